"""Batches, plans and fallbacks over the wire: refused whole before anything runs, or answered whole."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Running


def item(tool_id: str = "count_calls", **parameters: Any) -> dict[str, Any]:
    return {"tool_id": tool_id, "parameters": parameters}


def task(task_id: str, *dependencies: str, tool_id: str = "count_calls", **parameters: Any) -> dict[str, Any]:
    return {"task_id": task_id, "dependencies": list(dependencies), **item(tool_id, **parameters)}


REFUSED_PLANS: dict[str, dict[str, Any]] = {
    "a cycle": {"tasks": [task("free"), task("a", "b"), task("b", "a")]},
    "itself": {"tasks": [task("a", "a")]},
    "an unknown task": {"tasks": [task("a"), task("b", "nowhere")]},
    "a duplicate": {"tasks": [task("a"), task("a")]},
    "a reference to no dependency": {"tasks": [task("a"), task("b", tool_id="echo", message={"$from": "a"})]},
    "no task": {"tasks": []},
    "too many tasks": {"tasks": [task(f"t{number}") for number in range(101)]},
    "no task_id": {"tasks": [item()]},
    **{
        f"max_concurrent {value!r}": {"tasks": [task("a")], "max_concurrent": value}
        for value in (0, 101, -1, 1.5, "5", True, None)
    },
}

REFUSED_BATCHES: dict[str, dict[str, Any]] = {
    "no request": {"requests": []},
    "too many requests": {"requests": [item()] * 101},
    "too many by the older name": {"executions": [item()] * 101},
    "a request without a tool": {"requests": [item(), {}]},
    **{
        f"max_concurrent {value!r}": {"requests": [item()], "max_concurrent": value}
        for value in (0, 101, -1, 1.5, "5", True, None)
    },
}

CASES = [
    *(("tools.execute_parallel", why, params) for why, params in REFUSED_PLANS.items()),
    *(("tools.execute_batch", why, params) for why, params in REFUSED_BATCHES.items()),
    ("tools.execute_with_fallback", "too many", {"primary": item(), "fallback": [item()] * 101}),
    ("tools.execute_with_fallback", "no primary", {"fallback": [item()]}),
]


@pytest.mark.parametrize(("method", "why", "params"), CASES, ids=[f"{method} {why}" for method, why, _ in CASES])
def test_what_is_wrong_with_many_calls_is_said_before_any_of_them_runs(
    service: Running, method: str, why: str, params: dict[str, Any]
) -> None:
    before = service.execute("count_calls")["result"]
    error = service.rpc(method, params)["error"]
    assert error["code"] == -32602, why
    assert error["data"]["errors"][0]["path"]
    assert service.execute("count_calls")["result"] == before + 1, "nothing ran in between"


def test_a_plan_answers_each_task_by_its_id(service: Running) -> None:
    answer = service.rpc(
        "tools.execute_parallel",
        {
            "tasks": [
                task("last", "sum", "bad", tool_id="echo", message="never"),
                task("text", tool_id="echo", message="six"),
                task("shout", "text", tool_id="echo", message={"$from": "text", "path": "message"}, uppercase=True),
                task("sum", tool_id="calculator", operation="add", a=1, b=2),
                task("bad", tool_id="fail_clearly"),
                task("unknown", tool_id="no_such_tool"),
            ]
        },
    )["result"]
    results = answer["results"]
    assert list(results) == ["last", "text", "shout", "sum", "bad", "unknown"]
    assert results["shout"]["result"] == {"message": "SIX"}
    assert results["sum"]["result"] == {"value": 3}
    assert results["bad"]["error"]["code"] == "TICKET_CLOSED"
    assert (results["last"]["status"], results["last"]["error"]["code"]) == ("skipped", "DEPENDENCY_FAILED")
    assert results["unknown"]["error"]["code"] == -32004
    assert (answer["successful_count"], answer["failed_count"]) == (3, 3)
    assert answer["execution_order"].index("text") < answer["execution_order"].index("shout")
    assert "last" not in answer["execution_order"]


def test_a_batch_answers_in_order_with_refusals_in_their_place(service: Running) -> None:
    requests = [
        item("wait", seconds=0.2, value=0),
        item("echo", message=1),
        item("wait", seconds=0.0, value=2),
        item("no_such_tool"),
        item("fail_clearly"),
    ]
    for name in ("requests", "executions"):
        answer = service.rpc("tools.execute_batch", {name: requests, "max_concurrent": 5})["result"]
        first, invalid, second, unknown, failed = answer["results"]
        assert (first["result"], second["result"]) == (0, 2)
        assert (invalid["error"]["code"], unknown["error"]["code"]) == (-32602, -32004)
        assert failed["status"] == "failed"
        assert (answer["successful_count"], answer["failed_count"]) == (2, 3)


def test_a_batch_may_have_a_hundred_requests(service: Running) -> None:
    answer = service.rpc("tools.execute_batch", {"requests": [item("echo", message="a")] * 100, "max_concurrent": 100})
    assert answer["result"]["successful_count"] == 100


def fallback(service: Running, *tools: dict[str, Any]) -> dict[str, Any]:
    return service.rpc("tools.execute_with_fallback", {"primary": tools[0], "fallback": list(tools[1:])})


FINE, OTHER = item("echo", message="fine"), item("echo", message="other")
BAD, UNKNOWN, INVALID = item("fail_clearly"), item("no_such_tool"), item("echo")


def test_a_primary_that_succeeds_needs_no_fallback(service: Running) -> None:
    answer = fallback(service, FINE, OTHER)["result"]
    assert answer["result"]["result"] == {"message": "fine"}
    assert (answer["used_fallback"], len(answer["attempts"])) == (False, 1)


def test_a_fallback_stands_in_for_a_tool_that_fails_or_is_not_there(service: Running) -> None:
    for first in (BAD, UNKNOWN):
        answer = fallback(service, first, OTHER, FINE)["result"]
        assert answer["result"]["result"] == {"message": "other"}
        assert (answer["used_fallback"], len(answer["attempts"])) == (True, 2)


def test_a_fallback_by_the_older_name_or_alone_is_the_same(service: Running) -> None:
    for params in ({"fallback": OTHER}, {"fallbacks": [OTHER]}):
        answer = service.rpc("tools.execute_with_fallback", {"primary": BAD, **params})["result"]
        assert answer["used_fallback"] and answer["result"]["result"] == {"message": "other"}


def test_invalid_parameters_are_the_callers_to_mend(service: Running) -> None:
    assert fallback(service, INVALID, FINE)["error"]["code"] == -32602
    answer = fallback(service, BAD, INVALID, FINE)["result"]
    assert answer["result"]["status"] == "failed" and not answer["used_fallback"]
    assert answer["attempts"][1]["error"]["code"] == -32602


def test_when_nothing_could_run_the_first_refusal_is_the_answer(service: Running) -> None:
    assert fallback(service, UNKNOWN, item("hidden"))["error"]["code"] == -32004


def test_when_everything_failed_the_last_execution_is_the_answer(service: Running) -> None:
    answer = fallback(service, item("raise_exception"), BAD)["result"]
    assert answer["result"]["error"]["code"] == "TICKET_CLOSED"
    assert answer["used_fallback"] and len(answer["attempts"]) == 2


def test_tasks_whose_turn_never_came_are_counted_too(service: Running) -> None:
    before = {kind: service.metric("tool_errors_total", error_type=kind) for kind in ("skipped", "invalid_params")}
    tasks: list[dict[str, Any]] = [
        {"task_id": "fails", "tool_id": "fail_clearly"},
        {"task_id": "skipped", "tool_id": "echo", "dependencies": ["fails"]},
        {"task_id": "works", "tool_id": "echo", "parameters": {"message": "x"}},
        {
            "task_id": "lost",
            "tool_id": "echo",
            "parameters": {"message": {"$from": "works", "path": "no.such"}},
            "dependencies": ["works"],
        },
    ]
    result = service.rpc("tools.execute_parallel", {"tasks": tasks})["result"]
    assert (result["successful_count"], result["failed_count"]) == (1, 3)
    after = {kind: service.metric("tool_errors_total", error_type=kind) for kind in before}
    assert after == {kind: count + 1 for kind, count in before.items()}
