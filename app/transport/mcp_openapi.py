"""What POST /mcp says of itself in the OpenAPI document: the envelope, the routing headers, the statuses.

MCP describes its own tools; nobody generates a client of it from this. Every example is executed by a test.
"""

from __future__ import annotations

from typing import Any

from app.transport.examples import Json
from app.transport.mcp_protocol import MODERN_VERSION, SERVED_VERSIONS
from app.transport.openapi import CHALLENGE, REFUSED_BECAUSE, RETRY_AFTER, reference, response

RESPONSE = "McpResponse"

_ECHO = {"name": "echo", "arguments": {"message": "Hello"}}
_OPENING = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "example", "version": "1.0.0"},
}
_CALLED = {
    "content": [{"type": "text", "text": '{"message":"Hello"}'}],
    "structuredContent": {"message": "Hello"},
    "isError": False,
    "_meta": {"io.agentcore/execution_id": "01981c5e-7c1a-7000-8000-0123456789ab"},
}


def mcp_operation() -> Json:
    """The door, as an operation of OpenAPI."""
    return {
        "tags": ["mcp"],
        "operationId": "callMcp",
        "summary": "Model Context Protocol over Streamable HTTP",
        "description": (
            f"Versions {', '.join(SERVED_VERSIONS)}; no session is kept. The examples are those of the older versions, "
            "which need no headers. With a `progressToken`, progress comes as server-sent events, the response last."
        ),
        "parameters": [
            _header("MCP-Protocol-Version", "Of this message; without it the era before versions had headers"),
            _header("Mcp-Method", f"The body's method; from {MODERN_VERSION} on"),
            _header("Mcp-Name", f"The body's `params.name`, on `tools/call`; from {MODERN_VERSION} on"),
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"anyOf": [reference("McpRequest"), _array_of("McpRequest")]},
                    "examples": _examples(),
                }
            },
        },
        "responses": _responses(),
    }


def mcp_schemas() -> Json:
    """The envelopes. What is in `params` and `result` is for the specification of MCP to say."""
    error = {
        "type": "object",
        "properties": {"code": {"type": "integer"}, "message": {"type": "string"}, "data": {"type": "object"}},
        "required": ["code", "message"],
    }
    return {
        "McpRequest": {
            "type": "object",
            "title": "MCP request or notification",
            "properties": {
                "jsonrpc": {"const": "2.0"},
                "method": {"type": "string"},
                "params": {"type": "object"},
                "id": {"type": ["string", "integer"], "description": "Without it: a notification, which runs nothing"},
            },
            "required": ["jsonrpc", "method"],
        },
        RESPONSE: {"oneOf": [reference("McpResultResponse"), reference("McpErrorResponse")]},
        "McpResultResponse": _envelope("result", {"type": "object"}),
        "McpErrorResponse": _envelope("error", error),
    }


def _header(name: str, description: str) -> Json:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": {"type": "string"}}


def _array_of(name: str) -> Json:
    return {"type": "array", "items": reference(name), "minItems": 1}


def _envelope(member: str, schema: Json) -> Json:
    return {
        "type": "object",
        "properties": {"jsonrpc": {"const": "2.0"}, "id": {"type": ["string", "integer", "null"]}, member: schema},
        "required": ["jsonrpc", "id", member],
        "additionalProperties": False,
    }


def _examples() -> Json:
    requests: dict[str, Any] = {
        "initialize": _request("initialize", _OPENING),
        "tools/list": _request("tools/list", {}),
        "tools/call": _request("tools/call", _ECHO),
        "batch": [_request("ping", {}), {**_request("tools/call", _ECHO), "id": 2}],
    }
    examples: Json = {name: {"value": value} for name, value in requests.items()}
    examples["notification"] = {
        "summary": "No id: answers 202",
        "value": {"jsonrpc": "2.0", "method": "notifications/initialized"},
        "x-status": 202,
    }
    return examples


def _request(method: str, params: Json) -> Json:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


def _responses() -> Json:
    answered = {"anyOf": [reference(RESPONSE), _array_of(RESPONSE)]}
    result = response("The result, or the error, of each request", answered, {"tools/call": _answer(_CALLED)})
    result["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    one = reference(RESPONSE)
    refused = {
        "400": response("The message, its headers or its version are not what MCP asks for", one),
        "403": response(REFUSED_BECAUSE[403], {"anyOf": [reference("Refused"), one]}),
        "404": response("A method that there is not, from the newest version on", one),
        **{str(status): response(REFUSED_BECAUSE[status], one) for status in (408, 413)},
        "503": {**response(REFUSED_BECAUSE[503], answered), "headers": RETRY_AFTER},
    }
    return {
        "200": result,
        "202": {"description": "There were only notifications and responses"},
        "401": {"description": REFUSED_BECAUSE[401], "headers": CHALLENGE},
        **refused,
    }


def _answer(result: Json) -> Json:
    return {"jsonrpc": "2.0", "id": 1, "result": result}
