"""What a Locust run counted, sampled and comes to: the figures behind the table, the plots and the exit code.

`locustfile` counts here and has `listen()` called once; `run` and `origin` read what `--report` is written to. Knows
no user and no tool. In a distributed run the workers tell the master.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gevent
from locust import events
from locust.runners import MasterRunner, WorkerRunner
from locust.stats import StatsEntry, StatsError

from load.scenarios import SCENARIOS, UNNAMED, Bounds

SAMPLES_MAX = 600
"""Of a run, however long: more points than a picture has pixels tell nothing."""

WORKERS_TELL_EVERY_S = 3
"""Locust's own pace; sampled faster, every third sample of a distributed run would hold it all."""

LAST_SAMPLE_S_MIN = 0.25

OVERHEAD = re.compile(rb'"overhead_ms":([\d.]+)')
OVERHEAD_STEP_US = 10

_overheads: Counter[int] = Counter()
"""What single calls say of the service's share, by steps of OVERHEAD_STEP_US."""
_sent_bytes: Counter[str] = Counter()
_samplers: list[Sampler] = []
"""One for each start of the test; headless there is one."""


def listen() -> None:
    """Take part in Locust's events."""
    hooks: Any = events
    hooks.test_start.add_listener(_start_sampling)
    hooks.report_to_master.add_listener(_tell_master)
    hooks.worker_report.add_listener(_take_from_worker)
    hooks.quitting.add_listener(_judge)


def count_sent(body: str) -> None:
    _sent_bytes["all"] += len(body)


def count_overhead(answer: bytes) -> None:
    """What the answer to a single call says of it."""
    if found := OVERHEAD.search(answer):
        _overheads[int(float(found[1]) * 1e3 / OVERHEAD_STEP_US)] += 1


class Sampler:
    """Looks at the run now and then; a sample is what came since the one before."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.began = time.monotonic()
        self.samples: list[dict[str, Any]] = []
        self.seen = 0.0, 0, 0, Counter[int]()

    def keep_sampling(self) -> None:
        """Until it is killed, or, where nobody said when the run ends, there are enough."""
        every_s = max(1, math.ceil((self.environment.parsed_options.run_time or 0) / SAMPLES_MAX))
        if isinstance(self.environment.runner, MasterRunner):
            every_s = max(every_s, WORKERS_TELL_EVERY_S)
        while len(self.samples) < 2 * SAMPLES_MAX:
            gevent.sleep(every_s)
            self.sample()

    def finish(self) -> None:
        """The rest since the last sample; a blink of it would give wild rates."""
        if time.monotonic() - self.began - self.seen[0] > LAST_SAMPLE_S_MIN:
            self.sample()

    def sample(self) -> None:
        total = self.environment.stats.total
        before_s, requests, failures, times = self.seen
        at_s, counted = time.monotonic() - self.began, Counter(total.response_times)
        self.samples.append(
            {
                "at_s": round(at_s, 2),
                "users": self.environment.runner.user_count,
                "rps": (total.num_requests - requests) / (at_s - before_s),
                "failures_per_s": (total.num_failures - failures) / (at_s - before_s),
                **_percentiles(counted - times, 1.0),
            }
        )
        self.seen = at_s, total.num_requests, total.num_failures, counted


def _start_sampling(environment: Any, **_: Any) -> None:
    if not isinstance(environment.runner, WorkerRunner):
        _samplers.append(Sampler(environment))
        gevent.spawn(_samplers[-1].keep_sampling)


def _tell_master(data: dict[str, Any], **_: Any) -> None:
    data["overheads"], data["sent_bytes"] = dict(_overheads), _sent_bytes["all"]
    _overheads.clear()
    _sent_bytes.clear()


def _take_from_worker(data: dict[str, Any], **_: Any) -> None:
    _overheads.update(data["overheads"])
    _sent_bytes["all"] += data["sent_bytes"]


def _judge(environment: Any, **_: Any) -> None:
    """All users have ended here. Exit code 1 if a bound is broken, 0 if none is, whatever single requests did."""
    if environment.runner is None or isinstance(environment.runner, WorkerRunner):
        return
    options = environment.parsed_options
    if _samplers:
        _samplers[-1].finish()
    report = _report(environment)
    report["broken"] = broken = _bounds(options).broken(report)
    environment.process_exit_code = 1 if broken else 0
    if options.report:
        Path(options.report).write_text(json.dumps(report), encoding="utf-8")
    else:
        print("\n".join(["FAILED", *broken]) if broken else "PASSED", file=sys.stderr)


def _bounds(options: Any) -> Bounds:
    named = SCENARIOS[options.scenario].bounds if options.scenario else UNNAMED
    return Bounds(
        named.p95_ms_max if options.p95_max is None else options.p95_max,
        named.success_min if options.success_min is None else options.success_min,
    )


def _report(environment: Any) -> dict[str, Any]:
    stats, overheads = environment.stats, Counter(_overheads)
    return {
        "rows": [_row(stats.entries[key]) for key in sorted(stats.entries)],
        "total": _row(stats.total),
        "failures": [_failure(error) for error in stats.errors.values()],
        "crashes": [crash["msg"] for crash in environment.runner.exceptions.values()],
        "samples": _samplers[-1].samples if _samplers else [],
        "overhead_ms": _summary(overheads, OVERHEAD_STEP_US / 1e3),
        "sent_bytes": _sent_bytes["all"],
        "received_bytes": stats.total.total_content_length,
    }


def _percentiles(counted: Mapping[int, int], unit: float) -> dict[str, float]:
    """Of values and how often each was, all times the unit; nothing of nothing."""
    ordered, total = sorted(counted.items()), sum(counted.values())
    found: dict[str, float] = {}
    for percent in (50, 95, 99):
        below = 0
        for value, count in ordered:
            below += count
            if below >= total * percent / 100:
                found[f"p{percent}"] = round(value * unit, 3)
                break
    return found


def _summary(counted: Mapping[int, int], unit: float) -> dict[str, float]:
    if not counted:
        return {}
    mean = sum(value * count for value, count in counted.items()) / sum(counted.values())
    return {**_percentiles(counted, unit), "mean": round(mean * unit, 3), "max": round(max(counted) * unit, 3)}


def _row(entry: StatsEntry) -> dict[str, Any]:
    percentiles = {f"p{p}": entry.get_response_time_percentile(p / 100) for p in (50, 95, 99)}
    return {
        "name": entry.name,
        "requests": entry.num_requests,
        "failures": entry.num_failures,
        **percentiles,
        "mean": entry.avg_response_time,
        "max": entry.max_response_time,
        "rps": entry.total_rps,
    }


def _failure(error: StatsError) -> dict[str, Any]:
    return {"name": error.name, "reason": str(error.error), "count": error.occurrences}
