"""Limit policies: what they say, and which counters a caller's call of a tool meets.

They come from the limits file, from settings and from tools' declarations, and bind the same way. Knows no store and
decides nothing: `admission.py` binds a call here and has its limits decided.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple, get_args

from app.limits.limit import DAILY, KINDS, MONTHLY, RATE, STEPS, WINDOW_US_MAX, Kind, Limit, OnFailure, counter_key
from app.limits.store import Ask

Dimension = Literal["tenant", "subject", "tool"]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)

PERIODS_US = {"second": 1_000_000, "minute": 60_000_000, "hour": 3_600_000_000, "day": 86_400_000_000}

RATE_MAX = 1_000_000_000
"""Calls of a rate, and of its burst: a call a nanosecond, and all arithmetic stays under 2**53."""

QUOTA_MAX = 10**12
CONCURRENT_MAX = 100_000
"""The bounds of LIMITS_QUOTA_* and MAX_CONCURRENT_EXECUTIONS."""

NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")
RESERVED = ("tool:", "settings:")

BOUNDS_KEPT = 50_000
LIMITS_KEPT = 100_000
"""Callers choose the keys where authentication is off. Callers that come in turn all find theirs while they are half as
many; one more, and each would be made anew for each call."""

LET_GO_AT_ONCE = 8
"""For each bound that is made: what is forgotten is gone before more of it comes."""


class Rate(NamedTuple):
    """`amount` calls in `period_us`, of which `burst` may come at once."""

    amount: int
    period_us: int
    burst: int

    def __str__(self) -> str:
        return f"{self.amount}/{next(unit for unit, period_us in PERIODS_US.items() if period_us == self.period_us)}"


RATE_SPELLING = re.compile(rf"([1-9][0-9]{{0,9}})/({'|'.join(PERIODS_US)})")


def parse_rate(text: str, burst: int | None = None) -> Rate:
    """The rate that `text` says, with bursts up to its amount unless given. Raises ValueError."""
    found = RATE_SPELLING.fullmatch(str(text))
    if found is None or int(found[1]) > RATE_MAX:
        raise ValueError(f"a rate is N/second, N/minute, N/hour or N/day with N from 1 to {RATE_MAX}, as 600/minute")
    rate = Rate(int(found[1]), PERIODS_US[found[2]], int(found[1]) if burst is None else burst)
    longest = min(RATE_MAX, WINDOW_US_MAX * rate.amount // rate.period_us)
    if not 1 <= rate.burst <= longest:
        raise ValueError(f"burst must be 1 to {longest} at this rate")
    return rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Globs: `*` is any text, `?` any one character, all else is itself."""

    tool: str = "*"
    tenant: str = "*"
    subject: str = "*"
    limit_class: str = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the calls that match may do together, counted by the dimensions in `per`."""

    name: str
    match: Match = Match()
    per: tuple[Dimension, ...] = ()
    rate: Rate | None = None
    daily: int | None = None
    monthly: int | None = None
    max_concurrent: int | None = None
    """Calls at once on one replica."""
    on_store_failure: OnFailure | None = None
    """None: rates `local`, quotas `closed`."""
    shadow: bool = False
    adaptive: bool = False
    """The rate tightens with the load of the process."""


def matching_no_tool(policies: Iterable[Policy], tool_ids: Collection[str]) -> list[str]:
    """Names of policies that bind no call of these tools."""
    found = []
    for policy in policies:
        test = _test(policy.match.tool)
        if not any(test(tool_id) for tool_id in tool_ids):
            found.append(policy.name)
    return found


class SlotRule(NamedTuple):
    """So many calls of one counter at once, on this replica."""

    key: str
    amount: int
    rule: str


class Bound:
    """Everything that one caller's calls of one tool must pass. Made once and kept, with what every call asks."""

    __slots__ = ("_ask", "_rates", "_tightened", "adaptive", "limits", "slots")

    def __init__(self, limits: tuple[Limit, ...], slots: tuple[SlotRule, ...]) -> None:
        self.limits = limits
        self.slots = slots
        self.adaptive = any(limit.terms.step is not None for limit in limits)
        self._ask: Ask | None = None
        self._tightened: tuple[int, dict[int, Ask]] | None = None
        self._rates: Bound | None = None

    @property
    def rates(self) -> Bound:
        """What an answer that needed no run must pass: it spends rate and no quota."""
        if self._rates is None:
            self._rates = Bound(tuple(limit for limit in self.limits if limit.terms.kind == RATE), ())
        return self._rates

    def ask(self, cost: int) -> Ask:
        """The question of a call of this cost, one object for all calls: the store knows it again. A tool has one
        cost."""
        ask = self._ask
        if ask is None or ask.cost != cost:
            ask = self._ask = Ask(self.limits, cost)
        return ask

    def tightened_ask(self, cost: int, step: int) -> Ask:
        """As `ask`, with adaptive limits at so many tenths of their rate."""
        if self._tightened is None or self._tightened[0] != step:
            self._tightened = (step, {})
        asks = self._tightened[1]
        ask = asks.get(cost)
        if ask is None:
            ask = asks[cost] = Ask(tuple(limit.tightened(step, cost) for limit in self.limits), cost)
        return ask


def settings_policies(rate: str | None, daily: int | None, monthly: int | None) -> tuple[Policy, ...]:
    """LIMITS_RATE for each subject, LIMITS_QUOTA_* for each tenant. Raises ValueError."""
    policies = []
    if rate is not None:
        try:
            parsed = parse_rate(rate)
        except ValueError as error:
            raise ValueError(f"LIMITS_RATE: {error}") from None
        policies.append(Policy(name="settings:rate", per=("tenant", "subject"), rate=parsed))
    if daily is not None:
        policies.append(Policy(name="settings:daily", per=("tenant",), daily=daily))
    if monthly is not None:
        policies.append(Policy(name="settings:monthly", per=("tenant",), monthly=monthly))
    return tuple(policies)


def tool_policies(tool_id: str, rate_limits: Sequence[str], quotas: Mapping[str, int]) -> tuple[Policy, ...]:
    """What a tool declares of itself, for each tenant. Raises ValueError that names the tool."""
    match = Match(tool=tool_id)
    per: tuple[Dimension, ...] = ("tenant", "tool")
    policies: dict[Rate, Policy] = {}
    for text in rate_limits:
        try:
            rate = parse_rate(text)
        except ValueError as error:
            raise ValueError(f"tool {tool_id!r}: rate_limits: {error}") from None
        policies[rate] = Policy(name=f"tool:{tool_id}:{rate}", match=match, per=per, rate=rate)
    if len(policies) < len(rate_limits):
        raise ValueError(f"tool {tool_id!r}: rate_limits: one of them is there twice")
    if not quotas:
        return tuple(policies.values())
    if not quotas.keys() <= {"daily", "monthly"} or not all(_is_quota(amount) for amount in quotas.values()):
        raise ValueError(f"tool {tool_id!r}: quotas are daily and monthly, each 1 to {QUOTA_MAX}")
    daily, monthly = quotas.get("daily"), quotas.get("monthly")
    return (*policies.values(), Policy(name=f"tool:{tool_id}", match=match, per=per, daily=daily, monthly=monthly))


def _is_quota(amount: Any) -> bool:
    return type(amount) is int and 1 <= amount <= QUOTA_MAX


class Policies:
    """All policies, and the counters of each caller and tool that were asked for lately.

    A counter has one Limit for as long as it is kept, whichever tools and callers meet it. What was not asked for
    while half of the room filled anew is forgotten: a counter's state is in the store, not here.
    """

    __slots__ = (
        "_bounds",
        "_bounds_half",
        "_everywhere",
        "_going",
        "_limits",
        "_limits_half",
        "_of_tool",
        "_older_bounds",
        "_older_limits",
        "_replicas",
    )

    def __init__(
        self,
        policies: Iterable[Policy],
        replicas: int = 1,
        *,
        bounds_kept: int = BOUNDS_KEPT,
        limits_kept: int = LIMITS_KEPT,
    ) -> None:
        self._replicas = replicas
        self._bounds_half = bounds_kept // 2
        self._limits_half = limits_kept // 2
        self._everywhere: list[_Rule] = []
        self._of_tool: dict[str, list[_Rule]] = {}
        names = set()
        for place, policy in enumerate(policies):
            if policy.name in names:
                raise ValueError(f"two policies are named {policy.name}")
            names.add(policy.name)
            rules = self._everywhere if _is_glob(policy.match.tool) else self._of_tool.setdefault(policy.match.tool, [])
            rules.append(_Rule(place, policy))
        self._bounds: dict[_Who, Bound] = {}
        self._older_bounds: dict[_Who, Bound] = {}
        self._limits: dict[str, Limit] = {}
        self._older_limits: dict[str, Limit] = {}
        self._going: list[dict[Any, Any]] = []
        """Forgotten, and given back piece by piece."""

    def __len__(self) -> int:
        """Limits that are kept."""
        return len(self._limits.keys() | self._older_limits.keys())

    def bind(self, tenant: str, subject: str, limit_class: str, tool_id: str) -> Bound:
        """What a call must pass: the limits of every policy that matches, in the order of the policies."""
        who = (tenant, subject, limit_class, tool_id)
        return self._bounds.get(who) or self._bind(who)

    def _bind(self, who: _Who) -> Bound:
        bound = self._older_bounds.get(who) or self._bound(who)
        if len(self._bounds) >= self._bounds_half or len(self._limits) + len(bound.limits) > self._limits_half:
            # No order of use has to be kept up on a hit: what was not asked for while a half filled is the older half.
            self._going = [self._older_limits, self._older_bounds]
            self._older_bounds, self._bounds = self._bounds, {}
            self._older_limits, self._limits = self._limits, {}
        self._bounds[who] = bound
        self._limits.update((limit.key, limit) for limit in bound.limits)
        if self._going:
            self._let_go_some()
        return bound

    def _let_go_some(self) -> None:
        """Of what is forgotten: all of it at once would hold the loop for tens of milliseconds."""
        going = self._going[-1]
        for _ in range(min(LET_GO_AT_ONCE, len(going))):
            going.popitem()
        if not going:
            self._going.pop()

    def _bound(self, who: _Who) -> Bound:
        rules = self._everywhere
        if own := self._of_tool.get(who[_TOOL]):
            rules = sorted((*rules, *own), key=attrgetter("place"))
        matching = [rule for rule in rules if rule.matches(who)]
        return Bound(
            tuple(self._limit(rule, who, kind, amount) for rule in matching for kind, amount in rule.amounts),
            tuple(rule.slots(who) for rule in matching if rule.policy.max_concurrent is not None),
        )

    def _limit(self, rule: _Rule, who: _Who, kind: Kind, amount: int) -> Limit:
        key = rule.key(who, KINDS[kind])
        return self._limits.get(key) or self._older_limits.get(key) or rule.limit(key, kind, amount, self._replicas)


_Who = tuple[str, str, str, str]
"""Tenant, subject, limit class, tool id."""
_TOOL = 3
_POSITION: dict[Dimension, int] = {"tenant": 0, "subject": 1, "tool": _TOOL}


def _is_glob(text: str) -> bool:
    return "*" in text or "?" in text


class _Rule:
    """A policy made ready: its globs compiled, its dimensions as places in `_Who`."""

    __slots__ = ("_dimensions", "_tests", "amounts", "place", "policy")

    def __init__(self, place: int, policy: Policy) -> None:
        self.place = place
        self.policy = policy
        match = policy.match
        globs = (match.tenant, match.subject, match.limit_class, match.tool)
        self._tests = tuple((position, _test(glob)) for position, glob in enumerate(globs) if glob != "*")
        self._dimensions = tuple((name, _POSITION[name]) for name in DIMENSIONS if name in policy.per)
        amounts: dict[Kind, int | None] = {
            RATE: policy.rate and policy.rate.amount,
            DAILY: policy.daily,
            MONTHLY: policy.monthly,
        }
        self.amounts = tuple((kind, amount) for kind, amount in amounts.items() if amount is not None)

    def matches(self, who: _Who) -> bool:
        return all(test(who[position]) for position, test in self._tests)

    def key(self, who: _Who, kind: str) -> str:
        """Of name, kind and dimensions alone: a limit that is changed goes on with its counter."""
        parts = (part for name, position in self._dimensions for part in (name, who[position]))
        return counter_key(self.policy.name, kind, *parts)

    def slots(self, who: _Who) -> SlotRule:
        return SlotRule(self.key(who, "slots"), self.policy.max_concurrent or 0, self.policy.name)

    def limit(self, key: str, kind: Kind, amount: int, replicas: int) -> Limit:
        policy = self.policy
        rate = policy.rate if kind == RATE else None
        return Limit(
            key,
            policy.name,
            kind,
            amount,
            period_us=rate.period_us if rate else 0,
            burst=rate.burst if rate else 0,
            shadow=policy.shadow,
            on_failure=policy.on_store_failure or ("local" if rate else "closed"),
            replicas=replicas,
            step=STEPS if policy.adaptive and rate else None,
        )


def _test(glob: str) -> Callable[[str], object]:
    if not _is_glob(glob):
        return glob.__eq__
    # fnmatch's translation is linear in the text; its sets are not ours, so a bracket is made a set of itself.
    return re.compile(fnmatch.translate(glob.replace("[", "[[]"))).match
