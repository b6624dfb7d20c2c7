"""Threads for the service's own work that would hold the event loop: packing a result, opening or reading a file.

Not the loop's default pool: that is everybody's, and a tool whose calls of `asyncio.to_thread` hang has soon taken all
of its threads. What runs here is short, unless its disk hangs.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

THREADS_MAX = 4
"""Packing is computing, for which there are few cores; the others are for files that a hung disk may keep."""

_threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="off-loop")


async def off_loop(work: Callable[..., T], *arguments: object) -> T:
    """What `work` comes to, in a thread. Raises OSError where the system has none left."""
    try:
        done = asyncio.get_running_loop().run_in_executor(_threads, work, *arguments)
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "no thread to work in") from error
    return await done
