"""The months of the log: partitions made ahead, dropped when they are past LOG_RETENTION_DAYS, rows deleted on SQLite.

An execution id begins with its time, so the bounds of ids are bounds in time. Of all replicas one works, under an
advisory lock, and no lock on a table is waited for longer than inserts may be held up. The service runs `Upkeep`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from app.execution_log.connections import StoreAway, borrowed, opened

MONTHS_BEHIND = 1
"""Records that waited in a journal over the turn of a month."""

MONTHS_AHEAD = 3
"""A service that cannot make any for a quarter still writes by month."""

UPKEEP_EVERY_S = 86_400.0
UPKEEP_RETRY_S = 300.0

CLOCKS_APART_S = 60.0
"""More between our clock and the database's than a busy machine explains."""

LOCK_KEY = 0x61676E75
"""Beside that of `app/migration.py`, which may run at the same time: it waits at the tables, not here."""

LOCK_TIMEOUT_MS = 1_000
"""Inserts queue behind a lock that waits: they are held up for no longer. The next round tries again."""

UPKEEP_TIMEOUT_S = 60.0

MOVED_ROWS_MAX = 100_000
"""Rows that a new month takes over from `tool_executions_other` in its one transaction, during which inserts of months
without a partition wait: about a second. More stay where they are, until retention."""

DELETED_ROWS_MAX = 2_000
"""Of one DELETE: about 20 ms, the longest that a writer waits for it."""

logger = logging.getLogger("app.execution_log")


class Month(NamedTuple):
    """A calendar month in UTC."""

    year: int
    month: int

    @classmethod
    def of(cls, unix_s: float) -> Month:
        moment = datetime.fromtimestamp(unix_s, UTC)
        return cls(moment.year, moment.month)

    def plus(self, months: int) -> Month:
        year, before = divmod(self.year * 12 + self.month - 1 + months, 12)
        return Month(year, before + 1)

    @property
    def starts_s(self) -> float:
        return datetime(self.year, self.month, 1, tzinfo=UTC).timestamp()

    @property
    def first_id(self) -> str:
        return first_id(int(self.starts_s) * 1000)

    @property
    def table(self) -> str:
        return f"tool_executions_{self.year:04d}_{self.month:02d}"


def first_id(unix_ms: int) -> str:
    """The least id that a UUIDv7 of this millisecond can have (RFC 9562, section 5.7), clamped to what 48 bits hold."""
    digits = f"{min(max(unix_ms, 0), 0xFFFF_FFFF_FFFF):012x}"
    return f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000"


class Upkeep:
    """Makes months ahead and drops what is past retention, at start and every day."""

    def __init__(self, engine: AsyncEngine, retention_days: int, now: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._retention_s = retention_days * 86_400.0
        self._now = now

    async def run(self) -> None:
        """For ever. A database that is away is tried again; the writer says that it is."""
        while True:
            try:
                await self.once()
                pause_s = UPKEEP_EVERY_S
            except (StoreAway, asyncpg.PostgresError) as error:
                logger.warning("upkeep of the log put off", extra={"reason": str(error)})
                pause_s = UPKEEP_RETRY_S
            await asyncio.sleep(pause_s)

    async def once(self) -> None:
        if self._engine.dialect.name == "sqlite":
            await self._delete_from_sqlite()
            return
        await ensure_partitions(self._engine, self._now())
        await drop_partitions(self._engine, await self._past_s() - self._retention_s)

    async def _past_s(self) -> float:
        """By the earlier clock, ours or the database's: a replica whose clock is years ahead would drop every month."""
        ours_s = self._now()
        async with borrowed(self._engine, UPKEEP_TIMEOUT_S) as pg:
            theirs_s = float(await pg.fetchval("SELECT extract(epoch FROM now())"))
        if abs(ours_s - theirs_s) > CLOCKS_APART_S:
            logger.warning(
                "clock differs from the database's: the log is kept by the earlier one",
                extra={"ahead_s": round(ours_s - theirs_s)},
            )
        return min(ours_s, theirs_s)

    async def _delete_from_sqlite(self) -> None:
        before_s = self._now() - self._retention_s
        for statement, parameter in (
            (SQLITE_DELETE, first_id(int(before_s * 1000))),
            (SQLITE_DELETE_DEAD, int(before_s * 1e6)),
        ):
            deleted = DELETED_ROWS_MAX
            while deleted == DELETED_ROWS_MAX:
                async with opened(self._engine, UPKEEP_TIMEOUT_S) as connection:
                    deleted = (await connection.exec_driver_sql(statement, (parameter, DELETED_ROWS_MAX))).rowcount


async def ensure_partitions(engine: AsyncEngine, now_s: float) -> list[str]:
    """Make the months that are missing, and the partition for all other ids; the names of what was made. A month whose
    table was detached stays out: its late rows go to the partition for others.

    Nothing when another process is at it. Raises StoreAway; PostgresError when the role may not, or a lock was busy.
    """
    made = []
    this = Month.of(now_s)
    async with borrowed(engine, UPKEEP_TIMEOUT_S) as pg:
        for month in (this.plus(step) for step in range(-MONTHS_BEHIND, MONTHS_AHEAD + 1)):
            if month.first_id == month.plus(1).first_id:  # before 1970, where no id is: of a clock that was never set
                continue
            async with pg.transaction():
                if not await _locked(pg):
                    break
                known = await _partitions(pg)
                if OTHER not in known:
                    await pg.execute(f"CREATE TABLE {OTHER} PARTITION OF tool_executions DEFAULT")
                    made.append(OTHER)
                if month.table not in known and not await _exists(pg, month.table) and await _make(pg, month):
                    made.append(month.table)
    if made:
        logger.info("partitions made", extra={"tables": made})
    return made


OTHER = "tool_executions_other"


async def _locked(pg: Any) -> bool:
    await pg.execute(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
    return bool(await pg.fetchval("SELECT pg_try_advisory_xact_lock($1)", LOCK_KEY))


async def _exists(pg: Any, table: str) -> bool:
    return await pg.fetchval("SELECT to_regclass($1)::text", table) is not None


async def _make(pg: Any, month: Month) -> bool:
    """A table of its own first, attached then: CREATE … PARTITION OF would lock the whole log exclusively."""
    table, low, high = month.table, month.first_id, month.plus(1).first_id
    await pg.execute(f"LOCK TABLE {OTHER} IN ACCESS EXCLUSIVE MODE")  # attaching needs it; nothing may slip in before
    within = f"execution_id >= '{low}' AND execution_id < '{high}'"
    astray = await pg.fetchval(
        f"SELECT count(*) FROM (SELECT FROM {OTHER} WHERE {within} LIMIT {MOVED_ROWS_MAX + 1}) AS astray"  # noqa: S608
    )
    if astray > MOVED_ROWS_MAX:
        logger.warning("month not made: too many of its rows are in the partition for others", extra={"table": table})
        return False
    await pg.execute(f"CREATE TABLE {table} (LIKE tool_executions INCLUDING ALL)")
    if astray:
        await pg.execute(
            f"WITH moved AS (DELETE FROM {OTHER} WHERE {within} RETURNING *) "  # noqa: S608
            f"INSERT INTO {table} SELECT * FROM moved"
        )
    await pg.execute(f"ALTER TABLE tool_executions ATTACH PARTITION {table} FOR VALUES FROM ('{low}') TO ('{high}')")
    return True


async def drop_partitions(engine: AsyncEngine, before_s: float) -> list[str]:
    """Drop the months that ended before, and the rows and dead letters outside of months that are older; the names.

    A plain DROP with a bounded wait: DETACH … CONCURRENTLY is not to be had beside a default partition.
    """
    dropped: list[str] = []
    limit_id = first_id(int(before_s * 1000))
    async with borrowed(engine, UPKEEP_TIMEOUT_S) as pg:
        while (table := await _drop_oldest(pg, limit_id)) is not None:
            dropped.append(table)
        moment = datetime.fromtimestamp(before_s, UTC)
        for statement in POSTGRESQL_DELETES:
            while await pg.execute(statement, moment, DELETED_ROWS_MAX) == f"DELETE {DELETED_ROWS_MAX}":
                pass
    if dropped:
        logger.info("partitions dropped", extra={"tables": dropped})
    return dropped


async def _drop_oldest(pg: Any, limit_id: str) -> str | None:
    async with pg.transaction():
        if not await _locked(pg):
            return None
        past = [table for table, high in (await _partitions(pg)).items() if high is not None and high <= limit_id]
        if not past:
            return None
        await pg.execute(f"DROP TABLE {min(past)}")
        return min(past)


async def _partitions(pg: Any) -> dict[str, str | None]:
    """Names of the partitions, each with the id at which it ends; None for the default one, or for foreign ones."""
    rows = await pg.fetch(POSTGRESQL_PARTITIONS)
    return dict(_bounds(rows))


def _bounds(rows: list[Any]) -> Iterator[tuple[str, str | None]]:
    for name, bound in rows:
        found = re.fullmatch(r"FOR VALUES FROM \('[0-9a-f-]+'\) TO \('([0-9a-f-]+)'\)", bound)
        ours = re.fullmatch(r"tool_executions_\d{4}_\d\d", name)
        yield name, found[1] if found and ours else None


POSTGRESQL_PARTITIONS = """
SELECT c.relname, pg_get_expr(c.relpartbound, c.oid)
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'tool_executions'::regclass
"""

POSTGRESQL_DELETES = (
    f"""DELETE FROM {OTHER} WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM {OTHER} WHERE finished_at < $1 LIMIT $2))""",  # noqa: S608
    """DELETE FROM tool_executions_dead WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM tool_executions_dead WHERE at < $1 LIMIT $2))""",
)

SQLITE_DELETE = """DELETE FROM tool_executions WHERE execution_id IN (
    SELECT execution_id FROM tool_executions WHERE execution_id < ? ORDER BY execution_id LIMIT ?)"""
SQLITE_DELETE_DEAD = """DELETE FROM tool_executions_dead WHERE record_sha256 IN (
    SELECT record_sha256 FROM tool_executions_dead WHERE at < ? LIMIT ?)"""
