"""The HTTP server around an open service: uvicorn with our bounds and our way to stop.

SIGTERM or SIGINT: /readyz turns 503, DRAIN_SECONDS of serving on, then no new calls, running ones end within their
deadlines. A second signal ends at once. uvicorn alone closes its listener before anybody has stopped sending.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator

import uvicorn

from app.service import Phase, Service
from app.settings import http_url
from app.transport.access_log import access_log
from app.transport.app import Guard
from app.transport.lane import Lane, lane_class
from app.transport.protocol import BoundedHttpProtocol, protocol_class
from app.transport.wire import HttpBounds, Wire

logger = logging.getLogger("app.server")

FINISH_MARGIN_S = 5.0
"""After the longest deadline of a tool: what writing the answers may take."""

SHUTDOWN_STEP_S = 0.05

BACKLOG = 65_535
"""Connections that wait to be accepted: as many as the system allows (net.core.somaxconn). Who finds no place there
comes back after a second or three, by the system's own clock."""

ACCEPTED_AT_ONCE = 16
"""Connections in one turn of the loop. libuv accepts one of each listener, so under load, with turns of 50 ms, twenty
new callers a second were let in, and the others waited while known ones were served."""

GC_THRESHOLD = 50_000
"""Young collections at uvicorn's and our rate of garbage came every few milliseconds with the default of 700."""


class CannotListen(Exception):
    """The address cannot be bound: names it, why, and the arguments to change."""

    def __init__(self, host: str, port: int, error: BaseException | None) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        super().__init__(f"cannot listen on {host} port {port} ({reason}); choose another --host or --port")


class Server(uvicorn.Server):
    """One listener over one service."""

    def __init__(self, app: Guard, service: Service, host: str, port: int) -> None:
        settings = service.settings
        self._service = service
        self._wire = Wire(
            HttpBounds(
                request_bytes_max=settings.max_request_bytes,
                requests_bytes_max=max(settings.max_request_bytes_in_flight, settings.max_request_bytes),
                responses_bytes_max=settings.max_response_bytes_in_flight,
                header_read_timeout_s=settings.request_read_timeout_s,
                body_read_timeout_s=settings.request_read_timeout_s,
            ),
            access_log(settings.access_log_ratio),
        )
        self._draining: asyncio.Task[None] | None = None
        service.metrics.wire_refusals = lambda: {str(reason): count for reason, count in self._wire.refused.items()}
        service.lifecycle.on_crash = self.drain
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                backlog=BACKLOG,
                loop="uvloop",
                http=protocol_for(app, self._wire, lane=settings.protocol_lane),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(settings.forwarded_allow_ips),
                forwarded_allow_ips=list(settings.forwarded_allow_ips),
                timeout_graceful_shutdown=int(settings.tool_execution_timeout + FINISH_MARGIN_S),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would stop at once, and die of the signal afterwards instead of exiting 0."""
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGTERM: self.stop, signal.SIGINT: self.stop}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            handlers[signal.SIGHUP] = self.drain  # a terminal that closes may say so twice
        for one, handler in handlers.items():
            loop.add_signal_handler(one, handler)
        try:
            yield
        finally:
            for one in handlers:
                loop.remove_signal_handler(one)
            if self._draining is not None:
                self._draining.cancel()
            self._wire.close()

    async def startup(self, sockets: object = None) -> None:
        try:
            await super().startup()
        except (SystemExit, UnicodeError) as end:  # uvicorn logs the bare error and exits
            error = end.__context__ if isinstance(end, SystemExit) else end
            raise CannotListen(self.config.host, self.config.port, error) from error
        if self.started:
            await self._accept_more()
            freeze_garbage()
            raise_open_files()
            self._service.lifecycle.serve()
            logger.info("serving", extra={"url": http_url(self.config.host, self.port)})

    async def _accept_more(self) -> None:
        """Each listener is there as often as connections are to be accepted at once."""
        loop, config = asyncio.get_running_loop(), self.config

        def connection() -> asyncio.Protocol:
            protocol: type[BoundedHttpProtocol] = config.http_protocol_class  # type: ignore[assignment]
            return protocol(config, self.server_state, self.lifespan.state)

        for listener in list(self.servers[0].sockets):
            for _ in range(ACCEPTED_AT_ONCE - 1):
                again = socket.socket(fileno=os.dup(listener.fileno()))
                self.servers.append(await loop.create_server(connection, sock=again, backlog=BACKLOG))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn waits for connections and for its own tasks; a call whose client has gone is in neither."""
        loop, calls = asyncio.get_running_loop(), self._service.executor.calls
        ends = loop.time() + (self.config.timeout_graceful_shutdown or 0)
        await super().shutdown(sockets)
        while len(calls) and not self.force_exit and loop.time() < ends:  # noqa: ASYNC110 - force_exit is no event
            await asyncio.sleep(SHUTDOWN_STEP_S)

    @property
    def port(self) -> int:
        """The port that was bound; differs from the one asked for when that was 0."""
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port

    def stop(self) -> None:
        """Begin to drain; called again, end at once."""
        if self._draining is None:
            self.drain()
        else:
            logger.info("ending at once", extra={"running": len(self._service.executor.calls)})
            self._service.lifecycle.hurried = True
            self.force_exit = self.should_exit = True

    def drain(self) -> None:
        """Begin to drain, unless it has begun: a crash in the middle of it must not cut running calls."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain(), name="drain")

    async def _drain(self) -> None:
        self._service.lifecycle.phase = Phase.DRAINING
        self._wire.draining = True
        seconds = self._service.settings.drain_seconds
        logger.info("draining", extra={"seconds": seconds})
        await asyncio.sleep(seconds)
        self._service.executor.calls.stop_accepting()
        self.should_exit = True


def protocol_for(app: Guard, wire: Wire, *, lane: bool) -> type[BoundedHttpProtocol]:
    """The class of every connection to this application."""
    return lane_class(Lane(app.door_at, app.is_good_host), wire) if lane else protocol_class(wire)


def freeze_garbage() -> None:
    """What start-up made lives as long as the process: out of every later collection with it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 100)


def raise_open_files() -> None:
    """Take all the open files that we may have; the soft limit of 1,024 is for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
