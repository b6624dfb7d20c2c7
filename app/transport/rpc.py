"""The JSON-RPC door as plain ASGI: reads a body within its bounds, hands it to the dispatcher, writes the answer.

Stands ahead of FastAPI's router, which costs 33 µs a request more. Knows HTTP; knows no method and no tool.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from app.access.authenticator import Authenticator
from app.access.credential import CredentialMissing
from app.errors import UNAUTHENTICATED, BodyTooLarge, BodyTooSlow, ToolServiceError
from app.telemetry.metrics import Histogram
from app.telemetry.tracing import OFF, Tracing
from app.transport.allowance import limit_headers, limit_lines, retry_after_s
from app.transport.exchange import EXTENSION, Exchange
from app.transport.jsonrpc import Dispatcher, RequestContext

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

Headers = list[tuple[bytes, bytes]]

RPC_PATH = "/api/v1/jsonrpc"

JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")
JSON_HEADERS = b"content-type: application/json\r\ncontent-length: %d\r\n"
CLOSE: tuple[bytes, bytes] = (b"connection", b"close")


class ClientGone(Exception):
    """The client closed the connection before its request was read."""


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


def json_headers(body: bytes) -> Headers:
    return [JSON, (b"content-length", b"%d" % len(body))]


CHALLENGE = b'Bearer realm="agentcore-tools"'
"""RFC 6750, section 3: with an error only where a credential was given."""


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


class JsonRpcDoor:
    """POST /api/v1/jsonrpc."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        access: Authenticator,
        authentication: Histogram,
        count_error: Callable[[str], None],
        body_bytes_max: int,
        read_timeout_s: float,
        tracing: Tracing = OFF,
    ) -> None:
        self._tracing = tracing
        self._dispatcher = dispatcher
        self._access = access
        self._authentication = authentication
        self._count_error = count_error
        self._body_bytes_max = body_bytes_max
        self._read_timeout_s = read_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.perf_counter()
        try:
            headers = scope["headers"]
            caller = self._access.recognised(headers) or await self._access.identify(headers)
        except ToolServiceError as error:
            self._authentication.observe(time.perf_counter() - begin)
            self._count_error(error.kind.error_type)
            await self._refuse(send, error)
            return
        authentication_s = time.perf_counter() - begin
        self._authentication.observe(authentication_s)
        if scope["method"] != "POST":
            await respond(send, 405, [(b"allow", b"POST"), (b"content-length", b"0")])
            return
        exchange: Exchange | None = scope["extensions"].get(EXTENSION) if "extensions" in scope else None
        body = None if exchange is None else exchange.body()
        if body is None:
            try:
                body = await read_body(receive, self._body_bytes_max, self._read_timeout_s)
            except ClientGone:
                return
            except ToolServiceError as error:
                await self._refuse(send, error)
                return
        received_at = time.perf_counter() - authentication_s  # what a slow client took for its body is not ours
        trace = self._tracing.begin(scope["headers"])
        context = RequestContext(caller, received_at, AsgiClient(receive, exchange), trace=trace)
        answer = await self._dispatcher.dispatch(body, context)
        if context.commits is not None:
            await context.committed()
        if exchange is not None and answer is not None and not context.draining:
            headers = JSON_HEADERS % len(answer)
            if context.allowance is not None:
                headers += limit_lines(context.allowance, context.retry_after_ms)
            answered = exchange.answer(200, headers, answer)
        else:
            answered = False
        if not answered:
            await self._respond(send, context, answer)
        self._tracing.request_ended(context.trace, begin, caller.tenant, context.method, context.error, context.batch)

    async def _respond(self, send: Send, context: RequestContext, answer: bytes | None) -> None:
        if context.draining:
            await respond(send, 503, [*json_headers(answer or b""), CLOSE, RETRY_LATER], answer or b"")
        elif answer is None:
            await respond(send, 204, [])
        else:
            left = limit_headers(context.allowance, context.retry_after_ms)
            await respond(send, 200, [*json_headers(answer), *left], answer)

    async def _refuse(self, send: Send, error: ToolServiceError) -> None:
        answer = orjson.dumps({"jsonrpc": "2.0", "error": error.as_error(), "id": None})
        await respond(send, error.http_status, refusal_headers(error, answer), answer)


RETRY_LATER: tuple[bytes, bytes] = (b"retry-after", b"1")
