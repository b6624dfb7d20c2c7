"""Keys in a real database with an authenticator before them, inside of the test's process: clocks are the test's."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.access.authenticator import Authenticator, Mode, Presented
from app.access.credential import Headers
from app.access.jwt import JwtVerifier
from app.access.keys import Key, NewKey
from app.access.store import KeyStore
from app.calls import Caller
from app.clients import close_engine, create_engine
from app.migration import migrate
from tests.servers import in_thread

NOW_S = 1_800_000_000.0


@dataclass
class Clock:
    """Seconds that pass when the test says so; as the clock and as the time of day."""

    now_s: float = NOW_S

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Keyring:
    """A store, what asks it, and every statement that reached the database."""

    engine: AsyncEngine
    store: KeyStore
    access: Authenticator
    clock: Clock
    wall: Clock
    statements: list[str] = field(default_factory=list)
    _presented: dict[tuple[tuple[bytes, bytes], ...], Presented] = field(default_factory=dict)

    async def make(self, **given: Any) -> tuple[Key, bytes]:
        key, credential = await self.store.create(NewKey(**{"tenant": "acme", "subject": "planner", **given}))
        return key, credential.encode()

    async def identify(self, credential: bytes) -> Caller:
        headers = bearer(credential)
        if (caller := self.recognised(headers)) is None:
            caller = await self.access.identify(headers)
            self.recognised(headers)
        return caller

    def recognised(self, headers: Headers) -> Caller | None:
        """By the headers, and by what was kept of the same ones the last time: both must say the same."""
        caller = self.access.recognised(headers)
        sent = tuple(headers)
        if sent not in self._presented:
            self._presented[sent] = self.access.presented(headers)
        assert self.access.again(self._presented[sent]) is caller
        return caller

    async def run_sql(self, sql: str, **values: Any) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(text(sql), values)


def make_key(url: str, **given: Any) -> tuple[Key, str]:
    """A key in a database that others may be using."""

    async def made() -> tuple[Key, str]:
        async with opened_keyring(url) as ring:
            key, credential = await ring.make(**given)
            return key, credential.decode()

    return in_thread(made())


def change_keys(url: str, sql: str, **values: Any) -> None:
    """What an operator, or time, does to the table."""

    async def changed() -> None:
        async with opened_keyring(url) as ring:
            await ring.run_sql(sql, **values)

    in_thread(changed())


def bearer(credential: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"localhost"), (b"authorization", b"Bearer " + credential)]


@contextlib.asynccontextmanager
async def opened_keyring(
    url: str, mode: Mode = "required", stale_s: float = 600.0, tokens: JwtVerifier | None = None
) -> AsyncIterator[Keyring]:
    """Over the database at this URL, which gets its tables here."""
    engine = create_engine(url, 10, 10)
    clock, wall = Clock(), Clock()
    try:
        await migrate(engine)
        store = KeyStore(engine)
        access = Authenticator(store, mode, stale_s, tokens, clock, wall)
        ring = Keyring(engine, store, access, clock, wall)

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def note(*arguments: Any) -> None:
            ring.statements.append(arguments[2])

        yield ring
        await access.close()
    finally:
        await close_engine(engine)
