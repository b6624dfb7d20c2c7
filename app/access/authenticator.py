"""From a credential to its Caller: known ones at once, new ones by one look-up however many wait for it.

Known keys are confirmed in the database every 2 s, so that a revocation takes effect everywhere within 5 s without any
message between replicas; one that was not, since the process stood still, is looked up. While the database is away they
stay good for KEYS_STALE_S. Knows no HTTP but the headers; the doors ask it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Literal

from app.access.credential import (
    CredentialMissing,
    CredentialRefused,
    Headers,
    credential_in,
    gives_credential,
    is_sendable,
)
from app.access.keys import KEY_PREFIX, proven, split
from app.access.memory import Known, Memory
from app.access.store import CHUNK_MAX, KeyStore, Row, decode
from app.calls import LOCAL_CALLER, Caller
from app.clients import lacks_tables, reason
from app.errors import DependencyUnavailable, Overloaded, ToolServiceError, Unauthenticated

if TYPE_CHECKING:
    from app.access.jwks import FixedKey, KeySet
    from app.access.jwt import JwtVerifier  # loaded where there are tokens alone

logger = logging.getLogger("app.access")

Mode = Literal["off", "auto", "required"]

CONFIRM_EVERY_S = 2.0
EFFECTIVE_WITHIN_S = 5.0
"""What is promised of a revocation: one interval, one question that takes as long as it may, and room."""

REFUSED_KEPT_S = 1.0
REFUSED_MAX = 10_000
"""A flood of one wrong credential asks the database once a second."""

LOOKUPS_AT_ONCE = 8
"""The pool's other connections are for confirming and for the log, whatever strangers send."""

LOOKUPS_MAX = 1_000
TURN_TIMEOUT_S = 2.0

CLOSE_TIMEOUT_S = 1.0

Refusal = Callable[[], ToolServiceError]


class Presented:
    """A credential by the SHA-256 of the whole of it; None: there is none. `known` is what it was found to be."""

    __slots__ = ("digest", "is_key", "known")

    def __init__(self, digest: bytes | None, is_key: bool) -> None:
        self.digest = digest
        self.is_key = is_key
        self.known: Known | None = None


class Authenticator:
    """Who calls. `mode` auto is off for as long as the table of keys can be read and never held one."""

    def __init__(
        self,
        store: KeyStore,
        mode: Mode,
        stale_s: float,
        tokens: JwtVerifier | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._mode = mode
        self._good_for_s = max(stale_s, EFFECTIVE_WITHIN_S)
        self._verifier = tokens
        self._generation = tokens.generation if tokens else 0
        self._clock = clock
        self._wall = wall
        self._off_until = math.inf if mode == "off" else -math.inf
        self._keys = Memory(clock, wall)
        self._tokens = Memory(clock, wall)
        self._unchanged: dict[int, tuple[list[Known | None], bytes]] = {}
        """What was known from each place on when its rows were read, and their digest."""
        self._refused: dict[bytes, float] = {}
        self._flights: dict[bytes, asyncio.Task[Caller | Refusal]] = {}
        self._turns = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        self._away_since: float | None = None
        self.lacks_tables = False
        """Whether the database answers and was not migrated: it is away until somebody does."""
        self.keys_exist: bool | None = None
        """Whether the table was ever seen to hold a row; None until it could be read."""

    # What the doors ask

    def recognised(self, headers: Headers) -> Caller | None:
        """The caller, if that can be told without waiting; None: await `identify`. Raises Unauthenticated."""
        if self.is_off:
            return LOCAL_CALLER if self._mode == "off" or not gives_credential(headers) else None
        credential = credential_in(headers)
        return None if credential is None else self.known(credential)

    def known(self, credential: bytes) -> Caller | None:
        """The caller of a credential that was good a moment ago."""
        memory = self._keys if credential.startswith(KEY_PREFIX) else self._fresh_tokens()
        return memory.caller(sha256(credential).digest())

    def presented(self, headers: Headers) -> Presented:
        """What headers present, to be asked for again and again. Raises CredentialRefused."""
        credential = credential_in(headers)
        if credential is None:
            return Presented(None, False)
        return Presented(sha256(credential).digest(), credential.startswith(KEY_PREFIX))

    def again(self, presented: Presented) -> Caller | None:
        """`recognised` for headers that were looked at before."""
        digest, off_until = presented.digest, self._off_until
        if off_until > 0.0 and off_until > self._clock():  # `is_off`, asked for each request
            return LOCAL_CALLER if self._mode == "off" or digest is None else None
        if digest is None:
            return None
        memory = self._keys if presented.is_key else self._fresh_tokens()
        known = presented.known
        if known is None or self._wall() >= known.expires_at or self._clock() >= known.stale_at:
            known = presented.known = memory.fresh(digest)
        return None if known is None else known.caller

    def _fresh_tokens(self) -> Memory:
        """Without those that were verified by keys which the issuer has replaced since."""
        if self._verifier is not None and self._verifier.generation != self._generation:
            self._generation = self._verifier.generation
            self._tokens.clear()
        return self._tokens

    async def identify(self, headers: Headers) -> Caller:
        """The caller. Raises Unauthenticated, DependencyUnavailable or Overloaded."""
        try:
            credential = credential_in(headers)
            if credential is None:
                raise CredentialMissing
            return self.known(credential) or await self._look_up(credential)
        except ToolServiceError:
            if self.is_off:  # a key made just now turns authentication on; anything else nobody asked for
                return LOCAL_CALLER
            raise

    @property
    def is_off(self) -> bool:
        """Everybody may call, and nothing tells them apart."""
        off_until = self._off_until
        return off_until > 0.0 and off_until > self._clock()  # nearly always -inf: the clock need not be read

    # What operators ask

    @property
    def always_asks(self) -> bool:
        """For a credential, from the first request to the last."""
        return self._mode == "required"

    @property
    def away_s(self) -> float | None:
        """How long the database has been away; None while it answers."""
        return None if self._away_since is None else self._clock() - self._away_since

    @property
    def token_keys(self) -> KeySet | FixedKey | None:
        """What tokens are verified by; None where none is taken."""
        return None if self._verifier is None else self._verifier.keys

    @property
    def lets_nobody_in(self) -> bool:
        """No key of tokens is known, and no API key is: none can be read, or there is none beside the tokens. Where
        there are no tokens, an empty table is no reason: whoever makes the first key is let in at once."""
        if self.is_off or (self._verifier is not None and self._verifier.keys.usable):
            return False
        if self._away_since is not None:
            return not self._keys.holds_fresh()
        return self._verifier is not None and not self.keys_exist

    # New credentials

    async def _look_up(self, credential: bytes) -> Caller:
        if not is_sendable(credential):
            raise CredentialRefused
        digest = sha256(credential).digest()
        if self._refused.get(digest, -math.inf) > self._clock():
            raise CredentialRefused
        outcome = await asyncio.shield(self._flight(credential, digest))  # one who leaves leaves the others alone
        if isinstance(outcome, Caller):
            return outcome
        raise outcome()

    def _flight(self, credential: bytes, digest: bytes) -> asyncio.Task[Caller | Refusal]:
        """The one look-up of this credential, under way or begun now."""
        flight = self._flights.get(digest)
        if flight is None:
            if len(self._flights) >= LOOKUPS_MAX:
                raise Overloaded("Too many new credentials at once; try again", retry_after_ms=1000)
            flight = asyncio.get_running_loop().create_task(self._resolve(credential, digest), name="identify")
            self._flights[digest] = flight
            flight.add_done_callback(lambda _: self._flights.pop(digest, None))
        return flight

    async def _resolve(self, credential: bytes, digest: bytes) -> Caller | Refusal:
        """The caller, or how to say that it is none: each who waits raises an exception of its own."""
        by = self._by_key if credential.startswith(KEY_PREFIX) else self._by_token
        try:
            return await by(credential, digest)
        except Unauthenticated:
            self._refuse_for_a_while(digest)
            return CredentialRefused
        except DependencyUnavailable:
            return self._keys.believed(digest) or _away

    async def _by_key(self, credential: bytes, digest: bytes) -> Caller:
        parts = split(credential)
        if parts is None:
            raise CredentialRefused
        key_id, secret = parts
        row, asked_at = await self._row_in_turn(key_id)
        key = proven(None if row is None else decode(row), secret)
        if row is not None:
            self._found_keys()
        if key is None or not key.is_good(self._wall()):
            raise CredentialRefused
        known = Known(key.caller, key.good_until, asked_at + EFFECTIVE_WITHIN_S, asked_at + self._good_for_s, row)
        self._keys.keep(key_id, digest, known)
        return key.caller

    async def _row_in_turn(self, key_id: str) -> tuple[Row | None, float]:
        if self._away_since is not None:  # the next round finds out when it is back; strangers need not wait for that
            raise _away()
        try:
            async with asyncio.timeout(TURN_TIMEOUT_S):
                await self._turns.acquire()
        except TimeoutError:
            raise _away() from None
        try:
            asked_at = self._clock()
            rows = await self._store.find([key_id])
        finally:
            self._turns.release()
        return (rows[0] if rows else None), asked_at

    async def _by_token(self, credential: bytes, digest: bytes) -> Caller:
        if self._verifier is None:
            raise CredentialRefused
        generation = self._verifier.generation
        caller, expires_at = await self._verifier.verify(credential.decode("ascii"))
        if generation == self._verifier.generation:
            self._fresh_tokens().keep(digest.hex(), digest, Known(caller, expires_at, math.inf, math.inf))
        return caller

    def _refuse_for_a_while(self, digest: bytes) -> None:
        self._refused.pop(digest, None)  # to the end of the line
        self._refused[digest] = self._clock() + REFUSED_KEPT_S
        if len(self._refused) > REFUSED_MAX:
            del self._refused[next(iter(self._refused))]

    # Known keys

    async def watch(self) -> None:
        """Confirm for ever: a background task of the service, which has confirmed once before."""
        while True:
            await asyncio.sleep(CONFIRM_EVERY_S)
            await self.confirm()

    async def confirm(self) -> None:
        """Ask the database once more for every known key: what was revoked, changed or deleted takes effect."""
        try:
            names = self._keys.names()
            self._unchanged = {start: kept for start, kept in self._unchanged.items() if start < len(names)}
            if names:
                for start in range(0, len(names), CHUNK_MAX):
                    await self._confirm_some(start, names[start : start + CHUNK_MAX])
            else:
                await self._look_for_keys()
        except DependencyUnavailable as error:
            self._database_failed(error)
        else:
            self._database_answered()

    async def _confirm_some(self, start: int, key_ids: Sequence[str]) -> None:
        """Row by row only where the database's digest of them is not what it was: reading 10,000 rows takes 55 ms."""
        asked_at = self._clock()
        asked = [self._keys.named(key_id) for key_id in key_ids]
        digest = await self._store.digest(key_ids)
        if digest is not None and self._unchanged.get(start) == (asked, digest):
            self._confirmed(asked, asked_at)
            return
        rows = {row[0]: row for row in await self._store.find(key_ids)}
        good = []
        for key_id in key_ids:
            known = self._keys.named(key_id)
            if known is None:  # forgotten meanwhile
                continue
            row = rows.get(key_id)
            if row == known.row or self._take_over(known, row):
                good.append(known)
            else:
                self._keys.forget(key_id)
        self._confirmed(good, asked_at)
        if digest is not None:  # taken before they were read: what was changed in between shows in the next one
            self._unchanged[start] = (asked, digest)

    def _confirmed(self, good: Sequence[Known | None], asked_at: float) -> None:
        stale_at, believed_until = asked_at + EFFECTIVE_WITHIN_S, asked_at + self._good_for_s
        for known in good:
            if known is not None:
                known.stale_at, known.believed_until = stale_at, believed_until

    def _take_over(self, known: Known, row: Row | None) -> bool:
        """Whether the key is still good as the row now is; if so, what it says holds from here on."""
        key = None if row is None else decode(row)
        before = decode(known.row)
        if key is None or before is None or key.secret_sha256 != before.secret_sha256 or not key.is_good(self._wall()):
            return False
        known.caller, known.expires_at, known.row = key.caller, key.good_until, row
        return True

    def forget(self, key_id: str) -> None:
        """It was revoked here: do not wait for the next round."""
        self._keys.forget(key_id)

    async def _look_for_keys(self) -> None:
        """With no key known: has there ever been one?"""
        asked_at = self._clock()
        if await self._store.holds_any():
            self._found_keys()
        elif not self.keys_exist:
            self.keys_exist = False
            if self._mode == "auto":
                self._off_until = asked_at + self._good_for_s

    def _found_keys(self) -> None:
        """From now on, for the life of this process, even should every row be deleted."""
        if not self.keys_exist:
            self.keys_exist = True
            if self._mode == "auto":
                self._off_until = -math.inf
                logger.info("authentication is on: there is a key")

    def _database_failed(self, error: DependencyUnavailable) -> None:
        cause = error.__cause__
        lacks = isinstance(cause, Exception) and lacks_tables(cause)
        if self._away_since is None or lacks is not self.lacks_tables:
            why = reason(cause) if isinstance(cause, Exception) else "no answer in time"
            logger.error("keys cannot be read; known ones stay good for a while", extra={"reason": why})
        self.lacks_tables = lacks
        self._keys.believe()
        if self._away_since is None:
            self._away_since = self._clock()

    def _database_answered(self) -> None:
        if self._away_since is not None:
            logger.info("keys can be read again", extra={"after_s": round(self._clock() - self._away_since, 1)})
            self._away_since = None
            self.lacks_tables = False

    async def close(self) -> None:
        """Nobody waits any more."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        if flights:
            await asyncio.wait(flights, timeout=CLOSE_TIMEOUT_S)


def _away() -> DependencyUnavailable:
    return DependencyUnavailable("What tells new credentials is away; try again", retry_after_ms=1000)
