"""API keys in the database: the table `api_keys`, on PostgreSQL and SQLite alike.

Every question is bounded, and every failure of the database is one refusal, DependencyUnavailable. Knows no secret but
its digest, no cache and no HTTP. The authenticator, the admin routes and the command line ask it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import (
    ARRAY,
    Column,
    DateTime,
    Dialect,
    MetaData,
    Table,
    Text,
    bindparam,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.types import TypeDecorator, TypeEngine

from app.access.keys import Key, NewKey, is_id, new_secret
from app.calls import Caller
from app.clients import DATABASE_ERRORS
from app.errors import DependencyUnavailable
from app.telemetry.supervision import ignore_result

logger = logging.getLogger("app.access")

QUERY_TIMEOUT_S = 2.0
"""A caller who is not known yet waits this long for a database that does not answer."""

CHUNK_SIZES = (1, 16, 128, 512)
"""Ids asked for at once, filled up to one of these: each length is a statement of its own to prepare."""

CHUNK_MAX = CHUNK_SIZES[-1]

LISTED_AT_ONCE = 1_000

RIGHTS_KEPT = 256
"""Of rights that keys have alike."""

T = TypeVar("T")
Row = tuple[Any, ...]


class _Time(TypeDecorator[Any]):
    """Takes Unix seconds and gives what the database has: one row that cannot be read must not spoil the others."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else DateTime(timezone=True))

    def process_bind_param(self, value: float | None, dialect: Dialect) -> datetime | str | None:
        if value is None:
            return None
        moment = datetime.fromtimestamp(value, UTC)
        return moment.isoformat(" ") if dialect.name == "sqlite" else moment


KEYS = Table(
    "api_keys",
    MetaData(),
    Column("id", Text, primary_key=True),
    Column("secret_sha256", Text),
    Column("tenant", Text),
    Column("subject", Text),
    Column("scopes", Text),
    Column("tools", Text),
    Column("limit_class", Text),
    Column("created_at", _Time),
    Column("expires_at", _Time),
    Column("revoked_at", _Time),
)


_DIGEST = text(
    "SELECT sha256(convert_to(string_agg(k::text, E'\\n' ORDER BY k.id), 'UTF8')) "
    "FROM api_keys AS k WHERE k.id = ANY(:key_ids)"
).bindparams(bindparam("key_ids", type_=ARRAY(Text)))


class KeyStore:
    """The table, over an engine that somebody else opens and closes."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._given_up: set[asyncio.Task[Any]] = set()

    async def create(self, new: NewKey) -> tuple[Key, str]:
        """The key, and its credential, which is nowhere else."""
        made, now, caller = new_secret(), _now(), new.caller()
        values = {
            "id": made.key_id,
            "secret_sha256": made.secret_sha256,
            "tenant": caller.tenant,
            "subject": caller.subject,
            "scopes": " ".join(sorted(caller.scopes)),
            "tools": " ".join(caller.tools),
            "limit_class": caller.limit_class,
            "created_at": now,
            "expires_at": new.expires_at(now),
        }

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(insert(KEYS).values(values))

        await self._bounded(work)
        return Key(made.key_id, made.secret_sha256, caller, now, new.expires_at(now), None), made.credential

    async def find(self, key_ids: Sequence[str]) -> list[Row]:
        """The rows that there are of 1 to CHUNK_MAX ids, as the database has them; `decode` makes Keys of them."""
        size = next(size for size in CHUNK_SIZES if size >= len(key_ids))
        asked = [*key_ids, *[key_ids[-1]] * (size - len(key_ids))]
        return await self._rows(select(KEYS).where(KEYS.c.id.in_(asked)))

    async def digest(self, key_ids: Sequence[str]) -> bytes | None:
        """Taken by the database of all there is of these rows: another as soon as one of them is changed, made or
        deleted. None: SQLite has none to give."""
        if self._engine.dialect.name == "sqlite":
            return None
        rows = await self._rows(_DIGEST.bindparams(key_ids=list(key_ids)))
        taken: bytes = rows[0][0] or b""  # of no row at all there is none
        return taken

    async def one(self, key_id: str) -> Key | None:
        """The key, revoked or not; None when there is none."""
        rows = await self.find([key_id]) if is_id(key_id) else []
        return decode(rows[0]) if rows else None

    async def page(self, limit: int, after: str) -> tuple[list[Key], str | None]:
        """Keys in the order of their making past the id `after`, and where the next page begins, if there is one.
        Rows that cannot be read are left out."""
        rows = await self._rows(select(KEYS).where(KEYS.c.id > after).order_by(KEYS.c.id).limit(limit + 1))
        keys = [key for row in rows[:limit] if (key := decode(row)) is not None]
        return keys, rows[limit - 1][0] if len(rows) > limit else None

    async def all(self) -> AsyncIterator[Key]:
        """Every key, page by page."""
        after: str | None = ""
        while after is not None:
            keys, after = await self.page(LISTED_AT_ONCE, after)
            for key in keys:
                yield key

    async def revoke(self, key_id: str) -> Key | None:
        """The key, revoked now or before; None when there is none."""
        if not is_id(key_id):
            return None

        async def work(connection: AsyncConnection) -> Row | None:
            unrevoked = (KEYS.c.id == key_id) & KEYS.c.revoked_at.is_(None)
            await connection.execute(update(KEYS).where(unrevoked).values(revoked_at=_now()))
            row = (await connection.execute(select(KEYS).where(KEYS.c.id == key_id))).first()
            return None if row is None else tuple(row)

        row = await self._bounded(work)
        return None if row is None else decode(row)

    async def holds_any(self) -> bool:
        """Whether there is a row, of a revoked key too."""
        return bool(await self._rows(select(KEYS.c.id).limit(1)))

    async def _rows(self, statement: Any) -> list[Row]:
        async def work(connection: AsyncConnection) -> list[Row]:
            return [tuple(row) for row in await connection.execute(statement)]

        return await self._bounded(work)

    async def _bounded(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Its result in time. Work that goes on all the same is left to itself: a driver that closes a connection to a
        stopped server takes seconds more."""
        task = asyncio.get_running_loop().create_task(self._transact(work), name="key-store")
        try:
            done, _ = await asyncio.wait({task}, timeout=QUERY_TIMEOUT_S)
        except asyncio.CancelledError:
            self._give_up(task)
            raise
        if not done:
            self._give_up(task)
            raise DependencyUnavailable("The key store does not answer; try again", retry_after_ms=1000)
        return task.result()

    async def close(self) -> None:
        """Wait, bounded, for work that was left to itself: the engine is closed next."""
        if self._given_up:
            await asyncio.wait(self._given_up, timeout=QUERY_TIMEOUT_S)

    def _give_up(self, task: asyncio.Task[Any]) -> None:
        self._given_up.add(task)
        task.add_done_callback(self._given_up.discard)
        task.add_done_callback(ignore_result)
        task.cancel()

    async def _transact(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        try:
            async with self._engine.begin() as connection:
                return await work(connection)
        except DATABASE_ERRORS as error:
            raise DependencyUnavailable("The key store is away; try again", retry_after_ms=1000) from error


def _now() -> float:
    """In whole milliseconds, which come back from the database as they were."""
    return time.time_ns() // 1_000_000 / 1e3


def decode(row: Row) -> Key | None:
    """The key of a row; None, and a line in the log, when somebody wrote there what is none."""
    try:
        key_id, secret_sha256, tenant, subject, scopes, tools, limit_class, created, expires, revoked = row
        if not all(isinstance(value, str) for value in row[:7]):  # SQLite takes bytes for text
            raise TypeError
        caller = Caller(tenant, subject, *_shared(scopes, tools, limit_class))
        return Key(key_id, secret_sha256, caller, _unix_s(created) or 0.0, _unix_s(expires), _unix_s(revoked))
    except (AttributeError, OverflowError, TypeError, ValueError):
        logger.error("a row of api_keys cannot be read", extra={"key_id": row[0]})
        return None


@lru_cache(RIGHTS_KEPT)
def _shared(scopes: str, tools: str, limit_class: str) -> tuple[frozenset[str], tuple[str, ...], str]:
    """What many keys have alike, as the same objects: those of 10,000 callers fit no cache of a processor."""
    return frozenset(scopes.split()), tuple(tools.split()), limit_class


def _unix_s(value: datetime | str | None) -> float | None:
    if value is None:
        return None
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
