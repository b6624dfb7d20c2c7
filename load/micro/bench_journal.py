"""A row before the database: its record, and its share of the journal's write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.calls import LOCAL_CALLER, Execution, ToolCall, new_execution_id
from app.execution_log.journal import Journal
from app.execution_log.record import Payloads, Recorder

Benchmark = Callable[..., Any]

RECORD = b"x" * 400
RESERVED_BYTES = 8_192
A_TICK = 64

pytestmark = pytest.mark.benchmark(group="journal")


@pytest.mark.parametrize("level", ["off", "metadata", "full"])
def bench_record(benchmark: Benchmark, level: Payloads) -> None:
    execution_id = new_execution_id()
    call = ToolCall(execution_id, "echo", {"message": "hello, this is an agent"}, LOCAL_CALLER, 0.0, agent_id="agent-7")
    result = b'{"message":"hello, this is an agent"}'
    ended = Execution(execution_id, "echo", "success", result, None, None, 4e-4, 1e-4, time.time(), 1, execution_id)
    recorder = Recorder(4_096)
    benchmark(recorder.record, call, ended, "1.0.0", 1, level)


def bench_tick_of_64_records(benchmark: Benchmark, tmp_path: Path) -> None:
    """Appended, written by one system call, read for the database and released: divide by 64."""
    with asyncio.Runner() as runner:
        journal = runner.run(_opened(tmp_path))

        async def tick() -> None:
            for _ in range(A_TICK):
                assert journal.reserve(RESERVED_BYTES)
                journal.append(RECORD, strict=False)
                journal.unreserve(RESERVED_BYTES)
            await asyncio.sleep(0)
            while (batch := journal.read_batch(1_000, 1_048_576)) is not None:
                journal.release(batch)

        benchmark(lambda: runner.run(tick()))
        runner.run(journal.close())


async def _opened(folder: Path) -> Journal:
    return Journal.open(folder, bytes_max=1 << 30)
