"""The journal where disks fail: they take nothing, give nothing back, or give back something else."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.execution_log.folders import UNREADABLE_BYTES, Damage, Folder, Position, Segment
from app.execution_log.journal import Journal
from app.execution_log.segments import FRAME_BYTES, HEADER_BYTES, new_header
from tests.execution_log.journals import (
    MIB,
    child,
    crash,
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


async def test_a_journal_for_which_there_was_no_thread_syncs_and_gives_room_back_once_there_is(tmp_path: Path) -> None:
    async with opened(tmp_path, segment_bytes=4_000) as journal:
        before = threading.stack_size(sys.maxsize // 2 + 1)  # more than there are addresses: the system refuses
        try:
            strict = journal.append(b"strict", strict=True)
            await write(journal, *[b"x" * 100] * 100)
            await write(journal, b"in another segment")
            assert len(read(journal, release=True)) == 102
            assert not strict.done and journal.size_bytes > 10_000
        finally:
            threading.stack_size(before)
        await asyncio.wait_for(strict.wait(), SOON_S)
        await until(lambda: journal.size_bytes < 4_000)
        assert not journal.failing
    assert folders(tmp_path) == []


async def test_a_journal_for_which_there_is_never_a_thread_closes_in_its_time(tmp_path: Path) -> None:
    before = threading.stack_size(sys.maxsize // 2 + 1)
    try:
        journal = Journal.open(tmp_path, bytes_max=64 * MIB)
        strict = journal.append(b"strict", strict=True)
        await journal.close(0.01)
        assert strict.done
    finally:
        threading.stack_size(before)
    assert len(segments(tmp_path)) == 1, "for whoever adopts it"
    await crash(journal)


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
        await crash(journal)
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
        await crash(journal)
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

    async def write(self, records):
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
