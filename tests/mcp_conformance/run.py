"""`make conformance`: the official MCP conformance suite against a real service, at both eras.

The suite and the Node that it needs come from npm into `var/conformance`, at fixed versions. Where they cannot be had,
it says so and ends well: a missing download is not a defect of this service. Everything that the suite finds and the
baseline beside this file does not explain is one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, end, start_service

SUITE = "@modelcontextprotocol/conformance@0.2.0-alpha.12"
"""An alpha, for what is tagged `latest` does not know 2026-07-28."""

NODE = "node@22.23.3"
NODE_MAJOR_MIN = 22

REVISIONS = ("2026-07-28", "2025-11-25")
HERE = Path(__file__).parent
FOLDER = ROOT / "var" / "conformance"

INSTALL_S_MAX = 300
RUN_S_MAX = 300


def main() -> int:
    """0: nothing unexpected, or not tried; 1: something unexpected."""
    problem = install()
    if problem:
        print(f"\n*** MCP CONFORMANCE NOT RUN: {problem} ***\n", file=sys.stderr)
        return 0
    service = start_service(TOOL_MODULES="tests.mcp_fixtures")
    try:
        failed = [revision for revision in REVISIONS if not conforms(service.url, revision)]
    finally:
        end(service)
    print(f"unexpected at {', '.join(failed)}" if failed else "nothing unexpected")
    return 1 if failed else 0


def install() -> str | None:
    """Why the suite cannot be run here; None when it can."""
    if shutil.which("npm") is None:
        return "there is no npm"
    wanted = [SUITE] if node_is_new_enough() else [SUITE, NODE]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "package.json").write_text('{"private": true}\n')
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error", *wanted]
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=INSTALL_S_MAX)
    except subprocess.TimeoutExpired:
        return "npm did not install it in time"
    if done.returncode != 0:
        return f"npm could not install it: {done.stderr.strip()[-500:]}"
    if not node_is_new_enough():
        return f"no Node {NODE_MAJOR_MIN} could be had"
    return None


def node_is_new_enough() -> bool:
    try:
        told = subprocess.run(["node", "--version"], env=environ(), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return told.returncode == 0 and int(told.stdout.lstrip("v").split(".")[0]) >= NODE_MAJOR_MIN


def environ() -> dict[str, str]:
    """The Node of npm comes first."""
    return {**os.environ, "PATH": f"{FOLDER / 'node_modules' / '.bin'}{os.pathsep}{os.environ['PATH']}"}


def conforms(url: str, revision: str) -> bool:
    """Whether every scenario of a revision, those that are not scored too, comes out as the baseline says."""
    print(f"\n=== {revision} ===", flush=True)
    command = ["conformance", "server", "--url", f"{url}/mcp", "--suite", "all", "--spec-version", revision]
    command += ["--expected-failures", str(HERE / f"{revision}.yml"), "-o", str(FOLDER / revision)]
    done = subprocess.run(command, cwd=FOLDER, env=environ(), capture_output=True, text=True, timeout=RUN_S_MAX)
    print(done.stdout[done.stdout.rfind("=== SUMMARY") :], done.stderr, flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
