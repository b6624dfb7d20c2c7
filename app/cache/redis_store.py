"""Records and results in Redis, for all replicas together.

One key a command, tagged by tenant. A command that has no answer in time goes on by itself and is not sent again; a
claim that nobody waits for any more, or that may have been made though its connection broke, is undone behind. Once a
command had no answer, others are refused at once for a moment, so that a dead Redis costs one budget and not one each.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable
from importlib import resources
from time import monotonic
from typing import Any, TypeVar

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import (
    MasterDownError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from app.cache.store import KEPT_MS, Claim, StoreAway

logger = logging.getLogger("app.cache")

T = TypeVar("T")
Undo = Callable[[], Awaitable[None]]

AWAY_S = 1.0
"""After a command without an answer, nothing is asked for this long."""

BURST_S_MAX = 1.0
"""Waited at most while Redis answers others: a burst that opens 50 connections takes longer than one answer may."""

LATE_S = 0.01
"""Woken so much later than asked, it was the event loop that stood still: the answer may be there, unread."""

UNDO_TRIES = 20
UNDO_RETRY_S = 0.5
"""A claim of which nobody knows would block its key for a day: about the time that a Redis takes to fail over."""

UNDOING_MAX = 1_000

EPOCHS_KEY = "agentcore:cache:epochs"

CLOSE_S = 1.0

FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError, RuntimeError, LookupError)
"""What the library raises for a server that is away. That of Clusters is no RedisError, or a KeyError of its table of
slots; uvloop has a RuntimeError for a connection that closed while it was opened."""

DEMOTED = (ReadOnlyError, MasterDownError)
"""Of a server that became a replica: by now its name may stand for another, and its connections never will."""

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


BEGIN, FINISH, FORGET = Script("begin"), Script("finish"), Script("forget")


class RedisStore:
    """`at_once` commands are under way at most; nobody waits longer than `timeout_s` for a Redis that says nothing."""

    def __init__(self, client: Redis | RedisCluster, at_once: int, timeout_s: float) -> None:
        self._client: Any = client
        self._places = asyncio.Semaphore(at_once)
        self._timeout_s = timeout_s
        self._away_until = 0.0
        self._answered_at = 0.0
        self._said_until = 0.0
        self._under_way: set[asyncio.Task[Any]] = set()
        self._undoing: set[asyncio.Task[None]] = set()

    async def begin(self, key: str, fingerprint: str, token: str, lease_ms: int, *, take_over: bool) -> Claim:
        arguments = fingerprint, token, lease_ms, max(KEPT_MS, lease_ms), int(take_over)

        async def claim() -> Claim:
            return _claim(await BEGIN(self._client, key, *arguments))

        async def undo() -> None:  # of this token alone, and only while it has no outcome
            await FINISH(self._client, key, token, "", b"", 0)

        return await self._ask(claim, undo)

    async def finish(self, key: str, fingerprint: str, token: str, body: bytes) -> bool:
        return bool(await self._ask(lambda: FINISH(self._client, key, token, fingerprint, body, KEPT_MS)))

    async def release(self, key: str, token: str) -> None:
        await self._ask(lambda: FINISH(self._client, key, token, "", b"", 0))

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
        return int(await self._ask(lambda: FORGET(self._client, EPOCHS_KEY, tool_id)))

    async def close(self) -> None:
        tasks = self._under_way | self._undoing
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(CLOSE_S):
                await self._client.aclose()

    async def _ask(self, command: Callable[[], Awaitable[T]], undo: Undo | None = None) -> T:
        """What the command came to. Raises StoreAway; `undo` is called when it was carried out for nobody."""
        if monotonic() < self._away_until:
            raise StoreAway("Redis is away")
        patience = _Patience(self._timeout_s)
        await self._take_place(patience)
        waited_for = _Waited()
        # A task of its own: a connection that takes longer than the budget to open is there for the next command.
        task = asyncio.get_running_loop().create_task(self._carry_out(command, undo, waited_for), name="cache-command")
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        try:
            patience.begin()
            await asyncio.wait({task}, timeout=self._timeout_s)
            while not task.done() and patience.goes_on(self._answered_at):
                patience.begin()
                await asyncio.wait({task}, timeout=self._timeout_s)
        except BaseException:
            if task.done() and undo is not None:  # cancelled in the tick in which the answer came
                self._undo(undo)
            raise
        finally:
            waited_for.ended = not task.done()
        if not task.done():
            self._stay_away("no answer in time")
            raise StoreAway("no answer in time")
        if task.cancelled():
            raise StoreAway("the store is closing")
        return task.result()

    async def _take_place(self, patience: _Patience) -> None:
        while True:
            patience.begin()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._places.acquire()
                return
            except TimeoutError:
                if not patience.goes_on(self._answered_at):
                    raise StoreAway("too many wait for Redis") from None

    async def _carry_out(self, command: Callable[[], Awaitable[T]], undo: Undo | None, waited_for: _Waited) -> T:
        try:
            said = await command()
        except FAILURES as error:
            reason = str(error)[:200] or type(error).__name__
            if isinstance(error, ResponseError):  # it is there, and says no
                self._answered_at = monotonic()
                self._say(reason)
                if isinstance(error, DEMOTED):
                    await self._drop_idle()
            else:
                self._stay_away(reason)
            if undo is not None:
                self._undo(undo, after_s=UNDO_RETRY_S)
            raise StoreAway(reason) from None
        self._answered_at = monotonic()
        if waited_for.ended and undo is not None:
            self._undo(undo)
        return said

    async def _drop_idle(self) -> None:
        """That of the command among them. A Cluster's client finds another node by itself."""
        if not isinstance(self._client, RedisCluster):
            with contextlib.suppress(*FAILURES):
                await self._client.connection_pool.disconnect(inuse_connections=False)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        self._places.release()
        if not task.cancelled():
            task.exception()  # told to whoever waits, if somebody does

    def _undo(self, undo: Undo, after_s: float = 0.0) -> None:
        if len(self._undoing) < UNDOING_MAX:
            task = asyncio.get_running_loop().create_task(self._keep_undoing(undo, after_s), name="cache-undo")
            self._undoing.add(task)
            task.add_done_callback(self._undoing.discard)

    async def _keep_undoing(self, undo: Undo, after_s: float) -> None:
        for _ in range(UNDO_TRIES):
            await asyncio.sleep(after_s)
            with contextlib.suppress(*FAILURES):
                async with self._places:
                    await undo()
                return
            after_s = UNDO_RETRY_S

    def _stay_away(self, reason: str) -> None:
        self._say(reason)
        self._away_until = monotonic() + AWAY_S

    def _say(self, reason: str) -> None:
        now = monotonic()
        if now >= self._said_until:
            logger.warning("Redis did not answer", extra={"reason": reason})
        self._said_until = now + AWAY_S


class _Patience:
    """Of one who asks: budget after budget while Redis answers others, or while nobody could have heard it."""

    __slots__ = ("_began", "_ends", "_timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._began = monotonic()
        self._ends = self._began + max(timeout_s, BURST_S_MAX)

    def begin(self) -> None:
        self._began = monotonic()

    def goes_on(self, answered_at: float) -> bool:
        """After a budget without an answer. Time in which the loop stood still is not Redis's: it is added."""
        now = monotonic()
        late_s = now - self._began - self._timeout_s
        if late_s > LATE_S:
            self._ends += late_s
        return now < self._ends and (answered_at >= self._began or late_s > LATE_S)


class _Waited:
    """Whether whoever asked has gone."""

    ended = False


def _claim(said: Any) -> Claim:
    try:
        state, token, left_ms, body = said
        claim = Claim(state.decode(), token.decode("ascii", "replace"), int(left_ms), body)
    except (ValueError, TypeError, AttributeError):
        raise StoreAway("Redis gave an answer that cannot be read") from None
    if claim.state not in STATES:
        raise StoreAway("Redis gave an answer that cannot be read")
    return claim


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0
