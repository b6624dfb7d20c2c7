"""The log of mode buffered: records wait in memory alone, bounded; what finds no room is dropped and counted.

Looks like the journal to the executor and to the writer. Knows no file.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from app.calls import Execution, ToolCall
from app.execution_log.batch import Batch
from app.execution_log.commit import COMMITTED, Commit
from app.execution_log.segments import FRAME_BYTES

ROWS_MAX = 200_000
"""Small records take more memory than their bytes: 200,000 of them about 100 MB."""


class BufferedLog:
    """A queue of records. Those that were read stay until they are released."""

    failing = False
    stalled = False
    unwritten = 0

    def __init__(self, bytes_max: int, rows_max: int = ROWS_MAX) -> None:
        self.dropped = 0
        self._bytes_max = bytes_max
        self._rows_max = rows_max
        self._waiting: deque[bytes] = deque()
        self._in_hand: deque[Batch] = deque()
        self._rows = 0
        self._used = 0
        self._readable = asyncio.Event()

    @property
    def size_bytes(self) -> int:
        return self._used

    @property
    def backlog_bytes(self) -> int:
        return self._used

    def reserve(self, size_bytes: int) -> bool:
        """No call is refused for want of room here."""
        return True

    def unreserve(self, size_bytes: int) -> None:
        """Nothing was taken."""

    def append(self, record: bytes, *, strict: bool = False) -> Commit:
        """Take a record in, or drop it where there is no room. The answer need not wait either way."""
        size_bytes = len(record) + FRAME_BYTES
        if self._used + size_bytes > self._bytes_max or self._rows >= self._rows_max:
            self.dropped += 1
            return COMMITTED
        self._used += size_bytes
        self._rows += 1
        self._waiting.append(record)
        self._readable.set()
        return COMMITTED

    def append_made(
        self,
        make: Callable[[ToolCall, Execution], bytes],
        call: ToolCall,
        execution: Execution,
        reserved_bytes: int,
        strict: bool,
    ) -> Commit:
        """As the journal's; made at once, for nobody waits for a tick here."""
        return self.append(make(call, execution))

    async def wait(self) -> None:
        """Returns when there may be something to read."""
        await self._readable.wait()

    def read_batch(self, rows_max: int, bytes_max: int) -> Batch | None:
        """As the journal's."""
        if not self._waiting:
            self._readable.clear()
            return None
        records: list[bytes] = []
        while self._waiting and len(records) < rows_max:
            bytes_max -= len(self._waiting[0]) + FRAME_BYTES
            if bytes_max < 0 and records:
                break
            records.append(self._waiting.popleft())
        batch = Batch(records)
        self._in_hand.append(batch)
        return batch

    def release(self, batch: object) -> None:
        """The database has this batch, and everything that was read before it."""
        while self._in_hand:
            first = self._in_hand.popleft()
            self._rows -= len(first.records)
            self._used -= sum(map(len, first.records)) + FRAME_BYTES * len(first.records)
            if first is batch:
                break

    def rewind(self) -> None:
        """Offer everything again that is not released."""
        while self._in_hand:
            self._waiting.extendleft(reversed(self._in_hand.pop().records))
        self._readable.set()

    async def close(self) -> None:
        """What the writer has not read by now is lost, and counted."""
        self.dropped += self._rows
        self._waiting.clear()
        self._in_hand.clear()
        self._rows = self._used = 0
