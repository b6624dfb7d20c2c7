"""A request leaves nothing for the garbage collector: at 20,000 requests/s, circles cost pauses of 30 ms."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

from app.service import Phase, open_service
from app.settings import read_settings
from app.transport.app import create_app
from app.transport.server import Server
from tests.conftest import places_in
from tests.transport.doors import execute, http, rpc
from tests.transport.raw_http import answered

REQUESTS = 200


@pytest.mark.parametrize(
    "call",
    [
        execute("echo", message="x"),
        execute("no_such_tool"),
        execute("echo", message=1),
        execute("calculator", expression="1/0"),
        rpc("nope"),
        b"{",
    ],
    ids=["success", "not found", "invalid", "failed", "no method", "no JSON"],
)
def test_a_call_leaves_no_garbage_in_circles(call: bytes, tmp_path: Path) -> None:
    request = http(call)

    async def circles() -> int:
        settings = read_settings({"DRAIN_SECONDS": "0", **places_in(tmp_path)})
        async with open_service(settings) as service:
            server: Any = Server(create_app(service), service, "127.0.0.1", 0)
            serving = asyncio.create_task(server.serve())
            while service.lifecycle.phase is not Phase.SERVING:  # start-up ends with a collection of its own
                await asyncio.sleep(0)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            await answered(reader, writer, request)
            gc.collect()
            for _ in range(REQUESTS):
                await answered(reader, writer, request)
            found = gc.collect()
            writer.close()
            server.stop()
            await serving
            return found

    gc.disable()
    gc.freeze()  # what other tests left: a look through it stops the loop past deadlines, and that leaves circles
    try:
        assert asyncio.run(circles()) < REQUESTS / 2  # one for each would be twice that, without a background task's
    finally:
        gc.enable()
        gc.unfreeze()
