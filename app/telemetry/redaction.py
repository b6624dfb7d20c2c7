"""Takes secrets out of what is written down: by the name that a value goes under, and by a secret's own form.

Works on Python values, on texts, and on JSON text without parsing it. The work is linear in the text: places are found
by plain search, and a pattern is tried there alone. Knows neither logs nor rows. Called for log lines, for the rows of
executions and for whatever else leaves the process.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import orjson

from app.telemetry import resembling

REDACTED = "[redacted]"
TOO_DEEP = "[too deep]"
HUGE_NUMBER = "[huge number]"

DEPTH_MAX = 64
"""Of a value: what requests may nest."""

NUMBER_BITS_MAX = 4096
"""Of an integer that is written as text; Python refuses much longer ones."""

CHARACTERS_MAX = 8_000
"""Of one text."""

SECRET_CHARACTERS_MAX = 8_000
"""Looked at beyond what is kept, so that no cut through the middle of a secret hides it: longer than a PEM key."""

KEY_BYTES_MAX = 256
"""Of a JSON member's name before the word that makes it a secret's."""

_SECRET_NAME = re.compile(
    r"(?i)passw|passphrase|passcode|pwd|secret|token|authorization|cookie|credential|^(?:x[-_])?auth$"
    rf"|(?:{'|'.join(resembling.KEYS_OF)})[-_ .]?key"
)
_COUNT_NAME = re.compile(r"(?i)tokens|token[-_ ]?(?:count|limit|budget|usage)")
"""`max_tokens` is no secret as long as it is a number."""

NAME_HINTS = ("pass", "pwd", "secret", "token", "key", "auth", "cookie", "credential")
"""In lower case; every name that _SECRET_NAME takes holds one of them."""


class Form(NamedTuple):
    """How a secret looks: tried where the hint, in lower case, stands. It must fail soon or swallow what it saw."""

    hint: str
    pattern: re.Pattern[bytes]
    secret: bool = False
    """The last group of the match is the secret; else all of it is."""


_BEGIN = rb"(?:(?<![A-Za-z0-9_-])|(?<=\\[nrt])|(?<=\\u00[0-9a-f][0-9a-f])|(?<=%[0-9A-Fa-f][0-9A-Fa-f]))(?<!\\)"
"""Of a word; the letters of an escape before it are none of its own. Without it `eyJeyJeyJ...` would be quadratic."""

_AFTER_SCHEME = rb"\s{1,8}((?=[A-Za-z]{0,80}[0-9._~+/=-]|[A-Za-z][a-z]{0,80}[A-Z])[A-Za-z0-9._~+/=-]{8,})"
"""Words of prose are that long too, but have a capital at their begin alone and no digit."""

_PEM = (
    rb"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:[A-Za-z0-9+/=\s:,.()-]|\\{1,8}[nrt])*?"
    rb"(?:-----END [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----|(?![A-Za-z0-9+/=\s:,.()-]|\\{1,8}[nrt]))"
)

_KEY_OF = "(?:{})key".format("|".join(f"(?<={word})|(?<={word}[-_ .])" for word in resembling.KEYS_OF)).encode()

_PLAIN_FORMS = (
    Form("act_", re.compile(rb"act_[0-9a-f]{20}_[0-9a-f]{64}|" + _BEGIN + rb"act_[A-Za-z0-9]+_[A-Za-z0-9_-]{16,}")),
    Form("eyj", re.compile(_BEGIN + rb"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*")),
    Form("akia", re.compile(rb"AKIA[A-Z0-9]{16}")),
    Form("asia", re.compile(rb"ASIA[A-Z0-9]{16}")),
    Form("aiza", re.compile(rb"AIza[A-Za-z0-9_-]{35}")),
    Form("ya29.", re.compile(rb"ya29\.[A-Za-z0-9_-]{16,}")),
    *(
        Form(hint, re.compile(hint.encode() + rb"[A-Za-z0-9]{16,}"))
        for hint in ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")
    ),
    Form("github_pat_", re.compile(rb"github_pat_[A-Za-z0-9_]{16,}")),
    Form("glpat-", re.compile(rb"glpat-[A-Za-z0-9_-]{16,}")),
    Form("xox", re.compile(rb"xox[a-z]-[A-Za-z0-9-]{10,}")),
    Form("hooks.slack.com/", re.compile(rb"(?i:hooks\.slack\.com)/([A-Za-z0-9/_-]+)"), True),
    Form("sk-", re.compile(_BEGIN + rb"sk-[A-Za-z0-9_-]{16,}")),
    Form("sk_", re.compile(_BEGIN + rb"sk_[A-Za-z0-9_-]{16,}")),
    Form("-----begin ", re.compile(_PEM)),
    Form("bearer", re.compile(rb"(?i:bearer)" + _AFTER_SCHEME), True),
    Form("basic", re.compile(rb"(?i:basic)" + _AFTER_SCHEME), True),
    Form("://", re.compile(rb"://([^/\s\"'<>\\]+)@"), True),
    Form("signature=", re.compile(rb"(?i:signature)=([A-Za-z0-9%+/_-]{16,})"), True),
    Form("sig=", re.compile(rb"(?i:sig)=([A-Za-z0-9%+/_-]{16,})"), True),
)


def _assigned_forms(quote: bytes) -> tuple[Form, ...]:
    """`name=value`, `name: value`, `"name": "value"`, with what a quote is in the text."""
    quoted = rb"(?:" + quote + rb"|')"
    equals = quoted + rb"?\s{0,8}[:=]\s{0,8}"
    value = rb"(?:" + quote + rb"([^\"\\]+)|'([^'\"\\]+)|([^\s\"'&;,)\\]+))"
    line = quoted + rb"?([^\"'\r\n\\]+)"
    pairs = quoted + rb"?([^=\s\"';,\\]{1,128}=[^\"'\r\n\\]*)"

    def named(hint: str, name: bytes, rest: bytes = value) -> Form:
        return Form(hint, re.compile(rb"(?i:" + name + rb"[\w.-]{0,32})" + equals + rest), True)

    return (
        named("pass", rb"pass(?:w(?:or)?d|phrase|code)"),
        named("pwd", rb"pwd"),
        named("secret", rb"secret"),
        named("token", rb"token(?!s)"),
        named("key", _KEY_OF),
        named("auth", rb"authorization", line),
        named("cookie", rb"cookie", pairs),
    )


_TEXT_FORMS = (*_PLAIN_FORMS, *_assigned_forms(rb"\\{0,8}\""))
_JSON_FORMS = (*_PLAIN_FORMS, *_assigned_forms(rb"\\(?:\\\\){0,3}\""))
"""Inside of a JSON string a quote has an odd number of backslashes before it."""


Span = tuple[int, int, bytes]
"""Begin and end of what is taken out, and what comes in its place."""

_IN_PLACE = REDACTED.encode()
_STRING_REST = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_MEMBER = re.compile(rb'"\s*:\s*')
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[{}\[\]]', re.DOTALL)
_SCALAR_BEGINS = frozenset(b"%c" % character for character in b"-0123456789tf")
_SCALAR = re.compile(rb"[^,}\]\s]*")


def redact(value: Any, depth: int = DEPTH_MAX) -> Any:
    """The value as JSON can hold it, bounded, without what looks like a secret by its name or by its own form."""
    if isinstance(value, str):
        return redact_text(value)
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return _number(value)
    if isinstance(value, dict | list | tuple) and depth == 0:
        return TOO_DEEP
    if isinstance(value, dict):
        return {
            redact_text(str(key)): REDACTED if _is_secret(str(key), item) else redact(item, depth - 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item, depth - 1) for item in value]
    return redact_text(repr(value))


def redact_text(text: str, *, keep_end: bool = False) -> str:
    """At most CHARACTERS_MAX of the text, from its begin or its end; lone surrogates become question marks."""
    looked_at = CHARACTERS_MAX + SECRET_CHARACTERS_MAX
    seen = text[-looked_at:] if keep_end else text[:looked_at]
    data = seen.encode("utf-8", "replace")
    low = _lowered(data)
    first = max(0, len(seen) - CHARACTERS_MAX) if keep_end else 0
    if not _may_hold_secret(data, low):
        return data.decode()[first : first + CHARACTERS_MAX]
    # Cut where the text is cut, not where the redacted text ends: past that only half a secret may stand.
    begin = len(seen[:first].encode("utf-8", "replace"))
    end = begin + len(seen[first : first + CHARACTERS_MAX].encode("utf-8", "replace"))
    clean = _without(data, _form_spans(data, low, _TEXT_FORMS), begin, end).decode("utf-8", "replace")
    return clean[-CHARACTERS_MAX:] if keep_end else clean[:CHARACTERS_MAX]


def redact_json(data: bytes, end: int | None = None) -> bytes:
    """JSON without its secrets, as JSON. With `end` the begin of one, up to there; what stands behind is looked at to
    know a secret that is cut."""
    low = _lowered(data)
    if not _may_hold_secret(data, low):
        return data if end is None else data[:end]
    spans = _member_spans(data, low) + _form_spans(data, low, _JSON_FORMS)
    if end is not None:
        return _without(data, spans, 0, min(end, len(data)))
    clean = _without(data, spans, 0, len(data))
    return clean if not spans or _is_json(clean) else b'"' + _IN_PLACE + b'"'


def may_hold_guessable(data: bytes) -> bool:
    """False: whatever secret it holds is random, and cannot be found by trying, given a digest of the data. Half a
    microsecond for a short text, so two are better looked at together."""
    low = _lowered(data)
    return resembling.may_hold_guessable(low) or _holds_scheme(data, low)


def _may_hold_secret(data: bytes, low: str) -> bool:
    return resembling.may_hold_secret(low) or _holds_scheme(data, low)


def _holds_scheme(data: bytes, low: str) -> bool:
    return resembling.may_hold_scheme(low) and resembling.holds_scheme(data.decode("latin-1"))


def _lowered(data: bytes) -> str:
    """ASCII alone, so that a place in it is the same place in the data. Every byte a character: in another coding one
    that was cut would be none."""
    return data.lower().decode("latin-1")


def _is_secret(name: str, value: Any) -> bool:
    if _SECRET_NAME.search(name) is None:
        return False
    return not (isinstance(value, int | float) and _COUNT_NAME.search(name))


def _number(value: int) -> int | str:
    if -(2**63) <= value < 2**64:
        return value
    return str(value) if value.bit_length() <= NUMBER_BITS_MAX else HUGE_NUMBER


def _form_spans(data: bytes, low: str, forms: tuple[Form, ...]) -> list[Span]:
    spans: list[Span] = []
    for hint, pattern, secret in forms:
        position = low.find(hint)
        while position >= 0:
            match = pattern.match(data, position)
            if match is None:
                position = low.find(hint, position + len(hint))
            else:
                spans.append((*match.span(match.lastindex or 0 if secret else 0), _IN_PLACE))
                position = low.find(hint, match.end())
    return spans


def _member_spans(data: bytes, low: str) -> list[Span]:
    """Values whose names are those of secrets. A hint can stand nowhere but in a string, and where that ends is seen
    from any place in it."""
    spans: list[Span] = []
    for hint in NAME_HINTS:
        position = low.find(hint)
        while position >= 0:
            rest = _STRING_REST.match(data, position)
            assert rest is not None  # it takes the empty text
            passed = rest.end()
            member = _MEMBER.match(data, passed)
            if member is not None:
                earliest = max(0, position - KEY_BYTES_MAX)
                name = data[max(earliest, data.rfind(b'"', earliest, position) + 1) : passed]
                begin = member.end()
                if _is_secret(name[: 2 * KEY_BYTES_MAX].decode("utf-8", "replace"), _scalar(data[begin : begin + 1])):
                    passed = _value_end(data, begin)
                    spans.append((begin, passed, b'"' + _IN_PLACE + b'"'))
            position = low.find(hint, max(passed, position + 1))
    return spans


def _value_end(data: bytes, begin: int) -> int:
    """Where the JSON value ends that begins there; the end of the data where it is cut."""
    if data[begin : begin + 1] not in (b'"', b"{", b"["):
        found = _SCALAR.match(data, begin)
        return found.end() if found is not None else begin
    depth = 0
    for token in _BRACKETS.finditer(data, begin):
        first = token[0][:1]
        depth += (first in b"{[") - (first in b"}]")
        if depth == 0:
            return token.end()
    return len(data)


def _scalar(first: bytes) -> Any:
    """Something like the value that begins so: a number for numbers, true and false, None for anything else."""
    return 0 if first in _SCALAR_BEGINS else None


def _without(data: bytes, spans: list[Span], begin: int, end: int) -> bytes:
    """The data from `begin` to `end` with the spans replaced, those that overlap by one."""
    spans.sort(key=lambda span: (span[0], -span[1]))
    pieces = []
    position = begin
    replaced_to = 0
    for start, stop, in_place in spans:
        if stop > position and start < end and stop > replaced_to:
            if start >= replaced_to:
                pieces += [data[position:start], in_place]
            position = replaced_to = stop
    pieces.append(data[position:end])
    return b"".join(pieces)


def _is_json(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True
