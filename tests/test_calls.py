"""The nouns: ids, times and the wire form of an outcome."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime

import orjson
import pytest

from app.calls import IDS_AHEAD, Execution, new_execution_id, rfc3339
from app.errors import Failure

MANY = 10 * IDS_AHEAD


def test_ids_are_uuids_of_version_7_none_twice_and_in_the_order_of_their_milliseconds() -> None:
    begin_ms = time.time_ns() // 1_000_000
    made = [new_execution_id() for _ in range(MANY)]
    end_ms = time.time_ns() // 1_000_000
    read = [uuid.UUID(text) for text in made]
    assert [str(one) for one in read] == made and len(set(made)) == MANY
    assert {(one.version, one.variant) for one in read} == {(7, uuid.RFC_4122)}
    milliseconds = [one.int >> 80 for one in read]
    assert begin_ms <= milliseconds[0] and milliseconds[-1] <= end_ms and milliseconds == sorted(milliseconds)


def test_every_bit_of_an_id_that_is_neither_time_nor_version_is_random() -> None:
    """None of 74 is the same in 2,560 ids."""
    read = [uuid.UUID(new_execution_id()).int for _ in range(MANY)]
    ever = never = read[0]
    for one in read:
        ever |= one
        never &= one
    varies = (ever ^ never) & ((1 << 80) - 1)
    assert varies == (0x0FFF << 64 | 0x3FFF_FFFF_FFFF_FFFF)


@pytest.mark.parametrize("unix_s", [0.0, 1.9996, 1_700_000_000.0, 1_700_000_000.9994, 1_700_000_000.9999996])
def test_a_time_is_written_as_its_microseconds_say_whatever_was_written_before(unix_s: float) -> None:
    instant = datetime.fromtimestamp(int(unix_s * 1e6 + 0.5) / 1e6, UTC)
    expected = instant.strftime("%Y-%m-%dT%H:%M:%S.") + f"{instant.microsecond // 1000:03d}Z"
    assert rfc3339(unix_s) == expected
    assert rfc3339(unix_s + 0.25) != expected and rfc3339(unix_s + 3600.0) != expected
    assert rfc3339(unix_s) == expected


def execution(error: Failure | None = None, *, replayed: bool = False) -> Execution:
    result = b'{"message":"a \\"quoted\\" one"}' if error is None else None
    status = "success" if error is None else "failed"
    times = (0.0012345, 0.0000516, 1_700_000_000.25)
    execution_id = new_execution_id()
    return Execution(execution_id, "echo", status, result, error, None, *times, 1, "trace", True, replayed=replayed)  # type: ignore[arg-type]


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("error", [None, Failure("BROKEN", "tool_error", 'said "no"', False)])
def test_what_is_written_by_hand_is_what_the_dict_says(error: Failure | None, replayed: bool) -> None:
    one = execution(error, replayed=replayed)
    assert orjson.loads(one.as_json()) == orjson.loads(orjson.dumps(one.as_dict()))
