"""A call under an idempotency key: claimed before it runs, its outcome kept for a day, and given again to repeats.

A key is its tenant's, subject's and tool's. Never a second run unless the tool says that one is harmless: a claim whose
process died is answered with "outcome unknown". Knows stores; the executor runs what was claimed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, NamedTuple

import orjson

from app.cache.store import CacheStore, Claim, StoreAway, StoreFull, digest, key_of
from app.calls import STATUSES, Aside, Execution, ToolCall
from app.errors import DependencyUnavailable, Failure, IdempotencyConflict, InvalidParams

logger = logging.getLogger("app.cache")

LEASE_GRACE_S = 6.0
"""Beyond a run's deadline: the queue's patience, stores, and a loop that was late. Too short, and a repeat is told that
the outcome is unknown while it is about to be known; too long, and it hears "still running" of a process that died."""

RETRY_AFTER_MS_MAX = 1_000
"""What a repeat is told to wait for a call that runs: the lease is how long it may take, not how long it will."""

FINISH_TRIES = 20
FINISH_RETRY_S = 0.5
"""An outcome that the store did not take is offered again for about the time that a Redis takes to fail over."""

FINISHING_MAX = 1_000
FINISHING_BYTES_MAX = 33_554_432
"""Outcomes that are offered again at once; past either, a repeat hears that the outcome is unknown."""


class Claimed(NamedTuple):
    """The right to run, once. None of it where the store is away and a repeat is harmless."""

    key: str
    fingerprint: str
    token: str


class Idempotency:
    """One per service."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self._settling: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._finishing_bytes = 0

    async def claim(self, call: ToolCall, lease_s: float, *, harmless: bool) -> Claimed | Execution | None:
        """The right to run, or the outcome of the first call with this key. None: no store, and a repeat is harmless.

        Raises IdempotencyConflict, DependencyUnavailable, InvalidParams.
        """
        key = key_of("idempotency", call.caller.tenant, call.caller.subject, call.tool_id, call.idempotency_key or "")
        lease_ms = int((lease_s + LEASE_GRACE_S) * 1e3)
        claimed = Claimed(key, _fingerprint(call), call.execution_id)
        try:
            claim = await self._store.begin(*claimed, lease_ms, take_over=harmless)
        except StoreFull:
            raise DependencyUnavailable("No room for one more idempotency key", retry_after_ms=60_000) from None
        except StoreAway:
            if harmless:
                return None
            raise DependencyUnavailable(
                "The store of idempotency keys is away; nothing ran", retry_after_ms=1_000
            ) from None
        if claim.state == "begun":
            return claimed
        if claim.state == "done":
            return _first_execution(claim, key, call)
        raise _conflict(claim)

    async def keep(self, claimed: Claimed, execution: Execution) -> None:
        """Before the answer leaves. What the store does not take now is offered again behind it."""
        body = written(execution, claimed.key)
        try:
            if not await self._store.finish(*claimed, body):
                logger.warning("idempotency key was taken over", extra={"execution_id": execution.execution_id})
        except (StoreAway, StoreFull):
            self._later(claimed, body)

    async def release(self, claimed: Claimed) -> None:
        """Nothing came of it: the next call with this key may run."""
        try:
            await self._store.release(claimed.key, claimed.token)
        except (StoreAway, StoreFull):
            self._later(claimed, None)

    async def surely(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for it; it goes on when whoever waits is cancelled."""
        task = asyncio.get_running_loop().create_task(work, name="idempotency-settling")
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        await asyncio.shield(task)

    def _later(self, claimed: Claimed, body: bytes | None) -> None:
        size_bytes = len(body or b"")
        if len(self._finishing) >= FINISHING_MAX or self._finishing_bytes + size_bytes > FINISHING_BYTES_MAX:
            _say_not_kept(claimed)
            return
        work = self._keep_trying(claimed, body)
        task = asyncio.get_running_loop().create_task(work, name="idempotency-outcome")
        self._finishing.add(task)
        self._finishing_bytes += size_bytes
        task.add_done_callback(lambda task: self._ended(task, size_bytes))

    def _ended(self, task: asyncio.Task[None], size_bytes: int) -> None:
        self._finishing.discard(task)
        self._finishing_bytes -= size_bytes

    async def _keep_trying(self, claimed: Claimed, body: bytes | None) -> None:
        for _ in range(FINISH_TRIES):
            await asyncio.sleep(FINISH_RETRY_S)
            try:
                if body is None:
                    await self._store.release(claimed.key, claimed.token)
                else:
                    await self._store.finish(*claimed, body)
                return
            except (StoreAway, StoreFull):
                continue
        _say_not_kept(claimed)

    async def drain(self, timeout_s: float) -> None:
        """Wait for outcomes that are on their way, bounded."""
        tasks = self._settling | self._finishing
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        for task in self._settling | self._finishing:
            task.cancel()


def _say_not_kept(claimed: Claimed) -> None:
    logger.error("outcome of an idempotency key was not kept", extra={"execution_id": claimed.token})


def _fingerprint(call: ToolCall) -> str:
    """What must be equal: SHA-256 of the tool's id and its parameters with sorted names."""
    canonical = canonical_json(call.parameters)
    if canonical is None:
        raise InvalidParams.at("parameters", "With an idempotency_key, texts must be valid Unicode")
    return digest(call.tool_id, canonical)


def canonical_json(value: Any) -> bytes | None:
    """JSON with sorted names; None where it has none: lone surrogates."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return None


def _conflict(claim: Claim) -> IdempotencyConflict:
    first = claim.token or None
    if claim.state == "other":
        return IdempotencyConflict.other_call(first)
    if claim.state == "running":
        return IdempotencyConflict.still_running(first, min(max(1, claim.left_ms), RETRY_AFTER_MS_MAX))
    return IdempotencyConflict.outcome_unknown(first)


# What is kept of an Execution: a check sum, a line of JSON, then the result as it is.


def written(execution: Execution, key: str) -> bytes:
    """An Execution that is no refusal."""
    error = execution.error
    head = [
        execution.execution_id,
        execution.tool_id,
        execution.status,
        None if error is None else list(error),
        execution.run_s,
        execution.overhead_s,
        execution.finished_at,
        execution.attempts,
        execution.trace_id,
        execution.cached,
    ]
    body = orjson.dumps(head) + b"\n" + (execution.result or b"")
    return _check_sum(key, body) + body


def _first_execution(claim: Claim, key: str, call: ToolCall) -> Execution:
    """The first call's, to be given again. Raises IdempotencyConflict: what is kept cannot be believed."""
    try:
        return _read(claim.body, key, call.tool_id)
    except (ValueError, TypeError, KeyError):
        logger.error("what is kept of an idempotency key cannot be believed", extra={"tool_id": call.tool_id})
        raise IdempotencyConflict.outcome_unknown(None) from None


def _read(kept: bytes, key: str, tool_id: str) -> Execution:
    """Raises ValueError, TypeError, KeyError for what this service did not write under this key."""
    body = kept[CHECK_SUM_BYTES:]
    if kept[:CHECK_SUM_BYTES] != _check_sum(key, body):
        raise ValueError
    head, _, result = body.partition(b"\n")
    written_head = orjson.loads(head)
    execution_id, kept_tool_id, status, error, run_s, overhead_s, finished_at, attempts, trace_id, cached = written_head
    if kept_tool_id != tool_id or status not in STATUSES or (status == "success") != (error is None):
        raise ValueError
    if status == "success":
        orjson.loads(result)
    return Execution(
        execution_id,
        tool_id,
        status,
        result if status == "success" else None,
        None if error is None else Failure(*error),
        None,
        run_s,
        overhead_s,
        finished_at,
        attempts,
        trace_id,
        cached,
        Aside(),
        replayed=True,
    )


CHECK_SUM_BYTES = 32


def _check_sum(key: str, body: bytes) -> bytes:
    """Bound to the key: an outcome that is copied to another tenant's key is none. It keeps mistakes out, not somebody
    who may write to the store and knows this code."""
    return digest("outcome", key, body)[:CHECK_SUM_BYTES].encode()
