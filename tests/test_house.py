"""The house: imports point down, nothing imports in a circle, and few know the service or its settings."""

from __future__ import annotations

import ast
import gc
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APP = ROOT / "app"

FLOORS = (
    {"cli"},
    {"doctor", "process"},
    {"transport"},
    {"service"},
    {"opening"},
    {"executor"},
    {"tools", "limits", "cache", "access", "execution_log"},
    {"migration"},
    {"telemetry", "egress", "bus"},
    {"clients"},
    {"breaker", "names"},
    {"calls", "settings", "stepping", "fairness", "reload", "off_loop"},
    {"errors", "database_url"},
)
"""From top to bottom; what stands on one floor does not import one another."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

MAY_READ_SETTINGS = {"transport/app.py", "transport/server.py"} | {
    *("service.py", "opening.py", "cli.py", "doctor.py", "process.py"),
}
"""Those of transport have them from the open service, and only ask what an address is."""

MAY_TOUCH_THE_SERVICE = {"transport/app.py", "transport/server.py", "transport/ops.py"}


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(APP.rglob("*.py")):
        inside = path.relative_to(APP)
        found.setdefault(inside.parts[0].removesuffix(".py"), []).append(path)
    return {room: paths for room, paths in found.items() if not room.startswith("__")}


def parsed(path: Path) -> ast.Module:
    """Without a collection in the middle: what that finds may be told with a traceback, which parses as well, and
    CPython 3.11 takes the depths of both for one (its issue 106905)."""
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def imported_modules(path: Path) -> set[str]:
    """Modules of `app` that a file imports anywhere, inside of functions and `if TYPE_CHECKING` too."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] == "app" and "." in name}


@pytest.mark.parametrize("room", sorted(rooms()))
def test_every_room_stands_on_a_floor_and_imports_only_from_below(room: str) -> None:
    assert room in FLOOR_OF, f"say in FLOORS where {room} stands"
    for path in rooms()[room]:
        for name in imported_modules(path):
            other = name.split(".")[1]
            if other != room and other in FLOOR_OF:
                assert FLOOR_OF[other] > FLOOR_OF[room], f"{path.relative_to(APP)} imports {name}, which is not below"


def importing(module: str) -> set[str]:
    """Files of `app` that import this module of it."""
    paths = (path for paths in rooms().values() for path in paths)
    return {str(path.relative_to(APP)) for path in paths if module in imported_modules(path)}


def test_of_transport_the_application_the_server_and_ops_alone_touch_the_service() -> None:
    assert {file for file in importing("app.service") if file.startswith("transport/")} == MAY_TOUCH_THE_SERVICE


def test_settings_are_read_by_the_service_and_the_command_line_alone() -> None:
    assert importing("app.settings") == MAY_READ_SETTINGS


def test_codec_and_dispatcher_know_no_web_framework() -> None:
    for name in ("request.py", "jsonrpc.py", "methods.py", "calling.py", "shapes.py", "openrpc.py"):
        tree = parsed(APP / "transport" / name)
        imported = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom | ast.Import)
        }
        assert not imported & {"fastapi", "starlette", "uvicorn", "httptools"}, name


def test_no_module_of_ours_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    modules = {
        ".".join(("app", *path.relative_to(APP).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in APP.rglob("*.py")
    }
    for name, path in modules.items():
        graph[name] = {other for other in imported_modules(path) if other in modules and other != name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_top_level_is_what_was_promised() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    found = {path.split("/")[0] for path in listed.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} == {
        *("pyproject.toml", "Dockerfile", "docker-compose.yml", "app", "migrations", "tests", "load", "k8s"),
        *("alembic.ini", "README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "docs"),
        "requirements",  # lock files
    }


def test_only_standard_words_name_modules() -> None:
    unwanted = {"utils", "util", "helpers", "helper", "base", "manager", "common", "misc", "handlers"}
    assert not {path.stem for path in APP.rglob("*.py")} & unwanted
