"""Between validation and slots: what was answered before is not run again.

An idempotency key stands for one run, a kept result for many, a running identical call for those beside it. Whoever is
answered without a run spends rate and no quota. Tools and calls that use none of it never come here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

from app.cache.idempotency import Claimed, Idempotency, canonical_json
from app.cache.results import CachedTool, Found, ResultCache
from app.cache.singleflight import Flight, Flights, Lead, Turn
from app.calls import Execution, ToolCall, new_execution_id
from app.errors import TOOL_CANCELLED, TOOL_ERROR, TOOL_TIMEOUT, Failure, RunFailed
from app.executor.on_loop import TIMED_OUT
from app.executor.run import Run, ToolState
from app.limits.policy import Bound
from app.tools.tool import Tool

REFRESHES_MAX = 100
"""Stale results that are fetched anew at once; past it they are given as they are until they end."""

CUT_OFF = frozenset({TOOL_TIMEOUT.category, TOOL_CANCELLED.category})

CLOSE_S = 2.0
"""At the end, for outcomes of idempotency keys that the store has not taken yet."""


class Replayed(Exception):
    """Not an error: the outcome of the first call with this idempotency key."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution


class Wanted(NamedTuple):
    """A validated call that wants a result."""

    call: ToolCall
    run: Run
    state: ToolState
    bound: Bound
    timeout_s: float
    spend: Callable[[Bound], Awaitable[None]]
    """Ask these limits, and keep the grant in the run. Raises the refusal."""
    perform: Callable[[float], Awaitable[bytes]]
    """Slots, limits, the tool's own run of at most so many seconds. Raises RunFailed or a refusal."""


class Reuse:
    """One per service. `fetch`, which runs a call whatever is kept, is hung in by the executor."""

    fetch: Callable[[ToolCall], Awaitable[object]]

    def __init__(self, idempotency: Idempotency, results: ResultCache) -> None:
        self._idempotency = idempotency
        self._results = results
        self._flights = Flights()
        self._refreshing: dict[str, asyncio.Task[None]] = {}

    def cached(self, tool: Tool) -> CachedTool | None:
        """What the cache knows of a tool; None: its results are not kept."""
        spec = tool.spec
        if spec.cache_ttl is None or not self._results.keeps_any:
            return None
        schemas = canonical_json([tool.parameters.json_schema, tool.result.json_schema]) or b""
        is_object = tool.result.is_object
        return CachedTool(spec.id, spec.version, schemas, spec.cache_ttl, shared=spec.cache_shared, is_object=is_object)

    async def close(self) -> None:
        """Give up what is being fetched, and wait for outcomes on their way to the store; both bounded."""
        tasks = list(self._refreshing.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        await self._idempotency.drain(CLOSE_S)

    # Idempotency keys

    async def claim(self, wanted: Wanted) -> None:
        """The right to run, in `run.claimed`; or Replayed. Raises IdempotencyConflict, DependencyUnavailable, and what
        its limits say to a replay."""
        state = wanted.state
        claimed = await self._idempotency.claim(wanted.call, wanted.timeout_s, harmless=state.harmless)
        if isinstance(claimed, Execution):
            await wanted.spend(wanted.bound.rates)
            state.series.reuse["replayed"] += 1
            raise Replayed(replace(claimed, aside=wanted.run))
        wanted.run.claimed = claimed
        _end_if_cancelled(wanted.run)

    async def settle(self, run: Run, execution: Execution) -> None:
        """After its row is kept and before its answer leaves: the key stands for this outcome, or is free again. Goes
        on when whoever waits for it is cancelled."""
        claimed, run.claimed = run.claimed, None
        if claimed is not None:
            await self._idempotency.surely(self._settled(claimed, run, execution))

    async def _settled(self, claimed: Claimed, run: Run, execution: Execution) -> None:
        if run.commit is not None:
            await run.commit.wait()
        if _may_run_again(run, execution):
            await self._idempotency.release(claimed)
        elif execution.refusal is None:
            await self._idempotency.keep(claimed, execution)

    # Kept results and identical calls

    async def result(self, wanted: Wanted) -> bytes:
        """By whoever has it, or by `perform`. Raises as that does."""
        call, run, state = wanted.call, wanted.run, wanted.state
        parameters = canonical_json(call.parameters)
        if parameters is None:
            return await wanted.perform(wanted.timeout_s)
        key = None
        if state.cached is not None:
            key = self._results.key(state.cached, call.caller.tenant, parameters)
            if run.fresh:
                return await self._performed(wanted, key)
            if (found := self._results.look(key)) is not None:
                return await self._give(wanted, key, found)
        if call.on_progress is not None:  # of another's run it would hear nothing
            return await self._alone(wanted, key)
        flight, leads = self._flights.of(key or _identity(call, state, parameters))
        if not leads:
            turn = flight.join()
            if turn is None:
                return await wanted.perform(wanted.timeout_s)
            joined = perf_counter()
            outcome = await self._follow(wanted, flight, turn)
            if not isinstance(outcome, Lead):
                return outcome
            # Its run has what it did not wait: nobody who gave it half a second is answered after one.
            wanted = wanted._replace(timeout_s=max(0.0, wanted.timeout_s - (perf_counter() - joined)))
        return await self._lead(wanted, key, flight)

    async def _alone(self, wanted: Wanted, key: str | None) -> bytes:
        found = None if key is None else await self._fetched(wanted.state, key)
        _end_if_cancelled(wanted.run)
        if key is not None and found is not None:
            return await self._give(wanted, key, found)
        if key is not None:
            wanted.state.series.reuse["miss"] += 1
        return await self._performed(wanted, key)

    async def _performed(self, wanted: Wanted, key: str | None) -> bytes:
        result = await wanted.perform(wanted.timeout_s)
        if key is not None and wanted.state.cached is not None:
            self._results.keep(key, wanted.state.cached, result)
        return result

    async def _give(self, wanted: Wanted, key: str, found: Found) -> bytes:
        await self._without_run(wanted)
        wanted.run.cached = True
        wanted.state.series.reuse["stale" if found.stale else "hit"] += 1
        if found.stale:
            self._refresh(wanted.call, wanted.state, key)
        return found.result

    async def _without_run(self, wanted: Wanted) -> None:
        """Room for its row, then its rate."""
        wanted.state.log.reserve()
        try:
            await wanted.spend(wanted.bound.rates)
        except BaseException:
            wanted.state.log.unreserve()
            raise

    async def _lead(self, wanted: Wanted, key: str | None, flight: Flight) -> bytes:
        landed: bytes | Failure | None = None
        try:
            found = None if key is None else await self._fetched(wanted.state, key)
            if key is not None and found is not None:
                landed = found.result  # theirs, whatever this caller's limits say
            _end_if_cancelled(wanted.run)
            if key is not None and found is not None:
                return await self._give(wanted, key, found)
            if key is not None:
                wanted.state.series.reuse["miss"] += 1
            landed = await self._performed(wanted, key)
            return landed
        except RunFailed as failed:
            if not _by_own_wish(wanted, failed.cause):
                landed = failed.cause
            raise
        finally:
            if landed is None:
                flight.hand_on()
            else:
                flight.land(landed)

    async def _fetched(self, state: ToolState, key: str) -> Found | None:
        return None if state.cached is None else await self._results.fetch(key, state.cached)

    async def _follow(self, wanted: Wanted, flight: Flight, turn: Turn) -> bytes | Lead:
        """What the leader came to. Lead: it has nothing, and this call is to run. Raises RunFailed with its failure."""
        run, log = wanted.run, wanted.state.log
        ends = perf_counter() + wanted.timeout_s
        try:
            await self._without_run(wanted)
        except BaseException:
            flight.leave(turn)
            raise
        try:
            run.interrupt.watch(turn)
            await asyncio.wait({turn}, timeout=max(0.0, ends - perf_counter()))
            outcome = turn.result() if turn.done() else TIMED_OUT
            _end_if_cancelled(run)
        except BaseException:  # CancelledError, when this call was cancelled
            flight.leave(turn)
            log.unreserve()
            raise
        if isinstance(outcome, Lead):
            log.unreserve()
            if run.grant is not None:  # the run asks for itself, its quota too
                run.grant.give_back()
                run.grant = None
            return outcome
        flight.leave(turn)
        run.cached = True
        wanted.state.series.reuse["joined"] += 1
        if isinstance(outcome, Failure):
            raise RunFailed(outcome)
        return outcome

    # Stale results

    def _refresh(self, call: ToolCall, state: ToolState, key: str) -> None:
        """Once for all who are given the stale one: a call of whoever met it first, with limits and a row as any."""
        if key in self._refreshing or len(self._refreshing) >= REFRESHES_MAX:
            return
        task = asyncio.get_running_loop().create_task(
            self._refreshed(_again(call), state, key), name=f"cache-refresh:{call.tool_id}"
        )
        self._refreshing[key] = task
        task.add_done_callback(lambda _: self._refreshing.pop(key, None))

    async def _refreshed(self, call: ToolCall, state: ToolState, key: str) -> None:
        if state.cached is not None and await self._results.may_refresh(key, state.cached, state.timeout_s):
            await self.fetch(call)


def _end_if_cancelled(run: Run) -> None:
    """What was awaited was nothing that a cancellation could end."""
    if run.interrupt.requested:
        raise asyncio.CancelledError


def _by_own_wish(wanted: Wanted, cause: Failure) -> bool:
    """A cancellation, and a deadline that is shorter than the tool's own, are no outcome for others."""
    if cause.category == TOOL_TIMEOUT.category:
        return wanted.timeout_s < wanted.state.timeout_s
    return cause.category == TOOL_CANCELLED.category


def _identity(call: ToolCall, state: ToolState, parameters: bytes) -> Hashable:
    """What makes two calls of a tool identical for its author: all that a run can see of its call but ids, which differ
    from call to call: its own, that of its trace, its idempotency key."""
    seen: tuple[Hashable, ...] = ()
    if state.takes_context:
        seen = (call.caller, call.agent_id, call.session_id, canonical_json(call.metadata))
    return (call.tool_id, call.caller.tenant, parameters, call.timeout_override_s, call.deadline, *seen)


def _again(call: ToolCall) -> ToolCall:
    """The same call as one of its own: nobody waits for it, and no client can end it."""
    return replace(
        call,
        execution_id=new_execution_id(),
        received_at=perf_counter(),
        timeout_override_s=None,
        deadline=None,
        call_id=None,
        idempotency_key=None,
        client=None,
        on_progress=None,
        trace=None,
        trace_id=None,
    )


def _may_run_again(run: Run, execution: Execution) -> bool:
    """Whether a repeat with the same key is to run: where nothing ran, where the tool says that the same call may
    succeed later, and where it was cut off and a second run does what one did."""
    if run.attempts == 0 and not run.cached:
        return True
    error = execution.error
    if error is None:
        return False
    if error.category == TOOL_ERROR.category:
        return error.retryable
    return error.category in CUT_OFF and run.state is not None and run.state.harmless
