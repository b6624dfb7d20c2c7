"""The cores of this machine, and what a process takes of them: pinning, CPU time, memory. Knows no server.

Where processes cannot be held to cores (one core, no Linux), nothing is pinned and everything else goes on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

IDLE_SHARE = 0.05
"""Of a core; what a service at rest takes is well under it."""
IDLE_S_MAX = 15.0


@functools.cache
def cores() -> tuple[int, int] | None:
    """(the server's, everybody else's), or None where this machine or system cannot hold processes to cores."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # whoever started us may have pinned us already
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else None


def pin(pid: int, core: int) -> None:
    """A process with all its threads and children; where it cannot be done, nothing happens."""
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        for each in process_tree(pid):
            for thread in Path(f"/proc/{each.pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), {core})


def pin_self() -> None:
    """This process and all that it starts from now on to the core of the load. Says so where there is none."""
    chosen = cores()
    if chosen is None:
        print("one core, or no way to pin: server and load disturb each other, read ratios alone", file=sys.stderr)
        return
    os.sched_setaffinity(0, {chosen[1]})


def pin_server(pid: int) -> None:
    if (chosen := cores()) is not None:
        pin(pid, chosen[0])


def raise_open_files() -> None:
    """As many as are allowed, here and in what is started from now on: a connection takes one on each side."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def process_tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_s(pid: int) -> float:
    """User and system time of a process and its children, seconds."""
    return sum(map(_own_cpu_s, process_tree(pid)))


def _own_cpu_s(process: psutil.Process) -> float:
    if sys.platform == "linux":
        # clock_getcpuclockid(3): nanoseconds, where /proc counts in hundredths of a second.
        with contextlib.suppress(OSError):
            return time.clock_gettime(~process.pid << 3 | 2)
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def rss_mb(pid: int) -> float:
    """Of a process and its children, MB of 1,000,000 bytes."""
    return float(sum(process.memory_info().rss for process in process_tree(pid))) / 1e6


def settle(pid: int) -> None:
    """Wait, bounded, until it is idle: a backlog of rows would be charged to the next server's core."""
    ends = time.monotonic() + IDLE_S_MAX
    while time.monotonic() < ends:
        before, began = cpu_s(pid), time.monotonic()
        time.sleep(0.1)
        if cpu_s(pid) - before < IDLE_SHARE * (time.monotonic() - began):
            return
