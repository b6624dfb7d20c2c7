"""`python -m tests.deploy.checkov CHECKOV`: every finding about k8s/ is explained, and everything explained is found.

Called by `.ci/checkov`, which installs the program. Exit 1 where the two differ, or where nothing was checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.deploy.kustomize import COMPONENTS, K8S, OVERLAYS, Object, render, render_with

EXPLAINED = K8S / "checkov.yaml"


def rendered() -> Iterator[tuple[str, list[Object]]]:
    """Everything that can be installed, by a name for its file."""
    for overlay in OVERLAYS:
        yield overlay, render(K8S / "overlays" / overlay)
    in_production = yaml.safe_load((K8S / "overlays" / "production" / "kustomization.yaml").read_text())["components"]
    for component in set(COMPONENTS) - {Path(one).name for one in in_production} - set(OVERLAYS):
        yield f"production-with-{component}", render_with("production", component)


def findings(checkov: str, folder: Path) -> tuple[dict[str, set[str]], int]:
    """Where each check failed, by its id, and how many passed."""
    command = [
        checkov,
        "--skip-download",
        "--quiet",
        "--framework",
        "kubernetes",
        "--output",
        "json",
        "-d",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    report = json.loads(done.stdout)
    failed: dict[str, set[str]] = {}
    for one in report["results"]["failed_checks"]:
        failed.setdefault(f"{one['check_id']}", set()).add(f"{one['check_name']}: {one['file_path']} {one['resource']}")
    return failed, report["summary"]["passed"]


def main() -> None:
    explained: dict[str, str] = yaml.safe_load(EXPLAINED.read_text())
    with tempfile.TemporaryDirectory(prefix="agentcore-checkov-") as folder:
        for name, objects in rendered():
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump_all(objects))
        failed, passed = findings(sys.argv[1], Path(folder))
    for check in sorted(failed.keys() - explained.keys()):
        print(f"{check} is not explained:", *sorted(failed[check]), sep="\n  ")
    for check in sorted(explained.keys() - failed.keys()):
        print(f"{check} is explained and was not found: take it out of {EXPLAINED.name}")
    print(
        f"checkov: {passed} checks passed, {sum(map(len, failed.values()))} findings, {len(explained)} kinds explained"
    )
    sys.exit(0 if passed and failed.keys() == explained.keys() else 1)


if __name__ == "__main__":
    main()
