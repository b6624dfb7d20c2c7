"""A tool's doings stay its own: other calls of the same request, and the process, go on."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.conftest import Running, Serve
from tests.servers import wait_until

TOOLS = "tests.tools_for_tests"


def test_a_tool_cannot_cancel_the_request_that_it_runs_in(service: Running) -> None:
    requests: list[dict[str, Any]] = [
        {"tool_id": "cancel_current_task"},
        {"tool_id": "wait", "parameters": {"seconds": 0}},
    ]
    result = service.rpc("tools.execute_batch", {"requests": requests, "max_concurrent": 1})["result"]
    assert [item["status"] for item in result["results"]] == ["success", "success"]
    batch = [
        {"jsonrpc": "2.0", "id": number, "method": "tools.execute", "params": params}
        for number, params in enumerate([requests[0]] * 10 + [requests[1]] * 20)
    ]
    answers = service.http.post("/api/v1/jsonrpc", json=batch).json()
    assert sorted(answer["id"] for answer in answers) == list(range(30))


def test_a_value_that_comes_after_the_deadline_is_none_though_nothing_could_interrupt_the_run(service: Running) -> None:
    late = service.execute("block_loop_past_the_deadline")
    assert (late["status"], late["result"], late["error"]["code"]) == ("timeout", None, "TOOL_TIMEOUT")


def test_a_group_of_tasks_that_is_cancelled_before_it_begins_ends_as_it_would_elsewhere(service: Running) -> None:
    assert service.execute("cancel_a_group_that_has_not_begun")["result"] == "done"


def test_an_exit_below_a_context_of_its_own_ends_no_more_than_its_task(service: Running) -> None:
    assert service.execute("exit_in_a_task_of_another_context")["result"] == "done"
    assert service.http.get("/livez").status_code == 200


def test_an_exit_in_a_callback_ends_no_other_call_and_not_the_process(serve: Serve) -> None:
    running = serve(TOOL_MODULES=TOOLS, DRAIN_SECONDS="0")
    requests = [{"tool_id": "wait", "parameters": {"seconds": 0.3}}, {"tool_id": "exit_in_callbacks"}]
    result = running.rpc("tools.execute_batch", {"requests": requests})["result"]
    assert [item["status"] for item in result["results"]] == ["success", "success"]
    assert running.http.get("/livez").status_code == 200
    assert running.stop() == 0
    assert running.process.stdout is not None
    assert running.process.stdout.read().count(b"exit in a callback") == 3


def test_a_tool_that_takes_the_default_threads_keeps_no_call_from_its_own(serve: Serve) -> None:
    running = serve(TOOL_MODULES=TOOLS)
    assert running.execute("hang_in_the_default_pool")["status"] == "timeout"
    keyed = {"tool_id": "echo", "parameters": {"message": "hi"}, "idempotency_key": "k"}  # its file is opened now
    first = running.rpc("tools.execute", keyed)["result"]
    assert first["status"] == "success"
    assert running.rpc("tools.execute", keyed)["result"] == {**first, "replayed": True}
    assert running.stop() == 0


def test_the_results_of_one_request_share_the_room_of_one_answer(serve: Serve) -> None:
    running = serve(TOOL_MODULES=TOOLS, MAX_RESULT_BYTES="10000")
    one = {"tool_id": "return_long", "parameters": {"characters": 9000}}
    result = running.rpc("tools.execute_batch", {"requests": [one] * 30})["result"]
    assert result["successful_count"] == 17  # 16 results of MAX_RESULT_BYTES, that is 160,000 bytes
    errors = {item["error"]["code"] for item in result["results"] if item["status"] != "success"}
    assert errors == {"TOOL_RESULT_TOO_LARGE"}
    call = {"jsonrpc": "2.0", "method": "tools.execute_batch", "params": {"requests": [one] * 10}}
    batch = [{**call, "id": number} for number in range(10)]
    answers = running.http.post("/api/v1/jsonrpc", json=batch).json()
    assert sum(answer["result"]["successful_count"] for answer in answers) == 17


def test_a_drain_cuts_no_plan_that_was_let_in_and_no_batch_that_partly_ran(serve: Serve, tmp_path: Path) -> None:
    running = serve(TOOL_MODULES=TOOLS)
    gate = tmp_path / "gate"
    chain = [
        {
            "task_id": str(number),
            "tool_id": "wait_for_file",
            "parameters": {"path": str(gate)},
            "dependencies": [str(number - 1)] if number else [],
        }
        for number in range(4)
    ]
    waits = [
        {"jsonrpc": "2.0", "id": number, "method": "tools.execute", "params": ["wait_for_file", {"path": str(gate)}]}
        for number in range(30)
    ]
    with ThreadPoolExecutor(2) as pool:
        plan = pool.submit(running.rpc, "tools.execute_parallel", {"tasks": chain})
        array = pool.submit(running.http.post, "/api/v1/jsonrpc", json=waits)
        wait_until(lambda: running.metric("tool_execution_concurrency") >= 11, "both run")
        running.process.send_signal(signal.SIGTERM)
        running.read_log(lambda event: event["message"] == "draining")
        gate.touch()
        assert plan.result(60)["result"]["successful_count"] == 4
        answered = array.result(60)
    assert answered.status_code == 200
    refused = [answer for answer in answered.json() if "error" in answer]
    assert refused and {answer["error"]["code"] for answer in refused} == {-32009}
    assert len(refused) < 30 and running.process.wait(60) == 0
