"""Requests to /mcp as bytes and headers, so that tests can send what no client would."""

from __future__ import annotations

import base64
import http.client
import json
from dataclasses import dataclass
from typing import Any

from tests.conftest import Running

MODERN = "2026-07-28"
VERSION = "io.modelcontextprotocol/protocolVersion"
CAPABILITIES = "io.modelcontextprotocol/clientCapabilities"
META: dict[str, Any] = {VERSION: MODERN, CAPABILITIES: {}}

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def result(self) -> dict[str, Any]:
        assert self.status == 200 and self.headers["content-type"] == "application/json", self
        assert set(self.json) == {"jsonrpc", "id", "result"} and self.json["jsonrpc"] == "2.0", self
        return self.json["result"]  # type: ignore[no-any-return]

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"jsonrpc", "id", "error"} and self.json["jsonrpc"] == "2.0", self
        return self.json["error"]  # type: ignore[no-any-return]

    @property
    def code(self) -> tuple[int, int]:
        """HTTP status and JSON-RPC code."""
        return self.status, self.error["code"]

    @property
    def events(self) -> list[dict[str, Any]]:
        assert self.status == 200 and self.headers["content-type"] == "text/event-stream", self
        frames = self.body.decode().split("\n\n")
        assert frames.pop() == ""
        lines = [frame.split("\n") for frame in frames]
        assert all(len(frame) == 2 and frame[0] == "event: message" for frame in lines), lines
        return [json.loads(frame[1].removeprefix("data: ")) for frame in lines]


def send(service: Running, body: Any, headers: Headers | None = None, verb: str = "POST", path: str = "/mcp") -> Answer:
    """One HTTP request; `body` is JSON unless it is bytes already. Only the headers that are given."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        connection.putrequest(verb, path, skip_accept_encoding=True)
        for name, value in [("Content-Length", str(len(content))), *(headers or [])]:
            connection.putheader(name, value.encode("latin-1"))
        connection.endheaders(content)
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def message(method: str, params: Any = None, request_id: Any = 1, **members: Any) -> dict[str, Any]:
    given = {} if params is None else {"params": params}
    return {"jsonrpc": "2.0", "id": request_id, "method": method, **given, **members}


def modern_message(method: str, params: dict[str, Any] | None = None, **members: Any) -> dict[str, Any]:
    params = params or {}
    return message(method, {**params, "_meta": {**META, **params.get("_meta", {})}}, **members)


def routing(method: str, name: str | None = None) -> Headers:
    """The headers that a modern client sends."""
    headers = [("MCP-Protocol-Version", MODERN), ("Mcp-Method", method)]
    return headers if name is None else [*headers, ("Mcp-Name", name)]


def modern(service: Running, method: str, params: dict[str, Any] | None = None, *more: tuple[str, str]) -> Answer:
    """A request of 2026-07-28 as it should be."""
    name = (params or {}).get("name")
    return send(service, modern_message(method, params), [*routing(method, name), *more])


def call(service: Running, tool: str, arguments: dict[str, Any] | None = None, **params: Any) -> Answer:
    return modern(service, "tools/call", {"name": tool, "arguments": arguments or {}, **params})


def legacy(service: Running, method: str, params: Any = None, version: str | None = "2025-11-25") -> Answer:
    """A request of an older version; None sends no header."""
    return send(service, message(method, params), [("MCP-Protocol-Version", version)] if version else [])


def legacy_call(service: Running, tool: str, arguments: dict[str, Any] | None = None) -> Answer:
    return legacy(service, "tools/call", {"name": tool, "arguments": arguments or {}})


def encoded(value: str) -> str:
    return f"=?base64?{base64.b64encode(value.encode()).decode()}?="
