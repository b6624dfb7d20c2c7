"""The slots that one call needs: of policies, of its tool, of slow calls, of the process; all of them or none.

Knows no store: a replica without a slot says so before anybody is asked. Called by the executor.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

from app.errors import Overloaded
from app.executor.run import Run, ToolState
from app.limits.adaptive import FLOOR, LoadControl
from app.limits.concurrency import Slots, SlotTable, release_all, take_all_now
from app.limits.policy import Bound

BUSY = "The service has more to compute than it can"


class NoPlace(NamedTuple):
    """Slots in which a call finds no place, where they stand among those that it wants, and why. Holds in the step in
    which it was found."""

    slots: Slots
    place: int
    message: str

    def refusal(self, bound: Bound) -> Overloaded:
        error = self.slots.refused_for(self.message)
        _name_rule(error, bound, self.place)
        return error


class CallSlots:
    """One per service. `take_now` of the process's slots alone is the executor's own short way."""

    def __init__(self, control: LoadControl) -> None:
        self._control = control
        self._of_policies = SlotTable()

    @property
    def queued(self) -> int:
        """Calls that wait for a slot of the process or of a policy; those of tools are with their tools."""
        return self._control.slots.queued + self._control.slow_slots.queued + self._of_policies.queued

    async def take(self, state: ToolState, bound: Bound, run: Run, patience_s: float) -> Callable[[], None]:
        """Wait for every slot in one patience: those of policies first, so that a tenant that waits for itself holds
        nothing that others want, then the tool's, then the process's; how to give them back."""
        if self.sheds(state):
            raise self._control.slots.refused_for(BUSY)
        wanted = self._wanted(state, bound)
        if take_all_now(wanted):
            return lambda: release_all(wanted)
        patience_ends = perf_counter() + patience_s
        held: list[Slots] = []
        try:
            for slots in wanted:
                await self._take_slot(slots, run, max(0.0, patience_ends - perf_counter()))
                held.append(slots)
        except BaseException as error:
            release_all(held)
            if isinstance(error, Overloaded):
                _name_rule(error, bound, len(held))
            raise
        return lambda: release_all(held)

    def sheds(self, state: ToolState) -> bool:
        """Whether a call is refused whatever slots are free. What runs in place is over before it matters."""
        return self._control.shedding and not state.in_place and self._control.slots.running >= FLOOR

    def no_place(self, state: ToolState, bound: Bound, tenant: str, patience_s: float) -> NoPlace | None:
        """Why a call that came now could neither take its slots nor wait for them, if that is so. Takes nothing."""
        if self.sheds(state):
            return NoPlace(self._control.slots, len(bound.slots), BUSY)
        slots, place = self._first_taken(state, bound)
        message = None if slots is None else slots.no_place(tenant, self._patience_s(patience_s))
        return None if slots is None or message is None else NoPlace(slots, place, message)

    def _first_taken(self, state: ToolState, bound: Bound) -> tuple[Slots | None, int]:
        """The slots that it would wait for first, and their place among those that it wants."""
        if state.slots is None and not bound.slots and not state.is_slow:  # as most
            slots = self._control.slots
            return (slots if slots.running >= slots.limit else None), 0
        for place, slots in enumerate(self._wanted(state, bound)):
            if slots.running >= slots.limit:
                return slots, place
        return None, 0

    def _patience_s(self, patience_s: float) -> float:
        """What would wait longer than it may is refused on arrival, where limits adapt."""
        return patience_s if self._control.enforces else math.inf

    def _wanted(self, state: ToolState, bound: Bound) -> list[Slots]:
        """In the order in which they are taken."""
        wanted = [self._of_policies.of(rule.key, rule.amount) for rule in bound.slots]
        if state.slots is not None:
            wanted.append(state.slots)
        if state.is_slow:
            wanted.append(self._control.slow_slots)
        wanted.append(self._control.slots)
        return wanted

    async def _take_slot(self, slots: Slots, run: Run, patience_s: float) -> None:
        if slots.take_now():
            return
        turn = slots.wait(run.call.caller.tenant, self._patience_s(patience_s))
        run.interrupt.watch(turn)
        await slots.take(turn, patience_s)
        if run.interrupt.requested:  # in the tick in which the slot came
            slots.release()
            raise asyncio.CancelledError


def _name_rule(error: Overloaded, bound: Bound, place: int) -> None:
    """The slots at this place of those wanted had none: a policy's come first."""
    if place < len(bound.slots):
        error.data["rule"] = bound.slots[place].rule
