"""Breakers: what fails again and again is not asked for a while, then asked a little, then as before.

`Breaker` is one of them, `BreakerTable` those of keys that have failed lately, `ToolBreaker` what a tool has. Knows no
tool, no HTTP and no wire: the executor tells how runs end, the egress client how requests do.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable
from time import perf_counter
from typing import Any, Final, Generic, Literal, TypeVar

import orjson

from app.errors import TOOL_CRASHED, TOOL_ERROR, TOOL_TIMEOUT, Failure, Overloaded, UpstreamFailed

State = Literal[0, 1, 2]
CLOSED: Final = 0
HALF_OPEN: Final = 1
OPEN: Final = 2
"""As the metrics show them."""

Outcome = Literal[-1, 0, 1]
FAILED: Final = -1
SAYS_NOTHING: Final = 0
SUCCEEDED: Final = 1

WINDOW_S = 10.0
"""Failures are held against calls of the last one to two windows."""

CALLS_MIN = 20
FAILED_PART = 0.5
"""Of at least so many calls in the window. Below half, a caller gains more by trying again than by being refused."""

STREAK = 10
"""Failures with no success between open it at once: what is dead fails always, however good the minutes before were.
Half of the 20 calls that a dead upstream may cost, since as many may be on their way when the tenth fails."""

OPEN_S_MIN, OPEN_S_MAX = 1.0, 6.0
OPEN_SPREAD = 0.25
"""The first time is as long as a restart of something small takes; each that follows soon is twice as long. At most
7.5 s with the spread, by which replicas do not all ask at once: what is healed is used again within 10 s."""

CALM_S = 60.0
"""Closed for so long, the next time begins short again."""

PROBES_AT_ONCE = 3
PROBES_TO_CLOSE = 3
"""One success may be luck; more than a few calls at once could knock down what has just got up."""

PROBE_S_MAX = 2.0
"""A probe that hangs does not keep others out for longer, and what becomes of it then counts no more."""

RETRY_AFTER_MS_MIN = 100

FORGET_S = 300.0
"""Not closed, and not asked for so long: whoever comes then is no burden."""

KEYS_MAX = 1_000
"""Keys that have failed lately, at some 400 bytes each; past it the one that failed longest ago is forgotten, which
costs its upstream a few calls."""

TENANTS_TO_OPEN_ALL = 3
"""A failure that so many tenants see in a row is the tool's. Fewer could be one who wants to keep others out."""

ABANDONED_TO_OPEN_ALL = 4
"""Half of the runs after which a tool is refused altogether (runner.ABANDONED_PER_TOOL_MAX)."""

Clock = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)


class Probe:
    """The right to try what is half open. Its end must be told, whatever it is."""

    __slots__ = ("began_s", "breaker")

    def __init__(self, breaker: Breaker, began_s: float) -> None:
        self.breaker = breaker
        self.began_s = began_s


class Breaker:
    """Closed: everyone passes and failures are counted. Open: nobody does. Half open: some do, and they decide.

    A success while it is closed costs an addition; the clock is read on failures only. All methods are synchronous.
    """

    __slots__ = (
        "_clock",
        "_failed",
        "_mark",
        "_mark_before",
        "_open_s",
        "_passed",
        "_probes",
        "_random",
        "_streak",
        "_streak_seen",
        "_succeeded",
        "_until",
        "_window_began",
        "changed_at",
        "state",
        "touched_at",
    )

    def __init__(self, clock: Clock = perf_counter, chance: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._random = chance
        self.state: State = CLOSED
        self.changed_at = -math.inf
        self.touched_at = clock()
        self._succeeded = self._failed = 0
        self._window_began = -math.inf
        self._mark = self._mark_before = (0, 0)
        """Successes and failures as this window and the one before it began."""
        self._streak = self._streak_seen = 0
        self._open_s = 0.0
        self._until = 0.0
        self._probes: list[Probe] = []
        self._passed = 0

    @property
    def state_now(self) -> State:
        """As it would meet a call at this moment."""
        if self.state == CLOSED:
            return CLOSED
        now = self._clock()
        if self.is_forgettable(now):
            return CLOSED
        return HALF_OPEN if now >= self._until else OPEN

    def enter(self) -> Probe | None:
        """Pass, with a probe when it is half open. Raises Overloaded."""
        if self.state == CLOSED:
            return None
        now = self._clock()
        if self.is_forgettable(now):
            self._close()
            return None
        self.touched_at = now
        if self.state == OPEN:
            if now < self._until:
                raise _refusal(self._until - now + OPEN_SPREAD * OPEN_S_MIN * self._random())
            self.state, self.changed_at, self._passed = HALF_OPEN, now, 0
        probes = self._probes
        if len(probes) >= PROBES_AT_ONCE:
            left_s = probes[0].began_s + PROBE_S_MAX - now
            if left_s > 0:
                raise _refusal(min(left_s, OPEN_S_MIN) * (1 + OPEN_SPREAD * self._random()))
            del probes[0]
        probe = Probe(self, now)
        probes.append(probe)
        return probe

    def ended(self, began_s: float, outcome: Outcome, probe: Probe | None = None) -> None:
        """How a call that began at `began_s` of the clock ended. What began before the last change says nothing."""
        if probe is not None:
            self._probed(outcome, probe)
        elif self.state == CLOSED and began_s >= self.changed_at:
            if outcome == SUCCEEDED:
                self._succeeded += 1
            elif outcome == FAILED:
                self._count_failure()

    def open(self) -> None:
        """Refuse from now on, for longer than the last time if that was not long ago."""
        now = self._clock()
        soon_again = self.state != CLOSED or now - self.changed_at < CALM_S
        self._open_s = min(OPEN_S_MAX, 2 * self._open_s) if soon_again and self._open_s else OPEN_S_MIN
        self._until = now + self._open_s * (1 + OPEN_SPREAD * self._random())
        self.state, self.changed_at, self.touched_at = OPEN, now, now
        self._probes.clear()

    def is_forgettable(self, now: float) -> bool:
        return now - self.touched_at >= (CALM_S if self.state == CLOSED else FORGET_S)

    def _probed(self, outcome: Outcome, probe: Probe) -> None:
        if probe not in self._probes:
            return  # too late: it was replaced, or another has decided
        self._probes.remove(probe)
        if outcome == FAILED:
            self.open()
        elif outcome == SUCCEEDED:
            self._passed += 1
            if self._passed >= PROBES_TO_CLOSE:
                self._close()

    def _close(self) -> None:
        self.state = CLOSED
        self.changed_at = self.touched_at = self._clock()
        self._probes.clear()
        self._mark = self._mark_before = (self._succeeded, self._failed)
        self._streak = 0

    def _count_failure(self) -> None:
        now = self.touched_at = self._clock()
        totals = (self._succeeded, self._failed)
        passed_s = now - self._window_began
        if passed_s >= WINDOW_S:
            self._mark_before = self._mark if passed_s < 2 * WINDOW_S else totals
            self._mark, self._window_began = totals, now
        if self._streak_seen != self._succeeded:
            self._streak, self._streak_seen = 0, self._succeeded
        self._failed += 1
        self._streak += 1
        failed = self._failed - self._mark_before[1]
        calls = failed + self._succeeded - self._mark_before[0]
        if self._streak >= STREAK or (calls >= CALLS_MIN and failed >= FAILED_PART * calls):
            self.open()


def _refusal(wait_s: float) -> Overloaded:
    wait_ms = max(RETRY_AFTER_MS_MIN, math.ceil(wait_s * 1e3))
    return Overloaded("The tool fails again and again and is not run at this time", retry_after_ms=wait_ms)


class BreakerTable(Generic[Key]):
    """A breaker for each key that has failed lately, at most `keys_max`. A key without one is closed."""

    __slots__ = ("_breakers", "_chance", "_keys_max", "_swept_at", "clock")

    def __init__(
        self, clock: Clock = perf_counter, chance: Callable[[], float] = random.random, keys_max: int = KEYS_MAX
    ) -> None:
        self.clock = clock
        self._chance = chance
        self._keys_max = keys_max
        self._breakers: OrderedDict[Key, Breaker] = OrderedDict()
        self._swept_at = clock()

    def __len__(self) -> int:
        return len(self._breakers)

    @property
    def open_now(self) -> int:
        """How many are not closed. Sweeps: who reads it at each scrape keeps the table small."""
        self.sweep()
        return sum(breaker.state != CLOSED for breaker in self._breakers.values())

    @property
    def state_now(self) -> State:
        """The worst of them. Sweeps too."""
        self.sweep()
        return max((breaker.state_now for breaker in self._breakers.values()), default=CLOSED)

    def enter(self, key: Key) -> Probe | None:
        """As of a breaker. Raises Overloaded."""
        breaker = self._breakers.get(key)
        return None if breaker is None else breaker.enter()

    def ended(self, key: Key, began_s: float, outcome: Outcome, probe: Probe | None = None) -> None:
        if probe is not None:
            probe.breaker.ended(began_s, outcome, probe)
            return
        breaker = self._breakers.get(key)
        if breaker is None:
            if outcome != FAILED:
                return
            breaker = self._add(key)
        elif outcome == FAILED:
            self._breakers.move_to_end(key)
        breaker.ended(began_s, outcome)

    def sweep(self) -> None:
        """Forget those that nothing has happened to for long."""
        now = self._swept_at = self.clock()
        for key in [key for key, breaker in self._breakers.items() if breaker.is_forgettable(now)]:
            del self._breakers[key]

    def clear(self) -> None:
        self._breakers.clear()

    def _add(self, key: Key) -> Breaker:
        if self.clock() - self._swept_at >= CALM_S:
            self.sweep()
        if len(self._breakers) >= self._keys_max:
            self._breakers.popitem(last=False)
        breaker = self._breakers[key] = Breaker(self.clock, self._chance)
        return breaker


class ToolBreaker:
    """One tool's: a breaker for each tenant that has seen it fail lately, and one for all.

    A tenant can choose parameters with which a tool fails, so what one tenant sees closes the tool to that tenant. The
    one for all opens when several see nothing but failures, or when runs of several hang. While `quiet`, nothing has
    failed lately, and neither `enter` nor `ended` needs to be called for a success.
    """

    __slots__ = ("_for_all", "_of_tenants", "_streak", "_tenants_in_streak", "quiet")

    def __init__(self, clock: Clock = perf_counter, chance: Callable[[], float] = random.random) -> None:
        self.quiet = True
        self._for_all = Breaker(clock, chance)
        self._of_tenants: BreakerTable[str] = BreakerTable(clock, chance)
        self._streak = 0
        self._tenants_in_streak: set[str] = set()

    @property
    def state_now(self) -> State:
        """The worst that some tenant meets."""
        state = max(self._for_all.state_now, self._of_tenants.state_now)
        self._settle()
        return state

    def enter(self, tenant: str) -> Probe | None:
        """Before a run: pass, with a probe when it is half open, whose end must be told. Raises Overloaded."""
        if self._for_all.state != CLOSED:
            return self._for_all.enter()
        return self._of_tenants.enter(tenant)

    def ended(
        self, tenant: str, began_s: float, outcome: Outcome, probe: Probe | None = None, abandoned: int = 0
    ) -> None:
        """After a run. `abandoned`: how many of the tool's were given up and still live; 0 if all are one tenant's."""
        if outcome == SUCCEEDED and self._streak:
            self._streak = 0
            self._tenants_in_streak.clear()
        if probe is not None:
            probe.breaker.ended(began_s, outcome, probe)
            self._settle()
        elif self._for_all.state == CLOSED and began_s >= self._for_all.changed_at:
            self._of_tenants.ended(tenant, began_s, outcome)
            if outcome == FAILED:
                self._failed(tenant, abandoned)
                self._settle()

    def _failed(self, tenant: str, abandoned: int) -> None:
        self._streak += 1
        if len(self._tenants_in_streak) < TENANTS_TO_OPEN_ALL:
            self._tenants_in_streak.add(tenant)
        seen_by_many = self._streak >= STREAK and len(self._tenants_in_streak) >= TENANTS_TO_OPEN_ALL
        if seen_by_many or abandoned >= ABANDONED_TO_OPEN_ALL:
            self._for_all.open()
            self._of_tenants.clear()
            self._streak = 0
            self._tenants_in_streak.clear()

    def _settle(self) -> None:
        self.quiet = self._for_all.state == CLOSED and not len(self._of_tenants)
        if self.quiet:
            self._streak = 0
            self._tenants_in_streak.clear()


class NoBreaker(ToolBreaker):
    """ENABLE_CIRCUIT_BREAKERS=false: always quiet, counts nothing."""

    def ended(
        self, tenant: str, began_s: float, outcome: Outcome, probe: Probe | None = None, abandoned: int = 0
    ) -> None:
        return


NO_BREAKER = NoBreaker()


def outcome_of(failure: Failure, error: BaseException | None, parameters: Any, *, cut_short: bool) -> Outcome:
    """What a failed run says of the tool. `error`: what the tool raised, if that is known; `cut_short`: the caller
    gave it less time than it takes at most.

    The caller's own doing says nothing: an error that the tool does not call retryable, a cancellation, a deadline of
    the caller's, a host that is named in the parameters (its origin has a breaker of its own).
    """
    if failure.category == TOOL_TIMEOUT.category:
        return SAYS_NOTHING if cut_short else FAILED
    if failure.category == TOOL_CRASHED.category:
        return FAILED
    if failure.category != TOOL_ERROR.category:
        return SAYS_NOTHING
    if isinstance(error, UpstreamFailed):  # retryable or not: a repeat may do harm, and the server is down all the same
        return FAILED if error.asked and not _names(parameters, error.host) else SAYS_NOTHING
    return FAILED if failure.retryable else SAYS_NOTHING


def _names(parameters: Any, host: str) -> bool:
    """As JSON, since the `repr` of a megabyte of numbers keeps the loop for 0.1 s."""
    try:
        return host.encode() in orjson.dumps(parameters).lower()
    except TypeError:  # not from a door
        return host in repr(parameters).lower()
