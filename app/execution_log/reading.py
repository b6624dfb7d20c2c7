"""Reads folders and waits where the disk does not let it: an error of the disk is no damage of what is on it.

What stays unreadable for TRIES_MAX attempts is passed over, but never for want of descriptors, memory or rights. Knows
neither rows nor the tail in memory. Called by the journal.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from app.execution_log.folders import NOT_THE_FILE, Folder, Position

logger = logging.getLogger("app.execution_log")

RETRY_S = 1.0
"""Between two attempts to read a folder: each may hold the event loop for as long as a bad sector takes."""

TRIES_MAX = 300
"""Five minutes: longer than a disk's own repeats and the switch to another path to it take, 30 to 180 s."""


@dataclass(slots=True)
class Stall:
    """Of one folder, from its first error until it is read again."""

    sequence: int
    """Of the segment that could not be read last."""
    tries: int = 0
    """In a row, and after TRIES_MAX until that segment is left: patience is had once for each."""
    failing: bool = True
    timer: asyncio.TimerHandle | None = None
    """Until it fires the folder is left alone."""


class Reading:
    """Of all folders of a journal."""

    def __init__(self, wake: Callable[[], None], retry_s: float, tries_max: int) -> None:
        self._wake = wake
        self._retry_s = retry_s
        self._tries_max = tries_max
        self._loop = asyncio.get_running_loop()
        self._stalls: dict[Folder, Stall] = {}

    @property
    def stalled(self) -> bool:
        """Something is there that cannot be read now."""
        return any(stall.failing for stall in self._stalls.values())

    def is_stalled(self, folder: Folder) -> bool:
        stall = self._stalls.get(folder)
        return stall is not None and stall.failing

    def read(self, folder: Folder, rows_max: int, bytes_max: int, end: Position | None) -> list[bytes] | None:
        """As the folder's own, but never raises. None: no more, or none now; `is_stalled` says which."""
        stall = self._stalls.get(folder)
        if stall is not None and stall.timer is not None:
            return None
        try:
            records = folder.read(rows_max, bytes_max, end)
        except OSError as error:
            return self._failed(folder, end, error)
        if stall is not None:
            self._succeeded(folder, stall)
        return records

    def forget(self, folder: Folder) -> None:
        stall = self._stalls.pop(folder, None)
        if stall is not None and stall.timer is not None:
            stall.timer.cancel()

    def close(self) -> None:
        for folder in list(self._stalls):
            self.forget(folder)

    def _failed(self, folder: Folder, end: Position | None, error: OSError) -> list[bytes] | None:
        stall = self._stalls.get(folder)
        if stall is None:
            stall = self._stalls[folder] = Stall(folder.cursor.sequence)
            logger.error(
                "journal cannot be read, rows wait",
                extra={"folder": str(folder.path), "errno": error.errno, "reason": error.strerror},
            )
        stall.sequence = folder.cursor.sequence
        stall.tries = 0 if error.errno in NOT_THE_FILE else stall.tries + 1
        stall.failing = stall.tries < self._tries_max
        if stall.failing:
            stall.timer = self._loop.call_later(self._retry_s, self._retry, stall)
            return None
        folder.pass_over_unreadable(end, error)
        return []

    def _succeeded(self, folder: Folder, stall: Stall) -> None:
        stall.failing = False
        if stall.tries < self._tries_max or folder.cursor.sequence != stall.sequence:
            del self._stalls[folder]
            logger.warning("journal is read again", extra={"folder": str(folder.path)})

    def _retry(self, stall: Stall) -> None:
        stall.timer = None
        self._wake()
