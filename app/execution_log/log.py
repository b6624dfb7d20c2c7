"""The log as the executor sees it: room before a call runs, a record after it, and a commit that the door waits for.

`ExecutionLog` holds the journal, the memory of mode buffered and their writers; `ToolLog` is one tool's view of it,
with the tool's own mode and payloads. Never awaits on a call's way. Opened, watched and drained by the service.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Literal, Protocol

from app.calls import Execution, ToolCall
from app.errors import DependencyUnavailable
from app.execution_log.commit import COMMITTED, Commit
from app.execution_log.journal import BufferedLog, Journal, Make
from app.execution_log.record import Payloads, Recorder
from app.execution_log.writer import OUTCOMES, LogWriter

logger = logging.getLogger("app.execution_log")

Mode = Literal["durable", "strict", "buffered"]

ADOPTED_EVERY_S = 30.0
"""Between two looks for journals whose processes have ended."""


class Intake(Protocol):
    """Where records go first: the journal or memory."""

    @property
    def unwritten(self) -> int:
        """Records that are in memory alone because the disk took none."""

    def reserve(self, size_bytes: int) -> bool: ...
    def unreserve(self, size_bytes: int) -> None: ...
    def append_made(
        self, make: Make, call: ToolCall, execution: Execution, reserved_bytes: int, strict: bool
    ) -> Commit: ...


class ToolLog:
    """What one tool's rows hold and where they go."""

    __slots__ = ("_cost", "_intake", "_observe_s", "_payloads", "_recorder", "_reserved_bytes", "_strict", "_version")

    def __init__(
        self,
        intake: Intake,
        recorder: Recorder,
        mode: Mode,
        payloads: Payloads,
        version: str,
        cost: int,
        observe_s: Callable[[float], None],
    ) -> None:
        self._intake = intake
        self._recorder = recorder
        self._strict = mode == "strict"
        self._payloads = payloads
        self._version = version
        self._cost = cost
        self._observe_s = observe_s
        self._reserved_bytes = recorder.bytes_max(payloads)

    def reserve(self) -> None:
        """Before a call runs. Raises DependencyUnavailable when its row would find no room, or no disk that takes it:
        what was running then is answered from memory, what comes then would be promised what cannot be kept."""
        if self._intake.unwritten or not self._intake.reserve(self._reserved_bytes):
            raise DependencyUnavailable("The log has no room for this call's row", retry_after_ms=1000)

    def unreserve(self) -> None:
        """The call did not run after all."""
        self._intake.unreserve(self._reserved_bytes)

    def append(self, call: ToolCall, execution: Execution) -> Commit:
        """After a call has run, or was cut off while it did. Never raises; gives the room back."""
        return self._intake.append_made(self._record, call, execution, self._reserved_bytes, self._strict)

    def _record(self, call: ToolCall, execution: Execution) -> bytes:
        begin = perf_counter()
        gone = call.client is not None and call.client.is_gone
        record = self._recorder.record(call, execution, self._version, self._cost, self._payloads, gone)
        # Copied: what orjson returns holds 4 KB for as long as it lives, and thousands of these wait.
        copied = bytes(memoryview(record))
        self._observe_s(perf_counter() - begin)
        return copied


class NoLog(ToolLog):
    """ENABLE_DATABASE_LOGGING=false."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def reserve(self) -> None:
        pass

    def unreserve(self) -> None:
        pass

    def append(self, call: ToolCall, execution: Execution) -> Commit:
        return COMMITTED


NO_LOG = NoLog()


class ExecutionLog:
    """All that is logged of one process. Without an intake of a mode, no tool may have that mode."""

    def __init__(
        self,
        recorder: Recorder,
        mode: Mode,
        payloads: Payloads,
        journal: Journal | None,
        memory: BufferedLog | None,
        writers: tuple[LogWriter, ...],
        adopted_every_s: float = ADOPTED_EVERY_S,
    ) -> None:
        self._recorder = recorder
        self._mode = mode
        self._payloads = payloads
        self._journal = journal
        self._memory = memory
        self._writers = writers
        self._adopted_every_s = adopted_every_s
        self.observe_s: Callable[[float], None] = lambda seconds: None
        """Told what the making of each record took; hung in by the service."""

    def for_tool(self, version: str, cost: int, mode: Mode | None, payloads: Payloads | None) -> ToolLog:
        """A tool's log; None is the service's own mode, or payloads."""
        mode = mode or self._mode
        intake = self._memory if mode == "buffered" else self._journal
        if intake is None:
            return NO_LOG
        return ToolLog(intake, self._recorder, mode, payloads or self._payloads, version, cost, self.observe_s)

    # What is seen of it

    @property
    def rows(self) -> Mapping[str, int]:
        """For `execution_log_rows_total{outcome}`."""
        return {outcome: sum(writer.counts[outcome] for writer in self._writers) for outcome in OUTCOMES}

    @property
    def lag_s(self) -> float:
        """Age of the oldest record that the database does not have."""
        return max((writer.lag_s() for writer in self._writers), default=0.0)

    @property
    def journal_bytes(self) -> int:
        """Of records that are no rows yet, on disk and in memory."""
        return sum(intake.backlog_bytes for intake in (self._journal, self._memory) if intake is not None)

    @property
    def problems(self) -> list[str]:
        """What `/readyz` says, to anyone who asks: why is in the service's own log."""
        problems = []
        if any(writer.away for writer in self._writers):
            problems.append(f"database away for {self.lag_s:.0f} s, rows wait")
        if self._journal is not None and self._journal.failing:
            problems.append(f"journal cannot be written or synced, {self._journal.unwritten} rows are in memory alone")
        if self._journal is not None and self._journal.stalled:
            problems.append("journal cannot be read, rows wait")
        if self._is_full():
            problems.append("journal full, calls are refused")
        return problems

    def _is_full(self) -> bool:
        if self._journal is None:
            return False
        size_bytes = self._recorder.bytes_max(self._payloads)
        if not self._journal.reserve(size_bytes):
            return True
        self._journal.unreserve(size_bytes)
        return False

    # Its life

    async def adopt(self) -> None:
        """For ever: take over journals whose processes have ended."""
        while True:
            await asyncio.sleep(self._adopted_every_s)
            if self._journal is not None:
                self._journal.adopt_orphans()

    async def drain(self, timeout_s: float) -> None:
        """Write what is there to the database, bounded; what was not stays in the journal."""
        await asyncio.gather(*(writer.drain(timeout_s) for writer in self._writers))
        if self._journal is not None and self._journal.backlog_bytes:
            left = {"journal_bytes": self._journal.backlog_bytes, "waited_s": timeout_s}
            logger.warning("rows are left to the next start", extra=left)
