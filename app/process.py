"""How a command's process begins and ends: its standard files, what it says of an error, the code it ends with.

Knows no command; called by the command line alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TextIO

import uvloop

from app.errors import ToolServiceError
from app.executor.containment import LastingLoop
from app.migration import MigrationError
from app.settings import SettingsError
from app.transport.server import CannotListen

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Where the answer was to go, most likely."""

NOWHERE = "the working directory was removed; change to one that is there, or give absolute paths"

FLUSH_S = 1.0
"""At the end of `serve`, for each of stdout and stderr."""

ENDED_BY_INTERRUPT = 130
ENDED_BY_PIPE = 141
"""What a shell shows for a program that SIGINT or SIGPIPE ended."""


def open_standard_files() -> None:
    """Those that were closed: their numbers would go to a journal or a database, and what is logged goes to 1."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks is told as stderr tells it
        sys.stdout.reconfigure(errors="backslashreplace")


def is_somewhere() -> bool:
    """Whether there is a working directory: a shell keeps one that was removed, and relative paths lead nowhere."""
    try:
        os.getcwd()  # noqa: PTH109 - what Path.cwd would ask
    except FileNotFoundError:
        return False
    return True


def said(error: Exception) -> int:
    """Tell the operator what is wrong; the code to end with."""
    print(f"agentcore-tools: {error}", file=sys.stderr)
    return 2 if isinstance(error, SettingsError) else 1


def _flush(stream: TextIO) -> None:
    stream.flush()


def run(command: Coroutine[Any, Any, int], flush: Callable[[TextIO], None] = _flush) -> NoReturn:
    """Run a command and end the process with its code: the one way out.

    From inside the loop, because leaving it waits for all its tasks and threads: one hung tool would keep the process.
    """

    async def whole() -> NoReturn:
        try:
            code = await command
            flush(sys.stdout)
        except (SettingsError, CannotListen, MigrationError, ToolServiceError) as error:
            code = said(error)
        except BrokenPipeError:  # whoever read the answer has seen enough
            code = ENDED_BY_PIPE
        except asyncio.CancelledError:
            code = ENDED_BY_INTERRUPT
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                said(error)
            elif isinstance(error, FileNotFoundError) and not is_somewhere():
                said(FileNotFoundError(NOWHERE))
            else:
                traceback.print_exc()
            code = 1
        with contextlib.suppress(OSError):
            flush(sys.stderr)
        os._exit(code)

    uvloop.run(whole(), loop_factory=LastingLoop)
    raise AssertionError("the process has ended")


def flush_briefly(stream: TextIO) -> None:
    """What tools printed. Not for as long as nobody reads it: a print that hangs holds the stream's lock."""

    def flush() -> None:
        with contextlib.suppress(OSError):
            stream.flush()

    flushing = threading.Thread(target=flush, name="flush", daemon=True)
    flushing.start()
    flushing.join(FLUSH_S)
