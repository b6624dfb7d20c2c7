"""Pools to the outside, each with a name, a bound and a timeout. Knows no table and no key."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, DisconnectionError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool

from app.database_url import parse_database_url
from app.off_loop import off_loop

# redis-py is imported by whoever opens a client, before anything is served: it takes 9 MB that a service without Redis
# does without.
if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

CONNECT_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 10.0
POOL_TIMEOUT_S = 30.0
POOL_RECYCLE_S = 3600
"""Firewalls and poolers drop what is older without a word."""

CLOSE_TIMEOUT_S = 2.0
"""asyncpg's own close waits for ever for a server that is stopped."""

SQLITE_BUSY_S = 5.0

WAL_TRIES = 50
WAL_RETRY_S = 0.05
"""SQLite does not wait, however busy_timeout is set, when several processes turn a new file to WAL at once."""

DATABASE_ERRORS: tuple[type[Exception], ...] = (
    SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
"""Everything by which a statement can fail; while it connects, the driver's own errors come unwrapped."""


TABLES_LACK = frozenset({"42P01", "42703"})
"""SQLSTATE of an undefined table or column."""

SQLITE_LACKS = ("no such table: ", "no such column: ")
"""How its messages begin; a code of their own they have none."""


def reason(error: Exception) -> str:
    """Why the database failed, in a line for operators: without the statement and its values."""
    cause = _cause(error)
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    lines = str(cause).splitlines()
    said = lines[0][:200] if lines else type(cause).__name__
    return f"{said}; run agentcore-tools migrate" if lacks_tables(error) else said


def lacks_tables(error: Exception) -> bool:
    """Whether the database answers, and has no tables yet or those of an older version."""
    cause = _cause(error)
    return getattr(cause, "sqlstate", None) in TABLES_LACK or str(cause).startswith(SQLITE_LACKS)


def _cause(error: Exception) -> BaseException:
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error


def create_engine(
    url: str, pool_size: int, max_overflow: int, command_timeout_s: float = COMMAND_TIMEOUT_S
) -> AsyncEngine:
    """The engine of DATABASE_URL. Opens nothing yet. The pool's bounds hold for PostgreSQL; SQLite has one writer.

    Raises ValueError as `parse_database_url` does."""
    place = parse_database_url(url)
    if place.url.get_backend_name() == "sqlite":
        return _create_sqlite(place.url)
    return create_async_engine(
        place.url,
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=POOL_TIMEOUT_S,
        pool_recycle=POOL_RECYCLE_S,
        pool_pre_ping=True,
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": command_timeout_s,
            "server_settings": {"application_name": "agentcore-tools"},
            **place.options,
        },
    )


def _create_sqlite(url: URL) -> AsyncEngine:
    import sqlite3  # nobody else needs it

    engine = create_async_engine(url, connect_args={"timeout": SQLITE_BUSY_S})
    file_now: Callable[[], tuple[int, int] | None] = _no_file
    # With a query it is a URI: what it names is SQLite's to find and to make.
    if url.database and url.database != ":memory:" and not url.query:
        file = Path(url.database).absolute()
        file_now = partial(file_at, str(file))
        _make_private(engine, file)
    _tell_want_of_threads(engine)

    @event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        for left in reversed(range(WAL_TRIES)):
            try:
                cursor.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if not left or error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise
                connection.run_async(lambda _: asyncio.sleep(WAL_RETRY_S))
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
        record.info["file"] = file_now()

    @event.listens_for(engine.sync_engine, "checkout")
    def look(connection: Any, record: Any, proxy: Any) -> None:
        if record.info["file"] != file_now():
            raise DisconnectionError

    return engine


def _make_private(engine: AsyncEngine, file: Path) -> None:
    """For its owner alone: payloads are in it. Once it is asked for; SQLite gives its other files the same mode."""
    with contextlib.suppress(OSError):  # the first statement says what is wrong
        file.parent.mkdir(parents=True, exist_ok=True)

    @event.listens_for(engine.sync_engine, "do_connect")
    def make(*_: Any) -> None:
        with contextlib.suppress(OSError):
            file.touch(mode=0o600)


def _tell_want_of_threads(engine: AsyncEngine) -> None:
    """As an error of the system, which DATABASE_ERRORS has: every connection to SQLite takes a thread."""

    @event.listens_for(engine.sync_engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        try:
            return dialect.connect(*arguments, **options)
        except RuntimeError as error:  # the system has no thread left for it
            raise OSError(errno.EAGAIN, str(error)) from error


def _no_file() -> None:
    """In memory, or by a URI whose path is SQLite's to read."""


def file_at(path: str | Path) -> tuple[int, int] | None:
    """Which file has the name now, if any has, in 2 µs: SQLite goes on writing to one that was removed or replaced,
    where nobody finds it again."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a third of the time of Path's
    except OSError:
        return None
    return found.st_dev, found.st_ino


def pool_states(engine: AsyncEngine) -> dict[str, int]:
    """Of every connection that the pool may have: in use, idle, or not opened. Nothing where there is no such pool."""
    pool = engine.pool
    if not isinstance(pool, QueuePool):
        return {}
    in_use, idle = pool.checkedout(), pool.checkedin()
    return {"in_use": in_use, "idle": idle, "unopened": pool.size() + pool._max_overflow - in_use - idle}


async def close_engine(engine: AsyncEngine) -> None:
    """Close every connection, bounded."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await engine.dispose()


class RedisEndpoint(NamedTuple):
    """Where a Redis answers and what it wants to hear first."""

    host: str
    port: int
    db: int = 0
    username: str | None = None
    password: str | None = None
    ssl: ssl.SSLContext | None = None


Locate = Callable[[], Awaitable[RedisEndpoint]]

LOCATE_TIMEOUT_S_MIN = 0.25
"""For each Sentinel or node that is asked: no call waits for it, and TLS takes several round trips."""


class _RedisPlace(NamedTuple):
    """What a Redis URL says: `kind` is "", "sentinel" or "cluster"."""

    kind: str
    nodes: list[tuple[str, int]]
    service: str
    template: RedisEndpoint
    tls: dict[str, Any]


def redis_locator(url: str, key: str, timeout_s: float) -> Locate:
    """How to find the server that holds `key` now: itself, the master that Sentinels name, a shard of a Cluster.

    `redis://[user:password@]host[:port][/db]`; `redis+sentinel://[user:password@]host:port,host:port/service[/db]`;
    `redis+cluster://[user:password@]host:port,host:port`. `rediss` in place of `redis` is TLS; `?ca=FILE` names its
    authorities. Raises ValueError that says what is wrong, without the URL, which holds a password.
    """
    kind, nodes, service, template, tls = _redis_place(url)
    options = _library_options(max(timeout_s, LOCATE_TIMEOUT_S_MIN), tls)
    authorities: str | None = tls.get("ssl_ca_certs")

    async def locate() -> RedisEndpoint:
        now = template
        if now.ssl is not None:  # as the library does: they are renewed while the service runs
            now = template._replace(ssl=await off_loop(lambda: _tls_context(authorities)))
        if kind == "sentinel":
            return await _ask_sentinels(nodes, service, now, options)
        if kind == "cluster":
            return await _ask_cluster(nodes, key, now, options)
        return now._replace(host=nodes[0][0], port=nodes[0][1])

    return locate


def create_redis(url: str, pool_size: int, name: str) -> Redis | RedisCluster:
    """A pooled client of REDIS_URL that opens nothing yet and never retries; who uses it bounds the time of a command
    and how many are under way. `name` is what CLIENT LIST shows. Raises ValueError as `redis_locator` does."""
    from redis.asyncio import Redis, RedisCluster, Sentinel
    from redis.asyncio.cluster import ClusterNode

    kind, nodes, service, template, tls = _redis_place(url)
    options = {**_library_options(CONNECT_TIMEOUT_S, tls), "client_name": name}
    options |= {"username": template.username, "password": template.password, "max_connections": pool_size}
    if kind == "cluster":
        return RedisCluster(startup_nodes=[ClusterNode(host, port) for host, port in nodes], **options)
    options["db"] = template.db
    if kind == "sentinel":
        asked = _library_options(LOCATE_TIMEOUT_S_MIN, tls)
        sentinels: Any = Sentinel(nodes, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
        master: Redis = sentinels.master_for(service, **options)
        return master
    host, port = nodes[0]
    return Redis(host=host, port=port, **options)


def redis_database(url: str) -> int:
    """The number of the database that REDIS_URL names. Raises ValueError as `redis_locator` does."""
    return _redis_place(url).template.db


def _redis_place(url: str) -> _RedisPlace:
    scheme, _, rest = url.partition("://")
    try:
        parts = urlsplit("//" + rest)
    except ValueError:
        raise ValueError("cannot be read; special characters of a password are written as %XX") from None
    kind = scheme.partition("+")[2]
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    context, tls = _tls(scheme.startswith("rediss"), parts.query)
    nodes = [_host_and_port(host, 26379 if kind == "sentinel" else 6379) for host in hosts.split(",")]
    path = [part for part in parts.path.split("/") if part]
    service = path.pop(0) if kind == "sentinel" and path else ""
    if kind == "sentinel" and not service:
        raise ValueError("a Sentinel URL names the service after the hosts: redis+sentinel://host:26379/mymaster")
    if kind != "sentinel" and kind != "cluster" and len(nodes) > 1:
        raise ValueError("one host only; redis+sentinel:// and redis+cluster:// take several")
    if len(path) > 1 or not all(part.isdecimal() for part in path) or (kind == "cluster" and path):
        raise ValueError("after the host comes the number of a database at most, and none in a Cluster")
    template = RedisEndpoint(
        "", 0, int(path[0]) if path else 0, unquote(username) or None, unquote(password) or None, context
    )
    return _RedisPlace(kind, nodes, service, template, tls)


def _tls(wanted: bool, query: str) -> tuple[ssl.SSLContext | None, dict[str, Any]]:
    """Of our own connection, and in the words of the library. Raises ValueError."""
    given = parse_qsl(query, keep_blank_values=True)
    if not all(name == "ca" for name, _ in given) or (given and not wanted):
        raise ValueError("after ? may come ca=FILE, with rediss:// alone")
    if not wanted:
        return None, {}
    authorities = dict(given).get("ca")
    return _tls_context(authorities), {"ssl": True, "ssl_ca_certs": authorities}


def _tls_context(authorities: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise ValueError(f"ca: cannot be read: {error.strerror or error}") from None


def _host_and_port(text: str, port: int) -> tuple[str, int]:
    parts = urlsplit("//" + text)
    try:
        host, port = parts.hostname or "", parts.port or port
    except ValueError:
        host = ""
    if not host:
        raise ValueError("each host is a name or an address, perhaps with :port")
    return host, port


def _library_options(timeout_s: float, tls: dict[str, Any]) -> dict[str, Any]:
    """No retries: the library's ten of them would make a dead server cost seconds."""
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.maint_notifications import MaintNotificationsConfig

    once = Retry(NoBackoff(), 0)
    # With these on, its pool hands out idle connections that the server has closed.
    quiet = MaintNotificationsConfig(enabled=False)
    bounds = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    return {**bounds, "retry": once, "maint_notifications_config": quiet, **tls}


async def _ask_sentinels(
    nodes: list[tuple[str, int]], service: str, template: RedisEndpoint, options: dict[str, Any]
) -> RedisEndpoint:
    from redis.asyncio import Sentinel

    sentinels: Any = Sentinel(nodes, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
    try:
        host, port = await sentinels.discover_master(service)
    finally:
        for sentinel in sentinels.sentinels:
            await sentinel.aclose()
    return template._replace(host=str(host), port=int(port))


async def _ask_cluster(
    nodes: list[tuple[str, int]], key: str, template: RedisEndpoint, options: dict[str, Any]
) -> RedisEndpoint:
    from redis.asyncio import RedisCluster
    from redis.asyncio.cluster import ClusterNode

    cluster = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in nodes],
        username=template.username,
        password=template.password,
        **options,
    )
    try:
        await cluster.initialize()
        node = cluster.get_node_from_key(key)
        if node is None:
            raise ConnectionError("the Cluster has no node for this key")
    finally:
        await cluster.aclose()
    return template._replace(host=str(node.host), port=int(node.port))
