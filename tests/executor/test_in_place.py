"""Tools that never wait share one coroutine, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextvars import ContextVar
from typing import Any

import pytest

from app.executor.containment import in_tool
from app.executor.in_place import InPlace

LEFT = ContextVar("left", default="nothing")


class Payload:
    """Something that a weak reference can be had of."""


async def look(leaves: str) -> tuple[str, bool]:
    found = LEFT.get(), in_tool.get()
    LEFT.set(leaves)
    return found


def test_each_returns_its_value_and_sees_nothing_of_the_one_before() -> None:
    runs = InPlace()
    assert [runs.run(look(leaves)) for leaves in "abc"] == [("nothing", True)] * 3
    assert (LEFT.get(), in_tool.get()) == ("nothing", False)


@pytest.mark.parametrize(
    "error", [ValueError, StopAsyncIteration, asyncio.CancelledError, GeneratorExit, SystemExit, KeyboardInterrupt]
)
def test_what_one_raises_is_its_own_and_the_next_one_runs(error: type[BaseException]) -> None:
    async def fail() -> None:
        raise error("mine")

    runs = InPlace()
    for _ in range(3):
        with pytest.raises(error, match="mine"):
            runs.run(fail())
        assert runs.run(look("a")) == ("nothing", True)


def test_a_stop_iteration_is_an_error_and_no_result() -> None:
    async def fail() -> None:
        raise StopIteration("mine")

    runs = InPlace()
    with pytest.raises(RuntimeError, match="StopIteration"):
        runs.run(fail())
    assert runs.run(look("a")) == ("nothing", True)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_run_is_kept(fails: bool) -> None:
    async def take(payload: Payload) -> Payload:
        if fails:
            raise ValueError
        return payload

    def run(runs: InPlace) -> weakref.ref[Any]:
        payload = Payload()
        try:
            assert runs.run(take(payload)) is payload
        except ValueError:
            assert fails
        return weakref.ref(payload)

    runs = InPlace()
    kept = run(runs)
    gc.collect()
    assert kept() is None
