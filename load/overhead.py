"""`make overhead`: what a call costs by stage, beside the figures that its origin reports, and a picture of a load run.

Load rises in steps; the table is of the step at 500 calls a second, the origin's headline test. Everything is on:
credentials, a rate limit and a quota, the durable log, traces at 1 % to a collector. Figures are those of /metrics, by
the same arithmetic as PromQL's histogram_quantile. Stores are those of DATABASE_URL and REDIS_URL, else embedded.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import orjson

from load.echo import BODY, PATH
from load.harness import collector
from load.run import ROOT, CannotRun, own_service
from load.svg import Line, Panel, picture

STEPS = (100, 250, 500, 1000, 2000, 4000)
"""Calls a second; more and the client of this file is what is measured."""

HEADLINE = 500
CONNECTIONS = 32
SAMPLE_S = 0.5

SERVICE_OVERHEAD = "whole overhead"

ORIGIN_P95_MS = {
    "authentication": 8.5,
    "registry": 2.3,
    "validation": 1.8,
    "limits": 8.0,  # 4.2 for the rate limit and 3.8 for the quota, which are one decision here
    "execution": 0.5,
    "serialisation": 2.1,
    "log": 0.0,  # "async"
    "tracing": 4.8,
    "metrics": 3.2,
    SERVICE_OVERHEAD: 42.0,
}
"""As reported; that its parts add up to 31 and not to 42 is among what it reports."""

LIMITS = """policies:
  - {name: rate, per: [tenant, subject], rate: 100000/second}
  - {name: quota, per: [tenant, tool], quota: {daily: 1000000000, monthly: 1000000000}}
"""

Buckets = dict[float, float]
"""Cumulated counts by upper bound."""


class LoadFailed(Exception):
    """The service gave no answer."""


class Sample(NamedTuple):
    """What /metrics showed at a moment."""

    at_s: float
    calls: float
    stages: dict[str, Buckets]


@dataclass
class Recording:
    """The samples of a run, and the first and last of each step."""

    samples: list[Sample] = field(default_factory=list)
    steps: dict[int, tuple[Sample, Sample]] = field(default_factory=dict)
    failed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each step")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="calls a second")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "overhead.svg", help="where to draw it")
    options = parser.parse_args()
    try:
        with watched_service() as (url, key):
            recording = asyncio.run(record(url, key, options.steps, options.seconds))
    except (CannotRun, LoadFailed, OSError, asyncio.IncompleteReadError) as error:
        raise SystemExit(f"overhead: {error}") from None
    headline = HEADLINE if HEADLINE in recording.steps else options.steps[-1]
    print(heading(f"{headline} calls a second"))
    print("\n".join(table(*recording.steps[headline])))
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    options.plot.write_text(drawn(recording))
    print(f"drawn: {os.path.relpath(options.plot)}")
    if recording.failed:
        print(f"{recording.failed} calls did not succeed")


@contextlib.contextmanager
def watched_service() -> Iterator[tuple[str, str]]:
    """A service with everything on: its URL and a key."""
    with tempfile.TemporaryDirectory(prefix="agentcore-overhead-") as folder, collector() as endpoint:
        limits = Path(folder) / "limits.yaml"
        limits.write_text(LIMITS)
        settings = {
            "DATABASE_URL": os.environ.get("DATABASE_URL") or f"sqlite+aiosqlite:///{folder}/agentcore.db",
            "AUTH_MODE": "required",
            "LIMITS_FILE": str(limits),
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        }
        with own_service("http://127.0.0.1:1", **settings) as service:
            create = ["keys", "create", "--tenant", "load", "--subject", "overhead", "--expires-in", "1d", "--json"]
            made = subprocess.run(
                [sys.executable, "-m", "app", *create],
                cwd=folder,
                env=os.environ | settings | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                check=True,
            )
            yield service.url, orjson.loads(made.stdout)["key"]


async def record(url: str, key: str, steps: list[int], seconds: float) -> Recording:
    recording = Recording()
    port = urlsplit(url).port
    assert port is not None
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        await drive(port, key, steps[0], 1.0)  # connections, caches and the first commit are no part of it
        sampling = asyncio.create_task(keep_sampling(http, recording))
        for rate in steps:
            first = await sample(http)
            recording.failed += await drive(port, key, rate, seconds)
            recording.steps[rate] = first, await sample(http)
        sampling.cancel()
    return recording


async def keep_sampling(http: httpx.AsyncClient, recording: Recording) -> None:
    while True:
        recording.samples.append(await sample(http))
        await asyncio.sleep(SAMPLE_S)


async def sample(http: httpx.AsyncClient) -> Sample:
    at_s, text = time.perf_counter(), (await http.get("/metrics")).text
    stages: dict[str, Buckets] = {}
    for line in text.splitlines():
        if line.startswith("framework_stage_seconds_bucket{"):
            found = re.fullmatch(r'\S+\{le="(.+?)",stage="(\w+)"\} (\S+)|\S+\{stage="(\w+)",le="(.+?)"\} (\S+)', line)
            assert found is not None
            bound, stage, count = (found[1], found[2], found[3]) if found[1] else (found[5], found[4], found[6])
            stages.setdefault(stage, {})[float(bound)] = float(count)
        elif line.startswith("framework_overhead_seconds_bucket{"):
            bound, count = line.split('le="')[1].split('"} ')
            stages.setdefault(SERVICE_OVERHEAD, {})[float(bound)] = float(count)
    return Sample(at_s, stages[SERVICE_OVERHEAD][float("inf")], stages)


async def drive(port: int, key: str, rate: float, seconds: float) -> int:
    """Calls at that rate whatever the answers take, as far as CONNECTIONS allow; how many did not succeed."""
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(BODY)}\r\n\r\n"
    )
    request, turns, begin = head.encode() + BODY, itertools.count(), time.perf_counter()

    async def caller() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (due := next(turns) / rate) < seconds:
            await asyncio.sleep(begin + due - time.perf_counter())
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer)
            if not answer.startswith(b"HTTP/1.1 200 ") or length is None:
                raise LoadFailed(f"not an answer: {answer[:200]!r}")
            if b'"status":"success"' not in await reader.readexactly(int(length[1])):
                failed.append(due)
        writer.close()

    failed: list[float] = []
    await asyncio.gather(*(caller() for _ in range(CONNECTIONS)))
    return len(failed)


def grown(before: Buckets, after: Buckets) -> Buckets:
    return {bound: count - before.get(bound, 0.0) for bound, count in after.items()}


def quantile_s(q: float, buckets: Buckets) -> float | None:
    """As PromQL's histogram_quantile: linear within a bucket. None where nothing was counted."""
    total = buckets[float("inf")]
    if not total:
        return None
    rank, lower, below = q * total, 0.0, 0.0
    for bound, count in buckets.items():
        if count >= rank:
            return lower if bound == float("inf") else lower + (bound - lower) * (rank - below) / max(count - below, 1)
        lower, below = bound, count
    return lower


def heading(what: str) -> str:
    stores = [
        "PostgreSQL" if "postgresql" in os.environ.get("DATABASE_URL", "") else "SQLite",
        "Redis" if os.environ.get("REDIS_URL") else "limits in process",
    ]
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores, {', '.join(stores)}"
    return f"{time.strftime('%Y-%m-%d')}, {machine}, echo at {what}"


def table(first: Sample, last: Sample) -> Iterator[str]:
    yield f"{'stage':<16}{'p50 us':>10}{'p95 us':>10}{'origin p95 us':>15}"
    for stage, origin_ms in ORIGIN_P95_MS.items():
        counted = grown(first.stages[stage], last.stages[stage])
        p50, p95 = shown(quantile_s(0.5, counted)), shown(quantile_s(0.95, counted))
        yield f"{stage:<16}{p50:>10}{p95:>10}{origin_ms * 1e3:>15,.0f}"


def shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.1f}"


def drawn(recording: Recording) -> str:
    """Calls a second above, quantiles of the overhead below, over the same time."""
    samples = recording.samples
    begin = samples[0].at_s
    times = [after.at_s - begin for after in samples[1:]]
    pairs = list(itertools.pairwise(samples))
    rates = [(after.calls - before.calls) / (after.at_s - before.at_s) for before, after in pairs]
    counted = [grown(before.stages[SERVICE_OVERHEAD], after.stages[SERVICE_OVERHEAD]) for before, after in pairs]
    lines = [
        Line(
            f"p{q * 100:g}",
            [(at, value * 1e3) for at, one in zip(times, counted, strict=True) if (value := quantile_s(q, one))],
        )
        for q in (0.5, 0.95, 0.99)
    ]
    return picture(
        "Overhead of a call while the load rises",
        heading("rising rates"),
        "seconds",
        [
            Panel("calls a second", [Line("calls/s", list(zip(times, rates, strict=True)))], logarithmic=False),
            Panel("overhead, ms (logarithmic)", lines, logarithmic=True),
        ],
    )


if __name__ == "__main__":
    main()
