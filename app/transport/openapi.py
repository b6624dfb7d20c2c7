"""What routes say of themselves, in the words of OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.1).

`documents.py` makes the document of it. Every request example is executed by a test: an example that cannot be pasted
is a defect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.transport import shapes
from app.transport.examples import ECHO_SUMMARY, EXECUTION, Json
from app.transport.openrpc import REFERENCE

REFUSED_BECAUSE = {
    400: "The body is not JSON that this service takes",
    401: "No credential where one is needed, or one that is not good",
    403: "A foreign Origin or Host, or a missing scope",
    404: "No such thing, or none that you may see",
    408: "The body did not arrive in time",
    409: "The first call with this idempotency key still runs; `data.retryable` says whether to come back",
    413: "The body is too large",
    414: "The URL is too long",
    422: "A parameter does not fit; `data.errors` says which and why",
    429: "A rate limit or quota; `data.rule` names it, come back after `Retry-After` seconds",
    500: "A defect of this service; the log has the rest",
    503: "Overloaded, shutting down, or what is needed is away; come back after `Retry-After` seconds",
}
CHALLENGE = {"WWW-Authenticate": {"description": "Bearer", "schema": {"type": "string"}}}
RETRY_AFTER = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}}

RATE_LIMIT = {
    "RateLimit-Limit": {"description": "What the tightest limit allows", "schema": {"type": "integer"}},
    "RateLimit-Remaining": {"description": "What it has left", "schema": {"type": "integer", "minimum": 0}},
    "RateLimit-Reset": {"description": "Seconds until all of it is there", "schema": {"type": "integer", "minimum": 0}},
}


def reference(name: str) -> Json:
    return {"$ref": REFERENCE.format(model=name)}


def response(description: str, schema: Json, examples: Mapping[str, Any] | None = None) -> Json:
    content: Json = {"schema": schema}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"description": description, "content": {"application/json": content}}


def refusals(statuses: Iterable[int], shape: str = "Refused") -> dict[int | str, Json]:
    """Responses in the one shape of errors."""
    written: dict[int | str, Json] = {
        status: response(REFUSED_BECAUSE[status], reference(shape)) for status in sorted(statuses)
    }
    if 401 in written:
        written[401]["headers"] = CHALLENGE
    if 503 in written:
        written[503]["headers"] = RETRY_AFTER
    if 429 in written:
        written[429]["headers"] = {**RETRY_AFTER, **RATE_LIMIT}
    return written


def query_parameters(shape: type[shapes.Params], examples: Mapping[str, Any]) -> list[Json]:
    """Parameters of a query from its shape; a query has no null, so what is optional is left out instead."""
    properties = shape.model_json_schema()["properties"]
    return [_query_parameter(name, schema, examples.get(name)) for name, schema in properties.items()]


def _query_parameter(name: str, schema: Json, example: Any) -> Json:
    optional = "anyOf" in schema
    if optional:
        (plain,) = (branch for branch in schema["anyOf"] if branch.get("type") != "null")
    else:
        plain = {key: value for key, value in schema.items() if key != "description"}
    described = {"description": schema["description"], "schema": plain}
    parameter = {"name": name, "in": "query", "required": not optional, **described}
    return parameter if example is None else {**parameter, "example": example}


TOOL_ID = {
    "name": "tool_id",
    "in": "path",
    "required": True,
    "description": "Id of the tool, as the list gives it",
    "schema": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_-]{0,63}$"},
    "example": "echo",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """What a route of REST says of itself."""

    id: str
    summary: str
    description: str
    answer: Json
    extra: Json = field(default_factory=dict)
    status: int = 200

    def described(self, statuses: Iterable[int]) -> dict[str, Any]:
        """Keyword arguments for FastAPI's `add_api_route`."""
        return {
            "operation_id": self.id,
            "summary": self.summary,
            "description": self.description,
            "status_code": self.status,
            "responses": {self.status: self.answer, **refusals(statuses)},
            "openapi_extra": self.extra,
        }

    def written(self, tag: str, statuses: Iterable[int]) -> Json:
        """The operation as OpenAPI has it, for a route that is none of FastAPI's."""
        answers = {self.status: self.answer, **refusals(statuses)}
        return {
            "tags": [tag],
            "operationId": self.id,
            "summary": self.summary,
            "description": self.description,
            **self.extra,
            "responses": {str(status): answer for status, answer in answers.items()},
        }


LIST_TOOLS = Operation(
    "listTools",
    "Tools, in pages or by words",
    "In the order of ids, page by page; with `query` one page, best match first, whose `next_cursor` is null.",
    response(
        "The tools",
        reference("ToolListing"),
        {"search": {"tools": [ECHO_SUMMARY], "count": 1, "query": "message", "next_cursor": None}},
    ),
    {
        "parameters": query_parameters(
            shapes.ToolsQuery, {"query": "message", "category": "utility", "tag": ["text"], "limit": 20}
        )
    },
)
EXPORT_TOOLS = Operation(
    "exportTools",
    "Tools as a model provider takes them",
    "`tools` goes to the provider as it is; what the model calls goes to the execute path of the tool of that name.",
    response("The definitions", reference("ToolExport")),
    {"parameters": query_parameters(shapes.ExportQuery, {"format": "openai", "category": "utility"})},
)
GET_TOOL = Operation(
    "getTool",
    "One tool with its schemas",
    "`parameters` and `result` are JSON Schema 2020-12: what an execute request must hold, and what comes back.",
    response("The tool", reference("ToolDetail")),
    {"parameters": [TOOL_ID]},
)
_RATE = {"limit": 600, "remaining": 598, "reset_at": "2026-11-20T15:00:00.200Z", "window_seconds": 60.0}
_DAILY = {"limit": 10_000, "used": 2, "remaining": 9_998, "reset_at": "2026-11-21T00:00:00.000Z"}
_MONTHLY = {"limit": 200_000, "used": 52, "remaining": 199_948, "reset_at": "2026-12-01T00:00:00.000Z"}
LIMITS_LEFT = {
    "tool_id": "echo",
    "cost": 1,
    "rate_limit": _RATE,
    "quota": {"daily": _DAILY, "monthly": _MONTHLY},
    "policies": [
        {"rule": "search-free", "kind": "rate", **_RATE, "burst": 600},
        {"rule": "search-free", "kind": "daily", **_DAILY},
        {"rule": "search-free", "kind": "monthly", **_MONTHLY},
    ],
}
GET_LIMITS = Operation(
    "getLimits",
    "What is left of each limit of a tool",
    "For the caller, and only what is enforced. Asking costs nothing.",
    response(
        "What is left",
        reference("LimitStatus"),
        {"a rate and two quotas": LIMITS_LEFT},
    ),
    {"parameters": [TOOL_ID]},
)
EXECUTE_REFUSALS = (400, 403, 404, 408, 409, 413, 414, 422, 429, 500, 503)
EXECUTE_TOOL = Operation(
    "executeTool",
    "Run a tool",
    "`parameters` must fit the schema that the tool's own path gives. No body means no arguments.",
    response("What came of the call, also when the tool failed", reference("Execution"), {"success": EXECUTION}),
    {
        "parameters": [TOOL_ID],
        "requestBody": {
            "content": {
                "application/json": {
                    "schema": reference("RestExecuteBody"),
                    "examples": {
                        "plain": {"value": {"parameters": {"message": "Hello"}}},
                        "labelled": {
                            "value": {
                                "parameters": {"message": "Hello", "uppercase": True},
                                "agent_id": "planner",
                                "execution_context": {"trace_id": "trace-1", "session_id": "session-1"},
                                "timeout_override": 2.5,
                                "call_id": "greeting-1",
                            }
                        },
                    },
                }
            }
        },
    },
)
