"""What the rows of a running service hold, who may read them, and what is in none of them."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from tests.access.keyring import make_key
from tests.conftest import Running, Serve, end, places_in, start_service
from tests.servers import PostgresAt, make_folder, remove_folder, wait_until

LOG = "/api/v1/executions"


@dataclass(frozen=True)
class Asked:
    """A service that asks for keys, and clients with some."""

    service: Running
    acme: httpx.Client
    other: httpx.Client
    admin: httpx.Client
    blind: httpx.Client
    """May call, may not read the log."""
    reader: httpx.Client
    """May read, may not call."""

    def row(self, execution_id: str) -> dict[str, Any]:
        """Once it is written."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            response = self.admin.get(f"{LOG}/{execution_id}")
            assert response.status_code in (200, 404), response.text
            found.append(response.json())
            return response.status_code == 200

        wait_until(is_there, f"row {execution_id}")
        return found[-1]

    def written(self) -> None:
        """Whatever is a row by and by is one now."""
        last = execute(self.acme, "echo", {"message": "last"})["execution_id"]
        self.row(last)

    def ids(self, client: httpx.Client, **filters: str) -> list[str]:
        """Of everything that the client may see, newest first, as the export has it."""
        response = client.get(f"{LOG}/export", params=filters)
        assert response.status_code == 200
        return [json.loads(line)["execution_id"] for line in response.text.splitlines()]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def asked(request: pytest.FixtureRequest) -> Iterator[Asked]:
    folder = make_folder("agentcore-asked-")
    places = places_in(folder)
    if request.param == "postgresql":
        server: PostgresAt = request.getfixturevalue("postgres")
        places["DATABASE_URL"] = server.create_database()
    url = places["DATABASE_URL"]
    keys = {
        "acme": make_key(url, tenant="acme", subject="planner")[1],
        "other": make_key(url, tenant="other", subject="planner")[1],
        "admin": make_key(url, tenant="operators", subject="root", scopes=["admin", "executions:read"])[1],
        "reader": make_key(url, tenant="acme", subject="reader", scopes=["executions:read"])[1],
        "blind": make_key(url, tenant="acme", subject="blind", scopes=["tools:execute", "tools:read"])[1],
    }
    limits = folder / "limits.yaml"
    limits.write_text("policies:\n  - {name: never, match: {tool: current_time}, per: [tenant], rate: 1/day}\n")
    running = start_service(
        **places,
        AUTH_MODE="required",
        TOOL_MODULES="tests.tools_for_tests,tests.transport.lane_tools",
        LOG_PAYLOADS="full",
        LIMITS_FILE=str(limits),
    )
    clients = {
        name: httpx.Client(base_url=running.url, headers={"X-API-Key": key}, timeout=60, trust_env=False)
        for name, key in keys.items()
    }
    yield Asked(running, **clients)
    for client in clients.values():
        client.close()
    end(running)
    remove_folder(folder)


def rpc(client: httpx.Client, method: str, params: Any, **request: Any) -> dict[str, Any]:
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params, **request}
    answer: dict[str, Any] = client.post("/api/v1/jsonrpc", json=body).json()
    return answer.get("result") or answer["error"]


def execute(client: httpx.Client, tool_id: str, parameters: Any = None, **params: Any) -> dict[str, Any]:
    return rpc(client, "tools.execute", {"tool_id": tool_id, "parameters": parameters or {}, **params})


def seconds(text: str) -> datetime:
    return datetime.fromisoformat(text)


# What a row holds


def test_a_row_says_all_that_was_known_of_its_call(asked: Asked) -> None:
    execution = execute(
        asked.acme,
        "echo",
        {"message": "grüße", "uppercase": True},
        agent_id="agent-7",
        execution_context={"trace_id": "trace-1"},
    )
    row = asked.row(execution["execution_id"])
    parameters, result = (
        json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        for value in ({"message": "grüße", "uppercase": True}, {"message": "GRÜSSE"})
    )
    assert row == {
        "execution_id": execution["execution_id"],
        "tool_id": "echo",
        "tool_version": "1.0.0",
        "tenant": "acme",
        "subject": "planner",
        "agent_id": "agent-7",
        "status": "success",
        "error_type": None,
        "error_code": None,
        "started_at": row["started_at"],
        "finished_at": execution["timestamp"],
        "execution_ms": pytest.approx(execution["execution_time_ms"], abs=0.002),
        "overhead_ms": pytest.approx(execution["overhead_ms"], abs=0.002),
        "attempts": 1,
        "cached": False,
        "client_gone": False,
        "trace_id": "trace-1",
        "cost": 1,
        "parameters": {
            "content": {"message": "grüße", "uppercase": True},
            "size_bytes": len(parameters),
            "sha256": hashlib.sha256(parameters).hexdigest(),
        },
        "result": {
            "content": {"message": "GRÜSSE"},
            "size_bytes": len(result),
            "sha256": hashlib.sha256(result).hexdigest(),
        },
    }
    took = timedelta(milliseconds=execution["execution_time_ms"] + execution["overhead_ms"] + 2)
    assert seconds(row["finished_at"]) - took <= seconds(row["started_at"]) <= seconds(row["finished_at"])


@pytest.mark.parametrize(
    ("tool_id", "parameters", "status", "error_type", "error_code"),
    [
        ("fail_clearly", {}, "failed", "tool", "TICKET_CLOSED"),
        ("raise_exception", {}, "failed", "tool", "TOOL_CRASHED"),
        ("return_bad", {"kind": "nan"}, "failed", "tool", "TOOL_RESULT_INVALID"),
        ("short_timeout", {"seconds": 30}, "timeout", "timeout", "TOOL_TIMEOUT"),
        ("cancel_itself", {}, "failed", "tool", "TOOL_CRASHED"),
    ],
)
def test_a_row_of_a_call_that_ended_badly_says_how(
    asked: Asked, tool_id: str, parameters: dict[str, Any], status: str, error_type: str, error_code: str
) -> None:
    execution = execute(asked.acme, tool_id, parameters)
    row = asked.row(execution["execution_id"])
    assert (
        (row["status"], row["error_code"]) == (status, error_code) == (execution["status"], execution["error"]["code"])
    )
    assert row["error_type"] == execution["error"]["category"]
    assert row["attempts"] == 1 and row["execution_ms"] > 0
    assert row["result"] == {"content": None, "size_bytes": None, "sha256": None}


def test_a_row_has_the_cost_and_version_that_its_tool_declares(asked: Asked) -> None:
    execution = execute(asked.acme, "dear", {})
    row = asked.row(execution["execution_id"])
    assert (row["cost"], row["tool_version"]) == (7, "2.1.0")


def test_a_call_that_was_cancelled_while_it_ran_has_a_row_and_one_that_waited_for_its_slot_has_none(
    asked: Asked,
) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = pool.submit(execute, asked.acme, "one_at_a_time", {"seconds": 30}, call_id="runs")
        wait_until(lambda: asked.service.metric("tool_execution_concurrency") == 1, "it runs")
        waits = pool.submit(execute, asked.acme, "one_at_a_time", {"seconds": 30}, call_id="waits")
        wait_until(lambda: asked.service.metric("tool_execution_queue_depth") == 1, "it waits")
        assert rpc(asked.acme, "tools.cancel", {"call_id": "waits"}) == {"cancelled": True}
        assert waits.result()["status"] == "cancelled" and waits.result()["attempts"] == 0
        assert rpc(asked.acme, "tools.cancel", {"call_id": "runs"}) == {"cancelled": True}
    row = asked.row(runs.result()["execution_id"])
    assert (row["status"], row["error_code"], row["attempts"]) == ("cancelled", "TOOL_CANCELLED", 1)
    asked.written()
    assert waits.result()["execution_id"] not in asked.ids(asked.acme)


@pytest.mark.parametrize(("tool_id", "status"), [("held", "success"), ("held_for_client", "cancelled")])
def test_the_row_of_a_client_that_hung_up_says_so(asked: Asked, tool_id: str, status: str) -> None:
    def inside() -> int:
        count: int = execute(asked.acme, "inside", {"gate": tool_id})["result"]
        return count

    params = {"tool_id": tool_id, "parameters": {"gate": tool_id}, "agent_id": f"gone-{tool_id}"}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": params}).encode()
    key = asked.acme.headers["X-API-Key"].encode()
    with socket.create_connection(("127.0.0.1", asked.service.port)) as connection:
        connection.sendall(
            b"POST /api/v1/jsonrpc HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (key, len(body), body)
        )
        wait_until(lambda: inside() == 1, "it runs")
    if tool_id == "held":
        assert inside() == 1  # answered after the end of that connection has been read
        execute(asked.acme, "open_gate", {"gate": tool_id})
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        found[:] = asked.acme.get(LOG, params={"tool_id": tool_id}).json()["executions"]
        return bool(found)

    wait_until(is_there, "its row")
    (row,) = found
    assert (row["agent_id"], row["status"], row["client_gone"]) == (f"gone-{tool_id}", status, True)


def test_every_item_of_batches_and_plans_that_ran_has_a_row_and_the_others_have_none(asked: Asked) -> None:
    agent = {"agent_id": f"items-{secrets.token_hex(4)}"}
    echo, bad = ({"tool_id": "echo", "parameters": {"message": message}, **agent} for message in ("a", 1))
    fails = {"tool_id": "fail_clearly", "parameters": {}, **agent}
    single = {"jsonrpc": "2.0", "id": 1, "method": "tools.execute", "params": echo}
    answers: list[Any] = [
        asked.acme.post(
            "/api/v1/jsonrpc", json=[single, {**single, "params": bad}, {**single, "params": fails}]
        ).json(),
        rpc(asked.acme, "tools.execute_batch", {"requests": [echo, bad, fails]}),
        rpc(asked.acme, "tools.execute_with_fallback", {"primary": fails, "fallback": echo}),
        rpc(
            asked.acme,
            "tools.execute_parallel",
            {
                "tasks": [
                    {"task_id": "a", **echo},
                    {"task_id": "b", **fails},
                    {"task_id": "skipped", **echo, "dependencies": ["b"]},
                    {"task_id": "refused", **bad},
                ]
            },
        ),
        asked.acme.post("/api/v1/tools/echo/execute", json={"parameters": {"message": "a"}, **agent}).json(),
    ]
    ran, others = told(answers)
    assert (len(ran), len(others)) == (9, 4)
    asked.written()
    logged = [
        row["execution_id"]
        for row in asked.acme.get(LOG, params={"limit": 500}).json()["executions"]
        if row["agent_id"] == agent["agent_id"]
    ]
    assert sorted(logged) == sorted(ran)


def told(answer: Any) -> tuple[list[str], list[str]]:
    """Ids of calls that ran and of those that did not, wherever they stand; each once, though a fallback's is twice."""
    text = json.dumps(answer)
    everything = set(re.findall(r'"execution_id": "([0-9a-f-]{36})"', text))
    ran = set(re.findall(r'"execution_id": "([0-9a-f-]{36})", "tool_id": "\w+", "status": "(?:success|failed)"', text))
    return sorted(ran), sorted(everything - ran)


def test_no_call_that_was_refused_has_a_row(asked: Asked, tmp_path: Path) -> None:
    gate = {"path": str(tmp_path / "gate")}
    execute(asked.acme, "current_time")
    refusals = {
        -32602: execute(asked.acme, "echo", {"message": 1}),
        -32004: execute(asked.acme, "no_such_tool"),
        -32001: execute(asked.acme, "current_time"),
    }
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(execute, asked.acme, "wait_alone_for_file", gate)
        wait_until(lambda: asked.service.metric("tool_execution_concurrency") == 1, "it runs")
        refusals[-32006] = execute(asked.acme, "wait_alone_for_file", gate, timeout_override=0.05)
        Path(gate["path"]).touch()
        running.result()
    assert [error["code"] for error in refusals.values()] == list(refusals)
    refused = {error["data"]["execution_id"] for error in refusals.values()}
    asked.written()
    before = asked.ids(asked.admin)
    assert len(refused) == 4 and refused.isdisjoint(before)
    assert execute(asked.reader, "echo", {"message": "a"})["code"] == -32003
    asked.written()
    assert len(asked.ids(asked.admin)) == len(before) + 1, "the one that was waited for"


# Who may read


def test_a_tenant_sees_its_own_rows_alone_by_every_way_there_is(asked: Asked) -> None:
    mine = [execute(asked.acme, "echo", {"message": "mine"})["execution_id"] for _ in range(3)]
    theirs = [execute(asked.other, "echo", {"message": "theirs"})["execution_id"] for _ in range(3)]
    asked.row(theirs[-1])
    ways = {
        "list": [row["execution_id"] for row in asked.acme.get(LOG, params={"limit": 500}).json()["executions"]],
        "method": [
            row["execution_id"] for row in rpc(asked.acme, "tools.get_execution_history", {"limit": 500})["executions"]
        ],
        "export": asked.ids(asked.acme),
        "subject": asked.ids(asked.acme, subject="planner"),
    }
    for way, seen in ways.items():
        assert set(mine) <= set(seen) and set(theirs).isdisjoint(seen), way
    assert set(mine) | set(theirs) <= set(asked.ids(asked.admin))
    assert asked.acme.get(f"{LOG}/{mine[0]}").status_code == 200
    assert asked.other.get(f"{LOG}/{mine[0]}").status_code == 404


def test_another_tenants_row_looks_like_one_that_is_not_there(asked: Asked) -> None:
    theirs = execute(asked.other, "echo", {"message": "theirs"})["execution_id"]
    asked.row(theirs)
    unknown = str(UUID(int=UUID(theirs).int ^ 1))
    found, missing = asked.acme.get(f"{LOG}/{theirs}"), asked.acme.get(f"{LOG}/{unknown}")
    assert found.status_code == missing.status_code == 404
    assert found.json() == missing.json()


def test_an_export_is_bounded_and_goes_on_where_it_was_cut_off(asked: Asked) -> None:
    for _ in range(4):
        execute(asked.acme, "echo", {"message": "exported"})
    asked.written()
    everything = asked.ids(asked.acme)
    assert asked.ids(asked.acme, limit="3") == everything[:3]
    assert asked.ids(asked.acme, cursor=everything[2]) == everything[3:]
    assert asked.ids(asked.acme, cursor=everything[0], limit="2", tool_id="echo") == everything[1:3]
    for wrong in ({"limit": "0"}, {"limit": "x"}, {"cursor": "x"}):
        refused = asked.acme.get(f"{LOG}/export", params=wrong)
        assert refused.status_code == 422 and refused.json()["error"]["data"]["errors"][0]["path"] in wrong


def test_another_tenants_cursor_is_a_place_and_no_key(asked: Asked) -> None:
    for client in (asked.acme, asked.other, asked.acme, asked.other, asked.acme):
        last = execute(client, "echo", {"message": "a"})["execution_id"]
    asked.row(last)
    cursor = asked.acme.get(LOG, params={"limit": 1}).json()["next_cursor"]
    pages = asked.other.get(LOG, params={"limit": 500, "cursor": cursor}).json()["executions"]
    assert pages and {row["tenant"] for row in pages} == {"other"}


def test_pages_give_every_row_once_and_filters_what_they_say(asked: Asked) -> None:
    for _ in range(5):
        last = execute(asked.acme, "log_all_of_it", {"value": 1})["execution_id"]
    asked.row(last)
    paged: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = asked.acme.get(LOG, params={"limit": 7, **cursor}).json()
        paged += [row["execution_id"] for row in page["executions"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert paged == asked.ids(asked.acme) == sorted(set(paged), reverse=True)
    assert len(asked.ids(asked.acme, tool_id="log_all_of_it")) == 5
    failed = asked.acme.get(LOG, params={"status": "failed", "limit": 500}).json()["executions"]
    assert all(row["status"] == "failed" for row in failed)
    newest = asked.row(last)["started_at"]
    assert last in asked.ids(asked.acme, since=newest) and last not in asked.ids(asked.acme, until=newest)


def test_reading_the_log_needs_its_scope(asked: Asked) -> None:
    own = execute(asked.blind, "echo", {"message": "a"})["execution_id"]
    asked.row(own)
    for path in (LOG, f"{LOG}/{own}", f"{LOG}/export"):
        response = asked.blind.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (403, -32003)
    assert rpc(asked.blind, "tools.get_execution_history", {})["code"] == -32003
    assert httpx.get(f"{asked.service.url}{LOG}").status_code == 401


# What is in none of it


def canaries() -> dict[str, str]:
    """Secrets by their kind, made anew."""
    mark = secrets.token_hex(8)
    return {
        "our key": f"act_{secrets.token_hex(10)}_{secrets.token_hex(32)}",
        "JWT": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0{mark}.c2lnbmF0dXJl{mark}",
        "PEM": f"MIIEvQIBADANBgkqhkiG9w0{mark}",
        "cookie": f"cookie{mark}value",
        "user info": f"userinfo{mark}",
        "password": f"hunter{mark}",
        "api key": f"apikey{mark}",
        "bearer": f"bearer{mark}token",
        "AWS": "AKIA" + mark.upper(),
        "GitHub": f"ghp_{mark}{mark}",
    }


def carriers(secret: dict[str, str]) -> list[Any]:
    """Values in which callers send them."""
    texts = [
        secret["our key"],
        f"token {secret['JWT']} ends",
        f"-----BEGIN PRIVATE KEY-----\n{secret['PEM']}\n-----END PRIVATE KEY-----",
        f"Cookie: session={secret['cookie']}",
        f"https://anna:{secret['user info']}@example.com/path",
        f"password={secret['password']}",
        f"Authorization: Bearer {secret['bearer']}",
        f"{secret['AWS']} and {secret['GitHub']}",
    ]
    members = {
        "password": secret["password"],
        "nested": [{"api_key": secret["api key"], "headers": {"Cookie": f"a={secret['cookie']}"}}],
        "Authorization": f"Bearer {secret['bearer']}",
    }
    return [*texts, members, json.dumps(members), json.dumps(json.dumps(members)), {"text": "\n".join(texts)}]


@pytest.mark.parametrize("payloads", ["off", "metadata", "full"])
def test_no_secret_is_in_a_row_in_the_journal_or_in_a_line_of_the_log(serve: Serve, payloads: str) -> None:
    running = serve(TOOL_MODULES="tests.tools_for_tests", LOG_PAYLOADS=payloads, LOG_LEVEL="DEBUG")
    secret, plain = canaries(), f"plain{secrets.token_hex(8)}"
    for value in carriers(secret):
        text = value if isinstance(value, str) else json.dumps(value)
        assert running.execute("wait", {"seconds": 0, "value": value})["result"] == value
        running.execute("echo", {"message": text}, agent_id=text[:200])
        running.execute("fail_clearly", {"message": text})
        running.execute("echo", {"message": "a"}, execution_context={"trace_id": text[:64], "session_id": text[:200]})
        running.execute("echo", {"message": 1, "password": secret["password"]})
        running.execute(text[:200])
    running.execute("echo", {"message": plain})
    running.execute("raise_exception")
    wait_until(lambda: running.metric("execution_log_journal_bytes") == 0, "all are rows")
    places = {path.name: path.read_bytes() for path in running.folder.rglob("*") if path.is_file()}
    assert any(name.endswith(".segment") for name in places)
    assert running.stop() == 0
    assert running.process.stdout is not None
    places["stdout"] = running.process.stdout.read()
    places["database"] = (running.folder / "agentcore.db").read_bytes()
    found = [(kind, name) for kind, text in secret.items() for name, data in places.items() if text.encode() in data]
    assert found == []
    assert (plain.encode() in places["database"]) == (payloads == "full"), "what is looked for would be found"
