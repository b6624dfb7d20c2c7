"""Tool definitions in the shapes that model providers take, and what of a tool does not fit into one.

Nothing is weakened in silence: a schema goes out as it is, with references put in place, or its tool is left out and
named with the reason. Knows no provider's address and no HTTP; docs/exports.md says whose rules these are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from app.tools.tool import Tool

Format = Literal["openai", "openai-chat", "anthropic", "gemini", "mcp"]

DESCRIPTION_CHARACTERS_MAX = 1_024
"""OpenAI refuses a longer description of a function."""

COMBINATORS = frozenset({"anyOf", "oneOf", "allOf", "not", "if", "then", "else"})

# fmt: off
STRICT_KEYWORDS = frozenset(
    {
        "type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "description",
        "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems",
        "maxItems",
    }
)
# fmt: on
"""What OpenAI's strict mode takes wherever it is described; lengths of strings and defaults are refused by some models
(openai-node pull request 1988, 2026-07)."""


STRICT_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})
"""Another one and the whole request is refused (OpenAI's guide to structured outputs, "Supported schemas")."""


class Report(NamedTuple):
    """What an exporter has to say of one tool. `left_out`: it is not among the tools."""

    tool_id: str
    reason: str
    left_out: bool


class Export(NamedTuple):
    """`tools` as the provider takes them; for Gemini it is what goes into its `tools` list."""

    tools: list[dict[str, Any]]
    reports: list[Report]

    def as_dict(self, target: Format) -> dict[str, Any]:
        return {"format": target, "tools": self.tools, "reports": [report._asdict() for report in self.reports]}


class Inexpressible(Exception):
    """A schema that this provider cannot be told; the text says what of it."""


def export(tools: Iterable[Tool], target: Format) -> Export:
    """Definitions of all tools that can be expressed."""
    definitions: list[dict[str, Any]] = []
    reports: list[Report] = []
    for tool in tools:
        try:
            parameters = inlined(tool.parameters.json_schema)
            _check_root(parameters)
        except Inexpressible as error:
            reports.append(Report(tool.spec.id, str(error), left_out=True))
            continue
        definitions.append(_SHAPES[target](tool, parameters))
        reports += [Report(tool.spec.id, reason, left_out=False) for reason in lint(tool, parameters, target)]
    if target == "gemini":
        definitions = [{"functionDeclarations": definitions}] if definitions else []
    return Export(definitions, reports)


def lint(tool: Tool, parameters: Mapping[str, Any], target: Format) -> Iterator[str]:
    """What a model or a provider will do less well with, though it is taken."""
    if len(tool.spec.description) > DESCRIPTION_CHARACTERS_MAX and target in ("openai", "openai-chat"):
        yield f"description is over {DESCRIPTION_CHARACTERS_MAX} characters"
    for name, schema in parameters["properties"].items():
        if not (isinstance(schema, dict) and schema.get("description")):
            yield f"parameter {name!r} has no description"


def _check_root(parameters: Mapping[str, Any]) -> None:
    if parameters.get("type") != "object":
        raise Inexpressible("the root of its parameters is no object")
    if found := COMBINATORS & parameters.keys():
        raise Inexpressible(f"the root of its parameters has {min(found)}")


def inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with every `$ref` to its own definitions put in place. Raises Inexpressible for what refers to itself,
    or to elsewhere."""
    definitions = schema.get("$defs", {})

    def put_in(value: Any, inside: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [put_in(item, inside) for item in value]
        if not isinstance(value, dict):
            return value
        reference = value.get("$ref")
        if reference is None:
            return {
                name: put_in(item, inside) for name, item in value.items() if not _only_with_references(name, value)
            }
        name = str(reference).removeprefix("#/$defs/")
        if name not in definitions:
            raise Inexpressible(f"it refers to {reference}")
        if name in inside:
            raise Inexpressible(f"its type {name} contains itself")
        beside = {key: put_in(item, inside) for key, item in value.items() if key != "$ref"}
        return {**put_in(definitions[name], (*inside, name)), **beside}

    whole: dict[str, Any] = put_in(dict(schema), ())
    return whole


def _only_with_references(name: str, schema: Mapping[str, Any]) -> bool:
    """The definitions, and the hint of OpenAPI which of them a value is: the choices themselves say it too."""
    told = schema[name]
    return name == "$defs" or (
        name == "discriminator" and "oneOf" in schema and isinstance(told, dict) and "mapping" in told
    )


def is_strict(schema: Any) -> bool:
    """Whether OpenAI's strict mode takes it as it is: closed objects, everything required, known keywords alone."""
    if not isinstance(schema, dict) or not schema.keys() <= STRICT_KEYWORDS:
        return False
    if schema.get("format", "uuid") not in STRICT_FORMATS or (schema.get("type") == "array" and "items" not in schema):
        return False
    if schema.get("type") == "object":
        properties = schema.get("properties", {})
        closed = schema.get("additionalProperties") is False and set(schema.get("required", ())) == set(properties)
        return closed and all(map(is_strict, properties.values()))
    parts = [*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else [])]
    return ("type" in schema or "enum" in schema or "const" in schema or bool(parts)) and all(map(is_strict, parts))


def _openai(tool: Tool, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.spec.id,
        "description": tool.spec.description,
        "parameters": parameters,
        "strict": is_strict(parameters),
    }


def _openai_chat(tool: Tool, parameters: dict[str, Any]) -> dict[str, Any]:
    function = _openai(tool, parameters)
    del function["type"]
    return {"type": "function", "function": function}


def _anthropic(tool: Tool, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"name": tool.spec.id, "description": tool.spec.description, "input_schema": parameters}


def _gemini(tool: Tool, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"name": tool.spec.id, "description": tool.spec.description, "parametersJsonSchema": parameters}


def _mcp(tool: Tool, parameters: dict[str, Any]) -> dict[str, Any]:
    """Without references, which some clients do not follow; POST /mcp itself serves the schema as it is."""
    spec = tool.spec
    title = spec.title or spec.name
    definition: dict[str, Any] = {
        "name": spec.id,
        "title": title,
        "description": spec.description,
        "inputSchema": parameters,
        "annotations": {
            "title": title,
            "readOnlyHint": spec.read_only,
            "destructiveHint": spec.destructive,
            "idempotentHint": spec.idempotent or spec.read_only,
        },
    }
    if tool.result.json_schema is not None and tool.result.is_object:
        definition["outputSchema"] = tool.result.json_schema
    return definition


_SHAPES: Mapping[Format, Callable[[Tool, dict[str, Any]], dict[str, Any]]] = {
    "openai": _openai,
    "openai-chat": _openai_chat,
    "anthropic": _anthropic,
    "gemini": _gemini,
    "mcp": _mcp,
}
FORMATS: tuple[Format, ...] = tuple(_SHAPES)
