"""Definitions for model providers: each provider's rules hold, and what does not fit is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Annotated, Any, Literal

import orjson
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field

from app.tools.builtin import builtin_tools
from app.tools.exports import FORMATS, Format, export, is_strict
from app.tools.tool import FunctionTool, tool
from tests.conftest import ROOT, Running, service_environ

BUILT_IN = builtin_tools("https://example.org", None)


class Point(BaseModel):
    x: float
    y: float


class Node(BaseModel):
    children: list[Node] = []


@tool
async def place(at: Annotated[Point, Field(description="Where")]) -> str:
    """Place it."""
    return ""


@tool
async def grow(root: Annotated[Node, Field(description="The tree")]) -> str:
    """Grow it."""
    return ""


@tool
async def pick(
    colour: Annotated[Literal["red", "blue"], Field(description="Which")],
    count: Annotated[int, Field(ge=1, description="How many")],
) -> str:
    """Pick some."""
    return ""


class Dot(BaseModel):
    kind: Literal["dot"]


class Line(BaseModel):
    kind: Literal["line"]
    length: int


@tool
async def draw(shape: Annotated[Dot | Line, Field(discriminator="kind", description="What")]) -> str:
    """Draw it."""
    return ""


@tool
async def terse(word: str) -> str:
    """Say less."""
    return word


def parameters_of(definition: dict[str, Any], target: Format) -> dict[str, Any]:
    if target == "openai-chat":
        definition = definition["function"]
    names = {"anthropic": "input_schema", "gemini": "parametersJsonSchema", "mcp": "inputSchema"}
    return definition[names.get(target, "parameters")]  # type: ignore[no-any-return]


def definitions(tools: list[FunctionTool], target: Format) -> list[dict[str, Any]]:
    exported = export(tools, target).tools
    return exported[0]["functionDeclarations"] if target == "gemini" else exported  # type: ignore[no-any-return]


def every_object(schema: Any) -> list[dict[str, Any]]:
    found = []
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            found.append(schema)
        for value in schema.values():
            found += every_object(value)
    elif isinstance(schema, list):
        for value in schema:
            found += every_object(value)
    return found


@pytest.mark.parametrize("target", FORMATS)
def test_every_built_in_tool_passes_the_rules_that_providers_share(target: Format) -> None:
    assert export(BUILT_IN, target).reports == []
    for definition in definitions(BUILT_IN, target):
        named = definition["function"] if target == "openai-chat" else definition
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", named["name"])
        assert 0 < len(named["description"]) <= 1024
        schema = parameters_of(definition, target)
        Draft202012Validator.check_schema(schema)
        assert schema["type"] == "object" and schema["additionalProperties"] is False
        assert not schema.keys() & {"anyOf", "oneOf", "allOf", "$ref", "$defs"} and "$ref" not in json.dumps(schema)
        assert all(property["description"] for property in schema["properties"].values())


def test_references_are_put_in_place() -> None:
    (definition,) = definitions([place], "anthropic")
    at = definition["input_schema"]["properties"]["at"]
    assert at["properties"]["x"] == {"type": "number"} and at["description"] == "Where"


@pytest.mark.parametrize("target", FORMATS)
def test_a_schema_that_contains_itself_is_left_out_and_named(target: Format) -> None:
    exported = export([grow, place], target)
    (report,) = [report for report in exported.reports if report.left_out]
    assert report.tool_id == "grow" and "contains itself" in report.reason
    assert [definition.get("name", "") for definition in definitions([grow, place], target)] in (["place"], [""])


@pytest.mark.parametrize("target", FORMATS)
def test_a_union_told_apart_by_a_field_refers_to_nothing_that_is_not_there(target: Format) -> None:
    (definition,) = definitions([draw], target)
    parameters = parameters_of(definition, target)
    assert "#/$defs" not in orjson.dumps(parameters).decode()
    assert [one["properties"]["kind"]["const"] for one in parameters["properties"]["shape"]["oneOf"]] == ["dot", "line"]


def test_strict_is_said_only_where_every_rule_of_it_holds() -> None:
    (picked,) = definitions([pick], "openai")
    assert picked["strict"] is True
    for schema in every_object(picked["parameters"]):
        assert schema["additionalProperties"] is False and set(schema["required"]) == set(schema["properties"])
    (placed,) = definitions([place], "openai")
    assert placed["strict"] is False, "an object inside is open"
    echo = next(one for one in definitions(BUILT_IN, "openai") if one["name"] == "echo")
    assert echo["strict"] is False, "a parameter of it is optional"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False},
        {"type": "object", "properties": {}, "required": []},
        {"type": "string", "maxLength": 5},
        {"type": "string", "format": "binary"},
        {"type": "string", "format": "uri"},
        {"type": "array"},
        {"type": "array", "items": {"type": "object"}},
        {"anyOf": [{"type": "string"}, {}]},
        {},
        True,
    ],
)
def test_what_strict_mode_refuses_is_not_strict(schema: Any) -> None:
    assert not is_strict(schema)


def test_a_parameter_without_a_description_is_reported_and_stays() -> None:
    exported = export([terse], "gemini")
    assert len(exported.tools[0]["functionDeclarations"]) == 1
    (report,) = exported.reports
    assert not report.left_out and "'word'" in report.reason


def test_rest_exports_what_the_caller_sees(service: Running) -> None:
    answer = service.http.get("/api/v1/tools/export", params={"format": "anthropic", "category": "search"}).json()
    assert {one["name"] for one in answer["tools"]} >= {"web_search", "wikipedia_search"}
    assert answer["format"] == "anthropic"
    refused = service.http.get("/api/v1/tools/export", params={"format": "other"})
    assert refused.status_code == 422 and refused.json()["error"]["data"]["errors"][0]["path"] == "format"


def test_the_command_line_prints_what_a_provider_takes() -> None:
    command = [sys.executable, "-m", "app", "tools", "export", "--format", "gemini"]
    done = subprocess.run(command, cwd=ROOT, env=service_environ(), capture_output=True, check=True)
    (declarations,) = json.loads(done.stdout)
    assert {one["name"] for one in declarations["functionDeclarations"]} == {one.spec.id for one in BUILT_IN}
    assert done.stderr == b""


def test_the_command_line_exports_for_openai_when_no_format_is_named() -> None:
    command = [sys.executable, "-m", "app", "tools", "export"]
    named, plain = (
        subprocess.run(asked, cwd=ROOT, env=service_environ(), capture_output=True, check=True).stdout
        for asked in ([*command, "--format", "openai"], command)
    )
    assert plain == named and {one["name"] for one in json.loads(plain)} == {one.spec.id for one in BUILT_IN}
