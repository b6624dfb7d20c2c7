"""No secret gets through, by its name or its form, and the work stays in proportion to the text."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.telemetry.redaction import (
    CHARACTERS_MAX,
    DEPTH_MAX,
    HUGE_NUMBER,
    NAME_HINTS,
    REDACTED,
    TOO_DEEP,
    may_hold_guessable,
    redact,
    redact_json,
    redact_text,
)

CANARY = "canary7f3acanary7f3a"
HEX = "0123456789abcdef" * 4
PEM = f"-----BEGIN RSA PRIVATE KEY-----\nMIIE{CANARY}\n{CANARY}==\n-----END RSA PRIVATE KEY-----"

FORMS = [
    f"act_{HEX[:20]}_{HEX}",
    f"prefix-act_{HEX[:20]}_{HEX}",
    f"act_01abc_{CANARY}",
    f"eyJhbGciOiJIUzI1NiJ9.{CANARY}.{CANARY}",
    f"eyJhbGciOiJIUzI1NiJ9.{CANARY}.",
    "AKIACANARY7F3ACANARY",
    "ASIACANARY7F3ACANARY",
    f"AIza{CANARY}{CANARY[:15]}",
    f"ya29.{CANARY}",
    f"ghp_{CANARY}",
    f"github_pat_{CANARY}",
    f"glpat-{CANARY}",
    f"xoxb-{CANARY}",
    f"https://hooks.slack.com/services/T0/B0/{CANARY}",
    f"sk-{CANARY}",
    f"sk_live_{CANARY}",
    PEM,
    PEM.replace("RSA ", ""),
    PEM.replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK"),
    PEM[: PEM.index("-----END")],
    f"Authorization: Bearer {CANARY}",
    f"authorization: Token {CANARY}",
    f"bearer {CANARY}",
    f"Basic {CANARY}==",
    "Basic CanaryCanary",
    f"https://user:{CANARY}@example.org/",
    f"redis://:{CANARY}@example.org:6379/0",
    f"https://{CANARY}@example.org/",
    f"postgresql+asyncpg://user:{CANARY}p@ss@example.org/",
    f"https://example.org/?token={CANARY}&a=b",
    f"https://example.org/?X-Amz-Signature={CANARY}&a=b",
    f"https://example.org/?sv=1&sig={CANARY}%3D",
    f"Cookie: sid={CANARY}; theme=dark{CANARY}",
    f"Set-Cookie: sid={CANARY}; Path=/",
    f"X-Api-Key: {CANARY}",
    f"X-Auth-Key: {CANARY}",
    f"Ocp-Apim-Subscription-Key: {CANARY}",
    f"https://example.org/?app_key={CANARY}&code=1",
    '{"encryptionKey": "' + CANARY + '"}',
    f"host=a password={CANARY} user=b",
    f"password: {CANARY}",
    f'password="two {CANARY} words"',
    f"AccountKey={CANARY};EndpointSuffix=x",
    "{'password': '" + CANARY + "'}",
    '{"api_key": "' + CANARY + '"}',
    '{"access_token":"' + CANARY + '","x":1}',
    "client_secret_value=" + CANARY,
]


def has_canary(text: str) -> bool:
    return "canary" in text.lower() or HEX in text


@pytest.mark.parametrize("secret", FORMS)
def test_a_secret_is_known_by_its_form_in_texts_and_in_json_of_any_depth(secret: str) -> None:
    for text in (secret, f"saw {secret} here", f"line\n{secret}\n", f'quoted "{secret}" é', f"\t{secret}"):
        assert not has_canary(redact_text(text)) and REDACTED in redact_text(text)
        for value in (text, [text], {"inside": [{"deep": text}]}, json.dumps({"note": text}), {text: 1}):
            written = redact_json(orjson.dumps(value))
            assert not has_canary(written.decode()), value
            orjson.loads(written)
            assert not has_canary(str(redact(value)))


NAMES = ["password", "passwd", "PASSWORD", "client_secret", "access_token", "api_key", "x-api-key", "apikey", "token"]
NAMES += ["Authorization", "Set-Cookie", "cookies", "credentials", "private_key", "private-key", "pwd", "access key"]
NAMES += ["auth", "x-auth", "passphrase", "passcode", "AWS_SECRET_ACCESS_KEY", "sshKey", "refreshToken", "signing.key"]
NAMES += [
    "X-Auth-Key",
    "Ocp-Apim-Subscription-Key",
    "x-functions-key",
    "DD-APPLICATION-KEY",
    "consumer_key",
    "masterKey",
]

VALUES: list[Any] = [CANARY, {"any": [CANARY, {"deep": CANARY}]}, [CANARY, 1], {"}": '"]' + CANARY}, f'"{CANARY}\\']


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", VALUES)
def test_a_secret_is_known_by_the_name_that_it_goes_under(name: str, value: Any) -> None:
    whole = {"first": 1, name: value, "inside": [{name: value, "last": "kept"}], "end": None}
    expected = {"first": 1, name: REDACTED, "inside": [{name: REDACTED, "last": "kept"}], "end": None}
    assert redact(whole) == expected
    assert orjson.loads(redact_json(orjson.dumps(whole))) == expected
    assert orjson.loads(redact_json(json.dumps(whole, indent=1).encode())) == expected


@pytest.mark.parametrize("value", [12345, -1.5, True, None])
def test_numbers_are_secrets_under_such_a_name_unless_they_count_tokens(value: Any) -> None:
    whole = {"pin_password": value, "max_tokens": value, "token_count": value, "token": value}
    kept = REDACTED if value is None else value
    expected = {"pin_password": REDACTED, "max_tokens": kept, "token_count": kept, "token": REDACTED}
    assert redact(whole) == expected
    assert orjson.loads(redact_json(orjson.dumps(whole))) == expected


ORDINARY = [
    "GET https://example.org/a@b from mail@example.org, 5 tokens, act_1, passwords differ",
    "a basic understanding of basic information, Basic Authentication explained to the bearer of good news",
    "keyboard keys, monkeys, authors and passages; the task-force-of-risk-assessment-teams",
    "max_tokens=100 tokens: 5",
    "cookie: yes please",
    "https://example.org/act_as_a_team",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_what_only_resembles_a_secret_stays_readable(text: str) -> None:
    assert redact_text(text) == text
    value = {"author": text, "keywords": [text], "passage": 1, "monkey": {"x": 2}}
    assert redact_json(orjson.dumps(value)) == orjson.dumps(value)
    assert redact(value) == value


PIECES = st.sampled_from([*FORMS, *ORDINARY, *NAME_HINTS, "\\", '"', "'", ":", "=", "{", "}", "\n", "é", "\x1b", " "])
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=6).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False, width=16) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.one_of(TEXTS, st.sampled_from(NAMES)), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(value=JSON)
@settings(max_examples=300, deadline=None)
def test_json_stays_json_and_loses_no_more_than_its_secrets(value: Any) -> None:
    written = redact_json(orjson.dumps(value))
    assert shape(orjson.loads(written), value)
    if not any(
        hint in orjson.dumps(value).decode().lower() for hint in (*NAME_HINTS, "canary", "://", "basic", "0123")
    ):
        assert written == orjson.dumps(value)


def shape(redacted: Any, value: Any) -> bool:
    """What is left of a value is the same but for what was replaced."""
    if redacted == REDACTED:
        return True
    if isinstance(value, dict):
        return isinstance(redacted, dict) and (
            len(redacted) < len(value)
            or all(shape(a, b) for a, b in zip(redacted.values(), value.values(), strict=True))
        )
    if isinstance(value, list):
        return isinstance(redacted, list) and all(shape(a, b) for a, b in zip(redacted, value, strict=True))
    if isinstance(value, str):
        return isinstance(redacted, str) and (redacted == value or REDACTED in redacted)
    return bool(redacted == value)


@given(value=JSON, cut=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_the_begin_of_json_holds_no_part_of_a_secret_wherever_it_is_cut(value: Any, cut: float) -> None:
    whole = orjson.dumps(value)
    end = int(len(whole) * cut)
    if not has_canary(redact_json(whole).decode()):  # pieces may be put together to what is no secret any more
        assert not has_canary(redact_json(whole, end).decode("utf-8", "replace"))


@pytest.mark.parametrize("secret", [PEM, f"password={CANARY}", f"eyJhbGciOiJIUzI1NiJ9.{CANARY}.{CANARY}"])
def test_no_part_of_a_secret_is_left_at_a_cut(secret: str) -> None:
    whole = orjson.dumps({"text": "x" * 100 + " " + secret + " " + "y" * 100, "password": {"a": [CANARY]}})
    for end in range(len(whole)):
        assert "canary" not in redact_json(whole, end).decode()


def test_what_a_long_redacted_text_leaves_free_is_not_filled_with_half_a_secret() -> None:
    """Eight thousand characters become ten: what was only looked at to know a secret must not move up."""
    key = f"{'A' * 7_000}{CANARY}"
    looked_at = 2 * CHARACTERS_MAX
    text = f"password={'x' * (CHARACTERS_MAX - 9)}"
    text += "z" * (looked_at - len(text) - 40) + f" token={key}"
    assert not has_canary(redact_text(text)) and "zzz" not in redact_text(text)
    assert not has_canary(redact_text(text[::-1].replace("=drowssap", "password=")[::-1], keep_end=True))


def test_values_are_bounded_in_depth_and_hold_nothing_that_json_cannot() -> None:
    deep: Any = "bottom"
    for _ in range(DEPTH_MAX + 50):
        deep = [deep]
    assert str(redact(deep)).count("[") <= DEPTH_MAX + 2 and TOO_DEEP in str(redact(deep))
    assert redact([2**70, -(2**70), 10**5_000, 2**63]) == [str(2**70), str(-(2**70)), HUGE_NUMBER, 2**63]
    assert redact({1: "a", "b": "\ud800", (2,): b"c"}) == {"1": "a", "b": "?", "(2,)": "b'c'"}
    orjson.dumps(redact([deep, 10**5_000, {"x": "\udfff"}]))


def test_json_that_redaction_would_break_is_taken_out_as_a_whole() -> None:
    whole = b'{"a":"\\u000AKIACANARY7F3ACANARY","b":1}'  # the key's first letter is the escape's last: no key at all
    orjson.loads(whole)
    assert redact_json(whole) == b'"' + REDACTED.encode() + b'"'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"message":"hello"}', False),
        ('{"user":"bob","password":"hunter2"}', True),
        ('{"PASSWORD":"hunter2"}', True),
        ('{"url":"https://bob:hunter2@example.org"}', True),
        ('"Basic Ym9iOmh1bnRlcjI="', True),
        (f'"ghp_{CANARY}"', False),
    ],
)
def test_what_can_be_guessed_is_told_from_what_is_random(text: str, expected: bool) -> None:
    assert may_hold_guessable(text.encode()) == expected


HOSTILE = {
    "name": b"token",
    "assigned": b"token:",
    "quoted": b'token\\"',
    "jwt": b"eyJ",
    "jwt after escapes": b"\\neyJaaaaaaaa.",
    "jwt in parts": b"eyJaaaaaaaa.aaaa",
    "own keys": b"act_a_",
    "long own keys": b"act_aaaaaaaaaaaaaa",
    "pem": b"-----BEGIN PRIVATE KEY-----",
    "pem that never ends": b"-----END ",
    "urls": b"://",
    "userinfo": b"://a@",
    "cookies": b"cookie:",
    "cookie pairs": b"cookie=a",
    "schemes": b"basic ",
    "words after schemes": b"bearer " + b"a" * 79 + b" ",
    "headers": b"authorization:",
    "backslashes": b"\\\\\\\\",
    "aws": b"AKIA",
    "github": b"ghp_",
    "spaces": b"secret        ",
    "equals": b"pwd= ",
    "members": b'{"secret":{"token":',
    "members that are kept": b'{"keyboard":{"author":',
    "lists": b'["secret",',
    "brackets": b'{"secret":' + b"[" * 1000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_work_is_linear_in_a_hostile_text(kind: str) -> None:
    """Four times the text may take ten times as long, for the machine is shared; quadratic work would take sixteen
    times as long, and minutes for the megabyte."""
    part, before, after = HOSTILE[kind], b'{"text":"', b'"}'
    if part.startswith((b"{", b"[")):
        before = after = b""

    def took_s(size: int) -> float:
        data = before + part * (size // len(part)) + after
        times = []
        for _ in range(3 if size < 1_000_000 else 1):
            begin = time.process_time()
            redact_json(data, len(data))
            times.append(time.process_time() - begin)
        return min(times)

    assert took_s(65_536) < max(10 * took_s(16_384), 0.02)
    took_s(1_048_576)


def test_names_hold_a_hint() -> None:
    for name in NAMES:
        assert any(hint in name.lower() for hint in NAME_HINTS), name
    assert all(hint == hint.lower() and re.escape(hint) for hint in NAME_HINTS)


PLAIN = st.sampled_from(
    [*FORMS, *ORDINARY, *NAME_HINTS, *NAMES, CANARY, "api", "_", "-", ".", "s", "=", ": ", "à", "\x85"]
)
FORCED = {"password": "forced"}


@given(value=JSON | st.dictionaries(st.lists(PLAIN, max_size=5).map("".join), st.one_of(JSON, PLAIN), max_size=4))
@settings(max_examples=500, deadline=None)
def test_no_secret_of_json_gets_through_the_net(value: Any) -> None:
    """What is looked at place by place, because a secret stands beside it, comes out the same."""
    for data in (orjson.dumps(value), json.dumps(value, indent=1).encode()):
        beside = redact_json(b"[" + data + b"," + orjson.dumps(FORCED) + b"]")
        assert beside == b"[" + redact_json(data) + b"," + orjson.dumps({"password": REDACTED}) + b"]"


@given(pieces=st.lists(st.one_of(PLAIN, st.text(max_size=4)), max_size=8))
@settings(max_examples=500, deadline=None)
def test_no_secret_of_a_text_gets_through_the_net(pieces: list[str]) -> None:
    text = "".join(pieces)
    if "-----" not in text:  # the begin of a key takes what is behind it
        assert redact_text(text + '\n""\npwd=forced') == redact_text(text) + f'\n""\npwd={REDACTED}'


@pytest.mark.parametrize("name", ["token\x85id", "token\n", 'a_token"', "token\\s", "tokens"])
def test_an_escape_in_a_name_opens_no_hole_in_the_net(name: str) -> None:
    for data in (orjson.dumps({name: 5}), json.dumps({name: 5}).encode()):
        is_secret = name != "tokens"
        assert may_hold_guessable(data) is is_secret
        assert (b"5" not in redact_json(data).rpartition(b":")[2]) is is_secret


RANDOM_FORMS = (f"bearer {CANARY}", f"https://example.org/?X-Amz-Signature={CANARY}&a=b")
THOUGHT_UP = [form for form in FORMS[FORMS.index(f"Authorization: Bearer {CANARY}") :] if form not in RANDOM_FORMS]
THOUGHT_UP.remove(f"https://example.org/?sv=1&sig={CANARY}%3D")
GUESSABLE = st.sampled_from(
    [*THOUGHT_UP, *NAMES, *ORDINARY[1:5], "a", "=", ": ", " ", '"', "à", "\\", "Basic ", CANARY]
)
GUESSABLES = st.lists(GUESSABLE, max_size=4).map("".join)


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | GUESSABLES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(GUESSABLES, inner, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=500, deadline=None)
def test_what_people_think_up_is_seen_before_a_digest(value: Any) -> None:
    for data in (orjson.dumps(value), json.dumps(value, indent=1).encode(), orjson.dumps(json.dumps(value))):
        assert may_hold_guessable(data) or redact_json(data) == data


@pytest.mark.parametrize(
    "text", [*ORDINARY[:3], "https://example.org/a?b=c", '{"author": "Pass", "key": 1, "max_tokens": 5}']
)
def test_words_of_secrets_alone_are_no_secret(text: str) -> None:
    assert not may_hold_guessable(orjson.dumps(text))


SCHEMED = st.sampled_from(
    [
        "basic",
        "Basic",
        "BEARER",
        " ",
        "  ",
        "\t",
        "a",
        "A",
        "7",
        ".",
        "=",
        "aaaa",
        "aaaaaaa",
        "aaaaaA",
        "x" * 79,
        "x" * 80,
        "é",
        ",",
    ]
)


@given(pieces=st.lists(SCHEMED, max_size=8))
@settings(max_examples=1000, deadline=None)
def test_credentials_after_a_scheme_are_told_from_prose_as_they_are_found(pieces: list[str]) -> None:
    data = json.dumps("Basic " + "".join(pieces), ensure_ascii=False).encode()
    beside = redact_json(b"[" + data + b"," + orjson.dumps(FORCED) + b"]")
    found = beside != b"[" + data + b"," + orjson.dumps({"password": REDACTED}) + b"]"
    assert may_hold_guessable(data) == found
