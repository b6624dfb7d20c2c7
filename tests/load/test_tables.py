"""The origin's tables with our figures: one short run of the real thing, and every table in what it writes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from load.tables import LEVELS, ORIGIN_CPU, ORIGIN_LATENCY_MS, ORIGIN_MEMORY, ORIGIN_NETWORK, ORIGIN_P95_MS
from load.watch import Look, Seen
from tests.conftest import ROOT, service_environ

TABLES_S_MAX = 180.0
"""Not a claim about speed: past it the test fails instead of hanging."""

SHORT = ["--seconds", "2", "--users", "20", "--capacity-users", "20", "--levels", "8", "--rows", "1000"]


def rows_of(text: str, title: str) -> list[list[str]]:
    lines = text.split(f"## {title}\n\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def test_a_short_run_fills_every_table_beside_the_origins_figures(tmp_path: Path) -> None:
    out = tmp_path / "tables.md"
    done = subprocess.run(
        [sys.executable, "-m", "load.tables", *SHORT, "--out", str(out)],
        cwd=ROOT,
        env=service_environ(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TABLES_S_MAX,
    )
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert text.strip() == done.stdout.strip()
    assert f"python -m load.tables {' '.join(SHORT)}" in text
    assert re.search(r"^20\d\d-\d\d-\d\d \d\d:\d\d UTC, \d+ cores of .+, Python 3\.", text, re.MULTILINE)
    latency = rows_of(text, "Latency of a call")
    assert [row[:2] for row in latency[1:]] == [[name, f"{ms:g} ms"] for name, ms in ORIGIN_LATENCY_MS.items()]
    stages = rows_of(text, "Overhead by stage")
    assert [row[:2] for row in stages[1:]] == [[name, f"{ms:g} ms"] for name, ms in ORIGIN_P95_MS.items()]
    registry = rows_of(text, "Registry")
    assert [row[1] for row in registry[1:]] == ["2.3 ms", "8.7 ms", "12.5 ms"]
    for row in [*latency[1:], *stages[1:], *registry[1:]]:
        assert all(re.fullmatch(r"[\d.,e-]+ ms", cell) for cell in row[1:]), row
    capacity = {row[0]: row[1:] for row in rows_of(text, "Capacity")[1:]}
    origin, most = capacity["calls under way at once, at most"]
    assert origin == "1,500+" and int(most) >= 8  # of the level; the mix of 20 users may have more where they are slow
    assert capacity["success"] == ["98.7 %", "100.00%"], text
    database = {row[0]: row[1:] for row in rows_of(text, "Database")[1:]}
    assert [origin for origin, _ in database.values()] == ["8.5 ms", "12.3 ms", "65 %", "98.5 %"]
    assert re.fullmatch(r"\d+\.\d\d%", database["connections reused"][1])
    idle, level = rows_of(text, "CPU, memory and network")[1:]
    assert idle[0] == "idle" and level[0] == level[7] == "8" and level[8] == "0.00%"
    assert re.fullmatch(r"[\d,]+ MB", level[4]) and level[6].endswith(" Mbit/s")


def test_every_level_of_the_origin_has_its_figures() -> None:
    assert ORIGIN_CPU.keys() == ORIGIN_MEMORY.keys() == {0, *LEVELS}
    assert ORIGIN_NETWORK.keys() == {*LEVELS} - {1500}  # it reports none there


@pytest.mark.parametrize(("level", "cpu"), [(100, 0.4), (500, 0.2)])
def test_a_level_is_measured_while_it_lasts_and_not_on_the_way_there(level: int, cpu: float) -> None:
    seen = Seen([Look(0.0, 90, 0, 0), Look(0.4, 120, 99, 0.05), Look(0.2, 110, 20, 0)])
    assert seen.steady(level).cpu_mean == pytest.approx(cpu)
    assert Seen([]).cpu_mean == Seen([]).rss_mb_max == 0
