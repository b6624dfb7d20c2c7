"""A caller by its key, and the limits that bind a call, in process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.access.keys import NewKey
from app.service import Service, open_service
from app.settings import read_settings
from load.harness import LIMITS

Benchmark = Callable[..., Any]

TENANTS = 1_000

BROUGHT = [(name, b"x") for name in (b"host", b"user-agent", b"accept", b"content-type", b"content-length")]
"""Headers that a client sends anyway."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, Service, str]]:
    """A service with a key and limits; the loop stands still while a function of it is timed."""
    folder: Path = tmp_path_factory.mktemp("admission")
    limits = folder / "limits.yaml"
    limits.write_text(LIMITS)
    settings = {"DATABASE_URL": f"sqlite+aiosqlite:///{folder}/agentcore.db", "JOURNAL_DIR": str(folder)}
    settings |= {"AUTH_MODE": "required", "LIMITS_FILE": str(limits)}
    with asyncio.Runner() as runner:
        context = open_service(read_settings(settings))
        service = runner.run(context.__aenter__())
        _, credential = runner.run(service.keys.create(NewKey(tenant="bench", subject="bench")))
        yield runner, service, credential
        runner.run(context.__aexit__(None, None, None))


@pytest.mark.benchmark(group="access")
def bench_caller_of_a_known_key(benchmark: Benchmark, opened: tuple[asyncio.Runner, Service, str]) -> None:
    runner, service, credential = opened
    headers = [*BROUGHT, (b"authorization", f"Bearer {credential}".encode())]
    runner.run(service.access.identify(headers))
    benchmark(service.access.recognised, headers)


@pytest.mark.benchmark(group="admission")
def bench_rate_and_quota_in_process(benchmark: Benchmark, opened: tuple[asyncio.Runner, Service, str]) -> None:
    """A thousand tenants in turn."""
    admission = opened[1].admission
    tenants = itertools.cycle([f"tenant-{number}" for number in range(TENANTS)])

    def admit() -> object:
        return admission.admit(admission.bind(next(tenants), "subject", "default", "echo"), 1)

    benchmark(admit)
