"""Parameters of one tool: their JSON Schema and their validator, built once from type hints.

Knows pydantic; knows nothing of HTTP or of the run. What leaves as a result is `result_schema.py`'s.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails, PydanticKnownError, PydanticSerializationError, SchemaValidator
from pydantic_core.core_schema import CoreSchema, no_info_before_validator_function

from app.errors import InvalidParams, clean_text
from app.tools.mirrored import mirrored
from app.tools.non_finite import hides_non_finite

ERRORS_REPORTED_MAX = 20
"""An agent mends a call from the first few; a list of 100,000 wrong items must not cost a megabyte of answer."""

ERRORS_BUILT_MAX = 1_000
"""pydantic builds all details or none, about 2 µs each; past this only the number is told."""

# fmt: off
_VALUE_FREE = frozenset(
    {
        "missing", "extra_forbidden", "model_type", "dataclass_type", "dict_type", "list_type", "tuple_type",
        "set_type", "frozen_set_type", "string_type", "int_type", "float_type", "bool_type", "bytes_type",
        "none_required", "too_short", "too_long", "string_too_short", "string_too_long", "bytes_too_short",
        "bytes_too_long", "string_pattern_mismatch", "greater_than", "greater_than_equal", "less_than",
        "less_than_equal", "multiple_of", "finite_number", "literal_error", "enum", "union_tag_not_found",
        "set_item_not_hashable", "int_from_float", "int_parsing_size", "decimal_type", "decimal_max_digits",
        "decimal_max_places", "decimal_whole_digits", "datetime_type", "date_type", "time_type", "time_delta_type",
        "date_past", "date_future", "datetime_past", "datetime_future", "timezone_aware", "timezone_naive", "uuid_type",
        "uuid_version", "url_type", "url_scheme", "url_too_long",
    }
)
# fmt: on
"""Error types whose message pydantic forms from the schema alone. Any other could quote the rejected value."""

_OBJECT = "Input should be an object"
_IN_JSON = {"model_type": _OBJECT, "dict_type": _OBJECT, "list_type": "Input should be a valid array"}
"""As pydantic has it for JSON that it parses; of Python values it speaks as Python does, and names a model's class."""


class PlainJsonSchema(GenerateJsonSchema):
    """JSON Schema 2020-12 without a `title` for every field: agents pay for each token of it."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def ser_schema(self, schema: Any) -> dict[str, Any] | None:
        """What a serializer of the author's makes, which without a return type can be anything."""
        if schema["type"] == "function-plain" and schema.get("return_schema") is None:
            theirs = str(getattr(schema["function"], "__module__", "")).startswith("pydantic.")
            return super().ser_schema(schema) if theirs else {}
        return super().ser_schema(schema)

    def encode_default(self, dft: Any) -> Any:
        """Left out where it is NaN or infinite, which JSON would show as null."""
        encoded = super().encode_default(dft)
        if hides_non_finite(dft, encoded):
            raise PydanticSerializationError("not JSON")
        return encoded


class ParameterSchema:
    """Parameters of one tool: a JSON Schema to publish and a validator that accepts exactly that.

    JSON types are strict at every depth. Whole floats pass as integers, as JSON Schema has it (section 6.1.1).
    """

    __slots__ = ("_validator", "json_schema", "mirrored")

    def __init__(self, fields: Mapping[str, tuple[Any, FieldInfo | Any]]) -> None:
        with warnings.catch_warnings():
            # A parameter may be called `json` or `copy`; that it hides a method of the model harms nobody.
            warnings.simplefilter("ignore", UserWarning)
            definitions: dict[str, Any] = dict(fields)
            model = create_model("Parameters", __config__=_PARAMETERS_CONFIG, **definitions)
            self.json_schema = model.model_json_schema(schema_generator=PlainJsonSchema)
        if unusable := definitions.keys() - model.model_fields.keys():
            raise TypeError(f"parameter {min(unusable)!r} needs another name; Field(alias=...) can publish this one")
        if "$ref" in self.json_schema:
            raise TypeError("Self is no type of a parameter")
        if len(self.json_schema.get("properties", {})) < len(definitions):
            raise TypeError("two parameters have the same published name; change an alias")
        self._validator = _exact_validator(model)
        self.json_schema.pop("title", None)
        for name, published in self.json_schema.setdefault("properties", {}).items():
            if "default" in published and not self._takes(name, published["default"]):
                del published["default"]
        self.mirrored = mirrored(self.json_schema)

    def validate(self, parameters: Any) -> dict[str, Any]:
        """Keyword arguments for the tool's function, defaults applied. Raises InvalidParams without values."""
        # By way of JSON, so that dates, enums and sets read as JSON has them; 0.06 µs over Python mode.
        try:
            document = orjson.dumps(parameters)
        except TypeError:
            raise InvalidParams.at("", "Not JSON: text, number or key outside of it", "json_invalid") from None
        try:
            model = self._validator.validate_json(document, strict=True)
        except ValidationError as error:
            model = self._validate_whole_floats(parameters, error)
        return model.__dict__  # type: ignore[no-any-return]  # the validator is untyped

    def _takes(self, name: str, default: Any) -> bool:
        """Whether a caller may say the default, too: not None where `x: int = None`."""
        try:
            self._validator.validate_json(orjson.dumps({name: whole_floats_as_integers(default)}), strict=True)
        except ValidationError as error:
            return all(detail["loc"][:1] != (name,) for detail in error.errors(include_url=False, include_input=False))
        except Exception:  # a validator of the author's, or a number beyond JSON's
            return False
        return True

    def _validate_whole_floats(self, parameters: Any, first: ValidationError) -> Any:
        if first.error_count() > ERRORS_BUILT_MAX:
            raise InvalidParams.at("", f"{first.error_count()} violations", "too_many_errors") from None
        integral = whole_floats_as_integers(parameters)
        try:
            return self._validator.validate_json(orjson.dumps(integral), strict=True)
        except ValidationError as error:
            found = violations(error, parameters)
            raise InvalidParams("Invalid parameters; tools.get shows the schema", found) from None


_PARAMETERS_CONFIG = ConfigDict(extra="forbid", protected_namespaces=(), hide_input_in_errors=True)


def _exact_validator(model: type[BaseModel]) -> Any:
    """The model's validator, or one rebuilt where it would not take what its JSON Schema says.

    A literal or an enum could take `true` for 1: pydantic compares those as Python does, even in strict mode; JSON
    Schema holds them apart (section 4.2.2). A literal of an enum's members would take nothing, as JSON has only their
    values. An iterable would be anything that has items, a text too, none of them looked at before the tool runs.
    """
    loose = model.__pydantic_core_schema__
    exact = _exact(loose)
    if exact == loose:
        return model.__pydantic_validator__
    # The switch that pydantic's own model_rebuild(force=True) uses; else the loose validators of models are taken.
    return SchemaValidator(exact, _use_prebuilt=False)


def _exact(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_exact(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type", "")
    if kind in ("literal", "enum"):
        return _exact_literal(schema)
    inside = {key: _exact(item) for key, item in schema.items()}
    if kind == "generator":
        return {**inside, "type": "list"}
    if kind == "tagged-union":
        tags = inside["choices"]
        return {**inside, "choices": {**tags, **{tag.value: tags[tag] for tag in tags if isinstance(tag, enum.Enum)}}}
    return inside


def _exact_literal(schema: dict[str, Any]) -> Any:
    expected = schema.get({"literal": "expected", "enum": "members"}[schema["type"]])
    if not isinstance(expected, list):
        return schema
    values = [value.value if isinstance(value, enum.Enum) else value for value in expected]
    if schema["type"] == "literal" and values != expected:
        return no_info_before_validator_function(_member_by_value(expected, values), cast(CoreSchema, schema))
    if not any(isinstance(value, bool | int | float) and value in (0, 1) for value in values):
        return schema
    return no_info_before_validator_function(_boolean_apart(values), cast(CoreSchema, schema))


def _member_by_value(expected: list[Any], values: list[Any]) -> Callable[[Any], Any]:
    def member(value: Any) -> Any:
        for one, own in zip(expected, values, strict=True):
            if type(own) is type(value) and own == value:
                return one
        raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, values))})

    return member


def _boolean_apart(expected: list[Any]) -> Callable[[Any], Any]:
    kinds = {(type(value) is bool, value) for value in expected if isinstance(value, bool | int | float)}

    def refuse_the_other_kind(value: Any) -> Any:
        if isinstance(value, bool | int | float) and (type(value) is bool, value) not in kinds:
            raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, expected))})
        return value

    return refuse_the_other_kind


def violations(error: ValidationError, rejected: Any = None) -> list[dict[str, str]]:
    """`[{path, message, type}]` of a failed validation, bounded, without the rejected values.

    With the rejected document at hand, paths lead through it and do not name the branches of unions.
    """
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return [_violation(detail, rejected) for detail in details[:ERRORS_REPORTED_MAX]]


def _violation(detail: ErrorDetails, rejected: Any) -> dict[str, str]:
    kind = detail["type"]
    message = _IN_JSON.get(kind, detail["msg"]) if kind in _VALUE_FREE else "Value is not valid here"
    location = detail["loc"] if rejected is None else _within(rejected, detail)
    path = ".".join(clean_text(str(part)[:64]) for part in location)
    return {"path": path, "message": message, "type": kind}


def _within(document: Any, detail: ErrorDetails) -> Iterable[int | str]:
    """The parts of the location that exist in the document, and at its end the one that is missing."""
    *above, last = detail["loc"] or ("",)
    for part in above:
        if _holds(document, part):
            yield part
            document = document[part]
    if _holds(document, last) or detail["type"] == "missing":
        yield last


def _holds(document: Any, part: int | str) -> bool:
    if isinstance(document, list):
        return isinstance(part, int) and part < len(document)
    return isinstance(document, dict) and part in document


def whole_floats_as_integers(value: Any) -> Any:
    """A copy in which 1.0 is 1. Recursion is bounded by the codec: 64 levels."""
    if type(value) is float and value.is_integer() and -(2**63) <= value < 2**64:
        return int(value)
    if type(value) is dict:
        return {key: whole_floats_as_integers(item) for key, item in value.items()}
    if type(value) is list:
        return [whole_floats_as_integers(item) for item in value]
    return value
