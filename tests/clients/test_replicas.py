"""Two replicas behind a proxy that gives each request to the next one: no client notices that there are two."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from tests.access.keyring import make_key
from tests.clients import environments
from tests.clients.environments import MODULES, PROGRAMS, python_program
from tests.conftest import Running, end, places_in, start_service
from tests.haproxy import Haproxy, needs_haproxy
from tests.servers import make_folder, remove_folder
from tests.transport.mcp_requests import BODIES, CHANGING, HEADS, Line, body_of, head_of

CALLS = 30

SOME = ["fastmcp", "langchain", "mcp1"]
"""One of each SDK, and one that opens anew for every call: the rest is made of these."""


@dataclass(frozen=True)
class Replicated:
    services: list[Running]
    port: int
    key: str

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/mcp"

    def calls(self) -> list[float]:
        """How many each replica has run."""
        return [service.metric("tool_executions_total") for service in self.services]


@pytest.fixture(scope="module")
def replicated() -> Iterator[Replicated]:
    """They share a database, and a key in it; each has a journal of its own."""
    needs_haproxy()
    folders = [make_folder("agentcore-replicas-") for _ in range(2)]
    database = places_in(folders[0])["DATABASE_URL"]
    _, key = make_key(database, subject="agent")
    services = [
        start_service(
            **{**places_in(folder), "DATABASE_URL": database},
            TOOL_MODULES="tests.tools_for_tests,tests.mcp_fixtures",
            AUTH_MODE="required",
        )
        for folder in folders
    ]
    with Haproxy([service.port for service in services]) as proxy:
        proxy.wait_until_up()
        yield Replicated(services, proxy.port, key)
    for service in services:
        end(service)
    for folder in folders:
        remove_folder(folder)


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["auto", "legacy", "2026-07-28"])
async def test_the_python_sdk_lists_calls_and_hears(replicated: Replicated, mode: Any) -> None:
    heard: list[float] = []

    async def hear(done: float, total: float | None, message: str | None) -> None:
        heard.append(done)

    before = replicated.calls()
    headers = {"Authorization": f"Bearer {replicated.key}"}
    async with (
        httpx2.AsyncClient(headers=headers, trust_env=False, timeout=60) as http,
        Client(streamable_http_client(replicated.address, http_client=http), mode=mode) as client,
    ):
        assert "echo" in {tool.name for tool in (await client.list_tools()).tools}
        for number in range(CALLS):
            result = await client.call_tool("echo", {"message": str(number)})
            assert result.structured_content == {"message": str(number)}
            await client.call_tool("test_tool_with_progress", {}, progress_callback=hear)
            arguments = {"region": "eu", "count": number, "dry": True}
            mirrored = await client.call_tool("mirrored_parameters", arguments)
            assert mirrored.structured_content == arguments
    assert heard == [0, 50, 100] * CALLS
    ran = [after - earlier for earlier, after in zip(before, replicated.calls(), strict=True)]
    assert sum(ran) == 3 * CALLS and min(ran) >= CALLS


@pytest.mark.parametrize("name", SOME)
def test_a_library_lists_and_calls(replicated: Replicated, name: str) -> None:
    check_told(replicated, python_program(name))


@pytest.mark.parametrize("module", MODULES, ids=" ".join)
def test_the_typescript_sdk_lists_and_calls(replicated: Replicated, module: list[str]) -> None:
    program, *mode = module
    check_told(replicated, environments.node_command(PROGRAMS / program), *mode)


def check_told(replicated: Replicated, command: list[str], *arguments: str) -> None:
    done = environments.run([*command, replicated.address, *arguments], KEY=replicated.key)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["echo"] == {"message": "hi"}


def test_every_request_is_answered_as_one_replica_answers_it(replicated: Replicated) -> None:
    """Status and body of each head with each body, twice: once from either replica."""
    proxied, alone = Line(replicated.port), Line(replicated.services[0].port)
    different = []
    for head_name, body_name in itertools.product(HEADS, BODIES):
        request = head_of(HEADS[head_name], f"Bearer {replicated.key}") + body_of(BODIES[body_name])
        answers = {told(alone.send(request)), told(proxied.send(request)), told(proxied.send(request))}
        if len(answers) > 1:
            different.append((head_name, body_name, answers))
    proxied.close()
    alone.close()
    assert different == []


def told(answer: bytes) -> tuple[bytes, bytes]:
    head, _, body = CHANGING.sub(b"*", answer).partition(b"\r\n\r\n")
    return head[9:12], body
