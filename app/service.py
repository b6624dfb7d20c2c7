"""The composition root: builds every room once, in order, and closes them in reverse.

`open_service` is what the command line and the tests call. Nothing else constructs a room or reads a setting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncEngine

from app import __version__
from app.access.authenticator import Authenticator, Mode
from app.access.jwt import JwtVerifier, jwt_rules
from app.access.store import KeyStore
from app.breaker import BreakerTable
from app.bus import Bus, RedisBus
from app.cache.file_store import FileStore
from app.cache.idempotency import Idempotency
from app.cache.redis_store import RedisStore
from app.cache.results import ResultCache
from app.cache.store import CacheStore, StoreAway
from app.calls import current_call
from app.clients import close_engine, create_engine, create_redis, pool_states, redis_locator
from app.egress import EgressAllow, EgressClient, parse_egress_allow
from app.execution_log.history import ExecutionHistory
from app.execution_log.journal import BufferedLog, Journal, JournalError
from app.execution_log.log import ExecutionLog
from app.execution_log.partitions import Upkeep
from app.execution_log.record import Recorder
from app.execution_log.store import ExecutionStore
from app.execution_log.writer import LogWriter
from app.executor.executor import Executor
from app.executor.reuse import Reuse
from app.executor.runner import Runner
from app.executor.threads import ThreadPool
from app.limits.adaptive import LoadControl
from app.limits.admission import Admission
from app.limits.concurrency import QUEUE_PATIENCE_S, Slots
from app.limits.limit import KEY_PREFIX
from app.limits.limits_file import read_policies
from app.limits.memory_store import MemoryStore
from app.limits.policy import Policies, Policy, settings_policies, tool_policies
from app.limits.redis_store import RedisStore as RedisLimits
from app.migration import MigrationError, migrate
from app.settings import Settings, SettingsError, has_jwt, is_loopback
from app.telemetry.metrics import Metrics
from app.telemetry.scraping import Scraper
from app.telemetry.supervision import LoopWatch, Supervisor
from app.telemetry.system import SystemWatch
from app.telemetry.tracing import Tracing, open_tracing
from app.tools.builtin import builtin_tools
from app.tools.loading import LoadedTools, LoadProblem, load_tools
from app.tools.registry import Registry
from app.tools.tool import Tool

logger = logging.getLogger("app.service")


IDEMPOTENCY_FILE = "idempotency.db"

LOG_DRAIN_S = 5.0
"""At the end, for rows that the database does not have yet; what is left then stays in the journal."""


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
    on_crash: Callable[[], None] = field(default=lambda: None)
    on_serving: Callable[[], None] = field(default=lambda: None)

    def serve(self) -> None:
        """The listener is open."""
        self.phase = Phase.SERVING
        self.on_serving()

    def crash(self, task: str) -> None:
        """A background task ended by itself: the process is to drain and exit non-zero."""
        self.crashed = task
        self.on_crash()


class Database(NamedTuple):
    """The engine of DATABASE_URL, and why its tables could not be made at start, if they could not."""

    engine: AsyncEngine
    problem: str | None


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
        tracing = _open_tracing(settings, listen)
        stack.push_async_callback(tracing.close)
        http = EgressClient(
            _egress_allow(settings),
            settings.http_connection_pool_size,
            [listen] if listen else [],
            trace=tracing.outgoing,
            whose=_tenant_at_work,
            breakers=BreakerTable() if settings.enable_circuit_breakers else None,
        )
        stack.push_async_callback(http.aclose)
        loaded = load_tools(
            [*builtin_tools(settings.wikipedia_url, settings.searxng_url), *extra_tools], settings.tool_modules
        )
        declared = _declared_limits(loaded)
        registry = Registry(
            loaded.tools.values(),
            timeout_ceiling_s=settings.tool_execution_timeout,
            cache_answers=settings.enable_registry_cache,
        )
        threads = ThreadPool()
        stack.callback(threads.close)
        slots = Slots(settings.max_concurrent_executions)
        database = await _open_database(settings, stack)
        keys = KeyStore(database.engine)
        stack.push_async_callback(keys.close)
        stack.push_async_callback(supervisor.close)  # for what fails below; otherwise it is closed before
        access = await _open_access(settings, listen, keys, supervisor, stack)
        admission = await _open_admission(settings, declared, supervisor, stack)
        log = _open_log(settings, registry, database.engine, supervisor, stack) if keep_log else None
        if log is not None:
            log.observe_s = metrics.stages["log"].observe
        control = _open_control(settings, slots, admission, supervisor)
        store = _open_cache_store(settings, stack)
        results = await _open_results(settings, store, supervisor)
        bus = _open_bus(settings, results, supervisor, stack)
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
            ExecutionHistory(database.engine, wait_s_max=QUEUE_PATIENCE_S + settings.tool_execution_timeout),
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
            stack.push_async_callback(log.drain, LOG_DRAIN_S)
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


def _open_tracing(settings: Settings, listen: tuple[str, int] | None) -> Tracing:
    """Commands, which do not listen, have no request to trace. Raises SettingsError."""
    enabled = settings.enable_tracing and listen is not None
    try:
        return open_tracing(enabled, settings.trace_sample_ratio, os.environ, __version__)
    except ValueError as error:  # OpenTelemetry reads some of its variables when it is imported
        named = re.findall(r"OTEL_[A-Z_]+", str(error)) or ["OTEL_*"]
        raise SettingsError(f"{named[0]}: OpenTelemetry does not take this value") from None


async def _open_database(settings: Settings, stack: contextlib.AsyncExitStack) -> Database:
    """The engine. A SQLite file gets its tables here; PostgreSQL gets them by `agentcore-tools migrate` alone."""
    engine = create_engine(settings.database_url, settings.database_pool_size, settings.database_max_overflow)
    stack.push_async_callback(close_engine, engine)
    if engine.dialect.name != "sqlite":
        return Database(engine, None)
    try:
        await migrate(engine)
    except MigrationError as error:  # whoever needs no key and no log is served all the same
        logger.error("the database has no tables", extra={"reason": str(error)})
        return Database(engine, str(error))
    return Database(engine, None)


async def _open_access(
    settings: Settings,
    listen: tuple[str, int] | None,
    keys: KeyStore,
    supervisor: Supervisor,
    stack: contextlib.AsyncExitStack,
) -> Authenticator:
    """Who calls, by key and by token; with a first look at the keys, on which the safe default depends."""
    verifier = _token_verifier(settings)
    if verifier is not None:
        supervisor.start("token-keys", verifier.keys.keep_fresh())
    access = Authenticator(keys, auth_mode(settings, listen[0] if listen else None), settings.keys_stale_s, verifier)
    stack.push_async_callback(access.close)
    await access.confirm()
    supervisor.start("key-watch", access.watch())
    return access


def auth_mode(settings: Settings, host: str | None) -> Mode:
    """What AUTH_MODE comes to on this address; None: nobody listens."""
    if settings.auth_mode == "none":
        return "off"
    if settings.auth_mode == "auto" and not has_jwt(settings) and (host is None or is_loopback(host)):
        return "auto"
    return "required"


def _token_verifier(settings: Settings) -> JwtVerifier | None:
    try:
        rules = jwt_rules(
            issuer=settings.jwt_issuer,
            audience=settings.jwt_audience,
            algorithms=settings.jwt_algorithms,
            secret=settings.jwt_secret,
            jwks=settings.jwt_jwks,
            tenant_claim=settings.jwt_tenant_claim,
            scope_claim=settings.jwt_scope_claim,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return None if rules is None else JwtVerifier(rules)


def _declared_limits(loaded: LoadedTools) -> list[Policy]:
    """The policies that tools declare; a tool whose declaration cannot hold is taken out and reported."""
    policies: list[Policy] = []
    for tool in list(loaded.tools.values()):
        spec = tool.spec
        try:
            policies += tool_policies(spec.id, spec.rate_limits, spec.quotas)
        except ValueError as error:
            del loaded.tools[spec.id]
            loaded.report(spec.id, str(error))
    return policies


def _open_log(
    settings: Settings,
    registry: Registry,
    engine: AsyncEngine,
    supervisor: Supervisor,
    stack: contextlib.AsyncExitStack,
) -> ExecutionLog | None:
    """The journal, and memory for what is buffered, as far as some tool needs them, with a writer each."""
    if not settings.enable_database_logging:
        return None
    modes = {tool.spec.log_mode or settings.journal_mode for tool in registry.snapshot.tools.values()}
    journal = memory = None
    if modes - {"buffered"}:
        try:
            journal = Journal.open(settings.journal_dir, bytes_max=settings.journal_max_bytes)
        except JournalError as error:
            raise SettingsError(f"JOURNAL_DIR: {error}") from None
        stack.push_async_callback(journal.close)
    if "buffered" in modes:
        memory = BufferedLog(settings.journal_max_bytes)
        stack.push_async_callback(memory.close)
    store = ExecutionStore(engine)
    writers = tuple(LogWriter(source, store) for source in (journal, memory) if source is not None)
    recorder = Recorder(settings.log_payload_bytes)
    log = ExecutionLog(recorder, settings.journal_mode, settings.log_payloads, journal, memory, writers)
    for number, writer in enumerate(writers):
        supervisor.start(f"log-writer-{number}", writer.run())
    supervisor.start("journal-adoption", log.adopt())
    supervisor.start("log-upkeep", Upkeep(engine, settings.log_retention_days).run())
    return log


async def _open_admission(
    settings: Settings, declared: Iterable[Policy], supervisor: Supervisor, stack: contextlib.AsyncExitStack
) -> Admission:
    """Every policy that there is, over the store that settings name. Raises SettingsError."""
    try:
        policies = [
            *settings_policies(settings.limits_rate, settings.limits_quota_daily, settings.limits_quota_monthly),
            *(read_policies(settings.limits_file) if settings.limits_file else ()),
            *declared,
        ]
        admission_policies = Policies(policies, settings.limits_expected_replicas)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if settings.redis_url is None:
        return Admission(admission_policies, MemoryStore())
    timeout_s = settings.limits_timeout_ms / 1e3
    try:
        locate = redis_locator(settings.redis_url, KEY_PREFIX, timeout_s)
    except ValueError as error:
        raise SettingsError(f"REDIS_URL: {error}") from None
    store = RedisLimits(locate, timeout_s)
    supervisor.start("limit-store", store.run())
    stack.push_async_callback(store.close)
    await store.settled()
    return Admission(admission_policies, store)


def _open_control(settings: Settings, slots: Slots, admission: Admission, supervisor: Supervisor) -> LoadControl:
    """What makes the limit of calls at once, and adaptive rates, follow the load."""

    def tighten(step: int) -> None:
        admission.step = step

    control = LoadControl(slots, settings.adaptive_concurrency, factor_changed=tighten)
    if settings.adaptive_concurrency != "off":
        supervisor.start("load-control", control.run())
    return control


def _tenant_at_work() -> str:
    call = current_call.get()
    return "" if call is None else call.tenant


def _open_cache_store(settings: Settings, stack: contextlib.AsyncExitStack) -> CacheStore:
    """Redis where there is one; else a file beside the journal. Opens nothing yet. Raises SettingsError."""
    store: CacheStore
    if settings.redis_url is None:
        store = FileStore(settings.journal_dir / IDEMPOTENCY_FILE)
    else:
        size = settings.redis_pool_size
        try:
            client = create_redis(settings.redis_url, size, "agentcore-tools:cache")
        except ValueError as error:
            raise SettingsError(f"REDIS_URL: {error}") from None
        store = RedisStore(client, size, settings.limits_timeout_ms / 1e3)
    stack.push_async_callback(store.close)
    return store


async def _open_results(settings: Settings, store: CacheStore, supervisor: Supervisor) -> ResultCache:
    results = ResultCache(
        None if settings.redis_url is None else store,
        settings.result_cache_bytes,
        settings.max_result_bytes,
        compress=settings.enable_result_compression,
    )
    with contextlib.suppress(StoreAway):  # the bus tries again
        await results.catch_up()
    supervisor.start("result-cache", results.run())
    return results


def _open_bus(
    settings: Settings, results: ResultCache, supervisor: Supervisor, stack: contextlib.AsyncExitStack
) -> Bus:
    """Word from and to other replicas, where they have a Redis in common."""
    if settings.redis_url is None:
        return Bus()
    bus = RedisBus(settings.redis_url)
    bus.listeners["forget"] = results.hear
    bus.on_gap = results.catch_up
    stack.push_async_callback(bus.close)
    supervisor.start("bus", bus.run())
    return bus


def _egress_allow(settings: Settings) -> EgressAllow:
    try:
        return parse_egress_allow(",".join(settings.egress_allow))
    except ValueError as error:
        raise SettingsError(f"EGRESS_ALLOW: {error}") from None
