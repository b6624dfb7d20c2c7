"""A record is a row that every store takes, whatever the call held, and never larger than what was reserved."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.calls import Caller, Execution, ToolCall, new_execution_id
from app.errors import TOOL_TIMEOUT, InternalError, failure
from app.execution_log.columns import COLUMNS
from app.execution_log.record import LABELS_MAX, NESTING_MAX, WHOLE_BYTES_MAX, Payloads, Recorder, identity
from app.execution_log.segments import RECORD_BYTES_MAX
from app.telemetry.redaction import REDACTED

CANARY = "canary7f3acanary7f3a"
LEVELS: tuple[Payloads, ...] = ("off", "metadata", "full")


def record_of(
    parameters: Any = None,
    result: bytes | None = b"{}",
    *,
    level: Payloads = "full",
    payload_bytes_max: int = 4096,
    tenant: str = "acme",
    subject: str = "bob",
    agent_id: str | None = None,
    version: str = "1.0.0",
    cost: int = 1,
    client_gone: bool = False,
    **execution: Any,
) -> bytes:
    execution_id = new_execution_id()
    call = ToolCall(execution_id, "echo", parameters, Caller(tenant, subject), 0.0, agent_id=agent_id)
    usual = Execution(
        execution_id, "echo", "success", result, None, None, 0.25, 0.5, 1_800_000_000.0, 1, "0123456789abcdef"
    )
    ended = replace(usual, **execution)
    recorder = Recorder(payload_bytes_max)
    record = recorder.record(call, ended, version, cost, level, client_gone)
    assert len(record) <= recorder.bytes_max(level)
    return record


def row_of(*arguments: Any, **options: Any) -> dict[str, Any]:
    values = orjson.loads(record_of(*arguments, **options))
    return dict(zip(COLUMNS, values, strict=True))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_record_holds_every_column_in_its_order() -> None:
    row = row_of({"b": 1, "a": [True, None]}, b'{"x":"y"}', agent_id="agent-7", cost=3, cached=True, client_gone=True)
    assert row.pop("execution_id")[14] == "7"
    assert row == {
        "tool_id": "echo",
        "tool_version": "1.0.0",
        "tenant": "acme",
        "subject": "bob",
        "agent_id": "agent-7",
        "status": "success",
        "error_type": None,
        "error_code": None,
        "started_at": 1_800_000_000.0 - 0.75,
        "finished_at": 1_800_000_000.0,
        "execution_ms": 250.0,
        "overhead_ms": 500.0,
        "attempts": 1,
        "cached": True,
        "client_gone": True,
        "trace_id": "0123456789abcdef",
        "cost": 3,
        "parameters": {"a": [True, None], "b": 1},
        "parameters_bytes": 23,
        "parameters_sha256": digest(b'{"a":[true,null],"b":1}'),
        "result": {"x": "y"},
        "result_bytes": 9,
        "result_sha256": digest(b'{"x":"y"}'),
    }


def test_how_a_call_failed_is_in_its_row() -> None:
    timed_out = row_of({}, None, status="timeout", error=failure(TOOL_TIMEOUT, "too slow"))
    assert (timed_out["status"], timed_out["error_type"], timed_out["error_code"]) == (
        "timeout",
        "timeout",
        "TOOL_TIMEOUT",
    )
    assert timed_out["result"] is timed_out["result_bytes"] is timed_out["result_sha256"] is None
    broken = row_of({}, None, status="failed", refusal=InternalError())
    assert (broken["status"], broken["error_type"], broken["error_code"]) == ("failed", "internal", None)


def test_durations_are_those_of_the_answer() -> None:
    for run_s in (0.0, 1e-7, 0.000412345, 12.3456784, 3599.9999996):
        row = row_of({}, run_s=run_s)
        assert row["execution_ms"] == pytest.approx(round(run_s * 1e3, 3), abs=0.0011)


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_keeps_what_it_says(level: Payloads) -> None:
    row = row_of({"a": 1}, b'{"b":2}', level=level)
    kept = {name: value for name, value in row.items() if name.startswith(("parameters", "result"))}
    metadata = {
        "parameters_bytes": 7,
        "parameters_sha256": digest(b'{"a":1}'),
        "result_bytes": 7,
        "result_sha256": digest(b'{"b":2}'),
    }
    contents = {"parameters": {"a": 1}, "result": {"b": 2}}
    nothing = dict.fromkeys((*metadata, *contents))
    assert kept == {"off": nothing, "metadata": nothing | metadata, "full": metadata | contents}[level]


@pytest.mark.parametrize("level", ["metadata", "full"])
def test_the_same_parameters_have_the_same_digest_in_any_order(level: Payloads) -> None:
    one, other = (
        row_of({"a": 1, "b": {"c": 2, "d": 3}}, level=level),
        row_of({"b": {"d": 3, "c": 2}, "a": 1}, level=level),
    )
    assert one["parameters_sha256"] == other["parameters_sha256"]


SECRETS = [{"password": CANARY}, {"text": f"https://bob:{CANARY}@example.org"}, {"deep": [{"token": {"is": CANARY}}]}]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("level", LEVELS)
def test_no_secret_is_in_a_row_nor_can_one_be_found_by_trying(secret: Any, level: Payloads) -> None:
    written = orjson.dumps(secret)
    record = record_of(secret, written, level=level, agent_id=f"act_01ab_{CANARY}")
    assert CANARY.encode() not in record and digest(written).encode() not in record
    other = orjson.dumps(orjson.loads(written.replace(CANARY.encode(), b"guess1guess1guess1")))
    if level != "off":
        row, guessed = row_of(secret, written, level=level), row_of(orjson.loads(other), other, level=level)
        assert row["parameters_sha256"] == guessed["parameters_sha256"] is not None
        assert row["result_sha256"] == guessed["result_sha256"] is not None
        assert row["result_bytes"] == len(written)


def test_where_a_large_payload_may_hold_what_can_be_guessed_there_is_no_digest() -> None:
    filling = "x" * WHOLE_BYTES_MAX
    row = row_of({"filling": filling, "password": CANARY}, orjson.dumps({"filling": filling}), level="metadata")
    assert row["parameters_sha256"] is None and row["parameters_bytes"] > WHOLE_BYTES_MAX
    assert row["result_sha256"] == digest(orjson.dumps({"filling": filling}))


@pytest.mark.parametrize("size", [3_000, WHOLE_BYTES_MAX - 100, WHOLE_BYTES_MAX + 100, 1_048_576])
def test_a_payload_over_the_cap_is_kept_as_a_text_of_its_begin(size: int) -> None:
    whole = orjson.dumps({"message": "é" * (size // 2), "password": CANARY})
    record = record_of({}, whole, payload_bytes_max=1_000)
    row = dict(zip(COLUMNS, orjson.loads(record), strict=True))
    assert isinstance(row["result"], str) and row["result"].startswith('{"message":"éé')
    assert 900 < len(orjson.dumps(row["result"])) <= 1_000
    assert row["result_bytes"] == len(whole)
    assert CANARY not in row["result"]


@pytest.mark.parametrize("where", range(0, 120, 3))
@pytest.mark.parametrize("filling", [b"x", b"y" * WHOLE_BYTES_MAX])
def test_no_cut_shows_a_part_of_a_secret(where: int, filling: bytes) -> None:
    whole = b'{"a":"' + b"-" * where + b" token=" + CANARY.encode() * 4 + b'","b":"' + filling + b'"}'
    assert b"canary" not in record_of({}, whole, payload_bytes_max=64)


@given(
    data=st.recursive(st.text() | st.integers(-9, 9), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
@settings(max_examples=200, deadline=None)
def test_whatever_is_cut_is_json_within_the_cap(data: Any) -> None:
    whole = orjson.dumps(data)
    for cap in (64, 65, 66, 67):
        row = row_of(data, whole, payload_bytes_max=cap)
        for kept in (row["parameters"], row["result"]):
            assert len(orjson.dumps(kept)) <= cap


@pytest.mark.parametrize("cap", range(64, 90))
@pytest.mark.parametrize("text", ["\\", '"\\', "\x07", "a\x07\\", '\\\\"', "u00\\u00", "\x07\x07é"])
def test_no_cut_leaves_half_an_escape(text: str, cap: int) -> None:
    whole = orjson.dumps([text * 60])
    kept = row_of({}, whole, payload_bytes_max=cap)["result"]
    assert whole.decode().startswith(kept)
    assert cap - 12 <= len(orjson.dumps(kept)) <= cap


POISON = ["\x00", "a\x00b", "\ud800", "x\udfff", "\\u0000", "\\\x00\\", "\u202eabc", "é" * 300, '"' * 5_000, "\x1b[0m"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("poison", POISON)
def test_poison_is_taken_out_before_it_is_queued(poison: str, level: Payloads) -> None:
    row = row_of(
        {"text": poison, poison: [poison]},
        orjson.dumps({"a": poison.encode("utf-8", "replace").decode()}),
        level=level,
        tenant=poison,
        subject=poison,
        agent_id=poison,
        version=poison,
        trace_id=poison,
        tool_id=poison,
    )
    for text in texts_of(row):
        assert "\x00" not in text
        text.encode()
    for name in ("tenant", "subject", "agent_id"):
        assert len(row[name].encode()) <= 1024
    assert row["tenant"] == row["subject"] != ""


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for text in texts_of(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts_of(item)]
    return []


def test_an_escaped_backslash_before_u0000_is_no_poison() -> None:
    text = "a \\u0000 b \\\\u0000"
    assert row_of({"text": text}, orjson.dumps([text]))["result"] == [text]
    assert row_of({"text": text})["parameters"] == {"text": text}


def nested(depth: int) -> Any:
    value: Any = "bottom"
    for _ in range(depth):
        value = [value]
    return value


ODD = [
    2**70,
    -(2**70),
    10**5_000,
    float("nan"),
    float("inf"),
    {1: 2},
    {"set": {1}},
    b"bytes",
    object(),
    nested(100),
    nested(5_000),
    None,
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", ODD, ids=lambda value: str(type(value)))
def test_nothing_that_parameters_can_be_keeps_a_call_from_its_row(value: Any, level: Payloads) -> None:
    for parameters in (value, {"value": value}, [value]):
        row = row_of(parameters, level=level)
        assert row["status"] == "success" and (row["parameters_bytes"] is None) == (level == "off")


class Fails(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("no items")


def test_a_payload_that_cannot_be_written_at_all_is_null_and_the_row_lands(caplog: pytest.LogCaptureFixture) -> None:
    row = row_of({"inner": Fails(a="\ud800")})
    assert row["status"] == "success" and row["parameters"] is row["parameters_bytes"] is row["result"] is None
    assert "payload of a record failed" in caplog.text


def test_numbers_beyond_what_columns_take_do_not_keep_a_row_from_landing() -> None:
    assert row_of({}, cost=2**80)["cost"] == 2**63 - 1


def test_deep_payloads_are_kept_as_text() -> None:
    deep, shallow = orjson.dumps(nested(NESTING_MAX + 1)), orjson.dumps(nested(NESTING_MAX))
    assert row_of({}, deep)["result"] == deep.decode()
    assert row_of({}, shallow)["result"] == nested(NESTING_MAX)
    flat = orjson.dumps([[]] * 200)
    assert row_of({}, flat)["result"] == [[]] * 200
    brackets = orjson.dumps("[" * 200)
    assert row_of({}, brackets)["result"] == "[" * 200


@given(one=st.text(max_size=400), other=st.text(max_size=400))
@settings(max_examples=300)
def test_no_two_tenants_become_one_in_the_log(one: str, other: str) -> None:
    assert (identity(one) == identity(other)) == (one == other)
    assert len(identity(one).encode()) <= 1024


def test_tenants_that_are_long_or_hold_poison_keep_apart() -> None:
    assert identity("acme") == "acme"
    assert len({identity("x" * 300), identity("x" * 301), identity("a\x00"), identity("a"), identity("a\ud800")}) == 5
    assert len(identity("é" * 1_000)) <= 256


@given(st.text(st.sampled_from("\x00\x1f\x7f\u202eé a~") | st.characters(codec="utf-8"), max_size=300))
def test_a_row_has_the_tenant_that_its_identity_says(tenant: str) -> None:
    assert row_of({}, b"1", tenant=tenant)["tenant"] == identity(tenant)


def test_labels_are_remembered_within_bounds() -> None:
    recorder = Recorder(64)
    call = ToolCall(new_execution_id(), "echo", {}, Caller("t", "s"), 0.0)
    ended = Execution(call.execution_id, "echo", "success", b"1", None, None, 0.0, 0.0, time.time(), 1, "t")
    for number in range(LABELS_MAX + 100):
        labelled = replace(call, agent_id=f"agent-{number}", caller=Caller(f"é{number}", "x" * 1_000_000))
        if number > 10:
            labelled = replace(labelled, caller=Caller(f"é{number}", f"è{number}"))
        recorder.record(labelled, ended, "1", 1, "metadata")
    remembered = [*recorder._labels, *recorder._identities]
    assert len(remembered) <= 2 * LABELS_MAX + 1 and max(map(len, remembered)) <= 256


def test_what_is_reserved_for_the_largest_payloads_fits_a_frame() -> None:
    assert Recorder(1_048_576).bytes_max("full") <= RECORD_BYTES_MAX
    assert Recorder(4_096).bytes_max("metadata") == Recorder(1_048_576).bytes_max("off") <= 8_192
    worst = record_of(
        {"a": '"\\' * 1_000_000},
        orjson.dumps('"\\' * 500_000),
        payload_bytes_max=1_048_576,
        tenant='"' * 300,
        subject="\U0001f600" * 300,
        agent_id='\\"' * 200,
    )
    assert len(worst) > 2_000_000
    assert REDACTED.encode() not in worst
