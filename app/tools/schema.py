"""Schemas and validators of one tool, built once from its type hints.

Owns what is accepted as parameters and what leaves as a result. Knows pydantic; knows nothing of HTTP or of the run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails

from app.errors import RESULT_INVALID, InvalidParams, RunFailed, clean_text, failure

ERRORS_REPORTED_MAX = 20
"""An agent mends a call from the first few; a list of 100,000 wrong items must not cost a megabyte of answer."""

ERRORS_BUILT_MAX = 1_000
"""pydantic builds all details or none, about 2 µs each; past this only the number is told."""

_VALUE_FREE = frozenset(
    """
    missing extra_forbidden model_type dict_type list_type tuple_type set_type frozen_set_type string_type int_type
    float_type bool_type bytes_type none_required too_short too_long string_too_short string_too_long
    string_pattern_mismatch greater_than greater_than_equal less_than less_than_equal multiple_of finite_number
    literal_error enum int_from_float datetime_type date_type time_type time_delta_type uuid_type url_type
    url_scheme decimal_type timezone_aware timezone_naive int_parsing_size
    """.split()
)
"""Error types whose message pydantic forms from the schema alone. Any other could quote the rejected value."""


class _PlainJsonSchema(GenerateJsonSchema):
    """JSON Schema 2020-12 without a `title` for every field: agents pay for each token of it."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


class ParameterSchema:
    """Parameters of one tool: a JSON Schema to publish and a validator that accepts exactly that.

    JSON types are strict at every depth. Whole floats pass as integers, as JSON Schema has it (section 6.1.1).
    """

    __slots__ = ("_model", "_validator", "json_schema")

    def __init__(self, fields: Mapping[str, tuple[Any, FieldInfo | Any]]) -> None:
        with warnings.catch_warnings():
            # A parameter may be called `json` or `copy`; that it hides a method of the model harms nobody.
            warnings.simplefilter("ignore", UserWarning)
            definitions: dict[str, Any] = dict(fields)
            self._model = create_model("Parameters", __config__=_PARAMETERS_CONFIG, **definitions)
        self._validator = self._model.__pydantic_validator__
        self.json_schema = self._model.model_json_schema(schema_generator=_PlainJsonSchema)
        self.json_schema.pop("title", None)
        self.json_schema.setdefault("properties", {})

    def validate(self, parameters: Any) -> dict[str, Any]:
        """Keyword arguments for the tool's function, defaults applied. Raises InvalidParams without values."""
        try:
            # By way of JSON, so that dates, enums and sets read as JSON has them; 0.06 µs over Python mode.
            model = self._validator.validate_json(orjson.dumps(parameters), strict=True)
        except ValidationError as error:
            model = self._validate_whole_floats(parameters, error)
        return model.__dict__  # type: ignore[no-any-return]  # the validator is untyped

    def _validate_whole_floats(self, parameters: Any, first: ValidationError) -> Any:
        if first.error_count() > ERRORS_BUILT_MAX:
            raise InvalidParams.at("", f"{first.error_count()} violations", "too_many_errors") from None
        integral = _whole_floats_as_integers(parameters)
        try:
            return self._validator.validate_json(orjson.dumps(integral), strict=True)
        except ValidationError as error:
            raise InvalidParams("Invalid parameters; tools.get shows the schema", violations(error)) from None


_PARAMETERS_CONFIG = ConfigDict(
    extra="forbid", protected_namespaces=(), validate_by_name=True, validate_by_alias=True, hide_input_in_errors=True
)


def violations(error: ValidationError) -> list[dict[str, str]]:
    """`[{path, message, type}]` of a failed validation, bounded, without the rejected values."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return [_violation(detail) for detail in details[:ERRORS_REPORTED_MAX]]


def _violation(detail: ErrorDetails) -> dict[str, str]:
    message = detail["msg"] if detail["type"] in _VALUE_FREE else "Value is not valid here"
    path = ".".join(clean_text(str(part)[:64]) for part in detail["loc"])
    return {"path": path, "message": message, "type": detail["type"]}


def _whole_floats_as_integers(value: Any) -> Any:
    """A copy in which 1.0 is 1. Recursion is bounded by the codec: 64 levels."""
    if type(value) is float and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if type(value) is dict:
        return {key: _whole_floats_as_integers(item) for key, item in value.items()}
    if type(value) is list:
        return [_whole_floats_as_integers(item) for item in value]
    return value


class ResultSchema:
    """The result of one tool: its JSON Schema when it declares one, and the way to checked JSON bytes."""

    __slots__ = ("_adapter", "json_schema")

    def __init__(self, annotation: Any) -> None:
        self._adapter: TypeAdapter[Any] | None = None
        self.json_schema: dict[str, Any] | None = None
        if annotation is not Any:
            self._adapter = TypeAdapter(annotation)
            self.json_schema = self._adapter.json_schema(mode="serialization", schema_generator=_PlainJsonSchema)

    def encode(self, value: Any) -> bytes:
        """JSON bytes of a tool's return value.

        Raises RunFailed for what JSON cannot hold or the declared type does not allow: NaN, infinities, bytes,
        cycles, integers past 64 bits, lone surrogates, keys that are no strings.
        """
        try:
            plain = value if self._adapter is None else self._validated(value)
            encoded = orjson.dumps(plain, default=_plain_model)
            # orjson writes NaN and infinities as null, so only a null can hide one.
            if b"null" in encoded and _holds_non_finite([value]):
                raise ValueError("NaN or infinity")
        except Exception as error:  # serialisers and validators of the tool's own types run here
            raise RunFailed("failed", failure(RESULT_INVALID, "The tool returned an invalid result")) from error
        return encoded

    def _validated(self, value: Any) -> Any:
        assert self._adapter is not None
        return self._adapter.dump_python(self._adapter.validate_python(value), mode="json", by_alias=True)


def _plain_model(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _holds_non_finite(values: Iterable[Any]) -> bool:
    """Whether a float without a JSON form hides in there. Only called on what orjson could walk, so it ends."""
    for value in values:
        if type(value) is float:
            if not math.isfinite(value):
                return True
        elif isinstance(value, Mapping):
            if _holds_non_finite(value.values()):
                return True
        elif isinstance(value, list | tuple | set | frozenset):
            if _holds_non_finite(value):
                return True
        elif hasattr(value, "__dict__") and _holds_non_finite(vars(value).values()):
            return True
    return False
