"""Redis away in every way: nobody waits past the budget, no claim is left behind, and no answer is another's."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from app.cache import redis_store as room
from app.cache.redis_store import EPOCHS_KEY
from app.cache.store import StoreAway, key_of
from tests.cache.stores import BUDGET_S, LEASE_MS, PATIENT_S, redis_store
from tests.proxy import FaultProxy
from tests.redis_groups import start_cluster
from tests.servers import HOST, RedisAt, RedisServer
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio

SANE_S = 10.0
"""Far over the budget: machines that test are slow."""


@dataclass
class Site:
    """A server, and the proxy before it."""

    server: RedisServer
    proxy: FaultProxy

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.proxy.port}"


@pytest.fixture(scope="module")
def shared_site() -> Iterator[Site]:
    with RedisServer() as server, FaultProxy(server.port) as proxy:
        yield Site(server, proxy)


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    """Well again at the end of each test."""
    shared_site.server.cli("FLUSHALL")
    yield shared_site
    shared_site.proxy.heal()


def kill(site: Site) -> None:
    site.server.kill()


def read_only(site: Site) -> None:
    site.server.cli("REPLICAOF", HOST, "1")


def fill(site: Site) -> None:
    site.server.cli("CONFIG", "SET", "maxmemory", 1)


FAULTS: dict[str, tuple[Callable[[Site], object], Callable[[Site], object]]] = {
    "killed": (kill, lambda site: site.server.start()),
    "stopped": (lambda site: site.server.pause(), lambda site: site.server.resume()),
    "stalled": (lambda site: site.proxy.stall(), lambda site: site.proxy.heal()),
    "reset": (lambda site: site.proxy.reset(), lambda site: site.proxy.heal()),
    "half closed": (lambda site: site.proxy.half_close(), lambda site: site.proxy.heal()),
    "read only": (read_only, lambda site: site.server.cli("REPLICAOF", "NO", "ONE")),
    "out of memory": (fill, lambda site: site.server.cli("CONFIG", "SET", "maxmemory", 0)),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_redis_away_is_said_within_the_budget_and_it_comes_back(site: Site, fault: str) -> None:
    """The key of a claim that failed is free again: whoever was told that nothing ran may try again."""
    harm, heal = FAULTS[fault]
    async with redis_store(site.url, BUDGET_S) as store:
        await begun(store, "before")
        harm(site)
        began = time.perf_counter()
        for number in range(5):
            with pytest.raises(StoreAway):
                await store.begin("k", "fp", f"lost {number}", LEASE_MS, take_over=False)
        assert time.perf_counter() - began < SANE_S
        heal(site)
        await begun(store, "k")
        assert (await answered(store, "k", "later")).token == "first"


async def test_idle_connection_that_the_server_closed_costs_no_answer(site: Site) -> None:
    async with redis_store(site.url, PATIENT_S) as store:
        await begun(store, "before")
        [idle] = store._client.connection_pool._available_connections
        site.server.cli("CLIENT", "KILL", "TYPE", "normal")
        async with asyncio.timeout(SOON_S):
            while not await idle.can_read():
                await asyncio.sleep(0)
        claim = await store.begin("k", "fp", "first", LEASE_MS, take_over=False)
        assert claim.state == "begun"


async def begun(store: room.RedisStore, key: str) -> None:
    """Claimed for `first`, once it can be."""

    async def claimed() -> None:
        while (await answered(store, key, "first")).state != "begun":
            await asyncio.sleep(0.02)

    await asyncio.wait_for(claimed(), SOON_S)


async def answered(store: room.RedisStore, key: str, token: str) -> Any:
    """The first claim that is an answer: after a fault the store stays away for a moment."""
    async with asyncio.timeout(SOON_S):
        while True:
            with contextlib.suppress(StoreAway):
                return await store.begin(key, "fp", token, LEASE_MS, take_over=False)
            await asyncio.sleep(0.02)


async def test_a_server_that_became_a_replica_is_left_for_the_one_its_name_stands_for() -> None:
    """Nobody closes the connections to it; outcomes of its time as a primary reach the new one."""
    with RedisServer() as old, RedisServer() as new, FaultProxy(old.port) as name:
        async with redis_store(f"redis://{HOST}:{name.port}") as store:
            assert (await store.begin("k", "fp", "first", LEASE_MS, take_over=False)).state == "begun"
            await asyncio.gather(*(store.get("key") for _ in range(10)))
            new.cli("REPLICAOF", HOST, old.port)
            await until(lambda: new.cli("EXISTS", "k") == "1")
            new.cli("REPLICAOF", "NO", "ONE")
            old.cli("REPLICAOF", HOST, new.port)
            name.point_at(new.port)
            with pytest.raises(StoreAway):
                await store.finish("k", "fp", "first", b"body")
            assert await store.finish("k", "fp", "first", b"body")
            assert (await store.begin("k", "fp", "second", LEASE_MS, take_over=False)).body == b"body"


async def test_a_claim_that_comes_too_late_is_given_back(site: Site) -> None:
    """It was carried out, and nobody waits for it any more."""
    async with redis_store(site.url, BUDGET_S) as store:
        await begun(store, "before")
        site.proxy.hold_answers()
        with pytest.raises(StoreAway):
            await store.begin("k", "fp", "late", LEASE_MS, take_over=False)
        await until(lambda: site.server.cli("EXISTS", "k") == "1")
        site.proxy.heal()
        await until(lambda: site.server.cli("EXISTS", "k") == "0")


async def test_a_claim_whose_connection_broke_after_it_was_sent_is_given_back(site: Site) -> None:
    async with redis_store(site.url, BUDGET_S) as store:
        await begun(store, "before")
        site.proxy.hold_answers()
        with pytest.raises(StoreAway):
            await store.begin("k", "fp", "lost", LEASE_MS, take_over=False)
        await until(lambda: site.server.cli("EXISTS", "k") == "1")
        site.proxy.reset()
        site.proxy.heal()
        await until(lambda: site.server.cli("EXISTS", "k") == "0")


async def test_a_claim_that_is_cancelled_leaves_nothing_whenever_it_is(site: Site) -> None:
    """At each turn of the loop on its way, that in which the answer came among them."""
    async with redis_store(site.url) as store:
        await begun(store, "before")
        ended = 0
        for turns in range(60):
            task = asyncio.create_task(store.begin("k", "fp", str(turns), LEASE_MS, take_over=False))
            for _ in range(turns):
                await asyncio.sleep(0)
            if task.done():
                ended += 1
                await store.release("k", str(turns))
                continue
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not store._under_way and not store._undoing)
            assert site.server.cli("EXISTS", "k") == "0", turns
        assert (await store.begin("k", "fp", "last", LEASE_MS, take_over=False)).state == "begun"


async def test_a_claim_cancelled_in_the_tick_of_its_answer_leaves_nothing(site: Site) -> None:
    async with redis_store(site.url) as store:
        await begun(store, "before")
        task = asyncio.create_task(store.begin("k", "fp", "first", LEASE_MS, take_over=False))
        await asyncio.sleep(0)
        (command,) = store._under_way
        command.add_done_callback(lambda _: task.cancel())
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not store._undoing)
        assert site.server.cli("EXISTS", "k") == "0"


async def test_cancelled_commands_mix_up_no_answers(site: Site) -> None:
    async with redis_store(site.url, at_once=3) as store:
        for number in range(20):
            await store.put(f"key {number}", b"%d" % number, 60_000)

        async def ask(number: int, cut: bool) -> None:
            task = asyncio.create_task(store.get(f"key {number}"))
            if cut:
                await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            else:
                assert await task == b"%d" % number

        for _ in range(10):
            await asyncio.gather(*(ask(number, number % 3 == 0) for number in range(20)))


async def test_scripts_that_the_server_forgot_are_told_once_more(redis: RedisAt) -> None:
    async with redis_store(redis.url) as store:
        for number in range(2):
            redis.cli("SCRIPT", "FLUSH")
            assert (await store.begin(f"noscript {number}", "fp", "t", LEASE_MS, take_over=False)).state == "begun"
            redis.cli("SCRIPT", "FLUSH")
            assert await store.finish(f"noscript {number}", "fp", "t", b"body")
            redis.cli("SCRIPT", "FLUSH")
            assert await store.next_epoch("noscript") > 0


async def test_at_most_so_many_commands_are_under_way(site: Site) -> None:
    async with redis_store(site.url, at_once=4) as store:
        site.proxy.stall()
        asked = [asyncio.create_task(store.get("key")) for _ in range(12)]
        await until(lambda: len(store._under_way) == 4)
        site.proxy.heal()
        assert await asyncio.gather(*asked) == [None] * 12
        clients = [line for line in site.server.cli("CLIENT", "LIST").splitlines() if "name=test" in line]
        assert len(clients) <= 4


async def test_who_finds_no_place_in_time_is_told_so(site: Site) -> None:
    async with redis_store(site.url, 0.2, at_once=1) as store:
        await begun(store, "before")
        site.proxy.stall()
        asked = await asyncio.gather(*(store.get("key") for _ in range(5)), return_exceptions=True)
        assert {type(one) for one in asked} == {StoreAway}
        assert len(store._under_way) == 1
        site.proxy.heal()
        await until(lambda: not store._under_way)


async def test_a_burst_that_redis_answers_one_by_one_is_waited_for(site: Site) -> None:
    """Longer than one answer may take; nobody takes it for a Redis that is away."""
    async with redis_store(site.url, 4 * BUDGET_S, at_once=1) as store:
        await begun(store, "before")
        site.proxy.latency_s = 0.6 * BUDGET_S
        asked = await asyncio.gather(*(store.get("before key") for _ in range(10)))
        assert asked == [None] * 10


@pytest.mark.parametrize("still_s", [0.5, 2.5])
async def test_a_loop_that_stood_still_is_not_taken_for_a_redis_that_is_away(site: Site, still_s: float) -> None:
    """For less than a burst is waited for, and for more."""
    async with redis_store(site.url, 0.4) as store:
        await begun(store, "before")
        asked = asyncio.create_task(store.begin("k", "fp", "first", LEASE_MS, take_over=False))
        await asyncio.sleep(0)
        assert store._under_way
        time.sleep(still_s)
        assert (await asked).state == "begun"


POISONS: dict[str, tuple[str, ...]] = {
    "a text": ("SET", "k", "garbage"),
    "a list": ("RPUSH", "k", "fp", "token"),
    "no fingerprint of ours": ("HSET", "k", "fp", "\ufffd" * 100, "token", "x"),
    "a lease that is no number": ("HSET", "k", "fp", "fp", "token", "x", "lease", "soon"),
    "a lease that never ends": ("HSET", "k", "fp", "fp", "token", "x", "lease", "1e308"),
    "no token": ("HSET", "k", "fp", "fp", "lease", "0"),
}


@pytest.mark.parametrize("poison", POISONS)
async def test_a_record_that_is_none_begins_nothing_and_harms_no_other_key(redis: RedisAt, poison: str) -> None:
    redis.cli("FLUSHDB")
    redis.cli(*POISONS[poison])
    async with redis_store(redis.url, PATIENT_S) as store:
        try:
            claim = await store.begin("k", "fp", "t", LEASE_MS, take_over=False)
        except StoreAway:
            claim = None
        assert claim is None or claim.state in ("other", "unknown", "running")
        assert (await store.begin("another", "fp", "t", LEASE_MS, take_over=False)).state == "begun"


async def test_an_epoch_grows_though_redis_has_lost_the_last_one(redis: RedisAt) -> None:
    async with redis_store(redis.url) as store:
        epochs = []
        for lost in (False, False, True, False):
            if lost:
                redis.cli("FLUSHDB")
            epochs.append(await store.next_epoch("search"))
        assert epochs == sorted(set(epochs))
        assert await store.epochs() == {"search": epochs[-1]}
        redis.cli("HSET", EPOCHS_KEY, "poisoned", "not a number")
        assert (await store.epochs())["poisoned"] == 0
        assert await store.next_epoch("poisoned") > 0


async def test_a_cluster_keeps_records_where_their_tags_say_and_away_it_is_a_store_that_is_away() -> None:
    with start_cluster() as cluster:
        async with redis_store(cluster.url) as store:
            keys = [key_of("idempotency", f"tenant {number}", "s", "t", "k") for number in range(12)]
            for key in keys:
                assert (await store.begin(key, "fp", "t", LEASE_MS, take_over=False)).state == "begun"
                assert await store.finish(key, "fp", "t", b"body")
                assert (await store.begin(key, "fp", "u", LEASE_MS, take_over=False)).body == b"body"
                assert await store.take_turn(f"{key}:turn", 1_000)
            assert len({id(cluster.node_of(key)) for key in keys}) > 1, "tenants spread"
            assert await store.next_epoch("search") == (await store.epochs())["search"]
        for node in cluster.nodes:
            node.kill()
        async with redis_store(cluster.url, BUDGET_S * 10) as store:
            with pytest.raises(StoreAway):
                await store.get("key")
