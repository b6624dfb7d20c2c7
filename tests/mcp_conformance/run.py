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
    wanted = [SUITE] if node_is_new_enough(dict(os.environ)) else [SUITE, NODE]
    stamp = FOLDER / "installed"
    if not stamp.exists() or stamp.read_text().split() != wanted:
        problem = download(wanted)
        if problem:
            return problem
        stamp.write_text("\n".join(wanted))
    return None if node_is_new_enough(environ()) else f"no Node {NODE_MAJOR_MIN} could be had"


def download(wanted: list[str]) -> str | None:
    if shutil.which("npm") is None:
        return "there is no npm"
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    (FOLDER / "package.json").write_text('{"private": true}\n')
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error", *wanted]
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=INSTALL_S_MAX)
    except subprocess.TimeoutExpired:
        return "npm did not install it in time"
    return f"npm could not install it: {done.stderr.strip()[-500:]}" if done.returncode else None


def node_is_new_enough(environ: dict[str, str]) -> bool:
    node = shutil.which("node", path=environ.get("PATH"))
    if node is None:
        return False
    try:
        told = subprocess.run([node, "--version"], env=environ, capture_output=True, text=True, timeout=30)
        return told.returncode == 0 and int(told.stdout.lstrip("v").split(".")[0]) >= NODE_MAJOR_MIN
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False


def environ() -> dict[str, str]:
    """The Node of npm comes first."""
    path = f"{FOLDER / 'node_modules' / '.bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path}


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
