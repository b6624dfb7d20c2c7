"""Records of idempotency keys: one behaviour, in Redis and in a file."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.cache.store import KEPT_MS, digest, key_of
from tests.cache.stores import LEASE_MS, SHORT_MS, Store, in_file, in_redis
from tests.servers import RedisAt

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["redis", "file"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "file":
        opened = in_file(tmp_path / "folder" / "keys.db")
    else:
        redis: RedisAt = request.getfixturevalue("redis")
        redis.cli("FLUSHDB")
        opened = in_redis(redis)
    async with opened as one:
        yield one


async def test_the_first_begins_and_repeats_hear_that_it_runs_and_for_how_long(store: Store) -> None:
    assert await store.begin("first") == ("begun", "first", 0, b"")
    state, token, left_ms, body = await store.begin("second")
    assert (state, token, body) == ("running", "first", b"")
    assert 0 < left_ms <= LEASE_MS


async def test_what_came_of_it_is_given_again_byte_for_byte(store: Store) -> None:
    body = bytes(range(256)) * 4_000
    await store.begin("first")
    assert await store.finish("first", body)
    for token in ("second", "third"):
        assert await store.begin(token) == ("done", "first", 0, body)


async def test_a_key_stands_for_one_call_whatever_became_of_it(store: Store) -> None:
    await store.begin("first")
    assert await store.begin("second", "another") == ("other", "first", 0, b"")
    await store.finish("first", b"body")
    assert await store.begin("second", "another", take_over=True) == ("other", "first", 0, b"")


async def test_an_ended_lease_leaves_an_unknown_outcome(store: Store) -> None:
    await store.begin("first", lease_ms=SHORT_MS)
    await store.pass_ms(SHORT_MS)
    assert await store.begin("second") == ("unknown", "first", 0, b"")
    assert await store.begin("second", "another") == ("other", "first", 0, b"")


async def test_an_ended_lease_is_taken_over_where_a_repeat_is_harmless(store: Store) -> None:
    await store.begin("first", lease_ms=SHORT_MS)
    assert (await store.begin("second", take_over=True)).state == "running", "not before it has ended"
    await store.pass_ms(SHORT_MS)
    assert await store.begin("second", take_over=True) == ("begun", "second", 0, b"")
    assert (await store.begin("third", take_over=True))[:2] == ("running", "second")


async def test_a_late_finisher_overwrites_nothing_newer(store: Store) -> None:
    await store.begin("first", lease_ms=SHORT_MS)
    await store.pass_ms(SHORT_MS)
    await store.begin("second", take_over=True)
    assert not await store.finish("first", b"late")
    assert (await store.begin("third"))[:2] == ("running", "second")
    assert await store.finish("second", b"new")
    assert not await store.finish("first", b"later still")
    assert (await store.begin("third")).body == b"new"


async def test_a_finisher_that_is_late_and_alone_is_heard(store: Store) -> None:
    await store.begin("first", lease_ms=SHORT_MS)
    await store.pass_ms(SHORT_MS)
    assert await store.finish("first", b"body")
    assert await store.begin("second") == ("done", "first", 0, b"body")


async def test_an_outcome_is_written_once(store: Store) -> None:
    await store.begin("first")
    assert await store.finish("first", b"one")
    assert not await store.finish("first", b"two")
    assert (await store.begin("second")).body == b"one"


async def test_a_claim_given_back_is_free_for_any_call(store: Store) -> None:
    await store.begin("first")
    await store.release("first")
    assert (await store.begin("second", "another")).state == "begun"


async def test_nobody_gives_back_what_is_not_theirs_or_has_ended(store: Store) -> None:
    await store.begin("first")
    await store.release("second")
    assert (await store.begin("third"))[:2] == ("running", "first")
    await store.finish("first", b"body")
    await store.release("first")
    assert (await store.begin("third")).state == "done"


async def test_an_outcome_whose_claim_was_lost_is_kept_and_one_that_came_before_it_stays(store: Store) -> None:
    """The store forgot the claim while its call ran. Whoever began since then is not overwritten."""
    assert await store.finish("first", b"body")
    assert await store.begin("second") == ("done", "first", 0, b"body")
    assert await store.begin("second", "another") == ("other", "first", 0, b"")
    assert not await store.finish("second", b"later")
    await store.begin("third", key="anew")
    assert not await store.finish("first", b"body", key="anew")
    assert (await store.begin("fourth", key="anew"))[:2] == ("running", "third")


async def test_what_never_began_is_given_back_without_a_trace(store: Store) -> None:
    await store.release("first")
    assert (await store.begin("second")).state == "begun"


async def test_of_fifty_at_once_one_begins(store: Store) -> None:
    claims = await asyncio.gather(*(store.begin(str(number)) for number in range(50)))
    assert Counter(claim.state for claim in claims) == {"begun": 1, "running": 49}
    begun = next(claim.token for claim in claims if claim.state == "begun")
    assert {claim.token for claim in claims} == {begun}


async def test_of_fifty_that_take_over_at_once_one_begins(store: Store) -> None:
    await store.begin("first", lease_ms=SHORT_MS)
    await store.pass_ms(SHORT_MS)
    claims = await asyncio.gather(*(store.begin(str(number), take_over=True) for number in range(50)))
    assert Counter(claim.state for claim in claims) == {"begun": 1, "running": 49}


async def test_keys_are_apart(store: Store) -> None:
    names = [key_of("idempotency", tenant, subject, "t", "k") for tenant, subject in (("a", "bc"), ("ab", "c"))]
    for name in names:
        assert (await store.begin(name, key=name)).state == "begun"
        await store.finish(name, name.encode(), key=name)
    assert [(await store.begin("later", key=name)).body for name in names] == [name.encode() for name in names]


async def test_a_record_is_forgotten_after_its_day(tmp_path: Path, redis: RedisAt) -> None:
    """In the file by its clock; in Redis the server does it, by the time that it was told."""
    async with in_file(tmp_path / "keys.db") as store:
        await store.begin("first")
        await store.pass_ms(1_000)
        await store.finish("first", b"body")
        await store.pass_ms(KEPT_MS - 1)
        assert (await store.begin("second")).state == "done"
        await store.pass_ms(1)
        assert (await store.begin("second")).state == "begun"
    redis.cli("FLUSHDB")
    async with in_redis(redis) as store:
        await store.begin("first", key="running")
        await store.begin("first", key="long", lease_ms=2 * KEPT_MS)
        await store.begin("first", key="done")
        await store.finish("first", b"body", key="done")
        left_ms = {key: int(redis.cli("PTTL", key)) for key in ("running", "long", "done")}
        assert all(KEPT_MS - 60_000 < left_ms[key] <= KEPT_MS for key in ("running", "done"))
        assert left_ms["long"] > KEPT_MS, "a record never ends before its lease"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "bc"), ("ab", "c")),
        (("a:b", "c"), ("a", "b:c")),
        (("a", "", "b"), ("a", "b", "")),
        (("1:a",), ("1", "a")),
        (("a\0b",), ("a", "b")),
        (("é",), ("e\u0301",)),
        (("\ud800",), ("\ufffd",)),
        (("3:abc1:d",), ("abc", "d")),
    ],
)
def test_parts_never_run_into_each_other(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert digest(*one) != digest(*other)
    assert key_of("kind", *one) != key_of("kind", *other)


def test_keys_of_one_tenant_share_a_tag_and_those_of_others_only_by_its_chance() -> None:
    """A Cluster hashes what is in the braces alone; the rest of the key is of all parts, the tenant too."""
    own = [key_of("idempotency", "acme", part) for part in ("a", "b")]
    tags = {key.partition("{")[2].partition("}")[0] for key in own}
    assert len(tags) == 1 and len(set(own)) == 2
    assert all(key.count("{") == key.count("}") == 1 for key in own)
    other = key_of("idempotency", "acme}", "a")
    assert other.partition("{")[2] != own[0].partition("{")[2]
    assert other.rpartition(":")[2] != own[0].rpartition(":")[2]
