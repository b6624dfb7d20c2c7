#!/usr/bin/env python3
"""`python -m load.compare --fail-on-regression 10%`: what a call costs now, against the commit of load/baseline.json.

Compares ratios, not times: CPU per call over that of the same call by the baseline's code, which git has, in the same
rounds; and instructions per call over a bare echo's where valgrind is there. Where git does not have it, CPU over the
bare echo's is held against the baseline's, which from one machine or day to another is up to a quarter off. What passes
the limit is measured again before it counts. The origin's gates are kept as they are. Exit 1: a regression.
`--update` writes the baseline anew; `--plant 15` makes each call 15 % dearer, to see that it is found.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a file: modules of this folder would hide others of the same names
    _root = Path(__file__).resolve().parent.parent
    _own = _root / ".venv" / "bin" / "python"
    _python = str(_own) if _own.exists() else sys.executable
    os.execve(_python, [_python, "-m", "load.compare", *sys.argv[1:]], os.environ | {"PYTHONPATH": str(_root)})

import argparse
import io
import platform
import subprocess
import tarfile
import urllib.request
from typing import Any, NamedTuple

import orjson

from load.client import RIGHT, Plan
from load.harness import (
    OFF,
    Asking,
    Bench,
    Running,
    Target,
    bench,
    command,
    drive,
    heading,
    measure,
    print_table,
    write_json,
)
from load.instructions import Counted, available, counted
from load.overhead import Buckets, grown, quantile_s
from load.run import ROOT, CannotRun
from load.wire import ASGI, BATCH, MCP_HEADERS

BASELINE = Path(__file__).parent / "baseline.json"

TOOL = "spin"
LIMIT = 0.10

AGAIN = 2
"""How often a ratio past the limit is measured again; then the median of all rounds counts. Instructions are not."""

GATES_MS = {"framework_overhead_seconds": 50.0, "registry_lookup_duration_seconds": 5.0}
"""The origin's, for the 95th percentile, at the rate of its headline test."""
GATE_RATE, GATE_CONNECTIONS = 500.0, 64

BURSTS = 8
INSTRUCTION_CREDENTIALS = 4

CODE = ("app", "load", "migrations")
"""Of a commit: what a service needs."""

CALIBRATION_LOOPS = 2_000
CALIBRATION_ROUNDS = 5


class Line(NamedTuple):
    """One figure beside its baseline: a cost, so more is worse."""

    name: str
    base: float | None
    now: float

    @property
    def change(self) -> float:
        return 0.0 if self.base is None else self.now / self.base - 1

    def text(self, limit: float) -> str:
        if self.base is None:
            return f"{self.name:44}{'-':>10}{self.now:10.3f}{'new':>10}"
        verdict = "WORSE" if self.change > limit else "better" if self.change < -limit else "ok"
        return f"{self.name:44}{self.base:10.3f}{self.now:10.3f}{self.change:+10.1%}   {verdict}"


class Measured(NamedTuple):
    """One run: costs by name, the gates' 95th percentiles in ms, and costs of the baseline's code beside them."""

    ratios: dict[str, float]
    instructions: dict[str, float]
    gates_ms: dict[str, float]
    before: dict[str, float] | None = None


# What is asked


def parameters(loops: int) -> dict[str, Any]:
    return {"message": "hello world", "loops": loops}


def call(loops: int, request_id: int = 1) -> bytes:
    params = {"tool_id": TOOL, "parameters": parameters(loops)}
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "method": "tools.execute", "params": params})


def askings(credentials: tuple[str, ...], loops: int) -> dict[str, Asking]:
    """A call as `echo`, by a tool that can be made slower."""
    right = '"status":"success"'
    batch = b"[" + b",".join(call(loops, number) for number in range(BATCH)) + b"]"
    params = {"name": TOOL, "arguments": parameters(loops)}
    mcp = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
    return {
        "single": Asking(body=call(loops), right=right, credentials=credentials),
        "batch": Asking(body=batch, calls=BATCH, right=right, credentials=credentials),
        "mcp": Asking("/mcp", mcp, MCP_HEADERS, right='"structuredContent"', credentials=credentials),
    }


# What is measured


class Comparison:
    """The servers of one run, and what they are held against: the baseline's code, else its ratios."""

    def __init__(
        self, bench: Bench, baseline: dict[str, Any], limit: float, rounds: int, seconds: float, loops: int
    ) -> None:
        self.baseline = baseline
        self.limit = limit
        self.rounds = rounds
        self.seconds = seconds
        self.asked = askings(bench.credentials, loops)
        self.bare = Target("bare uvicorn echo", bench.bare())
        self.now = targets(bench, self.asked, {})
        self.lane = self.now[0].server
        self.then: list[Target] = []
        commit = baseline.get("commit", "")
        if commit and unpacked(commit, bench.folder / commit):
            try:
                self.then = targets(bench, askings(bench.credentials, 0), {"PYTHONPATH": str(bench.folder / commit)})
            except CannotRun as error:
                print(f"the code of {commit:.10} does not run here: {error}")
        print(f"baseline: {self._what_it_is()}")

    def _what_it_is(self) -> str:
        if self.then:
            return f"the code of {self.baseline['commit']:.10}, beside it"
        return "ratios, of another run" if self.baseline else "none"

    def costs(self) -> tuple[dict[str, float], dict[str, float]]:
        """CPU per call over the bare echo's, now and of the baseline; measured again while one is past the limit."""
        for attempt in range(AGAIN + 1):
            if attempt:
                print("a ratio is past the limit: measured again", flush=True)
            measure([self.bare, *self.now, *self.then], self.rounds, self.seconds)
            found = {one.name: 1 / one.cpu_ratio(self.bare) for one in self.now}
            before: dict[str, float] = self.baseline.get("ratios", {})
            if self.then:
                pairs = zip(self.now, self.then, strict=True)
                before = {now.name: found[now.name] * now.cpu_ratio(then) for now, then in pairs}
            if all(now <= before.get(name, now) * (1 + self.limit) for name, now in found.items()):
                break
        print_table("64 connections", [self.bare, *self.now])
        return found, before

    def gates(self, seconds: float) -> dict[str, float]:
        """The best of some times: these are no ratios, and whatever else the machine does is in them."""
        best = self.gate(seconds)
        for _ in range(AGAIN):
            if all(best[name] < at_most for name, at_most in GATES_MS.items()):
                break
            again = self.gate(seconds)
            best = {name: min(best[name], again[name]) for name in GATES_MS}
        return best

    def gate(self, seconds: float) -> dict[str, float]:
        before = histograms(self.lane)
        plan = Plan(self.lane.port, self.asked["single"].requests(), GATE_CONNECTIONS, phases=[(GATE_RATE, seconds)])
        outcome = drive(plan)
        if not any(one == RIGHT for one in outcome.ended):
            return dict.fromkeys(GATES_MS, float("inf"))
        after = histograms(self.lane)
        p95_s = {name: quantile_s(0.95, grown(before[name], after[name])) for name in GATES_MS}
        return {name: float("inf") if value is None else value * 1e3 for name, value in p95_s.items()}


def targets(bench: Bench, asked: dict[str, Asking], settings: dict[str, str]) -> list[Target]:
    """The calls that are compared, of services with everything on and these settings."""
    everything = bench.everything(TOOL_MODULES="load.tools", **settings)
    lane = bench.service("everything, lane", everything)
    asgi = bench.service("everything, ASGI", {**everything, **ASGI})
    return [
        Target("everything, lane", lane, asked["single"]),
        Target("everything, ASGI", asgi, asked["single"]),
        Target(f"batch of {BATCH}, lane", lane, asked["batch"]),
        Target("MCP tools/call, lane", lane, asked["mcp"]),
    ]


def unpacked(commit: str, folder: Path) -> bool:
    """The code of a commit in a folder. False: there is no git here, or it does not have that commit."""
    try:
        archive = git("archive", "--format=tar", commit, *CODE)
    except (OSError, subprocess.CalledProcessError):
        return False
    with tarfile.open(fileobj=io.BytesIO(archive)) as tree:
        tree.extractall(folder, filter="data")
    return True


def this_commit() -> str:
    """Empty where there is no git, or where its code is not what runs."""
    try:
        return "" if git("status", "--porcelain", "--", *CODE) else git("rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


def histograms(server: Running) -> dict[str, Buckets]:
    """Cumulated counts by bound, of all series of a name together."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found: dict[str, Buckets] = {name: {} for name in GATES_MS}
    for line in text.splitlines():
        name, _, rest = line.partition("_bucket{")
        if name in found:
            bound = float(rest.split('le="')[1].split('"')[0])
            found[name][bound] = found[name].get(bound, 0.0) + float(rest.rsplit(" ", 1)[1])
    return found


def instructions(loops: int) -> dict[str, float]:
    """Instructions per call over the bare echo's, of the path with keys and limits in process.

    Stores and the log's writer work by the clock, which valgrind slows down: they are in the CPU time."""
    with bench() as own:
        asked = askings(own.credentials[:INSTRUCTION_CREDENTIALS], loops)["single"]
        off = {**OFF, "DATABASE_URL": own.database, "TOOL_MODULES": "load.tools"}
        path = {**off, "AUTH_MODE": "required", "LIMITS_FILE": str(own.limits_file)}
        wanted: list[tuple[str, dict[str, str] | None, Asking]] = [("bare", None, Asking()), ("path", path, asked)]
        with counted(own, wanted) as found:
            return relative(found)


def relative(found: dict[str, Counted]) -> dict[str, float]:
    counts = {name: one.per_call(BURSTS) for name, one in found.items()}
    shown = ", ".join(f"{name} {count:,.0f}" for name, count in counts.items())
    print(f"instructions per call: {shown}", flush=True)
    return {f"{name}, instructions": count / counts["bare"] for name, count in counts.items() if name != "bare"}


# The verdict


def judged(measured: Measured, baseline: dict[str, Any], limit: float) -> bool:
    """Print the table; whether nothing is past its limit."""
    before = baseline.get("ratios", {}) if measured.before is None else measured.before
    lines = [Line(name, before.get(name), now) for name, now in measured.ratios.items()]
    known = baseline.get("instructions", {}).get(python_version(), {})
    lines += [Line(name, known.get(name), now) for name, now in measured.instructions.items()]
    title = f"cost of a call over a bare echo's, limit {limit:.0%}"
    print(f"{title:44}{'baseline':>10}{'now':>10}{'change':>10}")
    for line in lines:
        print(line.text(limit))
    for name, at_most in GATES_MS.items():
        now = measured.gates_ms[name]
        print(f"{name + ' p95, ms':44}{at_most:10.0f}{now:10.3f}{'':10}   {'ok' if now < at_most else 'WORSE'}")
    bad = [line.name for line in lines if line.change > limit]
    bad += [name for name, at_most in GATES_MS.items() if measured.gates_ms[name] >= at_most]
    print(f"past the limit: {', '.join(bad)}\n" if bad else "nothing is past its limit\n", flush=True)
    return not bad


def python_version() -> str:
    """Instructions differ from one to the next; ratios of CPU time hardly."""
    return ".".join(platform.python_version_tuple()[:2])


def planted_loops(percent: float) -> int:
    """Turns of an empty loop that make a call that much dearer, found by asking one server both ways in turn."""
    with bench() as own:
        server = own.service("everything, lane", own.everything(TOOL_MODULES="load.tools"))
        clean = Target("clean", server, askings(own.credentials, 0)["single"])
        slowed = Target("slowed", server, askings(own.credentials, CALIBRATION_LOOPS)["single"])
        measure([clean, slowed], CALIBRATION_ROUNDS, 1.0)
    added = 1 / slowed.cpu_ratio(clean) - 1
    if added <= 0:
        raise CannotRun("the machine is too busy to plant a slowdown of known size")
    loops = round(CALIBRATION_LOOPS * percent / 100 / added)
    print(f"planted: {loops} turns of a loop; {CALIBRATION_LOOPS} made a call {added:.0%} dearer\n", flush=True)
    return loops


def one_run(options: argparse.Namespace, baseline: dict[str, Any], loops: int) -> Measured:
    print(heading("against the baseline"))
    with bench() as own:
        limit = options.fail_on_regression
        comparison = Comparison(own, baseline, limit, options.rounds, options.seconds, loops)
        ratios, before = comparison.costs()
        gates_ms = comparison.gates(3 * options.seconds)
    counts: dict[str, float] = {}
    if available() and not options.no_instructions:
        try:
            counts = instructions(loops)
        except (CannotRun, OSError, subprocess.SubprocessError) as error:
            print(f"instructions are not compared: {error}")
    return Measured(ratios, counts, gates_ms, before)


def updated(baseline: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """Instructions of other Python versions stay."""
    kept = baseline.get("instructions", {})
    counts = {**kept, **({python_version(): rounded(measured.instructions)} if measured.instructions else {})}
    return {"commit": this_commit(), "ratios": rounded(measured.ratios), "instructions": counts}


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def share(text: str) -> float:
    """`10%` or `0.1`."""
    value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    if not 0 < value < 10:
        raise argparse.ArgumentTypeError("must be a share such as 10% or 0.1")
    return value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fail-on-regression", type=share, default=LIMIT, metavar="SHARE", help="10%% when not given")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--rounds", type=int, default=7, help="for each of five targets")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one round")
    parser.add_argument("--runs", type=int, default=1, help="as many times, each with servers of its own")
    parser.add_argument("--plant", type=float, default=0.0, metavar="PERCENT", help="make each call that much dearer")
    parser.add_argument("--no-instructions", action="store_true", help="CPU time alone, though valgrind is there")
    parser.add_argument("--update", action="store_true", help="write what is measured as the new baseline")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    baseline = orjson.loads(options.baseline.read_bytes()) if options.baseline.exists() else {}
    if not available():
        print("no valgrind: CPU time alone is compared (Debian: apt install valgrind)")
    loops = planted_loops(options.plant) if options.plant else 0
    against = {} if options.update else baseline
    bad = 0
    for _ in range(options.runs):
        measured = one_run(options, against, loops)
        bad += not judged(measured, against, options.fail_on_regression)
    if options.update:
        write_json(str(options.baseline), updated(baseline, measured))
    if options.runs > 1:
        print(f"{bad} of {options.runs} runs found a regression")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    command(main)
