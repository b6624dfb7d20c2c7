"""The body of a response: bounded as it is sent and as it is inflated, without inflating more than the bound."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterable, Iterator, Mapping
from contextlib import aclosing

from app.errors import ToolError

GZIP_MEMBERS_MAX = 16
"""More than one is rare and legal; thousands of empty ones are a way to burn CPU."""

INFLATE_BYTES = 256 * 1024
"""Inflated between two turns of the event loop: about 1 ms."""

CHUNKS_IN_A_TURN = 32
"""Of what has arrived: a server may send each byte as a chunk, and each costs 20 µs and more."""


async def read_body(stream: AsyncIterable[bytes], headers: Mapping[str, str], bytes_max: int) -> bytes:
    """The body, inflated. Raises EGRESS_RESPONSE_TOO_LARGE as soon as either form is over `bytes_max`."""
    if _declared_length(headers) > bytes_max:
        raise _too_large(bytes_max)
    content = _content_decoder(headers)
    body = bytearray()
    received_bytes = received_chunks = 0
    async with aclosing(aiter(stream)) as chunks:  # type: ignore[type-var]  # httpcore streams are generators
        async for chunk in chunks:
            received_bytes += len(chunk)
            received_chunks += 1
            if received_chunks % CHUNKS_IN_A_TURN == 0:
                await asyncio.sleep(0)
            for piece in content.pieces(chunk):
                body += piece
                if max(received_bytes, len(body)) > bytes_max:
                    raise _too_large(bytes_max)
                if len(piece) == INFLATE_BYTES:
                    await asyncio.sleep(0)
    if received_bytes and not content.complete:
        raise ToolError("response ended in the middle of its gzip data", code="EGRESS_FAILED", retryable=True)
    return bytes(body)


def _declared_length(headers: Mapping[str, str]) -> int:
    text = headers.get("content-length", "")
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text) else 0


def _content_decoder(headers: Mapping[str, str]) -> _Identity | _Gunzip:
    match headers.get("content-encoding", "identity").strip().lower():
        case "" | "identity":
            return _Identity()
        case "gzip" | "x-gzip":
            return _Gunzip()
        case _:
            raise ToolError("response has a content encoding that was not asked for", code="EGRESS_FAILED")


class _Identity:
    complete = True

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        yield chunk


class _Gunzip:
    """gzip in pieces of at most INFLATE_BYTES, so that whoever counts them can stop a bomb."""

    def __init__(self) -> None:
        self._members_left = GZIP_MEMBERS_MAX
        self._begin_member()

    def _begin_member(self) -> None:
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._members_left -= 1

    @property
    def complete(self) -> bool:
        return self._inflate.eof

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        pending = True
        while chunk or pending:
            if self._inflate.eof:
                if not chunk:
                    return
                self._begin_member()
            piece = self._piece(chunk)
            yield piece
            chunk = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
            pending = len(piece) == INFLATE_BYTES  # zlib may hold more output after the last input

    def _piece(self, chunk: bytes) -> bytes:
        try:
            if self._members_left < 0:
                raise zlib.error
            return self._inflate.decompress(chunk, INFLATE_BYTES)
        except zlib.error:
            raise ToolError("response holds broken gzip data", code="EGRESS_FAILED") from None


def _too_large(bytes_max: int) -> ToolError:
    return ToolError(f"response is over {bytes_max} bytes", code="EGRESS_RESPONSE_TOO_LARGE")
