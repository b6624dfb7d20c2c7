"""A real haproxy in front of replicas: keep-alive on both sides, health by /readyz, nothing tried again, and a client
that goes away is told on.

From the PATH, or where `.ci/haproxy` puts Debian's package. A retry in the proxy would hide what a replica does wrong.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers import HOST, Server, wait_until

FETCHED = Path(sys.prefix) / "haproxy" / "usr"

CHECK_MS = 200
"""Between two looks at /readyz; one failed look takes a replica out."""


@functools.cache
def binary() -> Path | None:
    found = shutil.which(
        "haproxy", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", str(FETCHED / "sbin")))
    )
    return Path(found) if found else None


def needs_haproxy() -> None:
    """Skip, and say so: the summary of the run lists it."""
    if binary() is None:
        pytest.skip("NOT TESTED: no haproxy here. `.ci/haproxy` fetches it, or: apt install haproxy")


class Haproxy(Server):
    """Spreads requests over the replicas at these ports, one after the other."""

    name = "haproxy"

    def __init__(self, ports: Sequence[int]) -> None:
        super().__init__()
        self._ports = ports

    def command(self) -> list[str]:
        program = binary()
        assert program is not None
        path = self.folder / "haproxy.cfg"
        path.write_text(self._configuration())
        libraries = [str(path) for path in (FETCHED / "lib").glob("*-linux-gnu")]
        return ["env", f"LD_LIBRARY_PATH={os.pathsep.join(libraries)}", str(program), "-db", "-f", str(path)]

    def _configuration(self) -> str:
        servers = "\n".join(
            f"    server replica-{number} {HOST}:{port} check inter {CHECK_MS}ms fall 1 rise 1"
            for number, port in enumerate(self._ports)
        )
        return f"""
global
    stats socket {self.folder}/stats.sock level admin
    maxconn 4000
    nbthread 1
defaults
    mode http
    timeout connect 2s
    timeout client 90s
    timeout server 90s
    timeout http-keep-alive 90s
    retries 0
    http-reuse always
    option abortonclose
frontend calls
    bind {HOST}:{self.port}
    default_backend replicas
backend replicas
    balance roundrobin
    option httpchk
    http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host {HOST}
    http-check expect status 200
{servers}
"""

    def is_ready(self) -> bool:
        try:
            return bool(self.states())
        except OSError:
            return False

    def states(self) -> dict[int, str]:
        """UP or DOWN by port, as the last look found it; "no" where it does not look."""
        rows = list(csv.DictReader(io.StringIO(self._ask("show stat").removeprefix("# "))))
        return {
            port: row["status"].split()[0]
            for number, port in enumerate(self._ports)
            for row in rows
            if row["svname"] == f"replica-{number}"
        }

    @contextmanager
    def not_looking_at(self, port: int) -> Iterator[None]:
        """As between two looks, for as long as this lasts: a replica counts as up, whatever becomes of it."""
        server = f"replicas/replica-{self._ports.index(port)}"
        self._ask(f"disable health {server}")
        try:
            yield
        finally:
            self._ask(f"enable health {server}")

    def _ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.folder / "stats.sock"))
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()

    def wait_until_up(self, *ports: int) -> None:
        wait_until(
            lambda: all(self.states()[port] != "DOWN" for port in ports or self._ports), "haproxy sees a replica"
        )
