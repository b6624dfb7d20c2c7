"""What a caller sees of limits: refusals with their rule, headers, and the status that costs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import Running, end, start_service

POLICIES = """
policies:
  - name: echo-rate
    match: {tool: echo}
    per: [tenant, subject, tool]
    rate: 3/hour
  - name: time-quota
    match: {tool: current_time}
    per: [subject]
    quota: {daily: 2, monthly: 50}
  - name: watched
    match: {tool: calculator}
    per: []
    rate: 1/day
    mode: shadow
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("limits") / "limits.yaml"
    file.write_text(POLICIES)
    running = start_service(LIMITS_FILE=str(file), TOOL_MODULES="tests.tools_for_tests")
    yield running
    end(running)


def execute(service: Running, agent: str, tool_id: str = "echo", **more: Any) -> httpx.Response:
    params = {"tool_id": tool_id, "parameters": {"message": "m"} if tool_id == "echo" else {}, "agent_id": agent}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": {**params, **more}}
    return service.http.post("/api/v1/jsonrpc", json=body)


def limit_headers(answer: httpx.Response) -> dict[str, int]:
    return {name: int(value) for name, value in answer.headers.items() if name.startswith(("ratelimit-", "retry-"))}


def status(service: Running, agent: str, tool_id: str = "echo") -> dict[str, Any]:
    answer = service.rpc("tools.get_rate_limit_status", {"tool_id": tool_id, "agent_id": agent})
    return answer["result"]  # type: ignore[no-any-return]


def test_the_a2a_context_names_the_agent_of_a_status_as_of_a_call(limited: Running) -> None:
    execute(limited, "of-a2a")
    by_a2a = limited.rpc("tools.get_rate_limit_status", {"tool_id": "echo"}, a2a_context={"source_agent": "of-a2a"})
    assert by_a2a["result"]["rate_limit"]["remaining"] == status(limited, "of-a2a")["rate_limit"]["remaining"] == 2


def test_a_call_that_met_a_limit_says_what_is_left_in_headers(limited: Running) -> None:
    remaining = [limit_headers(execute(limited, "a")) for _ in range(3)]
    assert [left["ratelimit-remaining"] for left in remaining] == [2, 1, 0]
    assert {left["ratelimit-limit"] for left in remaining} == {3}
    assert [math.ceil(left["ratelimit-reset"] / 1200) for left in remaining] == [1, 2, 3]
    assert not any("retry-after" in left for left in remaining)


def test_a_refusal_names_its_rule_and_when_to_come_back_on_both_doors(limited: Running) -> None:
    for _ in range(3):
        execute(limited, "b")
    rpc = execute(limited, "b")
    rest = limited.http.post("/api/v1/tools/echo/execute", json={"parameters": {"message": "m"}, "agent_id": "b"})
    assert (rpc.status_code, rest.status_code) == (200, 429)
    for answer in (rpc, rest):
        error = answer.json()["error"]
        assert error["code"] == -32001
        data = error["data"]
        assert (data["error_type"], data["retryable"], data["rule"], data["limit"]) == (
            "rate_limit",
            True,
            "echo-rate",
            3,
        )
        assert 0 < data["retry_after_ms"] <= 1_200_000 and data["execution_id"]
        left = limit_headers(answer)
        assert left["ratelimit-remaining"] == 0
        assert left["retry-after"] == math.ceil(data["retry_after_ms"] / 1000)


def test_a_used_up_quota_says_when_its_day_ends(limited: Running) -> None:
    for _ in range(2):
        assert execute(limited, "c", "current_time").json()["result"]["status"] == "success"
    answer = execute(limited, "c", "current_time")
    error = answer.json()["error"]
    assert error["code"] == -32005 and error["data"]["rule"] == "time-quota" and error["data"]["limit"] == 2
    assert error["data"]["reset_at"].endswith("T00:00:00.000Z")
    left = status(limited, "c", "current_time")
    assert left["quota"]["daily"] == {"limit": 2, "used": 2, "remaining": 0, "reset_at": error["data"]["reset_at"]}
    assert left["quota"]["monthly"]["used"] == 2, "what the day refused was taken from the month"


def test_calls_without_a_limit_and_batches_have_no_headers(limited: Running) -> None:
    assert limit_headers(execute(limited, "d", "calculator", parameters={"expression": "1"})) == {}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": {"tool_id": "echo", "agent_id": "d"}}
    call["params"]["parameters"] = {"message": "m"}  # type: ignore[index]
    answer = limited.http.post("/api/v1/jsonrpc", json=[call] * 4)
    assert limit_headers(answer) == {}
    assert [item.get("error", {}).get("code") for item in answer.json()].count(-32001) == 1


def test_every_item_of_a_plan_is_counted(limited: Running) -> None:
    item = {"tool_id": "echo", "parameters": {"message": "m"}, "agent_id": "e"}
    result = limited.rpc("tools.execute_batch", {"requests": [item] * 5})["result"]
    assert (result["successful_count"], result["failed_count"]) == (3, 2)


def test_asking_costs_nothing_and_both_doors_tell_the_same(limited: Running) -> None:
    execute(limited, "f")
    first = status(limited, "f")
    assert first["rate_limit"]["remaining"] == 2 and first["rate_limit"]["window_seconds"] == 3600
    assert first["policies"] == [
        {"rule": "echo-rate", "kind": "rate", **first["rate_limit"], "burst": 3},
    ]
    assert status(limited, "f")["rate_limit"]["remaining"] == 2
    rest = limited.http.get("/api/v1/limits/current_time").json()
    assert rest == status(limited, "local", "current_time") | {"policies": rest["policies"]}


def test_what_is_only_watched_is_counted_and_never_shown_or_enforced(limited: Running) -> None:
    before = limited.metric("limit_decisions_total", kind="rate", outcome="would_refuse")
    answers = [execute(limited, "g", "calculator", parameters={"expression": "1"}) for _ in range(3)]
    assert [answer.json()["result"]["status"] for answer in answers] == ["success"] * 3
    assert limited.metric("limit_decisions_total", kind="rate", outcome="would_refuse") >= before + 2
    assert status(limited, "g", "calculator")["policies"] == []


def test_the_status_of_a_tool_that_is_not_there_looks_like_any_other_unknown_tool(limited: Running) -> None:
    answer = limited.rpc("tools.get_rate_limit_status", {"tool_id": "nope"})
    assert answer["error"]["code"] == -32004
    assert limited.http.get("/api/v1/limits/nope").status_code == 404


def test_a_call_that_its_schema_refuses_costs_nothing(limited: Running) -> None:
    for _ in range(5):
        assert execute(limited, "h", parameters={"message": 1}).json()["error"]["code"] == -32602
    assert status(limited, "h")["rate_limit"]["remaining"] == 3


def test_refusals_are_said_in_the_log_once_and_not_for_each_call(limited: Running) -> None:
    for _ in range(20):
        execute(limited, "i")
    limited.rpc("rpc.ping")
    limited.read_log(lambda event: event["message"] == "limit refuses" and event["rule"] == "echo-rate")
    said = [event for event in limited.log if event["message"] == "limit refuses" and event["rule"] == "echo-rate"]
    assert len(said) <= 3
