"""What the tests of the journal share: journals on real files, and processes that hold one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from app.execution_log.journal import BufferedLog, Journal
from tests.conftest import ROOT, service_environ
from tests.waiting import SOON_S, until

MIB = 1_048_576


@contextlib.asynccontextmanager
async def opened(root: Path, *, bytes_max: int = 64 * MIB, **options: Any) -> AsyncIterator[Journal]:
    journal = Journal.open(root, bytes_max=bytes_max, **options)
    try:
        yield journal
    finally:
        await journal.close(SOON_S)


async def write(journal: Journal, *records: bytes) -> None:
    """In one tick, until they are on disk."""
    for record in records:
        commit = journal.append(record, strict=False)
    await asyncio.wait_for(commit.wait(), SOON_S)


def read(journal: Journal | BufferedLog, rows_max: int = 1000, *, release: bool = False) -> list[bytes]:
    """All that there is now."""
    records: list[bytes] = []
    for _ in range(100_000):
        batch = journal.read_batch(rows_max, MIB)
        if batch is not None:
            assert 0 < len(batch.records) <= rows_max
            records += batch.records
            if release:
                journal.release(batch)
        elif not journal._readable.is_set():
            return records
    raise AssertionError("it never ends")


def numbered(count: int, first: int = 0) -> list[bytes]:
    return [b"record %d" % number for number in range(first, first + count)]


def folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.segment"))


async def left_behind(root: Path, *records: bytes, ticks: int = 1, **options: Any) -> Path:
    """The folder of a process that has ended without its writer having read anything."""
    async with opened(root, **options) as journal:
        for tick in range(ticks):
            await write(journal, *records[tick::ticks])
        return journal._own.path


@contextlib.asynccontextmanager
async def disk_that_hangs(journal: Journal) -> AsyncIterator[threading.Event]:
    """Its thread is stuck until the event is set."""
    begun, ends = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        ends.wait(SOON_S)

    journal._disk.submit(hang, lambda error: None)
    await until(begun.is_set)
    yield ends
    ends.set()


async def crash(journal: Journal) -> None:
    """What a killed process leaves: files as they are, locks free."""
    await journal._disk.finish(SOON_S)
    for fd in (journal._writer._fd, *journal._syncing._retired_fds):
        if fd >= 0:
            os.close(fd)
    journal._syncing._stop_timers()
    for folder in (journal._own, *journal._adopted):
        folder.close()


CHILD = """
import asyncio, os, resource, sys
from pathlib import Path
from app.execution_log.journal import Journal

def say(text):
    os.write(1, text.encode() + b"\\n")

async def main():
    root = Path(sys.argv[1])
    {body}

asyncio.run(main())
"""


@contextlib.contextmanager
def child(root: Path, body: str) -> Iterator[subprocess.Popen[bytes]]:
    source = CHILD.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ").strip())
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=service_environ(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def lines(process: subprocess.Popen[bytes], count: int) -> list[bytes]:
    assert process.stdout is not None
    found = [process.stdout.readline() for _ in range(count)]
    assert all(line.endswith(b"\n") for line in found), (found[-3:], process.poll())
    return [line.strip() for line in found]
