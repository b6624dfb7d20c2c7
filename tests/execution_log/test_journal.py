"""The journal on real files: what was committed is found again, whatever ended the process or damaged the files."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.execution_log.folders import UNREADABLE_BYTES, Damage, Folder, Position, Segment
from app.execution_log.journal import COMMITTED, BufferedLog, Commit, Journal, JournalError
from app.execution_log.segments import FRAME_BYTES, HEADER_BYTES, new_header
from tests.conftest import ROOT, service_environ
from tests.executor.in_process import SOON_S, until

pytestmark = pytest.mark.anyio

MIB = 1_048_576


@contextlib.asynccontextmanager
async def opened(root: Path, *, bytes_max: int = 64 * MIB, **options: Any) -> AsyncIterator[Journal]:
    journal = Journal.open(root, bytes_max=bytes_max, **options)
    try:
        yield journal
    finally:
        await journal.close(SOON_S)


async def write(journal: Journal, *records: bytes) -> None:
    """In one tick, until they are on disk."""
    for record in records:
        commit = journal.append(record, strict=False)
    await asyncio.wait_for(commit.wait(), SOON_S)


def read(journal: Journal | BufferedLog, rows_max: int = 1000, *, release: bool = False) -> list[bytes]:
    """All that there is now."""
    records: list[bytes] = []
    for _ in range(100_000):
        batch = journal.read_batch(rows_max, MIB)
        if batch is not None:
            assert 0 < len(batch.records) <= rows_max
            records += batch.records
            if release:
                journal.release(batch)
        elif not journal._readable.is_set():
            return records
    raise AssertionError("it never ends")


def numbered(count: int, first: int = 0) -> list[bytes]:
    return [b"record %d" % number for number in range(first, first + count)]


def folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.segment"))


async def left_behind(root: Path, *records: bytes, ticks: int = 1, **options: Any) -> Path:
    """The folder of a process that has ended without its writer having read anything."""
    async with opened(root, **options) as journal:
        for tick in range(ticks):
            await write(journal, *records[tick::ticks])
        return journal._own.path


@contextlib.asynccontextmanager
async def disk_that_hangs(journal: Journal) -> AsyncIterator[threading.Event]:
    """Its thread is stuck until the event is set."""
    begun, ends = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        ends.wait(SOON_S)

    journal._disk.submit(hang, lambda error: None)
    await until(begun.is_set)
    yield ends
    ends.set()


# Commits


async def test_the_records_of_a_tick_share_a_commit_and_one_system_call(tmp_path: Path) -> None:
    def writes() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("syscw"))

    async with opened(tmp_path, sync_interval_s=60.0) as journal:
        await write(journal, b"begins the segment")
        before = writes()
        commits = {journal.append(record, strict=False) for record in numbered(50)}
        assert len(commits) == 1 and not commits.copy().pop().done
        await commits.pop().wait()
        assert writes() - before == 1
        assert journal.append(b"next", strict=False) not in commits


async def test_a_commit_is_done_once_its_tick_is_on_disk(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        commit = journal.append(b"one record", strict=False)
        assert not commit.done and segments(tmp_path) == []
        seen: list[tuple[Commit, bool]] = []
        commit.add_done_callback(lambda it: seen.append((it, b"one record" in segments(tmp_path)[0].read_bytes())))
        await commit.wait()
        commit.add_done_callback(lambda it: seen.append((it, True)))
        assert seen == [(commit, True)] * 2


async def test_a_commit_may_be_waited_for_by_many_of_whom_one_is_cancelled(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        commit = journal.append(b"record", strict=True)
        waiting = [asyncio.ensure_future(commit.wait()) for _ in range(3)]
        waiting[0].cancel()
        done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), SOON_S)
        assert isinstance(done[0], asyncio.CancelledError) and done[1:] == [None, None]


async def test_a_callback_that_fails_keeps_no_other_from_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    commit, called = Commit(), []
    commit.add_done_callback(lambda _: 1 / 0)
    commit.add_done_callback(called.append)
    commit.complete()
    assert called == [commit] and "callback of a signal failed" in caplog.text


async def test_a_strict_commit_is_done_after_its_sync_and_a_durable_one_does_not_wait_for_that(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        strict, durable = journal.append(b"a", strict=True), journal.append(b"b", strict=False)
        await durable.wait()
        assert not strict.done
        await asyncio.wait_for(strict.wait(), SOON_S)
        assert journal._syncing._synced_bytes == journal._syncing._written_bytes > 0


async def test_strict_commits_that_come_during_a_sync_share_the_next_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal, disk_that_hangs(journal) as ends:
        commits = []
        for number in range(20):
            commits.append(journal.append(b"%d" % number, strict=True))
            await asyncio.sleep(0)
        assert len(set(commits)) == 20 and not any(commit.done for commit in commits)
        assert journal._disk._queue.qsize() == 1
        others: list[bool] = []
        loop = asyncio.get_running_loop()
        commits[0].add_done_callback(lambda _: loop.call_soon(lambda: others.append(commits[1].done)))
        ends.set()
        await asyncio.wait_for(asyncio.gather(*(commit.wait() for commit in commits)), SOON_S)
        assert others == [False]


async def test_a_disk_that_hangs_holds_no_answer_back_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path, sync_patience_s=0.01) as journal, disk_that_hangs(journal) as ends:
        await asyncio.wait_for(journal.append(b"first", strict=True).wait(), SOON_S)
        assert journal.failing
        await asyncio.wait_for(journal.append(b"second", strict=True).wait(), SOON_S)
        ends.set()
        await until(lambda: not journal.failing)
    hangs, again = caplog.records
    assert hangs.message == "journal sync hangs"
    assert again.message == "journal is synced again" and again.failures == 1  # type: ignore[attr-defined]


async def test_a_new_segment_is_not_synced_before_its_name_is(tmp_path: Path) -> None:
    async with opened(tmp_path, sync_interval_s=0.001) as journal:
        async with disk_that_hangs(journal) as ends:
            strict = journal.append(b"record", strict=True)
            await until(lambda: len(segments(tmp_path)) == 1)
            journal._syncing._folders.append(tmp_path / "above")  # which cannot be synced: it is not there
            ends.set()
            await asyncio.wait_for(strict.wait(), SOON_S)
        rounds = 0
        for number in range(3):  # the segment's own file can be synced all the while
            commit = journal.append(b"%d" % number, strict=True)
            async with disk_that_hangs(journal):
                await asyncio.wait_for(commit.wait(), SOON_S)
            rounds += journal.failing
        assert rounds == 3
        (tmp_path / "above").mkdir()
        await until(lambda: not journal.failing)
        assert journal._syncing._synced_bytes == journal._syncing._written_bytes


async def test_what_is_durable_is_synced_soon_and_then_there_is_no_timer(tmp_path: Path) -> None:
    async with opened(tmp_path, sync_interval_s=0.001) as journal:
        await write(journal, b"record")
        await until(lambda: journal._syncing._synced_bytes == journal._syncing._written_bytes)
        await until(lambda: not journal._syncing._running)
        assert journal._syncing._timer is None


# Reading and releasing


async def test_records_come_in_their_order_within_rows_and_bytes(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await write(journal, *numbered(10))
        await write(journal, b"x" * 5000, *numbered(3, first=10))
        sizes, records = [], []
        while (batch := journal.read_batch(4, 100)) is not None:
            sizes.append(len(batch.records))
            records += batch.records
        assert records == [*numbered(10), b"x" * 5000, *numbered(3, first=10)]
        assert max(sizes) == 4 and sum(sizes) == 14


async def test_the_writer_is_woken_when_there_is_something_to_read(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        assert journal.read_batch(1, 1) is None
        waiting = asyncio.ensure_future(journal.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        journal.append(b"record", strict=False)
        await asyncio.wait_for(waiting, SOON_S)
        assert read(journal) == [b"record"]


async def test_what_is_not_released_is_offered_to_the_next_process_and_what_is_is_not(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await write(journal, *numbered(10))
        batch = journal.read_batch(4, MIB)
        assert batch is not None
        journal.release(batch)
        assert read(journal) == numbered(6, first=4)
    async with opened(tmp_path) as journal:
        assert len(folders(tmp_path)) == 2
        assert journal.backlog_bytes == sum(len(record) + FRAME_BYTES for record in numbered(6))
        assert read(journal, release=True) == numbered(6, first=4)
        assert journal.backlog_bytes == 0
        await until(lambda: folders(tmp_path) == [journal._own.path])
    assert folders(tmp_path) == []


async def test_a_release_covers_what_was_read_before_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await write(journal, *numbered(10))
        batches = [journal.read_batch(2, MIB) for _ in range(3)]
        journal.release(batches[-1])
        journal.rewind()
        assert read(journal) == numbered(4, first=6)


async def test_a_later_batch_in_hand_is_not_released_with_an_earlier_one(tmp_path: Path) -> None:
    async with opened(tmp_path, tail_bytes_max=60) as journal:
        await write(journal, *numbered(2))
        await write(journal, *numbered(2, first=2))
        first, second = journal.read_batch(2, MIB), journal.read_batch(2, MIB)
        for number in range(4, 20):
            await write(journal, *numbered(1, first=number))
        journal.release(first)
        journal.rewind()
        assert second is not None and read(journal)[: len(second.records)] == second.records


async def test_memory_stays_flat_while_nobody_reads(tmp_path: Path) -> None:
    async with opened(tmp_path, tail_bytes_max=10_000, segment_bytes=20_000) as journal:
        for number in range(500):
            await write(journal, b"%d " % number + b"x" * 400)
            assert journal._tail_bytes <= 10_000
        assert len(segments(tmp_path)) > 5
        assert [int(record.split()[0]) for record in read(journal, 7)] == list(range(500))


async def test_a_reader_that_fell_behind_catches_up_though_records_keep_coming(tmp_path: Path) -> None:
    async with opened(tmp_path, tail_bytes_max=2_000) as journal:
        written = numbered(500)
        for record in written:
            await write(journal, record)
        assert journal._behind
        got: list[bytes] = []
        for _ in range(100):
            batch = journal.read_batch(50, MIB)
            assert batch is not None
            got += batch.records
            journal.release(batch)
            if len(got) == len(written):
                break
            more = numbered(5, len(written))  # while the batch was on its way
            written += more
            for record in more:
                await write(journal, record)
        assert got == written and journal.backlog_bytes == 0
        assert not journal._behind


async def test_released_segments_are_deleted_and_their_room_is_free_again(tmp_path: Path) -> None:
    async with opened(tmp_path, segment_bytes=10_000) as journal:
        for _ in range(200):
            await write(journal, b"x" * 400)
        assert len(segments(tmp_path)) > 5 and journal.size_bytes == 200 * (400 + FRAME_BYTES)
        assert len(read(journal, release=True)) == 200
        await until(lambda: len(segments(tmp_path)) <= 1)
        await until(lambda: journal.size_bytes <= 10_000)
        assert journal.backlog_bytes == 0


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 30)),
        st.tuples(st.just("read"), st.integers(1, 40)),
        st.tuples(st.just("release"), st.integers(1, 3)),
        st.tuples(st.sampled_from(["rewind", "reopen", "crash"]), st.just(0)),
    ),
    min_size=5,
    max_size=60,
)


@given(operations=OPERATIONS, seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_in_between_everything_is_read_in_order_until_it_is_released(
    operations: list[tuple[str, int]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def run() -> None:
        model = Model(tmp_path_factory.mktemp("journal"), random.Random(seed))
        for operation, count in operations:
            await getattr(model, operation)(count)
        await model.end()

    asyncio.run(run())


class Model:
    """A journal beside the numbers of the records that it took, was read and was told to forget."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root = root
        self.rng = rng
        self.journal = self.opened()
        self.made = self.read_to = self.released_to = 0
        self.in_hand: list[tuple[Any, int]] = []

    def opened(self) -> Journal:
        return Journal.open(self.root, bytes_max=64 * MIB, tail_bytes_max=2_000, segment_bytes=4_000)

    async def append(self, count: int) -> None:
        for number in range(self.made, self.made + count):
            commit = self.journal.append(b"%d:" % number + b"x" * self.rng.randrange(300), strict=False)
        await commit.wait()
        self.made += count

    async def read(self, count: int) -> None:
        batch = self.journal.read_batch(count, self.rng.randrange(1, 5_000))
        if batch is None:
            assert self.read_to == self.made
            return
        numbers = numbers_of(batch.records)
        assert numbers == list(range(self.read_to, self.read_to + len(numbers)))
        self.read_to += len(numbers)
        self.in_hand.append((batch, self.read_to))

    async def release(self, count: int) -> None:
        for batch, read_to in self.in_hand[:count]:
            self.journal.release(batch)
            self.released_to = read_to
        del self.in_hand[:count]

    async def rewind(self, _: int = 0) -> None:
        self.journal.rewind()
        self.read_to = self.released_to
        self.in_hand.clear()

    async def reopen(self, _: int) -> None:
        await self.journal.close(SOON_S)
        self.journal = self.opened()
        await self.rewind()

    async def crash(self, _: int) -> None:
        await _crash(self.journal)
        self.journal = self.opened()
        await self.rewind()

    async def end(self) -> None:
        await self.rewind()
        assert numbers_of(read(self.journal, release=True)) == list(range(self.released_to, self.made))
        await self.journal.close(SOON_S)
        assert folders(self.root) == []


def numbers_of(records: list[bytes]) -> list[int]:
    return [int(record.split(b":")[0]) for record in records]


async def _crash(journal: Journal) -> None:
    """What a killed process leaves: files as they are, locks free."""
    await journal._disk.finish(SOON_S)
    for fd in (journal._writer._fd, *journal._syncing._retired_fds):
        if fd >= 0:
            os.close(fd)
    journal._syncing._stop_timers()
    for folder in (journal._own, *journal._adopted):
        folder.close()


# The bound


async def test_room_is_reserved_before_and_never_exceeded(tmp_path: Path) -> None:
    async with opened(tmp_path, bytes_max=MIB) as journal:
        accepted = 0
        while journal.reserve(4_000):
            await write(journal, b"x" * 4_000)
            journal.unreserve(4_000)
            accepted += 1
        assert accepted > 200
        assert sum(path.stat().st_size for path in segments(tmp_path)) <= MIB
        assert not journal.reserve(4_000)
        assert len(read(journal, release=True)) == accepted
        await until(lambda: journal.reserve(4_000))
        journal.unreserve(4_000)


async def test_reservations_count_until_they_are_given_back(tmp_path: Path) -> None:
    async with opened(tmp_path, bytes_max=MIB) as journal:
        held = 0
        while journal.reserve(10_000):
            held += 1
        assert 100 <= held <= 105
        journal.unreserve(10_000)
        assert journal.reserve(10_000) and not journal.reserve(10_000)
        for _ in range(held):
            journal.unreserve(10_000)
        assert journal._reserved == 0


async def test_what_an_ended_process_left_counts_against_the_bound(tmp_path: Path) -> None:
    await left_behind(tmp_path, *[b"x" * 4_000] * 200, bytes_max=MIB)
    async with opened(tmp_path, bytes_max=MIB) as journal:
        assert not journal.reserve(300_000)
        read(journal, release=True)
        await until(lambda: journal.reserve(300_000))
        journal.unreserve(300_000)


async def test_a_record_too_large_for_any_frame_is_counted_and_nothing_else_suffers(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        assert journal.append(b"x" * 5 * MIB, strict=True) is COMMITTED
        await write(journal, b"x" * 3 * MIB, b"small")
        assert journal.dropped == 1
        assert [len(record) for record in read(journal)] == [3 * MIB, 5]


async def test_large_records_are_read_from_segments_as_well(tmp_path: Path) -> None:
    records = [b"%d" % number * size for number, size in enumerate((10, 300_000, 3, 1_000_000, 262_144, 5))]
    await left_behind(tmp_path, *records)
    async with opened(tmp_path) as journal:
        assert read(journal) == records


# Ends of processes

CHILD = """
import asyncio, os, resource, sys
from pathlib import Path
from app.execution_log.journal import Journal

def say(text):
    os.write(1, text.encode() + b"\\n")

async def main():
    root = Path(sys.argv[1])
    {body}

asyncio.run(main())
"""


@contextlib.contextmanager
def child(root: Path, body: str) -> Iterator[subprocess.Popen[bytes]]:
    source = CHILD.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ").strip())
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=service_environ(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def lines(process: subprocess.Popen[bytes], count: int) -> list[bytes]:
    assert process.stdout is not None
    found = [process.stdout.readline() for _ in range(count)]
    assert all(line.endswith(b"\n") for line in found), (found[-3:], process.poll())
    return [line.strip() for line in found]


APPENDS = """
journal = Journal.open(root, bytes_max=1 << 30, segment_bytes=50_000)
number = 0
while True:
    first = number
    for _ in range(7):
        commit = journal.append(b"%d:" % number + b"x" * (number * 37 % 500), strict={strict})
        number += 1
    await commit.wait()
    say(f"{number}")
"""


@pytest.mark.parametrize("strict", [False, True])
async def test_a_killed_process_loses_nothing_that_was_committed(tmp_path: Path, strict: bool) -> None:
    with child(tmp_path, APPENDS.replace("{strict}", str(strict))) as process:
        committed = int(lines(process, 60)[-1])
        process.send_signal(signal.SIGKILL)
        assert process.stdout is not None
        rest = process.stdout.read().split()
        process.wait()
    committed = max([committed, *(int(line) for line in rest[:-1])])
    async with opened(tmp_path) as journal:
        numbers = [int(record.split(b":")[0]) for record in read(journal)]
    assert numbers == list(range(len(numbers))) and len(numbers) >= committed


async def test_the_folder_of_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    body = """
    journal = Journal.open(root, bytes_max=1 << 30)
    await journal.append(b"theirs", strict=False).wait()
    say("ready")
    await asyncio.sleep(600)
    """
    with child(tmp_path, body) as process:
        lines(process, 1)
        async with opened(tmp_path) as journal, opened(tmp_path) as other:
            await write(other, b"of another journal of this process")
            assert journal.adopt_orphans() == other.adopt_orphans() == 0
            assert read(journal) == []
            process.kill()
            process.wait()
            assert journal.adopt_orphans() == 1
            assert other.adopt_orphans() == 0
            await asyncio.wait_for(journal.wait(), SOON_S)
            assert read(journal) == [b"theirs"]


async def test_of_processes_that_adopt_at_once_each_folder_goes_to_one(tmp_path: Path) -> None:
    for number in range(20):
        await left_behind(tmp_path / "made", *numbered(3, first=3 * number))
        # Each close frees the folder, and the next open would adopt it: so it is put aside.
        (folder,) = folders(tmp_path / "made")
        (tmp_path / "all").mkdir(exist_ok=True)
        folder.rename(tmp_path / "all" / folder.name)
    body = """
    say("ready")
    sys.stdin.readline()
    journal = Journal.open(root, bytes_max=1 << 30)
    while (batch := journal.read_batch(100, 1 << 20)) is not None:
        for record in batch.records:
            say(record.decode())
        journal.release(batch)
    say("done")
    sys.stdin.readline()
    await journal.close()
    """
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(child(tmp_path / "all", body)) for _ in range(3)]
        for process in processes:
            lines(process, 1)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        seen: list[bytes] = []
        for process in processes:
            while (line := lines(process, 1)[0]) != b"done":
                seen.append(line)
        assert sorted(seen) == sorted(numbered(60))
        for process in processes:
            process.communicate(b"end\n", timeout=SOON_S)
    assert folders(tmp_path / "all") == []


async def test_a_crash_in_the_middle_of_an_adoption_loses_nothing(tmp_path: Path) -> None:
    await left_behind(tmp_path, *numbered(50), ticks=5, segment_bytes=100)
    body = """
    journal = Journal.open(root, bytes_max=1 << 30)
    batch = journal.read_batch(20, 1 << 20)
    journal.release(batch)
    journal.read_batch(5, 1 << 20)
    say(str(len(batch.records)))
    await asyncio.sleep(600)
    """
    with child(tmp_path, body) as process:
        released = int(lines(process, 1)[0])
    async with opened(tmp_path) as journal:
        expected = [record for tick in range(5) for record in numbered(50)[tick::5]]
        assert read(journal, release=True) == expected[released:]
        await until(lambda: folders(tmp_path) == [journal._own.path])


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "checkpoint"], ["0000000001.segment"], ["checkpoint"]])
async def test_what_a_crash_leaves_of_an_empty_folder_is_tidied_away(tmp_path: Path, left: list[str]) -> None:
    folder = tmp_path / "0001795000000000-77-00aa11bb"
    folder.mkdir(parents=True)
    for name in left:
        (folder / name).touch()
    async with opened(tmp_path) as journal:
        assert read(journal) == []
        await until(lambda: not folder.exists())
        assert journal.damage.bytes == 0 and journal.size_bytes == 0


async def test_a_folder_with_a_file_of_someone_else_is_emptied_and_kept(tmp_path: Path) -> None:
    folder = await left_behind(tmp_path, b"record")
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "not a folder of ours").mkdir()
    async with opened(tmp_path) as journal:
        assert read(journal, release=True) == [b"record"]
    assert (folder / "notes.txt").exists() and (tmp_path / "not a folder of ours").exists()


async def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def once() -> None:
        await left_behind(tmp_path, *numbered(200), ticks=20, segment_bytes=200)
        async with opened(tmp_path, segment_bytes=200, tail_bytes_max=100) as journal:
            await write(journal, *numbered(10))
            await write(journal, *numbered(10))
            assert len(read(journal, release=True)) == 220

    await once()
    before = descriptors()
    for _ in range(5):
        await once()
    assert descriptors() == before


async def test_a_folder_that_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match=r"JOURNAL_DIR .*file cannot be used: .*; give the service a") as refused:
        Journal.open(tmp_path / "file", bytes_max=MIB)
    assert refused.value.errno in (errno.EEXIST, errno.ENOTDIR)


async def test_records_are_for_their_owner_alone(tmp_path: Path) -> None:
    folder = await left_behind(tmp_path / "made", b"record")
    for path in (tmp_path / "made", folder, *folder.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


async def test_a_close_is_bounded_when_the_disk_hangs(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, bytes_max=MIB)
    async with disk_that_hangs(journal) as ends:
        commit = journal.append(b"record", strict=True)
        await journal.close(0.01)
        assert commit.done
        assert journal.append(b"late", strict=True) is COMMITTED and journal.dropped == 1
        ends.set()
        thread = journal._disk._thread
        assert thread is not None
        await asyncio.to_thread(thread.join, SOON_S)
    journal._own.close()


# A disk that takes nothing

FULL = """
journal = Journal.open(root, bytes_max=1 << 30)
await journal.append(b"before", strict=False).wait()
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, hard))
for number in range(100):
    commit = journal.append(b"%d" % number, strict=number % 2 == 0)
    if number % 10 == 9:
        await commit.wait()
say(f"{journal.failing} {journal.unwritten} {journal.write_failures > 0}")
"""


async def test_while_nothing_can_be_written_answers_go_out_and_records_wait_in_memory(tmp_path: Path) -> None:
    body = (
        FULL.replace("{limit}", "70")
        + """
say(f"{journal.reserve(100)} {journal.reserve(17 << 20)}")
while journal.write_failures < 4:
    await asyncio.sleep(0.01)
say(f"{len(list(root.glob('*/*.segment')))}")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
while journal.failing:
    await asyncio.sleep(0.01)
say(f"{journal.unwritten} {journal.dropped}")
await asyncio.sleep(600)
"""
    )
    with child(tmp_path, body) as process:
        assert lines(process, 4) == [b"True 100 True", b"True False", b"2", b"0 0"]
    async with opened(tmp_path) as journal:
        assert read(journal) == [b"before", *(b"%d" % number for number in range(100))]
        assert journal.damage.bytes == 0


@pytest.mark.parametrize("rewound", ["never", "while it fails", "once it is written"])
async def test_what_the_database_took_from_memory_is_not_written_later(tmp_path: Path, rewound: str) -> None:
    again = "journal.rewind(); batch = journal.read_batch(3, 1 << 20)"
    body = (
        FULL.replace("{limit}", "70")
        + """
batch = journal.read_batch(66, 1 << 20)
say(f"{batch.records[0].decode()} {batch.records[-1].decode()}")
journal.release(batch)
say(f"{journal.unwritten}")
batch = journal.read_batch(3, 1 << 20)
{while it fails}
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
while journal.failing:
    await asyncio.sleep(0.01)
{once it is written}
journal.release(batch)
say(f"{batch.records[0].decode()} {batch.records[-1].decode()}")
await asyncio.sleep(600)
"""
    )
    for when in ("while it fails", "once it is written"):
        body = body.replace("{%s}" % when, again if rewound == when else "")
    with child(tmp_path, body) as process:
        assert lines(process, 4) == [b"True 100 True", b"before 64", b"35", b"65 67"]
    async with opened(tmp_path) as journal:
        assert read(journal) == [b"%d" % number for number in range(68, 100)]


async def test_half_a_frame_that_a_full_disk_took_is_taken_back(tmp_path: Path) -> None:
    body = FULL.replace("{limit}", "100") + "await asyncio.sleep(600)\n"
    with child(tmp_path, body) as process:
        assert lines(process, 1)[0].startswith(b"True")
    async with opened(tmp_path) as journal:
        written = read(journal)
        assert written == [b"before", *(b"%d" % number for number in range(len(written) - 1))]
        assert journal.damage.bytes == 0


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small tmpfs")
async def test_a_full_disk_is_written_again_once_there_is_room(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no mounts here")
    try:
        async with opened(tmp_path / "j", segment_bytes=16_000) as journal:
            for number in range(200):
                await write(journal, b"%d:" % number + b"x" * 500)
            assert journal.failing and 50 < journal.unwritten < 200
            assert len(segments(tmp_path / "j")) < 10
            batch = journal.read_batch(60, MIB)
            assert batch is not None
            journal.release(batch)
            await until(lambda: len(segments(tmp_path / "j")) < 4 or not journal.failing)
            rest = read(journal, release=True)
            assert [int(record.split(b":")[0]) for record in [*batch.records, *rest]] == list(range(200))
            await until(lambda: not journal.failing)
            await write(journal, b"after")
            assert journal.unwritten == 0 and read(journal) == [b"after"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


async def test_a_journal_dir_that_was_removed_and_made_again_is_written_without_a_restart(tmp_path: Path) -> None:
    root = tmp_path / "journal"
    async with opened(root, segment_bytes=50) as journal, opened(root) as other:
        await write(journal, *numbered(5))
        shutil.rmtree(root)
        await write(journal, *numbered(1, first=5))
        assert journal.failing and journal.unwritten == 1 and not root.exists(), "a disk that is not mounted looks so"
        root.mkdir()
        await until(lambda: not journal.unwritten)
        for number in range(6, 20):
            await write(journal, *numbered(1, first=number))
        assert other.adopt_orphans() == 0, "it is locked"
        await _crash(journal)
        assert other.adopt_orphans() == 1
        assert read(other, release=True) == numbered(15, first=5)
        assert read(journal) == numbered(20)
        journal._closed = True
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("what", ["folder removed", "segment removed", "folder moved"])
async def test_once_the_segment_is_gone_records_go_to_another_from_the_next_sync_on(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as journal, opened(tmp_path) as other:
        await write(journal, b"before")
        (gone,) = journal._own.path.glob("*.segment")
        if what == "segment removed":
            gone.unlink()
        elif what == "folder moved":
            journal._own.path.rename(tmp_path / "moved")
        else:
            shutil.rmtree(journal._own.path)
        await write(journal, b"with it")
        await until(lambda: journal._own.active is None)
        assert f"{gone.name}" in str([vars(record).get("segment") for record in caplog.records])
        await write(journal, b"after")
        assert not journal.unwritten
        await _crash(journal)
        assert other.adopt_orphans() == 1
        assert read(other, release=True) == [b"after"]
        assert read(journal) == [b"before", b"with it", b"after"], "from memory"
        journal._closed = True


async def test_a_folder_that_was_made_again_is_not_written_while_another_process_holds_it(tmp_path: Path) -> None:
    async with opened(tmp_path, segment_bytes=10) as journal:
        await write(journal, b"first")
        shutil.rmtree(journal._own.path)
        journal._own.path.mkdir()
        theirs = os.open(journal._own.path / "lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(theirs, fcntl.LOCK_EX)
        await write(journal, b"second")
        assert journal.unwritten == 1 and segments(tmp_path) == []
        (journal._own.path / "lock").unlink()  # as at the end of an adoption
        journal._own.path.rmdir()
        os.close(theirs)
        await until(lambda: not journal.failing)
        assert journal.unwritten == 0 and len(segments(tmp_path)) == 1
        assert read(journal, release=True) == [b"first", b"second"]
    assert list(tmp_path.iterdir()) == []


async def test_records_that_went_with_the_folder_hold_up_the_later_ones_for_a_while_only(tmp_path: Path) -> None:
    options = {"segment_bytes": 50, "tail_bytes_max": 60, "read_retry_s": 0.001, "read_tries_max": 5}
    async with opened(tmp_path, **options) as journal:
        for record in numbered(20):
            await write(journal, record)
        shutil.rmtree(journal._own.path)
        for record in numbered(20, first=20):
            await write(journal, record)
        found = []
        while journal.backlog_bytes:
            await asyncio.wait_for(journal.wait(), SOON_S)
            found += read(journal, release=True)
        assert found == sorted(found) and set(numbered(20, first=20)) <= set(found) and not journal.stalled


# A disk that gives nothing back

STARVED = """
from app.execution_log.connections import StoreAway
from app.execution_log.store import Stored
from app.execution_log.writer import LogWriter

class Store:
    away, rows = True, []

    async def insert(self, records):
        if self.away:
            raise StoreAway("refuses", None)
        self.rows += records
        return Stored(len(records), 0, 0)

async def until(holds):
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)

async def append(first, last):
    for number in range(first, last):
        await journal.append(b"record %d" % number, strict=False).wait()

store = Store()
journal = Journal.open(root, bytes_max=1 << 30, segment_bytes=90, tail_bytes_max=60, read_retry_s=0.01)
writer = LogWriter(journal, store, jitter=lambda low, high: 0.01)
await append(30, 60)
task = asyncio.create_task(writer.run())
await until(lambda: writer.away)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
store.away = False
await until(lambda: journal.stalled)
await append(60, 70)
say(f"{await writer.drain(0.1)} {journal.damage.segments}")
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
await until(lambda: len(store.rows) >= 70)
assert await writer.drain(5)
say(f"{sorted(store.rows) == sorted(b'record %d' % number for number in range(70))}")
say(f"{journal.stalled} {journal.failing} {journal.backlog_bytes} {journal.damage.segments}")
task.cancel()
await journal.close(5)
"""


async def test_without_a_free_descriptor_no_segment_is_given_up_and_every_row_arrives_later(tmp_path: Path) -> None:
    await left_behind(tmp_path, *numbered(30), ticks=10, segment_bytes=50)
    with child(tmp_path, STARVED) as process:
        assert lines(process, 3) == [b"False 0", b"True", b"False False 0 0"]
        assert process.wait(SOON_S) == 0
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def unreadable(segment: Path) -> Iterator[None]:
    """Whoever opens it and reads gets EIO, as of a bad sector."""
    aside = segment.with_suffix(".aside")
    segment.rename(aside)
    segment.symlink_to("/proc/self/mem")
    yield
    segment.unlink(missing_ok=True)
    aside.rename(segment)


async def test_an_error_that_passes_costs_nothing_and_holds_up_no_other_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await left_behind(tmp_path, *numbered(9), ticks=3, segment_bytes=10)
    first, second, third = segments(tmp_path)
    async with opened(tmp_path, read_retry_s=0.01) as journal:
        await write(journal, b"own")
        with unreadable(second):
            assert read(journal, release=True) == [*numbered(9)[0::3], b"own"]
            for _ in range(5):
                await asyncio.wait_for(journal.wait(), SOON_S)
                assert read(journal) == [] and journal.stalled
            assert not first.exists() and third.exists()
        await asyncio.wait_for(journal.wait(), SOON_S)
        assert read(journal, release=True) == [*numbered(9)[1::3], *numbered(9)[2::3]]
        assert not journal.stalled and journal.damage.bytes == 0 and journal.backlog_bytes == 0
    assert [one.message for one in caplog.records] == ["journal cannot be read, rows wait", "journal is read again"]


async def test_what_can_never_be_read_is_set_aside_after_so_many_tries_and_the_rest_arrives(tmp_path: Path) -> None:
    await left_behind(tmp_path, *numbered(9), ticks=3, segment_bytes=10)
    _, second, _ = segments(tmp_path)
    async with opened(tmp_path, read_retry_s=0.001, read_tries_max=4) as journal:
        with contextlib.suppress(FileNotFoundError), unreadable(second):
            found = read(journal, release=True)
            tries = 1
            while journal.stalled:
                await asyncio.wait_for(journal.wait(), SOON_S)
                found += read(journal, release=True)
                tries += 1
            async with asyncio.timeout(SOON_S):  # or its name would be given back while the disk's thread takes it away
                while not list(tmp_path.glob("*.damaged")):
                    await asyncio.sleep(0.001)
        assert found == [*numbered(9)[0::3], *numbered(9)[2::3]] and tries == 4
        assert journal.damage.segments == 1
    assert len(list(tmp_path.glob("*.damaged"))) == 1


async def test_of_a_segment_of_our_own_what_is_unreadable_alone_is_passed_over(tmp_path: Path) -> None:
    async with opened(tmp_path, tail_bytes_max=1_000, read_retry_s=0.001, read_tries_max=1) as journal:
        records = [b"%d:" % number + b"x" * 500 for number in range(600)]
        for record in records:
            await write(journal, record)
        (path,) = segments(tmp_path)
        with unreadable(path):
            for _ in range(2):
                assert journal.read_batch(1000, MIB) is None
        found = read(journal, release=True)
        assert found == records[-len(found) :]
        assert 2 * UNREADABLE_BYTES // 600 < len(records) - len(found) < 2 * UNREADABLE_BYTES // 500
        assert journal.backlog_bytes == 0


async def test_the_tail_in_memory_waits_behind_segments_that_cannot_be_read(tmp_path: Path) -> None:
    async with opened(tmp_path, tail_bytes_max=50, read_retry_s=0.001) as journal:
        for record in numbered(20):
            await write(journal, record)
        with unreadable(*segments(tmp_path)):
            assert read(journal, release=True) == [] and journal.stalled
            await write(journal, b"record 20")
            assert read(journal, release=True) == []
        await until(lambda: not journal._reading._stalls[journal._own].timer)
        assert read(journal, release=True) == numbered(21)


async def test_what_stands_before_a_bad_sector_is_read(tmp_path: Path) -> None:
    """Memory whose second page cannot be read stands for the disk; offsets in it are addresses."""
    page = mmap.PAGESIZE
    with (tmp_path / "pages").open("wb+") as file:
        file.truncate(2 * page)
        mapped = mmap.mmap(file.fileno(), 2 * page)
        file.truncate(page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    _, framing = new_header()
    records = [b"x" * 900] * 5
    mapped[:page] = framing.encode(records)[:page]
    folder = Folder.create(tmp_path / "journal", Damage())
    path = folder.segment_path(1)
    path.symlink_to("/proc/self/mem")
    folder.segments.append(Segment(1, path, address + 2 * page, framing))
    folder.cursor = Position(1, address)
    assert folder.read(100, MIB) == records[: page // 912]
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            folder.read(100, MIB)
    folder.close()


@pytest.mark.parametrize("free", range(4))
async def test_a_folder_that_met_an_error_that_passes_is_adopted_in_a_later_round(tmp_path: Path, free: int) -> None:
    """Also where it holds a segment of another version before those that were released: it stays what it is."""
    folder = await left_behind(tmp_path, *numbered(6), ticks=3, segment_bytes=10)
    _, second, _ = segments(tmp_path)
    data = bytearray(second.read_bytes())
    data[8] = data[HEADER_BYTES // 2 + 8] = 2
    second.write_bytes(data)
    async with opened(tmp_path) as journal:
        batches = [journal.read_batch(1, MIB) for _ in range(3)]
        journal.release(batches[-1])
    (tmp_path / "root").mkdir()
    body = """
    root /= "root"
    journal = Journal.open(root, bytes_max=1 << 30)
    {folder}.rename(root / "{name}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + {free}, hard))
    say(f"{journal.adopt_orphans()} {journal.adopt_orphans()}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    journal.adopt_orphans()
    say(f"{journal.read_batch(5, 1 << 20).records}")
    """
    body = body.replace("{folder}", repr(folder).replace("PosixPath", "Path")).replace("{name}", folder.name)
    with child(tmp_path, body.replace("{free}", str(free))) as process:
        expected = b"0 0" if free < 3 else b"1 0"
        assert lines(process, 2) == [expected, repr([b"record 5"]).encode()]
    assert (tmp_path / "root" / folder.name / second.name).read_bytes() == data


async def test_what_is_no_folder_of_a_journal_is_named_once_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0001795000000000-77-00aa11bb").touch()
    (tmp_path / "0001795000000000-77-00aa11cc" / "lock").mkdir(parents=True)
    async with opened(tmp_path) as journal:
        assert journal.adopt_orphans() == journal.adopt_orphans() == 0
        assert len(journal._left_alone) == 3
    assert [one.message for one in caplog.records] == ["journal folder cannot be adopted"] * 2


async def test_a_folder_that_cannot_be_adopted_is_named_once_however_often_it_is_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = await left_behind(tmp_path, b"record")
    (folder / "lock").unlink()
    (folder / "lock").symlink_to("lock")
    async with opened(tmp_path) as journal:
        assert journal.adopt_orphans() == journal.adopt_orphans() == 0
        assert [one.message for one in caplog.records] == ["journal folder cannot be adopted"]
        (folder / "lock").unlink()
        assert journal.adopt_orphans() == 1
        assert read(journal, release=True) == [b"record"]


# Damage


async def whole_segment(root: Path, records: list[bytes]) -> tuple[Path, bytes]:
    await left_behind(root, *records)
    (path,) = segments(root)
    return path, path.read_bytes()


async def test_a_tail_torn_at_any_byte_costs_the_last_record_alone(tmp_path: Path) -> None:
    records = numbered(5)
    path, data = await whole_segment(tmp_path / "made", records)
    last = len(data) - FRAME_BYTES - len(records[-1])
    for cut in range(last, len(data) + 1):
        root = tmp_path / str(cut)
        copy = root / path.parent.name / path.name
        copy.parent.mkdir(parents=True)
        copy.write_bytes(data[:cut])
        async with opened(root) as journal:
            assert read(journal, release=True) == records[: 5 if cut == len(data) else 4]
            assert journal.damage.bytes == (0 if cut == len(data) else cut - last)
        assert len(list(root.glob("*.damaged"))) == (last < cut < len(data))
        assert folders(root) == []


async def test_a_tail_of_zeros_as_a_power_cut_leaves_it_is_passed_over(tmp_path: Path) -> None:
    path, data = await whole_segment(tmp_path, numbered(5))
    path.write_bytes(data + bytes(5_000))
    async with opened(tmp_path) as journal:
        assert read(journal, release=True) == numbered(5)
        assert journal.damage.bytes == 5_000 and journal.damage.segments == 1


SAMPLE = [b"record %d " % number + bytes([number]) * (number * 13 % 90) for number in range(20)]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_flipped_bits_cost_records_but_never_invent_or_reorder_one(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def run() -> None:
        root = tmp_path_factory.mktemp("flipped")
        path, whole = await whole_segment(root, SAMPLE)
        damaged = bytearray(whole)
        flips = data.draw(st.lists(st.integers(0, len(whole) * 8 - 1), min_size=1, max_size=4, unique=True))
        for flip in flips:
            damaged[flip // 8] ^= 1 << flip % 8
        path.write_bytes(damaged)
        async with opened(root) as journal:
            found = read(journal, release=True)
        places = [SAMPLE.index(record) for record in found]
        assert places == sorted(set(places))
        if len(flips) == 1:
            assert len(found) >= len(SAMPLE) - 1
        assert folders(root) == [] or len(flips) > 1

    asyncio.run(run())


@given(cut=st.integers(0, 2_000), gone=st.integers(1, 600), put=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_a_stretch_that_is_lost_or_overwritten_costs_what_it_held_alone(
    cut: int, gone: int, put: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def run() -> None:
        root = tmp_path_factory.mktemp("stretch")
        path, whole = await whole_segment(root, SAMPLE)
        begin = HEADER_BYTES + cut % (len(whole) - HEADER_BYTES)
        path.write_bytes(whole[:begin] + put + whole[begin + gone :])
        offsets = [HEADER_BYTES]
        for record in SAMPLE:
            offsets.append(offsets[-1] + FRAME_BYTES + len(record))
        untouched = [
            record
            for record, start, end in zip(SAMPLE, offsets, offsets[1:], strict=False)
            if end <= begin or start >= begin + gone
        ]
        async with opened(root) as journal:
            found = read(journal, release=True)
        assert [record for record in found if record in untouched] == untouched
        assert set(found) <= set(SAMPLE)

    asyncio.run(run())


async def test_a_payload_that_looks_like_a_frame_is_never_taken_for_one(tmp_path: Path) -> None:
    """Whoever may send payloads must not be able to make rows of others, not even with luck in a damaged segment."""
    _, another = await whole_segment(tmp_path / "another", [b"forged"])
    path, data = await whole_segment(tmp_path / "made", [b"a" * 50, another, b"b" * 50])
    damaged = bytearray(data)
    damaged[HEADER_BYTES + 2 * FRAME_BYTES + 50 + 5] ^= 1  # in the outer record, before the forged frame
    path.write_bytes(damaged)
    async with opened(tmp_path / "made") as journal:
        assert read(journal) == [b"a" * 50, b"b" * 50]


async def test_a_segment_without_any_readable_header_is_set_aside_whole(tmp_path: Path) -> None:
    path, data = await whole_segment(tmp_path, numbered(5))
    path.write_bytes(bytes(HEADER_BYTES) + data[HEADER_BYTES:])
    async with opened(tmp_path) as journal:
        assert read(journal) == []
        assert journal.damage.bytes == len(data) and journal.damage.segments == 1
        await until(lambda: journal.size_bytes == 0)
        await until(lambda: folders(tmp_path) == [journal._own.path])
    (aside,) = tmp_path.glob("*.damaged")
    assert aside.read_bytes()[HEADER_BYTES:] == data[HEADER_BYTES:]


async def test_damage_is_reported_once_for_a_segment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, data = await whole_segment(tmp_path, SAMPLE)
    damaged = bytearray(data)
    for place in range(HEADER_BYTES, len(data), 70):
        damaged[place] ^= 255
    path.write_bytes(damaged)
    with caplog.at_level(logging.ERROR):
        async with opened(tmp_path) as journal:
            read(journal, 1, release=True)
    assert [record.getMessage() for record in caplog.records] == ["journal segment damaged"]


async def test_what_is_set_aside_is_bounded_and_the_newest_is_kept(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:016d}-1-00aa11bb-1.damaged").write_bytes(b"x")
    path, data = await whole_segment(tmp_path, numbered(5))
    path.write_bytes(data[:-1])
    async with opened(tmp_path) as journal:
        read(journal, release=True)
    left = sorted(file.name for file in tmp_path.glob("*.damaged"))
    assert len(left) == 32
    assert left[-1].startswith(path.parent.name)


async def test_a_segment_of_another_version_stays_where_it_is_for_that_version_to_find(tmp_path: Path) -> None:
    folder = await left_behind(tmp_path, *numbered(6), ticks=3, segment_bytes=10)
    _, second, _ = segments(tmp_path)
    data = bytearray(second.read_bytes())
    data[8] = data[HEADER_BYTES // 2 + 8] = 2
    second.write_bytes(data)
    for _ in range(2):  # the second process finds nothing else in it
        async with opened(tmp_path) as journal:
            found = read(journal, release=True)
            assert found == [] or found == [*numbered(6)[0::3], *numbered(6)[2::3]]
            assert journal.damage.other_versions == 1 and journal.damage.bytes == 0
            assert journal.adopt_orphans() == 0
            await until(lambda: journal.size_bytes == 0)
    assert [path.name for path in folder.glob("*.segment")] == [second.name]
    assert second.read_bytes() == data


@pytest.mark.parametrize("checkpoint", [b"", b"\x00" * 36, b"garbage", None])
async def test_a_lost_or_torn_checkpoint_means_that_rows_are_offered_again(
    tmp_path: Path, checkpoint: bytes | None
) -> None:
    async with opened(tmp_path) as journal:
        await write(journal, *numbered(10))
        batch = journal.read_batch(4, MIB)
        assert batch is not None
        journal.release(batch)
        path = journal._own.path / "checkpoint"
    if checkpoint is None:
        flipped = bytearray(path.read_bytes())
        flipped[20] ^= 1
        checkpoint = bytes(flipped)
    path.write_bytes(checkpoint)
    async with opened(tmp_path) as journal:
        assert read(journal) == numbered(10)


async def test_a_checkpoint_beyond_the_end_of_what_a_power_cut_left_is_the_end(tmp_path: Path) -> None:
    async with opened(tmp_path) as journal:
        await write(journal, *numbered(10))
        batch = journal.read_batch(8, MIB)
        assert batch is not None
        journal.release(batch)
    (path,) = segments(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    async with opened(tmp_path) as journal:
        assert read(journal) == []
        await until(lambda: folders(tmp_path) == [journal._own.path])


# In memory alone


async def test_the_buffered_log_keeps_order_and_forgets_what_is_released() -> None:
    log = BufferedLog(bytes_max=MIB)
    assert log.append(b"first", strict=True) is COMMITTED
    for record in numbered(10):
        log.append(record)
    await asyncio.wait_for(log.wait(), SOON_S)
    batch = log.read_batch(4, MIB)
    assert batch is not None and batch.records == [b"first", *numbered(3)]
    assert read(log) == numbered(7, first=3)
    log.release(batch)
    log.rewind()
    assert read(log, 3, release=True) == numbered(7, first=3)
    assert log.size_bytes == log.backlog_bytes == 0


async def test_the_buffered_log_drops_what_finds_no_room_and_counts_it() -> None:
    log = BufferedLog(bytes_max=1_000, rows_max=5)
    for record in numbered(7):
        assert log.reserve(10_000)
        log.append(record)
        log.unreserve(10_000)
    assert log.dropped == 2 and read(log, release=True) == numbered(5)
    log.append(b"x" * 2_000)
    assert log.dropped == 3 and read(log) == []
    log.append(b"never read")
    await log.close()
    assert log.dropped == 4
