"""Flights: one leads, nobody harms another, and somebody leads as long as somebody waits."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cache.singleflight import FOLLOWERS_MAX, Flight, Flights, Lead, Turn
from app.errors import TOOL_CRASHED, failure

pytestmark = pytest.mark.anyio

CRASHED = failure(TOOL_CRASHED, "crashed")


def opened(followers: int) -> tuple[Flights, Flight, list[Turn]]:
    flights = Flights()
    flight, leads = flights.of("key")
    assert leads
    turns = []
    for _ in range(followers):
        same, leads = flights.of("key")
        assert same is flight and not leads
        turn = flight.join()
        assert turn is not None
        turns.append(turn)
    return flights, flight, turns


@pytest.mark.parametrize("outcome", [b"result", CRASHED])
async def test_what_the_leader_came_to_is_everyones(outcome: object) -> None:
    flights, flight, turns = opened(1_000)
    flight.land(outcome)  # type: ignore[arg-type]
    assert {await turn for turn in turns} == {outcome}
    assert not len(flights)
    for turn in turns:
        flight.leave(turn)
    assert flights.of("key")[1], "the next call leads a flight of its own"


async def test_a_leader_without_an_outcome_is_followed_by_whoever_waits_longest() -> None:
    flights, flight, turns = opened(3)
    flight.hand_on()
    assert turns[0].result() is Lead.NOW and not turns[1].done() and not turns[2].done()
    flight.hand_on()
    assert turns[1].result() is Lead.NOW and len(flights) == 1
    flight.land(b"result")
    assert turns[2].result() == b"result" and not len(flights)


async def test_the_last_to_leave_ends_the_flight() -> None:
    flights, flight, _ = opened(0)
    flight.hand_on()
    assert not len(flights)


async def test_followers_that_are_cancelled_leave_alone() -> None:
    flights, flight, turns = opened(3)
    turns[0].cancel()
    flight.leave(turns[1])
    assert turns[1].cancelled() and not turns[2].done()
    flight.hand_on()
    assert turns[2].result() is Lead.NOW and len(flights) == 1


async def test_a_follower_that_was_just_told_to_lead_and_goes_passes_it_on() -> None:
    flights, flight, turns = opened(3)
    flight.hand_on()
    flight.leave(turns[0])  # in the tick in which it was told
    assert turns[1].result() is Lead.NOW and not turns[2].done()
    flight.leave(turns[1])
    flight.leave(turns[2])
    assert not len(flights)


async def test_a_flight_that_has_landed_is_left_without_harm_to_its_successor() -> None:
    flights, flight, turns = opened(2)
    flight.land(b"old")
    successor, leads = flights.of("key")
    assert leads
    for turn in turns:
        flight.leave(turn)
    flight.hand_on()
    flight.land(b"again")
    assert flights.of("key") == (successor, False)


async def test_a_flight_has_room_for_so_many() -> None:
    _, flight, turns = opened(FOLLOWERS_MAX)
    assert flight.join() is None
    flight.leave(turns[0])
    assert flight.join() is not None


@given(
    steps=st.lists(st.tuples(st.sampled_from(["join", "leave", "cancel", "hand on"]), st.integers(0, 9)), max_size=30)
)
def test_as_long_as_somebody_waits_somebody_leads(steps: list[tuple[str, int]]) -> None:
    async def played() -> None:
        flights = Flights()
        flight, _ = flights.of("key")
        leads = True
        turns: list[Turn] = []
        for step, place in steps:
            if flights._flights.get("key") is not flight:
                return
            if step == "join":
                turn = flight.join()
                assert turn is not None
                turns.append(turn)
            elif step == "hand on" and leads:
                flight.hand_on()
            elif turns:
                turn = turns.pop(place % len(turns))
                if step == "cancel":
                    turn.cancel()
                flight.leave(turn)
            told = [turn for turn in turns if turn.done() and not turn.cancelled()]
            assert len(told) <= 1, "two lead"
            if told:
                turns.remove(told[0])
                leads = True
            elif step == "hand on":
                leads = False
                assert not turns and not len(flights), "waits for nobody"

    asyncio.run(played())
