"""Requests and a service for tests of the doors: the same by the protocol lane and by ASGI.

`which_door` tells by which way a call came, so that each test knows that the lane was really taken where it should be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tests.conftest import Running, start_service
from tests.servers import wait_until
from tests.transport.mcp_wire import META, MODERN
from tests.transport.raw_http import Peer, Response

RPC, MCP = b"/api/v1/jsonrpc", b"/mcp"
TOOLS = "tests.tools_for_tests,tests.transport.lane_tools"
DOORS = ("lane", "asgi")


def http(body: bytes, *headers: bytes, path: bytes = RPC, verb: bytes = b"POST", version: bytes = b"1.1") -> bytes:
    lines = (b"Host: 127.0.0.1", b"Content-Type: application/json", *headers, b"Content-Length: %d" % len(body))
    return b"%b %b HTTP/%b\r\n%b\r\n\r\n%b" % (verb, path, version, b"\r\n".join(lines), body)


def chunked(body: bytes) -> bytes:
    head = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n" % RPC
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def execute(tool_id: str, request_id: Any = 1, **parameters: Any) -> bytes:
    return rpc("tools.execute", {"tool_id": tool_id, "parameters": parameters}, request_id)


def rpc(method: str, params: Any = None, request_id: Any = 1) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params or {}}).encode()


def which(number: int = 0) -> bytes:
    """A call of which_door; all of them are of one length, so that they share a head."""
    return execute("which_door", f"{number:04}")


def mcp_call(tool: str, **arguments: Any) -> bytes:
    params = {"name": tool, "arguments": arguments, "_meta": META}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    routing = (b"MCP-Protocol-Version: " + MODERN.encode(), b"Mcp-Method: tools/call", b"Mcp-Name: " + tool.encode())
    return http(body, *routing, path=MCP)


@dataclass
class Door:
    """A service with the lane on or off, and connections to it."""

    running: Running
    name: str
    peers: list[Peer] = field(default_factory=list)

    def connect(self, receive_buffer_bytes: int = 0) -> Peer:
        self.peers.append(Peer(self.running.port, receive_buffer_bytes))
        return self.peers[-1]

    def taught(self, request: bytes) -> bytes:
        """The request, after it was answered once: from now on the lane knows its head."""
        assert self.connect().send(request).response().status < 500
        return request

    def hang_up(self) -> None:
        for peer in self.peers:
            peer.close()
        self.peers.clear()

    def turn(self) -> None:
        """Returns when the server has read what was sent before."""
        assert self.running.http.get("/livez").status_code == 200

    def answers(self, response: Response) -> bool:
        """Whether the answer to `which` came by this door."""
        return response.status == 200 and response.json["result"]["result"] == self.name

    def open(self, gate: str) -> None:
        self.running.execute("open_gate", {"gate": gate})

    def come(self, gate: str, count: int = 1) -> None:
        wait_until(lambda: self.running.execute("inside", {"gate": gate})["result"] >= count, f"{count} at {gate}")

    def rows(self, tool_id: str) -> dict[str, dict[str, Any]]:
        """The newest of the tool's rows that are written, by their ids."""
        found = self.running.rpc("tools.get_execution_history", {"tool_id": tool_id, "limit": 100})["result"]
        return {row["execution_id"]: row for row in found["executions"]}

    def rows_until_now(self, tool_id: str) -> set[str]:
        """Ids of the tool's calls that have ended."""
        wait_until(lambda: self.running.metric("execution_log_journal_bytes") == 0, "all rows are written")
        return set(self.rows(tool_id))

    def rows_since(self, before: set[str], tool_id: str, count: int = 1) -> list[dict[str, Any]]:
        """So many rows that were not there before."""
        found: list[dict[str, Any]] = []

        def are_there() -> bool:
            found[:] = [row for name, row in self.rows(tool_id).items() if name not in before]
            return len(found) >= count

        wait_until(are_there, f"{count} rows of {tool_id}")
        return found


def start_door(name: str, **environ: str) -> Door:
    lane = "true" if name == "lane" else "false"
    return Door(start_service(PROTOCOL_LANE=lane, TOOL_MODULES=TOOLS, **environ), name)
