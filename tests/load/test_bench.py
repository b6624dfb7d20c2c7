"""The benchmark suite: each part runs, in a tiny form, prints its table and ends what it started; and how it judges."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from load import compare, growth, headline, wire
from load.bench import PARTS
from load.client import FAILED, REFUSED, RIGHT, Outcome, arrivals
from load.compare import GATES_MS, Line, Measured, judged, share
from load.growth import Family
from load.harness import Asking, Round, Running, Target, quantile
from tests.conftest import ROOT, service_environ
from tests.servers import wait_until

RUN_S_MAX = 300.0
"""Bounds a hang; a part takes some seconds in this form."""


def run(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=service_environ(),
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
    )
    assert done.returncode in codes, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rows(table: str, columns: int) -> dict[str, list[float]]:
    """Lines that end in so many numbers, by what stands before them."""
    found = {}
    for line in table.splitlines():
        cells = re.findall(r"(?<=\s)-?[\d,]+(?:\.\d+)?(?=\s|$)", line)
        if len(cells) >= columns:
            found[re.split(r"\s{2,}", line.strip())[0]] = [float(cell.replace(",", "")) for cell in cells[-columns:]]
    return found


# Each part in a tiny form


def test_wire_shows_lane_and_asgi_beside_a_bare_echo_without_an_error(tmp_path: Path) -> None:
    file = tmp_path / "wire.json"
    table = run("load.wire", "--only", "payloads", "--rounds", "1", "--seconds", "0.2", "--json", str(file))
    shown = rows(table, 8)
    assert list(shown) == ["bare uvicorn echo", "everything, lane", "everything, ASGI"]
    assert all(row[-1] == 0 for row in shown.values()), "errors"
    written = orjson.loads(file.read_bytes())["wire"]
    assert [len(targets) for targets in written.values()] == [3] * len(wire.PAYLOADS)


def test_headline_stands_beside_the_origin_and_its_design() -> None:
    table = run("load.headline", "--users", "10", "--rate", "40", "--seconds", "0.5")
    shown = rows(table, 6)
    assert list(shown) == [
        headline.ORIGIN[0],
        "bare uvicorn echo",
        "everything, lane",
        "everything, ASGI",
        "the origin's design",
    ]
    assert all(row[-2] == 0 for name, row in shown.items() if name != headline.ORIGIN[0]), "failed calls"


def test_capacity_shows_the_mix_slow_tools_and_overload() -> None:
    table = run("load.capacity", "--users", "20", "--slow-calls", "10", "--seconds", "0.6")
    mixed = rows(table, 5)
    assert [mixed[name][1] for name in ("echo", "calculator", "web_scrape", "all")] == [100.0] * 4
    assert re.search(r"^(\d+) of \1 calls right", table, re.MULTILINE)
    assert {"2 x", "5 x", "10 x"} <= {line.strip()[:4].strip() for line in table.splitlines()}


def test_profiles_stand_beside_the_default() -> None:
    shown = rows(run("load.profiles", "--seconds", "0.5", "--calls", "20", "--large-calls", "5"), 8)
    assert list(shown) == ["default", "high-throughput", "low-latency", "constrained"]
    assert all(row[0] > 0 and row[1] == 0 for row in shown.values()), "calls at once"


def test_growth_draws_a_plot_for_each_line(tmp_path: Path) -> None:
    few = ["--tools", "2", "20", "--tenants", "1", "3", "--rows", "0", "100"]
    table = run("load.growth", *few, "--rounds", "1", "--seconds", "0.2", "--plots", str(tmp_path))
    assert {"2 tools", "20 tools", "1 tenants", "3 tenants", "0 rows", "100 rows"} <= set(rows(table, 6))
    assert all(row[-1] == 0 for row in rows(table, 6).values()), "errors"
    assert {path.name for path in tmp_path.iterdir()} == {"growth-tools.svg", "growth-tenants.svg", "growth-log.svg"}
    assert all("<polyline" in path.read_text() for path in tmp_path.iterdir())


def test_micro_times_parts_in_process() -> None:
    assert "bench_decode_a_call" in run("load.micro", "-k", "codec", "--benchmark-max-time=0.01")


@pytest.mark.skipif(not (ROOT / ".venv" / "peers" / ".ready").exists(), reason="`python -m load.peers` installs them")
def test_peers_give_right_answers_beside_the_service() -> None:
    shown = rows(run("load.peers", "--rounds", "1", "--seconds", "0.3"), 8)
    assert {"everything, lane", "fastmcp", "mcp SDK", "fastapi-jsonrpc", "the origin's design"} <= set(shown)


def test_the_gate_writes_a_baseline_and_holds_a_run_against_it(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    tiny = ["--no-instructions", "--rounds", "1", "--seconds", "0.3", "--baseline", str(file)]
    run(
        "load.compare", *tiny, "--update", codes=(0, 1)
    )  # 1 where the machine is too slow for the origin's milliseconds
    written = orjson.loads(file.read_bytes())
    assert set(written["ratios"]) == set(orjson.loads(compare.BASELINE.read_bytes())["ratios"])
    assert written.pop("commit") == compare.this_commit()
    written["ratios"] = {name: value / 100 for name, value in written["ratios"].items()}
    file.write_bytes(orjson.dumps(written))
    table = run("load.compare", *tiny, "--fail-on-regression", "300%", codes=(1,))
    worse = {re.split(r"\s{2,}", line)[0] for line in table.splitlines() if line.endswith("WORSE")}
    assert worse >= set(written["ratios"]), "and the origin's milliseconds, where the machine is slow"


def test_the_gate_holds_a_run_against_the_baselines_code_beside_it(tmp_path: Path) -> None:
    commit = compare.this_commit()
    if not commit:
        pytest.skip("NOT TESTED: no git here, or its code is not what runs")
    file = tmp_path / "baseline.json"
    file.write_bytes(orjson.dumps({"commit": commit, "ratios": {"everything, lane": 1e-6}}))
    tiny = ["--no-instructions", "--rounds", "1", "--seconds", "0.3", "--baseline", str(file)]
    table = run("load.compare", *tiny, "--fail-on-regression", "300%", codes=(0, 1))
    assert f"baseline: the code of {commit:.10}" in table
    assert not [line for line in table.splitlines() if line.startswith("everything") and line.endswith("WORSE")]


def test_ctrl_c_ends_every_server_that_a_part_started() -> None:
    command = [sys.executable, "-u", "-m", "load.wire", "--only", "payloads", "--rounds", "50"]
    mine: list[psutil.Process] = []
    with subprocess.Popen(command, cwd=ROOT, env=service_environ(), stdout=subprocess.DEVNULL) as part:
        try:
            wait_until(lambda: under_load(part), "load on a server")
            mine = psutil.Process(part.pid).children(recursive=True)
            part.send_signal(signal.SIGINT)
            assert part.wait(RUN_S_MAX) == 130
        finally:
            part.kill()
    _, alive = psutil.wait_procs(mine, timeout=30)
    assert not alive


def under_load(part: subprocess.Popen[bytes]) -> bool:
    assert part.poll() is None, "it ended by itself"
    for one in psutil.Process(part.pid).children(recursive=True):
        try:
            if one.name() == "wrk" or "load.client" in one.cmdline():
                return True
        except psutil.NoSuchProcess:
            continue
    return False


# How it judges


def measured(**ratios: float) -> Measured:
    return Measured(ratios, {}, dict.fromkeys(GATES_MS, 1.0))


@pytest.mark.parametrize(("now", "good"), [(3.29, True), (3.31, False), (1.0, True)])
def test_a_cost_may_pass_its_baseline_by_the_limit_and_no_more(now: float, good: bool) -> None:
    assert judged(measured(lane=now), {"ratios": {"lane": 3.0}}, 0.10) is good


def test_a_new_figure_is_no_regression_and_a_gate_of_the_origin_is_one() -> None:
    assert judged(measured(lane=3.0), {}, 0.10)
    slow = measured(lane=3.0)._replace(gates_ms={**dict.fromkeys(GATES_MS, 1.0), "framework_overhead_seconds": 50.0})
    assert not judged(slow, {}, 0.10)


def test_instructions_are_held_against_those_of_the_same_python() -> None:
    now = measured()._replace(instructions={"path, instructions": 2.0})
    known = {compare.python_version(): {"path, instructions": 1.7}, "2.7": {"path, instructions": 9.0}}
    assert not judged(now, {"instructions": known}, 0.10)
    assert judged(now, {"instructions": {"2.7": {"path, instructions": 1.0}}}, 0.10)


def test_a_share_is_read_as_percent_or_as_a_number() -> None:
    assert share("10%") == share("0.1") == 0.1
    for wrong in ("0", "-5%", "x"):
        with pytest.raises((ValueError, compare.argparse.ArgumentTypeError)):
            share(wrong)


def test_the_gate_runs_as_a_file_too() -> None:
    done = subprocess.run([ROOT / "load" / "compare.py", "--help"], capture_output=True, text=True, timeout=RUN_S_MAX)
    assert "--fail-on-regression" in done.stdout


def test_the_baseline_has_what_a_run_measures() -> None:
    written: dict[str, Any] = orjson.loads(compare.BASELINE.read_bytes())
    assert set(written["ratios"]) == {
        "everything, lane",
        "everything, ASGI",
        "batch of 20, lane",
        "MCP tools/call, lane",
    }
    assert all(value > 0 for value in written["ratios"].values())
    assert Line("x", 2.0, 2.3).change == pytest.approx(0.15)


def test_ratios_are_medians_of_the_rounds_own_ratios() -> None:
    """A round in which the machine was half as fast says as much as any other."""
    yardstick, one = (Target(name, Running(name, 0, 0)) for name in ("bare", "one"))
    for slowness in (1.0, 2.0, 1.0):
        yardstick.rounds.append(Round(1000 / slowness, 20 * slowness, 1.0, 2.0, 30.0, 0))
        one.rounds.append(Round(500 / slowness, 50 * slowness, 1.0, 2.0, 30.0, 0))
    assert one.rate_ratio(yardstick) == pytest.approx(0.5)
    assert one.cpu_ratio(yardstick) == pytest.approx(0.4)


def test_a_batch_counts_by_its_calls() -> None:
    one = Target("batch", Running("s", 0, 0), Asking(calls=20), rounds=[Round(100, 400, 1.0, 2.0, 30.0, 0)])
    assert (one.calls_per_s, one.cpu_us_per_call) == (2000, 20)


def test_growth_is_the_last_point_over_the_first() -> None:
    points = []
    for count, cpu_us in ((10, 50.0), (100, 70.0), (1000, 55.0)):
        rounds = [Round(1, cpu_us, 1.0, 1.0, 1.0, 0)]
        points.append((count, Target(str(count), Running("s", 0, 0), rounds=rounds)))
    grown = Family("x", "x", points).growth()
    assert grown == pytest.approx(1.1)
    assert grown <= growth.FLAT + 1e-9


def test_arrivals_have_the_rates_of_their_phases_and_do_not_wait_for_anybody() -> None:
    due = list(arrivals([(1000.0, 2.0), (100.0, 2.0)], began=5.0, seed=1))
    first = [at for at in due if at < 7.0]
    assert due == sorted(due) and due[0] >= 5.0 and due[-1] < 9.0
    assert len(first) == pytest.approx(2000, rel=0.1)
    assert len(due) - len(first) == pytest.approx(200, rel=0.3)


def test_only_right_answers_count_among_latencies() -> None:
    outcome = Outcome(1.0, [0, 1, 2], [1000, 9000, 2000], [RIGHT, FAILED, REFUSED], [0, 0, 0], 5, 0.1, "")
    row = headline.summary(Running("self", psutil.Process().pid, 0), outcome, 0.5)
    assert (row.p50_ms, row.max_ms, row.failed, row.cpu_percent) == (1.0, 1.0, 2, 50.0)


def test_a_quantile_of_nothing_is_zero() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([1.0, 2.0, 3.0], 0.99) == 3.0


def test_every_part_is_a_module_that_runs() -> None:
    assert set(PARTS) == {"wire", "headline", "capacity", "profiles", "micro", "growth", "peers", "compare"}
    refused = subprocess.run(
        [sys.executable, "-m", "load.bench", "wires"], cwd=ROOT, capture_output=True, text=True, timeout=RUN_S_MAX
    )
    assert refused.returncode == 2
    assert "no part wires; there are wire" in refused.stderr


def test_resilience_shows_overload_and_a_dead_upstream() -> None:
    table = run("load.resilience", "--seconds", "0.5", "--few")
    assert re.search(r"^breaker open after ([0-9]|1[0-9]) calls", table, re.MULTILINE)
    assert {"2 x"} <= {line.strip()[:3] for line in table.splitlines()}
