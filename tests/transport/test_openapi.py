"""The OpenAPI document: valid, complete, true. What it says is compared with what a running service does."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from app import errors
from app.service import open_service
from app.settings import read_settings
from app.transport.app import create_fastapi
from app.transport.mcp import MCP_PATH
from app.transport.methods import Methods
from app.transport.rest_door import EXECUTE_PATH
from app.transport.rpc import RPC_PATH
from tests.conftest import ROOT, Running, Serve, places_in

Json = dict[str, Any]

EXAMPLES_PER_OPERATION = 30
"""For a test of a quarter of a minute. A campaign is `st run` with the same file and `--max-examples 1500`."""


@pytest.fixture(scope="module")
def document(service: Running) -> Json:
    answer = service.http.get("/openapi.json").json()
    assert answer["openapi"].startswith("3.1.")
    return answer  # type: ignore[no-any-return]


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def media(answer: Json) -> Json:
    found: Json = answer.get("content", {}).get("application/json", {})
    return found


def test_it_is_valid(document: Json) -> None:
    validate(document)


def test_every_route_is_documented_and_nothing_else(tmp_path: Path) -> None:
    async def compared() -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
        async with open_service(read_settings(places_in(tmp_path))) as service:
            methods = Methods(service.executor, service.registry, service.history, service.metrics, 100, 1_000_000)
            app = create_fastapi(service, methods)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                document = (await client.get("/openapi.json")).json()
        routes = [context.original_route for context in iter_route_contexts(app.routes)]
        assert all(isinstance(route, APIRoute) for route in routes)
        paths = [
            (context.path, context.methods)
            for context in iter_route_contexts(app.routes)
            if not str(context.path).startswith("/docs/")  # parts of the page
        ]
        served = {(method.lower(), path) for path, methods in paths for method in methods or ()}
        return served, {(method, path) for method, path, _ in operations(document)}

    served, documented = asyncio.run(compared())
    assert documented == served | {("post", path) for path in (RPC_PATH, MCP_PATH, EXECUTE_PATH)}


def test_every_operation_says_what_it_is(document: Json) -> None:
    tags = {tag["name"] for tag in document["tags"]}
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert ids == [  # generated clients name their functions by these
        "callMethods",
        "callMcp",
        "getLiveness",
        "getReadiness",
        "getMetrics",
        "listTools",
        "exportTools",
        "getTool",
        "executeTool",
        "getLimits",
        "listExecutions",
        "exportExecutions",
        "getExecution",
        "listKeys",
        "createKey",
        "getKey",
        "revokeKey",
        "forgetResults",
        "getOpenApi",
        "getDocs",
    ]
    for _, _, operation in operations(document):
        assert operation["summary"] and set(operation["tags"]) <= tags
        assert all(parameter["description"] for parameter in operation.get("parameters", ()))


def test_every_array_and_every_answer_can_be_a_class(document: Json) -> None:
    """openapi-python-client takes no array that does not say of what, and no two objects that are alike without a
    name: its client of either door could not be imported."""

    def arrays(schema: Any) -> Iterator[Json]:
        if isinstance(schema, dict) and schema.get("type") == "array":
            yield schema
        for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            yield from arrays(part)

    schemas = document["components"]["schemas"]
    assert all({"items", "prefixItems"} & array.keys() for array in arrays(schemas))
    for name in ("RpcResponse", "McpResponse"):
        assert [list(shape) for shape in schemas[name]["oneOf"]] == [["$ref"], ["$ref"]]


def test_every_refusal_has_the_one_shape(document: Json) -> None:
    for _, path, operation in operations(document):
        for status, answer in operation["responses"].items():
            if int(status) < 400 or (path, status) == ("/readyz", "503"):
                continue
            named = re.findall(r"schemas/(\w+)", str(media(answer).get("schema")))
            assert set(named) == shapes_of_refusals(path, status), (path, status)
            assert ("Retry-After" in answer.get("headers", {})) == (status in ("429", "503"))


def shapes_of_refusals(path: str, status: str) -> set[str]:
    if path == MCP_PATH:
        return {"401": set(), "403": {"Refused", "McpResponse"}}.get(status, {"McpResponse"})
    return {"RpcResponse"} if path == RPC_PATH and status != "403" else {"Refused"}


def test_every_status_that_a_refusal_can_have_is_documented(document: Json) -> None:
    def kinds(of: type[errors.ToolServiceError]) -> Iterator[int]:
        for each in of.__subclasses__():
            yield each.kind.http_status
            yield from kinds(each)

    execute = document["paths"]["/api/v1/tools/{tool_id}/execute"]["post"]
    assert {str(status) for status in kinds(errors.ToolServiceError)} <= set(execute["responses"])
    assert {"413", "408"} <= set(execute["responses"])


def test_every_method_of_the_door_is_documented_with_an_example(document: Json, service: Running) -> None:
    methods = service.rpc("rpc.methods")["result"]["methods"]
    schemas = document["components"]["schemas"]
    mapping = schemas["RpcRequest"]["discriminator"]["mapping"]
    assert list(mapping) == methods
    for method, reference in mapping.items():
        assert schemas[reference.rsplit("/", 1)[1]]["properties"]["method"] == {"const": method}
    examples = media(document["paths"][RPC_PATH]["post"]["requestBody"])["examples"]
    assert set(methods) <= set(examples)


PASTED_ELSEWHERE = {"getExecution", "listKeys", "createKey", "getKey", "revokeKey", "forgetResults"}
"""They need a row of the log, or a credential: tests/service/test_log.py, tests/access/."""


def test_every_request_example_works_when_it_is_pasted(document: Json, service: Running) -> None:
    pasted = 0
    for method, path, operation in operations(document):
        if operation["operationId"] in PASTED_ELSEWHERE:
            continue
        examples = media(operation.get("requestBody", {})).get("examples") or {"none": {}}
        for name, example in examples.items():
            response = service.http.request(method, **request_of(path, operation), json=example.get("value"))
            assert response.status_code == example.get("x-status", 200), (path, name, response.text)
            check_answer(document, operation, response)
            pasted += 1
    assert pasted > 20


def request_of(path: str, operation: Json) -> Json:
    """URL and query with the example of every parameter that has one."""
    parameters = [parameter for parameter in operation.get("parameters", ()) if "example" in parameter]
    by_place = {place: {p["name"]: p["example"] for p in parameters if p["in"] == place} for place in ("path", "query")}
    return {"url": path.format(**by_place["path"]), "params": by_place["query"]}


def check_answer(document: Json, operation: Json, response: httpx.Response) -> None:
    """The answer is what the document says, and no error unless that is what the example is for."""
    documented = operation["responses"][str(response.status_code)]
    if "application/x-ndjson" in documented.get("content", {}):
        return  # lines, each of them held to its schema where rows are read
    if schema := media(documented).get("schema"):
        assert list(validator(document, schema).iter_errors(response.json())) == []
        answers = response.json() if isinstance(response.json(), list) else [response.json()]
        assert all("jsonrpc" not in answer or "result" in answer for answer in answers), response.text


def validator(document: Json, schema: Json) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]})


def test_every_example_fits_its_schema(document: Json) -> None:
    for _, path, operation in operations(document):
        for part in (operation.get("requestBody", {}), *operation["responses"].values()):
            for name, example in media(part).get("examples", {}).items():
                wrong = list(validator(document, media(part)["schema"]).iter_errors(example["value"]))
                assert wrong == [], (path, name)
        for parameter in operation.get("parameters", ()):
            if "example" in parameter:
                assert list(validator(document, parameter["schema"]).iter_errors(parameter["example"])) == []


def test_clients_are_sent_to_the_public_url(document: Json, serve: Serve) -> None:
    assert document["servers"] == [{"url": "/"}]
    public = serve(PUBLIC_URL="https://tools.example/agents/")
    assert public.http.get("/openapi.json").json()["servers"] == [{"url": "https://tools.example/agents"}]


def test_the_page_shows_the_document_from_where_it_stands(service: Running) -> None:
    page = service.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    url = re.search(r"url: '([^']+)'", page.text)
    assert url is not None
    assert httpx.URL("https://proxy.example/agents/docs").join(url[1]) == "https://proxy.example/agents/openapi.json"


def test_the_page_needs_no_other_host_and_no_credential(serve: Serve) -> None:
    service = serve(AUTH_MODE="required")
    page = service.http.get("/docs")
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert "://" not in page.text and '"validatorUrl": null' in page.text
    types = {}
    for link in links:
        if not link.startswith("data:"):
            part = service.http.get(str(page.url.join(link)))
            assert part.status_code == 200 and len(part.content) > 100_000
            types[link] = part.headers["content-type"].partition(";")[0]
            assert part.headers["cache-control"] == "max-age=86400"
    assert types == {"docs/swagger-ui-bundle.js": "text/javascript", "docs/swagger-ui.css": "text/css"}


def test_schemathesis_finds_nothing(serve: Serve) -> None:
    service = serve(WIKIPEDIA_URL="http://127.0.0.1:1")
    command = [
        *(str(Path(sys.executable).with_name("st")), "--config-file", "tests/transport/schemathesis.toml"),
        *("run", f"{service.url}/openapi.json", "--phases", "examples,coverage,fuzzing,stateful", "--no-color"),
        *("--seed", "1", "--max-examples", str(EXAMPLES_PER_OPERATION), "--generation-database", "none"),
    ]
    environ = {**os.environ, "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-20_000:]
    tested = re.search(r"Tested: (\d+)", ran.stdout)
    documented = len(list(operations(service.http.get("/openapi.json").json())))
    assert tested is not None and int(tested[1]) == documented - 1, "all but the document itself"
    assert service.process.poll() is None


def test_the_description_names_every_status_that_any_path_can_answer(service: Running) -> None:
    text = service.http.get("/openapi.json").json()["info"]["description"]
    protocol = (ROOT / "app/transport/protocol.py").read_text()
    numbers = {int(status) for status in re.findall(r"\b([45]\d\d)\)", protocol)}
    kinds = [errors.BodyTooLarge(1), errors.BodyTooSlow(1.0), errors.Overloaded("x"), errors.PermissionDenied("x")]
    assert numbers >= {408, 414, 431, 505}, "how the protocol writes its refusals has changed"
    for status in numbers | {error.http_status for error in kinds} | {400, 405}:
        assert str(status) in text, status
