"""Large bodies pass one in each turn of the loop, in order, and nobody who has gone keeps the others."""

from __future__ import annotations

import asyncio

import pytest

from app.transport.turns import Turns

pytestmark = pytest.mark.anyio


class Counted:
    """Which turn of the loop it is."""

    def __init__(self) -> None:
        self.turn = 0
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._next)

    def _next(self) -> None:
        self.turn += 1
        self._handle = self._loop.call_soon(self._next)

    def stop(self) -> None:
        self._handle.cancel()


async def passed(turns: Turns, counted: Counted, name: int, seen: list[tuple[int, int]], tenant: str = "") -> None:
    await turns.take(tenant)
    seen.append((counted.turn, name))


async def test_one_passes_in_each_turn_in_order() -> None:
    turns, counted, seen = Turns(), Counted(), list[tuple[int, int]]()
    await asyncio.gather(*(passed(turns, counted, name, seen) for name in range(20)))
    counted.stop()
    assert [name for _, name in seen] == list(range(20))
    assert len({turn for turn, _ in seen}) == 20


async def test_a_tenant_with_many_lets_another_pass_in_between() -> None:
    turns, counted, seen = Turns(), Counted(), list[tuple[int, int]]()
    many = [passed(turns, counted, name, seen, "many") for name in range(20)]
    await asyncio.gather(*many, passed(turns, counted, 20, seen, "other"), passed(turns, counted, 21, seen, "other"))
    counted.stop()
    assert [name for _, name in seen][:6] == [0, 1, 20, 2, 21, 3]


async def test_one_alone_waits_for_nothing() -> None:
    turns, counted, seen = Turns(), Counted(), list[tuple[int, int]]()
    for name in range(3):
        before = counted.turn
        await passed(turns, counted, name, seen)
        assert counted.turn == before
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    counted.stop()


async def test_who_has_gone_keeps_nobody() -> None:
    turns, counted, seen = Turns(), Counted(), list[tuple[int, int]]()
    tasks = [asyncio.create_task(passed(turns, counted, name, seen)) for name in range(6)]
    await asyncio.sleep(0)
    for gone in tasks[1:4]:
        gone.cancel()
    await asyncio.wait(tasks)
    counted.stop()
    assert [name for _, name in seen] == [0, 4, 5]
    await turns.take("")
