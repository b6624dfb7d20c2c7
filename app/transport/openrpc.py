"""The OpenRPC document (https://spec.open-rpc.org) of the method table; `rpc.discover` serves it.

Every example in it can be sent as it stands, by name or by position, and its result fits the result's schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from app import __version__
from app.errors import REFUSALS, ErrorKind
from app.transport.methods import SERVICE_NAME, MethodSpec

Json = dict[str, Any]

OPENRPC_VERSION = "1.2.6"
"""The newest that @open-rpc/test-coverage takes; nothing of 1.3 is used, whose meta-schema takes this number too."""

REFERENCE = "#/components/schemas/{model}"

OPENRPC = {"type": "object", "title": "OpenRPC document", "required": ["openrpc", "info", "methods"]}

ECHO_SUMMARY = {
    "tool_id": "echo",
    "name": "Echo",
    "description": "Return the message.",
    "version": "1.0.0",
    "category": "utility",
    "tags": ["text", "test"],
    "capabilities": ["echo"],
}
ECHO_DETAIL = {
    **ECHO_SUMMARY,
    "parameters": {
        "type": "object",
        "properties": {
            "message": {"description": "Text to return", "maxLength": 10_000, "type": "string"},
            "uppercase": {"default": False, "description": "Return it in upper case", "type": "boolean"},
        },
        "required": ["message"],
        "additionalProperties": False,
    },
    "result": {
        "type": "object",
        "title": "EchoResult",
        "properties": {"message": {"type": "string"}},
        "required": ["message"],
    },
    "timeout_seconds": 5.0,
    "limits": {"max_concurrent": None},
    "flags": {"read_only": True, "idempotent": True, "destructive": False, "cancel_on_disconnect": False},
}
EXECUTION = {
    "execution_id": "01981c5e-7c1a-7000-8000-0123456789ab",
    "tool_id": "echo",
    "status": "success",
    "result": {"message": "Hello"},
    "error": None,
    "execution_time_ms": 0.05,
    "overhead_ms": 0.12,
    "timestamp": "2026-11-20T15:00:00.000Z",
    "attempts": 1,
    "cached": False,
    "trace_id": "01981c5e7c1a700080000123456789ab",
}
FAILED = {
    **EXECUTION,
    "execution_id": "01981c5e-7c1a-7000-8000-0123456789aa",
    "tool_id": "calculator",
    "status": "failed",
    "result": None,
    "error": {
        "code": "DIVISION_BY_ZERO",
        "category": "tool_error",
        "message": "Division by zero has no result",
        "retryable": False,
        "retry_after_ms": None,
    },
    "trace_id": "01981c5e7c1a700080000123456789aa",
}

_ECHO = {"tool_id": "echo", "parameters": {"message": "Hello"}}
_FAILING = {"tool_id": "calculator", "parameters": {"operation": "divide", "a": 1, "b": 0}}
_PLAN = [
    {"task_id": "first", **_ECHO},
    {
        "task_id": "second",
        "tool_id": "echo",
        "parameters": {"message": {"$from": "first", "path": "message"}},
        "dependencies": ["first"],
    },
]
EXAMPLES: dict[str, tuple[Json, Json]] = {
    "tools.list": (
        {"category": "utility", "tags": ["text"], "limit": 20},
        {"tools": [ECHO_SUMMARY], "count": 1, "next_cursor": None},
    ),
    "tools.get": ({"tool_id": "echo"}, ECHO_DETAIL),
    "tools.search": (
        {"name_query": "message", "limit": 5},
        {"tools": [ECHO_SUMMARY], "count": 1, "query": "message"},
    ),
    "tools.execute": (_ECHO, EXECUTION),
    "tools.execute_batch": (
        {"requests": [_ECHO, _FAILING], "max_concurrent": 2},
        {"results": [EXECUTION, FAILED], "successful_count": 1, "failed_count": 1, "total_time_ms": 0.4},
    ),
    "tools.execute_parallel": (
        {"tasks": _PLAN},
        {
            "results": {"first": EXECUTION, "second": EXECUTION},
            "execution_order": ["first", "second"],
            "successful_count": 2,
            "failed_count": 0,
            "total_time_ms": 0.4,
        },
    ),
    "tools.execute_with_fallback": (
        {"primary": _FAILING, "fallback": _ECHO},
        {"result": EXECUTION, "used_fallback": True, "attempts": [FAILED, EXECUTION], "total_time_ms": 0.4},
    ),
    "tools.cancel": ({"call_id": "greeting-1"}, {"cancelled": False}),
    "rpc.ping": ({}, {"pong": True}),
    "rpc.version": ({}, {"name": SERVICE_NAME, "version": __version__}),
}
"""Params and result by method. Ids and times of a result differ from run to run."""


def openrpc_document(table: Iterable[MethodSpec], public_url: str | None) -> Json:
    """Every method with its params, its result, an example of both, and the errors of this service."""
    table = list(table)
    schemas = schemas_of([spec.params for spec in table], [spec.result for spec in table if spec.result])
    return {
        "openrpc": OPENRPC_VERSION,
        "info": {"title": "AgentCore Tools", "version": __version__},
        "servers": [{"name": "this", "url": f"{public_url or 'http://127.0.0.1:8001'}/api/v1/jsonrpc"}],
        "methods": [_method(spec, schemas) for spec in table],
        "components": {"schemas": schemas},
    }


def schemas_of(taken: Iterable[type[BaseModel]], given: Iterable[type[BaseModel]]) -> Json:
    """JSON Schemas of what the service takes and of what it gives, by name of the model."""
    takes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in taken]
    gives: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "serialization") for model in given]
    _, components = models_json_schema([*takes, *gives], by_alias=False, ref_template=REFERENCE)
    schemas: Json = components["$defs"]
    return schemas


def _method(spec: MethodSpec, schemas: Json) -> Json:
    params = schemas[spec.params.__name__]
    required = set(params.get("required", ()))
    return {
        "name": spec.name,
        "summary": spec.summary,
        "paramStructure": "either",
        "params": [
            {"name": name, "required": name in required, "schema": schema}
            for name, schema in params.get("properties", {}).items()
        ],
        "result": {
            "name": "result",
            "schema": {"$ref": REFERENCE.format(model=spec.result.__name__)} if spec.result else OPENRPC,
        },
        "errors": [_error(kind) for kind in REFUSALS],
        "examples": _examples(spec),
    }


def _error(kind: ErrorKind) -> Json:
    data = {"error_type": kind.error_type, "retryable": kind.retryable}
    return {"code": kind.rpc_code, "message": kind.error_type, "data": data}


def _examples(spec: MethodSpec) -> list[Json]:
    """Clients send the values of an example by position, so what is left out before the last one is null."""
    if spec.name not in EXAMPLES:
        return []
    params, result = EXAMPLES[spec.name]
    names = list(spec.params.model_fields)
    given = max((names.index(name) + 1 for name in params), default=0)
    return [
        {
            "name": "plain",
            "params": [{"name": name, "value": params.get(name)} for name in names[:given]],
            "result": {"name": "result", "value": result},
        }
    ]
