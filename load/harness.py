"""What every benchmark here stands on: servers on one core, stores and load on the other, rounds that are interleaved.

`bench()` starts what is asked of it and ends it; `measure()` visits targets in turn and charges each with the CPU time
that its processes took until they were idle again. Only what was measured in one run is compared, as medians of rounds
and ratios to a yardstick of the same round. Knows no benchmark; those of this folder import it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from load.client import REFUSED, RIGHT, Outcome, Plan
from load.machine import cores, cpu_s, pin_self, pin_server, raise_open_files, rss_mb, settle
from load.many import make_keys
from load.run import ROOT, CannotRun, end, own_service
from tests.servers import PostgresServer, RedisServer, ServerFailed

PATH = "/api/v1/jsonrpc"
LIMITS = """policies:
  - {name: each-caller, per: [tenant, subject], rate: 1000000/second}
  - {name: each-tenant, per: [tenant], quota: {daily: 1000000000}}
"""
"""Looked at by every call and out of anybody's reach."""

KEYS = 200
"""API keys that take turns, of TENANTS tenants: one key alone would be in every cache."""
TENANTS = 20

OFF = {"ENABLE_DATABASE_LOGGING": "false", "AUTH_MODE": "none", "ENABLE_TRACING": "false"}
"""The call path alone."""

LIMITS_TIMEOUT_MS = "1000"
"""Not the default of 50: on a machine that others use too, a stall would make an outage of Redis out of a cost."""

START_S_MAX = 60.0

WARM_UP_S_MAX = 30.0


def call_body(message: str = "hello world", tool_id: str = "echo", request_id: int = 1) -> bytes:
    """`tools.execute` of a tool that takes a message."""
    params = {"tool_id": tool_id, "parameters": {"message": message}}
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "method": "tools.execute", "params": params})


BODY = call_body()


PROBES = 3
PROBE_AGAIN_S = 1.2
"""Longer than what a service that found a store away waits before it asks it again."""


@dataclass(frozen=True)
class Running:
    """A server, by its process and its port."""

    name: str
    pid: int
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True)
class Asking:
    """One kind of HTTP request. `right` is in every right answer; `calls` is how many tool calls are in one request."""

    path: str = PATH
    body: bytes = BODY
    headers: tuple[tuple[str, str], ...] = ()
    calls: int = 1
    right: str = '"result"'
    credentials: tuple[str, ...] = ()
    bodies: tuple[bytes, ...] = ()
    """Instead of one body: they take turns, as credentials do."""

    def heads(self) -> Iterator[str]:
        """All headers of each request; the body to the n-th is the n-th of `sent`, which begin anew when they end."""
        fixed = {"Host": "127.0.0.1", "Content-Type": "application/json", **dict(self.headers)}
        credentials = self.credentials or ("",)
        for number in range(max(len(credentials), len(self.sent))):
            credential = credentials[number % len(credentials)]
            headers = {**fixed, **({"Authorization": f"Bearer {credential}"} if credential else {})}
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            size = len(self.sent[number % len(self.sent)])
            yield f"POST {self.path} HTTP/1.1\r\n{lines}Content-Length: {size}\r\n\r\n"

    @property
    def sent(self) -> tuple[bytes, ...]:
        return self.bodies or (self.body,)

    def requests(self) -> list[tuple[str, str]]:
        """Whole requests, and what is in a right answer."""
        bodies = [body.decode() for body in self.sent]
        return [(head + bodies[number % len(bodies)], self.right) for number, head in enumerate(self.heads())]


class Round(NamedTuple):
    """One visit: per second and per HTTP request."""

    requests_per_s: float
    cpu_us: float
    p50_ms: float
    p99_ms: float
    rss_mb: float
    errors: int


@dataclass
class Target:
    """A server asked in one way, and what its rounds showed."""

    name: str
    server: Running
    asking: Asking = field(default_factory=Asking)
    connections: int = 64
    rounds: list[Round] = field(default_factory=list)

    def median(self, column: str) -> float:
        return float(statistics.median(getattr(one, column) for one in self.rounds))

    @property
    def calls_per_s(self) -> float:
        return self.median("requests_per_s") * self.asking.calls

    @property
    def cpu_us_per_call(self) -> float:
        return self.median("cpu_us") / self.asking.calls

    @property
    def errors(self) -> int:
        return sum(one.errors for one in self.rounds)

    def rate_ratio(self, yardstick: Target) -> float:
        """Calls per second over the yardstick's, as the median of the rounds' own ratios."""
        calls = self.asking.calls / yardstick.asking.calls
        return self._ratio([a.requests_per_s * calls / b.requests_per_s for a, b in self._rounds(yardstick)])

    def cpu_ratio(self, yardstick: Target) -> float:
        """The yardstick's CPU time per call over this one's: 1 is as cheap, 0.5 costs twice as much."""
        calls = self.asking.calls / yardstick.asking.calls
        return self._ratio([b.cpu_us * calls / a.cpu_us for a, b in self._rounds(yardstick)])

    def _rounds(self, yardstick: Target) -> Iterator[tuple[Round, Round]]:
        return zip(self.rounds, yardstick.rounds, strict=True)

    @staticmethod
    def _ratio(ratios: list[float]) -> float:
        return statistics.median(ratios)

    def as_json(self) -> dict[str, Any]:
        medians = {column: round(self.median(column), 3) for column in Round._fields if column != "errors"}
        shown = {"name": self.name, "connections": self.connections, "calls_per_request": self.asking.calls}
        return {**shown, **medians, "errors": self.errors, "rounds": [one._asdict() for one in self.rounds]}


def command(main: Callable[[], None]) -> None:
    """A benchmark's entry point: whatever ends it, what it started ends too. Exit 2: no run was possible."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        main()
    except (CannotRun, ServerFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _terminated(number: int, _: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


# Servers


class Bench:
    """Starts servers when they are first asked for; `bench()` ends them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agentcore-bench-")))

    @functools.cached_property
    def postgres(self) -> PostgresServer:
        return self.stack.enter_context(PostgresServer())

    @functools.cached_property
    def redis(self) -> RedisServer:
        return self.stack.enter_context(RedisServer())

    @functools.cached_property
    def database(self) -> str:
        """URL of one with its tables."""
        return self.new_database()

    def new_database(self) -> str:
        url = self.postgres.create_database()
        command = [sys.executable, "-m", "app", "migrate"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"DATABASE_URL": url}, check=True, stdout=subprocess.DEVNULL)
        return url

    @functools.cached_property
    def credentials(self) -> tuple[str, ...]:
        """KEYS keys of the database."""
        return tuple(asyncio.run(make_keys(self.database, KEYS, TENANTS)))

    @functools.cached_property
    def limits_file(self) -> Path:
        path = self.folder / "limits.yaml"
        path.write_text(LIMITS)
        return path

    @functools.cached_property
    def collector(self) -> str:
        return self.stack.enter_context(collector())

    def everything(self, **settings: str) -> dict[str, str]:
        """API keys, limit and quota in Redis, journal and PostgreSQL, metrics, 1 % tracing to a collector."""
        return {
            "DATABASE_URL": self.database,
            "REDIS_URL": self.redis.url,
            "LIMITS_FILE": str(self.limits_file),
            "LIMITS_TIMEOUT_MS": LIMITS_TIMEOUT_MS,
            "AUTH_MODE": "required",
            "ENABLE_DATABASE_LOGGING": "true",
            "ENABLE_TRACING": "true",
            "TRACE_SAMPLE_RATIO": "0.01",
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.collector,
            **settings,
        }

    def service(self, name: str, settings: dict[str, str], pages_url: str = "http://127.0.0.1:1") -> Running:
        """The service with these settings, on the server's core."""
        own = self.stack.enter_context(own_service(pages_url, **settings))
        pin_server(own.pid)
        return Running(name, own.pid, int(own.url.rsplit(":", 1)[1]))

    def bare(self, name: str = "bare uvicorn echo") -> Running:
        """The yardstick: uvicorn with uvloop and httptools, orjson in, orjson out, nothing else."""
        return self.process(name, [sys.executable, "-m", "load.bare"])

    def origin_design(self) -> Running:
        """What the origin documents, on the same stores: `load/origin_design.py`."""
        environ = {"DATABASE_URL": self.database, "REDIS_URL": self.redis.url}
        environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = self.collector
        return self.process("the origin's design", [sys.executable, "-m", "load.origin_design"], environ)

    def process(self, name: str, command: Sequence[str], environ: dict[str, str] | None = None) -> Running:
        """Any server that prints its port as its first line, on the server's core."""
        return self.stack.enter_context(_process(name, command, environ or {}))


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """Servers of one run. This process and the stores share the core of the load."""
    pin_self()
    raise_open_files()
    with contextlib.ExitStack() as stack:
        yield Bench(stack)


@contextlib.contextmanager
def _process(name: str, command: Sequence[str], environ: dict[str, str]) -> Iterator[Running]:
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def drain() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put(b"")

    reader = threading.Thread(target=drain, name=name)
    reader.start()
    try:
        try:
            port = int(lines.get(timeout=START_S_MAX))
        except (queue.Empty, ValueError):
            raise CannotRun(f"{name} did not say its port within {START_S_MAX:.0f} s") from None
        pin_server(process.pid)
        yield Running(name, process.pid, port)
    finally:
        end(process)
        reader.join()


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """Takes spans and forgets them."""

    class Collector(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, name="collector", daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# Load


def measure(targets: Sequence[Target], rounds: int, seconds: float) -> None:
    """A B C, A B C, …: each visited once a round, so that what disturbs the machine for a while disturbs all."""
    for target in targets:
        probe(target)
        if not target.rounds:
            warm_up(target, min(1.0, seconds))
    for _ in range(rounds):
        for target in targets:
            target.rounds.append(visit(target, seconds))


def warm_up(target: Target, seconds: float) -> None:
    """A first call compiles, connects and fills caches; so does the first of each credential and of each body."""
    asked = visit(target, seconds).requests_per_s * seconds
    kinds = max(len(target.asking.credentials), len(target.asking.sent))
    if asked < kinds:  # every load begins with the first of them again
        visit(target, min(WARM_UP_S_MAX, math.ceil(2 * kinds / max(1.0, asked / seconds))))


def visit(target: Target, seconds: float) -> Round:
    """Load for so long, then wait until the server is idle: what it does later it did for these requests."""
    pid = target.server.pid
    before = cpu_s(pid)
    # wrk counts in whole seconds.
    wrk = shutil.which("wrk")
    asked = wrk_load(wrk, target, seconds) if wrk and seconds >= 1 else client_load(target, seconds)
    memory = rss_mb(pid)
    settle(pid)
    cpu_us = (cpu_s(pid) - before) / max(asked.requests, 1) * 1e6
    return Round(asked.requests_per_s, cpu_us, asked.p50_ms, asked.p99_ms, memory, asked.errors)


def probe(target: Target) -> None:
    """One request must get a right answer: wrk looks at the status alone. A server that just started may stall."""
    for left in reversed(range(PROBES)):
        answer = ask(target.server, target.asking)
        if target.asking.right in answer and '"error":{"code"' not in answer:
            return
        if left:
            time.sleep(PROBE_AGAIN_S)
    raise CannotRun(f"{target.name}: no right answer: {answer[:300]}")


def ask(server: Running, asking: Asking) -> str:
    """The first of its requests, by itself; an error's body too."""
    headers = {"Content-Type": "application/json", **dict(asking.headers)}
    if asking.credentials:
        headers["Authorization"] = f"Bearer {asking.credentials[0]}"
    request = urllib.request.Request(server.url + asking.path, asking.sent[0], headers)
    try:
        with urllib.request.urlopen(request, timeout=START_S_MAX) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        return error.read().decode()


class Asked(NamedTuple):
    requests: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int


def client_name() -> str:
    return "wrk" if shutil.which("wrk") else "load/client.py"


SCRIPT = """
local heads, bodies, made, turn = {%s}, {%s}, {}, 0
function init()
  for number, head in ipairs(heads) do made[number] = head .. bodies[(number - 1) %% #bodies + 1] end
end
function request()
  turn = turn %% #made + 1
  return made[turn]
end
"""


def wrk_load(wrk: str, target: Target, seconds: float) -> Asked:
    heads = ",".join(json.dumps(head) for head in target.asking.heads())
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT % (heads, ",".join(f"[==[{body.decode()}]==]" for body in target.asking.sent)))
        script.flush()
        command = [wrk, "-t1", f"-c{target.connections}", f"-d{round(seconds)}s", "--latency"]
        command += ["--timeout", "30s", "-s", script.name, target.server.url]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+) requests in", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert found and rate, text
    wrong = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    broken = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    errors = (int(wrong[1]) if wrong else 0) + (sum(map(int, broken.groups())) if broken else 0)
    return Asked(int(found[1]), float(rate[1]), _percentile(text, "50%"), _percentile(text, "99%"), errors)


def _percentile(text: str, name: str) -> float:
    found = re.search(rf"{name}\s+([\d.]+)(us|ms|s|m)", text)
    assert found, text
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}[found[2]]


def client_load(target: Target, seconds: float) -> Asked:
    asked = target.asking.requests()
    outcome = drive(Plan(target.server.port, asked, target.connections, seconds=seconds))
    took = sorted(outcome.took_us)
    errors = sum(one != RIGHT for one in outcome.ended)
    rate = len(took) / outcome.seconds
    return Asked(len(took), rate, quantile(took, 0.5) / 1e3, quantile(took, 0.99) / 1e3, errors)


def drive(plan: Plan) -> Outcome:
    """Run load/client.py in a process of its own, on this process's core."""
    longest = plan.seconds + sum(seconds for _, seconds in plan.phases) + START_S_MAX
    command = [sys.executable, "-m", "load.client"]
    try:
        done = subprocess.run(
            command, check=False, cwd=ROOT, input=orjson.dumps(asdict(plan)), stdout=subprocess.PIPE, timeout=longest
        )
    except subprocess.TimeoutExpired:
        raise CannotRun("the client did not end") from None
    if done.returncode:
        raise CannotRun("the client ended early")
    return Outcome(**orjson.loads(done.stdout))


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of values in order; 0 of none."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else 0.0


def refused(outcome: Outcome) -> int:
    return sum(one == REFUSED for one in outcome.ended)


# Tables


def heading(what: str) -> str:
    """Whose figures these are; under it goes a table."""
    pinned = "server on a core of its own" if cores() else "not pinned"
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores, {pinned}"
    return f"{time.strftime('%Y-%m-%d')}, {machine}, {client_name()}: {what}"


def print_table(title: str, targets: Sequence[Target], goals: dict[str, str] | None = None) -> None:
    """The first target is the yardstick of the ratios; `goals` is a text to stand beside a target of that name."""
    width = max(22, *(len(target.name) + 2 for target in targets))
    print(heading(f"{title}, medians of {len(targets[0].rounds)} rounds"))
    columns = (("calls/s", 10), ("ratio", 7), ("CPU us/call", 13), ("ratio", 7), ("p50 ms", 9), ("p99 ms", 9))
    print(" " * width + "".join(f"{name:>{size}}" for name, size in (*columns, ("MB", 6), ("errors", 8))))
    for target in targets:
        ratios = target.rate_ratio(targets[0]), target.cpu_ratio(targets[0])
        row = f"{target.name:{width}}{target.calls_per_s:10,.0f}{ratios[0]:7.2f}{target.cpu_us_per_call:13.1f}"
        row += f"{ratios[1]:7.2f}{target.median('p50_ms'):9.2f}{target.median('p99_ms'):9.2f}"
        row += f"{target.median('rss_mb'):6.0f}{target.errors:8d}"
        goal = (goals or {}).get(target.name)
        print(row + (f"   {goal}" if goal else ""))
    print(flush=True)


def write_json(path: str | None, document: dict[str, Any]) -> None:
    """One document, with the machine that it came from."""
    if path is None:
        return
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "client": client_name()}
    whole = {"date": time.strftime("%Y-%m-%d"), "machine": machine, **document}
    Path(path).write_bytes(orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS) + b"\n")
