"""Access lines: one of every so many HTTP requests gets a line in the log, by whichever way it was answered.

Counts and writes; what is known of a request is handed over, and no header, body or query is among it. The protocol
class tells of what goes through ASGI and of what it refuses itself, the lane of what it answers.
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.calls import CurrentCall, current_call
from app.telemetry.logging import ACCESS_LINE, call_facts
from app.transport.request import RequestContext

NAME, MESSAGE = ACCESS_LINE
logger = logging.getLogger(NAME)

LINE = "agentcore.access_line"
"""Key in the scope of a request that was counted; the value is its AsgiLine, or None where it gets no line."""

_WHOLE = 1_000_000_000
"""What the parts of requests add up to until one is told: in whole numbers, so that a tenth is exactly a tenth."""


class AccessLog:
    """The lines of one server. Every request is counted once, by `is_due` alone."""

    __slots__ = ("_counted", "_part")

    def __init__(self, ratio: float) -> None:
        self._part = round(ratio * _WHOLE)
        self._counted = 0

    def is_due(self) -> bool:
        """Whether the request that is counted now gets a line."""
        self._counted += self._part
        if self._counted < _WHOLE:
            return False
        self._counted -= _WHOLE
        return True

    def line_of(self, cycle: RequestResponseCycle, asgi: ASGI3Application) -> AsgiLine | None:
        """Count a request that goes through ASGI."""
        line = AsgiLine(cycle, asgi) if self.is_due() else None
        cycle.scope[LINE] = line  # type: ignore[literal-required]  # of our own
        return line


def access_log(ratio: float) -> AccessLog | None:
    """None where nothing is told, so that a request pays for one look."""
    return AccessLog(ratio) if ratio > 0 else None


def tell(
    method: str | None,
    path: str | None,
    client: tuple[str, int] | None,
    status: int | None,
    context: RequestContext | None = None,
    call: CurrentCall | None = None,
    **facts: Any,
) -> None:
    """Write one line. `status` is None where nothing was answered."""
    known: dict[str, Any] = {"method": method, "path": path, "client_address": client and client[0], **facts}
    if context is not None:
        known |= {"rpc_method": context.method, "batch": context.batch}
    told = {name: fact for name, fact in known.items() if fact is not None}
    logger.info(MESSAGE, extra={**told, "status": status, **({} if call is None else call_facts(call))})


def told_call(context: RequestContext | None, current: CurrentCall | None) -> CurrentCall | None:
    """The call that a request made: the one it names, or else that of what ran for it."""
    return current if context is None or context.call is None else CurrentCall.of(context.call)


class AsgiLine:
    """The line of one request behind ASGI; stands between uvicorn's cycle and the application."""

    __slots__ = ("_asgi", "_began", "_cycle", "_refused", "_response_bytes", "_status", "context")

    def __init__(self, cycle: RequestResponseCycle, asgi: ASGI3Application) -> None:
        self._cycle = cycle
        self._asgi = asgi
        self._began = perf_counter()
        self._status: int | None = None
        self._response_bytes = None if cycle.scope["method"] == "HEAD" else 0
        self._refused = False
        self.context: RequestContext | None = None
        """Set by an RPC door."""

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        current_call.set(None)  # a request that waited for its turn has the context of the one before
        cycle = self._cycle

        async def seen(event: ASGISendEvent) -> None:
            await send(event)
            if event["type"] == "http.response.start":
                self._status = event["status"]
            elif event["type"] == "http.response.body" and not cycle.disconnected:
                self._add(len(event.get("body", b"")))

        try:
            await self._asgi(scope, receive, seen)
        finally:
            self._tell()

    def answered(self, status: int, body_bytes: int) -> None:
        """By the exchange, past `send`."""
        self._status = status
        self._add(body_bytes)

    def refused(self, status: int) -> None:
        """By the connection, which told the application that its client has gone."""
        self._status = status
        self._response_bytes = None
        self._refused = True

    def _add(self, body_bytes: int) -> None:
        if self._response_bytes is not None:
            self._response_bytes += body_bytes

    def _tell(self) -> None:
        cycle, scope = self._cycle, self._cycle.scope
        del self._cycle, self._asgi  # the scope has us: a circle would be garbage for the collector
        status = self._status
        if not (cycle.response_started or self._refused):
            status = None if cycle.disconnected else 500  # uvicorn's, for an application that gave no answer
        tell(
            scope["method"],
            scope["path"],
            scope["client"],
            status,
            self.context,
            told_call(self.context, current_call.get()),
            duration_ms=ms_since(self._began),
            request_bytes=_declared_bytes(scope["headers"]),
            response_bytes=self._response_bytes,
            client_gone=True if cycle.disconnected and not self._refused else None,
        )


def path_of(url: bytes) -> str | None:
    """The path of a request target, decoded as for an application; None where it has none."""
    try:
        path = httptools.parse_url(url).path
    except httptools.HttpParserError:
        return None
    return unquote(path.decode("ascii")) if path else None


def ms_since(began: float) -> float:
    """`began`, `time.perf_counter()` seconds."""
    return round((perf_counter() - began) * 1e3, 3)


def _declared_bytes(headers: Any) -> int | None:
    for name, value in headers:
        if name == b"content-length":
            return int(value)
    return None
