"""Ends what the tests started even when pytest itself is killed: a process of its own that outlives it.

The tests tell it over a pipe which processes and folders they owe an end; when the pipe closes, however that came
about, it ends and removes what is left. Knows nothing of servers. Used by tests/servers.py and tests/conftest.py.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import psutil

ROOT = Path(__file__).parent.parent

Kind = Literal["process", "folder"]

END_S_MAX = 15.0
"""For processes to do what a signal made them do."""

POLL_S = 0.01

_reaper: subprocess.Popen[bytes] | None = None


def owe(kind: Kind, value: object) -> None:
    """To be ended or removed when this process is gone."""
    _tell("owe", kind, value)


def settle(kind: Kind, value: object) -> None:
    """Ended or removed by now."""
    _tell("settle", kind, value)


def _tell(verb: str, kind: Kind, value: object) -> None:
    global _reaper
    if _reaper is None:
        _reaper = subprocess.Popen(
            [sys.executable, "-m", "tests.reaper"], cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True
        )
        atexit.register(_dismiss, _reaper)
    assert _reaper.stdin is not None
    _reaper.stdin.write(f"{verb} {kind} {value}\n".encode())
    _reaper.stdin.flush()


def _dismiss(reaper: subprocess.Popen[bytes]) -> None:
    assert reaper.stdin is not None
    reaper.stdin.close()
    reaper.wait(timeout=30)


def send(pid: int, signal_number: int) -> list[psutil.Process]:
    """Signal a process and all that it started: PostgreSQL's backends are no group, each leads its own session."""
    try:
        parent = psutil.Process(pid)
        if signal_number != signal.SIGCONT:
            # First, so that it starts no other while these are looked up.
            parent.suspend()
        signalled = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    for process in signalled:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal_number)
    return signalled


def wait(signalled: list[psutil.Process], *until: str) -> None:
    """Until all are in one of these states, or gone; a zombie holds nothing, its exit code is only not collected."""
    ends = time.monotonic() + END_S_MAX
    while not all(_status(process) in (None, *until) for process in signalled):
        if time.monotonic() > ends:
            raise TimeoutError(f"processes are not {' or '.join(until)} within {END_S_MAX:g} s")
        time.sleep(POLL_S)


def _status(process: psutil.Process) -> str | None:
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return None


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    owed: set[tuple[str, str]] = set()
    for line in sys.stdin:
        verb, kind, value = line.rstrip("\n").split(" ", 2)
        if verb == "owe":
            owed.add((kind, value))
        else:
            owed.discard((kind, value))
    ended = [process for kind, value in owed if kind == "process" for process in send(int(value), signal.SIGKILL)]
    with contextlib.suppress(TimeoutError):
        wait(ended, psutil.STATUS_ZOMBIE)
    for kind, value in owed:
        if kind == "folder":
            shutil.rmtree(value, ignore_errors=True)


if __name__ == "__main__":
    os.chdir("/")
    main()
