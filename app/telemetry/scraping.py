"""The text that Prometheus reads, written without holding the event loop.

The library writes the few dozen series of the process. Those of the tools are written here, for there may be thousands:
a line costs the library 4 µs, and 1,000 tools have 23,000 lines. Called by /metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from app.telemetry.histogram import Histogram, Seen
from app.telemetry.metrics import DURATION_BUCKETS_S, REUSES, RUN_STATUSES, Metrics, ToolSeries

TOOLS_A_STEP = 100
"""Written between two turns of the loop: about half a millisecond. A thread would hold it for 5 ms at a time, which is
how long Python lets a thread keep the interpreter from another."""

END = b"# EOF\n"
"""The last line of OpenMetrics, and of no part before."""

_REFUSED = frozenset({"q=0", "q=0.", "q=0.0", "q=0.00", "q=0.000"})
"""Weights of what is not to be sent (RFC 9110, section 12.4.2); the library looks at none."""

_STATUS = [f'tool_executions_total{{status="{status}",tool_id="' for status in RUN_STATUSES]
_BUCKET = [f'tool_execution_duration_seconds_bucket{{le="{bound}",tool_id="' for bound in (*DURATION_BUCKETS_S, "+Inf")]
_COUNT = 'tool_execution_duration_seconds_count{tool_id="'
_REUSE = [f'tool_reuse_total{{outcome="{outcome}",tool_id="' for outcome in REUSES]
_RETRIES = 'tool_retries_total{tool_id="'
_BREAKER = 'tool_breaker_state{tool_id="'
_SUM = 'tool_execution_duration_seconds_sum{tool_id="'


def _is_refused(media_range: str) -> bool:
    return any(parameter.strip().lower() in _REFUSED for parameter in media_range.split(";")[1:])


class Scraper:
    """Answers scrapes; those that come while one is being written get the same text."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._written: dict[str, asyncio.Task[bytes]] = {}

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, by the Accept header."""
        accept = ",".join(one for one in accept.split(",") if not _is_refused(one))
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # the library on a version that is no number
            encode, content_type = choose_encoder("")
        task = self._written.get(content_type)
        if task is None:
            is_openmetrics = content_type.startswith("application/openmetrics-text")
            task = asyncio.get_running_loop().create_task(self._text(encode, is_openmetrics), name="scrape")
            self._written[content_type] = task
            task.add_done_callback(lambda _: self._written.pop(content_type))
        return await asyncio.shield(task), content_type

    async def _text(self, encode: Callable[[Collector], bytes], is_openmetrics: bool) -> bytes:
        runs, durations, reuses, retries, breakers = await self._of_tools(with_exemplars=is_openmetrics)
        total = "" if is_openmetrics else "_total"
        own = encode(self._metrics)
        await asyncio.sleep(0)
        return b"".join(
            (
                _head(f"tool_executions{total}", "counter", "Calls by tool and outcome"),
                *runs,
                _head("tool_execution_duration_seconds", "histogram", "The tool's own run"),
                *durations,
                _head(f"tool_reuse{total}", "counter", "Calls by what they met of earlier ones"),
                *reuses,
                _head(f"tool_retries{total}", "counter", "Runs after a failed one of the same call"),
                *retries,
                _head("tool_breaker_state", "gauge", "0 closed, 1 half open, 2 open; for whom it is worst"),
                *breakers,
                own.removesuffix(END),
                encode(self._metrics.registry),
            )
        )

    async def _of_tools(self, *, with_exemplars: bool) -> tuple[list[bytes], ...]:
        """Lines of the tools, step by step: every count from 0 on, so that `increase` sees the first run; a histogram,
        most of the text, from the first run on."""
        series = list(self._metrics.tools.items())
        runs, durations, reuses, retries, breakers = [], [], [], [], []
        for start in range(0, len(series), TOOLS_A_STEP):
            step = series[start : start + TOOLS_A_STEP]
            runs.append("".join(line for tool_id, one in step for line in _runs(tool_id, one)).encode())
            ran = (
                line for tool_id, one in step if one.ran for line in _durations(tool_id, one.duration, with_exemplars)
            )
            durations.append("".join(ran).encode())
            used = [(tool_id, one) for tool_id, one in step if any(one.executions.values()) or any(one.reuse.values())]
            reuses.append("".join(line for tool_id, one in step for line in _reuses(tool_id, one)).encode())
            retries.append("".join(f'{_RETRIES}{tool_id}"}} {one.retries}\n' for tool_id, one in used).encode())
            breakers.append(
                "".join(f'{_BREAKER}{tool_id}"}} {one.breaker_state()}\n' for tool_id, one in used).encode()
            )
            await asyncio.sleep(0)
        return runs, durations, reuses, retries, breakers


def _head(name: str, kind: str, text: str) -> bytes:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n".encode()


def _runs(tool_id: str, series: ToolSeries) -> Iterable[str]:
    """An id needs no escapes: it is made of letters, digits, _ and -."""
    for prefix, count in zip(_STATUS, series.executions.values(), strict=True):
        yield f'{prefix}{tool_id}"}} {count}\n'


def _reuses(tool_id: str, series: ToolSeries) -> Iterable[str]:
    if series.keeps_results or any(series.reuse.values()):
        for prefix, count in zip(_REUSE, series.reuse.values(), strict=True):
            yield f'{prefix}{tool_id}"}} {count}\n'


def _durations(tool_id: str, duration: Histogram, with_exemplars: bool) -> Iterable[str]:
    cumulated = 0
    for number, (prefix, count) in enumerate(zip(_BUCKET, duration.counts, strict=True)):
        cumulated += count
        exemplar = _exemplar(duration.seen[number]) if with_exemplars and number in duration.seen else ""
        yield f'{prefix}{tool_id}"}} {cumulated}{exemplar}\n'
    yield f'{_COUNT}{tool_id}"}} {cumulated}\n'
    yield f'{_SUM}{tool_id}"}} {duration.total!r}\n'


def _exemplar(seen: Seen) -> str:
    return f' # {{trace_id="{seen.trace_id}"}} {seen.value!r} {seen.at_s:.3f}'
