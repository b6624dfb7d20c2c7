"""`serve --reload`: a change of a tool's module is served without anybody's doing, and no call is cut off by it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from app.reload import watched_folders
from tests.conftest import ROOT, Running, Serve, service_environ
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
    call = threading.Thread(target=lambda: answers.append(running.execute("slowly", {"seconds": 4.0})))
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


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda told: told.name)
def test_the_service_ends_with_whoever_watches_it(serve: Serve, module: Path, told: signal.Signals) -> None:
    running = reloading(serve, module)
    assert running.stop(told) == 0
    with pytest.raises(httpx.ConnectError):
        running.http.get("/livez")


def which_code(running: Running) -> Any:
    try:
        return running.execute("which").get("code")
    except httpx.TransportError:
        return None


def test_what_is_watched_is_our_code_and_the_tools_a_package_that_cannot_be_imported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "broken_tools_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    here = Path(__file__).parent
    modules = ["tests.tools_for_tests", "broken_tools_package.tools", "no_such_module", ".x", "sys"]
    assert watched_folders(modules) == sorted([here.parent / "app", here, package.resolve()])


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Reloading]:
    """In a folder that has an `app` of its own, and run as the console script runs: without that folder's modules."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text("raise SystemExit('not ours')")
    (tmp_path / "modules").mkdir()
    path = os.pathsep.join((str(ROOT), str(tmp_path / "modules")))
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "app", "serve", "--reload", "--port", "0"],
        cwd=tmp_path,
        env=service_environ(tmp_path, PYTHONPATH=path),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Reloading(process, tmp_path / ".env")
        finally:
            process.terminate()


class Reloading(NamedTuple):
    process: subprocess.Popen[str]
    dotenv: Path

    def messages_until(self, last: str) -> list[str]:
        assert self.process.stdout is not None
        messages = []
        for line in self.process.stdout:
            messages.append(json.loads(line)["message"])
            if messages[-1] == last:
                return messages
        raise AssertionError(f"{last} never came after {messages}")

    def replace(self, text: str) -> None:
        """As editors do it: another file takes the name."""
        beside = self.dotenv.with_name("env.new")
        beside.write_text(text)
        beside.replace(self.dotenv)


def test_an_env_file_that_is_made_or_replaced_is_read_anew_variables_of_opentelemetry_too(elsewhere: Reloading) -> None:
    told = "a variable of OpenTelemetry is not followed"
    assert told not in elsewhere.messages_until("serving")
    elsewhere.replace("OTEL_BSP_MAX_QUEUE_SIZE=abc\nOTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:1\n")
    assert told in elsewhere.messages_until("serving")
    elsewhere.replace("LOG_LEVEL=INFO\n")
    assert told not in elsewhere.messages_until("serving")
    elsewhere.dotenv.unlink()
    assert told not in elsewhere.messages_until("serving")


def test_tools_that_an_env_file_names_later_are_watched_too(elsewhere: Reloading, tmp_path: Path) -> None:
    elsewhere.messages_until("serving")
    module = tmp_path / "modules" / "named_later.py"
    module.write_text("")
    elsewhere.replace("TOOL_MODULES=named_later\n")
    assert "tools not loaded" in elsewhere.messages_until("serving")
    module.write_text(MODULE.format(version=1))
    assert "tools not loaded" not in elsewhere.messages_until("serving")
