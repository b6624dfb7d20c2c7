"""Whether calls that compute have made the event loop late, told within tenths of a second.

The limit of calls at once follows in windows, and it takes several until it is down. Where calls compute for
milliseconds, those let in until then keep everyone waiting for a second. Knows no limit and no call; `LoadControl`
asks at each look.
"""

from __future__ import annotations

LATE_WEIGHT = 0.5
"""Of one look in how late the loop is."""

BUSY_S = 0.1
"""The time over which the thread's own part of it is averaged."""

BUSY_PART = 0.8
"""From here on what the loop computes makes it late, and not a machine that stood still."""

LAG_PART_MAX = 1.5
"""Of what is overload, in one look: it takes two, for a single call may be long."""

OVERLOAD_CALLS = 10.0
OVERLOAD_S_MIN = 0.02
"""A queue of so many calls, and as long at least, is overload. Shorter ones come and go on a core that is four fifths
in use, and its calls would rather wait than be refused."""

QUEUE_CALLS = 6.0
QUEUE_S_MAX = 0.04
"""What is left of the queue once it was that long, until it is over: so those that get through are not late."""

OVER_AFTER_S = 1.0
"""Without anything to refuse."""


class Lateness:
    """Fed with looks. Times in seconds of any one clock; `cpu_s` is what the loop's thread has computed so far."""

    __slots__ = ("_busy", "_cpu_s", "_late_s", "_looked_at", "_over_at")

    def __init__(self, now: float, cpu_s: float) -> None:
        self._looked_at = now
        self._cpu_s = cpu_s
        self._late_s = 0.0
        self._busy = 0.0
        self._over_at = now

    def look(self, lag_s: float, work_s: float, tolerated_s: float, now: float, cpu_s: float) -> bool:
        """Whether calls that compute for `work_s` each have made it so late that the next ones are better refused.
        What is tolerated anyway is never late."""
        elapsed_s, worked_s = now - self._looked_at, cpu_s - self._cpu_s
        self._looked_at, self._cpu_s = now, cpu_s
        overload_s = max(OVERLOAD_S_MIN, OVERLOAD_CALLS * work_s)
        self._late_s += LATE_WEIGHT * (min(lag_s, LAG_PART_MAX * overload_s) - self._late_s)
        if elapsed_s > 0:
            self._busy += min(1.0, elapsed_s / BUSY_S) * (worked_s / elapsed_s - self._busy)
        if self._busy <= BUSY_PART or self._late_s <= max(tolerated_s, min(QUEUE_S_MAX, QUEUE_CALLS * work_s)):
            return False
        if self._late_s > overload_s or now < self._over_at:
            self._over_at = now + OVER_AFTER_S
        return now < self._over_at
