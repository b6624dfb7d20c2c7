"""The command line, run as an operator runs it."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import __version__
from app.settings import http_url
from tests.conftest import ROOT, Running, places_in, service_environ
from tests.servers import RedisServer, free_port, wait_until


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env=service_environ(**environ),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_tools_list_shows_what_would_be_served_and_json_for_programs() -> None:
    listed = run("tools", "list", TOOL_MODULES="tests.tools_for_tests")
    assert listed.returncode == 0 and "echo" in listed.stdout and "count_calls" in listed.stdout
    tools = json.loads(run("tools", "list", "--json").stdout)
    assert {"tool_id", "name", "description", "version", "category", "tags", "capabilities"} == set(tools[0])


def test_what_a_command_meets_is_told_in_words_with_its_facts_and_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "broken_tools.py").write_text('raise RuntimeError("password=hunter2hunter2")\n')
    listed = run("tools", "list", TOOL_MODULES="broken_tools", PYTHONPATH=str(tmp_path))
    assert listed.returncode == 0 and "echo" in listed.stdout
    told, trace = listed.stderr.split("\n", 1)
    assert told.startswith("tools not loaded (source: broken_tools, reason: RuntimeError")
    assert trace.startswith("Traceback") and "hunter2" not in listed.stderr


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
    assert not findings["address"]["ok"] and "--port 0" in findings["address"]["says"]
    assert not findings["tools from tests.no_such_module"]["ok"]
    nobody = free_port()
    away = run("doctor", "--port", "0", "--json", REDIS_URL=f"redis://127.0.0.1:{nobody}", JOURNAL_DIR="/proc/journal")
    findings = {finding["what"]: finding for finding in json.loads(away.stdout)}
    assert not findings["limits"]["ok"] and "check REDIS_URL" in findings["limits"]["says"]
    assert not findings["journal"]["ok"] and "JOURNAL_DIR" in findings["journal"]["says"]
    exposed = run("doctor", "--host", "0.0.0.0", "--port", "0")
    assert exposed.returncode == 1 and "AUTH_MODE=none" in exposed.stdout


def test_doctor_warns_of_a_redis_that_evicts_counters(own_redis: RedisServer) -> None:
    def limits() -> dict[str, Any]:
        done = run("doctor", "--port", "0", "--json", REDIS_URL=own_redis.url)
        return next(finding for finding in json.loads(done.stdout) if finding["what"] == "limits")

    own_redis.cli("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    assert limits()["ok"], "it may take all the memory that there is"
    own_redis.cli("CONFIG", "SET", "maxmemory", "64mb")
    assert not limits()["ok"] and "volatile-lru" in limits()["says"] and "set noeviction" in limits()["says"]
    own_redis.cli("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert limits()["ok"]


def test_doctor_finds_nothing_wrong_beside_a_service_that_runs(service: Running) -> None:
    places = places_in(service.folder)
    done = run("doctor", "--port", "0", **places)
    assert done.returncode == 0, done.stdout
    assert run("doctor", "--port", str(service.port), **places).returncode == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgresql+asyncpg://h:notaport/db"),
        ("MAX_BATCH_SIZE", "0"),
        ("EGRESS_ALLOW", "http://x/"),
        ("JWT_ISSUER", "alone"),
    ],
)
def test_doctor_reports_a_setting_that_is_refused_among_its_checks(name: str, value: str) -> None:
    done = run("doctor", "--port", "0", "--json", **{name: value})
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1 and done.stderr == ""
    assert not findings["settings"]["ok"] and f"{name.partition('_')[0]}_" in findings["settings"]["says"]
    assert findings["address"]["ok"] and findings["clock"]["ok"]
    told = run("doctor", "--port", "0", **{name: value})
    assert told.returncode == 1 and told.stdout.startswith("BAD  settings: ")


def test_doctor_makes_the_folder_of_journals_for_its_owner_alone(tmp_path: Path) -> None:
    assert run("doctor", "--port", "0", JOURNAL_DIR=str(tmp_path / "journal")).returncode == 0
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o700


def test_doctor_shows_as_json_what_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"j\xff")
    done = run("doctor", "--port", "0", "--json", JOURNAL_DIR=str(folder), LIMITS_FILE=str(folder / "none"))
    assert done.returncode == 1 and r"j\udcff" in next(
        each["says"] for each in json.loads(done.stdout) if not each["ok"]
    )
    done = run("doctor", "--port", "0", "--json", JOURNAL_DIR=str(folder))
    assert done.returncode == 0 and r"j\udcff can be written" in done.stdout.replace(r"\\", "\\")


def test_what_stdout_cannot_write_is_shown_by_its_number(tmp_path: Path) -> None:
    places = places_in(tmp_path)
    assert run("keys", "create", "--tenant", "é", "--subject", "s", **places).returncode == 0
    done = run("keys", "list", PYTHONIOENCODING="ascii", **places)
    assert (done.returncode, done.stderr) == (0, "") and r"\xe9/s" in done.stdout


@pytest.mark.parametrize("command", ["keys list", "serve --port 0", "serve --reload --port 0", "doctor --port 0"])
def test_a_working_directory_that_was_removed_is_told(command: str, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    done = subprocess.run(
        ["sh", "-c", f'rmdir "$PWD" && exec "$0" -m app {command}', sys.executable],
        cwd=folder,
        env={**service_environ(), "DATABASE_URL": "sqlite+aiosqlite:///var/agentcore.db"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("agentcore-tools: the working directory was removed")
    assert "Traceback" not in done.stderr


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout.strip() == __version__


def test_an_unknown_command_exits_2_with_the_usage() -> None:
    done = run("dance")
    assert done.returncode == 2 and "usage" in done.stderr


def test_tools_call_ends_with_its_answer_though_the_tool_swallows_its_cancellation() -> None:
    done = run(
        *("tools", "call", "stubborn", '{"seconds": 3600}'),
        TOOL_MODULES="tests.tools_for_tests",
        TOOL_EXECUTION_TIMEOUT="0.2",
    )
    assert done.returncode == 1 and json.loads(done.stdout)["status"] == "timeout" and done.stderr == ""


def test_an_interrupt_ends_a_call_of_a_tool_that_swallows_its_cancellation() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "tools", "call", "say_and_hang"],
        cwd=ROOT,
        env=service_environ(TOOL_MODULES="tests.tools_for_tests"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None and process.stderr.readline() == b"hanging\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.communicate()


IMPORTING = "import sys; print('importing', flush=True); sys.stdin.read()"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_imports_ends_it_in_silence(number: signal.Signals, code: int, tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text(IMPORTING)
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "tools", "list"],
        cwd=ROOT,
        env={**service_environ(), "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"importing\n"
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        assert process.stderr is not None and process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("command", [["tools", "list"], ["tools", "list", "--json"], ["tools", "call", "echo"]])
def test_a_reader_that_has_seen_enough_is_no_error(command: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "app", *command],
        cwd=ROOT,
        env=service_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, b"")


@pytest.mark.parametrize("command", ["doctor --port 0", "tools list --json", 'tools call echo \'{"message": "a"}\''])
def test_a_command_whose_stdout_is_closed_does_its_work_and_is_silent(command: str) -> None:
    done = run_in_shell(f"{command} >&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert run_in_shell(f"{command} <&- >&- 2>&-").returncode == 0


def test_no_file_of_a_service_has_the_number_of_a_stdout_that_was_closed(tmp_path: Path) -> None:
    """Lines of the log go to number 1: into the database, were that its number."""
    port = free_port()
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$0" -m app serve --port {port} <&- >&- 2>&-', sys.executable],
        cwd=ROOT,
        env=service_environ(tmp_path),
    )
    try:
        wait_until(lambda: is_alive(port), "it serves")
        names = [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)]
        assert names == [Path(os.devnull)] * 3
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def is_alive(port: int) -> bool:
    try:
        return httpx.get(http_url("127.0.0.1", port) + "/livez").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("command", ["tools list", "keys list --json", "migrate"])
def test_an_answer_that_finds_no_room_exits_1_with_a_line_that_says_so(command: str) -> None:
    done = run_in_shell(f"{command} >/dev/full")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("agentcore-tools: ") and os.strerror(errno.ENOSPC) in line


def run_in_shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -m app {command}', sys.executable],
        cwd=ROOT,
        env=service_environ(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "1_0", "²"])
def test_a_port_that_cannot_be_is_refused_plainly(port: str) -> None:
    done = run("serve", f"--port={port}")
    assert done.returncode == 2 and "must be a number from 0 to 65535" in done.stderr


def test_a_port_that_is_taken_exits_1_with_a_line_that_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"127.0.0.1 port {port}" in line and "address already in use" in line.lower() and "--port" in line


def test_a_host_that_is_no_text_is_refused_plainly() -> None:
    for command in ("serve", "doctor"):
        done = run(command, "--host", os.fsdecode(b"a\xff"), "--port", "0", AUTH_MODE="none")
        assert done.returncode == 2 and "must be text in UTF-8" in done.stderr


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "[::1]"])
def test_a_host_that_is_none_exits_1_with_a_line_that_says_so(host: str) -> None:
    done = run("serve", "--host", host, "--port", "0", AUTH_MODE="none")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert host in line and "--host" in line
    assert run("doctor", "--host", host, "--port", "0", AUTH_MODE="none").returncode == 1


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:8001"), ("::1", "http://[::1]:8001")])
def test_the_url_of_a_listener_has_brackets_around_ipv6(host: str, url: str) -> None:
    assert http_url(host, 8001) == url


def test_python_without_docstrings_is_refused_with_what_to_do() -> None:
    refused = run("tools", "list", PYTHONOPTIMIZE="2")
    assert (
        refused.returncode == 2 and "PYTHONOPTIMIZE at most 1" in refused.stderr and "Traceback" not in refused.stderr
    )
    assert run("tools", "list", PYTHONOPTIMIZE="1").returncode == 0
