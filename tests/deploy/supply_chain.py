"""`python -m tests.deploy.supply_chain audit|sbom FOLDER`: the packages of the image's lock, audited or listed.

Called by `.ci/supply-chain`, which installs both programs into FOLDER. They exit 0 when they looked at nothing:
pip-audit says "No known vulnerabilities found" of packages that its database did not answer for. So what they looked
at is counted, and anything that the lock names and they did not look at makes this exit 1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

LOCK = ROOT / "requirements" / "runtime.txt"
SBOM = ROOT / "dist" / "sbom.cdx.json"

PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?==([^\s;\\]+)[^\\\n]*", re.MULTILINE)

PROGRAM_S_MAX = 900.0

SHOWN_MAX = 10
"""Of the packages that were not looked at: when the database is away it is all of them."""

Packages = Mapping[str, str]
"""Versions by normalised name."""


def normal(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: str) -> Packages:
    return {normal(name): version for name, version in PIN.findall(lock)}


def for_every_platform(lock: str) -> str:
    """The lock without conditions: a package for another Python or platform would be left out of the count."""
    return PIN.sub(lambda pin: f"{pin[1]}=={pin[2]} ", lock)


def missing(wanted: Packages, seen: Packages) -> list[str]:
    if not wanted:
        return ["the lock names no package"]
    unseen = [f"{name} {version} was not checked" for name, version in wanted.items() if seen.get(name) != version]
    more = [f"nor were {len(unseen) - SHOWN_MAX} more of {len(wanted)}"] if len(unseen) > SHOWN_MAX else []
    return unseen[:SHOWN_MAX] + more


def audit_problems(lock: str, report: Mapping[str, Any]) -> list[str]:
    """What is wrong by pip-audit's report, in its format `json`."""
    packages = report["dependencies"]
    seen = {normal(one["name"]): one["version"] for one in packages if "skip_reason" not in one}
    problems = missing(locked(lock), seen)
    if any("skip_reason" in one for one in packages):
        problems.append("the vulnerability database did not answer for them: can it be reached from here?")
    for one in packages:
        for found in one.get("vulns", ()):
            fixed = ", ".join(found["fix_versions"]) or "no version yet"
            problems.append(f"{one['name']} {one['version']}: {found['id']}, mended in {fixed}")
    return problems


def sbom_problems(lock: str, bom: Mapping[str, Any]) -> list[str]:
    """What is wrong with a CycloneDX document: each package of the lock is in it, with hashes."""
    components = {normal(one["name"]): one for one in bom.get("components", ())}
    problems = missing(locked(lock), {name: one["version"] for name, one in components.items()})
    return problems + [f"{name} has no hash" for name, one in components.items() if not _hashes(one)]


def _hashes(component: Mapping[str, Any]) -> list[Any]:
    """cyclonedx-py gives them with the distributions, of which a package has several."""
    references = component.get("externalReferences", ())
    return [*component.get("hashes", ()), *(one for reference in references for one in reference.get("hashes", ()))]


def report_of(command: list[str], report: Path) -> Mapping[str, Any] | None:
    """What a program wrote; None where it wrote nothing, and why is on stderr."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S_MAX)
    if not report.exists() or not report.stat().st_size:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
        print(f"{Path(command[0]).name}: {said[-1]}", file=sys.stderr)
        return None
    read: Mapping[str, Any] = json.loads(report.read_text())
    return read


def audit(programs: Path, lock: Path) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="agentcore-audit-") as folder:
        whole, report = Path(folder) / "lock.txt", Path(folder) / "report.json"
        whole.write_text(for_every_platform(lock.read_text()))
        options = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
        command = [str(programs / "pip-audit"), *options, "--output", str(report), "--requirement", str(whole)]
        found = report_of(command, report)
    if found is None:
        return ["nothing was audited: the vulnerability database cannot be reached, or refused the question"]
    return audit_problems(lock.read_text(), found)


def sbom(programs: Path, lock: Path, to: Path = SBOM) -> list[str]:
    to.parent.mkdir(exist_ok=True)
    to.unlink(missing_ok=True)
    options = ["--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible", "--of", "JSON", "--output-file"]
    found = report_of([str(programs / "cyclonedx-py"), "requirements", *options, str(to), str(lock)], to)
    return ["no list was made"] if found is None else sbom_problems(lock.read_text(), found)


def main(action: str, folder: str) -> int:
    count = len(locked(LOCK.read_text()))
    problems = {"audit": audit, "sbom": sbom}[action](Path(folder), LOCK)
    if problems:
        print(f"{action} of {LOCK.name} failed:", *problems, sep="\n  ", file=sys.stderr)
        return 1
    if action == "audit":
        print(f"audit: {count} packages of {LOCK.name}, all of them checked, no known vulnerability")
    else:
        print(f"sbom: {count} packages of {LOCK.name} in {SBOM.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
