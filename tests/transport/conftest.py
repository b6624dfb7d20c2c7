"""One service for the tests of /mcp: the built-in tools, the misbehaving ones, and those of the conformance suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Running, end, start_service


@pytest.fixture(scope="session")
def mcp() -> Iterator[Running]:
    running = start_service(TOOL_MODULES="tests.tools_for_tests,tests.mcp_fixtures")
    yield running
    end(running)
