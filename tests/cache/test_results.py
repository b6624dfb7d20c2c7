"""Kept results: bounded, jittered, forgotten together; and of Redis only what we wrote there ourselves is believed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cache import results as room
from app.cache.results import (
    ENTRIES_MAX,
    ENTRY_OVERHEAD_BYTES,
    JITTER,
    OFF_LOOP_BYTES,
    STALE_S_MAX,
    CachedTool,
    ResultCache,
    Write,
)
from tests.cache.stores import redis_store
from tests.conftest import ROOT
from tests.servers import RedisAt
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio

RESULT_BYTES_MAX = 100_000


class Now:
    """Monotonic seconds."""

    s = 1_000.0

    def __call__(self) -> float:
        return self.s


def tool(**changed: Any) -> CachedTool:
    given: dict[str, Any] = {"tool_id": "search", "version": "1.0.0", "schemas": b"{}", "ttl_s": 100.0}
    flags: dict[str, Any] = {"shared": False, "is_object": False}
    given |= {name: value for name, value in changed.items() if name in given}
    flags |= {name: value for name, value in changed.items() if name in flags}
    return CachedTool(*given.values(), **flags)


TOOL = tool()


def alone(bytes_max: int = 1_000_000, clock: Now | None = None, drawn: float = 0.0) -> ResultCache:
    return ResultCache(
        None, bytes_max, RESULT_BYTES_MAX, compress=False, clock=clock or Now(), jitter=lambda low, high: drawn
    )


@contextlib.asynccontextmanager
async def together(url: str, **options: Any) -> AsyncIterator[ResultCache]:
    """With Redis, writing there."""
    async with redis_store(url) as store:
        cache = ResultCache(store, 1_000_000, RESULT_BYTES_MAX, compress=options.pop("compress", True), **options)
        await cache.catch_up()
        writing = asyncio.create_task(cache.run())
        yield cache
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing


def key_of(cache: ResultCache, parameters: bytes = b"{}", tenant: str = "acme", of: CachedTool = TOOL) -> str:
    return cache.key(of, tenant, parameters)


# In the process


def test_a_result_is_fresh_then_stale_then_gone() -> None:
    clock = Now()
    cache = alone(clock=clock)
    cache.keep("key", TOOL, b"1")
    seen = []
    for clock.s in (1_000.0, 1_099.9, 1_100.0, 1_159.9, 1_160.0):
        found = cache.look("key")
        seen.append(None if found is None else found.stale)
    assert seen == [False, False, True, True, None]
    assert len(cache) == cache.bytes == 0


def test_a_short_life_is_stale_for_as_long_again() -> None:
    clock = Now()
    cache = alone(clock=clock)
    cache.keep("key", tool(ttl_s=2.0), b"1")
    seen = []
    for clock.s in (1_001.9, 1_002.0, 1_003.9, 1_004.0):
        found = cache.look("key")
        seen.append(None if found is None else found.stale)
    assert seen == [False, True, True, None]
    assert STALE_S_MAX < 100


def test_what_is_kept_takes_little_more_memory_than_is_counted() -> None:
    cache, keys = alone(), [f"key {number}" for number in range(1_000)]
    tracemalloc.start()
    try:
        for key in keys:
            cache.keep(key, TOOL, orjson.dumps({"text": key}))
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(cache) == 1_000
    assert kept_bytes < 2 * cache.bytes


def test_lives_are_drawn_a_tenth_more_or_less() -> None:
    for drawn in (-JITTER, JITTER):
        clock = Now()
        cache = alone(clock=clock, drawn=drawn)
        cache.keep("key", TOOL, b"1")
        clock.s += 100 * (1 + drawn) - 0.1
        assert cache.look("key") == (b"1", False)
        clock.s += 0.2
        assert cache.look("key") == (b"1", True)
    spread = ResultCache(None, 10**6, 10**6, compress=False)
    for number in range(50):
        spread.keep(str(number), TOOL, b"1")
    lives = {kept.fresh_until for kept in spread._kept.values()}
    assert max(lives) - min(lives) > 5, "kept together, they end together"


def test_result_cache_bytes_bounds_what_is_kept_and_the_least_used_goes() -> None:
    size = 1_000 + ENTRY_OVERHEAD_BYTES
    cache = alone(3 * size)
    for name in ("a", "b", "c"):
        cache.keep(name, TOOL, b"x" * 1_000)
    assert cache.look("a") is not None
    cache.keep("d", TOOL, b"x" * 1_000)
    assert [name for name in "abcd" if cache.look(name)] == ["a", "c", "d"]
    assert cache.bytes == 3 * size
    cache.keep("a", TOOL, b"y")
    assert cache.bytes == 3 * size - 999
    cache.keep("large", TOOL, b"x" * 3 * size)
    assert cache.look("large") is None and len(cache) == 3, "nothing goes for what cannot stay"


def test_so_many_results_are_kept_however_small() -> None:
    cache = alone(10**9)
    for number in range(ENTRIES_MAX + 5):
        cache.keep(str(number), TOOL, b"1")
    assert len(cache) == ENTRIES_MAX and cache.look("4") is None and cache.look("5") is not None


@pytest.mark.parametrize(
    "changed", [{"version": "1.0.1"}, {"schemas": b"{ }"}, {"tool_id": "search2"}, {"shared": True}], ids=str
)
def test_another_declaration_is_another_key(changed: dict[str, Any]) -> None:
    cache = alone()
    assert key_of(cache) != key_of(cache, of=tool(**changed))


def test_tenants_have_keys_of_their_own_unless_the_tool_shares() -> None:
    cache = alone()
    tenants = ["a", "b", "a:b", "a}", "a\0", "", "shared", "tenant"]
    assert len({key_of(cache, tenant=tenant) for tenant in tenants}) == len(tenants)
    assert len({key_of(cache, tenant=tenant, of=tool(shared=True)) for tenant in tenants}) == 1


async def test_what_is_forgotten_is_forgotten_for_that_tool_alone() -> None:
    cache = alone()
    other = tool(tool_id="other")
    for of in (TOOL, other):
        cache.keep(key_of(cache, of=of), of, b"1")
    before = key_of(cache)
    assert await cache.forget("search") == 1
    assert cache.look(before) is None and key_of(cache) != before
    assert cache.look(key_of(cache, of=other)) is not None
    cache.keep(before, TOOL, b"late")  # of a run that began before
    assert cache.look(key_of(cache)) is None


@pytest.mark.parametrize("epoch", [0, -1, True, 1.5, "7", None, 2**53, 10**30, []], ids=str)
def test_an_epoch_that_is_none_is_not_heard(epoch: Any) -> None:
    cache = alone()
    before = key_of(cache)
    cache.hear({"tool_id": "search", "epoch": epoch})
    cache.hear({"tool_id": epoch, "epoch": 1})
    cache.hear({})
    assert key_of(cache) == before


def test_an_older_epoch_that_is_heard_late_brings_nothing_back() -> None:
    cache = alone()
    forgotten = key_of(cache)
    cache.keep(forgotten, TOOL, b"1")
    cache.hear({"tool_id": "search", "epoch": 3})
    cache.hear({"tool_id": "search", "epoch": 2})
    now = key_of(cache)
    cache.hear({"tool_id": "search", "epoch": 3})
    assert key_of(cache) == now != forgotten


# In Redis


async def test_replicas_share_results_and_what_was_forgotten(redis_url: str) -> None:
    async with together(redis_url) as one, together(redis_url) as two:
        key = key_of(one)
        one.keep(key, TOOL, b'{"a":1}')
        await until(lambda: one._writes.empty())
        await eventually(two, key)
        assert two.look(key) == (b'{"a":1}', False)
        epoch = await one.forget("search")
        two.hear({"tool_id": "search", "epoch": epoch})
        assert two.look(key) is None and key_of(one) == key_of(two) != key
        assert await two.fetch(key_of(two), TOOL) is None


async def eventually(cache: ResultCache, key: str, of: CachedTool = TOOL) -> bytes:
    async with asyncio.timeout(SOON_S):
        while (found := await cache.fetch(key, of)) is None:
            await asyncio.sleep(0.005)
    return found.result


async def test_who_was_away_catches_up_and_believes_nothing_until_it_has(redis_url: str) -> None:
    async with together(redis_url) as one, redis_store(redis_url) as store:
        late = ResultCache(store, 10**6, RESULT_BYTES_MAX, compress=False)
        key = key_of(one)
        one.keep(key, TOOL, b"1")
        await eventually(one, key)
        assert await late.fetch(key, TOOL) is None, "it does not know yet what was forgotten"
        late.keep(key_of(late), TOOL, b"1")
        await one.forget("search")
        await late.catch_up()
        assert late.look(key) is None and key_of(late) == key_of(one)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("size", [10, 5_000, 90_000])
async def test_enable_result_compression_makes_long_results_short_in_redis(
    redis: RedisAt, redis_url: str, compress: bool, size: int
) -> None:
    result = json.dumps("ab" * (size // 2)).encode()
    async with together(redis_url, compress=compress) as one, together(redis_url) as two:
        key = key_of(one)
        one.keep(key, TOOL, result)
        assert await eventually(two, key) == result
        stored = int(redis.cli("STRLEN", key))
        assert (stored < len(result)) is (compress and size > 10)


async def test_threads_that_tools_hold_do_not_keep_a_long_result_away(redis_url: str) -> None:
    release, taken = threading.Event(), threading.Semaphore(0)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))

    def hold() -> None:
        taken.release()
        release.wait()

    held = loop.run_in_executor(None, hold)
    taken.acquire()
    try:
        async with together(redis_url, compress=False) as one, together(redis_url) as two:
            key, result = key_of(one), json.dumps("a" * OFF_LOOP_BYTES).encode()
            one.keep(key, TOOL, result)
            assert await eventually(two, key) == result
    finally:
        release.set()
        await held


NO_THREAD = """
import asyncio, sys, threading
from app.cache.results import OFF_LOOP_BYTES, CachedTool, ResultCache
from tests.cache.stores import redis_store
from tests.waiting import SOON_S

async def main():
    threading.stack_size(sys.maxsize // 2 + 1)
    tool = CachedTool("search", "1", b"", 100.0, shared=False, is_object=False)
    result = b'"' + b"a" * OFF_LOOP_BYTES + b'"'
    async with redis_store(sys.argv[1]) as store:
        one, two = (ResultCache(store, 1_000_000, 100_000, compress=True) for _ in range(2))
        for cache in (one, two):
            await cache.catch_up()
        writing = asyncio.create_task(one.run())
        key = one.key(tool, "acme", b"{}")
        one.keep(key, tool, result)
        async with asyncio.timeout(SOON_S):
            while (found := await two.fetch(key, tool)) is None and not writing.done():
                await asyncio.sleep(0.005)
        print(found is not None and found.result == result, writing.done())
        writing.cancel()

asyncio.run(main())
"""
"""More stack than there are addresses: the system refuses, as it does at a limit of processes."""


def test_a_long_result_is_shared_though_the_system_has_no_thread_left(redis_url: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", NO_THREAD, redis_url], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.stdout == "True False\n", ended.stderr


async def test_a_result_lives_in_redis_as_long_as_it_may_be_given(redis: RedisAt, redis_url: str) -> None:
    async with together(redis_url, jitter=lambda low, high: 0.0) as one:
        key = key_of(one)
        one.keep(key, TOOL, b"1")
        await eventually(one, key)
        assert 100_000 < int(redis.cli("PTTL", key)) <= 160_000


async def test_a_tool_that_declares_less_now_is_not_given_longer_lives(redis_url: str) -> None:
    async with together(redis_url) as one:
        key = key_of(one)
        one.keep(key, TOOL, b"1")
        await eventually(one, key)
        clock = Now()
        async with redis_store(redis_url) as store:
            two = ResultCache(store, 10**6, RESULT_BYTES_MAX, compress=False, clock=clock)
            await two.catch_up()
            assert await two.fetch(key, tool(ttl_s=5.0)) is not None
            clock.s += 2 * 5.0 * (1 + JITTER)
            assert two.look(key) is None


async def test_writes_that_wait_are_bounded_by_number_and_bytes(redis_url: str) -> None:
    async with redis_store(redis_url) as store:
        cache = ResultCache(store, 10**9, 10**9, compress=False)
        for number in range(room.WRITES_WAITING_MAX + 5):
            cache.keep(str(number), TOOL, b"1")
        assert cache._writes.qsize() == room.WRITES_WAITING_MAX
        cache = ResultCache(store, 10**9, 10**9, compress=False)
        for number in range(100):
            cache.keep(str(number), TOOL, b"1" * 1_000_000)
        assert cache._writes.qsize() == room.WRITES_BYTES_MAX // 1_000_000


async def test_room_for_writes_comes_back_as_they_are_written(redis_url: str) -> None:
    half = b'"%b"' % (b"x" * (room.WRITES_BYTES_MAX // 2 - 2))
    async with redis_store(redis_url) as store:
        cache = ResultCache(store, 1, room.WRITES_BYTES_MAX, compress=True)
        await cache.catch_up()
        writing = asyncio.create_task(cache.run())
        for parameters in (b"1", b"2", b"3"):
            key = key_of(cache, parameters)
            cache.keep(key, TOOL, half)
            assert await eventually(cache, key) == half
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing


async def test_one_replica_at_a_time_refreshes_and_a_short_life_does_not_wait_for_its_turn(redis_url: str) -> None:
    short = tool(ttl_s=0.1)
    async with together(redis_url) as one, together(redis_url) as two:
        key = key_of(one)
        assert [await cache.may_refresh(key, short, 30.0) for cache in (one, two)] == [True, False]
        async with asyncio.timeout(SOON_S):
            while not await two.may_refresh(key, short, 30.0):
                await asyncio.sleep(0.01)
        one.keep(key, TOOL, b"1")
        await eventually(one, key)
        assert not await two.may_refresh(key, TOOL, 30.0), "another replica has a new one"
        assert two.look(key) == (b"1", False)


# What is planted


def packed(
    key: str, result: bytes, *, made_at: float | None = None, life_s: float = 100.0, compress: bool = False
) -> bytes:
    return room._written(Write(key, result, time.time() if made_at is None else made_at, life_s), compress)


def bomb(key: str, size: int) -> bytes:
    value = packed(key, b'"' + b"x" * size + b'"', compress=True)
    assert len(value) < size / 50
    return value


def tampered(key: str, place: int) -> bytes:
    value = bytearray(packed(key, b'{"a":1}'))
    value[place] ^= 1
    return bytes(value)


POISONS = {
    "nothing": lambda key: b"",
    "garbage": lambda key: b"\xff\x00garbage" * 100,
    "a pickle": lambda key: pickle.dumps({"a": 1}),
    "plain JSON": lambda key: b'{"a":1}',
    "another key's value": lambda key: packed(key + "x", b'{"a":1}'),
    "a bomb": lambda key: bomb(key, 50_000_000),
    "a bomb one byte too long": lambda key: bomb(key, RESULT_BYTES_MAX - 1),
    "a result that is too long": lambda key: packed(key, b'"' + b"x" * RESULT_BYTES_MAX + b'"'),
    "not JSON": lambda key: packed(key, b"{'a': 1}"),
    "NaN": lambda key: packed(key, b'{"a":NaN}'),
    "bad UTF-8": lambda key: packed(key, b'{"a":"\xff"}'),
    "two texts": lambda key: packed(key, b'{"a":1}{"b":2}'),
    "too deep": lambda key: packed(key, b'{"a":' + b"[" * 40_000 + b"]" * 40_000 + b"}"),
    "no object": lambda key: packed(key, b"[1]"),
    "a line break, which would end an event of a stream": lambda key: packed(key, b'{"a":\n1}'),
    "from the future": lambda key: packed(key, b'{"a":1}', made_at=time.time() + 3_600),
    "of no time": lambda key: packed(key, b'{"a":1}', made_at=float("nan")),
    "without an end": lambda key: packed(key, b'{"a":1}', life_s=float("inf")),
    "of a negative life": lambda key: packed(key, b'{"a":1}', life_s=-1.0),
    "cut short": lambda key: packed(key, b'{"a":1}')[:-1],
    "a head alone": lambda key: packed(key, b""),
    "compressed by its own word": lambda key: tampered(key, 4),
    "longer lived by another hand": lambda key: tampered(key, 20),
    "another result": lambda key: tampered(key, -2),
}


@pytest.mark.parametrize("poison", POISONS)
async def test_a_planted_value_is_refused_and_counted(redis_url: str, poison: str) -> None:
    of = tool(is_object=True)
    async with together(redis_url) as cache, redis_store(redis_url) as store:
        key = key_of(cache, of=of)
        await store.put(key, POISONS[poison](key), 60_000)
        assert await cache.fetch(key, of) is None
        assert cache.refused == 1 and cache.look(key) is None
        await store.put(key, packed(key, b'{"a":1}'), 60_000)
        assert await cache.fetch(key, of) == (b'{"a":1}', False)


async def test_a_value_of_another_type_is_no_result_and_the_next_write_mends_it(redis: RedisAt, redis_url: str) -> None:
    async with together(redis_url) as cache:
        key = key_of(cache)
        redis.cli("RPUSH", key, "a")
        assert await cache.fetch(key, TOOL) is None
        cache.keep(key, TOOL, b"1")
        assert await eventually(cache, key) == b"1"


async def test_a_value_that_is_past_its_life_is_none(redis_url: str) -> None:
    async with together(redis_url) as cache, redis_store(redis_url) as store:
        key = key_of(cache)
        await store.put(key, packed(key, b"1", made_at=time.time() - 1_000), 60_000)
        assert await cache.fetch(key, TOOL) is None and cache.refused == 0
        await store.put(key, packed(key, b"1", made_at=time.time() - 120), 60_000)
        found = await cache.fetch(key, TOOL)
        assert found is not None and found.stale


async def test_without_redis_only_this_process_forgets_and_refreshes() -> None:
    cache = alone()
    assert await cache.fetch("key", TOOL) is None
    assert await cache.may_refresh("key", TOOL, 1.0)


@given(
    result=st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        st.lists,
        max_leaves=20,
    ),
    compress=st.booleans(),
)
def test_what_is_written_is_read_again(result: Any, compress: bool) -> None:
    encoded = json.dumps([result] * 400, separators=(",", ":")).encode()
    value = packed("key", encoded, compress=compress)
    read = room._read(value, "key", 10**8)
    assert read is not None and read[0] == encoded and read[2] == 100.0
    assert room._read(value, "another", 10**8) is None


@given(
    value=st.binary(max_size=200)
    | st.binary(max_size=100).map(lambda rest: room._HEAD.pack(room._MAGIC, True, time.time(), 1.0, bytes(16)) + rest)
)
def test_no_bytes_at_all_are_an_error_or_a_result(value: bytes) -> None:
    assert room._read(value, "key", 1_000) is None
