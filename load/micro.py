"""Second half of `make bench`: parts of the path inside one process, at 10,000 registered tools."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable

from app.access.keys import NewKey
from app.calls import LOCAL_CALLER
from app.service import open_service
from app.settings import read_settings
from app.telemetry.metrics import Metrics
from app.telemetry.scraping import Scraper
from app.tools.registry import Registry, ToolFilter
from app.tools.tool import FunctionTool, ToolSpec

TOOLS = 10_000
ROUNDS = 2_000
TOOLS_THAT_RAN = 1_000
SCRAPES = 50

_WORDS = """account alert archive backup balance batch bridge calendar catalog channel client cluster contract country
customer dashboard dataset delivery deploy device document domain email event export feature file forecast graph group
history image import index inventory invoice journal key label ledger license location mail map message metric model
network note order page password payment person phone pipeline policy price product profile project query queue report
request resource review role rule schedule schema search secret server session shipment signal site snapshot source
stock storage stream subscription summary table tag task team template ticket token topic trace track user vendor video
volume wallet weather webhook widget workflow zone"""
WORDS = _WORDS.split()


def tools(count: int) -> list[FunctionTool]:
    """That many tools with names and descriptions of their own, over one function."""
    choose = random.Random(7)

    async def work(value: int) -> int:
        """Return the value."""
        return value

    first = FunctionTool(work, ToolSpec(id="work", name="Work", description="Return the value."))
    made = []
    for number in range(count):
        verb, noun, more = choose.sample(WORDS, 3)
        spec = ToolSpec(
            id=f"{verb}_{noun}_{number}",
            name=f"{verb} {noun}".title(),
            description=f"Work on the {noun} of a {verb} by its {more}.",
            category=choose.choice(("utility", "search", "database")),
            tags=(noun, more),
        )
        one = object.__new__(FunctionTool)  # schemas are shared: what is measured is the registry
        for name in ("_context_parameter", "_hints", "blocking", "function", "never_waits", "parameters", "result"):
            setattr(one, name, getattr(first, name))
        one.spec = spec
        made.append(one)
    return made


def measured(work: Callable[[int], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median and 95th percentile of one call, µs."""
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        work(number)
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times), statistics.quantiles(times, n=20)[-1]


def main() -> None:
    began = time.perf_counter()
    made = tools(TOOLS)
    registry = Registry(made, timeout_ceiling_s=30.0)
    print(f"{TOOLS} tools registered in {time.perf_counter() - began:.2f} s")
    ids = [tool.spec.id for tool in made]
    queries = [" ".join(random.Random(n).sample(WORDS, 2)) for n in range(ROUNDS)]
    typos = [query[:3] + query[4:] for query in queries]
    everything = ToolFilter()
    uncached = Registry(made, timeout_ceiling_s=30.0, cache_answers=False)
    rows = [
        ("look-up by id", measured(lambda n: registry.lookup(ids[n], LOCAL_CALLER))),
        ("search, two words", measured(lambda n: registry.search(queries[n], everything, LOCAL_CALLER, None))),
        ("search, with a typo", measured(lambda n: registry.search(typos[n], everything, LOCAL_CALLER, None))),
        ("list of 100, kept", measured(lambda n: registry.page(everything, LOCAL_CALLER, 100, None))),
        (
            "list of 100, by tag",
            measured(lambda n: registry.page(ToolFilter(tags=(WORDS[n % 100],)), LOCAL_CALLER, 100, None)),
        ),
        ("list of 100, built anew", measured(lambda n: uncached.page(everything, LOCAL_CALLER, 100, None), 100)),
    ]
    rows.append((f"scrape, {TOOLS_THAT_RAN:,} tools that ran", asyncio.run(_scrapes(ids[:TOOLS_THAT_RAN]))))
    rows.append(("caller of a known key", asyncio.run(_known_key())))
    print(f"{'':30}{'median us':>12}{'p95 us':>12}")
    for name, (median, p95) in rows:
        print(f"{name:30}{median:12.2f}{p95:12.2f}")
    asyncio.run(_service_start())


async def _scrapes(ids: list[str]) -> tuple[float, float]:
    """Median and 95th percentile of one scrape, µs; prints how late the loop was meanwhile."""
    metrics = Metrics()
    scraper = Scraper(metrics)
    for tool_id in ids:
        metrics.for_tool(tool_id).executions["success"] = 1
    times, lags, done = [], [0.0], asyncio.Event()

    async def turn() -> None:
        while not done.is_set():
            began = time.perf_counter()
            await asyncio.sleep(0)
            lags.append(time.perf_counter() - began)

    turning = asyncio.create_task(turn())
    for _ in range(SCRAPES):
        began = time.perf_counter()
        await scraper.scrape("")
        times.append((time.perf_counter() - began) * 1e6)
    done.set()
    await turning
    print(f"the loop was at most {max(lags) * 1e3:.1f} ms late while {len(ids):,} tools that ran were scraped")
    return statistics.median(times), statistics.quantiles(times, n=20)[-1]


async def _known_key() -> tuple[float, float]:
    """What a door spends on a credential that it has seen before, µs."""
    with tempfile.TemporaryDirectory(prefix="agentcore-micro-") as folder:
        database = {"DATABASE_URL": f"sqlite+aiosqlite:///{folder}/agentcore.db", "JOURNAL_DIR": folder}
        async with open_service(read_settings({**database, "AUTH_MODE": "required"})) as service:
            _, credential = await service.keys.create(NewKey(tenant="bench", subject="bench"))
            headers = [*BROUGHT, (b"authorization", f"Bearer {credential}".encode())]
            await service.access.identify(headers)
            return measured(lambda _: service.access.recognised(headers))


BROUGHT = [(name, b"x") for name in (b"host", b"user-agent", b"accept", b"content-type", b"content-length")]
"""Headers that a client sends anyway."""


async def _service_start() -> None:
    began = time.perf_counter()
    async with open_service(read_settings({})):
        print(f"a service with the built-in tools opens in {time.perf_counter() - began:.3f} s")


if __name__ == "__main__":
    main()
