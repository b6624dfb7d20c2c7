"""A scrape shows every series once, in both formats, and leaves the loop to others while it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from app.telemetry.metrics import DURATION_BUCKETS_S, RUN_STATUSES, Metrics
from app.telemetry.scraping import TOOLS_A_STEP, Scraper
from tests.conftest import Serve

pytestmark = pytest.mark.anyio

Parse = Callable[[str], Iterable[Any]]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def with_tools(ran: int, idle: int = 0) -> Metrics:
    metrics = Metrics()
    for number in range(ran + idle):
        series = metrics.for_tool(f"tool-{number}")
        if number < ran:
            series.executions["success"] = number + 1
            series.executions["timeout"] = 1
            series.duration.observe(0.002)
            series.duration.observe(99.0)
    return metrics


@pytest.mark.parametrize(
    ("accept", "parse"),
    [("", parser.text_string_to_metric_families), (OPENMETRICS, openmetrics_parser.text_string_to_metric_families)],
    ids=["text", "OpenMetrics"],
)
async def test_both_formats_show_the_runs_of_each_tool(accept: str, parse: Parse) -> None:
    text, content_type = await Scraper(with_tools(2)).scrape(accept)
    assert content_type.startswith(accept.split(";")[0] or "text/plain")
    families = {family.name: family for family in parse(text.decode())}
    runs = {(s.labels["tool_id"], s.labels["status"]): s.value for s in families["tool_executions"].samples}
    assert set(runs) == {(f"tool-{n}", status) for n in range(2) for status in RUN_STATUSES}
    assert (runs["tool-1", "success"], runs["tool-1", "timeout"], runs["tool-1", "failed"]) == (2, 1, 0)
    durations = [s for s in families["tool_execution_duration_seconds"].samples if s.labels["tool_id"] == "tool-0"]
    buckets = {s.labels["le"]: s.value for s in durations if s.name.endswith("_bucket")}
    assert [float(bound) for bound in buckets] == [*DURATION_BUCKETS_S, float("inf")]
    assert (buckets["0.001"], buckets["0.005"], buckets["60.0"], buckets["+Inf"]) == (0, 1, 1, 2)
    assert [s.value for s in durations if not s.name.endswith("_bucket")] == [2, pytest.approx(99.002)]
    assert "framework_overhead_seconds" in families and "registered_tools" in families


@pytest.mark.parametrize("weight", ["q=0", "Q=0.000 ; x=y"])
async def test_a_format_that_is_refused_is_not_sent(weight: str) -> None:
    _, content_type = await Scraper(with_tools(1)).scrape(f"{OPENMETRICS}; {weight}, text/plain")
    assert content_type.startswith("text/plain")
    _, content_type = await Scraper(with_tools(1)).scrape(f"text/plain; {weight}, {OPENMETRICS}; q=0.01")
    assert content_type.startswith("application/openmetrics-text")


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
async def test_a_version_that_is_no_number_is_answered_with_text(kind: str) -> None:
    _, content_type = await Scraper(with_tools(1)).scrape(f"{kind}; version=abc")
    assert content_type.startswith("text/plain")


async def test_a_tool_that_never_ran_has_its_counts_at_0_and_no_duration() -> None:
    text, _ = await Scraper(with_tools(ran=1, idle=5)).scrape("")
    for status in RUN_STATUSES:
        assert f'tool_executions_total{{status="{status}",tool_id="tool-1"}} 0\n'.encode() in text
    assert (
        b'duration_seconds_count{tool_id="tool-0"}' in text and b'duration_seconds_count{tool_id="tool-1"}' not in text
    )


async def test_the_loop_turns_while_many_tools_are_written() -> None:
    scraper, turns = Scraper(with_tools(TOOLS_A_STEP * 10)), 0
    scrape = asyncio.create_task(scraper.scrape(""))
    while not scrape.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns >= 10


async def test_scrapes_at_the_same_time_share_one_text_and_a_later_one_is_new() -> None:
    scraper = Scraper(with_tools(TOOLS_A_STEP * 2))
    (first, _), (second, _) = await asyncio.gather(scraper.scrape(""), scraper.scrape(""))
    assert first is second
    assert (await scraper.scrape(""))[0] is not first


async def test_a_scraper_that_goes_away_does_not_take_the_text_from_the_others() -> None:
    scraper = Scraper(with_tools(TOOLS_A_STEP * 4))
    gone, stays = (asyncio.create_task(scraper.scrape("")) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stays)[0].count(b"_sum{tool_id=") == TOOLS_A_STEP * 4
    assert gone.cancelled()


def test_a_service_counts_every_tool_from_0_and_shows_durations_from_the_first_run_on(serve: Serve) -> None:
    running = serve()
    before = running.http.get("/metrics").text
    assert 'tool_executions_total{status="success",tool_id="echo"} 0\n' in before
    assert "tool_execution_duration_seconds_count{" not in before
    running.execute("echo", {"message": "x"})
    assert running.metric("tool_executions_total", tool_id="echo", status="success") == 1
    assert running.metric("tool_execution_duration_seconds_count", tool_id="echo") == 1
    om = running.http.get("/metrics", headers={"Accept": OPENMETRICS})
    assert om.headers["content-type"].startswith("application/openmetrics-text") and om.text.endswith("# EOF\n")
