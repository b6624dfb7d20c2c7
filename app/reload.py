"""`serve --reload`, for development: the service runs in a process of its own, which drains and starts anew when code,
tools or settings change. Knows files and processes; nothing of what they serve.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

DRAINED_S_MAX = 60.0
"""A run may take as long as its timeout; past this the old process is killed."""

DRAIN_ENVIRON = "DRAIN_SECONDS"
"""Where nobody has endpoints to remove, it is 0 unless somebody set it."""

SUFFIXES = (".py", ".yaml", ".yml", ".json", ".lua")

FILES_LOOKED_AT_MS = 1_000
"""Between two looks at single files: nothing tells of one that is made, or replaced as editors do it."""


Stamp = tuple[int, int, int]


class Watched(NamedTuple):
    """Folders by all the sources in them, files each by itself."""

    folders: Sequence[Path]
    files: Sequence[Path]


def watched_folders(tool_modules: Iterable[str]) -> list[Path]:
    """Our own code, and the modules that tools come from."""
    folders = {Path(__file__).parent}
    importlib.invalidate_caches()  # a module may be new
    for name in tool_modules:
        try:
            # The package at the top is found without running anything of it, so that a broken one is watched too.
            spec = importlib.util.find_spec(name.partition(".")[0])
        except (ImportError, ValueError):
            continue  # the service says what is wrong with it
        if spec is not None and spec.submodule_search_locations is not None:
            folders |= {Path(folder) for folder in spec.submodule_search_locations}
        elif spec is not None and spec.has_location and spec.origin is not None:
            folders.add(Path(spec.origin).parent)
    return sorted(folder.resolve() for folder in folders if folder.is_dir())


def serve_reloading(
    arguments: Sequence[str], watched: Callable[[], Watched], environ: Mapping[str, str] = os.environ
) -> int:
    """Run `agentcore-tools serve` with these arguments until a signal, which the service gets too; its exit code.

    `watched` is asked at each start: settings that changed may name other tools and another file."""
    child_environ = {**environ, DRAIN_ENVIRON: environ.get(DRAIN_ENVIRON) or "0"}
    stop = threading.Event()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, *_as_found(), "serve", *arguments], env=child_environ)  # noqa: S603

    found = watched()
    stamps = _stamps(found.files)
    child = start()

    def pass_on(number: int, frame: FrameType | None) -> None:
        stop.set()
        child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, pass_on)
    while changed := _changes(found.folders, stamps, stop):
        sys.stderr.write(f"agentcore-tools: {_named(sorted(changed))} changed, restarting\n")
        found = watched()
        stamps = _stamps(found.files)
        _end(child)
        child = start()
    return _end(child)


def _changes(folders: Iterable[Path], stamps: Mapping[Path, Stamp | None], stop: threading.Event) -> set[str]:
    """Names of files that were changed; waits for one. Empty when it is to stop."""
    from watchfiles import watch  # nobody else needs it

    for changes in watch(
        *folders,
        watch_filter=_is_source,
        stop_event=stop,
        raise_interrupt=False,
        rust_timeout=FILES_LOOKED_AT_MS,
        yield_on_timeout=True,
    ):
        if stop.is_set():
            break
        changed = {Path(path).name for _, path in changes}
        if changed := changed | {path.name for path, before in stamps.items() if _stamp(path) != before}:
            return changed
    return set()


def _as_found() -> tuple[str, ...]:
    """This package, found as it was for us: a folder `app` in the working directory is most likely somebody else's."""
    return ("-m", "app") if Path(__file__).parent.parent == Path.cwd() else ("-P", "-m", "app")


def _stamps(files: Iterable[Path]) -> dict[Path, Stamp | None]:
    """By which a file that was changed, replaced, made or taken away is told."""
    return {path: _stamp(path) for path in files}


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _is_source(change: object, path: str) -> bool:
    """What a running service was made of."""
    return path.endswith(SUFFIXES) and "__pycache__" not in path


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _end(child: subprocess.Popen[bytes]) -> int:
    """Drained, or killed after a while; one that has ended by itself is left as it is."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
    try:
        return child.wait(DRAINED_S_MAX)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
