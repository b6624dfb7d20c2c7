"""Tools that tell by which way a call came in, and wait until they are told to go on."""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import Any

from app.calls import ToolCall, current_call
from app.tools.tool import tool
from app.transport.lane import LaneRequest

_gates: dict[str, asyncio.Event] = {}
_inside: dict[str, int] = {}


def _gate(name: str) -> asyncio.Event:
    return _gates.setdefault(name, asyncio.Event())


def _door_below() -> str:
    """For a tool that runs in place: the executor's frame below its own knows the call, and so its client. On a machine
    that is short of its cores it may have got a task of its own."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        call = frame.f_locals.get("call")
        if isinstance(call, ToolCall):
            return "lane" if isinstance(call.client, LaneRequest) else "asgi"
    return "no call below" if current_call.get() is None else _door_beside()


def _door_beside() -> str:
    """For a tool with a task of its own: whether there is a request of the lane that asked for this call."""
    current = current_call.get()
    assert current is not None
    requests = (one._request for one in gc.get_objects() if isinstance(one, LaneRequest))
    calls = (request.call for request in requests if request is not None)
    return "lane" if any(call and call.execution_id == current.execution_id for call in calls) else "asgi"


@tool(category="custom", read_only=True)
async def which_door(tag: Any = None) -> str:
    """Tell whether the protocol lane or ASGI brought this call."""
    return _door_below()


@tool(category="custom")
async def held(gate: str) -> str:
    """Return by which door this came, once the gate opens."""
    _inside[gate] = _inside.get(gate, 0) + 1
    door = _door_beside()
    await _gate(gate).wait()
    return door


@tool(category="custom", cancel_on_disconnect=True)
async def held_for_client(gate: str) -> str:
    """The same, but only as long as the client is there."""
    _inside[gate] = _inside.get(gate, 0) + 1
    door = _door_beside()
    await _gate(gate).wait()
    return door


@tool(category="custom")
async def open_gate(gate: str) -> int:
    """Let those go on that wait there, and those who come later; how many there were."""
    _gate(gate).set()
    return _inside.get(gate, 0)


@tool(category="custom", read_only=True)
async def inside(gate: str) -> int:
    """How many calls have come to the gate."""
    return _inside.get(gate, 0)
