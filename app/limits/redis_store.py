"""Counters in Redis, shared by all replicas: every ask of an event-loop tick goes into one script call.

At most one script call is on its way; what is asked meanwhile goes with the next, so a slower Redis gets larger calls
and not more of them. No ask waits longer than the budget: then Redis is away, every ask is told so at once, and a
background task looks for it. What may have been spent is never sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import hiredis
import orjson

from app.clients import Locate
from app.limits.limit import RATE, Limit, counter_key
from app.limits.redis_link import LinkLost, RedisLink
from app.limits.room import Room
from app.limits.store import PASSES, Ask, StoreAway, Verdict, Waiter

logger = logging.getLogger("app.limits")

SCRIPT = resources.files("app.limits").joinpath("scripts/admit.lua").read_bytes()
SCRIPT_SHA = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest()


def _packed(*words: Any) -> bytes:
    """Words of a command as RESP has them, without the line that says how many the command has."""
    command: bytes = hiredis.pack_command(words)
    return command.partition(b"\r\n")[2]


BY_SHA = _packed("EVALSHA", SCRIPT_SHA)
WHOLE = _packed("EVAL", SCRIPT)

BATCH_ASKS_MAX = 512
"""In one script call, some 2 ms of Redis; the rest goes with the next."""

BATCH_COUNTERS_MAX = 4_000
"""Lua's stack holds about 8,000 values."""

PENDING_MAX = 5_000
"""Asks that wait for the next script call: as many as Redis decides within half of the budget. Slots bound them long
before; past it the store is not away, but those that come are told so."""

RETRY_MIN_S = 0.05
RETRY_MAX_S = 1.0
"""Between two attempts to reach Redis again, doubling, with jitter so that replicas do not come all at once."""

CONNECT_S_MIN = 1.0
"""Finding the server, TLS and authentication take several round trips; no call waits for them once it is away."""

GRACE = 0.1
"""The last part of the budget, in which a loop that was a little late catches up."""

TIMER_S_MIN = 0.001
"""uvloop keeps time in whole milliseconds."""

HEARTBEAT_S = 5.0
"""Without a call nobody would ask, and a Redis that died would be called up until the next one has to find out."""

WANTS_KEPT = 1_024
"""What asks want of their counters; another one for each policy, cost and tenth of an adaptive rate."""

CLOSED = "closed"

PROBE = Ask((Limit(counter_key("probe"), "probe", RATE, 1_000_000, period_us=1_000_000, burst=1_000_000),), 1)
"""Written after each connect and as a heartbeat: a Redis that is full or read-only answers, but cannot count."""

Waiting = tuple[Ask, Waiter | None, float]
"""An ask, who waits for it (nobody for what is given back), and when that began, seconds of `perf_counter`."""


class RedisStore:
    """`run` must be running. For tests are `clock_us`, Unix microseconds that the script is to believe, and other times
    for `retry_s_max` and `heartbeat_s`."""

    def __init__(
        self,
        locate: Locate,
        timeout_s: float,
        clock_us: Callable[[], int] | None = None,
        retry_s_max: float = RETRY_MAX_S,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._loop = asyncio.get_running_loop()  # kept: asking costs Python 3.11 a system call
        self._context = Context()
        """Not that of the call that asks first: what is said of Redis is not said of it."""
        self._locate = locate
        self._timeout_s = timeout_s
        self._clock_us = clock_us
        self._retry_s_max = retry_s_max
        self._heartbeat_s = heartbeat_s
        self._grace_s = timeout_s * GRACE
        self._link: RedisLink | None = None
        self._lost = asyncio.Event()
        self._quiet = asyncio.Event()
        self._tried = asyncio.Event()
        self._pending: list[Waiting] = []
        self._in_flight: list[Waiting] = []
        self._flush_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._away = True
        self.reason = "not connected yet"
        self.room = Room(lambda: len(self._pending) + len(self._in_flight))

    @property
    def up(self) -> bool:
        """Whether asks are answered; False from the moment that one was not."""
        return not self._away

    @property
    def state(self) -> str:
        return "Redis up" if self.up else f"Redis away ({self.reason}), each policy's on_store_failure holds"

    async def trouble(self) -> str | None:
        """Keys that may be evicted are counters that begin anew. Who may not ask is told nothing."""
        link = self._link
        try:
            async with asyncio.timeout(CONNECT_S_MIN):
                told = b"" if link is None else await link.ask("INFO", "memory")
        except (OSError, TimeoutError, hiredis.ReplyError):
            return None
        memory = dict(line.split(b":", 1) for line in told.splitlines() if b":" in line)
        policy = memory.get(b"maxmemory_policy", b"noeviction").decode()
        if policy == "noeviction" or memory.get(b"maxmemory", b"0") == b"0":
            return None
        return f"Redis evicts keys when it is full (maxmemory-policy {policy}), and a counter that is gone begins anew"

    def ask(self, ask: Ask) -> asyncio.Future[Verdict]:
        future: asyncio.Future[Verdict] = self._loop.create_future()
        self.ask_for(future, ask)
        return future

    def ask_for(self, waiter: Waiter, ask: Ask) -> None:
        if self._away:
            raise StoreAway(self.reason)
        if len(self._pending) >= PENDING_MAX:
            raise StoreAway("too many wait for it")
        self._add(ask, waiter)

    def wall_us(self, now_us: int) -> int:
        """The server's clock is both."""
        return now_us

    def give_back(self, ask: Ask) -> None:
        if not self._away and len(self._pending) < PENDING_MAX:
            self._add(ask, None)

    def _add(self, ask: Ask, waiter: Waiter | None) -> None:
        self._pending.append((ask, waiter, time.perf_counter()))
        self._quiet.clear()
        if not self._in_flight and not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush, context=self._context)
            if self._timer is None:
                self._wake(self._timeout_s - self._grace_s)

    # One script call

    def _flush(self) -> None:
        """Send what is there. While the link is being made anew, it waits, and the timer runs."""
        self._flush_due = False
        link = self._link
        if link is None or self._in_flight:
            return
        batch = self._take_batch()
        if not batch:
            self._quiet.set()
            self.room.decided()  # all who asked are gone, and no reply will come
            return
        self._in_flight = batch
        request = _encode([ask for ask, _, _ in batch], "" if self._clock_us is None else str(self._clock_us()))
        link.send(request.by(BY_SHA), lambda reply: self._replied(link, batch, reply, request))

    def _take_batch(self) -> list[Waiting]:
        """The oldest, as many as one call takes. Who was cancelled before it was sent has spent nothing."""
        batch: list[Waiting] = []
        counters = 0
        for place, waiting in enumerate(self._pending):
            ask, waiter, _ = waiting
            if waiter is not None and waiter.done():
                continue
            counters += ask.counters
            if len(batch) == BATCH_ASKS_MAX or (batch and counters > BATCH_COUNTERS_MAX):
                self._pending = self._pending[place:]
                return batch
            batch.append(waiting)
        self._pending = []
        return batch

    def _replied(self, link: RedisLink, batch: list[Waiting], reply: Any, request: Request | None) -> None:
        if batch is not self._in_flight or link is not self._link:
            return  # given up
        if request is not None and isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
            # Not carried out, so it may be sent again, with the script itself this time.
            link.send(request.by(WHOLE), lambda reply: self._replied(link, batch, reply, None))
            return
        try:
            verdicts = _verdicts([ask for ask, _, _ in batch], reply)
        except StoreAway as error:
            self._declare_away(str(error))
            return
        self._in_flight = []
        for (ask, waiter, _), verdict in zip(batch, verdicts, strict=True):
            if waiter is None:
                continue
            if not waiter.done():
                waiter.set_result(verdict)
            elif ask.cost and verdict.passes:  # the call was cancelled meanwhile: it never ran
                self.give_back(ask.back(verdict))
        self.room.decided()
        if not self._pending:
            self._quiet.set()
        elif not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush, context=self._context)

    # Away and back

    def _wake(self, delay_s: float, judged: Waiting | None = None) -> None:
        due = time.perf_counter() + delay_s
        self._timer = self._loop.call_later(delay_s, self._judge, due, judged, context=self._context)

    def _judge(self, due: float, judged: Waiting | None) -> None:
        """Run towards the end of the budget of whoever has waited longest. Twice for the same one: a loop that was
        held up by a tool has then sent what it had not, and read the reply that lay in the socket."""
        self._timer = None
        oldest = next(iter(self._in_flight or self._pending), None)
        if oldest is None:
            return
        now = time.perf_counter()
        left_s = oldest[2] + self._timeout_s - now
        if oldest is judged:
            self._declare_away(f"no answer within {self._timeout_s * 1e3:g} ms")
        elif left_s - self._grace_s > TIMER_S_MIN:
            self._wake(left_s - self._grace_s)
        elif now - due > self._grace_s:
            self._wake(max(left_s, 2 * self._grace_s), oldest)  # that time was not Redis's
        else:
            self._wake(max(left_s, self._grace_s), oldest)

    def _declare_away(self, reason: str) -> None:
        """Tell everyone who waits, drop the connection (its replies would fit nothing), and look for another."""
        self.reason = reason
        if reason != CLOSED and not (self._away and self._tried.is_set()):
            logger.warning("limit store away", extra={"reason": reason})
        self._away = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        link, self._link = self._link, None
        waiting, self._in_flight, self._pending = [*self._in_flight, *self._pending], [], []
        if link is not None:
            link.close()
        self._lost.set()
        self._quiet.set()
        for _, waiter, _ in waiting:
            if waiter is not None and not waiter.done():
                waiter.set_exception(StoreAway(reason))
                if isinstance(waiter, asyncio.Future):
                    waiter.exception()  # who waited may be cancelled in this tick: then nobody takes it
        self.room.open()

    def _link_lost(self) -> None:
        """The connection ended with nothing on its way: what waits may wait on, for as long as its budget lasts."""
        if self._link is not None:
            self._link = None
            self._lost.set()

    async def run(self) -> None:
        """Keep a connection that can count; never ends by itself."""
        pause_s = RETRY_MIN_S
        while True:
            connected = await self._connect()
            self._tried.set()
            if connected:
                since = time.perf_counter()
                await self._until_lost()
                if time.perf_counter() - since > self._retry_s_max:
                    pause_s = RETRY_MIN_S
                    continue
            # A Redis that is lost again and again is given time, or every attempt would cost some calls their budget.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
            pause_s = min(self._retry_s_max, 2 * pause_s)

    async def _until_lost(self) -> None:
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._lost.wait()
            if not self._pending and not self._in_flight and self._link is not None:
                self._add(PROBE, None)  # who has no answer in time says that Redis is away

    async def settled(self) -> None:
        """Wait, bounded, until the first attempt to connect has ended either way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S_MIN + 2 * self._timeout_s):
                await self._tried.wait()

    async def _connect(self) -> bool:
        """Connect and count once, each within the budget (the first with time for TLS and discovery)."""
        link: RedisLink | None = None
        try:
            async with asyncio.timeout(CONNECT_S_MIN + self._timeout_s):
                endpoint = await self._locate()
                link = await RedisLink.connect(endpoint, self._link_lost)
                await link.ask("SCRIPT", "LOAD", SCRIPT)
            async with asyncio.timeout(self._timeout_s):
                _verdicts([PROBE], await link.answer(_encode([PROBE], "").by(BY_SHA)))
            if link.lost:
                raise LinkLost("connection to Redis lost")
        except BaseException as error:
            if link is not None:
                link.close()
            if not isinstance(error, Exception):
                raise
            # The library's, hiredis's, the system's: all mean the same here.
            self._declare_away("no answer in time" if isinstance(error, TimeoutError) else str(error) or repr(error))
            return False
        self._lost.clear()
        self._link = link
        if self._away:
            self._away = False
            logger.info("limit store up", extra={"host": endpoint.host, "port": endpoint.port})
        if self._pending:
            self._flush()
        return True

    async def close(self) -> None:
        """Send what is to be given back, bounded, and disconnect."""
        if self._pending or self._in_flight:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await self._quiet.wait()
        self._declare_away(CLOSED)


class Request(NamedTuple):
    """A script call: all but the script. `arguments` are RESP, from the number of keys on."""

    words: int
    arguments: bytes

    def by(self, script: bytes) -> bytes:
        """The command; `script` is BY_SHA or WHOLE."""
        return b"*%d\r\n%b%b" % (self.words, script, self.arguments)


def _encode(asks: Sequence[Ask], clock: str) -> Request:
    """KEYS and ARGV of the script. Calls of one caller for one tool share their ask, and all callers of one policy
    ask for the same: what is wanted of their counters is sent once."""
    numbers: dict[int, int] = {}
    keys: list[bytes] = []
    counters = 0
    wants: dict[bytes, int] = {}
    wanted: list[int] = []
    order: list[int] = []
    for ask in asks:
        number = numbers.get(id(ask))
        if number is None:
            keys.append(_written(ask) if ask.keys is None else ask.keys)
            counters += ask.counters
            wanted.append(wants.setdefault(ask.want, len(wants) + 1))
            number = numbers[id(ask)] = len(wanted)
        order.append(number)
    payload = b"[[%b],%b,%b]" % (b",".join(wants), orjson.dumps(wanted), orjson.dumps(order))
    words = 5 + counters  # the command, its script, how many keys there are, the keys, two arguments
    return Request(words, b"".join((_packed(counters), *keys, _packed(payload, clock))))


def _written(ask: Ask) -> bytes:
    """What is sent of an ask, kept: its keys."""
    keys = []
    one: list[int] = [0 if ask.spent is None else 1]
    for at, limit in enumerate(ask.limits):
        token, terms = 0, limit.terms
        if ask.spent is not None:
            status, period, _ = ask.spent.states[at]
            if status != PASSES:
                continue
            token = ask.spent.now_us if terms.kind == RATE else period
        keys.append(limit.key)
        one += (*terms.counter, *terms.spending(ask.cost), token, terms.shadow)
    ask.counters = len(keys)
    # Copied: what orjson returns holds up to 8 KB for as long as it lives.
    want = bytes(memoryview(orjson.dumps(one)))
    ask.want = _shared(want) if ask.spent is None else want
    ask.keys = _packed(*keys)
    return ask.keys


@lru_cache(WANTS_KEPT)
def _shared(want: bytes) -> bytes:
    """One object for all callers of a policy."""
    return want


_verdict = tuple.__new__
"""A NamedTuple's own way to be made takes twice as long."""


def _verdicts(asks: Sequence[Ask], reply: Any) -> list[Verdict]:
    """One for each ask; what was given back has none worth reading. Raises StoreAway: no answer of the script."""
    if isinstance(reply, Exception):
        raise StoreAway(str(reply))
    verdicts = []
    try:
        now, numbers = reply[0], iter(reply[1:])
        states = list(zip(numbers, numbers, numbers, strict=True))
        at = 0
        for ask in asks:
            end = at if ask.spent is not None else at + ask.counters
            verdicts.append(_verdict(Verdict, (now, states[at:end])))
            at = end
        if at != len(states):
            raise IndexError
    except (TypeError, IndexError, ValueError):
        raise StoreAway("not an answer of the script") from None
    return verdicts
