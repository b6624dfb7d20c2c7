"""Parameters that clients repeat in headers: which marks can stand, and where."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from app.tools.mirrored import Mirrored, mirrored
from app.tools.tool import ToolDeclarationError, tool


def marked(hint: Any, name: Any = "Region") -> Any:
    return Annotated[hint, Field(json_schema_extra={"x-mcp-header": name})]


def declare(**hints: Any) -> Any:
    async def declared(**given: Any) -> None:
        """A tool."""

    parameters = ", ".join(hints)
    scope: dict[str, Any] = {}
    exec(f"async def declared({parameters}):\n    'A tool.'", scope)
    scope["declared"].__annotations__ = hints
    return tool(scope["declared"])


def test_a_mark_names_a_header_and_the_way_to_its_value() -> None:
    found = declare(region=marked(str), count=marked(int, "Row-Count"), dry=marked(bool, "dry"), other=str)
    assert found.parameters.mirrored == (
        Mirrored("region", ("region",), "string"),
        Mirrored("row-count", ("count",), "integer"),
        Mirrored("dry", ("dry",), "boolean"),
    )


def test_a_mark_may_stand_in_an_object_that_is_written_out() -> None:
    nested = {"type": "object", "properties": {"region": {"type": "string", "x-mcp-header": "Region"}}}
    schema = {"type": "object", "properties": {"where": nested, "x-mcp-header": {"type": "string"}}}
    assert mirrored(schema) == (Mirrored("region", ("where", "region"), "string"),)


class Where(BaseModel):
    region: marked(str)  # type: ignore[valid-type]


@pytest.mark.parametrize(
    "hints",
    [
        {"a": marked(float)},
        {"a": marked(list[str])},
        {"a": marked(str | None)},
        {"a": marked(dict[str, str])},
        {"a": marked(Any)},
        {"a": list[marked(str)]},
        {"a": marked(str) | int},
        {"a": Where},
        {"a": marked(str), "b": marked(str, "REGION")},
        *({"a": marked(str, name)} for name in ("", "a b", "ä", "a:b", "a\r\nb", 5, None, "x" * 129)),
    ],
    ids=str,
)
def test_a_mark_that_clients_would_drop_the_tool_for_is_refused(hints: dict[str, Any]) -> None:
    with pytest.raises(ToolDeclarationError, match="x-mcp-header"):
        declare(**hints)


def test_a_literal_of_texts_is_a_text() -> None:
    assert declare(region=marked(Literal["eu", "us"])).parameters.mirrored[0].type == "string"


@pytest.mark.parametrize("member", ["default", "examples", "const", "enum"])
def test_values_in_a_schema_are_no_marks(member: str) -> None:
    assert mirrored({"properties": {"a": {"type": "object", member: {"x-mcp-header": 5}}}}) == ()


@pytest.mark.parametrize("keyword", ["items", "not", "if", "then", "additionalProperties"])
def test_a_mark_under_another_keyword_is_refused(keyword: str) -> None:
    part = {"type": "string", "x-mcp-header": "Region"}
    with pytest.raises(TypeError, match="properties alone"):
        mirrored({"type": "object", "properties": {"a": {"type": "object", keyword: part}}})
    with pytest.raises(TypeError, match="properties alone"):
        mirrored({"type": "object", "allOf": [{"properties": {"a": part}}]})
    with pytest.raises(TypeError, match="properties alone"):
        mirrored({"type": "object", "x-mcp-header": "Root", "properties": {}})
