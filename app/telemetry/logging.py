"""Logs: one JSON line an event on stdout, redacted, written by a thread, so that no reader of it can block the loop.

Events carry a short constant message and their facts in `extra`. Lines that find the queue full are counted, not
waited for.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from typing import Any

import orjson

from app.calls import rfc3339

QUEUE_LINES_MAX = 10_000
"""About a second of the worst flood; past it a line is dropped and counted."""

LINE_CHARACTERS_MAX = 8_000
REPEATS_PER_SECOND_MAX = 10
"""Of one message of one logger: enough to see it, too few to fill a disk when every call fails."""

_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}

_SECRET_NAME = re.compile(r"(?i)passw|secret|token|api_?key|authorization|cookie|credential|private_?key")
_SECRET_TEXT = re.compile(
    r"act_[A-Za-z0-9]+_[A-Za-z0-9_-]{8,}"  # our keys
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*"  # JWT
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # cloud access keys
    r"|(?:ghp|gho|ghs|sk|xox[abprs])[-_][A-Za-z0-9_-]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
    r"|(?i:bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user and password of a URL
)
REDACTED = "[redacted]"


def redact(value: Any) -> Any:
    """The value without what looks like a secret, by the name it goes under and by its own form."""
    if isinstance(value, str):
        return _SECRET_TEXT.sub(REDACTED, value[:LINE_CHARACTERS_MAX])
    if isinstance(value, dict):
        return {key: REDACTED if _SECRET_NAME.search(str(key)) else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


def line(record: logging.LogRecord) -> bytes:
    """One event as a JSON line."""
    event: dict[str, Any] = {
        "time": rfc3339(record.created),
        "level": record.levelname,
        "logger": record.name,
        "message": redact(record.getMessage()),
    }
    facts = {name: value for name, value in vars(record).items() if name not in _RESERVED}
    event.update(redact(facts))
    if record.exc_info:
        event["exception"] = redact(logging.Formatter().formatException(record.exc_info)[-LINE_CHARACTERS_MAX:])
    return orjson.dumps(event, default=repr, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)


class RepeatBound(logging.Filter):
    """Lets at most so many lines of one message through a second; the next second's first says how many it held."""

    def __init__(self) -> None:
        super().__init__()
        self._second = 0
        self._seen: dict[tuple[str, Any], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            held = sum(max(0, count - REPEATS_PER_SECOND_MAX) for count in self._seen.values())
            self._second, self._seen = second, {}
            if held:
                record.lines_held_back = held
        key = (record.name, record.msg)
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] <= REPEATS_PER_SECOND_MAX


class LineWriter(logging.Handler):
    """Hands records to a thread that owns the file descriptor. `emit` never waits."""

    def __init__(self, fd: int = 1) -> None:
        super().__init__()
        self.addFilter(RepeatBound())
        self.dropped = 0
        self._fd = fd
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(QUEUE_LINES_MAX)
        self._thread = threading.Thread(target=self._write_all, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def _write_all(self) -> None:
        while (record := self._records.get()) is not None:
            try:
                written = line(record)
                while written:
                    written = written[os.write(self._fd, written) :]
            except (OSError, ValueError, TypeError):
                self.dropped += 1

    def close(self) -> None:
        """Write what is queued, for at most a second; a stdout that nobody reads must not keep the process."""
        try:
            self._records.put_nowait(None)
            self._thread.join(timeout=1.0)
        except queue.Full:
            pass
        super().close()


def log_to_stdout(level: str) -> LineWriter:
    """Send every logger's events, uvicorn's too, to stdout as JSON lines."""
    writer = LineWriter()
    root = logging.getLogger()
    root.handlers[:] = [writer]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "httpx", "httpcore"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
    for noisy in ("httpx", "httpcore", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return writer
