"""What the executor keeps of a tool."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.execution_log.log import NO_LOG
from app.executor.run import IN_PLACE_AGAIN_S, LONG_IN_PLACE_MAX, LONG_IN_PLACE_S, ToolState
from app.telemetry.metrics import ToolSeries
from app.tools.tool import tool


@tool
async def quick() -> None:
    """Nothing to wait for."""


@given(st.lists(st.sampled_from((0.1 * LONG_IN_PLACE_S, 2 * LONG_IN_PLACE_S)), max_size=12))
def test_only_long_runs_in_a_row_take_a_tool_out_of_its_place(runs_s: list[float]) -> None:
    state = ToolState(quick, ToolSeries(), NO_LOG, 30.0)
    for run_s in runs_s:
        if state.in_place:
            state.ran_in_place(run_s, 0.0)
    longest = max(len(part) for part in "".join("l" if s > LONG_IN_PLACE_S else "s" for s in runs_s).split("s"))
    assert state.in_place is (longest < LONG_IN_PLACE_MAX)


@given(st.lists(st.booleans(), max_size=5))
def test_after_a_while_one_run_in_place_says_whether_it_stays_there(long: list[bool]) -> None:
    state = ToolState(quick, ToolSeries(), NO_LOG, 30.0)
    now = 100.0
    for _ in range(LONG_IN_PLACE_MAX):
        state.ran_in_place(2 * LONG_IN_PLACE_S, now)
    for one in long:
        assert not state.in_place
        state.hold_s, state.is_slow = 0.08, True  # as a run in a task leaves it
        state.ran_in_task(now + 0.9 * IN_PLACE_AGAIN_S)
        assert not state.in_place
        now += IN_PLACE_AGAIN_S
        state.ran_in_task(now)
        assert state.in_place and not state.is_slow and state.hold_s == 0.0
        state.ran_in_place(LONG_IN_PLACE_S * (2 if one else 0.1), now)
        assert state.in_place is not one
        if not one:
            break
