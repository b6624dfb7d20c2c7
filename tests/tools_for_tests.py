"""Tools that behave badly on purpose, and a few that make timing and order visible."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import anyio
from pydantic import Field

from app.tools.tool import ToolContext, ToolError, tool


@tool(category="custom")
async def wait(seconds: Annotated[float, Field(ge=0, le=60)], value: Any = None) -> Any:
    """Return the value after some seconds."""
    await asyncio.sleep(seconds)
    return value


@tool(category="custom", read_only=True, cache_ttl=60)
async def remembered(text: str) -> str:
    """Return the text; its results are kept."""
    return text


@tool(category="custom")
async def stubborn(seconds: float) -> str:
    """Swallow every cancellation until the seconds have passed."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        try:
            await asyncio.sleep(left)
        except asyncio.CancelledError:
            pass
    return "late"


@tool(category="custom")
def block_thread(seconds: float) -> str:
    """Hold a thread for some seconds."""
    threading.Event().wait(seconds)
    return "done"


POLL_S = 0.01
"""How soon a tool that waits for a file sees it. A file opens a gate in a service that takes no more calls."""


@tool(category="custom")
async def wait_for_file(path: str, value: Any = None) -> Any:
    """Return the value once there is such a file."""
    while not Path(path).exists():
        await asyncio.sleep(POLL_S)
    return value


@tool(category="custom", max_concurrent=1)
async def wait_alone_for_file(path: str) -> str:
    """Run alone, until there is such a file."""
    return str(await wait_for_file(path, "done"))


@tool(category="custom")
async def stubborn_until_file(path: str) -> str:
    """Swallow every cancellation until there is such a file."""
    while not Path(path).exists():
        try:
            await asyncio.sleep(POLL_S)
        except asyncio.CancelledError:
            pass
    return "late"


@tool(category="custom")
def block_thread_until_file(path: str) -> str:
    """Hold a thread until there is such a file."""
    while not Path(path).exists():
        threading.Event().wait(POLL_S)
    return "done"


@tool(category="custom")
async def print_lines(lines: int, text: str) -> int:
    """Print the text in so many different lines, on stdout and on stderr in turn."""
    for number in range(lines):
        print(number, text, file=(sys.stdout, sys.stderr)[number % 2])
    return lines


@tool(category="custom", timeout=0.1)
def print_in_thread(characters: int) -> None:
    """Print so much."""
    print("x" * characters, flush=True)


@tool(category="custom", timeout=0.1)
async def hang_in_the_default_pool() -> None:
    """Take every thread of the loop's default pool for ever."""
    threads_max = 32  # of any ThreadPoolExecutor that is not told otherwise
    await asyncio.gather(*(asyncio.to_thread(threading.Event().wait) for _ in range(threads_max)))


@tool(category="custom")
async def block_loop(seconds: float) -> str:
    """Hold the event loop for some seconds."""
    threading.Event().wait(seconds)
    return "done"


@tool(category="custom")
async def raise_exit() -> None:
    """Raise SystemExit."""
    sys.exit(3)


@tool(category="custom")
def raise_exit_in_thread() -> None:
    """Raise SystemExit in a thread."""
    sys.exit(3)


@tool(category="custom")
async def raise_exception() -> None:
    """Raise an exception whose text must not reach an agent."""
    raise ValueError("canary-7f3a password=hunter2")


@tool(category="custom")
async def cancel_itself() -> None:
    """Raise CancelledError unasked."""
    raise asyncio.CancelledError


@tool(category="custom")
async def fail_clearly(message: str = "The ticket is closed", retryable: bool = False) -> None:
    """Fail with a text and a code for the agent."""
    raise ToolError(message, code="TICKET_CLOSED", retryable=retryable, retry_after_ms=250 if retryable else None)


@tool(category="custom")
async def return_bad(kind: str) -> Any:
    """Return what JSON cannot hold."""
    cycle: list[Any] = []
    cycle.append(cycle)
    return {
        "nan": float("nan"),
        "infinity": [float("inf")],
        "bytes": b"\x00\xff",
        "cycle": cycle,
        "big integer": 2**70,
        "surrogate": "\ud800",
        "object": object(),
        "integer keys": {1: 2},
    }[kind]


@tool(category="custom")
async def return_long(characters: int) -> str:
    """Return a text of that length."""
    return "x" * characters


@tool(category="custom", cancel_on_disconnect=True)
async def wait_for_client(seconds: float) -> str:
    """Wait, but only as long as the client does."""
    await asyncio.sleep(seconds)
    return "done"


@tool(category="custom", max_concurrent=1)
async def one_at_a_time(seconds: float) -> str:
    """Run alone."""
    await asyncio.sleep(seconds)
    return "done"


@tool(category="custom", timeout=0.2)
async def short_timeout(seconds: float) -> str:
    """Wait, with a timeout of its own of 0.2 s."""
    await asyncio.sleep(seconds)
    return "done"


@tool(category="custom", read_only=True)
async def who_calls(context: ToolContext) -> dict[str, Any]:
    """Tell what the context holds."""
    return {
        "execution_id": context.execution_id,
        "tenant": context.caller.tenant,
        "subject": context.caller.subject,
        "agent_id": context.agent_id,
        "session_id": context.session_id,
        "trace_id": context.trace_id,
        "metadata": context.metadata,
        "remaining_s": context.remaining_s(),
    }


_calls = 0


@tool(category="custom")
async def count_calls() -> int:
    """How often this was called."""
    global _calls
    _calls += 1
    return _calls


@tool(category="custom", required_scopes=["never:granted"])
async def hidden() -> str:
    """Nobody may see this."""
    return "seen"


@tool(category="custom")
async def raise_exit_in_child() -> None:
    """Start a task that raises SystemExit, and wait for it."""
    async with asyncio.TaskGroup() as group:
        group.create_task(raise_exit())


@tool(category="custom")
async def end_background_task(name: str) -> int:
    """Cancel the service's own tasks of that name."""
    found = [task for task in asyncio.all_tasks() if task.get_name() == name]
    for task in found:
        task.cancel()
    return len(found)


@tool(category="custom")
def log_flood(lines: int) -> int:
    """Write so many different lines of a kilobyte into the log."""
    for number in range(lines):
        logging.getLogger("tests.flood").error(f"{number} {'x' * 1_000}")
    return lines


_met: dict[int, asyncio.Event] = {}
_arrived: dict[int, int] = {}


@tool(category="custom")
async def meet(count: int) -> int:
    """Return once that many calls are in here at the same time."""
    event = _met.setdefault(count, asyncio.Event())
    _arrived[count] = _arrived.get(count, 0) + 1
    if _arrived[count] == count:
        event.set()
    await event.wait()
    return count


@tool(category="custom")
async def cancel_current_task() -> str:
    """Cancel whatever task this runs in."""
    task = asyncio.current_task()
    if task is not None:
        task.cancel()
    return "done"


@tool(category="custom", timeout=0.2)
async def block_loop_past_the_deadline() -> str:
    """Hold the event loop for longer than the timeout, without an await."""
    threading.Event().wait(0.4)
    return "late"


@tool(category="custom")
async def cancel_a_group_that_has_not_begun() -> str:
    """Cancel a child of an anyio group before its first step."""
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 60)
        group.cancel_scope.cancel()
    return "done"


@tool(category="custom")
async def exit_in_callbacks() -> str:
    """Leave callbacks of every kind that exit."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(asyncio.sleep(0))
    task.add_done_callback(sys.exit)
    loop.call_soon(sys.exit, 3)
    await task
    await asyncio.sleep(0)
    ended = loop.create_future()
    loop.call_later(0, sys.exit, 3)
    loop.call_later(0.001, ended.set_result, None)
    await ended
    return "done"


@tool(category="custom")
async def exit_in_a_task_of_another_context() -> str:
    """Start a task with a context of its own; it starts one that exits."""

    async def exits() -> None:
        sys.exit(3)

    async def starts() -> None:
        await asyncio.gather(asyncio.create_task(exits()), return_exceptions=True)

    await asyncio.create_task(starts(), context=contextvars.Context())
    return "done"


@tool(category="custom")
async def say_and_hang() -> None:
    """Say so on stderr, then swallow every cancellation."""
    print("hanging", file=sys.stderr, flush=True)
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass


@tool(category="custom", read_only=True)
async def count_tasks() -> int:
    """Tasks of the event loop."""
    return len(asyncio.all_tasks())


@tool(category="custom")
async def write_line(message: str) -> str:
    """Write a line into the log."""
    logging.getLogger("tests.line").warning(message)
    await asyncio.sleep(0)
    return message


@tool(category="custom")
def write_line_in_thread(message: str) -> str:
    """Write a line into the log, from a thread."""
    logging.getLogger("tests.line").warning(message)
    return message


@tool(category="custom")
async def fetch(url: str, context: ToolContext, headers: dict[str, str] | None = None) -> int:
    """Send a GET request with these headers; its status."""
    response = await context.http.request("GET", url, headers=headers, timeout_s=10)
    return response.status_code


@tool(category="custom", version="2.1.0", cost=7)
async def dear() -> str:
    """Cost seven times what others do."""
    return "done"


@tool(category="custom", log_payloads="off")
async def log_nothing_of_it(value: Any = None) -> Any:
    """Return the value, of which no row says anything."""
    return value


@tool(category="custom", log_payloads="full")
async def log_all_of_it(value: Any = None) -> Any:
    """Return the value, which its row holds."""
    return value


@tool(category="custom", log_mode="buffered")
async def log_by_chance() -> str:
    """Be logged from memory alone."""
    return "done"


@tool(category="custom", log_mode="strict")
async def log_for_sure() -> str:
    """Be logged on disk before the answer."""
    return "done"
