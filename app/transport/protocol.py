"""The HTTP/1.1 connection: uvicorn's httptools protocol with the bounds in bytes, counts and seconds that it lacks.

Owns what happens to a peer that sends too much, too slowly or not HTTP: one JSON answer in order, then a close that the
peer can read. Knows no route but the two whose errors are JSON-RPC, and no application beyond ASGI.
The server's builder makes one `Wire` and gives `protocol_class(wire)` to `uvicorn.Config(http=..., ws="none")`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeGuard

import httptools
import orjson
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.errors import BodyTooLarge, BodyTooSlow, InvalidRequest, Overloaded, ToolServiceError
from app.transport.access_log import LINE, AccessLog, path_of, tell
from app.transport.allowance import retry_after_s
from app.transport.exchange import EXTENSION, Exchange
from app.transport.gathering import GatheringTransport
from app.transport.room import SHARE, Share
from app.transport.turns import LARGE_BODY_BYTES
from app.transport.wire import Reason, Wire

RPC_PATHS = frozenset({b"/api/v1/jsonrpc", b"/mcp"})
"""Where a refusal is a JSON-RPC response; everywhere else it is a REST error."""


class Refusal(NamedTuple):
    """A connection's last answer. Its request did not run, or was told that the client has gone."""

    reason: Reason
    error: ToolServiceError


def _invalid(reason: Reason, message: str, http_status: int = 400) -> Refusal:
    error = InvalidRequest(message)
    error.http_status = http_status
    return Refusal(reason, error)


MALFORMED = _invalid(Reason.MALFORMED, "This is not a well-formed HTTP/1.1 request")
BAD_HOST = _invalid(Reason.HOST, "An HTTP/1.1 request has exactly one Host header that names a host")
BAD_FRAMING = _invalid(
    Reason.FRAMING, "Send the body with one Content-Length, or in HTTP/1.1 with chunked coding alone"
)
BAD_VERSION = _invalid(Reason.VERSION, "Use HTTP/1.1", 505)


class _HeldFlow(FlowControl):
    """While `held`, a running application's `receive()` cannot resume reading: the bytes would be other requests."""

    held = False

    def hold(self) -> None:
        self.held = True
        self.pause_reading()

    def release(self) -> None:
        self.held = False
        self.resume_reading()

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class _BodyOnly:
    """Callbacks of a parser that reads one body."""

    def __init__(self, connection: BoundedHttpProtocol) -> None:
        self.on_chunk_header = connection.on_chunk_header
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete


IDLE, HEAD, BODY, DEAF, LINGER = range(5)
"""What the next byte belongs to: nothing yet; a head; a body; nothing that we will read (earlier answers are still due,
then the refusal); nothing (the refusal is sent). Plain integers: they are compared several times a request."""

RETRY_AFTER_MS = 1000
"""Told to who sends more requests in a row than wait on one connection: their answers are due first. And to who sends a
large body while others take all the room for such."""

BODIES_FULL = Refusal(
    Reason.BODIES_FULL,
    Overloaded("Too many large requests are under way here; send this one again", retry_after_ms=RETRY_AFTER_MS),
)

_CHUNKED = -1

_CHUNK_BYTES_MIN = len(b"0\r\n\r\n")
"""What a chunk adds to its content."""

_HOST = re.compile(rb"(?:\[([0-9A-Fa-f:.]+)\]|[A-Za-z0-9._~%!$&'()*+,;=-]+)(?::[0-9]{0,5})?")
"""RFC 9110, section 7.2, by way of RFC 3986; an http URI has no empty host (section 4.2.1)."""

_BLANKS = b" \t"
"""The parser keeps those behind a header's value, which are no part of it (RFC 9110, section 5.5)."""

_INSPECTED = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})


def protocol_class(wire: Wire, base: type[BoundedHttpProtocol] | None = None) -> type[BoundedHttpProtocol]:
    """The class for `uvicorn.Config(http=...)`: uvicorn makes an object of it per connection, all on this wire."""
    return type("WiredHttpProtocol", (base or BoundedHttpProtocol,), {"wire": wire, "__slots__": ()})


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. uvicorn's part makes ASGI of requests; this part decides what is a request, and for how long.

    What httptools refuses by itself (tests hold it to that): Content-Length twice, malformed or beside
    Transfer-Encoding, folded lines, NUL, bare CR or LF, malformed chunks, a target beyond ASCII.
    """

    wire: ClassVar[Wire]

    # Beside uvicorn's 28 attributes: past 30, CPython 3.11 gives up its fast layout: 0.4 µs a request.
    __slots__ = (
        "_answer",
        "_blocked_since",
        "_body_bytes",
        "_bounds",
        "_chunks",
        "_declared_bytes",
        "_framing_bytes",
        "_head_bytes",
        "_host_checked",
        "_hosts",
        "_linger_bytes",
        "_phase",
        "_running",
        "_segment_bytes",
        "_share",
        "_shared_bytes",
        "_since",
        "_task",
        "_verdict",
    )

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bounds = self.wire.bounds
        self._phase = IDLE
        self._since = self.loop.time()
        """When the phase began that a deadline runs for."""
        self._blocked_since = 0.0
        """When the write buffer filled; 0 while it flows."""
        self._verdict: Refusal | None = None
        self._answer = b""
        self._running: RequestResponseCycle | None = None
        """The request that those in `pipeline` wait for; without any, `cycle` is the only one."""
        self._task: asyncio.Task[None] | None = None
        """Of the last request that the application began whose body may be large."""
        self._linger_bytes = self._bounds.linger_bytes_max
        self._host_checked: bytes | None = None
        self.url = b""
        self._segment_bytes = 0
        self._shared_bytes = 0
        """Of the segment in which this head began behind another message: at most so many are the head's."""
        self._head_bytes = 0
        self._body_bytes = 0
        self._framing_bytes = 0
        self._chunks = 0
        self._hosts = 0
        self._declared_bytes = 0
        """What Content-Length says, or _CHUNKED."""
        self._share: Share | None = None
        """What this connection has of the room for large bodies, since the first that may be one."""

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        if not self.wire.admit(self.expire, self.loop):
            self.transport = transport
            transport.abort()
            return
        gathering = GatheringTransport(transport, self.wire.outbox, self.loop)
        super().connection_made(gathering)
        self.flow: _HeldFlow = _HeldFlow(gathering)

    def connection_lost(self, exc: Exception | None) -> None:
        self.wire.forget(self.expire)
        self.wire.note_read(self.transport)
        running = self._running if self.pipeline else self.cycle
        self.pipeline.clear()
        if is_open(running):
            self._disconnect(running)
        if self._share is not None and self._share.bytes:
            self._give_room_back_late(self._share)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._blocked_since = self.loop.time()
        super().pause_writing()
        self.wire.note_unread(self.transport)

    def resume_writing(self) -> None:
        self._blocked_since = 0.0
        super().resume_writing()
        self.wire.note_read(self.transport)

    def data_received(self, data: bytes) -> None:
        phase = self._phase
        if phase >= DEAF:
            self._forget_bytes(len(data))
            return
        cycle, body_bytes = self.cycle, self._body_bytes
        self._segment_bytes = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as exc:
            if self._verdict:
                self._refuse(self._verdict)
            else:  # an exception of ours is the context of httptools' own; its name alone, for its text quotes the peer
                self._refuse(MALFORMED, type(exc.__context__ or exc).__name__)
        else:
            if self._phase != IDLE:  # the usual segment brings a whole request
                self._note_unfinished(phase, cycle, len(data), self._body_bytes - body_bytes)

    def _note_unfinished(
        self, phase_before: int, cycle_before: RequestResponseCycle, segment_bytes: int, body_bytes: int
    ) -> None:
        """A head or body goes on in a later segment: start its clock, count the bytes that the parser does not tell of.

        What begins behind another message in a segment is counted exactly once its head has ended, if that is near.
        """
        phase, same_request = self._phase, self.cycle is cycle_before
        if phase != phase_before or not same_request:
            self._since = self.loop.time()
        if phase == HEAD and phase_before != BODY and same_request:
            self._head_bytes += segment_bytes
            if self._head_bytes > self._bounds.header_bytes_max:
                self._refuse(self._head_too_large())
        elif phase == HEAD:
            self._shared_bytes = segment_bytes
        elif phase == BODY and self._declared_bytes == _CHUNKED and same_request:
            self._framing_bytes += segment_bytes - body_bytes
            if self._framing_bytes > self._bounds.header_bytes_max + self._body_bytes:
                self._refuse(self._head_too_large())

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Go on after a request that asked for another protocol (RFC 9110, section 7.8: a server may ignore it).

        The parser takes such a request for complete without its body and would read the body as the next request.
        """
        if self._declared_bytes:
            cycle = self.cycle
            cycle.more_body = True
            cycle.keep_alive = False
            self._phase = BODY
            self._since = self.loop.time()
            chunked = self._declared_bytes == _CHUNKED
            framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % self._declared_bytes
            self.parser = httptools.HttpRequestParser(_BodyOnly(self))
            self.parser.feed_data(b"POST / HTTP/1.1\r\nconnection: close\r\n" + framing + b"\r\n\r\n")
        if rest:
            self.data_received(rest)

    def _should_upgrade(self) -> bool:
        return False

    # What the parser finds

    def on_message_begin(self) -> None:
        if self.pipeline and len(self.pipeline) >= self._bounds.pipelined_max:
            waiting = f"More than {self._bounds.pipelined_max} requests wait on this connection"
            self._reject(Refusal(Reason.PIPELINE_FULL, Overloaded(waiting, retry_after_ms=RETRY_AFTER_MS)))
        super().on_message_begin()
        self._head_bytes = self._shared_bytes = self._hosts = self._declared_bytes = 0
        self._phase = HEAD

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if value[-1:] in _BLANKS:
            value = value.rstrip(_BLANKS)
        headers = self.headers
        headers.append((name, value))
        if len(headers) > self._bounds.headers_max:
            self._reject(self._head_too_large())
        if name in _INSPECTED and self._phase == HEAD:
            self._inspect(name, value)

    def _inspect(self, name: bytes, value: bytes) -> None:
        if name == b"content-length":
            self._declared_bytes = int(value)  # the parser lets only digits through
        elif name == b"host":
            self._hosts += 1
            if value != self._host_checked:
                if not _names_host(value):
                    self._reject(BAD_HOST)
                self._host_checked = value
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                self._reject(BAD_FRAMING)
            self._declared_bytes = _CHUNKED
            self._body_bytes = self._framing_bytes = self._chunks = 0
        elif value.lower() == b"100-continue":
            self.expect_100_continue = True

    def on_headers_complete(self) -> None:
        self._check_head()
        previous = self.cycle
        super().on_headers_complete()
        self._phase = BODY
        self.headers = []  # for trailers, which nobody asked for; uvicorn would add them to those of a running request
        if self.pipeline:
            self._queue_behind(previous)
        if self.wire.draining:
            self.cycle.keep_alive = False

    def _check_head(self) -> None:
        bounds = self._bounds
        if self._hosts != 1 or self.parser.get_http_version() != "1.1":
            self._check_host_and_version(self.parser.get_http_version())
        head_bytes = self._shared_bytes + self._head_bytes + self._segment_bytes
        if head_bytes > bounds.header_bytes_max or len(self.url) > bounds.url_bytes_max:
            self._check_head_bytes()
        if self._declared_bytes > bounds.request_bytes_max:
            self._reject(self._body_too_large())
        if not 0 <= self._declared_bytes <= LARGE_BODY_BYTES:
            self._begin_large_body()

    def _begin_large_body(self) -> None:
        if not self.wire.room.fits(max(0, self._declared_bytes)):
            self._reject(BODIES_FULL)
        if self._share is None or not self._share.bytes:  # anew: behind a proxy the next body is another tenant's
            self._share = Share(self.wire.room)
        self._share.declared_bytes = self._declared_bytes
        self.scope[SHARE] = self._share  # type: ignore[literal-required]  # of our own

    def _check_host_and_version(self, version: str) -> None:
        if version not in ("1.0", "1.1"):
            self._reject(BAD_VERSION)
        if self._hosts > 1 or (version == "1.1" and not self._hosts):
            self._reject(BAD_HOST)
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, section 10.1.1
            if self._declared_bytes == _CHUNKED:
                self._reject(BAD_FRAMING)  # RFC 9112, section 6.1

    def _check_head_bytes(self) -> None:
        request_line_bytes = len(self.parser.get_method()) + len(self.url) + len(b"  HTTP/1.1\r\n")
        head_bytes = request_line_bytes + _fields_bytes(self.headers)
        if head_bytes > self._bounds.header_bytes_max or len(self.url) > self._bounds.url_bytes_max:
            self._reject(self._head_too_large())

    def on_body(self, body: bytes) -> None:
        declared_bytes = self._declared_bytes
        room_bytes = len(body) if declared_bytes > LARGE_BODY_BYTES else 0
        if declared_bytes == _CHUNKED:
            room_bytes = self._pass_chunk(len(body))
        cycle = self.cycle
        if cycle.response_complete:
            return
        if room_bytes:
            self._take_room(room_bytes)
        cycle.body += body
        cycle.message_event.set()
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def _pass_chunk(self, chunk_bytes: int) -> int:
        """The room that it takes: none until the body is large, and then for what came before it too."""
        before = self._body_bytes
        self._body_bytes = body_bytes = before + chunk_bytes
        if body_bytes > self._bounds.request_bytes_max:
            self._reject(self._body_too_large())
        if body_bytes <= LARGE_BODY_BYTES:
            return 0
        return chunk_bytes if before > LARGE_BODY_BYTES else body_bytes

    def _take_room(self, body_bytes: int) -> None:
        """For what has come of a body that is large."""
        assert self._share is not None
        if not self._share.take(body_bytes):
            self._reject(BODIES_FULL)

    def _give_room_back_late(self, share: Share) -> None:
        """Once the request has ended: it has its body whether or not somebody waits for the answer."""
        if self._task is None:
            self._give_room_back(share)
        else:
            self._task.add_done_callback(lambda _: self._give_room_back(share))

    def _give_room_back(self, share: Share) -> None:
        self.wire.note_let_go(share.give_back(), self.loop)

    def on_chunk_header(self) -> None:
        """Tens of thousands of one-byte chunks fit into one read, and each costs us a callback."""
        self._chunks += 1
        if self._chunks * _CHUNK_BYTES_MIN > self._bounds.header_bytes_max + self._body_bytes:
            self._reject(self._head_too_large())

    def on_message_complete(self) -> None:
        if self.headers and _fields_bytes(self.headers) > self._bounds.header_bytes_max:
            self._reject(self._head_too_large())
        self._phase = IDLE
        cycle = self.cycle
        if cycle.response_complete:
            self._since = self.loop.time()
        else:
            cycle.more_body = False
            cycle.message_event.set()

    # Taking turns

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        # As uvicorn does, without the loop's task factory, which is there for the tasks of tools.
        log = self.wire.access_log
        line = None if log is None else log.line_of(cycle, app)
        task = asyncio.Task(cycle.run_asgi(line or app), loop=self.loop)
        self.tasks.add(task)
        if self.pipeline or not 0 <= self._declared_bytes <= LARGE_BODY_BYTES:
            self._task = task
        if cycle.scope["method"] == "HEAD" or cycle.waiting_for_100_continue:
            # Neither has its head for a first write: one has no second, the other says 100 before it.
            task.add_done_callback(self.tasks.discard)
            return
        exchange = Exchange(cycle, self.transport, self.wire.default_head, self.tasks, line)
        cycle.transport = exchange  # type: ignore[assignment]  # the part of it that a cycle uses
        cycle.scope["extensions"] = {EXTENSION: exchange}  # type: ignore[dict-item]  # of our own
        task.add_done_callback(exchange.ended)

    def _queue_behind(self, previous: RequestResponseCycle) -> None:
        if len(self.pipeline) == 1:
            self._running = previous
        self.flow.hold()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self._share is not None and self._share.bytes and not self.pipeline:
            self._give_room_back(self._share)
        if self.transport.is_closing():
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._running = cycle
            self._start_asgi_task(cycle, app)
            if self.pipeline or self._phase == DEAF:
                return
        elif self._phase == DEAF:
            self._close_lingering()
            return
        elif self._phase != BODY:
            self._since = self.loop.time()
        self.flow.release()

    # Ends

    def expire(self, now: float) -> None:
        """Called by the sweep: cut what is overdue."""
        closing = self.transport.is_closing()
        if closing and not self._blocked_since:
            self._blocked_since = now
        if self._blocked_since and now - self._blocked_since > self._bounds.write_timeout_s:
            self.wire.count(Reason.READER_TOO_SLOW)
            self.transport.abort()
        elif not closing:
            self._expire_read(now - self._since, now)

    def _expire_read(self, waited_s: float, now: float) -> None:
        bounds, phase, cycle = self._bounds, self._phase, self.cycle
        if phase == IDLE:
            if not is_open(cycle) and waited_s > bounds.idle_timeout_s:
                self.wire.count(Reason.IDLE)
                self.transport.close()
        elif phase == HEAD:
            if is_open(cycle):
                self._since = now
            elif waited_s > bounds.header_read_timeout_s:
                late = f"Request head did not arrive within {bounds.header_read_timeout_s:g} s"
                self._refuse(_invalid(Reason.HEAD_TOO_SLOW, late, 408))
        elif phase == BODY:
            if self.flow.read_paused or cycle.waiting_for_100_continue:
                self._since = now
            elif waited_s > bounds.body_read_timeout_s:
                self._refuse(Refusal(Reason.BODY_TOO_SLOW, BodyTooSlow(bounds.body_read_timeout_s)))
        elif phase == LINGER and waited_s > bounds.linger_timeout_s:
            self.transport.abort()

    def _reject(self, refusal: Refusal) -> NoReturn:
        """Stop the parser from inside one of its callbacks; `data_received` then refuses."""
        self._verdict = refusal
        raise httptools.HttpParserError(refusal.reason)

    def _refuse(self, refusal: Refusal, detail: str = "") -> None:
        """Understand nothing more from this peer, answer when all earlier requests have their answers, and close."""
        self.wire.count(refusal.reason, detail)
        if self._phase != BODY or self._give_up_request():
            self._answer = self._render(refusal)
            if self.wire.access_log is not None:
                self._tell_refusal(self.wire.access_log, refusal.error.http_status)
        self._phase = DEAF
        if is_open(self.cycle):
            self.flow.hold()
        else:
            self._close_lingering()

    def _tell_refusal(self, log: AccessLog, status: int) -> None:
        """By the request's own access line where it has begun to run: it was counted then."""
        scope: Any = self.scope
        if self._phase != IDLE and LINE in scope:
            if scope[LINE] is not None:
                scope[LINE].refused(status)
        elif log.is_due():
            url = b"" if self._phase == IDLE else self.url
            # Before the target, the parser tells of some method, whatever came.
            method = scope.get("method") or self.parser.get_method().decode("ascii") if url else None
            tell(method, path_of(url), self.client, status)

    def _give_up_request(self) -> bool:
        """Drop the request whose body went wrong; whether it can still be answered."""
        cycle = self.cycle
        if self.pipeline:
            self.pipeline.popleft()
            assert self._running is not None
            self.cycle = self.pipeline[0][0] if self.pipeline else self._running
            return True
        if is_open(cycle):
            self._disconnect(cycle)
        return not cycle.response_started

    def _disconnect(self, cycle: RequestResponseCycle) -> None:
        cycle.disconnected = True
        cycle.waiting_for_100_continue = False
        cycle.logger = self.wire.gone_log
        cycle.message_event.set()

    def _close_lingering(self) -> None:
        self._phase = LINGER
        if self._share is not None:
            self._give_room_back(self._share)
        self._since = self.loop.time()
        self.transport.write(self._answer)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.release()

    def _forget_bytes(self, count: int) -> None:
        self._linger_bytes -= count
        if self._linger_bytes < 0:
            self.transport.abort()

    def _render(self, refusal: Refusal) -> bytes:
        error = refusal.error
        # One request too many has no path yet; who sends so many in a row sends them all to the door of the last.
        has_path = self._phase != IDLE or refusal.reason is Reason.PIPELINE_FULL
        is_rpc = has_path and self.url.partition(b"?")[0] in RPC_PATHS
        envelope = {"jsonrpc": "2.0", "error": error.as_error(), "id": None} if is_rpc else {"error": error.as_error()}
        body = orjson.dumps(envelope)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        if error.retry_after_ms is not None:
            headers.append((b"retry-after", b"%d" % retry_after_s(error.retry_after_ms)))
        lines = [b"%b: %b\r\n" % header for header in headers]
        is_head = self._phase == BODY and self.scope["method"] == "HEAD"
        return b"".join([STATUS_LINE[error.http_status], *lines, b"\r\n", b"" if is_head else body])

    def _head_too_large(self) -> Refusal:
        bounds = self._bounds
        if len(self.url) > bounds.url_bytes_max:
            return _invalid(Reason.URL_TOO_LONG, f"Request target is over {bounds.url_bytes_max} bytes", 414)
        over = (
            f"Headers, trailers or chunk framing are over {bounds.header_bytes_max} bytes or {bounds.headers_max} lines"
        )
        return _invalid(Reason.HEAD_TOO_LARGE, over, 431)

    def _body_too_large(self) -> Refusal:
        return Refusal(Reason.BODY_TOO_LARGE, BodyTooLarge(self._bounds.request_bytes_max))


def _names_host(value: bytes) -> bool:
    """Whether a Host is one: in brackets stands an IPv6 address, or later readers of it would stumble."""
    found = _HOST.fullmatch(value)
    if found is None or found[1] is None:
        return found is not None
    try:
        ipaddress.IPv6Address(found[1].decode("ascii"))
    except ValueError:
        return False
    return True


def is_open(cycle: RequestResponseCycle | None) -> TypeGuard[RequestResponseCycle]:
    """A request whose answer is still due. Before the first one uvicorn has None here."""
    return cycle is not None and not (cycle.response_complete or cycle.disconnected)


def _fields_bytes(fields: list[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) + len(b": \r\n") for name, value in fields)
