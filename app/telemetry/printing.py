"""What is printed in this process, as events: a line each, with its call's ids, without secrets, by the log's thread.

So a tool that prints cuts no event in two, and holds up neither the loop nor a thread where nobody reads stdout. A
terminal keeps its own streams, for debuggers. The command line puts this in place for as long as it serves.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Iterator
from typing import BinaryIO, TextIO, cast

LINE_CHARACTERS_MAX = 8_192
"""Of one printed line; what is past it goes on in the next event."""

LEVEL = logging.INFO
"""Of both streams: what is printed to stderr may be as harmless as a bar of progress."""


class PrintedLines(io.TextIOBase):
    """Stands for `stream`, under a name that its events have as their logger's. What a thread prints is an event once
    its line ends, or at `flush`."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, name: str, stream: TextIO, handler: logging.Handler) -> None:
        super().__init__()
        self.stream = stream
        self._name = name
        self._handler = handler
        self._begun = threading.local()

    @property
    def buffer(self) -> BinaryIO:
        """For bytes, which go where they always went."""
        return self.stream.buffer

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._begun.text = (getattr(self._begun, "text", "") + text).split("\n")
        for line in lines:
            self._tell(line)
        if len(self._begun.text) >= LINE_CHARACTERS_MAX:
            self.flush()
        return len(text)

    def flush(self) -> None:
        begun, self._begun.text = getattr(self._begun, "text", ""), ""
        self._tell(begun)

    def _tell(self, line: str) -> None:
        if not line.strip() or not logging.getLogger(self._name).isEnabledFor(LEVEL):
            return
        for start in range(0, len(line), LINE_CHARACTERS_MAX):
            piece = line[start : start + LINE_CHARACTERS_MAX]
            # Past the loggers: a tool may have given the root a handler that prints.
            self._handler.handle(logging.LogRecord(self._name, LEVEL, "", 0, piece, None, None))


@contextlib.contextmanager
def printing_as_events(handler: logging.Handler) -> Iterator[None]:
    """While it lasts, what is printed goes to the handler, but for a stream that is a terminal."""
    before = sys.stdout, sys.stderr
    own = [_own(name, stream, handler) for name, stream in zip(("stdout", "stderr"), before, strict=True)]
    sys.stdout, sys.stderr = own
    try:
        yield
    finally:
        for stream in own:
            stream.flush()
        if [sys.stdout, sys.stderr] == own:  # else somebody has put streams of their own there meanwhile
            sys.stdout, sys.stderr = before


def _own(name: str, stream: TextIO, handler: logging.Handler) -> TextIO:
    return stream if stream.isatty() else cast(TextIO, PrintedLines(name, stream, handler))
