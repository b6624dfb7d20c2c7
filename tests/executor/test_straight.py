"""Calls without a coroutine: the same outcome as by `execute`, whoever ends them, and nothing left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator

from app.calls import LOCAL_CALLER, Caller, Execution, ToolCall, new_execution_id
from app.errors import DRAINING, INVALID_PARAMS, OVERLOADED, ToolError
from app.executor.runner import ABANDONED_PER_TOOL_MAX
from app.limits.adaptive import QUICK_S
from app.limits.concurrency import Slots
from app.limits.memory_store import MemoryStore
from app.limits.policy import Policy, parse_rate
from app.limits.store import Ask, StoreAway, Verdict, Waiter
from app.tools.tool import FunctionTool, tool
from tests.executor.in_process import SEEN, Rig, leave_a_mark, opened
from tests.waiting import until

pytestmark = pytest.mark.anyio

TEN_A_MINUTE = Policy(name="ten", per=("tenant",), rate=parse_rate("10/minute"))
TWO_A_MINUTE = Policy(name="two", per=("tenant",), rate=parse_rate("2/minute"))

TIMEOUT_S = 0.25
"""A call that is held up for as long has timed out before it ran, which is another outcome."""


@tool
async def echo(message: str) -> str:
    """Return the message."""
    return message


@tool
async def fail() -> None:
    """Fail clearly."""
    raise ToolError("No")


@tool
async def crash() -> None:
    """Fail otherwise."""
    raise ValueError


@tool
async def give_bytes() -> Any:
    """Return what JSON cannot hold."""
    return b""


@tool
async def wait() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


@tool
async def echo_later(message: str) -> str:
    """Return the message after a turn of the loop."""
    await asyncio.sleep(0)
    return message


@tool
async def fail_later(how: str) -> None:
    """Wait, and fail in one of many ways."""
    await asyncio.sleep(0)
    raise {"clearly": ToolError("No"), "otherwise": ValueError(), "by exit": SystemExit(3)}[how]


@tool
async def cancel_itself() -> None:
    """Give up in the middle."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@tool(timeout=TIMEOUT_S)
async def outlast() -> None:
    """Wait past every deadline."""
    await asyncio.Event().wait()


@tool(timeout=TIMEOUT_S)
async def hold_the_loop() -> str:
    """Return late, without a wait in which a deadline could be met."""
    if NEVER:
        await asyncio.sleep(0)
    ends = time.perf_counter() + 1.2 * TIMEOUT_S
    while time.perf_counter() < ends:
        pass
    return "late"


NEVER = False


@tool(timeout=TIMEOUT_S)
async def ignore_everything(gate: str) -> None:
    """Go on when cancelled."""
    while gate not in OPEN_GATES:
        try:
            await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            pass


OPEN_GATES: set[str] = set()


@tool
async def nap() -> None:
    """Be a slow tool."""
    await asyncio.sleep(QUICK_S * 1.2)


@tool(read_only=True)
async def look() -> None:
    """Wait for what another call may bring too."""
    await asyncio.sleep(0)


@tool
async def marked(text: Annotated[str, AfterValidator(leave_a_mark)]) -> str:
    """Return what its validator saw of the calls before."""
    return text


class LateStore:
    """Counters that answer when they are told to: `answer` for all that was asked, `go` to be away."""

    up = True
    state = "late"

    def __init__(self) -> None:
        self.counters = MemoryStore()
        self.asked: list[tuple[Waiter, Ask]] = []

    def ask(self, ask: Ask) -> Verdict:
        return self.counters.ask(ask)

    def ask_for(self, waiter: Waiter, ask: Ask) -> None:
        self.asked.append((waiter, ask))

    def give_back(self, ask: Ask) -> None:
        self.counters.give_back(ask)

    def _waiting(self) -> Iterator[tuple[Waiter, Ask]]:
        asked, self.asked = self.asked, []
        return ((waiter, ask) for waiter, ask in asked if not waiter.done())

    def answer(self) -> None:
        for waiter, ask in self._waiting():
            waiter.set_result(self.counters.ask(ask))

    def go(self) -> None:
        for waiter, _ in self._waiting():
            waiter.set_exception(StoreAway("gone"))


def call_of(one: FunctionTool, caller: Caller = LOCAL_CALLER, /, **parameters: Any) -> ToolCall:
    return ToolCall(new_execution_id(), one.spec.id, parameters, caller, time.perf_counter())


async def known(rig: Rig, *tools: FunctionTool) -> None:
    """The executor knows a tool from its first call on, which need not run it."""
    for one in tools:
        refused = await rig.executor.execute(call_of(one, nonsense=1))
        assert refused.attempts == 0


def begun(rig: Rig, call: ToolCall) -> list[Execution]:
    """What the call comes to: in the list as soon as it has ended."""
    ended: list[Execution] = []
    assert rig.executor.begin(call, ended.append), "not by the straight way"
    return ended


def told(execution: Execution) -> tuple[Any, ...]:
    """All of an outcome but its id and times."""
    refusal = execution.refusal
    return (
        execution.status,
        execution.result,
        execution.error,
        refusal and (refusal.kind, refusal.message, refusal.execution_id == execution.execution_id),
        execution.attempts,
        execution.cached,
    )


@pytest.mark.parametrize(
    ("one", "parameters"),
    [
        (echo, {"message": "hello"}),
        (echo, {"message": 1}),
        (echo, {}),
        (fail, {}),
        (crash, {}),
        (give_bytes, {}),
        (echo_later, {"message": "hello"}),
        (echo_later, {"message": 1}),
        *((fail_later, {"how": how}) for how in ("clearly", "otherwise", "by exit")),
        (cancel_itself, {}),
        (outlast, {}),
        (hold_the_loop, {}),
    ],
)
async def test_a_call_comes_to_the_same_by_either_way(one: FunctionTool, parameters: dict[str, Any]) -> None:
    async with opened(one) as rig:
        await known(rig, one)

        async def counted(run: Callable[[], Any]) -> tuple[dict[str, int], dict[str, int], list[int]]:
            """What a call adds to the counters."""
            before = rig.runs(one), rig.errors(), [sum(stage.counts) for stage in rig.metrics.stages.values()]
            await run()
            after = rig.runs(one), rig.errors(), [sum(stage.counts) for stage in rig.metrics.stages.values()]
            grown = [
                {name: now[name] - then.get(name, 0) for name in now if now[name] != then.get(name, 0)}
                for now, then in zip(after[:2], before[:2], strict=True)
            ]
            return grown[0], grown[1], [now - then for now, then in zip(after[2], before[2], strict=True)]

        outcomes: list[Execution] = []

        async def straight() -> None:
            ended = begun(rig, call_of(one, **parameters))
            await until(lambda: bool(ended))
            outcomes.extend(ended)

        async def by_coroutine() -> None:
            outcomes.append(await rig.executor.execute(call_of(one, **parameters)))

        assert await counted(straight) == await counted(by_coroutine)
        assert told(outcomes[0]) == told(outcomes[1]) and len(outcomes) == 2


async def test_a_limit_refuses_it_as_it_refuses_others() -> None:
    async with opened(echo, policies=[TWO_A_MINUTE]) as rig:
        await known(rig, echo)
        first, second, third = (begun(rig, call_of(echo, message="x"))[0] for _ in range(3))
        assert first.status == second.status == "success"
        by_coroutine = await rig.executor.execute(call_of(echo, message="x"))
        assert third.refusal is not None and by_coroutine.refusal is not None
        assert third.refusal.kind is by_coroutine.refusal.kind and third.refusal.data == by_coroutine.refusal.data


async def test_it_holds_its_slot_until_its_limits_have_answered_and_then_runs() -> None:
    store = LateStore()
    async with opened(echo, policies=[TWO_A_MINUTE], store=store) as rig:
        await known(rig, echo)
        ended = begun(rig, call_of(echo, message="late"))
        assert not ended and rig.slots.running == 1 and rig.executor.concurrency == 1
        store.answer()
        assert ended[0].result == b'"late"' and ended[0].aside is not None and ended[0].aside.grant is not None


async def test_cancelled_while_its_limits_are_asked_it_does_not_run_and_spends_nothing() -> None:
    store = LateStore()
    async with opened(echo, policies=[TWO_A_MINUTE], store=store) as rig:
        await known(rig, echo)
        call = call_of(echo, message="x")
        ended = begun(rig, call)
        assert rig.executor.calls.cancel(LOCAL_CALLER, call.execution_id, None)
        assert ended[0].status == "cancelled" and ended[0].attempts == 0
        assert not rig.executor.calls.cancel(LOCAL_CALLER, call.execution_id, None)
        assert [waiter.done() for waiter, _ in store.asked] == [True], "the store gives back what it spends after all"
        store.answer()
        assert len(ended) == 1 and rig.runs(echo) == {}


class LateForAll(LateStore):
    """For those too that wait in a coroutine."""

    def ask(self, ask: Ask) -> asyncio.Future[Verdict]:  # type: ignore[override]
        future: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self.ask_for(future, ask)
        return future


async def test_cancelled_in_the_tick_in_which_its_limits_answer_a_call_gives_back_what_they_spent() -> None:
    store = LateForAll()
    async with opened(echo, policies=[TWO_A_MINUTE], store=store) as rig:
        call = rig.start(echo, {"message": "x"})
        await until(lambda: bool(store.asked))
        store.answer()
        assert rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None)
        assert (await call).status == "cancelled" and rig.runs(echo) == {}
        others = [begun(rig, call_of(echo, message="x")) for _ in range(3)]
        store.answer()
        assert [other[0].refusal is None for other in others] == [True, True, False]


@pytest.mark.parametrize(("on_failure", "status"), [("local", "success"), ("closed", "failed")])
async def test_without_its_store_its_policies_say_what_holds(on_failure: Any, status: str) -> None:
    store = LateStore()
    policy = Policy(name="two", per=("tenant",), rate=parse_rate("2/minute"), on_store_failure=on_failure)
    async with opened(echo, policies=[policy], store=store) as rig:
        await known(rig, echo)
        ended = begun(rig, call_of(echo, message="x"))
        store.go()
        assert [execution.status for execution in ended] == [status]


async def test_an_answer_that_fails_harms_no_other_call_of_the_tick() -> None:
    store = LateStore()
    async with opened(echo, policies=[TWO_A_MINUTE], store=store) as rig:
        await known(rig, echo)

        def broken(execution: Execution) -> None:
            raise ValueError("a bug in a door")

        assert rig.executor.begin(call_of(echo, message="first"), broken)
        second = begun(rig, call_of(echo, message="second"))
        store.answer()
        assert second[0].result == b'"second"'


async def test_a_call_that_finds_no_place_to_wait_is_refused_without_a_task() -> None:
    async with opened(wait, slots=Slots(1)) as rig:
        running, queued = rig.start(wait), rig.start(wait)
        while rig.slots.queued < 1:
            await asyncio.sleep(0)
        refused = begun(rig, call_of(wait))[0]
        wrong = begun(rig, call_of(wait, unknown=1))[0]
        assert refused.refusal is not None and refused.refusal.kind is OVERLOADED
        assert refused.refusal.retry_after_ms is not None and rig.slots.refused >= 1
        assert wrong.refusal is not None and wrong.refusal.kind is INVALID_PARAMS, "who tries again should know"
        rig.executor.calls.stop_accepting()
        draining = begun(rig, call_of(wait))[0]
        assert draining.refusal is not None and draining.refusal.kind is DRAINING
        for task in (running, queued):
            task.cancel()
        await asyncio.wait({running, queued})


async def test_what_a_validator_sets_for_a_call_that_is_turned_away_is_seen_by_nobody() -> None:
    async with opened(marked, wait, slots=Slots(1)) as rig:
        await known(rig, marked)
        tasks = {rig.start(wait), rig.start(wait)}
        await until(lambda: rig.slots.queued == 1)
        refused = begun(rig, call_of(marked, text="one"))[0]
        assert refused.refusal is not None and refused.refusal.kind is OVERLOADED
        assert SEEN.get() == "nothing"
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_who_would_find_no_place_is_told_so_before_there_is_a_call() -> None:
    async with opened(wait, look, slots=Slots(1)) as rig:
        await known(rig, look)
        crowded_out = rig.executor.crowded_out
        assert crowded_out(LOCAL_CALLER, "wait", None) is None, "a slot is free"
        running, queued = rig.start(wait), rig.start(wait)
        while rig.slots.queued < 1:
            await asyncio.sleep(0)
        refusal = crowded_out(LOCAL_CALLER, "wait", None)
        assert refusal is not None and refusal.retry_after_ms is not None and rig.slots.refused == 1
        assert crowded_out(LOCAL_CALLER, "look", None) is None, "it may be answered by another call's run"
        assert crowded_out(LOCAL_CALLER, "unknown", None) is None
        assert crowded_out(Caller("t", "s", tools=("ec*",)), "wait", None) is None, "it is told that there is none"
        rig.executor.calls.stop_accepting()
        assert crowded_out(LOCAL_CALLER, "wait", None) is None and rig.slots.refused == 1
        for task in (running, queued):
            task.cancel()
        await asyncio.wait({running, queued})


async def test_what_is_not_known_yet_or_could_be_answered_by_another_call_is_not_begun() -> None:
    async with opened(echo, look) as rig:
        assert not rig.executor.begin(call_of(echo, message="x"), lambda execution: None)
        await known(rig, echo, look)
        assert not rig.executor.begin(call_of(look), lambda execution: None)
        keyed = replace(call_of(echo, message="x"), idempotency_key="k")
        assert not rig.executor.begin(keyed, lambda execution: None)


async def test_a_tool_that_waits_is_cancelled_by_who_may_and_by_nobody_twice() -> None:
    async with opened(wait) as rig:
        await known(rig, wait)
        call = call_of(wait)
        ended = begun(rig, call)
        assert not rig.executor.calls.cancel(Caller("other", "s"), call.execution_id, None)
        await asyncio.sleep(0)
        assert rig.executor.calls.cancel(LOCAL_CALLER, call.execution_id, None)
        assert rig.executor.calls.cancel(LOCAL_CALLER, call.execution_id, None), "it is being cancelled"
        await until(lambda: bool(ended))
        assert ended[0].status == "cancelled" and ended[0].attempts == 1
        assert not rig.executor.calls.cancel(LOCAL_CALLER, call.execution_id, None)


async def test_a_tool_that_waits_can_be_cancelled_before_its_first_step() -> None:
    async with opened(wait) as rig:
        await known(rig, wait)
        call = call_of(wait)
        ended = begun(rig, call)
        assert rig.executor.calls.cancel(LOCAL_CALLER, call.execution_id, None)
        await until(lambda: bool(ended))
        assert ended[0].status == "cancelled"


async def test_runs_that_ignore_their_end_are_left_behind_counted_and_bounded() -> None:
    gate = new_execution_id()
    async with opened(ignore_everything, policies=[TEN_A_MINUTE], breakers=False) as rig:
        await known(rig, ignore_everything)
        ended = [begun(rig, call_of(ignore_everything, gate=gate)) for _ in range(ABANDONED_PER_TOOL_MAX)]
        try:
            await until(lambda: all(ended))
            abandoned = rig.executor.abandoned, rig.metrics.abandoned
            refused = [begun(rig, call_of(ignore_everything, gate=gate))[0].refusal for _ in range(5)]
        finally:
            OPEN_GATES.add(gate)  # else they would keep the loop too
        assert [one.status for [one] in ended] == ["timeout"] * ABANDONED_PER_TOOL_MAX
        assert abandoned == (ABANDONED_PER_TOOL_MAX, ABANDONED_PER_TOOL_MAX)
        assert [one and one.kind for one in refused] == [OVERLOADED] * 5, "and not by the limit: nothing was spent"
        await until(lambda: not rig.executor.abandoned)
        again = begun(rig, call_of(ignore_everything, gate=gate))
        await until(lambda: bool(again))
        assert again[0].status == "success"


async def test_a_slow_call_holds_a_slot_of_slow_ones_too_and_gives_it_back() -> None:
    async with opened(nap, mode="enforce") as rig:
        await rig.call(nap)
        control = rig.executor.control
        ended = begun(rig, call_of(nap))
        assert (rig.slots.running, control.slow_slots.running) == (1, 1)
        await until(lambda: bool(ended))
        assert (rig.slots.running, control.slow_slots.running) == (0, 0)


async def test_what_still_runs_at_the_end_of_the_process_is_cut_off_and_has_its_outcome() -> None:
    async with opened(wait) as rig:
        await known(rig, wait)
        ended = [begun(rig, call_of(wait)) for _ in range(3)]
        await rig.executor.stop()
        assert [one.status for [one] in ended] == ["cancelled"] * 3


async def test_a_tool_that_is_tried_in_place_again_needs_no_slot_of_the_slow() -> None:
    async with opened(hold_the_loop, mode="enforce") as rig:
        await known(rig, hold_the_loop)
        state = rig.executor._states["hold_the_loop"]
        state.in_place, state.in_place_again_at = False, 0.0  # long ago
        state.hold_s, state.is_slow = 2 * QUICK_S, True
        ended = begun(rig, call_of(hold_the_loop))
        await until(lambda: bool(ended))
        assert state.in_place and not state.is_slow


async def test_what_a_validator_sets_is_seen_by_no_other_call() -> None:
    async with opened(marked) as rig:
        await known(rig, marked)
        results = [begun(rig, call_of(marked, text=text))[0].result for text in ("one", "two")]
        assert results == [b'"nothing"', b'"nothing"'] and SEEN.get() == "nothing"


async def test_a_call_that_is_wrong_in_a_full_queue_is_not_counted_as_refused_for_want_of_a_slot() -> None:
    async with opened(wait, slots=Slots(1)) as rig:
        running, queued = rig.start(wait), rig.start(wait)
        while rig.slots.queued < 1:
            await asyncio.sleep(0)
        begun(rig, call_of(wait, unknown=1))
        assert rig.slots.refused == 0
        begun(rig, call_of(wait))
        assert rig.slots.refused == 1
        for task in (running, queued):
            task.cancel()
        await asyncio.wait({running, queued})


async def test_a_tool_that_was_replaced_is_the_new_one_from_the_next_call_on() -> None:
    @tool(id="echo")
    async def other(message: str) -> str:
        """Return something else."""
        return message.upper()

    async with opened(echo) as rig:
        await known(rig, echo)
        assert begun(rig, call_of(echo, message="x"))[0].result == b'"x"'
        rig.executor.registry.replace([other])
        assert not rig.executor.begin(call_of(echo, message="x"), lambda execution: None)
        assert (await rig.call("echo", {"message": "x"})).result == b'"X"'
        assert begun(rig, call_of(echo, message="x"))[0].result == b'"X"'
