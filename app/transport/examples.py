"""Requests that work when pasted, and what comes of them: the examples of the OpenRPC and the OpenAPI document.

Tests send every one of them and hold the answers to the documented schemas.
"""

from __future__ import annotations

from typing import Any

from app import SERVICE, __version__

Json = dict[str, Any]

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
ECHO_DETAIL: dict[str, Any] = {
    **ECHO_SUMMARY,
    "title": None,
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
    "limits": {"max_concurrent": None, "rate_limits": [], "quotas": {}, "cost": 1},
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
    "tools.get_execution_history": ({"tool_id": "echo", "status": "failed"}, {"executions": [], "next_cursor": None}),
    "tools.get_rate_limit_status": (
        {"tool_id": "echo"},
        {"tool_id": "echo", "cost": 1, "rate_limit": None, "quota": None, "policies": []},
    ),
    "rpc.ping": ({}, {"pong": True}),
    "rpc.version": ({}, {"name": SERVICE, "version": __version__}),
}
"""Params and result by method. Ids and times of a result differ from run to run."""
