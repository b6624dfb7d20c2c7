"""The journal on real files: what was committed is found again, whatever ended the process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.execution_log.journal import COMMITTED, BufferedLog, Commit, Journal, JournalError
from app.execution_log.segments import FRAME_BYTES
from tests.execution_log.journals import (
    MIB,
    child,
    crash,
    disk_that_hangs,
    folders,
    left_behind,
    lines,
    numbered,
    opened,
    read,
    segments,
    write,
)
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio


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
        await until(lambda: journal._syncing._synced_bytes == journal._syncing._written_bytes)


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
        await crash(self.journal)
        self.journal = self.opened()
        await self.rewind()

    async def end(self) -> None:
        await self.rewind()
        assert numbers_of(read(self.journal, release=True)) == list(range(self.released_to, self.made))
        await self.journal.close(SOON_S)
        assert folders(self.root) == []


def numbers_of(records: list[bytes]) -> list[int]:
    return [int(record.split(b":")[0]) for record in records]


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
