"""Client libraries at their defaults against a running service: they list, call, hear of progress, and are refused.

Each program in `programs/` is what a user of the library would write. It prints how many tools it was shown, what
echo gave it, and, where the library can be told of progress, what it heard.
"""

from __future__ import annotations

import json

import pytest

from tests.clients import environments
from tests.clients.conftest import Guarded
from tests.clients.environments import MODULES, PROGRAMS, python_program

HEAR_PROGRESS = {"fastmcp", "google-adk", "langchain", "mcp1", "pydantic-ai"}
"""The others offer their users no way to be told."""

WAIT_FOR_EVER = {"smolagents"}
"""Its adapter loses the error of a thread, and tells of a timeout after 30 s."""


def test_every_environment_has_a_program() -> None:
    programs = {path.stem for path in PROGRAMS.glob("*.py")}
    assert programs == {name.replace("-", "_") for name in environments.names()}


@pytest.mark.parametrize("name", environments.names())
def test_it_lists_and_calls(guarded: Guarded, name: str) -> None:
    check_told(guarded, python_program(name), hears=name in HEAR_PROGRESS)


@pytest.mark.parametrize("module", MODULES, ids=" ".join)
def test_it_lists_and_calls_in_typescript(guarded: Guarded, module: list[str]) -> None:
    program, *mode = module
    check_told(guarded, environments.node_command(PROGRAMS / program), *mode, hears=True)


def check_told(guarded: Guarded, command: list[str], *arguments: str, hears: bool) -> None:
    service = guarded.service
    done = environments.run([*command, f"{service.url}/mcp", *arguments], KEY=guarded.key)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tools"] == len(guarded.listed())
    assert told["echo"] == {"message": "hi"}
    assert told.get("progress") == ([0, 50, 100] if hears else None)


@pytest.mark.parametrize("name", sorted({*environments.names()} - WAIT_FOR_EVER))
def test_a_wrong_key_ends_it(guarded: Guarded, name: str) -> None:
    check_refused(guarded, python_program(name))


@pytest.mark.parametrize("module", MODULES, ids=" ".join)
def test_a_wrong_key_ends_it_in_typescript(guarded: Guarded, module: list[str]) -> None:
    program, *mode = module
    check_refused(guarded, environments.node_command(PROGRAMS / program), *mode)


def check_refused(guarded: Guarded, command: list[str], *arguments: str) -> None:
    service = guarded.service
    before = service.metric("tool_errors_total", error_type="unauthenticated")
    refused = environments.run([*command, f"{service.url}/mcp", *arguments], KEY=guarded.key[:-1])
    assert refused.returncode == 1 and "imeout" not in refused.stderr, refused.stderr
    assert service.metric("tool_errors_total", error_type="unauthenticated") > before
