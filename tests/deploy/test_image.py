"""The Dockerfile as text: it agrees with service, locks and k8s/. What it makes is tested in test_container.py."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import __version__
from app.cli import DEFAULT_PORT
from app.settings import Settings, read_settings
from tests.conftest import ROOT, Running, service_environ
from tests.deploy.dockerfile import Stage, apply_copies, copies, in_context, make_context, stages
from tests.deploy.supply_chain import locked
from tests.servers import HOST

PYTHON_OF_BASE = re.compile(r"python:(\d+\.\d+)-slim-[a-z]+")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


@pytest.fixture
def build() -> Stage:
    return stages()[0]


@pytest.fixture
def final() -> Stage:
    return stages()[-1]


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    text = (ROOT / "k8s" / "base" / "deployment.yaml").read_text()
    found: dict[str, Any] = yaml.safe_load(text)["spec"]["template"]["spec"]
    return found


def test_both_stages_are_of_one_slim_python_that_is_promised(project: dict[str, Any]) -> None:
    (base,) = {stage.base for stage in stages()}
    found = PYTHON_OF_BASE.fullmatch(base)
    assert found, base
    assert f"Programming Language :: Python :: {found[1]}" in project["classifiers"]


def test_the_user_is_a_number_and_not_root(final: Stage, pod: dict[str, Any]) -> None:
    user, group = final.all("USER")[-1].split(":")
    assert int(user) == pod["securityContext"]["runAsUser"] > 0
    assert int(group) == pod["securityContext"]["runAsGroup"] > 0


def test_it_starts_what_kubernetes_starts_and_without_a_shell(final: Stage, pod: dict[str, Any]) -> None:
    container = pod["containers"][0]
    assert final.exec_form("ENTRYPOINT") == container["command"]
    assert final.exec_form("CMD") == container["args"]


def test_one_port_is_served_checked_and_named(final: Stage, pod: dict[str, Any]) -> None:
    ports = {
        int(final.the("EXPOSE")),
        int(final.exec_form("CMD")[-1]),
        pod["containers"][0]["ports"][0]["containerPort"],
    }
    assert ports == {DEFAULT_PORT}
    assert f"'127.0.0.1', {DEFAULT_PORT}" in final.the("HEALTHCHECK")


def test_the_image_of_kubernetes_and_of_make_is_the_labelled_version(
    final: Stage, pod: dict[str, Any], project: dict[str, Any]
) -> None:
    labels, version = final.pairs("LABEL"), final.pairs("ARG")["VERSION"]
    assert version == project["version"] == __version__
    assert labels["org.opencontainers.image.version"] == "${VERSION}"
    assert labels["org.opencontainers.image.description"] == project["description"]
    assert labels["org.opencontainers.image.base.name"] == final.base
    assert pod["containers"][0]["image"] == f"{project['name']}:{version}"
    said = subprocess.run(["make", "--dry-run", "image"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"--tag {project['name']}:{version}" in said and f"VERSION={version}" in said


def test_its_variables_are_settings_of_places_in_its_volume(final: Stage) -> None:
    variables = final.pairs("ENV")
    ours = {name: value for name, value in variables.items() if name.lower() in Settings.model_fields}
    assert set(variables) - set(ours) == {"PATH", "PYTHONDONTWRITEBYTECODE"}
    (volume,) = final.exec_form("VOLUME")
    settings = read_settings(ours)
    assert settings.database_url.startswith(f"sqlite+aiosqlite:///{volume}/")
    assert str(settings.journal_dir).startswith(f"{volume}/")


def test_it_has_no_secret_no_compiler_and_no_pip(build: Stage, final: Stage) -> None:
    for stage in (build, final):
        assert not re.search(r"apt|curl|wget|gcc|build-essential", " ".join(stage.all("RUN")))
        names = stage.pairs("ENV").keys() | stage.pairs("ARG").keys()
        assert not [name for name in names if re.search(r"KEY|SECRET|PASSWORD|TOKEN", name)]
    assert "pip uninstall" in final.all("RUN")[0]
    assert "--without-pip" in build.all("RUN")[0]


def test_everything_installed_is_locked_by_hash(build: Stage) -> None:
    installs = [text for text in build.all("RUN") if "install" in text.split()]
    for text in installs:
        locks = re.findall(r"-r (\S+)", text)
        ours = "--no-build-isolation --editable ." in text and "--no-deps" in text
        assert ours or ("--require-hashes" in text and locks)
    runtime, tools = (locked((ROOT / "requirements" / f"{name}.txt").read_text()) for name in ("runtime", "build"))
    assert set(tools) == {"poetry-core"} and "poetry-core" not in runtime


def test_the_context_has_what_is_copied_and_nothing_else(build: Stage, tmp_path: Path) -> None:
    patterns = (ROOT / ".dockerignore").read_text()
    sources = {source for found, _ in copies(build) for source in found}
    for source in sources:
        assert (ROOT / source).exists() and in_context(source, patterns), source
    for stranger in (".env", "var/agentcore.db", ".git/config", "tests/conftest.py", "app/__pycache__/x.pyc", "x.pyc"):
        assert not in_context(stranger, patterns), stranger
    make_context(tmp_path)
    copied = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert all(any(path.is_relative_to(source) for source in sources) for path in copied)


def test_what_is_copied_is_enough_to_run_and_to_migrate(build: Stage, tmp_path: Path) -> None:
    context, image = tmp_path / "context", tmp_path / "image"
    context.mkdir()
    make_context(context)
    apply_copies(build, context, image)
    environ = {**service_environ(tmp_path), "PYTHONPATH": ""}
    for arguments, expected in (("--help", "migrate"), ("migrate", "tables at"), ("tools list", "calculator")):
        command = [sys.executable, "-m", "app", *arguments.split()]
        done = subprocess.run(command, cwd=image, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
    where = [sys.executable, "-c", "import app; print(app.__file__)"]
    said = subprocess.run(where, cwd=image, env=environ, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(image / "app" / "__init__.py")


def shown_images(folder: Path) -> Iterator[list[Stage]]:
    """The images that docs/operations/container.md builds upon ours."""
    page = (ROOT / "docs" / "operations" / "container.md").read_text()
    for block in re.findall(r"^```dockerfile\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        path = folder / "Dockerfile"
        path.write_text(block)
        yield stages(path)


def test_images_with_tools_of_ones_own_are_built_upon_this_one(
    final: Stage, tmp_path: Path, project: dict[str, Any]
) -> None:
    module, package = shown_images(tmp_path)
    for shown in (module, package):
        assert shown[0].base == f"{project['name']}:{project['version']}"
        assert shown[-1].base in (shown[0].base, shown[0].name)
    (((_, place)),) = copies(module[-1])
    assert place.rstrip("/") == final.the("WORKDIR")
    tools = package[1]
    assert tools.base == final.base
    environments = {text for text in final.all("COPY") if text.endswith("/opt/venv")}
    assert environments == {"--from=build /opt/venv /opt/venv"}
    assert tools.all("COPY")[0] == "--from=service /opt/venv /opt/venv"
    assert tools.the("RUN").count("--python /opt/venv/bin/python") == 2
    assert package[-1].the("COPY") == "--from=tools /opt/venv /opt/venv"


def test_a_module_beside_what_is_copied_brings_its_tools(build: Stage, tmp_path: Path) -> None:
    context, image = tmp_path / "context", tmp_path / "image"
    context.mkdir()
    make_context(context)
    apply_copies(build, context, image)
    readme = (ROOT / "README.md").read_text()
    (source,) = re.findall(r"^```python\n(# my_tools\.py\n.*?)^```", readme, re.MULTILINE | re.DOTALL)
    (image / "my_tools.py").write_text(source)
    environ = {**service_environ(tmp_path), "PYTHONPATH": "", "TOOL_MODULES": "my_tools"}
    command = [sys.executable, "-m", "app", "tools", "list"]
    done = subprocess.run(command, cwd=image, env=environ, capture_output=True, text=True, timeout=60)
    assert "shout" in done.stdout, done.stderr


def healthcheck(final: Stage, port: int) -> int:
    """The exit code of the image's check, asked of another port."""
    *_, command = final.the("HEALTHCHECK").partition("CMD ")
    words: list[str] = yaml.safe_load(command)
    assert words[0] == "python" and "'/livez'" in words[-1]
    words = [sys.executable, *(word.replace(str(DEFAULT_PORT), str(port)) for word in words[1:])]
    return subprocess.run(words, stderr=subprocess.DEVNULL, timeout=30).returncode


def test_the_healthcheck_is_good_for_a_live_service_and_bad_without(final: Stage, service: Running) -> None:
    assert healthcheck(final, service.port) == 0
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        assert healthcheck(final, closed.getsockname()[1]) != 0


def test_a_command_that_waits_for_its_database_ends_by_sigterm(tmp_path: Path) -> None:
    """As process 1 of a container it would not, if it left the signal to the system: the code tells who ended it."""
    with socket.create_server((HOST, 0)) as silent:
        silent.settimeout(60)
        url = f"postgresql+asyncpg://nobody@{HOST}:{silent.getsockname()[1]}/none"
        command = [sys.executable, "-m", "app", "migrate"]
        process = subprocess.Popen(command, cwd=tmp_path, env={**service_environ(tmp_path), "DATABASE_URL": url})
        try:
            connection, _ = silent.accept()
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 128 + signal.SIGTERM
            connection.close()
        finally:
            process.kill()
            process.wait()


def test_every_script_for_ci_can_be_run() -> None:
    for script in (ROOT / ".ci").iterdir():
        assert os.access(script, os.X_OK), script.name
