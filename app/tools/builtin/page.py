"""What a web page says: title, text, links and metadata out of hostile HTML, in time linear in its length.

Builds no tree. A tree costs the square of its nesting: 100,000 nested `<div>`, 500 KB, took lexbor 9 s in which it
held the interpreter's lock (2 cores, Python 3.11, 2026-11-20); the standard library's parser takes as long for
unclosed comments. Every alternative of every pattern here consumes what it scans and never goes back.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from urllib.parse import urldefrag, urljoin, urlsplit

TITLE_CHARACTERS_MAX = 300
LINKS_MAX = 100
LINKS_TRIED_MAX = 2_000
"""Links that are no web addresses cost time too."""
LINK_CHARACTERS_MAX = 2_048
METADATA_MAX = 30
METADATA_CHARACTERS_MAX = 500

_TOKEN = re.compile(
    r"""
      <!--(?:-?>|.*?(?:--!?>|\Z))                                     # comment
    | <[!?][^>]*+>?                                                   # doctype, CDATA, processing instruction
    | </(?P<close>[A-Za-z][^\s/>]*+)[^>]*+>?
    | <(?P<open>[A-Za-z][^\s/>]*+)
      (?P<attributes>(?:[^>=]++|=\s*+(?:"[^"]*+"?|'[^']*+'?)?+)*+)>?  # a quote counts only after an equals sign
    """,
    re.VERBOSE | re.DOTALL,
)
_ATTRIBUTE = re.compile(r"""([^\s"'<>/=]++)(?:\s*+=\s*+(?:"([^"]*+)"?|'([^']*+)'?|([^\s"'<>]*+)))?+""")
_BLANK = re.compile(r"\s++")
_LINE_END = re.compile(r" ?+\n[ \n]*+")

_UNREAD = frozenset(
    ("script", "style", "noscript", "template", "iframe", "noembed", "noframes", "svg", "textarea", "title")
)
"""Elements whose content is no text of the page. Read up to their end tag, as a browser reads most of them."""

_BLOCKS = frozenset(
    """address article aside blockquote br caption dd details div dl dt fieldset figcaption figure footer form h1 h2 h3
    h4 h5 h6 header hr li main nav ol option p pre section summary table tr ul""".split()  # noqa: SIM905  # a word list
)
_CELLS = frozenset(("td", "th"))
_WITH_ATTRIBUTES = frozenset(("a", "base", "html", "link", "meta"))


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    text: str
    links: list[str]
    metadata: dict[str, str]


def read_page(markup: str, url: str, characters_max: int, *, include_links: bool) -> Page:
    """The page at `url`. Text is cut at `characters_max`; links are absolute, distinct, http or https."""
    reader = _Reader(url, characters_max, include_links)
    reader.read(markup)
    return Page(reader.title, reader.text(), list(reader.links), reader.metadata)


@dataclass(slots=True)
class _Reader:
    base_url: str
    characters_max: int
    include_links: bool
    title: str = ""
    links: dict[str, None] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    _pieces: list[str] = field(default_factory=list)
    _characters: int = 0
    _links_tried: int = 0
    _base_given: bool = False

    def read(self, markup: str) -> None:
        position = 0
        while match := _TOKEN.search(markup, position):
            self._add_text(markup[position : match.start()])
            position = match.end()
            name = (match["open"] or match["close"] or "").lower()
            self._add_break(name)
            if match["open"] is None:
                continue
            if name in _UNREAD:
                position = self._pass_over(name, markup, position)
            elif name in _WITH_ATTRIBUTES:
                self._read_element(name, _attributes(match["attributes"]))
        self._add_text(markup[position:])

    def text(self) -> str:
        return _LINE_END.sub("\n", "".join(self._pieces)).strip()[: self.characters_max].rstrip()

    def _add_text(self, raw: str) -> None:
        if raw and self._characters < self.characters_max:
            collapsed = _BLANK.sub(" ", _unescaped(raw))
            if collapsed != " ":
                self._characters += len(collapsed)
                self._pieces.append(collapsed)
            elif self._pieces and not self._pieces[-1].endswith((" ", "\n")):
                self._pieces.append(" ")

    def _add_break(self, name: str) -> None:
        if self._pieces and self._pieces[-1] != "\n" and name in _BLOCKS:
            self._pieces.append("\n")
        elif name in _CELLS:
            self._add_text(" ")

    def _pass_over(self, name: str, markup: str, position: int) -> int:
        """The position after the element's content; without an end tag the rest of the page belongs to it."""
        end = _END_TAGS[name].search(markup, position)
        stop = len(markup) if end is None else end.start()
        if name == "title" and not self.title:
            self.title = _shortened(markup[position:stop], TITLE_CHARACTERS_MAX)
        return stop

    def _read_element(self, name: str, attributes: dict[str, str]) -> None:
        if name == "a":
            self._add_link(attributes.get("href", ""))
        elif name == "base" and not self._base_given:  # the first one counts
            self._base_given = True
            self.base_url = _joined(self.base_url, attributes.get("href", "")) or self.base_url
        elif name == "html":
            self._add_metadata("language", attributes.get("lang", ""))
        elif name == "link" and "canonical" in attributes.get("rel", "").lower().split():
            self._add_metadata("canonical", _joined(self.base_url, attributes.get("href", "")))
        elif name == "meta":
            key = (attributes.get("property") or attributes.get("name") or "").lower()
            if key == "description" or key.startswith("og:"):
                self._add_metadata(key[:64], attributes.get("content", ""))

    def _add_link(self, href: str) -> None:
        if not self.include_links or len(self.links) >= LINKS_MAX or self._links_tried >= LINKS_TRIED_MAX:
            return
        self._links_tried += 1
        if href and not href.startswith("#") and (link := _joined(self.base_url, href)):
            self.links[link] = None

    def _add_metadata(self, key: str, value: str) -> None:
        value = _shortened(value, METADATA_CHARACTERS_MAX)
        if value and len(self.metadata) < METADATA_MAX:
            self.metadata.setdefault(key, value)


_END_TAGS = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in _UNREAD}


def _attributes(text: str) -> dict[str, str]:
    """Names in lower case; of two with one name the first counts, as the HTML Standard has it."""
    found: dict[str, str] = {}
    for match in _ATTRIBUTE.finditer(text):
        found.setdefault(match[1].lower(), _unescaped(match[2] or match[3] or match[4] or ""))
    return found


def _unescaped(raw: str) -> str:
    try:
        return html.unescape(raw)
    except ValueError:  # a numeric reference with more digits than Python converts
        return raw


def _shortened(raw: str, characters_max: int) -> str:
    return _BLANK.sub(" ", _unescaped(raw)).strip()[:characters_max]


def _joined(base_url: str, href: str) -> str:
    """`href` made absolute, without its fragment; empty when it is no web address."""
    if len(href) > LINK_CHARACTERS_MAX:
        return ""
    try:
        link = urldefrag(urljoin(base_url, href.strip())).url
        parts = urlsplit(link)
    except ValueError:
        return ""
    return link if parts.scheme in ("http", "https") and parts.netloc else ""
