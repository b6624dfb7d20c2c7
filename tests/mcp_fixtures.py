"""The tools that the official MCP conformance suite calls by name. Loaded by the tests alone, never in production."""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any

from pydantic import BaseModel, Field

from app.tools.content import (
    Annotations,
    Audio,
    BlobResource,
    Content,
    Contents,
    EmbeddedResource,
    Image,
    ResourceLink,
    Text,
    TextResource,
)
from app.tools.tool import ToolContext, ToolError, tool

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360f8cf50"
    "0f0003860180342ac2180000000049454e44ae426082"
)
"""One red pixel."""

WAV = bytes.fromhex("524946462800000057415645666d74201000000001000100401f0000401f000001000800646174610400000080808080")
"""Four samples of silence."""


@tool(read_only=True)
async def test_simple_text() -> str:
    """Return a text."""
    return "This is a simple text response for testing."


@tool(read_only=True)
async def test_image_content() -> Image:
    """Return an image."""
    return Image(data=PNG, mime_type="image/png")


@tool(read_only=True)
async def test_audio_content() -> Audio:
    """Return a sound."""
    return Audio(data=WAV, mime_type="audio/wav")


@tool(read_only=True)
async def test_embedded_resource() -> EmbeddedResource:
    """Return a resource with its content."""
    text = "This is an embedded resource content."
    return EmbeddedResource(resource=TextResource(uri="test://embedded-resource", mime_type="text/plain", text=text))


@tool(read_only=True)
async def test_multiple_content_types() -> Contents:
    """Return a text, an image and a resource."""
    document = TextResource(
        uri="test://mixed-content-resource", mime_type="application/json", text='{"test":"data","value":123}'
    )
    return [
        Text(text="Multiple content types test:"),
        Image(data=PNG, mime_type="image/png"),
        EmbeddedResource(resource=document),
    ]


@tool(read_only=True)
async def every_content_type() -> list[Content]:
    """Return one block of each type, and a resource that is bytes."""
    return [
        Text(text="text"),
        Image(data=PNG, mime_type="image/png"),
        Audio(data=WAV, mime_type="audio/wav"),
        ResourceLink(uri="https://example.com/a", name="a", mime_type="text/plain", size=3),
        EmbeddedResource(resource=BlobResource(uri="test://blob", blob=b"\xff\xfe\xfb")),
    ]


@tool(read_only=True)
async def return_link() -> ResourceLink:
    """Return a link that is for people."""
    return ResourceLink(uri="x:resource_link", name="ü", annotations=Annotations(audience=["user"]))


@tool
async def test_error_handling() -> None:
    """Always fail."""
    raise ToolError("This tool intentionally returns an error for testing")


@tool(read_only=True)
async def test_tool_with_progress(context: ToolContext) -> str:
    """Tell of 0, 50 and 100 of 100."""
    for done in (0, 50, 100):
        await context.progress(done, 100, f"{done} of 100")
        await asyncio.sleep(0.05)
    return "Progress was told"


@tool(read_only=True)
async def test_streaming_elicitation(context: ToolContext) -> str:
    """Answer without asking the client for anything, whatever it declared."""
    await context.progress(1, 1)
    return "Nothing was asked"


@tool(read_only=True)
async def test_logging_tool() -> str:
    """Log, which no client is to see."""
    logging.getLogger(__name__).info("for operators alone")
    return "Logged"


@tool(client_capabilities=["sampling"])
async def test_missing_capability() -> str:
    """Need a client that can sample."""
    return "The client declared sampling"


@tool(read_only=True)
async def mirrored_parameters(
    region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})] = "",
    count: Annotated[int, Field(json_schema_extra={"x-mcp-header": "Count"})] = 0,
    dry: Annotated[bool, Field(json_schema_extra={"x-mcp-header": "Dry-Run"})] = False,
) -> dict[str, Any]:
    """Return parameters that clients repeat in headers."""
    return {"region": region, "count": count, "dry": dry}


@tool
async def tell_and_wait(context: ToolContext, seconds: float = 60) -> str:
    """Tell of some progress, then wait."""
    await context.progress(1)
    await asyncio.sleep(seconds)
    return "done"


@tool
async def tell_everything(context: ToolContext) -> None:
    """Tell of progress that goes on, back, nowhere and past all bounds."""
    await context.progress(-1)
    await context.progress(0, 2, "with \x00\u202e control and bidi")
    for done in (0, -1, float("nan"), 0.5, float("inf"), 0.5, 1):
        await context.progress(done, float("inf"))


@tool
async def tell_often(context: ToolContext, times: int) -> int:
    """Tell of progress as often as that."""
    for done in range(times):
        await context.progress(done)
    return times


@tool
async def tell_and_fail(context: ToolContext) -> None:
    """Tell of some progress, then fail."""
    await context.progress(1)
    raise ToolError("It went wrong")


@tool
async def tell_and_return(context: ToolContext, text: str) -> str:
    """Tell a text as progress, then return it."""
    await context.progress(1, message=text)
    return text


@tool(timeout=0.5)
async def tell_after_the_deadline(context: ToolContext) -> None:
    """Tell of progress, outlive the deadline, and tell of more."""
    await context.progress(1)
    for _ in range(50):
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            pass
    await context.progress(2)


class Outcome(BaseModel):
    """A result that has an `error` of its own."""

    done: bool
    error: str | None


class Branch(BaseModel):
    """A result that holds more of its kind."""

    name: str
    branches: list[Branch]


@tool(read_only=True)
async def return_outcome(error: str | None = None) -> Outcome:
    """Return an error as data."""
    return Outcome(done=error is None, error=error)


@tool(read_only=True)
async def return_anything(values: dict[str, Any]) -> dict[str, Any]:
    """Return what came."""
    return values


@tool(read_only=True)
async def return_numbers(values: dict[str, int]) -> dict[str, int]:
    """Return numbers by name."""
    return values


@tool(read_only=True)
async def return_named_numbers(values: dict[str, int]) -> dict[Annotated[str, Field(pattern="^[a-z]+$")], int]:
    """Return numbers by name, of names with a pattern."""
    return values


@tool(read_only=True)
async def return_branch() -> Branch:
    """Return a tree."""
    return Branch(name="root", branches=[Branch(name="leaf", branches=[])])


SCHEMA_2020_12: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}
"""What a list must give back as it is."""


@tool(read_only=True)
async def json_schema_2020_12_tool(name: str = "") -> str:
    """Be listed with a schema that no type hints would give."""
    return name


json_schema_2020_12_tool.parameters.json_schema = SCHEMA_2020_12
