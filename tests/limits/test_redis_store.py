"""How the store in Redis talks: one script call at a time for all that is asked, each answer to its own asker."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from app.clients import redis_locator
from app.limits.redis_store import BATCH_ASKS_MAX, BATCH_COUNTERS_MAX, PENDING_MAX
from app.limits.store import Ask, StoreAway, Verdict
from tests.certificates import make_certificate
from tests.limits.stores import answer, commands_used, daily, monthly, rate, running, script_calls
from tests.proxy import FaultProxy
from tests.servers import HOST, RedisServer
from tests.waiting import SOON_S, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quiet")]

TICK_S = 0.05
"""Latency of a slowed Redis: long enough for a test to act while a command is on its way."""


async def turn() -> None:
    """What was asked is sent by then."""
    for _ in range(3):
        await asyncio.sleep(0)


def used(verdict: Verdict) -> int:
    return verdict.states[0][2]


# Batches


async def test_what_was_sent_of_an_ask_takes_little_more_memory_than_its_bytes(one_redis: RedisServer) -> None:
    """An ask is kept for each caller and tool: tens of thousands."""
    limits = (rate(1_000), daily(10_000))
    asks = [Ask(limits, 1) for _ in range(500)]
    async with running(one_redis.url) as store:
        await answer(store, asks.pop())
        tracemalloc.start()
        try:
            for ask in asks:
                await answer(store, ask)
            kept_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert all(ask.keys is not None for ask in asks)
    assert kept_bytes < 1_000 * len(asks)


async def test_all_that_is_asked_in_one_turn_of_the_loop_is_one_command(each_redis: RedisServer) -> None:
    async with running(each_redis.url) as store:
        each_redis.cli("CONFIG", "RESETSTAT")
        limit, other = daily(60), rate(1_000)
        verdicts = await asyncio.gather(*(answer(store, Ask((limit, other), 1)) for _ in range(100)))
        assert script_calls(each_redis) == {"evalsha": 1, "eval": 0}
        assert [verdict.passes for verdict in verdicts] == [True] * 60 + [False] * 40
        assert [used(verdict) for verdict in verdicts[:60]] == list(range(1, 61)), "each has its own answer"


async def test_what_is_asked_while_a_command_is_on_its_way_goes_with_the_next(one_redis: RedisServer) -> None:
    with FaultProxy(one_redis.port) as proxy:
        async with running(f"redis://{HOST}:{proxy.port}") as store:
            proxy.latency_s = TICK_S
            one_redis.cli("CONFIG", "RESETSTAT")
            limit = daily(1_000)
            first = asyncio.create_task(answer(store, Ask((limit,), 1)))
            others = []
            for _ in range(50):
                await turn()
                assert not first.done()
                others.append(asyncio.create_task(answer(store, Ask((limit,), 1))))
            await asyncio.wait_for(asyncio.gather(first, *others), SOON_S)
            assert script_calls(one_redis) == {"evalsha": 2, "eval": 0}


async def test_under_load_there_is_at_most_one_command_in_a_turn_of_the_loop(one_redis: RedisServer) -> None:
    turns = 0

    def count() -> None:
        nonlocal turns, handle
        turns += 1
        handle = loop.call_soon(count)

    async def caller() -> None:
        for _ in range(20):
            await answer(store, Ask((limit,), 1))

    async with running(one_redis.url) as store:
        loop = asyncio.get_running_loop()
        limit = daily(1_000_000)
        one_redis.cli("CONFIG", "RESETSTAT")
        handle = loop.call_soon(count)
        await asyncio.gather(*(caller() for _ in range(200)))
        handle.cancel()
        calls = script_calls(one_redis)["evalsha"]
        assert 20 <= calls <= min(turns, 200), "4,000 asks"
        assert used(await answer(store, Ask((limit,), 0))) == 4_000


async def test_thousands_of_asks_in_one_turn_are_answered_in_bounded_commands(each_redis: RedisServer) -> None:
    asks = PENDING_MAX
    async with running(each_redis.url) as store:
        each_redis.cli("CONFIG", "RESETSTAT")
        limit = daily(asks // 2)
        tasks = [asyncio.create_task(answer(store, Ask((limit,), 1))) for _ in range(asks)]
        verdicts = await asyncio.gather(*tasks)
        assert sum(verdict.passes for verdict in verdicts) == asks // 2
        assert script_calls(each_redis)["evalsha"] == -(-asks // BATCH_ASKS_MAX)


async def test_past_its_bound_an_ask_is_told_so_and_the_store_is_not_away(one_redis: RedisServer) -> None:
    async with running(one_redis.url) as store:
        ask = Ask((daily(10 * PENDING_MAX),), 1)
        futures = [store.ask(ask) for _ in range(PENDING_MAX)]
        with pytest.raises(StoreAway):
            store.ask(ask)
        assert store.up
        verdicts = await asyncio.wait_for(asyncio.gather(*futures), SOON_S)  # type: ignore[arg-type]
        assert used(verdicts[-1]) == PENDING_MAX
        assert used(await answer(store, ask)) == PENDING_MAX + 1


async def test_asks_of_very_many_limits_fit_into_the_script(each_redis: RedisServer) -> None:
    """A limits file may hold 1,000 policies of three counters each."""
    limits = [tuple(daily(5) for _ in range(3_000)), *(tuple(daily(5) for _ in range(900)) for _ in range(10))]
    async with running(each_redis.url) as store:
        each_redis.cli("CONFIG", "RESETSTAT")
        verdicts = await asyncio.gather(*(answer(store, Ask(one, 1)) for one in limits))
        assert all(verdict.passes for verdict in verdicts)
        assert script_calls(each_redis)["evalsha"] >= 12_000 // BATCH_COUNTERS_MAX


# The script


async def test_a_flushed_script_is_loaded_once_and_charges_once(each_redis: RedisServer) -> None:
    async with running(each_redis.url) as store:
        limit = daily(1_000)
        await answer(store, Ask((limit,), 1))
        each_redis.cli("SCRIPT", "FLUSH")
        each_redis.cli("CONFIG", "RESETSTAT")
        await asyncio.gather(*(answer(store, Ask((limit,), 1)) for _ in range(30)))
        assert script_calls(each_redis) == {"evalsha": 1, "eval": 1}
        assert used(await answer(store, Ask((limit,), 1))) == 32
        assert script_calls(each_redis) == {"evalsha": 2, "eval": 1}
        assert store.up


@pytest.mark.parametrize("order", [(5, 2, 2, 2, 2, 2), (2, 5, 2, 2, 2, 2), (2, 2, 2, 2, 2, 5)])
async def test_asks_of_one_counter_in_one_tick_go_by_the_widest_window_among_them(
    one_redis: RedisServer, order: tuple[int, ...]
) -> None:
    """As when the load changes while they come: who asks first must not decide for the others."""
    async with running(one_redis.url) as store:
        limits = {burst: rate(10, burst=burst, name=f"of {order}") for burst in order}
        verdicts = await asyncio.gather(*(answer(store, Ask((limits[burst],), 1)) for burst in order))
        assert [verdict.passes for verdict in verdicts] == [True] * 5 + [False]


async def test_flushed_keys_let_one_limit_more_in_at_most(each_redis: RedisServer) -> None:
    async with running(each_redis.url) as store:
        limits = rate(10), daily(10), monthly(10)
        assert sum([(await answer(store, Ask(limits, 1))).passes for _ in range(15)]) == 10
        each_redis.cli("FLUSHALL")
        assert sum([(await answer(store, Ask(limits, 1))).passes for _ in range(15)]) == 10
        assert store.up


async def test_no_command_is_newer_than_redis_6_2(each_redis: RedisServer) -> None:
    async with running(each_redis.url) as store:
        spent = await answer(store, Ask((rate(10), daily(10), monthly(10)), 1))
        store.give_back(Ask((rate(10), daily(10), monthly(10)), 1, spent))
        each_redis.cli("SCRIPT", "FLUSH")
        await answer(store, Ask((rate(10),), 1))
    of_this_test = {"config|resetstat", "info", "script|flush", "client|setinfo"}
    ours = commands_used(each_redis) - of_this_test
    assert {"evalsha", "eval", "script|load", "mget", "set", "time"} <= ours
    for command in ours:
        words = each_redis.cli("COMMAND", "DOCS", command).split("\n")
        since = tuple(map(int, words[words.index("since") + 1].split(".")))
        assert since <= (6, 2), command


# Cancellation


async def test_who_goes_before_the_command_is_sent_spends_nothing(one_redis: RedisServer) -> None:
    async with running(one_redis.url) as store:
        limit = daily(10)
        one_redis.cli("CONFIG", "RESETSTAT")
        for _ in range(5):
            asked = store.ask(Ask((limit,), 1))
            assert isinstance(asked, asyncio.Future)
            asked.cancel()
        await turn()
        assert script_calls(one_redis) == {"evalsha": 0, "eval": 0}
        assert used(await answer(store, Ask((limit,), 0))) == 0


async def test_who_goes_in_the_middle_of_a_command_mixes_no_answers_up_and_has_spent_nothing(
    one_redis: RedisServer,
) -> None:
    with FaultProxy(one_redis.port) as proxy:
        async with running(f"redis://{HOST}:{proxy.port}") as store:
            proxy.latency_s = TICK_S
            limits = [daily(1_000) for _ in range(20)]
            asks = [asyncio.create_task(answer(store, Ask((limit,), n + 1))) for n, limit in enumerate(limits)]
            await turn()
            for gone in asks[::2]:
                gone.cancel()
            await asyncio.wait(asks)
            assert [used(asks[n].result()) for n in range(1, 20, 2)] == list(range(2, 21, 2))
            left = await asyncio.gather(*(answer(store, Ask((limit,), 0)) for limit in limits))
            assert [used(verdict) for verdict in left] == [0 if n % 2 == 0 else n + 1 for n in range(20)]


async def test_a_refused_call_that_is_gone_gives_nothing_back(one_redis: RedisServer) -> None:
    with FaultProxy(one_redis.port) as proxy:
        async with running(f"redis://{HOST}:{proxy.port}") as store:
            full, day = daily(1), daily(10)
            await answer(store, Ask((full, day), 1))
            proxy.latency_s = TICK_S
            gone = asyncio.create_task(answer(store, Ask((full, day), 1)))
            await turn()
            gone.cancel()
            await answer(store, Ask((full, day), 0))
            left = await answer(store, Ask((full, day), 0))
            assert [state[2] for state in left.states] == [1, 1]


async def test_what_is_given_back_last_of_all_still_reaches_redis(one_redis: RedisServer) -> None:
    limit = daily(10)
    async with running(one_redis.url) as store:
        ask = Ask((limit,), 4)
        spent = await answer(store, ask)
        store.give_back(ask.back(spent))
    async with running(one_redis.url) as store:
        assert used(await answer(store, Ask((limit,), 0))) == 0


# A loop that is late


BLOCKED_S = 4.0
"""So long that a tenth of it is time enough for Redis, on a machine that does much else."""


@pytest.mark.parametrize("turns", [0, 2])
async def test_a_loop_that_a_tool_blocked_does_not_make_redis_away(one_redis: RedisServer, turns: int) -> None:
    """Before the command is sent, while it is, and after it; until shortly before the end of the budget, until after
    it, and for twice the budget."""
    async with AsyncExitStack() as stack:
        budgets_s = [BLOCKED_S / part for part in (0.85, 0.95, 1.05, 2.0)]
        stores = [await stack.enter_async_context(running(one_redis.url, timeout_s=each_s)) for each_s in budgets_s]
        asked = [asyncio.create_task(answer(store, Ask((daily(100),), 1))) for store in stores]
        for _ in range(turns):
            await asyncio.sleep(0)
        time.sleep(BLOCKED_S)
        assert all(verdict.passes for verdict in await asyncio.gather(*asked)) and all(store.up for store in stores)


async def test_the_time_that_a_tool_took_is_not_counted_as_that_of_redis(one_redis: RedisServer) -> None:
    with FaultProxy(one_redis.port) as proxy:
        async with running(f"redis://{HOST}:{proxy.port}", timeout_s=BLOCKED_S) as store:
            proxy.latency_s = BLOCKED_S / 8
            asked = asyncio.create_task(answer(store, Ask((daily(100),), 1)))
            await asyncio.sleep(0)
            time.sleep(BLOCKED_S * 1.5)
            assert (await asked).passes and store.up


async def test_a_loop_that_is_blocked_again_and_again_still_finds_out_that_redis_is_away(
    own_redis: RedisServer,
) -> None:
    async with running(own_redis.url, timeout_s=0.05) as store:
        own_redis.pause()
        asked = asyncio.create_task(answer(store, Ask((daily(10),), 1)))
        blocked = 0
        while not asked.done() and blocked < 100:
            time.sleep(0.02)
            blocked += 1
            await asyncio.sleep(0)
        assert blocked < 20 and isinstance(asked.exception(), StoreAway)
        own_redis.resume()


# Without calls


async def test_a_redis_that_stops_answering_is_away_though_nobody_asks(own_redis: RedisServer) -> None:
    async with running(own_redis.url, timeout_s=0.2, heartbeat_s=0.01) as store:
        own_redis.pause()
        await until(lambda: not store.up)
        own_redis.resume()
        await until(lambda: store.up)


async def test_so_is_one_that_answers_and_cannot_count(own_redis: RedisServer) -> None:
    async with running(own_redis.url, heartbeat_s=0.01) as store:
        own_redis.cli("CONFIG", "SET", "maxmemory", "1")
        await until(lambda: not store.up)
        own_redis.cli("CONFIG", "SET", "maxmemory", "0")
        await until(lambda: store.up)


# The connection


async def test_password_user_and_database_of_the_url_are_used(own_redis: RedisServer) -> None:
    own_redis.cli("ACL", "SETUSER", "limits", "on", ">s3/cr:et", "~{limits}:*", "+@all")
    own_redis.cli("CONFIG", "SET", "requirepass", "other")
    limit = daily(10)
    async with running(f"redis://limits:s3%2Fcr%3Aet@{HOST}:{own_redis.port}/3") as store:
        assert store.up, store.reason
        assert (await answer(store, Ask((limit,), 1))).passes
    async with running(f"redis://:other@{HOST}:{own_redis.port}/3") as store:
        assert used(await answer(store, Ask((limit,), 0))) == 1
    async with running(f"redis://:other@{HOST}:{own_redis.port}/2") as store:
        assert used(await answer(store, Ask((limit,), 0))) == 0
    async with running(f"redis://:wrong@{HOST}:{own_redis.port}") as store:
        assert not store.up and "WRONGPASS" in store.reason and "wrong" not in store.reason.replace("WRONGPASS", "")


async def test_a_user_who_may_do_what_is_needed_and_no_more_is_enough(own_redis: RedisServer) -> None:
    may = ["+eval", "+evalsha", "+script|load", "+time", "+mget", "+set"]
    own_redis.cli("ACL", "SETUSER", "limits", "on", ">secret", "resetkeys", "~{limits}:*", "-@all", *may)
    async with running(f"redis://limits:secret@{HOST}:{own_redis.port}") as store:
        assert store.up, store.reason
        assert (await answer(store, Ask((rate(10), daily(10)), 1))).passes
        assert await store.trouble() is None, "it may not ask"


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the kernel's own list of timers is Linux's")
async def test_a_silent_connection_is_kept_alive(one_redis: RedisServer) -> None:
    """Else a firewall forgets it, and the first call after a pause finds out."""
    async with running(one_redis.url) as store:
        await answer(store, Ask((daily(10),), 1))
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        timers = [line[5] for line in lines if line[2].endswith(f":{one_redis.port:04X}") and line[3] == "01"]
        [(kind, _, ticks)] = [timer.partition(":") for timer in timers]
        assert kind == "02" and 0 < int(ticks, 16) <= 31 * os.sysconf("SC_CLK_TCK")


async def test_redis_behind_tls_is_checked_against_the_authorities_of_the_url(
    one_redis: RedisServer, tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path, "localhost")
    other = make_certificate(tmp_path, "elsewhere")
    async with behind_tls(one_redis.port, serving_tls(certificate)) as port:
        async with running(f"rediss://localhost:{port}?ca={certificate}") as store:
            assert store.up, store.reason
            assert (await answer(store, Ask((daily(10),), 1))).passes
        for authority in (f"?ca={other}", ""):
            async with running(f"rediss://localhost:{port}{authority}") as store:
                assert not store.up and "certificate" in store.reason.lower()


@pytest.mark.parametrize("of", ["url", "environment"])
async def test_authorities_that_were_renewed_meanwhile_are_taken(
    of: str, one_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authorities = tmp_path / "ca.pem"
    if of == "environment":
        monkeypatch.setenv("SSL_CERT_FILE", str(authorities))
    query = f"?ca={authorities}" if of == "url" else ""
    first = make_certificate(tmp_path, "localhost").rename(tmp_path / "first.pem")
    authorities.write_bytes(first.read_bytes())
    server = serving_tls(first)
    async with (
        behind_tls(one_redis.port, server) as port,
        running(f"rediss://localhost:{port}{query}") as store,
    ):
        assert store.up, store.reason
        second = make_certificate(tmp_path, "localhost")
        server.load_cert_chain(second)
        one_redis.cli("CLIENT", "KILL", "TYPE", "normal")
        await until(lambda: not store.up)
        second.replace(authorities)
        await until(lambda: store.up)
        assert (await answer(store, Ask((daily(10),), 1))).passes


def serving_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


@asynccontextmanager
async def behind_tls(target_port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """The port of a server that speaks TLS and forwards."""
    tasks: set[asyncio.Task[None]] = set()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(65_536):
                writer.write(chunk)
        except OSError:
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(HOST, target_port)
        for one in (pipe(reader, to_server), pipe(from_server, writer)):
            tasks.add(asyncio.create_task(one))

    server = await asyncio.start_server(accept, HOST, 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://", "host"),
        ("redis://one:1,two:2", "one host only"),
        ("redis://h/zero", "number of a database"),
        ("redis://h/²", "number of a database"),
        ("redis://h/1/2", "number of a database"),
        ("redis://h:port", ":port"),
        ("redis://h:70000", ":port"),
        ("redis://:s3cret@h?db=1", "ca=FILE"),
        ("redis://:s3cret@h?ca=x", "rediss"),
        ("rediss://:s3cret@h?ca=/nowhere", "cannot be read"),
        ("redis://:s3cret#@h", "host"),
        ("redis://:s3cret\u2100@h", "%XX"),
        ("redis://:s3cret@[::1", "%XX"),
        ("redis+sentinel://h", "names the service"),
        ("redis+cluster://h/1", "none in a Cluster"),
    ],
)
async def test_a_redis_url_that_cannot_be_is_refused_without_its_password(url: str, told: str) -> None:
    with pytest.raises(ValueError) as refused:
        redis_locator(url, "{limits}:", 0.05)
    assert told in str(refused.value) and "s3cret" not in str(refused.value)
