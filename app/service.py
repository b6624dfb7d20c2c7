"""The composition root: builds every room once, in order, and closes them in reverse.

`open_service` is what the command line and the tests call. Nothing else constructs a room or reads a setting.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum

from app.egress import EgressAllow, EgressClient, parse_egress_allow
from app.executor.executor import Executor
from app.executor.runner import Runner
from app.executor.threads import ThreadPool
from app.limits.concurrency import Slots
from app.settings import Settings, SettingsError
from app.telemetry.metrics import Metrics
from app.telemetry.scraping import Scraper
from app.telemetry.supervision import LoopWatch, Supervisor
from app.tools.builtin import builtin_tools
from app.tools.loading import LoadProblem, load_tools
from app.tools.registry import Registry
from app.tools.tool import Tool

logger = logging.getLogger("app.service")


NOT_ENFORCED_YET = frozenset(
    {"retries", "rate_limits", "quotas", "cache_ttl", "cache_shared", "log_mode", "log_payloads", "cost"}
)
"""Declarations that are kept and have no effect yet: said once at start, so that nobody relies on them."""


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


@dataclass(frozen=True, slots=True)
class Service:
    """Every room, built and open."""

    settings: Settings
    registry: Registry
    executor: Executor
    metrics: Metrics
    scraper: Scraper
    lifecycle: Lifecycle
    load_problems: tuple[LoadProblem, ...]


@contextlib.asynccontextmanager
async def open_service(
    settings: Settings,
    *,
    listen: tuple[str, int] | None = None,
    extra_tools: Iterable[Tool] = (),
) -> AsyncIterator[Service]:
    """Build, yield, unwind. `listen` is where this process answers, which egress must not reach."""
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics()
        lifecycle = Lifecycle()
        http = EgressClient(
            _egress_allow(settings),
            settings.http_connection_pool_size,
            [listen] if listen else [],
        )
        stack.push_async_callback(http.aclose)
        builtin = [*builtin_tools(settings.wikipedia_url, settings.searxng_url), *extra_tools]
        loaded = load_tools(builtin, settings.tool_modules)
        registry = Registry(
            loaded.tools.values(),
            timeout_ceiling_s=settings.tool_execution_timeout,
            cache_answers=settings.enable_registry_cache,
        )
        threads = ThreadPool()
        stack.callback(threads.close)
        slots = Slots(settings.max_concurrent_executions)
        executor = Executor(
            registry,
            Runner(threads, settings.max_result_bytes, metrics.count_abandoned),
            slots,
            http,
            metrics,
            timeout_ceiling_s=settings.tool_execution_timeout,
            rebuild_validators=not settings.enable_parameter_validation_cache,
        )
        for tool in registry.snapshot.tools.values():
            metrics.for_tool(tool.spec.id)
            _warn_of_unenforced(tool)
        watch = LoopWatch()
        supervisor = Supervisor(lifecycle.crash)
        stack.push_async_callback(supervisor.close)
        # Not before: start-up itself holds the loop for longer than a tool may.
        lifecycle.on_serving = lambda: supervisor.start("loop-watch", watch.measure())
        metrics.gauges.update(
            tool_execution_concurrency=lambda: executor.concurrency,
            tool_execution_limit=lambda: slots.limit,
            tool_execution_queue_depth=lambda: executor.queue_depth,
            tool_abandoned_runs_active=lambda: executor.abandoned,
            event_loop_lag_seconds=watch.lag_s,
            registered_tools=lambda: len(registry),
        )
        yield Service(settings, registry, executor, metrics, Scraper(metrics), lifecycle, tuple(loaded.problems))


def _warn_of_unenforced(tool: Tool) -> None:
    declared = sorted(tool.spec.declared & NOT_ENFORCED_YET)
    if declared:
        logger.warning("declared but not enforced yet", extra={"tool_id": tool.spec.id, "declared": declared})


def _egress_allow(settings: Settings) -> EgressAllow:
    try:
        return parse_egress_allow(",".join(settings.egress_allow))
    except ValueError as error:
        raise SettingsError(f"EGRESS_ALLOW: {error}") from None
