"""One page on one load run: the verdict, the figures by kind of request, plots over time. Needs no network to be read.

`run` writes it from what load/tally.py reports. Knows no Locust and no service.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from load.scenarios import Bounds
from load.svg import Line, Panel, picture

STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 900px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: 0 }
p.run { color: #666; margin-top: .2em }
code { background: #f3f3f3; padding: .1em .3em }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25em .6em; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
tr.all td { font-weight: bold; border-top: 2px solid #888 }
.verdict { padding: .6em .9em; border-left: 6px solid }
.passed { border-color: #2e7d32; background: #eff7ef }
.failed { border-color: #b3261e; background: #fbeeed }
svg { max-width: 100%; height: auto }
"""

COLUMNS = {
    "requests": ("requests", "{:,.0f}"),
    "failures": ("failures", "{:,.0f}"),
    "p50": ("p50 ms", "{:,.0f}"),
    "p95": ("p95 ms", "{:,.0f}"),
    "p99": ("p99 ms", "{:,.0f}"),
    "max": ("max ms", "{:,.0f}"),
    "rps": ("requests/s", "{:,.1f}"),
}


def html(scenario: str, heading: str, command: str, report: dict[str, Any], bounds: Bounds) -> str:
    """The whole page."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Load test: {escape(scenario)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Load test: {escape(scenario)}</h1>
<p class="run">{escape(heading)}<br><code>{escape(command)}</code></p>
{_verdict(report["broken"], bounds)}
{plots(report["samples"])}
<h2>By kind of request</h2>
{_table(report)}
{"".join(_failures(report))}
<p>Times are whole milliseconds as Locust saw them, so its own load is in them.{_overhead(report["overhead_ms"])}</p>
</body>
</html>
"""


def _verdict(broken: list[str], bounds: Bounds) -> str:
    wanted = f"success of each kind at least {bounds.success_min:.0%}, p95 of all at most {bounds.p95_ms_max:,.0f} ms"
    if not broken:
        return f'<p class="verdict passed"><b>Passed</b>: {wanted}.</p>'
    reasons = "".join(f"<br>{escape(reason)}" for reason in broken)
    return f'<div class="verdict failed"><b>Failed</b>: {wanted}.{reasons}</div>'


def plots(samples: list[dict[str, Any]]) -> str:
    """Users, requests, percentiles and failures over the same time, as SVG within the page."""
    if not samples:
        return "<p>The run was too short for plots.</p>"
    panels = [
        Panel("users", [_line(samples, "users", "users")], logarithmic=False),
        Panel("requests a second", [_line(samples, "rps", "requests")], logarithmic=False),
        Panel("response time, ms (logarithmic)", list(_percentiles(samples)), logarithmic=True),
        Panel("failures a second", [_line(samples, "failures_per_s", "failures")], logarithmic=False),
    ]
    drawn = [panel for panel in panels if panel.lines]
    return picture("Over time", "each point is what came since the one before", "seconds", drawn)


def _line(samples: list[dict[str, Any]], column: str, name: str) -> Line:
    return Line(name, [(sample["at_s"], sample[column]) for sample in samples])


def _percentiles(samples: list[dict[str, Any]]) -> Iterator[Line]:
    """Locust counts whole milliseconds: what took less than half of one is drawn as that half."""
    for name in ("p50", "p95", "p99"):
        points = [(sample["at_s"], max(sample[name], 0.5)) for sample in samples if name in sample]
        if points:
            yield Line(name, points)


def _table(report: dict[str, Any]) -> str:
    heads = "".join(f"<th>{title}</th>" for title, _ in COLUMNS.values())
    rows = [_row(row, row["name"]) for row in report["rows"]] + [_row(report["total"], "all", ' class="all"')]
    return f"<table><tr><th></th>{heads}</tr>{''.join(rows)}</table>"


def _row(row: dict[str, Any], name: str, kind: str = "") -> str:
    cells = "".join(f"<td>{shape.format(row[column])}</td>" for column, (_, shape) in COLUMNS.items())
    return f"<tr{kind}><td>{escape(name)}</td>{cells}</tr>"


def _failures(report: dict[str, Any]) -> Iterator[str]:
    if report["failures"]:
        yield "<h2>Failures</h2><table><tr><th>reason</th><th>kind</th><th>how often</th></tr>"
        for failure in sorted(report["failures"], key=lambda one: -one["count"]):
            reason, name = escape(failure["reason"]), escape(failure["name"])
            yield f"<tr><td>{reason}</td><td>{name}</td><td>{failure['count']:,}</td></tr>"
        yield "</table>"


def _overhead(overhead_ms: dict[str, float]) -> str:
    if not overhead_ms:
        return ""
    shown = ", ".join(f"{name} {value:,.2f} ms" for name, value in overhead_ms.items())
    return f" The service's own share, as single calls report it (<code>overhead_ms</code>): {shown}."
