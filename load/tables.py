"""`make report`: the tables of the report that this service comes from, with our figures beside its own, in Markdown.

One service with everything on (API key, limit and quota in Redis, log in PostgreSQL, traces at 1 %) on a core of its
own, Locust and the stores on another; figures are those of /metrics, the operating system, PostgreSQL and Locust.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from app import migration
from app.calls import LOCAL_CALLER
from app.clients import create_engine
from app.execution_log.history import ExecutionHistory, Filters
from app.execution_log.partitions import ensure_partitions
from app.execution_log.store import ExecutionStore
from app.tools.registry import Registry, ToolFilter
from load.harness import Bench, Running, bench, command
from load.history import TENANTS, record
from load.machine import settle
from load.many import tools
from load.micro import measured
from load.overhead import ORIGIN_P95_MS, SERVICE_OVERHEAD, Buckets, Sample, grown, quantile_s, sample
from load.pages import serving_pages
from load.run import Plan, heading, run_locust
from load.scenarios import SCENARIOS, Bounds
from load.watch import Seen, Watch

LEVELS = (100, 500, 1000, 1500)
SPAWN_RATE = 100
"""Locust warns of more."""
IDLE_S_MAX = 10
ROWS = 100_000
BATCH_ROWS = 1_000
QUERIES = 500
SINGLE_WRITES = 500
TOOLS = 1_000
LOOKUPS = 10_000
REASONS_MAX = 5

ANY = Bounds(p95_ms_max=math.inf, success_min=0.0)
"""The tables tell what was; they judge nothing."""

POOL = {"DATABASE_POOL_SIZE": "10", "DATABASE_MAX_OVERFLOW": "10"}
"""The origin's."""
POOL_CONNECTIONS = 20

ORIGIN_LATENCY_MS = {"p50": 18.0, "p95": 42.0, "p99": 87.0, "mean": 24.0, "max": 156.0}
ORIGIN_REGISTRY_MS = {"look-up by id": 2.3, "search by category": 8.7, "list all": 12.5}
ORIGIN_CPU = {0: "2-5 %", 100: "18-25 %", 500: "45-55 %", 1000: "68-78 %", 1500: "82-92 %"}
ORIGIN_MEMORY = {0: "450 MB", 100: "850 MB", 500: "1.8 GB", 1000: "3.2 GB", 1500: "4.5 GB"}
ORIGIN_NETWORK = {100: "15 Mbit/s", 500: "75 Mbit/s", 1000: "145 Mbit/s"}


@dataclass(frozen=True, slots=True)
class Size:
    """How long and how much; the defaults are the origin's but for the time."""

    seconds: int
    users: int
    capacity_users: int
    levels: tuple[int, ...]
    rows: int


class Service(NamedTuple):
    """The service under measurement, and what Locust needs to ask it."""

    running: Running
    pages_url: str
    key: str


class Visit(NamedTuple):
    """A Locust run, and what the service showed before, meanwhile and after."""

    report: dict[str, Any]
    seen: Seen
    first: Sample
    last: Sample
    mean_ms: float
    took_s: float


def main() -> None:
    size, out = _arguments()
    with tempfile.TemporaryDirectory(prefix="agentcore-tables-") as folder, bench() as servers:
        parts = [f"# The origin's tables\n\n{heading()}\n\n`{_command()}`\n"]
        for section in _sections(servers, size, Path(folder)):
            parts.append(section)
            print(section if len(parts) > 2 else f"{parts[0]}\n{section}", flush=True)
    if out is not None:
        out.write_text("\n".join(parts), encoding="utf-8")


def _arguments() -> tuple[Size, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m load.tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="of each load, after its ramp")
    parser.add_argument("--users", type=int, default=SCENARIOS["headline"].users, help="of the headline test")
    parser.add_argument("--capacity-users", type=int, default=SCENARIOS["capacity"].users, help="of the mix")
    parser.add_argument("--levels", type=int, nargs="+", default=list(LEVELS), help="calls under way at once")
    parser.add_argument("--rows", type=int, default=ROWS, help="in the log, for the table of the database")
    parser.add_argument("--out", type=Path, help="a file for the same Markdown")
    given = parser.parse_args()
    if min(given.seconds, given.users, given.capacity_users, *given.levels) < 1 or given.rows < BATCH_ROWS:
        parser.error(f"all must be over 0, and --rows at least {BATCH_ROWS}")
    return Size(given.seconds, given.users, given.capacity_users, tuple(given.levels), given.rows), given.out


def _command() -> str:
    return shlex.join(["python", "-m", "load.tables", *sys.argv[1:]])


def _sections(servers: Bench, size: Size, folder: Path) -> Iterator[str]:
    """Idle and the levels come first: memory that a process once had, it keeps."""
    with serving_pages() as pages_url:
        address = pages_url.split("://", 1)[1]
        settings = servers.everything(**POOL, TOOL_MODULES="load.tools", EGRESS_ALLOW=address)
        service = Service(servers.service("service", settings, pages_url), pages_url, servers.credentials[0])
        idle = _idle(service, min(size.seconds, IDLE_S_MAX))
        levels = {level: _visit(service, _level(level, size)) for level in size.levels}
        before = Counts.of(servers)
        headline = _visit(service, _plan("headline", size.users, size))
        counted = Counts.of(servers).since(before)
        capacity = _visit(service, _plan("capacity", size.capacity_users, size))
    yield _latency(headline, size)
    yield _stages(headline)
    yield _registry()
    yield _capacity(capacity, levels, size)
    times = asyncio.run(_log_times(servers.postgres.create_database(), size.rows))
    yield _database(times, headline, counted, size)
    yield _resources(idle, levels)


# Measuring


def _plan(scenario: str, users: int, size: Size) -> Plan:
    named = SCENARIOS[scenario]
    run_time_s = math.ceil(users / named.spawn_rate) + size.seconds
    return Plan(scenario, users, named.spawn_rate, run_time_s, ANY, named.classes)


def _level(level: int, size: Size) -> Plan:
    return Plan("mix", level, SPAWN_RATE, math.ceil(level / SPAWN_RATE) + size.seconds, ANY, ("PausingUser",))


def _visit(service: Service, plan: Plan) -> Visit:
    settle(service.running.pid)
    first, before = asyncio.run(_scraped(service.running.url))
    with Watch(service.running.pid, service.running.url) as watch:
        report = run_locust(plan, service.running.url, service.pages_url, API_KEY=service.key)
    last, after = asyncio.run(_scraped(service.running.url))
    calls = max(after["framework_overhead_seconds_count"] - before["framework_overhead_seconds_count"], 1.0)
    took_s = after["framework_overhead_seconds_sum"] - before["framework_overhead_seconds_sum"]
    return Visit(report, watch.seen(), first, last, took_s / calls * 1e3, last.at_s - first.at_s)


async def _scraped(url: str) -> tuple[Sample, dict[str, float]]:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        lines = (await http.get("/metrics")).text.splitlines()
        plain = dict(line.split(" ")[:2] for line in lines if line and line[0] != "#" and "{" not in line)
        return await sample(http), {name: float(value) for name, value in plain.items()}


def _idle(service: Service, seconds: int) -> Seen:
    settle(service.running.pid)
    with Watch(service.running.pid, service.running.url) as watch:
        time.sleep(seconds)
    return watch.seen()


class Counts(NamedTuple):
    """What PostgreSQL counted in the service's database: connections opened, transactions ended, time of statements."""

    opened: int
    ended: int
    active_ms: float

    @classmethod
    def of(cls, servers: Bench) -> Counts:
        columns = "sessions, xact_commit + xact_rollback, active_time"
        name = servers.database.rsplit("/", 1)[1]
        return cls(*servers.postgres.run_sql(f"SELECT {columns} FROM pg_stat_database WHERE datname = $1", name)[0])

    def since(self, before: Counts) -> Counts:
        return Counts(self.opened - before.opened, self.ended - before.ended, self.active_ms - before.active_ms)


class LogTimes(NamedTuple):
    """p95, ms."""

    one_row: float
    batch: float
    page: float


async def _log_times(url: str, rows: int) -> LogTimes:
    """By the service's own store and history: rows of a month, then single rows, then pages of 50 of a tenant."""
    engine = create_engine(url, 10, 10)
    try:
        await migration.migrate(engine)
        await ensure_partitions(engine, time.time())
        store, history = ExecutionStore(engine), ExecutionHistory(engine)
        now_ms = int(time.time() * 1000)
        batches, singles, pages = [], [], []
        for start in range(0, rows, BATCH_ROWS):
            batch = [record(now_ms - rows + number) for number in range(start, min(start + BATCH_ROWS, rows))]
            batches.append(await _timed(lambda batch=batch: store.write(batch)))  # type: ignore[misc]
        async with engine.begin() as connection:
            await connection.exec_driver_sql("ANALYZE")  # autovacuum does so within a minute
        for number in range(SINGLE_WRITES):
            singles.append(await _timed(lambda number=number: store.write([record(now_ms + number)])))  # type: ignore[misc]
        for number in range(QUERIES):
            tenant = TENANTS[number % len(TENANTS)]
            pages.append(await _timed(lambda tenant=tenant: history.page(tenant, Filters.of())))  # type: ignore[misc]
    finally:
        await engine.dispose()
    return LogTimes(_p95(singles), _p95(batches), _p95(pages))


async def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    await work()
    return (time.perf_counter() - began) * 1e3


def _p95(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=20)[-1] if len(times) > 1 else times[0]


# Tables


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", note, ""])


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _calls(visit: Visit) -> tuple[Buckets, int]:
    counted = grown(visit.first.stages[SERVICE_OVERHEAD], visit.last.stages[SERVICE_OVERHEAD])
    return counted, int(counted[math.inf])


def _latency(headline: Visit, size: Size) -> str:
    counted, calls = _calls(headline)
    ours: dict[str, float | None] = {"mean": headline.mean_ms, "max": headline.report["overhead_ms"].get("max")}
    for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        seconds = quantile_s(q, counted)
        ours[name] = None if seconds is None else seconds * 1e3
    total = headline.report["total"]
    rows = [(name, _ms(origin), _ms(ours[name]), _ms(total[name])) for name, origin in ORIGIN_LATENCY_MS.items()]
    note = (
        f"`echo`, {size.users:,} users, {calls:,} calls at {total['rps']:,.0f}/s, {total['failures']:,} failed. The "
        "origin: 1,000 users, 150,000 calls. Overhead by `framework_overhead_seconds`, its maximum by `overhead_ms` of "
        "the answers; what Locust saw has its own load in it."
    )
    return _table("Latency of a call", ("", "origin, overhead", "overhead", "seen by Locust"), rows, note)


def _stages(headline: Visit) -> str:
    rows = []
    for stage, origin_ms in ORIGIN_P95_MS.items():
        seconds = quantile_s(0.95, grown(headline.first.stages[stage], headline.last.stages[stage]))
        ours_ms = None if seconds is None else seconds * 1e3
        rows.append((stage, _ms(origin_ms), _ms(ours_ms)))
    note = (
        "p95 of each, in the same run. `limits` is rate limit and quota in one step (4.2 and 3.8 ms). The origin's "
        "parts add up to 31 ms, not to 42."
    )
    return _table("Overhead by stage", ("stage", "origin p95", "p95"), rows, note)


def _registry() -> str:
    made = tools(TOOLS)
    registry = Registry(made, timeout_ceiling_s=30.0, cache_answers=False)
    ids, categories = [tool.spec.id for tool in made], ("utility", "search", "database")
    works: dict[str, tuple[Callable[[int], object], int]] = {
        "look-up by id": (lambda n: registry.lookup(ids[n % TOOLS], LOCAL_CALLER), LOOKUPS),
        "search by category": (
            lambda n: registry.search("", ToolFilter(category=categories[n % 3]), LOCAL_CALLER, TOOLS),
            LOOKUPS // 50,
        ),
        "list all": (lambda n: registry.page(ToolFilter(), LOCAL_CALLER, TOOLS, None), LOOKUPS // 50),
    }
    rows = []
    for name, (work, rounds) in works.items():
        median_us, p95_us = measured(work, rounds)
        rows.append((name, _ms(ORIGIN_REGISTRY_MS[name]), _ms(median_us / 1e3), _ms(p95_us / 1e3)))
    note = (
        f"{TOOLS:,} tools, {LOOKUPS:,} look-ups, in one process; answers built anew each time, though the service "
        "keeps them. The origin reports averages."
    )
    return _table("Registry", ("", "origin", "p50", "p95"), rows, note)


def _capacity(capacity: Visit, levels: dict[int, Visit], size: Size) -> str:
    total = capacity.report["total"]
    success = 1 - total["failures"] / max(total["requests"], 1)
    most = max(visit.seen.concurrency_max for visit in [capacity, *levels.values()])
    rows = [
        ("calls under way at once, at most", "1,500+", f"{most:,.0f}"),
        ("success", "98.7 %", f"{success:.2%}"),
        ("errors", "1.3 %", f"{1 - success:.2%}"),
        ("CPU, at most", "78 %", f"{capacity.seen.cpu_max:.0%} of a core"),
        ("memory, at most", "3.2 GB", f"{capacity.seen.rss_mb_max:,.0f} MB"),
        ("calls a second", "-", f"{total['rps']:,.0f}"),
        ("p95 seen by Locust", "-", _ms(total["p95"])),
    ]
    note = (
        f"50 % echo, 30 % calculator, 20 % web_scrape by {size.capacity_users:,} users who call every 1 to 3 s (the "
        f"origin: 2,000 at most). The first row is of the loads of the last table too.{_reasons(capacity)}"
    )
    return _table("Capacity", ("", "origin", "here"), rows, note)


def _reasons(visit: Visit) -> str:
    failures = sorted(visit.report["failures"], key=lambda one: -one["count"])
    return "".join(f" {one['count']:,} x {one['name']}: {one['reason']}." for one in failures[:REASONS_MAX])


def _database(times: LogTimes, headline: Visit, counted: Counts, size: Size) -> str:
    reuse = f"{1 - counted.opened / counted.ended:.2%}" if counted.ended else "-"
    share = counted.active_ms / 1e3 / headline.took_s / POOL_CONNECTIONS
    pool = f"{share:.2%} in the mean, {headline.seen.pool_max:.0%} at most"
    rows = [
        ("write, p95", "8.5 ms", f"{_ms(times.one_row)} a row by itself, {_ms(times.batch)} a batch of {BATCH_ROWS:,}"),
        ("query, p95", "12.3 ms", f"{_ms(times.page)} a page of 50"),
        ("pool in use", "65 %", pool),
        ("connections reused", "98.5 %", reuse),
    ]
    note = (
        f"PostgreSQL with {size.rows:,} rows (the origin: 100,000). No call waits for a write: a writer moves the "
        "journal to the database in batches. Pool (10 and 10 more, as the origin's) and reuse are of the headline run, "
        "by `pg_stat_database`: time of statements over that of all connections; one less sessions over transactions."
    )
    return _table("Database", ("", "origin", "here"), rows, note)


def _resources(idle: Seen, levels: dict[int, Visit]) -> str:
    rows = [
        (
            "idle",
            ORIGIN_CPU[0],
            f"{idle.cpu_mean:.1%}",
            ORIGIN_MEMORY[0],
            f"{idle.rss_mb_max:,.0f} MB",
            "-",
            "-",
            "-",
            "-",
        )
    ]
    for level, visit in levels.items():
        seen, total = visit.seen.steady(level), visit.report["total"]
        mbit = (visit.report["sent_bytes"] + visit.report["received_bytes"]) * 8 / 1e6
        failed = f"{total['failures'] / max(total['requests'], 1):.2%}"
        rows.append(
            (
                f"{level:,}",
                ORIGIN_CPU.get(level, "-"),
                f"{seen.cpu_mean:.1%}",
                ORIGIN_MEMORY.get(level, "-"),
                f"{seen.rss_mb_max:,.0f} MB",
                ORIGIN_NETWORK.get(level, "-"),
                f"{mbit / max(total['requests'], 1) * total['rps']:.2f} Mbit/s",
                f"{seen.concurrency_max:,.0f}",
                failed,
            )
        )
    note = (
        "So many calls of a tool that waits 1 s are under way all the time, so as many calls a second. CPU is of one "
        "core (100 % is all that one process can use), mean while that many were under way; memory is resident, at "
        "most; network is the bodies of requests and answers. `under way` is `tool_execution_concurrency` at most."
    )
    columns = (
        "calls at once",
        "origin CPU",
        "CPU",
        "origin memory",
        "memory",
        "origin network",
        "network",
        "under way",
        "failed",
    )
    return _table("CPU, memory and network", columns, rows, note)


if __name__ == "__main__":
    command(main)
