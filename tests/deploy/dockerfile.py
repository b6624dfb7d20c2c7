"""Dockerfile and .dockerignore as data, as far as ours use them: no heredocs and no escapes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT


@dataclass
class Stage:
    """What one FROM begins: its base, its name and its instructions in order."""

    base: str
    name: str | None
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [text for word, text in self.steps if word == keyword]

    def the(self, keyword: str) -> str:
        (text,) = self.all(keyword)
        return text

    def exec_form(self, keyword: str) -> list[str]:
        """Raises ValueError for the shell form, whose shell would take the signals."""
        words: list[str] = json.loads(self.the(keyword))
        return words

    def pairs(self, keyword: str) -> dict[str, str]:
        """Of ENV, ARG and LABEL."""
        return dict(word.split("=", 1) for text in self.all(keyword) for word in shlex.split(text))


def stages(path: Path = ROOT / "Dockerfile") -> list[Stage]:
    found: list[Stage] = []
    for keyword, text in _instructions(path.read_text()):
        if keyword == "FROM":
            base, _, name = text.partition(" AS ")
            found.append(Stage(base, name or None))
        else:
            found[-1].steps.append((keyword, text))
    return found


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    whole = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", whole).splitlines():
        if line.strip():
            keyword, _, rest = line.strip().partition(" ")
            yield keyword, rest.strip()


def copies(stage: Stage) -> list[tuple[list[str], str]]:
    """Sources and destination of each COPY out of the build's folder."""
    found = [shlex.split(text) for text in stage.all("COPY")]
    return [(words[:-1], words[-1]) for words in found if not words[0].startswith("--from")]


def in_context(path: str, patterns: str) -> bool:
    """Whether .dockerignore lets a file through: the last pattern that holds it, or a folder above it, decides."""
    through = True
    for line in patterns.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#") and _holds(pattern.lstrip("!"), path):
            through = pattern.startswith("!")
    return through


def _holds(pattern: str, path: str) -> bool:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    expression = re.sub(r"\*\*/|\*\*|\*|[^*]+", lambda one: parts.get(one[0], re.escape(one[0])), pattern.strip("/"))
    return re.fullmatch(f"{expression}(?:/.*)?", path) is not None


def make_context(to: Path) -> None:
    """Copy what the engine would be sent of this checkout."""
    patterns = (ROOT / ".dockerignore").read_text()
    skipped = {".git", ".venv", "var", "dist"}
    for top in (one for one in ROOT.iterdir() if one.name not in skipped):
        for path in [top] if top.is_file() else top.rglob("*"):
            inside = path.relative_to(ROOT)
            if path.is_file() and in_context(str(inside), patterns):
                (to / inside).parent.mkdir(parents=True, exist_ok=True)
                (to / inside).write_bytes(path.read_bytes())


def apply_copies(stage: Stage, context: Path, workdir: Path) -> None:
    """What COPY makes of the context in the stage's working directory. Raises where a source is not there."""
    for sources, destination in copies(stage):
        for source in sources:
            origin, target = context / source, workdir / destination
            files = [origin] if origin.is_file() else [path for path in origin.rglob("*") if path.is_file()]
            assert files, f"COPY {source}: nothing is there, or .dockerignore keeps it out"
            for path in files:
                into = target / path.name if origin.is_file() and destination.endswith("/") else target
                into = into if origin.is_file() else target / path.relative_to(origin)
                into = into / path.name if into.is_dir() else into
                into.parent.mkdir(parents=True, exist_ok=True)
                into.write_bytes(path.read_bytes())
