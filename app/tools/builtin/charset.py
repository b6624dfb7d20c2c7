"""Which charset a response declares, and the codec for it. Knows only charsets of web pages.

Python's registry also holds codecs that take quadratic time (idna, punycode) and remembers every unknown name.
"""

from __future__ import annotations

import codecs
import re

_CHARSET = re.compile(r"charset\s*+=\s*+[\"']?+\s*+([A-Za-z0-9_:.-]{2,40})", re.IGNORECASE)
"""Gives no blank back: a server may send 60,000 of them after the sign, and each split in two would be tried."""
_PROLOG = re.compile(r"<\?xml\s[^>]*?\bencoding\s*+=\s*+[\"']\s*+([A-Za-z0-9_:.-]{2,40})")
_KNOWN = re.compile(
    r"utf-?8|utf-16(le|be)?|us-ascii|ascii|latin-?1|iso-?8859-?(1[0-6]?|[2-9])|(windows-|cp)125[0-8]|koi8-[ru]"
    r"|gb2312|gbk|gb18030|big5(-hkscs)?|euc-jp|euc-kr|ks_c_5601-1987|shift[_-]jis|sjis|windows-31j|iso-2022-jp"
    r"|macintosh|tis-620|(ibm|cp)866"
)
_ALSO = {"x-sjis": "cp932", "x-gbk": "gbk", "windows-874": "cp874", "windows-949": "cp949", "iso-8859-8-i": "iso8859-8"}
"""Labels of the web that Python does not know."""

_AS_BROWSERS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "euc_kr": "cp949",
    "shift_jis": "cp932",
}
"""What a page is written in that declares the first of two: the larger one (Encoding Standard, section 4.2). Else curly
quotes of every other page in "iso-8859-1" are control characters, and rarer characters of Asian ones are lost."""

PIECE_BYTES = 16 * 1024
"""Decoded in one go: a few milliseconds where no byte means anything."""

META_BYTES_MAX = 1024
"""Where the HTML Standard stops looking for a declaration (section 13.2.3.2)."""


def declared_codec(text: str) -> str | None:
    """The codec named by a `charset=` in a Content-Type or a meta element, if it is one of the web's."""
    return _codec(_CHARSET.search(text))


def _codec(match: re.Match[str] | None) -> str | None:
    label = match[1].lower() if match else ""
    if label in _ALSO:
        return _ALSO[label]
    if not _KNOWN.fullmatch(label):
        return None
    try:
        return codecs.lookup(label).name
    except LookupError:
        return None


def decoded_page(body: bytes, content_type: str) -> str:
    """HTML as text: header, byte order mark, meta element, XML prolog, UTF-8, and last what browsers assume."""
    codec = declared_codec(content_type)
    if body.startswith(codecs.BOM_UTF8):
        codec = "utf-8-sig"
    elif body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        codec = "utf-16"
    elif codec is None:
        head = body[:META_BYTES_MAX].decode("latin-1")
        codec = declared_codec(head) or _codec(_PROLOG.match(head))
        if codec is not None and codec.startswith("utf-16"):
            codec = "utf-8"  # what could be read byte by byte is not UTF-16; the HTML Standard says the same
    if codec is not None:
        return _decoded(body, _AS_BROWSERS.get(codec, codec))
    try:
        return body.decode()
    except UnicodeDecodeError:
        return _decoded(body, "cp1252")


def _decoded(body: bytes, codec: str) -> str:
    """With a replacement for each byte that means nothing, piece by piece: a whole page of them would hold the
    interpreter's lock, and with it the event loop, for most of a second."""
    if codec == "iso2022_jp":  # is quick, and its decoder of pieces fails at the half of an escape sequence
        return body.decode(codec, "replace")
    decoder = codecs.getincrementaldecoder(codec)("replace")
    pieces = [decoder.decode(body[start : start + PIECE_BYTES]) for start in range(0, len(body), PIECE_BYTES)]
    return "".join([*pieces, decoder.decode(b"", final=True)])
