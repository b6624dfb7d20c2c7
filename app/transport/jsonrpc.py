"""JSON-RPC 2.0: bytes in, bytes out. Codec and dispatcher; imports no web framework and knows no tool.

The specification is https://www.jsonrpc.org/specification; where it is silent, docs/json-rpc.md says what holds here.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any

import orjson

from app.errors import (
    DRAINING,
    InternalError,
    InvalidParams,
    InvalidRequest,
    MethodNotFound,
    ParseError,
    ToolServiceError,
)
from app.limits.room import Room
from app.stepping import IN_TASK, Signal
from app.transport.request import AnswerBudget, RequestContext

logger = logging.getLogger("app.jsonrpc")

NESTING_MAX = 64
CONTAINERS_MAX = 100_000
"""Arrays and objects in one body. 350,000 empty arrays fit a megabyte and cost 19 ms to build."""

BATCH_AT_ONCE = 20
"""Requests of one batch that run at the same time: one client's batch must not take every slot."""

BEGUN_AT_ONCE_S = 0.002
"""Of the requests of one batch, between two turns of the loop."""

_MARKS = bytes.maketrans(b"0123456789{", b"0000000000[")
"""Every digit the same, and every begin of an array or object: one pass for both questions."""
_LONG_NUMBER = b"0" * 19
_LONG_INTEGER = re.compile(rb"[\[,:\s](-[0-9]{19,}+|[0-9]{20,}+)(?=[\],}\s])")
_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1

_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'"[{]}')
_NESTING = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_LEAF = b"\x01\xff"
_LEAVES_TAKEN = 4
"""Levels to take off at once before counting one by one: few bodies are deeper, and the counting takes 25 ns each."""


def decode(body: bytes) -> Any:
    """The JSON value of a body. Raises ParseError, also for what orjson would let pass changed:
    integers past 64 bits become floats there, and nesting goes to 1,024."""
    marked = body.translate(_MARKS)
    if len(body) > 2 * NESTING_MAX and marked.count(b"[") > NESTING_MAX and is_too_much(body):
        raise ParseError(f"Parse error: over {NESTING_MAX} levels or {CONTAINERS_MAX} arrays and objects")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise ParseError("Parse error: the body is not valid JSON") from None
    if marked.find(_LONG_NUMBER) >= 0 and holds_long_integer(body):  # `in` takes 80 ns more of bytes
        raise ParseError("Parse error: an integer does not fit 64 bits; send it as a string")
    return value


def is_too_much(body: bytes) -> bool:
    """Whether arrays and objects are too many or too deep, told before they are built. Exact where `body` is JSON."""
    nesting = _outside_of_strings(_without_escapes(body).translate(None, _NOT_STRUCTURE)).translate(_NESTING)
    if nesting.count(b"\x01") > CONTAINERS_MAX:
        return True
    for _ in range(_LEAVES_TAKEN):
        nesting = nesting.replace(_LEAF, b"")
    return max(accumulate(memoryview(nesting).cast("b")), default=0) > NESTING_MAX - _LEAVES_TAKEN


def holds_long_integer(body: bytes) -> bool:
    """Whether a number outside of strings, without fraction or exponent, passes 64 bits. `body` is valid JSON."""
    found = _LONG_INTEGER.findall(b" %b " % _outside_of_strings(_without_escapes(body)))
    return any(len(number) > 20 or not _INT64_MIN <= int(number) <= _UINT64_MAX for number in found)


def _without_escapes(body: bytes) -> bytes:
    """Every quote that is left begins or ends a string."""
    return body.replace(b"\\\\", b"").replace(b'\\"', b"")


def _outside_of_strings(text: bytes) -> bytes:
    """Two quotes in a row are an empty string, or else stand between two strings: the rest is the same without."""
    return b"".join(text.replace(b'""', b"").split(b'"')[::2])


Handler = Callable[[RequestContext, Any], Awaitable[bytes]]

Ended = Callable[[bytes | Exception], None]
"""Gets the result, or why there is none."""

Answered = Callable[[bytes | None], None]
"""Gets a response; None where none was asked for."""


@dataclass(frozen=True, slots=True)
class Method:
    """One method: how its params are read and what answers. `names` is the order of positional params."""

    name: str
    names: tuple[str, ...]
    read: Callable[[dict[str, Any]], Any]
    handler: Handler
    begin: Callable[[RequestContext, Any, Ended], bool] | None = None
    """What the handler does, without a coroutine. False: nothing was done, and the handler is to be asked."""


class Dispatcher:
    """Answers request bodies by a table of methods."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        batch_max: int,
        answer_bytes_max: int,
        count_error: Callable[[str], None],
        room: Room | None = None,
    ) -> None:
        """`room` is what a batch waits for before it begins."""
        self.methods = methods
        self._room = room
        self._batch_max = batch_max
        self._answer_bytes_max = answer_bytes_max
        self._count_error = count_error

    def begin(self, body: bytes, context: RequestContext, then: Answered) -> Coroutine[Any, Any, bytes | None] | None:
        """Answer a body. None: `then` gets the response, before this returns or later; else the steps that it takes,
        which return it. There is no response to notifications alone."""
        try:
            request = decode(body)
        except ToolServiceError as error:
            then(self.refused(error, b"null", context))
            return None
        if type(request) is list:
            return self._dispatch_batch(request, context)
        asked = _Asked(self, context, then)
        method = asked.begin(request)
        return None if method is None else asked.handled_by(method)

    async def _dispatch_batch(self, requests: list[Any], context: RequestContext) -> bytes | None:
        if not 0 < len(requests) <= self._batch_max:
            wrong = f"a batch holds at most {self._batch_max} requests" if requests else "the batch is empty"
            return self.refused(InvalidRequest(f"Invalid request: {wrong}"), b"null", context)
        if context.idempotency_key is not None:
            wrong = "Idempotency-Key is for one call; give each request its own idempotency_key"
            return self.refused(InvalidRequest(f"Invalid request: {wrong}"), b"null", context)
        if self._room is not None:
            await self._room.enter(min(len(requests), BATCH_AT_ONCE), context.caller.tenant)
        batch = _Batch(context, len(requests), AnswerBudget(self._answer_bytes_max))
        handled: list[asyncio.Task[None]] = []
        pause_at = perf_counter() + BEGUN_AT_ONCE_S
        try:
            for position, request in enumerate(requests):
                if position - batch.answered >= BATCH_AT_ONCE:
                    await batch.next_answer()
                asked, method = batch.begin(self, position, request)
                if method is not None:
                    await IN_TASK
                    handled.append(asyncio.create_task(asked.handled_in_batch(method)))
                if perf_counter() > pause_at:
                    await asyncio.sleep(0)
                    pause_at = perf_counter() + BEGUN_AT_ONCE_S
            await batch.ended.wait()
        finally:
            await _end(handled)
        return batch.answer()

    def refused(self, error: ToolServiceError, request_id: bytes, context: RequestContext) -> bytes:
        """The response that says so."""
        error.forget_origin()
        context.error = error
        if error.kind is DRAINING:
            context.draining = True
        self.count(error)
        return b'{"jsonrpc":"2.0","error":%b,"id":%b}' % (orjson.dumps(error.as_error()), request_id)

    def count(self, error: ToolServiceError) -> None:
        if error.execution_id is None:
            self._count_error(error.kind.error_type)  # one with an id was counted by the executor


_BROKEN = b'{"jsonrpc":"2.0","error":%b,"id":%%b}' % orjson.dumps(InternalError().as_error()).replace(b"%", b"%%")


class _Asked:
    """One request on its way to its response."""

    __slots__ = ("_context", "_dispatcher", "_params", "_request_id", "_then", "_wants_answer")

    def __init__(self, dispatcher: Dispatcher, context: RequestContext, then: Answered) -> None:
        self._dispatcher = dispatcher
        self._context = context
        self._then = then
        self._request_id = b"null"
        self._wants_answer = True

    def begin(self, request: Any) -> Method | None:
        """None: it is answered, or will be. Else by what method it is to be handled."""
        try:
            method = self._read(request)
            if method.begin is None or not method.begin(self._context, self._params, self.ended):
                return method
        except Exception as error:
            self._then(self._failed(error))
        return None

    def _read(self, request: Any) -> Method:
        """Raises InvalidRequest, MethodNotFound, InvalidParams."""
        context = self._context
        self._request_id = _readable_id(request)
        name = request.get("method")
        if type(name) is not str:
            if name is None and ("result" in request or "error" in request):
                self._request_id = b"null"
                raise InvalidRequest("Invalid request: this is a response, and nobody here has asked")
            raise InvalidRequest("Invalid request: method must be a string")
        if request.get("jsonrpc") != "2.0":
            raise InvalidRequest('Invalid request: jsonrpc must be "2.0"')
        self._wants_answer = "id" in request
        if "a2a_context" in request:
            context.a2a = _a2a(request["a2a_context"])
        method = self._dispatcher.methods.get(name)
        if method is not None:
            context.method = name
        params = request.get("params", _NO_PARAMS)
        if type(params) is not dict and type(params) is not list:
            raise InvalidRequest("Invalid request: params must be an object or an array")
        if method is None:
            raise MethodNotFound("Method not found; rpc.methods lists what there is")
        named: Any = _by_position(method, params) if type(params) is list else params
        self._params = method.read(named)
        return method

    def ended(self, result: bytes | Exception) -> None:
        """What its method came to, which awaited nothing."""
        try:
            answer = self._answer(result) if type(result) is bytes else self._failed(result)  # type: ignore[arg-type]
        except Exception:  # nobody above would answer
            logger.exception("answer failed")
            answer = _BROKEN % self._request_id if self._wants_answer else None
        self._then(answer)

    async def handled_by(self, method: Method) -> bytes | None:
        try:
            return self._answer(await method.handler(self._context, self._params))
        except Exception as error:
            return self._failed(error)

    async def handled_in_batch(self, method: Method) -> None:
        try:
            answer = await self.handled_by(method)
        except asyncio.CancelledError:
            self._then(self._failed(InternalError()))  # the others of the batch wait for every answer
            raise
        self._then(answer)

    def _answer(self, result: bytes) -> bytes | None:
        if not self._wants_answer:
            return None
        return b'{"jsonrpc":"2.0","result":%b,"id":%b}' % (result, self._request_id)

    def _failed(self, error: Exception) -> bytes | None:
        if not isinstance(error, ToolServiceError):
            logger.error("method failed", exc_info=error)
            error = InternalError()
        if self._wants_answer:
            return self._dispatcher.refused(error, self._request_id, self._context)
        self._dispatcher.count(error)
        return None


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Of a batch that has ended, or is cancelled: then so are its requests."""
    left = [task for task in tasks if not task.done()]
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left)


class _Batch:
    """Requests of one body on their way to one response."""

    def __init__(self, context: RequestContext, size: int, budget: AnswerBudget) -> None:
        self.ended = Signal()
        self.answered = 0
        self._next_answer: Signal | None = None
        self._context = context
        self._budget = budget
        self._answers: list[bytes | None] = [None] * size
        self._size = size
        self._served = False
        context.batch = size

    def begin(self, dispatcher: Dispatcher, position: int, request: Any) -> tuple[_Asked, Method | None]:
        own = self._context.in_batch(self._budget)
        asked = _Asked(dispatcher, own, partial(self._take, position, own))
        return asked, asked.begin(request)

    def _take(self, position: int, own: RequestContext, answer: bytes | None) -> None:
        self._answers[position] = answer
        self._served = self._served or not own.draining
        for commit in own.commits or ():
            self._context.hold_for(commit)
        self.answered += 1
        if self.answered == self._size:
            self.ended.complete()
        awaited, self._next_answer = self._next_answer, None
        if awaited is not None:
            awaited.complete()

    async def next_answer(self) -> None:
        """Return when one more has been answered."""
        self._next_answer = Signal()
        await self._next_answer.wait()

    def answer(self) -> bytes | None:
        """Once it has ended."""
        self._context.draining = not self._served  # a 503 is tried again, and what ran must not run twice
        written = [answer for answer in self._answers if answer is not None]
        return b"[" + b",".join(written) + b"]" if written else None


_NO_PARAMS: dict[str, Any] = {}
_ID_TYPES = frozenset({str, int, float, type(None)})


def _readable_id(request: Any) -> bytes:
    """The id as it came, encoded; null when there is none. Raises InvalidRequest when it cannot be one."""
    if type(request) is not dict:
        raise InvalidRequest("Invalid request: a request is an object")
    request_id = request.get("id")
    if type(request_id) not in _ID_TYPES:
        raise InvalidRequest("Invalid request: id must be a string, a number or null")
    return orjson.dumps(request_id)


def _by_position(method: Method, params: list[Any]) -> dict[str, Any]:
    if len(params) > len(method.names):
        raise InvalidParams.at("", f"Takes at most {len(method.names)} params", "too_many_params")
    return dict(zip(method.names, params, strict=False))


def _a2a(value: Any) -> Mapping[str, Any] | None:
    if value is not None and type(value) is not dict:
        raise InvalidRequest("Invalid request: a2a_context must be an object")
    return value
