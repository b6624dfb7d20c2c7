"""Tasks that tools start for themselves: a SystemExit in one ends that task and not the process.

asyncio and uvloop re-raise SystemExit and KeyboardInterrupt of any task out of the event loop, and every other call
would end with it. Installed once per loop, by the runner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any

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
