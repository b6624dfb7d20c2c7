"""http_request, web_scrape and graphql_query against real servers, through their own schemas."""

from __future__ import annotations

import asyncio
import base64
import sys
from types import FrameType
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidParams
from app.tools.builtin.charset import _AS_BROWSERS as SUPERSETS
from app.tools.builtin.charset import PIECE_BYTES, declared_codec, decoded_page
from app.tools.builtin.page import LINKS_MAX, METADATA_MAX, TITLE_CHARACTERS_MAX, read_page
from app.tools.builtin.web import graphql_query, http_request, web_scrape
from tests.executor.in_process import opened
from tests.origin import WAIT_S_MAX, Received, origin, redirect, response
from tests.tools.invoking import failure_of, run, tool_context

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def html(markup: str, content_type: str = "text/html; charset=utf-8", charset: str = "utf-8") -> bytes:
    return response(markup.encode(charset), content_type=content_type)


async def test_request_returns_exactly_what_the_contract_says() -> None:
    async with origin({"/": response(b"hi", content_type="text/plain")}) as server, tool_context() as context:
        result = await run(http_request, context, url=server.url())
    assert result == {
        "status_code": 200,
        "headers": {"content-length": "2", "content-type": "text/plain"},
        "body": "hi",
        "url": server.url(),
    }


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_every_listed_method_is_sent(method: str) -> None:
    async with origin({"/": b"HTTP/1.1 204 No Content\r\n\r\n"}) as server, tool_context() as context:
        assert (await run(http_request, context, url=server.url(), method=method))["status_code"] == 204
        assert server.received[0].method == method


@pytest.mark.parametrize(
    "parameters", [{"method": "TRACE"}, {"timeout": 0}, {"timeout": 1e9}, {"url": ""}, {"body": 1}]
)
def test_parameters_outside_the_schema_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams):
        http_request.parameters.validate({"url": "http://a.test/", **parameters})


@pytest.mark.parametrize(
    ("body", "sent", "content_type"),
    [
        ("plain ü", "plain ü".encode(), "text/plain; charset=utf-8"),
        ({"a": [1, None]}, b'{"a":[1,null]}', "application/json"),
        ([1, "2"], b'[1,"2"]', "application/json"),
        ([], b"[]", "application/json"),
        (None, b"", None),
    ],
)
async def test_body_is_text_or_json(body: Any, sent: bytes, content_type: str | None) -> None:
    async with origin({"/": response()}) as server, tool_context() as context:
        await run(http_request, context, url=server.url(), method="POST", body=body)
    assert server.received[0].body == sent
    assert server.received[0].headers.get("content-type") == content_type


async def test_headers_and_parameters_of_the_caller_are_sent_as_given() -> None:
    async with origin({"/": response()}) as server, tool_context() as context:
        await run(
            http_request,
            context,
            url=server.url(),
            method="POST",
            headers={"content-TYPE": "application/x-own", "X-A": "1"},
            params={"q": "a b", "n": 1, "f": 1.5, "t": True},
            body={"a": 1},
        )
    (request,) = server.received
    assert (request.headers["content-type"], request.headers["x-a"]) == ("application/x-own", "1")
    assert request.target == "/?q=a+b&n=1&f=1.5&t=true"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("image/png", b"\x89PNG\r\n"),
        ("application/octet-stream", b"text, but nobody says so"),
        ("text/plain", b"\xff\xfe\xfd"),
        ("text/plain; charset=ascii", "ü".encode()),
        ("text/plain", b"nul\x00"),
        ("", b"\xff"),
    ],
)
async def test_body_that_is_no_text_comes_as_base64(content_type: str, body: bytes) -> None:
    reply = response(body, content_type=content_type) if content_type else response(body)
    async with origin({"/": reply}) as server, tool_context() as context:
        result = await run(http_request, context, url=server.url())
    assert result["body_base64"] is True
    assert base64.b64decode(result["body"]) == body


@pytest.mark.parametrize(
    ("content_type", "body", "text"),
    [
        ("text/plain", "ü".encode(), "ü"),
        ("text/plain; charset=iso-8859-1", b"\xfc", "ü"),
        ('TEXT/HTML; Charset="windows-1251"', "ж".encode("windows-1251"), "ж"),
        ("application/json", b'{"a":1}', '{"a":1}'),
        ("application/problem+json", b"{}", "{}"),
        ("application/atom+xml", b"<a/>", "<a/>"),
        ("text/plain; charset=punycode", b"abc", "abc"),
        ("text/plain; charset=no-such", b"abc", "abc"),
        ("", b"abc", "abc"),
        ("image/png", b"", ""),
    ],
)
async def test_body_that_is_text_comes_as_text(content_type: str, body: bytes, text: str) -> None:
    reply = response(body, content_type=content_type) if content_type else response(body)
    async with origin({"/": reply}) as server, tool_context() as context:
        result = await run(http_request, context, url=server.url())
    assert result["body"] == text
    assert "body_base64" not in result or not body


async def test_error_status_of_the_server_is_a_result() -> None:
    async with origin({"/": response(b"no", status="503 Busy")}) as server, tool_context() as context:
        result = await run(http_request, context, url=server.url())
    assert (result["status_code"], result["body"]) == (503, "no")


async def test_url_in_the_result_is_the_last_one() -> None:
    async with origin({"/": redirect("/end"), "/end": response()}) as server, tool_context() as context:
        assert (await run(http_request, context, url=server.url()))["url"] == server.url("/end")


async def test_private_address_is_refused_without_a_word_about_it() -> None:
    async with tool_context(allow="") as context:
        for tool in (http_request, web_scrape):
            error = await failure_of(tool, context, url="http://127.0.0.1:8001/secret")
            assert (error.code, str(error)) == ("EGRESS_REFUSED", "egress refused")
        error = await failure_of(graphql_query, context, endpoint="http://127.0.0.1/", query="{a}")
        assert error.code == "EGRESS_REFUSED"


async def _silent(request: Received, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def test_timeout_of_the_caller_ends_the_request() -> None:
    async with origin({"/": _silent}) as server, tool_context() as context:
        error = await failure_of(http_request, context, url=server.url(), timeout=0.1)
        assert (error.code, error.retryable) == ("EGRESS_TIMEOUT", True)
        await server.until(lambda: server.open == 0)


async def test_deadline_of_the_call_ends_the_request() -> None:
    async with origin({"/": _silent}) as server, tool_context(within_s=0.1) as context:
        error = await failure_of(http_request, context, url=server.url(), timeout=300)
        assert error.code == "EGRESS_TIMEOUT"


async def test_response_that_could_not_leave_as_base64_is_too_large() -> None:
    async with origin({"/": response(bytes(800_000))}) as server, tool_context() as context:
        assert (await failure_of(http_request, context, url=server.url())).code == "EGRESS_RESPONSE_TOO_LARGE"


PAGE = """<!DOCTYPE html><HTML lang="en-GB"><head><title> The
 &lt;Title&gt; </title><meta name="Description" content="About &amp; about">
<meta property="og:title" content='OG "title"'><meta property=og:image content=/i.png><meta name="viewport" content="x">
<link rel="stylesheet" href="/s.css"><link rel=canonical href="/canonical#part">
<style>p { color: red }</style><script>var a = "<p>not text</p>";</script></head>
<body><!-- hidden --><h1>Head&nbsp;line</h1><p>One <b>bold</b>word &amp; more<br>next</p><noscript>enable</noscript>
<svg><title>icon</title><text>drawn</text></svg><template><p>later</p></template>
<ul><li><a href="a?x=1&amp;y=2">A</a><li><a href='/b#frag'>B</a><li><a href=//other.test/c>C</a></ul>
<a href="/b">again</a><a href="#top">top</a><a href="mailto:x@y.test">mail</a><a href="javascript:alert(1)">js</a>
<a href="ftp://f.test/">ftp</a><a name="x">none</a><a href="http://[">broken</a>
<table><tr><td>1</td><td>2</td></tr></table><p data-x="a > b" title='</p>'>tail</p><textarea>form</textarea>
</body></HTML><script>unclosed"""


async def test_page_is_read_as_a_person_would() -> None:
    async with origin({"/dir/": html(PAGE)}) as server, tool_context() as context:
        result = await run(web_scrape, context, url=server.url("/dir/"), include_links=True)
    assert result.keys() == {"title", "text", "links", "metadata", "url"}
    assert result["title"] == "The <Title>"
    assert result["text"].split("\n") == [
        "Head line",
        "One boldword & more",
        "next",
        "A",
        "B",
        "C",
        "againtopmailjs ftpnonebroken",
        "1 2",
        "tail",
    ]
    assert result["links"] == [server.url("/dir/a?x=1&y=2"), server.url("/b"), "http://other.test/c"]
    assert result["metadata"] == {
        "language": "en-GB",
        "description": "About & about",
        "og:title": 'OG "title"',
        "og:image": "/i.png",
        "canonical": server.url("/canonical"),
    }


async def test_links_come_only_when_asked_for() -> None:
    async with origin({"/": html("<a href=/x>x</a>")}) as server, tool_context() as context:
        assert (await run(web_scrape, context, url=server.url()))["links"] == []


async def test_links_follow_the_base_of_the_page_and_its_last_url() -> None:
    based = html('<base target=_blank><base href="/docs/"><base href="/no/"><a href="x">x</a>')
    pages = {"/": redirect("/a/b"), "/a/b": html('<a href="x">x</a>'), "/c": based}
    async with origin({**pages}) as server, tool_context() as context:
        moved = await run(web_scrape, context, url=server.url(), include_links=True)
        fixed = await run(web_scrape, context, url=server.url("/c"), include_links=True)
    assert moved["links"] == [server.url("/a/x")]
    assert fixed["links"] == [server.url("/docs/x")]


async def test_text_is_cut_at_the_number_of_characters_asked_for() -> None:
    async with origin({"/": html("<p>word</p>" * 10_000)}) as server, tool_context() as context:
        assert (await run(web_scrape, context, url=server.url(), max_characters=9))["text"] == "word\nword"
        assert len((await run(web_scrape, context, url=server.url()))["text"]) == 4_999


def test_a_declaration_that_is_all_blanks_is_read_once() -> None:
    """Would take days if it were tried anew from each of them."""
    blanks = " " * 10_000_000
    for text in (f"text/plain; charset={blanks}!", f"charset{blanks}={blanks}'{blanks}!"):
        assert declared_codec(text) is None
    assert declared_codec(f"charset{blanks}={blanks}'{blanks}koi8-r") == "koi8-r"


@pytest.mark.parametrize(
    ("content_type", "markup", "charset"),
    [
        ("text/html; charset=windows-1251", "<p>Привет", "windows-1251"),
        ("text/html", "<meta charset=windows-1251><p>Привет", "windows-1251"),
        ("text/html", '<meta http-equiv=content-type content="text/html; charset=koi8-r"><p>Привет', "koi8-r"),
        ("text/html; charset=utf-8", "<meta charset=windows-1251><p>Привет", "utf-8"),
        ("text/html", "<p>Привет", "utf-8"),
        ("text/html", "<p>Привет", "utf-16"),
        ("text/html; charset=latin1", "<p>Привет", "utf-8-sig"),
        ("application/xhtml+xml; charset=zlib", "<p>Привет", "utf-8"),
        ("text/html", '<?xml version="1.0" encoding="koi8-r"?><p>Привет', "koi8-r"),
        ("text/html", '<?xml version="1.0" encoding="utf-16"?><p>Привет', "utf-8"),
        ("text/html", "<p>h\xe9llo", "cp1252"),
    ],
)
async def test_charset_is_found_where_the_page_declares_it(content_type: str, markup: str, charset: str) -> None:
    async with origin({"/": html(markup, content_type, charset)}) as server, tool_context() as context:
        assert (await run(web_scrape, context, url=server.url()))["text"] in ("Привет", "h\xe9llo")


@pytest.mark.parametrize(
    ("declared", "text", "charset"),
    [
        ("iso-8859-1", "\u201cquoted\u201d \u2013 5 \u20ac", "cp1252"),
        ("us-ascii", "caf\xe9 \u2019", "cp1252"),
        ("iso-8859-9", "\u0130stanbul \u2026", "cp1254"),
        ("gb2312", "\u9555 and \u20ac", "gb18030"),
        ("shift_jis", "\u2460 \u2116", "cp932"),
        ("x-sjis", "\u9ad9", "cp932"),
        ("euc-kr", "\ub620\ubc29\uac01\ud558", "cp949"),
        ("ks_c_5601-1987", "\ud55c\uae00", "cp949"),
        ("big5", "\u9999\u6e2f\u5605", "big5hkscs"),
        ("tis-620", "\u0e44\u0e17\u0e22 \u201cx\u201d", "cp874"),
        ("windows-874", "\u0e44\u0e17\u0e22", "cp874"),
    ],
)
async def test_a_page_is_read_as_browsers_read_its_charset(declared: str, text: str, charset: str) -> None:
    page = html(f"<meta charset={declared}><p>{text}", "text/html", charset)
    async with origin({"/": page}) as server, tool_context() as context:
        assert (await run(web_scrape, context, url=server.url()))["text"] == text


CHARSETS = ["utf-8", "utf-16le", "windows-1252", "windows-874", "koi8-r", "gb18030", "big5", "euc-kr", "shift_jis"]
CHARSETS += ["euc-jp", "iso-2022-jp"]


@given(
    st.sampled_from(CHARSETS), st.lists(st.sampled_from([*b"\x1b$(B\x81\x82\xd8\xe2\xff\x00a"])).map(bytes), st.data()
)
def test_what_a_page_says_does_not_depend_on_where_its_pieces_end(
    charset: str, content: bytes, data: st.DataObject
) -> None:
    before = PIECE_BYTES - data.draw(st.integers(0, len(content)))
    body = b"  " * (before // 2) + content
    codec = declared_codec(f"charset={charset}") or ""
    assert decoded_page(body, f"text/html; charset={charset}") == body.decode(SUPERSETS.get(codec, codec), "replace")


@pytest.mark.parametrize("body", [b"\x81" * 100_000, b"\xff\xfe" + b"\x00\xd8" * 50_000], ids=["charmap", "utf-16"])
def test_no_page_is_decoded_in_one_go_that_holds_the_interpreter(body: bytes) -> None:
    decoded: list[int] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == "decode":
            decoded.append(len(frame.f_locals["input"]))

    sys.setprofile(note)
    try:
        decoded_page(body, "text/html; charset=iso-8859-1")
    finally:
        sys.setprofile(None)
    assert max(decoded) == PIECE_BYTES and sum(decoded) == len(body)


@pytest.mark.parametrize(("status", "retryable"), [("404 Not Found", False), ("429 Slow", True), ("503 Busy", True)])
async def test_page_that_the_server_does_not_give_is_a_failure(status: str, retryable: bool) -> None:
    async with origin({"/": response(b"<p>error", status=status)}) as server, tool_context() as context:
        error = await failure_of(web_scrape, context, url=server.url())
    assert (error.code, error.retryable) == ("HTTP_STATUS", retryable)


async def test_content_that_is_no_html_is_a_failure() -> None:
    async with origin({"/": response(b"%PDF", content_type="application/pdf")}) as server, tool_context() as context:
        assert (await failure_of(web_scrape, context, url=server.url())).code == "NOT_HTML"


async def test_large_page_does_not_hold_the_event_loop() -> None:
    async with origin({"/": html("<p>" * 300_000 + "last")}) as server, tool_context() as context:
        call = asyncio.create_task(run(web_scrape, context, url=server.url()))
        turns = 0
        while not call.done():
            await asyncio.sleep(0)
            turns += 1
        assert (await call)["text"] == "last"
        assert turns > 100


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("", ""),
        (" \n", ""),
        ("\ufeff", ""),
        ("<!-- only a comment", ""),
        ("<", "<"),
        ("<p", ""),
        ("%PDF-1.7 & \x00\x01 <<", "%PDF-1.7 & \ufffd\x01 <<"),
        ("only text", "only text"),
        ("a<![CDATA[b]]>c", "ac"),
        ("&#xD800;&#99999999999;&nosuch;", "\ufffd\ufffd&nosuch;"),
    ],
)
async def test_page_without_structure_is_read_all_the_same(markup: str, text: str) -> None:
    async with origin({"/": html(markup)}) as server, tool_context() as context:
        result = await run(web_scrape, context, url=server.url())
    assert (result["title"], result["text"], result["links"], result["metadata"]) == ("", text, [], {})


async def test_xhtml_is_read_in_the_encoding_of_its_prolog() -> None:
    markup = """<?xml version="1.0" encoding='windows-1251'?>
    <!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Strict//EN" "">
    <html xmlns="http://www.w3.org/1999/xhtml" xml:lang="ru"><head><title>Привет</title><script src="x.js"/></head>
    <body><p>один<br/>два</p><p/><a href="/x"/></body></html>"""
    page = html(markup, "application/xhtml+xml", "windows-1251")
    async with origin({"/": page}) as server, tool_context() as context:
        result = await run(web_scrape, context, url=server.url(), include_links=True)
    assert (result["title"], result["text"]) == ("Привет", "один\nдва")
    assert (result["links"], result["metadata"]) == ([server.url("/x")], {"language": "ru"})


async def test_elements_past_any_sensible_depth_end_the_page() -> None:
    page = html("<p>before</p>" + "<div>" * 100_000 + "<p>after</p>")
    async with origin({"/": page}) as server, tool_context() as context:
        assert (await run(web_scrape, context, url=server.url()))["text"] == "before"


LENGTH = 1024 * 1024
NAMES = [f"n{number:x}" for number in range(LENGTH // 9)]


@pytest.mark.parametrize(
    "markup",
    [
        pytest.param("<a " + " ".join(NAMES) + " href=/x>", id="one tag with 116,000 attributes"),
        pytest.param("<a " + "='<>' ".join(NAMES) + "='' href=/x>", id="one tag with brackets in its values"),
        pytest.param("<a " + " ".join(NAMES), id="one tag that does not end"),
        pytest.param(("<a " + " ".join(NAMES[:2_000]) + ">") * 60, id="many tags with many attributes"),
        pytest.param("<html " + "><html ".join(NAMES) + ">", id="attributes of one element in many tags"),
        pytest.param("<div>" * 200_000 + "</b>" * 250_000, id="end tags that nothing began"),
        pytest.param(("<div>" + "<b>" * 4_000 + "</i>" * 4_000 + "</div>") * 70, id="deep again and again"),
        pytest.param("&#" + "9" * LENGTH, id="a number that does not end"),
        pytest.param("<script>" + "<!--<script>" * (LENGTH // 12), id="a script that does not end"),
        pytest.param("<title>" + "&lt;" * (LENGTH // 4), id="a title that does not end"),
        pytest.param("<!DOCTYPE a [" + "<!ENTITY b '&b;&b;'>" * (LENGTH // 20) + "]>&b;", id="entities of entities"),
        *(
            pytest.param(piece * (LENGTH // len(piece.encode())), id=piece)
            for piece in (
                *("<div>", "<p>", "<b id=1><p>", "<td> ", "</p>", "<svg>", "<table><form>", "<select><option>"),
                *("<!--", "<!-- -- ->", "a<!---->", "<!", "<?x ", "<![CDATA[", "<script></scrip", "<title></title>"),
                *("<", "</", "<a ", "<a b='", '<a b="><', "<a = ", "<a/", "&", "&a", " ", "\x00", "\r", "\f<"),
                *("<base href=/x>", "<a href=http://[>", "<meta property=og:x content=y>", "\U0001f600"),
            )
        ),
    ],
)
async def test_hostile_page_ends_within_its_bounds(markup: str) -> None:
    async with origin({"/": html(markup)}) as server, tool_context() as context:
        async with asyncio.timeout(WAIT_S_MAX):
            page = await run(web_scrape, context, url=server.url(), max_characters=100_000, include_links=True)
    assert len(page["text"]) <= 100_000
    assert len(page["title"]) <= TITLE_CHARACTERS_MAX
    assert len(page["links"]) <= LINKS_MAX
    assert len(page["metadata"]) <= METADATA_MAX


PIECES = (
    *("<p>", "</p>", "<b>", "</b>", "<div>", "</div>", "<td>", "<table>", "<br/>", "</body>", "<html lang=z>"),
    *("<a href=x>", "</a>", "<base href=y>", "<title>", "</title>", "<!--", "-->", "&amp;", "&#x0;", "&"),
    *("<svg>", "</svg>", "<script>", "</script>", "<noscript>", "<textarea>", "x", " ", "<", ">", "'", '"', "="),
)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=60))
def test_any_markup_is_a_page(pieces: list[str]) -> None:
    page = read_page("".join(pieces), "http://a.test/", 50, include_links=True)
    assert len(page.text) <= 50
    assert page.text == "\n".join(" ".join(line.split()) for line in page.text.split("\n"))
    assert set(page.links) <= {"http://a.test/x", "http://a.test/y"}


async def test_graphql_query_is_sent_as_json_and_its_data_returned() -> None:
    reply = response(b'{"data":{"a":1}}', content_type="application/json")
    async with origin({"/g": reply}) as server, tool_context() as context:
        result = await run(
            graphql_query,
            context,
            endpoint=server.url("/g"),
            query="query($x: Int) { a(x: $x) }",
            variables={"x": 1},
            headers={"Authorization": "Bearer t"},
        )
    assert result == {"data": {"a": 1}, "errors": []}
    (request,) = server.received
    assert orjson.loads(request.body) == {"query": "query($x: Int) { a(x: $x) }", "variables": {"x": 1}}
    assert request.headers["content-type"] == "application/json"
    assert request.headers["authorization"] == "Bearer t"


@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
async def test_graphql_errors_are_passed_on_as_data(status: str) -> None:
    reply = response(b'{"errors":[{"message":"no field b"}],"data":null}', status=status)
    async with origin({"/": reply}) as server, tool_context() as context:
        result = await run(graphql_query, context, endpoint=server.url(), query="{b}")
    assert result == {"data": None, "errors": [{"message": "no field b"}]}


@pytest.mark.parametrize(
    ("reply", "query", "in_doubt"),
    [
        (b"", "mutation { pay }", True),
        (b"", "{ balance }", False),
        (response(status="504 Gateway Timeout"), "mutation { pay }", True),
        (response(status="504 Gateway Timeout"), "{ balance }", False),
        (response(status="503 Service Unavailable"), "mutation { pay }", False),
    ],
)
async def test_mutation_that_may_have_been_carried_out_is_in_doubt(reply: bytes, query: str, in_doubt: bool) -> None:
    async def answer(request: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)
        await writer.drain()

    async with origin({"/": answer}) as server, tool_context() as context:
        error = await failure_of(graphql_query, context, endpoint=server.url(), query=query)
    assert (error.retryable, error.in_doubt) == (True, in_doubt)


async def test_payment_without_an_answer_is_not_sent_twice_under_one_key() -> None:
    async def silent(request: Received, writer: asyncio.StreamWriter) -> None:
        """Read it and go."""

    async with origin({"/": silent}) as server, opened(http_request, egress="127.0.0.1") as rig:
        parameters = {"url": server.url(), "method": "POST", "body": "pay 5"}
        first = await rig.call(http_request, parameters, idempotency_key="k")
        again = await rig.call(http_request, parameters, idempotency_key="k")
        assert first.error is not None and (first.error.code, first.error.retryable) == ("EGRESS_FAILED", False)
        assert again.replayed and len(server.received) == 1


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (response(b"<html>"), "GRAPHQL_RESPONSE_INVALID"),
        (response(b"[]"), "GRAPHQL_RESPONSE_INVALID"),
        (response(b'{"other":1}'), "GRAPHQL_RESPONSE_INVALID"),
        (response(b'{"data":NaN}'), "GRAPHQL_RESPONSE_INVALID"),
        (response(b"[" * 100_000), "GRAPHQL_RESPONSE_INVALID"),
        (response(b"gone", status="502 Bad Gateway"), "HTTP_STATUS"),
    ],
)
async def test_answer_that_is_no_graphql_is_a_failure(reply: bytes, code: str) -> None:
    async with origin({"/": reply}) as server, tool_context() as context:
        assert (await failure_of(graphql_query, context, endpoint=server.url(), query="{a}")).code == code


def test_tools_declare_what_they_do() -> None:
    assert {tool.spec.id: tool.spec.read_only for tool in (http_request, web_scrape, graphql_query)} == {
        "http_request": False,
        "web_scrape": True,
        "graphql_query": False,
    }
    for tool in (http_request, web_scrape, graphql_query):
        assert tool.spec.timeout == 30
        assert not tool.spec.destructive
        properties = tool.parameters.json_schema["properties"]
        assert all("description" in schema for schema in properties.values()), tool.spec.id
