"""Every setting has the effect that it says, and a value that cannot be is refused by name."""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.calls import LOCAL_CALLER, ToolCall, new_execution_id
from app.service import open_service
from app.settings import Settings, SettingsError, read_settings
from app.tools.registry import Registry, ToolFilter
from app.tools.tool import FunctionTool, tool
from tests.conftest import ROOT, Running, Serve, end, places_in, service_environ, start_service
from tests.otlp import OtlpReceiver
from tests.servers import wait_until

TUNED = {
    "TOOL_MODULES": "tests.tools_for_tests",
    "TOOL_EXECUTION_TIMEOUT": "0.4",
    "MAX_CONCURRENT_EXECUTIONS": "2",
    "MAX_REQUEST_BYTES": "4096",
    "MAX_RESULT_BYTES": "1024",
    "MAX_BATCH_SIZE": "3",
    "REQUEST_READ_TIMEOUT_S": "0.4",
    "PUBLIC_URL": "https://tools.example.org/",
    "CORS_ALLOW_ORIGINS": "https://app.example.org, https://other.example.org",
    "LOG_LEVEL": "DEBUG",
}


@pytest.fixture(scope="module")
def tuned() -> Iterator[Running]:
    """A service with nearly every setting away from its default."""
    running = start_service(**TUNED)
    yield running
    end(running)


def refused(*arguments: str, **environ: str) -> str:
    """What a service that will not start says; it exits 2."""
    done = subprocess.run(
        [sys.executable, "-m", "app", "serve", *arguments],
        cwd=ROOT,
        env=service_environ(**environ),
        capture_output=True,
    )
    assert done.returncode == 2 and done.stdout == b""
    return done.stderr.decode()


def test_every_setting_is_named_by_a_test() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    tests = " ".join(name for file in files for name in re.findall(r"def test_(\w+)", file.read_text()))
    assert [name for name in Settings.model_fields if f"{name}_" not in f" {tests}"] == []


def test_tool_execution_timeout_bounds_every_run(tuned: Running) -> None:
    execution = tuned.execute("wait", {"seconds": 30}, timeout_override=60)
    assert (
        execution["status"] == "timeout" and execution["execution_time_ms"] >= 399
    )  # uvloop keeps time in whole milliseconds
    assert tuned.rpc("tools.get", {"tool_id": "wait"})["result"]["timeout_seconds"] == 0.4


def test_tool_execution_timeout_bounds_a_whole_plan(tuned: Running) -> None:
    tasks = [
        {
            "task_id": str(n),
            "tool_id": "wait",
            "parameters": {"seconds": 0.2},
            "dependencies": [str(n - 1)] if n else [],
        }
        for n in range(3)
    ]
    result = tuned.rpc("tools.execute_parallel", {"tasks": tasks})["result"]
    statuses = [result["results"][str(n)]["status"] for n in range(3)]
    done = statuses.index("timeout")
    assert statuses == ["success"] * done + ["timeout"] + ["skipped"] * (2 - done), "each has time enough, not all"


def test_max_concurrent_executions_bounds_what_runs_at_once(serve: Serve, tmp_path: Path) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests", MAX_CONCURRENT_EXECUTIONS="2")
    gate = tmp_path / "gate"
    wanted = [{"tool_id": "wait_for_file", "parameters": {"path": str(gate), "value": number}} for number in range(3)]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(running.rpc, "tools.execute_batch", {"requests": wanted, "max_concurrent": 3})
        wait_until(lambda: running.metric("tool_execution_queue_depth") == 1, "the third waits")
        assert running.metric("tool_execution_concurrency") == 3, "that one and the two that run"
        gate.touch()
        assert answer.result()["result"]["successful_count"] == 3


def test_max_request_bytes_is_413_past_it(tuned: Running) -> None:
    response = tuned.http.post("/api/v1/jsonrpc", content=b" " * 4097)
    assert response.status_code == 413 and "4096" in response.json()["error"]["message"]


def test_max_request_bytes_in_flight_is_never_less_than_one_request(serve: Serve) -> None:
    running = serve("--profile", "constrained", MAX_REQUEST_BYTES="8388608", MAX_REQUEST_BYTES_IN_FLIGHT="1048576")
    body = b'{"jsonrpc": "2.0", "method": "rpc.ping", "id": 1}'.ljust(8_388_608)
    assert running.http.post("/api/v1/jsonrpc", content=body).json()["result"] == {"pong": True}


def test_max_result_bytes_fails_a_longer_result(tuned: Running) -> None:
    assert tuned.execute("return_long", {"characters": 1022})["status"] == "success"
    longer = tuned.execute("return_long", {"characters": 1023})
    assert longer["status"] == "failed" and longer["error"]["code"] == "TOOL_RESULT_TOO_LARGE"


def test_max_batch_size_bounds_batches_and_plans(tuned: Running) -> None:
    four = [{"jsonrpc": "2.0", "method": "rpc.ping", "id": n} for n in range(4)]
    assert tuned.http.post("/api/v1/jsonrpc", json=four).json()["error"]["code"] == -32600
    calls = [{"tool_id": "echo", "parameters": {"message": "x"}}] * 4
    assert tuned.rpc("tools.execute_batch", {"requests": calls})["error"]["code"] == -32602


def test_request_read_timeout_s_cuts_a_body_that_trickles(tuned: Running) -> None:
    with socket.create_connection(("127.0.0.1", tuned.port), timeout=30) as client:
        client.sendall(b"POST /api/v1/jsonrpc HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_public_url_is_where_the_documents_point(tuned: Running) -> None:
    servers = tuned.rpc("rpc.discover")["result"]["servers"]
    assert servers[0]["url"] == "https://tools.example.org/api/v1/jsonrpc"
    assert tuned.http.get("/openapi.json").json()["servers"][0]["url"] == "https://tools.example.org"
    own = {"Origin": "https://tools.example.org"}
    assert tuned.http.get("/api/v1/tools", headers=own).status_code == 200


@pytest.mark.parametrize(("origin", "status"), [("https://other.example.org", 200), ("https://evil.example.org", 403)])
def test_cors_allow_origins_lets_those_pages_call(tuned: Running, origin: str, status: int) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "rpc.ping"}
    response = tuned.http.post("/api/v1/jsonrpc", json=body, headers={"Origin": origin})
    assert response.status_code == status
    assert response.headers.get("access-control-allow-origin") == (origin if status == 200 else None)


def test_tool_modules_are_loaded_and_a_broken_one_is_named(serve: Serve) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests,tests.no_such_module")
    assert running.execute("count_calls")["status"] == "success"
    assert "tests.no_such_module" in running.http.get("/readyz").text
    event = running.read_log(lambda event: event["message"] == "tools not loaded")
    assert event["source"] == "tests.no_such_module" and "ModuleNotFoundError" in event["reason"]


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    one = OtlpReceiver()
    yield one
    one.close()


def test_enable_tracing_false_takes_over_and_sends_nothing(serve: Serve, receiver: OtlpReceiver) -> None:
    parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": {"tool_id": "echo"}}
    body["params"]["parameters"] = {"message": "x"}
    traced = serve(**receiver.environ)
    assert traced.http.post("/api/v1/jsonrpc", json=body, headers=parent).json()["result"]["trace_id"] == "a" * 32
    receiver.wait_for_trace("a" * 32, 2)
    off = serve(ENABLE_TRACING="false", TRACE_SAMPLE_RATIO="1", **receiver.environ)
    execution = off.http.post("/api/v1/jsonrpc", json=body, headers=parent).json()["result"]
    assert execution["trace_id"] == execution["execution_id"].replace("-", "")
    assert off.stop() == 0 and len(receiver.spans) == 2


def test_trace_sample_ratio_is_the_part_that_is_traced(serve: Serve, receiver: OtlpReceiver) -> None:
    calls = [{"tool_id": "echo", "parameters": {"message": "x"}}]
    traced = {}
    for ratio in ("0", "0.4", "1"):
        running, before = serve(TRACE_SAMPLE_RATIO=ratio, **receiver.environ), len(receiver.spans)
        for _ in range(100):
            running.rpc("tools.execute_batch", {"requests": calls})
        assert running.stop() == 0
        traced[ratio] = (len(receiver.spans) - before) / 2
    # 0.4 of 100: outside of this once in 10 million runs
    assert traced["0"] == 0 and 14 < traced["0.4"] < 67 and traced["1"] == 100
    assert "TRACE_SAMPLE_RATIO" in refused("--port", "0", TRACE_SAMPLE_RATIO="1.5")


@pytest.mark.parametrize(("level", "written"), [("INFO", True), ("ERROR", False)])
def test_log_level_holds_lesser_events_back(level: str, written: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", str(port)],
        cwd=ROOT,
        env=service_environ(LOG_LEVEL=level),
        stdout=subprocess.PIPE,
    )
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=8), trust_env=False) as client:
            assert client.get(f"http://127.0.0.1:{port}/livez").status_code == 200
        process.terminate()
        stdout, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (b"serving" in stdout) is written
    assert "LOG_LEVEL" in refused(LOG_LEVEL="nonsense")


def test_drain_seconds_keeps_serving_after_sigterm(serve: Serve) -> None:
    running = serve(DRAIN_SECONDS="6")
    assert running.http.get("/readyz").status_code == 200
    running.process.send_signal(signal.SIGTERM)
    running.read_log(lambda event: event["message"] == "draining")
    ready = running.http.get("/readyz")
    assert ready.status_code == 503 and "draining" in ready.text and ready.headers["connection"] == "close"
    assert running.execute("echo", {"message": "still here"})["status"] == "success"
    assert running.process.wait(timeout=60) == 0


class Upstream:
    """A real HTTP server that answers `{}` or what it is told, and remembers what was asked."""

    def __init__(self, answer: Any) -> None:
        self.paths: list[str] = []
        self.open = 0
        self.most_open = 0
        self.gate = threading.Event()
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                upstream.paths.append(self.path)
                upstream.open += 1
                upstream.most_open = max(upstream.most_open, upstream.open)
                if "wait" in self.path:
                    upstream.gate.wait(5)
                upstream.open -= 1
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.gate.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream({"results": [{"title": "T", "url": "https://example.org", "content": "S"}]})
    yield server
    server.close()


def test_egress_allow_opens_what_is_refused_otherwise(serve: Serve, upstream: Upstream) -> None:
    url = f"http://127.0.0.1:{upstream.port}/"
    closed = serve().execute("http_request", {"url": url})
    assert closed["status"] == "failed" and closed["error"]["code"] == "EGRESS_REFUSED"
    assert "EGRESS_ALLOW" in refused("--port", "0", EGRESS_ALLOW="http://x/")
    opened = serve(EGRESS_ALLOW=f"127.0.0.1:{upstream.port}").execute("http_request", {"url": url})
    assert opened["status"] == "success" and opened["result"]["status_code"] == 200


def test_searxng_url_is_where_web_search_asks(serve: Serve, upstream: Upstream) -> None:
    unset = serve().execute("web_search", {"query": "x"})
    assert unset["status"] == "failed" and "SEARXNG_URL" in unset["error"]["message"]
    running = serve(EGRESS_ALLOW="127.0.0.1", SEARXNG_URL=f"http://127.0.0.1:{upstream.port}/search")
    found = running.execute("web_search", {"query": "needle"})
    assert found["result"]["results"] == [{"title": "T", "url": "https://example.org", "snippet": "S"}]
    assert "needle" in upstream.paths[0]


def test_wikipedia_url_is_where_wikipedia_search_asks(serve: Serve, upstream: Upstream) -> None:
    running = serve(EGRESS_ALLOW="127.0.0.1", WIKIPEDIA_URL=f"http://127.0.0.1:{upstream.port}/w/api.php")
    running.execute("wikipedia_search", {"query": "needle"})
    assert upstream.paths[0].startswith("/w/api.php?") and "needle" in upstream.paths[0]


def test_http_connection_pool_size_bounds_outgoing_connections(serve: Serve, upstream: Upstream) -> None:
    running = serve(EGRESS_ALLOW="127.0.0.1", HTTP_CONNECTION_POOL_SIZE="2")
    url = f"http://127.0.0.1:{upstream.port}/wait"
    requests = [{"tool_id": "http_request", "parameters": {"url": url}} for _ in range(6)]
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(running.rpc, "tools.execute_batch", {"requests": requests, "max_concurrent": 6})
        upstream.gate.set()
        assert batch.result(60)["result"]["successful_count"] == 6
    assert upstream.most_open <= 2


def test_forwarded_allow_ips_believes_those_proxies_scheme(serve: Serve) -> None:
    forwarded = {"X-Forwarded-Proto": "https", "Origin": "https://localhost:9", "Host": "localhost:9"}
    assert serve().http.get("/api/v1/tools", headers=forwarded).status_code == 403
    trusting = serve(FORWARDED_ALLOW_IPS="127.0.0.1")
    assert trusting.http.get("/api/v1/tools", headers=forwarded).status_code == 200


ORIGIN_PROFILES = {  # pool and overflow of PostgreSQL, pools of Redis and HTTP, calls at once; None: not said
    "high-throughput": (20, 20, 50, 100, None),
    "low-latency": (50, None, 100, None, None),
    "constrained": (5, 5, 10, 20, 500),
}


@pytest.mark.parametrize("profile", ORIGIN_PROFILES)
def test_a_profile_sets_what_the_origin_says_of_it(profile: str) -> None:
    names = ("database_pool_size", "database_max_overflow", "redis_pool_size", "http_connection_pool_size")
    settings, plain = read_settings({"PROFILE": profile}), read_settings({})
    for name, said in zip((*names, "max_concurrent_executions"), ORIGIN_PROFILES[profile], strict=True):
        assert getattr(settings, name) == (getattr(plain, name) if said is None else said), name


def test_profile_sets_defaults_that_single_variables_override(serve: Serve) -> None:
    assert serve("--profile", "constrained").metric("tool_execution_limit") == 500
    assert serve(PROFILE="constrained", MAX_CONCURRENT_EXECUTIONS="7").metric("tool_execution_limit") == 7
    assert read_settings({"PROFILE": "constrained"}).http_connection_pool_size == 20
    assert "default, " in refused("--profile", "fast").replace("'", "").replace(" or ", ", ")


def test_auth_mode_none_is_needed_beyond_loopback(serve: Serve) -> None:
    message = refused("--host", "0.0.0.0", "--port", "0")
    assert "AUTH_MODE=none" in message and "loopback" in message
    running = serve("--host", "0.0.0.0", AUTH_MODE="none")
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: tools.example.org\r\nConnection: close\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


@tool(read_only=True)
async def give(value: int) -> int:
    """Return the value."""
    return value


class CountsRebuilds(FunctionTool):
    """A tool that tells how often its schemas were built anew."""

    __slots__ = ("rebuilds",)

    def rebuilt(self) -> FunctionTool:
        self.rebuilds += 1
        return super().rebuilt()


@pytest.mark.parametrize(("enabled", "rebuilds"), [(True, 0), (False, 3)])
def test_enable_parameter_validation_cache_false_builds_validators_on_every_call(
    enabled: bool, rebuilds: int, tmp_path: Path
) -> None:
    async def run() -> int:
        counting = CountsRebuilds(give.function, give.spec)
        counting.rebuilds = 0
        settings = read_settings(places_in(tmp_path), enable_parameter_validation_cache=enabled)
        async with open_service(settings, extra_tools=[counting]) as service:
            for _ in range(3):
                call = ToolCall(new_execution_id(), "give", {"value": 1}, LOCAL_CALLER, 0.0)
                assert (await service.executor.execute(call)).status == "success"
        return counting.rebuilds

    assert asyncio.run(run()) == rebuilds


@pytest.mark.parametrize("enabled", [True, False])
def test_enable_registry_cache_false_builds_list_answers_anew(enabled: bool) -> None:
    registry = Registry([give], timeout_ceiling_s=1.0, cache_answers=enabled)
    first, second = (registry.page(ToolFilter(), LOCAL_CALLER, None, None) for _ in range(2))
    assert first == second and (first is second) is enabled


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("TOOL_EXECUTION_TIMEOUT", "0", "greater than 0"),
        ("TOOL_EXECUTION_TIMEOUT", "abc-canary", "number"),
        ("MAX_CONCURRENT_EXECUTIONS", "0", "greater than or equal to 1"),
        ("MAX_REQUEST_BYTES", "10", "1024"),
        ("DRAIN_SECONDS", "-1", "greater than or equal to 0"),
        ("DRAIN_SECONDS", "nan", "300"),
        ("ENABLE_REGISTRY_CACHE", "perhaps-canary", "boolean"),
        ("AUTH_MODE", "canary", "'none'"),
        ("PUBLIC_URL", "ftp://canary", "http"),
        ("PUBLIC_URL", "http://a:canary", "a host"),
        ("PUBLIC_URL", "http://a:99999/canary", "a host"),
        ("PUBLIC_URL", "http://[::canary", "a host"),
        ("PUBLIC_URL", "http://", "a host"),
        ("PUBLIC_URL", "http:///canary", "a host"),
        ("PUBLIC_URL", "http://a canary/", "a host"),
        ("WIKIPEDIA_URL", "http://", "a host"),
        ("SEARXNG_URL", "http://:8080/canary", "a host"),
        ("CORS_ALLOW_ORIGINS", "not a canary", "scheme://host[:port]"),
        ("CORS_ALLOW_ORIGINS", "canary.example", "scheme://host[:port]"),
        ("CORS_ALLOW_ORIGINS", "https://a.example,https://canary.example/", "scheme://host[:port]"),
        ("CORS_ALLOW_ORIGINS", "https://a.example/canary", "scheme://host[:port]"),
        ("CORS_ALLOW_ORIGINS", "https://Canary.example", "scheme://host[:port]"),
        ("CORS_ALLOW_ORIGINS", "null", "scheme://host[:port]"),
        ("FORWARDED_ALLOW_IPS", "canary", "IP addresses"),
        ("FORWARDED_ALLOW_IPS", "127.0.0.1,10.0.0.1/8", "IP addresses"),
        ("FORWARDED_ALLOW_IPS", "*,127.0.0.1", "alone"),
        ("DATABASE_URL", "postgresql://u:canary@h/db", "postgresql+asyncpg://"),
        ("DATABASE_URL", "postgresql+asyncpg://u:can/ary@h:canary/db", "%XX"),
        ("DATABASE_URL", "postgresql+asyncpg://u:canary@[::1/db", "host:port"),
        ("DATABASE_URL", "postgresql+asyncpg://u:canary@h:65536/db", "65535"),
        ("DATABASE_URL", "postgresql+asyncpg://u:canary@a..b/db", "a host must be"),
        ("DATABASE_URL", "postgresql+asyncpg://u:canary@a:1,b:2/db", "host:port"),
        ("DATABASE_URL", "postgresql+asyncpg:///db?host=a:1&host=canary", "several hosts"),
        ("DATABASE_URL", "postgresql+asyncpg://h/db?canary=bar", "sslmode, sslnegotiation"),
        ("DATABASE_URL", "postgresql+asyncpg://h/db?canary", "name=value"),
        ("DATABASE_URL", "postgresql+asyncpg://h/db?sslmode=", "name=value"),
        ("DATABASE_URL", "postgresql+asyncpg://h/db?sslmode=canary", "verify-full"),
        ("DATABASE_URL", "postgresql+asyncpg://h/db?ssl=require&ssl=prefer", "once"),
        ("DATABASE_URL", "postgresql+asyncpg://h/db?prepared_statement_cache_size=canary", "whole number"),
        ("DATABASE_URL", "sqlite+aiosqlite:///", "path"),
        ("DATABASE_URL", "sqlite+aiosqlite:///canary.db?timeout=1", "uri=true"),
    ],
)
def test_a_bad_value_is_refused_by_name_and_bound_and_never_shown(name: str, value: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({name: value})
    assert name in str(caught.value) and says in str(caught.value) and "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("PUBLIC_URL", "https://tools.example:8443/a/", "https://tools.example:8443/a"),
        ("PUBLIC_URL", "http://[::1]:8001", "http://[::1]:8001"),
        ("SEARXNG_URL", "http://search_1:8080", "http://search_1:8080"),
        ("CORS_ALLOW_ORIGINS", "*", ("*",)),
        ("CORS_ALLOW_ORIGINS", "http://[::1]:3000, app://local", ("http://[::1]:3000", "app://local")),
        ("FORWARDED_ALLOW_IPS", "*", ("*",)),
        ("FORWARDED_ALLOW_IPS", "::1, 10.0.0.0/8", ("::1", "10.0.0.0/8")),
        *(
            ("DATABASE_URL", url, url)
            for url in (
                "postgresql+asyncpg://u:p%40ss@[::1]:5432/db?sslmode=require",
                "postgresql+asyncpg://u:p?ss@h/db",
                "postgresql+asyncpg:///db?host=a:5432&host=b:5432&target_session_attrs=primary",
                "sqlite+aiosqlite:///file:a.db?uri=true&mode=ro",
                "sqlite+aiosqlite:///:memory:",
            )
        ),
    ],
)
def test_addresses_that_can_be_are_taken(name: str, value: str, kept: object) -> None:
    assert getattr(read_settings({name: value}), name.lower()) == kept


def test_a_dotenv_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_bytes(b"LOG_LEVEL=canary\xff\n")
    with pytest.raises(SettingsError, match=r"^\.env: must be text in UTF-8$"):
        read_settings({}, dotenv)
    done = subprocess.run(
        [sys.executable, "-m", "app", "tools", "list"], cwd=tmp_path, env=service_environ(), capture_output=True
    )
    assert done.returncode == 2 and done.stderr == b"agentcore-tools: .env: must be text in UTF-8\n"


@pytest.mark.parametrize(
    "line",
    ['AUTH_MODE="canary', "AUTH_MODE: canary", "export AUTH_MODE canary", "AUTH_MODE='canary' b", 'AUTH_MODE="a" b'],
)
def test_a_line_of_dotenv_that_would_be_left_out_is_refused(tmp_path: Path, line: str) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(f"LOG_LEVEL=INFO\n{line}\nMAX_BATCH_SIZE=3\n")
    with pytest.raises(SettingsError, match=r"^AUTH_MODE: line 2 of \.env cannot be read; ") as caught:
        read_settings({}, dotenv)
    assert "canary" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_dotenv_may_be_for_others_too_or_no_file(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    assert read_settings({}, dotenv) == read_settings({})
    dotenv.write_text("set -a\nTHEIRS: 1\nMAX_BATCH_SIZE='3'\n")
    assert read_settings({}, dotenv).max_batch_size == 3
    (tmp_path / "folder").mkdir()
    assert read_settings({}, tmp_path / "folder") == read_settings({})


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({"DRAIN_SECONDS": "-1", "MAX_BATCH_SIZE": "0"})
    assert "DRAIN_SECONDS" in str(caught.value) and "MAX_BATCH_SIZE" in str(caught.value)


def test_the_environment_wins_over_dotenv_and_dotenv_over_the_profile(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("PROFILE=constrained\nMAX_CONCURRENT_EXECUTIONS=11\nMAX_BATCH_SIZE=12\n")
    settings = read_settings({"MAX_BATCH_SIZE": "13"}, dotenv)
    assert (settings.max_concurrent_executions, settings.max_batch_size) == (11, 13)
    assert settings.http_connection_pool_size == 20
