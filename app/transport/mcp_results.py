"""What /mcp answers, as JSON: definitions of tools, results of calls, and refusals that an agent is to read.

Written as bytes around the tool's own, which are JSON already. Knows both eras and their versions; no registry.
"""

from __future__ import annotations

from typing import Any

import orjson

from app import SERVICE, __version__
from app.calls import Execution
from app.errors import (
    DEPENDENCY_UNAVAILABLE,
    IDEMPOTENCY_CONFLICT,
    INVALID_PARAMS,
    OVERLOADED,
    QUOTA,
    RATE_LIMIT,
    Failure,
    ToolServiceError,
)
from app.tools.tool import Tool
from app.transport.mcp_protocol import BEFORE_2025_06_18, Routing

META_EXECUTION_ID = "io.agentcore/execution_id"

FOR_THE_AGENT = frozenset({RATE_LIMIT, QUOTA, OVERLOADED, DEPENDENCY_UNAVAILABLE, IDEMPOTENCY_CONFLICT})
"""Refusals of a call that its agent can wait out: results for it to read, where an error would go to its client."""

SERVER_INFO = orjson.dumps({"name": SERVICE, "version": __version__})
_META = b'"_meta":{"io.modelcontextprotocol/serverInfo":%b' % SERVER_INFO


def definition(tool: Tool, *, modern: bool) -> dict[str, Any]:
    """A tool as MCP has it. The hints are always there, for their defaults say that a tool destroys."""
    spec = tool.spec
    title = spec.title or spec.name
    described: dict[str, Any] = {
        "name": spec.id,
        "title": title,
        "description": spec.description,
        "inputSchema": tool.parameters.json_schema,
    }
    schema = tool.result.json_schema
    if schema is not None and tool.result.is_object:  # some clients drop the whole list over a schema of another root
        described["outputSchema"] = schema if modern else _or_refused(schema)
    described["annotations"] = {
        "title": title,
        "readOnlyHint": spec.read_only,
        "destructiveHint": spec.destructive,
        "idempotentHint": spec.idempotent or spec.read_only,
    }
    return described


def _or_refused(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, which a refusal passes too. The TypeScript SDK up to 1.x, which speaks the legacy era, checks
    the structured content of errors against it and throws: its agent would never read when to come back. What the tool
    itself may return under that name goes on passing."""
    others = schema.get("additionalProperties", True)
    if type(others) is not bool or not schema.keys() <= _SIMPLE:
        return _wrapped(schema)
    properties, needed = schema.get("properties", {}), schema.get("required", [])
    own = properties.get("error", others)
    widened = {name: value for name, value in schema.items() if name != "required"}
    if own is not True:
        widened["properties"] = {**properties, "error": {"anyOf": [own, _REFUSAL_SCHEMA]} if own else _REFUSAL_SCHEMA}
    if needed:
        widened["anyOf"] = [{"required": needed}, _REFUSED]
    return widened


def _wrapped(schema: dict[str, Any]) -> dict[str, Any]:
    """For what binds every property. Definitions stay at the root, which references start from."""
    root = {name: value for name, value in schema.items() if name in _OF_ROOT}
    rest = {name: value for name, value in schema.items() if name not in _OF_ROOT}
    return {**root, "type": "object", "anyOf": [rest, _REFUSED]}


_SIMPLE = frozenset(("$defs", "additionalProperties", "description", "properties", "required", "title", "type"))
_OF_ROOT = frozenset(("$defs", "$id", "$schema"))
_REFUSAL_SCHEMA = {"type": "object", "description": "Instead of a result, where the call was refused"}
_REFUSED = {"properties": {"error": {"type": "object"}}, "required": ["error"]}


def finished(result: bytes, *, modern: bool) -> bytes:
    """A result, an object that is not empty, with what the modern era adds to each."""
    return b'{"resultType":"complete",%b,%b}}' % (result[1:-1], _META) if modern else result


def rendered(execution: Execution, tool: Tool, routing: Routing, *, modern: bool) -> bytes:
    """A run as a result: blocks as they are, data as JSON text, and as structure where its schema was published."""
    result = execution.result
    if result is None:
        assert execution.error is not None
        return failed(_reason(execution.error), modern, execution.execution_id)
    if tool.result.are_contents:
        blocks = result if result[:1] == b"[" else b"[%b]" % result
        if not modern and routing.version in BEFORE_2025_06_18:
            blocks = _without_links(blocks)
        return _result(b'"content":%b,"isError":false' % blocks, modern, execution.execution_id)
    text = result if result[:1] == b'"' else _quoted(result)
    structured = b'"structuredContent":%b,' % result if tool.result.is_object else b""
    return _result(
        b'"content":[{"type":"text","text":%b}],%b"isError":false' % (text, structured), modern, execution.execution_id
    )


def _without_links(blocks: bytes) -> bytes:
    """Links as text: SDKs of revisions that have none throw a result away for one, and the tool has run."""
    if b'"resource_link"' not in blocks:
        return blocks
    return orjson.dumps([_as_text(each) if each["type"] == "resource_link" else each for each in orjson.loads(blocks)])


def _as_text(link: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "text", "text": f"{link['name']}: {link['uri']}"}
    return {**text, "annotations": link["annotations"]} if "annotations" in link else text


def _quoted(document: bytes) -> bytes:
    """JSON as a JSON string: written by us, so without control characters."""
    return b'"%b"' % document.replace(b"\\", b"\\\\").replace(b'"', b'\\"')


def _result(members: bytes, modern: bool, execution_id: str) -> bytes:
    if modern:
        return b'{"resultType":"complete",%b,%b,"%b":"%b"}}' % (members, _META, _EXECUTION_ID, execution_id.encode())
    return b'{%b,"_meta":{"%b":"%b"}}' % (members, _EXECUTION_ID, execution_id.encode())


_EXECUTION_ID = META_EXECUTION_ID.encode()


def failed(text: str, modern: bool, execution_id: str) -> bytes:
    """A call that came to nothing, with what its agent can do about it."""
    return _result(b'"content":[{"type":"text","text":%b}],"isError":true' % orjson.dumps(text), modern, execution_id)


def refused(refusal: ToolServiceError, *, modern: bool) -> bytes:
    """A refusal as a result that the agent can act on; raised again where it is the client's to act."""
    execution_id = refusal.execution_id or ""
    if refusal.kind == INVALID_PARAMS:
        return failed(advice(refusal), modern, execution_id)
    if refusal.kind not in FOR_THE_AGENT:
        raise refusal
    error = orjson.dumps({"error": refusal.as_error()})
    members = b'"content":[{"type":"text","text":%b}],"structuredContent":%b,"isError":true' % (_quoted(error), error)
    return _result(members, modern, execution_id)


def advice(refusal: ToolServiceError) -> str:
    """What is wrong with the arguments, for who wrote them."""
    found = refusal.data.get("errors", ())
    wrong = "; ".join(f"{each['path']}: {each['message']}" if each["path"] else each["message"] for each in found)
    return f"The arguments do not fit: {wrong or refusal.message}. Mend them and call again."


def _reason(error: Failure) -> str:
    """Why a run failed, and whether to try again."""
    if error.retry_after_ms is not None:
        return f"{error.message} [{error.code}; may be tried again in {error.retry_after_ms} ms]"
    return f"{error.message} [{error.code}{'; may be tried again' if error.retryable else ''}]"
