"""`python -m load.growth`: what a call costs as tools, tenants and rows of the log become many; a plot of each.

Everything is on. The calls of each point go to as many tools, or come from as many tenants, as there are (tools: 1,000
of them in turn at most). All points are visited in turn; flat means that the last costs at most 10 % more than the
first, as the median of the rounds' own ratios. Plots: growth-*.svg in the folder of `--plots`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from load.harness import Asking, Bench, Target, bench, call_body, command, heading, measure, write_json
from load.many import fill_log, make_keys, tool_id
from load.run import ROOT
from load.svg import Line, Panel, picture

TOOLS = (10, 100, 1_000, 10_000)
TENANTS = (1, 10, 100, 1_000, 10_000)
ROWS = (0, 1_000_000)
CALLED_MAX = 1_000
"""Tools that are called in turn: each needs a request of its own in the load's memory."""

FLAT = 1.10


class Family(NamedTuple):
    """One plot: how many there are, and the target that is asked then."""

    name: str
    title: str
    points: list[tuple[int, Target]]

    def growth(self) -> float:
        """CPU per call at the last point over that at the first."""
        return 1 / self.points[-1][1].cpu_ratio(self.points[0][1])


def by_tools(bench: Bench, counts: Sequence[int]) -> Family:
    points = []
    for count in counts:
        module = bench.folder / f"tools_{count}.py"
        module.write_text(
            f"from load.many import tools\n\nglobals().update((one.spec.id, one) for one in tools({count}))\n"
        )
        settings = bench.everything(TOOL_MODULES=module.stem, PYTHONPATH=f"{ROOT}:{bench.folder}")
        server = bench.service(f"{count:,} tools", settings)
        called = range(0, count, max(1, count // CALLED_MAX))
        bodies = tuple(call_body(tool_id=tool_id(number)) for number in called)
        asking = Asking(bodies=bodies, right='"status":"success"', credentials=bench.credentials)
        points.append((count, Target(server.name, server, asking)))
    return Family("tools", "registered tools", points)


def by_tenants(bench: Bench, counts: Sequence[int]) -> Family:
    credentials = asyncio.run(make_keys(bench.database, max(counts), max(counts)))
    server = bench.service("tenants", bench.everything())
    points = []
    for count in counts:
        asking = Asking(right='"status":"success"', credentials=tuple(credentials[:count]))
        points.append((count, Target(f"{count:,} tenants", server, asking)))
    return Family("tenants", "tenants that call, each with a key and limits of its own", points)


def by_rows(bench: Bench, counts: Sequence[int]) -> Family:
    """Databases of their own."""
    points = []
    for count in counts:
        database = bench.new_database()
        credentials = asyncio.run(make_keys(database, 200, 20))
        if count:
            asyncio.run(fill_log(database, count))
        server = bench.service(f"{count:,} rows", bench.everything(DATABASE_URL=database))
        asking = Asking(right='"status":"success"', credentials=tuple(credentials))
        points.append((count, Target(server.name, server, asking)))
    return Family("log", "rows of the log at the beginning", points)


def print_family(family: Family) -> None:
    first = family.points[0][1]
    print(f"{'':22}{'calls/s':>10}{'CPU us/call':>13}{'of the first':>14}{'p99 ms':>9}{'MB':>6}{'errors':>8}")
    for _, target in family.points:
        cost = f"{target.calls_per_s:10,.0f}{target.cpu_us_per_call:13.1f}{1 / target.cpu_ratio(first):14.2f}"
        rest = f"{target.median('p99_ms'):9.2f}{target.median('rss_mb'):6.0f}{target.errors:8d}"
        print(f"{target.name:22}{cost}{rest}")
    grown = family.growth()
    print(f"{family.title}: {'flat' if grown <= FLAT else 'NOT FLAT'}, {grown - 1:+.0%} from end to end\n", flush=True)


def plot(family: Family) -> str:
    times = [(max(1.0, count), target.cpu_us_per_call) for count, target in family.points]
    panel = Panel("CPU of the service per call, us", [Line("us", times)], logarithmic=False)
    title = f"What a call costs against {family.title}"
    return picture(title, heading("everything on, 64 connections"), family.title, [panel], logarithmic_x=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one round")
    parser.add_argument("--only", choices=("tools", "tenants", "log"))
    parser.add_argument("--tools", type=int, nargs="+", default=list(TOOLS))
    parser.add_argument("--tenants", type=int, nargs="+", default=list(TENANTS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--plots", type=Path, help="a folder to draw into, such as var/bench")
    parser.add_argument("--json", help="a file for all figures")
    options = parser.parse_args()
    with bench() as own:
        families = []
        if options.only in (None, "tools"):
            families.append(by_tools(own, options.tools))
        if options.only in (None, "tenants"):
            families.append(by_tenants(own, options.tenants))
        if options.only in (None, "log"):
            families.append(by_rows(own, options.rows))
        measure([target for family in families for _, target in family.points], options.rounds, options.seconds)
    print(heading(f"growth, 64 connections, medians of {options.rounds} rounds"))
    for family in families:
        print_family(family)
        if options.plots is not None:
            options.plots.mkdir(parents=True, exist_ok=True)
            (options.plots / f"growth-{family.name}.svg").write_text(plot(family))
    shown = {one.name: {str(count): target.as_json() for count, target in one.points} for one in families}
    write_json(options.json, {"growth": shown})


if __name__ == "__main__":
    command(main)
