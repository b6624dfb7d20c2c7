"""Messages between replicas: heard once by the others, answered, and never the end of a process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from app.bus import Bus
from app.bus.redis_bus import CHANNEL, MESSAGE_BYTES_MAX, RedisBus
from tests.proxy import FaultProxy
from tests.redis_groups import start_cluster
from tests.servers import HOST, RedisAt, RedisServer, free_port
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio


PATIENT_S = 20.0
"""For answers that come: on a slow machine they may take longer than anybody who cancels a call would wait."""


class Replica:
    """A bus that listens for `do`, and does what it has."""

    def __init__(self, url: str, *has: str, answer_s: float = PATIENT_S) -> None:
        self.bus = RedisBus(url, answer_s)
        self.heard: list[Any] = []
        self.gaps = 0
        self.bus.listeners["do"] = lambda message: self.heard.append(message.get("what")) or message.get("what") in has
        self.bus.on_gap = self.on_gap

    async def on_gap(self) -> None:
        self.gaps += 1


@contextlib.asynccontextmanager
async def replicas(*each: Replica) -> AsyncIterator[tuple[Replica, ...]]:
    running = [asyncio.create_task(one.bus.run()) for one in each]
    for one in each:
        await asyncio.wait_for(one.bus.subscribed.wait(), SOON_S)
    try:
        yield each
    finally:
        assert not any(task.done() for task in running), "it ends with its process alone"
        for task, one in zip(running, each, strict=True):
            task.cancel()
            await asyncio.wait({task})
            await one.bus.close()


async def test_what_is_told_is_heard_by_all_others_once(redis: RedisAt) -> None:
    async with replicas(*(Replica(redis.url) for _ in range(3))) as (one, two, three):
        assert await one.bus.tell("do", what="a")
        await until(lambda: bool(two.heard and three.heard))
        assert await two.bus.tell("do", what="b")
        await until(lambda: len(three.heard) == 2)
        assert (one.heard, two.heard, three.heard) == (["b"], ["a"], ["a", "b"])
        assert [one.gaps, two.gaps, three.gaps] == [1, 1, 1]


async def test_a_question_is_answered_by_whoever_can(redis: RedisAt) -> None:
    async with replicas(Replica(redis.url, "mine"), Replica(redis.url, "theirs"), Replica(redis.url)) as (one, two, _):
        assert await one.bus.ask("do", what="theirs")
        assert not await one.bus.ask("do", what="mine"), "it is not asked itself"
        assert await two.bus.ask("do", what="mine")
        answers = await asyncio.gather(*(one.bus.ask("do", what="theirs") for _ in range(100)))
        assert all(answers), "more at once than there are connections"
        noes = await asyncio.gather(*(one.bus.ask("do", what="nobody's") for _ in range(5)))
        assert not any(noes)
        assert not one.bus._asked and not one.bus._replies


async def test_databases_of_one_redis_are_apart(redis: RedisAt) -> None:
    """They keep services apart that share a server: whoever cancels or forgets in one means no call of another."""
    three, four = (urlsplit(redis.url)._replace(path=path).geturl() for path in ("/3", "/4"))
    mine, other, others = Replica(three, "a"), Replica(four, "a"), Replica(four, "b")
    async with replicas(mine, other, others):
        assert not await mine.bus.ask("do", what="a")
        assert await mine.bus.tell("do", what="told")
        assert await other.bus.ask("do", what="b") and others.heard == ["b"]
        assert mine.heard == other.heard == []


async def test_nobody_waits_for_the_answer_of_nobody(redis: RedisAt) -> None:
    async with replicas(Replica(redis.url)) as (alone,):
        took = []
        for _ in range(3):
            began = time.monotonic()
            assert not await alone.bus.ask("do", what="x")
            took.append(time.monotonic() - began)
        assert min(took) < PATIENT_S


POISONS: list[bytes] = [
    b"",
    b"\xff\x00",
    b"[]",
    b"7",
    b'"do"',
    b"{}",
    b'{"kind":"answer","from":"x","number":[]}',
    b'{"kind":"answer","from":"x","number":{},"done":true}',
    b'{"kind":"answer","from":"x","number":true,"done":true}',
    b'{"kind":"answer","from":"x"}',
    b'{"kind":["do"],"from":"x"}',
    b'{"kind":"do","from":["x"],"number":1}',
    b'{"kind":"do"}',
    b'{"kind":"unknown","from":"x","number":1}',
    b'{"kind":"do","from":"x","number":"1"}',
    b'{"kind":"do","from":"x","what":"' + b"x" * MESSAGE_BYTES_MAX + b'"}',
    b"[" * 5_000,
]


async def test_no_message_at_all_ends_the_bus(redis: RedisAt) -> None:
    async with replicas(Replica(redis.url), Replica(redis.url)) as (one, two):
        for poison in POISONS:
            redis.cli("PUBLISH", CHANNEL, poison)
            redis.cli("PUBLISH", f"{CHANNEL}:{one.bus._name}", poison)
        await two.bus.tell("do", what="after")
        await until(lambda: "after" in one.heard)
        assert one.heard == [None, None, "after"], "one of them asked, twice, for nothing that there is"


async def test_what_cannot_be_written_is_told_to_nobody(redis: RedisAt) -> None:
    async with replicas(Replica(redis.url), Replica(redis.url)) as (one, two):
        for what in ("\ud800", "x" * MESSAGE_BYTES_MAX):
            assert not await one.bus.tell("do", what=what)
            assert not await one.bus.ask("do", what=what)
        assert two.heard == []


async def test_who_was_cut_off_is_told_that_it_may_have_missed_something(own_redis: RedisServer) -> None:
    with FaultProxy(own_redis.port) as proxy:
        async with replicas(Replica(own_redis.url), Replica(f"redis://{HOST}:{proxy.port}")) as (one, cut):
            proxy.reset()
            await until(lambda: not cut.bus.subscribed.is_set())
            assert await one.bus.tell("do", what="missed")
            assert not await cut.bus.tell("do", what="x") and not await cut.bus.ask("do", what="x")
            proxy.heal()
            await until(lambda: cut.bus.subscribed.is_set())
            assert cut.gaps == 2 and cut.heard == []
            await one.bus.tell("do", what="heard")
            await until(lambda: cut.heard == ["heard"])
            own_redis.kill()
            await until(lambda: not one.bus.subscribed.is_set())
            own_redis.start()
            await until(lambda: one.bus.subscribed.is_set() and cut.bus.subscribed.is_set())
            assert (one.gaps, cut.gaps) == (2, 3)


async def test_a_gap_that_cannot_be_made_up_for_is_tried_again(redis: RedisAt) -> None:
    replica = Replica(redis.url)
    tries: list[int] = []

    async def fails_once() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError

    replica.bus.on_gap = fails_once
    async with replicas(replica):
        assert len(tries) == 2


async def test_it_ends_when_it_is_cancelled_at_any_turn_of_the_loop(redis: RedisAt) -> None:
    for turns in range(60):
        bus = RedisBus(redis.url)
        task = asyncio.create_task(bus.run())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=SOON_S)
        await bus.close()
        assert done and task.cancelled(), turns


async def test_over_a_cluster_whatever_node_is_asked_all_hear_it() -> None:
    with start_cluster() as cluster:
        each = Replica(cluster.url, "a"), Replica(cluster.url, "b"), Replica(cluster.url, answer_s=0.5)
        async with replicas(*each) as (one, two, hasty):
            assert await one.bus.ask("do", what="b")
            assert await two.bus.ask("do", what="a")
            assert not await hasty.bus.ask("do", what="c"), "nobody has it, and nobody can count who said so"


async def test_without_redis_there_is_nobody_to_tell() -> None:
    bus = Bus()
    assert await bus.tell("do") and not await bus.ask("do")
    away = RedisBus(f"redis://{HOST}:{free_port()}")
    assert not await away.tell("do") and not await away.ask("do")
    await away.close()
