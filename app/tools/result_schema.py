"""The result of one tool: its JSON Schema and the way to checked JSON bytes, built once from its return hint.

Refuses what the JSON libraries would bend, cut or never come to the end of. Knows pydantic and orjson; knows nothing of
HTTP or of the run. What is accepted as parameters is `schema.py`'s.
"""

from __future__ import annotations

import dataclasses
import typing
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping, Sized
from decimal import Decimal
from functools import lru_cache
from sys import getrefcount
from typing import Any, Literal, Never, cast

import orjson
from pydantic import BaseModel, PydanticSchemaGenerationError, TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic_core import SchemaValidator
from pydantic_core.core_schema import CoreSchema, chain_schema, is_instance_schema

from app.errors import RESULT_INVALID, RunFailed, failure
from app.tools.content import are_contents
from app.tools.non_finite import ARRAYS, attributes, hides_non_finite
from app.tools.schema import PlainJsonSchema


class ResultSchema:
    """The result of one tool: its JSON Schema when it declares one, and the way to checked JSON bytes."""

    __slots__ = (
        "_adapter",
        "_may_hold_floats",
        "_may_hold_fragments",
        "_may_hold_iterators",
        "_native",
        "_validate",
        "are_contents",
        "is_object",
        "json_schema",
    )

    def __init__(self, annotation: Any) -> None:
        self.are_contents = are_contents(annotation)
        """Blocks of `tools/content.py` rather than data."""
        self.is_object = False
        """It declares data whose root is an object, which is what MCP clients take as structured."""
        self._adapter: TypeAdapter[Any] | None = None
        self._validate: Callable[[Any], Any] | None = None
        self._native = True
        self._may_hold_floats = True
        self._may_hold_fragments = True
        self._may_hold_iterators = False
        self.json_schema: dict[str, Any] | None = None
        if annotation is not Any:
            self._adapter = _adapter(annotation)
            self._validate = _validator_of_results(self._adapter).validate_python  # the adapter's own adds 0.5 µs to it
            self._native = _is_native(self._adapter.core_schema)
            nodes = list(_nodes(self._adapter.core_schema))
            self._may_hold_iterators = any(map(_is_roomy, nodes))
            self._may_hold_floats = not self._native or any(map(_takes_floats, nodes))
            self._may_hold_fragments = self._native and self._may_hold_iterators
            schema = self._adapter.json_schema(mode="serialization", schema_generator=_ReadAlike)
            self.json_schema = _with_root(schema)
            self.is_object = self.json_schema.get("type") == "object" and not self.are_contents

    def encode(self, value: Any) -> bytes:
        """JSON bytes of a tool's return value.

        Raises RunFailed for what JSON cannot hold or the declared type does not allow: NaN, infinities, bytes,
        cycles, integers past 64 bits, lone surrogates, keys that are no strings. Where the declared type is a model
        or has a JSON form of its own, pydantic's form of its fields counts.
        """
        try:
            valid = value if self._validate is None else self._validate(value)
            # Straight to orjson where the two agree: saves 0.4 µs and lets orjson refuse what pydantic would bend.
            form = valid if self._native else self._dumped(valid, "json")
            encoded = orjson.dumps(form, default=_json_form)
            # orjson copies them unread. That some are alive, ours or a tool's, is seldom and seen in 40 ns.
            if self._may_hold_fragments and getrefcount(orjson.Fragment) > _FRAGMENTS_NONE:
                _refuse_unwritable(form)
            # Both libraries write NaN and infinities as null, so only a null can hide one.
            if self._may_hold_floats and encoded.find(b"null") >= 0:
                given = valid if self._native else self._dumped(valid, "python")
                if hides_non_finite(given, form):
                    raise ValueError("NaN or infinity")
        except Exception as error:  # serialisers and validators of the tool's own types run here
            raise RunFailed(failure(RESULT_INVALID, "The tool returned an invalid result")) from error
        return encoded

    def _dumped(self, valid: Any, mode: Literal["json", "python"]) -> Any:
        assert self._adapter is not None
        if self._may_hold_iterators:
            _refuse_unwritable(valid)
        return self._adapter.dump_python(valid, mode=mode, by_alias=True)


class _ReadAlike(PlainJsonSchema):
    """Without what validators of clients read otherwise than pydantic: they throw away the result of a tool that ran,
    or the whole list of tools. Patterns are in Rust's dialect, which JavaScript need not take; times may come without
    an offset and durations with fractions, which RFC 3339 does not know."""

    def str_schema(self, schema: Any) -> dict[str, Any]:
        return _without("pattern", super().str_schema(schema))

    def datetime_schema(self, schema: Any) -> dict[str, Any]:
        return _of_time(schema, super().datetime_schema(schema))

    def time_schema(self, schema: Any) -> dict[str, Any]:
        return _of_time(schema, super().time_schema(schema))

    def timedelta_schema(self, schema: Any) -> dict[str, Any]:
        return _without("format", super().timedelta_schema(schema))


def _of_time(schema: Mapping[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    return described if schema.get("tz_constraint") == "aware" else _without("format", described)


def _without(keyword: str, described: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name != keyword}


def _with_root(schema: dict[str, Any]) -> dict[str, Any]:
    """With its own keywords at the root: what holds more of its kind has only a reference there."""
    if schema.keys() != {"$defs", "$ref"}:
        return schema
    return {**schema["$defs"][schema["$ref"].removeprefix("#/$defs/")], "$defs": schema["$defs"]}


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    """Raises TypeError where the annotation lets an iterator through, which could be endless."""
    try:
        adapter = TypeAdapter(annotation)
        iterates = any(node["type"] == "generator" for node in _nodes(adapter.core_schema))
    except PydanticSchemaGenerationError:
        if not _names_iterator(annotation):
            raise
        iterates = True
    if iterates:
        raise TypeError("the result must not be an iterator, which could be endless; declare and return list[...]")
    return adapter


def _names_iterator(annotation: Any) -> bool:
    origin = typing.get_origin(annotation) or annotation
    if isinstance(origin, type) and issubclass(origin, (Iterator, AsyncIterable)):
        return True
    return any(map(_names_iterator, typing.get_args(annotation)))


def _nodes(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every schema within a core schema, itself too; no values that it holds, as defaults and literals."""
    if isinstance(schema, list | tuple):
        for item in schema:
            yield from _nodes(item)
    elif isinstance(schema, Mapping):  # a dict, or what stands for one until the model is built
        # Tables of fields have names for keys and no type of their own, but maybe a field of that name.
        is_node = isinstance(schema.get("type"), str)
        if is_node:
            yield schema
        for key, item in schema.items():
            if not (is_node and key in _VALUES):
                yield from _nodes(item)


_VALUES = frozenset(("default", "expected", "members", "metadata"))


def _validator_of_results(adapter: TypeAdapter[Any]) -> Any:
    """The adapter's validator, or one rebuilt so that an iterator is no list and a dataclass holds what it says.

    pydantic makes a list of any iterator, however long: an endless one would hold the event loop for ever. It takes a
    dataclass as it is, though nothing has looked at its fields.
    """
    schema = adapter.core_schema
    if any(node["type"] in _COLLECTED or _is_unread(node) for node in _nodes(schema)):
        return SchemaValidator(_looked_through(schema), _use_prebuilt=False)
    return adapter.validator


def _looked_through(schema: Any) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(_looked_through(item) for item in schema)
    if not isinstance(schema, Mapping):
        return schema
    is_node = isinstance(schema.get("type"), str)
    inside = {key: item if is_node and key in _VALUES else _looked_through(item) for key, item in schema.items()}
    if not is_node:
        return inside
    if _is_unread(schema):
        return {**inside, "revalidate_instances": "always"}
    if schema["type"] not in _COLLECTED:
        return inside
    ref = inside.pop("ref", None)
    return chain_schema([_SIZED, cast(CoreSchema, inside)], ref=ref)


def _is_unread(node: Mapping[str, Any]) -> bool:
    """A dataclass of the standard library that can be made again from its fields by their names."""
    if node["type"] != "dataclass" or node.get("post_init") or is_pydantic_dataclass(node["cls"]):
        return False
    fields = {field["name"]: field for field in node["schema"].get("fields", ())}
    made_of = {field.name for field in dataclasses.fields(node["cls"]) if field.init}
    return fields.keys() == made_of and not any("validation_alias" in field for field in fields.values())


def _is_roomy(node: Mapping[str, Any]) -> bool:
    """Whether something of this core schema can hold what no validator has seen to its end."""
    return node["type"] == "any" or node["type"] in _COLLECTED or _takes_more(node)


def _takes_floats(node: Mapping[str, Any]) -> bool:
    return node["type"] in ("any", "float") or _takes_more(node)


def _takes_more(node: Mapping[str, Any]) -> bool:
    """Than the fields that it names."""
    extra = node.get("extra_behavior") or (node.get("config") or {}).get("extra_fields_behavior")
    return bool(extra == "allow")


_COLLECTED = frozenset(("list", "tuple", "set", "frozenset", "deque"))

_SIZED = is_instance_schema((list, tuple, set, frozenset, deque, Sized), cls_repr="Sized")
"""What has a length ends. The usual types stand first: 20 ns, where the abstract one takes its time."""

_NATIVE_TYPES = frozenset(
    ("any", "none", "bool", "int", "float", "str", "nullable", "list", "dict", "union", "typed-dict")
)
_NATIVE_KEYS = frozenset(("any", "str"))


def _is_native(schema: Any) -> bool:
    """Whether what this core schema validates is, as it stands, what orjson writes."""
    if "serialization" in schema or schema["type"] not in _NATIVE_TYPES:
        return False
    if schema["type"] == "typed-dict":
        fields = schema["fields"].values()
        return not schema.get("computed_fields") and all(
            field.keys() <= {"type", "schema", "required", "metadata"} and _is_native(field["schema"])
            for field in fields
        )
    inner = [schema[part] for part in ("schema", "items_schema", "values_schema") if part in schema]
    inner += schema.get("choices", [])
    keys = schema.get("keys_schema", {"type": "str"})
    return keys["type"] in _NATIVE_KEYS and all(isinstance(part, dict) and _is_native(part) for part in inner)


def _json_form(value: Any) -> Any:
    """What orjson does not know and JSON can hold. Not generators: one may never end."""
    if isinstance(value, BaseModel):
        _refuse_unwritable(value)
        form: Any = value.model_dump(mode="json", by_alias=True)
        if hides_non_finite(value.model_dump(by_alias=True), form):
            raise ValueError("NaN or infinity")
        return form
    if isinstance(value, set | frozenset):
        return list(value)
    if isinstance(value, Decimal) and value.is_finite():
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _refuse_unwritable(value: Any) -> None:
    """Raises TypeError where the value is or holds what the libraries would write without refusing. pydantic takes
    iterators for lists, also in the fields of models and dataclasses, that nothing has validated; orjson copies
    fragments. A cycle raises RecursionError."""
    parts = _parts_of(type(value))  # type: ignore[arg-type]  # mypy takes it for one of its instances
    if parts is not None:
        for part in parts(value):
            if type(part) not in _LEAVES:
                _refuse_unwritable(part)


_FRAGMENTS_NONE = getrefcount(orjson.Fragment)
"""Each fragment refers to its type. Whoever imports the name later makes results be looked through, and no more."""

_LEAVES = frozenset((str, int, float, bool, type(None)))

KINDS_KEPT_MAX = 1_000
"""To ask what a type is costs more than all the rest; results are of few types."""


@lru_cache(KINDS_KEPT_MAX)
def _parts_of(kind: type) -> Callable[[Any], Iterable[Any]] | None:
    if kind is orjson.Fragment or hasattr(kind, "__next__"):
        return _refuse
    if issubclass(kind, dict):
        return dict.values
    if issubclass(kind, BaseModel):
        return _model_parts
    if dataclasses.is_dataclass(kind):
        return lambda value: attributes(value).values()
    return iter if issubclass(kind, ARRAYS) else None


def _refuse(value: Any) -> Never:
    raise TypeError(f"{type(value).__name__} is not JSON")


def _model_parts(value: BaseModel) -> Iterable[Any]:
    own, extra = vars(value).values(), value.__pydantic_extra__
    return (*own, *extra.values()) if extra else own
