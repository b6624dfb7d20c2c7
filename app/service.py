"""The composition root: builds every room once, in order, and closes them in reverse.

`open_service` is what the command line and the tests call. Nothing else constructs a room or reads a setting.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

from app.access.authenticator import Authenticator
from app.access.store import KeyStore
from app.bus import Bus
from app.cache.idempotency import Idempotency
from app.cache.results import ResultCache
from app.cache.store import StoreAway
from app.clients import pool_states
from app.egress import EgressClient
from app.execution_log.history import ExecutionHistory
from app.execution_log.log import ExecutionLog
from app.executor.executor import Executor
from app.executor.reuse import Reuse
from app.executor.runner import Runner
from app.executor.threads import ThreadPool
from app.limits.adaptive import LoadControl
from app.limits.admission import Admission
from app.limits.concurrency import Slots
from app.opening import (
    Database,
    declared_limits,
    open_access,
    open_admission,
    open_bus,
    open_cache_store,
    open_control,
    open_database,
    open_egress,
    open_history,
    open_log,
    open_results,
    open_tracing_of,
)
from app.settings import Settings
from app.telemetry.metrics import Metrics
from app.telemetry.scraping import Scraper
from app.telemetry.supervision import LoopWatch, Supervisor
from app.telemetry.system import SystemWatch
from app.telemetry.tracing import SPANS_CLOSE_S, Tracing
from app.tools.builtin import builtin_tools
from app.tools.loading import LoadProblem, load_tools
from app.tools.registry import Registry
from app.tools.tool import Tool

LOG_DRAIN_S = 5.0
"""At the end, for rows that the database does not have yet; what is left then stays in the journal."""

HURRIED_S = 0.5
"""For each of what is still to be sent, once a second signal has come: enough where nothing hangs."""


class Phase(Enum):
    """Where a process is in its life; `/readyz` is 200 in SERVING alone."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(slots=True)
class Lifecycle:
    """The one mutable part of a service: its phase, and why it is ending when nobody asked it to."""

    phase: Phase = Phase.STARTING
    crashed: str | None = None
    hurried: bool = False
    on_crash: Callable[[], None] = field(default=lambda: None)
    on_serving: Callable[[], None] = field(default=lambda: None)

    def serve(self) -> None:
        """The listener is open."""
        self.phase = Phase.SERVING
        self.on_serving()

    def patience_s(self, usual_s: float) -> float:
        """How long to wait for a server that may hang, on the way out."""
        return min(usual_s, HURRIED_S) if self.hurried else usual_s

    def crash(self, task: str) -> None:
        """A background task ended by itself: the process is to drain and exit non-zero."""
        self.crashed = task
        self.on_crash()


@dataclass(frozen=True, slots=True)
class Service:
    """Every room, built and open."""

    settings: Settings
    database: Database
    keys: KeyStore
    access: Authenticator
    admission: Admission
    log: ExecutionLog | None
    history: ExecutionHistory
    registry: Registry
    executor: Executor
    metrics: Metrics
    tracing: Tracing
    scraper: Scraper
    results: ResultCache
    bus: Bus
    lifecycle: Lifecycle
    load_problems: tuple[LoadProblem, ...]

    async def forget_results(self, tool_id: str) -> None:
        """Kept results of a tool, on every replica. Raises StoreAway."""
        if not await self.bus.tell("forget", tool_id=tool_id, epoch=await self.results.forget(tool_id)):
            raise StoreAway("other replicas could not be told")


@contextlib.asynccontextmanager
async def open_service(
    settings: Settings,
    *,
    listen: tuple[str, int] | None = None,
    extra_tools: Iterable[Tool] = (),
    keep_log: bool = True,
) -> AsyncIterator[Service]:
    """Build, yield, unwind. `listen` is where this process answers, which egress must not reach; `keep_log` False is
    for commands that run no tool."""
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics()
        lifecycle = Lifecycle()
        supervisor = Supervisor(lifecycle.crash)
        tracing = open_tracing_of(settings, listen)
        stack.push_async_callback(lambda: tracing.close(lifecycle.patience_s(SPANS_CLOSE_S)))
        http = open_egress(settings, listen, tracing, stack)
        loaded = load_tools(
            [*builtin_tools(settings.wikipedia_url, settings.searxng_url), *extra_tools], settings.tool_modules
        )
        declared = declared_limits(loaded)
        registry = Registry(
            loaded.tools.values(),
            timeout_ceiling_s=settings.tool_execution_timeout,
            cache_answers=settings.enable_registry_cache,
        )
        threads = ThreadPool()
        stack.callback(threads.close)
        slots = Slots(settings.max_concurrent_executions)
        database = await open_database(settings, stack)
        keys = KeyStore(database.engine)
        stack.push_async_callback(keys.close)
        stack.push_async_callback(supervisor.close)  # for what fails below; otherwise it is closed before
        access = await open_access(settings, listen, keys, supervisor, stack)
        admission = await open_admission(settings, declared, registry, supervisor, stack)
        log = open_log(settings, registry, database.engine, supervisor, stack) if keep_log else None
        if log is not None:
            log.observe_s = metrics.stages["log"].observe
        control = open_control(settings, slots, admission, supervisor)
        store = open_cache_store(settings, stack)
        results = await open_results(settings, store, supervisor)
        bus = open_bus(settings, results, supervisor, stack)
        reuse = Reuse(Idempotency(store), results)
        stack.push_async_callback(reuse.close)
        executor = Executor(
            registry,
            Runner(threads, settings.max_result_bytes, metrics.count_abandoned),
            control,
            admission,
            log,
            reuse,
            bus,
            http,
            metrics,
            timeout_ceiling_s=settings.tool_execution_timeout,
            rebuild_validators=not settings.enable_parameter_validation_cache,
            breakers=settings.enable_circuit_breakers,
            tracing=tracing,
        )
        service = Service(
            settings,
            database,
            keys,
            access,
            admission,
            log,
            open_history(settings, database.engine),
            registry,
            executor,
            metrics,
            tracing,
            Scraper(metrics),
            results,
            bus,
            lifecycle,
            tuple(loaded.problems),
        )
        _show(service, control, http, supervisor)
        stack.push_async_callback(supervisor.close)
        if log is not None:
            stack.push_async_callback(lambda: log.drain(lifecycle.patience_s(LOG_DRAIN_S)))
        stack.push_async_callback(executor.stop)
        yield service


def _show(service: Service, control: LoadControl, http: EgressClient, supervisor: Supervisor) -> None:
    """Hang into the metrics what other rooms count, and start what measures the process."""
    metrics, executor, admission, log = service.metrics, service.executor, service.admission, service.log
    watch, system = LoopWatch(), SystemWatch()
    supervisor.start("system-watch", system.measure())
    # Not before: start-up itself holds the loop for longer than a tool may.
    service.lifecycle.on_serving = lambda: supervisor.start("loop-watch", watch.measure())
    for tool_id, tool in service.registry.snapshot.tools.items():
        metrics.for_tool(tool_id).keeps_results = tool.spec.cache_ttl is not None
    metrics.limit_decisions = admission.decisions
    metrics.trace_spans = lambda: service.tracing.outcomes
    metrics.database_pool = lambda: pool_states(service.database.engine)
    metrics.gauges.update(
        limit_store_up=lambda: admission.store.up,
        tool_execution_concurrency=lambda: executor.concurrency,
        tool_execution_limit=lambda: control.slots.limit,
        adaptive_limit=lambda: control.limit,
        adaptive_rate_factor=lambda: control.factor,
        adaptive_delay_seconds=lambda: control.delay_s,
        tool_execution_queue_depth=lambda: executor.queue_depth,
        tool_abandoned_runs_active=lambda: executor.abandoned,
        event_loop_lag_seconds=watch.lag_s,
        registered_tools=lambda: len(service.registry),
        result_cache_bytes=lambda: service.results.bytes,
        result_cache_entries=lambda: len(service.results),
        egress_breakers_open=lambda: 0 if http.breakers is None else http.breakers.open_now,
        system_cpu_percent=system.cpu_percent,
        system_memory_percent=system.memory_percent,
        execution_log_journal_limit_bytes=lambda: service.settings.journal_max_bytes,
    )
    metrics.counters["result_cache_refused_total"] = lambda: service.results.refused
    if log is not None:
        metrics.log_rows = lambda: log.rows
        metrics.gauges.update(
            execution_log_lag_seconds=lambda: log.lag_s,
            execution_log_journal_bytes=lambda: log.journal_bytes,
        )
