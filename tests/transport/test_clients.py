"""The JSON-RPC door as clients of others see it: each is used as its own manual says.

What a client makes of a 204 shows in its notifications: all four send them, and jsonrpclib-pelix is the one that takes
nothing but 200 for an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonrpcclient
import jsonrpclib
import pjrpc.client.exceptions
import pytest
from jsonrpclib.jsonrpc import TransportError
from pjrpc.client.backend import httpx as pjrpc_httpx
from tinyrpc import RPCClient
from tinyrpc.client import RPCCall
from tinyrpc.exc import InvalidReplyError
from tinyrpc.protocols.jsonrpc import JSONRPCError, JSONRPCProtocol
from tinyrpc.transports.http import HttpPostClientTransport

from tests.conftest import Running

PATH = "/api/v1/jsonrpc"
HELLO = {"message": "Grüße \U0001f980"}


def times_run(service: Running) -> int:
    count: int = service.execute("count_calls")["result"]
    return count


class TestJsonrpcclient:
    """Makes and reads messages; the HTTP client is the caller's own."""

    @pytest.fixture
    def post(self, service: Running) -> Any:
        return lambda text: service.http.post(PATH, content=text)

    @pytest.mark.parametrize("params", [{"tool_id": "echo", "parameters": HELLO}, ("echo", HELLO)])
    @pytest.mark.parametrize(
        "request_json",
        [jsonrpcclient.request_json, jsonrpcclient.request_json_hex, jsonrpcclient.request_json_uuid],
    )
    def test_calls(self, post: Any, params: Any, request_json: Any) -> None:
        text = request_json("tools.execute", params=params)
        answer = jsonrpcclient.parse(post(text).json())
        assert isinstance(answer, jsonrpcclient.Ok) and answer.result["result"] == HELLO
        assert answer.id == json.loads(text)["id"]

    def test_gets_errors(self, post: Any) -> None:
        answer = jsonrpcclient.parse_json(post(jsonrpcclient.request_json("tools.get", ("nope",))).text)
        assert isinstance(answer, jsonrpcclient.Error)
        assert answer.code == -32004 and answer.data == {"error_type": "tool_not_found", "retryable": False}

    def test_notifies(self, service: Running, post: Any) -> None:
        before = times_run(service)
        response = post(jsonrpcclient.notification_json("tools.execute", {"tool_id": "count_calls"}))
        assert (response.status_code, response.content) == (204, b"")
        assert times_run(service) == before + 2

    def test_sends_batches(self, post: Any) -> None:
        batch = [
            jsonrpcclient.request("rpc.ping"),
            jsonrpcclient.notification("rpc.ping"),
            jsonrpcclient.request("no.such.method"),
        ]
        answers: Any = jsonrpcclient.parse(post(json.dumps(batch)).json())
        assert [type(answer) for answer in answers] == [jsonrpcclient.Ok, jsonrpcclient.Error]


class TestPjrpc:
    @pytest.fixture
    def client(self, service: Running) -> Iterator[pjrpc_httpx.Client]:
        with pjrpc_httpx.Client(service.url + PATH) as client:
            yield client

    def test_calls(self, client: Any) -> None:
        assert client("tools.execute", tool_id="echo", parameters=HELLO)["result"] == HELLO
        assert client.call("tools.execute", "echo", HELLO)["result"] == HELLO

    def test_gets_errors(self, client: Any) -> None:
        with pytest.raises(pjrpc.client.exceptions.JsonRpcError) as own:
            client("tools.get", tool_id="nope")
        assert own.value.code == -32004 and own.value.data == {"error_type": "tool_not_found", "retryable": False}
        with pytest.raises(pjrpc.client.exceptions.InvalidParamsError) as invalid:
            client("tools.get")
        assert invalid.value.data == {
            "error_type": "invalid_params",
            "retryable": False,
            "errors": [{"path": "tool_id", "message": "Field required", "type": "missing"}],
        }
        with pytest.raises(pjrpc.client.exceptions.MethodNotFoundError):
            client("no.such.method")

    def test_notifies(self, service: Running, client: Any) -> None:
        before = times_run(service)
        client.notify("tools.execute", tool_id="count_calls")
        assert times_run(service) == before + 2

    def test_sends_batches(self, client: Any) -> None:
        with client.batch() as batch:
            batch("rpc.ping")
            batch.notify("rpc.ping")
            batch("tools.execute", "echo", HELLO)
        pong, execution = batch.get_results()
        assert pong == {"pong": True} and execution["result"] == HELLO

    def test_gets_errors_in_batches(self, client: Any) -> None:
        with client.batch() as batch:
            batch("rpc.ping")
            batch("no.such.method")
        assert [answer.is_error for answer in batch.get_response()] == [False, True]

    def test_sends_batches_of_notifications(self, client: Any) -> None:
        with client.batch() as batch:
            batch.notify("rpc.ping")
            batch.notify("no.such.method")
        assert batch.get_response() is None


class TestTinyrpc:
    @pytest.fixture
    def client(self, service: Running) -> RPCClient:
        return RPCClient(JSONRPCProtocol(), HttpPostClientTransport(service.url + PATH))

    def test_calls(self, client: Any) -> None:
        tools = client.get_proxy("tools.")
        assert tools.execute(tool_id="echo", parameters=HELLO)["result"] == HELLO
        assert tools.execute("echo", HELLO)["result"] == HELLO

    def test_gets_errors(self, client: Any) -> None:
        with pytest.raises(JSONRPCError) as raised:
            client.call("tools.get", ["nope"], {})
        assert raised.value._jsonrpc_error_code == -32004  # it has no public name for it
        assert raised.value.data == {"error_type": "tool_not_found", "retryable": False}

    def test_notifies(self, service: Running, client: Any) -> None:
        before = times_run(service)
        client.call("tools.execute", ["count_calls"], {}, one_way=True)
        assert times_run(service) == before + 2

    def test_sends_batches(self, client: Any) -> None:
        answers = client.batch_call([RPCCall("rpc.ping", [], {}), RPCCall("no.such.method", [], {})])
        assert answers[0].result == {"pong": True} and "Method not found" in answers[1].error

    def test_cannot_read_the_nothing_after_a_batch_of_notifications(self, client: Any) -> None:
        # its batch_call ("use at your own peril") has no way to say that no answer is due
        with pytest.raises(InvalidReplyError):
            client.batch_call([("rpc.ping", [], {}, True)])


class NothingIsAnAnswer(jsonrpclib.jsonrpc.Transport):  # type: ignore[misc]
    """For jsonrpclib-pelix: 204 means what an empty 200 means to it. Its connection is not read to the end after
    anything but 200, so it cannot be used again."""

    def single_request(self, host: Any, handler: str, request_body: Any, verbose: Any = 0) -> Any:
        try:
            return super().single_request(host, handler, request_body, verbose)
        except TransportError as error:
            self.close()
            if error.errcode != 204:
                raise
            return ""


class TestJsonrpclibPelix:
    @pytest.fixture
    def client(self, service: Running) -> Iterator[Any]:
        client = jsonrpclib.ServerProxy(service.url + PATH)
        yield client
        client("close")()

    @pytest.fixture
    def taught(self, service: Running) -> Iterator[Any]:
        transport = NothingIsAnAnswer(jsonrpclib.config.DEFAULT)
        client = jsonrpclib.ServerProxy(service.url + PATH, transport=transport)
        yield client
        client("close")()

    def test_calls(self, client: Any) -> None:
        assert client.tools.execute(tool_id="echo", parameters=HELLO)["result"] == HELLO
        assert client.tools.execute("echo", HELLO)["result"] == HELLO

    def test_gets_errors(self, client: Any) -> None:
        with pytest.raises(jsonrpclib.ProtocolError) as raised:
            client.tools.get("nope")
        assert raised.value.args[0][0] == -32004

    def test_notifies_but_takes_204_for_a_failure(self, service: Running, client: Any) -> None:
        before = times_run(service)
        with pytest.raises(TransportError) as raised:
            client._notify.tools.execute(tool_id="count_calls")
        assert raised.value.errcode == 204
        assert times_run(service) == before + 2
        client("close")()
        assert client.rpc.ping() == {"pong": True}

    def test_notifies_when_told_what_204_is(self, service: Running, taught: Any) -> None:
        before = times_run(service)
        taught._notify.tools.execute(tool_id="count_calls")
        taught._notify.tools.execute("count_calls")
        assert times_run(service) == before + 3

    def test_sends_batches(self, client: Any) -> None:
        batch = jsonrpclib.MultiCall(client)
        batch.rpc.ping()
        batch._notify.rpc.ping()
        batch.tools.execute(tool_id="echo", parameters=HELLO)
        batch.nope()
        answers = batch()
        assert len(answers) == 3
        assert answers[0] == {"pong": True} and answers[1]["result"] == HELLO
        with pytest.raises(jsonrpclib.ProtocolError):
            answers[2]

    def test_sends_batches_of_notifications_when_told_what_204_is(self, taught: Any) -> None:
        batch = jsonrpclib.MultiCall(taught)
        batch._notify.rpc.ping()
        assert list(batch()) == []
