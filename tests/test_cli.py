"""The command line, run as an operator runs it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from app import __version__
from tests.conftest import ROOT, service_environ


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env=service_environ(**environ),
        capture_output=True,
        text=True,
    )


def test_tools_list_shows_what_would_be_served_and_json_for_programs() -> None:
    listed = run("tools", "list", TOOL_MODULES="tests.tools_for_tests")
    assert listed.returncode == 0 and "echo" in listed.stdout and "count_calls" in listed.stdout
    tools = json.loads(run("tools", "list", "--json").stdout)
    assert {"tool_id", "name", "description", "version", "category", "tags", "capabilities"} == set(tools[0])


def test_tools_call_runs_one_through_the_whole_executor() -> None:
    done = run("tools", "call", "echo", '{"message": "hi"}')
    assert done.returncode == 0 and json.loads(done.stdout)["result"] == {"message": "hi"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["echo", "{}"], 1),
        (["no_such_tool"], 1),
        (["echo", "{not json"], 2),
        (["calculator", '{"expression":"1/0"}'], 1),
    ],
)
def test_tools_call_exits_non_zero_when_it_did_not_succeed(arguments: list[str], code: int) -> None:
    assert run("tools", "call", *arguments).returncode == code


def test_doctor_is_content_with_the_defaults() -> None:
    done = run("doctor", "--port", "0")
    assert done.returncode == 0, done.stdout
    assert all(line.startswith("ok ") for line in done.stdout.splitlines())


def test_doctor_says_what_is_wrong_and_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("doctor", "--port", port, "--json", TOOL_MODULES="tests.no_such_module")
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert not findings["address"]["ok"] and "--port" in findings["address"]["says"]
    assert not findings["tools from tests.no_such_module"]["ok"]
    exposed = run("doctor", "--host", "0.0.0.0", "--port", "0")
    assert exposed.returncode == 1 and "AUTH_MODE=none" in exposed.stdout


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout.strip() == __version__


def test_an_unknown_command_exits_2_with_the_usage() -> None:
    done = run("dance")
    assert done.returncode == 2 and "usage" in done.stderr


def test_a_port_that_is_taken_exits_non_zero_with_a_line_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode not in (0, 2)
    assert "address already in use" in (done.stdout + done.stderr).lower()
