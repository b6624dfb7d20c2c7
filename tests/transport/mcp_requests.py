"""Heads and bodies for /mcp, right and wrong, to be sent each with each.

Bodies are padded to one length, so that each comes under heads that the lane has learned from others.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any

from tests.transport.mcp_wire import CAPABILITIES, META, MODERN, VERSION, Headers, encoded, message, modern_message

BODY_BYTES = 700

ECHO = {"name": "echo", "arguments": {"message": "hi"}}
MIRRORED = {"name": "mirrored_parameters", "arguments": {"region": "eu"}}
PROGRESS = {"name": "test_tool_with_progress", "_meta": {"progressToken": "p"}}
CALL: Headers = [("MCP-Protocol-Version", MODERN), ("Mcp-Method", "tools/call")]
LIST: Headers = [("MCP-Protocol-Version", MODERN), ("Mcp-Method", "tools/list")]

HEADS: dict[str, Headers] = {
    "none": [],
    **{version: [("MCP-Protocol-Version", version)] for version in ("2025-11-25", "2025-06-18", "2025-03-26")},
    "version of nobody": [("MCP-Protocol-Version", "2099-01-01")],
    "version twice": [("MCP-Protocol-Version", "2025-11-25")] * 2,
    "modern version alone": CALL[:1],
    "echo": [*CALL, ("Mcp-Name", "echo")],
    "echo in base64": [*CALL, ("Mcp-Name", encoded("echo"))],
    "echo, not canonical": [*CALL, ("Mcp-Name", "=?base64?ZWNobx==?=")],
    "echo, padded": [(name, f"\t{value} ") for name, value in [*CALL, ("Mcp-Name", "echo")]],
    "echo, other case": [(name.upper(), value) for name, value in [*CALL, ("Mcp-Name", "echo")]],
    "echo twice": [*CALL, *[("Mcp-Name", "echo")] * 2],
    "Echo": [*CALL, ("Mcp-Name", "Echo")],
    "unknown": [*CALL, ("Mcp-Name", "no_such_tool")],
    "no name": CALL,
    "mirrored": [*CALL, ("Mcp-Name", "mirrored_parameters"), ("Mcp-Param-Region", "eu")],
    "mirrored otherwise": [*CALL, ("Mcp-Name", "mirrored_parameters"), ("Mcp-Param-Region", "us")],
    "not mirrored": [*CALL, ("Mcp-Name", "mirrored_parameters")],
    "progress": [*CALL, ("Mcp-Name", "test_tool_with_progress")],
    "progress, JSON only": [*CALL, ("Mcp-Name", "test_tool_with_progress"), ("Accept", "application/json")],
    "legacy, JSON only": [("MCP-Protocol-Version", "2025-06-18"), ("Accept", "application/json")],
    "session": [*CALL, ("Mcp-Name", "echo"), ("Mcp-Session-Id", "s"), ("Last-Event-ID", "1")],
    "list": LIST,
    "list with a name": [*LIST, ("Mcp-Name", "echo")],
    "discover": [LIST[0], ("Mcp-Method", "server/discover")],
    "unknown method": [LIST[0], ("Mcp-Method", "no/such")],
    "no JSON": [*CALL, ("Mcp-Name", "echo"), ("Content-Type", "text/plain")],
    "own origin": [*CALL, ("Mcp-Name", "echo"), ("Origin", "http://127.0.0.1")],
    "foreign origin": [*CALL, ("Mcp-Name", "echo"), ("Origin", "https://evil.example")],
}

BODIES: dict[str, Any] = {
    "modern echo": modern_message("tools/call", ECHO),
    "modern echo, other id": modern_message("tools/call", ECHO, request_id="ü"),
    "modern unknown tool": modern_message("tools/call", {"name": "no_such_tool"}),
    "modern without a name": modern_message("tools/call", {}),
    "modern mirrored": modern_message("tools/call", MIRRORED),
    "modern progress": modern_message("tools/call", PROGRESS),
    "modern wrong arguments": modern_message("tools/call", {"name": "echo", "arguments": {"message": 5}}),
    "modern malformed arguments": modern_message("tools/call", {"name": "echo", "arguments": []}),
    "modern list": modern_message("tools/list"),
    "modern list, bad cursor": modern_message("tools/list", {"cursor": 5}),
    "modern discover": modern_message("server/discover"),
    "modern unknown method": modern_message("no/such"),
    "modern initialize": modern_message("initialize", {"protocolVersion": "2025-11-25"}),
    "modern notification": {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"_meta": META}},
    "no capabilities": message("tools/call", {**ECHO, "_meta": {VERSION: MODERN}}),
    "legacy version in meta": message("tools/call", {**ECHO, "_meta": {VERSION: "2025-11-25", CAPABILITIES: {}}}),
    "version of nobody": message("tools/call", {**ECHO, "_meta": {VERSION: "2099-01-01", CAPABILITIES: {}}}),
    "initialize": message("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}}),
    "ping": message("ping"),
    "echo": message("tools/call", ECHO),
    "progress": message("tools/call", PROGRESS),
    "list": message("tools/list"),
    "failing tool": message("tools/call", {"name": "fail_clearly"}),
    "notification": {"jsonrpc": "2.0", "method": "notifications/initialized"},
    "response": {"jsonrpc": "2.0", "id": 1, "result": {}},
    "batch": [message("ping"), message("tools/call", ECHO, request_id=2)],
    "batch of modern": [modern_message("tools/list")],
    "empty batch": [],
    "id null": {**message("ping"), "id": None},
    "id fraction": modern_message("tools/call", ECHO, request_id=1.0),
    "envelope": {**message("ping"), "jsonrpc": "1.0"},
    "params": message("ping", []),
    "no object": 5,
    "no JSON": b"{",
    "not UTF-8": b'"\xff"',
    "NaN": b'{"jsonrpc":"2.0","id":NaN}',
}

CHANGING = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}|(?<=date: )[^\r]+")
"""Ids of executions, and the time."""


class Line:
    """One connection, opened anew when the service closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._unread = b""

    def send(self, *pieces: bytes) -> bytes:
        """The whole response, its chunks put together."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=30)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._unread = b""
        for piece in pieces:
            self._socket.sendall(piece)
        head = self._until(b"\r\n\r\n")
        lines = head.lower()
        if b"transfer-encoding: chunked" in lines:
            body = b"".join(iter(self._chunk, b""))
        else:
            found = re.search(rb"content-length: (\d+)", lines)
            body = self._take(int(found[1]) if found else 0)
        if b"connection: close" in lines:
            self.close()
        return head + body

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _chunk(self) -> bytes:
        size = int(self._until(b"\r\n"), 16)
        return self._take(size + 2)[:-2]

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._unread:
            self._read()
        found, _, self._unread = self._unread.partition(mark)
        return found + mark

    def _take(self, count: int) -> bytes:
        while len(self._unread) < count:
            self._read()
        taken, self._unread = self._unread[:count], self._unread[count:]
        return taken

    def _read(self) -> None:
        assert self._socket is not None
        read = self._socket.recv(65_536)
        assert read, "closed in the middle of an answer"
        self._unread += read


def head_of(headers: Headers, credential: str | None, body_bytes: int = BODY_BYTES) -> bytes:
    given = [*headers, *([("Authorization", credential)] if credential else [])]
    lines = "".join(f"{name}: {value}\r\n" for name, value in given)
    return f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}Content-Length: {body_bytes}\r\n\r\n".encode()


def body_of(body: Any) -> bytes:
    return (body if isinstance(body, bytes) else json.dumps(body).encode()).ljust(BODY_BYTES)
