"""An agent over plain HTTP: tools of this service, a model of any provider, no framework.

    python docs/examples/agent_loop.py --provider anthropic "What is 6 * 7?"

The definitions come from `GET /api/v1/tools/export`, the calls of the model go to `POST /api/v1/jsonrpc`, and what
came of them goes back to the model, until it answers in words. Without `--endpoint` the model is a script, so that it
runs offline; with it, that URL is asked as the provider's API (`--model`, key in `MODEL_KEY`). The key for this
service, where it wants one, is in `AGENTCORE_KEY`. Needs httpx.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import httpx

Json = dict[str, Any]

TURNS_MAX = 8
"""A model that only ever calls tools is stopped."""


class Call(NamedTuple):
    """What the model wants run. `id` is the provider's; it comes back with the outcome."""

    id: str
    name: str
    arguments: Json


class Outcome(NamedTuple):
    """What came of a call, for the model to read."""

    call: Call
    value: Any
    failed: bool


class Provider(Protocol):
    """A provider's shapes. A history is a list of what its API takes; it begins with the question."""

    format: str

    def question(self, text: str) -> Json: ...
    def request(self, model: str, tools: list[Json], history: list[Json]) -> Json: ...
    def headers(self, key: str) -> dict[str, str]: ...
    def said(self, answer: Json) -> list[Json]:
        """What the model said, as it goes into the history."""

    def text(self, answer: Json) -> str: ...
    def calls(self, answer: Json) -> list[Call]: ...
    def outcomes(self, outcomes: list[Outcome]) -> list[Json]: ...
    def script(self, call: Call | None, text: str) -> Json:
        """The answer of a stand-in: a call, or a text."""


class OpenAI:
    """The Responses API."""

    format = "openai"

    def question(self, text: str) -> Json:
        return {"role": "user", "content": text}

    def request(self, model: str, tools: list[Json], history: list[Json]) -> Json:
        return {"model": model, "tools": tools, "input": history}

    def headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def said(self, answer: Json) -> list[Json]:
        output: list[Json] = answer["output"]
        return output

    def text(self, answer: Json) -> str:
        messages = (item for item in answer["output"] if item["type"] == "message")
        return "".join(part.get("text", "") for item in messages for part in item["content"])

    def calls(self, answer: Json) -> list[Call]:
        called = (item for item in answer["output"] if item["type"] == "function_call")
        return [Call(item["call_id"], item["name"], json.loads(item["arguments"])) for item in called]

    def outcomes(self, outcomes: list[Outcome]) -> list[Json]:
        return [
            {"type": "function_call_output", "call_id": each.call.id, "output": json.dumps(each.value)}
            for each in outcomes
        ]

    def script(self, call: Call | None, text: str) -> Json:
        if call is None:
            content = [{"type": "output_text", "text": text, "annotations": []}]
            return {"output": [{"type": "message", "role": "assistant", "content": content}]}
        arguments = json.dumps(call.arguments)
        item = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": arguments}
        return {"output": [item]}


class Anthropic:
    """The Messages API."""

    format = "anthropic"

    def question(self, text: str) -> Json:
        return {"role": "user", "content": text}

    def request(self, model: str, tools: list[Json], history: list[Json]) -> Json:
        return {"model": model, "max_tokens": 1024, "tools": tools, "messages": history}

    def headers(self, key: str) -> dict[str, str]:
        return {"x-api-key": key, "anthropic-version": "2023-06-01"}

    def said(self, answer: Json) -> list[Json]:
        return [{"role": "assistant", "content": answer["content"]}]

    def text(self, answer: Json) -> str:
        return "".join(block["text"] for block in answer["content"] if block["type"] == "text")

    def calls(self, answer: Json) -> list[Call]:
        called = (block for block in answer["content"] if block["type"] == "tool_use")
        return [Call(block["id"], block["name"], block["input"]) for block in called]

    def outcomes(self, outcomes: list[Outcome]) -> list[Json]:
        blocks = [
            {
                "type": "tool_result",
                "tool_use_id": each.call.id,
                "content": json.dumps(each.value),
                "is_error": each.failed,
            }
            for each in outcomes
        ]
        return [{"role": "user", "content": blocks}]

    def script(self, call: Call | None, text: str) -> Json:
        if call is None:
            return {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn"}
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments}
        return {"content": [block], "stop_reason": "tool_use"}


class Gemini:
    """generateContent. The model is part of the URL there."""

    format = "gemini"

    def question(self, text: str) -> Json:
        return {"role": "user", "parts": [{"text": text}]}

    def request(self, model: str, tools: list[Json], history: list[Json]) -> Json:
        return {"tools": tools, "contents": history}

    def headers(self, key: str) -> dict[str, str]:
        return {"x-goog-api-key": key}

    def said(self, answer: Json) -> list[Json]:
        return [answer["candidates"][0]["content"]]

    def text(self, answer: Json) -> str:
        return "".join(part.get("text", "") for part in answer["candidates"][0]["content"]["parts"])

    def calls(self, answer: Json) -> list[Call]:
        parts = answer["candidates"][0]["content"]["parts"]
        called = [part["functionCall"] for part in parts if "functionCall" in part]
        return [Call(each.get("id", str(at)), each["name"], each.get("args", {})) for at, each in enumerate(called)]

    def outcomes(self, outcomes: list[Outcome]) -> list[Json]:
        parts = [
            {
                "functionResponse": {
                    "id": each.call.id,
                    "name": each.call.name,
                    "response": {"error" if each.failed else "output": each.value},
                }
            }
            for each in outcomes
        ]
        return [{"role": "user", "parts": parts}]

    def script(self, call: Call | None, text: str) -> Json:
        part: Json = {"text": text}
        if call is not None:
            part = {"functionCall": {"id": call.id, "name": call.name, "args": call.arguments}}
        return {"candidates": [{"content": {"role": "model", "parts": [part]}}]}


PROVIDERS: dict[str, Provider] = {provider.format: provider for provider in (OpenAI(), Anthropic(), Gemini())}

Model = Callable[[list[Json], list[Json]], Json]
"""Definitions and history to the provider's answer."""


class Tools:
    """The tools of the service, by its REST and JSON-RPC doors."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def definitions(self, target: str) -> list[Json]:
        response = self._http.get("/api/v1/tools/export", params={"format": target}).raise_for_status()
        tools: list[Json] = response.json()["tools"]
        return tools

    def run(self, calls: list[Call]) -> list[Outcome]:
        """All calls of one turn, in one batch. Answers may come in any order; ids say whose they are."""
        batch = [
            {
                "jsonrpc": "2.0",
                "id": at,
                "method": "tools.execute",
                "params": {"tool_id": call.name, "parameters": call.arguments, "agent_id": "agent-loop"},
            }
            for at, call in enumerate(calls)
        ]
        answers = self._http.post("/api/v1/jsonrpc", json=batch).raise_for_status().json()
        by_id = {answer["id"]: answer for answer in answers}
        return [self._outcome(call, by_id[at]) for at, call in enumerate(calls)]

    def _outcome(self, call: Call, answer: Json) -> Outcome:
        """A refusal and a failure are told to the model alike: what was wrong, and when to try again."""
        if "error" in answer:
            return Outcome(call, answer["error"], failed=True)
        execution = answer["result"]
        failed = execution["status"] != "success"
        return Outcome(call, execution["error"] if failed else execution["result"], failed)


def converse(provider: Provider, model: Model, tools: Tools, question: str) -> str:
    """The loop: what the model calls is run, until it answers in words."""
    definitions = tools.definitions(provider.format)
    history = [provider.question(question)]
    for _ in range(TURNS_MAX):
        answer = model(definitions, history)
        history += provider.said(answer)
        calls = provider.calls(answer)
        if not calls:
            return provider.text(answer)
        outcomes = tools.run(calls)
        for outcome in outcomes:
            print(f"{outcome.call.name}({json.dumps(outcome.call.arguments)}) -> {json.dumps(outcome.value)}")
        history += provider.outcomes(outcomes)
    raise SystemExit(f"The model did not come to an end in {TURNS_MAX} turns")


def scripted(provider: Provider) -> Model:
    """Stands in for a model: calls the calculator wrongly, mends the call, and repeats what came of it."""
    turns = iter(
        [Call("call-1", "calculator", {"formula": "6 * 7"}), Call("call-2", "calculator", {"expression": "6 * 7"})]
    )

    def model(tools: list[Json], history: list[Json]) -> Json:
        return provider.script(next(turns, None), f"The calculator says: {json.dumps(history[-1])}")

    return model


def asked(provider: Provider, endpoint: str, name: str, http: httpx.Client) -> Model:
    """A real model, by the API of its provider."""
    headers = provider.headers(os.environ.get("MODEL_KEY", ""))

    def model(tools: list[Json], history: list[Json]) -> Json:
        response = http.post(endpoint, json=provider.request(name, tools, history), headers=headers)
        answer: Json = response.raise_for_status().json()
        return answer

    return model


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="An agent over plain HTTP")
    parser.add_argument("question", nargs="?", default="What is 6 * 7?")
    parser.add_argument("--service", default="http://127.0.0.1:8001")
    parser.add_argument("--provider", choices=PROVIDERS, default="openai")
    parser.add_argument("--endpoint", help="URL of the provider's API; left out, the model is a script")
    parser.add_argument("--model", default="", help="name of the model at that endpoint")
    options = parser.parse_args(arguments)
    provider = PROVIDERS[options.provider]
    key = os.environ.get("AGENTCORE_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(timeout=60) as outside, httpx.Client(base_url=options.service, headers=headers) as http:
        real = options.endpoint
        model = asked(provider, real, options.model, outside) if real else scripted(provider)
        print(converse(provider, model, Tools(http), options.question))


if __name__ == "__main__":
    main(sys.argv[1:])
