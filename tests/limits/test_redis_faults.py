"""Redis away in every way that it can be: nobody waits past the budget, all is told at once, and it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from app.calls import CurrentCall, current_call
from app.clients import redis_locator
from app.limits.limit import KEY_PREFIX
from app.limits.redis_link import RedisLink
from app.limits.redis_store import RedisStore
from app.limits.store import Ask, StoreAway
from tests.limits.stores import answer, daily, rate, running, until_answered, until_away, until_up
from tests.proxy import FaultProxy
from tests.servers import HOST, RedisServer, free_port
from tests.waiting import SOON_S, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quiet")]

BUDGET_S = 0.05

SANE_S = 10.0
"""Far over the budget: machines that test are slow."""

LONG_S = 5.0
"""An answer that takes so long comes too late, though the machine stood still meanwhile."""


@dataclass
class Site:
    """A server, the proxy before it, and a connection that was there before anything went wrong."""

    server: RedisServer
    proxy: FaultProxy
    admin: redis.Redis

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.proxy.port}"

    def configure(self, name: str, value: object) -> None:
        self.admin.config_set(name, value)

    def drop_others(self) -> None:
        """Connections that are open already feel no new setting."""
        self.admin.client_kill_filter(_type="normal", skipme=True)


@pytest.fixture
def site(own_redis: RedisServer) -> Iterator[Site]:
    with FaultProxy(own_redis.port) as proxy, redis.Redis(host=HOST, port=own_redis.port) as admin:
        admin.ping()
        yield Site(own_redis, proxy, admin)


def kill(site: Site) -> None:
    site.server.kill()


def slow(site: Site) -> None:
    site.proxy.latency_s = LONG_S


def fill(site: Site) -> None:
    site.configure("maxmemory", 1)


def fill_no_more(site: Site) -> None:
    site.configure("maxmemory", 0)


def want_password(site: Site) -> None:
    site.configure("requirepass", "secret")
    site.drop_others()


def take_no_more_clients(site: Site) -> None:
    site.configure("maxclients", 1)
    site.drop_others()


FAULTS: dict[str, tuple[Callable[[Site], object], Callable[[Site], object], str]] = {
    "killed": (kill, lambda site: site.server.start(), ""),
    "stopped": (lambda site: site.server.pause(), lambda site: site.server.resume(), "no answer"),
    "slow": (slow, lambda site: site.proxy.heal(), "no answer"),
    "stalled": (lambda site: site.proxy.stall(), lambda site: site.proxy.heal(), "no answer"),
    "reset": (lambda site: site.proxy.reset(), lambda site: site.proxy.heal(), ""),
    "half closed": (lambda site: site.proxy.half_close(), lambda site: site.proxy.heal(), "lost"),
    "out of memory": (fill, fill_no_more, "OOM"),
    "read only": (
        lambda site: site.admin.replicaof(HOST, "1"),
        lambda site: site.admin.replicaof("NO", "ONE"),
        "READONLY",
    ),
    "out of clients": (take_no_more_clients, lambda site: site.configure("maxclients", 1000), "max number of clients"),
    "wants a password": (want_password, lambda site: site.configure("requirepass", ""), "NOAUTH"),
}


async def outcomes(store: RedisStore, count: int, worst: list[float]) -> list[bool]:
    """Of so many asks at once: whether each was answered. `worst` takes what the slowest waited, seconds."""

    async def one() -> bool:
        began = time.perf_counter()
        try:
            await answer(store, Ask((daily(10), rate(10)), 1))
        except StoreAway:
            return False
        finally:
            worst.append(time.perf_counter() - began)
        return True

    return await asyncio.gather(*(one() for _ in range(count)))


async def until_all_are_answered(store: RedisStore) -> None:
    """Soon: on a slow machine a Redis that is well may take longer than the budget."""
    async with asyncio.timeout(SOON_S):
        while not (store.up and all(await outcomes(store, 20, []))):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("fault", FAULTS)
async def test_redis_away_is_told_within_the_budget_then_at_once_and_it_comes_back(site: Site, fault: str) -> None:
    begin, heal, told = FAULTS[fault]
    waited: list[float] = []
    async with running(site.url, BUDGET_S) as store:
        await until_all_are_answered(store)
        begin(site)
        assert not all(await outcomes(store, 20, waited))
        await until_away(store)
        # Each attempt to get it back fails as well, and calls do not wait for any.
        for _ in range(20):
            with pytest.raises(StoreAway):
                store.ask(Ask((daily(10),), 1))
            await asyncio.sleep(0.01)
        await until(lambda: told in store.reason)
        heal(site)
        await until_all_are_answered(store)
    assert max(waited) < SANE_S


@pytest.mark.parametrize("fault", FAULTS)
async def test_redis_away_at_the_start_is_found_later(site: Site, fault: str) -> None:
    begin, heal, _ = FAULTS[fault]
    begin(site)
    async with running(site.url, BUDGET_S) as store:
        assert not store.up
        with pytest.raises(StoreAway):
            store.ask(Ask((daily(10),), 1))
        heal(site)
        await until_all_are_answered(store)


async def test_what_is_away_is_said_once_and_what_is_back_is_said_once(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "app.limits")
    own_redis.stop()
    async with running(own_redis.url, BUDGET_S, retry_s_max=0.02) as store:
        await asyncio.sleep(0.2)
        own_redis.start()
        await until_up(store)
        own_redis.kill()
        await until_away(store)
        await asyncio.sleep(0.2)
    said = [record.getMessage() for record in caplog.records]
    assert said == ["limit store away", "limit store up", "limit store away"]


@pytest.mark.parametrize("fault", ["killed", "stopped"])
async def test_what_is_said_of_redis_names_no_call_that_asked_it(site: Site, fault: str) -> None:
    begin, heal, _ = FAULTS[fault]
    said = Calls()
    logging.getLogger("app.limits").addHandler(said)
    try:
        async with running(site.url, BUDGET_S) as store:
            current_call.set(CurrentCall("01a203b6-c8e7-78c0-b0cb-723c1e156398", None, None))
            begin(site)
            await outcomes(store, 1, [])
            await until_away(store)
    finally:
        logging.getLogger("app.limits").removeHandler(said)
        heal(site)
    assert said.calls and not any(said.calls)


class Calls(logging.Handler):
    """The call that each line would name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[CurrentCall | None] = []

    def emit(self, _: logging.LogRecord) -> None:
        self.calls.append(current_call.get())


async def test_an_idle_connection_that_redis_closes_costs_no_answer(site: Site) -> None:
    """As after CONFIG SET timeout, or a restart between two calls."""
    async with running(site.server.url) as store:
        for _ in range(5):
            site.drop_others()
            assert all(await outcomes(store, 5, []))


async def test_an_ask_that_finds_no_connection_is_not_sent_twice(site: Site) -> None:
    async with running(site.url) as store:
        limit = daily(100)
        for _ in range(10):
            await until_answered(store, limit)
            site.proxy.reset()
            site.proxy.heal()
            with contextlib.suppress(StoreAway):
                await answer(store, Ask((limit,), 1))
        await until_answered(store, limit)
        assert (await answer(store, Ask((limit,), 0))).states[0][2] <= 10


async def test_a_redis_that_comes_and_goes_leaves_nothing_behind(site: Site) -> None:
    """Fifty times: no file descriptor, task or connection more than before."""
    async with running(site.url, BUDGET_S, retry_s_max=0.02) as store:
        await until_answered(store)
        before = descriptors(), len(asyncio.all_tasks()), links()
        for cycle in range(50):
            if cycle % 2:
                asks = [asyncio.create_task(answer(store, Ask((daily(10),), 1))) for _ in range(5)]
                await asyncio.sleep(0)
                site.proxy.reset()
                await asyncio.wait(asks)
                assert not any(ask.cancelled() for ask in asks)
                for ask in asks:
                    ask.exception()
            else:
                site.proxy.reset()
            site.proxy.heal()
            await until_up(store)
            await until_answered(store)
        await until(lambda: (descriptors(), len(asyncio.all_tasks()), links()) == before)


async def test_a_store_that_is_closed_while_it_connects_leaves_nothing_behind(site: Site) -> None:
    site.proxy.stall()
    for _ in range(3):
        store = RedisStore(redis_locator(site.url, KEY_PREFIX, BUDGET_S), BUDGET_S)
        before = site.proxy.connections
        task = asyncio.create_task(store.run())
        await until(lambda before=before: site.proxy.connections > before)
        task.cancel()
        await asyncio.wait([task])
        await store.close()
    del store, task  # whose traceback has it
    await until(lambda: not links())
    site.proxy.heal()
    await until(lambda: not site.proxy.connections)


def links() -> int:
    gc.collect()
    return sum(isinstance(one, RedisLink) for one in gc.get_objects())


def descriptors() -> int:
    folder = Path("/proc/self/fd")
    return sum(1 for _ in folder.iterdir()) if folder.exists() else 0


async def test_an_answer_that_nobody_waits_for_is_no_error_when_redis_goes_away(site: Site) -> None:
    """As of a call that is cancelled in the very turn in which its store goes away."""
    async with running(site.url, BUDGET_S) as store:
        site.proxy.stall()
        store.ask(Ask((daily(10),), 1))
        await until_away(store)
        site.proxy.heal()
    gc.collect()


# What is no Redis


async def say(writer: asyncio.StreamWriter, reader: asyncio.StreamReader, text: bytes) -> None:
    """Once for everything that comes."""
    while await reader.read(65_536):
        writer.write(text)


async def speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await say(writer, reader, b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def agree(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await say(writer, reader, b"+OK\r\n")


async def answer_numbers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await say(writer, reader, b"*1\r\n:1\r\n")


async def chatter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await say(writer, reader, b"+OK\r\n" * 50)


async def never_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.write(b"+")
        while True:
            writer.write(b"x" * 65_536)
            await writer.drain()


async def announce_much(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await say(writer, reader, b"$900000000\r\n")


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


@pytest.mark.parametrize(
    "speak", [speak_http, agree, answer_numbers, chatter, never_end, announce_much, say_nothing, hang_up]
)
async def test_a_server_that_is_no_redis_is_away_and_nothing_worse(
    speak: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object],
) -> None:
    async with speaking(speak) as port, running(f"redis://{HOST}:{port}", BUDGET_S) as store:
        assert not store.up and store.reason
        with pytest.raises(StoreAway):
            store.ask(Ask((daily(10),), 1))


PROBED = b"*4\r\n:1\r\n:0\r\n:1\r\n:0\r\n"
"""What the script answers to the one ask that a new connection begins with."""


@pytest.mark.parametrize("then", [b"+OK\r\n", b":1\r\n", b"$-1\r\n", b"*1\r\n:1\r\n", b"-ERR no\r\n", b"*0\r\n"])
async def test_a_redis_that_goes_mad_is_away_and_is_not_flooded_with_connections(then: bytes) -> None:
    connections = 0

    async def go_mad(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for text in (b"+OK\r\n", b"+OK\r\n", PROBED):
            await reader.read(65_536)
            writer.write(text)
        await say(writer, reader, then)

    began = time.perf_counter()
    async with speaking(go_mad) as port, running(f"redis://{HOST}:{port}", BUDGET_S, retry_s_max=1.0) as store:
        async with asyncio.timeout(SOON_S):
            while connections < 5:
                with contextlib.suppress(StoreAway):
                    verdict = await answer(store, Ask((daily(10),), 1))
                    pytest.fail(f"that is no verdict: {verdict}")
                await asyncio.sleep(0.001)
    assert time.perf_counter() - began >= (0.05 + 0.1 + 0.2 + 0.4) / 2, "50 ms, then doubling, with jitter"


async def test_a_budget_that_ends_while_the_next_connection_is_made_leaves_no_connection_behind() -> None:
    come, open_now = 0, 0
    lost, second, told = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal come, open_now
        come, open_now = come + 1, open_now + 1
        is_first = come == 1
        try:
            for text in (b"+OK\r\n", b"+OK\r\n", PROBED):
                await reader.read(65_536)
                if not is_first:
                    second.set()
                    await told.wait()
                writer.write(text)
            if is_first:
                await lost.wait()
            else:
                await say(writer, reader, PROBED)
        finally:
            open_now -= 1

    async with speaking(speak) as port, running(f"redis://{HOST}:{port}", BUDGET_S) as store:
        await until_up(store)
        await asyncio.sleep(0.11)  # a connection that held for long is replaced at once
        lost.set()
        await asyncio.wait_for(second.wait(), SOON_S)
        with pytest.raises(StoreAway):
            await answer(store, Ask((daily(10),), 1))
        told.set()
        await until_up(store)
        await until_answered(store, daily(10))
        await until(lambda: open_now == 1)


async def test_a_store_that_is_closed_before_the_script_is_loaded_leaves_nothing_behind() -> None:
    loading, gone = asyncio.Event(), asyncio.Event()

    async def stop_at_the_script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        writer.write(b"+OK\r\n")
        await reader.read(65_536)
        loading.set()
        while await reader.read(65_536):
            pass
        gone.set()

    async with speaking(stop_at_the_script) as port:
        store = RedisStore(redis_locator(f"redis://{HOST}:{port}", KEY_PREFIX, BUDGET_S), BUDGET_S)
        task = asyncio.create_task(store.run())
        await asyncio.wait_for(loading.wait(), SOON_S)
        task.cancel()
        await asyncio.wait([task])
        await store.close()
        await asyncio.wait_for(gone.wait(), SOON_S)


@contextlib.asynccontextmanager
async def speaking(speak: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]) -> AsyncIterator[int]:
    serving: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await speak(reader, writer)  # type: ignore[misc]
        finally:
            serving.discard(task)
            writer.close()

    server = await asyncio.start_server(accept, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(serving):
            task.cancel()
        await asyncio.sleep(0.01)


async def test_nobody_listening_and_a_name_that_is_none_are_away() -> None:
    for url in (f"redis://{HOST}:{free_port()}", "redis://no-such-host.invalid"):
        async with running(url, BUDGET_S) as store:
            assert not store.up and store.reason
