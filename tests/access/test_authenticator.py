"""Who a credential is: over a real database, with clocks of the test's own and every statement counted."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

import pytest

from app.access.authenticator import CONFIRM_EVERY_S, EFFECTIVE_WITHIN_S, LOOKUPS_MAX, REFUSED_MAX
from app.access.credential import CredentialMissing, CredentialRefused
from app.access.memory import KNOWN_MAX, Known, Memory
from app.access.store import QUERY_TIMEOUT_S
from app.calls import LOCAL_CALLER, Caller
from app.errors import DependencyUnavailable, Overloaded, Unauthenticated
from tests.access.keyring import Clock, Keyring, bearer, opened_keyring
from tests.servers import PostgresAt, PostgresServer

pytestmark = pytest.mark.anyio


def questions(ring: Keyring) -> int:
    """How often the database was asked for a key since the last time."""
    count = sum("FROM api_keys" in statement for statement in ring.statements)
    ring.statements.clear()
    return count


async def refused(ring: Keyring, credential: bytes) -> None:
    with pytest.raises(CredentialRefused):
        await ring.identify(credential)


# Known and new credentials


async def test_a_key_is_looked_up_once_and_known_from_then_on(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make(scopes=["tools:read"], tools=["web_*"], limit_class="free")
        ring.statements.clear()
        caller = await ring.identify(credential)
        assert caller == Caller("acme", "planner", frozenset({"tools:read"}), ("web_*",), "free") == key.caller
        assert questions(ring) == 1
        assert ring.recognised(bearer(credential)) is caller and questions(ring) == 0


async def test_a_herd_on_one_new_key_asks_once(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        ring.statements.clear()
        callers = await asyncio.gather(*(ring.identify(credential) for _ in range(200)))
        assert all(caller == key.caller for caller in callers) and questions(ring) == 1


async def test_a_herd_on_one_wrong_key_asks_once_and_each_gets_an_error_of_its_own(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        _, credential = await ring.make()
        ring.statements.clear()
        wrong = credential[:-1] + (b"0" if credential[-1:] != b"0" else b"1")
        errors = await asyncio.gather(*(ring.identify(wrong) for _ in range(200)), return_exceptions=True)
        assert all(isinstance(error, CredentialRefused) for error in errors) and questions(ring) == 1
        assert len({id(error) for error in errors}) == 200


async def test_who_leaves_the_herd_leaves_the_others_alone(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        herd = [asyncio.create_task(ring.identify(credential)) for _ in range(10)]
        await asyncio.sleep(0)
        for left in herd[:5]:  # the one that began the look-up among them
            left.cancel()
        outcomes = await asyncio.gather(*herd, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[:5])
        assert outcomes[5:] == [key.caller] * 5
        assert ring.access.known(credential) == key.caller


async def test_when_all_leave_the_look_up_ends_by_itself_and_leaks_nothing(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        before = asyncio.all_tasks()
        herd = [asyncio.create_task(ring.identify(credential)) for _ in range(3)]
        await asyncio.sleep(0)
        for left in herd:
            left.cancel()
        await asyncio.gather(*herd, return_exceptions=True)
        while rest := asyncio.all_tasks() - before:
            await asyncio.wait(rest, timeout=QUERY_TIMEOUT_S)
        assert ring.access.known(credential) == key.caller


async def test_one_wrong_key_in_a_flood_asks_once_a_second(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        wrong = b"act_" + b"0" * 20 + b"_" + b"1" * 64
        for _ in range(3):
            for _ in range(50):
                await refused(ring, wrong)
            assert questions(ring) == 1
            ring.clock.now_s += 1.001


async def test_a_key_made_after_it_was_refused_is_taken_a_second_later(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        await ring.run_sql("UPDATE api_keys SET revoked_at = created_at")
        await refused(ring, credential)
        await ring.run_sql("UPDATE api_keys SET revoked_at = NULL")
        await refused(ring, credential)
        ring.clock.now_s += 1.001
        assert await ring.identify(credential) == key.caller


async def test_what_is_no_key_at_all_never_reaches_the_database(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        ring.statements.clear()
        for none in (credential[:-1], credential + b"0", credential.upper(), b"act_" + key.id.encode(), b"x", b"a.b.c"):
            await refused(ring, none)
        assert questions(ring) == 0


async def test_wrong_credentials_are_remembered_within_a_bound(tmp_path: Any) -> None:
    async with opened_keyring(f"sqlite+aiosqlite:///{tmp_path}/keys.db") as ring:
        for number in range(REFUSED_MAX + 10):
            await refused(ring, b"%d" % number)
        assert len(ring.access._refused) == REFUSED_MAX


async def test_more_new_credentials_at_once_than_there_is_room_for_are_told_to_come_back(tmp_path: Any) -> None:
    async with opened_keyring(f"sqlite+aiosqlite:///{tmp_path}/keys.db") as ring:
        _, credential = await ring.make()
        strangers = [
            asyncio.create_task(ring.identify(b"act_%020x_%064x" % (number, number))) for number in range(LOOKUPS_MAX)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await ring.identify(credential)
        assert caught.value.retry_after_ms == 1000
        outcomes = await asyncio.gather(*strangers, return_exceptions=True)
        assert all(isinstance(outcome, CredentialRefused | DependencyUnavailable) for outcome in outcomes)
        assert await ring.identify(credential)


async def test_known_credentials_are_kept_within_a_bound_by_their_whole_digest() -> None:
    clock = Clock()
    memory = Memory(clock, clock)
    caller = Caller("acme", "planner")
    for number in range(KNOWN_MAX + 1):
        name = str(number)
        memory.keep(name, hashlib.sha256(name.encode()).digest(), Known(caller, clock() + 1, clock() + 1, clock() + 1))
    assert len(memory) == KNOWN_MAX
    assert memory.caller(hashlib.sha256(b"0").digest()) is None, "the one kept longest went"
    digest = hashlib.sha256(b"1").digest()
    assert memory.caller(digest) is caller
    assert memory.caller(digest[:16]) is None and memory.caller(digest[:31] + b"\x00") is None


async def test_two_credentials_that_share_all_but_their_end_are_two(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        assert await ring.identify(credential) == key.caller
        await refused(ring, credential[:-1] + (b"0" if credential[-1:] != b"0" else b"1"))
        assert ring.access.known(credential) == key.caller


async def test_the_id_of_one_key_with_the_secret_of_another_is_nobody(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        (first, first_credential), (second, second_credential) = await ring.make(), await ring.make(subject="other")
        secrets = [credential.rsplit(b"_", 1)[1] for credential in (first_credential, second_credential)]
        await refused(ring, b"act_" + first.id.encode() + b"_" + secrets[1])
        await refused(ring, b"act_" + second.id.encode() + b"_" + secrets[0])


async def test_no_credential_is_told_apart_from_one_that_is_not_good(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        with pytest.raises(CredentialMissing):
            await ring.access.identify([(b"host", b"localhost")])
        assert issubclass(CredentialMissing, Unauthenticated)


# The end of a key


async def test_a_key_expires_to_the_second_though_nothing_asks_the_database(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make(expires_in="30m")
        assert key.expires_at is not None
        ring.wall.now_s = key.expires_at - 0.001
        assert await ring.identify(credential) == key.caller
        ring.statements.clear()
        ring.wall.now_s = key.expires_at
        assert ring.access.known(credential) is None and questions(ring) == 0
        await refused(ring, credential)


async def test_a_key_that_was_expired_before_it_was_seen_is_refused(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make(expires_in="1s")
        ring.wall.now_s = key.created_at + 1.0
        await refused(ring, credential)


@pytest.mark.parametrize("rounds", [0, 1, 2], ids=["the first", "the second", "the third"])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE api_keys SET revoked_at = created_at WHERE id = :id",
        "DELETE FROM api_keys WHERE id = :id",
        "UPDATE api_keys SET secret_sha256 = 'ff' WHERE id = :id",
        "UPDATE api_keys SET expires_at = created_at WHERE id = :id",
    ],
    ids=["revoked", "deleted", "given another secret", "expired"],
)
async def test_what_happens_to_a_row_takes_effect_with_the_next_round(
    database_url: str, change: str, rounds: int
) -> None:
    async with opened_keyring(database_url) as ring:
        (gone, gone_credential), (kept, kept_credential) = await ring.make(), await ring.make(subject="other")
        ring.wall.now_s = gone.created_at
        await ring.identify(gone_credential)
        await ring.identify(kept_credential)
        for _ in range(rounds):
            await ring.access.confirm()
        await ring.run_sql(change, id=gone.id)
        await ring.access.confirm()
        assert ring.access.known(gone_credential) is None and ring.access.known(kept_credential) == kept.caller
        await refused(ring, gone_credential)


async def test_changed_scopes_and_tools_take_effect_with_the_next_round(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        await ring.identify(credential)
        for scope in ("tools:read", "tools:execute"):
            await ring.run_sql("UPDATE api_keys SET scopes = :scope, tools = '', tenant = 'other'", scope=scope)
            await ring.access.confirm()
            caller = ring.access.known(credential)
            assert caller == Caller("other", key.caller.subject, frozenset({scope}), ())


@pytest.mark.parametrize("asked", ["digest", "find"])
async def test_what_happens_to_a_row_in_the_middle_of_a_round_takes_effect_with_the_next(
    database_url: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        await ring.identify(credential)
        ask = getattr(ring.store, asked)

        async def ask_just_before(key_ids: Sequence[str]) -> Any:
            answer = await ask(key_ids)
            await ring.store.revoke(key.id)
            return answer

        with monkeypatch.context() as patched:
            patched.setattr(ring.store, asked, ask_just_before)
            await ring.access.confirm()
        await ring.access.confirm()
        await refused(ring, credential)


async def test_keys_that_come_and_go_between_rounds_change_nothing_for_the_others(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        made = [await ring.make(subject=f"subject {number}") for number in range(4)]
        for _, credential in made[:3]:
            await ring.identify(credential)
        await ring.access.confirm()
        ring.access.forget(made[0][0].id)
        await ring.identify(made[3][1])
        await ring.store.revoke(made[2][0].id)
        for _ in range(2):
            ring.clock.now_s += CONFIRM_EVERY_S
            await ring.access.confirm()
            known = [ring.access.known(credential) is not None for _, credential in made]
            assert known == [False, True, False, True]
        ring.clock.now_s += EFFECTIVE_WITHIN_S - 0.1
        assert ring.access.known(made[1][1]) == made[1][0].caller, "the last round has confirmed it"


async def test_a_round_asks_in_chunks_and_not_for_each_key(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        credentials = [(await ring.make())[1] for _ in range(20)]
        for credential in credentials:
            await ring.identify(credential)
        await ring.access.confirm()
        for _ in range(2):
            ring.statements.clear()
            await ring.access.confirm()
            assert questions(ring) == 1
        assert all(ring.access.known(credential) for credential in credentials)


async def test_rows_that_did_not_change_are_not_read_again_from_postgresql(postgres: PostgresAt) -> None:
    async with opened_keyring(postgres.create_database()) as ring:
        for _ in range(3):
            await ring.identify((await ring.make())[1])
        await ring.access.confirm()
        ring.statements.clear()
        await ring.access.confirm()
        assert not any("secret_sha256" in statement for statement in ring.statements)


async def test_a_key_revoked_here_is_refused_at_once(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        await ring.identify(credential)
        await ring.store.revoke(key.id)
        ring.access.forget(key.id)
        await refused(ring, credential)


@pytest.mark.parametrize(("rounds", "asked"), [(1, "digest"), (0, "find")])
async def test_a_key_revoked_here_in_the_middle_of_a_round_stays_refused(
    database_url: str, rounds: int, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        for _ in range(2):
            await ring.identify(credential)
        for _ in range(rounds):
            await ring.access.confirm()
        ask = getattr(ring.store, asked)

        async def ask_just_before(key_ids: Sequence[str]) -> Any:
            answer = await ask(key_ids)
            await ring.store.revoke(key.id)
            ring.access.forget(key.id)
            return answer

        with monkeypatch.context() as patched:
            patched.setattr(ring.store, asked, ask_just_before)
            await ring.access.confirm()
        await refused(ring, credential)


# The database away


async def away(ring: Keyring, credential: bytes) -> None:
    with pytest.raises(DependencyUnavailable) as caught:
        await ring.identify(credential)
    assert caught.value.retry_after_ms == 1000


async def test_with_the_table_gone_known_keys_are_good_for_their_time_and_new_ones_wait(database_url: str) -> None:
    async with opened_keyring(database_url, stale_s=60) as ring:
        (key, credential), (_, unseen) = await ring.make(), await ring.make()
        await ring.identify(credential)
        await ring.run_sql("ALTER TABLE api_keys RENAME TO elsewhere")
        await ring.access.confirm()
        assert ring.access.away_s == 0.0 and not ring.access.lets_nobody_in
        await away(ring, unseen)
        ring.clock.now_s += 59.9
        await ring.access.confirm()
        assert ring.access.known(credential) == key.caller, "60 s from when it was confirmed last, not from any failure"
        ring.clock.now_s += 0.1
        assert ring.access.known(credential) is None and ring.access.lets_nobody_in
        await away(ring, credential)
        await ring.run_sql("ALTER TABLE elsewhere RENAME TO api_keys")
        await ring.access.confirm()
        assert ring.access.away_s is None
        assert await ring.identify(credential) == await ring.identify(unseen) == key.caller
        assert not ring.access.lets_nobody_in


async def test_a_failed_look_up_is_not_remembered_as_a_refusal(database_url: str) -> None:
    async with opened_keyring(database_url) as ring:
        key, credential = await ring.make()
        await ring.run_sql("ALTER TABLE api_keys RENAME TO elsewhere")
        await away(ring, credential)
        await ring.run_sql("ALTER TABLE elsewhere RENAME TO api_keys")
        assert await ring.identify(credential) == key.caller


async def test_a_key_that_was_not_confirmed_in_time_is_looked_up(database_url: str) -> None:
    """As after a process stood still: its requests come before its next round of questions."""
    async with opened_keyring(database_url) as ring:
        (key, good), (other, revoked) = await ring.make(), await ring.make()
        await ring.identify(good)
        await ring.identify(revoked)
        await ring.run_sql("UPDATE api_keys SET revoked_at = created_at WHERE id = :id", id=other.id)
        ring.clock.now_s += EFFECTIVE_WITHIN_S - 0.001
        assert ring.access.known(good) == key.caller
        ring.clock.now_s += 0.001
        assert ring.access.known(good) is ring.access.known(revoked) is None
        assert await ring.identify(good) == key.caller
        await refused(ring, revoked)


async def test_a_key_that_was_not_confirmed_in_time_is_good_where_nobody_can_look_it_up(database_url: str) -> None:
    async with opened_keyring(database_url, stale_s=60) as ring:
        key, credential = await ring.make()
        await ring.identify(credential)
        await ring.run_sql("ALTER TABLE api_keys RENAME TO elsewhere")
        ring.clock.now_s += 59.9
        assert ring.access.known(credential) is None
        assert await ring.identify(credential) == key.caller
        ring.clock.now_s += 0.1
        await away(ring, credential)


async def test_the_time_of_day_may_jump_an_hour_and_known_keys_stay_known(database_url: str) -> None:
    async with opened_keyring(database_url, stale_s=60) as ring:
        key, credential = await ring.make()
        await ring.identify(credential)
        for jump_s in (3600, -7200):
            ring.wall.now_s += jump_s
            assert ring.access.known(credential) == key.caller


async def test_a_server_that_is_stopped_costs_two_seconds_at_most_and_is_found_again(
    own_postgres: PostgresServer,
) -> None:
    async with opened_keyring(own_postgres.create_database()) as ring:
        (key, credential), (_, unseen) = await ring.make(), await ring.make()
        await ring.identify(credential)
        own_postgres.pause()
        try:
            started = asyncio.get_running_loop().time()
            herd = [asyncio.create_task(ring.identify(unseen)) for _ in range(50)]
            strangers = [asyncio.create_task(ring.identify(b"act_%020x_%064x" % (n, n))) for n in range(50)]
            outcomes = await asyncio.wait_for(asyncio.gather(*herd, *strangers, return_exceptions=True), 30)
            took_s = asyncio.get_running_loop().time() - started
            assert took_s < 6 * QUERY_TIMEOUT_S, "of 51 questions, 8 at once, nobody waits for the turn of another"
            assert all(isinstance(outcome, DependencyUnavailable) for outcome in outcomes)
            assert ring.access.known(credential) == key.caller
            await asyncio.wait_for(ring.access.confirm(), 30)
            assert ring.access.away_s is not None
            assert ring.access.known(credential) == key.caller
            ring.statements.clear()
            await away(ring, b"act_" + b"1" * 20 + b"_" + b"1" * 64)
            assert questions(ring) == 0, "while it is known to be away, only the rounds ask"
        finally:
            own_postgres.resume()
        for _ in range(20):  # connections that were given up may still be in the way
            await ring.access.confirm()
            if ring.access.away_s is None:
                break
        assert ring.access.away_s is None
        assert await ring.identify(unseen) == key.caller
        assert await ring.identify(credential) == key.caller


# With nobody to ask for


async def test_auto_is_off_while_there_never_was_a_key_and_on_from_the_first(database_url: str) -> None:
    async with opened_keyring(database_url, "auto") as ring:
        assert not ring.access.is_off, "not before the table could be read"
        await ring.access.confirm()
        assert ring.access.is_off and ring.access.keys_exist is False
        assert ring.access.recognised([]) is LOCAL_CALLER
        key, credential = await ring.make()
        await ring.access.confirm()
        assert not ring.access.is_off and ring.access.keys_exist
        with pytest.raises(CredentialMissing):
            await ring.access.identify([])
        assert await ring.identify(credential) == key.caller
        await ring.run_sql("DELETE FROM api_keys")
        await ring.access.confirm()
        await ring.access.confirm()
        assert not ring.access.is_off, "for the life of the process"


async def test_a_revoked_key_counts_as_a_key(database_url: str) -> None:
    async with opened_keyring(database_url, "auto") as ring:
        key, _ = await ring.make()
        await ring.store.revoke(key.id)
        await ring.access.confirm()
        assert not ring.access.is_off


async def test_the_first_use_of_the_first_key_turns_authentication_on(database_url: str) -> None:
    async with opened_keyring(database_url, "auto") as ring:
        await ring.access.confirm()
        key, credential = await ring.make()
        assert ring.access.recognised([]) is LOCAL_CALLER
        assert await ring.identify(credential) == key.caller
        assert not ring.access.is_off and ring.access.recognised([]) is None


async def test_while_off_a_wrong_credential_is_as_good_as_none(database_url: str) -> None:
    async with opened_keyring(database_url, "auto") as ring:
        await ring.access.confirm()
        for headers in (
            bearer(b"act_" + b"0" * 20 + b"_" + b"0" * 64),
            bearer(b"x"),
            [(b"authorization", b"Basic eDp5")],
        ):
            assert await ring.access.identify(headers) is LOCAL_CALLER


async def test_a_table_that_cannot_be_read_means_required(database_url: str) -> None:
    async with opened_keyring(database_url, "auto") as ring:
        await ring.run_sql("ALTER TABLE api_keys RENAME TO elsewhere")
        await ring.access.confirm()
        assert not ring.access.is_off and ring.access.keys_exist is None and ring.access.lets_nobody_in
        with pytest.raises(CredentialMissing):
            await ring.access.identify([])
        await ring.run_sql("ALTER TABLE elsewhere RENAME TO api_keys")
        await ring.access.confirm()
        assert ring.access.is_off


@pytest.mark.parametrize(("stale_s", "good_for_s"), [(600, 600), (0, EFFECTIVE_WITHIN_S)])
async def test_off_stays_off_for_as_long_as_known_keys_would_stay_good(
    database_url: str, stale_s: float, good_for_s: float
) -> None:
    async with opened_keyring(database_url, "auto", stale_s) as ring:
        await ring.access.confirm()
        await ring.run_sql("ALTER TABLE api_keys RENAME TO elsewhere")
        ring.clock.now_s += good_for_s - 0.001
        await ring.access.confirm()
        assert ring.access.is_off
        ring.clock.now_s += 0.001
        assert not ring.access.is_off


def test_a_revocation_that_is_seen_by_the_next_confirmation_is_seen_in_time() -> None:
    assert CONFIRM_EVERY_S + QUERY_TIMEOUT_S < EFFECTIVE_WITHIN_S


async def test_required_is_on_though_there_is_no_key_and_off_is_off_though_there_is(database_url: str) -> None:
    async with opened_keyring(database_url, "required") as ring:
        await ring.access.confirm()
        assert not ring.access.is_off
    async with opened_keyring(database_url, "off") as ring:
        _, credential = await ring.make()
        await ring.access.confirm()
        assert ring.access.is_off and ring.access.recognised(bearer(credential)) is LOCAL_CALLER
