"""Moves records from the journal to the log's sink: in batches, in their order, one at a time, for as long as it takes.

One coroutine and one connection, whatever the database does: while it is away the batch in hand is tried again, and
the rest waits where it is. Knows neither files nor SQL. The service runs it, and drains it at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import orjson

from app.execution_log.columns import COLUMNS
from app.execution_log.connections import StoreAway
from app.execution_log.store import Stored

ROWS_MAX = 1_000
"""Of a batch: more is hardly cheaper (docs/adr/0014), and less is thrown away when it fails."""

BYTES_MAX = 1_048_576
"""Of a batch; one record may be larger. Joining and sending it holds the loop for about a millisecond."""

AGE_S = 0.1
"""How long a record waits for others to share its batch."""

BEHIND_BYTES = 262_144
"""Of records that wait after a batch: with so many, nobody need wait for more. 20,000 calls/s make less in a batch's
time and AGE_S."""

BACKOFF_S_MIN = 0.1
BACKOFF_S_MAX = 5.0
DRAIN_RETRY_S = 0.5
"""A drain has no patience for the whole wait, yet must not spin."""

SAID_EVERY_S = 10.0
"""An hour without the database is 360 lines, not one for each try."""

OUTCOMES = ("written", "duplicate", "dead", "dropped")

logger = logging.getLogger("app.execution_log")


class Batch(Protocol):
    """Some of the oldest records."""

    @property
    def records(self) -> Sequence[bytes]: ...


class Source(Protocol):
    """Where records wait: the journal, or memory."""

    @property
    def dropped(self) -> int:
        """Records that were never kept, for want of room."""

    @property
    def backlog_bytes(self) -> int:
        """Of records that are not released."""

    @property
    def stalled(self) -> bool:
        """There are records that cannot be read now; it tries again by itself."""

    async def wait(self) -> None:
        """Returns when there is a record to read."""

    def read_batch(self, rows_max: int, bytes_max: int) -> Batch | None:
        """The oldest records that were not read yet, at least one; None when there is none now."""

    def release(self, batch: Batch) -> None:
        """They are in the database: forget them. Batches come back in the order in which they were read."""


class LogSink(Protocol):
    """Where rows go. Raises StoreAway."""

    async def write(self, records: Sequence[bytes]) -> Stored: ...


class LogWriter:
    """Owns the batch in hand and what is counted of rows."""

    def __init__(
        self,
        source: Source,
        sink: LogSink,
        now: Callable[[], float] = time.time,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._source = source
        self._sink = sink
        self._now = now
        self._jitter = jitter
        self._counts = dict.fromkeys(OUTCOMES, 0)
        self._oldest_s: float | None = None
        self._away: StoreAway | None = None
        self._away_since = 0.0
        self._said_at: dict[str, float] = {}
        self._hurry = asyncio.Event()
        self._drained = asyncio.Event()

    @property
    def counts(self) -> dict[str, int]:
        """For `execution_log_rows_total{outcome}`."""
        return {**self._counts, "dropped": self._source.dropped}

    def lag_s(self) -> float:
        """Age of the oldest record that is no row, by the time at which its call ended; 0 when there is none."""
        return 0.0 if self._oldest_s is None else max(0.0, self._now() - self._oldest_s)

    @property
    def away(self) -> bool:
        """Whether the last try failed."""
        return self._away is not None

    @property
    def reason(self) -> str:
        """Why the last try failed; empty when it did not."""
        return self._away.reason if self._away is not None else ""

    async def run(self) -> None:
        """For ever. Expected failures are handled here; anything else is a bug and ends the process in order."""
        full = False
        while True:
            if not full:
                await self._gather()
            batch = self._source.read_batch(ROWS_MAX, BYTES_MAX)
            if batch is None:
                full = False
                if self._hurry.is_set() and not await self._has_more():
                    self._hurry.clear()
                    self._drained.set()
                continue
            self._oldest_s = self._made_at(batch.records[0])
            await self._write(batch)
            self._source.release(batch)
            waiting_bytes = self._source.backlog_bytes
            # What is left came after the last of these.
            self._oldest_s = self._made_at(batch.records[-1]) if waiting_bytes else None
            full = waiting_bytes >= BEHIND_BYTES or len(batch.records) >= ROWS_MAX

    async def drain(self, timeout_s: float) -> bool:
        """Write all that is there, at once; whether it was done in time. What was not stays in the source."""
        self._drained.clear()
        self._hurry.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()
        return self._drained.is_set()

    async def _has_more(self) -> bool:
        """Whether the source only paused: a journal does, in a long scan of damage and while its disk errs."""
        if self._source.stalled:
            await asyncio.sleep(DRAIN_RETRY_S)
            return True
        waiting = asyncio.ensure_future(self._source.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        return waiting.done() and waiting.exception() is None

    async def _gather(self) -> None:
        """Wait for a record, then for more to go with it; a drain ends both."""
        waiting = asyncio.ensure_future(self._source.wait())
        hurrying = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait({waiting, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            hurrying.cancel()
        if waiting.done():
            waiting.result()
        await self._pause(AGE_S)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    async def _write(self, batch: Batch) -> None:
        """Returns when every record of it is a row or a dead letter."""
        backoff_s = BACKOFF_S_MIN
        while True:
            try:
                stored = await self._sink.write(batch.records)
            except StoreAway as error:
                self._note_away(error)
                await self._back_off(self._jitter(BACKOFF_S_MIN, backoff_s))
                backoff_s = min(backoff_s * 2, BACKOFF_S_MAX)
            else:
                self._note_back()
                self._count(stored)
                return

    async def _back_off(self, seconds: float) -> None:
        if self._hurry.is_set():
            await asyncio.sleep(min(seconds, DRAIN_RETRY_S))
        else:
            await self._pause(seconds)

    def _count(self, stored: Stored) -> None:
        self._counts["written"] += stored.written
        self._counts["duplicate"] += stored.duplicates
        self._counts["dead"] += stored.parked
        if stored.parked and self._due("dead"):
            logger.error("rows refused by the database", extra={"dead": self._counts["dead"]})

    def _due(self, kind: str) -> bool:
        """Whether lines of this kind may have another one."""
        now = self._now()
        due = abs(now - self._said_at.get(kind, -math.inf)) >= SAID_EVERY_S
        if due:
            self._said_at[kind] = now
        return due

    def _note_away(self, error: StoreAway) -> None:
        if self._away is None:
            self._away_since = time.monotonic()
        if self._due("away"):
            logger.warning(
                "log database away, rows wait",
                extra={"reason": error.reason, "sqlstate": error.sqlstate, "lag_s": round(self.lag_s(), 1)},
            )
        self._away = error

    def _note_back(self) -> None:
        if self._away is not None:
            self._away = None
            del self._said_at["away"]  # the next time is news again
            logger.info("log database back", extra={"away_s": round(time.monotonic() - self._away_since, 1)})

    def _made_at(self, record: bytes) -> float:
        try:
            return float(orjson.loads(record)[FINISHED_AT])
        except (ValueError, TypeError, IndexError):  # damaged: the sink will say so
            return self._now()


FINISHED_AT = COLUMNS.index("finished_at")
