"""The bytes of a journal segment: its header, its frames, and how whole frames are found between damaged ones.

A segment is a header, written twice so that one flipped bit cannot lose it, and frames of marker, length, CRC-32 and
record. Marker and CRC begin with random bytes of the segment and the marker with 0xFF, which no UTF-8 text holds: a
caller cannot send a payload that reads as a frame (docs/adr/0013-journal.md). Knows neither files nor rows.
"""

from __future__ import annotations

import os
import time
from struct import Struct
from typing import NamedTuple
from zlib import crc32

MAGIC = b"\x89ACTJRN\n"
VERSION = 1

_COPY = Struct("<8sIQ8sI")
"""Magic, version, microseconds of its making, salt, CRC of the rest."""

HEADER_BYTES = 2 * _COPY.size

_FRAME = Struct("<4sII")
FRAME_BYTES = _FRAME.size

RECORD_BYTES_MAX = 4_194_304
"""Twice what two payloads of the largest LOG_PAYLOAD_BYTES take; a frame that says more is damaged."""


class OtherVersion(Exception):
    """A segment that another version of this program wrote."""


class Unreadable(Exception):
    """Both copies of the header are damaged, so no frame can be known."""


class Frames(NamedTuple):
    """What was found. `end_bytes` is where to go on; `skipped_bytes` were damaged; `needed_bytes` are still to be
    read, from `end_bytes` on, before the next frame can be told."""

    records: list[bytes]
    end_bytes: int
    skipped_bytes: int
    needed_bytes: int = 0


class Framing(NamedTuple):
    """How the frames of one segment begin."""

    marker: bytes
    seed: int

    def encode(self, records: list[bytes]) -> bytes:
        marker, seed = self
        pack = _FRAME.pack
        pieces = []
        for record in records:
            pieces.append(pack(marker, len(record), crc32(record, seed)))
            pieces.append(record)
        return b"".join(pieces)

    def decode(self, data: bytes, rows_max: int, *, ends: bool) -> Frames:
        """The whole frames at the begin of `data`, at most so many. `ends`: the segment has no more after it."""
        records: list[bytes] = []
        position = skipped = 0
        size = len(data)
        while len(records) < rows_max and position < size:
            end = self._frame_end(data, position)
            if end > size and not ends:
                return Frames(records, position, skipped, end - position)
            if 0 < end <= size and self._is_whole(data, position, end):
                records.append(data[position + FRAME_BYTES : end])
                position = end
            else:
                found = self._next_marker(data, position + 1, ends=ends)
                skipped += found - position
                position = found
        return Frames(records, position, skipped)

    def _frame_end(self, data: bytes, position: int) -> int:
        """Where the frame at `position` says that it ends, perhaps beyond the data; 0 when there is none."""
        if position + FRAME_BYTES > len(data):
            return position + FRAME_BYTES
        marker, length, _ = _FRAME.unpack_from(data, position)
        if marker != self.marker or not 0 < length <= RECORD_BYTES_MAX:
            return 0
        return position + FRAME_BYTES + int(length)

    def _is_whole(self, data: bytes, position: int, end: int) -> bool:
        return bool(crc32(data[position + FRAME_BYTES : end], self.seed) == _FRAME.unpack_from(data, position)[2])

    def _next_marker(self, data: bytes, position: int, *, ends: bool) -> int:
        """Where the next frame may begin; without one the end, or as much before it as a marker may need."""
        found = data.find(self.marker, position)
        if found >= 0:
            return found
        return len(data) if ends else max(position, len(data) - len(self.marker) + 1)


def new_header() -> tuple[bytes, Framing]:
    salt = os.urandom(8)
    copy = _COPY.pack(MAGIC, VERSION, time.time_ns() // 1000, salt, 0)[:-4]
    return (copy + crc32(copy).to_bytes(4, "little")) * 2, _framing(salt)


def read_header(header: bytes) -> Framing:
    """Raises OtherVersion or Unreadable. Every version begins with magic and version, and again 32 bytes on."""
    versions = []
    for start in (0, _COPY.size):
        copy = header[start : start + _COPY.size]
        if len(copy) < _COPY.size:
            break
        magic, version, _, salt, crc = _COPY.unpack(copy)
        sound = crc == crc32(copy[:-4])
        if magic == MAGIC and version == VERSION and sound:
            return _framing(salt)
        if magic == MAGIC and version != VERSION:
            versions += [version] * (2 if sound else 1)
    if len(versions) > 1 and len(set(versions)) == 1:
        raise OtherVersion(versions[0])
    raise Unreadable


def _framing(salt: bytes) -> Framing:
    return Framing(b"\xff" + salt[:3], int.from_bytes(salt[4:], "little"))
