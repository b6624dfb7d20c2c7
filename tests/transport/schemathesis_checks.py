"""Checks that schemathesis makes of every answer, in place of those that schemathesis.toml has to relax."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis.core.transport import Response

JSON = "application/json"
INVALID_REQUEST, PARSE_ERROR, METHOD_NOT_FOUND = -32600, -32700, -32601


def operation(case: schemathesis.Case, response: Response) -> str | None:
    """The id of the operation that this case is about; None where it tries another method or media type."""
    sent = response.request
    another = sent.method != case.operation.method.upper() or sent.headers.get("Content-Type", JSON) != JSON
    return None if another or case.meta is None else case.operation.definition.raw.get("operationId")


def is_positive(case: schemathesis.Case) -> bool:
    return case.meta.generation.mode.is_positive


@schemathesis.check
def valid_query_is_refused_for_its_cursor_alone(ctx: Any, response: Response, case: schemathesis.Case) -> None:
    if operation(case, response) == "listTools" and is_positive(case) and response.status_code == 422:
        assert {each["path"] for each in response.json()["error"]["data"]["errors"]} == {"cursor"}


@schemathesis.check
def valid_body_is_refused_by_the_tool_alone(ctx: Any, response: Response, case: schemathesis.Case) -> None:
    """By its schema, or for an integer among its free-form arguments that passes 64 bits."""
    if operation(case, response) != "executeTool" or not is_positive(case):
        return
    if response.status_code == 422:
        assert "execution_id" in response.json()["error"]["data"]
    if response.status_code == 400:
        assert "64 bits" in response.json()["error"]["message"]


@schemathesis.check
def door_accepts_what_is_valid(ctx: Any, response: Response, case: schemathesis.Case) -> None:
    """A request that fits the document gets to its method; what that thinks of it is another matter."""
    if operation(case, response) != "callMethods" or not is_positive(case) or response.status_code != 200:
        return
    for error in errors(response):
        big = "64 bits" in error["message"] or "at most" in error["message"]
        assert big or error["code"] not in {INVALID_REQUEST, PARSE_ERROR, METHOD_NOT_FOUND}, error


@schemathesis.check
def door_refuses_what_is_invalid(ctx: Any, response: Response, case: schemathesis.Case) -> None:
    if operation(case, response) == "callMethods" and not is_positive(case) and response.status_code == 200:
        assert errors(response), "accepted"


def errors(response: Response) -> list[dict[str, Any]]:
    answer = response.json()
    return [each["error"] for each in (answer if isinstance(answer, list) else [answer]) if "error" in each]
