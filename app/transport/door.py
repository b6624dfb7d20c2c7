"""What all doors of calls do: who calls, the method, the body within its bounds, and one reply written whole.

`Door` is plain ASGI and stands ahead of FastAPI's router, which costs 33 µs a request more; `lane.py` has the same
doors answer without ASGI, by `begin`. Knows HTTP; knows no method and no tool.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import orjson

from app.access.authenticator import Authenticator
from app.access.credential import CredentialMissing
from app.calls import Caller
from app.errors import UNAUTHENTICATED, BodyTooLarge, BodyTooSlow, InternalError, Overloaded, ToolServiceError
from app.telemetry.histogram import Histogram
from app.telemetry.tracing import OFF, Tracing
from app.transport.access_log import LINE
from app.transport.allowance import limit_lines, retry_after_s
from app.transport.exchange import EXTENSION, Exchange
from app.transport.request import RequestContext
from app.transport.room import SHARE, Share
from app.transport.turns import LARGE_BODY_BYTES, Turns

logger = logging.getLogger("app.door")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

Headers = list[tuple[bytes, bytes]]

JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")
CLOSE: tuple[bytes, bytes] = (b"connection", b"close")
CLOSE_LINE = b"connection: close\r\n"
RETRY_LATER_LINE = b"retry-after: 1\r\n"
NO_BODY: tuple[bytes, bytes] = (b"content-length", b"0")

CHALLENGE = b'Bearer realm="agentcore-tools"'
"""RFC 6750, section 3: with an error only where a credential was given."""


class ClientGone(Exception):
    """The client closed the connection before its request was read."""


class Reply(NamedTuple):
    """One HTTP response. `lines` are its header lines, each with its end; a close is one of them."""

    status: int
    lines: bytes
    body: bytes = b""


Replied = Callable[[Reply], None]
Steps = Coroutine[Any, Any, Reply]


def json_reply(context: RequestContext, body: bytes) -> Reply:
    """The usual one, with what the call's limits have left."""
    lines = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
    if context.allowance is not None:
        lines += limit_lines(context.allowance, context.retry_after_ms)
    elif context.retry_after_ms is not None:
        lines += b"retry-after: %d\r\n" % retry_after_s(context.retry_after_ms)
    return tuple.__new__(Reply, (200, lines, body))


def draining_reply(body: bytes) -> Reply:
    """All that was asked for was refused because the replica shuts down."""
    lines = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
    return Reply(503, lines + CLOSE_LINE + RETRY_LATER_LINE, body)


TENANT_FULL = "Too many large requests of this tenant are under way here; send this one again"
RETRY_AFTER_MS = 1000

NO_CONTENT = Reply(204, b"")
"""To a request of notifications alone."""


class AsgiClient:
    """Sees a disconnect by way of ASGI. Only asked while a call runs, so nothing else reads `receive` then."""

    __slots__ = ("_exchange", "_receive")

    def __init__(self, receive: Receive, exchange: Exchange | None) -> None:
        self._receive = receive
        self._exchange = exchange

    @property
    def is_gone(self) -> bool:
        return self._exchange is not None and self._exchange.client_gone

    async def gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class Door(ABC):
    """A POST door. Its errors are those of JSON-RPC unless it says otherwise."""

    reads_headers = True
    """Whether `begin` looks at any."""

    def __init__(
        self,
        access: Authenticator,
        authentication: Histogram,
        count_error: Callable[[str], None],
        body_bytes_max: int,
        read_timeout_s: float,
        tracing: Tracing = OFF,
    ) -> None:
        self.access = access
        self.authentication = authentication
        self.tracing = tracing
        self._turns = Turns()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._count_error = count_error
        self._body_bytes_max = body_bytes_max
        self._read_timeout_s = read_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = perf_counter()
        try:
            headers = scope["headers"]
            caller = self.access.recognised(headers) or await self.access.identify(headers)
        except ToolServiceError as error:
            self.authentication.observe(perf_counter() - begin)
            self._count_error(error.kind.error_type)
            await self._turn_away(scope, send, error)
            return
        ours_s = perf_counter() - begin
        self.authentication.observe(ours_s)
        if scope["method"] != "POST":
            await self._allow_post_alone(scope, send, begin)
            return
        exchange: Exchange | None = scope["extensions"].get(EXTENSION) if "extensions" in scope else None
        context = RequestContext(caller, begin, AsgiClient(receive, exchange), self.tracing.begin(headers))
        try:
            self.check(context, scope)
            body = None if exchange is None else exchange.body()
            if body is None:
                _claim_room(scope, caller)
                body, waited_s = await self._read(receive, caller.tenant)
                ours_s += waited_s
        except ClientGone:
            return
        except ToolServiceError as error:
            context.error = error
            await self._refuse(send, error, begin)
            self.tracing.request_ended(context, begin)
            return
        context.received_at = perf_counter() - ours_s  # what a slow client took for its body is not ours
        line = scope.get(LINE)
        if line is not None:
            line.context = context
        if self._loop is None:
            self._loop = asyncio.get_running_loop()  # kept: asking for it costs Python 3.11 a system call
        ended: asyncio.Future[Reply] = self._loop.create_future()
        reply: Reply | None
        try:
            steps = self.begin_asgi(body, context, scope, send, partial(_put, ended))
            reply = await (ended if steps is None else steps)
        except Exception as error:
            reply = self.failed(error)
        # A 500 and a 503 end the connection, which is the cycle's to do.
        if reply is not None and (exchange is None or reply.status >= 500 or not exchange.answer(*reply)):
            await respond(send, reply.status, _as_headers(reply.lines), reply.body)
        self.tracing.request_ended(context, begin)

    async def _read(self, receive: Receive, tenant: str) -> tuple[bytes, float]:
        """A body that did not come at once, or is large, and how long it waited for its turn, in seconds."""
        body = await read_body(receive, self._body_bytes_max, self._read_timeout_s)
        if len(body) <= LARGE_BODY_BYTES:
            return body, 0.0
        begin = perf_counter()
        await self._turns.take(tenant)
        return body, perf_counter() - begin

    def failed(self, error: BaseException) -> Reply:
        """What a bug is answered with."""
        logger.error("request failed", exc_info=error)
        internal = InternalError()
        self._count_error(internal.kind.error_type)
        body = self.written(internal)
        lines = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        return Reply(500, lines + CLOSE_LINE, body)

    def written(self, error: ToolServiceError) -> bytes:
        """A refusal of the whole request, as a body."""
        return orjson.dumps({"jsonrpc": "2.0", "error": error.as_error(), "id": None})

    def is_plain(self, request: bytes) -> bool:
        """Whether `begin` can answer it: one whole response, nothing streamed before it."""
        return True

    def check(self, context: RequestContext, scope: Scope) -> None:  # noqa: B027  # most have nothing to look at
        """Raises what is wrong before the body is asked for."""

    def begin_asgi(
        self, body: bytes, context: RequestContext, scope: Scope, send: Send, then: Replied
    ) -> Coroutine[Any, Any, Reply | None] | None:
        """`begin` for what the lane never brings: a header that is another one in each request, an answer in pieces.
        Steps that return None have streamed it."""
        return self.begin(body, context, scope, then)

    @abstractmethod
    def begin(self, body: bytes, context: RequestContext, scope: Scope, then: Replied) -> Steps | None:
        """Answer a body, awaiting nothing if it can be helped. None: `then` gets the whole response, before this
        returns or later; else the steps that it takes, which return it. Of the scope it asks for headers, path and
        scheme."""

    async def _turn_away(self, scope: Scope, send: Send, error: ToolServiceError) -> None:
        """Nobody's request."""
        await self._say(send, error)

    async def _allow_post_alone(self, scope: Scope, send: Send, began: float) -> None:
        await respond(send, 405, [(b"allow", b"POST"), NO_BODY])

    async def _refuse(self, send: Send, error: ToolServiceError, began: float) -> None:
        """A request that was no good before there was a body."""
        await self._say(send, error)

    async def _say(self, send: Send, error: ToolServiceError) -> None:
        answer = self.written(error)
        await respond(send, error.http_status, refusal_headers(error, answer), answer)


def _claim_room(scope: Scope, caller: Caller) -> None:
    """For a body that may be large. Raises Overloaded where it would be more than the tenant's part; nothing tells
    anonymous callers apart, so there is nobody whom they could keep out."""
    share: Share | None = scope.get(SHARE)
    if share is not None and not caller.anonymous and not share.belongs_to(caller.tenant):
        raise Overloaded(TENANT_FULL, retry_after_ms=RETRY_AFTER_MS)


def _put(ended: asyncio.Future[Reply], reply: Reply) -> None:
    if not ended.done():  # whoever waited may have been cancelled
        ended.set_result(reply)


def header_key(headers: Headers) -> str | None:
    """The Idempotency-Key of a request, as it is: `calling.py` says whether it can be one. Two that differ cannot, nor
    can what is no UTF-8: the same key is the same text in a body."""
    found = {value for name, value in headers if name == b"idempotency-key"}
    return b"\n".join(found).decode("utf-8", "surrogateescape") if found else None


async def read_body(receive: Receive, bytes_max: int, timeout_s: float) -> bytes:
    """The whole body. Raises BodyTooLarge, BodyTooSlow, or ClientGone."""
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        try:
            async with asyncio.timeout(timeout_s):
                body = await _read_rest(receive, body, bytes_max)
        except TimeoutError:
            raise BodyTooSlow(timeout_s) from None
    elif message["type"] == "http.disconnect":
        raise ClientGone
    if len(body) > bytes_max:
        raise BodyTooLarge(bytes_max)
    return body


async def _read_rest(receive: Receive, first: bytes, bytes_max: int) -> bytes:
    body = bytearray(first)
    more = True
    while more:
        if len(body) > bytes_max:
            raise BodyTooLarge(bytes_max)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def respond(send: Send, status: int, headers: Headers, body: bytes = b"") -> None:
    """One whole response."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _as_headers(lines: bytes) -> Headers:
    split = (line.split(b": ", 1) for line in lines.split(b"\r\n")[:-1])
    return [(name, value) for name, value in split]


def json_headers(body: bytes) -> Headers:
    return [JSON, (b"content-length", b"%d" % len(body))]


def refusal_headers(error: ToolServiceError, body: bytes) -> Headers:
    """Of a request that was refused before its body was read, or in the middle of it."""
    headers = json_headers(body)
    if error.kind is UNAUTHENTICATED:
        told = b"" if isinstance(error, CredentialMissing) else b', error="invalid_token"'
        headers.append((b"www-authenticate", CHALLENGE + told))
    elif error.http_status in (408, 413):
        headers.append(CLOSE)
    if error.retry_after_ms is not None:
        headers.append((b"retry-after", b"%d" % retry_after_s(error.retry_after_ms)))
    return headers
