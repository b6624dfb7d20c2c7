"""Background tasks are missed when they end, and a blocked event loop is named while it is blocked."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from app.telemetry.supervision import BLOCKED_AFTER_S, LAG_SAMPLE_S, LoopWatch, Supervisor, ignore_result
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio


async def forever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise ValueError("why")


async def end() -> None:
    pass


async def cancel_itself() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(("work", "has_trace"), [(fail, True), (end, False), (cancel_itself, False)])
async def test_a_task_that_ends_unasked_is_a_crash_however_it_ends(
    work: Any, has_trace: bool, caplog: pytest.LogCaptureFixture
) -> None:
    crashed: list[str] = []
    supervisor = Supervisor(crashed.append)
    supervisor.start("writer", work())
    supervisor.start("other", forever())
    await until(lambda: crashed == ["writer"])
    (event,) = caplog.records
    assert (event.levelno, vars(event)["task"], bool(event.exc_info)) == (logging.CRITICAL, "writer", has_trace)
    await supervisor.close()
    assert crashed == ["writer"]


async def test_closing_cancels_every_task_and_is_no_crash() -> None:
    crashed: list[str] = []
    cleaned: list[str] = []

    async def careful() -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(0)
            cleaned.append("careful")

    supervisor = Supervisor(crashed.append)
    supervisor.start("careful", careful())
    supervisor.start("other", forever())
    await asyncio.sleep(0)
    await supervisor.close()
    assert (crashed, cleaned) == ([], ["careful"])
    assert not [task for task in asyncio.all_tasks() if task.get_name() in ("careful", "other")]


async def test_a_task_that_fails_while_it_is_closed_is_logged_and_is_no_crash(
    caplog: pytest.LogCaptureFixture,
) -> None:
    crashed: list[str] = []

    async def clumsy() -> None:
        try:
            await forever()
        finally:
            raise ValueError("while closing")

    supervisor = Supervisor(crashed.append)
    supervisor.start("clumsy", clumsy())
    await asyncio.sleep(0)
    await supervisor.close()
    assert crashed == []
    assert [vars(event)["task"] for event in caplog.records] == ["clumsy"]


async def test_closing_without_tasks_is_nothing() -> None:
    await Supervisor(lambda _: None).close()


async def test_a_result_that_nobody_waits_for_is_not_reported_as_forgotten() -> None:
    for work in (fail, end, cancel_itself):
        task = asyncio.create_task(work())
        task.add_done_callback(ignore_result)
        await asyncio.wait({task})
        del task
    gc.collect()  # pytest turns what asyncio would report into an error


@pytest.fixture
async def watch() -> Any:
    """A watch over the loop of the test, which has taken its first sample."""
    one = LoopWatch()
    measuring = asyncio.create_task(one.measure(), name="loop-watch")
    await until(lambda: max(one._lags) > 0)
    yield one
    measuring.cancel()
    await asyncio.wait({measuring})


def block_the_loop(until_seen: threading.Event) -> None:
    until_seen.wait(SOON_S)


class Seen(logging.Handler):
    """Tells a blocked loop that its blockage was reported. A loop that the machine held up is reported too, and is not
    meant here."""

    def __init__(self) -> None:
        super().__init__()
        self.reported = threading.Event()
        self.events: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        event = {"message": record.getMessage(), **vars(record)}
        if "block_the_loop(seen.reported)" in event["stack"] or "yield held()" in event["stack"]:
            self.events.append(event)
            self.reported.set()


@pytest.fixture
def seen() -> Iterator[Seen]:
    handler = Seen()
    logging.getLogger("app.supervision").addHandler(handler)
    yield handler
    logging.getLogger("app.supervision").removeHandler(handler)


async def test_a_blocked_loop_is_reported_while_it_is_blocked_with_its_task_and_stack(
    watch: LoopWatch, seen: Seen
) -> None:
    async def blocking() -> bool:
        block_the_loop(seen.reported)
        return seen.reported.is_set()

    assert await asyncio.create_task(blocking(), name="tool:slow"), "the report came while the loop stood still"
    (event,) = seen.events
    assert (event["message"], event["task"]) == ("event loop blocked", "tool:slow")
    assert event["blocked_s"] >= BLOCKED_AFTER_S
    assert "block_the_loop(seen.reported)" in event["stack"]


class Untouchable:
    @property
    def spec(self) -> None:
        raise RuntimeError("looked at")


async def test_variables_of_the_code_that_blocks_are_not_looked_at(watch: LoopWatch, seen: Seen) -> None:
    tool = Untouchable()
    block_the_loop(seen.reported)
    (event,) = seen.events
    assert event["tool_id"] is None and tool


HELD_IN_A_COROUTINE = """
def steps(held):
    yield held()

def run(tool, held):
    for _ in steps(held):
        return True  # the stack is cut here: what yielded has no caller any more
"""


class SlowDisk:
    """A module's source that takes as long to read as its code holds the loop."""

    def __init__(self, went_on: threading.Event) -> None:
        self.hold = threading.Event()
        self._went_on = went_on

    def get_source(self, _: str) -> str:
        self.hold.set()
        assert self._went_on.wait(SOON_S)
        return HELD_IN_A_COROUTINE


async def test_a_tool_that_ends_while_its_stack_is_read_is_named(watch: LoopWatch, seen: Seen) -> None:
    went_on = threading.Event()
    disk = SlowDisk(went_on)
    code = {"__name__": "app.executor.slow", "__loader__": disk}
    exec(compile(HELD_IN_A_COROUTINE, "nowhere.py", "exec"), code)
    assert code["run"](SimpleNamespace(spec=SimpleNamespace(id="slow")), lambda: disk.hold.wait(SOON_S))  # type: ignore[operator]
    went_on.set()
    assert await asyncio.to_thread(seen.reported.wait, SOON_S)
    (event,) = seen.events
    assert event["tool_id"] == "slow" and "yield held()" in event["stack"]


async def test_one_blockage_is_one_line_and_the_next_one_another(watch: LoopWatch, seen: Seen) -> None:
    for blockages in (1, 2):
        seen.reported.clear()
        block_the_loop(seen.reported)
        threading.Event().wait(BLOCKED_AFTER_S)  # two more looks of the watch at the same blockage
        beat = watch._beat
        await until(lambda beat=beat: watch._beat != beat)
        assert len(seen.events) == blockages


async def test_the_lag_is_the_worst_of_the_last_samples(watch: LoopWatch) -> None:
    began = time.perf_counter()
    threading.Event().wait(2 * LAG_SAMPLE_S)
    blocked_s = time.perf_counter() - began
    await until(lambda: watch.lag_s() >= blocked_s - LAG_SAMPLE_S)
    *others, worst = sorted(watch._lags)
    assert watch.lag_s() == worst
    watch._lags[watch._lags.index(worst)] = 0.0
    assert watch.lag_s() == others[-1]


async def test_the_watch_leaves_no_thread_behind() -> None:
    one = LoopWatch()
    before = {thread.ident for thread in threading.enumerate()}
    measuring = asyncio.create_task(one.measure())
    await until(lambda: max(one._lags) > 0)
    (thread,) = [thread for thread in threading.enumerate() if thread.ident not in before]
    measuring.cancel()
    await asyncio.wait({measuring})
    await asyncio.to_thread(thread.join, SOON_S)
    assert not thread.is_alive()
