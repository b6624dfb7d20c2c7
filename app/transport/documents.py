"""The OpenAPI document of the whole service, built once.

FastAPI contributes its routes; the shapes and the doors, which stand ahead of FastAPI, are added here: JSON-RPC from
the method table, MCP as `mcp_openapi.py` has it, the execute path of REST.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from app.access.keys import NewKey
from app.transport import docs_page, shapes
from app.transport.admin import CREATE_KEY, FORGET_RESULTS, GET_KEY, LIST_KEYS, REVOKE_KEY, Forgotten, KeyMade, KeyPage
from app.transport.examples import EXAMPLES, EXECUTION, OPENRPC, Json
from app.transport.executions import EXPORT_EXECUTIONS, GET_EXECUTION, LIST_EXECUTIONS
from app.transport.gate import open_paths, open_to_all
from app.transport.mcp import MCP_PATH
from app.transport.mcp_openapi import mcp_operation, mcp_schemas
from app.transport.methods import MethodSpec
from app.transport.openapi import (
    EXECUTE_REFUSALS,
    EXECUTE_TOOL,
    EXPORT_TOOLS,
    GET_LIMITS,
    GET_TOOL,
    LIST_TOOLS,
    RETRY_AFTER,
    reference,
    refusals,
    response,
)
from app.transport.openrpc import schemas_of
from app.transport.rest_door import EXECUTE_PATH
from app.transport.rpc import RPC_PATH

TAGS = [
    {"name": "json-rpc", "description": "The main door: every method, single or in a batch."},
    {"name": "mcp", "description": "The same tools for clients of the Model Context Protocol."},
    {"name": "tools", "description": "Discovery and calls in REST shape, over the same registry and executor."},
    {"name": "limits", "description": "What is left of rates and quotas, for the caller."},
    {"name": "executions", "description": "The log of your tenant."},
    {"name": "admin", "description": "Keys of all callers. Needs the scope `admin`."},
    {"name": "ops", "description": "What probes and Prometheus ask. Never needs a credential."},
    {"name": "documents", "description": "This description."},
]

DESCRIPTION = """\
A call that ran is answered with an Execution and HTTP status 200, whatever its own `status` says: that a tool failed is
a result. A call that was refused is an error, `{"error": {"code", "message", "data"}}`, on every REST path.

Any path can also answer before a route is reached: 400 or 505 to what is not HTTP/1.1, 403 to a foreign `Origin` or
`Host`, 408 to what comes too slowly, 413, 414 or 431 to a body, a URL or headers that are too large, 503 when large
bodies take the room for them or too many requests wait on one connection; and 405 with `Allow` to another method. A
connection too many is closed unanswered.
"""

ANSWERS = {
    each.id: each
    for each in (
        *(LIST_TOOLS, EXPORT_TOOLS, GET_TOOL, GET_LIMITS),
        *(LIST_EXECUTIONS, GET_EXECUTION, EXPORT_EXECUTIONS),
        *(LIST_KEYS, CREATE_KEY, GET_KEY, REVOKE_KEY, FORGET_RESULTS),
    )
}

REQUEST_ID = {"type": ["string", "number", "null"]}


def mount(app: FastAPI, table: Sequence[MethodSpec], public_url: str | None, *, always_asks: bool) -> None:
    """Add /openapi.json and /docs. Call it when every other route is there. `always_asks`: for a credential."""
    document_json = b""

    @open_to_all
    async def document(request: Request) -> Response:
        return Response(document_json, media_type="application/json")

    app.add_api_route(
        "/openapi.json",
        document,
        methods=["GET"],
        tags=["documents"],
        operation_id="getOpenApi",
        summary="This document",
        response_class=Response,
        responses={200: response("OpenAPI 3.1", {"type": "object"}), **refusals([403])},
    )
    docs_page.mount(app)
    document_json = orjson.dumps(openapi_document(app, table, public_url, always_asks=always_asks))


def openapi_document(app: FastAPI, table: Sequence[MethodSpec], public_url: str | None, *, always_asks: bool) -> Json:
    """Every route of the application, and the doors, the first of this table."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=DESCRIPTION,
        tags=TAGS,
        servers=[{"url": public_url or "/"}],
        routes=app.routes,
    )
    for item in document["paths"].values():
        for operation in item.values():
            if operation["operationId"] in ANSWERS:  # get_openapi leaves out whatever is null, in examples too
                answer = ANSWERS[operation["operationId"]]
                operation["responses"][str(answer.status)] = answer.answer
    paths = {RPC_PATH: {"post": _door(table)}, MCP_PATH: {"post": mcp_operation()}}
    for path, item in document["paths"].items():
        paths[path] = item
        if EXECUTE_PATH.startswith(path) and path.endswith("}"):
            paths[EXECUTE_PATH] = {"post": EXECUTE_TOOL.written("tools", EXECUTE_REFUSALS)}
    document["paths"] = paths
    _say_who_may(document, open_paths(app.routes))
    schemas = {**_shapes(table), **_envelopes(table), **mcp_schemas()}
    document["components"] = {"schemas": schemas, "securitySchemes": CREDENTIALS}
    document["security"] = [*({name: []} for name in CREDENTIALS), *([] if always_asks else [{}])]
    return document


CREDENTIALS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or a JWT where those are taken"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key, or a JWT"},
}


def _say_who_may(document: Json, open_to_all: frozenset[str]) -> None:
    """As the gate has it: whatever is not open needs a credential, and who gives one may be told to come back."""
    for path, item in document["paths"].items():
        for operation in item.values():
            if path in open_to_all:
                operation["security"] = []
            else:
                shape = "RpcResponse" if path == RPC_PATH else "Refused"
                asked = {str(status): answer for status, answer in refusals((401, 503), shape).items()}
                operation["responses"] = {**asked, **operation["responses"]}


def _shapes(table: Sequence[MethodSpec]) -> Json:
    taken: list[type[BaseModel]] = [NewKey, shapes.RestExecuteBody, *(spec.params for spec in table)]
    given: list[type[BaseModel]] = [KeyPage, KeyMade, Forgotten, shapes.ToolListing, shapes.ToolExport, shapes.Refused]
    return schemas_of(taken, [*given, *(spec.result for spec in table if spec.result)])


def _door(table: Sequence[MethodSpec]) -> Json:
    described = "\n".join(f"- `{spec.name}`: {spec.summary}" for spec in table)
    return {
        "tags": ["json-rpc"],
        "operationId": "callMethods",
        "summary": "JSON-RPC 2.0, single or batch",
        "description": f"{described}\n\n`rpc.discover` gives the same as an OpenRPC document.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"anyOf": [reference("RpcRequest"), _array_of("RpcRequest")]},
                    "examples": _door_examples(table),
                }
            },
        },
        "responses": {
            "200": response(
                "The result or the error of each request that has an id",
                {"anyOf": [reference("RpcResponse"), _array_of("RpcResponse")]},
                {"tools.execute": {"jsonrpc": "2.0", "result": EXECUTION, "id": 1}},
            ),
            "204": {"description": "There were only notifications: requests without an id"},
            "403": refusals([403])[403],
            **{str(status): answer for status, answer in refusals((408, 413), "RpcResponse").items()},
            "503": {
                **response(
                    "A call was refused because this replica shuts down",
                    {"anyOf": [reference("RpcResponse"), _array_of("RpcResponse")]},
                ),
                "headers": RETRY_AFTER,
            },
        },
    }


def _array_of(name: str) -> Json:
    return {"type": "array", "items": reference(name), "minItems": 1}


def _door_examples(table: Sequence[MethodSpec]) -> Json:
    single = {spec.name: _request(spec.name) for spec in table}
    others: Json = {
        "by position": {"jsonrpc": "2.0", "method": "tools.get", "params": ["echo"], "id": 1},
        "batch": [_request("tools.execute"), {**_request("rpc.ping"), "id": 2}],
    }
    examples: Json = {name: {"value": value} for name, value in (single | others).items()}
    examples["notification"] = {
        "summary": "No id: answers 204",
        "value": {"jsonrpc": "2.0", "method": "rpc.ping"},
        "x-status": 204,
    }
    return examples


def _request(method: str) -> Json:
    params, _ = EXAMPLES.get(method, ({}, {}))
    return {"jsonrpc": "2.0", "method": method, **({"params": params} if params else {}), "id": 1}


def _envelopes(table: Sequence[MethodSpec]) -> Json:
    """The JSON-RPC objects around params and results."""
    requests = {_request_name(spec): _request_schema(spec) for spec in table}
    results = [reference(spec.result.__name__) if spec.result else OPENRPC for spec in table]
    return {
        **requests,
        "RpcRequest": {
            "oneOf": [reference(name) for name in requests],
            "discriminator": {
                "propertyName": "method",
                "mapping": {spec.name: reference(_request_name(spec))["$ref"] for spec in table},
            },
        },
        "RpcResponse": {"oneOf": [reference("RpcResultResponse"), reference("RpcErrorResponse")]},
        "RpcResultResponse": _response_schema("result", {"anyOf": _distinct(results)}),
        "RpcErrorResponse": _response_schema("error", reference("RpcError")),
    }


def _request_name(spec: MethodSpec) -> str:
    """tools.execute_batch: ToolsExecuteBatchRequest."""
    return "".join(word.capitalize() for word in spec.name.replace(".", "_").split("_")) + "Request"


def _request_schema(spec: MethodSpec) -> Json:
    named = reference(spec.params.__name__)
    needed = any(each.is_required() for each in spec.params.model_fields.values())
    return {
        "type": "object",
        "title": spec.name,
        "description": spec.summary,
        "properties": {
            "jsonrpc": {"const": "2.0"},
            "method": {"const": spec.name},
            "params": {
                "description": "By name, or by position",
                "anyOf": [named, {"type": "array", "items": {}, "maxItems": len(spec.params.model_fields)}],
            },
            "id": {**REQUEST_ID, "description": "Comes back in the answer; without it there is none"},
            "a2a_context": {
                "type": ["object", "null"],
                "description": "source_agent, trace_id, session_id, metadata of a caller",
            },
        },
        "required": ["jsonrpc", "method", *(["params"] if needed else [])],
    }


def _response_schema(member: str, schema: Json) -> Json:
    return {
        "type": "object",
        "properties": {"jsonrpc": {"const": "2.0"}, member: schema, "id": REQUEST_ID},
        "required": ["jsonrpc", member, "id"],
        "additionalProperties": False,
    }


def _distinct(schemas: Iterable[Json]) -> list[Json]:
    kept: list[Json] = []
    for schema in schemas:
        if schema not in kept:
            kept.append(schema)
    return kept
