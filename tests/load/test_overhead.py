"""The table and the picture of `make overhead`: from a real service, by PromQL's arithmetic, with nothing left out."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from app.telemetry.metrics import STAGES
from load.overhead import ORIGIN_P95_MS, SERVICE_OVERHEAD, quantile_s
from load.svg import Line, Panel, picture
from tests.conftest import ROOT, service_environ

SVG = "{http://www.w3.org/2000/svg}"


def test_the_table_has_every_stage_beside_what_the_origin_reports() -> None:
    assert set(ORIGIN_P95_MS) == {*STAGES, SERVICE_OVERHEAD}
    assert sum(ORIGIN_P95_MS[stage] for stage in STAGES) == pytest.approx(31.2)


def test_a_run_prints_every_stage_and_draws_itself(tmp_path: Path) -> None:
    plot = tmp_path / "new" / "overhead.svg"
    arguments = ["--steps", "50", "100", "--seconds", "1.5", "--plot", str(plot)]
    done = subprocess.run(
        [sys.executable, "-m", "load.overhead", *arguments],
        cwd=ROOT,
        env=service_environ(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+(?: overhead)?) +([\d.,]+) +([\d.,]+) +([\d,]+)$", done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == list(ORIGIN_P95_MS)
    for _, p50, p95, _ in rows:
        assert 0 < float(p50.replace(",", "")) <= float(p95.replace(",", ""))
    drawn = ElementTree.parse(plot).getroot()
    lines = drawn.findall(f"{SVG}polyline")
    assert len(lines) == 4
    assert {text.text for text in drawn.iter(f"{SVG}text")} >= {"calls/s", "p50", "p95", "p99", "seconds"}


@pytest.mark.parametrize(("q", "expected"), [(0.5, 0.08), (0.95, 0.1), (0.99, 0.22), (1.0, 0.25)])
def test_a_quantile_is_that_of_prometheus(q: float, expected: float) -> None:
    """The buckets and values of test_the_quantiles_are_series_of_the_bare_name, which Prometheus itself computes."""
    buckets = {0.05: 0.0, 0.08: 500.0, 0.1: 950.0, 0.25: 1000.0, math.inf: 1000.0}
    assert quantile_s(q, buckets) == pytest.approx(expected)


def test_a_quantile_of_nothing_is_none_and_past_the_last_bound_is_that_bound() -> None:
    assert quantile_s(0.95, {0.1: 0.0, math.inf: 0.0}) is None
    assert quantile_s(0.95, {0.1: 0.0, math.inf: 7.0}) == 0.1


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_picture_keeps_every_point_inside_its_panel(logarithmic: bool) -> None:
    lines = [Line("a", [(0.0, 0.3), (5.0, 700.0)]), Line("b", [(1.0, 3.0), (9.7, 701.0)])]
    root = ElementTree.fromstring(picture("t", "s & <t>", "x", [Panel("up", lines, logarithmic)] * 2))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for line in root.findall(f"{SVG}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width and 0 <= y <= height
    names = [text for text in root.iter(f"{SVG}text") if text.text in ("a", "b")]
    heights = sorted(float(text.attrib["y"]) for text in names[:2])
    assert heights[1] - heights[0] >= 14
