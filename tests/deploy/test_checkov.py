"""checkov over what every overlay renders to and the Dockerfile: each finding is mended or explained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.deploy.kustomize import COMPONENTS, K8S, OVERLAYS, Object, needs_kustomize, render, render_with

CHECKOV = Path(sys.prefix) / "checkov" / "bin" / "checkov"

FRAMEWORKS = {"kubernetes", "dockerfile"}
"""What it looks for. Its reader of workflows takes ours for none and checks nothing."""

SPOILT = """
apiVersion: v1
kind: Pod
metadata: {name: spoilt, namespace: default}
spec: {containers: [{name: spoilt, image: spoilt, securityContext: {privileged: true}}]}
"""
"""Beside the others: a run that does not find fault with this has not looked."""


def rendered() -> Iterator[tuple[str, list[Object]]]:
    """Everything that can be installed, by a name for its file."""
    for overlay in OVERLAYS:
        yield overlay, render(K8S / "overlays" / overlay)
    in_production = yaml.safe_load((K8S / "overlays" / "production" / "kustomization.yaml").read_text())["components"]
    for component in set(COMPONENTS) - {Path(one).name for one in in_production} - set(OVERLAYS):
        yield f"production-with-{component}", render_with("production", component)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What checkov says, by framework."""
    if not CHECKOV.exists():
        pytest.skip("NOT TESTED: no checkov here. `.ci/checkov` installs it")
    needs_kustomize()
    folder = tmp_path_factory.mktemp("checkov")
    (folder / "k8s").mkdir()
    (folder / "k8s" / "spoilt.yaml").write_text(SPOILT)
    for name, objects in rendered():
        (folder / "k8s" / f"{name}.yaml").write_text(yaml.safe_dump_all(objects))
    shutil.copy(ROOT / "Dockerfile", folder)
    command = [CHECKOV, "--skip-download", "--quiet", "--output", "json", "-d", folder, "--framework", *FRAMEWORKS]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith(("{", "[")), done.stderr
    read = json.loads(done.stdout)
    found = {report["check_type"]: report for report in (read if isinstance(read, list) else [read])}
    assert found.keys() == FRAMEWORKS
    return found


def findings(reports: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    """Where each check failed, by its id."""
    failed: dict[str, set[str]] = {}
    for report in reports.values():
        for one in report["results"]["failed_checks"]:
            failed.setdefault(one["check_id"], set()).add(f"{one['check_name']}: {one['file_path']} {one['resource']}")
    return failed


def test_every_finding_is_explained_and_everything_explained_is_found(reports: dict[str, dict[str, Any]]) -> None:
    ours = {
        check: places
        for check, all_places in findings(reports).items()
        if (places := {place for place in all_places if "spoilt.yaml" not in place})
    }
    explained = yaml.safe_load((K8S / "checkov.yaml").read_text())
    assert {check: places for check, places in ours.items() if check not in explained} == {}
    assert explained.keys() - ours.keys() == set(), "explained and not found: take it out"


def test_it_has_looked_at_everything(reports: dict[str, dict[str, Any]]) -> None:
    assert all(report["summary"]["passed"] for report in reports.values())
    assert {"CKV_K8S_16"} < {check for check, places in findings(reports).items() if "spoilt.yaml" in "".join(places)}
