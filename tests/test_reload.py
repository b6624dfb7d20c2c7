"""`serve --reload`: a change of a tool's module is served without anybody's doing, and no call is cut off by it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.reload import watched_paths
from tests.conftest import Running, Serve
from tests.servers import free_port, wait_until

MODULE = """
import asyncio

from app.tools.tool import tool

@tool
async def which() -> int:
    "Say which version this is."
    return {version}

@tool
async def slowly(seconds: float) -> int:
    "Say so after some seconds."
    await asyncio.sleep(seconds)
    return {version}
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "tools_that_change.py"
    path.write_text(MODULE.format(version=1))
    return path


def reloading(serve: Serve, module: Path) -> Running:
    path = os.pathsep.join(filter(None, (str(module.parent), os.environ.get("PYTHONPATH"))))
    return serve(
        "--reload", "--port", str(free_port()), TOOL_MODULES="tools_that_change", PYTHONPATH=path, DRAIN_SECONDS=""
    )


def which(running: Running) -> Any:
    try:
        return running.execute("which").get("result")
    except httpx.TransportError:
        return None


def test_a_changed_tool_is_served_and_the_call_that_runs_is_finished(serve: Serve, module: Path) -> None:
    running = reloading(serve, module)
    assert which(running) == 1
    answers: list[dict[str, Any]] = []
    call = threading.Thread(target=lambda: answers.append(running.execute("slowly", {"seconds": 1.0})))
    call.start()
    wait_until(lambda: running.metric("tool_execution_concurrency") == 1, "the slow call runs")
    module.write_text(MODULE.format(version=2))
    call.join()
    assert answers[0]["result"] == 1, "drained first"
    wait_until(lambda: which(running) == 2, "the changed tool is served")
    assert running.stop() == 0


def test_a_module_that_cannot_be_loaded_is_mended_by_the_next_change(serve: Serve, module: Path) -> None:
    running = reloading(serve, module)
    module.write_text("this is no Python")
    wait_until(lambda: which_code(running) == -32004, "the tool is gone")
    module.write_text(MODULE.format(version=3))
    wait_until(lambda: which(running) == 3, "it is back")
    assert running.stop() == 0


def which_code(running: Running) -> Any:
    try:
        return running.execute("which").get("code")
    except httpx.TransportError:
        return None


def test_what_is_watched_is_our_code_the_tools_and_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    paths = watched_paths(["tests.tools_for_tests", "no_such_module"], [tmp_path / ".env", tmp_path / "none", None])
    here = Path(__file__).parent
    assert paths == sorted([here.parent / "app", here, (tmp_path / ".env").resolve()])
