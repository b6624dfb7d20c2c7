"""Results of read-only tools that are kept: in this process, and in Redis for all replicas.

A key holds everything that a result may depend on: tenant (unless the tool shares), tool, version, schemas, how often
the tool's results were forgotten, parameters. What comes from Redis is checked before it is believed. A result is
fresh for the tool's `cache_ttl`, a little less or more, and then stale for as long again, at most a minute: a stale
one is still given, while one call fetches a new one. Knows stores; decides nothing about a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import struct
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, NamedTuple, TypeVar

import orjson

from app.cache.store import CacheStore, StoreAway, digest, key_of
from app.off_loop import off_loop

logger = logging.getLogger("app.cache")

T = TypeVar("T")

JITTER = 0.1
"""Of a life, either way: what was kept together must not end together."""

STALE_S_MAX = 60.0

ENTRIES_MAX = 10_000
ENTRY_OVERHEAD_BYTES = 400
"""What an entry takes beside its result."""

COPIED_BYTES_MAX = 65_536
"""What orjson returns holds up to 8 KB more than its bytes for as long as it lives: to larger ones that adds little."""

WRITES_WAITING_MAX = 1_000
WRITES_BYTES_MAX = 33_554_432
"""Results on their way to Redis; past either they are kept in this process alone."""

OFF_LOOP_BYTES = 65_536
"""From this size packing and checking go to a thread: a megabyte would hold the loop for 10 ms."""

TURN_PART = 0.8
"""Of a result's life. One replica's turn to refresh it must be over when the next is due, or that one is missed."""

EPOCH_MAX = 2**53
"""Lua's numbers are exact below."""

COMPRESS_FROM_BYTES = 2_048
"""Below, a header and a dictionary of zlib cost more than they save."""

COMPRESSION_LEVEL = 1
"""A search result of 20 KB: a third of its size in 0.2 ms; level 6 takes three times as long for a tenth less."""

CLOCK_SKEW_S = 60.0

_MAGIC = b"ACR1"
_HEAD = struct.Struct("<4sBdd16s")
"""Magic, 1 if compressed, Unix seconds when made, seconds of life, check sum."""


class Found(NamedTuple):
    result: bytes
    stale: bool


class Kept(NamedTuple):
    """In this process. Times are `monotonic` seconds."""

    result: bytes
    fresh_until: float
    stale_until: float
    tool_id: str


class Write(NamedTuple):
    """On its way to Redis. `made_at` is Unix seconds."""

    key: str
    result: bytes
    made_at: float
    life_s: float


class CachedTool:
    """What the cache needs to know of one tool."""

    __slots__ = ("is_object", "schemas", "shared", "tool_id", "ttl_s", "version")

    def __init__(
        self, tool_id: str, version: str, schemas: bytes, ttl_s: float, *, shared: bool, is_object: bool
    ) -> None:
        self.tool_id = tool_id
        self.version = version
        self.schemas = hashlib.sha256(schemas).digest()
        self.ttl_s = ttl_s
        self.shared = shared
        self.is_object = is_object


class ResultCache:
    """One per service. `run` must be running for Redis to be written."""

    def __init__(
        self,
        store: CacheStore | None,
        bytes_max: int,
        result_bytes_max: int,
        *,
        compress: bool,
        clock: Callable[[], float] = monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._store = store
        self._bytes_max = bytes_max
        self._result_bytes_max = result_bytes_max
        self._compress = compress
        self._clock = clock
        self._jitter = jitter
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self.bytes = 0
        self.refused = 0
        """Values from Redis that were not believed."""
        self._epochs: dict[str, int] = {}
        self._caught_up = store is None
        """Before, Redis may hold what was forgotten."""
        self._writes: asyncio.Queue[Write] = asyncio.Queue(WRITES_WAITING_MAX)
        self._writes_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def keeps_any(self) -> bool:
        return self._bytes_max > 0

    def key(self, tool: CachedTool, tenant: str, parameters: bytes) -> str:
        """`parameters` as JSON with sorted names."""
        epoch = str(self._epochs.get(tool.tool_id, 0))
        owner = digest("shared", tool.tool_id) if tool.shared else digest("tenant", tenant)
        return key_of("result", owner, tool.tool_id, tool.version, tool.schemas, epoch, parameters)

    def look(self, key: str) -> Found | None:
        """In this process."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        now = self._clock()
        if now >= kept.stale_until:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return Found(kept.result, now >= kept.fresh_until)

    async def fetch(self, key: str, tool: CachedTool) -> Found | None:
        """In Redis; what is found there is kept here too."""
        if self._store is None or not self._caught_up:
            return None
        try:
            value = await self._store.get(key)
        except StoreAway:
            return None
        if value is None:
            return None
        read = await _off_loop(len(value), _read, value, key, self._result_bytes_max)
        if read is None or (tool.is_object and not read[0].startswith(b"{")):
            self.refused += 1
            logger.warning("a kept result cannot be believed", extra={"tool_id": tool.tool_id})
            return None
        result, age_s, life_s = read
        life_s = min(life_s, tool.ttl_s * (1 + JITTER))  # what was kept while the tool declared more
        if age_s >= life_s + _stale_s(life_s):
            return None
        self._keep(key, tool.tool_id, result, life_s - age_s, _stale_s(life_s))
        return Found(result, age_s >= life_s)

    def keep(self, key: str, tool: CachedTool, result: bytes) -> None:
        """A result that was made just now."""
        if len(result) < COPIED_BYTES_MAX:
            result = bytes(memoryview(result))
        life_s = tool.ttl_s * (1 + self._jitter(-JITTER, JITTER))
        self._keep(key, tool.tool_id, result, life_s, _stale_s(life_s))
        if self._store is not None and self._writes_bytes + len(result) <= WRITES_BYTES_MAX:
            with contextlib.suppress(asyncio.QueueFull):
                self._writes.put_nowait(Write(key, result, time.time(), life_s))
                self._writes_bytes += len(result)

    async def may_refresh(self, key: str, tool: CachedTool, timeout_s: float) -> bool:
        """Whether this replica is the one to fetch a new result for a stale one: nobody has one, nobody is at it."""
        if self._store is None:
            return True
        found = await self.fetch(key, tool)
        if found is not None and not found.stale:
            return False
        try:
            turn_s = min(timeout_s, tool.ttl_s * TURN_PART)
            return await self._store.take_turn(key + ":turn", max(1, int(turn_s * 1e3)))
        except StoreAway:
            return True

    # Forgetting

    async def forget(self, tool_id: str) -> int:
        """Every result of a tool; the number that other replicas are to be told. Raises StoreAway."""
        epoch = self._epochs.get(tool_id, 0) + 1 if self._store is None else await self._store.next_epoch(tool_id)
        self.forgotten(tool_id, epoch)
        return epoch

    def forgotten(self, tool_id: str, epoch: int) -> None:
        """It was, here or by another replica."""
        self._epochs[tool_id] = max(epoch, self._epochs.get(tool_id, 0))
        for key in [key for key, kept in self._kept.items() if kept.tool_id == tool_id]:
            self._drop(key)

    def hear(self, message: Mapping[str, Any]) -> bool:
        """Another replica says so."""
        tool_id, epoch = message.get("tool_id"), message.get("epoch")
        if isinstance(tool_id, str) and type(epoch) is int and 0 < epoch < EPOCH_MAX:
            self.forgotten(tool_id, epoch)
        return True

    async def catch_up(self) -> None:
        """After a time in which nobody could tell us: what was forgotten, we forget too. Raises StoreAway."""
        if self._store is not None:
            self._caught_up = False
            for tool_id, epoch in (await self._store.epochs()).items():
                if epoch > self._epochs.get(tool_id, 0):
                    self.forgotten(tool_id, epoch)
            self._caught_up = True

    # Its own life

    async def run(self) -> None:
        """For ever: write to Redis what was kept."""
        while True:
            write = await self._writes.get()
            self._writes_bytes -= len(write.result)
            left_s = write.made_at + write.life_s + _stale_s(write.life_s) - time.time()
            if self._store is not None and left_s > 0:
                value = await _off_loop(len(write.result), _written, write, self._compress)
                with contextlib.suppress(StoreAway):
                    await self._store.put(write.key, value, max(1, int(left_s * 1e3)))

    def _keep(self, key: str, tool_id: str, result: bytes, fresh_s: float, stale_s: float) -> None:
        if len(result) + ENTRY_OVERHEAD_BYTES > self._bytes_max:
            return
        self._drop(key)
        now = self._clock()
        self._kept[key] = Kept(result, now + fresh_s, now + fresh_s + stale_s, tool_id)
        self.bytes += len(result) + ENTRY_OVERHEAD_BYTES
        while self.bytes > self._bytes_max or len(self._kept) > ENTRIES_MAX:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.bytes -= len(kept.result) + ENTRY_OVERHEAD_BYTES


def _stale_s(life_s: float) -> float:
    return min(life_s, STALE_S_MAX)


async def _off_loop(size_bytes: int, work: Callable[..., T], *arguments: Any) -> T:
    """Here, or in a thread where it would take long and there is one to be had."""
    if size_bytes >= OFF_LOOP_BYTES:
        with contextlib.suppress(OSError):
            return await off_loop(work, *arguments)
    return work(*arguments)


def _written(write: Write, compress: bool) -> bytes:
    packed = write.result
    if compress and len(write.result) >= COMPRESS_FROM_BYTES:
        packed = zlib.compress(write.result, COMPRESSION_LEVEL)
    compressed = len(packed) < len(write.result)
    if not compressed:
        packed = write.result
    check_sum = _check_sum(write.key, compressed, write.made_at, write.life_s, packed)
    return _HEAD.pack(_MAGIC, compressed, write.made_at, write.life_s, check_sum) + packed


def _read(value: bytes, key: str, bytes_max: int) -> tuple[bytes, float, float] | None:
    """Result, age and life in seconds; None for what this service did not write under this key."""
    try:
        magic, compressed, made_at, life_s, check_sum = _HEAD.unpack_from(value)
        packed = value[_HEAD.size :]
        age_s = time.time() - made_at
        if magic != _MAGIC or check_sum != _check_sum(key, compressed, made_at, life_s, packed):
            return None
        if not (age_s > -CLOCK_SKEW_S and 0 < life_s < float("inf")):
            return None
        result = _unpacked(packed, bytes_max) if compressed else packed
        # A line break would end an event of a stream. We write none, and strings of JSON hold none.
        if len(result) > bytes_max or b"\n" in result or b"\r" in result:
            return None
        orjson.loads(result)
    except (struct.error, zlib.error, ValueError):
        return None
    return result, max(0.0, age_s), life_s


def _unpacked(packed: bytes, bytes_max: int) -> bytes:
    """A bomb is cut after one byte too many."""
    unpacking = zlib.decompressobj()
    result = unpacking.decompress(packed, bytes_max + 1)
    if not unpacking.eof:
        raise ValueError
    return result


def _check_sum(key: str, compressed: bool, made_at: float, life_s: float, packed: bytes) -> bytes:
    """Bound to the key: a value that is copied to another tenant's key is none. It keeps mistakes out, not somebody who
    may write to Redis and knows this code."""
    return bytes.fromhex(digest(key, struct.pack("<Bdd", compressed, made_at, life_s), packed))[:16]
