"""Records to rows: each exactly once by its execution id, on PostgreSQL and on SQLite alike.

A record that the database refuses is parked in `tool_executions_dead` with its SQLSTATE, and the rest of its batch
lands. Knows no journal and never retries: `StoreAway` says that the batch may be offered again. The writer calls it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import asyncpg
import orjson
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.execution_log.columns import COLUMNS
from app.execution_log.connections import StoreAway, away, borrowed, opened
from app.execution_log.partitions import ensure_partitions

INSERT_TIMEOUT_S = 10.0
"""1,000 rows take 30 ms; a server that takes longer than this is in trouble."""

SERVER_SHARE = 0.9
"""Of that time, after which the server gives up by itself. A connection that is cut leaves its statement to the server,
where it waits for a lock on and on: an hour of tries would take every connection that there is."""

RECORD_BYTES_SHOWN_MAX = 1_048_576
"""Of a dead letter: more of it would help nobody."""


class Stored(NamedTuple):
    """What became of a batch: rows written now, rows that were there already, records that were parked."""

    written: int
    duplicates: int
    parked: int


class RecordsRefused(Exception):
    """At least one record of these cannot become a row, now or ever. `reason` holds no value of it."""

    def __init__(self, sqlstate: str, reason: str) -> None:
        super().__init__(f"{sqlstate} {reason}")
        self.sqlstate = sqlstate
        self.reason = reason


class Table(Protocol):
    """What differs between the engines."""

    async def put(self, records: Sequence[bytes]) -> int:
        """Insert all or none, rows that exist excepted; how many were new. Raises RecordsRefused or StoreAway."""

    async def park(self, record: bytes, why: RecordsRefused) -> None:
        """Keep a dead letter, once. Raises StoreAway."""


class ExecutionStore:
    """The table of executions, for writing."""

    def __init__(self, engine: AsyncEngine, timeout_s: float = INSERT_TIMEOUT_S) -> None:
        kind = SqliteTable if engine.dialect.name == "sqlite" else PostgresTable
        self._table: Table = kind(engine, timeout_s)

    async def write(self, records: Sequence[bytes]) -> Stored:
        """Write them in their order, bisecting around what is refused. Raises StoreAway; offer them again then."""
        written = parked = 0
        pieces = [records] if records else []
        while pieces:
            piece = pieces.pop()
            try:
                written += await self._table.put(piece)
            except RecordsRefused as why:
                if len(piece) == 1:
                    await self._table.park(piece[0], why)
                    parked += 1
                else:
                    middle = len(piece) // 2
                    pieces += [piece[middle:], piece[:middle]]
        return Stored(written, len(records) - written - parked, parked)


def execution_id_of(record: bytes) -> str | None:
    """Read from the head of a record, whatever the rest is."""
    found = _ID.match(record)
    return found[1].decode() if found else None


_ID = re.compile(rb'\["([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"')

_JSON = ("parameters", "result")
_TIMES = ("started_at", "finished_at")
_POSTGRESQL_TYPES = {
    "execution_id": "uuid",
    "execution_ms": "float8",
    "overhead_ms": "float8",
    "attempts": "int4",
    "cached": "bool",
    "client_gone": "bool",
    "cost": "int8",
    "parameters_bytes": "int8",
    "result_bytes": "int8",
}


def _expressions() -> Iterator[str]:
    for number, column in enumerate(COLUMNS):
        if column in _JSON:
            yield f"nullif(r -> {number}, 'null')"
        elif column in _TIMES:
            yield f"to_timestamp((r ->> {number})::float8)"
        elif column in _POSTGRESQL_TYPES:
            yield f"(r ->> {number})::{_POSTGRESQL_TYPES[column]}"
        else:
            yield f"r ->> {number}"


# PostgreSQL reads the JSON itself: of all that was tried the least of our CPU, 0.8 µs a row (docs/adr/0014).
POSTGRESQL_INSERT = (
    f"INSERT INTO tool_executions ({', '.join(COLUMNS)}) SELECT {', '.join(_expressions())} "  # noqa: S608
    "FROM jsonb_array_elements(convert_from($1::bytea, 'UTF8')::jsonb) AS r ON CONFLICT DO NOTHING"
)
POSTGRESQL_PARK = """
INSERT INTO tool_executions_dead (record_sha256, execution_id, record, sqlstate, reason)
VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING
"""


PARTITION_TRIES = 3


class PostgresTable:
    """By way of asyncpg's own connection."""

    def __init__(self, engine: AsyncEngine, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._begin = f"BEGIN; SET LOCAL statement_timeout = {max(1, int(timeout_s * SERVER_SHARE * 1000))}"

    async def put(self, records: Sequence[bytes]) -> int:
        document = b"[" + b",".join(records) + b"]"
        for _ in range(PARTITION_TRIES):
            try:
                return await self._insert(document)
            except asyncpg.CheckViolationError:
                # No partition takes it, or a month was attached while it waited for the partition of all others.
                await self._make_partitions()
        raise StoreAway("no partition takes the rows", asyncpg.CheckViolationError.sqlstate)

    async def _insert(self, document: bytes) -> int:
        try:
            status = await self._execute(POSTGRESQL_INSERT, document)
        except asyncpg.PostgresError as error:
            if error.sqlstate == asyncpg.CheckViolationError.sqlstate and not error.constraint_name:
                raise
            if not _blames_a_record(error):
                raise away(error) from error
            raise RecordsRefused(error.sqlstate, _why(error)) from error
        return int(status.rpartition(" ")[2])  # "INSERT 0 1000"

    async def _make_partitions(self) -> None:
        try:
            await ensure_partitions(self._engine, time.time())
        except asyncpg.PostgresError as error:
            raise away(error) from error

    async def park(self, record: bytes, why: RecordsRefused) -> None:
        shown = record[:RECORD_BYTES_SHOWN_MAX]
        digest = hashlib.sha256(record).digest()
        try:
            await self._execute(POSTGRESQL_PARK, digest, execution_id_of(record), shown, why.sqlstate, why.reason)
        except asyncpg.PostgresError as error:
            raise away(error) from error

    async def _execute(self, statement: str, *parameters: Any) -> str:
        """In a transaction, since behind a pooler nothing else may be set."""
        async with borrowed(self._engine, self._timeout_s) as pg:
            await pg.execute(self._begin)
            try:
                status: str = await pg.execute(statement, *parameters)
            except asyncpg.PostgresError:
                if not pg.is_closed():
                    await pg.execute("ROLLBACK")
                raise
            await pg.execute("COMMIT")
            return status


def _blames_a_record(error: asyncpg.PostgresError) -> bool:
    """Data exceptions (22), program limits (54), a constraint. Anything else may pass, so the rows wait."""
    state: str = error.sqlstate or ""
    return state[:2] in ("22", "54") or state in ("23502", "23514")


def _why(error: asyncpg.PostgresError) -> str:
    """Names alone: the server's message quotes values."""
    named = error.constraint_name or error.column_name
    return f"{type(error).__name__} ({named})" if named else type(error).__name__


SQLITE_INSERT = (
    f"INSERT INTO tool_executions ({', '.join(COLUMNS)}) "  # noqa: S608
    f"VALUES ({', '.join('?' * len(COLUMNS))}) ON CONFLICT DO NOTHING"
)
SQLITE_PARK = """
INSERT INTO tool_executions_dead (record_sha256, execution_id, record, sqlstate, reason, at)
VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING
"""

DECODED_AT_ONCE = 100
"""Records between two turns of the loop: half a millisecond."""


class SqliteTable:
    """By way of SQLAlchemy, which runs SQLite in a thread. What is refused has the SQLSTATE that PostgreSQL gives."""

    def __init__(self, engine: AsyncEngine, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s

    async def put(self, records: Sequence[bytes]) -> int:
        rows = []
        for start in range(0, len(records), DECODED_AT_ONCE):
            rows += [_row(record) for record in records[start : start + DECODED_AT_ONCE]]
            await asyncio.sleep(0)
        try:
            async with opened(self._engine, self._timeout_s) as connection:
                return (await connection.exec_driver_sql(SQLITE_INSERT, rows)).rowcount
        except DBAPIError as error:
            raise RecordsRefused(*_sqlite_refusal(error)) from error
        except OverflowError as error:
            raise RecordsRefused("22003", "OverflowError") from error

    async def park(self, record: bytes, why: RecordsRefused) -> None:
        shown = record[:RECORD_BYTES_SHOWN_MAX]
        values = (
            hashlib.sha256(record).digest(),
            execution_id_of(record),
            shown,
            why.sqlstate,
            why.reason,
            int(time.time() * 1e6),
        )
        async with opened(self._engine, self._timeout_s) as connection:
            await connection.exec_driver_sql(SQLITE_PARK, values)


def _row(record: bytes) -> tuple[Any, ...]:
    try:
        values = orjson.loads(record)
    except orjson.JSONDecodeError:
        raise RecordsRefused("22P02", "JSONDecodeError") from None
    if not isinstance(values, list) or execution_id_of(record) is None:
        raise RecordsRefused("22P02", "no execution id")
    if b"\\u0000" in record and _has_nul(values):
        raise RecordsRefused("22P05", "NUL")
    values = (values + [None] * len(COLUMNS))[: len(COLUMNS)]
    for number in _JSON_NUMBERS:
        if values[number] is not None:
            values[number] = orjson.dumps(values[number]).decode()
    for number in _TIME_NUMBERS:
        if isinstance(values[number], int | float):
            values[number] = round(values[number] * 1e6)
    return tuple(values)


_JSON_NUMBERS = tuple(COLUMNS.index(column) for column in _JSON)
_TIME_NUMBERS = tuple(COLUMNS.index(column) for column in _TIMES)


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\x00" in value
    if isinstance(value, dict):
        return any(_has_nul(key) or _has_nul(inner) for key, inner in value.items())
    return isinstance(value, list) and any(map(_has_nul, value))


def _sqlite_refusal(error: DBAPIError) -> tuple[str, str]:
    """SQLSTATE and reason: SQLite says `CHECK constraint failed: tenant_length` and has no codes of that kind."""
    text = str(error.orig)
    name = text.rpartition(": ")[2] if ": " in text else type(error.orig).__name__
    if text.startswith("CHECK"):
        return "23514", f"CheckViolationError ({name})"
    if text.startswith("NOT NULL"):
        return "23502", f"NotNullViolationError ({name.rpartition('.')[2]})"
    return "22000", type(error.orig).__name__
