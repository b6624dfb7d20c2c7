"""Records of idempotency keys in a SQLite file, where there is no Redis: they outlive the process, and processes of one
machine share them. Results of tools are kept in memory alone then.

Every step is one transaction of some 50 µs in the page cache, made where it is called: a thread would cost more.
Survives SIGKILL; a power cut may lose the last ones.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from app.cache.store import KEPT_MS, Claim, StoreAway, StoreFull

T = TypeVar("T")

BUSY_S = 0.05
"""Another process writes; the loop stands still meanwhile."""

FILE_BYTES_MAX = 268_435_456
PAGE_BYTES = 4_096

SWEEP_EVERY = 100
"""Claims between two removals of what is past its day."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    key TEXT PRIMARY KEY,
    fp TEXT NOT NULL,
    token TEXT NOT NULL,
    lease_ms INTEGER NOT NULL,
    ends_ms INTEGER NOT NULL,
    body BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS records_ends ON records (ends_ms);
"""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class FileStore:
    """`clock_ms` is Unix milliseconds. Opens the file with the first claim, so that who has none has no file."""

    def __init__(self, path: Path, clock_ms: Callable[[], int] = _now_ms, bytes_max: int = FILE_BYTES_MAX) -> None:
        self._path = path
        self._clock_ms = clock_ms
        self._pages_max = bytes_max // PAGE_BYTES
        self._opened: sqlite3.Connection | None = None
        self._claims = 0
        self._epochs: dict[str, int] = {}

    async def begin(self, key: str, fingerprint: str, token: str, lease_ms: int, *, take_over: bool) -> Claim:
        return self._transaction(lambda file: self._begin(file, key, fingerprint, token, lease_ms, take_over))

    def _begin(
        self, file: sqlite3.Connection, key: str, fingerprint: str, token: str, lease_ms: int, take_over: bool
    ) -> Claim:
        now_ms = self._clock_ms()
        self._claims += 1
        if self._claims % SWEEP_EVERY == 1:
            file.execute("DELETE FROM records WHERE ends_ms <= ?", (now_ms,))
        found = file.execute("SELECT fp, token, lease_ms, ends_ms, body FROM records WHERE key = ?", (key,)).fetchone()
        if found is not None and found[3] > now_ms:
            first_fingerprint, first, lease_ends_ms, _, body = found
            if first_fingerprint != fingerprint:
                return Claim("other", first)
            if body is not None:
                return Claim("done", first, 0, body)
            if lease_ends_ms > now_ms:
                return Claim("running", first, lease_ends_ms - now_ms)
            if not take_over:
                return Claim("unknown", first)
        file.execute(
            "INSERT OR REPLACE INTO records (key, fp, token, lease_ms, ends_ms) VALUES (?, ?, ?, ?, ?)",
            (key, fingerprint, token, now_ms + lease_ms, now_ms + max(KEPT_MS, lease_ms)),
        )
        return Claim("begun", token)

    async def finish(self, key: str, token: str, body: bytes) -> bool:
        asked = (body, self._clock_ms() + KEPT_MS, key, token)
        statement = "UPDATE records SET body = ?, ends_ms = ? WHERE key = ? AND token = ? AND body IS NULL"
        return self._transaction(lambda file: file.execute(statement, asked).rowcount > 0)

    async def release(self, key: str, token: str) -> None:
        statement = "DELETE FROM records WHERE key = ? AND token = ? AND body IS NULL"
        self._transaction(lambda file: file.execute(statement, (key, token)))

    async def get(self, key: str) -> bytes | None:
        return None

    async def put(self, key: str, value: bytes, ttl_ms: int) -> None:
        pass

    async def take_turn(self, key: str, ttl_ms: int) -> bool:
        return True

    async def epochs(self) -> dict[str, int]:
        return dict(self._epochs)

    async def next_epoch(self, tool_id: str) -> int:
        self._epochs[tool_id] = self._epochs.get(tool_id, 0) + 1
        return self._epochs[tool_id]

    async def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            file = self._opened or self._open()
            file.execute("BEGIN IMMEDIATE")
            try:
                done = work(file)
            except BaseException:
                file.execute("ROLLBACK")
                raise
            file.execute("COMMIT")
            return done
        except sqlite3.Error as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise StoreFull("no room for idempotency keys") from None
            raise StoreAway(str(error)) from None
        except OSError as error:
            raise StoreAway(error.strerror or str(error)) from None

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
        try:
            file.execute("PRAGMA journal_mode=WAL")
            file.execute("PRAGMA synchronous=OFF")
            file.execute(f"PRAGMA max_page_count={self._pages_max}")
            file.executescript(_SCHEMA)
        except BaseException:
            file.close()
            raise
        self._opened = file
        return file
