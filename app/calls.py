"""The nouns that travel through every room: who calls, what is called, what came of it. All immutable: those that every
call makes by the word of the type checker, since a dataclass that is frozen takes four times as long to make."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, dataclass_transform

import orjson

from app.errors import Failure, ToolServiceError

Noun = TypeVar("Noun")

Status = Literal["success", "failed", "timeout", "cancelled", "skipped"]
STATUSES: tuple[Status, ...] = ("success", "failed", "timeout", "cancelled", "skipped")

DEFAULT_SCOPES = frozenset({"tools:execute", "tools:read", "executions:read"})


@dataclass_transform(frozen_default=True)
def _immutable(noun: type[Noun]) -> type[Noun]:
    """A look at a slot costs a third of one at a field of a NamedTuple, and some forty are taken a call."""
    return dataclass(slots=True)(noun)


EVERY_TOOL = ("*",)
DEFAULT_LIMIT_CLASS = "default"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. Limits and permissions follow this, never an `agent_id` in a request."""

    tenant: str
    subject: str
    scopes: frozenset[str] = DEFAULT_SCOPES
    tools: tuple[str, ...] = EVERY_TOOL
    """Globs over tool ids. The empty tuple allows none."""
    limit_class: str = DEFAULT_LIMIT_CLASS
    anonymous: bool = False
    """Authentication is off: nothing tells callers apart but the `agent_id` that they give, so limits follow it."""


LOCAL_CALLER = Caller(tenant="local", subject="local", anonymous=True)
"""Everyone, where authentication is off."""


class Aside:
    """What a door needs of a call besides its outcome. Filled by the executor; its own part of a call derives from it.

    `grant` is what the call's limits had left when it was let in, `commit` the promise that its row is kept, which the
    answer waits for; None where no limit binds it, or where it has no row. `kept_trace` is the id of its trace, when
    its span is kept.
    """

    __slots__ = ("commit", "grant", "kept_trace")

    def __init__(self) -> None:
        self.grant: Any = None
        self.commit: Any = None
        self.kept_trace: str | None = None


class Client(Protocol):
    """The other end of the connection that a call came by."""

    @property
    def is_gone(self) -> bool:
        """Whether the client is known to have closed the connection."""

    async def gone(self) -> None:
        """Returns when the client has closed the connection."""


Progress = Callable[[float, float | None, str | None], Awaitable[None]]
"""How far a run is: done, of what total, in words."""


@_immutable
class ToolCall:
    """One request to run one tool. Times are `time.perf_counter()` seconds.

    `deadline` is the end of the plan that the call belongs to, if any; the tool's own timeout is applied later.
    """

    execution_id: str
    tool_id: str
    parameters: Any
    caller: Caller
    received_at: float
    client: Client | None = None
    """None where a disconnect cannot be seen."""
    trace: Any = None
    """The RequestTrace that it belongs to; None where tracing is off."""
    trace_id: str | None = None
    agent_id: str | None = None
    timeout_override_s: float | None = None
    call_id: str | None = None
    idempotency_key: str | None = None
    session_id: str | None = None
    metadata: Mapping[str, Any] | None = None
    deadline: float | None = None
    admitted: bool = False
    """It belongs to a request that was let in before: a drain that has begun since does not refuse it."""
    on_progress: Progress | None = None
    """None where nobody listens."""
    trace_label: str | None = None
    """The trace id that the agent gave, in whatever form."""


class CurrentCall(NamedTuple):
    """What lines written and requests sent while a call runs may know of it."""

    execution_id: str
    trace_id: str | None
    trace: Any
    tenant: str = ""

    @classmethod
    def of(cls, call: ToolCall) -> CurrentCall:
        return tuple.__new__(cls, (call.execution_id, call.trace_id, call.trace, call.caller.tenant))


current_call: ContextVar[CurrentCall | None] = ContextVar("current_call", default=None)
"""The call that this context works for; the executor sets it, and tasks and threads of the tool inherit it. Holds no
parameters: what keeps a context for long, as a connection's task does, keeps this."""


@_immutable
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
    aside: Aside | None = None
    replayed: bool = False
    """What the first call with this idempotency key came to, given again."""

    def as_dict(self) -> dict[str, Any]:
        """The wire shape, for `orjson.dumps`."""
        written = {
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
        return {**written, "replayed": True} if self.replayed else written

    def as_json(self) -> bytes:
        """`as_dict` as bytes. Written by hand when there is no error: what is put in needs no escaping then."""
        result = self.result
        if result is None or self.error is not None or self.replayed:
            return orjson.dumps(self.as_dict())
        begin = f'{{"execution_id":"{self.execution_id}","tool_id":"{self.tool_id}","status":"{self.status}","result":'
        end = (
            f',"error":null,"execution_time_ms":{self.run_s * 1e3:.3f},"overhead_ms":{self.overhead_s * 1e3:.3f},'
            f'"timestamp":"{rfc3339(self.finished_at)}","attempts":{self.attempts},'
            f'"cached":{"true" if self.cached else "false"},"trace_id":"{self.trace_id}"}}'
        )
        return begin.encode() + result + end.encode()


IDS_AHEAD = 256
_VERSION = int("0fff" * IDS_AHEAD, 16), int("7000" * IDS_AHEAD, 16)
_VARIANT = int("3fff" * IDS_AHEAD, 16), int("8000" * IDS_AHEAD, 16)
"""What is random of a group and what is set, of so many ids: 7 (RFC 9562, section 5.7), and the two bits 0b10 (4.1)."""


class _ExecutionIds:
    """Makes UUIDv7s (RFC 9562, section 5.7): 48 bits of Unix milliseconds, then 74 random bits.

    What is random comes from the system, for many at once: a system call for each id was 9 % of an echo call.
    """

    __slots__ = ("_millisecond", "_prefix", "_tails")

    def __init__(self) -> None:
        self._millisecond = 0
        self._prefix = ""
        self._tails: list[str] = []

    def make(self) -> str:
        millisecond = time.time_ns() // 1_000_000
        if millisecond != self._millisecond:
            text = f"{millisecond & 0xFFFF_FFFF_FFFF:012x}"
            self._prefix = f"{text[:8]}-{text[8:]}-"
            self._millisecond = millisecond
        if not self._tails:
            self._tails = _random_tails()
        return self._prefix + self._tails.pop()


def _random_tails() -> list[str]:
    """The last three groups of so many ids."""
    nodes = os.urandom(IDS_AHEAD * 6).hex(" ", 6).split(" ")
    return list(map("-".join, zip(_groups(*_VERSION), _groups(*_VARIANT), nodes, strict=True)))


def _groups(random: int, fixed: int) -> list[str]:
    size_bytes = IDS_AHEAD * 2
    return (int.from_bytes(os.urandom(size_bytes)) & random | fixed).to_bytes(size_bytes).hex(" ", 2).split(" ")


new_execution_id = _ExecutionIds().make
"""A new UUIDv7 as text."""


class _Timestamps:
    """The millisecond that was written last, kept, for under load many calls end in one, and its second, which takes
    3 us to write. Safe between threads."""

    __slots__ = ("_last", "_second")

    def __init__(self) -> None:
        self._last = (-1, "")
        self._second = (-1, "")

    def rfc3339(self, unix_s: float) -> str:
        """UTC with milliseconds, as `2026-11-20T15:00:00.000Z`. By way of whole microseconds, which is what rows keep:
        an answer and its row tell the same."""
        millisecond = int(unix_s * 1e6 + 0.5) // 1000
        known, text = self._last
        if millisecond != known:
            second, rest = divmod(millisecond, 1000)
            text = f"{self._to_the_second(second)}.{rest:03d}Z"
            self._last = (millisecond, text)
        return text

    def _to_the_second(self, second: int) -> str:
        known, text = self._second
        if second != known:
            text = f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}"
            self._second = (second, text)
        return text


rfc3339 = _Timestamps().rfc3339
