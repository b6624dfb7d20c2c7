"""`python -m load.history`: rows of a quarter, then how long pages of 50 take by each filter, and one written batch.

Writes by the service's own store and reads by its own history, without HTTP. --url names an empty database, which is
migrated and filled; without it a SQLite file in a scratch folder.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import orjson

from app import migration
from app.clients import create_engine
from app.execution_log.history import ExecutionHistory, Filters
from app.execution_log.partitions import ensure_partitions
from app.execution_log.store import ExecutionStore

DAYS = 90
BATCH_ROWS = 1_000
ROUNDS = 300
SINGLE_WRITES = 500

TENANTS = [f"tenant-{number}" for number in range(20)]
TENANT_WEIGHTS = [100, 50] + [10] * 8 + [1] * 10
TOOLS = [f"tool_{number}" for number in range(40)]
TOOL_WEIGHTS = [100, 50, 20] + [5] * 17 + [1] * 20
SUBJECTS_OF_EACH = 50
STATUSES = ("success", "failed", "timeout", "cancelled")
STATUS_WEIGHTS = (960, 30, 8, 2)

choose = random.Random(11)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load.history", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--url", help="of an empty database, as DATABASE_URL")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="agentcore-history-") as folder:
        asyncio.run(_measure(given.url or f"sqlite+aiosqlite:///{Path(folder) / 'log.db'}", given.rows))


async def _measure(url: str, rows: int) -> None:
    engine = create_engine(url, 10, 10)
    try:
        await migration.migrate(engine)
        if engine.dialect.name != "sqlite":
            for month in range(DAYS // 30 + 1):
                await ensure_partitions(engine, time.time() - month * 30 * 86_400)
        store, history = ExecutionStore(engine), ExecutionHistory(engine)
        await _fill(store, rows)
        async with engine.begin() as connection:
            await connection.exec_driver_sql("ANALYZE")  # autovacuum does so within a minute
        await _write_single(store)
        await _read(history, engine.dialect.name)
    finally:
        await engine.dispose()


async def _fill(store: ExecutionStore, rows: int) -> None:
    """Oldest first, as calls come."""
    times, cpu_s = [], 0.0
    began_ms = int((time.time() - DAYS * 86_400) * 1000)
    step_ms = DAYS * 86_400_000 / rows
    for start in range(0, rows, BATCH_ROWS):
        batch = [record(began_ms + int(number * step_ms)) for number in range(start, min(start + BATCH_ROWS, rows))]
        began, cpu = time.perf_counter(), _cpu_s()
        await store.write(batch)
        times.append((time.perf_counter() - began) * 1e3)
        cpu_s += _cpu_s() - cpu
    print(f"{rows:,} rows over {DAYS} days, written in batches of {BATCH_ROWS:,}:")
    print(f"  {rows / sum(times) * 1e3:,.0f} rows/s, {cpu_s / rows * 1e6:.2f} us of our CPU a row, {_line(times)} ms")


async def _write_single(store: ExecutionStore) -> None:
    async def write(_: int) -> None:
        await store.write([record(int(time.time() * 1000))])

    print(f"one row by itself: {_line(await _times(write, SINGLE_WRITES))} ms")


async def _read(history: ExecutionHistory, engine: str) -> None:
    print(f"{'page of 50, ' + engine:38}{'p50 ms':>9}{'p95 ms':>9}{'max ms':>9}{'rows':>7}")
    for name, query in QUERIES.items():
        counts: list[int] = []

        async def ask(_: int, query: Query = query, counts: list[int] = counts) -> None:
            tenant, filters = query()
            counts.append(len((await history.page(tenant, filters)).rows))

        times = await _times(ask, ROUNDS)
        p50, p95 = statistics.median(times), statistics.quantiles(times, n=20)[-1]
        print(f"{name:38}{p50:9.2f}{p95:9.2f}{max(times):9.2f}{statistics.mean(counts):7.1f}")


async def _times(work: Callable[[int], Awaitable[None]], rounds: int) -> list[float]:
    """Milliseconds of each round, after some to warm up."""
    times = []
    for number in range(rounds + 10):
        began = time.perf_counter()
        await work(number)
        times.append((time.perf_counter() - began) * 1e3)
    return times[10:]


def _line(times: list[float]) -> str:
    return f"p50 {statistics.median(times):.2f}, p95 {statistics.quantiles(times, n=20)[-1]:.2f}"


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def record(unix_ms: int) -> bytes:
    """What the journal would hold of an ordinary call, payloads kept."""
    tenant = choose.choices(TENANTS, TENANT_WEIGHTS)[0]
    tool = choose.choices(TOOLS, TOOL_WEIGHTS)[0]
    status = choose.choices(STATUSES, STATUS_WEIGHTS)[0]
    digits = f"{unix_ms:012x}7{os.urandom(10).hex()[:3]}b{os.urandom(8).hex()[:15]}"
    execution_id = f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
    started_s = unix_ms / 1000 + choose.random() / 100
    failed = status != "success"
    return orjson.dumps(
        [
            execution_id,
            tool,
            "1.0.0",
            tenant,
            f"subject-{choose.randrange(SUBJECTS_OF_EACH)}",
            "agent-7",
            status,
            "tool_error" if failed else None,
            "TOOL_ERROR" if failed else None,
            round(started_s, 6),
            round(started_s + 0.004, 6),
            3.812,
            0.094,
            1,
            False,
            False,
            os.urandom(16).hex(),
            1,
            {"message": "hello", "count": choose.randrange(1000)},
            31,
            os.urandom(32).hex(),
            None if failed else {"message": "hello hello hello", "items": [1, 2, 3]},
            None if failed else 48,
            None if failed else os.urandom(32).hex(),
        ]
    )


Query = Callable[[], tuple[str | None, Filters]]


def _moment(days_ago: float) -> str:
    return datetime.fromtimestamp(time.time() - days_ago * 86_400, UTC).isoformat()


def _span() -> dict[str, str]:
    """Some two days of the quarter."""
    ago = choose.uniform(2, DAYS)
    return {"since": _moment(ago), "until": _moment(ago - 2)}


FILTERS: dict[str, Callable[[], dict[str, str]]] = {
    "nothing": dict,
    "tool_id": lambda: {"tool_id": choose.choice(TOOLS)},
    "tool_id that never ran": lambda: {"tool_id": "nothing"},
    "status success": lambda: {"status": "success"},
    "status other": lambda: {"status": choose.choice(STATUSES[1:])},
    "subject": lambda: {"subject": f"subject-{choose.randrange(SUBJECTS_OF_EACH)}"},
    "subject that never called": lambda: {"subject": "nobody"},
    "since": lambda: {"since": _moment(choose.uniform(0, DAYS))},
    "since a minute ago": lambda: {"since": _moment(1 / 1440)},
    "until": lambda: {"until": _moment(choose.uniform(0, DAYS))},
    "since, until": _span,
    "tool_id, status other": lambda: FILTERS["tool_id"]() | FILTERS["status other"](),
    "tool_id, subject": lambda: FILTERS["tool_id"]() | FILTERS["subject"](),
    "subject, status other": lambda: FILTERS["subject"]() | FILTERS["status other"](),
    "tool_id, since, until": lambda: FILTERS["tool_id"]() | _span(),
    "all of them": lambda: {**FILTERS["tool_id"](), **FILTERS["status other"](), **FILTERS["subject"](), **_span()},
}


def _queries() -> Iterator[tuple[str, Query]]:
    for name, filters in FILTERS.items():
        yield f"tenant; {name}", partial(_of_a_tenant, filters)
    for name, filters in FILTERS.items():
        yield f"all tenants; {name}", partial(_of_all, filters)


def _of_a_tenant(filters: Callable[[], dict[str, str]]) -> tuple[str | None, Filters]:
    return choose.choice(TENANTS), Filters.of(**filters())


def _of_all(filters: Callable[[], dict[str, str]]) -> tuple[str | None, Filters]:
    return None, Filters.of(**filters())


QUERIES = dict(_queries())


if __name__ == "__main__":
    main()
