"""Containers for test_container.py, by the command line of a Docker engine. `.ci/image` builds what they are made of.

AGENTCORE_IMAGE names the image, DOCKER the command; without the first these tests are skipped, and say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import Running, end
from tests.servers import make_folder

DOCKER = shlex.split(os.environ.get("DOCKER", "docker"))

CLOSED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp:size=64m")
"""As k8s/base and docker-compose.yml run it."""

WAIT_S_MAX = 120.0
POLL_S = 0.2


def image() -> str:
    name = os.environ.get("AGENTCORE_IMAGE")
    if not name:
        pytest.skip("NOT TESTED: no image. Where there is a Docker engine, `.ci/image` makes one and runs these")
    return name


def docker(*arguments: str, code: int | None = 0) -> str:
    """What a command said, on both streams. Another exit code than expected is a failure; None takes any."""
    done = subprocess.run(
        [*DOCKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=WAIT_S_MAX
    )
    assert code is None or done.returncode == code, f"docker {arguments[0]}: exit {done.returncode}: {done.stdout}"
    return done.stdout


def inspect(name: str) -> dict[str, Any]:
    (found,) = json.loads(docker("inspect", name))
    return dict(found)


@contextlib.contextmanager
def volume() -> Iterator[str]:
    """An empty volume, gone afterwards."""
    name = docker("volume", "create").strip()
    try:
        yield name
    finally:
        docker("volume", "rm", "--force", name)


@contextlib.contextmanager
def container(*arguments: str, volume: str, **environ: str) -> Iterator[tuple[str, Running]]:
    """The image's service, closed as in production, published on a free port of 127.0.0.1: its name, and itself."""
    name = f"agentcore-test-{uuid.uuid4().hex[:12]}"
    variables = [f"--env={key}={value}" for key, value in {"DRAIN_SECONDS": "0", **environ}.items()]
    options = [*CLOSED, *variables, f"--volume={volume}:/var/lib/agentcore", "--publish=127.0.0.1::8001", *arguments]
    process = subprocess.Popen([*DOCKER, "run", f"--name={name}", *options, image()], stdout=subprocess.PIPE)
    running = Running(process, "", 0, make_folder("agentcore-container-"))
    try:
        running.read_log(lambda event: event["message"] == "serving", WAIT_S_MAX)
        running.port = port_of(name)
        running.url = f"http://127.0.0.1:{running.port}"
        yield name, running
    finally:
        docker("rm", "--force", name)
        end(running)


def port_of(name: str) -> int:
    return int(docker("port", name, "8001/tcp").split()[0].rsplit(":", 1)[1])


def eventually(holds: Callable[[], Any], within_s: float = WAIT_S_MAX) -> Any:
    """What `holds` gives once that is true. What it raises counts as false until the time is up."""
    ends = time.monotonic() + within_s
    while True:
        try:
            if found := holds():
                return found
        except Exception:
            if time.monotonic() > ends:
                raise
        assert time.monotonic() < ends, "it never came true"
        time.sleep(POLL_S)
