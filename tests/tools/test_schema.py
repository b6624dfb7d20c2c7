"""What is accepted as parameters: JSON types as they are, and never a rejected value in an error."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import AfterValidator, BaseModel, Discriminator, Field, HttpUrl

from app.errors import InvalidParams
from app.tools.schema import ERRORS_BUILT_MAX, ERRORS_REPORTED_MAX, ParameterSchema
from tests.tools.values import CANARY, Colour, Place, json_values, unhurried


class Level(enum.IntEnum):
    LOW = 0
    HIGH = 1


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Round(BaseModel):
    colour: Literal[Colour.RED]
    radius: int


class Square(BaseModel):
    colour: Literal[Colour.BLUE]
    side: int


Shape = Annotated[Round | Square, Discriminator("colour")]


class Address(BaseModel):
    street: str
    number: int = 1
    flags: dict[str, bool] = {}


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


Pet = Annotated[Cat | Dog, Discriminator("kind")]


class Parity(BaseModel):
    bit: Literal[0, 1] = 0
    children: list[Parity] = []


def schema(**fields: Any) -> ParameterSchema:
    return ParameterSchema(
        {name: field if isinstance(field, tuple) else (field, ...) for name, field in fields.items()}
    )


def refusals(parameters: ParameterSchema, value: Any) -> list[dict[str, str]]:
    with pytest.raises(InvalidParams) as caught:
        parameters.validate(value)
    errors = caught.value.data["errors"]
    assert all(error.keys() == {"path", "message", "type"} for error in errors)
    return errors


ACCEPTED: list[tuple[Any, Any, Any]] = [
    (int, 1, 1),
    (int, 1.0, 1),
    (int, -0.0, 0),
    (int, 1e19, 10**19),
    (int, float(-(2**63)), -(2**63)),
    (float, 1, 1.0),
    (float, 1.5, 1.5),
    (bool, True, True),
    (str, "1", "1"),
    (int | None, None, None),
    (int | float, 2, 2),
    (int | float, 2.5, 2.5),
    (bool | int, 1, 1),
    (bool | int, True, True),
    (list[int], [1, 2.0], [1, 2]),
    (set[int], [1, 1], {1}),
    (frozenset[str], ["a"], frozenset({"a"})),
    (tuple[int, str], [1, "a"], (1, "a")),
    (tuple[int, ...], [], ()),
    (dict[str, int], {"a": 1.0}, {"a": 1}),
    (Any, {"a": [None]}, {"a": [None]}),
    (datetime, "2026-11-20T15:00:00Z", datetime(2026, 11, 20, 15, tzinfo=UTC)),
    (date, "2026-11-20", date(2026, 11, 20)),
    (timedelta, "PT90S", timedelta(seconds=90)),
    (Decimal, "1.10", Decimal("1.10")),
    (UUID, "12345678-1234-5678-1234-567812345678", UUID("12345678-1234-5678-1234-567812345678")),
    (Colour, "red", Colour.RED),
    (Level, 1, Level.HIGH),
    (Literal["a", 1], "a", "a"),
    (Literal[1, 2], 1.0, 1),
    (Literal[Colour.RED], "red", Colour.RED),
    (Literal[Level.HIGH, "a"], 1.0, Level.HIGH),
    (Shape, {"colour": "blue", "side": 2.0}, Square(colour=Colour.BLUE, side=2)),
    (Iterable[int], [1, 2.0], [1, 2]),
    (Iterable, ["a", 1], ["a", 1]),
    (Literal[True], True, True),
    (Point, {"x": 1.0}, Point(1)),
    (Place, {"lat": 1}, {"lat": 1.0}),
    (Address, {"street": "s", "number": 2.0}, Address(street="s", number=2)),
    (Pet, {"kind": "cat", "lives": 9}, Cat(kind="cat", lives=9)),
    (list[Address], [{"street": "s"}], [Address(street="s")]),
    (Parity, {"bit": 1, "children": [{"bit": 0}]}, Parity(bit=1, children=[Parity(bit=0)])),
]


@pytest.mark.parametrize(("hint", "given_json", "received"), ACCEPTED)
def test_json_reads_as_the_declared_type(hint: Any, given_json: Any, received: Any) -> None:
    value = schema(x=hint).validate({"x": given_json})["x"]
    assert value == received
    assert type(value) is type(received)


REFUSED: list[tuple[Any, Any]] = [
    (int, "1"),
    (int, True),
    (int, 1.5),
    (int, 1e300),
    (int, None),
    (int, [1]),
    (float, "1"),
    (float, True),
    (bool, 1),
    (bool, 0),
    (bool, "true"),
    (str, 1),
    (str, True),
    (str, None),
    (str, ["a"]),
    (int | float, True),
    (int | str, True),
    (list[int], {"0": 1}),
    (list[int], ["1"]),
    (set[int], {"a": 1}),
    (tuple[int, str], [1]),
    (tuple[int, str], ["1", "a"]),
    (dict[str, int], [["a", 1]]),
    (dict[str, int], {"a": True}),
    (datetime, 5),
    (datetime, 5.5),
    (datetime, "yesterday"),
    (date, 5),
    (timedelta, 5),
    (Decimal, True),
    (UUID, 5),
    (UUID, "nonsense"),
    (Colour, "green"),
    (Colour, 1),
    (Level, True),
    (Level, False),
    (Level, "1"),
    (Literal["a", "b"], "c"),
    (Literal[1, 2], "1"),
    (Literal[Colour.RED], "blue"),
    (Literal[Colour.RED], "RED"),
    (Literal[Level.HIGH], True),
    (Shape, {"colour": "red", "side": 1}),
    (Shape, {"colour": "green"}),
    (Iterable[int], ["a"]),
    (Iterable[str], "ab"),
    (Iterable[str], {"a": 1}),
    (Iterable, "ab"),
    (Literal[1, 2], True),
    (Literal[True], 1),
    (Literal[True], 1.0),
    (Point, {"x": "1"}),
    (Point, [1]),
    (Place, {"lat": "1"}),
    (Address, {"street": 1}),
    (Address, {"street": "s", "number": "1"}),
    (Address, {"street": "s", "flags": {"a": 1}}),
    (Pet, {"kind": "cat", "lives": "9"}),
    (Pet, {"kind": "cow"}),
    (Annotated[int, Field(strict=False)], "1"),
    (Annotated[int, Field(ge=3)], 2),
    (Annotated[str, Field(max_length=3)], "four"),
    (Parity, {"bit": True}),
    (Parity, {"children": [{"children": [{"bit": False}]}]}),
]


@pytest.mark.parametrize(("hint", "given_json"), REFUSED)
def test_json_types_are_never_converted(hint: Any, given_json: Any) -> None:
    assert refusals(schema(x=hint), {"x": given_json})[0]["path"].startswith("x")


@pytest.mark.parametrize("parameters", [None, 1, "x", [], [["x", 1]], True])
def test_parameters_must_be_an_object(parameters: Any) -> None:
    assert refusals(schema(x=int), parameters)[0]["path"] == ""


def test_unknown_parameters_are_refused_by_name() -> None:
    assert refusals(schema(x=int), {"x": 1, "y": 2}) == [
        {"path": "y", "message": "Extra inputs are not permitted", "type": "extra_forbidden"}
    ]


def test_a_missing_parameter_is_named() -> None:
    assert refusals(schema(x=int, y=Address), {"y": {}}) == [
        {"path": "x", "message": "Field required", "type": "missing"},
        {"path": "y.street", "message": "Field required", "type": "missing"},
    ]


def test_defaults_are_applied_and_mutable_ones_are_not_shared() -> None:
    parameters = schema(
        plain=(int, 3),
        items=(list[int], []),
        made=(dict[str, int], Field(default_factory=dict)),
        annotated=(Annotated[int, Field(default=7)], Field()),
    )
    first, second = parameters.validate({}), parameters.validate({})
    assert first == {"plain": 3, "items": [], "made": {}, "annotated": 7}
    first["items"].append(1)
    first["made"]["a"] = 1
    assert second == parameters.validate({}) == {"plain": 3, "items": [], "made": {}, "annotated": 7}


def test_an_alias_is_the_only_name_on_the_wire() -> None:
    parameters = schema(filter_=Annotated[int, Field(alias="filter")])
    assert parameters.validate({"filter": 1}) == {"filter_": 1}
    assert parameters.json_schema["properties"].keys() == {"filter"}
    assert {error["path"] for error in refusals(parameters, {"filter_": 1})} == {"filter", "filter_"}


NAMES = [
    "json",
    "copy",
    "schema",
    "dict",
    "validate",
    "construct",
    "model_x",
    "model_fields",
    "model_dump",
    "self",
    "cls",
]


@pytest.mark.parametrize("name", [*NAMES, "model_name", "fields", "warnings", "class_"])
def test_a_parameter_may_have_any_public_name(name: str) -> None:
    assert schema(**{name: int}).validate({name: 1}) == {name: 1}


@pytest.mark.parametrize("name", ["model_config", "_private", "__class__", "__config__"])
def test_a_parameter_that_could_never_be_passed_is_refused_when_declared(name: str) -> None:
    with pytest.raises(TypeError):
        schema(**{name: int})


def test_paths_lead_through_the_document_and_not_through_unions() -> None:
    parameters = schema(x=int | list[Cat | Dog], pet=(Pet | None, None))
    paths = {error["path"] for error in refusals(parameters, {"x": [{"kind": "cat", "lives": "9"}]})}
    assert paths == {"x", "x.0.lives", "x.0.kind", "x.0.tricks"}
    assert refusals(schema(pet=Pet), {"pet": {"kind": "cat"}})[0]["path"] == "pet.lives"
    assert refusals(schema(x=tuple[int, int]), {"x": [1]})[0]["path"] == "x.1"


def _quoting(value: str) -> str:
    raise ValueError(f"bad value {value}")


CANARY_TYPES: list[Any] = [
    int,
    float,
    bool,
    list[int],
    set[int],
    tuple[int, int],
    dict[str, int],
    datetime,
    date,
    timedelta,
    Decimal,
    UUID,
    bytes | int,
    HttpUrl,
    Colour,
    Level,
    Literal["a", "b"],
    Point,
    Place,
    Address,
    Pet,
    int | list[str],
    Annotated[str, Field(max_length=2)],
    Annotated[str, Field(pattern="^[0-9]+$")],
    Annotated[str, AfterValidator(_quoting)],
]


TAKES_THE_CANARY = (bytes | int, int | list[str])
"""Where one value of the test below is right; every other is rejected."""


@pytest.mark.parametrize("hint", CANARY_TYPES)
@pytest.mark.parametrize(
    "value",
    [
        CANARY,
        [CANARY],
        {"kind": CANARY},
        {"street": CANARY, "number": CANARY, "lat": CANARY, "x": CANARY, "kind": "cat"},
    ],
)
def test_a_rejected_value_is_never_told(hint: Any, value: Any) -> None:
    try:
        schema(x=hint).validate({"x": value})
    except InvalidParams as error:
        assert CANARY not in orjson.dumps(error.as_error()).decode()
        assert CANARY not in str(error)
        assert error.__suppress_context__
    else:
        assert hint in TAKES_THE_CANARY


def test_the_error_list_is_bounded() -> None:
    parameters = schema(x=list[int])
    assert len(refusals(parameters, {"x": ["a"] * (ERRORS_REPORTED_MAX + 5)})) == ERRORS_REPORTED_MAX
    assert refusals(parameters, {"x": ["a"] * (ERRORS_BUILT_MAX + 1)}) == [
        {"path": "", "message": f"{ERRORS_BUILT_MAX + 1} violations", "type": "too_many_errors"}
    ]


def test_a_path_is_bounded_and_printable() -> None:
    assert refusals(schema(), {"\u202e\x00" + "k" * 1_000: 1})[0]["path"] == "k" * 62


OUTSIDE_JSON = [2**70, "\ud800", {1: 2}, b"x", {"a": {2}}, object()]


@pytest.mark.parametrize("value", OUTSIDE_JSON)
def test_what_json_cannot_hold_is_refused_and_not_raised(value: Any) -> None:
    assert refusals(schema(x=Any), {"x": value})[0]["type"] == "json_invalid"


def test_nesting_past_the_parser_is_refused_and_not_raised() -> None:
    for depth in (220, 10_000):
        value: Any = 0
        for _ in range(depth):
            value = [value]
        assert refusals(schema(x=Any), {"x": value})


ALL_SORTS = schema(i=int, f=float, b=(bool, False), s=(str, ""), l=(list[int], []), e=(Level, 0), a=(Any, None))


@unhurried
@given(st.dictionaries(st.sampled_from(["i", "f", "b", "s", "l", "e", "a", "z"]), json_values))
@example({"i": 1.0, "f": 1, "e": True})
@example({"i": 1.0, "f": 1, "e": 1.0, "l": [2.0]})
def test_the_validator_accepts_exactly_what_the_published_schema_accepts(document: dict[str, Any]) -> None:
    published = Draft202012Validator(ALL_SORTS.json_schema).is_valid(document)
    try:
        ALL_SORTS.validate(document)
    except InvalidParams:
        assert not published
    else:
        assert published


def test_the_published_schema_is_small_and_closed() -> None:
    parameters = schema(message=Annotated[str, Field(max_length=10, description="Text")], uppercase=(bool, False))
    assert parameters.json_schema == {
        "type": "object",
        "properties": {
            "message": {"type": "string", "maxLength": 10, "description": "Text"},
            "uppercase": {"type": "boolean", "default": False},
        },
        "required": ["message"],
        "additionalProperties": False,
    }
    assert schema().json_schema["properties"] == {}


def test_a_default_that_a_caller_could_not_say_is_not_published() -> None:
    parameters = ParameterSchema(
        {
            "needed": (str, ...),
            "nothing": (int, None),
            "below": (Annotated[int, Field(ge=1)], 0),
            "beyond": (int, 2**70),
            "named": (Annotated[int, Field(alias="published")], "text"),
            "whole": (int, 1.0),
            "good": (int | None, None),
        }
    )
    published = parameters.json_schema["properties"]
    assert [name for name, one in published.items() if "default" in one] == ["whole", "good"]
    assert parameters.json_schema["required"] == ["needed"]
    assert parameters.validate({"needed": "a"})["nothing"] is None


def test_a_default_that_json_cannot_hold_is_not_published() -> None:
    parameters = schema(most=(float, math.inf), steps=(list[float], [1.0, math.nan]), least=(float, 0.5))
    assert parameters.validate({})["most"] == math.inf
    assert [one.get("default") for one in parameters.json_schema["properties"].values()] == [None, None, 0.5]
    assert "default" not in parameters.json_schema["properties"]["most"]
