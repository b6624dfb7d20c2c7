"""A process's folder of the journal: its lock, its segments on disk, how far they were read and released.

A folder belongs to whoever holds the lock on its `lock` file: the process that made it, and after its end the first
that adopts it. Nothing is moved or copied by an adoption, so a crash in the middle of one leaves the folder as it was.
Knows frames by `segments.py`; knows nothing of rows, ticks and the event loop. Called by the journal.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import NamedTuple
from zlib import crc32

from app.execution_log.segments import FRAME_BYTES, HEADER_BYTES, Framing, OtherVersion, Unreadable, read_header

logger = logging.getLogger("app.execution_log")

READ_BYTES = 262_144
"""Read at once: 600 small records, well under a millisecond of the event loop."""

SCAN_BYTES_MAX = 4_194_304
"""Looked through in one call where everything is damaged: about 2 ms."""

UNREADABLE_BYTES = 65_536
"""Passed over in one go where the disk does not give back what it holds: some two hundred small records."""

ATTEMPTS_MAX = 10
"""To make a folder of our own: another process may take a new one for an orphan before it is locked."""

NOT_THE_FILE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM})
"""Want of descriptors, memory or rights: however long it lasts, the file is whole."""

_NAME = re.compile(r"[0-9]{16}-[0-9]+-[0-9a-f]{8}")
_SEGMENT_NAME = re.compile(r"([0-9]{10})\.segment")

_CHECKPOINT = Struct("<8sIQQI")
_CHECKPOINT_MAGIC = b"\x89ACTCKP\n"
_CHECKPOINT_VERSION = 1


class JournalError(OSError):
    """The journal cannot be opened; the message says what to do."""


class Position(NamedTuple):
    """A place in a folder: of a segment's sequence number, and the bytes before it in that segment."""

    sequence: int
    offset: int


@dataclass(slots=True, eq=False)
class Segment:
    sequence: int
    path: Path
    size_bytes: int
    """As far as it was written."""
    framing: Framing | None = None
    damaged_bytes: int = 0

    @property
    def frames_bytes(self) -> int:
        return max(0, self.size_bytes - HEADER_BYTES)


@dataclass(slots=True)
class Damage:
    """What could not be read, counted since the start."""

    bytes: int = 0
    segments: int = 0
    other_versions: int = 0
    """Segments of another version of this program, or perhaps of one; they stay where they are, for it to find."""


class Folder:
    """Positions only grow: `released` <= `handed_out` <= `cursor`, but for a cursor that was not needed yet."""

    def __init__(self, path: Path, lock_fd: int, damage: Damage) -> None:
        self.path = path
        self.segments: deque[Segment] = deque()
        self.active: Segment | None = None
        """The one that is still written to: ours alone has one."""
        self.other_versions: list[Segment] = []
        self.released = self.handed_out = self.cursor = Position(0, HEADER_BYTES)
        self._damage = damage
        self._lock_fd = lock_fd
        self._checkpoint_fd = -1
        self._reading: tuple[Segment, int] | None = None

    @classmethod
    def create(cls, root: Path, damage: Damage) -> Folder:
        """A new folder, locked. Raises JournalError."""
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for _ in range(ATTEMPTS_MAX):
                path = root / f"{time.time_ns() // 1000:016d}-{os.getpid()}-{os.urandom(4).hex()}"
                path.mkdir(mode=0o700)
                lock_fd = _locked(path)
                if lock_fd is not None:
                    return cls(path, lock_fd, damage)._opened()
        except OSError as error:
            raise JournalError(
                error.errno,
                f"JOURNAL_DIR {root} cannot be used: {_reason(error)}; give the service a folder on a local disk that "
                "it may write to, or set JOURNAL_MODE=buffered",
            ) from error
        raise JournalError(errno.EAGAIN, f"JOURNAL_DIR {root}: no folder could be locked; try again")

    @classmethod
    def adopt(cls, path: Path, damage: Damage) -> Folder | None:
        """The folder of a process that has ended, locked for us; None when it lives or another was faster."""
        lock_fd = _locked(path)
        if lock_fd is None:
            return None
        return cls(path, lock_fd, damage)._opened()

    def hold(self) -> None:
        """Before a new segment: where folder or lock was taken away under us, they are made again. Raises OSError, also
        when another took the new folder for an orphan before it was locked: try again."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._lock_fd), (self.path / "lock").stat()):
                return
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)  # not what is above it: a disk that is not mounted must not be written beside
        lock_fd = _locked(self.path)
        if lock_fd is None:
            raise BlockingIOError(errno.EAGAIN, "the journal's folder is held by another process")
        try:
            checkpoint_fd = os.open(self.path / "checkpoint", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            os.close(lock_fd)
            raise
        for fd in (self._lock_fd, self._checkpoint_fd):
            os.close(fd)
        self._lock_fd, self._checkpoint_fd = lock_fd, checkpoint_fd
        logger.error("journal folder was taken away and is made again", extra={"folder": str(self.path)})

    @property
    def frames_bytes(self) -> int:
        return sum(segment.frames_bytes for segment in (*self.segments, *self.other_versions))

    @property
    def unreleased_bytes(self) -> int:
        """Of records that were written and not released; headers of later segments count too."""
        first = self.released
        return sum(
            max(0, segment.size_bytes - (first.offset if segment.sequence == first.sequence else HEADER_BYTES))
            for segment in self.segments
            if segment.sequence >= first.sequence
        )

    def read(self, rows_max: int, bytes_max: int, end: Position | None = None) -> list[bytes] | None:
        """The next records, up to `end`. Empty: only damage was found so far, ask again. None: no more.

        Raises OSError where they cannot be read now: all is as it was, and may be asked for again.
        """
        scanned = 0
        while scanned < SCAN_BYTES_MAX:
            segment = self._segment_at_cursor(end)
            if segment is None:
                return None
            before = self.cursor.offset
            wanted_bytes = max(FRAME_BYTES, min(bytes_max, READ_BYTES))
            records = self._read_segment(segment, rows_max, wanted_bytes, _limit(segment, end))
            if records:
                self.handed_out = self.cursor
                return records
            scanned += self.cursor.offset - before
        return []

    def pass_over_unreadable(self, end: Position | None, error: OSError) -> None:
        """`read` up to `end` raises that at the cursor again and again: go on after what stands there. Without a header
        or a file that is the rest of the segment."""
        segment = self._segment_at_cursor(end)
        assert segment is not None
        limit = _limit(segment, end)
        if segment.framing is None or isinstance(error, FileNotFoundError):
            self._pass_over_rest(segment, limit, error)
            return
        passed_bytes = min(UNREADABLE_BYTES, limit - self.cursor.offset)
        self._pass_over(segment, passed_bytes, error)
        self.cursor = Position(segment.sequence, self.cursor.offset + passed_bytes)

    def release(self, position: Position) -> list[Segment]:
        """Everything up to `position` is in the database: note it, and give back the segments that are done with."""
        if position >= self.handed_out:
            position = max(position, self.cursor)  # what was read since held no record
        if position > self.released:
            self.released = position
            self._write_checkpoint()
        finished = []
        while self.segments and self._is_finished(self.segments[0]):
            finished.append(self.segments.popleft())
        if self._reading is not None and self._reading[0] in finished:
            self._stop_reading()
        return finished

    def release_damage(self) -> list[Segment]:
        """Where nothing but damage was read since the last release, that is done with as well."""
        return self.release(self.cursor) if self.released >= self.handed_out else []

    def rewind(self) -> None:
        """Read again from what was released."""
        self.cursor = self.handed_out = self.released

    def close(self) -> None:
        """Unlock; what is in it is for whoever adopts it."""
        self._stop_reading()
        for fd in (self._checkpoint_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._checkpoint_fd = self._lock_fd = -1

    def remove(self) -> None:
        """Take it away, and unlock it. A file that is not ours keeps it in place."""
        with contextlib.suppress(OSError):
            for name in ("checkpoint", "lock"):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        self.close()

    def segment_path(self, sequence: int) -> Path:
        return self.path / f"{sequence:010d}.segment"

    def _segment_at_cursor(self, end: Position | None) -> Segment | None:
        """The segment to read next; the cursor is put into it."""
        for segment in self.segments:
            if segment.sequence < self.cursor.sequence:
                continue
            if end is not None and segment.sequence > end.sequence:
                return None
            if segment.sequence > self.cursor.sequence:
                self.cursor = Position(segment.sequence, HEADER_BYTES)
            if self.cursor.offset < _limit(segment, end):
                return segment
        return None

    def _read_segment(self, segment: Segment, rows_max: int, wanted_bytes: int, limit: int) -> list[bytes]:
        offset = self.cursor.offset
        try:
            framing = segment.framing or self._read_header(segment)
            data, ends = self._read_at(segment, offset, wanted_bytes, limit)
            frames = framing.decode(data, rows_max, ends=ends)
            if frames.needed_bytes and frames.end_bytes == 0:  # one record is larger than what was read
                wanted_bytes = max(frames.needed_bytes, wanted_bytes)
                data, ends = self._read_at(segment, offset, wanted_bytes, limit, frames.needed_bytes)
                frames = framing.decode(data, rows_max, ends=ends)
        except OtherVersion:
            self._leave_alone(segment, "of another version")
            return []
        except Unreadable as error:
            self._pass_over_rest(segment, limit, error)
            return []
        except OSError:
            self._stop_reading()  # another descriptor may do
            raise
        at_end = ends and frames.end_bytes == len(data)
        damaged_bytes = frames.skipped_bytes + (limit - offset - len(data) if at_end else 0)
        if damaged_bytes:
            self._pass_over(segment, damaged_bytes, None)
        self.cursor = Position(segment.sequence, limit if at_end else offset + frames.end_bytes)
        return frames.records

    def _read_header(self, segment: Segment) -> Framing:
        header = os.pread(self._fd_of(segment), HEADER_BYTES, 0)
        segment.framing = read_header(header)
        return segment.framing

    def _read_at(
        self, segment: Segment, offset: int, wanted_bytes: int, limit: int, needed_bytes: int = 1
    ) -> tuple[bytes, bool]:
        """At most so many bytes, and whether the segment ends with them. Raises OSError with fewer than are needed."""
        wanted_bytes = min(wanted_bytes, limit - offset)
        fd = self._fd_of(segment)
        data = os.pread(fd, wanted_bytes, offset)
        while len(data) < wanted_bytes:  # the file ends there, or cannot be read from there on
            try:
                more = os.pread(fd, wanted_bytes - len(data), offset + len(data))
            except OSError:
                if len(data) < needed_bytes:
                    raise
                return data, False
            if not more:
                return data, True
            data += more
        return data, offset + wanted_bytes == limit

    def _fd_of(self, segment: Segment) -> int:
        if self._reading is None or self._reading[0] is not segment:
            self._stop_reading()
            self._reading = (segment, os.open(segment.path, os.O_RDONLY))
        return self._reading[1]

    def _stop_reading(self) -> None:
        if self._reading is not None:
            os.close(self._reading[1])
            self._reading = None

    def _pass_over_rest(self, segment: Segment, limit: int, error: Exception) -> None:
        offset = self.cursor.offset
        self._pass_over(segment, limit - offset + (HEADER_BYTES if offset == HEADER_BYTES else 0), error)
        self.cursor = Position(segment.sequence, limit)

    def _pass_over(self, segment: Segment, size_bytes: int, error: Exception | None) -> None:
        if not segment.damaged_bytes:
            self._damage.segments += 1
            logger.error(
                "journal segment damaged",
                extra={"segment": str(segment.path), "reason": "unreadable" if error is None else repr(error)},
            )
        segment.damaged_bytes += size_bytes
        self._damage.bytes += size_bytes

    def _leave_alone(self, segment: Segment, why: str) -> None:
        self._stop_reading()
        self.segments.remove(segment)
        self.other_versions.append(segment)
        self._damage.other_versions += 1
        logger.error(
            "journal segment left where it is",
            extra={"segment": str(segment.path), "size_bytes": segment.size_bytes, "reason": why},
        )

    def _is_finished(self, segment: Segment) -> bool:
        if segment is self.active:
            return False
        sequence, offset = self.released
        return segment.sequence < sequence or (segment.sequence == sequence and segment.size_bytes <= offset)

    def _opened(self) -> Folder:
        """With the segments that a process left in it, and how far they had been released. Raises OSError, closed."""
        try:
            for path in sorted(self.path.iterdir()):
                named = _SEGMENT_NAME.fullmatch(path.name)
                if named:
                    self.segments.append(Segment(int(named[1]), path, path.stat().st_size))
            self._checkpoint_fd = os.open(self.path / "checkpoint", os.O_RDWR | os.O_CREAT, 0o600)
            checkpoint = _read_checkpoint(os.pread(self._checkpoint_fd, _CHECKPOINT.size, 0))
            if checkpoint is not None:
                self.released = checkpoint
                self._leave_other_versions()
        except OSError:
            self.close()
            raise
        self.rewind()
        return self

    def _leave_other_versions(self) -> None:
        """Whoever wrote the checkpoint passed over segments of another version: released they are not."""
        for segment in [segment for segment in self.segments if segment.sequence < self.released.sequence]:
            try:
                self._read_header(segment)
            except OtherVersion:
                self._leave_alone(segment, "of another version")
            except Unreadable:
                pass  # it was set aside, or held nothing
            except OSError as error:
                if error.errno in NOT_THE_FILE:
                    raise
                self._leave_alone(segment, repr(error))  # perhaps one of another version: not ours to remove

    def _write_checkpoint(self) -> None:
        """Not synced: should it be lost or torn, rows are offered again, and their key keeps them single."""
        body = _CHECKPOINT.pack(_CHECKPOINT_MAGIC, _CHECKPOINT_VERSION, *self.released, 0)[:-4]
        with contextlib.suppress(OSError):
            os.pwrite(self._checkpoint_fd, body + crc32(body).to_bytes(4, "little"), 0)


def _limit(segment: Segment, end: Position | None) -> int:
    """How far a segment may be read."""
    return segment.size_bytes if end is None or segment.sequence != end.sequence else end.offset


def orphans_in(root: Path) -> list[Path]:
    """Folders in the order in which they were made, whoever holds them."""
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


def _locked(folder: Path) -> int | None:
    """The descriptor that holds the folder's lock; None when another holds it or the folder has gone."""
    path = folder / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.stat()):  # not one that its last owner has just unlinked
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _read_checkpoint(data: bytes) -> Position | None:
    if len(data) == _CHECKPOINT.size and crc32(data[:-4]) == int.from_bytes(data[-4:], "little"):
        magic, version, sequence, offset, _ = _CHECKPOINT.unpack(data)
        if magic == _CHECKPOINT_MAGIC and version == _CHECKPOINT_VERSION:
            return Position(sequence, offset)
    return None


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
