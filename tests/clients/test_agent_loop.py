"""The agent of docs/examples against a real service: with its script, and with endpoints in the shapes of providers."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.clients import environments
from tests.clients.conftest import Guarded
from tests.conftest import ROOT

EXAMPLE = [sys.executable, str(ROOT / "docs" / "examples" / "agent_loop.py")]

HELLO = {"message": "hi"}
ANSWERS: dict[str, list[Any]] = {
    "openai": [
        {
            "output": [
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "function_call", "call_id": "a", "name": "echo", "arguments": json.dumps(HELLO)},
                {"type": "function_call", "call_id": "b", "name": "no_such_tool", "arguments": "{}"},
            ]
        },
        {"output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Done"}]}]},
    ],
    "anthropic": [
        {
            "role": "assistant",
            "stop_reason": "tool_use",
            "content": [
                {"type": "text", "text": "One moment"},
                {"type": "tool_use", "id": "a", "name": "echo", "input": HELLO},
                {"type": "tool_use", "id": "b", "name": "no_such_tool", "input": {}},
            ],
        },
        {"role": "assistant", "stop_reason": "end_turn", "content": [{"type": "text", "text": "Done"}]},
    ],
    "gemini": [
        {
            "candidates": [
                {
                    "content": {
                        "role": "model",
                        "parts": [
                            {"functionCall": {"id": "a", "name": "echo", "args": HELLO}},
                            {"functionCall": {"id": "b", "name": "no_such_tool"}},
                        ],
                    }
                }
            ]
        },
        {"candidates": [{"content": {"role": "model", "parts": [{"text": "Done"}]}}]},
    ],
}
"""As the documents of the providers have them: two calls at once, then a text."""


class Endpoint:
    """A provider's API that answers by its list and keeps what it was sent."""

    def __init__(self, answers: list[Any]) -> None:
        self.received: list[Any] = []
        self.headers: dict[str, str] = {}
        left = iter(answers)
        own = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                own.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                own.headers = {name.lower(): value for name, value in self.headers.items()}
                content = json.dumps(next(left)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(params=sorted(ANSWERS))
def provider(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def endpoint(provider: str) -> Iterator[Endpoint]:
    found = Endpoint(ANSWERS[provider])
    yield found
    found.close()


def run(guarded: Guarded, provider: str, *arguments: str) -> list[str]:
    command = [*EXAMPLE, "--service", guarded.service.url, "--provider", provider, *arguments]
    done = environments.run(command, AGENTCORE_KEY=guarded.key, MODEL_KEY="secret")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_script_mends_its_call_and_repeats_the_result(guarded: Guarded, provider: str) -> None:
    wrong, mended, said = run(guarded, provider)
    assert '"code": -32602' in wrong and '"path": "formula"' in wrong
    assert mended == 'calculator({"expression": "6 * 7"}) -> {"value": 42}'
    assert said.startswith("The calculator says: ") and "42" in said


def test_what_a_provider_calls_is_run_and_told_back(guarded: Guarded, provider: str, endpoint: Endpoint) -> None:
    *calls, said = run(guarded, provider, "--endpoint", endpoint.url, "--model", "m-1", "Say hi")
    assert said == "Done"
    assert calls[0] == 'echo({"message": "hi"}) -> {"message": "hi"}' and "-32004" in calls[1]
    first, second = endpoint.received
    assert first["tools"] == second["tools"] == exported(guarded, provider)
    assert "secret" in {*endpoint.headers.values(), *endpoint.headers.get("authorization", "").split()}
    {"openai": check_openai, "anthropic": check_anthropic, "gemini": check_gemini}[provider](first, second)


def exported(guarded: Guarded, provider: str) -> Any:
    headers = {"Authorization": f"Bearer {guarded.key}"}
    answer = guarded.service.http.get(f"/api/v1/tools/export?format={provider}", headers=headers)
    return answer.json()["tools"]


def check_openai(first: Any, second: Any) -> None:
    assert first["model"] == "m-1" and first["input"] == [{"role": "user", "content": "Say hi"}]
    assert second["input"][1:4] == ANSWERS["openai"][0]["output"]
    told, refused = second["input"][4:]
    assert told == {"type": "function_call_output", "call_id": "a", "output": json.dumps(HELLO)}
    assert refused["call_id"] == "b" and json.loads(refused["output"])["data"]["error_type"] == "tool_not_found"


def check_anthropic(first: Any, second: Any) -> None:
    assert first["model"] == "m-1" and first["messages"] == [{"role": "user", "content": "Say hi"}]
    said, told = second["messages"][1:]
    assert said == {"role": "assistant", "content": ANSWERS["anthropic"][0]["content"]}
    assert told["role"] == "user" and [each["tool_use_id"] for each in told["content"]] == ["a", "b"]
    assert [each["is_error"] for each in told["content"]] == [False, True]
    assert json.loads(told["content"][0]["content"]) == HELLO


def check_gemini(first: Any, second: Any) -> None:
    assert first["contents"] == [{"role": "user", "parts": [{"text": "Say hi"}]}]
    said, told = second["contents"][1:]
    assert said == ANSWERS["gemini"][0]["candidates"][0]["content"]
    responses = [part["functionResponse"] for part in told["parts"]]
    assert [(each["id"], each["name"]) for each in responses] == [("a", "echo"), ("b", "no_such_tool")]
    assert responses[0]["response"] == {"output": HELLO} and "error" in responses[1]["response"]
