"""Tasks and callbacks that tools start for themselves: a SystemExit in one ends that one and not the process.

asyncio and uvloop re-raise SystemExit and KeyboardInterrupt of any task or callback out of the event loop, and every
other call would end with it. Tasks are contained by the runner, once per loop; callbacks by the loop itself, which the
command line makes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any

from app.names import ResolvingLoop

logger = logging.getLogger("app.tools")

in_tool = ContextVar("in_tool", default=False)
"""True in a tool's task and, as tasks inherit their context, in every task below it."""


def contain_exits(loop: asyncio.AbstractEventLoop) -> None:
    """From now on tasks of this loop that are started inside of a tool cannot end the loop."""
    loop.set_task_factory(_task)


def _task(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any] | Generator[Any, Any, Any], **options: Any
) -> asyncio.Task[Any]:
    if not in_tool.get():
        return asyncio.Task(coroutine, loop=loop, **options)
    if (context := options.get("context")) is not None:
        context.run(in_tool.set, True)  # a context of its own would forget where it comes from
    return asyncio.Task(Contained(coroutine), loop=loop, **options)


class LastingLoop(ResolvingLoop):
    """A loop that only what it was run for ends. What came out of a callback has left the loop in good order: the other
    callbacks of the turn are still due. A KeyboardInterrupt is let out, for it may be one."""

    def run_until_complete(self, future: Any) -> Any:
        task = asyncio.ensure_future(future, loop=self)
        while True:
            try:
                return super().run_until_complete(task)
            except SystemExit as error:
                if task.done():
                    raise
                logger.error("exit in a callback", exc_info=error)


class Contained(Coroutine[Any, Any, Any]):
    """A coroutine whose SystemExit becomes a RuntimeError. An `async def` around it would not do: cancelled before
    its first step, it would leave the inner one never awaited."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Coroutine[Any, Any, Any] | Generator[Any, Any, Any]) -> None:
        self._inner = inner

    def send(self, value: Any) -> Any:
        return _contained(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return _contained(self._inner.throw, *error)

    def close(self) -> None:
        self._inner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # anyio and reprs look at `cr_frame` and its like

    def __await__(self) -> Generator[Any, Any, Any]:
        raise TypeError("a task's own coroutine is awaited by way of the task")


def _contained(step: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return step(*arguments)
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"raised {type(error).__name__}") from error
