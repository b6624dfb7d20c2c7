"""`python -m load.run`: one load test from start to finish, ending by itself. `make load` calls this.

Without --host it starts a service of its own, in a scratch folder, and the pages that web_scrape reads. Locust runs
as a process of its own because gevent patches the standard library. Exit 0: within the failure ratio; 1: not; 2: the
run could not be made.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from load.pages import PORT_DEFAULT, serving_pages

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

OPEN_FILES = 65_536
"""A connection for each user here, and one more in the service; many shells allow 1,024."""

WEIGHTS = 20
"""The sum of the user classes' weights: fewer users than that would leave some kinds out."""

_UNITS = {"h": 3600, "m": 60, "s": 1}


class CannotRun(Exception):
    """No run was possible; the text says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for."""

    host: str | None
    users: int
    spawn_rate: float
    run_time_s: int
    fail_ratio: float
    pages_port: int | None
    classes: tuple[str, ...]


def main() -> None:
    """Entry point."""
    plan = _plan()
    signal.signal(signal.SIGTERM, _terminated)
    _raise_open_files()
    try:
        with ExitStack() as stack:
            pages_url = _pages(plan, stack)
            host = plan.host or stack.enter_context(own_service(pages_url)).url
            _wait_until_ready(host)
            _announce(plan, host, pages_url)
            report = run_locust(plan, host, pages_url)
    except CannotRun as error:
        print(f"load: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if verdict(report, plan.fail_ratio) else 1)


def _terminated(signal_number: int, _: object) -> None:
    """Leave by way of every `finally`; asked again, go on ending."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal_number)


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m load.run", description="Runs headless Locust and sums it up.")
    parser.add_argument("--host", help="URL of a running service; without it one is started")
    parser.add_argument("--users", type=_at_least(1), default=100)
    parser.add_argument("--spawn-rate", type=float, default=20.0, help="users a second")
    parser.add_argument("--run-time", type=seconds, default=30, help="such as 30s, 10m, 1h30m; ramp included")
    parser.add_argument("--fail-ratio", type=_ratio, default=0.01, help="failures that any kind of request may have")
    parser.add_argument("--pages-port", type=_at_least(0), help=f"with --host {PORT_DEFAULT}, else any free one")
    parser.add_argument("classes", nargs="*", metavar="USER_CLASS", help="PlainUser, BurstUser, …; all by weight")
    given = parser.parse_args()
    if given.spawn_rate <= 0:
        parser.error("--spawn-rate must be over 0")
    if given.host and not given.host.startswith(("http://", "https://")):
        parser.error("--host is a URL: http://… or https://…")
    return Plan(
        given.host.rstrip("/") if given.host else None,
        given.users,
        given.spawn_rate,
        given.run_time,
        given.fail_ratio,
        given.pages_port,
        tuple(given.classes),
    )


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)

    return number


def _ratio(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError("must be 0..1, such as 0.01 for 1 %")
    return float(text)


def seconds(text: str) -> int:
    """Locust's spelling of a duration, which must be bounded: `300`, `30s`, `10m`, `1h30m`."""
    if text.isdecimal():
        text += "s"
    parts = re.findall(r"(\d+)([hms])", text)
    total = sum(int(number) * _UNITS[unit] for number, unit in parts)
    if total == 0 or "".join(number + unit for number, unit in parts) != text:
        raise argparse.ArgumentTypeError("must be a duration such as 30s, 10m or 1h30m")
    return total


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


def _announce(plan: Plan, host: str, pages_url: str) -> None:
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    machine = f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}"
    print(f"{when}: {plan.users} users at {plan.spawn_rate:g}/s for {plan.run_time_s} s on {host} ({machine})")
    if plan.host:
        address = pages_url.split("://", 1)[1]
        print(f"web_scrape reads {pages_url}: the service must reach it and have EGRESS_ALLOW={address}")
        print("(another page server: PAGES_URL). What it refuses to fetch is counted as a failure.")
    sys.stdout.flush()


def run_locust(plan: Plan, host: str, pages_url: str) -> dict[str, Any]:
    """Run Locust to its end; the report that load/locustfile.py writes."""
    with tempfile.TemporaryDirectory(prefix="agentcore-load-") as folder:
        report = Path(folder, "report.json")
        process = subprocess.Popen(
            _locust_command(plan, host, report),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PAGES_URL": pages_url},
            stdin=subprocess.DEVNULL,
        )
        try:
            code = process.wait(timeout=plan.run_time_s + FINISH_S_MAX + LOCUST_S_MAX)
        except subprocess.TimeoutExpired:
            raise CannotRun("Locust did not end by itself") from None
        finally:
            end(process)
        if code != 0 or not report.exists():
            raise CannotRun(f"Locust ended with code {code}")
        written: dict[str, Any] = json.loads(report.read_bytes())
        return written


def _locust_command(plan: Plan, host: str, report: Path) -> list[str]:
    command = [sys.executable, "-m", "locust", "-f", "load/locustfile.py", "--headless", "--host", host]
    command += ["--users", str(plan.users), "--spawn-rate", f"{plan.spawn_rate:g}", "--run-time", f"{plan.run_time_s}s"]
    command += ["--stop-timeout", f"{FINISH_S_MAX:g}", "--report", str(report)]
    # The figures are ours to judge and to print, once.
    command += ["--exit-code-on-error", "0", "--only-summary", "--skip-log-setup"]
    if plan.users < WEIGHTS:
        command.append("--equal-weights")
    return [*command, *plan.classes]


def verdict(report: dict[str, Any], fail_ratio: float) -> bool:
    """Print what came out, and whether the run was good.

    No kind of request may pass the ratio: the many of one kind would hide that another never works.
    """
    _print_table([*report["rows"], report["total"] | {"name": "all"}])
    for failure in report["failures"]:
        print(f"{failure['count']:>8} x {failure['name']}: {failure['reason']}")
    for crash in report["crashes"]:
        print(f"a user crashed: {crash}")
    worst = max((row["failures"] / max(row["requests"], 1) for row in report["rows"]), default=1.0)
    total = report["total"]
    print(f"{total['failures']} of {total['requests']} requests failed; worst kind {worst:.2%}, limit {fail_ratio:.2%}")
    return worst <= fail_ratio and not report["crashes"]


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ("requests", "failures", "p50", "p95", "p99", "max", "rps")
    print(f"{'':<24}" + "".join(f"{column:>10}" for column in columns) + "   (times in ms)")
    for row in rows:
        numbers = [f"{row[column]:.1f}" if column == "rps" else f"{row[column]:.0f}" for column in columns]
        print(f"{row['name']:<24}" + "".join(f"{number:>10}" for number in numbers))


if __name__ == "__main__":
    main()
