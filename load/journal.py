"""What a row costs before the database: its record, its share of the journal's write, and reading it back.

`python -m load.journal [FOLDER]`
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import orjson

from app.calls import LOCAL_CALLER, Execution, ToolCall, new_execution_id
from app.execution_log.journal import Journal
from app.execution_log.record import Payloads, Recorder
from app.telemetry.redaction import redact_json

RECORD_BYTES = 400
ROUNDS = 9
TICKS = 1_000
LEVELS: tuple[Payloads, ...] = ("off", "metadata", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", help="decides which disk it is; without it, that of temporary files"
    )
    options = parser.parse_args()
    for level in LEVELS:
        print(f"{'record, payloads ' + level:44}{_per_call_us(_recording(level), 20_000):10.2f} us")
    prose = orjson.dumps({"text": "The author's keyboard, https://example.org/a, a passage of some tokens. " * 450})
    print(f"{'redact 32 KB of prose':44}{_per_call_us(lambda: redact_json(prose), 20) / 1e3:10.2f} ms")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        asyncio.run(_journal(Path(folder)))


def _recording(level: Payloads) -> Callable[[], object]:
    execution_id = new_execution_id()
    call = ToolCall(execution_id, "echo", {"message": "hello, this is an agent"}, LOCAL_CALLER, 0.0, agent_id="agent-7")
    result = b'{"message":"hello, this is an agent"}'
    ended = Execution(execution_id, "echo", "success", result, None, None, 4e-4, 1e-4, time.time(), 1, execution_id)
    recorder = Recorder(4_096)
    return lambda: recorder.record(call, ended, "1.0.0", 1, level)


def _per_call_us(work: Callable[[], object], calls: int) -> float:
    """The best of some rounds: what the machine's other work adds is no cost of ours."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        rounds.append((time.perf_counter() - began) / calls * 1e6)
    return min(rounds)


async def _journal(folder: Path) -> None:
    journal = Journal.open(folder, bytes_max=1 << 30)
    for records in (1, 5, 20, 100):
        us = [await _ticks(journal, records) for _ in range(ROUNDS)]
        label = f"append and write, {records} of {RECORD_BYTES} bytes a tick"
        print(f"{label:44}{statistics.median(us):10.2f} us a record")
    for label, ticks in (("memory", 100), ("segments", 1_000)):
        await _ticks(journal, 100, ticks, drained=False)
        print(f"{'read from ' + label + ' and release':44}{_drained_us(journal):10.2f} us a record")
    strict = []
    for _ in range(200):
        began = time.perf_counter()
        await journal.append(b"x" * RECORD_BYTES, strict=True).wait()
        strict.append((time.perf_counter() - began) * 1e3)
    print(f"{'strict commit, alone: median, p99':44}{statistics.median(strict):10.2f} ms, {_p99(strict):.2f} ms")
    _drained_us(journal)
    await journal.close()


async def _ticks(journal: Journal, records: int, ticks: int = TICKS, *, drained: bool = True) -> float:
    """Microseconds a record, the event loop's own tick and the syncing thread's share included."""
    record = b"x" * RECORD_BYTES
    began = time.perf_counter()
    for _ in range(ticks):
        for _ in range(records):
            if journal.reserve(8_192):
                journal.append(record, strict=False)
                journal.unreserve(8_192)
        await asyncio.sleep(0)
    took_s = time.perf_counter() - began
    if drained:
        _drained_us(journal)
    return took_s / (ticks * records) * 1e6


def _drained_us(journal: Journal) -> float:
    rows, began = 0, time.perf_counter()
    while (batch := journal.read_batch(1_000, 1_048_576)) is not None:
        rows += len(batch.records)
        journal.release(batch)
    return (time.perf_counter() - began) / max(1, rows) * 1e6


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


if __name__ == "__main__":
    main()
