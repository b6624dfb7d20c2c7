"""Our set-up of logging, kept against foreign code that makes one for itself, as it is imported and as it runs.

`basicConfig` with `force` and `dictConfig` take all handlers away, and the latter switches off each logger that it does
not name. What such code adds stays beside ours.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from app.telemetry.printing import PrintedLines

LOOKED_AFTER_S = 1.0
"""Between two looks."""

logger = logging.getLogger("app.telemetry")


class LoggingSetup:
    """How logging was set up when this was made."""

    def __init__(self) -> None:
        manager = logging.root.manager
        self._handlers = logging.root.handlers[:]
        self._level = logging.root.level
        self._disabled_below = manager.disable
        known = (one for one in list(manager.loggerDict.values()) if isinstance(one, logging.Logger))
        self._loggers = [one for one in known if not one.disabled]

    def holds(self) -> bool:
        """Whether what is logged still goes where it went."""
        return (
            all(handler in logging.root.handlers for handler in self._handlers)
            and logging.root.manager.disable <= self._disabled_below
            and not any(one.disabled for one in self._loggers if one.name.startswith("app."))
        )

    def restore(self) -> None:
        root = logging.root
        root.handlers[:] = [*self._handlers, *(one for one in root.handlers if one not in self._handlers)]
        for one in root.handlers:
            if isinstance(one, logging.StreamHandler) and isinstance(one.stream, PrintedLines):
                one.setStream(one.stream.stream)  # or each event would be printed, and so be an event again
        root.setLevel(self._level)
        logging.disable(self._disabled_below)
        for each in self._loggers:
            each.disabled = False


@contextlib.contextmanager
def keeping_logging() -> Iterator[None]:
    """Around an import of foreign code."""
    before = LoggingSetup()
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def watching_logging() -> Iterator[None]:
    """While tools run, which may set it up at any time: a thread looks after it and puts it right."""
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(LoggingSetup(), ended), name="logging-watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()


def _watch(setup: LoggingSetup, ended: threading.Event) -> None:
    while not ended.wait(LOOKED_AFTER_S):
        if not setup.holds():
            setup.restore()
            logger.warning("logging was set up by a tool, put right")
