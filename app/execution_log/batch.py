"""What goes from the log's memory to the writer: blocks of one tick's records, batches made of them.

A block knows where it stands in its segment once it is written, so that a part of it can be released.
"""

from __future__ import annotations

from app.execution_log.folders import Folder, Position
from app.execution_log.segments import FRAME_BYTES

NOWHERE = Position(0, 0)


class Block:
    """The records of one tick."""

    __slots__ = ("_first_written", "_written_bytes", "number", "records", "released", "segment", "size_bytes", "start",
                 "taken")  # fmt: skip

    def __init__(self, number: int, records: list[bytes], size_bytes: int) -> None:
        self.number = number
        self.records = records
        self.size_bytes = size_bytes
        """With their frames; without what was released before it was written."""
        self.taken = 0
        """Records that the writer has read."""
        self.released = 0
        """Records that the database has, while the block is in memory alone."""
        self.segment = 0
        """Sequence number; 0 while it is not written."""
        self.start = 0
        self._first_written = 0
        self._written_bytes = 0

    def unreleased(self) -> list[bytes]:
        return self.records[self.released :] if self.released else self.records

    def place(self, segment: int, start: int, written_bytes: int) -> None:
        """It has been written there, without what was released before."""
        self.segment = segment
        self.start = start
        self._first_written = self.released
        self._written_bytes = written_bytes

    def offset_of(self, rows: int) -> int:
        """Where in the segment the first so many records end."""
        if rows == len(self.records):
            return self.start + self._written_bytes
        return self.start + _framed_bytes(self.records[self._first_written : rows])

    def take(self, into: list[bytes], rows_max: int, bytes_max: int) -> int:
        """Move records that are not taken yet to the end of a list of at most `rows_max`; how many bytes they are.
        The first one of the list may be larger than `bytes_max`."""
        first = self.taken
        if not first and len(into) + len(self.records) <= rows_max and self.size_bytes <= bytes_max:
            self.taken = len(self.records)
            into += self.records
            return self.size_bytes
        taken_bytes = 0
        while self.taken < len(self.records) and len(into) + self.taken - first < rows_max:
            size_bytes = len(self.records[self.taken]) + FRAME_BYTES
            if taken_bytes + size_bytes > bytes_max and (into or self.taken > first):
                break
            taken_bytes += size_bytes
            self.taken += 1
        into += self.records[first : self.taken]
        return taken_bytes

    def release(self, rows: int) -> int:
        """The database has the first so many records, though they were never written; how many bytes that frees."""
        freed_bytes = _framed_bytes(self.records[self.released : rows])
        self.released = rows
        self.size_bytes -= freed_bytes
        return freed_bytes


class Batch:
    """Records for the writer, in order. What else it holds is the log's own."""

    __slots__ = ("block", "block_rows", "folder", "position", "records")

    def __init__(
        self,
        records: list[bytes],
        folder: Folder | None = None,
        position: Position = NOWHERE,
        block: Block | None = None,
        block_rows: int = 0,
    ) -> None:
        self.records = records
        self.folder = folder
        self.position = position
        self.block = block
        self.block_rows = block_rows


def _framed_bytes(records: list[bytes]) -> int:
    return sum(map(len, records)) + FRAME_BYTES * len(records)
