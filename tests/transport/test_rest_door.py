"""The execute path of REST by the protocol lane and by ASGI: one door, one behaviour."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from app.telemetry.http_requests import HttpRequests
from tests.conftest import Running, Serve, end
from tests.transport.doors import DOORS, Door, http, start_door
from tests.transport.raw_http import Response

PATH = b"/api/v1/tools/%b/execute"


@pytest.fixture(scope="module", params=DOORS)
def shared(request: pytest.FixtureRequest) -> Iterator[Door]:
    door = start_door(request.param)
    yield door
    end(door.running)


@pytest.fixture
def door(shared: Door) -> Iterator[Door]:
    yield shared
    shared.hang_up()


def call(tool_id: bytes, body: Any = None, *headers: bytes, query: bytes = b"", verb: bytes = b"POST") -> bytes:
    written = body if isinstance(body, bytes) else json.dumps({"parameters": body or {}}).encode()
    return http(written, *headers, path=PATH % tool_id + query, verb=verb)


def twice(door: Door, request: bytes) -> tuple[Response, Response]:
    """The answer by ASGI, and the one by the door under test."""
    first, second = (door.connect().send(request).response() for _ in range(2))
    return first, second


def counted(running: Running) -> dict[tuple[str, str], float]:
    """Requests of the execute path by method and class of status."""
    found = {
        (method, status): running.metric(
            "http_requests_total", handler="/api/v1/tools/{tool_id}/execute", method=method, status=status
        )
        for method in ("POST", "GET", "other")
        for status in ("2xx", "4xx", "5xx")
    }
    return {labels: count for labels, count in found.items() if count}


def test_a_head_that_came_before_takes_the_lane(door: Door) -> None:
    first, second = twice(door, call(b"which_door"))
    assert (first.json["result"], second.json["result"]) == ("asgi", door.name)
    assert list(first.headers) == list(second.headers)


def test_a_tool_that_waits_and_one_with_labels_are_answered(door: Door) -> None:
    for _ in range(2):
        waited = door.connect().send(call(b"wait", {"seconds": 0.001, "value": 7})).response()
        assert waited.json["result"] == 7
        body = json.dumps({"parameters": {"message": "m"}, "agent_id": "a", "call_id": "c-1"}).encode()
        assert door.connect().send(call(b"echo", body)).response().json["result"] == {"message": "m"}


@pytest.mark.parametrize(
    ("tool_id", "body", "status", "code"),
    [
        (b"nobody_has_this", b'{"parameters":{}}', 404, -32004),
        (b"echo", b'{"parameters":{"message":1}}', 422, -32602),
        (b"echo", b'{"parameters":{},"more":1}', 422, -32602),
        (b"echo", b'{"parameters":[]}', 422, -32602),
        (b"echo", b"[1]", 422, -32602),
        (b"echo", b"{", 400, -32700),
    ],
)
def test_a_refusal_is_the_same_by_both_ways(door: Door, tool_id: bytes, body: bytes, status: int, code: int) -> None:
    errors = []
    for response in twice(door, call(tool_id, body)):
        assert response.status == status and list(response.json) == ["error"]
        errors.append(response.json["error"])
        errors[-1]["data"].pop("execution_id", None)
    assert errors[0] == errors[1] and errors[0]["code"] == code


def test_a_query_an_escape_and_a_key_in_a_header_take_asgi_each_time(door: Door) -> None:
    for _ in range(2):
        refused = door.connect().send(call(b"which_door", query=b"?a=b")).response()
        assert refused.status == 422 and refused.json["error"]["data"]["errors"][0]["path"] == "a"
        assert door.connect().send(call(b"which%5Fdoor")).response().json["result"] == "asgi"
        assert door.connect().send(call(b"a%2Fb")).response().status == 404
    keyed = call(b"echo", {"message": "m"}, b"Idempotency-Key: rest-door-" + door.name.encode())
    first, second = twice(door, keyed)
    assert "replayed" not in first.json and second.json["replayed"]
    assert first.json["execution_id"] == second.json["execution_id"]


def test_every_answer_is_counted_once(serve: Serve) -> None:
    running = serve(MAX_REQUEST_BYTES="100000")
    good, bad = call(b"echo", {"message": "m"}), call(b"echo", b"{")
    door = Door(running, "lane")
    for request in (good, good, good, bad, bad):
        door.connect().send(request).response()
    door.connect().send(call(b"echo", b"x" * 100_001)).response()  # cut by the protocol class: no request of REST
    door.connect().send(call(b"echo", b"{}", verb=b"PUT")).response()
    door.connect().send(call(b"echo", b"{}", verb=b"GET")).response()
    assert counted(running) == {("POST", "2xx"): 3, ("POST", "4xx"): 2, ("other", "4xx"): 1, ("GET", "4xx"): 1}
    handler = "/api/v1/tools/{tool_id}/execute"
    assert running.metric("http_request_duration_seconds_count", handler=handler, method="POST") == 5
    assert (
        running.metric("http_request_size_bytes_sum", handler=handler)
        == 3 * len(b'{"parameters": {"message": "m"}}') + 2
    )
    assert running.metric("http_response_size_bytes_count", handler=handler) == 7
    door.hang_up()


def test_without_a_credential_nothing_is_counted_and_the_challenge_is_there(serve: Serve) -> None:
    running = serve(AUTH_MODE="required")
    door = Door(running, "lane")
    for response in twice(door, call(b"echo", {"message": "m"})):
        assert response.status == 401 and response.headers["www-authenticate"].startswith("Bearer ")
        assert response.json["error"]["code"] == -32002
    assert counted(running) == {}
    door.hang_up()


def test_what_is_counted_reads_as_prometheus_wants_it() -> None:
    requests = HttpRequests()
    requests.observe("/a", "PURGE", "4xx", 0.002, 10, 20)
    requests.observe("/a", "GET", "2xx", 0.5, 1, 2)
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in requests.collect()
        for sample in family.samples
    }
    assert samples["http_requests_total", (("handler", "/a"), ("method", "other"), ("status", "4xx"))] == 1
    assert samples["http_request_size_bytes_sum", (("handler", "/a"),)] == 11
    assert samples["http_response_size_bytes_count", (("handler", "/a"),)] == 2
    by_route = "http_request_duration_seconds_bucket"
    assert samples[by_route, (("handler", "/a"), ("le", "0.025"), ("method", "GET"))] == 0
    assert samples[by_route, (("handler", "/a"), ("le", "1.0"), ("method", "GET"))] == 1
    assert samples["http_request_duration_highr_seconds_bucket", (("le", "0.0025"),)] == 1
    assert samples["http_request_duration_highr_seconds_sum", ()] == pytest.approx(0.502)
