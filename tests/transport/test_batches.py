"""Requests of one body: how many of them are under way at once, and that none goes without its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from app.calls import LOCAL_CALLER
from app.limits.room import ASKS_AT_ONCE, Room
from app.transport.jsonrpc import BATCH_AT_ONCE, Dispatcher, Ended, Method
from app.transport.request import RequestContext
from tests.waiting import until

pytestmark = pytest.mark.anyio


class Late:
    """A method that is begun and ends when it is told to, by `params.n`; some are handled by awaiting."""

    def __init__(self, *, awaited: frozenset[int] = frozenset()) -> None:
        self.begun: dict[int, Ended] = {}
        self.most = 0
        self.cancelled: set[int] = set()
        self._awaited = awaited

    def begin(self, context: RequestContext, params: dict[str, Any], then: Ended) -> bool:
        if params["n"] in self._awaited:
            return False
        self.begun[params["n"]] = then
        self.most = max(self.most, len(self.begun))
        return True

    async def handle(self, context: RequestContext, params: dict[str, Any]) -> bytes:
        ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.begun[params["n"]] = ended.set_result  # type: ignore[assignment]
        self.most = max(self.most, len(self.begun))
        try:
            return await ended
        except asyncio.CancelledError:
            self.cancelled.add(params["n"])
            raise

    def end(self, number: int, result: bytes | Exception) -> None:
        self.begun.pop(number)(result)


def dispatcher(
    late: Late, count_error: Callable[[str], None] = lambda kind: None, room: Room | None = None
) -> Dispatcher:
    method = Method("late", ("n",), lambda params: params, late.handle, late.begin)
    return Dispatcher({"late": method}, 100, 1_000_000, count_error, room)


def answered(dispatcher: Dispatcher, body: bytes, context: RequestContext) -> asyncio.Task[bytes | None]:
    """On its way: a batch takes steps."""
    steps = dispatcher.begin(body, context, lambda answer: None)
    assert steps is not None
    return asyncio.create_task(steps)


def batch_of(count: int) -> bytes:
    return orjson.dumps([{"jsonrpc": "2.0", "id": n, "method": "late", "params": {"n": n}} for n in range(count)])


async def test_a_batch_begins_when_the_store_of_limits_has_room_and_a_single_request_at_once() -> None:
    late, waiting = Late(), ASKS_AT_ONCE
    room = Room(lambda: waiting)
    asked = dispatcher(late, room=room)
    answer = answered(asked, batch_of(2), RequestContext(LOCAL_CALLER, 0.0))
    await asyncio.sleep(0)
    assert not late.begun
    single = b'{"jsonrpc":"2.0","id":7,"method":"late","params":{"n":7}}'
    assert asked.begin(single, RequestContext(LOCAL_CALLER, 0.0), lambda answer: None) is None
    assert list(late.begun) == [7]
    waiting = 0
    room.decided()
    await until(lambda: len(late.begun) == 3)
    for number in (0, 1):
        late.end(number, b"%d" % number)
    assert orjson.loads(await answer or b"") == [{"jsonrpc": "2.0", "result": n, "id": n} for n in (0, 1)]


@pytest.mark.parametrize("awaited", [{3, 40}, set(range(10)), set(range(10, 50)), set(range(0, 50, 2))], ids=len)
async def test_a_batch_has_a_bounded_number_under_way_and_begins_the_next_as_one_is_answered(awaited: set[int]) -> None:
    late = Late(awaited=frozenset(awaited))
    context = RequestContext(LOCAL_CALLER, 0.0)
    answer = answered(dispatcher(late), batch_of(50), context)
    for ended in range(50):
        under_way = min(BATCH_AT_ONCE, 50 - ended)
        await until(lambda wanted=under_way: len(late.begun) == wanted)  # type: ignore[misc]
        number = next(iter(late.begun))
        late.end(number, b"%d" % number)
    written = await answer
    assert written is not None and late.most == BATCH_AT_ONCE
    assert [(one["id"], one["result"]) for one in orjson.loads(written)] == [(n, n) for n in range(50)]


async def test_a_batch_that_is_cancelled_cancels_what_is_awaited_for_it() -> None:
    late = Late(awaited=frozenset({1, 2}))
    answer = answered(dispatcher(late), batch_of(4), RequestContext(LOCAL_CALLER, 0.0))
    while len(late.begun) < 4:
        await asyncio.sleep(0)
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert late.cancelled == {1, 2}


async def test_an_answer_that_cannot_be_written_is_an_internal_error() -> None:
    def broken(kind: str) -> None:
        raise ValueError("a bug in a counter")

    late = Late()
    answer = answered(dispatcher(late, broken), batch_of(2), RequestContext(LOCAL_CALLER, 0.0))
    await asyncio.sleep(0)
    late.end(0, ValueError("a bug in a tool's way"))
    late.end(1, b"1")
    written = await answer
    assert written is not None
    first, second = orjson.loads(written)
    assert first["id"] == 0 and first["error"]["data"]["error_type"] == "internal" and second["result"] == 1
