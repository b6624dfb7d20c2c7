"""Writes frames to a folder's newest segment, and begins another when that is full or seems bad.

Knows neither ticks nor commits; every failure of the disk goes to the caller. Called by the journal.
"""

from __future__ import annotations

import contextlib
import errno
import os

from app.execution_log.batch import Block
from app.execution_log.folders import Folder, Segment
from app.execution_log.segments import HEADER_BYTES, new_header
from app.execution_log.syncing import Syncing


class SegmentWriter:
    """The only one that writes to a folder's segments. Their files are closed in the disk's thread."""

    def __init__(self, folder: Folder, syncing: Syncing, segment_bytes: int) -> None:
        self._folder = folder
        self._syncing = syncing
        self._segment_bytes = segment_bytes
        self._sequence = 0
        self._fd = -1

    def write(self, block: Block) -> None:
        """Write what of the block is not released yet, all of it or nothing. Raises OSError."""
        segment = self._folder.active
        if segment is None or segment.size_bytes >= self._segment_bytes:
            segment = self._begin()
        assert segment.framing is not None
        frames = segment.framing.encode(block.unreleased())
        try:
            _write_whole(self._fd, frames, segment.size_bytes)
        except OSError:
            self._take_back(segment)
            raise
        block.place(segment.sequence, segment.size_bytes, len(frames))
        segment.size_bytes += len(frames)
        self._syncing.note_written(len(frames))

    def retire(self) -> None:
        """Write no more to this segment; the next block begins another."""
        if self._folder.active is not None:
            self._folder.active = None
            self._syncing.retire(self._fd)
            self._fd = -1

    def _begin(self) -> Segment:
        self.retire()
        self._folder.hold()
        header, framing = new_header()
        self._sequence += 1
        path = self._folder.segment_path(self._sequence)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _write_whole(fd, header, 0)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        segment = Segment(self._sequence, path, HEADER_BYTES, framing)
        self._folder.segments.append(segment)
        self._folder.active = segment
        self._fd = fd
        self._syncing.note_new_file(fd, path)
        return segment

    def _take_back(self, segment: Segment) -> None:
        """No half a frame stays behind. The next attempt is made with another file, should this one be bad."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, segment.size_bytes)
        if segment.size_bytes > HEADER_BYTES:  # an empty one is kept: attempts go on for as long as the disk is full
            self.retire()


def _write_whole(fd: int, data: bytes, offset: int) -> None:
    """Each round writes something, so it ends."""
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        more = os.pwrite(fd, memoryview(data)[written:], offset + written)
        if more == 0:
            raise OSError(errno.EIO, "nothing was written")
        written += more
