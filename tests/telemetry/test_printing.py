"""What is printed while it serves is an event a line, whoever prints it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.telemetry.own_logging import keeping_logging
from app.telemetry.printing import LINE_CHARACTERS_MAX, printing_as_events


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append((record.name, record.getMessage()))


@contextlib.contextmanager
def printed() -> Iterator[Kept]:
    """What is printed meanwhile, with streams that are files. No fixture: pytest puts its own there for each phase."""
    handler, root, before = Kept(), logging.getLogger(), (sys.stdout, sys.stderr)
    level = root.level
    root.setLevel(logging.INFO)
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            sys.stdout = sys.stderr = nowhere
            with printing_as_events(handler):
                yield handler
    finally:
        sys.stdout, sys.stderr = before
        root.setLevel(level)


def test_a_line_is_an_event_of_its_stream() -> None:
    with printed() as kept:
        print("a", 1)
        print("b", file=sys.stderr)
        print("one\ntwo\n\n   ")
        assert kept.events == [("stdout", "a 1"), ("stderr", "b"), ("stdout", "one"), ("stdout", "two")]


def test_what_is_printed_is_not_taken_for_a_format() -> None:
    with printed() as kept:
        print("100 %s {} %d")
        assert kept.events == [("stdout", "100 %s {} %d")]


def test_a_line_that_is_printed_in_parts_is_one_event() -> None:
    with printed() as kept:
        print("half", end=" ")
        assert kept.events == []
        print("whole")
        print("at once", end="", flush=True)
        assert kept.events == [("stdout", "half whole"), ("stdout", "at once")]


def test_threads_finish_their_own_lines() -> None:
    with printed() as kept:
        print("mine", end=" ")
        thread = threading.Thread(target=print, args=("theirs",))
        thread.start()
        thread.join()
        print("still mine")
        assert kept.events == [("stdout", "theirs"), ("stdout", "mine still mine")]


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_without_end_is_cut_into_pieces(end: str) -> None:
    with printed() as kept:
        print("x" * (2 * LINE_CHARACTERS_MAX + 5), end=end)
        assert [len(text) for _, text in kept.events] == [LINE_CHARACTERS_MAX, LINE_CHARACTERS_MAX, 5]


def test_the_log_level_holds_for_what_is_printed() -> None:
    with printed() as kept:
        logging.getLogger().setLevel(logging.WARNING)
        print("unheard")
        assert kept.events == []


def test_what_asks_for_the_file_behind_finds_it() -> None:
    with printed() as kept:
        sys.stdout.buffer.write(b"bytes go where they went\n")
        subprocess.run([sys.executable, "-c", "print('as does a program')"], stdout=sys.stdout, check=True)
        assert not sys.stdout.isatty() and sys.stdout.writable()
        assert kept.events == []


def test_at_its_end_the_streams_are_what_they_were_and_nothing_is_left_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    out, handler = io.StringIO(), Kept()
    monkeypatch.setattr(sys, "stdout", out)
    logging.getLogger("stdout").setLevel(logging.INFO)
    with printing_as_events(handler):
        print("begun", end="")
    assert sys.stdout is out and handler.events == [("stdout", "begun")]
    with printing_as_events(handler):
        sys.stdout = theirs = io.StringIO()
    assert sys.stdout is theirs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_keeps_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with printing_as_events(Kept()):
        print("(Pdb) ", end="")
    assert terminal.getvalue() == "(Pdb) "


def test_a_handler_of_someone_elses_writes_where_it_did_and_makes_no_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = logging.getLogger()
    with printed() as kept:
        monkeypatch.setattr(root, "handlers", [kept])
        with keeping_logging():
            logging.basicConfig(force=True, stream=sys.stderr)
        assert len(root.handlers) == 2
        logging.getLogger("test.printed").error("once")
        assert kept.events == [("test.printed", "once")]
