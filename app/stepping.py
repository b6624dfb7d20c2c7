"""Runs a coroutine's steps from callbacks of the loop, without a task, for as long as it needs none.

A task costs 3 µs of a call on Python 3.11: its making, a turn of the loop before it begins, its end. What needs to be
in a task, to have timeouts, groups or a cancellation of its own, awaits IN_TASK first. Knows nothing of calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from types import coroutine
from typing import Any

logger = logging.getLogger("app.stepping")

NEEDS_TASK = object()
"""What a coroutine yields to whoever steps it."""


class InTask:
    """Await it before anything that a task is needed for; in one, nothing happens."""

    def __await__(self) -> Generator[Any, None, None]:
        if asyncio.current_task() is None:
            yield NEEDS_TASK


IN_TASK = InTask()


class Now:
    """What is going on at this moment. Not a class's own attribute: to set one costs every look-up of a method."""

    __slots__ = ("stepping",)

    def __init__(self) -> None:
        self.stepping = False
        """A coroutine is being stepped, and not by a task."""


NOW = Now()


class Signal:
    """Done once, and then for good; it never fails. One for all who wait, so that a call costs no future of its own."""

    __slots__ = ("_asyncio_future_blocking", "_callbacks", "_loop", "done")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None, *, done: bool = False) -> None:
        self.done = done
        self._loop = loop  # kept by who makes many: asking for it costs Python 3.11 a system call
        self._callbacks: list[Callable[[Any], object]] = []
        self._asyncio_future_blocking = False

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Context | None = None) -> None:
        """Have it called with this signal, on the event loop: when it is done, or now when it is."""
        if self.done:
            callback(self)
        elif context is None:
            self._callbacks.append(callback)
        else:
            self._callbacks.append(lambda signal: context.run(callback, signal))

    async def wait(self) -> None:
        """Return when it is done. May be cancelled; others that wait do not notice."""
        if self.done:
            return
        if NOW.stepping:  # the stepper is called back by the signal itself: no future, no turn of the loop
            await _Directly(self)
            return
        future = (self._loop or asyncio.get_running_loop()).create_future()
        self._callbacks.append(lambda _: settle(future))
        await future

    def complete(self) -> None:
        """Called once, by its owner alone."""
        self.done = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # one's bug must not keep the others waiting
                logger.exception("callback of a signal failed")


class _Directly:
    """For a stepper, to which a signal is as good as a future."""

    __slots__ = ("_signal",)

    def __init__(self, signal: Signal) -> None:
        self._signal = signal

    def __await__(self) -> Generator[Signal, None, None]:
        self._signal._asyncio_future_blocking = True
        yield self._signal


def settle(future: asyncio.Future[None]) -> None:
    """End what somebody waits for, if somebody still does."""
    if not future.done():
        future.set_result(None)


class Stepper:
    """Steps one coroutine. `returned` or `raised` is called once, on the loop; a cancelled task is a CancelledError."""

    __slots__ = ("_context", "_coroutine", "_loop", "_tasks")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        self._loop = loop
        self._context = context
        """What the coroutine sets stays there."""
        self._tasks = tasks
        """Where its task is kept, should it need one: who stops the loop cancels them."""

    def start(self, steps: Coroutine[Any, Any, Any]) -> None:
        """Take the first steps now, up to the first thing that has to be waited for."""
        self._coroutine = steps
        self._context.run(self._step)

    def returned(self, value: Any) -> None:
        raise NotImplementedError

    def raised(self, error: BaseException) -> None:
        raise NotImplementedError

    def _step(self, _: Any = None) -> None:
        NOW.stepping = True
        try:
            awaited = self._coroutine.send(None)
        except StopIteration as end:
            NOW.stepping = False
            self.returned(end.value)
        except BaseException as error:
            NOW.stepping = False
            self.raised(error)
        else:
            NOW.stepping = False
            if awaited is NEEDS_TASK:
                self._go_on_in_task()
            elif awaited is None:
                self._loop.call_soon(self._step, context=self._context)
            elif getattr(awaited, "_asyncio_future_blocking", None):
                awaited._asyncio_future_blocking = False
                awaited.add_done_callback(self._step, context=self._context)
            else:
                self._coroutine.close()
                self.raised(RuntimeError(f"awaited a {type(awaited).__name__}, which is no future"))

    def _go_on_in_task(self) -> None:
        task = asyncio.Task(_rest(self._coroutine), loop=self._loop, name="stepped", context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            self._coroutine.close()  # it knows nothing of it yet when its task had not begun
            self.raised(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.raised(error)
        else:
            self.returned(task.result())


async def _rest(steps: Coroutine[Any, Any, Any]) -> Any:
    """A coroutine from where it stands. From Python 3.12 on a task takes no generator, declared as one or not."""
    return await _going_on(steps)


@coroutine
def _going_on(steps: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """What stands at an await cannot be awaited itself."""
    return (yield from steps)
