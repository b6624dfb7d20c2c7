"""The bus over Redis publish and subscribe. Imported only where there is a Redis: the library takes 9 MB.

At most once: who is away misses what is said, and learns by `on_gap` that it may have. Knows no call and no tool.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import secrets
from typing import Any

import orjson
from redis.asyncio import RedisCluster
from redis.exceptions import RedisClusterException, RedisError

from app.bus.bus import Bus, Message
from app.clients import create_redis, redis_database

logger = logging.getLogger("app.bus")

CHANNEL = "agentcore:bus"
"""Of database 0. Redis has channels for all of its databases together: those of others have its number in theirs."""
MESSAGE_BYTES_MAX = 4_096

ANSWER_S_MAX = 0.5
"""In which the replica that can do what was asked says so."""

COMMAND_S_MAX = 1.0
CONNECTIONS_MAX = 8
ASKED_MAX = 1_000
"""Questions that wait for an answer at once; past it the answer is no."""

RETRY_S_MIN, RETRY_S_MAX = 0.1, 2.0
"""Between two attempts to subscribe, doubling, with jitter."""

SILENCE_S_MAX = 10.0
"""Without a message the connection is tried with a ping."""

FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError, RuntimeError, LookupError)
"""What the library raises for a server that is away. That of Clusters is no RedisError, or a KeyError of its table of
slots; uvloop has a RuntimeError for a connection that closed while it was opened."""


class RedisBus(Bus):
    """`run` must be running. Another time for `answer_s` is for tests."""

    def __init__(self, url: str, answer_s: float = ANSWER_S_MAX) -> None:
        """Raises ValueError that says what is wrong with the URL."""
        super().__init__()
        self._answer_s = answer_s
        self._client: Any = create_redis(url, CONNECTIONS_MAX, "agentcore-tools:bus")
        database = redis_database(url)
        self._channel = f"{CHANNEL}/{database}" if database else CHANNEL
        self._counts_listeners = not isinstance(self._client, RedisCluster)
        """A node of a Cluster counts its own subscribers alone."""
        self._places = asyncio.Semaphore(CONNECTIONS_MAX - 1)
        """One connection listens; the library refuses what is more than there are."""
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._asked: dict[int, _Question] = {}
        self._replies: set[asyncio.Task[int | None]] = set()
        self.subscribed = asyncio.Event()

    async def tell(self, kind: str, **what: Any) -> bool:
        return await self._publish(self._channel, {"kind": kind, "from": self._name, **what}) is not None

    async def ask(self, kind: str, **what: Any) -> bool:
        if len(self._asked) >= ASKED_MAX or not self.subscribed.is_set():
            return False
        number = next(self._numbers)
        question = self._asked[number] = _Question()
        try:
            heard = await self._publish(self._channel, {"kind": kind, "from": self._name, "number": number, **what})
            if heard is None:
                return False
            if self._counts_listeners:
                question.expect(heard - 1)  # we hear it too
            async with asyncio.timeout(self._answer_s):
                return await question.answer
        except TimeoutError:
            return False
        finally:
            del self._asked[number]

    async def run(self) -> None:
        """For ever: listen."""
        wait_s = RETRY_S_MIN
        while True:
            try:
                if isinstance(self._client, RedisCluster):
                    async with asyncio.timeout(COMMAND_S_MAX * 2):
                        await self._client.initialize()  # a subscription does not ask for the slots itself
                async with self._client.pubsub() as subscription:
                    async with asyncio.timeout(COMMAND_S_MAX * 2):
                        await subscription.subscribe(self._channel, f"{CHANNEL}:{self._name}")
                    wait_s = RETRY_S_MIN
                    await self._listen(subscription)
            except FAILURES as error:
                if self.subscribed.is_set():
                    logger.warning("no word from other replicas", extra={"reason": str(error)[:200]})
            finally:
                self.subscribed.clear()
            _end_if_cancelled()
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load, guards nothing
            wait_s = min(2 * wait_s, RETRY_S_MAX)

    async def _listen(self, subscription: Any) -> None:
        waits_for_pong = False
        while True:
            _end_if_cancelled()
            message = await subscription.get_message(timeout=SILENCE_S_MAX)
            if message is None:
                if waits_for_pong:
                    raise TimeoutError("no answer to a ping")
                waits_for_pong = True
                await subscription.ping()
                continue
            waits_for_pong = False
            if message["type"] == "message":
                self._hear(message["data"])
            elif message["type"] == "subscribe" and not self.subscribed.is_set():
                await self.on_gap()
                self.subscribed.set()

    def _hear(self, data: bytes) -> None:
        try:
            message = orjson.loads(data) if len(data) <= MESSAGE_BYTES_MAX else None
        except ValueError:
            message = None
        if not isinstance(message, dict):
            return
        kind, sender, number = message.get("kind"), message.get("from"), message.get("number")
        if not isinstance(kind, str) or not isinstance(sender, str) or sender == self._name:
            return
        if kind == "answer":
            question = self._asked.get(number) if type(number) is int else None
            if question is not None:
                question.take(message.get("done") is True)
            return
        listener = self.listeners.get(kind)
        if listener is None:
            return
        done = listener(message)
        if type(number) is int and len(self._replies) < ASKED_MAX:
            answer = {"kind": "answer", "from": self._name, "number": number, "done": done}
            task = asyncio.get_running_loop().create_task(
                self._publish(f"{CHANNEL}:{sender}", answer), name="bus-answer"
            )
            self._replies.add(task)
            task.add_done_callback(self._replies.discard)

    async def _publish(self, channel: str, message: Message) -> int | None:
        """How many heard it; None: Redis did not take it, or nobody could read it."""
        try:
            written = orjson.dumps(message)
        except TypeError:  # a lone surrogate in a token's subject
            return None
        if len(written) > MESSAGE_BYTES_MAX:
            return None
        try:
            async with asyncio.timeout(COMMAND_S_MAX), self._places:
                return int(await self._client.publish(channel, written))
        except FAILURES:
            return None

    async def close(self) -> None:
        for task in self._replies:
            task.cancel()
        with contextlib.suppress(*FAILURES):
            async with asyncio.timeout(COMMAND_S_MAX):
                await self._client.aclose()


class _Question:
    """One that others may answer: the first yes is the answer, or a no of all."""

    __slots__ = ("_noes", "_of", "answer")

    def __init__(self) -> None:
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._noes = 0
        self._of: int | None = None

    def expect(self, answers: int) -> None:
        self._of = answers
        self._settle()

    def take(self, done: bool) -> None:
        if done and not self.answer.done():
            self.answer.set_result(True)
        self._noes += not done
        self._settle()

    def _settle(self) -> None:
        if self._of is not None and self._noes >= self._of and not self.answer.done():
            self.answer.set_result(False)


def _end_if_cancelled() -> None:
    """redis-py 8.1 loses a cancellation that comes while it connects or reads: it goes on as if nothing were."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
