"""The limits file: YAML or JSON, read whole, every mistake told with its line.

Knows what may stand in the file; what policies then do is `policy.py`'s. The service and `doctor` call it at start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

from app.limits.document import Entry, Node, UnreadableDocument, parse_json, parse_yaml, shown
from app.limits.limit import OnFailure
from app.limits.policy import (
    CONCURRENT_MAX,
    DIMENSIONS,
    NAME,
    QUOTA_MAX,
    RATE_MAX,
    RESERVED,
    Dimension,
    Match,
    Policy,
    Rate,
    parse_rate,
)

FILE_BYTES_MAX = 1 << 20
POLICIES_MAX = 1_000
"""Each is looked at when a caller is first seen. A file of so many is some 200 KiB."""

GLOB_CHARACTERS_MAX = 256
PROBLEMS_SHOWN_MAX = 20


class LimitsFileError(ValueError):
    """A limits file that cannot be taken: one line of text for each problem, with file, line and reason."""


def read_policies(path: Path) -> tuple[Policy, ...]:
    """The policies of a file, in its order. Raises LimitsFileError with all that is wrong."""
    try:
        root = _document(path)
    except OSError as error:
        raise LimitsFileError(f"{path}: cannot be read: {error.strerror}") from None
    except UnreadableDocument as error:
        raise LimitsFileError(f"{path}:{error.line}: {error}") from None
    reading = _Reading()
    policies = reading.policies(root)
    if reading.problems:
        lines = [f"{path}:{line}: {reason}" for line, reason in sorted(reading.problems, key=itemgetter(0))]
        if more := lines[PROBLEMS_SHOWN_MAX:]:
            lines[PROBLEMS_SHOWN_MAX:] = [f"{path}: and {len(more)} more"]
        raise LimitsFileError("\n".join(lines))
    return policies


def _document(path: Path) -> Node | None:
    with path.open("rb") as file:
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise UnreadableDocument(content.count(b"\n") + 1, f"is over {FILE_BYTES_MAX} bytes")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableDocument(content.count(b"\n", 0, error.start) + 1, "is not UTF-8") from None
    return parse_json(text) if path.suffix == ".json" else parse_yaml(text)


POLICY_KEYS = (
    "name",
    "match",
    "per",
    "rate",
    "burst",
    "adaptive",
    "quota",
    "max_concurrent",
    "on_store_failure",
    "mode",
)
MATCH_KEYS = ("tool", "tenant", "subject", "class")


class _Reading:
    """Goes through a document and notes what is wrong with which line, instead of stopping at the first."""

    def __init__(self) -> None:
        self.problems: list[tuple[int, str]] = []
        self._lines_of_names: dict[str, int] = {}

    def policies(self, root: Node | None) -> tuple[Policy, ...]:
        if root is None or root.kind == "nothing":
            return ()
        listed = self._mapping(root, "the file", ("policies",)).get("policies")
        if listed is None or listed.kind == "nothing":
            return ()
        items = self._list(listed, "policies", "a list of policies, each beginning with - name")
        if len(items) > POLICIES_MAX:
            self._wrong(items[POLICIES_MAX], f"there may be {POLICIES_MAX} policies at most")
            return ()
        return tuple(self._policy(item) for item in items)

    def _policy(self, node: Node) -> Policy:
        told = len(self.problems)
        found = self._mapping(node, "a policy", POLICY_KEYS)
        policy = Policy(
            name=self._name(found.get("name")),
            match=self._match(found.get("match")),
            per=self._per(found.get("per")),
            rate=self._rate(found.get("rate"), found.get("burst")),
            **self._quota(found.get("quota")),
            max_concurrent=self._number(found.get("max_concurrent"), "max_concurrent", CONCURRENT_MAX),
            on_store_failure=self._one_of(found.get("on_store_failure"), "on_store_failure", get_args(OnFailure)),
            shadow=self._one_of(found.get("mode"), "mode", ("enforce", "shadow")) == "shadow",
            adaptive=self._truth(found.get("adaptive"), "adaptive"),
        )
        if len(self.problems) == told:
            self._whole(node, found)
        return policy

    def _whole(self, node: Node, found: Mapping[str, Node]) -> None:
        """Nothing is missing, and all that is said has an effect."""
        if "name" not in found:
            self._wrong(node, "a policy needs a name")
        if not found.keys() & {"rate", "quota", "max_concurrent"}:
            self._wrong(node, "a policy needs a rate, a quota or max_concurrent")
        elif "burst" in found and "rate" not in found:
            self._wrong(found["burst"], "burst needs a rate")
        elif "adaptive" in found and "rate" not in found:
            self._wrong(found["adaptive"], "adaptive needs a rate; quotas and slots do not follow the load")
        elif "max_concurrent" in found and "mode" in found and found["mode"].value == "shadow":
            self._wrong(found["mode"], "max_concurrent cannot be in shadow; give it a policy of its own")
        elif "on_store_failure" in found and not found.keys() & {"rate", "quota"}:
            self._wrong(found["on_store_failure"], "on_store_failure needs a rate or a quota; slots have no store")

    def _name(self, node: Node | None) -> str:
        name = None if node is None else self._text(node, "name")
        if node is None or name is None:
            return ""
        if not NAME.fullmatch(name):
            self._wrong(node, "name must be 1 to 64 of A-Z a-z 0-9 . _ : -")
        elif name.startswith(RESERVED):
            self._wrong(node, f"names that begin with {' or '.join(RESERVED)} are taken")
        elif name in self._lines_of_names:
            self._wrong(node, f"name is that of the policy in line {self._lines_of_names[name]} already")
        self._lines_of_names.setdefault(name, node.line)
        return name

    def _match(self, node: Node | None) -> Match:
        if node is None:
            return Match()
        found = self._mapping(node, "match", MATCH_KEYS)
        globs = {("limit_class" if key == "class" else key): self._glob(found[key], key) for key in found}
        return Match(**globs)

    def _glob(self, node: Node, key: str) -> str:
        text = self._text(node, key)
        if text is not None and not 1 <= len(text) <= GLOB_CHARACTERS_MAX:
            self._wrong(node, f"{key} must have 1 to {GLOB_CHARACTERS_MAX} characters")
        return text or "*"

    def _per(self, node: Node | None) -> tuple[Dimension, ...]:
        wanted = f"a list out of {', '.join(DIMENSIONS)}, as [tenant, tool]"
        named: set[Any] = set()
        for item in [] if node is None else self._list(node, "per", wanted):
            if item.value not in DIMENSIONS:
                self._wrong(item, f"per must be {wanted}")
            elif item.value in named:
                self._wrong(item, f"per has {item.value} twice")
            else:
                named.add(item.value)
        return tuple(dimension for dimension in DIMENSIONS if dimension in named)

    def _rate(self, node: Node | None, burst: Node | None) -> Rate | None:
        at_once = self._number(burst, "burst", RATE_MAX)
        text = None if node is None else self._text(node, "rate")
        if node is None or text is None:
            return None
        return self._parsed(node, text, None) and self._parsed(burst or node, text, at_once)

    def _parsed(self, blamed: Node, text: str, burst: int | None) -> Rate | None:
        try:
            return parse_rate(text, burst)
        except ValueError as error:
            self._wrong(blamed, str(error))
            return None

    def _quota(self, node: Node | None) -> dict[str, int | None]:
        if node is None:
            return {}
        found = self._mapping(node, "quota", ("daily", "monthly"))
        if node.value == {}:
            self._wrong(node, "quota needs daily or monthly, as {daily: 10000}")
        return {key: self._number(found[key], key, QUOTA_MAX) for key in found}

    def _mapping(self, node: Node, what: str, known: Sequence[str]) -> dict[str, Node]:
        """The known entries of a mapping; all others are wrong."""
        if not isinstance(node.value, dict):
            self._wrong(node, f"{what} must be a mapping with {', '.join(known)}; it is {node.kind}")
            return {}
        for key, entry in node.value.items():
            if key not in known:
                near = get_close_matches(key[:64].lower(), known, 1)
                hint = f"did you mean {near[0]}?" if near else f"it can have {', '.join(known)}"
                self._wrong(entry, f"{what} has no {shown(key)}; {hint}")
        return {key: entry.node for key, entry in node.value.items() if key in known}

    def _list(self, node: Node, what: str, wanted: str) -> list[Node]:
        if isinstance(node.value, list):
            return node.value
        self._wrong(node, f"{what} must be {wanted}; it is {node.kind}")
        return []

    def _text(self, node: Node, what: str) -> str | None:
        if isinstance(node.value, str):
            return node.value
        plain = not isinstance(node.value, list | dict)
        self._wrong(node, f"{what} must be a text; it is {node.kind}{', unless it is in quotes' if plain else ''}")
        return None

    def _number(self, node: Node | None, what: str, highest: int) -> int | None:
        if node is None:
            return None
        if type(node.value) is int and 1 <= node.value <= highest:
            return node.value
        kind = "" if node.kind == "a number" else f"; it is {node.kind}"
        self._wrong(node, f"{what} must be a whole number from 1 to {highest} in plain digits{kind}")
        return None

    def _truth(self, node: Node | None, what: str) -> bool:
        if node is not None and not isinstance(node.value, bool):
            self._wrong(node, f"{what} must be true or false, in these letters and without quotes")
        return node is not None and node.value is True

    def _one_of(self, node: Node | None, what: str, allowed: Sequence[str]) -> Any:
        if node is None or node.value in allowed:
            return node and node.value
        self._wrong(node, f"{what} must be {', '.join(allowed[:-1])} or {allowed[-1]}")
        return None

    def _wrong(self, where: Node | Entry, reason: str) -> None:
        self.problems.append((where.line, reason))
