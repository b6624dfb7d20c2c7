"""How many instructions a server runs for a call, counted by callgrind: the same on a quiet machine and on a busy one.

`counted()` starts servers under valgrind and asks each in bursts: every connection sends, then all answers are awaited,
so that the calls of an event-loop tick are as many each time. What a server does when nobody asks is taken off.
Instructions of the kernel and waiting are no part of it: CPU time beside it has these. Used by `load/compare.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from load.harness import Asking, Bench, Running
from load.run import CannotRun

CONNECTIONS = 16
WARM_BURSTS = 4
WARM_TRIES = 10
TRY_AGAIN_S = 1.1
"""A service that found its key store too slow says to come back after a second."""
IDLE_S = 1.0
ANSWER_S_MAX = 60.0
CONTROL_S_MAX = 60.0


def available() -> bool:
    """Whether valgrind is there with its control command; on Debian: apt install valgrind."""
    return bool(shutil.which("valgrind") and shutil.which("callgrind_control"))


class Counted:
    """A server under callgrind and the connections to it."""

    def __init__(self, server: Running, asking: Asking, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.dumps = 0
        self.requests = [request.encode() for request, _ in asking.requests()]
        self.right = asking.right.encode()
        self.sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(CONNECTIONS)]
        for one in self.sockets:
            one.settimeout(ANSWER_S_MAX)
        self.turn = 0

    def close(self) -> None:
        for one in self.sockets:
            one.close()

    def per_call(self, bursts: int) -> float:
        """Instructions of one call."""
        self.control("--zero")
        time.sleep(IDLE_S)
        idle_per_s = self.taken() / IDLE_S
        began = time.perf_counter()
        for _ in range(bursts):
            self.burst()
        took_s = time.perf_counter() - began
        return max(0.0, self.taken() - idle_per_s * took_s) / (bursts * CONNECTIONS)

    def warm(self) -> None:
        """A first look-up of a key may be too slow under valgrind for the service's own patience: ask until it is
        known. Then count, and let caches and batches become as they stay."""
        for request in self.requests:
            for _ in range(WARM_TRIES):
                self.sockets[0].sendall(request)
                if self.right in (received := answer(self.sockets[0])):
                    break
                time.sleep(TRY_AGAIN_S)
            else:
                raise CannotRun(f"{self.server.name} under valgrind: {received[-300:]!r}")
        self.control("--instr=on")
        for _ in range(WARM_BURSTS):
            self.burst()

    def burst(self) -> None:
        for one in self.sockets:
            self.turn += 1
            one.sendall(self.requests[self.turn % len(self.requests)])
        for one in self.sockets:
            if self.right not in (received := answer(one)):
                raise CannotRun(f"{self.server.name} under valgrind: {received[-300:]!r}")

    def taken(self) -> int:
        """Instructions since the last time."""
        self.control("--dump")
        self.dumps += 1
        path = self.folder / f"callgrind.{self.server.pid}.{self.dumps}"
        found = re.search(r"^totals: (\d+)", path.read_text(), re.MULTILINE)
        if found is None:
            raise CannotRun("callgrind wrote no totals")
        return int(found[1])

    def control(self, what: str) -> None:
        command = ["callgrind_control", *what.split(), str(self.server.pid)]
        subprocess.run(command, check=True, capture_output=True, timeout=CONTROL_S_MAX)


def answer(connection: socket.socket) -> bytes:
    received = b""
    while True:
        received += connection.recv(1 << 20)
        head, found, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if found and length and len(body) >= int(length[1]):
            return received


@contextlib.contextmanager
def under_valgrind(folder: Path) -> Iterator[None]:
    """Interpreters that this process starts meanwhile run under callgrind, which counts nothing until it is told to."""
    script = folder / "python-under-callgrind"
    options = f"--tool=callgrind --instr-atstart=no --callgrind-out-file={folder}/callgrind.%p"
    script.write_text(f'#!/bin/sh\nexec valgrind {options} {sys.executable} "$@" 2>/dev/null\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    real, sys.executable = sys.executable, str(script)
    try:
        yield
    finally:
        sys.executable = real


@contextlib.contextmanager
def counted(bench: Bench, wanted: Sequence[tuple[str, dict[str, str] | None, Asking]]) -> Iterator[dict[str, Counted]]:
    """Servers by name, warm; settings None is the bare echo."""
    folder = bench.folder / "callgrind"
    folder.mkdir()
    found: dict[str, Counted] = {}
    with contextlib.ExitStack() as stack:
        with under_valgrind(folder):
            running = [
                (bench.bare(name) if settings is None else bench.service(name, settings), asking)
                for name, settings, asking in wanted
            ]
        for server, asking in running:
            os.sched_setaffinity(server.pid, range(os.cpu_count() or 1))
            one = found[server.name] = Counted(server, asking, folder)
            stack.callback(one.close)
            one.warm()
        yield found
