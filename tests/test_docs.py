"""The documents and the code say the same: settings, metrics, methods, errors, commands, links."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from app.errors import FAILURES, REFUSALS
from app.settings import PROFILES, Settings
from app.tools.builtin import builtin_tools
from app.tools.tool import ToolSpec
from tests.conftest import ROOT, Running, service_environ
from tests.documents import DOCS, table_rows


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value in ((), None) else str(value)


def bounds(name: str) -> str:
    field = Settings.model_fields[name]
    low = next((shown(m.ge) for m in field.metadata if hasattr(m, "ge")), None)
    low = low or next((f"over {shown(m.gt)}" for m in field.metadata if hasattr(m, "gt")), None)
    high = next((shown(m.le) for m in field.metadata if hasattr(m, "le")), None)
    return f"{low} to {high}" if low else ""


def test_the_settings_page_is_the_settings() -> None:
    expected = [
        [f"`{name.upper()}`", shown(field.default), bounds(name), field.description]
        for name, field in Settings.model_fields.items()
    ]
    assert table_rows(DOCS / "settings.md", "## All settings")[1:] == expected


def test_the_profiles_page_is_the_profiles() -> None:
    expected = [
        [f"`{profile}`", ", ".join(f"`{name.upper()}={shown(value)}`" for name, value in values.items())]
        for profile, values in PROFILES.items()
    ]
    assert table_rows(DOCS / "settings.md", "## Profiles")[1:] == expected


def test_the_metrics_page_is_what_a_scrape_shows(service: Running) -> None:
    text = service.http.get("/metrics").text
    served = {
        (name, kind)
        for name, kind in re.findall(r"# TYPE (\S+) (\w+)", text)
        if not name.startswith(("process_", "python_"))
    }
    documented = {(row[0].strip("`").split("{")[0], row[1]) for row in table_rows(DOCS / "metrics.md")[1:]}
    assert documented == served


def test_the_labels_on_the_metrics_page_are_those_served(service: Running) -> None:
    service.execute("echo", {"message": "x"})
    service.http.get("/api/v1/tools")
    text = service.http.get("/metrics").text
    for row in table_rows(DOCS / "metrics.md")[1:]:
        name, _, labels = row[0].strip("`").rstrip("}").partition("{")
        sample = re.search(rf"^{name}(?:_bucket|_count)?{{(.*?)}} ", text, re.MULTILINE)
        served = set(re.findall(r"(\w+)=", sample[1])) - {"le"} if sample else set()
        assert served == set(filter(None, labels.split(","))), name


def test_the_methods_page_is_the_method_table(service: Running) -> None:
    documented = [row[0].strip("`") for row in table_rows(DOCS / "json-rpc.md", "## Methods")[1:]]
    assert documented == service.rpc("rpc.methods")["result"]["methods"]


def test_the_errors_page_is_the_taxonomy() -> None:
    rows = table_rows(DOCS / "errors.md")
    refusals = [[str(k.rpc_code), k.error_type, str(k.http_status), "yes" if k.retryable else "no"] for k in REFUSALS]
    assert [row[:4] for row in rows if row[0].startswith("-3")] == refusals
    failures = {kind.code: kind.category for kind in FAILURES}
    assert {row[0].split(",")[0]: row[1] for row in rows if row[0].isupper() or "TOOL_ERROR" in row[0]} == failures


def test_the_tools_page_is_what_is_built_in_and_what_a_declaration_takes() -> None:
    text = (DOCS / "tools.md").read_text()
    documented = [row[0].strip("`") for row in table_rows(DOCS / "tools.md", "## Built in")[1:]]
    assert documented == [tool.spec.id for tool in builtin_tools("https://example.org", None)]
    for name in ToolSpec.__dataclass_fields__:
        assert f"`{name}`" in text, name


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^\.PHONY: (\w+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)", listed)) == targets


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "load").glob("*.md")]), ids=str
)
def test_what_the_documents_name_exists(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"`((?:app|docs|tests|load|requirements|\.ci)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE):
        assert f".PHONY: {target}\n" in (ROOT / "Makefile").read_text(), target


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")]), ids=str)
def test_the_commands_that_the_documents_name_exist(page: Path) -> None:
    for command in set(re.findall(r"agentcore-tools ((?:tools )?[a-z]+)\b", page.read_text())):
        done = subprocess.run([sys.executable, "-m", "app", *command.split(), "--help"], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, command


def test_the_readmes_first_tool_runs_as_it_stands_and_passes_the_check_where_it_is_pasted(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (module,) = re.findall(r"```python\n(# my_tools\.py\n.*?)```", text, re.DOTALL)
    (called,) = re.findall(r"agentcore-tools (tools call shout .*)\n", text)
    (tmp_path / "my_tools.py").write_text(module)
    environ = service_environ(tmp_path, TOOL_MODULES="my_tools", PYTHONPATH=os.pathsep.join((str(ROOT), str(tmp_path))))
    command = [sys.executable, "-m", "app", *shlex.split(called)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert json.loads(done.stdout)["result"] == "HI!", done.stderr
    for check in ("check", "format --check"):
        command = [sys.executable, "-m", "ruff", *check.split(), "--no-cache", "--stdin-filename", "my_tools.py", "-"]
        done = subprocess.run(command, cwd=ROOT, input=module, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_types_are_checked_as_of_the_oldest_python_whichever_runs_the_check() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == f">={project['tool']['mypy']['python_version']}"
