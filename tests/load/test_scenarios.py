"""The scenarios by name: each runs, follows its shape, keeps to its bounds, and is what load/README.md says."""

from __future__ import annotations

import csv
import os
import re
import shlex
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from load.pages import PAGES
from load.run import parse
from load.scenarios import ALL_KINDS, SCENARIOS, UNNAMED, Scenario
from tests.conftest import ROOT, Running, Serve, service_environ
from tests.load.runs import RUN_TIME, Limited, Run, finished, run_load, serving, start_load

README = ROOT / "load" / "README.md"
BLOCKS = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
LOCUST = [command for command in COMMANDS if command.startswith("locust ")]
ORIGINS = [command for command in LOCUST if "--users" in command]
BIN = Path(sys.executable).parent
PAGES_HOST = "127.0.0.1:8900"


def start(command: str, *more: str, **environ: str) -> subprocess.Popen[str]:
    """As an operator types it, in the project's folder with .venv/bin on the PATH."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["sh", "-c", " ".join(["exec", command, *map(shlex.quote, more)])],
        cwd=ROOT,
        env=service_environ(**{"PATH": path, "LOAD_P95_MAX": "60000", **environ}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def locust(command: str, *more: str, **environ: str) -> Run:
    return finished(start(command, *more, **environ))


@pytest.fixture(scope="module")
def pages() -> Iterator[str]:
    class Page(Limited):
        def do_GET(self) -> None:
            self._answer(PAGES[self.path].html)

    with serving(Page) as url:
        yield url


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "locust_stats_history.csv").open() as file:
        return list(csv.DictReader(file))


LEVEL = [one for one in SCENARIOS.values() if not one.stages]


@pytest.fixture(scope="module")
def runs(service: Running, pages: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Path]]:
    """Every scenario without a shape, all at once, for seconds."""
    started = {}
    for scenario in LEVEL:
        folder = tmp_path_factory.mktemp(scenario.name)
        arguments = ["--scenario", scenario.name, "--users", "20", "--spawn-rate", "20", "--run-time", "8s"]
        where = ["--p95-max", "60000", "--host", service.url, "--out", str(folder)]
        started[scenario.name] = start_load(*arguments, *where, PAGES_URL=pages), folder
    return {name: (finished(process), folder) for name, (process, folder) in started.items()}


@pytest.mark.parametrize("scenario", LEVEL, ids=lambda one: one.name)
def test_every_scenario_runs_with_its_own_users(scenario: Scenario, runs: dict[str, tuple[Run, Path]]) -> None:
    run, folder = runs[scenario.name]
    assert run.code == 0, run.output
    kinds = {name for name, (requests, _) in run.rows.items() if requests} - {"all"}
    if scenario.classes == ("EchoUser",):
        assert kinds == {"echo"}
    else:
        assert kinds >= {"echo", "calculator", "web_scrape"}
        assert ("echo hammered" in kinds) is (scenario.classes == ALL_KINDS)
    assert history(folder)


def test_a_spike_is_one_and_a_staircase_too(service: Running, pages: str, tmp_path: Path) -> None:
    """Side by side, each of seconds: how many users there were, by Locust's own history."""
    counts = {}
    command = f"locust -f load/locustfile.py --headless --host {service.url} -u 20 -r 100 -t 20s"
    started = {
        name: start(command, "--scenario", name, "--csv", str(tmp_path / name / "locust"), PAGES_URL=pages)
        for name in ("spike", "step")
    }
    for name, process in started.items():
        run = finished(process)
        assert run.code == 0, run.output
        counts[name] = [int(row["User Count"]) for row in history(tmp_path / name)]
    highest = counts["spike"].index(20)
    assert 2 in counts["spike"][:highest] and 2 in counts["spike"][highest:]
    assert set(counts["spike"]) <= {0, 2, 20}
    steps = [count for count in counts["step"] if count]
    assert steps == sorted(steps) and set(steps) <= {4, 8, 12, 16, 20} and len(set(steps)) >= 4


def test_shapes_end_where_the_run_ends_and_never_leave_it_empty() -> None:
    for scenario in SCENARIOS.values():
        if scenario.stages:
            assert scenario.users_at(1.0, 1000) is None
            assert max(stage.users for stage in scenario.stages) == 1
            assert all((scenario.users_at(share / 100, 3) or 0) >= 1 for share in range(100))


def test_a_slow_tool_breaks_the_bound_on_p95_though_every_call_succeeds(service: Running, tmp_path: Path) -> None:
    never = Event()

    class Slow(Limited):
        def do_GET(self) -> None:
            never.wait(0.8)
            self._answer(PAGES[self.path].html)

    with serving(Slow) as url:
        arguments = ["--scenario", "latency", "--users", "20", "--spawn-rate", "20", "--run-time", "4s"]
        run = run_load(*arguments, "--p95-max", "700", "--host", service.url, "--out", str(tmp_path), PAGES_URL=url)
    assert run.code == 1, run.output
    assert re.search(r"FAILED: p95 is \d,?\d* ms, at most 700 ms may be", run.output), run.output
    assert run.output.count("FAILED") == 1 and run.rows["all"][1] == 0
    page = (tmp_path / "report.html").read_text()
    assert 'class="verdict failed"' in page and "at most 700 ms may be" in page


class Reader(HTMLParser):
    """Tags, and whatever would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]


def test_the_page_stands_alone_and_plots_users_requests_percentiles_and_failures(
    runs: dict[str, tuple[Run, Path]],
) -> None:
    run, folder = runs["mix"]
    page = (folder / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.loaded == [] and "script" not in reader.tags and "link" not in reader.tags
    assert "url(" not in page and "@import" not in page
    plots = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    names = {text.text for text in plots.iter("{http://www.w3.org/2000/svg}text")}
    assert names >= {"users", "requests a second", "p50", "p95", "p99", "failures a second"}
    lines = plots.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 6 and sum(len(line.attrib["points"].split()) >= 2 for line in lines) >= 3
    for kind in run.rows:
        assert f"<td>{kind}</td>" in page
    stats = {row["Name"] for row in csv.DictReader((folder / "locust_stats.csv").read_text().splitlines())}
    assert stats >= run.rows.keys() - {"all"}


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_two_commands_of_the_origin_run_as_it_wrote_them(serve: Serve) -> None:
    """But for the path, and the length, which later options of the same name set."""
    assert [re.findall(r"--(\S+?)(?: +([\w:/.]+))?(?= +-|$)", command) for command in ORIGINS] == [
        [("host", "http://localhost:8001"), ("users", users), ("spawn-rate", rate), ("run-time", time), *rest]
        for users, rate, time, rest in (
            ("1500", "100", "10m", [("headless", "")]),
            ("100", "10", "5m", [("headless", ""), ("only-summary", "")]),
        )
    ]
    if free(8001):
        serve("--port", "8001", EGRESS_ALLOW=PAGES_HOST)
        host: list[str] = []
    else:
        host = ["--host", serve(EGRESS_ALLOW=PAGES_HOST).url]
    for command in ORIGINS:
        run = locust(command, "-u", "20", "-t", RUN_TIME, *host)
        assert run.code == 0, run.output
        assert "PASSED" in run.output.splitlines()
        assert re.search(r"web_scrape +[1-9]\d* +0\(0.00%\)", run.output), run.output


def test_locust_alone_fails_as_well_when_calls_fail(serve: Serve) -> None:
    service = serve()  # allows no egress to loopback
    command = f"locust -f load/locustfile.py --headless --host {service.url} -t {RUN_TIME} -u 2 BurstUser"
    run = locust(command, PAGES_URL="http://127.0.0.1:1")
    assert run.code == 1, run.output
    assert "web_scrape: 0.00% succeeded, at least 95.00% must" in run.output


def test_workers_are_counted_by_their_master_whoever_started_them(service: Running, pages: str, tmp_path: Path) -> None:
    """One run of `load.run` and one by the commands of the page, side by side."""
    arguments = ["--scenario", "headline", "--processes", "2", "--p95-max", "60000", "--out", str(tmp_path)]
    few = ["-u", "20", "-r", "20", "-t", RUN_TIME, "--host", service.url]
    spelled = ["--users", "20", "--spawn-rate", "20", "--run-time", RUN_TIME, "--host", service.url]
    by_run = start_load(*arguments, *spelled, PAGES_URL=pages)
    by_hand = next(command for command in LOCUST if "--master " in command)
    worker = next(command for command in LOCUST if "--worker" in command)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    workers = [start(worker, "--master-port", port, LOAD_MASTER="127.0.0.1", PAGES_URL=pages) for _ in range(2)]
    run = locust(by_hand, "--master-bind-host", "127.0.0.1", "--master-bind-port", port, *few, PAGES_URL=pages)
    other = finished(by_run)
    assert other.code == 0, other.output
    assert other.rows["echo"][0] > 0 and other.rows.keys() == {"echo", "all"}
    assert "overhead_ms" in (tmp_path / "report.html").read_text()
    ended = [finished(process) for process in workers]
    assert run.code == 0, run.output
    assert re.search(r"web_scrape +[1-9]\d* +0\(0.00%\)", run.output), run.output
    assert [worker.code for worker in ended] == [0, 0]


def test_every_locust_command_of_the_page_is_one_that_locust_takes() -> None:
    for run in [
        finished(each) for each in [start(command.replace("--processes 4", ""), "--list") for command in LOCUST]
    ]:
        assert run.code == 0, run.output
        assert "PlainUser" in run.output


def planned(command: str) -> Any:
    """What a `make load` or `python -m load.run` of the page would run."""
    if command.startswith("make "):
        shown = subprocess.run(
            ["make", "-n", "-o", ".venv/.ready", *shlex.split(command)[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        command = shown.replace("\\\n", " ").split("python", 1)[1]
        command = f"python{command}"
    program, flag, module, *arguments = shlex.split(command)
    assert (program, flag, module) == ("python", "-m", "load.run")
    return parse(arguments)


def test_the_other_commands_of_the_page_are_taken() -> None:
    plans = {command: planned(command) for command in COMMANDS if not command.startswith("locust ")}
    assert plans["make load"].scenario == "mix"
    capacity = next(plan for command, plan in plans.items() if "USERS=1500" in command)
    assert (capacity.users, capacity.spawn_rate, capacity.run_time_s) == (1500, 100, 600)
    assert capacity.host == "http://127.0.0.1:8001"
    for module in re.findall(r"python -m (load\.\w+)", README.read_text()):
        assert find_spec(module) is not None, module


def test_each_measurement_that_a_page_names_says_what_it_does_and_does_nothing_when_asked() -> None:
    pages = [README, *(README.parent.parent / "docs").rglob("*.md")]
    modules = {name for page in pages for name in re.findall(r"python -m (load\.\w+)", page.read_text())}
    assert {"load.journal", "load.micro", "load.shard", "load.tracing"} <= modules
    for module in sorted(modules):
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and done.stdout.startswith("usage: "), module
        assert len(done.stdout.split()) > 15, module


def test_the_page_lists_the_scenarios_that_there_are() -> None:
    text = README.read_text().split("## Scenarios\n", 1)[1].split("\n\n```", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    documented = {row[0].strip("`"): row for row in rows}
    assert documented.keys() == SCENARIOS.keys()
    for name, scenario in SCENARIOS.items():
        _, users, rate, time, who, shape, p95 = documented[name]
        kinds = "all kinds" if scenario.classes == ALL_KINDS else ", ".join(f"`{kind}`" for kind in scenario.classes)
        assert (int(users), float(rate), who) == (scenario.users, scenario.spawn_rate, kinds)
        assert parse(["--run-time", time]).run_time_s == scenario.run_time_s
        assert (shape == "level") is (not scenario.stages)
        assert p95 == f"{scenario.bounds.p95_ms_max:g} ms"
    named = set(re.findall(r"(?:--scenario |SCENARIO=)([a-z]+)", README.read_text()))
    assert named <= SCENARIOS.keys()
    assert f"p95 may be {UNNAMED.p95_ms_max:,.0f} ms" in README.read_text()


def test_the_page_lists_the_users_that_there_are() -> None:
    listed = locust("locust -f load/locustfile.py --list").output.split("Available Users:")[1].split()
    text = README.read_text().split("## Who calls\n", 1)[1]
    assert set(listed) == set(re.findall(r"`(\w+User)`", text.split("\n\nUnder 20", 1)[0]))
