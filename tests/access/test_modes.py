"""The safe default, and replicas that share a database: services in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.clients import close_engine, create_engine
from app.migration import migrate
from tests.access.keyring import make_key
from tests.conftest import ROOT, START_S_MAX, Running, Serve, places_in, service_environ
from tests.servers import PostgresAt, PostgresServer, in_thread

RPC, TOOLS, ADMIN = "/api/v1/jsonrpc", "/api/v1/tools", "/api/v1/admin/keys"
PING = {"jsonrpc": "2.0", "id": 1, "method": "rpc.ping"}


def ping(service: Running, key: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return service.http.post(RPC, json=PING, headers=headers)


def error_code(response: httpx.Response) -> int | None:
    code: int | None = response.json().get("error", {}).get("code")
    return code


def readiness(service: Running) -> tuple[int, dict[str, str]]:
    response = service.http.get("/readyz")
    return response.status_code, dict(line.split(": ", 1) for line in response.text.splitlines())


def becomes(holds: Callable[[], bool], within_s: float = START_S_MAX) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < within_s, f"not within {within_s} s"
        time.sleep(0.02)
    return time.monotonic() - began


def migrated(url: str) -> str:
    async def work() -> None:
        engine = create_engine(url, 1, 0)
        await migrate(engine)
        await close_engine(engine)

    in_thread(work())
    return url


def test_a_database_without_tables_is_said_to_need_migrating_and_heals_by_it(
    serve: Serve, postgres: PostgresAt
) -> None:
    url = postgres.create_database()
    running = serve(DATABASE_URL=url, AUTH_MODE="required")
    status, lines = readiness(running)
    assert status == 503 and "run agentcore-tools migrate; no key is known" in lines["database"]
    told = running.read_log(lambda event: event["message"].startswith("keys cannot be read"))
    assert told["reason"].endswith("run agentcore-tools migrate")
    migrated(url)
    becomes(lambda: readiness(running)[1]["database"] == "up")


def refused_to_serve(*arguments: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "app", "serve", "--port", "0", *arguments],
        cwd=ROOT,
        env=service_environ(**environ),
        capture_output=True,
        text=True,
        timeout=START_S_MAX,
    )
    assert done.returncode == 2, done.stdout
    return done.stderr


# The safe default


def test_without_a_key_loopback_serves_and_the_first_key_closes_it(serve: Serve, tmp_path: Path) -> None:
    places = places_in(tmp_path)
    service = serve(**places)
    assert ping(service).json()["result"] == {"pong": True}
    assert readiness(service) == (200, {**readiness(service)[1], "authentication": "off", "database": "up"})
    _, key = make_key(places["DATABASE_URL"])
    becomes(lambda: ping(service).status_code == 401)
    assert ping(service, key).status_code == 200
    assert readiness(service)[1]["authentication"] == "on"


def test_a_key_made_by_the_command_works_at_once_in_the_service_beside_it(serve: Serve, tmp_path: Path) -> None:
    places = places_in(tmp_path)
    service = serve(**places)
    _, key = make_key(places["DATABASE_URL"], scopes=["admin"])
    listed = service.http.get(ADMIN, headers={"X-API-Key": key})
    assert listed.status_code == 200 and listed.json()["count"] == 1
    assert ping(service).status_code == 401, "and nobody else gets in any more"


def test_beyond_loopback_auto_wants_a_key_and_then_asks_for_it(serve: Serve, tmp_path: Path) -> None:
    places = places_in(tmp_path)
    message = refused_to_serve("--host", "0.0.0.0", **places)
    assert "keys create" in message and "AUTH_MODE=none" in message and "loopback" in message
    _, key = make_key(places["DATABASE_URL"])
    service = serve("--host", "0.0.0.0", **places)
    assert ping(service).status_code == 401 and ping(service, key).status_code == 200


def test_beyond_loopback_tokens_are_enough(serve: Serve) -> None:
    settings = {"JWT_ISSUER": "i", "JWT_AUDIENCE": "a", "JWT_ALGORITHMS": "HS256", "JWT_SECRET": "s" * 32}
    assert ping(serve("--host", "0.0.0.0", **settings)).status_code == 401
    assert ping(serve(**settings)).status_code == 401, "on loopback too: somebody means to be asked for one"


def test_required_asks_on_loopback_though_there_is_no_key(serve: Serve) -> None:
    service = serve(AUTH_MODE="required")
    assert ping(service).status_code == 401
    assert readiness(service)[0] == 200


def test_none_asks_nobody_anywhere_though_there_are_keys(serve: Serve, tmp_path: Path) -> None:
    places = places_in(tmp_path)
    _, key = make_key(places["DATABASE_URL"], tenant="acme")
    service = serve("--host", "0.0.0.0", AUTH_MODE="none", TOOL_MODULES="tests.tools_for_tests", **places)
    for headers in ({}, {"X-API-Key": key}, {"X-API-Key": "wrong"}):
        called = {"method": "tools.execute", "params": {"tool_id": "who_calls"}}
        answer = service.http.post(RPC, json={**PING, **called}, headers=headers)
        assert answer.json()["result"]["result"]["tenant"] == "local"


def test_a_table_that_cannot_be_read_at_start_means_required(serve: Serve, own_postgres: PostgresServer) -> None:
    url = own_postgres.create_database()
    service = serve(DATABASE_URL=url)
    assert ping(service).status_code == 401
    status, lines = readiness(service)
    assert status == 503 and "no key is known" in lines["database"]
    migrated(url)
    becomes(lambda: ping(service).status_code == 200)
    assert readiness(service)[0] == 200 and readiness(service)[1]["database"] == "up"


def test_a_sqlite_file_that_cannot_be_used_is_refused_at_start(tmp_path: Path) -> None:
    message = refused_to_serve(DATABASE_URL=f"sqlite+aiosqlite:///{tmp_path}")
    assert "DATABASE_URL" in message


# Replicas


@pytest.fixture
def replicas(serve: Serve, postgres: PostgresAt) -> tuple[str, Running, Running]:
    url = migrated(postgres.create_database())
    return url, serve(DATABASE_URL=url, AUTH_MODE="required"), serve(DATABASE_URL=url, AUTH_MODE="required")


def test_a_key_revoked_on_one_replica_is_refused_on_the_other_within_five_seconds(
    replicas: tuple[str, Running, Running],
) -> None:
    url, first, second = replicas
    _, admin = make_key(url, scopes=["admin"])
    for _ in range(3):
        key, credential = make_key(url)
        assert ping(first, credential).status_code == ping(second, credential).status_code == 200
        assert first.http.delete(f"{ADMIN}/{key.id}", headers={"X-API-Key": admin}).status_code == 200
        assert ping(first, credential).status_code == 401
        becomes(lambda credential=credential: ping(second, credential).status_code == 401)


def test_a_key_revoked_by_the_command_is_refused_soon_by_every_replica(replicas: tuple[str, Running, Running]) -> None:
    url, first, second = replicas
    key, credential = make_key(url)
    assert ping(first, credential).status_code == ping(second, credential).status_code == 200
    revoke = [sys.executable, "-m", "app", "keys", "revoke", key.id]
    subprocess.run(revoke, cwd=ROOT, env=service_environ(DATABASE_URL=url), check=True, capture_output=True)
    for service in (first, second):
        becomes(lambda service=service: ping(service, credential).status_code == 401)


# The database away


@pytest.mark.parametrize("fault", ["paused", "killed"])
def test_with_the_database_away_known_keys_are_served_and_new_ones_told_to_come_back(
    serve: Serve, own_postgres: PostgresServer, fault: str
) -> None:
    url = migrated(own_postgres.create_database())
    (_, known), (_, unseen) = make_key(url), make_key(url)
    service = serve(DATABASE_URL=url, AUTH_MODE="required")
    assert ping(service, known).status_code == 200
    if fault == "paused":
        own_postgres.pause()
    else:
        own_postgres.kill()
    try:
        becomes(lambda: "away" in readiness(service)[1]["database"])
        assert readiness(service)[0] == 200, "it serves whom it knows"
        assert ping(service, known).status_code == 200
        away = ping(service, unseen)
        assert away.status_code == 503 and error_code(away) == -32008 and away.headers["retry-after"] == "1"
        rest = service.http.get(TOOLS, headers={"X-API-Key": unseen})
        assert rest.status_code == 503 and error_code(rest) == -32008
        assert ping(service).status_code == 401 and service.http.get("/livez").status_code == 200
    finally:
        if fault == "paused":
            own_postgres.resume()
        else:
            own_postgres.start()
    becomes(lambda: ping(service, unseen).status_code == 200)
    assert ping(service, known).status_code == 200 and readiness(service)[1]["database"] == "up"


def test_after_keys_stale_s_without_the_database_nobody_is_let_in(serve: Serve, own_postgres: PostgresServer) -> None:
    url = migrated(own_postgres.create_database())
    _, key = make_key(url)
    service = serve(DATABASE_URL=url, AUTH_MODE="required", KEYS_STALE_S="0")
    assert ping(service, key).status_code == 200
    own_postgres.kill()
    becomes(lambda: ping(service, key).status_code == 503)
    assert readiness(service)[0] == 503
    own_postgres.start()
    becomes(lambda: ping(service, key).status_code == 200)


def test_a_replica_that_starts_without_the_database_lets_nobody_in_and_says_so(
    serve: Serve, own_postgres: PostgresServer
) -> None:
    url = migrated(own_postgres.create_database())
    _, key = make_key(url)
    own_postgres.kill()
    service = serve("--host", "0.0.0.0", DATABASE_URL=url)
    status, lines = readiness(service)
    assert status == 503 and "no key is known" in lines["database"]
    assert error_code(ping(service, key)) == -32008 and ping(service).status_code == 401
    own_postgres.start()
    becomes(lambda: ping(service, key).status_code == 200)
    assert readiness(service)[0] == 200
