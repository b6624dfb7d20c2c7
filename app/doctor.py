"""What `agentcore-tools doctor` looks at: each finding says what is wrong and what to do about it."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from app.migration import MigrationError, version, versions
from app.opening import log_modes, open_tracing_of
from app.service import Service
from app.settings import SettingsError, check_bind
from app.telemetry.otel_variables import is_exporting, odd_variables

OPEN_FILES_MIN = 4096
"""Two sockets a call at the default of 1,500 calls, and room for idle clients."""

RELEASED_UNIX_S = 1_700_000_000
"""A clock before this (2023) is wrong: execution ids carry the time and must sort by it."""


class Finding(NamedTuple):
    what: str
    ok: bool
    says: str


async def examine(service: Service, host: str, port: int) -> list[Finding]:
    """Every check, in the order in which one would mend things."""
    settings = Finding("settings", True, f"profile {service.settings.profile}")
    return [
        settings,
        await _database(service),
        *await _tokens(service),
        await _limits(service),
        await _tracing(service, host, port),
        *await asyncio.to_thread(lambda: [*_local(service, host, port)]),
    ]


def examine_refused(error: SettingsError, host: str, port: int) -> list[Finding]:
    """What the settings are refused for, and what can be looked at without any."""
    return [Finding("settings", False, str(error)), _listen(host, port), _open_files(), _clock()]


def _local(service: Service, host: str, port: int) -> Iterator[Finding]:
    """What is asked of this machine alone."""
    yield _bind(service, host)
    yield _listen(host, port)
    yield _journal(service)
    yield Finding("tools", bool(len(service.registry)), f"{len(service.registry)} registered")
    for problem in service.load_problems:
        says = f"{problem.reason}; mend it, or take the source out of TOOL_MODULES or uninstall it"
        yield Finding(f"tools from {problem.source}", False, says)
    yield _open_files()
    yield _clock()


async def _database(service: Service) -> Finding:
    """Reached, and with the tables that this version needs."""
    try:
        found, newest = await version(service.database.engine), versions()[-1]
    except MigrationError as error:
        return Finding("database", False, str(error))
    if (found or "") < newest:
        says = f"its tables are at {found or 'nothing'}, {newest} is needed; run agentcore-tools migrate"
        return Finding("database", False, says)
    return Finding("database", True, f"{service.database.engine.dialect.name}, tables at {found}")


async def _tokens(service: Service) -> list[Finding]:
    """The keys of tokens can be read, and there is one."""
    keys = service.access.token_keys
    if keys is None:
        return []
    await keys.refresh()
    if keys.problem is None:
        return [Finding("token keys", True, "there are some")]
    says = f"JWT_JWKS: {keys.problem}; give a path or a URL of a JWK Set that can be read from here"
    return [Finding("token keys", False, says)]


async def _limits(service: Service) -> Finding:
    """The service tried to reach Redis, and to count there, when it was opened."""
    store = service.admission.store
    if not store.up:
        return Finding("limits", False, f"{store.state}; check REDIS_URL, and that this user may write there")
    if trouble := await store.trouble():
        return Finding("limits", False, f"{trouble}; set noeviction, or give the limits a Redis of their own")
    return Finding("limits", True, store.state)


async def _tracing(service: Service, host: str, port: int) -> Finding:
    """Opened as `serve` does it, and closed again: nothing is sent."""
    if not service.settings.enable_tracing:
        return Finding("tracing", True, "off")
    try:
        tracing = open_tracing_of(service.settings, (host, port))
    except SettingsError as error:
        return Finding("tracing", False, f"{error}; correct it or take it away")
    await tracing.close()
    if odd := [*odd_variables(os.environ)]:
        return Finding("tracing", False, "; ".join(odd))
    if is_exporting(os.environ) and not tracing.recording:
        return Finding("tracing", False, "spans go nowhere; check OTEL_TRACES_EXPORTER and OTEL_EXPORTER_OTLP_*")
    return Finding("tracing", True, "spans are sent" if tracing.recording else "ids are made, no span is sent")


def _journal(service: Service) -> Finding:
    """Its folder can be made and written, and the disk has room for the whole of it. Without Redis the outcomes of
    idempotency keys are there too, whether there is a journal or not."""
    settings = service.settings
    journals = bool(log_modes(settings, service.registry) - {"buffered"})
    if not journals and settings.redis_url is not None:
        return Finding("journal", True, "not used")
    folder = settings.journal_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # as the journal itself
        with tempfile.TemporaryFile(dir=folder):
            free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        says = f"{folder} cannot be written ({error.strerror}); mend its rights, or set JOURNAL_DIR"
        keyed = "" if journals else "; calls with an idempotency key are refused until then"
        return Finding("journal", False, says + keyed)
    if journals and free_bytes < settings.journal_max_bytes:
        says = f"{folder} has {free_bytes} bytes free, JOURNAL_MAX_BYTES is {settings.journal_max_bytes}; lower it"
        return Finding("journal", False, says)
    return Finding(
        "journal", True, f"{folder} can be written{'' if journals else ', for outcomes of idempotency keys'}"
    )


def _bind(service: Service, host: str) -> Finding:
    try:
        check_bind(service.settings, host, service.access.keys_exist)
    except SettingsError as error:
        return Finding("access", False, str(error))
    return Finding("access", True, f"AUTH_MODE {service.settings.auth_mode} may serve on {host}")


def _listen(host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        says = f"{host} port {port} cannot be bound ({reason}); choose another --host or --port"
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            says += ", or --port 0 to look beside the service that has it"
        return Finding("address", False, says)
    return Finding("address", True, f"{host}:{port} is free")


def _open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # the service raises its soft limit to the hard one
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES_MIN:
        says = f"the hard limit is {hard}; raise it to {OPEN_FILES_MIN}, as root: ulimit -Hn {OPEN_FILES_MIN}"
        return Finding("open files", False, says)
    return Finding("open files", True, f"up to {hard}")


def _clock() -> Finding:
    if time.time() < RELEASED_UNIX_S:
        return Finding("clock", False, "the system clock is in the past; set it, for example by NTP")
    return Finding("clock", True, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
