"""How single rooms are opened from settings: one function each, in the order in which `open_service` calls them.

Whatever must be closed goes onto the stack that the caller gives; whatever runs for ever, to the supervisor. Raises
SettingsError for a setting that cannot hold. Knows no executor and no door.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy.ext.asyncio import AsyncEngine

from app import PROPAGATORS, __version__
from app.access.authenticator import Authenticator, Mode
from app.access.store import KeyStore
from app.breaker import BreakerTable
from app.bus import Bus
from app.cache.results import ResultCache
from app.cache.store import CacheStore, StoreAway
from app.calls import current_call
from app.clients import close_engine, create_engine, create_redis, redis_locator
from app.egress import EgressClient, parse_egress_allow
from app.execution_log.history import ExecutionHistory
from app.execution_log.journal import BufferedLog, Journal, JournalError
from app.execution_log.log import ExecutionLog
from app.execution_log.partitions import Upkeep
from app.execution_log.record import Recorder
from app.execution_log.store import ExecutionStore
from app.execution_log.writer import LogWriter
from app.limits.adaptive import LoadControl
from app.limits.admission import Admission
from app.limits.concurrency import QUEUE_PATIENCE_S, Slots
from app.limits.limit import KEY_PREFIX
from app.limits.memory_store import MemoryStore
from app.limits.policy import Policies, Policy, matching_no_tool, settings_policies, tool_policies
from app.limits.redis_store import RedisStore as RedisLimits
from app.migration import MigrationError, migrate
from app.settings import Settings, SettingsError, has_jwt, is_loopback
from app.telemetry.otel_variables import foreign_propagators
from app.telemetry.supervision import Supervisor
from app.telemetry.tracing import Tracing, open_tracing
from app.tools.loading import LoadedTools
from app.tools.registry import Registry

if TYPE_CHECKING:
    from app.access.jwt import JwtVerifier

logger = logging.getLogger("app.opening")

IDEMPOTENCY_FILE = "idempotency.db"
"""Beside the journals of the processes."""


class Database(NamedTuple):
    """The engine of DATABASE_URL, and why its tables could not be made at start, if they could not."""

    engine: AsyncEngine
    problem: str | None


def open_tracing_of(settings: Settings, listen: tuple[str, int] | None) -> Tracing:
    """Commands, which do not listen, have no request to trace. Raises SettingsError."""
    enabled = settings.enable_tracing and listen is not None
    if enabled and foreign_propagators(PROPAGATORS or os.environ.get("OTEL_PROPAGATORS", "")):
        logger.warning("OTEL_PROPAGATORS is not followed: W3C Trace Context is passed on, and nothing else")
    try:
        return open_tracing(enabled, settings.trace_sample_ratio, os.environ, __version__)
    except ValueError as error:  # OpenTelemetry reads some of its variables when it is imported
        named = re.findall(r"OTEL_[A-Z_]+", str(error)) or ["OTEL_*"]
        raise SettingsError(f"{named[0]}: OpenTelemetry does not take this value") from None


def open_egress(
    settings: Settings, listen: tuple[str, int] | None, tracing: Tracing, stack: contextlib.AsyncExitStack
) -> EgressClient:
    """The one way out for tools, which must not lead to ourselves. Raises SettingsError."""
    try:
        allow = parse_egress_allow(",".join(settings.egress_allow))
    except ValueError as error:
        raise SettingsError(f"EGRESS_ALLOW: {error}") from None
    http = EgressClient(
        allow,
        settings.http_connection_pool_size,
        [listen] if listen else [],
        trace=tracing.outgoing,
        whose=_tenant_at_work,
        breakers=BreakerTable() if settings.enable_circuit_breakers else None,
    )
    stack.push_async_callback(http.aclose)
    return http


def _tenant_at_work() -> str:
    call = current_call.get()
    return "" if call is None else call.tenant


def declared_limits(loaded: LoadedTools) -> list[Policy]:
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


async def open_database(settings: Settings, stack: contextlib.AsyncExitStack) -> Database:
    """The engine. A SQLite file gets its tables here; PostgreSQL gets them by `agentcore-tools migrate` alone."""
    engine = create_engine(settings.database_url, settings.database_pool_size, settings.database_max_overflow)
    stack.push_async_callback(close_engine, engine)
    if engine.dialect.name != "sqlite":
        return Database(engine, None)
    try:
        await migrate(engine)
    except MigrationError as error:  # whoever needs no key and no log is served all the same
        logger.error("the database cannot be used", extra={"reason": str(error)})
        return Database(engine, str(error))
    return Database(engine, None)


async def open_access(
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
    if not has_jwt(settings):
        return None
    from app.access.jwt import JwtVerifier, jwt_rules  # PyJWT and cryptography take 9 MB

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


RULES_SHOWN_MAX = 10
"""In one line of the log; there may be a thousand."""


async def open_admission(
    settings: Settings,
    declared: Iterable[Policy],
    registry: Registry,
    supervisor: Supervisor,
    stack: contextlib.AsyncExitStack,
) -> Admission:
    """Every policy that there is, over the store that settings name. Raises SettingsError."""
    try:
        policies = [
            *settings_policies(settings.limits_rate, settings.limits_quota_daily, settings.limits_quota_monthly),
            *(_policies_in(settings.limits_file) if settings.limits_file else ()),
            *declared,
        ]
        admission_policies = Policies(policies, settings.limits_expected_replicas)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if idle := matching_no_tool(policies, registry.snapshot.tools.keys()):
        # Not refused: one file may be for services that have other tools.
        logger.warning("limit policies match no tool", extra={"rules": idle[:RULES_SHOWN_MAX], "count": len(idle)})
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


def _policies_in(file: Path) -> Iterable[Policy]:
    from app.limits.limits_file import LimitsFileError, read_policies  # PyYAML takes 1 MB

    try:
        return read_policies(file)
    except LimitsFileError as error:
        raise ValueError(f"LIMITS_FILE: {error}") from None


def open_log(
    settings: Settings,
    registry: Registry,
    engine: AsyncEngine,
    supervisor: Supervisor,
    stack: contextlib.AsyncExitStack,
) -> ExecutionLog | None:
    """The journal, and memory for what is buffered, as far as some tool needs them, with a writer each."""
    modes = log_modes(settings, registry)
    journal = memory = None
    if not modes - {"buffered"}:
        _tell_of_outcomes(settings)
    if not settings.enable_database_logging:
        return None
    if modes - {"buffered"}:
        try:
            journal = Journal.open(settings.journal_dir, bytes_max=settings.journal_max_bytes)
        except JournalError as error:
            raise SettingsError(str(error.strerror)) from None  # it names the variable; an errno is of no use
        stack.push_async_callback(journal.close)
    if "buffered" in modes:
        memory = BufferedLog(settings.journal_max_bytes)
        stack.push_async_callback(memory.close)
    sink = ExecutionStore(engine)
    writers = tuple(LogWriter(source, sink) for source in (journal, memory) if source is not None)
    recorder = Recorder(settings.log_payload_bytes)
    log = ExecutionLog(recorder, settings.journal_mode, settings.log_payloads, journal, memory, writers)
    for number, writer in enumerate(writers):
        supervisor.start(f"log-writer-{number}", writer.run())
    supervisor.start("journal-adoption", log.adopt())
    supervisor.start("log-upkeep", Upkeep(engine, settings.log_retention_days).run())
    return log


def log_modes(settings: Settings, registry: Registry) -> set[str]:
    """How rows are kept: each tool's own way, else the service's; nothing where there is no log."""
    if not settings.enable_database_logging:
        return set()
    return {tool.spec.log_mode or settings.journal_mode for tool in registry.snapshot.tools.values()}


def _tell_of_outcomes(settings: Settings) -> None:
    """Without a journal nobody else would find out before the first call with an idempotency key."""
    if settings.redis_url is not None:
        return
    folder = settings.journal_dir.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        logger.error(
            "calls with an idempotency key will be refused: JOURNAL_DIR, which has their outcomes, cannot be used"
        )


def open_control(settings: Settings, slots: Slots, admission: Admission, supervisor: Supervisor) -> LoadControl:
    """What makes the limit of calls at once, and adaptive rates, follow the load."""

    def tighten(step: int) -> None:
        admission.step = step

    control = LoadControl(slots, settings.adaptive_concurrency, factor_changed=tighten)
    if settings.adaptive_concurrency != "off":
        supervisor.start("load-control", control.run())
    return control


def open_cache_store(settings: Settings, stack: contextlib.AsyncExitStack) -> CacheStore:
    """Redis where there is one; else a file beside the journal. Opens nothing yet. Raises SettingsError."""
    store: CacheStore
    if settings.redis_url is None:
        from app.cache.file_store import FileStore  # brings sqlite3

        store = FileStore(settings.journal_dir / IDEMPOTENCY_FILE)
    else:
        from app.cache.redis_store import RedisStore  # redis-py takes 9 MB

        size = settings.redis_pool_size
        try:
            client = create_redis(settings.redis_url, size, "agentcore-tools:cache")
        except ValueError as error:
            raise SettingsError(f"REDIS_URL: {error}") from None
        store = RedisStore(client, size, settings.limits_timeout_ms / 1e3)
    stack.push_async_callback(store.close)
    return store


async def open_results(settings: Settings, store: CacheStore, supervisor: Supervisor) -> ResultCache:
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


def open_bus(settings: Settings, results: ResultCache, supervisor: Supervisor, stack: contextlib.AsyncExitStack) -> Bus:
    """Word from and to other replicas, where they have a Redis in common."""
    if settings.redis_url is None:
        return Bus()
    from app.bus.redis_bus import RedisBus  # redis-py takes 9 MB

    bus = RedisBus(settings.redis_url)
    bus.listeners["forget"] = results.hear
    bus.on_gap = results.catch_up
    stack.push_async_callback(bus.close)
    supervisor.start("bus", bus.run())
    return bus


def open_history(settings: Settings, engine: AsyncEngine) -> ExecutionHistory:
    """The log as callers read it."""
    return ExecutionHistory(
        engine,
        wait_s_max=QUEUE_PATIENCE_S + settings.tool_execution_timeout,
        payload_bytes_max=settings.log_payload_bytes,
    )
