"""Where the client libraries are: each in an environment of its own, because what they need disagrees.

`make clients` makes the Python ones from requirements/clients/; npm gives the TypeScript SDKs, at fixed versions, in
`var/clients`. A test whose library is not there says so and names the command.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ENVIRONMENTS = Path(sys.prefix) / "clients"
LOCKS = ROOT / "requirements" / "clients"
PROGRAMS = Path(__file__).parent / "programs"
NODE_PACKAGES = ("@modelcontextprotocol/sdk@1.32.2", "@modelcontextprotocol/client@2.4.0", "mcp-remote@0.15.1")
NODE_MAJOR_MIN = 20
NODE_FOLDER = ROOT / "var" / "clients"
MODULES = [["sdk1.mjs"], ["sdk2.mjs"], ["sdk2.mjs", "auto"]]
"""Of TypeScript: a program, and the mode that it is given."""

RUN_S_MAX = 120
"""Not a claim about speed: past it a test fails instead of hanging."""

INSTALL_S_MAX = 120


def names() -> list[str]:
    return sorted(path.stem for path in LOCKS.glob("*.txt"))


def python_of(name: str) -> str:
    """The interpreter of an environment; skips the test where there is none."""
    python = ENVIRONMENTS / name / "bin" / "python"
    if not (ENVIRONMENTS / name / ".ready").exists():
        pytest.skip(f"NOT TESTED: no environment of {name} here. `make clients` makes it")
    return str(python)


def python_program(name: str) -> list[str]:
    # -I: the folder of a program is not where imports are looked for; programs are named after libraries
    return [python_of(name), "-I", str(PROGRAMS / f"{name.replace('-', '_')}.py")]


def run(command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    """A client's program, told of nothing but what it is given. It reports to nobody that it was used."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    quiet = {"MCP_USE_ANONYMIZED_TELEMETRY": "false", "AGNO_TELEMETRY": "false", "NO_COLOR": "1"}
    return subprocess.run(command, env={**kept, **quiet, **environ}, capture_output=True, text=True, timeout=RUN_S_MAX)


@functools.cache
def _node_problem() -> str | None:
    """Why the TypeScript SDKs cannot be run here; None when they can."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        return "there is no Node with npm"
    told = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=30).stdout
    if int(told.lstrip("v").split(".")[0] or 0) < NODE_MAJOR_MIN:
        return f"Node is older than {NODE_MAJOR_MIN}"
    NODE_FOLDER.mkdir(parents=True, exist_ok=True)
    with (NODE_FOLDER / "lock").open("w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = NODE_FOLDER / "installed"
        if stamp.exists() and tuple(stamp.read_text().split()) == NODE_PACKAGES:
            return None
        return _install_node_packages(stamp)


def _install_node_packages(stamp: Path) -> str | None:
    (NODE_FOLDER / "package.json").write_text('{"private": true}\n')
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error", *NODE_PACKAGES]
    try:
        done = subprocess.run(command, cwd=NODE_FOLDER, capture_output=True, text=True, timeout=INSTALL_S_MAX)
    except subprocess.TimeoutExpired:
        return "npm did not install them in time"
    if done.returncode:
        return f"npm could not install them: {done.stderr.strip()[-300:]}"
    stamp.write_text("\n".join(NODE_PACKAGES))
    return None


def node_folder() -> Path:
    """Where npm has put the packages; skips the test where they cannot be had."""
    problem = _node_problem()
    if problem is not None:
        pytest.skip(f"NOT TESTED: no packages of npm here: {problem}")
    return NODE_FOLDER


def node_command(program: Path) -> list[str]:
    """Runs a module where it finds the SDKs; skips the test where they cannot be had."""
    node_folder()
    module = NODE_FOLDER / program.name
    if program.parent != NODE_FOLDER:
        shutil.copyfile(program, module)
    return ["node", str(module)]
