"""How much of its CPU and memory the container uses: read from /proc and the control groups, in the background.

The innermost control group that has a limit counts (cgroup v2 or v1); without one, the machine. Knows no metric names;
`open_service` runs `measure` and shows both values as gauges.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SAMPLE_S = 5.0
"""Three to a scrape of every 15 s: about ten small files, 0.2 ms."""

UNLIMITED_BYTES = 1 << 60
"""cgroup v1 has no word for "no limit", only a number that no machine has."""


class CpuTime(NamedTuple):
    """Totals since some past moment: what was used, and what there was to use."""

    used_s: float
    available_s: float


class SystemWatch:
    """The last reading of each; NaN where there is none, as on systems without /proc."""

    def __init__(self, root: Path = Path("/"), now: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._now = now
        self._before: CpuTime | None = None
        self._cpu_percent = math.nan
        self._memory_percent = math.nan

    def cpu_percent(self) -> float:
        """Over the last SAMPLE_S."""
        return self._cpu_percent

    def memory_percent(self) -> float:
        """Without the files that the kernel keeps only because there is room."""
        return self._memory_percent

    async def measure(self) -> None:
        """For ever."""
        while True:
            self.sample()
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> None:
        before, self._before = self._before, self._cpu_time()
        self._cpu_percent = _used_percent(before, self._before)
        self._memory_percent = self._memory()

    def _cpu_time(self) -> CpuTime | None:
        for read in (self._cpu_of_v2, self._cpu_of_v1, self._cpu_of_machine):
            found = read()
            if found is not None:
                return found
        return None

    def _cpu_of_v2(self) -> CpuTime | None:
        for folder in self._groups("", ""):
            quota, _, period = _text(folder / "cpu.max").partition(" ")
            used_us = _field(_text(folder / "cpu.stat"), "usage_usec")
            if quota.isdigit() and period.isdigit() and used_us is not None:
                return CpuTime(used_us / 1e6, self._now() * int(quota) / int(period))
        return None

    def _cpu_of_v1(self) -> CpuTime | None:
        for cpu, account in zip(self._groups("cpu", "cpu"), self._groups("cpu", "cpuacct"), strict=True):
            quota, period = _number(cpu / "cpu.cfs_quota_us"), _number(cpu / "cpu.cfs_period_us")
            used_ns = _number(account / "cpuacct.usage")
            if quota is not None and quota > 0 and period and used_ns is not None:
                return CpuTime(used_ns / 1e9, self._now() * quota / period)
        return None

    def _cpu_of_machine(self) -> CpuTime | None:
        words = _text(self._root / "proc/stat").partition("\n")[0].split()
        if len(words) < 9:
            return None
        ticks = [int(word) for word in words[1:9]]  # what follows, time of guests, is in the first two already
        idle = ticks[3] + ticks[4]
        return CpuTime(sum(ticks) - idle, sum(ticks))  # ticks, not seconds: only their ratio counts

    def _memory(self) -> float:
        text = _text(self._root / "proc/meminfo")
        total_kb, available_kb = _field(text, "MemTotal:"), _field(text, "MemAvailable:")
        if not total_kb or available_kb is None:
            return math.nan
        total = total_kb * 1024
        for controller, limit, used, reclaimable in (
            ("", "memory.max", "memory.current", "inactive_file"),
            ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            for folder in self._groups(controller, controller):
                limit_bytes, used_bytes = _number(folder / limit), _number(folder / used)
                if limit_bytes and used_bytes is not None and limit_bytes < min(total, UNLIMITED_BYTES):
                    cached = _field(_text(folder / "memory.stat"), reclaimable) or 0
                    return 100 * max(0, used_bytes - cached) / limit_bytes
        return 100 * (total - available_kb * 1024) / total

    def _groups(self, controller: str, mounted: str) -> Iterator[Path]:
        """Folders of our group and of those around it, innermost first. `controller` is empty for cgroup v2. A path
        that is not there is one outside of the container, whose own group is then what is mounted."""
        mount = self._root / "sys/fs/cgroup" / mounted
        for line in _text(self._root / "proc/self/cgroup").splitlines():
            parts = line.split(":", 2)
            if len(parts) == 3 and controller in parts[1].split(","):
                inner = mount / parts[2].strip("/")
                yield from [inner, *inner.parents[: len(inner.parts) - len(mount.parts)]]


def _used_percent(before: CpuTime | None, now: CpuTime | None) -> float:
    if before is None or now is None or now.available_s <= before.available_s:
        return math.nan
    return 100 * max(0.0, now.used_s - before.used_s) / (now.available_s - before.available_s)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _field(text: str, name: str) -> int | None:
    """The number behind a name, in files of `name number` lines."""
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None
