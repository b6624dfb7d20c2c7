"""The requests that load users make, and what a right answer to each looks like.

HTTP 200 is not success: a JSON-RPC error, an Execution that is not `success` and a wrong value are all failures, and
the reasons are short and few because Locust counts by them. Knows no Locust; `locustfile` sends what is made here.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from load.pages import HOST, PAGES, PORT_DEFAULT

PAGES_URL = os.environ.get("PAGES_URL", f"http://{HOST}:{PORT_DEFAULT}").rstrip("/")
"""Where the service finds the page server; its EGRESS_ALLOW must list the host and port."""

RATE_LIMIT = -32001
QUOTA = -32005


class WrongAnswer(Exception):
    """A request that failed, whatever its HTTP status said."""


class Refused(WrongAnswer):
    """A JSON-RPC error."""

    def __init__(self, code: int, kind: str, retry_after_s: float | None) -> None:
        super().__init__(f"refused: {code} {kind}")
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool, and whether a result is the one it must have."""

    tool_id: str
    parameters: dict[str, Any]
    is_right: Callable[[Any], bool]

    def params(self, agent_id: str, **more: Any) -> dict[str, Any]:
        """As `tools.execute` and its relatives take it."""
        return {"tool_id": self.tool_id, "parameters": self.parameters, "agent_id": agent_id, **more}

    def check(self, execution: Any) -> None:
        """Raises WrongAnswer unless the call succeeded with the right result."""
        if "status" not in execution:
            raise _refused(execution["error"])
        if execution["status"] != "success":
            raise WrongAnswer(f"{self.tool_id} {execution['status']}: {execution['error']['code']}")
        if execution["tool_id"] != self.tool_id or not self.is_right(execution["result"]):
            raise WrongAnswer(f"{self.tool_id}: wrong result")


@dataclass(frozen=True, slots=True)
class Request:
    """One POST. `name` is what it is counted under."""

    name: str
    method: str
    params: dict[str, Any]
    check: Callable[[Any], None]

    def body(self, request_id: int) -> str:
        request = {"jsonrpc": "2.0", "id": request_id, "method": self.method, "params": self.params}
        return orjson.dumps(request).decode()

    def judge(self, status_code: int, body: bytes | None, request_id: int) -> None:
        """Raises WrongAnswer unless the response is the right one, Refused where it is an error object."""
        if status_code != 200:
            raise WrongAnswer(f"HTTP {status_code}")
        try:
            answer = orjson.loads(body or b"")
            if "error" in answer:
                raise _refused(answer["error"])
            if answer["id"] != request_id:
                raise WrongAnswer("answer to another request")
            self.check(answer["result"])
        except orjson.JSONDecodeError:
            raise WrongAnswer("not JSON") from None
        except (KeyError, IndexError, TypeError, AttributeError):
            raise WrongAnswer("not of the shape that the contract gives") from None


def _refused(error: Any) -> Refused:
    details = error.get("data") or {}
    retry_after_ms = details.get("retry_after_ms")
    retry_after_s = None if retry_after_ms is None else retry_after_ms / 1e3
    return Refused(int(error["code"]), str(details.get("error_type", "")), retry_after_s)


def echo() -> Call:
    message = f"{random.getrandbits(64):016x} " + "The quick brown fox jumps over the lazy dog. " * random.randint(1, 8)
    return Call("echo", {"message": message}, lambda result: result["message"] == message)


def calculator() -> Call:
    a, b = random.randint(-10_000, 10_000), random.randint(1, 10_000)
    operation, value = random.choice([("add", a + b), ("-", a - b), ("multiply", a * b), ("/", a / b)])
    return Call("calculator", {"operation": operation, "a": a, "b": b}, lambda result: result["value"] == value)


def web_scrape() -> Call:
    path, page = random.choice(list(PAGES.items()))
    return Call(
        "web_scrape",
        {"url": PAGES_URL + path, "include_links": random.random() < 0.5},
        lambda result: result["title"] == page.title and page.lead in result["text"],
    )


DECK = (echo, calculator, echo, web_scrape, echo, calculator, echo, web_scrape, echo, calculator)
"""50 % echo, 30 % calculator, 20 % web_scrape. Dealt in turn: the mix is exact, also in a run of seconds."""


def deal() -> Iterator[Call]:
    """Calls of the mix, without end."""
    for make in itertools.cycle(DECK):
        yield make()


def execute(call: Call, agent_id: str, name: str | None = None) -> Request:
    """One call, counted under its tool."""
    return Request(name or call.tool_id, "tools.execute", call.params(agent_id), call.check)


def execute_batch(calls: Sequence[Call], agent_id: str) -> Request:
    """Right when each call is, and they come back in order."""

    def check(result: Any) -> None:
        if len(result["results"]) != len(calls):
            raise WrongAnswer("a batch of another length")
        for call, execution in zip(calls, result["results"], strict=True):
            call.check(execution)

    requests = [call.params(agent_id) for call in calls]
    return Request("execute_batch", "tools.execute_batch", {"requests": requests}, check)


def execute_parallel(first: Call, second: Call, agent_id: str) -> Request:
    """Two tasks at once, and one that waits for both and computes with the value of the first, a calculator's."""
    parameters = {"operation": "add", "a": {"$from": "first", "path": "value"}, "b": 1}

    def check(result: Any) -> None:
        results = result["results"]
        first.check(results["first"])
        second.check(results["second"])
        value = results["first"]["result"]["value"] + 1
        Call("calculator", parameters, lambda last: last["value"] == value).check(results["last"])

    tasks = [
        first.params(agent_id, task_id="first"),
        second.params(agent_id, task_id="second"),
        Call("calculator", parameters, bool).params(agent_id, task_id="last", dependencies=["first", "second"]),
    ]
    return Request("execute_parallel", "tools.execute_parallel", {"tasks": tasks}, check)


def execute_with_fallback(primary: Call, fallback: Call, agent_id: str, falls_back: bool) -> Request:
    """Right when the one that was to answer did."""

    def check(result: Any) -> None:
        if result["used_fallback"] is not falls_back:
            raise WrongAnswer("fallback not used" if falls_back else "fallback used")
        (fallback if falls_back else primary).check(result["result"])

    params = {"primary": primary.params(agent_id), "fallback": fallback.params(agent_id)}
    return Request("execute_with_fallback", "tools.execute_with_fallback", params, check)


def division_by_zero() -> Call:
    """Fails by contract: its result is not a finite number."""
    return Call("calculator", {"operation": "divide", "a": 1, "b": 0}, lambda _: False)
