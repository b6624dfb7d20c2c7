"""Credentials that were good a moment ago, by the full SHA-256 of the whole credential, never by a part of it.

Owns the bounds: how many, and how long without being confirmed. Asks nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from app.calls import Caller

KNOWN_MAX = 10_000
"""About 10 MB. Past it the one kept longest goes, and is looked up when it comes again."""


class Known:
    """Whose credential, until when it is good (Unix), and until when that need not be confirmed (clock); where nobody
    can say, until `believed_until`.

    `row` is what the database said, to be compared with what it says next. One that is forgotten is expired for good:
    whoever has kept it sees that.
    """

    __slots__ = ("believed_until", "caller", "expires_at", "row", "stale_at")

    def __init__(
        self, caller: Caller, expires_at: float, stale_at: float, believed_until: float, row: Any = None
    ) -> None:
        self.caller = caller
        self.expires_at = expires_at
        self.stale_at = stale_at
        self.believed_until = believed_until
        self.row = row


class Memory:
    """Each credential has a name besides, by which it is confirmed or forgotten."""

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._clock = clock
        self._wall = wall
        self._by_digest: dict[bytes, Known] = {}
        self._digests: dict[str, bytes] = {}

    def fresh(self, digest: bytes) -> Known | None:
        """Looks at the time on every use: nothing need happen for a credential to expire."""
        known = self._by_digest.get(digest)
        if known is None or self._wall() >= known.expires_at or self._clock() >= known.stale_at:
            return None
        return known

    def caller(self, digest: bytes) -> Caller | None:
        known = self.fresh(digest)
        return None if known is None else known.caller

    def believed(self, digest: bytes) -> Caller | None:
        """The caller of a credential that nobody can confirm now."""
        known = self._by_digest.get(digest)
        if known is None or self._wall() >= known.expires_at or self._clock() >= known.believed_until:
            return None
        return known.caller

    def believe(self) -> None:
        """Nobody can confirm any of them for now."""
        for known in self._by_digest.values():
            known.stale_at = known.believed_until

    def keep(self, name: str, digest: bytes, known: Known) -> None:
        self.forget(name)
        self._by_digest[digest] = known
        self._digests[name] = digest
        if len(self._digests) > KNOWN_MAX:
            self.forget(next(iter(self._digests)))

    def forget(self, name: str) -> None:
        digest = self._digests.pop(name, None)
        if digest is not None:
            self._by_digest.pop(digest).expires_at = -math.inf

    def clear(self) -> None:
        for known in self._by_digest.values():
            known.expires_at = -math.inf
        self._by_digest.clear()
        self._digests.clear()

    def named(self, name: str) -> Known | None:
        digest = self._digests.get(name)
        return None if digest is None else self._by_digest[digest]

    def names(self) -> list[str]:
        return list(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def holds_fresh(self) -> bool:
        """Whether any of them is still believed without being confirmed."""
        now = self._clock()
        return any(now < known.stale_at for known in self._by_digest.values())
