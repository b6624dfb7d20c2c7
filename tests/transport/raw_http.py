"""What the tests of the wire share: a peer that speaks bytes, and a small application behind the bounded protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from app.transport.protocol import protocol_class
from app.transport.wire import HttpBounds, Wire

WAIT_S = 30.0
"""Longer than anything here takes; a test that reaches it has failed."""

GRAIN_S = 0.01
"""What uvloop's time, in whole milliseconds and read once a turn, may be behind that of the test."""

SHORT_S = 1.0
SHORT = HttpBounds(
    header_read_timeout_s=SHORT_S,
    body_read_timeout_s=SHORT_S,
    idle_timeout_s=SHORT_S,
    write_timeout_s=SHORT_S,
    linger_timeout_s=SHORT_S,
)

GET = b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /%b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b"
CHUNKED = b"POST /%b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def post(path: bytes, body: bytes) -> bytes:
    return POST % (path, len(body), body)


class Echo:
    """Tells what it was asked. The first segment of the path says how to behave."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.calls = 0
        self.seen: queue.Queue[str] = queue.Queue()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.calls += 1
        way = scope["path"].strip("/").split("/")[0]
        if way == "open":
            self.gate.set()
        if way in ("gated", "gated-before-reading"):
            await self.gate.wait()
        if way == "early":
            return await self.answer(send, b"early")
        body = await self.read(receive)
        if way in ("bytes", "streamed"):
            size = int(scope["path"].split("/")[2])
            await self.answer(send, *[bytes(size)] if way == "bytes" else [bytes(100_000)] * (size // 100_000))
            return self.seen.put("sent")
        if way == "listening":
            await self.listen(receive)
        if way == "kept":
            await self.gate.wait()
        told = {"method": scope["method"], "path": scope["path"], "body": body.decode("latin-1")}
        told["headers"] = [name.decode() for name, _ in scope["headers"]]
        return await self.answer(send, json.dumps(told).encode())

    async def read(self, receive: Any) -> bytes:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.seen.put("disconnect")
                raise ConnectionAbortedError("as frameworks do")
            body += message["body"]
            if not message["more_body"]:
                return body

    async def listen(self, receive: Any) -> None:
        """Asks again and again whether the client is there, as `Request.is_disconnected` does, until the gate opens."""
        self.seen.put("listening")
        gate = asyncio.create_task(self.gate.wait(), name="gate")
        while not gate.done():
            listener = asyncio.create_task(receive(), name="listener")
            await asyncio.wait([listener, gate], timeout=0.01)
            listener.cancel()
            await asyncio.wait([listener])

    async def answer(self, send: Any, *parts: bytes) -> None:
        headers = [(b"content-length", str(sum(map(len, parts))).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, part in enumerate(parts, 1):
            await send({"type": "http.response.body", "body": part, "more_body": number < len(parts)})


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    def __init__(self, port: int, receive_buffer_bytes: int = 0) -> None:
        self.sock = socket.socket()
        if receive_buffer_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.sock.settimeout(WAIT_S)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")

    def send(self, data: bytes) -> Peer:
        self.sock.sendall(data)
        return self

    def trickle(self, data: bytes) -> None:
        """Byte by byte, as fast as a patient attacker, until the server says something."""
        for byte in data:
            self.sock.sendall(bytes([byte]))
            if select.select([self.sock], [], [], SHORT_S / 10)[0]:
                return
        raise AssertionError("the server let all of it pass")

    def response(self, has_body: bool = True) -> Response:
        status = int(self.file.readline().split()[1])
        headers = dict(iter(self._header, ("", "")))
        body = self.file.read(int(headers.get("content-length", 0))) if has_body else b""
        return Response(status, headers, body)

    def _header(self) -> tuple[str, str]:
        name, _, value = self.file.readline().decode("latin-1").strip().partition(": ")
        return name.lower(), value

    def is_at_end(self) -> bool:
        """Whether the server closed in an orderly way: a reset raises."""
        return self.file.read(1) == b""

    def is_gone(self) -> bool:
        """Whether the server closed; a byte that crosses an idle connection's end is answered by a reset."""
        try:
            return self.is_at_end()
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close()


@dataclass
class Served:
    port: int
    wire: Wire
    app: Echo
    server: uvicorn.Server
    peers: list[Peer] = field(default_factory=list)

    def connect(self, receive_buffer_bytes: int = 0) -> Peer:
        self.peers.append(Peer(self.port, receive_buffer_bytes))
        return self.peers[-1]

    def ask(self, data: bytes) -> Response:
        return self.connect().send(data).response()

    def pass_a_deadline(self) -> None:
        """Returns when a deadline that began now, of a connection of its own, has passed."""
        peer = self.connect().send(b"GET / HT")
        assert peer.response().status == 408
        assert peer.is_at_end()

    def forget_peers(self) -> None:
        for peer in self.peers:
            peer.close()
        self.peers.clear()


@contextlib.contextmanager
def serving(wire: Wire, loop: str, send_buffer_bytes: int = 0) -> Iterator[Served]:
    app, listener = Echo(), socket.create_server(("127.0.0.1", 0), backlog=1024)
    if send_buffer_bytes:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    config = uvicorn.Config(
        app,
        http=protocol_class(wire),
        ws="none",
        loop=loop,
        lifespan="off",
        access_log=True,
        log_config=None,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
    thread.start()
    served = Served(listener.getsockname()[1], wire, app, server)
    try:
        yield served
    finally:
        served.forget_peers()
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert not wire.connections, "a connection outlived the server"


def eventually(is_so: Callable[[], bool]) -> None:
    pause, deadline = threading.Event(), time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def assert_refused(peer: Peer, status: int) -> Response:
    """One JSON answer that says close, then an orderly end."""
    response = peer.response()
    assert response.status == status
    assert response.headers["connection"] == "close"
    assert response.headers["content-type"] == "application/json"
    assert "date" in response.headers
    error = response.json["error"]
    assert error["data"]["error_type"] in ("invalid_request", "overloaded")
    assert error["message"]
    assert peer.is_at_end()
    return response


async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
    """The body of the answer."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)
