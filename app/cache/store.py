"""The socket of the room: where idempotency records and kept results live. `redis_store` is for all replicas together,
`file_store` for one machine without Redis.

Keys are digests of lengths and parts (`digest`), tagged by tenant: no choice of names makes two keys one, and a Redis
Cluster spreads tenants. Values are bytes that `records` and `results` write and check; never pickle.
"""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple, Protocol

State = Literal["begun", "running", "done", "unknown", "other"]


class StoreAway(ConnectionError):
    """The store did not answer in its time, or not as it should. What it was asked may have happened."""


class StoreFull(Exception):
    """No room for one more record, and forgetting one would break its promise."""


class Claim(NamedTuple):
    """What a store says to who wants to run under an idempotency key.

    `begun`: run, the key is yours. `running`: the first call has its lease for `left_ms` more. `done`: `body` is what
    came of it. `unknown`: the lease ended and nobody said what came of it. `other`: the key stands for another call.
    `token` is the first call's.
    """

    state: State
    token: str = ""
    left_ms: int = 0
    body: bytes = b""


class CacheStore(Protocol):
    """Everything may raise StoreAway."""

    async def begin(self, key: str, fingerprint: str, token: str, lease_ms: int, *, take_over: bool) -> Claim:
        """Claim the key for `token`. `take_over`: an ended lease is no obstacle. Raises StoreFull."""

    async def finish(self, key: str, fingerprint: str, token: str, body: bytes) -> bool:
        """Say what came of it, also where the claim was lost meanwhile. False: the key is another token's now, or has
        its outcome, and nothing was written."""

    async def release(self, key: str, token: str) -> None:
        """Nothing ran under this claim: the next call may."""

    async def get(self, key: str) -> bytes | None:
        """A kept result."""

    async def put(self, key: str, value: bytes, ttl_ms: int) -> None:
        """Keep a result."""

    async def take_turn(self, key: str, ttl_ms: int) -> bool:
        """Whether nobody else has had this turn in the last `ttl_ms`."""

    async def epochs(self) -> dict[str, int]:
        """Of each tool whose results were ever forgotten: how often."""

    async def next_epoch(self, tool_id: str) -> int:
        """Forget every result of a tool."""

    async def close(self) -> None: ...


KEPT_MS = 86_400_000
"""A day, for what came of a call under an idempotency key."""


def digest(*parts: str | bytes) -> str:
    """Of parts with their lengths, 64 hexadecimal digits."""
    whole = hashlib.sha256()
    for part in parts:
        encoded = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        whole.update(b"%d:%b" % (len(encoded), encoded))
    return whole.hexdigest()


def key_of(kind: str, tag: str, *parts: str | bytes) -> str:
    """A store's key. `tag` is what a Cluster spreads by: a tenant, or a tool where tenants share."""
    return f"agentcore:{kind}:{{{digest(tag)[:16]}}}:{digest(tag, *parts)}"
