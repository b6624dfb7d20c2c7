"""What leaves as a result: JSON as it was declared, or a failure that tells nothing of the value."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from collections import deque
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import AwareDatetime, BaseModel, Field, computed_field, field_serializer, model_serializer
from typing_extensions import TypedDict

from app.errors import RESULT_INVALID, RunFailed
from app.tools.result_schema import ResultSchema
from tests.tools.values import CANARY, Colour, Place, json_values, unhurried


class Measured(BaseModel):
    value: float = 1.0
    note: str | None = None
    extra: Any = None


class Open(BaseModel, extra="allow"):
    note: str | None = None


class Computed(BaseModel):
    note: str | None = None

    @computed_field
    def ratio(self) -> float:
        return math.nan


class Hidden(BaseModel):
    secret: float = Field(default=math.nan, exclude=True)
    note: str | None = None


@dataclasses.dataclass(slots=True)
class Slotted:
    value: float
    note: str | None = None


@dataclasses.dataclass(slots=True)
class Box:
    value: Any


@dataclasses.dataclass
class Wide:
    value: Any
    added: dataclasses.InitVar[Any] = None
    _kept: float = 0.0

    def __post_init__(self, added: Any) -> None:
        self.more = added


@dataclasses.dataclass
class Listed:
    steps: list[int]
    _more: list[int] = dataclasses.field(default_factory=list)


class NotANumber(enum.Enum):
    NAN = math.nan
    LIST = [math.nan]


class Named(BaseModel):
    number: NotANumber = NotANumber.NAN
    note: str | None = None

    @field_serializer("number")
    def name_of(self, number: NotANumber) -> str:
        return number.name


class Steps(TypedDict):
    steps: list[int]


class Trail(BaseModel, defer_build=True):
    trails: list[Trail] = []
    steps: list[int] = []


def encoded(hint: Any, value: Any) -> Any:
    return orjson.loads(ResultSchema(hint).encode(value))


def refused(hint: Any, value: Any) -> None:
    with pytest.raises(RunFailed) as caught:
        ResultSchema(hint).encode(value)
    assert caught.value.cause.code == RESULT_INVALID.code
    assert CANARY not in caught.value.cause.message


def a_cycle() -> list[Any]:
    items: list[Any] = []
    items.append({"again": items})
    return items


WRITTEN: list[tuple[Any, Any, Any]] = [
    (Any, None, None),
    (Any, [1, "a", None, 2.5, True], [1, "a", None, 2.5, True]),
    (Any, {"a": Measured()}, {"a": {"value": 1.0, "note": None, "extra": None}}),
    (Any, Slotted(1.0), {"value": 1.0, "note": None}),
    (Any, [Wide([1.0], None, math.nan)], [{"value": [1.0], "more": None}]),
    (Any, {"t": datetime(2026, 11, 20, tzinfo=UTC)}, {"t": "2026-11-20T00:00:00+00:00"}),
    (Any, {"c": Colour.RED}, {"c": "red"}),
    (Any, {"s": {1}}, {"s": [1]}),
    (Any, {"d": Decimal("1.10")}, {"d": "1.10"}),
    (Any, 2**64 - 1, 2**64 - 1),
    (None, None, None),
    (dict, {"a": 1}, {"a": 1}),
    (dict[str, Any], {"a": {"b": [None]}}, {"a": {"b": [None]}}),
    (list[Any], [1], [1]),
    (Place, {"lat": 1}, {"lat": 1.0}),
    (Measured, Measured(value=2), {"value": 2.0, "note": None, "extra": None}),
    (Measured, {"value": 2}, {"value": 2.0, "note": None, "extra": None}),
    (Measured | None, None, None),
    (Slotted, Slotted(2.0), {"value": 2.0, "note": None}),
    (Hidden, Hidden(), {"note": None}),
    (Named, Named(), {"number": "NAN", "note": None}),
    (Any, Named(), {"number": "NAN", "note": None}),
    (datetime, datetime(2026, 11, 20, tzinfo=UTC), "2026-11-20T00:00:00Z"),
    (set[int], {1}, [1]),
    (dict[int, str], {1: "a"}, {"1": "a"}),
    (tuple[int, str], (1, "a"), [1, "a"]),
    (UUID, UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (Listed, Listed([1]), {"steps": [1], "_more": []}),
]


@pytest.mark.parametrize(("hint", "value", "written"), WRITTEN, ids=repr)
def test_results_are_written_as_json(hint: Any, value: Any, written: Any) -> None:
    assert encoded(hint, value) == written


LOOSE = [Any, dict, dict[str, Any], object]

NOT_JSON: list[dict[Any, Any]] = [
    {"x": math.nan},
    {"x": [math.inf]},
    {"x": (1.0, -math.inf)},
    {"x": Measured(value=math.nan)},
    {"x": Measured(extra={"deep": [math.nan]})},
    {"x": Open(hidden=math.nan)},
    {"x": Computed()},
    {"x": Slotted(math.nan)},
    {"x": Box({"deep": [math.nan]})},
    {"x": [Wide([math.nan])]},
    {"x": Wide({"deep": (Slotted(-math.inf),)})},
    {"x": Wide([], math.nan)},
    {"x": NotANumber.NAN},
    {"x": NotANumber.LIST},
    {"x": {math.nan}},
    {"x": b"bytes"},
    {"x": bytearray(b"bytes")},
    {"x": a_cycle()},
    {"x": 2**70},
    {"x": -(2**63) - 1},
    {"x": "\ud800"},
    {"\udfff": 1},
    {1: "a"},
    {None: "a"},
    {(1, 2): "a"},
    {"x": object()},
    {"x": 1j},
    {"x": itertools.count()},
    {"x": (number for number in itertools.count())},
    {"x": ValueError(CANARY)},
    {"x": orjson.Fragment(b'NaN, "x')},
    {"x": [orjson.Fragment("1")]},
    {"x": {"deep": (orjson.Fragment(b"{}"),)}},
    {"x": Box(orjson.Fragment(b"]"))},
    {"x": Wide(0, orjson.Fragment(b"]"))},
    {"x": Measured(extra=orjson.Fragment(b"]"))},
]


@pytest.mark.parametrize("hint", LOOSE, ids=repr)
@pytest.mark.parametrize("value", NOT_JSON)
def test_what_is_not_json_fails_wherever_it_hides(hint: Any, value: Any) -> None:
    refused(hint, value)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Measured, Measured(value=math.inf)),
        (Measured, Measured(extra=[math.nan])),
        (Open, Open(hidden=math.nan)),
        (Computed, Computed()),
        (Slotted, Slotted(math.nan)),
        (float, math.nan),
        (list[float], [math.nan]),
        (Place, {"lat": math.nan}),
        (dict[str, float | None], {"a": math.nan}),
        (int | dict[str, list[float]], {"a": [-math.inf]}),
        (dict[str, list[Any]], {"a": [math.nan]}),
        (list[dict], [{"a": math.nan}]),
        (str, "\ud800"),
        (int, 2**70),
        (bytes, b"\xff"),
        (dict[str, str], {"\ud800": "a"}),
    ],
    ids=repr,
)
def test_what_is_not_json_fails_inside_declared_types(hint: Any, value: Any) -> None:
    refused(hint, value)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (dict, None),
        (dict, [1]),
        (list, {"a": 1}),
        (None, 0),
        (int, CANARY),
        (str, 5),
        (Place, {"lat": CANARY}),
        (Place, {}),
        (Measured, {"value": CANARY}),
        (Measured, CANARY),
        (Colour, "green"),
        (Literal["a"], "b"),
        (list[int], [1, CANARY]),
    ],
    ids=repr,
)
def test_a_result_of_another_type_than_declared_fails(hint: Any, value: Any) -> None:
    refused(hint, value)


@pytest.mark.parametrize(
    "hint",
    [list, list[int], tuple[int, ...], tuple[int], set[int], frozenset[int], deque[int], Sequence[int], Steps, Trail],
    ids=repr,
)
def test_an_iterator_is_no_list_for_it_may_never_end(hint: Any) -> None:
    refused(hint, (number for number in (1,)))
    refused(hint, {"steps": (number for number in (1,))})
    refused(list[hint], [map(int, "1")])


@pytest.mark.parametrize(
    "value", [[1, 2], (1, 2), deque([1, 2]), range(1, 3), {1: 0, 2: 0}.keys(), {0: 1, 1: 2}.values()], ids=repr
)
def test_whatever_has_a_length_is_a_list(value: Any) -> None:
    assert encoded(list[int], value) == encoded(tuple[int, ...], value) == [1, 2]
    assert encoded(Steps, {"steps": value}) == {"steps": [1, 2]}


def test_lists_within_lists_of_their_own_type_are_written() -> None:
    assert encoded(Trail, {"trails": [{"steps": (1,)}]}) == {"trails": [{"trails": [], "steps": [1]}], "steps": []}
    refused(Trail, {"trails": [{"steps": iter([1])}]})


def unvalidated() -> list[Any]:
    late = Trail()
    late.steps = iter((1,))  # type: ignore[assignment]
    return [
        Measured(extra=iter((1,))),
        Measured(extra={"deep": [map(int, "1")]}),
        Measured(extra=deque([iter((1,))])),
        Open(more=iter((1,))),  # type: ignore[call-arg]
        Trail(trails=[late]),
        Trail.model_construct(steps=(number for number in (1,))),
    ]


@pytest.mark.parametrize("number", range(len(unvalidated())))
def test_an_iterator_is_not_run_though_nothing_was_declared_of_it(number: int) -> None:
    refused(Any, {"x": unvalidated()[number]})
    refused(type(unvalidated()[number]), unvalidated()[number])


def test_an_iterator_is_not_run_in_what_no_type_is_held_to() -> None:
    refused(Listed, Listed(iter((1,))))  # type: ignore[arg-type]
    refused(Listed, Listed([], iter((1,))))  # type: ignore[arg-type]
    refused(tuple[Any], (iter((1,)),))
    refused(set[Any], {iter((1,))})
    refused(dict[int, Any], {1: [iter((1,))]})


def test_a_serializer_that_raises_fails_the_run_and_tells_nothing() -> None:
    class Broken(BaseModel):
        @computed_field
        def ratio(self) -> float:
            raise KeyError(CANARY)

    refused(Broken, Broken())
    refused(Any, {"x": Broken()})


@unhurried
@given(json_values)
def test_any_json_value_comes_back_as_it_was(value: Any) -> None:
    assert encoded(Any, value) == value
    assert encoded(object, {"x": value}) == {"x": value}


@unhurried
@given(st.dictionaries(st.text(), json_values))
def test_any_json_object_comes_back_as_it_was(value: dict[str, Any]) -> None:
    assert encoded(dict[str, Any], value) == value
    assert encoded(dict, value) == value


def test_the_result_schema_is_published_when_declared() -> None:
    assert ResultSchema(Any).json_schema is None
    assert ResultSchema(Place).json_schema == {
        "type": "object",
        "properties": {"lat": {"type": "number"}},
        "required": ["lat"],
        "title": "Place",
    }


@pytest.mark.parametrize(
    ("annotation", "value", "described"),
    [
        (datetime, datetime(2026, 1, 1), {"type": "string"}),
        (AwareDatetime, datetime(2026, 1, 1, tzinfo=UTC), {"type": "string", "format": "date-time"}),
        (time, time(1, 2), {"type": "string"}),
        (timedelta, timedelta(seconds=1.5), {"type": "string"}),
        (date, date(2026, 1, 1), {"type": "string", "format": "date"}),
        (Annotated[str, Field(pattern=r"(?i)\Aabc\z", max_length=3)], "ABC", {"type": "string", "maxLength": 3}),
        (Decimal, Decimal("1.50"), {"type": "string"}),
    ],
    ids=["naive", "aware", "time", "duration", "date", "pattern", "decimal"],
)
def test_what_clients_read_otherwise_is_not_in_the_schema(annotation: Any, value: Any, described: Any) -> None:
    schema = ResultSchema(dict[str, annotation])
    assert schema.json_schema == {"type": "object", "additionalProperties": described}
    assert orjson.loads(schema.encode({"a": value})).keys() == {"a"}


def test_patterns_of_keys_are_not_in_the_schema() -> None:
    schema = ResultSchema(dict[Annotated[str, Field(pattern=r"(?i)\Aabc\z")], int])
    assert schema.json_schema == {"type": "object", "additionalProperties": {"type": "integer"}}


@dataclasses.dataclass
class Branch:
    length: Annotated[float, Field(ge=0)]
    kind: Literal["oak", "elm"] = "oak"
    ends: tuple[int, ...] = ()
    twigs: list[Branch] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Branch, Branch(None)),  # type: ignore[arg-type]
        (Branch, Branch(-1.0)),
        (Branch | None, Branch(1.0, "ash")),  # type: ignore[arg-type]
        (list[Branch], [Branch(1.0, ends=("a",))]),  # type: ignore[arg-type]
        (dict[str, Branch], {"a": Branch(1.0, twigs=[Branch(1.0), Branch("b")])}),  # type: ignore[arg-type]
    ],
)
def test_a_dataclass_that_does_not_hold_what_it_says_fails(hint: Any, value: Any) -> None:
    refused(hint, value)


def test_a_dataclass_is_written_as_what_it_says() -> None:
    given = Branch(1, ends=[2.0], twigs=(Branch(3),))  # type: ignore[arg-type]
    twig = {"length": 3.0, "kind": "oak", "ends": [], "twigs": []}
    assert encoded(Branch, given) == {"length": 1.0, "kind": "oak", "ends": [2], "twigs": [twig]}


@dataclasses.dataclass
class Counted:
    value: int
    added: dataclasses.InitVar[int] = 1
    more: int = dataclasses.field(default=0, init=False)

    def __post_init__(self, added: int) -> None:
        self.more = self.value + added


def test_a_dataclass_that_cannot_be_made_again_from_its_fields_is_taken_as_it_is() -> None:
    assert encoded(Counted, Counted(2, 3)) == {"value": 2, "more": 5}


class Untold(BaseModel):
    at: int
    where: Path = Path("/")

    @field_serializer("at")
    def shown(self, at):  # type: ignore[no-untyped-def]
        return f"at {at}"


class Sentence(BaseModel):
    word: str

    @model_serializer
    def whole(self):  # type: ignore[no-untyped-def]
        return self.word


class Told(BaseModel):
    at: int

    @field_serializer("at")
    def shown(self, at: int) -> str:
        return f"at {at}"


def test_a_serializer_that_says_what_it_makes_is_published_so() -> None:
    schema = ResultSchema(Told)
    assert schema.json_schema is not None
    assert schema.json_schema["properties"]["at"] == {"type": "string"}


@pytest.mark.parametrize("result", [Untold(at=1), Sentence(word="a")])
def test_a_serializer_that_does_not_say_what_it_makes_is_not_published_as_the_field_is(result: BaseModel) -> None:
    schema = ResultSchema(type(result))
    written = orjson.loads(schema.encode(result))
    assert schema.json_schema is not None
    assert Draft202012Validator(schema.json_schema).is_valid(written)
    assert schema.is_object == isinstance(written, dict)
    assert not schema.is_object or schema.json_schema["properties"]["where"]["type"] == "string"
