"""The load test itself: it ends, it sees every failure, and it says so. Locust stays in processes of its own."""

from __future__ import annotations

import json
import signal
from itertools import islice
from threading import Event
from typing import Any

import psutil
import pytest

from load.calls import Call, Request, WrongAnswer, deal, echo, execute, execute_batch, execute_parallel
from load.run import print_figures
from load.scenarios import Bounds, seconds
from tests.conftest import Serve
from tests.load.runs import RUN_S_MAX, RUN_TIME, Limited, run_load, serving, start_load

KINDS = {
    "echo",
    "calculator",
    "web_scrape",
    "echo hammered",
    "execute_batch",
    "execute_parallel",
    "execute_with_fallback",
}


def test_a_run_with_its_own_service_ends_by_itself_without_a_failure_and_sends_every_kind_of_request() -> None:
    run = run_load("--users", "5", "--spawn-rate", "5", "--run-time", "10s")
    assert run.code == 0, run.output
    assert run.rows.keys() == KINDS | {"all"}
    assert all(requests > 0 and failures == 0 for requests, failures in run.rows.values()), run.output


def test_a_tool_that_fails_counts_as_failure_and_fails_the_run(serve: Serve) -> None:
    service = serve()  # allows no egress to loopback
    run = run_load("--users", "2", "--run-time", RUN_TIME, "--pages-port", "0", "--host", service.url, "BurstUser")
    assert run.code == 1, run.output
    requests, failures = run.rows["web_scrape"]
    assert requests == failures > 0
    assert "web_scrape: web_scrape failed: EGRESS_REFUSED" in run.output
    assert run.rows["echo"][1] == run.rows["calculator"][1] == 0


def test_a_json_rpc_error_in_http_200_counts_as_failure() -> None:
    with serving(Limited) as url:
        run = run_load("--users", "2", "--run-time", RUN_TIME, "--pages-port", "0", "--host", url, "PlainUser")
    assert run.code == 1, run.output
    requests, failures = run.rows["all"]
    assert requests == failures > 0
    assert "refused: -32001 rate_limit" in run.output


def test_being_limited_is_what_the_quota_user_expects_and_counts_apart() -> None:
    with serving(Limited) as url:
        run = run_load("--users", "2", "--run-time", RUN_TIME, "--pages-port", "0", "--host", url, "QuotaUser")
    assert run.code == 0, run.output
    requests, failures = run.rows["echo hammered (limited)"]
    assert requests > 0 and failures == 0


def test_a_service_that_does_not_start_is_said_and_exits_2() -> None:
    run = run_load("--run-time", "1s", PROFILE="no such profile")
    assert run.code == 2
    assert "PROFILE" in run.output and "the service ended before it served" in run.output


def test_a_run_that_is_terminated_ends_what_it_started() -> None:
    scraped = Event()

    class Page(Limited):
        def do_GET(self) -> None:
            scraped.set()
            super().do_GET()

    with serving(Page) as url:
        process = start_load("--run-time", "5m", "BurstUser", PAGES_URL=url)
        try:
            assert scraped.wait(RUN_S_MAX)
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.terminate()
            process.communicate(timeout=RUN_S_MAX)
    assert process.returncode == 128 + signal.SIGTERM
    assert len(children) == 2  # the service and Locust
    assert psutil.wait_procs(children, timeout=RUN_S_MAX)[1] == []


def test_the_mix_is_half_echo_three_tenths_calculator_two_tenths_web_scrape() -> None:
    tools = [call.tool_id for call in islice(deal(), 100)]
    assert {tool: tools.count(tool) for tool in tools} == {"echo": 50, "calculator": 30, "web_scrape": 20}


def _success(result: Any, tool_id: str = "echo") -> dict[str, Any]:
    return {"status": "success", "tool_id": tool_id, "result": result}


def _answer(result: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 7, "result": result}


def _judge(request: Request, answer: Any, status_code: int = 200) -> str:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    try:
        request.judge(status_code, body, request_id=7)
    except WrongAnswer as wrong:
        return str(wrong)
    return ""


def _right() -> tuple[Request, dict[str, Any]]:
    call = echo()
    return execute(call, "test"), _answer(_success({"message": call.parameters["message"]}))


def test_the_right_answer_passes() -> None:
    request, answer = _right()
    assert _judge(request, answer) == ""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_answer(_success({"message": "something else"})), "echo: wrong result"),
        (_answer(_success({"message": "…"}, tool_id="current_time")), "echo: wrong result"),
        (_answer({"status": "failed", "error": {"code": "TOOL_FAILED"}}), "echo failed: TOOL_FAILED"),
        (_answer({"status": "timeout", "error": {"code": "TOOL_TIMEOUT"}}), "echo timeout: TOOL_TIMEOUT"),
        ({"id": 7, "error": {"code": -32006, "data": {"error_type": "overloaded"}}}, "refused: -32006 overloaded"),
        ({"id": 8, "result": {}}, "answer to another request"),
        (_answer(None), "not of the shape that the contract gives"),
        ([], "not of the shape that the contract gives"),
        (b"<html>", "not JSON"),
    ],
)
def test_http_200_with_anything_but_the_right_answer_is_a_failure(answer: Any, reason: str) -> None:
    assert _judge(execute(echo(), "test"), answer) == reason


def test_another_http_status_is_a_failure_whatever_the_body_says() -> None:
    assert _judge(*_right(), status_code=503) == "HTTP 503"


def test_one_wrong_item_fails_the_whole_batch() -> None:
    calls = [echo(), echo()]
    good = [_success({"message": call.parameters["message"]}) for call in calls]
    refused = {"error": {"code": -32001, "data": {"error_type": "rate_limit"}}}
    batch = execute_batch(calls, "test")
    assert _judge(batch, _answer({"results": good})) == ""
    assert _judge(batch, _answer({"results": good[::-1]})) == "echo: wrong result"
    assert _judge(batch, _answer({"results": good[:1]})) == "a batch of another length"
    assert _judge(batch, _answer({"results": [good[0], refused]})) == "refused: -32001 rate_limit"


def test_a_plan_whose_dependent_task_computed_with_another_value_is_a_failure() -> None:
    first = Call("calculator", {"operation": "add", "a": 1, "b": 2}, lambda result: result["value"] == 3)
    second = echo()
    results = {
        "first": _success({"value": 3}, "calculator"),
        "second": _success({"message": second.parameters["message"]}),
        "last": _success({"value": 4}, "calculator"),
    }
    plan = execute_parallel(first, second, "test")
    assert _judge(plan, _answer({"results": results})) == ""
    wrong = results | {"last": _success({"value": 5}, "calculator")}
    assert _judge(plan, _answer({"results": wrong})) == "calculator: wrong result"


def _row(name: str, requests: int, failures: int) -> dict[str, Any]:
    return {"name": name, "requests": requests, "failures": failures, "p50": 1, "p95": 2, "p99": 3, "max": 4, "rps": 5}


LOOSE = Bounds(p95_ms_max=1000)


def _report(**more: Any) -> dict[str, Any]:
    figures = {"rows": [_row("echo", 1, 0)], "total": _row("Aggregated", 1, 0), "failures": [], "crashes": []}
    return {**figures, **more}


def test_a_kind_that_never_works_fails_the_run_however_often_the_others_do() -> None:
    rows = [_row("echo", 9_990, 0), _row("execute_parallel", 10, 10)]
    report = _report(rows=rows, total=_row("Aggregated", 10_000, 10))
    assert LOOSE.broken(report) == ["execute_parallel: 0.00% succeeded, at least 95.00% must"]
    assert LOOSE.broken(report | {"rows": rows[:1]}) == []


@pytest.mark.parametrize(("failures", "good"), [(50, True), (51, False)])
def test_success_is_judged_at_its_bound(failures: int, good: bool) -> None:
    report = _report(rows=[_row("echo", 1000, failures)])
    assert (LOOSE.broken(report) == []) is good


@pytest.mark.parametrize(("p95", "good"), [(1000, True), (1001, False)])
def test_p95_is_judged_at_its_bound(p95: int, good: bool) -> None:
    report = _report(total=_row("Aggregated", 1, 0) | {"p95": p95})
    assert (LOOSE.broken(report) == []) is good


@pytest.mark.parametrize("nothing", [{"total": _row("Aggregated", 0, 0)}, {"crashes": ["KeyError"]}])
def test_a_run_that_asked_nothing_or_lost_a_user_is_not_good(nothing: dict[str, Any]) -> None:
    assert LOOSE.broken(_report()) == []
    assert len(LOOSE.broken(_report(**nothing))) == 1


def test_every_broken_bound_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_figures(_report(broken=["this", "that"]))
    assert "FAILED: this\nFAILED: that" in capsys.readouterr().out
    print_figures(_report(broken=[]))
    assert "PASSED" in capsys.readouterr().out


def test_a_run_time_is_spelled_as_locust_spells_it_and_bounded() -> None:
    assert [seconds(text) for text in ("45", "30s", "10m", "1h30m")] == [45, 30, 600, 5400]
    for text in ("", "0s", "10 m", "5x", "m", "-3s"):
        with pytest.raises(ValueError, match="30s"):
            seconds(text)
