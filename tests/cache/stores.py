"""Both stores of the room, opened for a test, and a clock that only the test moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from app.cache.file_store import FileStore
from app.cache.redis_store import RedisStore
from app.cache.store import CacheStore, Claim
from app.clients import create_redis
from tests.servers import RedisAt
from tests.waiting import SOON_S

PATIENT_S = 10.0
"""A budget for tests that are not about it."""

BUDGET_S = 0.05

LEASE_MS = 60_000
SHORT_MS = 50


class Clock:
    """Unix milliseconds."""

    def __init__(self, ms: int = 1_800_000_000_000) -> None:
        self.ms = ms

    def __call__(self) -> int:
        return self.ms


class Store:
    """A store under test; `pass_ms` lets its time pass."""

    def __init__(self, store: CacheStore, pass_ms: Callable[[int], Awaitable[None]]) -> None:
        self.store = store
        self.pass_ms = pass_ms

    async def begin(
        self, token: str, fingerprint: str = "fp", *, lease_ms: int = LEASE_MS, take_over: bool = False, key: str = "k"
    ) -> Claim:
        return await self.store.begin(key, fingerprint, token, lease_ms, take_over=take_over)

    async def finish(self, token: str, body: bytes, fingerprint: str = "fp", *, key: str = "k") -> bool:
        return await self.store.finish(key, fingerprint, token, body)

    async def release(self, token: str, key: str = "k") -> None:
        await self.store.release(key, token)


@contextlib.asynccontextmanager
async def redis_store(url: str, timeout_s: float = PATIENT_S, at_once: int = 20) -> AsyncIterator[RedisStore]:
    """Closed at the end, with nothing under way."""
    store = RedisStore(create_redis(url, at_once, "test"), at_once, timeout_s)
    try:
        yield store
    finally:
        await store.close()
    assert not store._under_way and not store._undoing


@contextlib.asynccontextmanager
async def in_redis(redis: RedisAt) -> AsyncIterator[Store]:
    """Its clock is Redis's own: what has to pass does."""

    async def pass_ms(ms: int) -> None:
        began = redis_ms(redis)
        async with asyncio.timeout(SOON_S):
            while redis_ms(redis) <= began + ms:
                await asyncio.sleep(0.005)

    async with redis_store(redis.url) as store:
        yield Store(store, pass_ms)


@contextlib.asynccontextmanager
async def in_file(path: Path) -> AsyncIterator[Store]:
    clock = Clock()

    async def pass_ms(ms: int) -> None:
        clock.ms += ms

    store = FileStore(path, clock)
    yield Store(store, pass_ms)
    await store.close()


def redis_ms(redis: RedisAt) -> int:
    seconds, micros = redis.cli("TIME").split("\n")
    return int(seconds) * 1_000 + int(micros) // 1_000
