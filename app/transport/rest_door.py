"""The REST shape of a call: POST /api/v1/tools/{tool_id}/execute, ahead of FastAPI's router.

FastAPI serves every other REST route; there, with its telemetry, a call costs several times as much
(docs/adr/0027-rest-door.md). Knows no tool.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import orjson
from starlette.requests import Request

from app.errors import DRAINING, InternalError, ToolServiceError
from app.telemetry.http_requests import HttpRequests
from app.transport.allowance import limit_lines, retry_after_s
from app.transport.calling import SCOPE_EXECUTE, require_scope
from app.transport.door import (
    CLOSE_LINE,
    Door,
    Replied,
    Reply,
    Scope,
    Send,
    Steps,
    header_key,
    json_headers,
    json_reply,
    respond,
)
from app.transport.jsonrpc import decode
from app.transport.methods import Methods, PlainExecute
from app.transport.request import RequestContext
from app.transport.rest import read_query, validated, wrong_method
from app.transport.shapes import NoParams, RestExecuteBody

EXECUTE_PATH = "/api/v1/tools/{tool_id}/execute"
_BEFORE, _AFTER = EXECUTE_PATH.split("{tool_id}")


def tool_id_in(path: str) -> str:
    """The tool that an execute path names; empty where it is no such path."""
    if not (path.startswith(_BEFORE) and path.endswith(_AFTER)):
        return ""
    tool_id = path[len(_BEFORE) : -len(_AFTER)]
    return "" if "/" in tool_id else tool_id


class RestDoor(Door):
    """An Execution is 200 whatever its status; a refusal is `{"error": …}` with a status of its own."""

    reads_headers = False

    def __init__(self, methods: Methods, requests: HttpRequests, *shared: Any) -> None:
        super().__init__(*shared)
        self._methods = methods
        self._requests = requests

    def check(self, context: RequestContext, scope: Scope) -> None:
        self._expect_scope(context, scope)
        if scope["query_string"]:  # the lane takes no request that has one
            read_query(Request(scope), NoParams)

    def _expect_scope(self, context: RequestContext, scope: Scope) -> None:
        context.route, context.scheme = EXECUTE_PATH, scope["scheme"]
        require_scope(context.caller, SCOPE_EXECUTE)

    def begin(self, body: bytes, context: RequestContext, scope: Scope, then: Replied) -> Steps | None:
        tool_id = tool_id_in(scope["path"])

        def ended(result: bytes | Exception) -> None:
            then(self._replied(result, context, len(body)))

        try:
            self._expect_scope(context, scope)
            asked = decode(body) if body else {}
            parameters = asked.get("parameters") if type(asked) is dict and len(asked) == 1 else None
            params: Any
            if type(parameters) is dict:
                params = PlainExecute(tool_id, parameters)
                if self._methods.begin_execute(context, params, ended):
                    return None
            else:
                params = validated(RestExecuteBody, asked, strict=True)
        except Exception as error:
            ended(error)
            return None
        return self._executed(tool_id, params, context, len(body))

    def begin_asgi(self, body: bytes, context: RequestContext, scope: Scope, send: Send, then: Replied) -> Steps | None:
        context.idempotency_key = header_key(scope["headers"])
        return self.begin(body, context, scope, then)

    async def _executed(self, tool_id: str, params: Any, context: RequestContext, request_bytes: int) -> Reply:
        result: bytes | Exception
        try:
            result = await self._methods.execute(context, tool_id, params)
        except Exception as error:
            result = error
        return self._replied(result, context, request_bytes)

    def _replied(self, result: bytes | Exception, context: RequestContext, request_bytes: int) -> Reply:
        """Never raises: nobody above would answer."""
        try:
            reply = json_reply(context, result) if type(result) is bytes else self._refused(result, context)  # type: ignore[arg-type]
        except Exception as error:
            reply = self._broken(error, context)
        self._count("POST", reply.status, context.received_at, request_bytes, len(reply.body))
        return reply

    def _refused(self, error: Exception, context: RequestContext) -> Reply:
        if not isinstance(error, ToolServiceError):
            return self._broken(error, context)
        error.forget_origin()
        context.error = error
        if error.execution_id is None:
            self._count_error(error.kind.error_type)  # one with an id was counted by the executor
        body = self.written(error)
        lines = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        if error.allowance is not None:
            lines += limit_lines(error.allowance, error.retry_after_ms)
        elif error.retry_after_ms is not None:
            lines += b"retry-after: %d\r\n" % retry_after_s(error.retry_after_ms)
        if error.kind is DRAINING:
            lines += CLOSE_LINE
        return Reply(error.http_status, lines, body)

    def _broken(self, error: Exception, context: RequestContext) -> Reply:
        context.error = InternalError()
        return self.failed(error)

    def written(self, error: ToolServiceError) -> bytes:
        return orjson.dumps({"error": error.as_error()})

    # Refused before its body was understood

    async def _allow_post_alone(self, scope: Scope, send: Send, began: float) -> None:
        body = self.written(wrong_method())
        await respond(send, 405, [*json_headers(body), (b"allow", b"POST")], body)
        self._count(scope["method"], 405, began, 0, len(body))

    async def _refuse(self, send: Send, error: ToolServiceError, began: float) -> None:
        self._count_error(error.kind.error_type)
        self._count("POST", error.http_status, began, 0, len(self.written(error)))
        await super()._refuse(send, error, began)

    def _count(self, method: str, status: int, began: float, request_bytes: int, response_bytes: int) -> None:
        seconds = perf_counter() - began
        self._requests.observe(EXECUTE_PATH, method, _CLASSES[status // 100], seconds, request_bytes, response_bytes)


_CLASSES = ("0xx", "1xx", "2xx", "3xx", "4xx", "5xx")
