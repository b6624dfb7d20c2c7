"""Series are right, bounded in number, there from the start; CPU and memory are of what the container may use."""

from __future__ import annotations

import math
import random
import socket
import string
from pathlib import Path

import orjson
import pytest
from prometheus_client.openmetrics import parser

from app.clients import close_engine, create_engine, pool_states
from app.telemetry.histogram import Histogram
from app.telemetry.metrics import LOG_OUTCOMES, POOL_STATES, STAGES, Metrics
from app.telemetry.system import SystemWatch
from tests.conftest import Running, Serve
from tests.otlp import OtlpReceiver

OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}


def series(running: Running) -> set[str]:
    """Every series that a scrape shows, without its value."""
    text = running.http.get("/metrics").text
    return {line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")}


class Noise:
    """Names that nobody registered, the same in each run."""

    def __init__(self) -> None:
        self._random = random.Random(5)

    def name(self) -> str:
        return "".join(self._random.choices(string.ascii_letters + string.digits + "_-", k=12))


def call(method: str, tool_id: str, number: int) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": {"tool_id": tool_id, "parameters": {}}}


def send_raw(running: Running, head: str) -> bytes:
    """The first line of the answer to a request as it is, whatever its method."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        connection.sendall(f"{head} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode())
        return connection.recv(64).partition(b"\r\n")[0]


REST_BEFORE = [
    ("GET", "/api/v1/tools"),
    ("GET", "/api/v1/tools/none"),
    ("GET", "/api/v1/nowhere"),
    ("POST", "/api/v1/tools/none/execute"),
    ("PURGE", "/api/v1/tools"),
    ("PURGE", "/api/v1/nowhere"),
]
"""Each route, method and class of status that the noise will meet, once."""


def test_100000_random_ids_paths_and_methods_add_no_series(serve: Serve) -> None:
    running, noise = serve(), Noise()
    for method, path in REST_BEFORE:
        running.http.request(method, path)
    before = series(running)
    for first in range(0, 94_000, 100):
        calls = [call("tools.execute", noise.name(), first + n) for n in range(50)]
        calls += [call(noise.name(), "echo", first + n) for n in range(50)]
        answers = orjson.loads(running.http.post("/api/v1/jsonrpc", json=calls).content)
        assert {answer["error"]["code"] for answer in answers} == {-32004, -32601}
    for _ in range(1_000):
        running.http.get(f"/api/v1/tools/{noise.name()}")
        running.http.get(f"/api/v1/{noise.name()}/{noise.name()}")
        running.http.get(f"/{noise.name()}")
        running.http.post(f"/api/v1/tools/{noise.name()}/execute")
    methods = ["PURGE", "PROPFIND", "MKCOL", "LOCK", "REPORT"]
    for number in range(2_000):
        method = methods[number % 5] if number % 2 else noise.name().upper()
        send_raw(running, f"{method} /api/v1/{'tools' if number % 3 else noise.name()}")
    assert series(running) - before == set()


def test_the_rest_routes_are_counted_by_route_and_the_others_not(serve: Serve) -> None:
    running = serve()
    running.http.get("/api/v1/tools/echo")
    running.http.get("/api/v1/tools/nobody_has_this")
    running.http.get("/api/v1/tools/echo/typo")
    running.http.request("PURGE", "/api/v1/tools")
    running.rpc("rpc.ping")
    for path in ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/anything"):
        running.http.get(path)
    requests = {one for one in series(running) if one.startswith("http_requests_total")}
    assert requests == {
        'http_requests_total{handler="/api/v1/tools/{tool_id}",method="GET",status="2xx"}',
        'http_requests_total{handler="/api/v1/tools/{tool_id}",method="GET",status="4xx"}',
        'http_requests_total{handler="none",method="GET",status="4xx"}',
        'http_requests_total{handler="/api/v1/tools",method="other",status="4xx"}',
    }
    assert running.metric("http_request_duration_highr_seconds_count") == 4
    assert running.metric("http_request_duration_seconds_bucket", handler="/api/v1/tools/{tool_id}", le="+Inf") == 2


def test_every_series_with_an_enumerated_label_is_there_from_the_start() -> None:
    families = {family.name: family for family in Metrics().collect()}

    def labels(name: str, label: str) -> set[str]:
        return {sample.labels[label] for sample in families[name].samples}

    assert labels("framework_stage_seconds", "stage") == set(STAGES)
    assert labels("execution_log_rows", "outcome") == set(LOG_OUTCOMES)
    assert labels("database_connection_pool_size", "state") == set(POOL_STATES)


@pytest.mark.parametrize("door", ["rpc", "rest"])
def test_authentication_is_a_stage_of_its_own_at_each_door(serve: Serve, door: str) -> None:
    running = serve(AUTH_MODE="required")
    if door == "rpc":
        running.http.post("/api/v1/jsonrpc", json={"jsonrpc": "2.0", "id": 1, "method": "rpc.ping"})
    else:
        running.http.get("/api/v1/tools")
    assert running.metric("framework_stage_seconds_count", stage="authentication") == 1
    assert running.metric("framework_stage_seconds_count", stage="registry") == 0


def test_what_a_service_shows_of_its_log_its_pool_and_its_machine(serve: Serve) -> None:
    running = serve()
    states = {state: running.metric("database_connection_pool_size", state=state) for state in POOL_STATES}
    assert sum(states.values()) > 0 and min(states.values()) >= 0
    assert 0 < running.metric("system_memory_percent") <= 100
    assert running.metric("execution_log_journal_limit_bytes") == 1 << 30
    running.execute("echo", {"message": "x"})
    assert running.metric("execution_log_journal_bytes") > 0


@pytest.mark.anyio
async def test_the_states_of_a_pool_add_up_to_its_bound(database_url: str) -> None:
    engine = create_engine(database_url, 5, 10)
    try:
        assert pool_states(engine) == {"in_use": 0, "idle": 0, "unopened": 15}
        async with engine.connect(), engine.connect():
            assert pool_states(engine) == {"in_use": 2, "idle": 0, "unopened": 13}
        assert pool_states(engine) == {"in_use": 0, "idle": 2, "unopened": 13}
    finally:
        await close_engine(engine)


# Exemplars


def test_a_bucket_shows_its_last_sampled_call() -> None:
    histogram = Histogram((0.1, 1.0))
    histogram.observe(0.05)
    histogram.observe_traced(0.5, "a" * 32)
    histogram.observe_traced(0.6, "b" * 32)
    histogram.observe(0.7)
    (first, second, last) = histogram.buckets()
    assert first == ("0.1", 1) and last == ("+Inf", 4)
    assert second[:2] == ("1.0", 4)
    assert len(second) == 3 and (second[2].labels, second[2].value) == ({"trace_id": "b" * 32}, 0.6)
    assert histogram.total == pytest.approx(1.85)


@pytest.mark.parametrize("ratio", ["0", "1"])
def test_exemplars_carry_the_trace_ids_of_sampled_calls(serve: Serve, ratio: str) -> None:
    receiver = OtlpReceiver()
    try:
        running = serve(TRACE_SAMPLE_RATIO=ratio, **receiver.environ)
        trace_id = running.execute("echo", {"message": "x"})["trace_id"]
        text = running.http.get("/metrics", headers=OPENMETRICS).text
    finally:
        receiver.close()
    found: dict[str, set[str]] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.exemplar is not None:
                found.setdefault(family.name, set()).add(sample.exemplar.labels["trace_id"])
    names = ("framework_overhead_seconds", "tool_execution_duration_seconds") if ratio == "1" else ()
    assert found == {name: {trace_id} for name in names}
    assert "trace_id" not in running.http.get("/metrics").text


# The container


class Machine:
    """Files as a kernel shows them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = 0.0
        self.write("proc/meminfo", "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 6000 kB\n")
        self.write("proc/self/cgroup", "")
        self.ticks(0, 0)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def ticks(self, busy: int, idle: int) -> None:
        self.write("proc/stat", f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")

    def watch(self) -> SystemWatch:
        return SystemWatch(self.root, lambda: self.clock)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_limits_cpu_and_memory_are_of_the_machine(machine: Machine) -> None:
    watch = machine.watch()
    watch.sample()
    assert math.isnan(watch.cpu_percent()) and watch.memory_percent() == 25
    machine.ticks(30, 70)
    watch.sample()
    assert watch.cpu_percent() == 30
    machine.ticks(130, 70)
    watch.sample()
    assert watch.cpu_percent() == 100


def test_in_cgroup_v2_they_are_of_the_limits(machine: Machine) -> None:
    group = "sys/fs/cgroup/pod/app"
    machine.write("proc/self/cgroup", "0::/pod/app\n")
    machine.write(f"{group}/cpu.max", "50000 100000\n")
    machine.write(f"{group}/cpu.stat", "usage_usec 1000000\nuser_usec 5\n")
    machine.write(f"{group}/memory.max", "4096000\n")
    machine.write(f"{group}/memory.current", "3072000\n")
    machine.write(f"{group}/memory.stat", "anon 1\ninactive_file 1024000\n")
    watch = machine.watch()
    watch.sample()
    machine.clock = 10.0
    machine.write(f"{group}/cpu.stat", "usage_usec 5000000\nuser_usec 5\n")
    watch.sample()
    assert watch.cpu_percent() == pytest.approx(80)  # 4 s used of half a core for 10 s
    assert watch.memory_percent() == 50


def test_a_limit_of_an_outer_group_counts_where_the_inner_has_none(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/pod/app\n")
    machine.write("sys/fs/cgroup/pod/app/memory.max", "max\n")
    machine.write("sys/fs/cgroup/pod/app/memory.current", "1\n")
    machine.write("sys/fs/cgroup/pod/memory.max", "1000\n")
    machine.write("sys/fs/cgroup/pod/memory.current", "900\n")
    watch = machine.watch()
    watch.sample()
    assert watch.memory_percent() == 90


def test_in_cgroup_v1_they_are_of_the_limits_that_are_mounted(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    machine.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000")
    machine.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    machine.write("sys/fs/cgroup/cpuacct/cpuacct.usage", "0")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000")
    machine.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "800")
    machine.write("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 100\n")
    watch = machine.watch()
    watch.sample()
    machine.clock = 1.0
    machine.write("sys/fs/cgroup/cpuacct/cpuacct.usage", "1000000000")
    watch.sample()
    assert (watch.cpu_percent(), watch.memory_percent()) == (pytest.approx(50), 70)


def test_no_limit_in_cgroup_v1_is_the_machine(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "4:memory:/\n3:cpu,cpuacct:/\n")
    machine.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    machine.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    machine.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1")
    watch = machine.watch()
    watch.sample()
    machine.ticks(1, 3)
    watch.sample()
    assert (watch.cpu_percent(), watch.memory_percent()) == (25, 25)


@pytest.mark.parametrize("content", ["", "cpu", "0::", "nonsense\n\n"])
def test_files_that_nobody_understands_are_no_number_and_no_error(machine: Machine, content: str) -> None:
    for path in ("proc/meminfo", "proc/stat", "proc/self/cgroup"):
        machine.write(path, content)
    watch = machine.watch()
    watch.sample()
    watch.sample()
    assert math.isnan(watch.cpu_percent()) and math.isnan(watch.memory_percent())
