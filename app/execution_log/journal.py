"""The journal: records are on disk before their answers leave, and stay there until the database has them.

All records of one event-loop tick are written by one system call; a thread syncs them. What the writer reads comes
from memory while it keeps up and from the segments when it does not, so that memory stays flat. Folders of processes
that have ended are adopted and read first. Knows neither rows nor databases: a record is bytes. The executor reserves
and appends, the writer reads and releases, the service opens and closes (docs/adr/0013-journal.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from contextvars import Context
from functools import partial
from pathlib import Path

from app.calls import Execution, ToolCall
from app.execution_log.appending import SegmentWriter
from app.execution_log.batch import Batch, Block
from app.execution_log.buffered import BufferedLog
from app.execution_log.commit import COMMITTED, Commit
from app.execution_log.disk import DiskThread
from app.execution_log.folders import Damage, Folder, JournalError, Position, Segment, orphans_in
from app.execution_log.reading import RETRY_S as READ_RETRY_S
from app.execution_log.reading import TRIES_MAX as READ_TRIES_MAX
from app.execution_log.reading import Reading
from app.execution_log.segments import FRAME_BYTES, HEADER_BYTES, RECORD_BYTES_MAX
from app.execution_log.syncing import INTERVAL_S, PATIENCE_S, Syncing

__all__ = ["COMMITTED", "Batch", "BufferedLog", "Commit", "Journal", "JournalError"]

logger = logging.getLogger("app.execution_log")

SEGMENT_BYTES_MAX = 16_777_216
"""Large enough that a new file is rare, small enough that drained ones are soon given back."""

SEGMENTS_MIN = 8
"""Of a full journal: its last segment is drained but kept, so that part of the room is not to be had."""

TAIL_BYTES_MAX = 4_194_304
"""Of records kept in memory for the writer: ten thousand small ones, half a second of the highest rate."""

UNWRITTEN_BYTES_MAX = 16_777_216
"""Of records kept in memory while the disk takes none; past it calls are refused before they run."""

WRITE_BYTES_MAX = 4_194_304
"""Written in one go once the disk takes records again: a few milliseconds of the event loop."""

RETRY_S = 0.25
"""Between two attempts to write to a disk that has failed."""

CLOSE_S = 2.0

ADOPTED_MAX = 64
"""Folders held at once; each takes two descriptors. More are adopted when these are drained."""

DAMAGED_FILES_MAX = 32
DAMAGED_BYTES_MAX = 67_108_864
"""Of segments set aside for someone to look at; the oldest go first."""


Make = Callable[[ToolCall, Execution], bytes]
"""Makes a record, of at most what was reserved for it. Never raises."""


class Journal:
    """One per process. All but the disk's thread happens on the event loop, and nothing here but `close` awaits."""

    def __init__(
        self,
        root: Path,
        own: Folder,
        damage: Damage,
        *,
        bytes_max: int,
        segment_bytes: int,
        tail_bytes_max: int,
        sync_interval_s: float,
        sync_patience_s: float,
        read_retry_s: float,
        read_tries_max: int,
    ) -> None:
        self.damage = damage
        self.dropped = 0
        """Records lost: too large for any frame, or appended after the close."""
        self.write_failures = 0
        self._root = root
        self._own = own
        self._retire_bytes = segment_bytes // 4
        self._tail_bytes_max = tail_bytes_max
        self._loop = asyncio.get_running_loop()
        self._context = Context()
        """Not that of the call whose record comes first: what is said of the disk is not said of it."""
        self._disk = DiskThread()
        self._syncing = Syncing(self._disk, [own.path, root], sync_interval_s, sync_patience_s, self._taken_away)
        self._writer = SegmentWriter(own, self._syncing, segment_bytes)
        self._room = bytes_max - HEADER_BYTES * (bytes_max // segment_bytes + 2)
        self._used = 0
        self._reserved = 0
        self._closed = False
        # The tick that is being gathered
        self._records: list[bytes] = []
        self._size_bytes = 0
        self._to_make: list[tuple[Make, ToolCall, Execution]] = []
        self._reserved_by_those = 0
        self._scheduled = False
        self._commit = Commit(self._loop)
        self._strict: Commit | None = None
        # Written or to be written
        self._blocks_made = 0
        self._unwritten: deque[Block] = deque()
        self._unwritten_bytes = 0
        self._write_failing = False
        self._retry_timer: asyncio.TimerHandle | None = None
        # To be read
        self._adopted: list[Folder] = []
        self._left_alone = {own.path.name}
        """Those that can never be adopted."""
        self._not_yet: set[str] = set()
        """Those that could not be adopted when it was tried last, which was said."""
        self._readable = asyncio.Event()
        self._reading = Reading(self._readable.set, read_retry_s, read_tries_max)
        self._tail: deque[Block] = deque()
        self._tail_bytes = 0
        self._behind = False
        """What comes before the tail is to be read from the segments."""

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        bytes_max: int,
        segment_bytes: int | None = None,
        tail_bytes_max: int = TAIL_BYTES_MAX,
        sync_interval_s: float = INTERVAL_S,
        sync_patience_s: float = PATIENCE_S,
        read_retry_s: float = READ_RETRY_S,
        read_tries_max: int = READ_TRIES_MAX,
    ) -> Journal:
        """A folder of this process's own in `root`, and every orphaned one adopted. Raises JournalError."""
        damage = Damage()
        journal = cls(
            root,
            Folder.create(root, damage),
            damage,
            bytes_max=bytes_max,
            segment_bytes=segment_bytes or min(SEGMENT_BYTES_MAX, bytes_max // SEGMENTS_MIN),
            tail_bytes_max=tail_bytes_max,
            sync_interval_s=sync_interval_s,
            sync_patience_s=sync_patience_s,
            read_retry_s=read_retry_s,
            read_tries_max=read_tries_max,
        )
        journal.adopt_orphans()
        return journal

    # What is seen of it

    @property
    def size_bytes(self) -> int:
        """What counts against the bound: records of segments that are still there, and those not written yet."""
        return self._used

    @property
    def backlog_bytes(self) -> int:
        """Of records that the database does not have yet."""
        return (
            self._own.unreleased_bytes
            + sum(folder.unreleased_bytes for folder in self._adopted)
            + self._unwritten_bytes
            + self._size_bytes
        )

    @property
    def failing(self) -> bool:
        """The disk takes no records, or does not sync them: answers leave all the same."""
        return self._write_failing or self._syncing.failing

    @property
    def stalled(self) -> bool:
        """Records on disk cannot be read now; others are read meanwhile, but for those of the same folder."""
        return self._reading.stalled

    @property
    def unwritten(self) -> int:
        """Records that are in memory alone because the disk took none."""
        if not self._unwritten:
            return 0  # asked for before every call
        return sum(len(block.records) - block.released for block in self._unwritten)

    # For the executor

    def reserve(self, size_bytes: int) -> bool:
        """Take room for a record before its call runs; to be given back once the record is appended."""
        wanted = self._reserved + size_bytes + FRAME_BYTES
        if self._used + wanted > self._room:
            return False
        if self._write_failing and self._unwritten_bytes + wanted > UNWRITTEN_BYTES_MAX:
            return False
        self._reserved = wanted
        return True

    def unreserve(self, size_bytes: int) -> None:
        self._reserved -= size_bytes + FRAME_BYTES

    def append(self, record: bytes, *, strict: bool) -> Commit:
        """Take a record in. Never waits and never fails; the commit is shared by the records of the tick."""
        size_bytes = len(record) + FRAME_BYTES
        if self._closed or size_bytes > RECORD_BYTES_MAX:
            self.dropped += 1
            return COMMITTED
        self._used += size_bytes
        self._size_bytes += size_bytes
        self._records.append(record)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush, context=self._context)
        if not strict:
            return self._commit
        if self._strict is None:
            self._strict = Commit(self._loop)
        return self._strict

    def append_made(
        self, make: Make, call: ToolCall, execution: Execution, reserved_bytes: int, strict: bool
    ) -> Commit:
        """`append` for a record that is made when the tick ends, beside its others: one function for all of them in a
        row takes half the time that it takes in the middle of each call. Gives the room back that it reserved."""
        if self._closed:
            self.dropped += 1
            return COMMITTED
        self._to_make.append((make, call, execution))
        self._reserved_by_those += reserved_bytes + FRAME_BYTES
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush, context=self._context)
        if not strict:
            return self._commit
        if self._strict is None:
            self._strict = Commit(self._loop)
        return self._strict

    # Writing

    def _make_all(self) -> None:
        calls, self._to_make = self._to_make, []
        self._reserved -= self._reserved_by_those
        self._reserved_by_those = 0
        size_bytes = 0
        for make, call, execution in calls:
            record = make(call, execution)
            if len(record) + FRAME_BYTES > RECORD_BYTES_MAX:
                self.dropped += 1
                continue
            size_bytes += len(record) + FRAME_BYTES
            self._records.append(record)
        self._used += size_bytes
        self._size_bytes += size_bytes

    def _flush(self) -> None:
        """One write for all records of the tick that has just ended."""
        self._scheduled = False
        if self._to_make:
            self._make_all()
        records, size_bytes, commit, strict = self._records, self._size_bytes, self._commit, self._strict
        self._records, self._size_bytes, self._commit, self._strict = [], 0, Commit(self._loop), None
        try:
            if records:  # else `close` was faster, or none of them fits a frame
                self._blocks_made += 1
                self._keep(Block(self._blocks_made, records, size_bytes))
            if strict is not None:
                self._syncing.hold(strict)
        finally:
            commit.complete()
            if records:
                self._readable.set()

    def _keep(self, block: Block) -> None:
        self._unwritten.append(block)
        self._unwritten_bytes += block.size_bytes
        self._tail.append(block)
        self._tail_bytes += block.size_bytes
        if not self._write_failing:
            self._write_all()
        while self._tail_bytes > self._tail_bytes_max and self._tail[0].segment:
            self._forget_oldest()

    def _write_all(self, bytes_max: int = WRITE_BYTES_MAX) -> bool:
        """Write what is in memory alone, about so much of it. False: the disk does not take it."""
        room_bytes = bytes_max
        while self._unwritten and room_bytes > 0:
            block = self._unwritten[0]
            try:
                self._writer.write(block)
            except OSError as error:
                self._write_failed(error)
                return False
            self._unwritten.popleft()
            self._unwritten_bytes -= block.size_bytes
            room_bytes -= block.size_bytes
        return True

    def _write_failed(self, error: OSError) -> None:
        self.write_failures += 1
        if not self._write_failing:
            self._write_failing = True
            logger.error("journal cannot be written", extra={"errno": error.errno, "reason": error.strerror})
        self._retry_timer = self._loop.call_later(RETRY_S, self._retry)

    def _taken_away(self) -> None:
        """Somebody removed the segment that is written, or its folder: what comes next goes to another."""
        active = self._own.active
        if active is not None:
            logger.error("journal segment was taken away", extra={"segment": str(active.path)})
            self._writer.retire()

    def _retry(self) -> None:
        if not self._write_all():
            return
        if self._unwritten:
            self._retry_timer = self._loop.call_later(0, self._retry)  # what is next has its turn in between
        else:
            self._write_failing = False
            logger.warning("journal is written again")

    # For the writer

    async def wait(self) -> None:
        """Returns when there may be something to read: after a tick's write, an adoption, a rewind."""
        await self._readable.wait()

    def read_batch(self, rows_max: int, bytes_max: int) -> Batch | None:
        """The next records in order, at least one, of at most so many rows and bytes; None when there are none now.

        A single record may be larger than `bytes_max`. Offered once, and again after `rewind` or another start.
        """
        for folder in list(self._adopted):
            batch = self._read_folder(folder, rows_max, bytes_max, None)
            if batch is not None:
                return batch if batch.records else None  # a pause in a long scan of damage
        if self._behind:
            batch = self._read_folder(self._own, rows_max, bytes_max, self._tail_begins())
            if batch is not None:
                return self._topped_up(batch, rows_max, bytes_max) if batch.records else None
            if self._reading.is_stalled(self._own):  # to release the tail would be to release what is before it
                self._readable.clear()
                return None
            self._behind = False
        batch = self._read_tail([], rows_max, bytes_max)
        if batch is None:
            self._readable.clear()
        return batch

    def _topped_up(self, batch: Batch, rows_max: int, bytes_max: int) -> Batch:
        """Where the segments were read up to the tail, with what follows there. By the next time each tick would have
        moved the tail's begin on, by as much as is read then: a writer once behind would stay so."""
        if self._own.cursor != self._tail_begins():
            return batch
        self._behind = False
        size_bytes = sum(map(len, batch.records)) + FRAME_BYTES * len(batch.records)
        return self._read_tail(batch.records, rows_max, bytes_max - size_bytes) or batch

    def release(self, batch: object) -> None:
        """The database has this batch, and everything that was read before it."""
        assert isinstance(batch, Batch) and batch.folder is not None
        position = batch.position
        if batch.block is not None:
            position = self._release_block(batch.block, batch.block_rows)
        self._discard(batch.folder, batch.folder.release(position))
        active = self._own.active
        if active is not None and active.size_bytes >= self._retire_bytes and self._is_drained():
            self._writer.retire()
            self._discard(self._own, self._own.release(self._own.released))

    def rewind(self) -> None:
        """Offer everything again that is not released: for a writer that has lost its batches."""
        for folder in (*self._adopted, self._own):
            folder.rewind()
        self._tail.clear()
        self._tail_bytes = 0
        self._behind = True
        for block in self._unwritten:
            block.taken = block.released
            self._tail.append(block)
            self._tail_bytes += block.size_bytes
        self._readable.set()

    def adopt_orphans(self) -> int:
        """Take over folders whose processes have ended; their records are read before ours. Called again and again."""
        adopted = 0
        known = self._left_alone | {folder.path.name for folder in self._adopted}
        orphans = _orphans(self._root)
        self._not_yet.intersection_update(path.name for path in orphans)
        for path in orphans:
            if len(self._adopted) >= ADOPTED_MAX:
                break
            if path.name not in known:
                adopted += self._adopt(path)
        if adopted:
            self._readable.set()
        return adopted

    def _adopt(self, path: Path) -> bool:
        try:
            folder = Folder.adopt(path, self.damage)
        except OSError as error:
            self._not_adopted(path, error)
            return False
        self._not_yet.discard(path.name)
        if folder is None:
            return False
        self._used += folder.frames_bytes
        self._adopted.append(folder)
        logger.info("journal folder adopted", extra={"folder": str(path), "backlog_bytes": folder.unreleased_bytes})
        self._discard(folder, folder.release_damage())
        return True

    def _not_adopted(self, path: Path, error: OSError) -> None:
        """Tried again in the next round and said once, unless it is no folder of a journal at all."""
        if isinstance(error, NotADirectoryError | IsADirectoryError):
            self._left_alone.add(path.name)
        if path.name not in self._not_yet:
            self._not_yet.add(path.name)
            logger.error("journal folder cannot be adopted", extra={"folder": str(path), "reason": error.strerror})

    def _read_folder(self, folder: Folder, rows_max: int, bytes_max: int, end: Position | None) -> Batch | None:
        """None: it has no more up to `end`, or none now. A batch without records: the scan of damage pauses."""
        records = self._reading.read(folder, rows_max, bytes_max, end)
        if records is None:
            self._discard(folder, folder.release_damage())
            return None
        return Batch(records, folder, folder.cursor)

    def _tail_begins(self) -> Position | None:
        """Where in the segments the first record of the tail stands; None: after their end."""
        if self._tail and self._tail[0].segment:
            block = self._tail[0]
            return Position(block.segment, block.offset_of(block.taken))
        return None

    def _read_tail(self, records: list[bytes], rows_max: int, bytes_max: int) -> Batch | None:
        """With the first of the tail after these; None where there is none, or no room for it."""
        room_bytes = bytes_max
        block: Block | None = None
        while self._tail and len(records) < rows_max and room_bytes > 0:
            block = self._tail[0]
            room_bytes -= block.take(records, rows_max, room_bytes)
            if block.taken < len(block.records):
                break
            self._tail.popleft()
            self._tail_bytes -= block.size_bytes
        if block is None:
            return None
        return Batch(records, self._own, self._own.released, block, block.taken)

    def _forget_oldest(self) -> None:
        """Drop the oldest block of the tail; the writer will find it in the segments."""
        block = self._tail.popleft()
        self._tail_bytes -= block.size_bytes
        if not self._behind:
            self._behind = True
            self._own.cursor = self._own.handed_out = Position(block.segment, block.offset_of(block.taken))

    def _release_block(self, block: Block, rows: int) -> Position:
        """Where that block's first so many records end; what is in memory alone up to there need not be written."""
        while self._unwritten and self._unwritten[0].number < block.number:
            self._release_unwritten(self._unwritten[0], len(self._unwritten[0].records))
        if block.segment:
            return Position(block.segment, block.offset_of(rows))
        if block.released < rows:
            self._release_unwritten(block, rows)
        segments = self._own.segments
        return Position(segments[-1].sequence, segments[-1].size_bytes) if segments else self._own.released

    def _release_unwritten(self, block: Block, rows: int) -> None:
        freed_bytes = block.release(rows)
        if block.taken < len(block.records):
            self._tail_bytes -= freed_bytes
        self._used -= freed_bytes
        self._unwritten_bytes -= freed_bytes
        if block.released == len(block.records):
            self._unwritten.remove(block)

    def _is_drained(self) -> bool:
        return not self._unwritten and not self._records and not self._own.unreleased_bytes

    def _discard(self, folder: Folder, segments: list[Segment]) -> None:
        """Remove what is done with, in the disk's thread: to unlink a large file takes milliseconds."""
        for segment in segments:
            work = partial(_set_aside if segment.damaged_bytes else _unlink, segment, self._root)
            self._disk.submit(work, partial(self._discarded, segment))
        if folder in self._adopted and not folder.segments:
            self._adopted.remove(folder)
            self._reading.forget(folder)
            if folder.other_versions:
                self._left_alone.add(folder.path.name)
                self._used -= sum(segment.frames_bytes for segment in folder.other_versions)
                folder.close()
            else:
                self._disk.submit(folder.remove, _ignore)

    def _discarded(self, segment: Segment, error: OSError | None) -> None:
        self._used -= segment.frames_bytes
        if error is not None:
            logger.error(
                "journal segment cannot be removed", extra={"segment": str(segment.path), "reason": error.strerror}
            )

    # The end

    async def close(self, within_s: float = CLOSE_S) -> None:
        """Write and sync what is left, bounded, and unlock. A folder without backlog is taken away."""
        if self._closed:
            return
        self._flush()
        self._closed = True
        if self._unwritten:
            self._write_all(bytes_max=self._unwritten_bytes)
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        self._reading.close()
        if self._unwritten:
            self.dropped += self.unwritten
            logger.critical("journal closed with records unwritten", extra={"records": self.unwritten})
        drained = self._is_drained()
        self._writer.retire()
        self._syncing.close()
        if drained:
            self._discard(self._own, self._own.release(self._own.released))
            self._disk.submit(self._own.remove, _ignore)
        if await self._disk.finish(within_s):
            for folder in (self._own, *self._adopted):
                folder.close()
        self._syncing.release()


def _orphans(root: Path) -> list[Path]:
    try:
        return orphans_in(root)
    except OSError as error:
        logger.error("journal folder cannot be listed", extra={"folder": str(root), "reason": error.strerror})
        return []


def _unlink(segment: Segment, root: Path) -> None:
    segment.path.unlink(missing_ok=True)


def _set_aside(segment: Segment, root: Path) -> None:
    """Keep a damaged segment for someone to look at, and as many others as may be kept, the newest first."""
    segment.path.rename(root / f"{segment.path.parent.name}-{segment.sequence}.damaged")
    kept_bytes = 0
    for number, path in enumerate(sorted(root.glob("*.damaged"), reverse=True)):
        with contextlib.suppress(FileNotFoundError):  # another process tidies up as well
            kept_bytes += path.stat().st_size
            if number >= DAMAGED_FILES_MAX or (number and kept_bytes > DAMAGED_BYTES_MAX):
                path.unlink()


def _ignore(error: OSError | None) -> None:
    """A folder that could not be removed is empty, and is tried again by the next who adopts."""
