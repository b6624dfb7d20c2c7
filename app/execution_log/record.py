"""Makes the record of one execution: a JSON array in the order of COLUMNS, poison taken out, every part bounded.

Runs in the executor's epilogue, so it never raises and takes microseconds. Knows neither the journal nor a database;
what of a payload is kept, hashed and left out is argued in docs/adr/0013-journal.md.
"""

from __future__ import annotations

import logging
import re
from hashlib import sha256
from typing import Any, Literal

import orjson

from app.calls import Execution, ToolCall
from app.errors import clean_text
from app.telemetry.redaction import (
    SECRET_CHARACTERS_MAX,
    may_hold_guessable,
    redact_json,
    redact_text,
)

logger = logging.getLogger("app.execution_log")

Payloads = Literal["off", "metadata", "full"]

LABEL_CHARACTERS_MAX = 256
"""Of a tenant, subject, agent id: at most 1,024 bytes, which an index still takes."""

WORD_CHARACTERS_MAX = 128
"""Of versions, codes and trace ids."""

TEXTS_BYTES_MAX = 8_192
"""Of a record without its payloads; the labels at their longest, escaped, take 5,000."""

WHOLE_BYTES_MAX = 32_768
"""Of a payload that is redacted as a whole, which takes up to 60 ns a byte. Of a larger one the begin is."""

NESTING_MAX = 64
"""Of a payload that is kept as JSON; deeper, as text. PostgreSQL's parser runs out of stack at some thousands."""

LABELS_MAX = 16_384
"""Of cleaned texts remembered."""

_NUL = re.compile(rb"(?<!\\)((?:\\\\)*)\\u0000")
_ESCAPE_BEGINS = re.compile(rb"\\(?:u[0-9a-f]{0,3})?")
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]]', re.DOTALL)


Payload = tuple[bytes | None, int | None, str | None]
"""What a row says of parameters or a result: its redacted JSON, and size and digest of the whole."""

NOTHING: Payload = (None, None, None)


class Recorder:
    """One per service."""

    def __init__(self, payload_bytes_max: int) -> None:
        self._payload_bytes_max = payload_bytes_max
        self._labels: dict[str, str] = {}
        self._identities: dict[str, str] = {}

    def bytes_max(self, payloads: Payloads) -> int:
        """No record is larger: what to reserve before a call runs."""
        return TEXTS_BYTES_MAX + (2 * self._payload_bytes_max if payloads == "full" else 0)

    def record(
        self,
        call: ToolCall,
        execution: Execution,
        tool_version: str,
        cost: int,
        payloads: Payloads,
        client_gone: bool = False,
    ) -> bytes:
        """The record of a call that was admitted. Never raises."""
        if payloads == "off":
            parameters = result = NOTHING
        else:
            try:
                parameters, result = self._payloads(call.parameters, execution.result, payloads == "full")
            except Exception:  # values of anyone's making; a row without them is better than none
                logger.exception("payload of a record failed", extra={"execution_id": call.execution_id})
                parameters = result = NOTHING
        values = self._values(call, execution, tool_version, cost, client_gone, parameters, result)
        try:
            record = orjson.dumps(values)
        except TypeError:  # a lone surrogate, an integer beyond 64 bits
            return self._repaired(values)
        kept_bytes = len(parameters[0] or b"") + len(result[0] or b"")
        if record.find(b"\\u0000") >= 0 or len(record) - kept_bytes > TEXTS_BYTES_MAX:
            return self._repaired(values)
        return record

    def _values(
        self,
        call: ToolCall,
        execution: Execution,
        tool_version: str,
        cost: int,
        client_gone: bool,
        parameters: Payload,
        result: Payload,
    ) -> tuple[Any, ...]:
        error, refusal, caller = execution.error, execution.refusal, call.caller
        run_s, overhead_s, finished_at = execution.run_s, execution.overhead_s, execution.finished_at
        error_type = error_code = None
        if error is not None:
            error_type, error_code = error.category, error.code
        elif refusal is not None:
            error_type = refusal.kind.error_type
        return (
            execution.execution_id,
            execution.tool_id,
            tool_version,
            self._identity(caller.tenant),
            self._identity(caller.subject),
            None if call.agent_id is None else self._label(call.agent_id),
            execution.status,
            error_type,
            error_code,
            finished_at - run_s - overhead_s,
            finished_at,
            int(run_s * 1e6 + 0.5) / 1e3,  # round() takes three times as long
            int(overhead_s * 1e6 + 0.5) / 1e3,
            execution.attempts,
            execution.cached,
            client_gone,
            execution.trace_id,
            cost,
            parameters[0] and orjson.Fragment(parameters[0]),
            parameters[1],
            parameters[2],
            result[0] and orjson.Fragment(result[0]),
            result[1],
            result[2],
        )

    def _label(self, text: str) -> str:
        known = self._labels.get(text)
        if known is None:
            known = clean_text(redact_text(text))[:LABEL_CHARACTERS_MAX]
            _remember(self._labels, text, known)
        return known

    def _identity(self, text: str) -> str:
        if len(text) <= LABEL_CHARACTERS_MAX and text.isascii() and text.isprintable():
            return text  # as nearly all are: of 10,000 callers, looking each up would cost more
        known = self._identities.get(text)
        if known is None:
            known = identity(text)
            _remember(self._identities, text, known)
        return known

    def _repaired(self, values: tuple[Any, ...]) -> bytes:
        """The slow way, for a row that holds poison or is too long; labels and payloads are clean already."""
        return orjson.dumps([_repaired(value, number in _LABELS) for number, value in enumerate(values)])

    def _payloads(self, parameters: Any, result: bytes | None, full: bool) -> tuple[Payload, Payload]:
        written = _json_of(parameters)
        if result is None:
            result = b""
        if not full and len(written) + len(result) <= WHOLE_BYTES_MAX and not may_hold_guessable(written + result):
            return (
                (None, len(written), sha256(written).hexdigest()),
                (None, len(result), sha256(result).hexdigest()) if result else NOTHING,
            )
        return self._payload(written, full), self._payload(result, full) if result else NOTHING

    def _payload(self, whole: bytes, full: bool) -> Payload:
        kept_max = self._payload_bytes_max
        guessable = may_hold_guessable(whole)
        digest: str | None
        if len(whole) > WHOLE_BYTES_MAX:
            clean = redact_json(whole[: kept_max + 1 + SECRET_CHARACTERS_MAX], kept_max + 1) if full else b""
            digest = None if guessable else sha256(whole).hexdigest()
        else:
            clean = redact_json(whole) if full or guessable else b""
            digest = sha256(clean if guessable else whole).hexdigest()
        kept = _kept(clean, kept_max, cut=len(whole) > WHOLE_BYTES_MAX) if full else None
        return kept, len(whole), digest


def _remember(known: dict[str, str], text: str, clean: str) -> None:
    """Bounded in number and in size; forgetting all at once costs a microsecond for each that comes again."""
    if len(text) <= LABEL_CHARACTERS_MAX:
        if len(known) >= LABELS_MAX:
            known.clear()
        known[text] = clean


_LABELS = (3, 4, 5)
"""Numbers of the columns tenant, subject and agent_id."""


def _repaired(value: Any, is_label: bool) -> Any:
    if isinstance(value, str):
        return clean_text(value)[: LABEL_CHARACTERS_MAX if is_label else WORD_CHARACTERS_MAX]
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-(2**63), min(value, 2**63 - 1))
    return value


def identity(text: str) -> str:
    """A tenant or subject as rows have it: the same, unless it is too long or holds what no column takes. Then its
    begin and its digest, so that no two become one."""
    cleaned = clean_text(text)
    if cleaned == text and len(text) <= LABEL_CHARACTERS_MAX:
        return text
    digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{cleaned[: LABEL_CHARACTERS_MAX - 65]}~{digest}"


def _json_of(parameters: Any) -> bytes:
    """With sorted names: the same parameters have the same digest, in whatever order they came."""
    try:
        return orjson.dumps(parameters, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return orjson.dumps(_encodable(parameters), option=orjson.OPT_SORT_KEYS)


def _encodable(value: Any, depth: int = NESTING_MAX) -> Any:
    """What JSON in UTF-8 can hold of it: for lone surrogates, integers of any size, and what is no JSON at all."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else float(value) if value.bit_length() < 1024 else None
    if depth == 0:
        return None
    if isinstance(value, dict):
        return {_encodable(str(name)): _encodable(item, depth - 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item, depth - 1) for item in value]
    return None


def _kept(clean: bytes, bytes_max: int, *, cut: bool) -> bytes:
    """Redacted JSON as a row keeps it: itself, or a JSON string of its begin where it is too long or too deep."""
    if b"\\u0000" in clean:
        clean = _NUL.sub(rb"\1\\ufffd", clean)
    if not cut and len(clean) <= bytes_max and not _is_deep(clean):
        return clean
    written = orjson.dumps(clean[:bytes_max].decode("utf-8", "ignore"))
    if len(written) <= bytes_max:
        return written
    begin = _without_cut_escape(written[: bytes_max - 1])
    return begin.decode("utf-8", "ignore").encode() + b'"'


def _without_cut_escape(text: bytes) -> bytes:
    """Of text in a JSON string that was cut anywhere. Looked for from the end: 4 KiB take a pattern 0.4 ms."""
    last = text.rfind(b"\\", max(0, len(text) - len(rb"\u000")))
    if last < 0 or _ESCAPE_BEGINS.fullmatch(text, last) is None:
        return text
    escapes = last + 1 - len(text[: last + 1].rstrip(b"\\"))
    return text[:last] if escapes % 2 else text


def _is_deep(data: bytes) -> bool:
    if data.count(b"[") + data.count(b"{") <= NESTING_MAX:
        return False
    depth = 0
    for token in _BRACKETS.finditer(data):
        first = token[0][:1]
        depth += (first in b"{[") - (first in b"}]")
        if depth > NESTING_MAX:
            return True
    return False
