"""The documents and the code say the same: settings, metrics, methods, errors, commands, links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.errors import FAILURES, REFUSALS
from app.settings import PROFILES, Settings
from app.tools.builtin import builtin_tools
from app.tools.tool import ToolSpec
from tests.conftest import ROOT, Running

DOCS = ROOT / "docs"


def table_rows(path: Path, heading: str | None = None) -> list[list[str]]:
    """Cells of every table row of a document, or of one section of it."""
    text = path.read_text()
    if heading is not None:
        text = text.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\\\)\|", row.strip().strip("|"))] for row in rows]


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
