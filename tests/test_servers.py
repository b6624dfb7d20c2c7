"""The servers of the tests do what the tests think they do."""

from __future__ import annotations

import asyncpg
import pytest

from tests.servers import PostgresAt, PostgresServer, RedisAt, RedisServer, postgres_binaries, redis_binaries


@pytest.mark.parametrize("flavour", postgres_binaries())
def test_postgresql_keeps_what_was_committed_when_it_is_killed(flavour: str) -> None:
    with PostgresServer(flavour, max_connections="7") as server:
        database = server.create_database()
        server.run_sql("CREATE TABLE kept AS SELECT 1 AS n", database=database)
        server.kill()
        with pytest.raises(OSError):
            server.run_sql("SELECT 1")
        server.start()
        assert [row["n"] for row in server.run_sql("SELECT n FROM kept", database=database)] == [1]
        assert server.run_sql("SHOW max_connections")[0][0] == "7"


@pytest.mark.parametrize("flavour", redis_binaries())
def test_redis_comes_back_empty_on_its_port_when_it_is_killed(flavour: str) -> None:
    with RedisServer(flavour, maxmemory="2mb") as server:
        assert server.cli("CONFIG", "GET", "maxmemory") == "maxmemory\n2097152"
        assert server.cli("SET", "key", "value") == "OK"
        url = server.url
        server.kill()
        server.start()
        assert (server.url, server.cli("GET", "key")) == (url, "")


def test_every_created_database_is_new_and_empty(postgres: PostgresAt) -> None:
    first, second = postgres.create_database(), postgres.create_database()
    postgres.run_sql("CREATE TABLE mine (n int)", database=first)
    with pytest.raises(asyncpg.UndefinedTableError):
        postgres.run_sql("SELECT n FROM mine", database=second)


def test_database_urls_and_redis_urls_name_servers_that_answer(
    database_url: str, redis: RedisAt, redis_url: str
) -> None:
    assert database_url.startswith(("sqlite+aiosqlite:////", "postgresql+asyncpg://"))
    assert redis.url == redis_url
    assert redis.cli("DBSIZE") == "0"
