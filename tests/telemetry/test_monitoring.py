"""What dashboards, rules and alerts name exists, and gives data: a real Prometheus asks a real service under load.

Rules run 60 times as fast as they are written. Each alert's own scenarios are in test_alerts.py.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import httpx
import orjson
import pytest
import yaml

from tests.conftest import ROOT, Running, end, start_service
from tests.documents import DOCS, table_rows
from tests.prometheus import MONITORING, RULE_FILES, Prometheus, hastened, needs_prometheus

DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
PAGE = DOCS / "operations" / "monitoring.md"

VARIABLES = {"$__rate_interval": "5m", "$__range": "15m", "$job": ".*agentcore-tools.*", "$tool": ".*"}
"""What Grafana would put in."""

DATA_S_MAX = 90.0
"""Until the last expression gives data; the longest `for` and window of the rules are a quarter of it."""


class Expression(NamedTuple):
    """PromQL and where it stands."""

    where: str
    text: str


def rule_documents() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in RULE_FILES]


def rules() -> list[dict[str, Any]]:
    return [rule for document in rule_documents() for group in document["groups"] for rule in group["rules"]]


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def of_rules() -> Iterator[Expression]:
    """Recording rules whole; of alerts what they compare, for while all is well an alert gives nothing."""
    for rule in rules():
        if "record" in rule:
            yield Expression(rule["record"], rule["expr"])
            continue
        for part in re.split(r"\bunless\b(?: on \(.*?\))?", rule["expr"]):
            text = part.strip()
            while (bare := re.sub(r"^\((.*)\)$|^absent\((.*)\)$", r"\1\2", text, flags=re.DOTALL)) != text:
                text = bare.strip()
            yield Expression(rule["alert"], re.sub(r"\s*(?:[<>]=?|==)\s*[\d.]+$", "", text))


def of_dashboards() -> Iterator[Expression]:
    for path in DASHBOARDS:
        for panel in panels(orjson.loads(path.read_bytes())):
            for target in panel["targets"]:
                yield Expression(f"{path.name}: {panel['title']}", with_variables(target["expr"]))


def of_pages() -> Iterator[Expression]:
    for page in sorted(DOCS.rglob("*.md")):
        for block in re.findall(r"```promql\n(.*?)```", page.read_text(), re.DOTALL):
            yield Expression(page.name, block.strip())


def with_variables(text: str) -> str:
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    return text


EXPRESSIONS = [*of_rules(), *of_dashboards(), *of_pages()]

WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "or", "and", "unless", "offset", "bool"}


def names_in(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    text = re.sub(r"\{.*?\}|\[.*?\]|\"[^\"]*\"", " ", expression)
    text = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", text)
    names = re.findall(r"(?<![\w:.])[a-zA-Z_][\w:]*(?!\s*\()(?![\w:])", text)
    return {name for name in names if name not in WORDS and not re.fullmatch(r"\d+[smhd]|[smhd]", name)}


def served_families(metrics: str) -> dict[str, str]:
    return dict(re.findall(r"# TYPE (\S+) (\w+)", metrics))


def series_of(families: dict[str, str]) -> set[str]:
    suffixes = {"histogram": ("_bucket", "_count", "_sum"), "summary": ("_count", "_sum")}
    return {name + suffix for name, kind in families.items() for suffix in suffixes.get(kind, ("",))}


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def used_names() -> set[str]:
    return {name for expression in EXPRESSIONS for name in names_in(expression.text)}


def test_the_names_in_an_expression_are_found() -> None:
    found = names_in(
        'sum by (a, job) (rate(x_total{b="c", d=~"e|f"}[5m])) / on (g) job:y:sum offset 5m > 2 * abs(z) or up'
    )
    assert found == {"x_total", "job:y:sum", "z", "up"}


def test_every_name_that_is_used_is_served_or_recorded(service: Running) -> None:
    known = series_of(served_families(service.http.get("/metrics").text)) | recorded() | {"up"}
    for expression in EXPRESSIONS:
        assert names_in(expression.text) <= known, expression
    assert len(EXPRESSIONS) > 100


def test_every_metric_is_used_or_it_is_said_why_not(service: Running) -> None:
    families = served_families(service.http.get("/metrics").text)
    used = used_names()
    unused = {name for name, kind in families.items() if not series_of({name: kind}) & used}
    explained = {row[0].strip("`") for row in table_rows(PAGE, "## Not shown")[1:]}
    assert unused == explained


def test_every_recorded_series_is_used_and_documented() -> None:
    page = PAGE.read_text()
    for name in recorded():
        assert name in used_names() and f"`{name}" in page, name


def test_every_alert_is_on_the_page_with_its_time() -> None:
    rows = {(row[0].split("]")[0].strip("["), row[1], row[3]) for row in table_rows(PAGE, "## Alerts")[1:]}
    alerts = [rule for rule in rules() if "alert" in rule]
    assert rows == {(rule["alert"], rule["labels"]["severity"], rule.get("for", "at once")) for rule in alerts}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_only_the_data_source_that_is_chosen(path: Any) -> None:
    dashboard = orjson.loads(path.read_bytes())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels(dashboard):
        assert panel["datasource"] == chosen and all(target["datasource"] == chosen for target in panel["targets"])
        assert panel["title"] and panel["targets"]
    for name in set(re.findall(r"\$(\w+)", path.read_text())) - {"__rate_interval", "__range", "__all"}:
        assert name in variables, name
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) and dashboard["uid"] == f"agentcore-tools-{path.stem}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows(path: Any) -> None:
    assert [panel["title"] for panel in panels(orjson.loads(path.read_bytes())) if not panel.get("description")] == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_the_panels_of_a_dashboard_do_not_overlap(path: Any) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in orjson.loads(path.read_bytes())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_bars_are_of_now_for_a_range_has_no_order_and_all_that_were_ever_on_top(path: Any) -> None:
    for panel in panels(orjson.loads(path.read_bytes())):
        sorts = any(re.search(r"\b(?:sort|topk|bottomk)", target["expr"]) for target in panel["targets"])
        if panel["type"] == "bargauge" or sorts:
            assert all(target["instant"] and not target["range"] for target in panel["targets"]), panel["title"]


# With servers


class Receiver:
    """Takes what Prometheus sends to an Alertmanager (API v2)."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        self.arrived = threading.Condition()
        receiver = self

        class Inbox(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200 if self.path == "/api/v2/alerts" else 404)
                self.end_headers()
                with receiver.arrived:
                    receiver.alerts += ({**alert, "heardAt": now()} for alert in orjson.loads(body))
                    receiver.arrived.notify_all()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Inbox)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, name="alert-receiver", daemon=True).start()

    def wait_for(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first that holds, of those that came and will come."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: any(map(holds, self.alerts)), DATA_S_MAX), self.alerts[-3:]
            return next(filter(holds, self.alerts))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Load:
    """Callers that keep a service busy in every way that the dashboards show."""

    service: Running
    callers: int
    ends: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    failed: list[BaseException] = field(default_factory=list)

    def start(self) -> None:
        for number in range(self.callers):
            self.threads.append(threading.Thread(target=self._call, name=f"caller-{number}"))
            self.threads[-1].start()

    def stop(self) -> None:
        self.ends.set()
        for thread in self.threads:
            thread.join(timeout=60)
        assert not self.failed, self.failed

    def _call(self) -> None:
        try:
            with httpx.Client(base_url=self.service.url, timeout=60, trust_env=False) as http:
                for number in itertools.count():
                    if self.ends.is_set():
                        return
                    self._round(http, number)
        except BaseException as error:
            self.failed.append(error)

    def _round(self, http: httpx.Client, number: int) -> None:
        for tool_id, parameters in (
            ("wait", {"seconds": 0.1}),
            ("echo", {"message": "x"}),
            ("fail_clearly", {}),
            # It waits for no slot: more of it, and the overhead of all calls would be small.
            *([("remembered", {"text": "x"})] if number % 20 == 0 else []),
            ("calculator", {"expression": "6 * 7"}),
        ):
            body = {"tool_id": tool_id, "parameters": parameters}
            http.post("/api/v1/jsonrpc", json={"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": body})
        http.get("/api/v1/tools", params={"query": "echo"})
        http.post("/api/v1/tools/echo/execute", json={"parameters": {"message": "x"}})
        http.get("/api/v1/nowhere")


@dataclass
class Watched:
    """A service with one slot under load, a Prometheus that scrapes it, and where its alerts go."""

    service: Running
    prometheus: Prometheus
    receiver: Receiver
    load: Load


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """One slot: calls wait for each other, so that the overhead is over what it may be as long as there is load."""
    needs_prometheus()
    service = start_service(TOOL_MODULES="tests.tools_for_tests", MAX_CONCURRENT_EXECUTIONS="1", TRACE_SAMPLE_RATIO="1")
    receiver, load = Receiver(), Load(service, callers=4)
    prometheus = Prometheus(f"127.0.0.1:{service.port}", receiver.address)
    try:
        with prometheus:
            load.start()
            yield Watched(service, prometheus, receiver, load)
            load.stop()
    finally:
        load.ends.set()
        receiver.close()
        end(service)


def test_every_expression_gives_data_under_load(watched: Watched) -> None:
    waiting = [*EXPRESSIONS]
    ends = time.monotonic() + DATA_S_MAX
    while waiting and time.monotonic() < ends:
        waiting = [one for one in waiting if not watched.prometheus.query(hastened(one.text))]
        time.sleep(0.2 if waiting else 0)
    assert not waiting, "\n".join(f"{one.where}: {one.text}" for one in waiting)


def test_an_expression_over_a_name_that_is_not_there_gives_no_data(watched: Watched) -> None:
    assert watched.prometheus.query("tool_executions_sum") == []


def test_every_rule_is_evaluated_without_an_error(watched: Watched) -> None:
    groups = watched.prometheus.ask("rules")["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) == len(rules())
    assert {rule["name"]: rule["lastError"] for rule in found if rule.get("lastError")} == {}


def test_the_alerts_receiver_hears_of_a_threshold_that_load_crosses_and_of_its_end(watched: Watched) -> None:
    def is_ours(alert: dict[str, Any]) -> bool:
        labels = alert["labels"]
        return labels["alertname"] == "FrameworkOverheadHigh" and labels["severity"] == "critical"

    heard = watched.receiver.wait_for(is_ours)
    assert heard["labels"]["job"] == "agentcore-tools" and heard["labels"]["namespace"] == "tests"
    assert re.fullmatch(r"95 % of calls cost up to [\d.]+m?s .*", heard["annotations"]["summary"])
    assert (ROOT / heard["annotations"]["runbook_url"]).exists()
    watched.load.stop()
    over = watched.receiver.wait_for(
        lambda one: is_ours(one) and one["startsAt"] == heard["startsAt"] and one["endsAt"] <= one["heardAt"]
    )
    assert over["labels"] == heard["labels"]


def now() -> str:
    """As Prometheus writes times."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
