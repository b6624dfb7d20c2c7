"""A function and its decorator become a tool, or the declaration says at once what to change."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import TYPE_CHECKING, Annotated, Any, Self

import pytest
from pydantic import BaseModel, Field, computed_field
from typing_extensions import TypedDict

from app.calls import LOCAL_CALLER
from app.egress import EgressClient
from app.errors import InvalidParams
from app.tools.tool import CATEGORIES, FunctionTool, ToolContext, ToolDeclarationError, ToolSpec, tool

if TYPE_CHECKING:
    from decimal import Decimal


class Reply(BaseModel):
    text: str


def context() -> ToolContext:
    # No tool here goes out, so nothing behind the client is needed.
    return ToolContext(
        execution_id="e-1", caller=LOCAL_CALLER, deadline=math.inf, http=EgressClient.__new__(EgressClient)
    )


def call(declared: FunctionTool, **parameters: Any) -> Any:
    value = declared.invoke(declared.parameters.validate(parameters), context())
    return value if declared.blocking else asyncio.run(value)


@tool
def shout(text: Annotated[str, Field(max_length=10)], times: int = 1) -> str:
    """Say it louder."""
    return text.upper() * times


def test_a_bare_decorator_takes_everything_from_the_function() -> None:
    assert shout.spec == ToolSpec(id="shout", name="Shout", description="Say it louder.")
    assert shout.blocking
    assert call(shout, text="a", times=2) == "AA"
    assert shout("b") == "B"


def test_hints_are_the_schema() -> None:
    assert shout.parameters.json_schema == {
        "type": "object",
        "properties": {"text": {"type": "string", "maxLength": 10}, "times": {"type": "integer", "default": 1}},
        "required": ["text"],
        "additionalProperties": False,
    }
    assert shout.result.json_schema == {"type": "string"}


def test_what_is_declared_is_kept() -> None:
    @tool(
        id="fetch-2",
        name="Fetch",
        description="Fetches.",
        version="2.1.0",
        category="search",
        tags=["web"],
        capabilities=["read"],
        timeout=2.5,
        read_only=True,
        required_scopes=["web"],
        quotas={"daily": 5, "monthly": 50},
        cache_ttl=60,
    )
    async def fetch() -> Reply:
        return Reply(text="here")

    spec = fetch.spec
    assert (spec.id, spec.name, spec.description, spec.version) == ("fetch-2", "Fetch", "Fetches.", "2.1.0")
    assert (spec.tags, spec.capabilities, spec.required_scopes) == (("web",), ("read",), frozenset({"web"}))
    assert (spec.category, spec.timeout, spec.cache_ttl) == ("search", 2.5, 60)
    assert spec.quotas == {"daily": 5, "monthly": 50}
    assert not fetch.blocking
    assert fetch.result.encode(call(fetch)) == b'{"text":"here"}'


@tool
async def first(whoever: ToolContext, question: str) -> str:
    """Context first."""
    return f"{question} {whoever.execution_id}"


@tool
def keyword(question: str, *, ctx: ToolContext) -> str:
    """Context by keyword, in a thread."""
    return f"{question} {ctx.execution_id}"


@tool
async def optional(question: str, ctx: ToolContext | None = None) -> str:
    """Context that the tool's own tests leave out."""
    return f"{question} {ctx.execution_id if ctx else None}"


@tool
async def annotated(ctx: Annotated[ToolContext, "who calls"], question: str) -> str:
    """Context with a remark."""
    return f"{question} {ctx.execution_id}"


@pytest.mark.parametrize("declared", [first, keyword, optional, annotated])
def test_the_context_is_injected_by_type_under_any_name_and_is_no_parameter(declared: FunctionTool) -> None:
    assert declared.parameters.json_schema["properties"].keys() == {"question"}
    assert call(declared, question="who?") == "who? e-1"
    for name in ("ctx", "whoever"):
        with pytest.raises(InvalidParams):
            declared.parameters.validate({"question": "", name: {}})


def test_a_context_can_be_left_out_where_the_tool_says_so() -> None:
    assert asyncio.run(optional("who?")) == "who? None"


def test_defaults_are_not_shared_between_calls() -> None:
    @tool
    def collect(item: int, into: list[int] = [], more: list[int] = Field(default_factory=list)) -> list[list[int]]:  # noqa: B006, B008
        """Append."""
        into.append(item)
        more.append(item)
        return [into, more]

    assert call(collect, item=1) == [[1], [1]]
    assert call(collect, item=2) == [[2], [2]]


def test_a_default_inside_annotated_counts() -> None:
    @tool
    def wait(seconds: Annotated[int, Field(default=3, ge=1)]) -> int:
        """Wait."""
        return seconds

    assert call(wait) == 3
    assert wait.parameters.json_schema.get("required") is None


def test_parameters_may_have_the_names_of_model_methods() -> None:
    @tool
    def awkward(json: str, copy: bool, schema: int, model_name: str, self: int = 0) -> list[Any]:
        """Awkward names."""
        return [json, copy, schema, model_name, self]

    assert call(awkward, json="j", copy=True, schema=1, model_name="m") == ["j", True, 1, "m", 0]


def test_a_wrapped_function_keeps_its_schema() -> None:
    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await function(*args, **kwargs)

        return wrapper

    @tool
    @traced
    async def ask(question: str) -> str:
        """Ask."""
        return question

    assert ask.spec.id == "ask"
    assert call(ask, question="why?") == "why?"


def test_a_rebuilt_tool_is_the_same_tool() -> None:
    again = shout.rebuilt()
    assert again is not shout
    assert again.spec == shout.spec
    assert again.parameters.json_schema == shout.parameters.json_schema


def with_star(*words: str) -> None:
    """Stars."""


def with_double_star(**words: str) -> None:
    """Stars."""


def positional(word: str, /) -> None:
    """Slash."""


def untyped(word) -> None:  # type: ignore[no-untyped-def]
    """No hint."""


def only_for_checkers(amount: Decimal) -> None:
    """A hint that does not exist at run time."""


def private(_word: str) -> None:
    """A name that pydantic keeps for itself."""


def shadowing(model_config: str) -> None:
    """A name that pydantic keeps for itself."""


def unreadable(client: EgressClient) -> None:
    """Nothing in JSON makes a client."""


def unwritable() -> EgressClient:
    """Nothing in JSON shows a client."""
    raise NotImplementedError


def two_contexts(one: ToolContext, two: ToolContext) -> None:
    """One is enough."""


def context_by_place(context: ToolContext, /) -> None:
    """Nobody could give it by name."""


def many_contexts(*contexts: ToolContext) -> None:
    """Nobody could give them by name."""


def same_name(a: int, b: Annotated[int, Field(alias="a")]) -> None:
    """One value for two."""


def containing_itself(parent: Self) -> None:
    """No class that it could be."""


def generating() -> Iterator[int]:
    """Yields."""
    yield 1


async def generating_slowly() -> AsyncIterator[int]:
    """Yields."""
    yield 1


def too_wide(size: Annotated[int, Field(le=2**64)]) -> None:
    """A bound that JSON libraries do not write."""


def misspelt(word: "str |") -> None:  # noqa: F722
    """A hint that is not Python."""


FUNCTIONS = [
    with_star,
    with_double_star,
    positional,
    untyped,
    only_for_checkers,
    private,
    shadowing,
    unreadable,
    unwritable,
    two_contexts,
    context_by_place,
    many_contexts,
    same_name,
    containing_itself,
    generating,
    generating_slowly,
    too_wide,
    misspelt,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_function_that_cannot_be_a_tool_is_refused_by_name(function: Callable[..., Any]) -> None:
    with pytest.raises(ToolDeclarationError, match=f"^tool '{function.__name__}': "):
        tool(function)


class Lazy(BaseModel, defer_build=True):
    default: Iterable[int]


class Streamed(TypedDict, total=False):
    type: str
    metadata: list[Generator[int, None, None]]


@dataclasses.dataclass
class Pending:
    items: dict[str, Iterable[Any]]


class Growing(BaseModel):
    @computed_field
    def items(self) -> Iterable[int]:
        return []


ENDLESS: list[Any] = [
    Iterable,
    Iterable[int],
    Iterator[int],
    Generator[int, None, None],
    AsyncIterable[int],
    AsyncIterator[int],
    AsyncGenerator[int, None],
    list[Iterable[int]],
    Iterator[int] | None,
    Annotated[dict[str, Iterable[int]], Field()],
    Lazy,
    Streamed,
    Pending,
    Growing,
]


@pytest.mark.parametrize("annotation", ENDLESS, ids=repr)
def test_a_result_that_could_be_endless_is_refused_by_name(annotation: Any) -> None:
    def endless() -> Any:
        """Never ends."""

    endless.__annotations__["return"] = annotation
    with pytest.raises(ToolDeclarationError, match=r"^tool 'endless': .* declare and return list\[\.\.\.\]$"):
        tool(endless)


class Finite(BaseModel):
    type: str = "generator"
    kept: Annotated[dict[str, str], Field(json_schema_extra={"type": "generator"})] = {"type": "generator"}
    parts: Sequence[int] | tuple[int, ...] | set[int] | Mapping[str, int] = ()


def test_a_result_that_only_speaks_of_generators_is_none() -> None:
    def finite() -> Finite:
        """Ends."""
        return Finite()

    assert tool(finite).result.encode(finite()) == b'{"type":"generator","kept":{"type":"generator"},"parts":[]}'


def plain() -> None:
    """Do nothing."""


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"id": "no spaces"}, "id must match"),
    ({"id": "1st"}, "id must match"),
    ({"id": "x" * 65}, "id must match"),
    ({"id": "caf\u00e9"}, "id must match"),
    ({"id": "line\n"}, "id must match"),
    ({"id": 5}, "wrong type"),
    ({"description": " \n "}, "needs a docstring"),
    ({"category": "misc"}, "category must be one of"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": -1.0}, "timeout"),
    ({"timeout": math.nan}, "timeout"),
    ({"timeout": math.inf}, "timeout"),
    ({"timeout": "5"}, "wrong type"),
    ({"max_concurrent": 0}, "max_concurrent"),
    ({"max_concurrent": 10**30}, "max_concurrent must be 1 to 1000000000"),
    ({"retries": -1}, "retries"),
    ({"retries": 10**30}, "retries must be 0 to 1000000000"),
    ({"cost": -1}, "cost"),
    ({"cost": 10_001}, "cost"),
    ({"cache_ttl": 5}, "read_only"),
    ({"cache_ttl": 0, "read_only": True}, "cache_ttl"),
    ({"cache_ttl": 1e300, "read_only": True}, "cache_ttl must be over 0 and at most 1000000000 seconds"),
    ({"log_mode": "loud"}, "log_mode must be one of durable, strict, buffered"),
    ({"log_mode": ""}, "log_mode"),
    ({"log_payloads": "all"}, "log_payloads must be one of off, metadata, full"),
    ({"quotas": {"weekly": 5}}, "daily and monthly"),
    ({"quotas": {"daily": 0}}, "at least 1"),
    ({"read_only": True, "destructive": True}, "both"),
    ({"tags": "text"}, "list of texts"),
    ({"capabilities": "text"}, "list of texts"),
    ({"required_scopes": "admin"}, "list of texts"),
    ({"readonly": True}, "no option 'readonly'"),
    ({"version": 2}, "version has the wrong type"),
    ({"name": 5}, "name has the wrong type"),
    ({"title": b"Plain"}, "title has the wrong type"),
    ({"description": 5}, "description has the wrong type"),
    ({"cost": 1.5}, "cost has the wrong type"),
    ({"cost": True}, "cost has the wrong type"),
    ({"retries": 1.5}, "retries has the wrong type"),
    ({"max_concurrent": math.nan}, "max_concurrent has the wrong type"),
    ({"timeout": True}, "timeout has the wrong type"),
    ({"idempotent": "false"}, "idempotent has the wrong type: it must be True or False"),
    ({"tags": [2024]}, "tags must be a list of texts"),
    ({"required_scopes": [None]}, "required_scopes must be a list of texts"),
    ({"description": "half a \ud83d"}, "surrogates"),
    ({"tags": ["half a \ud83d"]}, "surrogates"),
]


@pytest.mark.parametrize(("options", "text"), OPTIONS, ids=repr)
def test_an_option_that_cannot_hold_is_refused_by_name(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ToolDeclarationError, match=text) as caught:
        tool(**options)(plain)
    assert repr(options.get("id", "plain")) in str(caught.value)


def test_a_function_without_a_docstring_is_refused() -> None:
    with pytest.raises(ToolDeclarationError, match="'lambda_x': needs a docstring"):
        tool(id="lambda_x")(lambda: None)


def test_every_category_can_be_declared() -> None:
    assert len(CATEGORIES) == 11
    for category in CATEGORIES:
        assert tool(category=category)(plain).spec.category == category


def test_an_unreported_progress_costs_nothing_and_raises_nothing() -> None:
    asyncio.run(context().progress(0.5, 1.0, "half"))
    assert context().remaining_s() == math.inf
