"""Identical calls at one moment: the first runs, the others wait for what comes of it.

Nobody harms another: a follower that is cancelled leaves, and when the leader is cancelled or refused, one follower
takes its place. What the tool came to, good or bad, is everyone's. Knows no tool and no call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from enum import Enum

from app.errors import Failure

FOLLOWERS_MAX = 10_000
"""Of one flight. Past it a call runs by itself."""


class Lead(Enum):
    """What a follower is told instead of an outcome: run yourself, for all who still wait."""

    NOW = "now"


Outcome = bytes | Failure | Lead
Turn = asyncio.Future[Outcome]


class Flight:
    """One run and who waits for it."""

    __slots__ = ("_flights", "_key", "_turns")

    def __init__(self, flights: Flights, key: Hashable) -> None:
        self._flights = flights
        self._key = key
        self._turns: dict[Turn, None] = {}

    def join(self) -> Turn | None:
        """A future of the outcome, to be given to `leave` at the end; None: there is no room."""
        if len(self._turns) >= FOLLOWERS_MAX:
            return None
        turn: Turn = asyncio.get_running_loop().create_future()
        self._turns[turn] = None
        return turn

    def leave(self, turn: Turn) -> None:
        """A follower that does not wait any more; one that was just told to lead passes it on."""
        self._turns.pop(turn, None)
        if turn.done() and not turn.cancelled() and turn.result() is Lead.NOW:
            self.hand_on()
        turn.cancel()

    def land(self, outcome: bytes | Failure) -> None:
        """The leader's outcome is everyone's."""
        self._flights.end(self._key, self)
        turns, self._turns = self._turns, {}
        for turn in turns:
            if not turn.done():
                turn.set_result(outcome)

    def hand_on(self) -> None:
        """The leader has no outcome: the one who waits longest leads now."""
        while self._turns:
            turn = next(iter(self._turns))
            del self._turns[turn]
            if not turn.done():
                turn.set_result(Lead.NOW)
                return
        self._flights.end(self._key, self)


class Flights:
    """All of one service, by what makes calls identical."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def of(self, key: Hashable) -> tuple[Flight, bool]:
        """The flight of such calls, and whether it is new: then the caller leads it, and must `land` or `hand_on`."""
        flight = self._flights.get(key)
        if flight is not None:
            return flight, False
        flight = self._flights[key] = Flight(self, key)
        return flight, True

    def end(self, key: Hashable, flight: Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
