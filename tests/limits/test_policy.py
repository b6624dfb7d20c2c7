"""Policies: which calls they bind, by which counters, at which rates."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.limits.limit import DAILY, KINDS, MONTHLY, RATE, WINDOW_US_MAX, Limit, counter_key
from app.limits.policy import (
    DIMENSIONS,
    PERIODS_US,
    QUOTA_MAX,
    RATE_MAX,
    Bound,
    Match,
    Policies,
    Policy,
    Rate,
    parse_rate,
    settings_policies,
    tool_policies,
)

amounts = st.integers(1, RATE_MAX) | st.sampled_from([1, 2, 3, 7, RATE_MAX - 1, RATE_MAX])
units = st.sampled_from(sorted(PERIODS_US))
SOME_RATE = Rate(5, PERIODS_US["minute"], 5)


def names(bound: Bound) -> list[tuple[str, str]]:
    return [(limit.terms.rule, KINDS[limit.terms.kind]) for limit in bound.limits]


def binds_nothing(bound: Bound) -> bool:
    return (bound.limits, bound.slots) == ((), ())


def bind(*policies: Policy, tenant: str = "t", subject: str = "s", limit_class: str = "c", tool: str = "echo") -> Bound:
    return Policies(policies).bind(tenant, subject, limit_class, tool)


@given(amount=amounts, unit=units)
def test_a_rate_says_itself_again_and_lets_as_many_come_at_once(amount: int, unit: str) -> None:
    rate = parse_rate(f"{amount}/{unit}")
    assert rate == (amount, PERIODS_US[unit], amount)
    assert str(rate) == f"{amount}/{unit}"


@given(amount=amounts, unit=units, burst=st.integers(-1, RATE_MAX + 1) | st.integers(1, 400))
def test_a_burst_is_taken_when_it_comes_back_within_a_year(amount: int, unit: str, burst: int) -> None:
    fits = 1 <= burst <= RATE_MAX and Fraction(burst * PERIODS_US[unit], amount) <= WINDOW_US_MAX
    if fits:
        assert parse_rate(f"{amount}/{unit}", burst).burst == burst
    else:
        with pytest.raises(ValueError, match="burst must be 1 to"):
            parse_rate(f"{amount}/{unit}", burst)


def test_the_bound_of_a_burst_is_told_as_it_is() -> None:
    for text in ("1/day", "7/hour", "1000000000/second"):
        with pytest.raises(ValueError, match="burst") as caught:
            parse_rate(text, RATE_MAX * 2)
        highest = int(str(caught.value).split(" to ")[1].split()[0])
        assert parse_rate(text, highest).burst == highest
        with pytest.raises(ValueError, match="burst"):
            parse_rate(text, highest + 1)


OTHER_SPELLINGS = (
    *(
        "",
        "10",
        "/second",
        "0/second",
        "010/second",
        "+1/second",
        "-1/second",
        "1.5/second",
        "1e3/second",
        "1_0/second",
    ),
    *("10/seconds", "10/sec", "10/s", "10/Second", "10/week", "10/month", "10 /second", "10/ second", " 10/second"),
    *("10/second ", "10/second\n", "10/10second", "10 per second", "10/second/minute", "1000000001/second"),
    *("9" * 5000 + "/second", "١٠/second", "1０/second", "10/minute,5/second"),
)


@pytest.mark.parametrize("text", OTHER_SPELLINGS, ids=lambda text: text[:20])
def test_any_other_spelling_of_a_rate_is_refused_with_a_right_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"as 600/minute$"):
        parse_rate(text)


@given(text=st.text(max_size=20) | st.from_regex(r"[0-9]{1,3}/[a-z]{1,7}", fullmatch=True))
def test_no_text_is_a_rate_but_the_one_spelling(text: str) -> None:
    number, _, unit = text.partition("/")
    right = number.isascii() and number.isdigit() and str(int(number)) == number and int(number) and unit in PERIODS_US
    if right:
        assert str(parse_rate(text)) == text
    else:
        with pytest.raises(ValueError, match="a rate is"):
            parse_rate(text)


@given(amount=amounts, unit=units, cost=st.integers(0, RATE_MAX), replicas=st.integers(1, 100))
def test_no_part_of_a_rate_is_rounded(amount: int, unit: str, cost: int, replicas: int) -> None:
    (limit,) = Policies([Policy(name="p", rate=parse_rate(f"{amount}/{unit}"))], replicas).bind("", "", "", "").limits
    for one, shared_by in ((limit.terms, 1), (limit.fallback.terms, replicas)):
        whole_us, rest = one.span(cost)
        assert Fraction(whole_us) + Fraction(rest, one.amount) == Fraction(cost * PERIODS_US[unit] * shared_by, amount)
        assert 0 <= rest < one.amount
        assert one.window == one.span(one.burst)
        assert one.window[0] <= WINDOW_US_MAX * shared_by


def matches(glob: str, text: str) -> bool:
    """The meaning of a glob, spelled out: a table of which beginnings of the text the beginnings of the glob match."""
    row = [True] + [False] * len(text)
    for sign in glob:
        above, row = row, [sign == "*" and row[0]]
        for place, letter in enumerate(text):
            row.append((above[place + 1] or row[place]) if sign == "*" else (above[place] and sign in ("?", letter)))
    return row[-1]


globs = st.text(st.sampled_from("aAb_*?*?[]!-.\\^$\n"), min_size=1, max_size=8)
texts = st.text(st.sampled_from("aAb_[]!-.\\^$*?\n"), max_size=8)


@example(glob="[aA]*?", text="ab", where="tool")
@example(glob="[aA]*?", text="[aA]b", where="tool")
@example(glob="[!a]", text="b", where="subject")
@example(glob="a*b*", text="a\nb", where="tenant")
@given(glob=globs, text=texts, where=st.sampled_from(["tool", "tenant", "subject", "limit_class"]))
def test_a_policy_binds_what_its_glob_matches_and_nothing_else(glob: str, text: str, where: str) -> None:
    caller = {
        "tenant": "T",
        "subject": "S",
        "limit_class": "C",
        "tool": "X",
        where: text,
    }
    policy = Policy(name="p", match=Match(**{where: glob}), rate=SOME_RATE)
    assert names(bind(policy, **caller)) == ([("p", "rate")] if matches(glob, text) else [])


def test_a_glob_with_many_stars_is_decided_at_once() -> None:
    policy = Policy(name="p", match=Match(subject="*a" * 60 + "b"), rate=SOME_RATE)
    assert bind(policy, subject="a" * 20_000).limits == ()


def test_a_policy_binds_only_where_all_of_its_globs_match() -> None:
    policy = Policy(
        name="p",
        match=Match(tool="web_*", tenant="a?", subject="x", limit_class="free"),
        rate=SOME_RATE,
        max_concurrent=2,
    )
    right: dict[str, Any] = {"tool": "web_search", "tenant": "ab", "subject": "x", "limit_class": "free"}
    assert names(bind(policy, **right)) == [("p", "rate")] and len(bind(policy, **right).slots) == 1
    for wrong in ({"tool": "web"}, {"tenant": "abc"}, {"subject": "X"}, {"limit_class": "gold"}):
        assert binds_nothing(bind(policy, **{**right, **wrong}))


def test_limits_come_in_the_order_of_the_policies_whatever_they_match() -> None:
    every = Policy(name="every", rate=SOME_RATE, daily=1, monthly=2)
    echo = Policy(name="echo", match=Match(tool="echo"), monthly=1)
    some = Policy(name="some", match=Match(tool="e*"), daily=3)
    for order in ((every, echo, some), (some, echo, every), (echo, every, some)):
        of = {"every": ["rate", "daily", "monthly"], "echo": ["monthly"], "some": ["daily"]}
        assert names(bind(*order)) == [(policy.name, kind) for policy in order for kind in of[policy.name]]


def test_a_limit_is_what_its_policy_says() -> None:
    policy = Policy(name="p", per=("tenant",), rate=Rate(6, 60_000_000, 9), daily=10, monthly=200, shadow=True)
    limits = Policies([policy], replicas=2).bind("t", "s", "c", "echo").limits
    rate, daily, monthly = (limit.terms for limit in limits)
    assert (rate.kind, rate.amount, rate.period_us, rate.burst) == (RATE, 6, 60_000_000, 9)
    assert (daily.kind, daily.amount, monthly.kind, monthly.amount) == (DAILY, 10, MONTHLY, 200)
    assert [terms.on_failure for terms in (rate, daily, monthly)] == ["local", "closed", "closed"]
    assert all(terms.shadow and terms.rule == "p" for terms in (rate, daily, monthly))
    alone, alone_daily, _ = (limit.fallback.terms for limit in limits)
    assert (alone.period_us, alone.burst, alone_daily.amount) == (120_000_000, 4, 5)


@pytest.mark.parametrize("answer", ["local", "open", "closed"])
def test_an_answer_for_a_store_that_is_away_holds_for_rate_and_quota(answer: Any) -> None:
    bound = bind(Policy(name="p", rate=SOME_RATE, daily=1, monthly=1, on_store_failure=answer))
    assert [limit.terms.on_failure for limit in bound.limits] == [answer] * 3


def test_alone_a_replica_keeps_the_whole_limit() -> None:
    (limit,) = bind(Policy(name="p", rate=SOME_RATE)).limits
    assert limit.fallback is limit


PER = [(), *((one,) for one in DIMENSIONS), ("tenant", "subject"), ("tenant", "tool"), ("subject", "tool"), DIMENSIONS]
who = st.tuples(texts, texts, texts, texts)


@given(per=st.sampled_from(PER), one=who, other=who)
def test_a_counter_is_shared_by_the_callers_that_are_alike_in_what_it_is_kept_by(
    per: tuple[Any, ...], one: tuple[str, str, str, str], other: tuple[str, str, str, str]
) -> None:
    policies = Policies([Policy(name="p", per=per, rate=SOME_RATE, daily=1, monthly=1, max_concurrent=1)])
    first, second = policies.bind(*one), policies.bind(*other)
    place = {"tenant": 0, "subject": 1, "tool": 3}
    alike = all(one[place[dimension]] == other[place[dimension]] for dimension in per)
    assert [a is b for a, b in zip(first.limits, second.limits, strict=True)] == [alike] * 3
    assert (first.slots == second.slots) is alike
    keys = [limit.key for limit in first.limits] + [slot.key for slot in first.slots]
    assert len(set(keys)) == 4, "kinds of one policy have counters of their own"


@given(
    one=st.lists(st.text(max_size=4), max_size=5),
    other=st.lists(st.text(max_size=4), max_size=5),
    cut=st.integers(0, 8),
)
def test_no_choice_of_names_makes_two_counters_one(one: list[str], other: list[str], cut: int) -> None:
    assert (counter_key(*one) == counter_key(*other)) is (one == other)
    joined = "".join(one)
    assert (counter_key(joined[:cut], joined[cut:]) == counter_key(joined)) is False


def test_callers_cannot_be_named_so_that_they_share_a_counter() -> None:
    policies = Policies([Policy(name="p", per=("tenant", "subject"), rate=SOME_RATE)])
    callers = [("a", "b"), ("ab", ""), ("", "ab"), ("a:b", ""), ("a", ":b"), ("b", "a"), ("1:a", "b"), ("a\0", "b")]
    assert len({policies.bind(tenant, subject, "c", "x").limits[0].key for tenant, subject in callers}) == len(callers)


def test_policies_and_what_they_count_by_have_counters_of_their_own() -> None:
    policies = [
        Policy(name="p", per=("tenant",), rate=SOME_RATE),
        Policy(name="p", per=("subject",), rate=SOME_RATE),
        Policy(name="p", per=("tenant", "subject"), rate=SOME_RATE),
        Policy(name="p", rate=SOME_RATE),
        Policy(name="q", per=("tenant",), rate=SOME_RATE),
        Policy(name="p", per=("tenant",), daily=5),
    ]
    assert len({bind(policy, tenant="x", subject="x").limits[0].key for policy in policies}) == len(policies)


def test_a_limit_that_is_changed_goes_on_with_its_counter() -> None:
    before = Policy(name="p", per=("tenant", "tool"), rate=SOME_RATE, daily=5, match=Match(tenant="*"))
    after = Policy(
        name="p", per=("tool", "tenant"), rate=Rate(9, 10**6, 99), daily=7, match=Match(tenant="t"), shadow=True
    )
    assert [limit.key for limit in bind(before).limits] == [limit.key for limit in bind(after).limits]


def test_a_counter_is_the_same_in_every_process() -> None:
    (limit,) = bind(Policy(name="p", per=("tenant",), rate=SOME_RATE)).limits
    assert limit.key == "{limits}:" + limit.key[9:] == counter_key("p", "rate", "tenant", "t")


def test_what_was_bound_once_is_bound_to_the_same_again() -> None:
    policies = Policies([Policy(name="p", per=("tenant",), rate=SOME_RATE, max_concurrent=3)])
    bound = policies.bind("t", "s", "c", "echo")
    assert policies.bind("t", "s", "c", "echo") is bound
    assert policies.bind("t", "other", "other", "other").limits[0] is bound.limits[0]
    assert bound.slots == ((bound.slots[0].key, 3, "p"),)


EACH_AND_ALL = (
    Policy(name="each", per=("subject",), rate=SOME_RATE),
    Policy(name="all", per=("tenant",), rate=SOME_RATE, daily=5),
)


def test_callers_without_end_do_not_fill_the_memory() -> None:
    policies = Policies(EACH_AND_ALL, bounds_kept=100)
    for number in range(1000):
        policies.bind("t", f"caller {number}", "c", "echo")
        assert len(policies) <= 102
    assert len(policies) > 50


def test_a_caller_that_keeps_coming_keeps_its_limits_and_one_that_does_not_gets_equal_ones() -> None:
    policies = Policies(EACH_AND_ALL, bounds_kept=100)
    gone, mine = (policies.bind("t", name, "c", "echo") for name in ("gone", "mine"))
    for number in range(1000):
        other = policies.bind("t", f"caller {number}", "c", "echo")
        assert other.limits[1:] == mine.limits[1:]
        if number % 45 == 0:
            assert policies.bind("t", "mine", "c", "echo") is mine
    back = policies.bind("t", "gone", "c", "echo")
    assert back.limits[0] is not gone.limits[0]
    assert back.limits[0].key == gone.limits[0].key


def test_limits_are_bounded_by_their_number_too() -> None:
    policies = Policies((Policy(name=f"p{number}", per=("subject",), daily=1) for number in range(10)), limits_kept=100)
    for number in range(200):
        policies.bind("t", str(number), "c", "echo")
        assert len(policies) <= 100
    assert len(policies) > 50


callers = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6)), max_size=60)


@given(callers=callers)
def test_a_counter_has_one_limit_however_callers_come_and_are_forgotten(callers: list[tuple[str, int]]) -> None:
    policies = Policies(EACH_AND_ALL, bounds_kept=8)
    lately: list[Bound] = []
    for tenant, subject in callers:
        lately = [*lately, policies.bind(tenant, str(subject), "c", "x")][-4:]
        of_key: dict[str, Limit] = {}
        for limit in (limit for bound in lately for limit in bound.limits):
            assert of_key.setdefault(limit.key, limit) is limit


def test_two_policies_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two policies are named p"):
        Policies([Policy(name="p", daily=1), Policy(name="p", daily=2)])


def test_no_policies_bind_nothing() -> None:
    assert binds_nothing(bind())


def test_settings_limit_each_subject_and_each_tenant() -> None:
    rate, daily, monthly = settings_policies("600/minute", 1000, 20_000)
    assert rate == Policy(name="settings:rate", per=("tenant", "subject"), rate=Rate(600, 60_000_000, 600))
    assert daily == Policy(name="settings:daily", per=("tenant",), daily=1000)
    assert monthly == Policy(name="settings:monthly", per=("tenant",), monthly=20_000)
    assert settings_policies(None, None, None) == ()
    assert [policy.name for policy in settings_policies(None, None, 5)] == ["settings:monthly"]


def test_a_bad_rate_in_the_settings_names_the_variable() -> None:
    with pytest.raises(ValueError, match=r"^LIMITS_RATE: a rate is .* as 600/minute$"):
        settings_policies("10 per second", None, None)


def test_a_tool_is_limited_for_each_tenant_by_every_rate_and_quota_that_it_declares() -> None:
    policies = Policies(tool_policies("echo", ["10/second", "100/minute"], {"daily": 5, "monthly": 50}))
    bound = policies.bind("t", "s", "c", "echo")
    assert names(bound) == [
        ("tool:echo:10/second", "rate"),
        ("tool:echo:100/minute", "rate"),
        ("tool:echo", "daily"),
        ("tool:echo", "monthly"),
    ]
    assert policies.bind("t", "another", "another", "echo").limits == bound.limits
    assert not set(policies.bind("u", "s", "c", "echo").limits) & set(bound.limits)
    assert binds_nothing(policies.bind("t", "s", "c", "echo2"))
    assert names(Policies(tool_policies("echo", [], {"monthly": 5})).bind("t", "s", "c", "echo")) == [
        ("tool:echo", "monthly")
    ]
    assert tool_policies("echo", [], {}) == ()


def test_a_tool_with_a_name_that_begins_like_another_has_limits_of_its_own() -> None:
    policies = Policies([*tool_policies("web", ["1/second"], {}), *tool_policies("web_search", ["2/second"], {})])
    assert names(policies.bind("t", "s", "c", "web")) == [("tool:web:1/second", "rate")]
    assert names(policies.bind("t", "s", "c", "web_search")) == [("tool:web_search:2/second", "rate")]


BAD_DECLARATIONS: dict[str, tuple[Any, Any]] = {
    "rate_limits: a rate is": (["10/second", "10 per second"], {}),
    "rate_limits: a rate is N/second": ([10], {}),
    "rate_limits: one of them is there twice": (["10/second", "10/second"], {}),
    "quotas are daily and monthly, each": ([], {"weekly": 5}),
    f"quotas are daily and monthly, each 1 to {QUOTA_MAX}": ([], {"daily": 0}),
    "quotas are daily and monthly": ([], {"daily": QUOTA_MAX + 1}),
    "quotas are": ([], {"monthly": True}),
    "quotas": ([], {"daily": 1.5}),
}


@pytest.mark.parametrize("reason", BAD_DECLARATIONS)
def test_a_declaration_that_cannot_hold_is_refused_by_the_name_of_the_tool(reason: str) -> None:
    with pytest.raises(ValueError, match=f"^tool 'echo': {reason}"):
        tool_policies("echo", *BAD_DECLARATIONS[reason])


def test_a_limit_is_compared_by_identity() -> None:
    one, other = (Limit("k", "r", DAILY, 1) for _ in range(2))
    assert one != other and len({one, other}) == 2


def test_ten_thousand_callers_in_turn_all_find_what_binds_them() -> None:
    policies = Policies(EACH_AND_ALL)
    first = [policies.bind("t", str(number), "c", "echo") for number in range(10_000)]
    assert all(policies.bind("t", str(number), "c", "echo") is bound for number, bound in enumerate(first))


def test_limits_of_many_callers_share_what_is_the_same_in_all() -> None:
    policies = Policies(EACH_AND_ALL)
    one, other = (policies.bind("t", name, "c", "echo") for name in ("one", "other"))
    assert one.limits[0] is not other.limits[0]
    assert one.limits[0].terms is other.limits[0].terms and one.ask(1).form is other.ask(1).form
