"""The form of keys, what a new one may say, and the rows that keep them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import text

from app.access.keys import NewKey, life_s, new_secret, proven, split
from app.access.store import CHUNK_MAX, decode
from app.calls import DEFAULT_SCOPES
from tests.access.keyring import opened_keyring

# The form


def test_a_key_is_its_id_and_256_random_bits_and_splits_one_way_only() -> None:
    made = [new_secret() for _ in range(100)]
    for each in made:
        prefix, key_id, secret = each.credential.split("_")
        assert prefix == "act" and key_id == each.key_id and len(bytes.fromhex(secret)) == 32
        assert split(each.credential.encode()) == (key_id, secret.encode())
    assert len({each.credential for each in made}) == len({each.key_id for each in made}) == 100
    assert [each.key_id[:12] for each in made] == sorted(each.key_id[:12] for each in made), "in the order of making"


@given(st.binary(max_size=120))
def test_nothing_but_a_whole_key_splits(credential: bytes) -> None:
    assert split(credential) is None


@given(st.data())
def test_a_key_with_anything_added_removed_or_replaced_is_another_or_none(data: st.DataObject) -> None:
    whole = new_secret().credential.encode()
    at = data.draw(st.integers(0, len(whole)))
    changed = data.draw(
        st.sampled_from([whole[:at] + b"0" + whole[at:], whole[:at] + whole[at + 1 :], whole[:at] + whole[at:].upper()])
    )
    assert changed == whole or split(changed) is None


def test_only_the_digest_of_a_secret_is_kept() -> None:
    made = new_secret()
    secret = made.credential.rsplit("_", 1)[1]
    assert made.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in made.secret_sha256


def calls_of(work: Callable[[], Any]) -> list[str]:
    """The name of every function that it calls, of C too."""
    called: list[str] = []

    def note(frame: Any, what: str, argument: Any) -> None:
        if what == "call":
            called.append(frame.f_code.co_name)
        elif what == "c_call":
            called.append(argument.__name__)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


@pytest.mark.anyio
async def test_an_unknown_id_and_a_wrong_secret_take_the_same_steps(tmp_path: Any) -> None:
    async with opened_keyring(f"sqlite+aiosqlite:///{tmp_path}/keys.db") as ring:
        key, credential = await ring.make()
        right, wrong = credential.rsplit(b"_", 1)[1], b"0" * 64
    assert proven(key, right) is key and proven(key, wrong) is None and proven(None, wrong) is None
    steps = [calls_of(partial(proven, *given)) for given in ((key, right), (key, wrong), (None, wrong))]
    assert steps[0] == steps[1] == steps[2] and "compare_digest" in steps[2]


# What a new key may say


def test_what_is_not_said_is_the_least_that_is_of_use() -> None:
    caller = NewKey(tenant="acme", subject="planner").caller()
    assert caller.scopes == DEFAULT_SCOPES and "admin" not in caller.scopes
    assert caller.tools == ("*",) and caller.limit_class == "default" and not caller.anonymous


def test_an_empty_list_is_none_and_never_all() -> None:
    caller = NewKey(tenant="acme", subject="planner", scopes=[], tools=[]).caller()
    assert caller.scopes == frozenset() and caller.tools == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("tenant", each) for each in ("", " a", "a ", "a\n", "a\x00b", "a\u202eb", "x" * 257, "\ud800")),
        ("subject", "\t"),
        *(("scopes", [each]) for each in ("", "Admin", "tools execute", "tools:*", "x" * 65, "admin\n", "ádmin")),
        ("scopes", ["a"] * 101),
        ("scopes", "admin"),
        *(("tools", [each]) for each in ("", "web tool", "[a-z]", "a" * 65, "tool\n", "a.b", "!a", "../x")),
        ("limit_class", "no class"),
        *(("expires_in", each) for each in ("", "0d", "90", "d", "-1d", "1.5h", "90 d", "1w", "９d", "36501d", "1d\n")),
        ("admin", True),
    ],
)
def test_what_a_key_may_not_say_is_refused_by_name_and_without_its_value(name: str, value: Any) -> None:
    given = {"tenant": "acme", "subject": "planner", name: value}
    with pytest.raises(ValidationError) as caught:
        NewKey.model_validate(given)
    (error,) = caught.value.errors()[:1]
    assert error["loc"][0] == name
    assert "input_value" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90d", 7_776_000), ("12h", 43_200), ("30m", 1_800), ("45s", 45), ("36500d", 3_153_600_000)]
)
def test_a_life_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert life_s(text) == seconds


# The rows


@pytest.mark.anyio
async def test_a_key_comes_back_as_it_was_made(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, _ = await ring.make(
            tenant="Ünï tenant",
            scopes=["admin", "a.b:c-d_e"],
            tools=["web_*", "e?ho"],
            limit_class="free",
            expires_in="90d",
        )
        (row,) = await ring.store.find([key.id])
        found = decode(row)
        assert found is not None and found.caller == key.caller and found.secret_sha256 == key.secret_sha256
        assert found.expires_at == key.created_at + 90 * 86_400
        assert found.created_at == key.created_at and found.revoked_at is None


@pytest.mark.anyio
async def test_no_column_of_no_row_holds_a_secret(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        _, credential = await ring.make()
        secret = credential.rsplit(b"_", 1)[1].decode()
        async with ring.engine.connect() as connection:
            rows = list(await connection.execute(text("SELECT * FROM api_keys")))
        assert len(rows) == 1 and secret not in str(rows) and hashlib.sha256(secret.encode()).hexdigest() in str(rows)
        assert secret not in str(ring.statements)


@pytest.mark.anyio
async def test_two_keys_of_one_principal_are_good_at_once_and_end_one_by_one(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        (old, old_credential), (_, new_credential) = await ring.make(), await ring.make()
        assert await ring.identify(old_credential) == await ring.identify(new_credential)
        await ring.store.revoke(old.id)
        await ring.access.confirm()
        assert await ring.identify(new_credential)
        assert ring.access.known(old_credential) is None


@pytest.mark.anyio
async def test_a_second_revocation_changes_nothing_and_one_of_no_key_says_so(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, _ = await ring.make()
        first, second = await ring.store.revoke(key.id), await ring.store.revoke(key.id)
        assert first is not None and first.revoked_at is not None and first == second
        for nobody in ("0" * 20, "", "' OR '1'='1", "\x00", "\ud800", key.id.upper() + "x"):
            assert await ring.store.revoke(nobody) is None


@pytest.mark.anyio
async def test_pages_follow_one_another_in_the_order_of_making(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        made = sorted([(await ring.make())[0].id for _ in range(5)])
        first, after = await ring.store.page(2, "")
        assert [key.id for key in first] == made[:2] and after == made[1]
        second, after = await ring.store.page(3, after)
        assert [key.id for key in second] == made[2:] and after is None
        assert [key.id async for key in ring.store.all()] == made


@pytest.mark.anyio
async def test_as_many_rows_as_a_chunk_holds_are_found_at_once(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, _ = await ring.make()
        ids = [f"{number:020x}" for number in range(CHUNK_MAX - 1)]
        assert [row[0] for row in await ring.store.find([*ids, key.id])] == [key.id]


@pytest.mark.anyio
@pytest.mark.parametrize("column", ["scopes", "created_at"])
async def test_a_row_that_is_no_key_spoils_no_other(tmp_path: Any, column: str) -> None:
    async with opened_keyring(f"sqlite+aiosqlite:///{tmp_path}/keys.db") as ring:
        (bad, bad_credential), (good, good_credential) = await ring.make(), await ring.make()
        await ring.run_sql(f"UPDATE api_keys SET {column} = x'00ff' WHERE id = :id", id=bad.id)
        assert [key.id async for key in ring.store.all()] == [good.id]
        assert await ring.identify(good_credential)
        with pytest.raises(Exception, match="not good"):
            await ring.identify(bad_credential)
