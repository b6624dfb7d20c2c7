"""`make setup` on a machine that is not as it should be: it says so, or mends what an earlier run left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make setup` reads, with nothing to install but an empty project."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "dev.txt").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "empty"\nversion = "1"\n'
    )
    (tmp_path / "backend.py").write_text(BACKEND)
    return tmp_path


BACKEND = """
import zipfile


def build_editable(folder, *_):
    with zipfile.ZipFile(f"{folder}/empty-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("empty-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: empty\\nVersion: 1\\n")
        wheel.writestr("empty-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("empty-1.dist-info/RECORD", "")
    return "empty-1-py3-none-any.whl"
"""


def set_up(checkout: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["make", "setup", f"PYTHON={python}"]
    return subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True)


def test_an_environment_that_was_interrupted_before_it_had_pip_is_made_anew(checkout: Path) -> None:
    venv.create(checkout / ".venv", with_pip=False)
    done = set_up(checkout)
    assert done.returncode == 0, done.stderr
    assert (checkout / ".venv" / "bin" / "pip").exists()


def test_an_environment_of_an_older_python_is_made_anew(checkout: Path) -> None:
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 1;; esac\n')
    python.chmod(0o755)
    assert set_up(checkout).returncode == 0 and python.is_symlink()


def test_an_environment_that_was_copied_or_moved_is_made_anew(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert set_up(checkout).returncode == 0
    copy = shutil.copytree(checkout, tmp_path_factory.mktemp("elsewhere") / "a copy", symlinks=True)
    assert set_up(copy).returncode == 0
    pip = subprocess.run([copy / ".venv" / "bin" / "pip", "--version"], capture_output=True, text=True)
    assert f"{copy}/.venv/" in pip.stdout


def test_an_environment_whose_python_went_away_is_made_anew(checkout: Path) -> None:
    assert set_up(checkout).returncode == 0
    python = checkout / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("no-such-python")
    assert set_up(checkout).returncode == 0 and python.exists()


def test_an_environment_that_is_where_it_was_made_or_is_a_link_is_kept(checkout: Path, tmp_path: Path) -> None:
    assert set_up(checkout).returncode == 0
    kept = checkout / ".venv" / "kept"
    kept.touch()
    assert set_up(checkout).returncode == 0 and kept.exists()
    environment = checkout / ".venv"
    linked = environment.rename(tmp_path / "shared")
    environment.symlink_to(linked)
    assert set_up(checkout).returncode == 0 and environment.is_symlink() and kept.exists()


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_a_python_that_is_too_old_or_none_is_told_and_nothing_is_made(checkout: Path, python: str) -> None:
    done = set_up(checkout, python)
    assert done.returncode != 0 and done.stderr.startswith("No Python >= 3.11 found.")
    assert not (checkout / ".venv").exists()
