"""What a span is before OpenTelemetry sees it, and what decides whether there is one: the head's sampler, the tail's
bound. Plain Python, shared by `tracing`, which makes spans, and `span_export`, which sends them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

Attributes = dict[str, str | int | float | bool]
Kind = Literal["server", "internal", "client"]

RANDOM_BITS = 56
"""The low bits of a trace id that decide: all that W3C Trace Context level 2 promises to be random. Older samplers look
at 64, and in a UUIDv7 the first two of those are always 10: at any ratio below a half they would sample none."""

TAIL_PER_SECOND = 10
"""Spans that the tail rule keeps, of errors and of slow ones each: enough to see, too few to cost."""


class HeadSampler:
    """Decides from the trace id alone, so that replicas agree (OpenTelemetry's consistent probability sampling)."""

    def __init__(self, ratio: float, *, follows_parent: bool = True) -> None:
        rejected = round((1 - ratio) * 2**RANDOM_BITS)
        # Compared as hex digits, for slicing a text is cheaper than making a number of it. "g" is past every digit.
        self._threshold = "g" if rejected >= 2**RANDOM_BITS else f"{rejected:014x}"
        self._follows_parent = follows_parent

    def samples(self, trace_id: str, parent_sampled: bool | None) -> bool:
        if parent_sampled is not None and self._follows_parent:
            return parent_sampled
        return trace_id[-14:] >= self._threshold


class Tokens:
    """A bucket of TAIL_PER_SECOND tokens that fills in a second."""

    def __init__(self) -> None:
        self._left = float(TAIL_PER_SECOND)
        self._filled_at = 0.0

    def take(self, now: float) -> bool:
        self._left = min(TAIL_PER_SECOND, self._left + (now - self._filled_at) * TAIL_PER_SECOND)
        self._filled_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def sampler_of(ratio: float, environ: Mapping[str, str]) -> tuple[HeadSampler, bool]:
    """The head sampler that OTEL_TRACES_SAMPLER names, and whether the tail rule adds to it."""
    name = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    known = _SAMPLERS.get(name)
    if known is None:
        return HeadSampler(ratio), True
    fixed, follows_parent = known
    if fixed is None:
        given = environ.get("OTEL_TRACES_SAMPLER_ARG", "")
        fixed = float(given) if is_ratio(given) else ratio
    return HeadSampler(fixed, follows_parent=follows_parent), name != "always_off"


_SAMPLERS: dict[str, tuple[float | None, bool]] = {
    "always_on": (1.0, False),
    "always_off": (0.0, False),
    "traceidratio": (None, False),
    "parentbased_always_on": (1.0, True),
    "parentbased_always_off": (0.0, True),
    "parentbased_traceidratio": (None, True),
}
"""Ratio, where the name says it, and whether a caller's decision holds."""


def samplers() -> Iterable[str]:
    """What OTEL_TRACES_SAMPLER may name."""
    return _SAMPLERS


def is_sampler(text: str) -> bool:
    return text.strip().lower() in _SAMPLERS


def is_ratio(text: str) -> bool:
    try:
        return 0.0 <= float(text) <= 1.0
    except ValueError:
        return False


class SpanNote(NamedTuple):
    """One span in plain Python. Ids are hex digits; times are Unix nanoseconds."""

    name: str
    kind: Kind
    trace_id: str
    span_id: str
    parent_id: str
    parent_is_remote: bool
    start_ns: int
    end_ns: int
    common: Attributes
    """Attributes that many spans share: the same object, never changed, so that they are encoded once."""
    attributes: Attributes
    failed: bool = False
    state: str = ""
    link: tuple[str, str] | None = None
    """Trace id and span id of a span in another trace that this one came from."""


class SpanSink(Protocol):
    """Where spans go."""

    @property
    def outcomes(self) -> Mapping[str, int]: ...

    def keep(self, note: SpanNote) -> None:
        """Never waits, never raises."""

    def instrument(self, app: Any, own_paths: str) -> None:
        """Let FastAPI's instrumentation make the spans of an application's routes."""

    async def close(self, timeout_s: float) -> None: ...
