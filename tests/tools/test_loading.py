"""Tools are found where they are, and a source that cannot be loaded is reported by name and stops nobody else."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.service import open_service
from app.settings import read_settings
from app.tools.loading import LoadedTools, load_tools
from app.tools.tool import tool
from tests.conftest import places_in

DECLARATION = '''
from app.tools.tool import tool

@tool
async def {name}() -> str:
    """{name}."""
    return "{source}"
'''


@tool
async def builtin() -> str:
    """Built in."""
    return "built-in"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that Python imports from; what was imported from it is forgotten afterwards."""
    known = set(sys.modules)
    sys.path.insert(0, str(tmp_path))
    yield tmp_path
    sys.path.remove(str(tmp_path))
    for name in set(sys.modules) - known:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


Write = Callable[..., str]


@pytest.fixture
def module(folder: Path) -> Write:
    """Write a module and give its name."""

    def write(name: str, *tools: str, text: str = "") -> str:
        declared = "".join(DECLARATION.format(name=one, source=name) for one in tools)
        (folder / f"{name}.py").write_text(declared + text)
        return name

    return write


def install(folder: Path, distribution: str, **points: str) -> None:
    """What an installed package leaves on the disk to be found."""
    metadata = folder / f"{distribution}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (metadata / "entry_points.txt").write_text(f"[agentcore.tools]\n{lines}")


def problems(loaded: LoadedTools) -> dict[str, str]:
    return {problem.source: problem.reason for problem in loaded.problems}


def test_built_in_tools_modules_and_entry_points_are_all_found(folder: Path, module: Write) -> None:
    module("lt_first", "one", "two")
    module("lt_package", "three")
    install(folder, "lt-distribution", pack="lt_package")
    loaded = load_tools([builtin], ["lt_first"])
    assert sorted(loaded.tools) == ["builtin", "one", "three", "two"]
    assert loaded.problems == []


def test_an_entry_point_names_a_module_a_tool_or_a_list_of_tools(folder: Path, module: Write) -> None:
    module("lt_many", "one", "two", "three", text="SOME = [two, three]\n")
    install(folder, "lt-distribution", a="lt_many:one", b="lt_many:SOME")
    loaded = load_tools([], [])
    assert list(loaded.tools) == ["one", "two", "three"]


def test_the_first_of_an_id_stays_and_the_second_is_reported(module: Write) -> None:
    module("lt_first", "same", "own")
    module("lt_second", "same", "builtin", "other")
    loaded = load_tools([builtin], ["lt_first", "lt_second"])
    assert sorted(loaded.tools) == ["builtin", "other", "own", "same"]
    assert loaded.tools["builtin"] is builtin
    assert [(one.source, one.reason.split(";")[0]) for one in loaded.problems] == [
        ("lt_second", "tool id 'same' is taken"),
        ("lt_second", "tool id 'builtin' is taken"),
    ]


def test_a_tool_that_a_module_imports_from_another_is_no_second_tool(module: Write) -> None:
    module("lt_first", "shared")
    module("lt_second", "own", text="from lt_first import shared\nagain = shared\n")
    loaded = load_tools([], ["lt_first", "lt_second", "lt_first"])
    assert sorted(loaded.tools) == ["own", "shared"]
    assert loaded.problems == []


BAD_MODULES = {
    "raises": ("raise ValueError('reason')", "ValueError: reason"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "is no Python": ("this is no python", "SyntaxError: "),
    "misses a package": ("import there_is_no_such_package", "ModuleNotFoundError: No module named 'there_is_no_such"),
    "declares nothing": ("value = 1", "ValueError: no function there is decorated with @tool"),
    "declares badly": (
        "from app.tools.tool import tool\n@tool\nasync def undocumented() -> None: ...",
        "ToolDeclarationError: tool 'undocumented': needs a docstring",
    ),
    "yields": (
        'from app.tools.tool import tool\n@tool\nasync def numbers():\n    """Yield."""\n    yield 1',
        "ToolDeclarationError: tool 'numbers': must return its result, not yield",
    ),
    "raises without a text": (
        "class Silent(Exception):\n    def __str__(self): raise ValueError\nraise Silent",
        "Silent",
    ),
    "cancels": ("import asyncio; raise asyncio.CancelledError", "CancelledError: "),
    "floods": ("raise ValueError('x' * 10_000_000)", "ValueError: xxx"),
    "raises a group": ("raise BaseExceptionGroup('g', [SystemExit(1)])", "BaseExceptionGroup: g (1 sub-exception)"),
}


@pytest.mark.parametrize("kind", BAD_MODULES)
def test_a_module_that_does_not_load_is_reported_by_name_and_stops_nobody(
    kind: str, module: Write, caplog: pytest.LogCaptureFixture
) -> None:
    text, reason = BAD_MODULES[kind]
    module("lt_bad", text=text)
    module("lt_good", "good")
    loaded = load_tools([builtin], ["lt_bad", "lt_good"])
    assert sorted(loaded.tools) == ["builtin", "good"]
    assert list(problems(loaded)) == ["lt_bad"]
    assert problems(loaded)["lt_bad"].startswith(reason) and len(problems(loaded)["lt_bad"]) <= 2_000
    (event,) = caplog.records
    assert (event.levelno, event.getMessage(), vars(event)["source"]) == (logging.ERROR, "tools not loaded", "lt_bad")


@pytest.mark.parametrize("name", ["no_such_module", "", ".relative", "no such/name", "lt_missing.part"])
def test_a_name_that_is_no_module_is_reported(name: str, module: Write) -> None:
    module("lt_good", "good")
    loaded = load_tools([], [name, "lt_good"])
    assert list(loaded.tools) == ["good"]
    assert list(problems(loaded)) == [name]


def test_an_entry_point_that_does_not_load_is_reported_with_its_value(folder: Path, module: Write) -> None:
    module("lt_package", "good", text="count = 5\nmixed = [good, count]\n")
    install(
        folder,
        "lt-distribution",
        a="lt_package:nothing",
        b="no_such_module",
        c="lt_package:count",
        d="lt_package:mixed",
        e="not/a value",
    )
    loaded = load_tools([builtin], [])
    assert sorted(loaded.tools) == ["builtin", "good"]
    assert list(problems(loaded)) == [
        "a = lt_package:nothing",
        "b = no_such_module",
        "c = lt_package:count",
        "d = lt_package:mixed",
        "e = not/a value",
    ]


def test_an_interrupt_while_loading_ends_the_loading(module: Write) -> None:
    module("lt_bad", text="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_tools([], ["lt_bad"])


@pytest.mark.anyio
async def test_a_tool_whose_limits_cannot_hold_is_reported_and_the_others_are_there(tmp_path: Path) -> None:
    @tool(rate_limits=["10 per second"])
    async def misspelt() -> None:
        """Its rate is no rate."""

    @tool
    async def plain() -> None:
        """Nothing special."""

    async with open_service(read_settings(places_in(tmp_path)), extra_tools=[misspelt, plain]) as service:
        assert "plain" in service.registry.snapshot.tools
        assert "misspelt" not in service.registry.snapshot.tools
        (problem,) = service.load_problems
    assert problem.source == "misspelt" and "10 per second" not in problem.reason and "600/minute" in problem.reason
