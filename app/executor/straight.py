"""A call from its slot to its Execution without a coroutine of its own.

The store of limits calls it back, and a tool that waits does; everything else on its way happens at once. It walks the
executor's own steps in the executor's order: `Executor.begin` says which calls it is for, `Executor.execute` has the
way of all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import Context, copy_context
from time import perf_counter
from typing import Any, Protocol

from app.breaker import SUCCEEDED
from app.calls import CurrentCall, Execution, ToolCall, current_call
from app.errors import InternalError, RunFailed, ToolServiceError
from app.executor.on_loop import CANCELLED, LoopRun
from app.executor.run import Passage, ToolState
from app.executor.runner import Runner
from app.executor.running import RunningCalls
from app.limits.adaptive import LoadControl
from app.limits.admission import Admission
from app.limits.concurrency import Slots
from app.limits.policy import Bound
from app.limits.store import Ask, StoreAway, Verdict
from app.tools.registry import Registry
from app.tools.tool import Tool

logger = logging.getLogger("app.executor")

Then = Callable[[Execution], None]
"""Gets the Execution, once. Must not raise."""


class Steps(Protocol):
    """What the executor lends to a call on the straight way."""

    admission: Admission
    calls: RunningCalls
    control: LoadControl
    registry: Registry
    runner: Runner
    slots: Slots

    def arguments_of(self, call: ToolCall, tool: Tool) -> dict[str, Any]: ...
    def timeout_of(self, call: ToolCall, state: ToolState) -> float: ...
    def run_in_place(
        self, call: ToolCall, run: Passage, state: ToolState, arguments: dict[str, Any], deadline: float
    ) -> Any: ...
    def begin_run(
        self,
        call: ToolCall,
        run: Passage,
        state: ToolState,
        arguments: dict[str, Any],
        deadline: float,
        then: Callable[[LoopRun], None],
    ) -> LoopRun: ...
    def ran_in_place(self, state: ToolState, run_s: float) -> None: ...
    def learn_how_long(self, state: ToolState, run_s: float) -> None: ...
    def tell_breaker(
        self, call: ToolCall, run: Passage, state: ToolState, timeout_s: float, probe: None, error: BaseException
    ) -> None: ...
    def finish(self, run: Passage, execution: Execution) -> None: ...


class StraightCall(Passage):
    """One call on the straight way. It is made with a slot in its hand, of slow calls too if it is one, and gives them
    back.

    For the store of limits it is the waiter; it is decided once that has answered, or somebody has cancelled it."""

    __slots__ = (
        "_arguments",
        "_ask",
        "_bound",
        "_context",
        "_decided",
        "_entered",
        "_has_slow_slot",
        "_on_loop",
        "_reserved",
        "_steps",
        "_then",
        "_timeout_s",
    )

    state: ToolState
    _arguments: dict[str, Any]
    _ask: Ask
    _context: Context

    def __init__(self, steps: Steps, call: ToolCall, state: ToolState, bound: Bound, then: Then) -> None:
        Passage.__init__(self, call, state)
        self._steps = steps
        self._bound = bound
        self._then = then
        self._timeout_s = 0.0
        self._decided = self._entered = self._reserved = False
        self._has_slow_slot = state.is_slow
        self._on_loop: LoopRun | None = None
        """Its run, where the tool waits."""

    def begin(self) -> None:
        """Up to the verdict of its limits or, where none binds it, to its run, and to its end where that does not
        wait."""
        self._context = copy_context()  # its own: what validators and tools set is seen by no other call
        self._context.run(self._begin)

    def _begin(self) -> None:
        current_call.set(CurrentCall.of(self.call))
        try:
            self._prepare()
            self.state.log.reserve()
            self._reserved = True
            if self._bound.limits:
                granted = self._steps.admission.admit_for(self, self._bound, self.state.cost)
                if type(granted) is Ask:
                    self._ask = granted
                    return
                self.grant = granted  # type: ignore[assignment]  # the other of the two
            self._decided = True
            if self.state.in_place:
                self._conclude(self._ran())
            else:
                self._let_run()
        except Exception as error:
            self._conclude(self._refused(error))

    def _prepare(self) -> None:
        steps, call, state = self._steps, self.call, self.state
        steps.calls.enter(self)
        self._entered = True
        self.began = perf_counter()
        steps.registry.lookup(call.tool_id, call.caller)
        self.found = perf_counter()
        self._arguments = steps.arguments_of(call, state.tool)
        self.validated = self.asked = perf_counter()
        self._timeout_s = steps.timeout_of(call, state)

    # For the store of limits

    def done(self) -> bool:
        return self._decided

    def set_result(self, verdict: Verdict, /) -> None:
        self._go_on(verdict)

    def set_exception(self, error: StoreAway, /) -> None:
        self._go_on(None)

    def _go_on(self, verdict: Verdict | None) -> None:
        self._decided = True
        self._context.run(self._judged, verdict)

    def _judged(self, verdict: Verdict | None) -> None:
        admission = self._steps.admission
        try:
            if verdict is None:
                self.grant = admission.without_store(self._ask)
            else:
                self.grant = admission.judged(self._ask, verdict)
            if self.state.in_place:
                self._conclude(self._ran())
            else:
                self._let_run()
        except Exception as error:
            self._conclude(self._refused(error))

    # For who cancels it

    def cancel(self) -> bool:
        if self._on_loop is not None:
            return self._on_loop.cancel()
        if self._decided:
            return False
        self._decided = True
        self._conclude(self.ended("cancelled", error=CANCELLED))
        return True

    # Its run and its end

    def _let_run(self) -> None:
        self.started = started = perf_counter()
        self._on_loop = self._steps.begin_run(
            self.call, self, self.state, self._arguments, started + self._timeout_s, self._ran_on_loop
        )

    def _ran_on_loop(self, run: LoopRun) -> None:
        steps, call, state = self._steps, self.call, self.state
        self._on_loop = run  # on Python 3.12 it may have ended before it is known here
        self.run_ended = ended = perf_counter()
        self.run_s = ended - self.started
        try:
            steps.learn_how_long(state, self.run_s)
            value = steps.runner.returned(run, state.tool, call.execution_id)
            execution = self._succeeded(steps.runner.encode(state.tool, value))
        except RunFailed as failed:
            execution = self._failed(failed)
        except Exception as error:
            execution = self._refused(error)
        self._on_loop = None
        self._conclude(execution)

    def _ran(self) -> Execution:
        steps, call, state = self._steps, self.call, self.state
        self.started = started = perf_counter()
        try:
            try:
                value = steps.run_in_place(call, self, state, self._arguments, started + self._timeout_s)
            finally:
                self.run_ended = ended = perf_counter()
                self.run_s = ended - started
                steps.ran_in_place(state, self.run_s)
            return self._succeeded(steps.runner.encode(state.tool, value))
        except RunFailed as failed:
            return self._failed(failed)

    def _succeeded(self, result: bytes) -> Execution:
        self.encoded = perf_counter()
        breaker = self.state.breaker
        if not breaker.quiet:
            breaker.ended(self.call.caller.tenant, self.started, SUCCEEDED, None)
        return self.ended("success", result)

    def _failed(self, failed: RunFailed) -> Execution:
        self._steps.tell_breaker(self.call, self, self.state, self._timeout_s, None, failed)
        return self.failed(failed)

    def _refused(self, error: Exception) -> Execution:
        if not isinstance(error, ToolServiceError):
            logger.error("call failed inside", exc_info=error, extra={"execution_id": self.call.execution_id})
            error = InternalError()
        return self.ended("failed", refusal=error)

    def _conclude(self, execution: Execution) -> None:
        """Its only end. Never raises: others wait in the same tick."""
        steps = self._steps
        self._decided = True
        steps.slots.release()
        if self._has_slow_slot:
            steps.control.slow_slots.release()
        if self._reserved and not self.attempts:
            self.state.log.unreserve()
        if self._entered:
            steps.calls.leave(self)
        try:
            steps.finish(self, execution)
        except Exception:
            logger.exception("end of a call failed", extra={"execution_id": self.call.execution_id})
        try:
            self._then(execution)
        except Exception:
            logger.exception("answer to a call failed", extra={"execution_id": self.call.execution_id})
        del self._then
