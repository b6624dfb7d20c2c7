"""A YAML or JSON text as a tree whose nodes know their lines, so that whoever reads it can say where it is wrong.

Takes the plain part of YAML only: one document, no anchors, aliases or tags, a bounded depth; constructs nothing but
texts, numbers, lists and mappings. Knows no policy. `limits_file.py` calls it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from yaml.resolver import Resolver

DEPTH_MAX = 8
"""A limits file needs four levels. The composers of PyYAML recurse without a bound."""

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
"""What YAML 1.1, section 4.1.1, does not take. Found here, since PyYAML tells its offset and not its line."""

_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
"""YAML 1.1 reads 010 as 8, 1:30 as 90 and 1_0 as 10: a limit must not be what its reader would not expect."""

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""A number of JSON and of YAML 1.2; YAML 1.1 reads some as texts."""

_TRUTHS = {"true": True, "false": False}
"""YAML 1.1 has twenty more spellings, of which some are names of countries."""

_KINDS = {"bool": "true or false", "null": "nothing", "timestamp": "a date"}


class UnreadableDocument(ValueError):
    """The text is no document of ours; `line` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class Node(NamedTuple):
    """One value: a text, an int, true or false, a list of nodes, or a mapping from a text to its entry; None for all
    else."""

    line: int
    kind: str
    """In words, for messages."""
    value: str | int | list[Node] | dict[str, Entry] | None


class Entry(NamedTuple):
    line: int
    node: Node


def parse_yaml(text: str) -> Node | None:
    """The tree of a text, or None where nothing is in it. Raises UnreadableDocument."""
    if found := _UNPRINTABLE.search(text):
        raise UnreadableDocument(_line_of(text, found.start()), "has a character that YAML does not allow")
    loader = yaml.SafeLoader(text)
    try:
        return _document(iter(loader.get_event, None))
    except yaml.MarkedYAMLError as error:
        raise UnreadableDocument(*_described(error)) from None
    except UnreadableDocument:
        raise
    except (ValueError, OverflowError):  # PyYAML's own, of an escape or a version that is no number of Python's
        raise UnreadableDocument(_line(loader), "is not YAML: a number in it is too high") from None


def parse_json(text: str) -> Node | None:
    """As `parse_yaml`, for a text that must be JSON: JSON's own parser says what is wrong, YAML's knows the lines."""
    if not text.strip():
        return None
    try:
        json.loads(text, parse_int=float)  # an int of 5,000 digits would be an error without a line
    except json.JSONDecodeError as error:
        raise UnreadableDocument(error.lineno, f"is not JSON: {error.msg}") from None
    except RecursionError:
        raise UnreadableDocument(1, "is nested too deep") from None
    return parse_yaml(_json_as_yaml(text))


def _json_as_yaml(text: str) -> str:
    """JSON that is YAML 1.1 too, line by line: that has other escapes, and no tabs outside of a text."""
    return re.sub(r'"(?:[^"\\]|\\.)*"', _string_as_yaml, text.replace("\t", " "))


def _string_as_yaml(string: re.Match[str]) -> str:
    escaped = re.sub(r"[^ !#-\[\]-~]", lambda found: f"\\U{ord(found[0]):08x}", json.loads(string[0]))
    return f'"{escaped}"'


def _described(error: yaml.MarkedYAMLError) -> tuple[int, str]:
    line, begun, context = _line(error.problem_mark), _line(error.context_mark), error.context or ""
    reason = f"is not YAML: {error.problem or context}"
    if error.context_mark and begun != line:
        reason += f", {context} that begins in line {begun}"
    if "alias" in context:
        reason += "; a glob that begins with * needs quotes"
    return line, reason


def _line(mark: Any) -> int:
    """Of a mark, or of how far a loader has read; both count from 0."""
    return mark.line + 1 if mark else 1


def _line_of(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def _document(events: Iterator[Any]) -> Node | None:
    root = None
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            if root is not None:
                raise UnreadableDocument(_line(event.start_mark), "has a second document")
            root = _node(next(events), events, DEPTH_MAX)
    return root


def _node(event: Any, events: Iterator[Any], depth_left: int) -> Node:
    line = _line(event.start_mark)
    if isinstance(event, yaml.AliasEvent):
        raise UnreadableDocument(line, "has an alias, which is not read here; a glob that begins with * needs quotes")
    if event.anchor is not None or event.tag is not None:
        raise UnreadableDocument(line, "has an anchor or a tag, which are not read here")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event, line)
    if depth_left == 0:
        raise UnreadableDocument(line, f"is nested over {DEPTH_MAX} levels deep")
    if isinstance(event, yaml.SequenceStartEvent):
        return Node(line, "a list", list(_items(events, depth_left - 1)))
    return Node(line, "a mapping", _mapping(events, depth_left - 1))


def _items(events: Iterator[Any], depth_left: int) -> Iterator[Node]:
    while not isinstance(event := next(events), yaml.SequenceEndEvent):
        yield _node(event, events, depth_left)


def _mapping(events: Iterator[Any], depth_left: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        line = _node(event, events, depth_left).line
        if not isinstance(event, yaml.ScalarEvent):
            raise UnreadableDocument(line, "has a key that is no text")
        if event.value in entries:
            earlier = entries[event.value].line
            raise UnreadableDocument(line, f"has the key {shown(event.value)} again, as in line {earlier}")
        entries[event.value] = Entry(line, _node(next(events), events, depth_left))
    return entries


def _scalar(event: Any, line: int) -> Node:
    plain, _ = event.implicit
    tag = _RESOLVER.resolve(yaml.ScalarNode, event.value, (True, False)) if plain else "str"
    kind = tag.rpartition(":")[2]
    if kind == "str" and not (plain and _EXPONENT.fullmatch(event.value)):
        return Node(line, "a text", event.value)
    if kind == "bool" and event.value in _TRUTHS:
        return Node(line, _KINDS[kind], _TRUTHS[event.value])
    if kind == "int" and _WHOLE_NUMBER.fullmatch(event.value):
        return Node(line, "a number", int(event.value))
    return Node(line, _KINDS.get(kind, "a number"), None)


_RESOLVER: Any = Resolver()  # type: ignore[no-untyped-call,unused-ignore]


def shown(key: str) -> str:
    """A key for a message: in one line, and not too long."""
    return repr(key if len(key) <= 40 else f"{key[:40]}...")
