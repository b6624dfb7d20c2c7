"""One service for the tests of clients: it asks for a key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.access.keyring import make_key
from tests.conftest import Running, end, places_in, start_service
from tests.servers import make_folder, remove_folder


@dataclass(frozen=True)
class Guarded:
    service: Running
    key: str

    def listed(self) -> list[dict[str, Any]]:
        """The tools that the holder of the key sees."""
        headers = {"Authorization": f"Bearer {self.key}"}
        tools: list[dict[str, Any]] = self.service.http.get("/api/v1/tools?limit=100", headers=headers).json()["tools"]
        return tools


@pytest.fixture(scope="session")
def guarded() -> Iterator[Guarded]:
    folder = make_folder("agentcore-clients-")
    _, key = make_key(places_in(folder)["DATABASE_URL"], subject="agent")
    running = start_service(**places_in(folder), AUTH_MODE="required", TOOL_MODULES="tests.mcp_fixtures")
    yield Guarded(running, key)
    end(running)
    if folder.exists():
        remove_folder(folder)
