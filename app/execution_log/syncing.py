"""Syncs what the journal has written: soon, or at once for commits that wait for it, grouped, in the disk's thread.

Knows no frames. Called by the journal and its segment writer.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from app.execution_log.commit import Commit
from app.execution_log.disk import DiskThread

logger = logging.getLogger("app.execution_log")

INTERVAL_S = 0.05
"""What a power cut may cost in mode durable."""

PATIENCE_S = 5.0
"""A disk that hangs longer holds no answer back: the record is in the page cache, and a crash of ours keeps that."""


class Syncing:
    """One sync at a time; what is written while it runs is covered by the next. `on_gone` is told that the file which
    is written is no longer where its name says: nobody would find it after a crash."""

    def __init__(
        self,
        disk: DiskThread,
        folders: list[Path],
        interval_s: float,
        patience_s: float,
        on_gone: Callable[[], None],
    ) -> None:
        self.failing = False
        self._failures = 0
        """Since it last succeeded."""
        self._disk = disk
        self._folders = folders
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        self._path = Path()
        self._retired_fds: list[int] = []
        self._new_files = False
        """Their names are not known to be on disk: until a sync of the folders has succeeded."""
        self._written_bytes = 0
        self._synced_bytes = 0
        self._running = False
        self._closed = False
        self._waiting: deque[tuple[int, Commit]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None

    def note_new_file(self, fd: int, path: Path) -> None:
        """The file that is written from now on; its name must be found after a power cut as well."""
        self._fd, self._path = fd, path
        self._new_files = True

    def note_written(self, size_bytes: int) -> None:
        self._written_bytes += size_bytes
        if self._timer is None and not self._running:
            self._timer = self._loop.call_later(self._interval_s, self._sync)

    def retire(self, fd: int) -> None:
        """Close the file once it is synced."""
        self._retired_fds.append(fd)
        self._fd = -1

    def hold(self, commit: Commit) -> None:
        """Complete it when everything that is written now is synced; at once while the disk fails."""
        if self.failing:
            commit.complete()
            return
        self._waiting.append((self._written_bytes, commit))
        if not self._running:
            self._sync()
        self._be_patient()

    def close(self) -> None:
        """A last sync; `release` is due when the disk's thread has ended."""
        self._stop_timers()
        self._closed = True
        self._new_files |= self._running  # that sync may still fail
        self._sync()

    def release(self) -> None:
        """Complete what still waits: the disk hangs."""
        while self._waiting:
            self._waiting.popleft()[1].complete()

    def _be_patient(self) -> None:
        if self._patience is None:
            self._patience = self._loop.call_later(self._patience_s, self._hangs)

    def _stop_timers(self) -> None:
        for timer in (self._timer, self._patience):
            if timer is not None:
                timer.cancel()
        self._timer = self._patience = None

    def _sync(self) -> None:
        self._stop_timers()
        with_names = self._new_files
        gone: list[Path] = []
        work = partial(_sync_files, self._retired_fds, self._fd, self._path, gone, self._folders if with_names else [])
        self._retired_fds, self._new_files, self._running = [], False, True
        self._disk.submit(work, partial(self._synced, self._written_bytes, with_names, gone))

    def _synced(self, written_bytes: int, with_names: bool, gone: list[Path], error: OSError | None) -> None:
        self._running = False
        self._new_files |= with_names and error is not None
        self._stop_timers()
        self._note(error)
        if error is None:
            self._synced_bytes = written_bytes
        while self._waiting and (self.failing or self._waiting[0][0] <= written_bytes):
            self._waiting.popleft()[1].complete()
        if self._closed:
            return
        if self._fd >= 0 and self._path in gone:
            self._on_gone()
        if self._waiting:
            self._sync()
            self._be_patient()
        elif self._written_bytes > self._synced_bytes:
            self._timer = self._loop.call_later(self._interval_s, self._sync)

    def _note(self, error: OSError | None) -> None:
        if error is not None:
            self._failures += 1
            if not self.failing:
                logger.error("journal cannot be synced", extra={"errno": error.errno, "reason": error.strerror})
        elif self.failing:
            logger.warning("journal is synced again", extra={"failures": self._failures})
            self._failures = 0
        self.failing = error is not None

    def _hangs(self) -> None:
        self._patience = None
        self.failing = True
        self._failures += 1
        logger.error("journal sync hangs", extra={"patience_s": self._patience_s})
        self.release()


def _sync_files(retired_fds: list[int], fd: int, path: Path, gone: list[Path], folders: list[Path]) -> None:
    """In the disk's thread. Every retired file is closed, whatever fails. `path` is added to what is gone, if it is."""
    failed: OSError | None = None
    for retired_fd in retired_fds:
        try:
            os.fdatasync(retired_fd)
        except OSError as error:
            failed = error
        finally:
            os.close(retired_fd)
    if fd >= 0:
        os.fdatasync(fd)
        if not _is_at(path, fd):
            gone.append(path)
    for folder in folders:
        _sync_folder(folder)
    if failed is not None:
        raise failed


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # want of rights: it may well be there


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
