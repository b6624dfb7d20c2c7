"""What a failed run leaves behind: an error, whose tracebacks lead to frames with everything that was in them.

Where such a frame leads back to its error, as in libraries of HTTP and of I/O, only the garbage collector frees it all.
It counts objects and no bytes: a few hundred failed calls with a megabyte each are a gigabyte before it looks.
"""

from __future__ import annotations

import asyncio
from typing import Any

FORGET_AFTER_S = 0.1
"""The log's thread writes tracebacks, of the error and of those that it came of, and needs them until it has."""

ERRORS_MAX = 1_000
"""Of one error: a tool may make its chain as long as it likes."""


def forget_soon(loop: asyncio.AbstractEventLoop, error: BaseException) -> None:
    loop.call_later(FORGET_AFTER_S, forget_frames, error)


def forget_run_soon(loop: asyncio.AbstractEventLoop, run: asyncio.Future[Any]) -> None:
    loop.call_later(FORGET_AFTER_S, forget_run, run)


def forget_run(run: asyncio.Future[Any]) -> None:
    """Of a run that has ended and that nobody waits for any more. asyncio does not report its error as forgotten, and a
    future keeps a traceback of its own until it is asked for its result."""
    try:
        run.result()
    except BaseException as error:  # the tool's, whatever it is
        forget_frames(error)


def forget_frames(error: BaseException) -> None:
    """Of the error, of those that it came of, and of those in its groups."""
    left, seen = [error], set[int]()
    while left and len(seen) < ERRORS_MAX:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        BaseException.with_traceback(one, None)
        left += [other for other in (_CAUSE(one), _CONTEXT(one)) if other is not None]
        if isinstance(one, BaseExceptionGroup):
            left += _EXCEPTIONS(one)


# Not by their names: a tool's own class may have attributes that fail.
_CAUSE: Any = BaseException.__dict__["__cause__"].__get__
_CONTEXT: Any = BaseException.__dict__["__context__"].__get__
_EXCEPTIONS: Any = BaseExceptionGroup.__dict__["exceptions"].__get__
