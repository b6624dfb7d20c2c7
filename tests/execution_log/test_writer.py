"""The writer: every record becomes a row, in bounded tries, with a database that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from app.execution_log.connections import StoreAway
from app.execution_log.store import ExecutionStore, Stored
from app.execution_log.writer import AGE_S, BACKOFF_S_MAX, BACKOFF_S_MIN, ROWS_MAX, Batch, LogSink, LogWriter
from tests.execution_log.database import database, ids, logged, record
from tests.servers import PostgresServer
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio


TASKS_MAX = 6
"""The test's two, the writer and the two that it waits by, and a connection that is being closed."""


class Taken:
    def __init__(self, records: Sequence[bytes]) -> None:
        self.records = records


class Memory:
    """Records in a list, as the journal hands them out; `at_once` at most, as when it reads its segments."""

    at_once = ROWS_MAX
    stalled = False

    def __init__(self, *records: bytes) -> None:
        self.unread = deque(records)
        self.released: list[bytes] = []
        self.dropped = 0
        self._in_hand = 0
        self._some = asyncio.Event()
        if records:
            self._some.set()

    def add(self, *records: bytes) -> None:
        self.unread.extend(records)
        self._some.set()

    async def wait(self) -> None:
        await self._some.wait()

    def read_batch(self, rows_max: int, bytes_max: int) -> Taken | None:
        if not self.unread:
            self._some.clear()
            return None
        taken = [self.unread.popleft() for _ in range(min(rows_max, self.at_once, len(self.unread)))]
        self._in_hand += sum(map(len, taken))
        return Taken(taken)

    def release(self, batch: Batch) -> None:
        self.released += batch.records
        self._in_hand -= sum(map(len, batch.records))

    @property
    def backlog_bytes(self) -> int:
        return self._in_hand + sum(map(len, self.unread))


class Scripted:
    """A sink that is away as often as it is told, then takes everything."""

    def __init__(self, away: float = 0) -> None:
        self.away = away
        self.batches: list[list[bytes]] = []
        self.tries = 0
        self.tried = asyncio.Event()

    async def write(self, records: Sequence[bytes]) -> Stored:
        self.tries += 1
        self.tried.set()
        await asyncio.sleep(0)
        if self.away > 0:
            self.away -= 1
            raise StoreAway("on holiday", "57P03")
        self.batches.append(list(records))
        return Stored(len(records) - 1, 0, 1) if b"poison" in records else Stored(len(records), 0, 0)


@contextlib.asynccontextmanager
async def running(writer: LogWriter) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(writer.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def impatient(source: Memory, store: LogSink, now: Callable[[], float] = time.time) -> LogWriter:
    """A writer that hardly waits between tries."""
    return LogWriter(source, store, now, jitter=lambda low, high: 0.001)


async def test_records_become_rows_and_are_released_in_their_order(database_url: str) -> None:
    async with database(database_url) as engine:
        records = [record() for _ in range(2_500)]
        source = Memory(*records)
        writer = LogWriter(source, ExecutionStore(engine))
        async with running(writer):
            await until(lambda: len(source.released) == 2_500)
        assert source.released == records
        assert await logged(engine) == ids(records)
        assert writer.counts == {"written": 2_500, "duplicate": 0, "dead": 0, "dropped": 0}
        assert writer.lag_s() == 0


async def test_a_full_batch_does_not_wait_for_company_and_small_ones_share_one() -> None:
    source, store = Memory(*[record()] * (2 * ROWS_MAX + 1)), Scripted()
    async with running(LogWriter(source, store)):
        await until(lambda: len(store.batches) == 3)
        source.add(record())
        source.add(record(), record())
        await until(lambda: len(store.batches) == 4)
    assert [len(batch) for batch in store.batches] == [ROWS_MAX, ROWS_MAX, 1, 3]


async def test_a_writer_that_is_behind_waits_for_nobody_and_says_all_the_while_how_far() -> None:
    now = 1_800_000_000.0
    source, store = Memory(*(record(at=now - 60 + number / 100) for number in range(6_000))), Scripted()
    source.at_once = 50
    writer = LogWriter(source, store, lambda: now)
    async with running(writer):
        lags = []
        async with asyncio.timeout(6_000 / 50 * AGE_S / 2):  # half of what the pauses alone would take
            while source.unread:
                await asyncio.sleep(0)
                if store.batches:
                    lags.append(writer.lag_s())
        await until(lambda: len(source.released) == 6_000)
        assert max(lags) > 59 and min(lags) > 0, "at no moment it seems to be done"
        assert writer.lag_s() == 0


async def test_what_is_counted_is_what_became_of_the_rows() -> None:
    source, store = Memory(record(), b"poison"), Scripted()
    source.dropped = 7
    writer = LogWriter(source, store)
    async with running(writer):
        await until(lambda: len(source.released) == 2)
    assert writer.counts == {"written": 1, "duplicate": 0, "dead": 1, "dropped": 7}


async def test_a_database_that_is_away_keeps_one_batch_waiting_and_says_so_once_in_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "app.execution_log")
    now = [1_800_000_000.0]
    source, store = Memory(record(at=now[0] - 5)), Scripted(away=1e9)
    writer = impatient(source, store, lambda: now[0])
    async with running(writer):
        await until(lambda: store.tries > 20)
        assert writer.away and writer.reason == "on holiday"
        assert writer.lag_s() == pytest.approx(5, abs=0.01)
        assert [one.message for one in caplog.records] == ["log database away, rows wait"]
        now[0] += 10
        tries = store.tries
        await until(lambda: store.tries > tries + 20)
        assert [one.message for one in caplog.records] == ["log database away, rows wait"] * 2
        source.add(record())
        assert source.released == []
        store.away = 0
        await until(lambda: len(source.released) == 2)
        assert not writer.away and writer.reason == "" and writer.lag_s() == 0
    assert caplog.records[-1].message == "log database back"
    assert len(caplog.records) == 3


async def test_a_clock_that_is_set_back_does_not_make_the_database_away_for_less_than_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now, store = [1_800_000_000.0], Scripted(away=math.inf)
    source = Memory(record(at=now[0]))
    async with running(impatient(source, store, lambda: now[0])):
        await until(lambda: store.tries > 1)
        now[0] -= 3_600
        store.away = 0
        await until(lambda: len(source.released) == 1)
    assert caplog.records[-1].message == "log database back"
    assert vars(caplog.records[-1])["away_s"] >= 0


async def test_rows_that_are_refused_by_the_thousand_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    source, store = Memory(), Scripted()
    async with running(LogWriter(source, store, lambda: 1_800_000_000.0)):
        for number in range(5):
            source.add(b"poison")
            await until(lambda number=number: len(source.released) > number)
    assert [one.message for one in caplog.records] == ["rows refused by the database"]


async def test_waits_between_tries_grow_to_a_bound_and_begin_anew() -> None:
    asked: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        asked.append((low, high))
        return 0.0

    source, store = Memory(record()), Scripted(away=9)
    async with running(LogWriter(source, store, jitter=jitter)):
        await until(lambda: len(source.released) == 1)
        store.away = 1
        source.add(record())
        await until(lambda: len(source.released) == 2)
    assert [low for low, _ in asked] == [BACKOFF_S_MIN] * 10
    assert [high for _, high in asked] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 0.1]
    assert max(high for _, high in asked) == BACKOFF_S_MAX


async def test_a_drain_writes_all_that_is_there_and_the_writer_goes_on_after_it() -> None:
    source, store = Memory(*(record() for _ in range(3_333))), Scripted()
    writer = LogWriter(source, store)
    async with running(writer):
        assert await writer.drain(SOON_S)
        assert len(source.released) == 3_333
        source.add(record())
        assert await writer.drain(SOON_S)
        assert len(source.released) == 3_334
        source.add(record())
        await until(lambda: len(source.released) == 3_335)


async def test_a_drain_is_not_over_when_the_source_only_pauses() -> None:
    class Pausing(Memory):
        """Says every other time that there is nothing, and that there is more."""

        paused = False

        def read_batch(self, rows_max: int, bytes_max: int) -> Taken | None:
            self.paused = not self.paused
            return None if self.paused and self.unread else super().read_batch(rows_max, bytes_max)

    source = Pausing(*(record() for _ in range(5_000)))
    writer = LogWriter(source, Scripted())
    async with running(writer):
        assert await writer.drain(SOON_S)
    assert len(source.released) == 5_000


async def test_a_drain_waits_in_its_time_for_what_cannot_be_read_now() -> None:
    source = Memory()
    source.stalled = True
    writer = LogWriter(source, Scripted())
    async with running(writer):
        assert not await writer.drain(0.05)
        source.add(record())
        await until(lambda: not source.unread)
        source.stalled = False
        assert await writer.drain(SOON_S)
    assert len(source.released) == 1


async def test_a_drain_ends_in_time_with_the_database_away_and_leaves_the_rest_unreleased() -> None:
    source, store = Memory(record(), record()), Scripted(away=1e9)
    writer = LogWriter(source, store)
    async with running(writer):
        assert not await writer.drain(0.3)
    assert source.released == []


async def test_a_drain_does_not_sit_out_a_long_wait_between_tries() -> None:
    source, store = Memory(record()), Scripted(away=1)
    writer = LogWriter(source, store, jitter=lambda low, high: 10 * SOON_S)
    async with running(writer):
        await store.tried.wait()
        assert await writer.drain(SOON_S)
    assert len(source.released) == 1


async def test_a_bug_in_the_source_ends_the_writer_where_its_owner_sees_it() -> None:
    class Broken(Memory):
        async def wait(self) -> None:
            raise LookupError("segment")

    with pytest.raises(LookupError):
        await LogWriter(Broken(), Scripted()).run()


async def test_a_server_that_is_killed_stalled_stopped_or_without_its_table_loses_and_doubles_nothing(
    own_postgres: PostgresServer,
) -> None:
    url = own_postgres.create_database()
    async with database(url, pool_size=3) as engine:
        source = Memory()
        writer = impatient(source, ExecutionStore(engine, timeout_s=0.5))
        offered: list[bytes] = []

        async def rows_are_written(count: int = 300) -> None:
            """Also proves that it works again."""
            wanted = len(offered) + count
            for _ in range(count):
                offered.append(record())
                source.add(offered[-1])
            await until(lambda: len(source.released) >= wanted)

        def rows_wait() -> bool:
            offered.append(record())
            source.add(offered[-1])
            return writer.away

        async with running(writer):
            await rows_are_written()
            for break_it, mend_it in (
                (own_postgres.kill, own_postgres.start),
                (own_postgres.pause, own_postgres.resume),
                (
                    lambda: own_postgres.run_sql("ALTER TABLE tool_executions RENAME TO gone", database=url),
                    lambda: own_postgres.run_sql("ALTER TABLE gone RENAME TO tool_executions", database=url),
                ),
                (own_postgres.stop, own_postgres.start),
            ):
                break_it()
                await until(rows_wait)
                mend_it()
                await rows_are_written()
                assert not writer.away
                assert engine.pool.checkedout() <= 1
                assert len(asyncio.all_tasks()) <= TASKS_MAX
            assert await writer.drain(SOON_S)
        assert await logged(engine) == ids(offered)
        assert source.released == offered
        assert writer.counts["dead"] == 0
