"""The MCP door: a body and its routing headers to the dispatcher; the answer as JSON, or as events once a call told of
its progress. Stateless: no session is made, and one that comes is not looked at.

Knows no method and no tool. What it may cost is in docs/adr/0016-mcp-door.md.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Coroutine
from typing import Any

from app.access.credential import CredentialMissing
from app.calls import Progress
from app.errors import UNAUTHENTICATED, ToolServiceError
from app.transport.door import (
    CLOSE_LINE,
    NO_BODY,
    RETRY_LATER_LINE,
    Door,
    Headers,
    Receive,
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
from app.transport.mcp_dispatcher import Answer, McpDispatcher
from app.transport.mcp_protocol import Routing
from app.transport.mcp_resource import ProtectedResource
from app.transport.mcp_stream import ProgressStream
from app.transport.request import RequestContext

MCP_PATH = "/mcp"


class McpDoor(Door):
    """POST /mcp."""

    def __init__(self, dispatcher: McpDispatcher, resource: ProtectedResource, *shared: Any) -> None:
        super().__init__(*shared)
        self._dispatcher = dispatcher
        self._resource = resource

    def begin(self, body: bytes, context: RequestContext, scope: Scope, then: Replied) -> Steps | None:
        def answered(answer: Answer) -> None:
            try:
                reply = self._rendered(answer, context, scope)
            except Exception as error:
                reply = self.failed(error)
            then(reply)

        steps = self._dispatcher.begin(body, routing_of(scope), context, answered)
        return None if steps is None else self._reply_of(steps, context, scope)

    async def _reply_of(self, steps: Coroutine[Any, Any, Answer], context: RequestContext, scope: Scope) -> Reply:
        answer = await steps
        if context.commits is not None:
            await context.committed()
        return self._rendered(answer, context, scope)

    def is_plain(self, request: bytes) -> bool:
        return request.find(b"progressToken") < 0 and request.find(_ESCAPED_ASCII) < 0

    def begin_asgi(
        self, body: bytes, context: RequestContext, scope: Scope, send: Send, then: Replied
    ) -> Coroutine[Any, Any, Reply | None] | None:
        context.idempotency_key = header_key(scope["headers"])
        if self.is_plain(body) or not _takes_events(scope["headers"]):
            return self.begin(body, context, scope, then)
        return self._streamed(body, context, scope, send)

    async def _streamed(self, body: bytes, context: RequestContext, scope: Scope, send: Send) -> Reply | None:
        stream: ProgressStream | None = None

        def progress_to(token: str | int) -> Progress:
            nonlocal stream
            stream = ProgressStream(send, token)
            return stream.notify

        answer = await self._dispatcher.dispatch(body, routing_of(scope), context, progress_to)
        if stream is not None:
            stream.end()
        if context.commits is not None:
            await context.committed()
        if stream is None or not stream.opened:
            return self._rendered(answer, context, scope)
        await stream.finish(answer.body)
        return None

    def _rendered(self, answer: Answer, context: RequestContext, scope: Scope) -> Reply:
        status, body = answer.status, answer.body
        if status == 200:
            return json_reply(context, body)
        lines = b"content-length: %d\r\n" % len(body)
        if body:
            lines = b"content-type: application/json\r\n" + lines
        if context.draining:
            lines += CLOSE_LINE + RETRY_LATER_LINE
        elif answer.scope is not None:
            lines += b"www-authenticate: %b\r\n" % self._resource.scope_challenge(scope, answer.scope)
        return Reply(status, lines, body)

    async def _turn_away(self, scope: Scope, send: Send, error: ToolServiceError) -> None:
        """A 401 has no body: its challenge says all that a client needs."""
        if error.kind is not UNAUTHENTICATED:
            await self._say(send, error)
            return
        challenge = self._resource.challenge(scope, refused=not isinstance(error, CredentialMissing))
        await respond(send, 401, [(b"www-authenticate", challenge), NO_BODY])


def routing_of(scope: Scope) -> Routing:
    """The routing headers, read once of each scope: the lane has one for all requests with the same head."""
    known: Routing | None = scope.get(_ROUTING)
    if known is None:
        known = scope[_ROUTING] = Routing(scope["headers"])
    return known


_ROUTING = "agentcore.mcp_routing"


def _takes_events(headers: Headers) -> bool:
    """By its Accept header, or by having none. A client of MCP takes both forms, but not all that calls is one."""
    accepted = [value.lower() for name, value in headers if name == b"accept"]
    return not accepted or any(_TAKES_EVENTS.search(value) for value in accepted)


_TAKES_EVENTS = re.compile(rb"(?:\A|,)\s*(?:text/event-stream|text/\*|\*/\*)(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|\Z))")
"""RFC 9110, section 12.5.1: a weight of 0 is what is not wanted."""

_ESCAPED_ASCII = b"\\u00"
"""A name may be written with escapes: then only who parses it knows what it is."""


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
