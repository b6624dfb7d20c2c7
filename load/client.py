"""A raw HTTP client in a process of its own: a plan comes in by stdin, what every call met goes out by stdout.

Closed loop: each connection asks again when it was answered. Open loop: calls are due by a schedule that does not wait
for the server, and a latency counts from when the call was due, so a server that stalls is charged for all who wait
(no coordinated omission). Knows no service: an answer is right when it holds the marker that the plan names.
`load/harness.py` starts it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import resource
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import orjson
import uvloop

RIGHT, REFUSED, FAILED = 0, 1, 2
"""How a call ended: as it should; with an error that says why; any other way."""

TICK_S = 0.0002
"""The pacing thread wakes at most this often: what falls due in between is sent together."""

END_S_MAX = 10.0
"""For calls that are under way when the schedule ends."""

OPENED_AT_ONCE = 128
"""Connections; more, and the listener's queue drops some, which come back after a second."""

SHOWN_BYTES = 600
"""Of a wrong answer."""

Asked = tuple[str, str]
"""A whole HTTP request, and what a right answer to it holds."""


@dataclass
class Plan:
    """What to send. With `phases`, (calls a second, seconds) one after another, else a closed loop for `seconds`."""

    port: int
    requests: list[Asked]
    connections: int
    seconds: float = 0.0
    phases: list[tuple[float, float]] = field(default_factory=list)
    connections_max: int = 0
    seed: int = 1


@dataclass
class Outcome:
    """A column per fact, one entry per call: µs after the beginning when it was due and what it took, how it ended and
    which of the plan's requests it was."""

    seconds: float
    due_us: Sequence[int]
    took_us: Sequence[int]
    ended: Sequence[int]
    kind: Sequence[int]
    late_p99_us: int
    """How late the client itself sent: its share of the latencies."""
    cpu_s: float
    first_wrong: str
    """What the first call that did not end right was answered; empty when there was no answer."""


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.transport: asyncio.Transport | None = None
        self.due = 0.0
        self.kind = -1
        self.received = b""
        self.ends_at = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def send(self, due: float, kind: int) -> None:
        self.due, self.kind, self.received, self.ends_at = due, kind, b"", 0
        assert self.transport is not None
        self.transport.write(self.client.requests[kind])

    def data_received(self, data: bytes) -> None:
        received = self.received = self.received + data if self.received else data
        if not self.ends_at:
            head_ends = received.find(b"\r\n\r\n")
            if head_ends < 0:
                return
            self.ends_at = head_ends + 4 + content_length(received[:head_ends])
        if len(received) >= self.ends_at:
            self.client.answered(self, received)

    def connection_lost(self, _: Exception | None) -> None:
        self.client.lost(self)


def content_length(head: bytes) -> int:
    at = head.lower().find(b"\r\ncontent-length:")
    return int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


class Client:
    """The connections, and what they met."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.requests = [request.encode() for request, _ in plan.requests]
        self.markers = [marker.encode() for _, marker in plan.requests]
        self.idle: deque[Connection] = deque()
        self.waiting: deque[tuple[float, int]] = deque()
        self.opened = self.under_way = 0
        self.kinds = itertools.cycle(range(len(self.requests)))
        self.due, self.took, self.late = array("d"), array("d"), array("d")
        self.ended, self.kind = array("b"), array("H")
        self.began = self.ends = 0.0
        self.first_wrong = ""
        self.all_done = asyncio.Event()
        self.schedule: deque[float] = deque()
        self.opening: set[asyncio.Task[None]] = set()

    async def run(self) -> Outcome:
        for _ in range(0, self.plan.connections, OPENED_AT_ONCE):
            await asyncio.gather(
                *(self.open() for _ in range(min(OPENED_AT_ONCE, self.plan.connections - self.opened)))
            )
        gc.collect()
        gc.freeze()
        self.began = time.perf_counter()
        if self.plan.phases:
            self.schedule.extend(arrivals(self.plan.phases, self.began, self.plan.seed))
            self.ends = self.began + sum(seconds for _, seconds in self.plan.phases)
            await self.open_loop()
        else:
            self.ends = self.began + self.plan.seconds
            self.closed_loop()
        try:
            async with asyncio.timeout(self.ends - time.perf_counter() + END_S_MAX):
                await self.all_done.wait()
        except TimeoutError:
            pass
        return self.outcome()

    async def open(self) -> None:
        self.opened += 1
        try:
            connected = asyncio.get_running_loop().create_connection(
                lambda: Connection(self), "127.0.0.1", self.plan.port
            )
            _, connection = await asyncio.wait_for(connected, END_S_MAX)
        except (OSError, TimeoutError):
            self.opened -= 1
            if not self.opened and not self.began:
                raise
            return
        self.free(connection)

    def closed_loop(self) -> None:
        now = time.perf_counter()
        connections = list(self.idle)
        self.idle.clear()
        for connection in connections:
            self.begin(connection, now, next(self.kinds))

    async def open_loop(self) -> None:
        """The loop's own timers count whole milliseconds, which would be most of what a quick call takes."""
        loop = asyncio.get_running_loop()
        paced = asyncio.Event()

        def pace() -> None:
            while self.schedule:
                time.sleep(max(TICK_S, self.schedule[0] - time.perf_counter()))
                sent = threading.Event()
                loop.call_soon_threadsafe(self.send_due, sent)
                sent.wait()
            loop.call_soon_threadsafe(paced.set)

        thread = threading.Thread(target=pace, name="pace")
        thread.start()
        await paced.wait()
        thread.join()
        self.check_done()

    def send_due(self, sent: threading.Event) -> None:
        try:
            self.send_what_is_due()
        finally:
            sent.set()

    def send_what_is_due(self) -> None:
        now = time.perf_counter()
        while self.schedule and self.schedule[0] <= now:
            due, kind = self.schedule.popleft(), next(self.kinds)
            if self.idle:
                self.late.append(time.perf_counter() - due)
                self.begin(self.idle.popleft(), due, kind)
            else:
                self.waiting.append((due, kind))
                if self.opened < self.plan.connections_max:
                    task = asyncio.get_running_loop().create_task(self.open())
                    self.opening.add(task)
                    task.add_done_callback(self.opening.discard)

    def begin(self, connection: Connection, due: float, kind: int) -> None:
        self.under_way += 1
        connection.send(due, kind)

    def answered(self, connection: Connection, received: bytes) -> None:
        now = time.perf_counter()
        if connection.kind < 0:
            return
        status = received[9:12]
        if status == b"200" and self.markers[connection.kind] in received:
            ended = RIGHT
        else:
            ended = REFUSED if b'"error":{"code":-320' in received else FAILED
            self.first_wrong = self.first_wrong or received[:SHOWN_BYTES].decode(errors="replace")
        self.note(connection, now, ended)
        if not self.plan.phases and now < self.ends:
            self.begin(connection, now, next(self.kinds))
        else:
            self.free(connection)
            self.check_done()

    def note(self, connection: Connection, now: float, ended: int) -> None:
        self.under_way -= 1
        self.due.append(connection.due)
        self.took.append(now - connection.due)
        self.ended.append(ended)
        self.kind.append(connection.kind)
        connection.kind = -1

    def free(self, connection: Connection) -> None:
        if self.waiting:
            self.begin(connection, *self.waiting.popleft())
        else:
            self.idle.append(connection)

    def lost(self, connection: Connection) -> None:
        self.opened -= 1
        if connection.kind >= 0:
            self.note(connection, time.perf_counter(), FAILED)
            self.check_done()
        elif connection in self.idle:
            self.idle.remove(connection)

    def check_done(self) -> None:
        if not self.under_way and not self.waiting and not self.schedule and time.perf_counter() >= self.ends - TICK_S:
            self.all_done.set()

    def outcome(self) -> Outcome:
        for due, kind in self.waiting:
            self.due.append(due)
            self.took.append(time.perf_counter() - due)
            self.ended.append(FAILED)
            self.kind.append(kind)
        unanswered = self.under_way
        late = sorted(self.late) or [0.0]
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Outcome(
            min(time.perf_counter(), self.ends) - self.began,
            [round((due - self.began) * 1e6) for due in self.due] + [0] * unanswered,
            [round(took * 1e6) for took in self.took]
            + [round((END_S_MAX + self.ends - self.began) * 1e6)] * unanswered,
            self.ended.tolist() + [FAILED] * unanswered,
            self.kind.tolist() + [0] * unanswered,
            round(late[len(late) * 99 // 100] * 1e6),
            usage.ru_utime + usage.ru_stime,
            self.first_wrong,
        )


def arrivals(phases: Sequence[tuple[float, float]], began: float, seed: int) -> Iterator[float]:
    """When calls are due: exponential gaps, as independent callers make them."""
    choose, ends = random.Random(seed), began
    for rate, seconds in phases:
        due, ends = ends, ends + seconds
        while (due := due + choose.expovariate(rate)) < ends:
            yield due


def main() -> None:
    raw = orjson.loads(sys.stdin.buffer.read())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(_run(Plan(**raw)))
    sys.stdout.buffer.write(orjson.dumps(asdict(outcome)))


async def _run(plan: Plan) -> Outcome:
    return await Client(plan).run()


if __name__ == "__main__":
    main()
