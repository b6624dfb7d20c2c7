"""MCP over HTTP as bytes in, status and bytes out: one message or a legacy batch, each to its era and its method.

Imports no web framework. The door reads the body and the headers, and writes the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeGuard

import orjson

from app.calls import Progress
from app.errors import (
    DRAINING,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    PERMISSION_DENIED,
    TOOL_NOT_FOUND,
    InternalError,
    InvalidRequest,
    MethodNotFound,
    ToolServiceError,
)
from app.stepping import IN_TASK
from app.transport.jsonrpc import BATCH_AT_ONCE, decode
from app.transport.mcp_methods import SCOPES, McpMethods
from app.transport.mcp_protocol import (
    BEFORE_2025_06_18,
    CALL,
    ClientCapabilityMissing,
    HeaderMismatch,
    Malformed,
    Request,
    Routing,
    VersionNotServed,
    check_modern,
    is_modern,
    readable_id,
    request_of,
)
from app.transport.request import AnswerBudget, RequestContext

logger = logging.getLogger("app.mcp")

ProgressTo = Callable[[str | int], Progress | None]
"""Where progress under this token goes; None: nowhere, for the client takes no stream."""

TOKEN_CHARACTERS_MAX = 256
"""Of a progress token, which every notification repeats: one of a megabyte, a thousand times, takes the loop 4 s."""

_BAD_REQUEST = (PARSE_ERROR, INVALID_REQUEST, HeaderMismatch.kind, ClientCapabilityMissing.kind, VersionNotServed.kind)
LEGACY_STATUS = {**dict.fromkeys(_BAD_REQUEST, 400), PERMISSION_DENIED: 403, DRAINING: 503}
MODERN_STATUS = {**LEGACY_STATUS, METHOD_NOT_FOUND: 404, Malformed.kind: 400}
"""HTTP status by kind of error; any other error of a well-formed request is 200."""


class Answer(NamedTuple):
    """One HTTP response. `scope` is what the caller would have needed."""

    status: int
    body: bytes = b""
    scope: str | None = None


ACCEPTED = Answer(202)


class McpDispatcher:
    """Answers request bodies by the tables of both eras."""

    def __init__(
        self,
        methods: McpMethods,
        batch_max: int,
        answer_bytes_max: int,
        run_bounded: Callable[..., Awaitable[None]],
        count_error: Callable[[str], None],
        *,
        tolerate_mismatch: bool,
    ) -> None:
        self._methods = methods
        self._batch_max = batch_max
        self._answer_bytes_max = answer_bytes_max
        self._run_bounded = run_bounded
        self._count_error = count_error
        self._tolerate_mismatch = tolerate_mismatch

    def begin(
        self, body: bytes, routing: Routing, context: RequestContext, then: Callable[[Answer], None]
    ) -> Coroutine[Any, Any, Answer] | None:
        """Answer a body that asks for no progress. None: `then` gets the response, before this returns or later; else
        the steps that it takes, which return it."""
        try:
            message = decode(body)
        except ToolServiceError as error:
            then(self._refused(error, b"null", context, modern=False))
            return None
        if type(message) is list or _method_of(message) != CALL:
            return self._dispatch(message, routing, context, _to_nowhere)
        modern = is_modern(message, routing.version)
        request_id = readable_id(message)

        def ended(result: bytes | Exception) -> None:
            then(self._answered(result, request_id, context, modern=modern, method=CALL))

        try:
            request = self._read(message, request_id, routing, modern=modern)
            if request is None:
                then(ACCEPTED)
                return None
            context.method = CALL
            steps = self._methods.begin_call(context, request, routing, ended)
        except Exception as error:
            ended(error)
            return None
        return None if steps is None else self._awaited(steps, request_id, context, modern=modern, method=CALL)

    async def dispatch(self, body: bytes, routing: Routing, context: RequestContext, progress_to: ProgressTo) -> Answer:
        """The response to a body, whatever it is."""
        try:
            message = decode(body)
        except ToolServiceError as error:
            return self._refused(error, b"null", context, modern=False)
        return await self._dispatch(message, routing, context, progress_to)

    async def _dispatch(
        self, message: Any, routing: Routing, context: RequestContext, progress_to: ProgressTo
    ) -> Answer:
        version = routing.version
        if type(message) is not list:
            return await self._dispatch_one(message, routing, version, context, progress_to)
        try:
            return await self._dispatch_batch(message, routing, version, context)
        except ToolServiceError as error:
            return self._refused(error, b"null", context, modern=False)

    async def _dispatch_one(
        self, message: Any, routing: Routing, version: str | None, context: RequestContext, progress_to: ProgressTo
    ) -> Answer:
        modern = is_modern(message, version)
        request_id = readable_id(message)
        method = _method_of(message)
        try:
            request = self._read(message, request_id, routing, modern=modern)
            if request is None:
                return ACCEPTED
            steps = self._call(request, routing, context, progress_to)
        except Exception as error:
            return self._answered(error, request_id, context, modern=modern, method=method)
        return await self._awaited(steps, request_id, context, modern=modern, method=method)

    def _read(self, message: Any, request_id: bytes, routing: Routing, *, modern: bool) -> Request | None:
        """None: a notification. Raises what is wrong with it."""
        request = request_of(message, request_id, modern=modern)
        if request is not None and modern:
            check_modern(request, routing, tolerate_mismatch=self._tolerate_mismatch)
        return request

    async def _awaited(
        self, steps: Awaitable[bytes], request_id: bytes, context: RequestContext, *, modern: bool, method: str | None
    ) -> Answer:
        result: bytes | Exception
        try:
            result = await steps
        except Exception as error:
            result = error
        return self._answered(result, request_id, context, modern=modern, method=method)

    def _answered(
        self,
        result: bytes | Exception,
        request_id: bytes,
        context: RequestContext,
        *,
        modern: bool,
        method: str | None,
    ) -> Answer:
        if isinstance(result, bytes):
            return Answer(200, b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (request_id, result))
        if isinstance(result, ToolServiceError):
            return self._refused(result, request_id, context, modern=modern, method=method)
        logger.error("method failed", exc_info=result)
        return self._refused(InternalError(), request_id, context, modern=modern)

    def _call(
        self, request: Request, routing: Routing, context: RequestContext, progress_to: ProgressTo
    ) -> Awaitable[bytes]:
        table = self._methods.modern if request.modern else self._methods.legacy
        method = table.get(request.method)
        if method is None:
            raise MethodNotFound(f"Method not found; there is {', '.join(table)}")
        context.method = request.method
        token = request.meta.get("progressToken") if request.method == CALL else None
        on_progress = progress_to(token) if _is_token(token) else None
        return method(context, request, routing, on_progress)

    async def _dispatch_batch(
        self, messages: list[Any], routing: Routing, version: str | None, context: RequestContext
    ) -> Answer:
        if version not in BEFORE_2025_06_18:
            raise InvalidRequest("Invalid request: this protocol version has no batches")
        if not messages:
            raise InvalidRequest("Invalid request: the batch is empty")
        if len(messages) > self._batch_max:
            raise InvalidRequest(f"Invalid request: a batch holds at most {self._batch_max} requests")
        if context.idempotency_key is not None:
            raise InvalidRequest("Invalid request: Idempotency-Key is for one call; give each its own in _meta")
        context.batch = len(messages)
        answers = [ACCEPTED] * len(messages)
        budget = AnswerBudget(self._answer_bytes_max)
        served: list[bool] = []

        async def answer(position: int) -> None:
            own = context.in_batch(budget)
            answers[position] = await self._dispatch_one_of_batch(messages[position], routing, version, own)
            for commit in own.commits or ():
                context.hold_for(commit)
            served.append(not own.draining)

        work = [lambda position=position: answer(position) for position in range(len(messages))]
        await IN_TASK
        await self._run_bounded(work, min(BATCH_AT_ONCE, len(messages)))
        context.draining = not any(served)  # a 503 is tried again, and what ran must not run twice
        written = [each.body for each in answers if each.body]
        if not written:
            return ACCEPTED
        return Answer(503 if context.draining else 200, b"[%b]" % b",".join(written))

    async def _dispatch_one_of_batch(
        self, message: Any, routing: Routing, version: str | None, context: RequestContext
    ) -> Answer:
        if is_modern(message, version) or _method_of(message) == "initialize":
            error = InvalidRequest("Invalid request: this cannot stand in a batch")
            return self._refused(error, readable_id(message), context, modern=False)
        return await self._dispatch_one(message, routing, version, context, _to_nowhere)

    def _refused(
        self,
        error: ToolServiceError,
        request_id: bytes,
        context: RequestContext,
        *,
        modern: bool,
        method: str | None = None,
    ) -> Answer:
        if error.kind is TOOL_NOT_FOUND:  # it was there a moment ago
            error = Malformed(error.message)
        error.forget_origin()
        context.error = error
        if error.kind is DRAINING:
            context.draining = True
        if error.execution_id is None:
            self._count_error(error.kind.error_type)  # one with an id was counted by the executor
        status = (MODERN_STATUS if modern else LEGACY_STATUS).get(error.kind, 200)
        body = b'{"jsonrpc":"2.0","id":%b,"error":%b}' % (request_id, orjson.dumps(error.as_error()))
        return Answer(status, body, SCOPES.get(method or "") if status == 403 else None)


def _method_of(message: Any) -> str | None:
    method = message.get("method") if type(message) is dict else None
    return method if type(method) is str else None


def _is_token(token: Any) -> TypeGuard[str | int]:
    return type(token) is int or (type(token) is str and len(token) <= TOKEN_CHARACTERS_MAX)


def _to_nowhere(token: str | int) -> None:
    """An answer that is one JSON document, as that to a batch, has no place for notifications."""
