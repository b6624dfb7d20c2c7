"""How many calls run at once: slots with a queue that is fair between tenants, bounded, and of a bounded patience.

`Slots` is one limit (the process's, a tool's), `SlotTable` those that policies keep by key. Knows no tool, no policy
and no HTTP; the executor takes slots before a run and gives them back after it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from time import monotonic
from weakref import WeakValueDictionary

from app.errors import Overloaded
from app.fairness import FairQueue
from app.stepping import settle

QUEUE_PATIENCE_S = 1.0
"""Longer, and callers give up before they are served: a queue then only makes dead work."""

RETRY_AFTER_MS_MIN, RETRY_AFTER_MS_MAX = 50, 5000
"""Sooner, and refused clients are a load of their own; later, and nobody comes while slots are free again."""

RETRY_SPREAD = 0.25
"""Refused together must not mean back together: up to this part is added to what a client is told."""

PACE_WINDOW_S = 0.5
"""Over less, a few releases that happen to come together look like a trend."""

PACE_SLOTS_MIN = 8
"""Fewer slots in less time since a queue formed are no pace to refuse anyone by."""

Turn = asyncio.Future[None]
"""A place in a queue; done once a slot is its owner's."""


class Slots:
    """`limit` calls hold a slot, `queue_max` wait for one: each tenant's in order of arrival, tenants in turn.

    `take_now` decides without waiting; only when it says no is `wait` worth a future. Nobody waits while a slot is
    free: `release` hands it on in the same step. `limit` is changed by `resize` alone.
    """

    __slots__ = (
        "__weakref__",
        "_flooded_by",
        "_freed",
        "_handed_on",
        "_pace",
        "_waiting",
        "first",
        "flooded",
        "limit",
        "queue_max",
        "refused",
        "running",
    )

    def __init__(self, limit: int, queue_max: int | None = None, clock: Callable[[], float] = monotonic) -> None:
        self.limit = limit
        self.queue_max = limit if queue_max is None else queue_max
        self.running = 0
        self.first: asyncio.Future[None] | None = None
        """Of whoever waits for somebody to take a slot; done once, by the first."""
        self.refused = 0
        """How many found no place or no slot in time."""
        self.flooded = False
        """Set by whoever watches them: nobody waits behind calls of its own tenant."""
        self._flooded_by = ""
        self._waiting: FairQueue[Turn] = FairQueue()
        self._freed = 0
        self._handed_on = 0
        self._pace = Pace(QUEUE_PATIENCE_S / max(1, limit), clock)

    @property
    def queued(self) -> int:
        return len(self._waiting.turns)

    @property
    def left(self) -> int:
        """How many gave their slot back."""
        return self._freed + self._handed_on

    def take_now(self) -> bool:
        if self.running < self.limit:
            self.running += 1
            if self.first is not None:
                settle(self.first)
                self.first = None
            return True
        return False

    def resize(self, limit: int) -> None:
        """Let so many run, and as many wait. What runs beyond it runs to its end; what waits gets what is new."""
        self.limit = self.queue_max = limit
        while self.running < limit and self._waiting.turns:
            turn = self._waiting.pop_next()
            if turn is not None:
                self.running += 1
                self._handed_on += 1
                turn.set_result(None)

    def expected_wait_s(self, tenant: str = "") -> float:
        """How long a call of this tenant that comes now would wait, at the pace of late; 0 where there is none yet."""
        return self._waiting.ahead_of(tenant) * self._pace.seen_s(self._handed_on)

    def wait(self, tenant: str = "", patience_s: float = math.inf) -> Turn:
        """A future that is done once a slot is ours, to be given to `take` at once. Raises Overloaded when the queue
        is full, unless another tenant waits with so many more calls that its newest is refused instead; and when the
        slot would come after the patience: who is to be refused is told so on arrival."""
        waiting = self._waiting
        if not waiting.turns:
            self._pace.begin(self._freed, self._handed_on)
        why = self.no_place(tenant, patience_s)
        if why is not None:
            raise self.refused_for(why)
        if len(waiting.turns) >= self.queue_max and self.running >= self.limit:
            self._make_room()
        turn: Turn = asyncio.get_running_loop().create_future()
        if self.take_now():
            turn.set_result(None)
        else:
            waiting.add(turn, tenant)
        return turn

    def no_place(self, tenant: str, patience_s: float) -> str | None:
        """Why a call that came now, where no slot is free, would find no place to wait in, if that is so. Counts
        nothing."""
        waiting = self._waiting
        if self.flooded and not self._is_in_turn(tenant):
            self._flooded_by = tenant
            return "No slot is free"
        if waiting.turns and self.expected_wait_s(tenant) > patience_s:
            return "No slot would come free in time"
        full = len(waiting.turns) >= self.queue_max and self.running >= self.limit
        # Room is made only where the queues become more even by it: a swap of equals, or a tenant's only call, would be
        # refused after its wait for nothing.
        if full and waiting.length(tenant) + 1 >= waiting.longest:
            return "Too many calls at once"
        return None

    def _is_in_turn(self, tenant: str) -> bool:
        """In a flood one call of each tenant may wait while others want slots as well: so tenants are served in turn.
        A tenant's own flood has no queue."""
        others = bool(self._waiting.turns) or self._flooded_by != tenant
        return others and not self._waiting.length(tenant)

    async def take(self, turn: Turn, patience_s: float) -> None:
        """Wait for `turn`. Raises Overloaded after the patience, which is never longer than the call's own deadline,
        or when the place goes to another tenant; leaves neither slot nor place behind when cancelled."""
        expiry = turn.get_loop().call_later(patience_s, self._expire, turn)
        try:
            await turn
        except BaseException:
            self._leave(turn)
            raise
        finally:
            expiry.cancel()

    def release(self) -> None:
        """Give the slot to the next in the queue, or back."""
        if self._waiting.turns and self.running <= self.limit:
            turn = self._waiting.pop_next()
            if turn is not None:
                self._handed_on += 1
                turn.set_result(None)
                return
        self._freed += 1
        self.running -= 1

    def _make_room(self) -> None:
        turn = self._waiting.pop_newest_of_longest()
        if not turn.done():
            turn.set_exception(self.refused_for("Too many calls at once"))

    def _expire(self, turn: Turn) -> None:
        if not turn.done():
            self._waiting.discard(turn)
            turn.set_exception(self.refused_for("No slot came free in time"))

    def _leave(self, turn: Turn) -> None:
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            self.release()  # the slot came in the same tick as the cancellation
        else:
            self._waiting.discard(turn)

    def refused_for(self, message: str) -> Overloaded:
        """The refusal of one more, counted."""
        self.refused += 1
        return Overloaded(message, retry_after_ms=self._pace.retry_after_ms(self.queued, self._handed_on))


class SlotTable:
    """The slots of policies, by the key of their counter.

    A key's slots live as long as somebody has them in hand: who runs in them, who waits, and who is about to. So a call
    that waits elsewhere between `of` and `take_now` never finds itself in slots that the table has replaced, and a
    table of a million past tenants is empty.
    """

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: WeakValueDictionary[str, Slots] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def queued(self) -> int:
        return sum(slots.queued for slots in self._slots.values())

    def of(self, key: str, limit: int) -> Slots:
        """The slots of this key; a limit other than before holds once nobody has the earlier ones in hand."""
        slots = self._slots.get(key)
        if slots is None:
            slots = self._slots[key] = Slots(limit)
        return slots


def take_all_now(slots: Sequence[Slots]) -> bool:
    """A slot of each, none of them twice, or of none."""
    for each in slots:
        if each.running >= each.limit:
            return False
    for each in slots:
        each.take_now()
    return True


def release_all(slots: Sequence[Slots]) -> None:
    """Give every one to who waits for it, or back. The order does not matter: nobody wakes before all are done."""
    for each in slots:
        each.release()


class Pace:
    """How fast slots come free while calls wait, and so when a refused client may come back. Works on refusals only."""

    __slots__ = ("_clock", "_freed", "_handed_on", "_refused", "_seen", "_since_s", "_slot_s")

    def __init__(self, slot_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slot_s = slot_s
        """Seconds between two slots, as last seen; at first a guess."""
        self._freed = -1
        self._handed_on = 0
        self._since_s = 0.0
        self._seen = False
        """Whether `_slot_s` is of this queue."""
        self._refused = 0

    def begin(self, freed: int, handed_on: int) -> None:
        """A queue forms. Time in which slots were free says nothing about how fast they come when they are not; where
        none was freed since the last queue, that one's time goes on."""
        if freed != self._freed:
            self._freed = freed
            self._handed_on = handed_on
            self._seen = False
            self._since_s = self._clock()

    def seen_s(self, handed_on: int) -> float:
        """Seconds between two slots of this queue; 0 until enough of them have come to say. What an earlier queue
        showed is no reason to refuse anyone now."""
        if self._seen:
            return self._seconds_per_slot(handed_on)
        slots, elapsed_s = handed_on - self._handed_on, self._clock() - self._since_s
        return elapsed_s / max(1, slots) if slots >= PACE_SLOTS_MIN or elapsed_s >= PACE_WINDOW_S else 0.0

    def retry_after_ms(self, queued: int, handed_on: int) -> int:
        """When those who wait now and one more have had their slots, bounded and spread.

        The spread walks by the golden ratio: any number of refusals in a row come back evenly, chance would clump.
        """
        self._refused += 1
        wait_ms = (queued + 1) * self._seconds_per_slot(handed_on) * 1000
        wait_ms = min(max(wait_ms, RETRY_AFTER_MS_MIN), RETRY_AFTER_MS_MAX / (1 + RETRY_SPREAD))
        return int(wait_ms * (1 + RETRY_SPREAD * (self._refused * 0.618034 % 1)))

    def _seconds_per_slot(self, handed_on: int) -> float:
        now = self._clock()
        elapsed_s = now - self._since_s
        seen = handed_on - self._handed_on
        if not seen:
            return max(self._slot_s, elapsed_s)
        if elapsed_s >= PACE_WINDOW_S:
            self._slot_s = elapsed_s / seen
            self._seen = True
            self._since_s = now
            self._handed_on = handed_on
        return self._slot_s
