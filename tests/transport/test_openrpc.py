"""The OpenRPC document, held against the service that serves it: what it says of a method is what the method does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft7Validator, Draft202012Validator

from app.errors import REFUSALS
from app.transport import shapes
from app.transport.methods import MethodSpec
from app.transport.openrpc import openrpc_document
from app.transport.request import RequestContext
from tests.conftest import Running

METHODS = (
    "tools.list",
    "tools.get",
    "tools.search",
    "tools.execute",
    "tools.execute_batch",
    "tools.execute_parallel",
    "tools.execute_with_fallback",
    "tools.cancel",
    "tools.get_execution_history",
    "tools.get_rate_limit_status",
    "rpc.ping",
    "rpc.version",
    "rpc.methods",
    "rpc.discover",
)

DIFFER = {"execution_id", "trace_id", "timestamp", "execution_time_ms", "overhead_ms", "total_time_ms"}
"""Members that no two calls have in common."""


@pytest.fixture(scope="module")
def document(service: Running) -> dict[str, Any]:
    return service.rpc("rpc.discover")["result"]  # type: ignore[no-any-return]


@pytest.fixture(params=METHODS)
def method(document: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    (found,) = (each for each in document["methods"] if each["name"] == request.param)
    return found  # type: ignore[no-any-return]


def fits(document: dict[str, Any], schema: Any, value: Any) -> None:
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


async def no_work(context: RequestContext, params: Any) -> bytes:
    return b""


def values_of(member: str, value: Any) -> Iterator[Any]:
    """Every value of that member, however deep."""
    if isinstance(value, dict):
        if member in value:
            yield value[member]
        for item in value.values():
            yield from values_of(member, item)
    elif isinstance(value, list):
        for item in value:
            yield from values_of(member, item)


def without_what_differs(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: None if name in DIFFER else without_what_differs(item) for name, item in value.items()}
    return [without_what_differs(item) for item in value] if isinstance(value, list) else value


def test_the_document_names_every_method_in_the_order_of_the_table(service: Running, document: dict[str, Any]) -> None:
    names = [method["name"] for method in document["methods"]]
    assert tuple(names) == METHODS
    assert names == service.rpc("rpc.methods")["result"]["methods"]
    assert set(document) == {"openrpc", "info", "servers", "methods", "components"}
    assert document["info"]["version"] == service.rpc("rpc.version")["result"]["version"]


def test_a_version_that_the_tools_of_openrpc_take_is_declared(document: dict[str, Any]) -> None:
    # @open-rpc/test-coverage 2.2 brings a validator that refuses whatever is newer than 1.2.6
    assert document["openrpc"] == "1.2.6"


def test_the_server_is_where_operators_say_that_it_is() -> None:
    ping = MethodSpec("rpc.ping", shapes.NoParams, shapes.Pong, None, "Whether the service answers", no_work)
    servers = openrpc_document([ping], "https://tools.example/agents")["servers"]
    assert [server["url"] for server in servers] == ["https://tools.example/agents/api/v1/jsonrpc"]


def test_every_reference_resolves_and_every_schema_is_one(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    references = set(values_of("$ref", document))
    assert references
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= set(schemas)
    for schema in [*values_of("schema", document["methods"]), *schemas.values()]:
        Draft202012Validator.check_schema(schema)
        Draft7Validator.check_schema(schema)  # the dialect of OpenRPC


def test_a_method_tells_its_params_its_result_and_its_errors(method: dict[str, Any]) -> None:
    assert method["summary"] and method["paramStructure"] == "either"
    assert set(method["result"]) == {"name", "schema"} and method["result"]["schema"]
    assert {error["code"] for error in method["errors"]} == {kind.rpc_code for kind in REFUSALS}
    assert len(method["errors"]) == len(REFUSALS)
    needed = [param["required"] for param in method["params"]]
    assert needed == sorted(needed, reverse=True), "who calls by position cannot leave out what comes first"


def test_params_are_taken_in_the_documented_order(service: Running, method: dict[str, Any]) -> None:
    names = [param["name"] for param in method["params"]]
    for given in range(1, len(names) + 1):
        error = service.rpc(method["name"], [False] * given)["error"]  # no param of any method is a boolean
        assert error["code"] == -32602
        wrong = {each["path"].split(".")[0] for each in error["data"]["errors"] if each["type"] != "missing"}
        assert wrong == set(names[:given])
    too_many = service.rpc(method["name"], [None] * (len(names) + 1))["error"]
    assert too_many["code"] == -32602 and too_many["data"]["errors"][0]["type"] == "too_many_params"


def test_exactly_the_required_params_are_missed(service: Running, method: dict[str, Any]) -> None:
    required = {param["name"] for param in method["params"] if param["required"]}
    answer = service.rpc(method["name"], {"no_such_param": 1})
    errors = {each["path"]: each["type"] for each in answer["error"]["data"]["errors"]}
    assert errors.pop("no_such_param") == "extra_forbidden"
    assert errors == dict.fromkeys(required, "missing")


def test_every_method_that_takes_params_shows_an_example(method: dict[str, Any]) -> None:
    assert len(method["examples"]) == 1 or not method["params"]


def test_examples_fit_what_they_are_examples_of(document: dict[str, Any], method: dict[str, Any]) -> None:
    for example in method["examples"]:
        documented = method["params"][: len(example["params"])]
        assert [param["name"] for param in example["params"]] == [param["name"] for param in documented]
        for param, described in zip(example["params"], documented, strict=True):
            fits(document, described["schema"], param["value"])
        fits(document, method["result"]["schema"], example["result"]["value"])


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by position"])
def test_an_example_can_be_sent_and_its_result_is_what_comes(
    service: Running, document: dict[str, Any], method: dict[str, Any], by_name: bool
) -> None:
    example = method["examples"][0] if method["examples"] else {"params": []}
    named = {param["name"]: param["value"] for param in example["params"]}
    answer = service.rpc(method["name"], named if by_name else list(named.values()))
    fits(document, method["result"]["schema"], answer["result"])
    if "result" in example:
        assert without_what_differs(answer["result"]) == without_what_differs(example["result"]["value"])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("tools.execute", ["fail_clearly", {"retryable": True}]),
        ("tools.execute", ["short_timeout", {"seconds": 30}]),
        ("tools.execute", ["wait", {"seconds": 0, "value": None}]),
        ("tools.execute_batch", [[{"tool_id": "echo"}, {"tool_id": "no_such_tool"}, {"tool_id": "fail_clearly"}]]),
        (
            "tools.execute_parallel",
            [
                [
                    {"task_id": "a", "tool_id": "fail_clearly"},
                    {"task_id": "b", "tool_id": "echo", "dependencies": ["a"]},
                    {"task_id": "c", "tool_id": "no_such_tool"},
                ]
            ],
        ),
        ("tools.execute_with_fallback", [{"tool_id": "no_such_tool"}, [{"tool_id": "fail_clearly"}]]),
        ("tools.list", ["no such category"]),
        ("tools.list", [None, None, None, 1]),
        ("tools.get", ["wait"]),
        ("tools.search", [None, "custom"]),
    ],
)
def test_failures_refusals_and_what_is_skipped_fit_the_result_too(
    service: Running, document: dict[str, Any], name: str, params: list[Any]
) -> None:
    (method,) = (each for each in document["methods"] if each["name"] == name)
    fits(document, method["result"]["schema"], service.rpc(name, params)["result"])


def test_a_violation_in_a_fallback_is_told_once_by_its_own_path(service: Running) -> None:
    for fallback, path in (({"tool_id": 5}, "fallback.tool_id"), ([{"tool_id": 5}], "fallback.0.tool_id")):
        answer = service.rpc("tools.execute_with_fallback", [{"tool_id": "echo"}, fallback])
        assert [error["path"] for error in answer["error"]["data"]["errors"]] == [path]
