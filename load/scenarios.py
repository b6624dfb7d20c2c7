"""The load tests by name: who calls, how many, how long, in which shape, and what must hold for the run to be good.

Plain values that `run`, `locustfile` and `shapes` read; knows no Locust and no service. Whatever a scenario says can be
replaced on the command line, so that each can be run for seconds too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

ALL_KINDS = ("PlainUser", "BurstUser", "QuotaUser", "BatchUser", "FallbackUser")
"""The origin's kinds of users. Those that only measure are left out of a run that names none."""

SUCCESS_MIN = 0.95
"""The origin's target for the success rate of tools."""

_UNITS = {"h": 3600, "m": 60, "s": 1}


class Stage(NamedTuple):
    """Both are shares: of the run time that has passed when the stage ends, and of the users."""

    until: float
    users: float


@dataclass(frozen=True, slots=True)
class Bounds:
    """What must hold. Times are those that Locust saw, so its own load is in them."""

    p95_ms_max: float
    success_min: float = SUCCESS_MIN

    def broken(self, report: dict[str, Any]) -> list[str]:
        """What a report (load/locustfile.py writes it) does not keep to, in words.

        No kind of request may fall short: the many of one kind would hide that another never works.
        """
        if not report["total"]["requests"]:
            return ["nothing was asked"]
        found = [f"a user crashed: {crash}" for crash in report["crashes"]]
        for row in report["rows"]:
            success = 1 - row["failures"] / max(row["requests"], 1)
            if success < self.success_min:
                found.append(f"{row['name']}: {success:.2%} succeeded, at least {self.success_min:.2%} must")
        if (p95 := report["total"]["p95"]) > self.p95_ms_max:
            found.append(f"p95 is {p95:,.0f} ms, at most {self.p95_ms_max:,.0f} ms may be")
        return found


@dataclass(frozen=True, slots=True)
class Scenario:
    """`stages` empty: up to all users at the spawn rate, then on until the end."""

    name: str
    users: int
    spawn_rate: float
    run_time_s: int
    bounds: Bounds
    classes: tuple[str, ...]
    stages: tuple[Stage, ...] = ()

    def users_at(self, share: float, users: int) -> int | None:
        """Of so many users, how many there are when so much of the run time has passed; None at its end."""
        for stage in self.stages:
            if share < stage.until:
                return max(1, round(users * stage.users))
        return None


SPIKE = (Stage(0.4, 0.1), Stage(0.6, 1.0), Stage(1.0, 0.1))
STEPS = tuple(Stage(step / 5, step / 5) for step in range(1, 6))

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("mix", 100, 20, 30, Bounds(500), ALL_KINDS),
        Scenario("headline", 1000, 100, 300, Bounds(100), ("EchoUser",)),
        Scenario("latency", 100, 10, 300, Bounds(100), ("PlainUser",)),
        Scenario("capacity", 2000, 50, 300, Bounds(1000), ("PlainUser",)),
        Scenario("soak", 300, 10, 4 * 3600, Bounds(250), ALL_KINDS),
        Scenario("spike", 1000, 100, 180, Bounds(1000), ("PlainUser",), SPIKE),
        Scenario("step", 1000, 50, 300, Bounds(500), ("PlainUser",), STEPS),
    )
}
"""`mix` is what is run when none is named."""

DEFAULT = "mix"

UNNAMED = Bounds(1000)
"""Of a Locust that was started by hand without a scenario."""


def seconds(text: str) -> int:
    """Locust's spelling of a duration, which must be bounded: `300`, `30s`, `10m`, `1h30m`. Raises ValueError."""
    if text.isdecimal():
        text += "s"
    parts = re.findall(r"(\d+)([hms])", text)
    total = sum(int(number) * _UNITS[unit] for number, unit in parts)
    if total == 0 or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("such as 30s, 10m or 1h30m, over 0")
    return total
