"""What was answered before is not run again: keys, kept results and joined calls, through the whole executor."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

from app.bus import Bus
from app.cache.file_store import FileStore
from app.cache.redis_store import RedisStore
from app.cache.results import ResultCache
from app.calls import LOCAL_CALLER, Caller, Execution
from app.clients import create_redis
from app.errors import DependencyUnavailable, IdempotencyConflict, RateLimited
from app.limits.policy import tool_policies
from app.tools.tool import FunctionTool, ToolContext, ToolError, tool
from tests.executor.in_process import Rig, opened
from tests.servers import RedisServer, free_port
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.anyio

ANNA = Caller("acme", "anna")


@dataclass
class Work:
    """What the tools of a test do: each run is counted, and waits while the gate is closed."""

    runs: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    failures: list[BaseException] = field(default_factory=list)

    async def run(self, value: Any) -> Any:
        self.runs += 1
        run = self.runs
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        return {"value": value, "run": run}


@pytest.fixture
def work() -> Work:
    """With its gate open."""
    one = Work()
    one.gate.set()
    return one


def tool_of(work: Work, **declared: Any) -> FunctionTool:
    @tool(id="probe", description="Count a run.", **declared)
    async def probe(value: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = await work.run(value)
        return found

    return probe


def context_tool_of(work: Work, **declared: Any) -> FunctionTool:
    @tool(id="probe", description="Count a run.", **declared)
    async def probe(context: ToolContext, value: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = await work.run(context.caller.subject)
        return found

    return probe


def run_of(execution: Execution) -> int:
    assert execution.result is not None
    number: int = orjson.loads(execution.result)["run"]
    return number


class Clock:
    """Of kept results, seconds."""

    s = 0.0

    def __call__(self) -> float:
        return self.s


def kept(clock: Clock | None = None) -> ResultCache:
    return ResultCache(None, 2**20, 2**20, compress=False, clock=clock or Clock(), jitter=lambda low, high: 0.0)


# Idempotency keys: every row of the table in docs/resilience.md


async def test_a_first_call_that_has_ended_is_given_again(work: Work) -> None:
    probe = tool_of(work)
    async with opened(probe) as rig:
        first = await rig.call(probe, {"value": 1}, idempotency_key="k")
        again = await rig.call(probe, {"value": 1}, idempotency_key="k")
        assert orjson.loads(again.as_json()) == {**orjson.loads(first.as_json()), "replayed": True}
        assert again.execution_id == first.execution_id and work.runs == 1
        assert rig.runs(probe) == {"success": 1}, "no second row is counted"
        assert rig.metrics.for_tool("probe").reuse["replayed"] == 1


async def test_a_first_call_that_failed_for_good_is_given_again(work: Work) -> None:
    probe = tool_of(work)
    work.failures.append(ToolError("no", code="NO"))
    async with opened(probe) as rig:
        for replayed in (False, True):
            execution = await rig.call(probe, idempotency_key="k")
            assert execution.error is not None and execution.error.code == "NO"
            assert execution.replayed is replayed and execution.status == "failed"
        assert work.runs == 1


async def test_a_crash_is_an_end_like_another(work: Work) -> None:
    for declared in ({}, {"idempotent": True}):
        probe = tool_of(work, **declared)
        work.failures.append(ValueError("bug"))
        async with opened(probe) as rig:
            codes = [(await rig.call(probe, idempotency_key="k")).as_dict()["error"]["code"] for _ in range(2)]
            assert codes == ["TOOL_CRASHED"] * 2


@pytest.mark.parametrize("declared", [{}, {"idempotent": True}, {"read_only": True}], ids=str)
async def test_what_may_have_been_done_elsewhere_is_repeated_only_where_that_does_no_harm(
    work: Work, declared: dict[str, bool]
) -> None:
    probe = tool_of(work, **declared)
    error = ToolError("no complete response in time", retryable=True)
    error.in_doubt = True
    work.failures.append(error)
    async with opened(probe) as rig:
        first = await rig.call(probe, idempotency_key="k")
        assert first.error is not None and first.error.retryable is bool(declared)
        again = await rig.call(probe, idempotency_key="k")
        assert (again.replayed, work.runs) == ((False, 2) if declared else (True, 1))


async def test_a_failure_that_may_help_to_repeat_is_not_kept(work: Work) -> None:
    probe = tool_of(work)
    work.failures.append(ToolError("busy", retryable=True))
    async with opened(probe) as rig:
        assert (await rig.call(probe, idempotency_key="k")).status == "failed"
        second = await rig.call(probe, idempotency_key="k")
        assert second.status == "success" and not second.replayed and work.runs == 2


@pytest.mark.parametrize(("declared", "runs"), [({}, 1), ({"idempotent": True}, 2), ({"read_only": True}, 2)], ids=str)
async def test_a_call_cut_off_by_its_deadline_runs_again_only_where_that_is_harmless(
    work: Work, declared: dict[str, bool], runs: int
) -> None:
    probe = tool_of(work, **declared)
    work.gate.clear()
    async with opened(probe) as rig:
        assert (await rig.call(probe, idempotency_key="k", timeout_override_s=0.05)).status == "timeout"
        work.gate.set()
        second = await rig.call(probe, idempotency_key="k")
        assert (second.status, second.replayed, work.runs) == (
            ("success", False, 2) if runs == 2 else ("timeout", True, 1)
        )


@pytest.mark.parametrize(("declared", "runs"), [({}, 1), ({"idempotent": True}, 2)], ids=str)
@pytest.mark.parametrize("whole_request", [False, True])
async def test_a_call_cut_off_by_a_cancellation_runs_again_only_where_that_is_harmless(
    work: Work, declared: dict[str, bool], runs: int, whole_request: bool
) -> None:
    probe = tool_of(work, **declared)
    work.gate.clear()
    async with opened(probe) as rig:
        first = rig.start(probe, idempotency_key="k")
        await until(lambda: work.runs == 1)
        if whole_request:
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
        else:
            assert rig.executor.calls.cancel(Caller("local", "local"), first.get_name(), None)
            assert (await first).status == "cancelled"
        work.gate.set()
        second = await rig.call(probe, idempotency_key="k")
        assert (second.status, second.replayed, work.runs) == (
            ("success", False, 2) if runs == 2 else ("cancelled", True, 1)
        )


async def test_a_call_that_was_refused_leaves_its_key_free(work: Work) -> None:
    probe = tool_of(work)
    async with opened(probe) as rig:
        rig.executor.calls.stop_accepting()
        assert (await rig.call(probe, idempotency_key="k")).refusal is not None
        rig.executor.calls.accepting = True
        assert (await rig.call(probe, idempotency_key="k")).status == "success"


async def test_a_call_that_runs_is_a_conflict_and_retryable(work: Work) -> None:
    probe = tool_of(work)
    work.gate.clear()
    async with opened(probe) as rig:
        first = rig.start(probe, idempotency_key="k")
        await until(lambda: work.runs == 1)
        refusal = (await rig.call(probe, idempotency_key="k")).refusal
        assert isinstance(refusal, IdempotencyConflict) and refusal.http_status == 409
        data = refusal.as_data()
        assert (data["reason"], data["retryable"]) == ("still_running", True)
        assert 0 < data["retry_after_ms"] <= 1_000 and data["first_execution_id"] == first.get_name()
        work.gate.set()
        assert (await first).status == "success" and work.runs == 1


async def test_other_parameters_are_a_conflict_for_good(work: Work) -> None:
    probe = tool_of(work)
    async with opened(probe) as rig:
        first = await rig.call(probe, {"value": 1}, idempotency_key="k")
        refusal = (await rig.call(probe, {"value": 2}, idempotency_key="k")).refusal
        assert isinstance(refusal, IdempotencyConflict) and refusal.http_status == 422
        data = refusal.as_data()
        assert (data["reason"], data["retryable"]) == ("other_call", False)
        assert data["first_execution_id"] == first.execution_id and work.runs == 1


@pytest.mark.parametrize("declared", [{}, {"idempotent": True}], ids=str)
async def test_a_first_call_whose_process_died_is_unknown_and_runs_again_only_where_that_is_harmless(
    work: Work, declared: dict[str, bool], tmp_path: Path
) -> None:
    probe = tool_of(work, **declared)
    now_ms = [1_800_000_000_000]
    path = tmp_path / "keys.db"
    store = FileStore(path, lambda: now_ms[0])
    async with opened(probe, keys=store) as rig:
        work.gate.clear()
        dead = rig.start(probe, idempotency_key="k")
        await until(lambda: work.runs == 1)
        now_ms[0] += 60_000  # it says no more
        work.gate.set()
        second = rig.start(probe, idempotency_key="k")
        execution = await second
        if declared:
            assert execution.status == "success" and work.runs == 2
        else:
            assert execution.refusal is not None and work.runs == 1
            data = execution.refusal.as_data()
            assert (data["reason"], data["retryable"]) == ("outcome_unknown", False)
        await dead
    await store.close()


async def test_parameters_are_equal_in_whatever_order(work: Work) -> None:
    @tool(id="probe", description="Count a run.")
    async def probe(a: int, b: dict[str, int]) -> dict[str, Any]:
        found: dict[str, Any] = await work.run(a)
        return found

    async with opened(probe) as rig:
        await rig.call(probe, {"a": 1, "b": {"x": 1, "y": 2}}, idempotency_key="k")
        assert (await rig.call(probe, {"b": {"y": 2, "x": 1}, "a": 1}, idempotency_key="k")).replayed


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("b", "b")),
        (("a", "b"), ("a", "c")),
        (("a", "b:c"), ("a:b", "c")),
        (("a", ""), ("", "a")),
        (("a\0", "b"), ("a", "\0b")),
    ],
)
async def test_callers_with_the_same_key_never_meet(work: Work, one: tuple[str, str], other: tuple[str, str]) -> None:
    probe = tool_of(work)
    async with opened(probe) as rig:
        first = await rig.call(probe, caller=Caller(*one), idempotency_key="k")
        second = await rig.call(probe, caller=Caller(*other), idempotency_key="k")
        assert not second.replayed and work.runs == 2
        for caller, execution in ((one, first), (other, second)):
            again = await rig.call(probe, caller=Caller(*caller), idempotency_key="k")
            assert again.replayed and again.execution_id == execution.execution_id


async def test_fifty_at_once_with_one_key_are_one_run(work: Work) -> None:
    probe = tool_of(work)
    async with opened(probe) as rig:
        calls = await asyncio.gather(*(rig.start(probe, idempotency_key="k") for _ in range(50)))
        assert work.runs == 1
        refused = [call.refusal for call in calls if call.refusal is not None]
        assert all(isinstance(refusal, IdempotencyConflict) for refusal in refused)
        assert sum(call.status == "success" and not call.replayed for call in calls) == 1


async def test_without_a_store_a_call_runs_only_where_a_repeat_is_harmless(work: Work) -> None:
    for declared, runs in (({}, 0), ({"idempotent": True}, 1), ({"read_only": True}, 1)):
        work.runs = 0
        probe = tool_of(work, **declared)  # type: ignore[arg-type]
        store = RedisStore(create_redis(f"redis://127.0.0.1:{free_port()}", 2, "test"), 2, 0.5)
        async with opened(probe, keys=store) as rig:
            execution = await rig.call(probe, idempotency_key="k")
            assert work.runs == runs
            if not runs:
                assert isinstance(execution.refusal, DependencyUnavailable) and execution.refusal.as_data()["retryable"]
            else:
                assert execution.status == "success"
        await store.close()


async def test_an_outcome_that_the_store_did_not_take_is_offered_until_it_does(
    work: Work, own_redis: RedisServer
) -> None:
    """The answer does not wait for it; and until then a repeat is no second run."""
    probe = tool_of(work)
    store = RedisStore(create_redis(own_redis.url, 5, "test"), 5, 0.2)
    async with opened(probe, keys=store) as rig:
        work.gate.clear()
        first = rig.start(probe, idempotency_key="k")
        await until(lambda: work.runs == 1)
        own_redis.pause()
        work.gate.set()
        assert (await first).status == "success"
        refusal = (await rig.call(probe, idempotency_key="k")).refusal
        assert isinstance(refusal, DependencyUnavailable)
        own_redis.resume()

        async def replayed() -> Execution:
            while True:
                execution = await rig.call(probe, idempotency_key="k")
                if execution.refusal is None:
                    return execution
                await asyncio.sleep(0.02)

        again = await asyncio.wait_for(replayed(), 20)
        assert again.replayed and again.execution_id == first.get_name() and work.runs == 1
    await store.close()


async def test_an_outcome_that_was_copied_to_another_tenants_key_is_not_given(
    work: Work, own_redis: RedisServer
) -> None:
    probe = tool_of(work)
    store = RedisStore(create_redis(own_redis.url, 5, "test"), 5, 5.0)
    async with opened(probe, keys=store) as rig:
        await rig.call(probe, caller=Caller("a", "s"), idempotency_key="k")
        (first,) = own_redis.cli("KEYS", "*").split("\n")
        await rig.call(probe, caller=Caller("b", "s"), idempotency_key="k")
        (second,) = (key for key in own_redis.cli("KEYS", "*").split("\n") if key != first)
        own_redis.cli("COPY", first, second, "REPLACE")
        refusal = (await rig.call(probe, caller=Caller("b", "s"), idempotency_key="k")).refusal
        assert refusal is not None and refusal.as_data()["reason"] == "outcome_unknown" and work.runs == 2
    await store.close()


async def test_a_replay_spends_rate_and_no_quota(work: Work) -> None:
    probe = tool_of(work, rate_limits=["3/hour"], quotas={"daily": 2})
    await _spends(probe, work, {"idempotency_key": "k"})


async def test_a_kept_result_spends_rate_and_no_quota(work: Work) -> None:
    probe = tool_of(work, read_only=True, cache_ttl=100.0, rate_limits=["3/hour"], quotas={"daily": 2})
    await _spends(probe, work, {})


async def _spends(probe: FunctionTool, work: Work, named: dict[str, str]) -> None:
    policies = tool_policies("probe", probe.spec.rate_limits, probe.spec.quotas)
    async with opened(probe, policies=policies, results=kept()) as rig:
        for _ in range(3):
            execution = await rig.call(probe, **named)
            assert execution.status == "success"
            assert execution.aside is not None and execution.aside.grant is not None, "what is left goes into headers"
        status = await rig.executor.look_at_limits(LOCAL_CALLER, "probe", None)
        assert status["quota"]["daily"]["used"] == 1
        assert isinstance((await rig.call(probe, **named)).refusal, RateLimited)
        assert work.runs == 1


# Kept results


async def test_a_hit_is_said_to_be_one_and_runs_nothing(work: Work) -> None:
    probe = tool_of(work, read_only=True, cache_ttl=100.0)
    async with opened(probe, results=kept()) as rig:
        first = await rig.call(probe, {"value": 1})
        second = await rig.call(probe, {"value": 1})
        assert (first.cached, first.attempts, second.cached, second.attempts) == (False, 1, True, 0)
        assert second.result == first.result and second.execution_id != first.execution_id
        assert (await rig.call(probe, {"value": 2})).cached is False
        reuse = rig.metrics.for_tool("probe").reuse
        assert (reuse["miss"], reuse["hit"]) == (2, 1) and rig.runs(probe) == {"success": 3}


@pytest.mark.parametrize(("declared", "runs"), [({}, 2), ({"cache_shared": True}, 1)], ids=str)
async def test_tenants_share_results_only_where_the_tool_says_so(
    work: Work, declared: dict[str, bool], runs: int
) -> None:
    probe = tool_of(work, read_only=True, cache_ttl=100.0, **declared)
    async with opened(probe, results=kept()) as rig:
        for tenant in ("a", "b"):
            for subject in ("one", "two"):
                await rig.call(probe, caller=Caller(tenant, subject))
        assert work.runs == runs


async def test_failures_are_not_kept(work: Work) -> None:
    probe = tool_of(work, read_only=True, cache_ttl=100.0)
    work.failures += [ToolError("no"), ValueError("bug")]
    async with opened(probe, results=kept()) as rig:
        assert [(await rig.call(probe)).status for _ in range(4)] == ["failed", "failed", "success", "success"]
        assert work.runs == 3


async def test_a_herd_on_an_expired_result_is_one_run(work: Work) -> None:
    clock = Clock()
    probe = tool_of(work, read_only=True, cache_ttl=100.0)
    async with opened(probe, results=kept(clock)) as rig:
        await rig.call(probe)
        clock.s = 1_000.0
        work.gate.clear()
        herd = [rig.start(probe) for _ in range(1_000)]
        await until(lambda: work.runs == 2)
        work.gate.set()
        executions = await asyncio.gather(*herd)
        assert work.runs == 2 and {execution.status for execution in executions} == {"success"}
        assert sum(not execution.cached for execution in executions) == 1
        assert rig.runs(probe) == {"success": 1_001}


async def test_a_herd_on_a_stale_result_is_answered_at_once_and_one_run_follows(work: Work) -> None:
    clock = Clock()
    probe = tool_of(work, read_only=True, cache_ttl=100.0)
    async with opened(probe, results=kept(clock)) as rig:
        await rig.call(probe)
        clock.s = 120.0
        work.gate.clear()
        executions = await asyncio.gather(*(rig.start(probe) for _ in range(1_000)))
        assert {execution.cached for execution in executions} == {True}
        await until(lambda: work.runs == 2)
        work.gate.set()
        await until(lambda: not rig.executor._reuse._refreshing)
        assert run_of(await rig.call(probe)) == 2 and work.runs == 2
        reuse = rig.metrics.for_tool("probe").reuse
        assert (reuse["stale"], reuse["hit"]) == (1_000, 1)


async def test_a_refresh_that_fails_leaves_the_stale_result(work: Work) -> None:
    clock = Clock()
    probe = tool_of(work, read_only=True, cache_ttl=100.0)
    async with opened(probe, results=kept(clock)) as rig:
        await rig.call(probe)
        clock.s = 120.0
        work.failures.append(ValueError("bug"))
        await rig.call(probe)
        await until(lambda: work.runs == 2 and not rig.executor._reuse._refreshing)
        assert run_of(await rig.call(probe)) == 1


async def test_a_new_version_of_a_tool_starts_anew(work: Work) -> None:
    results = kept()
    for version in ("1.0.0", "1.0.0", "1.0.1"):
        probe = tool_of(work, read_only=True, cache_ttl=100.0, version=version)
        async with opened(probe, results=results) as rig:
            await rig.call(probe)
    assert work.runs == 2


# Joining


@pytest.fixture
async def joined(work: Work) -> AsyncIterator[tuple[Rig, FunctionTool]]:
    work.gate.clear()
    probe = tool_of(work, read_only=True)
    async with opened(probe) as rig:
        yield rig, probe
        work.gate.set()


async def started(rig: Rig, probe: FunctionTool, followers: int) -> list[asyncio.Task[Execution]]:
    """A leader that runs and so many that follow it."""
    tasks = [rig.start(probe) for _ in range(1 + followers)]
    await until(
        lambda: sum(len(flight._turns) for flight in rig.executor._reuse._flights._flights.values()) == followers
    )
    return tasks


async def test_identical_calls_at_one_moment_are_one_run(work: Work, joined: tuple[Rig, FunctionTool]) -> None:
    rig, probe = joined
    tasks = await started(rig, probe, 1_000)
    work.gate.set()
    executions = await asyncio.gather(*tasks)
    assert work.runs == 1 and rig.runs(probe) == {"success": 1_001}
    assert [execution.cached for execution in executions] == [False] + [True] * 1_000
    assert len({execution.execution_id for execution in executions}) == 1_001
    assert run_of(await rig.call(probe)) == 2, "what comes later runs"


async def test_the_leaders_failure_is_everyones_once(work: Work, joined: tuple[Rig, FunctionTool]) -> None:
    rig, probe = joined
    tasks = await started(rig, probe, 5)
    work.failures.append(ToolError("no", code="NO"))
    work.gate.set()
    for execution in await asyncio.gather(*tasks):
        assert execution.error is not None and execution.error.code == "NO"
    assert work.runs == 1


async def test_followers_that_are_cancelled_harm_nobody(work: Work, joined: tuple[Rig, FunctionTool]) -> None:
    rig, probe = joined
    leader, one, two, three = await started(rig, probe, 3)
    one.cancel()
    assert rig.executor.calls.cancel(Caller("local", "local"), two.get_name(), None)
    with pytest.raises(asyncio.CancelledError):
        await one
    assert (await two).status == "cancelled"
    work.gate.set()
    assert run_of(await leader) == run_of(await three) == 1 and work.runs == 1


def by_request(rig: Rig, task: asyncio.Task[Execution]) -> None:
    task.cancel()


def by_method(rig: Rig, task: asyncio.Task[Execution]) -> None:
    assert rig.executor.calls.cancel(Caller("local", "local"), task.get_name(), None)


@pytest.mark.parametrize("cancel", [by_request, by_method])
async def test_when_the_leader_is_cancelled_the_next_runs(
    work: Work, joined: tuple[Rig, FunctionTool], cancel: Callable[[Rig, asyncio.Task[Execution]], None]
) -> None:
    rig, probe = joined
    tasks = await started(rig, probe, 3)
    cancel(rig, tasks[0])
    await until(lambda: work.runs == 2)
    work.gate.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(ended[0], asyncio.CancelledError) or ended[0].status == "cancelled"  # type: ignore[union-attr]
    assert [execution.status for execution in ended[1:]] == ["success"] * 3  # type: ignore[union-attr]
    assert work.runs == 2


@pytest.mark.parametrize("cancel", [by_request, by_method])
@pytest.mark.parametrize("turns", range(8))
async def test_a_leader_and_the_one_who_follows_it_cancelled_within_some_turns_leave_the_third(
    work: Work, joined: tuple[Rig, FunctionTool], cancel: Callable[[Rig, asyncio.Task[Execution]], None], turns: int
) -> None:
    rig, probe = joined
    tasks = await started(rig, probe, 2)
    cancel(rig, tasks[0])
    for _ in range(turns):
        await asyncio.sleep(0)
    cancel(rig, tasks[1])
    work.gate.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) or one.status == "cancelled" for one in ended] == [  # type: ignore[union-attr]
        True,
        True,
        False,
    ]
    assert ended[2].status == "success"  # type: ignore[union-attr]


async def test_a_leader_that_is_refused_is_followed_by_the_next(work: Work) -> None:
    work.gate.clear()
    probe = tool_of(work, read_only=True)
    policies = tool_policies("probe", [], {"daily": 1})
    async with opened(probe, policies=policies) as rig:
        first = await started(rig, probe, 2)
        work.gate.set()
        assert [execution.status for execution in await asyncio.gather(*first)] == ["success"] * 3
        refused = await asyncio.gather(*(rig.start(probe) for _ in range(3)))
        assert {execution.as_dict()["status"] for execution in refused} == {"failed"}
        assert work.runs == 1, "joined calls spend no quota, and nobody waits for what is refused"


async def test_a_short_deadline_of_the_leader_is_its_own(work: Work) -> None:
    work.gate.clear()
    probe = tool_of(work, read_only=True, cache_ttl=100.0)
    async with opened(probe, results=kept()) as rig:
        hasty = rig.start(probe, timeout_override_s=0.1)
        patient = rig.start(probe)
        assert (await hasty).status == "timeout"
        work.gate.set()
        assert (await patient).status == "success" and work.runs == 2


async def test_a_follower_that_leads_has_what_it_did_not_wait() -> None:
    deadlines: list[float] = []
    waited_s = 0.1

    @tool(read_only=True, timeout=10.0)
    async def work(context: ToolContext) -> None:
        """Wait until cancelled."""
        deadlines.append(context.deadline)
        await asyncio.Event().wait()

    async with opened(work) as rig:
        first, second = await started(rig, work, 1)
        joined_at = time.perf_counter()
        threading.Event().wait(waited_s)
        for call in (first, second):
            assert rig.executor.calls.cancel(LOCAL_CALLER, call.get_name(), None)
            assert (await call).status == "cancelled"
            await until(lambda: len(deadlines) == 2)
        assert deadlines[1] < joined_at + waited_s / 2 + 10.0


async def test_a_follower_waits_no_longer_than_its_own_deadline(work: Work) -> None:
    work.gate.clear()
    probe = tool_of(work, read_only=True, cache_ttl=100.0)
    async with opened(probe, results=kept()) as rig:
        patient = rig.start(probe)
        await until(lambda: work.runs == 1)
        assert (await rig.call(probe, timeout_override_s=0.05)).status == "timeout"
        work.gate.set()
        assert (await patient).status == "success" and work.runs == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"caller": Caller("a", "s")}, {"caller": Caller("b", "s")}),
        ({"parameters": {"value": 1}}, {"parameters": {"value": 2}}),
        ({"timeout_override_s": 5.0}, {"timeout_override_s": 6.0}),
    ],
    ids=["tenant", "parameters", "timeout"],
)
async def test_calls_that_differ_run_apart(work: Work, one: dict[str, Any], other: dict[str, Any]) -> None:
    await _apart(work, tool_of(work, read_only=True), one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"caller": Caller("a", "s")}, {"caller": Caller("a", "t")}),
        ({"caller": Caller("a", "s")}, {"caller": Caller("a", "s", scopes=frozenset({"tools:execute"}))}),
        ({"agent_id": "x"}, {"agent_id": "y"}),
        ({"session_id": "x"}, {"session_id": "y"}),
        ({"metadata": {"a": 1}}, {"metadata": {"a": 2}}),
    ],
    ids=["subject", "scopes", "agent", "session", "metadata"],
)
async def test_a_tool_that_can_see_who_calls_runs_for_each(
    work: Work, one: dict[str, Any], other: dict[str, Any]
) -> None:
    await _apart(work, context_tool_of(work, read_only=True), one, other)


async def _apart(work: Work, probe: FunctionTool, one: dict[str, Any], other: dict[str, Any]) -> None:
    work.gate.clear()
    async with opened(probe) as rig:
        tasks = [rig.start(probe, **call) for call in (one, other)]
        await until(lambda: work.runs == 2)
        work.gate.set()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("declared", [{}, {"idempotent": True}], ids=str)
async def test_a_tool_that_is_not_read_only_runs_for_each(work: Work, declared: dict[str, bool]) -> None:
    await _apart(work, tool_of(work, **declared), {}, {})


# Cancelling


class SlowStore(FileStore):
    """Holds each claim until it is told to go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "keys.db")
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()

    async def begin(self, *arguments: Any, **named: Any) -> Any:
        self.asked.set()
        await self.go_on.wait()
        return await super().begin(*arguments, **named)


async def test_a_call_that_is_cancelled_while_it_claims_its_key_never_runs_and_leaves_it_free(
    work: Work, tmp_path: Path
) -> None:
    probe = tool_of(work)
    store = SlowStore(tmp_path)
    async with opened(probe, keys=store) as rig:
        first = rig.start(probe, idempotency_key="k")
        await store.asked.wait()
        assert rig.executor.calls.cancel(Caller("local", "local"), first.get_name(), None)
        store.go_on.set()
        assert (await first).status == "cancelled" and work.runs == 0
        assert (await rig.call(probe, idempotency_key="k")).status == "success"
    await store.close()


class SlowToKeep(FileStore):
    """Holds each outcome until it is told to go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "keys.db")
        self.offered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.kept = asyncio.Event()

    async def finish(self, *arguments: Any) -> bool:
        self.offered.set()
        await self.go_on.wait()
        kept = await super().finish(*arguments)
        self.kept.set()
        return kept


async def test_a_request_that_is_cancelled_twice_still_settles_its_key(work: Work, tmp_path: Path) -> None:
    probe = tool_of(work)
    work.gate.clear()
    store = SlowToKeep(tmp_path)
    async with opened(probe, keys=store) as rig:
        first = rig.start(probe, idempotency_key="k")
        await until(lambda: work.runs == 1)
        first.cancel()
        await store.offered.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        store.go_on.set()
        await asyncio.wait_for(store.kept.wait(), SOON_S)
        execution = await rig.call(probe, idempotency_key="k")
        assert (execution.status, execution.replayed, work.runs) == ("cancelled", True, 1)
    await store.close()


class Others(Bus):
    """Other replicas, which answer as the test says."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    async def ask(self, kind: str, **what: Any) -> bool:
        self.asked.append({"kind": kind, **what})
        return self.answer


async def test_others_are_asked_only_for_what_does_not_run_here(work: Work) -> None:
    work.gate.clear()
    probe = tool_of(work)
    bus = Others(True)
    async with opened(probe, bus=bus) as rig:
        task = rig.start(probe, caller=ANNA)
        await until(lambda: work.runs == 1)
        assert await rig.executor.calls.cancel_anywhere(ANNA, task.get_name(), None) and not bus.asked
        assert (await task).status == "cancelled"
        assert await rig.executor.calls.cancel_anywhere(ANNA, "elsewhere", None)
        assert bus.asked == [
            {
                "kind": "cancel",
                "tenant": "acme",
                "subject": "anna",
                "is_admin": False,
                "execution_id": "elsewhere",
                "call_id": None,
            }
        ]


async def test_another_replicas_caller_cancels_its_own_calls_and_an_admin_any(work: Work) -> None:
    work.gate.clear()
    probe = tool_of(work)
    async with opened(probe) as rig:
        task = rig.start(probe, caller=ANNA, call_id="mine")
        await until(lambda: work.runs == 1)
        own = {"tenant": "acme", "subject": "anna", "is_admin": False, "execution_id": None, "call_id": None}
        cancel = rig.executor.calls._cancel_for
        name = task.get_name()
        for asked in (
            {},
            own,
            {**own, "execution_id": name, "subject": "ben"},
            {**own, "execution_id": name, "tenant": "acme2"},
            {**own, "execution_id": name, "tenant": None},
            {**own, "execution_id": name, "subject": ["anna"]},
            {**own, "execution_id": name, "subject": "ben", "is_admin": "yes"},
            {**own, "execution_id": [name]},
            {**own, "call_id": "mine", "subject": "ben", "is_admin": True},
            {**own, "call_id": "mine", "subject": "ben", "anyones": True},
            {**own, "call_id": "mine", "subject": "ben", "is_admin": True, "anyones": "yes"},
            {**own, "execution_id": name, "subject": "ben", "is_admin": True, "anyones": True},
        ):
            assert not cancel(asked), asked
        assert cancel({**own, "execution_id": name, "tenant": "x", "subject": "root", "is_admin": True})
        assert (await task).status == "cancelled"
        other = rig.start(probe, caller=ANNA, call_id="mine")
        await until(lambda: work.runs == 2)
        assert cancel({**own, "call_id": "mine"})
        assert (await other).status == "cancelled"
        last = rig.start(probe, caller=ANNA, call_id="mine")
        await until(lambda: work.runs == 3)
        assert cancel({**own, "call_id": "mine", "subject": "ben", "is_admin": True, "anyones": True})
        assert (await last).status == "cancelled"
