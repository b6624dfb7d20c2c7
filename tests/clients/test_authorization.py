"""A client that knows nothing but the address of /mcp: the 401 leads it to the metadata, that to a token, and in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import httpx2
import pytest
from mcp import Client
from mcp.client.auth import OAuthClientProvider
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import AuthorizationCodeResult, OAuthClientInformationFull, OAuthClientMetadata, OAuthToken

from tests.clients import environments
from tests.clients.authorization import AuthorizationServer
from tests.conftest import Running, end, start_service
from tests.servers import free_port

PROGRAMS = Path(__file__).parent / "oauth_programs"
REDIRECT = "http://127.0.0.1:1/callback"
"""Nobody listens there: each client is handed what its browser would have been sent to."""

WAY = [
    "GET /.well-known/oauth-authorization-server",
    "POST /register",
    "GET /authorize",
    "POST /token",
]


@dataclass(frozen=True)
class Protected:
    service: Running
    issuer: AuthorizationServer

    @property
    def address(self) -> str:
        return f"{self.service.url}/mcp"

    def way(self) -> list[str]:
        """What a client asked the issuer, once each, since the last look; the keys are what the service asks for."""
        asked = [each for each in dict.fromkeys(self.issuer.asked) if each != "GET /keys"]
        self.issuer.asked.clear()
        return asked


@pytest.fixture(scope="module")
def shared() -> Iterator[Protected]:
    with AuthorizationServer() as issuer:
        port = free_port()
        audience = f"http://127.0.0.1:{port}/mcp"
        running = start_service("--port", str(port), **issuer.settings, JWT_AUDIENCE=audience, AUTH_MODE="required")
        yield Protected(running, issuer)
        end(running)


@pytest.fixture
def protected(shared: Protected) -> Protected:
    shared.way()
    shared.issuer.scopes.clear()
    return shared


class Memory:
    """Where a client keeps what it was given."""

    def __init__(self) -> None:
        self.tokens: OAuthToken | None = None
        self.client: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self.tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self.tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self.client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self.client = client_info


class Browser:
    """Follows one redirect, as far as the client's own address."""

    def __init__(self) -> None:
        self._query: dict[str, Any] = {}

    async def open(self, url: str) -> None:
        async with httpx.AsyncClient(trust_env=False) as http:
            response = await http.get(url)
        assert response.status_code == 302, response.text
        self._query = parse_qs(urlsplit(response.headers["location"]).query)

    async def came_back(self) -> AuthorizationCodeResult:
        code, state, issuer = (self._query[name][0] for name in ("code", "state", "iss"))
        return AuthorizationCodeResult(code=code, state=state, iss=issuer)


def provider(address: str, memory: Memory) -> OAuthClientProvider:
    browser = Browser()
    metadata = OAuthClientMetadata(client_name="agent", redirect_uris=[REDIRECT])
    return OAuthClientProvider(address, metadata, memory, browser.open, browser.came_back)


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["auto", "legacy", "2026-07-28"])
async def test_the_python_sdk_finds_its_way(protected: Protected, mode: Any) -> None:
    memory = Memory()
    auth = provider(protected.address, memory)
    async with (
        httpx2.AsyncClient(auth=auth, trust_env=False, timeout=60) as http,
        Client(streamable_http_client(protected.address, http_client=http), mode=mode) as client,
    ):
        assert "echo" in {tool.name for tool in (await client.list_tools()).tools}
        result = await client.call_tool("echo", {"message": "hi"})
    assert result.structured_content == {"message": "hi"}
    assert protected.way() == WAY
    assert protected.issuer.scopes == ["tools:read tools:execute"]
    assert memory.tokens is not None and memory.tokens.scope == "tools:read tools:execute"


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["legacy", "2026-07-28"])
async def test_a_scope_that_is_missing_is_asked_for(protected: Protected, mode: Any) -> None:
    protected.issuer.granted_first = "tools:read"
    memory = Memory()
    auth = provider(protected.address, memory)
    async with (
        httpx2.AsyncClient(auth=auth, trust_env=False, timeout=60) as http,
        Client(streamable_http_client(protected.address, http_client=http), mode=mode) as client,
    ):
        await client.list_tools()
        assert memory.tokens is not None and memory.tokens.scope == "tools:read"
        result = await client.call_tool("echo", {"message": "hi"})
    assert result.structured_content == {"message": "hi"}
    assert set(protected.issuer.scopes[1].split()) == {"tools:read", "tools:execute"}


def test_the_python_sdk_1_finds_its_way(protected: Protected) -> None:
    check_found([environments.python_of("mcp1"), "-I", str(PROGRAMS / "mcp1.py")], protected)


@pytest.mark.parametrize("version", ["1", "2"])
def test_the_typescript_sdk_finds_its_way(protected: Protected, version: str) -> None:
    check_found(environments.node_command(PROGRAMS / "sdk.mjs"), protected, version)


def check_found(command: list[str], protected: Protected, *arguments: str) -> None:
    done = environments.run([*command, protected.address, *arguments])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"message": "hi"}
    assert protected.way() == WAY
    assert protected.issuer.scopes == ["tools:read tools:execute"]
