"""/mcp by the protocol lane and by ASGI: every head with every body, twice on one connection, byte by byte the same.

Bodies are padded to one length, so that each comes under heads that the lane has learned from others: what a head says
of routing must be checked against every body anew.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.access.keyring import make_key
from tests.conftest import Running, end, places_in, start_service
from tests.servers import make_folder, remove_folder
from tests.transport.mcp_requests import BODIES, CALL, CHANGING, HEADS, Line, body_of, head_of
from tests.transport.mcp_wire import message, modern_message

TOOLS = "tests.tools_for_tests,tests.mcp_fixtures,tests.transport.lane_tools"


@dataclass(frozen=True)
class Pair:
    """The same service twice: with the lane, and without it."""

    lane: Running
    asgi: Running
    credential: str | None = None


@pytest.fixture(scope="module")
def open_pair() -> Iterator[Pair]:
    pair = Pair(*(start_service(PROTOCOL_LANE=lane, TOOL_MODULES=TOOLS) for lane in ("true", "false")))
    yield pair
    end(pair.lane)
    end(pair.asgi)


@pytest.fixture(scope="module")
def guarded_pair() -> Iterator[Pair]:
    folders = [make_folder("agentcore-mcp-lane-") for _ in range(2)]
    key = make_key(places_in(folders[0])["DATABASE_URL"], subject="agent", tools=["echo"])[1]
    database = {"DATABASE_URL": places_in(folders[0])["DATABASE_URL"]}
    lane, asgi = (
        start_service(**{**places_in(folder), **database}, PROTOCOL_LANE=lane, TOOL_MODULES=TOOLS, AUTH_MODE="required")
        for folder, lane in zip(folders, ("true", "false"), strict=True)
    )
    yield Pair(lane, asgi, f"Bearer {key}")
    end(lane)
    end(asgi)
    for folder in folders:
        remove_folder(folder)


def check_same(pair: Pair, seed: int) -> None:
    """Every head with every body, in an order of chance; half of them in two pieces."""
    chance = random.Random(seed)
    cases = list(itertools.product(HEADS, BODIES))
    chance.shuffle(cases)
    lines = Line(pair.lane.port), Line(pair.asgi.port)
    different, statuses = [], set()
    for head_name, body_name in cases:
        head, body = head_of(HEADS[head_name], pair.credential), body_of(BODIES[body_name])
        pieces = (head, body) if chance.random() < 0.5 else (head + body,)
        answers = {CHANGING.sub(b"*", line.send(*pieces)) for line in lines for _ in range(2)}
        statuses |= {int(answer[9:12]) for answer in answers}
        if len(answers) > 1:
            different.append((head_name, body_name, answers))
    for line in lines:
        line.close()
    assert different == []
    assert statuses == {200, 202, 400, 403, 404}


def test_every_head_with_every_body_is_answered_alike(open_pair: Pair) -> None:
    check_same(open_pair, 1)


def test_every_head_with_every_body_is_answered_alike_where_keys_are_asked_for(guarded_pair: Pair) -> None:
    check_same(guarded_pair, 2)


def test_who_is_turned_away_is_so_alike(guarded_pair: Pair) -> None:
    lines = Line(guarded_pair.lane.port), Line(guarded_pair.asgi.port)
    some = {name: HEADS[name] for name in ("none", "echo", "list")}
    for head, credential in itertools.product(some.values(), [None, "Bearer act_wrong", "Basic eA=="]):
        asked = head_of(head, credential) + body_of(BODIES["modern echo"])
        answers = {CHANGING.sub(b"*", line.send(asked)) for line in lines for _ in range(2)}
        assert len(answers) == 1 and answers.pop().startswith(b"HTTP/1.1 401 ")
    for line in lines:
        line.close()


@pytest.mark.parametrize("era", ["modern", "legacy"])
@pytest.mark.parametrize("apart", [False, True])
def test_what_is_asked_again_takes_the_lane(open_pair: Pair, era: str, apart: bool) -> None:
    params = {"name": "which_door"}
    body = body_of(modern_message("tools/call", params) if era == "modern" else message("tools/call", params))
    headers = [*CALL, ("Mcp-Name", "which_door")] if era == "modern" else [("MCP-Protocol-Version", "2025-11-25")]
    head = head_of([*headers, ("X-Test", f"{era} {apart}")], None)
    for service, last in ((open_pair.lane, "lane"), (open_pair.asgi, "asgi")):
        line = Line(service.port)
        line.send(head + body)
        answer = json.loads(line.send(*((head, body) if apart else (head + body,))).partition(b"\r\n\r\n")[2])
        assert answer["result"]["content"][0]["text"] == last
        line.close()
