"""The pipeline that every tool call walks, in one straight line with one epilogue.

Cheapest refusal first. Whatever happens, `execute` returns an Execution, and `finish` runs once and never awaits.
Called by the transport's methods and by plans; knows neither HTTP nor JSON-RPC.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from time import perf_counter
from typing import Any

from app.breaker import NO_BREAKER, OPEN, SAYS_NOTHING, SUCCEEDED, Outcome, Probe, ToolBreaker, outcome_of
from app.bus import Bus
from app.calls import Caller, Client, CurrentCall, Execution, ToolCall, current_call
from app.egress import EgressClient
from app.errors import (
    InternalError,
    Overloaded,
    RunFailed,
    ToolServiceError,
)
from app.execution_log.log import NO_LOG, ExecutionLog, ToolLog
from app.executor.on_loop import CANCELLED, UNWIND_S, LoopRun
from app.executor.reuse import Replayed, Reuse, Wanted
from app.executor.run import LONG_IN_PLACE_S, Passage, Run, ToolState
from app.executor.runner import Interrupt, Runner, cancelled_from_outside
from app.executor.running import RunningCalls
from app.executor.slots import CallSlots, NoPlace
from app.executor.straight import StraightCall, Then
from app.limits.adaptive import LoadControl
from app.limits.admission import Admission, Asked, Grant, status
from app.limits.concurrency import QUEUE_PATIENCE_S, take_all_now
from app.limits.policy import Bound
from app.stepping import IN_TASK, settle
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import OFF, Tracing
from app.tools.registry import Registry, may_call
from app.tools.tool import Tool, ToolContext

logger = logging.getLogger("app.executor")


class Executor:
    """Executes tool calls. One per service; everything it needs comes in by the constructor."""

    def __init__(
        self,
        registry: Registry,
        runner: Runner,
        control: LoadControl,
        admission: Admission,
        log: ExecutionLog | None,
        reuse: Reuse,
        bus: Bus,
        http: EgressClient,
        metrics: Metrics,
        *,
        timeout_ceiling_s: float,
        rebuild_validators: bool = False,
        breakers: bool = True,
        tracing: Tracing = OFF,
    ) -> None:
        self.registry = registry
        self.timeout_ceiling_s = timeout_ceiling_s
        self.runner = runner
        self.control = control
        self.slots = control.slots
        self.admission = admission
        self._log = log
        self._reuse = reuse
        reuse.fetch = self._fetch
        self.calls = RunningCalls(bus)
        self._breakers = breakers
        self._call_slots = CallSlots(control)
        self._http = http
        self.metrics = metrics
        self._tracing = tracing
        self._tracing_stage = metrics.stages["tracing"]
        self._metrics_stage = metrics.stages["metrics"]
        self._rebuild_validators = rebuild_validators
        self._states: dict[str, ToolState] = {}

    @property
    def concurrency(self) -> int:
        """Calls between their arrival and their answer."""
        return len(self.calls)

    @property
    def queue_depth(self) -> int:
        """Calls waiting for a slot."""
        of_tools = sum(state.slots.queued for state in self._states.values() if state.slots)
        return of_tools + self._call_slots.queued

    @property
    def abandoned(self) -> int:
        """Runs that were given up and still live."""
        return sum(state.abandoned.active for state in self._states.values())

    def crowded_out(self, caller: Caller, tool_id: str, agent_id: str | None) -> Overloaded | None:
        """Why a call that is not made yet would be refused at once, where the process has no slot for it, if that is
        so. Under overload refusing is most of the work: such a call gets no id, and nobody looks at its parameters. Not
        for one with an idempotency key, which may have its answer already."""
        slots, slow_slots = self.slots, self.control.slow_slots
        if slots.running < slots.limit and slow_slots.running < slow_slots.limit and not self.control.shedding:
            return None
        state = self._states.get(tool_id)
        if state is None or state.reused or not state.breaker.quiet or not self.registry.holds(state.tool):
            return None
        if not self.calls.accepting or not may_call(caller, state.tool.spec):
            return None
        bound = self._bound(caller, tool_id, agent_id)
        no_place = self._call_slots.no_place(state, bound, caller.tenant, self._patience_s(state, state.timeout_s))
        return None if no_place is None else no_place.refusal(bound)

    def begin(self, call: ToolCall, then: Then) -> bool:
        """Run a call without a coroutine where nothing in its way can wait but the store of limits and the tool, or
        refuse it where it would find no place to wait for a slot. `then` gets its Execution, before this returns or
        later. False: nothing was done, and `execute` is the way."""
        state = self._states.get(call.tool_id)
        if state is None or call.idempotency_key is not None or not state.breaker.quiet:
            return False
        if not self.registry.holds(state.tool):
            return False
        bound = self.bound(call)
        takes = self._take_slow_slots if state.is_slow else self.slots.take_now
        sheds = self.control.shedding and self._call_slots.sheds(state)
        if state.straight and not bound.slots and not sheds and takes():
            StraightCall(self, call, state, bound, then).begin()
            return True
        patience_s = self._patience_s(state, self.timeout_of(call, state))
        no_place = None if state.reused else self._call_slots.no_place(state, bound, call.caller.tenant, patience_s)
        if no_place is None:
            return False
        self._turn_away(call, state, bound, no_place, then)
        return True

    def _turn_away(self, call: ToolCall, state: ToolState, bound: Bound, no_place: NoPlace, then: Then) -> None:
        """Refuse it, for what else is wrong with it if there is something. Under overload that is most of the work: it
        is entered nowhere and has no context of its own but for what a validator may set."""
        run = Passage(call, state)
        refusal: ToolServiceError
        try:
            self.calls.check(call)
            self.registry.lookup(call.tool_id, call.caller)
            copy_context().run(self.arguments_of, call, state.tool)
            refusal = no_place.refusal(bound)
        except ToolServiceError as error:
            refusal = error
        execution = run.ended("failed", refusal=refusal)
        self.finish(run, execution)
        then(execution)

    def _take_slow_slots(self) -> bool:
        return take_all_now((self.control.slow_slots, self.slots))

    def _patience_s(self, state: ToolState, timeout_s: float) -> float:
        return self.control.patience_s(state.hold_s, min(QUEUE_PATIENCE_S, timeout_s))

    async def execute(self, call: ToolCall) -> Execution:
        """Run one call to its end. Raises nothing but CancelledError, when the whole request is cancelled."""
        return await self._execute(Run(call))

    async def _fetch(self, call: ToolCall) -> None:
        """Run it whatever is kept of earlier calls."""
        run = Run(call)
        run.fresh = True
        await self._execute(run)

    async def _execute(self, run: Run) -> Execution:
        call = run.call
        current_call.set(CurrentCall.of(call))
        try:
            self.calls.enter(run)
            try:
                execution = run.ended("success", await self._perform(call, run))
            except asyncio.CancelledError:
                execution = run.ended("cancelled", error=CANCELLED)
                if not run.interrupt.requested or cancelled_from_outside():
                    self.finish(run, execution)
                    if run.claimed is not None:
                        await self._reuse.settle(run, execution)
                    raise
            finally:
                self.calls.leave(run)
        except RunFailed as failed:
            execution = run.failed(failed)
        except Replayed as replayed:
            execution = replayed.execution
        except ToolServiceError as refusal:
            execution = run.ended("failed", refusal=refusal)
        except Exception:
            logger.exception("call failed inside", extra={"execution_id": call.execution_id})
            execution = run.ended("failed", refusal=InternalError())
        self.finish(run, execution)
        if run.claimed is not None:
            await self._reuse.settle(run, execution)
        return execution

    async def _perform(self, call: ToolCall, run: Run) -> bytes:
        run.began = perf_counter()
        tool = self.registry.lookup(call.tool_id, call.caller)
        state = self._states.get(call.tool_id)
        if state is None or state.tool is not tool:
            state = self._state_of(tool)
        run.state = state
        run.found = perf_counter()
        arguments = self.arguments_of(call, tool)
        run.validated = run.asked = perf_counter()
        timeout_s = self.timeout_of(call, state)
        bound = self.bound(call)
        if state.reused or call.idempotency_key is not None:
            return await self._reused(call, run, state, arguments, timeout_s, bound)
        return await self._performed(call, run, state, arguments, timeout_s, bound)

    async def _reused(
        self, call: ToolCall, run: Run, state: ToolState, arguments: dict[str, Any], timeout_s: float, bound: Bound
    ) -> bytes:
        """By an earlier call or one beside it, where there is one."""
        await IN_TASK

        async def spend(bound: Bound) -> None:
            if bound.limits:
                outcome = self.admission.admit(bound, state.cost)
                run.grant = await self._granted(outcome, run) if isinstance(outcome, Asked) else outcome

        def perform(timeout_s: float) -> Awaitable[bytes]:
            run.asked = perf_counter()  # what came before was no limit's time
            return self._performed(call, run, state, arguments, timeout_s, bound)

        wanted = Wanted(call, run, state, bound, timeout_s, spend, perform)
        if call.idempotency_key is not None:
            await self._reuse.claim(wanted)
        return await (self._reuse.result(wanted) if state.reused else perform(timeout_s))

    async def _performed(
        self, call: ToolCall, run: Run, state: ToolState, arguments: dict[str, Any], timeout_s: float, bound: Bound
    ) -> bytes:
        """The tool's own run, once its breaker, slots and limits allow it."""
        breaker = state.breaker
        probe = None if breaker.quiet else breaker.enter(call.caller.tenant)
        try:
            result = await self._let_run(call, run, state, arguments, timeout_s, bound)
        except BaseException as error:
            self.tell_breaker(call, run, state, timeout_s, probe, error)
            raise
        if not breaker.quiet:
            breaker.ended(call.caller.tenant, run.started, SUCCEEDED, probe)
        return result

    async def _let_run(
        self, call: ToolCall, run: Run, state: ToolState, arguments: dict[str, Any], timeout_s: float, bound: Bound
    ) -> bytes:
        of_process_alone = state.slots is None and not bound.slots and not state.is_slow
        if of_process_alone and not self._call_slots.sheds(state) and self.slots.take_now():
            release = self.slots.release
        else:
            await IN_TASK
            release = await self._call_slots.take(state, bound, run, self._patience_s(state, timeout_s))
        try:
            state.log.reserve()
            try:
                if bound.limits:
                    outcome = self.admission.admit(bound, state.cost)
                    run.grant = outcome if type(outcome) is Grant else await self._granted(outcome, run)  # type: ignore[arg-type]
                run.started = started = perf_counter()
                in_place = state.in_place  # what ended beside this run may change it
                try:
                    if state.retries is not None:
                        await IN_TASK
                        value = await self._run_again(call, run, state, arguments, started + timeout_s)
                    elif in_place:
                        value = self.run_in_place(call, run, state, arguments, started + timeout_s)
                    else:
                        await IN_TASK
                        value = await self._run(call, run, state, arguments, started + timeout_s)
                finally:
                    run.run_ended = perf_counter()
                    if run.attempts:
                        run.run_s = run.run_ended - started - run.paused_s
                        if in_place:
                            self.ran_in_place(state, run.run_s)
                        else:
                            self.learn_how_long(state, run.run_s)
            finally:
                if not run.attempts:
                    state.log.unreserve()
        finally:
            release()
        result = self.runner.encode(state.tool, value)
        run.encoded = perf_counter()
        return result

    def ran_in_place(self, state: ToolState, run_s: float) -> None:
        control = self.control
        control.quick_seen = True
        control.ended += 1
        if run_s > LONG_IN_PLACE_S or state.long_in_place:
            state.ran_in_place(run_s, perf_counter())

    def learn_how_long(self, state: ToolState, run_s: float) -> None:
        state.hold_s = self.control.ran(state.hold_s, run_s)
        state.is_slow = self.control.is_slow(state.hold_s)
        if state.in_place_again_at is not None:
            state.ran_in_task(perf_counter())

    def tell_breaker(
        self,
        call: ToolCall,
        run: Passage,
        state: ToolState,
        timeout_s: float,
        probe: Probe | None,
        error: BaseException,
    ) -> None:
        """How a call ended that has no result."""
        outcome: Outcome = SAYS_NOTHING
        if isinstance(error, RunFailed):
            cut_short = timeout_s < state.timeout_s
            outcome = outcome_of(error.cause, error.__cause__, call.parameters, cut_short=cut_short)
        if outcome is not SAYS_NOTHING or probe is not None:
            state.breaker.ended(call.caller.tenant, run.started, outcome, probe, abandoned=state.abandoned.of_several)

    async def _run_again(
        self, call: ToolCall, run: Run, state: ToolState, arguments: dict[str, Any], deadline: float
    ) -> Any:
        """Up to as many attempts as the tool declares, where a failure says that another may help."""
        retries = state.retries
        assert retries is not None
        if call.deadline is not None and call.deadline < deadline:
            deadline = call.deadline
        retries.begin(call.caller.tenant)
        last: RunFailed | None = None
        while True:
            try:
                if last is not None:
                    arguments = self.arguments_of(call, state.tool)  # the run before may have changed its own
                if state.in_place:
                    return self.run_in_place(call, run, state, arguments, deadline)
                return await self._run(call, run, state, arguments, deadline)
            except ToolServiceError:
                if last is None:
                    raise
                raise RunFailed(last.cause) from last.__cause__
            except RunFailed as failed:
                wait_s = retries.wait_s(
                    failed.cause,
                    call.caller.tenant,
                    attempts=run.attempts,
                    deadline=deadline,
                    has_key=run.claimed is not None,
                )
                if wait_s is None:
                    raise
                last = failed.with_traceback(None)
            state.series.retries += 1
            await self._pause(run, wait_s)
            if not state.breaker.quiet and state.breaker.state_now == OPEN:
                raise RunFailed(last.cause) from last.__cause__

    async def _pause(self, run: Run, wait_s: float) -> None:
        """Between two attempts; a cancellation ends it."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(wait_s, settle, over)
        run.interrupt.watch(over)
        begin = perf_counter()
        try:
            await over
        finally:
            run.paused_s += perf_counter() - begin
            timer.cancel()
        if run.interrupt.requested:  # in the tick in which it was over
            raise asyncio.CancelledError

    def run_in_place(
        self, call: ToolCall, run: Passage, state: ToolState, arguments: dict[str, Any], deadline: float
    ) -> Any:
        """A tool that never waits: no task, no timer, nothing that could be refused after all."""
        run.attempts += 1
        if call.deadline is not None and call.deadline < deadline:
            deadline = call.deadline
        context = self._context(call, deadline) if state.takes_context else None
        return self.runner.run_in_place(state.tool, arguments, context, deadline, call.execution_id)

    def begin_run(
        self,
        call: ToolCall,
        run: Passage,
        state: ToolState,
        arguments: dict[str, Any],
        deadline: float,
        then: Callable[[LoopRun], None],
    ) -> LoopRun:
        """A tool that waits: `then` gets the run once it has ended. Raises Overloaded: nothing ran."""
        run.attempts += 1
        if call.deadline is not None and call.deadline < deadline:
            deadline = call.deadline
        try:
            return self.runner.begin(state.tool, arguments, self._context(call, deadline), state.abandoned, then)
        except Overloaded:
            self._did_not_run(run)
            raise

    async def _run(self, call: ToolCall, run: Run, state: ToolState, arguments: dict[str, Any], deadline: float) -> Any:
        tool = state.tool
        watcher: asyncio.Task[None] | None = None
        try:
            run.attempts += 1
            if call.deadline is not None and call.deadline < deadline:
                deadline = call.deadline  # a plan does not wait for what waited for its slot
            context = self._context(call, deadline)
            if tool.spec.cancel_on_disconnect and call.client is not None:
                watcher = asyncio.create_task(
                    _cancel_when_gone(call.client, run.interrupt), name=f"client-watch:{call.execution_id}"
                )
            return await self.runner.run(tool, arguments, context, run.interrupt, state.abandoned)
        except Overloaded:
            self._did_not_run(run)
            raise
        finally:
            if watcher is not None:
                watcher.cancel()

    def _did_not_run(self, run: Passage) -> None:
        """Refused after all, this time."""
        run.attempts -= 1
        if not run.attempts and run.grant is not None:
            run.grant.give_back()
            run.grant = None

    async def stop(self) -> None:
        """Cancel what still runs, at the end of the process: what was cut off has a row too. Bounded."""
        await self.calls.cut_off(2 * UNWIND_S)

    def bound(self, call: ToolCall) -> Bound:
        """The limits and slots of the call."""
        return self._bound(call.caller, call.tool_id, call.agent_id)

    def _bound(self, caller: Caller, tool_id: str, agent_id: str | None) -> Bound:
        """Where nobody says who calls, the agent's own name for itself does."""
        subject = agent_id if caller.anonymous and agent_id else caller.subject
        return self.admission.bind(caller.tenant, subject, caller.limit_class, tool_id)

    async def _granted(self, asked: Asked, run: Run) -> Grant:
        """What the store says to the ask, or raise the refusal."""
        run.interrupt.watch(asked.future)
        grant = await asked.settled()
        if run.interrupt.requested:  # in the tick in which the answer came
            grant.give_back()
            raise asyncio.CancelledError
        return grant

    async def look_at_limits(self, caller: Caller, tool_id: str, agent_id: str | None) -> dict[str, Any]:
        """What is left of each limit for such a call, without spending. Raises ToolNotFound, DependencyUnavailable."""
        tool = self.registry.lookup(tool_id, caller)
        bound = self._bound(caller, tool_id, agent_id)
        cost = tool.spec.cost
        return status(tool_id, cost, await self.admission.look(bound.limits, cost))

    def arguments_of(self, call: ToolCall, tool: Tool) -> dict[str, Any]:
        try:
            return (tool.rebuilt() if self._rebuild_validators else tool).parameters.validate(call.parameters)
        except ToolServiceError:
            raise
        except BaseException as error:  # validators of the tool's author run in there; nothing awaits
            logger.exception("validator crashed", extra={"tool_id": call.tool_id, "execution_id": call.execution_id})
            raise InternalError from error

    def _state_of(self, tool: Tool) -> ToolState:
        spec = tool.spec
        log: ToolLog = NO_LOG
        if self._log is not None:
            log = self._log.for_tool(spec.version, spec.cost, spec.log_mode, spec.log_payloads)
        cached = self._reuse.cached(tool)
        breaker = ToolBreaker() if self._breakers else NO_BREAKER
        state = ToolState(tool, self.metrics.for_tool(spec.id), log, self.timeout_ceiling_s, cached, breaker)
        state.series.breaker_state = lambda: breaker.state_now
        before = self._states.get(tool.spec.id)
        if before is not None:  # the registry has another tool of this id now; what hangs of the old one still does
            state.abandoned = before.abandoned
        self._states[tool.spec.id] = state
        return state

    def timeout_of(self, call: ToolCall, state: ToolState) -> float:
        """The smallest of the tool's timeout, the caller's, the service's and what is left of the plan."""
        timeout_s = state.timeout_s
        if call.timeout_override_s is not None and call.timeout_override_s < timeout_s:
            timeout_s = call.timeout_override_s
        if call.deadline is not None:
            timeout_s = min(timeout_s, max(0.0, call.deadline - perf_counter()))
        return timeout_s

    def _context(self, call: ToolCall, deadline: float) -> ToolContext:
        context = ToolContext(
            call.execution_id,
            call.caller,
            deadline,
            self._http,
            call.agent_id,
            call.trace_id,
            call.session_id,
            call.metadata,
        )
        if call.on_progress is not None:
            context = context._replace(on_progress=call.on_progress)
        return context if call.idempotency_key is None else context._replace(idempotency_key=call.idempotency_key)

    def finish(self, run: Passage, execution: Execution) -> None:
        """The epilogue of every call. Never awaits: a slow sink must not slow a call."""
        metrics = self.metrics
        begin = perf_counter()
        kept = None
        if self._tracing.recording:
            marks = (run.found, run.validated, run.asked, run.started)
            kept = run.kept_trace = self._tracing.call_ended(run.call, execution, marks, known=run.state is not None)
            traced = perf_counter()
            self._tracing_stage.observe(traced - begin)
            begin = traced
        if run.attempts and run.state is not None:
            series = run.state.series
            series.executions[execution.status] += 1
            if kept is None:
                series.duration.observe(run.run_s)
            else:
                series.duration.observe_traced(run.run_s, kept)
            metrics.busy_s += run.run_s
            run.commit = run.state.log.append(run.call, execution)
        elif run.cached and run.state is not None:
            run.state.series.executions[execution.status] += 1
            run.commit = run.state.log.append(run.call, execution)
        metrics.observe_stages(run, run.run_s)
        if execution.result is None and not execution.replayed:
            metrics.count_outcome(execution)
        self._metrics_stage.observe(perf_counter() - begin)


async def _cancel_when_gone(client: Client, interrupt: Interrupt) -> None:
    await client.gone()
    interrupt.cancel()
