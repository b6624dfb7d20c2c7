"""What a web page says: title, text, links and metadata, out of HTML that may be hostile.

libxml2 tells what it finds and builds no tree: in a tree each attribute of a tag is put behind the last one from the
first on, and one tag with 116,000 of them took 32 s (libxml2 2.14, 2 cores, 2026-11-20). Fetches nothing; knows no
charsets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urldefrag, urljoin, urlsplit

TITLE_CHARACTERS_MAX = 300
LINKS_MAX = 100
LINKS_TRIED_MAX = 2_000
"""Links that are no web addresses cost time too."""
LINK_CHARACTERS_MAX = 2_048
METADATA_MAX = 30
METADATA_CHARACTERS_MAX = 500

DEPTH_MAX = 256
"""Where libxml2 stops when it builds a tree. Past it the page ends: an end tag is sought among all open elements."""

SLICE_CHARACTERS = 32 * 1024
"""Parsed before the bounds are looked at. An unfinished tag is scanned anew with each slice, so not much smaller."""

_UNREAD = frozenset(("script", "style", "noscript", "template", "iframe", "noembed", "noframes", "svg", "textarea"))
"""Elements whose content is no text of the page."""

_BLOCKS = frozenset(
    """address article aside blockquote br caption dd details div dl dt fieldset figcaption figure footer form h1 h2 h3
    h4 h5 h6 header hr li main nav ol option p pre section summary table title tr ul""".split()  # noqa: SIM905  # words
)
_CELLS = frozenset(("td", "th"))


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    text: str
    links: list[str]
    metadata: dict[str, str]


def read_page(markup: str, url: str, characters_max: int, *, include_links: bool) -> Page:
    """The page at `url`. Text is cut at `characters_max`; links are absolute, distinct, http or https."""
    from lxml import etree  # 4 MB that a service without scrapers does without

    reader = _Reader(url, characters_max, LINKS_MAX if include_links else 0)
    parser = etree.HTMLParser(target=reader, encoding="utf-8")
    for start in range(0, len(markup), SLICE_CHARACTERS):
        parser.feed(markup[start : start + SLICE_CHARACTERS])
        if reader.finished:
            return reader.close()
    page: Page = parser.close() if markup else reader.close()
    return page


@dataclass(slots=True)
class _Reader:
    """Called by the parser, with an end for every start whatever the page has."""

    base_url: str
    characters_max: int
    links_max: int
    title: str = ""
    links: dict[str, None] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    _lines: list[str] = field(default_factory=list)
    _line: list[str] = field(default_factory=list)
    _characters: int = 0
    _links_tried: int = 0
    _depth: int = 0
    _unread_depth: int = 0
    _too_deep: bool = False
    _base_given: bool = False

    @property
    def finished(self) -> bool:
        """Nothing more is wanted of the page, or it is absurd."""
        return self._too_deep or (self._characters > self.characters_max and len(self.links) >= self.links_max)

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        self._depth += 1
        self._too_deep |= self._depth > DEPTH_MAX
        if self._unread_depth or name in _UNREAD:
            self._unread_depth += 1
            return
        if name in _BLOCKS:
            self._end_line()
        elif name in _CELLS:
            self._line.append(" ")
        self._read_element(name, attributes)

    def end(self, name: str) -> None:
        self._depth -= 1
        if self._unread_depth:
            self._unread_depth -= 1
        elif name == "title":
            self.title = self.title or _shortened("".join(self._line), TITLE_CHARACTERS_MAX)
            self._line.clear()
        elif name in _BLOCKS:
            self._end_line()

    def data(self, text: str) -> None:
        if not self._unread_depth:
            self._line.append(text)

    def close(self) -> Page:
        self._end_line()
        text = "\n".join(self._lines)[: self.characters_max].rstrip()
        return Page(self.title, text, list(self.links), self.metadata)

    def _end_line(self) -> None:
        if self._line and self._characters <= self.characters_max and (line := _collapsed("".join(self._line))):
            self._lines.append(line)
            self._characters += len(line) + 1
        self._line.clear()

    def _read_element(self, name: str, attributes: Mapping[str, str]) -> None:
        match name:
            case "a":
                self._add_link(attributes.get("href", ""))
            case "base" if not self._base_given and "href" in attributes:  # the first one counts
                self._base_given = True
                self.base_url = _joined(self.base_url, attributes["href"]) or self.base_url
            case "html":
                self._add_metadata("language", attributes.get("lang") or attributes.get("xml:lang", ""))
            case "link" if "canonical" in attributes.get("rel", "").lower().split():
                self._add_metadata("canonical", _joined(self.base_url, attributes.get("href", "")))
            case "meta":
                key = (attributes.get("property") or attributes.get("name") or "").lower()
                if key == "description" or key.startswith("og:"):
                    self._add_metadata(key[:64], attributes.get("content", ""))

    def _add_link(self, href: str) -> None:
        if len(self.links) >= self.links_max or self._links_tried >= LINKS_TRIED_MAX:
            return
        self._links_tried += 1
        if href and not href.startswith("#") and (link := _joined(self.base_url, href)):
            self.links[link] = None

    def _add_metadata(self, key: str, value: str) -> None:
        value = _shortened(value, METADATA_CHARACTERS_MAX)
        if value and len(self.metadata) < METADATA_MAX:
            self.metadata.setdefault(key, value)


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _shortened(text: str, characters_max: int) -> str:
    return _collapsed(text)[:characters_max].rstrip()


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
