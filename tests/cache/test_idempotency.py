"""What is kept of an Execution: read again as it was, and nothing else is believed."""

from __future__ import annotations

import logging
from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cache.idempotency import (
    CHECK_SUM_BYTES,
    FINISHING_BYTES_MAX,
    Claimed,
    Idempotency,
    _check_sum,
    _first_execution,
    written,
)
from app.cache.store import Claim
from app.calls import LOCAL_CALLER, Execution, ToolCall
from app.errors import Failure, IdempotencyConflict
from tests.cache.stores import BUDGET_S, redis_store
from tests.servers import HOST, free_port

CALL = ToolCall("id", "probe", {}, LOCAL_CALLER, 0.0)

failures = st.builds(
    Failure, st.text(max_size=20), st.text(max_size=20), st.text(), st.booleans(), st.none() | st.integers(0, 10**8)
)
times = st.floats(0, 1e9, allow_nan=False)


def execution(error: Failure | None, result: object, *times: float, attempts: int, cached: bool) -> Execution:
    status = "success" if error is None else "failed"
    body = orjson.dumps(result) if error is None else None
    return Execution("id", "probe", status, body, error, None, *times, attempts, "trace", cached)  # type: ignore[arg-type]


def read(body: bytes, key: str = "key") -> Execution:
    return _first_execution(Claim("done", "id", 0, body), key, CALL)


@given(
    error=st.none() | failures,
    result=st.recursive(st.none() | st.text() | st.integers(-(2**53), 2**53), st.lists, max_leaves=20),
    run_s=times,
    overhead_s=times,
    finished_at=times,
    attempts=st.integers(0, 10),
    cached=st.booleans(),
)
def test_what_is_written_is_read_again(
    error: Failure | None,
    result: object,
    run_s: float,
    overhead_s: float,
    finished_at: float,
    attempts: int,
    cached: bool,
) -> None:
    first = execution(error, result, run_s, overhead_s, finished_at, attempts=attempts, cached=cached)
    again = read(written(first, "key"))
    assert again.replayed and replace(again, aside=None, replayed=False) == first
    assert again.result == first.result
    with pytest.raises(IdempotencyConflict):
        read(written(first, "key"), "another")


@given(body=st.binary(max_size=300) | st.lists(st.text() | st.integers(0, 9) | st.none()).map(orjson.dumps))
def test_nothing_else_is_believed_though_its_sum_be_right(body: bytes) -> None:
    for kept in (body, _check_sum("key", body) + body, body[:CHECK_SUM_BYTES]):
        with pytest.raises(IdempotencyConflict) as raised:
            read(kept)
        assert raised.value.as_data()["reason"] == "outcome_unknown"


@pytest.mark.anyio
async def test_outcomes_that_wait_for_a_store_are_bounded_by_their_bytes(caplog: pytest.LogCaptureFixture) -> None:
    """What finds no room is told in the log, as what was offered in vain is."""
    outcome = execution(None, "x" * (FINISHING_BYTES_MAX // 10), 0.0, 0.0, 0.0, attempts=1, cached=False)
    async with redis_store(f"redis://{HOST}:{free_port()}", BUDGET_S) as store:
        idempotency = Idempotency(store)
        with caplog.at_level(logging.ERROR, "app.cache"):
            for number in range(12):
                await idempotency.keep(Claimed(f"key {number}", "fp", f"call {number}"), outcome)
        assert [record.__dict__["execution_id"] for record in caplog.records] == ["call 9", "call 10", "call 11"]
        assert 0 < idempotency._finishing_bytes <= FINISHING_BYTES_MAX
        await idempotency.drain(0)
        await idempotency.drain(10)
        assert idempotency._finishing_bytes == 0 and not idempotency._finishing
