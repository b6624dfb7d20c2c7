"""The MCP door as plain ASGI: credential, body, then the dispatcher; the answer as JSON, or as events once a call told
of its progress. Stateless: no session is made, and one that comes is not looked at.

Knows HTTP; knows no method and no tool. What it may cost is in docs/adr/0016-mcp-door.md.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import orjson

from app.access.authenticator import Authenticator
from app.access.credential import CredentialMissing
from app.calls import Progress
from app.errors import UNAUTHENTICATED, ToolServiceError
from app.telemetry.metrics import Histogram
from app.telemetry.tracing import OFF, Tracing
from app.transport.allowance import limit_headers, limit_lines
from app.transport.exchange import EXTENSION, Exchange
from app.transport.jsonrpc import RequestContext
from app.transport.mcp_dispatcher import Answer, McpDispatcher
from app.transport.mcp_protocol import Routing
from app.transport.mcp_resource import ProtectedResource
from app.transport.mcp_stream import ProgressStream
from app.transport.rpc import (
    CLOSE,
    JSON_HEADERS,
    RETRY_LATER,
    AsgiClient,
    ClientGone,
    Headers,
    Receive,
    Scope,
    Send,
    json_headers,
    read_body,
    refusal_headers,
    respond,
)

MCP_PATH = "/mcp"

NO_BODY: tuple[bytes, bytes] = (b"content-length", b"0")


class McpDoor:
    """POST /mcp."""

    def __init__(
        self,
        dispatcher: McpDispatcher,
        access: Authenticator,
        authentication: Histogram,
        resource: ProtectedResource,
        count_error: Callable[[str], None],
        body_bytes_max: int,
        read_timeout_s: float,
        tracing: Tracing = OFF,
    ) -> None:
        self._dispatcher = dispatcher
        self._access = access
        self._authentication = authentication
        self._tracing = tracing
        self._resource = resource
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
            await self._turn_away(scope, send, error)
            return
        self._authentication.observe(time.perf_counter() - begin)
        if scope["method"] != "POST":
            await respond(send, 405, [(b"allow", b"POST"), NO_BODY])
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
        context = RequestContext(
            caller, time.perf_counter(), AsgiClient(receive, exchange), trace=self._tracing.begin(headers)
        )
        await self._answer(scope, send, context, body, exchange)
        self._tracing.request_ended(context.trace, begin, caller.tenant, context.method, context.error, context.batch)

    async def _answer(
        self, scope: Scope, send: Send, context: RequestContext, body: bytes, exchange: Exchange | None
    ) -> None:
        stream: ProgressStream | None = None

        def progress_to(token: str | int) -> Progress | None:
            nonlocal stream
            if not _takes_events(scope["headers"]):
                return None
            stream = ProgressStream(send, token)
            return stream.notify

        answer = await self._dispatcher.dispatch(body, Routing(scope["headers"]), context, progress_to)
        if stream is not None:
            stream.end()
        if context.commits is not None:
            await context.committed()
        if stream is not None and stream.opened:
            await stream.finish(answer.body)
        elif exchange is None or answer.status != 200 or not _answered(exchange, context, answer.body):
            await self._respond(scope, send, context, answer)

    async def _respond(self, scope: Scope, send: Send, context: RequestContext, answer: Answer) -> None:
        headers = json_headers(answer.body) if answer.body else [NO_BODY]
        if context.draining:
            headers += (CLOSE, RETRY_LATER)
        elif answer.scope is not None:
            headers.append((b"www-authenticate", self._resource.scope_challenge(scope, answer.scope)))
        else:
            headers += limit_headers(context.allowance, context.retry_after_ms)
        await respond(send, answer.status, headers, answer.body)

    async def _turn_away(self, scope: Scope, send: Send, error: ToolServiceError) -> None:
        """Nobody's request. A 401 has no body: its challenge says all that a client needs."""
        self._count_error(error.kind.error_type)
        if error.kind is not UNAUTHENTICATED:
            await self._refuse(send, error)
            return
        challenge = self._resource.challenge(scope, refused=not isinstance(error, CredentialMissing))
        await respond(send, 401, [(b"www-authenticate", challenge), NO_BODY])

    async def _refuse(self, send: Send, error: ToolServiceError) -> None:
        answer = orjson.dumps({"jsonrpc": "2.0", "error": error.as_error(), "id": None})
        await respond(send, error.http_status, refusal_headers(error, answer), answer)


def _answered(exchange: Exchange, context: RequestContext, body: bytes) -> bool:
    """In one write, where that can be."""
    headers = JSON_HEADERS % len(body)
    if context.allowance is not None:
        headers += limit_lines(context.allowance, context.retry_after_ms)
    return exchange.answer(200, headers, body)


def _takes_events(headers: Headers) -> bool:
    """By its Accept header, or by having none. A client of MCP takes both forms, but not all that calls is one."""
    accepted = [value for name, value in headers if name == b"accept"]
    return not accepted or any(
        form in value for value in accepted for form in (b"text/event-stream", b"*/*", b"text/*")
    )


class ResourceDoor:
    """GET of the document that says who issues tokens for this service (RFC 9728); open to all."""

    def __init__(self, resource: ProtectedResource) -> None:
        self._resource = resource

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["method"] not in ("GET", "HEAD"):
            return respond(send, 405, [(b"allow", b"GET"), NO_BODY])
        document = self._resource.document(scope)
        if document is None:
            return respond(send, 404, [NO_BODY])
        return respond(send, 200, json_headers(document), document)
