"""The protocol lane and the ASGI door behind it: the same wire tests over both, and what takes which."""

from __future__ import annotations

import pytest

from tests.conftest import end, start_service

PARAMS = {"tool_id": "echo", "parameters": {"message": "x"}}
ECHO = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": PARAMS}


@pytest.mark.parametrize("lane", ["true", "false"])
def test_protocol_lane_changes_nothing_but_the_way(lane: str) -> None:
    running = start_service(PROTOCOL_LANE=lane)
    try:
        first = running.http.post("/api/v1/jsonrpc", json=ECHO)
        second = running.http.post("/api/v1/jsonrpc", json=ECHO)
        assert first.json()["result"]["result"] == second.json()["result"]["result"] == {"message": "x"}
        assert list(first.headers) == list(second.headers)
    finally:
        end(running)
