"""Whether a text may hold a secret at all: nets with wider meshes than the forms of `redaction`, cast over all of it.

Most texts hold words of secrets ("author", "key", "://") and no secret. To look at each such place takes 60 ns a byte;
the engine of pydantic's patterns, which is Rust's and linear, takes 2. It looks at lower case: were it to ignore case,
it would take five times as long. Properties of the tests hold the nets to the forms: none may get through.
"""

from __future__ import annotations

from pydantic_core import SchemaValidator, core_schema

_BLANK = r"[ \t\n\r\f\v]"
"""As `\\s` is of bytes; of text it would be more, and a class that excludes it less."""

# fmt: off
KEYS_OF = (
    "access", "account", "api", "app", "application", "auth", "consumer", "encryption", "functions", "master",
    "private", "secret", "session", "shared", "signing", "ssh", "subscription",
)
# fmt: on
"""Words before `key` that make it a secret's; of some vendors' headers among them, as X-Auth-Key."""

_KEY = rf"(?:{'|'.join(KEYS_OF)})[-_ .]?key"
_NAMES = rf"passw|passphrase|passcode|pwd|secret|authorization|cookie|credential|{_KEY}"
_MORE = r"[0-9a-z_.-]{0,40}"
_EQUALS = rf"""[\\"']*{_BLANK}{{0,8}}[:=]"""
_REST_OF_NAME = r'(?:[^"\\]|(?s:\\.))*'
_MEMBER = rf'"{_BLANK}*:'

_GUESSABLE = (
    rf"(?:{_NAMES})(?:{_MORE}{_EQUALS}|{_REST_OF_NAME}{_MEMBER})",
    # `tokens` are counted: as a member's name they are a secret's where the value is no scalar.
    rf"token(?:[0-9a-rt-z_.-]{_MORE})?{_EQUALS}",
    rf'token(?:(?:[^s"\\]|(?s:\\.)){_REST_OF_NAME})?{_MEMBER}',
    rf"token{_REST_OF_NAME}{_MEMBER}{_BLANK}*[^ \t\n\r\f\v0-9tf-]",
    rf'"(?:x[-_])?auth{_MEMBER}',
    r"""://[^/ \t\n\r\f\v"'<>\\]+@""",
)
"""Of secrets that people think up."""

_RANDOM = (
    r"act_[0-9a-z]+_[0-9a-z_-]{16}",
    r"eyj[0-9a-z_-]{8}",
    r"a[ks]ia[0-9a-z]{16}",
    r"aiza[0-9a-z_-]{35}",
    r"ya29\.",
    r"gh[oprsu]_[0-9a-z]{16}",
    r"github_pat_",
    r"glpat-",
    r"xox[a-z]-",
    r"hooks\.slack\.com/",
    r"sk[-_][0-9a-z_-]{16}",
    r"-----begin ",
    r"sig(?:nature)?=",
)


def _net(*patterns: str) -> SchemaValidator:
    return SchemaValidator(core_schema.str_schema(pattern="|".join(patterns), regex_engine="rust-regex", strict=True))


may_hold_secret = _net(*_GUESSABLE, *_RANDOM).isinstance_python
"""Takes a text in lower case without lone surrogates. False: no form of a secret and no name of one is in it, but for
credentials after a scheme."""

may_hold_guessable = _net(*_GUESSABLE).isinstance_python
"""The same, of secrets that can be found by trying."""

may_hold_scheme = _net(rf"(?:basic|bearer){_BLANK}{{1,8}}[0-9a-z._~+/=-]{{8}}").isinstance_python
"""And of credentials after a scheme. Prose has these words too: in lower case it cannot be told."""

_MARK = "[0-9._~+/=-]"
_CREDENTIAL = "|".join(
    (
        *(rf"[A-Za-z]{{{letters}}}{_MARK}[A-Za-z0-9._~+/=-]{{{7 - letters}}}" for letters in range(8)),
        rf"[A-Za-z]{{8,80}}{_MARK}",
        *(rf"[A-Za-z][a-z]{{{letters}}}[A-Z][A-Za-z0-9._~+/=-]{{{6 - letters}}}" for letters in range(6)),
        r"[A-Za-z][a-z]{6,80}[A-Z]",
    )
)
"""Eight characters or more with one among them that words of prose have not: this engine cannot look ahead, so each
place of the first is spelt out."""

holds_scheme = _net(rf"(?i:basic|bearer){_BLANK}{{1,8}}(?:{_CREDENTIAL})").isinstance_python
"""Takes the text as it is, every byte a character: whether there are credentials after a scheme. Place by place, a
megabyte that tells of basic needs would hold the loop: before a digest all of a payload is looked at."""
