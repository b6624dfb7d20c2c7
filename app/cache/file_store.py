"""Records of idempotency keys in a SQLite file, where there is no Redis: they outlive the process, and processes of one
machine share them. Results of tools are kept in memory alone then.

Every step is one transaction of some 50 µs in the page cache, made where it is called: a thread would cost more.
A tenant has at most three times what is left free of the file (`app/transport/room.py`).
Survives SIGKILL; a power cut may lose the last ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TypeVar

from app.cache.store import KEPT_MS, Claim, StoreAway, StoreFull
from app.clients import file_at
from app.off_loop import off_loop

logger = logging.getLogger("app.cache")

T = TypeVar("T")

SAID_EVERY_S = 10.0
"""Between two lines of the log about a file that cannot be used."""

BUSY_MS = 50
"""Another process writes; the loop stands still meanwhile."""

OPEN_S_MAX = 2.0
WAL_RETRY_S = 0.02

FILE_BYTES_MAX = 268_435_456
PAGE_BYTES = 4_096

KEYS_PART = 3
OUTCOMES_PART = 7
"""Of what is left free of the file: what a tenant may have before one more key, and with one more outcome. Alone three
quarters and seven eighths: keys are refused before they run, so that what came of those that ran finds room."""

LOOKED_EVERY = 16
"""Steps between two looks at how full the file is, of 8 us each, while it is not half full."""

COUNTED_EVERY_S = 30.0
"""Between two counts of what each tenant has, while it is half full: half a second in a thread for its 250,000 records.
What is added meanwhile is added to the count."""

RECORD_BYTES = 1_024
"""What one takes beside its outcome, with its place in the index and what its page leaves unused."""

SWEEP_EVERY = 100
SWEPT_MAX = 500
"""Claims between two removals of what is past its day, and how much one removes: some 2 ms on the loop, and more than
comes meanwhile."""

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

_SWEEP = "DELETE FROM records WHERE key IN (SELECT key FROM records WHERE ends_ms <= ? ORDER BY ends_ms LIMIT ?)"

_COUNT = "SELECT substr(key, 1, instr(key, '}')), sum(? + coalesce(length(body), 0)) FROM records GROUP BY 1"

_FINISH = """
INSERT INTO records (key, fp, token, lease_ms, ends_ms, body) VALUES (?, ?, ?, 0, ?, ?)
ON CONFLICT (key) DO UPDATE SET ends_ms = excluded.ends_ms, body = excluded.body
WHERE token = excluded.token AND body IS NULL
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
        self._file: tuple[int, int] | None = None
        self._opening: asyncio.Future[sqlite3.Connection] | None = None
        self._closed = False
        self._claims = 0
        self._steps = 0
        self._half_full = False
        self._count_due = 0.0
        self._of_tenants: dict[str, int] = {}
        """Bytes, by the part of the keys that is the tenant's; counted only while the file is half full."""
        self._said_until = 0.0
        self._epochs: dict[str, int] = {}

    async def begin(self, key: str, fingerprint: str, token: str, lease_ms: int, *, take_over: bool) -> Claim:
        if self._half_full and monotonic() >= self._count_due:
            await self._count()
        claim = await self._transaction(lambda file: self._begin(file, key, fingerprint, token, lease_ms, take_over))
        if claim is None:
            raise StoreFull("the tenant's part of the file is taken")
        return claim

    def _begin(
        self, file: sqlite3.Connection, key: str, fingerprint: str, token: str, lease_ms: int, take_over: bool
    ) -> Claim | None:
        """None: no room, and what was swept stays swept."""
        now_ms = self._clock_ms()
        self._claims += 1
        if self._claims % SWEEP_EVERY == 1:
            file.execute(_SWEEP, (now_ms, SWEPT_MAX))
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
        if not self._has_room(file, key, RECORD_BYTES, KEYS_PART):
            return None
        file.execute(
            "INSERT OR REPLACE INTO records (key, fp, token, lease_ms, ends_ms) VALUES (?, ?, ?, ?, ?)",
            (key, fingerprint, token, now_ms + lease_ms, now_ms + max(KEPT_MS, lease_ms)),
        )
        return Claim("begun", token)

    async def finish(self, key: str, fingerprint: str, token: str, body: bytes) -> bool:
        asked = (key, fingerprint, token, self._clock_ms() + KEPT_MS, body)

        def finished(file: sqlite3.Connection) -> bool:
            if not self._has_room(file, key, len(body), OUTCOMES_PART):
                raise StoreFull("the tenant's part of the file is taken")
            return file.execute(_FINISH, asked).rowcount > 0

        return await self._transaction(finished)

    async def release(self, key: str, token: str) -> None:
        statement = "DELETE FROM records WHERE key = ? AND token = ? AND body IS NULL"
        await self._transaction(lambda file: file.execute(statement, (key, token)))

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
        self._closed = True
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _has_room(self, file: sqlite3.Connection, key: str, more_bytes: int, part: int) -> bool:
        """Whether the key's tenant may have so much more, which is counted as had."""
        self._steps += 1
        if not self._half_full and self._steps % LOOKED_EVERY:
            return True
        (pages,) = file.execute("PRAGMA page_count").fetchone()
        (unused,) = file.execute("PRAGMA freelist_count").fetchone()
        free_pages = self._pages_max - pages + unused
        self._half_full = 2 * free_pages < self._pages_max
        if not self._half_full:
            return True
        tenant = key[: key.find("}") + 1]
        had_bytes = self._of_tenants.get(tenant, 0) + more_bytes
        if had_bytes > part * (free_pages * PAGE_BYTES - more_bytes):
            return False
        self._of_tenants[tenant] = had_bytes
        return True

    async def _count(self) -> None:
        """Who comes meanwhile goes by the last count."""
        self._count_due = monotonic() + COUNTED_EVERY_S
        try:
            self._of_tenants = await off_loop(self._counted)
        except asyncio.CancelledError:
            self._count_due = 0.0
            raise
        except (OSError, sqlite3.Error) as error:
            self._say(str(error))

    def _counted(self) -> dict[str, int]:
        with contextlib.closing(sqlite3.connect(self._path)) as file:
            return dict(file.execute(_COUNT, (RECORD_BYTES,)).fetchall())

    async def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            file = self._opened
            if file is not None and file_at(self._path) != self._file:
                self._lose(file)
                file = None
            if file is None:  # the one step that touches the disk for long: 20 ms and more
                file = await self._open()
            try:
                file.execute("BEGIN IMMEDIATE")
                done = work(file)
                file.execute("COMMIT")
            except BaseException:
                if file.in_transaction:  # a full disk ends some by itself
                    file.execute("ROLLBACK")
                raise
            return done
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise StoreFull("no room for idempotency keys") from None
            reason = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
        self._say(reason)
        raise StoreAway(reason)

    def _lose(self, file: sqlite3.Connection) -> None:
        logger.error("the file of idempotency keys was taken away and is made again", extra={"file": str(self._path)})
        self._opened = None
        file.close()

    def _say(self, reason: str) -> None:
        now_s = monotonic()
        if now_s >= self._said_until:
            logger.warning("the file of idempotency keys cannot be used", extra={"reason": reason})
            self._said_until = now_s + SAID_EVERY_S

    async def _open(self) -> sqlite3.Connection:
        """In a thread, and one at a time: a disk that hangs keeps one of them. Who is cancelled meanwhile leaves the
        file open for the next."""
        if self._closed:
            raise OSError(errno.ESHUTDOWN, "the store is closed")
        opening = self._opening
        if opening is None:
            opening = self._opening = asyncio.ensure_future(off_loop(self._new_connection))
            opening.add_done_callback(self._has_opened)
        await asyncio.wait({opening})
        return opening.result()

    def _has_opened(self, opening: asyncio.Future[sqlite3.Connection]) -> None:
        self._opening = None
        if opening.cancelled() or opening.exception() is not None:
            return
        if self._closed:
            opening.result().close()
        else:
            self._opened = opening.result()

    def _new_connection(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.touch(mode=0o600)  # results are in it; SQLite gives its other files the same mode
        file = sqlite3.connect(self._path, timeout=OPEN_S_MAX, isolation_level=None, check_same_thread=False)
        try:
            _turn_to_wal(file)
            file.execute("PRAGMA synchronous=OFF")
            file.execute(f"PRAGMA max_page_count={self._pages_max}")
            file.executescript(_SCHEMA)
            file.execute(f"PRAGMA busy_timeout={BUSY_MS}")
            self._file = file_at(self._path)
        except BaseException:
            file.close()
            raise
        return file


def _turn_to_wal(file: sqlite3.Connection) -> None:
    """SQLite does not wait, whatever its timeout, when several processes turn a new file to WAL at once."""
    ends = monotonic() + OPEN_S_MAX
    while True:
        try:
            file.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or monotonic() > ends:
                raise
            time.sleep(WAL_RETRY_S)
