"""What the executor keeps: of a tool between its calls, and of a call while it is on its way."""

from __future__ import annotations

from time import perf_counter, time

from app.breaker import NO_BREAKER, ToolBreaker
from app.cache.idempotency import Claimed
from app.cache.results import CachedTool
from app.calls import Aside, Execution, Status, ToolCall
from app.errors import TOOL_CANCELLED, TOOL_TIMEOUT, Failure, RunFailed, ToolServiceError
from app.execution_log.commit import Commit
from app.execution_log.log import ToolLog
from app.executor.attempts import Retries
from app.executor.runner import Abandoned, Interrupt
from app.limits.admission import Grant
from app.limits.concurrency import Slots
from app.telemetry.metrics import ToolSeries
from app.tools.tool import Tool

_STATUS: dict[str, Status] = {TOOL_TIMEOUT.category: "timeout", TOOL_CANCELLED.category: "cancelled"}
"""What an Execution's status says of a failure's category; any other failure is `failed`."""


LONG_IN_PLACE_S = 0.0005
LONG_IN_PLACE_MAX = 3
"""A tool that computes for longer, so often in a row, goes on in a task of its own: then the calls that came with it
wait with a slot, where they are counted, limited and refused, and not in their sockets."""

IN_PLACE_AGAIN_S = 10.0
"""Then one run in place may show that it does not, and that something else held the process: a profiler, a machine that
was short of its cores."""


class ToolState:
    """What the executor keeps for one tool between calls."""

    __slots__ = (
        "abandoned",
        "breaker",
        "cached",
        "cost",
        "harmless",
        "hold_s",
        "in_place",
        "in_place_again_at",
        "is_slow",
        "log",
        "long_in_place",
        "retries",
        "reused",
        "series",
        "slots",
        "straight",
        "takes_context",
        "timeout_s",
        "tool",
    )

    def __init__(
        self,
        tool: Tool,
        series: ToolSeries,
        log: ToolLog,
        timeout_ceiling_s: float,
        cached: CachedTool | None = None,
        breaker: ToolBreaker = NO_BREAKER,
    ) -> None:
        self.tool = tool
        self.series = series
        self.log = log
        self.cost = tool.spec.cost
        self.abandoned = Abandoned()
        self.slots = None if tool.spec.max_concurrent is None else Slots(tool.spec.max_concurrent)
        self.takes_context = tool.takes_context
        self.in_place = tool.never_waits and not tool.spec.cancel_on_disconnect
        self.long_in_place = 0
        """Runs in a row that kept the loop."""
        self.in_place_again_at: float | None = None
        self.timeout_s = timeout_ceiling_s if tool.spec.timeout is None else min(tool.spec.timeout, timeout_ceiling_s)
        self.breaker = breaker
        self.retries = Retries.of(tool.spec)
        """None: a run that fails has failed."""
        self.hold_s = 0.0
        """What a run usually takes; is_slow: long enough to leave slots to others first."""
        self.is_slow = False
        self.harmless = tool.spec.read_only or tool.spec.idempotent
        """A second run does what one did."""
        self.cached = cached
        """None: its results are not kept."""
        self.reused = cached is not None or (tool.spec.read_only and not tool.never_waits)
        """A call may be answered by another one's run. What never waits never runs beside another."""
        on_loop = not tool.blocking and not tool.spec.cancel_on_disconnect
        self.straight = on_loop and self.slots is None and self.retries is None and not self.reused
        """Nothing in the way of a call can wait but the store of limits and the run itself, which nobody watches."""

    def ran_in_place(self, run_s: float, now: float) -> None:
        """Runs now and then that are long, by a pause of the machine's, say nothing."""
        if run_s < LONG_IN_PLACE_S:
            self.long_in_place = 0
            return
        self.long_in_place += 1
        if self.long_in_place >= LONG_IN_PLACE_MAX:
            self.in_place = False
            self.in_place_again_at = now + IN_PLACE_AGAIN_S

    def ran_in_task(self, now: float) -> None:
        """One more long run in place, and it is out again. What runs in place is not slow."""
        if self.in_place_again_at is not None and now >= self.in_place_again_at:
            self.in_place = True
            self.in_place_again_at = None
            self.long_in_place = LONG_IN_PLACE_MAX - 1
            self.hold_s = 0.0
            self.is_slow = False


class Passage(Aside):
    """One call on its way: what the epilogue needs. Slots, all of them set at once: a default of the class, or a dict
    that the interpreter had to make after all, costs three times as much at every look."""

    __slots__ = (
        "asked",
        "attempts",
        "began",
        "cached",
        "call",
        "encoded",
        "found",
        "run_ended",
        "run_s",
        "started",
        "state",
        "validated",
    )

    grant: Grant | None
    commit: Commit | None

    def __init__(self, call: ToolCall, state: ToolState | None) -> None:
        self.grant = self.commit = self.kept_trace = None
        self.call = call
        self.state = state
        self.attempts = 0
        self.cached = False
        """Answered by a kept result, or by the run of an identical call."""
        self.began = self.found = self.validated = self.asked = self.started = self.run_ended = self.encoded = 0.0
        """As `telemetry.metrics.Marks`."""
        self.run_s = 0.0

    def cancel(self) -> bool:
        """End what it waits for. False: too late, the call has another outcome already."""
        return False

    def ended(
        self,
        status: Status,
        result: bytes | None = None,
        error: Failure | None = None,
        refusal: ToolServiceError | None = None,
    ) -> Execution:
        call = self.call
        if refusal is not None:
            refusal.execution_id = call.execution_id
            refusal.forget_origin()
        overhead_s = perf_counter() - call.received_at - self.run_s
        return Execution(
            call.execution_id,
            call.tool_id,
            status,
            result,
            error,
            refusal,
            self.run_s,
            overhead_s if overhead_s > 0 else 0.0,
            time(),
            self.attempts,
            call.trace_id or call.execution_id.replace("-", ""),
            self.cached,
            self,
        )

    def failed(self, failed: RunFailed) -> Execution:
        return self.ended(_STATUS.get(failed.cause.category, "failed"), error=failed.cause)


class Run(Passage):
    """A call that somebody awaits, and the way to cancel it."""

    __slots__ = ("claimed", "fresh", "interrupt", "paused_s")

    def __init__(self, call: ToolCall) -> None:
        super().__init__(call, None)
        self.interrupt = Interrupt()
        self.fresh = False
        """Not to be answered by a kept result: it fetches a new one."""
        self.claimed: Claimed | None = None
        """The idempotency key that it runs under."""
        self.paused_s = 0.0
        """Of its run, the time between attempts."""

    def cancel(self) -> bool:
        return self.interrupt.cancel()
