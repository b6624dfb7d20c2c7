"""A whole answer is one write: what the exchange tells the transport, and when."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.transport.exchange import DefaultHead, Exchange


class Recorder(asyncio.Transport):
    """A transport that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[bytes | str] = []

    def write(self, data: object) -> None:
        self.told.append(bytes(data))  # type: ignore[call-overload]

    def close(self) -> None:
        self.told.append("closed")


def exchange_over(told: Recorder) -> Exchange:
    flow = FlowControl(told)
    log = logging.getLogger("none")
    cycle = RequestResponseCycle({}, told, flow, log, log, False, [], asyncio.Event(), False, True, lambda: None)  # type: ignore[arg-type]
    return Exchange(cycle, told, DefaultHead(), set())


def test_a_head_goes_out_with_the_first_of_its_body_in_one_write() -> None:
    told = Recorder()
    exchange = exchange_over(told)
    exchange.write(b"head ")
    assert told.told == []
    exchange.write(b"body")
    exchange.write(b" more")
    assert told.told == [b"head body", b" more"]


def test_a_head_without_a_body_goes_out_before_the_connection_closes() -> None:
    told = Recorder()
    exchange = exchange_over(told)
    exchange.write(b"head")
    exchange.close()
    assert told.told == [b"head", "closed"]


def test_a_whole_answer_is_one_write_and_is_given_once() -> None:
    told = Recorder()
    exchange = exchange_over(told)
    assert exchange.answer(200, b"content-length: 2\r\n", b"{}")
    assert told.told == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"]
    assert not exchange.answer(200, b"content-length: 2\r\n", b"{}")
