"""Where tools come from: the built-ins, modules named in TOOL_MODULES, packages with the entry point.

A source that fails to load is reported by name and does not stop the others. Called once, at start.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from app.errors import clean_text
from app.telemetry.own_logging import keeping_logging
from app.tools.tool import FunctionTool, Tool

logger = logging.getLogger("app.tools")

ENTRY_POINT_GROUP = "agentcore.tools"


@dataclass(frozen=True, slots=True)
class LoadProblem:
    """A source of tools, or one tool of it, that is not there, and why."""

    source: str
    reason: str


@dataclass(slots=True)
class LoadedTools:
    """What `load_tools` found: tools by id, and what could not be had."""

    tools: dict[str, Tool] = field(default_factory=dict)
    problems: list[LoadProblem] = field(default_factory=list)

    def add(self, source: str, tools: Iterable[Tool]) -> None:
        for tool in tools:
            known = self.tools.get(tool.spec.id)
            if known is tool:
                continue  # imported from where it was declared
            if known is not None:
                self.report(
                    source, f"tool id {tool.spec.id!r} is taken; the first one stays, as do this source's others"
                )
            else:
                self.tools[tool.spec.id] = tool

    def report(self, source: str, reason: str, error: BaseException | None = None) -> None:
        self.problems.append(LoadProblem(source, reason))
        logger.error("tools not loaded", extra={"source": source, "reason": reason}, exc_info=error)


def load_tools(builtin: Iterable[Tool], modules: Iterable[str]) -> LoadedTools:
    """Built-ins first, then modules in their order, then entry points by name; the first of an id wins."""
    loaded = LoadedTools()
    loaded.add("built-in", builtin)
    for name in modules:
        _add_source(loaded, name, partial(importlib.import_module, name))
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        _add_source(loaded, f"{point.name} = {point.value}", point.load)
    return loaded


def _add_source(loaded: LoadedTools, source: str, load: Callable[[], Any]) -> None:
    try:
        with keeping_logging():
            found = load()
        loaded.add(source, list(tools_in(found)))
    except BaseException as error:  # foreign code runs on import; even sys.exit() there must not stop the rest
        if isinstance(error, KeyboardInterrupt):
            raise
        loaded.report(source, _reason(error), error)


def _reason(error: BaseException) -> str:
    try:
        return clean_text(f"{type(error).__name__}: {error}")
    except Exception:  # an exception of foreign code, with a __str__ of its own
        return type(error).__name__


def tools_in(found: Any) -> Iterator[Tool]:
    """Tools of a module (its global names, `__all__` or not), of one tool, or of an iterable of tools."""
    if isinstance(found, ModuleType):
        names = {id(value): value for value in vars(found).values() if isinstance(value, FunctionTool)}
        if not names:
            raise ValueError("no function there is decorated with @tool")
        yield from names.values()
    elif isinstance(found, FunctionTool):
        yield found
    else:
        yield from found
