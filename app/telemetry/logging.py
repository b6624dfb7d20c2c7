"""Logs: one JSON line an event on stdout, redacted, written by a thread, so that no reader of it can block the loop.

Events carry a short constant message and their facts in `extra`. Lines that find the queue full are counted, not
waited for.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import select
import sys
import threading
import time
from functools import lru_cache
from typing import Any, Protocol

import orjson

from app.calls import CurrentCall, current_call, rfc3339
from app.telemetry.redaction import redact, redact_text

own_logger = logging.getLogger("app.telemetry")

QUEUE_LINES_MAX = 10_000
"""About a second of the worst flood; past it a line is dropped and counted."""

LINE_BYTES_MAX = 65_536
"""Past it a line keeps its first facts alone; collectors split or refuse long lines."""

NAMES_KNOWN_MAX = 512
"""Names of facts are words of our code."""

REPEATS_PER_SECOND_MAX = 10
"""Of one message of one logger: enough to see it, too few to fill a disk when every call fails."""

ACCESS_LINE = ("app.access", "request")
"""Logger and message of the one kind of line that may repeat as often as it likes: it was asked for, by its share."""

NOISY = ("httpx", "httpcore", "urllib3", "uvicorn.error", "alembic", "sqlalchemy", "aiosqlite", "redis")
"""Below WARNING they tell of every request and statement: 98 lines of 100, with parameters and hashes of keys in them.
Our own lines say what came of each."""

_OF_EVERY_LINE = ("time", "level", "logger", "message")

_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


def line(record: logging.LogRecord) -> bytes:
    """One event as a JSON line."""
    event: dict[str, Any] = {
        "time": rfc3339(record.created),
        "level": record.levelname,
        "logger": record.name,
        "message": redact_text(record.getMessage()),
    }
    facts: dict[str, Any] = {}
    for name, value in vars(record).items():
        if name not in _RESERVED:
            facts |= {name: redact(value)} if _is_plain(name) else redact({name: value})
    if record.exc_info:
        trace = logging.Formatter().formatException(record.exc_info)
        facts["exception"] = redact_text(trace, keep_end=True)
    # Twice: its place is in front, and no fact takes its names.
    written = orjson.dumps({**event, **facts, **event}, option=orjson.OPT_APPEND_NEWLINE)
    if len(written) > LINE_BYTES_MAX:
        written = orjson.dumps({**event, "line_bytes_cut": len(written)}, option=orjson.OPT_APPEND_NEWLINE)
    return written


@lru_cache(maxsize=NAMES_KNOWN_MAX)
def _is_plain(name: str) -> bool:
    """Whether a fact's name is no secret's and holds none. To look at the names was two thirds of a line's cost."""
    return bool(redact({name: ""}) == {name: ""})


def line_of_last_resort(record: logging.LogRecord) -> bytes:
    """Where `line` failed: an argument that cannot be formatted, an `extra` that contains itself."""
    message = redact_text(record.msg) if isinstance(record.msg, str) else type(record.msg).__name__
    event = {"level": record.levelname, "logger": redact_text(record.name), "message": message, "unreadable": True}
    return orjson.dumps({"time": rfc3339(record.created), **event}, option=orjson.OPT_APPEND_NEWLINE)


class RepeatBound:
    """Lets at most so many lines of one message through a second; the next second's first says how many it held.
    Access lines are none of its affair."""

    def __init__(self) -> None:
        self._second = 0
        self._seen: dict[tuple[str, str], int] = {}

    def lets_through(self, record: logging.LogRecord, second: int) -> bool:
        key = (record.name, _constant_part(record.msg))
        if key == ACCESS_LINE:
            return True
        if second != self._second:
            held = sum(max(0, count - REPEATS_PER_SECOND_MAX) for count in self._seen.values())
            self._second, self._seen = second, {}
            if held:
                record.lines_held_back = held
        count = self._seen.get(key, 0) + 1
        if count > 1 or len(self._seen) < QUEUE_LINES_MAX:
            self._seen[key] = count
        return count <= REPEATS_PER_SECOND_MAX


_UP_TO_A_REPR = re.compile(r"[^\n<(]*")


def _constant_part(message: object) -> str:
    """What a message has in common with those like it: asyncio's go on with the repr of a task or a function, which has
    its name or its address. Anything can be logged as a message, also what has no hash."""
    if not isinstance(message, str):
        return type(message).__name__
    found = _UP_TO_A_REPR.match(message)
    return found[0] if found else message


class Lines(Protocol):
    """Takes whole lines, one at a time."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...


class LineWriter(logging.Handler):
    """Hands records to a thread that owns the file descriptor. Neither `emit` nor `write` ever waits."""

    def __init__(self, fd: int = 1) -> None:
        super().__init__()
        self.dropped = 0
        self._fd = fd
        self._torn = False
        """The last line was written in part."""
        self._repeats = RepeatBound()
        # Not queue.Queue, whose lock is no re-entrant one: a finaliser that logs while that lock is held, as asyncio's
        # do, would hold up the event loop for ever.
        self._records: queue.SimpleQueue[logging.LogRecord | bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if not self._repeats.lets_through(record, int(time.monotonic())):
            return
        _name_call(record)
        if self._records.qsize() >= QUEUE_LINES_MAX:
            self.dropped += 1
        else:
            self._records.put(record)

    def write(self, text: str) -> int:
        """A line of other making, which no event may cut in two. Raises BlockingIOError when there is no room."""
        if self._records.qsize() >= QUEUE_LINES_MAX:
            raise BlockingIOError("nobody reads stdout")
        self._records.put(text.encode("utf-8", "replace"))
        return len(text)

    def _write_all(self) -> None:
        while (record := self._records.get()) is not None:
            try:
                self._write(record if isinstance(record, bytes) else _line_anyhow(record))
            except BaseException:  # a reader that has gone; whatever else, there is no other writer
                self.dropped += 1

    def _write(self, written: bytes) -> None:
        if self._torn:  # as by a disk that was full: what is left of that line takes no other with it
            written = b"\n" + written
        while written:
            try:
                count = os.write(self._fd, written)
            except BlockingIOError:  # whoever gave us this pipe wanted it so
                select.select([], [self._fd], [])
            else:
                written = written[count:]
                self._torn = bool(written)

    def end(self) -> None:
        """Write what is queued, for at most a second; a stdout that nobody reads must not keep the process.

        Not `close`, which anybody's set-up of logging calls."""
        self._records.put(None)
        self._thread.join(timeout=1.0)
        self.close()


def _name_call(record: logging.LogRecord) -> None:
    """Which call the line was written for, unless it is about another one."""
    call = current_call.get()
    if call is not None and getattr(record, "execution_id", call.execution_id) == call.execution_id:
        vars(record).update(call_facts(call))


def call_facts(call: CurrentCall) -> dict[str, str]:
    """How a line names a call."""
    return {"execution_id": call.execution_id, "trace_id": call.trace_id or call.execution_id.replace("-", "")}


def _line_anyhow(record: logging.LogRecord) -> bytes:
    try:
        return line(record)
    except BaseException:  # records hold arguments of anyone's making, that may also exit, and the writer outlives them
        return line_of_last_resort(record)


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
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(max(root.level, logging.WARNING))
    _hear_of_crashes()
    return writer


def log_to_stderr() -> None:
    """For commands that people run: warnings and worse in words, with their facts."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Words())
    logging.getLogger().handlers[:] = [handler]


class _Words(logging.Formatter):
    """What a line says, redacted as that is: message, facts, then the exception."""

    def format(self, record: logging.LogRecord) -> str:
        event = orjson.loads(_line_anyhow(record))
        trace = event.pop("exception", "")
        facts = ", ".join(f"{name}: {value}" for name, value in event.items() if name not in _OF_EVERY_LINE)
        message = event["message"]
        return "\n".join(filter(None, (f"{message} ({facts})" if facts else message, trace)))


def _hear_of_crashes() -> None:
    """What Python would write to stderr, many lines for one event and whatever secrets are in them: exceptions of
    threads and of finalisers, warnings."""

    def in_thread(crash: threading.ExceptHookArgs) -> None:
        if crash.exc_type is not SystemExit:  # which ends a thread, and is no crash
            own_logger.error("thread crashed", exc_info=crash.exc_value)

    def ignored(crash: sys.UnraisableHookArgs) -> None:
        # The object by name alone: it is about to go, and its `repr` may fail. Python 3.14 has none for a finaliser,
        # and a message in its place.
        within = getattr(crash.object, "__qualname__", type(crash.object).__name__)
        if crash.object is None and crash.err_msg:
            within = crash.err_msg
        own_logger.error("exception ignored", exc_info=crash.exc_value, extra={"within": within})

    threading.excepthook = in_thread
    sys.unraisablehook = ignored
    logging.captureWarnings(True)


def stdout_lines() -> Lines:
    """Where a line goes to stdout between the events."""
    return next((one for one in logging.getLogger().handlers if isinstance(one, LineWriter)), sys.stdout)
