"""How every peer is served: as `load/bare.py` is, by uvicorn with uvloop and httptools. Prints its port."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
import uvloop


def serve(app: Any) -> None:
    """Until SIGTERM."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_served(app))


async def _served(app: Any) -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(app, loop="uvloop", http="httptools", ws="none", log_level="error", access_log=False)
    print(listener.getsockname()[1], flush=True)
    await uvicorn.Server(config).serve([listener])
