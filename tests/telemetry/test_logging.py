"""Each event is one JSON line without secrets, and no reader of stdout, nor the lack of one, holds anything up."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from app.telemetry.logging import (
    LINE_BYTES_MAX,
    QUEUE_LINES_MAX,
    REPEATS_PER_SECOND_MAX,
    LineWriter,
    RepeatBound,
    line,
)
from app.telemetry.redaction import CHARACTERS_MAX, REDACTED, redact
from tests.conftest import ROOT, service_environ

CANARY = "canary7f3acanary7f3a"


@dataclass
class Pipe:
    """A logger that writes into a pipe, and the end from which to read."""

    read_fd: int
    writer: LineWriter
    logger: logging.Logger
    lines: list[bytes] = field(default_factory=list)

    def events(self) -> list[dict[str, Any]]:
        """Close the writer and read everything that it wrote."""
        reading = threading.Thread(target=self._read)
        reading.start()
        self.writer.end()
        self.writer._thread.join()  # past the second that `close` gives it
        os.close(self.writer._fd)
        reading.join()
        return [json.loads(one) for one in self.lines]

    def _read(self) -> None:
        with os.fdopen(os.dup(self.read_fd), "rb") as stream:
            self.lines = stream.readlines()


@contextlib.contextmanager
def opened(name: str = "test.pipe") -> Iterator[Pipe]:
    read_fd, write_fd = os.pipe()
    logger = logging.Logger(name)
    writer = LineWriter(write_fd)
    logger.addHandler(writer)
    yield Pipe(read_fd, writer, logger)
    with contextlib.suppress(OSError):
        os.close(write_fd)
    os.close(read_fd)


def record(message: Any = "event", *arguments: Any, **extra: Any) -> logging.LogRecord:
    return logging.Logger("test").makeRecord("test", logging.ERROR, "file", 1, message, arguments, None, extra=extra)


def event_of(message: Any = "event", *arguments: Any, **extra: Any) -> dict[str, Any]:
    written = line(record(message, *arguments, **extra))
    assert written.endswith(b"\n") and written.count(b"\n") == 1
    event: dict[str, Any] = json.loads(written)
    return event


def test_an_event_is_one_line_with_its_facts() -> None:
    with opened() as pipe:
        pipe.logger.warning("slot %s taken", 3, extra={"tool_id": "echo", "seconds": 0.5, "list": [1, None, True]})
        pipe.logger.info("two\nlines")
        first, second = pipe.events()
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "WARNING",
        "logger": "test.pipe",
        "message": "slot 3 taken",
        "tool_id": "echo",
        "seconds": 0.5,
        "list": [1, None, True],
    }
    assert second["message"] == "two\nlines"


def test_no_fact_takes_the_place_of_what_every_event_has() -> None:
    event = event_of("event", time="never", level="none", logger="other")
    assert (event["level"], event["logger"]) == ("ERROR", "test") and event["time"] != "never"


def test_an_exception_comes_with_its_trace() -> None:
    with opened() as pipe:
        try:
            raise ValueError("why")
        except ValueError:
            pipe.logger.exception("failed")
        (event,) = pipe.events()
    assert event["exception"].startswith("Traceback") and event["exception"].endswith("ValueError: why")


PEM = f"-----BEGIN RSA PRIVATE KEY-----\nMIIE{CANARY}\n-----END RSA PRIVATE KEY-----"

SECRETS = [
    f"act_01abc_{CANARY}",
    f"eyJhbGciOiJIUzI1NiJ9.{CANARY}.{CANARY}",
    "AKIACANARY7F3ACANARY",
    f"ghp_{CANARY}",
    f"sk-{CANARY}",
    f"xoxb-{CANARY}",
    PEM,
    PEM.replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK"),
    PEM[: PEM.index("-----END")],
    f"Authorization: Bearer {CANARY}",
    f"basic {CANARY}==",
    f"https://user:{CANARY}@example.org/",
    f"redis://:{CANARY}@example.org:6379/0",
    f"https://{CANARY}@example.org/",
    f"postgresql+asyncpg://user:{CANARY}p@ss@example.org/",
    f"https://example.org/?token={CANARY}&a=b",
    f"host=a password={CANARY} user=b",
    "{'password': '" + CANARY + "'}",
    '{"api_key": "' + CANARY + '"}',
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_taken_out_of_any_text_by_its_form(secret: str) -> None:
    for event in (
        event_of(f"saw {secret} here"),
        event_of("saw %s here", secret),
        event_of(fact=secret, inside={"list": [secret, {"deep": secret}]}, thing=ValueError(secret)),
        event_of(**{secret: "as a name"}),
    ):
        text = json.dumps(event)
        assert CANARY not in text and "CANARY7F3A" not in text
        assert REDACTED in text


NAMES = ["password", "passwd", "PASSWORD", "client_secret", "access_token", "api_key", "x-api-key", "apikey"]
NAMES += ["Authorization", "Set-Cookie", "cookies", "credentials", "private_key", "private-key", "pwd", "access key"]


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_is_taken_out_by_the_name_it_goes_under(name: str) -> None:
    assert redact({name: CANARY, "inside": [{name: {"any": CANARY}}]}) == {
        name: REDACTED,
        "inside": [{name: REDACTED}],
    }


def test_what_only_resembles_a_secret_stays_readable() -> None:
    text = "GET https://example.org/a@b from mail@example.org, 5 tokens, act_1, passwords differ"
    assert redact(text) == text


@pytest.mark.parametrize("keep", ["begin", "end"])
def test_no_secret_hides_in_the_cut_of_a_long_text(keep: str) -> None:
    for before in range(CHARACTERS_MAX - len(PEM) - 5, CHARACTERS_MAX + 5, 7):
        padding = "x" * before + "\n"
        text = f"{padding}{PEM}\n{'y' * CHARACTERS_MAX}"
        if keep == "begin":
            written = json.dumps(event_of(text))
        else:
            # Of a trace the end is kept, so the key is put where the begin of the end is.
            text = f"{'y' * CHARACTERS_MAX}\n{PEM}{padding}"
            try:
                raise ValueError(text)
            except ValueError:
                one = record()
                one.exc_info = sys.exc_info()
            written = line(one).decode()
        assert "canary7f3a" not in written


def test_texts_and_lines_are_bounded() -> None:
    assert len(event_of("x" * 10_000_000)["message"]) == CHARACTERS_MAX
    written = line(record("event", many=["y" * 1_000] * 10_000))
    assert len(written) < LINE_BYTES_MAX
    event = json.loads(written)
    assert event["message"] == "event" and event["line_bytes_cut"] > 10_000_000


class Fails:
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Panic(BaseException):
    """As extensions that are written in Rust raise one, and like SystemExit no Exception."""


class Panics:
    def __str__(self) -> str:
        raise Panic

    __repr__ = __str__


class Unreadable(str):
    """A text that lets nobody read it."""

    def __getitem__(self, _: Any) -> str:
        raise Panic

    __str__ = __repr__ = __len__ = __contains__ = __getitem__  # type: ignore[assignment]


def contains_itself() -> dict[str, Any]:
    one: dict[str, Any] = {}
    one["self"] = one
    return one


ODD: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "lone surrogate": ("a\ud800b", (), {"fact": "\udfff", "\ud800": 1}),
    "argument that does not fit": ("%d", ("text",), {}),
    "too few arguments": ("%s %s", ("one",), {}),
    "argument without a text": ("%s", (Fails(),), {}),
    "message that is no text": ({"a": ["list"]}, (), {}),
    "message without a text": (Fails(), (), {}),
    "fact without a text": ("event", (), {"fact": Fails()}),
    "argument that panics": ("%s", (Panics(),), {}),
    "message that panics": (Panics(), (), {}),
    "fact that panics": ("event", (), {"fact": Panics()}),
    "fact that contains itself": ("event", (), {"fact": contains_itself()}),
    "integer past 64 bits": ("event", (), {"fact": 2**70}),
    "not a number": ("event", (), {"fact": float("nan")}),
    "bytes": ("event", (), {"fact": b"\xff"}),
    "set of objects": ("event", (), {"fact": {object()}}),
    "keys of any kind": ("event", (), {"fact": {(1, 2): 3, None: 4, b"x": 5}}),
}


@pytest.mark.parametrize("kind", ODD)
def test_whatever_is_logged_a_line_is_written_and_the_writer_goes_on(kind: str) -> None:
    message, arguments, extra = ODD[kind]
    with opened() as pipe:
        pipe.logger.error(message, *arguments, extra=extra)
        pipe.logger.error("next")
        first, second = pipe.events()
        assert pipe.writer.dropped == 0
    assert first["level"] == "ERROR"
    assert second["message"] == "next"


def test_a_line_that_cannot_be_written_in_any_form_is_counted_and_the_writer_goes_on() -> None:
    with opened() as pipe:
        pipe.logger.error(Unreadable("text"))
        pipe.logger.error("next")
        assert [event["message"] for event in pipe.events()] == ["next"]
        assert pipe.writer.dropped == 1


def test_one_message_is_repeated_so_often_a_second_and_the_rest_is_counted() -> None:
    bound = RepeatBound()

    def at(second: int, message: Any) -> tuple[bool, int]:
        one = record(message)
        return bound.lets_through(one, second), vars(one).get("lines_held_back", 0)

    flood = [at(1, "same") for _ in range(REPEATS_PER_SECOND_MAX + 7)]
    assert [through for through, _ in flood] == [True] * REPEATS_PER_SECOND_MAX + [False] * 7
    assert at(1, "other") == (True, 0)
    assert at(2, "same") == (True, 7)
    assert at(2, "same") == (True, 0)
    assert at(3, {"no": "hash"}) == (True, 0)


def test_a_flood_of_one_message_is_held_back_and_other_messages_are_not() -> None:
    with opened() as pipe:
        for _ in range(1_000):
            pipe.logger.error("same")
        pipe.logger.error("other")
        events = pipe.events()
    assert len(events) < 100
    assert [event for event in events if event["message"] == "other"]


async def fail_in_tasks() -> None:
    async def fail() -> None:
        raise ValueError("unseen")

    for number in range(1_000):
        await asyncio.wait({asyncio.create_task(fail(), name=f"of-call-{number}")})


async def fail_in_callbacks() -> None:
    def failing(number: int) -> Callable[[], None]:
        def fail() -> None:
            raise ValueError(number)

        return fail

    kept = [failing(number) for number in range(1_000)]  # at addresses of their own
    for callback in kept:
        asyncio.get_running_loop().call_soon(callback)
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("failing", "message"),
    [(fail_in_tasks, "Task exception was never retrieved"), (fail_in_callbacks, "Exception in callback")],
)
def test_a_flood_of_what_fails_unseen_is_held_back(
    failing: Callable[[], Coroutine[Any, Any, None]], message: str
) -> None:
    asyncio_logger = logging.getLogger("asyncio")
    with opened() as pipe:
        asyncio_logger.addHandler(pipe.writer)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(failing())
            gc.collect()
        finally:
            asyncio_logger.removeHandler(pipe.writer)
        events = pipe.events()
    assert 0 < len(events) < 100
    assert all(event["message"].startswith(message) for event in events)


def test_a_stdout_that_nobody_reads_holds_nobody_up_and_what_is_lost_is_counted() -> None:
    with opened() as pipe:
        lines = QUEUE_LINES_MAX + 2_000
        for number in range(lines):
            pipe.logger.error(f"{number} " + "x" * 1_000)  # the pipe takes 64 KiB, the queue its bound
        assert 0 < pipe.writer.dropped <= 2_000
        dropped = pipe.writer.dropped
        events = pipe.events()
        assert len(events) + dropped == lines


def test_closing_does_not_wait_for_a_reader_that_never_comes() -> None:
    with opened() as pipe:
        for number in range(1_000):
            pipe.logger.error(f"{number} " + "x" * 1_000)
        pipe.writer.end()  # returns, though the thread is stuck in its write
        assert pipe.writer._thread.is_alive()
        pipe.events()


def test_a_reader_that_has_gone_is_no_reason_to_fail() -> None:
    read_fd, write_fd = os.pipe()
    writer = LineWriter(write_fd)
    os.close(read_fd)
    writer.handle(record("into the void"))
    writer.end()
    assert writer.dropped == 1
    os.close(write_fd)


def test_a_pipe_that_does_not_block_gets_whole_lines_all_the_same() -> None:
    with opened() as pipe:
        flags = fcntl.fcntl(pipe.writer._fd, fcntl.F_GETFL)
        fcntl.fcntl(pipe.writer._fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
        for number in range(500):
            pipe.logger.error(f"{number} " + "x" * 1_000)
        events = pipe.events()
        assert [event["message"].split()[0] for event in events] == [str(number) for number in range(500)]
        assert pipe.writer.dropped == 0


FULL = """
import logging, resource, sys
from app.telemetry.logging import LineWriter
writer = LineWriter()
def write(message):
    writer.handle(logging.makeLogRecord({"name": "test", "msg": message}))
for room in (500, resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    for number in range(10):
        write(f"{number} of {room} " + "x" * 80)
    while not writer._records.empty():
        pass
writer.end()
print(writer.dropped, file=sys.stderr)
"""


def test_a_line_that_the_disk_took_in_part_takes_no_other_with_it(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run([sys.executable, "-c", FULL], cwd=ROOT, stdout=log, stderr=subprocess.PIPE, check=True)
    ended = [one for one in (tmp_path / "log").read_bytes().splitlines() if one.endswith(b"}")]
    assert len(ended) == 20 - int(done.stderr) > 10 and all(map(json.loads, ended))


class LogsWhenCollected:
    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.itself = self

    def __del__(self) -> None:
        self.logger.error("collected")


def test_a_finaliser_that_logs_while_something_is_logged_holds_nobody_up() -> None:
    with opened() as pipe:
        threshold = gc.get_threshold()
        gc.set_threshold(1)  # collects at nearly every allocation, also inside of the handler
        try:
            for number in range(2_000):
                LogsWhenCollected(pipe.logger)
                pipe.logger.error(f"number {number}")
        finally:
            gc.set_threshold(*threshold)
        messages = {event["message"] for event in pipe.events()}
    assert {"collected", "number 1999"} <= messages


def test_threads_may_log_at_the_same_time() -> None:
    with opened() as pipe:
        ends = time.monotonic() + 1.2  # past the turn of a second, where the counts are taken

        def log(name: str) -> None:
            number = 0
            while time.monotonic() < ends:
                number += 1
                pipe.logger.error(f"{name} {number % 500}")

        threads = [threading.Thread(target=log, args=(f"t{number}",)) for number in range(4)]
        failures: list[Any] = []
        before, threading.excepthook = threading.excepthook, failures.append
        reading = threading.Thread(target=pipe._read)
        reading.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        threading.excepthook = before
        pipe.writer.end()
        os.close(pipe.writer._fd)
        reading.join()
    assert failures == []
    assert all(json.loads(one)["level"] == "ERROR" for one in pipe.lines)


PROBE = """
import logging
from app.telemetry.logging import log_to_stdout
writer = log_to_stdout({level!r})
names = ("app.tools", "uvicorn.error", "uvicorn.access", "httpx", "urllib3.connectionpool", "aiosqlite", "redis.client")
for name in (*names, "sqlalchemy.engine.Engine", "someone.else"):
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logging.getLogger(name).log(level, f"{{name}} {{logging.getLevelName(level)}}")
writer.end()
"""


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR"])
def test_the_log_level_holds_for_every_logger(level: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(level=level)], cwd=ROOT, env=service_environ(), capture_output=True
    )
    assert done.stderr == b""
    seen = [json.loads(one)["message"].split() for one in io.BytesIO(done.stdout)]
    least = getattr(logging, level)
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    for name in ("app.tools", "someone.else", "uvicorn.access"):
        assert [one[1] for one in seen if one[0] == name] == [one for one in levels if getattr(logging, one) >= least]
    for noisy in (
        "httpx",
        "uvicorn.error",
        "urllib3.connectionpool",
        "aiosqlite",
        "redis.client",
        "sqlalchemy.engine.Engine",
    ):
        expected = [one for one in levels if getattr(logging, one) >= max(least, logging.WARNING)]
        assert [one[1] for one in seen if one[0] == noisy] == expected


CRASHES = """
import os, sys, threading, warnings
from app.telemetry.logging import log_to_stdout
writer = log_to_stdout("INFO")

def crash(kind=ValueError):
    raise kind("password=" + os.environ["CANARY"])

class Finalised:
    __del__ = lambda self: crash()

for thread in (threading.Thread(target=crash), threading.Thread(target=crash, args=(SystemExit,))):
    thread.start()
    thread.join()
Finalised()
warnings.warn("password=" + os.environ["CANARY"])
writer.end()
"""


def test_what_python_would_write_to_stderr_is_an_event_without_secrets() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASHES], cwd=ROOT, env=service_environ(CANARY=CANARY), capture_output=True
    )
    assert done.stderr == b""
    assert CANARY.encode() not in done.stdout
    crashed, ignored, warned = [json.loads(one) for one in io.BytesIO(done.stdout)]
    assert crashed["message"] == "thread crashed" and crashed["exception"].endswith(f"ValueError: password={REDACTED}")
    assert ignored["message"] == "exception ignored" and "<lambda>" in ignored["within"]
    assert warned["logger"] == "py.warnings" and f"UserWarning: password={REDACTED}" in warned["message"]
