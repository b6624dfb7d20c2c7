"""The log as executor and service use it: room before a call, a record after it, what is seen, folders taken over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.calls import Caller, Execution, ToolCall, new_execution_id
from app.errors import DependencyUnavailable
from app.execution_log.journal import BufferedLog, Journal
from app.execution_log.log import NO_LOG, ExecutionLog, Mode
from app.execution_log.record import Recorder
from app.execution_log.segments import RECORD_BYTES_MAX
from app.execution_log.store import ExecutionStore
from app.execution_log.writer import LogWriter
from tests.conftest import ROOT
from tests.execution_log.database import database, logged, run
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio

BYTES_MAX = 1 << 20

CALLER = Caller("acme", "anna", frozenset(), ("*",))


def a_call() -> ToolCall:
    return ToolCall(new_execution_id(), "echo", {"message": "a"}, CALLER, time.perf_counter())


def ended(call: ToolCall) -> Execution:
    return Execution(call.execution_id, "echo", "success", b'"a"', None, None, 0.001, 0.001, time.time(), 1, "trace")


class Opened:
    """A log over a journal and memory in a folder; its writers run when told to."""

    def __init__(self, folder: Path, engine: AsyncEngine | None, adopted_every_s: float, bytes_max: int) -> None:
        self.journal = Journal.open(folder, bytes_max=bytes_max)
        self.memory = BufferedLog(bytes_max)
        self.recorder = Recorder(4096)
        sources = (self.journal, self.memory) if engine is not None else ()
        self.writers = tuple(LogWriter(source, ExecutionStore(engine)) for source in sources if engine is not None)
        self.log = ExecutionLog(
            self.recorder, "durable", "metadata", self.journal, self.memory, self.writers, adopted_every_s
        )


@contextlib.asynccontextmanager
async def opened(
    folder: Path, engine: AsyncEngine | None = None, adopted_every_s: float = 3600.0, bytes_max: int = BYTES_MAX
) -> AsyncIterator[Opened]:
    place = Opened(folder, engine, adopted_every_s, bytes_max)
    tasks = [asyncio.create_task(writer.run()) for writer in place.writers]
    tasks.append(asyncio.create_task(place.log.adopt()))
    try:
        yield place
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await place.journal.close()
        await place.memory.close()


@pytest.mark.parametrize("strict", [False, True])
async def test_an_answer_is_not_held_for_a_record_that_fits_no_frame(tmp_path: Path, strict: bool) -> None:
    async with opened(tmp_path) as place:
        call = a_call()
        assert place.journal.reserve(10)
        large = b"x" * (RECORD_BYTES_MAX + 1)
        commit = place.journal.append_made(lambda *_: large, call, ended(call), 10, strict)
        await asyncio.wait_for(commit.wait(), SOON_S)
        assert place.journal.dropped == 1 and not place.journal.backlog_bytes


@pytest.mark.parametrize("mode", ["durable", "strict", "buffered"])
async def test_a_tools_mode_decides_where_its_records_wait_and_when_they_are_kept(tmp_path: Path, mode: Mode) -> None:
    async with opened(tmp_path) as place:
        tool = place.log.for_tool("1", 1, mode, None)
        tool.reserve()
        call = a_call()
        commit = tool.append(call, ended(call))
        assert commit.done == (mode == "buffered")
        await commit.wait()
        assert (place.memory.backlog_bytes > 0) == (mode == "buffered")
        written = [path for path in tmp_path.rglob("*.segment") if call.execution_id.encode() in path.read_bytes()]
        assert bool(written) == (mode != "buffered")


async def test_a_tool_that_says_nothing_has_the_services_mode_and_payloads(tmp_path: Path) -> None:
    async with opened(tmp_path) as place:
        for payloads, size_bytes in ((None, 15), ("off", None)):
            call = a_call()
            place.log.for_tool("2.0", 3, None, payloads).append(call, ended(call))
            batch = None
            while batch is None:
                await asyncio.sleep(0)
                batch = place.journal.read_batch(10, BYTES_MAX)
            record = orjson.loads(batch.records[0])
            assert (record[0], record[2], record[17]) == (call.execution_id, "2.0", 3)
            assert record[19] == size_bytes


async def test_while_the_journal_cannot_be_read_the_service_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as place:
        await place.log.for_tool("1", 1, None, None).append(a_call(), ended(a_call())).wait()
    async with opened(tmp_path) as place:
        (segment,) = tmp_path.rglob("*.segment")
        segment.unlink()
        segment.symlink_to("/proc/self/mem")  # gives EIO
        assert place.journal.read_batch(10, BYTES_MAX) is None
        assert place.log.problems == ["journal cannot be read, rows wait"]


async def test_room_is_taken_before_a_call_and_given_back_whether_it_ran_or_not(tmp_path: Path) -> None:
    async with opened(tmp_path) as place:
        tool = place.log.for_tool("1", 1, None, None)
        reserved = 0
        with contextlib.suppress(DependencyUnavailable):
            while True:
                tool.reserve()
                reserved += 1
        assert 50 < reserved < BYTES_MAX // place.recorder.bytes_max("metadata")
        assert "journal full, calls are refused" in place.log.problems
        for number in range(reserved):
            if number % 2:
                tool.unreserve()
            else:
                call = a_call()
                tool.append(call, ended(call))
        await tool.append(a_call(), ended(a_call())).wait()  # the room of a tick is given back at its end
        tool.reserve()
        assert place.log.problems == []
        again = 0
        with contextlib.suppress(DependencyUnavailable):
            while True:
                tool.reserve()
                again += 1
        assert reserved - 10 < again <= reserved


async def test_a_record_that_waits_takes_little_more_memory_than_its_bytes(tmp_path: Path) -> None:
    count = 20_000
    async with opened(tmp_path, bytes_max=64 * BYTES_MAX) as place:
        tool = place.log.for_tool("1", 1, "buffered", None)
        before = memory_bytes()
        for _ in range(count):
            call = a_call()
            tool.append(call, ended(call))
        assert memory_bytes() - before < 5 * place.memory.backlog_bytes
        assert place.memory.backlog_bytes > 250 * count


def memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_what_waits_is_seen_in_bytes_and_age_and_is_nothing_once_it_is_written(
    tmp_path: Path, database_url: str
) -> None:
    async with database(database_url) as engine:
        await run(engine, "ALTER TABLE tool_executions RENAME TO away")
        async with opened(tmp_path, engine) as place:
            assert (place.log.journal_bytes, place.log.lag_s, place.log.problems) == (0, 0.0, [])
            calls = [a_call() for _ in range(20)]
            for call in calls:
                for mode in ("durable", "buffered"):
                    place.log.for_tool("1", 1, mode, None).append(call, ended(call))
            await until(lambda: all(writer.away for writer in place.writers) and place.log.lag_s > 0.1)
            assert place.log.journal_bytes > 20 * 2 * 300
            assert place.log.problems == ["database away for 0 s, rows wait"]
            await run(engine, "ALTER TABLE away RENAME TO tool_executions")
            await place.log.drain(SOON_S)
            assert (place.log.journal_bytes, place.log.lag_s, place.log.problems) == (0, 0.0, [])
            rows = place.log.rows
            assert (rows["written"], rows["duplicate"]) == (20, 20), "the same ids by both ways are one row"
            assert await logged(engine) == sorted(call.execution_id for call in calls)


async def test_a_log_that_is_off_takes_everything_and_keeps_nothing() -> None:
    log = ExecutionLog(Recorder(4096), "durable", "metadata", None, None, ())
    tool = log.for_tool("1", 1, None, None)
    assert tool is NO_LOG
    tool.reserve()
    tool.unreserve()
    call = a_call()
    assert tool.append(call, ended(call)).done
    assert (log.journal_bytes, log.lag_s, log.problems) == (0, 0.0, [])


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from app.execution_log.journal import Journal

async def main():
    journal = Journal.open(Path(sys.argv[1]), bytes_max=1 << 20)
    for record in sys.argv[2:]:
        await journal.append(record.encode(), strict=False).wait()
    print("kept", flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


async def test_the_folder_of_a_killed_process_is_taken_over_by_one_that_lives_within_its_period(
    tmp_path: Path, database_url: str
) -> None:
    calls = [a_call() for _ in range(3)]
    recorder = Recorder(4096)
    records = [recorder.record(call, ended(call), "1", 1, "metadata").decode() for call in calls]
    ids = sorted(call.execution_id for call in calls)
    async with database(database_url) as engine, opened(tmp_path / "journal", engine, adopted_every_s=0.02) as place:
        other = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "journal"), *records],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with other:
            assert other.stdout is not None and other.stdout.readline() == b"kept\n"
            assert place.log.journal_bytes == 0, "a process that lives keeps its own"
            assert await logged(engine) == []
            other.kill()
        await until(lambda: place.log.rows["written"] == 3)
        assert await logged(engine) == ids
        await until(lambda: len(list((tmp_path / "journal").iterdir())) == 1)
