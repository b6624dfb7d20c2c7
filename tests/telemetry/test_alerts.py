"""Each alert by promtool: fires after its time, silent at its threshold and without traffic, whatever restarts.

The forecast too. Live servers are in test_monitoring.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.prometheus import RULE_FILES, needs_prometheus, promtool

MINUTES = 60
"""Of each scenario: twice the longest `for`, and more."""

LABELS = 'namespace="n",job="agentcore-tools",instance="a:8001"'

Series = dict[str, str]


@dataclass(frozen=True)
class Alert:
    """One rule of alerts.yaml: samples, one a minute, by which it must fire and by which it must not."""

    name: str
    severity: str
    for_minutes: int
    over: Series
    at: Series
    idle: Series
    lead_minutes: int = 0
    """Until the expression can hold at all: a rate needs two samples."""
    after_resets: Series = field(default_factory=dict)
    at_after_resets: Series = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.severity}"


def always(value: float) -> str:
    return f"{value}+0x{MINUTES}"


def gauge(
    name: str,
    severity: str,
    for_minutes: int,
    metric: str,
    over: float,
    at: float,
    idle: float,
    more: Series | None = None,
) -> Alert:
    """Gauges know no traffic and no resets; a restart is a series that ends and comes back at its idle value."""
    series = f"{metric}{{{LABELS}}}"

    def with_more(values: str) -> Series:
        return {series: values, **(more or {})}

    restarts = " ".join(f"{at}+0x3 stale {idle}+0x2" for _ in range(MINUTES // 8))
    late = f"{idle}+0x3 stale {always(over)}"
    return Alert(
        name, severity, for_minutes, with_more(always(over)), with_more(always(at)), with_more(always(idle)),
        after_resets={**with_more(late)}, at_after_resets=with_more(restarts),
    )  # fmt: skip


def counters(name: str, severity: str, for_minutes: int, over: dict[str, float], at: dict[str, float]) -> Alert:
    """By how much each series grows in a minute."""

    def steady(growth: dict[str, float]) -> Series:
        return {series: f"0+{by}x{MINUTES}" for series, by in growth.items()}

    def reset(growth: dict[str, float]) -> Series:
        return {series: " ".join(f"0+{by}x6" for _ in range(MINUTES // 7)) for series, by in growth.items()}

    return Alert(
        name, severity, for_minutes, steady(over), steady(at), steady(dict.fromkeys(over, 0)),
        lead_minutes=1, after_resets=reset(over), at_after_resets=reset(at),
    )  # fmt: skip


def overhead(under_80_ms: float, under_100_ms: float) -> dict[str, float]:
    """Of 1,000 calls a minute, how many fall below the two bounds that the alerts look at."""
    counts = {"0.05": 0.0, "0.08": under_80_ms, "0.1": under_100_ms, "0.25": 1000.0, "+Inf": 1000.0}
    return {f'framework_overhead_seconds_bucket{{{LABELS},le="{le}"}}': by for le, by in counts.items()}


def runs(success: float, failed: float, cancelled: float = 0) -> dict[str, float]:
    of = {"success": success, "failed": failed, "cancelled": cancelled, "timeout": 0}
    return {f'tool_executions_total{{{LABELS},tool_id="echo",status="{status}"}}': by for status, by in of.items()}


def refusals(error_type: str, by: float) -> dict[str, float]:
    types = dict.fromkeys(("rate_limit", "quota", "overloaded", "dependency_unavailable", "internal"), 0.0)
    types[error_type] = by
    return {f'tool_errors_total{{{LABELS},error_type="{name}"}}': count for name, count in types.items()}


def rows(outcome: str) -> str:
    return f'execution_log_rows_total{{{LABELS},outcome="{outcome}"}}'


EXECUTION_LIMIT = {f"tool_execution_limit{{{LABELS}}}": always(500)}
JOURNAL_LIMIT = {f"execution_log_journal_limit_bytes{{{LABELS}}}": always(1000)}
POOL = 'database_connection_pool_size{%s,state="%s"}'


def pool(in_use: int) -> Series:
    return {
        POOL % (LABELS, "in_use"): always(in_use),
        POOL % (LABELS, "idle"): always(0),
        POOL % (LABELS, "unopened"): always(20 - in_use),
    }


def events(name: str, severity: str, series: str) -> Alert:
    """A counter of which every step is told, for no time at all."""
    return Alert(
        name, severity, 0, {series: f"0+1x{MINUTES}"}, {series: always(7)}, {series: always(0)}, lead_minutes=1,
        after_resets={series: "5 0 " + f"1+1x{MINUTES}"}, at_after_resets={series: "9 9 9 " + always(0)},
    )  # fmt: skip


UP = f"up{{{LABELS}}}"
CONCURRENCY = f"tool_execution_concurrency{{{LABELS}}}"
STARTED = f"process_start_time_seconds{{{LABELS}}}"
RESTARTS = " ".join(f"{at} stale" for at in range(100, 140))

ALERTS = [
    counters("FrameworkOverheadHigh", "critical", 5, overhead(0, 949), overhead(0, 950)),
    counters("FrameworkOverheadHigh", "warning", 10, overhead(949, 1000), overhead(950, 1000)),
    counters("ToolSuccessRateLow", "critical", 10, runs(949, 51, 500), runs(950, 50, 500)),
    counters("ToolSuccessRateLow", "warning", 15, runs(969, 31), runs(970, 30)),
    counters("CallsUnserved", "critical", 5, runs(989, 0) | refusals("overloaded", 11),
             runs(990, 0) | refusals("dependency_unavailable", 10)),
    counters("LimitRefusalSurge", "warning", 10, runs(799, 0) | refusals("rate_limit", 201),
             runs(800, 0) | refusals("quota", 200)),
    gauge("ConcurrencyHigh", "warning", 10, "tool_execution_concurrency", 401, 400, 0, EXECUTION_LIMIT),
    gauge("AbandonedRuns", "warning", 10, "tool_abandoned_runs_active", 1, 0, 0),
    gauge("ToolBreakerOpen", "warning", 5, "tool_breaker_state", 1, 0, 0),
    gauge("CpuHigh", "critical", 5, "system_cpu_percent", 90.1, 90, 1),
    gauge("CpuHigh", "warning", 10, "system_cpu_percent", 80.1, 80, 1),
    gauge("MemoryHigh", "critical", 5, "system_memory_percent", 90.1, 90, 5),
    gauge("EventLoopLag", "warning", 5, "event_loop_lag_seconds", 0.251, 0.25, 0),
    Alert("ReplicaRestarting", "warning", 0, {STARTED: "100 200 300 400+0x60"}, {STARTED: "100 200 300+0x60"},
          {STARTED: always(100)}, lead_minutes=3, after_resets={STARTED: RESTARTS},
          at_after_resets={STARTED: "100 stale 200 stale 300+0x60"}),
    events("LogLinesDropped", "warning", f"log_lines_dropped_total{{{LABELS}}}"),
    events("SpansLost", "warning", f'trace_spans_total{{{LABELS},outcome="dropped"}}'),
    gauge("LimitStoreAway", "critical", 2, "limit_store_up", 0, 1, 1),
    gauge("ExecutionLogLag", "warning", 5, "execution_log_lag_seconds", 60.1, 60, 0),
    gauge("JournalFilling", "critical", 1, "execution_log_journal_bytes", 801, 800, 0, JOURNAL_LIMIT),
    gauge("JournalFilling", "warning", 5, "execution_log_journal_bytes", 501, 500, 0, JOURNAL_LIMIT),
    events("ExecutionLogRowsDropped", "critical", rows("dropped")),
    events("ExecutionLogRowsDead", "warning", rows("dead")),
    Alert("DatabasePoolExhausted", "warning", 5, pool(8), pool(7), pool(0),
          after_resets=pool(8), at_after_resets=pool(7)),
    Alert("MetricsAbsent", "critical", 5, {UP: always(0)}, {CONCURRENCY: always(0)}, {CONCURRENCY: always(0)},
          after_resets={CONCURRENCY: "7 stale"}, at_after_resets={CONCURRENCY: " ".join(["7+0x3 stale"] * 12)}),
    gauge("ReplicaDown", "warning", 5, "up", 0, 1, 1),
    Alert("AutoscalerMetricStale", "warning", 2, {UP: always(1)},
          {UP: always(1), CONCURRENCY: always(0)}, {UP: always(1), CONCURRENCY: always(0)},
          after_resets={UP: always(1), CONCURRENCY: "7 stale"},
          at_after_resets={UP: always(1), CONCURRENCY: " ".join(["7+0x3 stale"] * 12)}),
]  # fmt: skip


def firing(alert: Alert, minute: int, expected: int) -> dict[str, Any]:
    chosen = f'alertname="{alert.name}",severity="{alert.severity}",alertstate="firing"'
    return {
        "expr": f"count(ALERTS{{{chosen}}}) or vector(0)",
        "eval_time": f"{minute}m",
        "exp_samples": [{"labels": "{}", "value": expected}],
    }


def scenario(name: str, series: Series, tests: list[dict[str, Any]]) -> dict[str, Any]:
    given = [{"series": one, "values": values} for one, values in series.items()]
    return {"name": name, "interval": "1m", "input_series": given, "promql_expr_test": tests}


def rules() -> list[tuple[str, dict[str, Any]]]:
    documents = [yaml.safe_load(path.read_text()) for path in RULE_FILES]
    return [(group["name"], rule) for document in documents for group in document["groups"] for rule in group["rules"]]


def scenarios(alert: Alert) -> list[dict[str, Any]]:
    fires_at = alert.lead_minutes + alert.for_minutes
    not_yet = [firing(alert, fires_at - 1, 0)] if fires_at else []
    never = [firing(alert, minute, 0) for minute in range(MINUTES // 2)]
    return [
        scenario("fires after its time", alert.over, [*not_yet, firing(alert, fires_at, 1)]),
        scenario("silent at its threshold", alert.at, never),
        scenario("silent without traffic", alert.idle, never),
        scenario("fires in spite of resets", alert.after_resets, [firing(alert, MINUTES // 2, 1)]),
        scenario("resets do not make it fire", alert.at_after_resets, never),
    ]


def test_the_rule_files_are_valid() -> None:
    needs_prometheus()
    checked = promtool("check", "rules", *RULE_FILES)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_has_its_scenarios_and_its_time() -> None:
    found = {
        (rule["alert"], rule["labels"]["severity"], rule.get("for", "0m")) for _, rule in rules() if "alert" in rule
    }
    assert {(alert.name, alert.severity, f"{alert.for_minutes}m") for alert in ALERTS} == found
    assert len(found) == len(ALERTS)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.id)
def test_an_alert_fires_when_it_must_and_only_then(alert: Alert, tmp_path: Path) -> None:
    needs_prometheus()
    run_promtool(scenarios(alert), tmp_path)


def run_promtool(tests: list[dict[str, Any]], folder: Path) -> None:
    """Every test of the document holds."""
    order = list(dict.fromkeys(group for group, _ in rules()))
    files = [str(path) for path in RULE_FILES]
    document = {"rule_files": files, "evaluation_interval": "1m", "group_eval_order": order, "tests": tests}
    path = folder / "tests.yaml"
    path.write_text(yaml.safe_dump(document))
    tested = promtool("test", "rules", path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


FORECAST = "job:tool_execution_concurrency"


def at_minute(minute: int, expr: str, value: float) -> dict[str, Any]:
    samples = [{"labels": "{}", "value": value}]
    return {"expr": f"round(sum({expr}), 0.001)", "eval_time": f"{minute}m", "exp_samples": samples}


def test_the_forecast_draws_the_trend_on_and_knows_its_error(tmp_path: Path) -> None:
    needs_prometheus()
    other = CONCURRENCY.replace("a:8001", "b:8001")
    rises = [
        at_minute(30, f"{FORECAST}:forecast5m", 350),
        at_minute(30, f"{FORECAST}:wanted", 350),
        at_minute(30, f"{FORECAST}:forecast5m_error", 0),
        at_minute(59, f"{FORECAST}:forecast5m_error_ratio1h < bool 0.02", 1),
    ]
    falls = [at_minute(30, f"{FORECAST}:forecast5m", 250), at_minute(30, f"{FORECAST}:wanted", 300)]
    turns = [
        at_minute(35, f"{FORECAST}:forecast5m_error", -50),
        at_minute(59, f"{FORECAST}:forecast5m_error_ratio1h > bool 0.05", 1),
    ]
    starts = [at_minute(1, f"{FORECAST}:forecast5m", 200), at_minute(0, f"{FORECAST}:wanted", 0)]
    ends = [at_minute(19, f"{FORECAST}:forecast5m", 0), at_minute(19, f"{FORECAST}:wanted", 10)]
    run_promtool(
        [
            scenario("rises on two replicas", {CONCURRENCY: "0+6x60", other: "0+4x60"}, rises),
            scenario("falls", {CONCURRENCY: "600-10x60"}, falls),
            scenario("turns where nobody could know", {CONCURRENCY: "0+10x30 300+0x30"}, turns),
            scenario("has two samples", {CONCURRENCY: "0 100"}, starts),
            scenario("ends", {CONCURRENCY: "200-10x20"}, ends),
        ],
        tmp_path,
    )


def test_the_quantiles_are_series_of_the_bare_name(tmp_path: Path) -> None:
    needs_prometheus()
    series = {series: f"0+{by}x{MINUTES}" for series, by in overhead(500, 950).items()}
    expected = [
        at_minute(10, 'framework_overhead_seconds{quantile="0.5"}', 0.08),
        at_minute(10, 'framework_overhead_seconds{quantile="0.95"}', 0.1),
        at_minute(10, 'framework_overhead_seconds{quantile="0.99"}', 0.22),
    ]
    run_promtool([scenario("quantiles", series, expected)], tmp_path)


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for _, rule in rules():
        if "alert" not in rule:
            continue
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        page = rule["annotations"]["runbook_url"]
        assert page == f"docs/operations/alerts/{rule['alert']}.md" and (ROOT / page).exists()


def test_each_runbook_page_is_of_an_alert() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "operations" / "alerts").glob("*.md")}
    assert pages == {rule["alert"] for _, rule in rules() if "alert" in rule}
