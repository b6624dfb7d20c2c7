"""What a tool returns when its result is not data but contents: text, images, audio, resources.

A tool says so by its return annotation: one of these types, a union of them, or a list. Over MCP they travel as content
blocks; the other doors give the same blocks as JSON. Knows the blocks of the protocol, no wire and no run.
"""

from __future__ import annotations

import types
import typing
from base64 import b64encode
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AnyUrl, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

__all__ = [
    "Annotations",
    "Audio",
    "BlobResource",
    "Content",
    "Contents",
    "EmbeddedResource",
    "Image",
    "ResourceLink",
    "Text",
    "TextResource",
]


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _is_none(value: Any) -> bool:
    return value is None


def _optional(**constraints: Any) -> Any:
    """A member that is left out when it is not given: clients take a null for a wrong type."""
    return Field(None, exclude_if=_is_none, **constraints)


Base64 = Annotated[bytes, PlainSerializer(_base64, return_type=str, when_used="json")]
"""Bytes here, base64 with the standard alphabet on the wire."""


def _as_it_is(uri: str) -> str:
    try:
        AnyUrl(uri)
    except ValidationError:
        raise ValueError("must be a URI, which begins with a scheme") from None
    return uri


Uri = Annotated[str, AfterValidator(_as_it_is)]
"""For anything else, as a path alone, the Python SDK up to 1.x throws the whole result away."""

MimeType = Annotated[str, Field(serialization_alias="mimeType", max_length=255)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Annotations(_Part):
    """Hints for the client: for whom a block is, how much it matters (0 to 1), when its content changed (RFC 3339)."""

    audience: list[Literal["user", "assistant"]] | None = _optional()
    priority: float | None = _optional(ge=0, le=1)
    last_modified: str | None = _optional(serialization_alias="lastModified")


class _Block(_Part):
    annotations: Annotations | None = _optional()


class Text(_Block):
    type: Literal["text"] = "text"
    text: str


class Image(_Block):
    type: Literal["image"] = "image"
    data: Base64
    mime_type: MimeType


class Audio(_Block):
    type: Literal["audio"] = "audio"
    data: Base64
    mime_type: MimeType


class ResourceLink(_Block):
    """Where something is; the client fetches it by its own means."""

    type: Literal["resource_link"] = "resource_link"
    uri: Uri
    name: str
    title: str | None = _optional()
    description: str | None = _optional()
    mime_type: str | None = _optional(serialization_alias="mimeType", max_length=255)
    size: int | None = _optional(ge=0)


class TextResource(_Part):
    uri: Uri
    mime_type: str | None = _optional(serialization_alias="mimeType", max_length=255)
    text: str


class BlobResource(_Part):
    uri: Uri
    mime_type: str | None = _optional(serialization_alias="mimeType", max_length=255)
    blob: Base64


class EmbeddedResource(_Block):
    """The thing itself, under the URI that names it."""

    type: Literal["resource"] = "resource"
    resource: TextResource | BlobResource


Content = Text | Image | Audio | ResourceLink | EmbeddedResource
Contents = list[Content]


def are_contents(annotation: Any) -> bool:
    """Whether a return annotation says that every result is a block or a list of blocks."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return are_contents(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return all(map(are_contents, arguments))
    if origin is list:
        return are_contents(arguments[0]) and typing.get_origin(arguments[0]) is not list
    return isinstance(annotation, type) and issubclass(annotation, _Block)
