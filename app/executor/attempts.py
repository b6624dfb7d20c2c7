"""Whether a failed run is tried again, and when: what is safe to repeat, what says that it may help, within the call's
deadline and a budget of the tool's, of which a tenant has what its own calls put in.

Decides and never waits; knows no breaker and no run. The executor asks after each failure, and only for tools that
declare `retries`.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from time import perf_counter

from app.errors import TOOL_ERROR, Failure
from app.tools.tool import ToolSpec

BACKOFF_S_MIN = 0.1
"""The most that is waited after the first failure: longer than a reset connection takes, short beside a call."""

BACKOFF_S_MAX = 2.0
"""The most that is waited after any. The call holds its slot meanwhile."""

RUN_S_MIN = 0.02
"""What must be left of the deadline after the wait; with less, the next run would only time out."""

RETRIES_MAX = 10
"""Whatever a tool declares. By then a minute would have passed if there were no deadline."""

CALLS_PER_RETRY = 10
"""What fails for everyone gets a tenth more load, not a multiple of it."""

RESERVE = 3
"""Retries that there are at first, and again after a while: a tool that is called once an hour may be tried again."""

RESERVE_S = 10.0
"""Time in which one retry of the reserve comes back."""

SAVED_MAX = 10
"""Retries that calls without failures can save up: a good hour must not pay for a storm."""

TENANTS_MAX = 1_000
"""Whose own part is counted: tenants whose calls were tried again lately."""


class RetryBudget:
    """A bucket, counted in calls: each call puts one in, each retry takes as many out as there must be for it."""

    __slots__ = ("_calls", "_clock", "_refilled_at")

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._calls = RESERVE * CALLS_PER_RETRY
        self._refilled_at = clock()

    def part(self) -> RetryBudget:
        """One more that holds as much."""
        part = RetryBudget(self._clock)
        part._calls, part._refilled_at = self._calls, self._refilled_at
        return part

    @property
    def is_full(self) -> bool:
        return self._calls >= SAVED_MAX * CALLS_PER_RETRY

    def deposit(self) -> None:
        if not self.is_full:
            self._calls += 1

    def has_one(self) -> bool:
        self._refill()
        return self._calls >= CALLS_PER_RETRY

    def take_one(self) -> None:
        self._calls -= CALLS_PER_RETRY

    def _refill(self) -> None:
        """Up to the reserve, as time has passed since it was last below."""
        now = self._clock()
        room = RESERVE * CALLS_PER_RETRY - self._calls
        if room <= 0:
            self._refilled_at = now
            return
        back = int((now - self._refilled_at) * CALLS_PER_RETRY / RESERVE_S)
        if back > 0:
            self._calls += min(room, back)
            self._refilled_at = now


class Retries:
    """One tool's. `begin` at each call, `wait_s` after each failed run of it. All methods are synchronous."""

    __slots__ = ("_always", "_budget", "_chance", "_clock", "_of_tenants", "_retries_max")

    def __init__(
        self,
        retries: int,
        *,
        always: bool,
        clock: Callable[[], float] = perf_counter,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`always`: a repeat is harmless by what the tool declares; otherwise only a call's key makes it so."""
        self._retries_max = min(retries, RETRIES_MAX)
        self._always = always
        self._clock = clock
        self._chance = chance
        self._budget = RetryBudget(clock)
        self._of_tenants: OrderedDict[str, RetryBudget] = OrderedDict()
        """A tenant without one has all that the tool has."""

    @classmethod
    def of(cls, spec: ToolSpec) -> Retries | None:
        """None for a tool that declares none, which then costs nothing."""
        return cls(spec.retries, always=spec.idempotent or spec.read_only) if spec.retries > 0 else None

    def begin(self, tenant: str) -> None:
        self._budget.deposit()
        if tenant in self._of_tenants:
            own = self._of_tenants[tenant]
            own.deposit()
            if own.is_full:
                del self._of_tenants[tenant]

    def wait_s(
        self, failure: Failure, tenant: str, *, attempts: int, deadline: float, has_key: bool = False
    ) -> float | None:
        """Seconds to wait before the next run, already taken out of the budget; None: the failure stands.

        `attempts`: runs so far. `deadline`: of the call as a whole, seconds of the clock. `has_key`: it has an
        idempotency key, so that its repeat is told from another call.
        """
        if attempts > self._retries_max or not (self._always or has_key) or not _may_help(failure):
            return None
        wait_s = self._backoff_s(attempts)
        if failure.retry_after_ms is not None:
            wait_s += failure.retry_after_ms / 1e3  # not before; after it, spread as always
        if self._clock() + wait_s + RUN_S_MIN > deadline:
            return None
        return wait_s if self._withdraw(tenant) else None

    def _withdraw(self, tenant: str) -> bool:
        """One retry, if the tool has one and the tenant's own calls put it in."""
        own = self._of_tenants.get(tenant) or self._budget.part()
        if not (own.has_one() and self._budget.has_one()):
            return False
        self._budget.take_one()
        own.take_one()
        self._of_tenants[tenant] = own
        self._of_tenants.move_to_end(tenant)
        if len(self._of_tenants) > TENANTS_MAX:
            self._of_tenants.popitem(last=False)
        return True

    def _backoff_s(self, attempts: int) -> float:
        """Full jitter: the whole of the time is drawn, which spreads those who failed together the most
        (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015)."""
        return self._chance() * min(BACKOFF_S_MAX, BACKOFF_S_MIN * (1 << (attempts - 1)))


def _may_help(failure: Failure) -> bool:
    """Only where the tool itself says so. A timeout has used up the deadline; a crash, a result that is too large and
    a cancellation would only come again."""
    return failure.category == TOOL_ERROR.category and failure.retryable
