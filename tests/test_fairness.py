"""A semaphore between tenants: each in turn, none left waiting while one is free, nothing kept by who has gone."""

from __future__ import annotations

import asyncio

import pytest

from app.fairness import FairSemaphore

pytestmark = pytest.mark.anyio


async def test_tenants_that_wait_are_let_in_by_turns() -> None:
    semaphore, order = FairSemaphore(2), list[str]()

    async def hold(name: str) -> None:
        await semaphore.acquire(name[0])
        order.append(name)

    names = ["a1", "a2", "a3", "a4", "a5", "b1", "c1", "b2"]
    tasks = [asyncio.create_task(hold(name)) for name in names]
    for _ in names:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        semaphore.release()
    await asyncio.gather(*tasks)
    assert order == ["a1", "a2", "a3", "b1", "c1", "a4", "b2", "a5"]
    assert semaphore.free == 2


@pytest.mark.parametrize("turns", range(3))
async def test_who_is_cancelled_holds_nothing_whenever_that_is(turns: int) -> None:
    semaphore = FairSemaphore(1)
    await semaphore.acquire("a")
    waiting = [asyncio.create_task(semaphore.acquire(tenant)) for tenant in "ab"]
    await asyncio.sleep(0)
    semaphore.release()  # it is the first one's, who is cancelled before it runs, as it runs, or after
    for _ in range(turns):
        await asyncio.sleep(0)
    if waiting[0].cancel():
        await asyncio.wait(waiting)
    else:
        semaphore.release()
    await waiting[1]
    assert semaphore.free == 0
    semaphore.release()
    assert semaphore.free == 1


async def test_one_that_waits_no_more_is_passed_over() -> None:
    semaphore = FairSemaphore(1)
    await semaphore.acquire("a")
    waiting = [asyncio.create_task(semaphore.acquire(tenant)) for tenant in "aab"]
    await asyncio.sleep(0)
    for gone in waiting[:2]:
        gone.cancel()
    semaphore.release()  # in the very tick of the cancellations
    await waiting[2]
    semaphore.release()
    await asyncio.wait(waiting)
    assert semaphore.free == 1
