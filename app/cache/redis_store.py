"""Records and results in Redis, for all replicas together.

One key a command, tagged by tenant. A command that had no answer in time is not sent again: it may have been carried
out. Once one had none, others are refused at once for a moment, so that a dead Redis costs one budget and not one
each.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from importlib import resources
from time import monotonic
from typing import Any, TypeVar

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import NoScriptError, RedisError

from app.cache.store import KEPT_MS, Claim, StoreAway

logger = logging.getLogger("app.cache")

T = TypeVar("T")

AWAY_S = 1.0
"""After a command without an answer, nothing is asked for this long."""

EPOCHS_KEY = "agentcore:cache:epochs"

STATES = frozenset(("begun", "running", "done", "unknown", "other"))


class Script:
    """A Lua script of this room: by its digest, with its text once where the server does not know it."""

    def __init__(self, name: str) -> None:
        self._text = resources.files("app.cache").joinpath(f"scripts/{name}.lua").read_text()
        self._sha = hashlib.sha1(self._text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, client: Any, key: str, *arguments: str | bytes | int) -> Any:
        try:
            return await client.evalsha(self._sha, 1, key, *arguments)
        except NoScriptError:  # nothing was carried out
            return await client.eval(self._text, 1, key, *arguments)


BEGIN, FINISH = Script("begin"), Script("finish")


class RedisStore:
    """`at_once` commands are under way at most, each for at most `timeout_s`."""

    def __init__(self, client: Redis | RedisCluster, at_once: int, timeout_s: float) -> None:
        self._client: Any = client
        self._places = asyncio.Semaphore(at_once)
        self._timeout_s = timeout_s
        self._away_until = 0.0

    async def begin(self, key: str, fingerprint: str, token: str, lease_ms: int, *, take_over: bool) -> Claim:
        arguments = fingerprint, token, lease_ms, max(KEPT_MS, lease_ms), int(take_over)
        said = await self._ask(lambda: BEGIN(self._client, key, *arguments))
        try:
            state, first, left_ms, body = said
            state = state.decode()
            if state not in STATES:
                raise ValueError
            return Claim(state, first.decode("ascii", "replace"), int(left_ms), body)
        except (ValueError, TypeError, AttributeError):
            raise StoreAway("Redis gave an answer that cannot be read") from None

    async def finish(self, key: str, token: str, body: bytes) -> bool:
        return bool(await self._ask(lambda: FINISH(self._client, key, token, body, KEPT_MS)))

    async def release(self, key: str, token: str) -> None:
        await self._ask(lambda: FINISH(self._client, key, token, b"", 0))

    async def get(self, key: str) -> bytes | None:
        value = await self._ask(lambda: self._client.get(key))
        return value if isinstance(value, bytes) else None

    async def put(self, key: str, value: bytes, ttl_ms: int) -> None:
        await self._ask(lambda: self._client.set(key, value, px=ttl_ms))

    async def take_turn(self, key: str, ttl_ms: int) -> bool:
        return bool(await self._ask(lambda: self._client.set(key, b"", px=ttl_ms, nx=True)))

    async def epochs(self) -> dict[str, int]:
        found = await self._ask(lambda: self._client.hgetall(EPOCHS_KEY))
        return {tool_id.decode("utf-8", "replace"): _number(count) for tool_id, count in found.items()}

    async def next_epoch(self, tool_id: str) -> int:
        return int(await self._ask(lambda: self._client.hincrby(EPOCHS_KEY, tool_id, 1)))

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(self, command: Callable[[], Awaitable[T]]) -> T:
        if monotonic() < self._away_until:
            raise StoreAway("Redis is away")
        try:
            async with asyncio.timeout(self._timeout_s), self._places:
                return await command()
        except (RedisError, OSError, TimeoutError) as error:
            if monotonic() >= self._away_until:
                logger.warning("Redis did not answer", extra={"reason": _reason(error)})
            self._away_until = monotonic() + AWAY_S
            raise StoreAway(_reason(error)) from None


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0


def _reason(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else str(error)[:200] or type(error).__name__
