"""Tools, clients and operators at their worst, against the service as it is served."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT, Running, Serve, service_environ, start_service
from tests.conftest import end as end_service

SOON_S = 30.0
"""Not a claim about speed: past it a test fails instead of hanging."""

CANARY = "canary-7f3a"


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < ends, "it never came to be"
        threading.Event().wait(0.01)


@pytest.fixture(scope="module")
def own() -> Iterator[Running]:
    """A service of this module's own, whose counters nobody else moves."""
    running = start_service(TOOL_MODULES="tests.tools_for_tests,tests.transport.lane_tools")
    yield running
    end_service(running)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as threads:
        yield threads


def call_of(tool_id: str, **parameters: Any) -> dict[str, Any]:
    params = {"tool_id": tool_id, "parameters": parameters}
    return {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": params}


def post(running: Running, tool_id: str, parameters: dict[str, Any] | None = None, **params: Any) -> httpx.Response:
    """tools.execute on a connection of its own, so that several can run at once."""
    body = {"tool_id": tool_id, "parameters": parameters or {}, **params}
    request = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": body}
    return httpx.post(f"{running.url}/api/v1/jsonrpc", json=request, timeout=SOON_S + 60, trust_env=False)


def waiting_call(running: Running, pool: ThreadPoolExecutor, folder: Path) -> tuple[Path, Future[httpx.Response]]:
    """A call that runs until there is that file, and its answer: `done`."""
    gate = folder / "gate"
    call = pool.submit(post, running, "wait_for_file", {"path": str(gate), "value": "done"})
    until(lambda: running.metric("tool_execution_concurrency") == 1)
    return gate, call


def result(response: httpx.Response) -> dict[str, Any]:
    answer: dict[str, Any] = response.json()
    return answer.get("result") or answer["error"]


def send_half(running: Running, request: bytes, keep_back: int = 0) -> socket.socket:
    """A POST on the wire, whole or but for its last bytes."""
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=SOON_S)
    head = b"POST /api/v1/jsonrpc HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(request)
    connection.sendall(head + request[: len(request) - keep_back])
    return connection


def execute_request(tool_id: str, parameters: dict[str, Any], **params: Any) -> bytes:
    body = {"tool_id": tool_id, "parameters": parameters, **params}
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": body}).encode()


def is_idle(running: Running) -> bool:
    gauges = ("tool_execution_concurrency", "tool_execution_queue_depth", "tool_abandoned_runs_active")
    return not any(running.metric(name) for name in gauges)


def test_a_tool_that_ignores_its_cancellation_times_out_and_its_end_is_noticed(own: Running, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    abandoned = own.metric("tool_abandoned_runs_total")
    execution = own.execute("stubborn_until_file", {"path": str(gate)}, timeout_override=0.5)
    assert (execution["status"], execution["result"]) == ("timeout", None)
    assert execution["error"]["code"] == "TOOL_TIMEOUT" and execution["error"]["category"] == "timeout"
    assert own.metric("tool_abandoned_runs_active") == 1
    assert own.metric("tool_execution_concurrency") == 0
    assert own.metric("tool_abandoned_runs_total") == abandoned + 1
    gate.touch()
    until(lambda: is_idle(own))
    assert own.metric("tool_executions_total", tool_id="stubborn_until_file", status="success") == 0


def test_a_tool_with_too_many_hung_runs_is_refused_and_the_others_are_not(own: Running, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    hung = {"path": str(gate)}

    def eight_hang() -> bool:
        """One more: a thread that comes too late to its call does not hang."""
        assert own.execute("block_thread_until_file", hung, timeout_override=0.05)["status"] == "timeout"
        return own.metric("tool_abandoned_runs_active") == 8

    until(eight_hang)
    refused = own.execute("block_thread_until_file", hung)
    assert refused["code"] == -32006
    assert refused["data"]["error_type"] == "overloaded" and refused["data"]["retry_after_ms"] > 0
    assert own.execute("echo", {"message": "a"})["status"] == "success"
    gate.touch()
    until(lambda: is_idle(own))
    assert own.execute("block_thread_until_file", hung)["status"] == "success"


@pytest.mark.parametrize(
    "tool_id", ["raise_exit", "raise_exit_in_thread", "raise_exit_in_child", "cancel_itself", "raise_exception"]
)
def test_a_tool_that_exits_or_raises_fails_alone(own: Running, tool_id: str) -> None:
    response = post(own, tool_id)
    execution = result(response)
    assert execution["status"] == "failed" and execution["error"]["code"] == "TOOL_CRASHED"
    assert own.process.poll() is None
    assert own.execute("echo", {"message": "a"})["status"] == "success"


def test_the_text_of_an_exception_is_in_the_log_without_secrets_and_in_no_answer(own: Running) -> None:
    response = post(own, "raise_exception")
    assert CANARY.encode() not in response.content and b"hunter2" not in response.content
    execution_id = result(response)["execution_id"]
    event = own.read_log(lambda event: event.get("execution_id") == execution_id)
    assert event["message"] == "tool crashed" and event["tool_id"] == "raise_exception"
    assert CANARY in event["exception"] and "hunter2" not in json.dumps(own.log)


@pytest.mark.parametrize(
    "kind", ["nan", "infinity", "bytes", "cycle", "big integer", "surrogate", "object", "integer keys"]
)
def test_a_result_that_json_cannot_hold_fails_with_a_stable_code(own: Running, kind: str) -> None:
    execution = own.execute("return_bad", {"kind": kind})
    assert (execution["status"], execution["result"]) == ("failed", None)
    assert execution["error"]["code"] == "TOOL_RESULT_INVALID"


def test_a_result_of_a_hundred_megabytes_fails_and_the_process_lives(own: Running) -> None:
    execution = own.execute("return_long", {"characters": 100_000_000})
    assert execution["status"] == "failed" and execution["error"]["code"] == "TOOL_RESULT_TOO_LARGE"
    assert own.execute("return_long", {"characters": 1_000_000})["status"] == "success"


def test_a_blocked_event_loop_is_named_in_the_log_and_answers_afterwards(own: Running) -> None:
    assert own.execute("block_loop", {"seconds": 3.0})["status"] == "success"
    event = own.read_log(lambda event: event["message"] == "event loop blocked" and event["tool_id"] == "block_loop")
    assert event["blocked_s"] > 0.25 and "in block_loop" in event["stack"]
    assert own.http.get("/livez").status_code == 200
    until(lambda: own.metric("event_loop_lag_seconds") > 0.25)


def test_a_call_is_cancelled_from_another_connection(own: Running, pool: ThreadPoolExecutor) -> None:
    for tool_id in ("wait", "block_thread"):
        call = pool.submit(post, own, tool_id, {"seconds": 3.0}, call_id="mine")
        until(lambda: own.rpc("tools.cancel", {"call_id": "mine"})["result"]["cancelled"])
        execution = result(call.result())
        assert execution["status"] == "cancelled" and execution["error"]["code"] == "TOOL_CANCELLED"
        assert own.rpc("tools.cancel", {"call_id": "mine"})["result"] == {"cancelled": False}
        assert own.rpc("tools.cancel", {"execution_id": execution["execution_id"]})["result"] == {"cancelled": False}
    until(lambda: is_idle(own))


def test_a_running_call_id_is_refused_and_free_again_afterwards(own: Running, pool: ThreadPoolExecutor) -> None:
    call = pool.submit(post, own, "wait", {"seconds": 60.0}, call_id="taken")
    until(lambda: own.metric("tool_execution_concurrency") == 1)
    refused = own.execute("echo", {"message": "a"}, call_id="taken")
    assert refused["code"] == -32602 and refused["data"]["errors"][0]["path"] == "call_id"
    assert own.rpc("tools.cancel", {"call_id": "taken"})["result"] == {"cancelled": True}
    call.result()
    assert own.execute("echo", {"message": "a"}, call_id="taken")["status"] == "success"


def test_a_call_goes_on_when_its_client_goes_unless_its_tool_says_otherwise(own: Running) -> None:
    def ended(tool_id: str, status: str) -> float:
        return own.metric("tool_executions_total", tool_id=tool_id, status=status)

    finished, cancelled = ended("held", "success"), ended("held_for_client", "cancelled")
    for tool_id in ("held", "held_for_client"):
        connection = send_half(own, execute_request(tool_id, {"gate": tool_id}))
        until(lambda gate=tool_id: own.execute("inside", {"gate": gate})["result"] == 1)  # type: ignore[misc]
        connection.close()
        if tool_id == "held":
            assert own.execute("open_gate", {"gate": tool_id})["result"] == 1
        until(lambda: own.metric("tool_execution_concurrency") == 0)
    assert ended("held", "success") == finished + 1
    assert ended("held_for_client", "cancelled") == cancelled + 1


def test_a_tools_own_limit_queues_then_refuses(own: Running, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    calls = [pool.submit(post, own, "wait_alone_for_file", {"path": str(gate)}) for _ in range(6)]
    until(lambda: sum(call.done() for call in calls) >= 4)
    gate.touch()
    answers = [result(call.result()) for call in calls]
    refused = [answer for answer in answers if "code" in answer]
    assert 1 <= sum(answer.get("status") == "success" for answer in answers) <= 2
    assert {answer["code"] for answer in refused} == {-32006}
    assert all(answer["data"]["retry_after_ms"] > 0 for answer in refused)
    until(lambda: is_idle(own))


def test_the_counters_are_the_ledger_of_all_that_was_answered(serve: Serve) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests")
    calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("echo", {"message": "a"}, {}),
        ("echo", {}, {}),
        ("hidden", {}, {}),
        ("unknown", {}, {}),
        ("fail_clearly", {}, {}),
        ("raise_exception", {}, {}),
        ("raise_exit", {}, {}),
        ("return_bad", {"kind": "nan"}, {}),
        ("return_long", {"characters": 2_000_000}, {}),
        ("short_timeout", {"seconds": 60.0}, {}),
        ("wait", {"seconds": 60.0}, {"timeout_override": 0.05}),
    ]
    runs: dict[tuple[str, str], int] = {}
    errors: dict[str, int] = {}
    for tool_id, parameters, params in calls * 3:
        answer = running.execute(tool_id, parameters, **params)
        if "status" in answer:
            runs[tool_id, answer["status"]] = runs.get((tool_id, answer["status"]), 0) + 1
            kind = answer["error"] and answer["error"]["category"]
        else:
            kind = answer["data"]["error_type"]
        if kind:
            errors[kind] = errors.get(kind, 0) + 1
    for (tool_id, status), count in runs.items():
        assert running.metric("tool_executions_total", tool_id=tool_id, status=status) == count
        assert running.metric("tool_execution_duration_seconds_count", tool_id=tool_id) >= count
    assert running.metric("tool_executions_total") == sum(runs.values())
    assert {kind: running.metric("tool_errors_total", error_type=kind) for kind in errors} == errors
    assert running.metric("tool_errors_total") == sum(errors.values())
    assert is_idle(running)


async def one_call(port: int, request: bytes, opened: asyncio.Event, go: asyncio.Event) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    opened.set()
    await go.wait()
    head = b"POST /api/v1/jsonrpc HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(request)
    writer.write(head + request)
    headers = await reader.readuntil(b"\r\n\r\n")
    length = int(headers.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    answer: dict[str, Any] = json.loads(await reader.readexactly(length))
    writer.close()
    return answer["result"]  # type: ignore[no-any-return]


async def many_calls(port: int, count: int, request: bytes) -> list[dict[str, Any]]:
    go = asyncio.Event()
    opened = [asyncio.Event() for _ in range(count)]
    calls = [asyncio.create_task(one_call(port, request, one, go)) for one in opened]
    for one in opened:
        await one.wait()
    go.set()
    return await asyncio.gather(*calls)


def test_fifteen_hundred_calls_of_a_second_run_at_once_in_one_process(serve: Serve) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests")
    executions = asyncio.run(many_calls(running.port, 1_500, execute_request("wait", {"seconds": 1.0})))
    assert [execution["status"] for execution in executions] == ["success"] * 1_500
    assert len({execution["execution_id"] for execution in executions}) == 1_500
    assert running.metric("tool_executions_total", tool_id="wait", status="success") == 1_500
    assert is_idle(running)


def test_hung_tools_do_not_keep_the_process_from_ending(serve: Serve) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests")
    for tool_id in ("block_thread", "stubborn"):
        assert running.execute(tool_id, {"seconds": 3600.0}, timeout_override=0.05)["status"] == "timeout"
    assert running.stop() == 0


def test_a_running_call_is_answered_while_new_ones_are_refused_and_the_process_ends_with_success(
    serve: Serve, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests")
    gate, call = waiting_call(running, pool, tmp_path)
    request = execute_request("echo", {"message": "a"})
    late = send_half(running, request, keep_back=10)
    running.process.send_signal(signal.SIGTERM)
    running.read_log(lambda event: event["message"] == "draining")
    with late, http.client.HTTPResponse(late) as response:
        late.sendall(request[-10:])
        response.begin()
        refused = json.loads(response.read())["error"]
    assert (response.status, refused["code"], refused["data"]["error_type"]) == (503, -32009, "draining")
    assert response.headers["connection"] == "close" and response.headers["retry-after"]
    gate.touch()
    assert result(call.result())["result"] == "done"
    assert running.process.wait(SOON_S) == 0


@pytest.mark.parametrize("known", [True, False], ids=["known", "first"])
@pytest.mark.parametrize("tool", ["stubborn", "wait"])
def test_a_second_signal_ends_the_process_and_cuts_off_what_runs(
    serve: Serve, pool: ThreadPoolExecutor, tool: str, known: bool
) -> None:
    """It is answered as cancelled and has a row, by whichever way it went: a tool's first call goes another."""
    running = serve(TOOL_MODULES="tests.tools_for_tests", TOOL_EXECUTION_TIMEOUT="3600")
    if known:
        running.execute(tool, {"seconds": 0.0})
    call = pool.submit(post, running, tool, {"seconds": 60.0})
    until(lambda: running.metric("tool_execution_concurrency") == 1)
    running.process.send_signal(signal.SIGTERM)
    running.read_log(lambda event: event["message"] == "draining")
    running.process.send_signal(signal.SIGTERM)
    assert running.read_log(lambda event: event["message"] == "ending at once")["running"] == 1
    running.process.wait(SOON_S)
    execution = result(call.result())
    assert execution["status"] == "cancelled"
    with contextlib.closing(sqlite3.connect(running.folder / "agentcore.db")) as database:
        rows = database.execute("SELECT execution_id FROM tool_executions WHERE status = 'cancelled'")
        assert rows.fetchall() == [(execution["execution_id"],)]


@pytest.mark.parametrize("method", ["batch", "tools.execute_batch"])
def test_what_a_second_signal_cuts_off_is_followed_by_nothing(
    serve: Serve, pool: ThreadPoolExecutor, method: str
) -> None:
    """The end of one call of a batch begins the next, and who counts on rows would not see what that did."""
    running = serve(TOOL_MODULES="tests.tools_for_tests", DRAIN_SECONDS="30", TOOL_EXECUTION_TIMEOUT="3600")
    running.execute("wait", {"seconds": 0.0})
    wanted = {"tool_id": "wait", "parameters": {"seconds": 60.0}}
    if method == "batch":
        body: Any = [{"jsonrpc": "2.0", "id": n, "method": "tools.execute", "params": wanted} for n in range(30)]
    else:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"requests": [wanted] * 30}}
    answer = pool.submit(httpx.post, f"{running.url}/api/v1/jsonrpc", json=body, timeout=SOON_S + 60, trust_env=False)
    until(lambda: running.metric("tool_execution_concurrency") >= 5)
    begun = running.metric("tool_execution_concurrency")
    running.process.send_signal(signal.SIGTERM)
    running.read_log(lambda event: event["message"] == "draining")
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(SOON_S)
    with contextlib.closing(sqlite3.connect(running.folder / "agentcore.db")) as database:
        rows = database.execute("SELECT count(*) FROM tool_executions WHERE status = 'cancelled'")
        assert rows.fetchall() == [(begun,)]
    assert answer.exception() is None or isinstance(answer.exception(), httpx.TransportError)


def test_a_terminal_that_closes_is_told_of_twice_and_drains(
    serve: Serve, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests")
    gate, call = waiting_call(running, pool, tmp_path)
    for _ in range(2):
        running.process.send_signal(signal.SIGHUP)
        running.read_log(lambda event: event["message"] == "draining")
    gate.touch()
    assert result(call.result())["result"] == "done"
    assert running.process.wait(SOON_S) == 0
    with pytest.raises(AssertionError, match="no such event"):
        running.read_log(lambda event: event["message"] == "ending at once")


def test_a_service_under_nohup_outlives_its_terminal(serve: Serve) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which children inherit
    try:
        running = serve()
    finally:
        signal.signal(signal.SIGHUP, before)
    running.process.send_signal(signal.SIGHUP)
    assert running.execute("echo", {"message": "a"})["status"] == "success"
    assert running.http.get("/readyz").status_code == 200
    assert running.stop() == 0


@pytest.mark.parametrize("lane", ["true", "false"])
def test_a_drain_waits_for_calls_whose_clients_have_gone(serve: Serve, tmp_path: Path, lane: str) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests", PROTOCOL_LANE=lane)
    there, gate = tmp_path / "1", tmp_path / "2"
    there.touch()
    for _ in range(2):  # then the head is known to the lane, and the tool to the executor
        running.execute("wait_for_file", {"path": str(there)})
    body, leaves = call_of("wait_for_file", path=str(gate)), httpx.Timeout(SOON_S, read=0.3)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/api/v1/jsonrpc", json=body, timeout=leaves, trust_env=False)
    until(lambda: running.metric("tool_execution_concurrency") == 1)
    running.process.send_signal(signal.SIGTERM)
    running.read_log(lambda event: event["message"] == "draining")
    gate.touch()
    assert running.process.wait(SOON_S) == 0
    with contextlib.closing(sqlite3.connect(running.folder / "agentcore.db")) as database:
        rows = database.execute("SELECT status FROM tool_executions")
        assert rows.fetchall() == [("success",)] * 3


def test_a_background_task_that_ends_drains_the_process_and_fails_it(
    serve: Serve, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests")
    gate, call = waiting_call(running, pool, tmp_path)
    assert running.execute("end_background_task", {"name": "loop-watch"})["result"] == 1
    assert running.read_log(lambda event: event["message"] == "background task ended")["task"] == "loop-watch"
    gate.touch()
    assert result(call.result())["result"] == "done", "what runs is answered"
    assert running.process.wait(SOON_S) == 1


def test_a_log_that_nobody_reads_holds_nobody_up_and_its_losses_are_counted(serve: Serve) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests")  # reads the log up to `serving` and no further
    assert running.execute("log_flood", {"lines": 12_000})["status"] == "success"
    assert running.http.get("/livez").status_code == 200
    assert running.metric("log_lines_dropped_total") > 0
    assert running.execute("echo", {"message": "a"})["status"] == "success"
    assert running.stop() == 0


def test_what_a_tool_prints_is_in_the_log_with_its_call_and_without_secrets(serve: Serve) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests")
    execution = running.execute("print_lines", {"lines": 2, "text": "password=hunter2hunter2"})
    for number, stream in enumerate(("stdout", "stderr")):
        event = running.read_log(lambda event, stream=stream: event["logger"] == stream)  # type: ignore[misc]
        assert event["message"].startswith(f"{number} password=") and "hunter2" not in event["message"]
        assert (event["level"], event["execution_id"]) == ("INFO", execution["execution_id"])


def test_a_tool_that_prints_what_nobody_reads_holds_nobody_up_and_its_losses_are_counted(serve: Serve) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests")
    for tool_id, parameters in (
        ("print_lines", {"lines": 12_000, "text": "x" * 1_000}),
        ("print_in_thread", {"characters": 1_000_000}),
    ):
        assert running.execute(tool_id, parameters)["status"] == "success"
    assert running.metric("log_lines_dropped_total") > 0
    assert running.stop() == 0


def test_a_module_that_does_not_load_is_named_and_the_rest_is_served(serve: Serve) -> None:
    running = serve(TOOL_MODULES="no_such_module,tests.tools_for_tests")
    event = running.read_log(lambda event: event["message"] == "tools not loaded")
    assert event["source"] == "no_such_module" and "ModuleNotFoundError" in event["reason"]
    assert "no_such_module" in running.http.get("/readyz").text
    assert running.execute("count_calls")["result"] == 1


def test_a_taken_tool_id_is_told_and_the_other_tools_of_its_source_are_served(serve: Serve, tmp_path: Path) -> None:
    """Two of one source are one line on /readyz."""
    source = "from app.tools.tool import tool\n"
    for tool_id in ("echo", "calculator", "fresh"):
        source += f"@tool\ndef {tool_id}() -> int:\n    'Return one.'\n    return 1\n"
    (tmp_path / "overlapping.py").write_text(source)
    running = serve(TOOL_MODULES="overlapping", PYTHONPATH=f"{tmp_path}:{ROOT}")
    lines = [line for line in running.http.get("/readyz").text.splitlines() if "overlapping" in line]
    assert lines == ["problem with tools from overlapping: the log says why"]
    event = running.read_log(lambda event: event["message"] == "tools not loaded")
    assert event["source"] == "overlapping" and "'echo' is taken" in event["reason"]
    assert running.execute("fresh")["result"] == 1
    assert running.execute("echo", {"message": "x"})["result"] == {"message": "x"}


def test_a_tool_that_changes_the_working_directory_takes_neither_keys_nor_rows_away(
    serve: Serve, tmp_path: Path
) -> None:
    """With its import and with each run; places in settings are relative, as the default ones are."""
    source = "import os\nfrom app.tools.tool import tool\nelsewhere = os.path.join(os.path.dirname(__file__), 'a')\n"
    source += "os.makedirs(elsewhere)\nos.chdir(elsewhere)\n"
    source += "@tool\ndef descend() -> None:\n    'Go further down.'\n    os.makedirs('b')\n    os.chdir('b')\n"
    (tmp_path / "wandering.py").write_text(source)
    here = os.path.relpath(tmp_path, ROOT)
    places = {"DATABASE_URL": f"sqlite+aiosqlite:///{here}/keys.db", "JOURNAL_DIR": f"{here}/journal"}
    made = subprocess.run(
        [sys.executable, "-m", "app", "keys", "create", "--tenant", "t", "--subject", "s", "--json"],
        cwd=ROOT,
        env=service_environ(tmp_path, **places),
        capture_output=True,
        check=True,
    )
    running = serve(TOOL_MODULES="wandering", PYTHONPATH=f"{tmp_path}:{ROOT}", **places)
    assert running.http.post("/api/v1/tools/echo/execute", json={}).status_code == 401
    running.http.headers["Authorization"] = f"Bearer {json.loads(made.stdout)['key']}"
    answered = [running.execute(tool, parameters) for tool, parameters in (("descend", {}), ("echo", {"message": "a"}))]
    assert [execution["status"] for execution in answered] == ["success", "success"]
    assert running.stop() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "keys.db")) as database:
        rows = database.execute("SELECT tool_id FROM tool_executions ORDER BY started_at").fetchall()
    assert rows == [("descend",), ("echo",)]
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b"]


LOGGING_SET_UP = [
    "import logging; logging.basicConfig(force=True, level='ERROR')",
    "import logging.config; logging.config.dictConfig({'version': 1, 'root': {'level': 'CRITICAL'}})",
    "import logging; logging.disable(logging.CRITICAL)",
]


@pytest.mark.parametrize("set_up", LOGGING_SET_UP)
def test_a_module_that_sets_up_logging_for_itself_leaves_the_service_its_own(
    serve: Serve, tmp_path: Path, set_up: str
) -> None:
    source = (
        f"{set_up}\nfrom app.tools.tool import tool\n@tool\ndef fail() -> None:\n    'Fail.'\n    raise ValueError\n"
    )
    (tmp_path / "talkative.py").write_text(source)
    running = serve(TOOL_MODULES="talkative", PYTHONPATH=f"{tmp_path}:{ROOT}")  # has said that it serves
    execution_id = running.execute("fail")["execution_id"]
    assert running.read_log(lambda event: event["message"] == "tool crashed")["execution_id"] == execution_id


@pytest.mark.parametrize("set_up", LOGGING_SET_UP)
def test_a_tool_that_sets_up_logging_as_it_runs_leaves_the_service_its_own(
    serve: Serve, tmp_path: Path, set_up: str
) -> None:
    source = f"from app.tools.tool import tool\n@tool\ndef talk() -> None:\n    'Talk.'\n    {set_up}\n"
    source += "@tool\ndef fail() -> None:\n    'Fail.'\n    raise ValueError\n"
    (tmp_path / "talkative.py").write_text(source)
    running = serve(TOOL_MODULES="talkative", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert running.execute("talk")["status"] == "success"
    running.read_log(lambda event: event["message"] == "logging was set up by a tool, put right")
    execution_id = running.execute("fail")["execution_id"]
    assert running.read_log(lambda event: event["message"] == "tool crashed")["execution_id"] == execution_id
