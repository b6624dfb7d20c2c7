"""The workflows run our own targets, with pinned actions and the rights of a reader."""

from __future__ import annotations

import os
import re
import tomllib
from typing import Any

import yaml

from tests.conftest import ROOT

FILES = tuple(sorted((ROOT / ".github" / "workflows").glob("*.yml")))
TEXTS = "\n".join(path.read_text() for path in FILES)

Job = dict[str, Any]


def jobs() -> dict[str, Job]:
    return {name: job for path in FILES for name, job in yaml.safe_load(path.read_text())["jobs"].items()}


def steps() -> list[dict[str, Any]]:
    return [step for job in jobs().values() for step in job["steps"]]


def commands(name: str) -> list[str]:
    return [step["run"] for step in jobs()[name]["steps"] if "run" in step]


def test_there_is_a_job_for_tests_clients_image_and_performance() -> None:
    assert jobs().keys() == {"test", "clients", "image", "performance"}
    assert {"make clients", "make conformance"} <= set(commands("clients"))
    assert {"make check", "make test"} <= set(commands("test"))
    assert {"make image", "make audit", "make sbom", ".ci/image"} <= set(commands("image"))
    assert "make bench" in commands("performance")


def test_what_they_run_exists() -> None:
    targets = set(re.findall(r"^\.PHONY: (\w+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in steps():
        run = step.get("run", "")
        assert set(re.findall(r"\bmake (\w+)", run)) <= targets, run
        for script in re.findall(r"\.ci/[\w-]+", run):
            assert os.access(ROOT / script, os.X_OK), script


def test_actions_are_pinned_by_commit_with_their_version_beside_it() -> None:
    used = re.findall(r"uses: (.*)", TEXTS)
    assert len(used) == len([step for step in steps() if "uses" in step])
    for one in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one), one
    by_action: dict[str, set[str]] = {}
    for one in used:
        by_action.setdefault(one.split("@")[0], set()).add(one)
    assert all(len(pins) == 1 for pins in by_action.values()), "one version of each"


def test_they_may_read_and_nothing_more() -> None:
    for path in FILES:
        whole = yaml.safe_load(path.read_text())
        assert whole["permissions"] == {"contents": "read"}
        assert not [name for name, job in whole["jobs"].items() if "permissions" in job]
    assert "pull_request_target" not in TEXTS and "secrets." not in TEXTS
    for step in steps():
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_nothing_from_outside_gets_into_a_shell() -> None:
    assert not [step["run"] for step in steps() if "${{" in step.get("run", "")]


def test_every_promised_python_is_tested_and_no_job_runs_for_ever() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = re.findall(r"Python :: (\d+\.\d+)", "\n".join(project["classifiers"]))
    assert jobs()["test"]["strategy"]["matrix"]["python"] == promised
    assert all(job["timeout-minutes"] <= 60 for job in jobs().values())
    assert not [job["runs-on"] for job in jobs().values() if "latest" in job["runs-on"]]
