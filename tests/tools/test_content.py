"""What a tool returns instead of data: which annotations say so, and what the blocks look like."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from app.errors import RunFailed
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
    are_contents,
)
from app.tools.result_schema import ResultSchema


@pytest.mark.parametrize(
    "annotation",
    [Text, Image | Audio, Content, Contents, list[Text], list[Text | Image], Annotated[Image, Field()]],
)
def test_blocks_unions_and_lists_of_them_are_contents(annotation: Any) -> None:
    schema = ResultSchema(annotation)
    assert are_contents(annotation) and schema.are_contents and not schema.is_object


@pytest.mark.parametrize(
    "annotation",
    [
        Any,
        str,
        dict[str, Any],
        list[str],
        list[Any],
        Text | None,
        Text | str,
        list[list[Text]],
        dict[str, Text],
        TextResource,
    ],
)
def test_anything_else_is_data(annotation: Any) -> None:
    assert not are_contents(annotation)


def encoded(annotation: Any, value: Any) -> Any:
    return orjson.loads(ResultSchema(annotation).encode(value))


def test_members_that_were_not_given_are_left_out_and_names_are_those_of_the_protocol() -> None:
    assert encoded(Contents, [Text(text="x"), ResourceLink(uri="a:b", name="c", mime_type="text/plain")]) == [
        {"type": "text", "text": "x"},
        {"type": "resource_link", "uri": "a:b", "name": "c", "mimeType": "text/plain"},
    ]
    hints = Annotations(audience=["user"], priority=0.5, last_modified="2026-11-20T00:00:00Z")
    assert encoded(Text, Text(text="x", annotations=hints))["annotations"] == {
        "audience": ["user"],
        "priority": 0.5,
        "lastModified": "2026-11-20T00:00:00Z",
    }


@given(st.binary(max_size=100))
def test_bytes_travel_in_base64(data: bytes) -> None:
    blob = EmbeddedResource(resource=BlobResource(uri="a:b", blob=data))
    image, audio, resource = encoded(
        Contents, [Image(data=data, mime_type="image/png"), Audio(data=data, mime_type="audio/wav"), blob]
    )
    for written in (image["data"], audio["data"], resource["resource"]["blob"]):
        assert base64.b64decode(written, validate=True) == data


@pytest.mark.parametrize("value", [None, "text", {"type": "text"}, [Text(text="x"), 5], [[Text(text="x")]], b"x"])
def test_what_is_no_block_fails_the_run(value: Any) -> None:
    with pytest.raises(RunFailed):
        ResultSchema(Contents).encode(value)


@pytest.mark.parametrize("uri", ["https://a/b c", "mailto:a", "x:é", "urn:isbn:1", "file:///a", "HTTP://A"])
def test_a_uri_stays_as_it_is(uri: str) -> None:
    assert encoded(ResourceLink, ResourceLink(uri=uri, name="a"))["uri"] == uri


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Image(data=b"x"),  # type: ignore[call-arg]
        lambda: Text(text="x", extra=1),  # type: ignore[call-arg]
        lambda: ResourceLink(uri="docs/a", name="a"),
        lambda: TextResource(uri="", text="x"),
        lambda: BlobResource(uri="http://[", blob=b"x"),
        lambda: Annotations(priority=1.5),
        lambda: Annotations(audience=["agent"]),  # type: ignore[list-item]
    ],
)
def test_a_block_that_is_wrong_fails_where_it_is_made(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        wrong()
