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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType

DRAINED_S_MAX = 60.0
"""A run may take as long as its timeout; past this the old process is killed."""

DRAIN_ENVIRON = "DRAIN_SECONDS"
"""Where nobody has endpoints to remove, it is 0 unless somebody set it."""

SUFFIXES = (".py", ".yaml", ".yml", ".json", ".env", ".lua")


def watched_paths(tool_modules: Iterable[str], files: Iterable[Path | None]) -> list[Path]:
    """Our own code, the modules that tools come from, and files of settings that are there."""
    paths = {Path(__file__).parent}
    for name in tool_modules:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue  # the service says what is wrong with it
        if spec is not None and spec.origin is not None:
            paths.add(Path(spec.origin).parent)
    paths |= {path for path in files if path is not None and path.exists()}
    return sorted(path.resolve() for path in paths)


def serve_reloading(arguments: Sequence[str], paths: Sequence[Path], environ: Mapping[str, str] = os.environ) -> int:
    """Run `agentcore-tools serve` with these arguments until a signal, which the service gets too; its exit code."""
    child_environ = {**environ, DRAIN_ENVIRON: environ.get(DRAIN_ENVIRON) or "0"}
    stop = threading.Event()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "app", "serve", *arguments], env=child_environ)  # noqa: S603

    child = start()

    def pass_on(number: int, frame: FrameType | None) -> None:
        stop.set()
        child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    from watchfiles import watch  # nobody else needs it

    for changes in watch(*paths, watch_filter=_is_source, stop_event=stop, raise_interrupt=False):
        if stop.is_set():
            break
        sys.stderr.write(f"agentcore-tools: {_named(changes)} changed, restarting\n")
        _end(child)
        child = start()
    return _end(child)


def _is_source(change: object, path: str) -> bool:
    """What a running service was made of."""
    name = Path(path).name
    return name == ".env" or (name.endswith(SUFFIXES) and "__pycache__" not in path)


def _named(changes: Iterable[tuple[object, str]]) -> str:
    names = sorted({Path(path).name for _, path in changes})
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
