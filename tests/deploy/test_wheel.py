"""What `pip install` of the project gives: whole without a checkout beside it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

BUILD = "import sys; from {backend} import build_sdist, build_wheel; print({hook}(sys.argv[1]))"


def build(hook: str, source: Path, into: Path) -> Path:
    into.mkdir(exist_ok=True)
    backend = tomllib.loads((source / "pyproject.toml").read_text())["build-system"]["build-backend"]
    command = [sys.executable, "-c", BUILD.format(backend=backend, hook=hook), str(into)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True, timeout=120)
    return into / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def files(folder: str) -> set[str]:
    """Of the checkout, as git would have them."""
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


def test_it_has_the_package_and_the_migrations_in_it(wheel: Path) -> None:
    ours = {name for name in names(wheel) if ".dist-info/" not in name}
    assert ours == files("app") | {f"app/{name}" for name in files("migrations")}


def test_the_wheel_of_a_source_distribution_is_the_same(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("build_sdist", ROOT, tmp_path)) as sources:
        sources.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert names(build("build_wheel", source, tmp_path / "again")) == names(wheel)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [("migrate", "tables at"), ("keys list --json", "[]"), ("doctor --port 0", "tables at"), ("tools list", "echo")],
)
def test_what_is_installed_works_in_an_empty_folder(arguments: str, says: str, wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    (site / "migrations" / "versions").mkdir(parents=True)  # of somebody else
    command = [sys.executable, "-P", "-m", "app", *arguments.split()]
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and says in done.stdout, done.stderr
