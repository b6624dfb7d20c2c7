"""`python -m load.run`: one load test from start to finish, ending by itself. `make load` calls this.

Without --host it starts a service of its own, in a scratch folder, and the pages that web_scrape reads. Locust runs
as a process of its own because gevent patches the standard library. Exit 0: within the scenario's bounds; 1: not; 2:
the run could not be made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from load.machine import pin_self, pin_server, raise_open_files
from load.pages import PORT_DEFAULT, serving_pages
from load.report import html
from load.scenarios import DEFAULT, SCENARIOS, Bounds, seconds

ROOT = Path(__file__).parent.parent

START_S_MAX = 60.0
"""A cold start compiles every module; a slow disk is no reason to give up."""

READY_S_MAX = 30.0
FINISH_S_MAX = 10.0
"""What calls may still take after the run time, before Locust breaks them off."""

LOCUST_S_MAX = 60.0
"""Over run time and FINISH_S_MAX: importing, and stopping 2,000 users."""

END_S_MAX = 15.0
WARNINGS_MAX = 20
WARNING_CHARACTERS_MAX = 300
"""A service that warns on every call, or with a stack, would bury the table."""

WEIGHTS = 20
"""The sum of the user classes' weights: fewer users than that would leave some kinds out."""


class CannotRun(Exception):
    """No run was possible; the text says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for, or whoever runs Locust by `run_locust`."""

    scenario: str
    users: int
    spawn_rate: float
    run_time_s: int
    bounds: Bounds
    classes: tuple[str, ...]
    host: str | None = None
    pages_port: int | None = None
    processes: int = 0
    folder: Path | None = None

    @property
    def command(self) -> str:
        """What makes such a run again."""
        parts = ["python -m load.run --scenario", self.scenario, f"--users {self.users}"]
        parts += [f"--spawn-rate {self.spawn_rate:g} --run-time {self.run_time_s}s"]
        if self.processes:
            parts.append(f"--processes {self.processes}")
        return " ".join([*parts, *(self.classes if self.classes != SCENARIOS[self.scenario].classes else ())])


def main() -> None:
    """Entry point."""
    plan = parse()
    signal.signal(signal.SIGTERM, _terminated)
    raise_open_files()
    try:
        with ExitStack() as stack:
            pages_url = _pages(plan, stack)
            host = plan.host or _pinned_service(stack, pages_url).url
            _wait_until_ready(host)
            _announce(plan, host, pages_url)
            report = run_locust(plan, host, pages_url)
    except CannotRun as error:
        print(f"load: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print_figures(report)
    _write_page(plan, report)
    sys.exit(1 if report["broken"] else 0)


def _terminated(signal_number: int, _: object) -> None:
    """Leave by way of every `finally`; asked again, go on ending."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal_number)


def parse(arguments: Sequence[str] | None = None) -> Plan:
    """Of the command line, or of these."""
    parser = argparse.ArgumentParser(prog="python -m load.run", description="Runs headless Locust and sums it up.")
    parser.add_argument("--scenario", choices=SCENARIOS, default=DEFAULT, help="what is not said otherwise comes of it")
    parser.add_argument("--host", help="URL of a running service; without it one is started")
    parser.add_argument("--users", type=_at_least(1))
    parser.add_argument("--spawn-rate", type=float, help="users a second")
    parser.add_argument("--run-time", type=seconds, help="such as 30s, 10m, 1h30m; ramp included")
    parser.add_argument("--success-min", type=_share, help="of each kind of request, such as 0.95")
    parser.add_argument("--p95-max", type=float, metavar="MS", help="of all requests")
    parser.add_argument("--processes", type=_at_least(0), default=0, help="Locust workers; 0: one process does it all")
    parser.add_argument("--pages-port", type=_at_least(0), help=f"with --host {PORT_DEFAULT}, else any free one")
    parser.add_argument("--out", type=Path, help="folder for report.html and CSV files (var/load/SCENARIO)")
    parser.add_argument("classes", nargs="*", metavar="USER_CLASS", help="PlainUser, BurstUser, …")
    given = parser.parse_args(arguments)
    scenario = SCENARIOS[given.scenario]
    bounds = Bounds(
        scenario.bounds.p95_ms_max if given.p95_max is None else given.p95_max,
        scenario.bounds.success_min if given.success_min is None else given.success_min,
    )
    if given.spawn_rate is not None and given.spawn_rate <= 0:
        parser.error("--spawn-rate must be over 0")
    if given.host and not given.host.startswith(("http://", "https://")):
        parser.error("--host is a URL: http://… or https://…")
    return Plan(
        scenario.name,
        given.users or scenario.users,
        given.spawn_rate or scenario.spawn_rate,
        given.run_time or scenario.run_time_s,
        bounds,
        tuple(given.classes) or scenario.classes,
        given.host.rstrip("/") if given.host else None,
        given.pages_port,
        given.processes,
        (given.out or ROOT / "var" / "load" / scenario.name).resolve(),
    )


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return number


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError("must be 0..1, such as 0.95 for 95 %")
    return float(text)


def _pages(plan: Plan, stack: ExitStack) -> str:
    """The URL of pages to scrape: PAGES_URL when there is one, else our own server's."""
    if given := os.environ.get("PAGES_URL"):
        return given.rstrip("/")
    # With a service of somebody else's the port must be known beforehand: its EGRESS_ALLOW names it.
    port = plan.pages_port if plan.pages_port is not None else PORT_DEFAULT if plan.host else 0
    try:
        return stack.enter_context(serving_pages(port))
    except OSError as error:
        raise CannotRun(f"no page server on port {port}: {error.strerror}; choose another with --pages-port") from None


class OwnService(NamedTuple):
    """A service that this process started and will end."""

    url: str
    pid: int


@contextmanager
def own_service(pages_url: str, **settings: str) -> Iterator[OwnService]:
    """`agentcore-tools serve` on a free port, with the settings of the environment and those given.

    It lives in a scratch folder, so that its log of calls does not end up among an operator's.
    """
    allowed = [pages_url.split("://", 1)[1].split("/", 1)[0], os.environ.get("EGRESS_ALLOW", "")]
    environ = {"PYTHONPATH": str(ROOT), "DRAIN_SECONDS": "0", "EGRESS_ALLOW": ",".join(filter(None, allowed))}
    with tempfile.TemporaryDirectory(prefix="agentcore-load-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", "--port", "0"],
            cwd=folder,
            env=os.environ | environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        urls: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        drain = threading.Thread(target=_drain_log, args=(process, urls), name="service-log")
        drain.start()
        try:
            yield OwnService(_own_url(urls), process.pid)
        finally:
            end(process)
            drain.join()


def _drain_log(process: subprocess.Popen[bytes], urls: queue.SimpleQueue[str | None]) -> None:
    """Read the service's log to its end, or the service would stand still with a full pipe. Warnings are shown."""
    assert process.stdout is not None
    shown = 0
    with process.stdout:
        for line in process.stdout:
            event = _event(line)
            if event.get("message") == "serving":
                urls.put(event["url"])
            elif event.get("level") in ("WARNING", "ERROR", "CRITICAL") and shown < WARNINGS_MAX:
                shown += 1
                print(f"service: {line.decode(errors='replace').rstrip()[:WARNING_CHARACTERS_MAX]}", file=sys.stderr)
    urls.put(None)


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _own_url(urls: queue.SimpleQueue[str | None]) -> str:
    try:
        url = urls.get(timeout=START_S_MAX)
    except queue.Empty:
        raise CannotRun(f"the service did not start within {START_S_MAX:.0f} s") from None
    if url is None:
        raise CannotRun("the service ended before it served")
    return url


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours whatever state it is in: asked first, then made to."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=END_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _wait_until_ready(host: str) -> None:
    ends = time.monotonic() + READY_S_MAX
    problem = ""
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < ends:
            try:
                status_code = client.get(f"{host}/readyz").status_code
            except httpx.HTTPError as error:
                problem = type(error).__name__
            else:
                if status_code == 200:
                    return
                problem = f"HTTP {status_code}"
            time.sleep(0.2)
    raise CannotRun(f"{host}/readyz: {problem}, for {READY_S_MAX:.0f} s")


def _pinned_service(stack: ExitStack, pages_url: str) -> OwnService:
    """The service has a core by itself; Locust and the pages share another."""
    pin_self()
    service = stack.enter_context(own_service(pages_url))
    pin_server(service.pid)
    return service


def _announce(plan: Plan, host: str, pages_url: str) -> None:
    print(f"{heading()}: {plan.command}, on {host}")
    if plan.host:
        address = pages_url.split("://", 1)[1]
        print(f"web_scrape reads {pages_url}: the service must reach it and have EGRESS_ALLOW={address}")
        print("(another page server: PAGES_URL). What it refuses to fetch is counted as a failure.")
    sys.stdout.flush()


def heading() -> str:
    """When, and on what."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{when}, {os.cpu_count()} cores of {processor()}, Python {platform.python_version()}"


def processor() -> str:
    """Its name, where the system tells."""
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()


def run_locust(plan: Plan, host: str, pages_url: str, **environ: str) -> dict[str, Any]:
    """Run Locust to its end; the report that load/tally.py writes. API_KEY may be among `environ`."""
    with tempfile.TemporaryDirectory(prefix="agentcore-load-") as folder:
        report = Path(folder, "report.json")
        process = subprocess.Popen(
            _locust_command(plan, host, report),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PAGES_URL": pages_url} | environ,
            stdin=subprocess.DEVNULL,
        )
        try:
            code = process.wait(timeout=plan.run_time_s + FINISH_S_MAX + LOCUST_S_MAX)
        except subprocess.TimeoutExpired:
            raise CannotRun("Locust did not end by itself") from None
        finally:
            end(process)
        if code not in (0, 1) or not report.exists():
            raise CannotRun(f"Locust ended with code {code}")
        written: dict[str, Any] = json.loads(report.read_bytes())
        return written


def _locust_command(plan: Plan, host: str, report: Path) -> list[str]:
    command = [sys.executable, "-m", "locust", "-f", "load/locustfile.py", "--headless", "--host", host]
    command += ["--scenario", plan.scenario, "--users", str(plan.users), "--spawn-rate", f"{plan.spawn_rate:g}"]
    command += ["--run-time", f"{plan.run_time_s}s", "--stop-timeout", f"{FINISH_S_MAX:g}", "--report", str(report)]
    command += ["--p95-max", str(plan.bounds.p95_ms_max), "--success-min", str(plan.bounds.success_min)]
    command += ["--only-summary", "--skip-log-setup"]  # the figures are ours to print, once
    if plan.folder:
        command += ["--csv", str(plan.folder / "locust")]
    if plan.processes:
        port = str(_free_port())  # Locust's own would be open to the network, and one for all runs
        command += ["--processes", str(plan.processes), "--master-bind-host", "127.0.0.1", "--master-bind-port", port]
        command += ["--master-port", port]
    if plan.users < WEIGHTS:
        command.append("--equal-weights")
    return [*command, *plan.classes]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def print_figures(report: dict[str, Any]) -> None:
    """What came out, and whether the run was good."""
    _print_table([*report["rows"], report["total"] | {"name": "all"}])
    for failure in report["failures"]:
        print(f"{failure['count']:>8} x {failure['name']}: {failure['reason']}")
    total = report["total"]
    print(f"{total['failures']} of {total['requests']} requests failed")
    for broken in report["broken"]:
        print(f"FAILED: {broken}")
    if not report["broken"]:
        print("PASSED")


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("requests", "failures", "p50", "p95", "p99", "max", "rps")
    print(f"{'':<24}" + "".join(f"{column:>10}" for column in columns) + "   (times in ms)")
    for row in rows:
        numbers = [f"{row[column]:.1f}" if column == "rps" else f"{row[column]:.0f}" for column in columns]
        print(f"{row['name']:<24}" + "".join(f"{number:>10}" for number in numbers))


def _write_page(plan: Plan, report: dict[str, Any]) -> None:
    assert plan.folder is not None
    page = plan.folder / "report.html"
    page.write_text(html(plan.scenario, heading(), plan.command, report, plan.bounds), encoding="utf-8")
    print(f"written: {os.path.relpath(page)}, {os.path.relpath(plan.folder)}/locust_*.csv")


if __name__ == "__main__":
    main()
