"""Where no slot is free and no place to wait for one, a call is refused before it is made, by every door alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.calls import LOCAL_CALLER
from app.limits.adaptive import FLOOR
from app.service import Service, open_service
from app.settings import read_settings
from app.transport.app import create_app
from app.transport.server import Server
from tests.conftest import places_in
from tests.waiting import until

pytestmark = pytest.mark.anyio

Served = tuple[Service, httpx.AsyncClient]


@pytest.fixture(params=["true", "false"], ids=["lane", "asgi"])
async def crowded(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Served]:
    """A service whose only slot is taken, and so is the only place to wait for it."""
    async with serving(tmp_path, PROTOCOL_LANE=request.param, MAX_CONCURRENT_EXECUTIONS="1") as (service, client):
        for _ in range(2):  # then the heads are known to the lane, and the tool to the executor
            assert "result" in await rpc(client, "echo", {"message": "x"})
            assert (await rest(client, "echo", {"message": "x"})).status_code == 200
        slots = service.executor.slots
        assert slots.take_now()
        place = slots.wait("another")
        yield service, client
        place.cancel()


@asynccontextmanager
async def serving(folder: Path, **environ: str) -> AsyncIterator[Served]:
    settings = read_settings({**environ, **places_in(folder), "DRAIN_SECONDS": "0", "AUTH_MODE": "none"})
    async with open_service(settings) as service:
        server = Server(create_app(service), service, "127.0.0.1", 0)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
                yield service, client
        finally:
            server.stop()
            await running


async def rpc(client: httpx.AsyncClient, tool_id: str, parameters: dict[str, Any], **params: Any) -> dict[str, Any]:
    asked = {"tool_id": tool_id, "parameters": parameters, **params}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": asked}
    answer: dict[str, Any] = (await client.post("/api/v1/jsonrpc", json=body)).json()
    return answer


async def rest(client: httpx.AsyncClient, tool_id: str, parameters: dict[str, Any]) -> httpx.Response:
    return await client.post(f"/api/v1/tools/{tool_id}/execute", json={"parameters": parameters})


async def test_it_is_told_when_to_come_back_and_counted_once(crowded: Served) -> None:
    service, client = crowded
    errors, refused = service.metrics.errors["overloaded"], service.executor.slots.refused
    asked = {"tool_id": "echo", "parameters": {"message": "x"}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": asked}
    answer = await client.post("/api/v1/jsonrpc", json=body)
    error = answer.json()["error"]
    assert error["code"] == -32006 and error["data"]["retry_after_ms"] > 0
    assert int(answer.headers["retry-after"]) >= 1
    assert "execution_id" not in error["data"], "there is no call"
    answer = await rest(client, "echo", {"message": "x"})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["message"] == error["message"]
    assert service.metrics.errors["overloaded"] == errors + 2
    assert service.executor.slots.refused == refused + 2


async def test_a_notification_is_counted_too(crowded: Served) -> None:
    service, client = crowded
    errors = service.metrics.errors["overloaded"]
    asked = {"tool_id": "echo", "parameters": {"message": "x"}}
    answer = await client.post("/api/v1/jsonrpc", json={"jsonrpc": "2.0", "method": "tools.execute", "params": asked})
    assert answer.status_code == 204 and service.metrics.errors["overloaded"] == errors + 1


async def test_nobody_looks_at_its_parameters(crowded: Served) -> None:
    _, client = crowded
    assert (await rpc(client, "echo", {"unknown": 1}))["error"]["code"] == -32006


async def test_a_tool_that_there_is_not_is_told_as_ever(crowded: Served) -> None:
    _, client = crowded
    assert (await rpc(client, "nothing", {}))["error"]["code"] == -32004


async def test_each_of_a_batch_is_refused(crowded: Served) -> None:
    _, client = crowded
    asked = {"tool_id": "echo", "parameters": {"message": "x"}}
    body = [{"jsonrpc": "2.0", "id": n, "method": "tools.execute", "params": asked} for n in range(3)]
    answers = (await client.post("/api/v1/jsonrpc", json=body)).json()
    assert [answer["error"]["code"] for answer in answers] == [-32006] * 3


async def test_a_service_that_drains_says_so(crowded: Served) -> None:
    service, client = crowded
    service.executor.calls.stop_accepting()
    answer = await rest(client, "echo", {"message": "x"})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == -32009


async def test_what_comes_when_a_slot_is_free_runs(crowded: Served) -> None:
    service, client = crowded
    service.executor.slots.release()  # to who waits
    service.executor.slots.release()
    answer = json.loads((await rest(client, "echo", {"message": "x"})).content)
    assert answer["status"] == "success"


async def test_a_result_that_is_kept_needs_no_slot(tmp_path: Path) -> None:
    key = "a key"
    async with serving(tmp_path, MAX_CONCURRENT_EXECUTIONS="1") as (service, client):
        first = (await rpc(client, "echo", {"message": "x"}, idempotency_key=key))["result"]
        assert service.executor.slots.take_now()
        place = service.executor.slots.wait("another")
        again = (await rpc(client, "echo", {"message": "x"}, idempotency_key=key))["result"]
        assert again["replayed"] and again["execution_id"] == first["execution_id"]
        place.cancel()


PER_AGENT = "policies: [{name: per-agent, per: [subject], max_concurrent: 1}]"


async def test_an_agent_has_its_own_place_however_its_name_came(tmp_path: Path) -> None:
    (tmp_path / "limits.yaml").write_text(PER_AGENT)
    environ = {"MAX_CONCURRENT_EXECUTIONS": "2", "LIMITS_FILE": str(tmp_path / "limits.yaml")}
    async with serving(tmp_path, TOOL_MODULES="tests.tools_for_tests", **environ) as (service, client):

        async def call(tool_id: str, parameters: dict[str, Any], more: dict[str, Any], **params: Any) -> Any:
            asked = {"tool_id": tool_id, "parameters": parameters, **params}
            body = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": asked, **more}
            return (await client.post("/api/v1/jsonrpc", json=body)).json()

        assert "result" in await call("echo", {"message": "x"}, {})
        running = []
        for call_id, params in (("nobody", {}), ("other", {"agent_id": "other"}), ("nobody-next", {})):
            waits = call("wait", {"seconds": 60}, {}, call_id=call_id, **params)
            running.append(asyncio.create_task(waits))
            await until(lambda: len(service.executor.calls) == len(running))
        asked = asyncio.create_task(call("echo", {"message": "x"}, {"a2a_context": {"source_agent": "bot"}}))
        await until(lambda: len(service.executor.calls) == 4 or asked.done())
        for call_id in ("other", "nobody", "nobody-next"):
            service.executor.calls.cancel(LOCAL_CALLER, None, call_id)
        assert {(await each)["result"]["status"] for each in running} == {"cancelled"}
        assert (await asked)["result"]["status"] == "success"


@pytest.fixture(params=["true", "false"], ids=["lane", "asgi"])
async def shedding(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Served]:
    """A service whose loop is late by what calls compute; as many run as are never too many, and it has slots."""
    async with serving(tmp_path, PROTOCOL_LANE=request.param, TOOL_MODULES="load.tools") as (service, client):
        for tool_id, parameters in (("echo", {"message": "x"}), WAITS):
            assert "result" in await rpc(client, tool_id, parameters)
            assert (await rest(client, tool_id, parameters)).status_code == 200
        service.executor.control.shedding = True
        for _ in range(FLOOR):
            assert service.executor.slots.take_now()
        yield service, client


WAITS = ("pause", {"seconds": 0.001})


async def test_where_the_loop_is_late_what_waits_or_computes_is_refused(shedding: Served) -> None:
    service, client = shedding
    refused = service.executor.slots.refused
    error = (await rpc(client, *WAITS))["error"]
    assert error["code"] == -32006 and error["data"]["retry_after_ms"] > 0 and "compute" in error["message"]
    assert (await rest(client, *WAITS)).status_code == 503
    assert service.executor.slots.refused == refused + 2 and service.executor.slots.running == FLOOR


async def test_and_what_is_over_at_once_runs(shedding: Served) -> None:
    _, client = shedding
    assert (await rpc(client, "echo", {"message": "x"}))["result"]["status"] == "success"


async def test_by_mcp_in_a_batch_and_by_coroutines_too(shedding: Served) -> None:
    service, client = shedding
    tool_id, parameters = WAITS
    asked = {"tool_id": tool_id, "parameters": parameters}
    body = [{"jsonrpc": "2.0", "id": n, "method": "tools.execute", "params": asked} for n in range(2)]
    answers = (await client.post("/api/v1/jsonrpc", json=body)).json()
    assert [answer["error"]["code"] for answer in answers] == [-32006] * 2
    batch = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute_batch", "params": {"requests": [asked]}}
    (item,) = (await client.post("/api/v1/jsonrpc", json=batch)).json()["result"]["results"]
    assert item["error"]["code"] == -32006
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool_id, "arguments": parameters}}
    headers = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25"}
    answer = (await client.post("/mcp", json=call, headers=headers)).json()
    assert answer["result"]["isError"] and "-32006" in str(answer)
    assert service.executor.slots.running == FLOOR


async def test_eight_calls_run_whatever_it_is(shedding: Served) -> None:
    service, client = shedding
    service.executor.slots.release()
    assert (await rpc(client, *WAITS))["result"]["status"] == "success"
    assert (await rest(client, *WAITS)).status_code == 200


async def test_a_result_that_is_kept_is_given_all_the_same(shedding: Served) -> None:
    service, client = shedding
    service.executor.control.shedding = False
    first = (await rpc(client, *WAITS, idempotency_key="a key"))["result"]
    service.executor.control.shedding = True
    again = (await rpc(client, *WAITS, idempotency_key="a key"))["result"]
    assert again["replayed"] and again["execution_id"] == first["execution_id"]
