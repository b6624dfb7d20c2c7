"""The pool of sync tools: bounded, never stopped by one that hangs, its counts back to where they were."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.executor.threads import CALLED_OFF_MAX, Job, ThreadPool
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio


@contextlib.contextmanager
def pool_of(size: int) -> Iterator[ThreadPool]:
    """A pool whose threads are gone afterwards."""
    others = set(threading.enumerate())
    pool = ThreadPool(size)
    yield pool
    pool.close()
    for thread in set(threading.enumerate()) - others:
        thread.join(SOON_S)
        assert not thread.is_alive()


def counts(pool: ThreadPool) -> tuple[int, int]:
    return pool._busy, pool._written_off


async def ended(job: Job) -> Any:
    return await asyncio.wait_for(asyncio.shield(job.future), SOON_S)


async def test_a_job_runs_in_a_thread_with_the_context_of_its_caller() -> None:
    label = contextvars.ContextVar("label", default="")
    label.set("the caller's")
    with pool_of(2) as pool:
        seen = await ended(pool.submit(lambda: (label.get(), threading.current_thread().name)))
        assert seen == ("the caller's", "sync-tool")
        assert counts(pool) == (0, 0)


async def test_no_more_threads_than_the_size_run_jobs_at_once() -> None:
    release, running, most = threading.Event(), [], []

    def work() -> None:
        running.append(1)
        most.append(len(running))
        release.wait(SOON_S)
        running.pop()

    with pool_of(3) as pool:
        jobs = [pool.submit(work) for _ in range(10)]
        await until(lambda: len(running) == 3)
        assert pool._threads == 3
        release.set()
        await asyncio.gather(*map(ended, jobs))
        assert max(most) == 3
        assert counts(pool) == (0, 0)


async def test_a_tenant_with_many_jobs_lets_another_have_its_turn() -> None:
    begun, release, order = threading.Event(), threading.Event(), list[str]()
    with pool_of(1) as pool:
        first = pool.submit(lambda: (begun.set(), release.wait(SOON_S)), "flood")
        await until(begun.is_set)
        jobs = [pool.submit(lambda: order.append("flood"), "flood") for _ in range(20)]
        jobs.append(pool.submit(lambda: order.append("other"), "other"))
        release.set()
        await asyncio.gather(*map(ended, (first, *jobs)))
        assert order.index("other") <= 1
        assert counts(pool) == (0, 0)


async def test_a_job_that_waits_behind_a_hung_one_gets_a_thread_of_its_own_when_that_is_given_up() -> None:
    release = threading.Event()
    with pool_of(1) as pool:
        begun = threading.Event()
        hung = pool.submit(lambda: (begun.set(), release.wait(SOON_S)))
        await until(begun.is_set)
        behind = pool.submit(lambda: "ran")
        pool.give_up(hung)
        assert hung.written_off
        assert await ended(behind) == "ran"
        release.set()
        await ended(hung)
        assert counts(pool) == (0, 0)
        assert pool._threads == 1, "the thread that came back made one too many"


async def test_jobs_that_are_called_off_leave_the_queue_though_every_thread_hangs() -> None:
    begun, release = threading.Event(), threading.Event()
    with pool_of(1) as pool:
        hung = pool.submit(lambda: (begun.set(), release.wait(SOON_S)))
        await until(begun.is_set)
        waiting = [pool.submit(lambda number=number: number) for number in range(3)]  # type: ignore[misc]
        for _ in range(3 * CALLED_OFF_MAX):
            pool.give_up(pool.submit(lambda: None))
            assert (pool._jobs.qsize(), len(pool._waiting.turns)) == (0, 3)
        release.set()
        await ended(hung)
        assert [await ended(job) for job in waiting] == [0, 1, 2]
        assert counts(pool) == (0, 0)


async def test_written_off_threads_are_replaced_as_often_as_there_are_threads_and_no_more() -> None:
    begun, release = threading.Semaphore(0), threading.Event()

    def hang() -> None:
        begun.release()
        release.wait(SOON_S)

    with pool_of(2) as pool:
        hung = []
        for threads in (1, 2, 3, 4):
            hung.append(pool.submit(hang))
            begun.acquire(timeout=SOON_S)
            pool.give_up(hung[-1])
            assert pool._threads == threads
        waiting = pool.submit(hang)
        assert pool._threads == 4
        release.set()
        await asyncio.gather(*map(ended, (*hung, waiting)))
        assert pool._threads == 2
        assert counts(pool) == (0, 0)


async def test_a_job_that_is_given_up_before_it_began_never_runs_and_lets_go_of_its_arguments() -> None:
    release, ran = threading.Event(), []
    with pool_of(1) as pool:
        first = pool.submit(lambda: release.wait(SOON_S))
        second = pool.submit(lambda: ran.append(1))
        function = second.function
        pool.give_up(second)
        assert not second.written_off
        assert second.function is not function
        release.set()
        await ended(first)
        await ended(pool.submit(lambda: None))
        assert ran == []
        assert counts(pool) == (0, 0)


async def test_giving_up_a_job_that_has_ended_changes_nothing() -> None:
    with pool_of(1) as pool:
        job = pool.submit(lambda: 1)
        await ended(job)
        pool.give_up(job)
        assert not job.written_off
        assert counts(pool) == (0, 0)


async def test_giving_up_a_job_whose_result_is_on_its_way_leaves_the_counts_right() -> None:
    with pool_of(1) as pool:
        done = threading.Event()
        job = pool.submit(done.set)
        done.wait(SOON_S)  # blocks the loop on purpose: the result cannot have been posted yet
        pool.give_up(job)
        await ended(job)
        assert counts(pool) == (0, 0)
        assert await ended(pool.submit(lambda: "next")) == "next"


ENDINGS: dict[str, Callable[[], BaseException]] = {
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "CancelledError": asyncio.CancelledError,
    "StopIteration": lambda: StopIteration(1),
    "GeneratorExit": GeneratorExit,
}


@pytest.mark.parametrize("kind", ENDINGS)
async def test_what_would_end_a_thread_or_a_future_arrives_as_an_ordinary_error(kind: str) -> None:
    def fail() -> None:
        raise ENDINGS[kind]()

    with pool_of(1) as pool:
        with pytest.raises(RuntimeError, match=kind) as caught:
            await ended(pool.submit(fail))
        assert type(caught.value.__cause__).__name__ == kind
        assert await ended(pool.submit(lambda: "next")) == "next", "its thread lives"
        assert counts(pool) == (0, 0)


async def test_a_system_without_threads_leaves_jobs_waiting_and_counts_none() -> None:
    # More stack than there are addresses: the system refuses, as it does at a limit of processes.
    before = threading.stack_size(sys.maxsize // 2 + 1)
    with pool_of(2) as pool:
        try:
            waiting = pool.submit(lambda: "ran")
            assert pool._threads == 0
        finally:
            threading.stack_size(before)
        assert await ended(pool.submit(lambda: "next")) == "next"
        assert await ended(waiting) == "ran"
        assert counts(pool) == (0, 0)


async def test_jobs_that_are_called_off_leave_the_queue_though_the_system_starts_no_thread() -> None:
    before = threading.stack_size(sys.maxsize // 2 + 1)
    with pool_of(2) as pool:
        try:
            waiting = pool.submit(lambda: "ran")
            for _ in range(3 * CALLED_OFF_MAX):
                pool.give_up(pool.submit(lambda: None))
                assert pool._jobs.qsize() <= CALLED_OFF_MAX
        finally:
            threading.stack_size(before)
        assert await ended(pool.submit(lambda: "next")) == "next"
        assert await ended(waiting) == "ran"
        assert counts(pool) == (0, 0)


async def test_a_job_that_outlives_the_loop_ends_without_a_word() -> None:
    release = threading.Event()

    async def start() -> ThreadPool:
        pool = ThreadPool(1)
        pool.submit(lambda: release.wait(SOON_S))
        return pool

    others = set(threading.enumerate())
    await asyncio.to_thread(asyncio.run, start())
    release.set()
    for thread in set(threading.enumerate()) - others:
        if thread.name == "sync-tool":
            thread.join(SOON_S)
            assert not thread.is_alive()
