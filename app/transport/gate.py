"""Who may come in at all: every path but the doors of calls passes here, whether there is a route or not.

Routes need a credential unless their endpoint says that it is open; what an endpoint needs beyond that, it asks itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from time import perf_counter
from typing import Any, TypeVar

import orjson
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access.authenticator import Authenticator
from app.access.credential import CredentialMissing
from app.calls import Caller
from app.errors import ToolServiceError
from app.telemetry.histogram import Histogram
from app.transport.calling import require_scope
from app.transport.door import refusal_headers, respond

CALLER = "agentcore.caller"
"""Key in the scope of a request that was let in."""

NO_STORE = (b"cache-control", b"no-store")

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

_OPEN = "needs_no_credential"


def open_to_all(endpoint: Endpoint) -> Endpoint:
    """For probes, scrapers and the documents: answered without a credential."""
    setattr(endpoint, _OPEN, True)
    return endpoint


def is_open(route: BaseRoute) -> bool:
    return isinstance(route, APIRoute) and getattr(route.endpoint, _OPEN, False)


def open_paths(routes: Iterable[BaseRoute]) -> frozenset[str]:
    """The paths of open endpoints, which have no parameters: compared whole, with what the router compares too."""
    found = (context for context in iter_route_contexts(list(routes)) if is_open(context.original_route))
    return frozenset(context.path for context in found if context.path is not None)


class Gate:
    """Lets in who is somebody, and leaves the caller in the scope."""

    def __init__(
        self,
        inner: ASGIApp,
        access: Authenticator,
        authentication: Histogram,
        open_to_all: frozenset[str],
        count_error: Callable[[str], None],
    ) -> None:
        self._inner = inner
        self._access = access
        self._authentication = authentication
        self._open = open_to_all
        self._count_error = count_error

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http" or scope["path"] in self._open:
            return self._inner(scope, receive, send)
        return self._let_in(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = perf_counter()
        try:
            headers = scope["headers"]
            scope[CALLER] = self._access.recognised(headers) or await self._access.identify(headers)
        except ToolServiceError as error:
            self._authentication.observe(perf_counter() - begin)
            self._count_error(error.kind.error_type)
            body = orjson.dumps({"error": error.as_error()})
            await respond(send, error.http_status, refusal_headers(error, body), body)
        else:
            self._authentication.observe(perf_counter() - begin)
            await self._inner(scope, receive, _unkept(send))


def _unkept(send: Send) -> Send:
    """For nobody else: a cache on the way knows Authorization (RFC 9111, section 3.5), and no X-API-Key."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], NO_STORE]}
        await send(message)

    return told


def caller_with(request: Request, scope: str) -> Caller:
    """Who calls, when it has this scope. A request that did not come through the gate is nobody's."""
    caller = request.scope.get(CALLER)
    if not isinstance(caller, Caller):
        raise CredentialMissing
    require_scope(caller, scope)
    return caller
