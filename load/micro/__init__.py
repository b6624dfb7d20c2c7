"""Parts of the path inside one process, by pytest-benchmark. `python -m load.micro` runs them all.

`measured` is for a table of a few that is printed elsewhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from load.many import tools

__all__ = ["measured", "tools"]

ROUNDS = 2_000


def measured(work: Callable[[int], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median and 95th percentile of one call, µs."""
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        work(number)
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times), statistics.quantiles(times, n=20)[-1]
