"""Tools that talk to the web: http_request, web_scrape and graphql_query.

All of them go out by `ToolContext.http`, which decides what may be reached. Docstrings and descriptions are what
language models read.
"""

from __future__ import annotations

import asyncio
import base64
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, NotRequired

import orjson
from pydantic import Field
from typing_extensions import TypedDict

from app.egress import EgressResponse
from app.tools.builtin.charset import declared_codec, decoded_page
from app.tools.builtin.page import read_page
from app.tools.tool import ToolContext, ToolError, tool

Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
Url = Annotated[str, Field(min_length=1, max_length=8_192, description="Absolute http or https URL")]
Headers = Annotated[dict[str, str] | None, Field(description="Request headers by name")]

BODY_BYTES_MAX = 700 * 1024
"""As base64, with the headers, it still passes under the default MAX_RESULT_BYTES of 1 MiB."""

PAGE_BYTES_MAX = 2 * 1024 * 1024
PAGE_INLINE_BYTES_MAX = 8 * 1024
"""Read on the event loop: about 1 ms for an ordinary page."""

_readers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="page")
"""Two, as most of reading holds the interpreter's lock; the default pool belongs to everyone, so one tool must not
fill it."""


class HttpResult(TypedDict):
    status_code: int
    headers: dict[str, str]
    body: Annotated[str, Field(description="Text, or base64 when body_base64 is true")]
    url: Annotated[str, Field(description="Where the response came from, after redirects")]
    body_base64: NotRequired[Annotated[bool, Field(description="True when the body is no text")]]


class ScrapeResult(TypedDict):
    title: str
    text: str
    links: list[str]
    metadata: dict[str, str]
    url: str


class GraphqlResult(TypedDict):
    data: Any
    errors: list[Any]


@tool(
    category="api_client",
    tags=["http", "web", "api", "rest"],
    capabilities=["http", "network"],
    timeout=30.0,
)
async def http_request(
    context: ToolContext,
    url: Url,
    method: Annotated[Method, Field(description="HTTP method")] = "GET",
    headers: Headers = None,
    params: Annotated[dict[str, str | int | float | bool] | None, Field(description="Added to the URL's query")] = None,
    body: Annotated[
        str | dict[str, Any] | list[Any] | None, Field(description="Text as it is; an object or array is sent as JSON")
    ] = None,
    timeout: Annotated[float | None, Field(gt=0, le=300, description="Seconds for the whole request")] = None,
) -> HttpResult:
    """Send an HTTP request and return status, headers and body.

    Follows up to 3 redirects. A 4xx or 5xx answer is a result, not an error. Private addresses are refused.
    """
    content, content_type = _encoded(body)
    response = await context.http.request(
        method,
        url,
        headers=_with_default(headers, "Content-Type", content_type),
        params=params,
        body=content,
        timeout_s=min(context.remaining_s(), timeout or context.remaining_s()),
        response_bytes_max=BODY_BYTES_MAX,
    )
    result: HttpResult = {
        "status_code": response.status_code,
        "headers": response.headers,
        "body": "",
        "url": response.url,
    }
    text = _text_of(response)
    if text is None:
        return {**result, "body": base64.b64encode(response.body).decode("ascii"), "body_base64": True}
    return {**result, "body": text}


@tool(
    category="search",
    tags=["web", "html", "scrape", "page"],
    capabilities=["http", "network", "html"],
    timeout=30.0,
    read_only=True,
    idempotent=True,
)
async def web_scrape(
    context: ToolContext,
    url: Url,
    max_characters: Annotated[int, Field(ge=1, le=100_000, description="Longest text to return")] = 5_000,
    include_links: Annotated[bool, Field(description="Also return up to 100 links of the page")] = False,
) -> ScrapeResult:
    """Read a web page: its title, plain text, metadata and links. Does not run scripts."""
    response = await context.http.request(
        "GET",
        url,
        headers={"Accept": "text/html, application/xhtml+xml"},
        timeout_s=context.remaining_s(),
        response_bytes_max=PAGE_BYTES_MAX,
    )
    require_success(response)
    content_type = response.headers.get("content-type", "text/html")
    if not re.match(r"\s*(text/html|application/xhtml\+xml)\b", content_type, re.IGNORECASE):
        raise ToolError("The URL holds no HTML page; http_request reads other content", code="NOT_HTML")

    def read() -> ScrapeResult:
        markup = decoded_page(response.body, content_type)
        page = read_page(markup, response.url, max_characters, include_links=include_links)
        return {
            "title": page.title,
            "text": page.text,
            "links": page.links,
            "metadata": page.metadata,
            "url": response.url,
        }

    # The first page loads the parser, which takes 10 ms and more.
    if len(response.body) <= PAGE_INLINE_BYTES_MAX and "lxml.etree" in sys.modules:
        return read()
    return await asyncio.get_running_loop().run_in_executor(_readers, read)


@tool(
    category="api_client",
    tags=["graphql", "api", "web"],
    capabilities=["http", "network", "graphql"],
    timeout=30.0,
)
async def graphql_query(
    context: ToolContext,
    endpoint: Url,
    query: Annotated[str, Field(min_length=1, max_length=100_000, description="GraphQL document")],
    variables: Annotated[dict[str, Any] | None, Field(description="Values of the document's variables")] = None,
    headers: Headers = None,
) -> GraphqlResult:
    """Send a GraphQL query or mutation. Errors of the GraphQL server come back in `errors`."""
    accepting = _with_default(headers, "Accept", "application/graphql-response+json, application/json")
    mutates = "mutation" in query  # without the word it only reads
    try:
        response = await context.http.request(
            "POST",
            endpoint,
            headers=_with_default(accepting, "Content-Type", "application/json"),
            body=orjson.dumps({"query": query, "variables": variables or {}}),
            timeout_s=context.remaining_s(),
            response_bytes_max=BODY_BYTES_MAX,
        )
    except ToolError as error:
        error.in_doubt = error.in_doubt and mutates
        raise
    answer = _json_of(response)
    if not isinstance(answer, dict) or not answer.keys() & {"data", "errors"}:
        require_success(response, mutates=mutates)
        raise ToolError("The endpoint's answer is not GraphQL", code="GRAPHQL_RESPONSE_INVALID")
    errors = answer.get("errors")
    return {"data": answer.get("data"), "errors": errors if isinstance(errors, list) else []}


def require_success(response: EgressResponse, *, mutates: bool = False) -> None:
    """Raises ToolError HTTP_STATUS for anything but 2xx; retryable where trying later may help, in doubt where what
    `mutates` may have been done before something behind it failed."""
    status = response.status_code
    if not 200 <= status < 300:
        later = status in (408, 425, 429, 500, 502, 503, 504)
        error = ToolError(f"The server answered with HTTP status {status}", code="HTTP_STATUS", retryable=later)
        error.in_doubt = mutates and status in (408, 500, 502, 504)
        raise error


def _json_of(response: EgressResponse) -> Any:
    """The body's JSON; None when it has none."""
    try:
        return orjson.loads(response.body)
    except orjson.JSONDecodeError:
        return None


def _encoded(body: str | dict[str, Any] | list[Any] | None) -> tuple[bytes | None, str | None]:
    if body is None:
        return None, None
    if isinstance(body, str):
        return body.encode(), "text/plain; charset=utf-8"
    return orjson.dumps(body), "application/json"


def _with_default(headers: dict[str, str] | None, name: str, value: str | None) -> dict[str, str]:
    given = dict(headers or {})
    if value is not None and not any(other.lower() == name.lower() for other in given):
        given[name] = value
    return given


_TEXT_TYPE = re.compile(
    r"\s*(text/|application/([\w.+-]+\+)?(json|xml|yaml|x-yaml|javascript|ecmascript|x-www-form-urlencoded"
    r"|graphql|sql|toml|x-ndjson|ndjson|rtf)\b|image/svg\+xml|\Z)",
    re.IGNORECASE,
)


def _text_of(response: EgressResponse) -> str | None:
    """The body as text when its type says text, or says nothing, and every byte of it reads as such; else None."""
    content_type = response.headers.get("content-type", "")
    if not _TEXT_TYPE.match(content_type):
        return None
    try:
        text = response.body.decode(declared_codec(content_type) or "utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\x00" in text else text
