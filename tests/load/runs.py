"""Load runs in processes of their own, and a server that refuses everybody."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from threading import Thread

from load.pages import HOST, PageServer
from tests.conftest import ROOT, service_environ
from tests.servers import make_folder

RUN_S_MAX = 180.0
"""Not a claim about speed: past it the test fails instead of hanging."""

RUN_TIME = "6s"
"""In which every kind of request is sent, though the machine stands still for some of it."""

P95_MS_MAX = "60000"
"""What is asked here is whether it answers right, on whatever machine; how a p95 is judged has tests of its own."""


@dataclass
class Run:
    """What a load run said."""

    code: int
    output: str

    @property
    def rows(self) -> dict[str, tuple[int, int]]:
        """Requests and failures by name."""
        found = re.findall(r"^(\w[\w ()]*?) +(\d+) +(\d+) +\d+ +\d+ +\d+ +\d+ +[\d.]+$", self.output, re.MULTILINE)
        return {name: (int(requests), int(failures)) for name, requests, failures in found}


def start_load(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    out = () if "--out" in arguments else ("--out", str(make_folder("agentcore-load-")))
    return subprocess.Popen(
        [sys.executable, "-m", "load.run", "--p95-max", P95_MS_MAX, *arguments, *out],
        cwd=ROOT,
        env=service_environ(**environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_load(*arguments: str, **environ: str) -> Run:
    return finished(start_load(*arguments, **environ))


def finished(process: subprocess.Popen[str]) -> Run:
    """Once it has ended by itself."""
    try:
        output, _ = process.communicate(timeout=RUN_S_MAX)
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: it has processes of its own to end
        output, _ = process.communicate(timeout=RUN_S_MAX)
        raise AssertionError(f"did not end by itself: {output}") from None
    return Run(process.returncode, output)


class Limited(BaseHTTPRequestHandler):
    """Ready, and out of its limit: HTTP 200 with a JSON-RPC error for everybody."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(b"ok")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        error = {"code": -32001, "message": "…", "data": {"error_type": "rate_limit", "retry_after_ms": 100}}
        self._answer(json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(answers: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with PageServer((HOST, 0), answers) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
