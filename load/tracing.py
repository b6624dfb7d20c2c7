"""What tracing costs a call: one echo at the application's door, in one process, rounds of each way interleaved.

`python -m load.tracing` prints the process's CPU for a call, exporter included, and that of the loop's thread alone:
medians, and medians of the differences to tracing off. The receiver is another process that reads and forgets.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import http.server
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple
from unittest import mock

import orjson
import uvloop
from starlette.types import ASGIApp

from app.service import Service, open_service
from app.settings import read_settings
from app.transport.app import create_app
from app.transport.rpc import RPC_PATH

CALLS = 4_000
ROUNDS = 20

CALL = {"tool_id": "echo", "parameters": {"message": "hello"}}
BODY = orjson.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": CALL})
NAMES = (b"host", b"user-agent", b"accept", b"content-type", b"content-length", b"accept-encoding")
HEADERS = [(name, b"127.0.0.1" if name == b"host" else b"x") for name in NAMES]

WAYS = {
    "off": {"ENABLE_TRACING": "false"},
    "ids only": {},
    "0 %": {"TRACE_SAMPLE_RATIO": "0"},
    "1 %": {"TRACE_SAMPLE_RATIO": "0.01"},
    "100 %": {"TRACE_SAMPLE_RATIO": "1"},
}


class Driven(NamedTuple):
    app: ASGIApp
    service: Service


class Sample(NamedTuple):
    """CPU of one call, µs."""

    process: float
    loop: float


def receive_forever(port: Any) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.value = server.server_address[1]
    server.serve_forever()


@contextlib.contextmanager
def receiver() -> Iterator[int]:
    """The port of one."""
    port = multiprocessing.Value("i", 0)
    process = multiprocessing.Process(target=receive_forever, args=(port,), daemon=True)
    process.start()
    while port.value == 0:
        time.sleep(0.01)
    yield port.value
    process.kill()
    process.join()


@contextlib.asynccontextmanager
async def driven(way: str, folder: str, port: int) -> AsyncIterator[Driven]:
    """A service of its own for each way; without a log, so that little else is measured."""
    exporting = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_MAX_QUEUE_SIZE": "200000",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    settings = {
        "DATABASE_URL": f"sqlite+aiosqlite:///{folder}/{list(WAYS).index(way)}.db",
        "ENABLE_DATABASE_LOGGING": "false",
        **WAYS[way],
    }
    with mock.patch.dict(os.environ, exporting if way.endswith("%") else {}):
        service = open_service(read_settings(settings), listen=("127.0.0.1", 8001))
        opened = await service.__aenter__()
    try:
        yield Driven(create_app(opened), opened)
    finally:
        await service.__aexit__(None, None, None)


async def drive(app: ASGIApp, calls: int) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Any) -> None:
        pass

    for number in range(calls):
        scope = {"type": "http", "method": "POST", "path": RPC_PATH, "headers": HEADERS, "scheme": "http"}
        await app(scope, receive, send)
        if number % 64 == 0:
            await asyncio.sleep(0)


async def measured(one: Driven, spans_by_now: int) -> Sample:
    """One round, to the end of the export of what it made, so that it pays for it."""
    process, loop = time.process_time(), time.thread_time()
    await drive(one.app, CALLS)
    loop = time.thread_time() - loop
    while sum(one.service.tracing.outcomes.values()) < spans_by_now:  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # nobody tells when the exporter's thread is done
    return Sample((time.process_time() - process) / CALLS * 1e6, loop / CALLS * 1e6)


async def main(rounds: int) -> None:
    samples: dict[str, list[Sample]] = {way: [] for way in WAYS}
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        port = stack.enter_context(receiver())
        ways = {way: await stack.enter_async_context(driven(way, folder, port)) for way in WAYS}
        for one in ways.values():
            await drive(one.app, CALLS)
        gc.collect()
        gc.freeze()
        for number in range(rounds):
            for way, one in ways.items():
                spans_by_now = 2 * CALLS * (number + 2) if way == "100 %" else 0
                samples[way].append(await measured(one, spans_by_now))
    show(samples)


def show(samples: dict[str, list[Sample]]) -> None:
    print(f"{'tracing':10}{'process us':>12}{'more':>8}{'loop us':>12}{'more':>8}")
    for way, of_way in samples.items():
        pairs = list(zip(of_way, samples["off"], strict=True))
        process = statistics.median(one.process for one in of_way)
        loop = statistics.median(one.loop for one in of_way)
        more = statistics.median(one.process - off.process for one, off in pairs)
        loop_more = statistics.median(one.loop - off.loop for one, off in pairs)
        print(f"{way:10}{process:12.2f}{more:8.2f}{loop:12.2f}{loop_more:8.2f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    return parser.parse_args()


if __name__ == "__main__":
    uvloop.run(main(parse().rounds))
