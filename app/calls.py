"""The nouns that travel through every room: who calls, what is called, what came of it. All immutable."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from app.errors import Failure, ToolServiceError

Status = Literal["success", "failed", "timeout", "cancelled", "skipped"]
STATUSES: tuple[Status, ...] = ("success", "failed", "timeout", "cancelled", "skipped")

DEFAULT_SCOPES = frozenset({"tools:execute", "tools:read", "executions:read"})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Limits and permissions follow this, never an `agent_id` in a request."""

    tenant: str
    subject: str
    scopes: frozenset[str] = DEFAULT_SCOPES


LOCAL_CALLER = Caller(tenant="local", subject="local")
"""Everyone, where authentication is off."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One request to run one tool. Times are `time.perf_counter()` seconds.

    `deadline` is the end of the plan that the call belongs to, if any; the tool's own timeout is applied later.
    """

    execution_id: str
    tool_id: str
    parameters: Any
    caller: Caller
    received_at: float
    agent_id: str | None = None
    trace_id: str | None = None
    session_id: str | None = None
    metadata: Mapping[str, Any] | None = None
    timeout_override_s: float | None = None
    deadline: float | None = None
    call_id: str | None = None
    idempotency_key: str | None = None
    client_gone: Callable[[], Awaitable[None]] | None = None
    """Returns once the client has closed its connection; None where that cannot be seen."""


@dataclass(frozen=True, slots=True)
class Execution:
    """What came of a call. `result` is JSON bytes, already bounded and checked; times are seconds.

    Exactly one of three: it succeeded (`error` and `refusal` are None), the tool ran and failed (`error`),
    or the call was refused before a tool ran (`refusal`).
    """

    execution_id: str
    tool_id: str
    status: Status
    result: bytes | None
    error: Failure | None
    refusal: ToolServiceError | None
    run_s: float
    overhead_s: float
    finished_at: float
    attempts: int
    trace_id: str
    cached: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The wire shape, for `orjson.dumps`."""
        return {
            "execution_id": self.execution_id,
            "tool_id": self.tool_id,
            "status": self.status,
            "result": None if self.result is None else orjson.Fragment(self.result),
            "error": None if self.error is None else self.error.as_dict(),
            "execution_time_ms": round(self.run_s * 1e3, 3),
            "overhead_ms": round(self.overhead_s * 1e3, 3),
            "timestamp": rfc3339(self.finished_at),
            "attempts": self.attempts,
            "cached": self.cached,
            "trace_id": self.trace_id,
        }

    def as_json(self) -> bytes:
        return orjson.dumps(self.as_dict())


class _RandomPool:
    """Random bytes fetched from the system in blocks: a system call for each id was 9 % of an echo call."""

    __slots__ = ("_block", "_next")

    BLOCK_BYTES = 4096

    def __init__(self) -> None:
        self._block = b""
        self._next = 0

    def take(self, count: int) -> bytes:
        end = self._next + count
        if end > len(self._block):
            self._block = os.urandom(self.BLOCK_BYTES)
            self._next, end = 0, count
        taken = self._block[self._next : end]
        self._next = end
        return taken


_random = _RandomPool()


def new_execution_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): 48 bits of Unix milliseconds, then 74 random bits."""
    random_bits = int.from_bytes(_random.take(10), "big")
    milliseconds = time.time_ns() // 1_000_000
    head, low = milliseconds >> 16 & 0xFFFFFFFF, milliseconds & 0xFFFF
    # version 7 opens the third group, variant 0b10 the fourth
    variant = 0x8000 | random_bits >> 48 & 0x3FFF
    return f"{head:08x}-{low:04x}-7{random_bits >> 68:03x}-{variant:04x}-{random_bits & 0xFFFFFFFFFFFF:012x}"


@dataclass(slots=True)
class _SecondPrefix:
    """The formatted second, kept: calls of one second share all but their milliseconds."""

    second: int = -1
    text: str = field(default="")


_prefix = _SecondPrefix()


def rfc3339(unix_s: float) -> str:
    """UTC with milliseconds, as `2026-11-20T15:00:00.000Z`."""
    second = int(unix_s)
    if second != _prefix.second:
        _prefix.text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        _prefix.second = second
    return f"{_prefix.text}.{int((unix_s - second) * 1000):03d}Z"
