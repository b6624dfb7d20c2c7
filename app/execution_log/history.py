"""Reading the log: one page, one row, or all of it as a stream, newest first, of one tenant or of all.

Pages go by key: a cursor is the id of the last row, in full or short, so a page costs the same wherever it is. Rows
are JSON bytes, alike from both engines. Knows no HTTP and no caller: whoever asks says which tenant; the doors call it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg
import orjson
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.calls import STATUSES, rfc3339
from app.clients import pool_states
from app.errors import DependencyUnavailable, InvalidParams
from app.execution_log.columns import COLUMNS
from app.execution_log.connections import StoreAway, away, borrowed, opened
from app.execution_log.partitions import first_id
from app.fairness import FairSemaphore

LIMIT_DEFAULT = 50
LIMIT_MAX = 500

STATEMENT_TIMEOUT_S = 5.0
"""The server's own bound."""

QUERY_CANCELED = "57014"
"""What PostgreSQL says then: a filter that few rows meet, over a long time, is looked for in all of them."""

CUT_AFTER_S = 1.0
"""The connection is cut that much later, when not even that was heard of."""

READERS_MAX = 8
"""Pages that are read at once: a page takes milliseconds, and each holds its rows."""

KEPT_FOR_OTHERS = 2
"""Connections of the pool that no page takes: one for keys, one for the writer."""

PATIENCE_S = 5.0
"""For one of these places."""

CHUNK_ROWS = 100
CHUNK_BYTES_MAX = 4 * 1024 * 1024
"""Rows are fetched and rendered in pieces between which the loop turns. After a piece of more bytes the next has fewer
rows: with LOG_PAYLOAD_BYTES at its most a row has 2 MiB, so that sizes are asked for first, and no piece has more than
twice these bytes."""

PAGE_BYTES_MAX = 8 * 1024 * 1024
"""A page ends early, with a cursor, rather than be larger."""

FILTER_CHARACTERS_MAX = 1_024
"""What the columns hold at most."""


class Page(NamedTuple):
    """Rows as JSON objects, and what the next page is asked for by; None when there is none."""

    rows: list[bytes]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Filters:
    """What a page is narrowed by; all given conditions hold. Times are Unix microseconds of `started_at`."""

    tool_id: str | None = None
    status: str | None = None
    subject: str | None = None
    since_us: int | None = None
    until_us: int | None = None

    @classmethod
    def of(
        cls,
        *,
        tool_id: str | None = None,
        status: str | None = None,
        subject: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> Filters:
        """From what a client sends, times as RFC 3339: `since` is in, `until` is not. Raises InvalidParams."""
        if status is not None and status not in STATUSES:
            raise InvalidParams.at("status", f"must be one of {', '.join(STATUSES)}", "enum")
        return cls(
            _text("tool_id", tool_id),
            status,
            _text("subject", subject),
            _moment("since", since),
            _moment("until", until),
        )


def _text(path: str, value: str | None) -> str | None:
    if value is None:
        return None
    if len(value) > FILTER_CHARACTERS_MAX or _NO_TEXT.search(value):
        raise InvalidParams.at(path, f"must be text of at most {FILTER_CHARACTERS_MAX} characters")
    return value


_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
"""What PostgreSQL takes for no text."""


def _moment(path: str, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        if not _RFC3339.fullmatch(value):
            raise ValueError
        moment = datetime.fromisoformat(value.upper())
        return int(moment.timestamp()) * 1_000_000 + moment.microsecond
    except (ValueError, OverflowError):
        raise InvalidParams.at(path, "must be a time as 2026-11-20T15:00:00Z (RFC 3339)", "datetime") from None


_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)


def _cursor(last_id: str) -> str:
    return base64.urlsafe_b64encode(UUID(last_id).bytes).rstrip(b"=").decode()


def _last_id(cursor: str | None) -> str | None:
    if cursor is None:
        return None
    if _ID.fullmatch(cursor):
        return cursor.lower()
    try:
        if len(cursor) != 22:
            raise ValueError
        return str(UUID(bytes=base64.b64decode(cursor + "==", altchars=b"-_", validate=True)))
    except (ValueError, binascii.Error):
        raise InvalidParams.at("cursor", "must be a next_cursor of an earlier answer") from None


class ExecutionHistory:
    """The table of executions, for reading.

    `wait_s_max` is how long a call may have its id before it starts, in a queue or in a plan: `since` is about starts,
    while keys are in the order of ids. `payload_bytes_max` is what a row keeps of each of its two payloads.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        wait_s_max: float = 60.0,
        timeout_s: float = STATEMENT_TIMEOUT_S,
        payload_bytes_max: int = 0,
    ) -> None:
        kind = SqliteReader if engine.dialect.name == "sqlite" else PostgresReader
        self._reader: PostgresReader | SqliteReader = kind(engine, timeout_s)
        self._wait_us_max = int(wait_s_max * 1e6)
        self._payload_bytes_max = payload_bytes_max
        self._places = FairSemaphore(_readers_max(engine))

    async def page(
        self, tenant: str | None, filters: Filters, limit: int = LIMIT_DEFAULT, cursor: str | None = None
    ) -> Page:
        """Newest first; `tenant` None is every tenant. Raises InvalidParams, DependencyUnavailable."""
        if not 1 <= limit <= LIMIT_MAX:
            raise InvalidParams.at("limit", f"must be 1 to {LIMIT_MAX}")
        below = _last_id(cursor)
        rows: list[bytes] = []
        page_bytes = 0
        while True:
            # One more than is wanted tells whether there is a next page.
            chunk = await self._chunk(tenant, filters, below, min(limit - len(rows) + 1, CHUNK_ROWS))
            for row in chunk.rows:
                if len(rows) == limit or page_bytes > PAGE_BYTES_MAX:
                    return Page(rows, _cursor(str(below)))
                rows.append(row.json)
                page_bytes += len(row.json)
                below = row.execution_id
            if chunk.last:
                return Page(rows, None)

    async def one(self, tenant: str | None, execution_id: str) -> bytes | None:
        """One row; None when there is none that this tenant may see, whatever the id is."""
        if not _ID.fullmatch(execution_id):
            return None
        query = self._reader.query(Where.of_one(tenant, execution_id.lower()), 1)
        rows = await self._read(query, tenant)
        return _rendered(rows[0]).json if rows else None

    async def export(
        self, tenant: str | None, filters: Filters, limit: int | None = None, cursor: str | None = None
    ) -> AsyncIterator[bytes]:
        """All rows, or `limit` of them, as NDJSON, newest first, in pieces of some MB; with a cursor those after it.

        Every piece is a query of its own: nothing is held in the database meanwhile. What was written when it began is
        in it once; what came later has a higher id and is not, except rows that waited in a journal. Rows that are
        dropped meanwhile are missing.
        """
        below = _last_id(cursor)
        rows_max = CHUNK_ROWS
        left = sys.maxsize if limit is None else limit
        while left > 0:
            chunk = await self._chunk(tenant, filters, below, min(rows_max, left))
            if chunk.rows:
                below = chunk.rows[-1].execution_id
                left -= len(chunk.rows)
                yield b"".join([row.json + b"\n" for row in chunk.rows])
            if chunk.last:
                return
            rows_max = _next_rows_max(rows_max, chunk)

    async def _chunk(self, tenant: str | None, filters: Filters, below: str | None, rows_max: int) -> Chunk:
        where = Where.of(tenant, filters, below, self._wait_us_max)
        if rows_max * self._payload_bytes_max > CHUNK_BYTES_MAX:
            rows_max = await self._fitting(where, rows_max)
        found = await self._read(self._reader.query(where, rows_max), tenant)
        rows: list[Row] = []
        for start in range(0, len(found), RENDERED_AT_ONCE):
            rows += map(_rendered, found[start : start + RENDERED_AT_ONCE])
            await asyncio.sleep(0)
        return Chunk(rows, len(found) < rows_max)

    async def _fitting(self, where: Where, rows_max: int) -> int:
        """How many rows fit, by the sizes that they have beside their payloads: these are not read for it."""
        chunk_bytes = 0
        sizes = await self._read(self._reader.sizes(where, rows_max, self._payload_bytes_max), where.tenant)
        for rows, (row_bytes,) in enumerate(sizes):
            chunk_bytes += row_bytes
            if chunk_bytes > 2 * CHUNK_BYTES_MAX:
                return max(1, rows)
        return rows_max

    async def _read(self, query: Query, tenant: str | None) -> Sequence[Sequence[Any]]:
        """In one of the places; tenants that wait get them in turn, and so do those who read everyone's."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._places.acquire(tenant or "")
        except TimeoutError:
            raise DependencyUnavailable("The log is busy; try again", retry_after_ms=1000) from None
        try:
            return await self._reader.read(query)
        except StoreAway as away:
            wrong = "The log cannot be read now"
            if away.sqlstate == QUERY_CANCELED:
                wrong = "The log did not find this in time; narrow it by since and until"
            raise DependencyUnavailable(wrong, retry_after_ms=1000) from None
        finally:
            self._places.release()


def _readers_max(engine: AsyncEngine) -> int:
    connections_max = sum(pool_states(engine).values())
    return max(1, min(READERS_MAX, connections_max - KEPT_FOR_OTHERS)) if connections_max else READERS_MAX


RENDERED_AT_ONCE = 50
"""Rows between two turns of the loop: under a millisecond with payloads of the usual size."""

_ID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Row(NamedTuple):
    execution_id: str
    json: bytes


class Chunk(NamedTuple):
    rows: list[Row]
    last: bool
    """There is nothing below."""


def _next_rows_max(rows_max: int, chunk: Chunk) -> int:
    chunk_bytes = sum(len(row.json) for row in chunk.rows)
    if chunk_bytes > CHUNK_BYTES_MAX:
        return max(1, rows_max // 2)
    return min(CHUNK_ROWS, rows_max * 2) if chunk_bytes < CHUNK_BYTES_MAX // 4 else rows_max


@dataclass(frozen=True, slots=True)
class Where:
    """Conditions on rows, still without an engine's spelling."""

    tenant: str | None = None
    tool_id: str | None = None
    status: str | None = None
    subject: str | None = None
    started_from_us: int | None = None
    started_before_us: int | None = None
    id_from: str | None = None
    id_below: str | None = None
    id_is: str | None = None

    @classmethod
    def of_one(cls, tenant: str | None, execution_id: str) -> Where:
        return cls(tenant=tenant, id_is=execution_id)

    @classmethod
    def of(cls, tenant: str | None, filters: Filters, below: str | None, wait_us_max: int) -> Where:
        """A call has its id before it starts: at most `wait_us_max`, so starts bound ids."""
        since, until = filters.since_us, filters.until_us
        id_below = below
        if until is not None:
            ceiling = first_id(-(-until // 1000))
            id_below = ceiling if below is None else min(below, ceiling)
        return cls(
            tenant,
            filters.tool_id,
            filters.status,
            filters.subject,
            since,
            until,
            None if since is None else first_id((since - wait_us_max) // 1000),
            id_below,
        )


class Query(NamedTuple):
    sql: str
    parameters: list[Any]


def _rendered(values: Sequence[Any]) -> Row:
    """The row as JSON: the columns, payloads as objects of content, size and digest, times as RFC 3339."""
    row = dict(zip(COLUMNS, values, strict=True))
    for name in ("started_at", "finished_at"):
        row[name] = rfc3339(row[name] / 1e6)
    for name in ("cached", "client_gone"):
        row[name] = None if row[name] is None else bool(row[name])
    for name in ("parameters", "result"):
        row[name] = {
            "content": _canonical(row[name]),
            "size_bytes": row.pop(f"{name}_bytes"),
            "sha256": row.pop(f"{name}_sha256"),
        }
    return Row(row["execution_id"], orjson.dumps(row))


def _canonical(payload: str | None) -> orjson.Fragment | None:
    """One spelling for both engines: jsonb keeps neither the order of keys, nor exponents, nor the sign of zero."""
    if payload is None:
        return None
    value = orjson.loads(payload)
    if _SPELT_DIFFERENTLY.search(payload):
        value = _like_jsonb(value)
    return orjson.Fragment(orjson.dumps(value, option=orjson.OPT_SORT_KEYS))


_SPELT_DIFFERENTLY = re.compile(r"[eE]\+?1[6-9]|-0\.0")


def _like_jsonb(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and (value == 0 or abs(value) >= 1e16):
        digits = int(Decimal(repr(value)))  # as they are written: `int(value)` has those of the binary number
        return 0.0 if value == 0 else digits if -(2**63) <= digits < 2**64 else value
    if isinstance(value, dict):
        return {key: _like_jsonb(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_like_jsonb(inner) for inner in value]
    return value


_CONDITIONS = (
    ("tenant", "tenant = {}"),
    ("tool_id", "tool_id = {}"),
    ("subject", "subject = {}"),
    ("id_is", "execution_id = {}"),
    ("id_from", "execution_id >= {}"),
    ("id_below", "execution_id < {}"),
)


def _conditions(where: Where, mark: str, parameters: list[Any]) -> Iterator[str]:
    """SQL of the conditions that are spelt alike; their values are appended to `parameters`."""
    for name, condition in _CONDITIONS:
        value = getattr(where, name)
        if value is not None:
            parameters.append(value)
            yield condition.format(mark.format(len(parameters)))
    if where.status is not None:
        assert where.status in STATUSES
        yield f"status = '{where.status}'"  # a literal, or no plan could use the partial index
        if where.status != "success":
            yield "status <> 'success'"  # SQLite wants that index's own words


POSTGRESQL_COLUMNS = ", ".join(
    {
        "execution_id": "execution_id::text",
        "started_at": "(extract(epoch from started_at) * 1000000)::int8",
        "finished_at": "(extract(epoch from finished_at) * 1000000)::int8",
        "parameters": "parameters::text",
        "result": "result::text",
    }.get(column, column)
    for column in COLUMNS
)


def _kept_bytes(least: str, bytes_max: int) -> str:
    """SQL of what a row's payloads take at most: one that is not kept has a size too, and one that is cut a larger."""
    parts = (
        f"CASE WHEN {name} IS NULL THEN 0 ELSE {least}(coalesce({name}_bytes, {bytes_max}), {bytes_max}) END"
        for name in ("parameters", "result")
    )
    return " + ".join(parts)


READ_ONLY = """BEGIN READ ONLY; SET LOCAL statement_timeout = {};
SET LOCAL plan_cache_mode = force_custom_plan"""
"""A tenant may have most of the rows or ten: planning with the values finds the right index, for half a millisecond."""


class PostgresReader:
    """By way of asyncpg's own connection."""

    def __init__(self, engine: AsyncEngine, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s

    def query(self, where: Where, rows_max: int) -> Query:
        return self._select(POSTGRESQL_COLUMNS, where, rows_max)

    def sizes(self, where: Where, rows_max: int, payload_bytes_max: int) -> Query:
        return self._select(_kept_bytes("least", payload_bytes_max), where, rows_max)

    def _select(self, columns: str, where: Where, rows_max: int) -> Query:
        parameters: list[Any] = []
        conditions = list(_conditions(where, "${}", parameters))
        for value, sign in ((where.started_from_us, ">="), (where.started_before_us, "<")):
            if value is not None:
                parameters.append(value)
                conditions.append(
                    f"started_at {sign} to_timestamp(0) + ${len(parameters)}::int8 * interval '1 microsecond'"
                )
        sql = (
            f"SELECT {columns} FROM tool_executions WHERE {' AND '.join(conditions) or 'true'} "  # noqa: S608
            f"ORDER BY tool_executions.execution_id DESC LIMIT {rows_max}"
        )
        return Query(sql, parameters)

    async def read(self, query: Query) -> Sequence[Sequence[Any]]:
        try:
            async with borrowed(self._engine, self._timeout_s + CUT_AFTER_S) as pg:
                await pg.execute(READ_ONLY.format(round(self._timeout_s * 1000)))
                try:
                    found: list[Any] = await pg.fetch(query.sql, *query.parameters)
                finally:
                    if not pg.is_closed():
                        await pg.execute("ROLLBACK")
                return found
        except asyncpg.PostgresError as error:
            raise away(error) from error


class SqliteReader:
    """By way of SQLAlchemy, which runs SQLite in a thread."""

    def __init__(self, engine: AsyncEngine, timeout_s: float) -> None:
        self._engine = engine
        self._timeout_s = timeout_s

    def query(self, where: Where, rows_max: int) -> Query:
        return self._select(", ".join(COLUMNS), where, rows_max)

    def sizes(self, where: Where, rows_max: int, payload_bytes_max: int) -> Query:
        return self._select(_kept_bytes("min", payload_bytes_max), where, rows_max)

    def _select(self, columns: str, where: Where, rows_max: int) -> Query:
        parameters: list[Any] = []
        conditions = list(_conditions(where, "?", parameters))
        for value, sign in ((where.started_from_us, ">="), (where.started_before_us, "<")):
            if value is not None:
                parameters.append(value)
                conditions.append(f"started_at {sign} ?")
        sql = (
            f"SELECT {columns} FROM tool_executions WHERE {' AND '.join(conditions) or 'true'} "  # noqa: S608
            f"ORDER BY execution_id DESC LIMIT {rows_max}"
        )
        return Query(sql, parameters)

    async def read(self, query: Query) -> Sequence[Sequence[Any]]:
        try:
            async with opened(self._engine, self._timeout_s) as connection:
                found = await connection.exec_driver_sql(query.sql, tuple(query.parameters))
                return found.fetchall()
        except DBAPIError as error:
            raise away(error) from error
