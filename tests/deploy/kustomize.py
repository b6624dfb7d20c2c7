"""Renders k8s/ with a real kustomize: `kubectl kustomize` or `kustomize build`, whichever is on the PATH."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from tests.conftest import ROOT
from tests.servers import make_folder, remove_folder

K8S = ROOT / "k8s"

OVERLAYS = tuple(sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml")))
COMPONENTS = tuple(sorted(path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml")))

Object = dict[str, Any]


def needs_kustomize() -> None:
    """Skip, and say so: the summary of the run lists it."""
    if _command() is None:
        pytest.skip("NOT TESTED: neither kubectl nor kustomize here; install either to render k8s/")


@functools.cache
def _command() -> tuple[str, ...] | None:
    if kubectl := shutil.which("kubectl"):
        return kubectl, "kustomize"
    if kustomize := shutil.which("kustomize"):
        return kustomize, "build"
    return None


@functools.cache
def _rendered(folder: Path) -> bytes:
    """As JSON, which is read in a hundredth of the time of YAML."""
    command = _command()
    assert command is not None
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, f"{folder.name}: {done.stderr}"
    return orjson.dumps([one for one in yaml.safe_load_all(done.stdout) if one])


def render(folder: Path) -> list[Object]:
    """The objects of a kustomization, anew each time: a test may spoil them. Warnings count as errors."""
    objects: list[Object] = orjson.loads(_rendered(folder))
    return objects


def render_with(overlay: str, *components: str) -> list[Object]:
    """An overlay with components, as an operator's own kustomization would name them."""
    objects: list[Object] = orjson.loads(_rendered_with(overlay, components))
    return objects


@functools.cache
def _rendered_with(overlay: str, components: tuple[str, ...]) -> bytes:
    folder = make_folder("agentcore-kustomize-")
    text = {
        "resources": [os.path.relpath(K8S / "overlays" / overlay, folder.resolve())],
        "components": [os.path.relpath(K8S / "components" / name, folder.resolve()) for name in components],
        "namespace": "agentcore-tools",
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    try:
        return _rendered(folder)
    finally:
        remove_folder(folder)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def the(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The only one of its kind, or of its name."""
    found = [one for one in of_kind(objects, kind) if name is None or one["metadata"]["name"].startswith(name)]
    assert len(found) == 1, f"{len(found)} of {kind} {name or ''}"
    return found[0]


def pod_template(owner: Object) -> Object:
    template: Object = owner["spec"]["template"]
    return template
