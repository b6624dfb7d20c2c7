"""The protocol lane: the doors of calls answered inside the protocol class, without parser, scope, cycle or task.

Clients send the same head with every call. A head that went the whole way once, through the parser and the guard, is
remembered by its bytes; the next request with those bytes needs only its body. Whatever is new, unusual or incomplete
goes on to the ASGI application behind, which behaves the same: the same `Door` is behind both. What
changes from call to call (the credential's standing, drain, a slow reader) is asked for each time. PROTOCOL_LANE turns
the lane off; docs/adr/0019-protocol-lane.md has the figures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from time import perf_counter
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from app.access.authenticator import Presented
from app.calls import Caller, current_call
from app.errors import ToolServiceError
from app.stepping import Stepper
from app.transport.access_log import ms_since, tell, told_call
from app.transport.door import CLOSE_LINE, Door, Reply, Scope
from app.transport.protocol import IDLE, BoundedHttpProtocol, is_open
from app.transport.request import RequestContext
from app.transport.turns import LARGE_BODY_BYTES
from app.transport.wire import Wire

HEAD_BYTES_MAX = 2_048
"""Of a head that is remembered; a bearer token of some size fits."""

HEADS_BYTES_MAX = 12_582_912
"""Of heads remembered at once, in two halves. A caller has one for every length of body that it sends: 10,000 callers
of the JSON-RPC door with one each fit a half."""

HEAD_OWN_BYTES = 350
SCOPE_BYTES = 1_500
SHARED_SCOPE_BYTES = 500
"""What a head takes beside its bytes, what its headers take where the door reads them, and what all heads of one path
take together where it does not; by sys.getsizeof."""

NOT_REMEMBERED = frozenset(
    (
        b"expect",
        b"forwarded",
        b"idempotency-key",
        b"origin",
        b"proxy-connection",
        b"traceparent",
        b"tracestate",
        b"upgrade",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-request-id",
    )
)
"""What asks for something of the connection, is another one in each request, or is for a layer of the application."""


class KnownHead(Presented):
    """A head of a request for one of the doors, what it presents, and what else follows from its bytes alone."""

    __slots__ = ("body_bytes", "door", "scope")

    def __init__(self, door: Door, scope: Scope, presented: Presented, body_bytes: int) -> None:
        Presented.__init__(self, presented.digest, presented.is_key)
        self.door = door
        self.scope = scope
        self.body_bytes = body_bytes


class Lane:
    """What the connections of one server share: the doors, and the heads that were seen lately."""

    def __init__(self, door_at: Callable[[str], Door | None], is_good_host: Callable[[bytes], bool]) -> None:
        self._door_at = door_at
        self._is_good_host = is_good_host
        self.heads: dict[bytes, KnownHead] = {}
        self._older: dict[bytes, KnownHead] = {}
        self._bytes = 0
        self._scopes: dict[tuple[str, str], Scope] = {}

    def recall(self, head: bytes) -> KnownHead | None:
        """The head, if it is remembered; from the older half it comes back into the newer."""
        known = self._older.get(head)
        if known is not None:
            self._keep(head, known)
        return known

    def learn(self, head: bytes, target: bytes, scope: Scope, body_bytes: int) -> None:
        """Remember a head that went the whole way, if it is one of the usual; its target is a path without escapes."""
        path: str = scope["path"]
        door = self._door_at(path)
        if door is None or target != path.encode() or len(head) > HEAD_BYTES_MAX or not self._is_usual(scope):
            return
        if body_bytes > LARGE_BODY_BYTES:  # takes its turn, and is counted
            return
        try:
            presented = door.access.presented(scope["headers"])
        except ToolServiceError:
            return
        self._keep(head, KnownHead(door, self._scope_for(door, scope), presented, body_bytes))

    def _scope_for(self, door: Door, scope: Scope) -> Scope:
        """What the door asks of a scope; one for all heads where it asks for no header."""
        path, scheme = scope["path"], scope["scheme"]
        if door.reads_headers:
            return {"headers": scope["headers"], "path": path, "scheme": scheme}
        return self._scopes.get((path, scheme)) or {"headers": [], "path": path, "scheme": scheme}

    def _is_usual(self, scope: Scope) -> bool:
        if scope["method"] != "POST" or scope["http_version"] != "1.1":
            return False
        for name, value in scope["headers"]:
            if name in NOT_REMEMBERED or (name == b"connection" and value.lower() != b"keep-alive"):
                return False
            if name == b"host" and not self._is_good_host(value):
                return False
        return True

    def _keep(self, head: bytes, known: KnownHead) -> None:
        if self._bytes >= HEADS_BYTES_MAX // 2:
            self._older, self.heads, self._bytes = self.heads, {}, 0
            self._scopes = {}
        self._bytes += len(head) + HEAD_OWN_BYTES
        if known.door.reads_headers:
            self._bytes += SCOPE_BYTES
        elif (shared := (known.scope["path"], known.scope["scheme"])) not in self._scopes:
            self._scopes[shared] = known.scope
            self._bytes += SHARED_SCOPE_BYTES + len(known.scope["path"])
        self.heads[head] = known


class _Nobody:
    """Where nobody waits for the client to go."""

    def set(self) -> None:
        pass


_NOBODY = _Nobody()


class LaneRequest(Stepper):
    """One request on the lane. It stands where uvicorn keeps its cycle, and is the call's client."""

    __slots__ = (
        "_began",
        "_known",
        "_protocol",
        "_request",
        "disconnected",
        "keep_alive",
        "logger",
        "message_event",
        "more_body",
        "response_complete",
        "response_started",
        "waiting_for_100_continue",
    )

    def __init__(self, protocol: LaneProtocol, known: KnownHead, began: float) -> None:
        Stepper.__init__(self, protocol.loop, protocol.context, protocol.tasks)
        self._protocol = protocol
        self._known = known
        self._began = began
        self._request: RequestContext | None = None
        # As of a cycle whose request came whole
        self.response_started = self.response_complete = self.disconnected = False
        self.waiting_for_100_continue = self.more_body = False
        self.keep_alive = True
        self.message_event: Any = _NOBODY
        self.logger: Any = None

    def serve(self, body: bytes, caller: Caller) -> None:
        door = self._known.door
        self._request = request = RequestContext(caller, self._began, self, door.tracing.begin(()))
        try:
            steps = door.begin(body, request, self._known.scope, self.returned)
        except Exception as error:
            self.raised(error)
        else:
            if steps is not None:
                self._context = self._context.copy()
                self.start(steps)

    # For the call: its client

    @property
    def is_gone(self) -> bool:
        return self.disconnected

    async def gone(self) -> None:
        if self.message_event is _NOBODY:
            self.message_event = asyncio.Event()  # of all who wait: a batch has several calls
        if not self.disconnected:
            await self.message_event.wait()

    # Its end

    def returned(self, value: Reply) -> None:
        protocol = self._protocol
        status, lines, body = value
        self.response_started = self.response_complete = True
        if not self.disconnected:
            closes = status != 200 and CLOSE_LINE in lines
            if not (self.keep_alive or closes):
                lines, closes = lines + CLOSE_LINE, True
            default = protocol.wire.default_head.of(protocol.server_state.default_headers)
            protocol.transport.write(b"".join((STATUS_LINE[status], default, lines, b"\r\n", body)))
            if closes:
                protocol.transport.close()
            protocol.on_response_complete()
        request = self._request
        if protocol.wire.access_log is not None and protocol.wire.access_log.is_due():
            self._tell(None if self.disconnected else status, len(body))
        self._let_go()
        tracing = self._known.door.tracing
        if tracing.recording and request is not None:
            tracing.request_ended(request, self._began)

    def raised(self, error: BaseException) -> None:
        """A bug, or the end of the loop."""
        if isinstance(error, asyncio.CancelledError):
            protocol = self._protocol
            protocol.transport.close()
            if protocol.wire.access_log is not None and protocol.wire.access_log.is_due():
                self._tell(None, 0)
            self._let_go()
            return
        self.returned(self._known.door.failed(error))

    def _tell(self, status: int | None, response_bytes: int) -> None:
        known = self._known
        tell(
            "POST",
            known.scope["path"],
            self._protocol.client,
            status,
            self._request,
            told_call(self._request, self._context.get(current_call)),
            duration_ms=ms_since(self._began),
            request_bytes=known.body_bytes,
            response_bytes=0 if status is None else response_bytes,
            client_gone=True if self.disconnected else None,
        )

    def _let_go(self) -> None:
        """Of the connection, which keeps its last request, and of the call, which knows us: circles are garbage for
        the collector."""
        self._request = None
        del self._protocol


def lane_class(lane: Lane, wire: Wire) -> type[LaneProtocol]:
    """The class for `uvicorn.Config(http=...)`, all of whose connections are on this lane and wire."""
    return type("LaneHttpProtocol", (LaneProtocol,), {"lane": lane, "wire": wire, "__slots__": ()})


class LaneProtocol(BoundedHttpProtocol):
    """One connection. A request takes the lane when no other is on its way here and it came whole, its head known."""

    lane: ClassVar[Lane]

    __slots__ = ("_held", "context")

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._held = b""
        """A known head whose body did not come with it."""
        self.context: Context = copy_context()

    def data_received(self, data: bytes) -> None:
        if self._phase != IDLE:
            super().data_received(data)
            return
        begin = perf_counter()
        held, self._held = self._held, b""
        request = held + data
        cycle = self.cycle
        end = request.find(b"\r\n\r\n") + 4
        head = request[:end]
        known = self.lane.heads.get(head) or self.lane.recall(head)
        if known is None or is_open(cycle):
            self._receive(request, head)
        elif len(request) != end + known.body_bytes:
            if len(request) == end:
                self._held = request  # most clients send a head and its body apart
                self._since = self.loop.time()
            else:
                self._begin_body(held)
                super().data_received(data)
        elif self.wire.draining or self.flow.write_paused or not known.door.is_plain(request):
            super().data_received(request)
        else:
            caller = known.door.access.again(known)
            if caller is None:
                super().data_received(request)
                return
            known.door.authentication.observe(perf_counter() - begin)
            served = LaneRequest(self, known, begin)
            self.cycle = served  # type: ignore[assignment]  # the part of a cycle that this class looks at
            served.serve(request[end:], caller)

    def _receive(self, data: bytes, head: bytes) -> None:
        """By the parser and the application; what it turns out to be may be remembered."""
        cycle = self.cycle
        super().data_received(data)
        body_bytes = self._declared_bytes
        if self.cycle is not cycle and self._phase == IDLE and 0 < body_bytes == len(data) - len(head):
            self.lane.learn(head, self.url, self.scope, body_bytes)  # type: ignore[arg-type]  # a dict of its own kind

    def expire(self, now: float) -> None:
        self._give_up_waiting()
        super().expire(now)

    def shutdown(self) -> None:
        self._give_up_waiting()
        super().shutdown()

    def _give_up_waiting(self) -> None:
        """A head without its body is the parser's affair once it has waited for a while: there are its deadlines."""
        held, self._held = self._held, b""
        self._begin_body(held)

    def _begin_body(self, held: bytes) -> None:
        """The body's time runs since its head was there."""
        if held:
            since = self._since
            super().data_received(held)
            self._since = since
