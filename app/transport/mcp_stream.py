"""What goes on beside a call over MCP while it runs: progress goes out as server-sent events, the client may hang up.

Knows no method: the door opens a stream, the calls tell it how far they are.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from app.calls import Client
from app.errors import clean_text

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

EVENTS_MAX = 1_000
"""Notifications that one call may send; a tool that tells of each of a million rows floods its agent."""

WATCH_AFTER_S = 0.005
"""Most calls have ended by then, and a watch costs a task."""

STREAM_HEADERS = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class ProgressStream:
    """The response of one call as server-sent events. Opens with the first notification and not before: a call that
    says nothing is answered in plain JSON, with the HTTP status of its outcome."""

    def __init__(self, send: Send, token: str | int, headers: tuple[tuple[bytes, bytes], ...] = STREAM_HEADERS) -> None:
        self._send = send
        self._token = token
        self._headers = headers
        self._turn = asyncio.Lock()
        self._done = -math.inf
        self._events = 0
        self._ended = False
        self.opened = False

    async def notify(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Send `notifications/progress`. What does not go forward is left out (specification: it must increase)."""
        if self._ended or self._events >= EVENTS_MAX or not self._done < done < math.inf:
            return
        self._done = done
        self._events += 1
        params: dict[str, Any] = {"progressToken": self._token, "progress": done}
        if total is not None and math.isfinite(total):
            params["total"] = total
        if message is not None:
            params["message"] = clean_text(message)
        await self._write(
            orjson.dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": params}), more=True
        )

    def end(self) -> None:
        """The call has its outcome: a run that was given up says nothing more."""
        self._ended = True

    async def finish(self, answer: bytes) -> None:
        """The response, which ends the stream."""
        await self._write(answer, more=False)

    async def _write(self, document: bytes, *, more: bool) -> None:
        async with self._turn:
            if not self.opened:
                await self._send({"type": "http.response.start", "status": 200, "headers": list(self._headers)})
                self.opened = True
            event = b"event: message\ndata: %b\n\n" % _in_one_line(document)
            await self._send({"type": "http.response.body", "body": event, "more_body": more})


def _in_one_line(document: bytes) -> bytes:
    """The same JSON, for readers that end lines where Unicode does, as httpx and httpx-sse before 0.4.2: an event with
    one of these in it was lost to them, and with it the response."""
    for character, escaped in _LINE_ENDS:
        document = document.replace(character, escaped)
    return document


_LINE_ENDS = tuple((character.encode(), b"\\u%04x" % ord(character)) for character in "\x85\u2028\u2029")


class HangUp:
    """Cancels a call whose client closes the connection, which is how the modern era cancels."""

    __slots__ = ("_cancel", "_client", "_task", "_timer")

    def __init__(self, client: Client, cancel: Callable[[], object]) -> None:
        self._client = client
        self._cancel = cancel
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="mcp-client-watch")

    async def _watch(self) -> None:
        await self._client.gone()
        self._cancel()

    def stop(self) -> None:
        """Let go of one another too: in a circle, a call with its parameters would wait for the garbage collector."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            self._task = None
