"""What a service holds in memory is mostly what it imported: no library of a part that is off, and nothing imported
by the first call that needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, service_environ

SCRIPT = """
import asyncio, os, sys
from app.cli import create_app, open_service, read_settings
async def opened():
    async with open_service(read_settings(os.environ), listen=("127.0.0.1", 8001)) as service:
        create_app(service)
asyncio.run(opened())
print(*sys.modules)
"""

OF_PARTS = {
    "redis": {"REDIS_URL": "redis://127.0.0.1:1"},
    "yaml": {"LIMITS_FILE": "limits.yaml"},
    "jwt": {"JWT_ISSUER": "https://issuer", "JWT_AUDIENCE": "us", "JWT_ALGORITHMS": "HS256", "JWT_SECRET": "x" * 32},
    "opentelemetry.sdk.trace": {"OTEL_TRACES_EXPORTER": "console"},
    "opentelemetry.exporter.otlp": {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
}
"""Libraries that come with a setting, and the settings."""

NEVER_AT_START = {"lxml", "grpc", "requests", "pydantic.v1"}
"""What tools import that read pages, one exporter of two and what the other would send by, and what FastAPI asks of
models in a route's signature."""


def modules_of_service(folder: Path, **environ: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=service_environ(folder, **environ),
        capture_output=True,
        check=True,
    )
    return set(done.stdout.decode().splitlines()[-1].split())


def test_a_service_without_redis_tokens_limits_and_spans_imports_none_of_their_libraries(tmp_path: Path) -> None:
    loaded = modules_of_service(tmp_path)
    assert not loaded & {*OF_PARTS, *NEVER_AT_START, "httpx", "rich", "cryptography", "opentelemetry.sdk"}


def test_a_service_has_imported_what_its_parts_need_before_the_first_call(tmp_path: Path) -> None:
    limits = tmp_path / "limits.yaml"
    limits.write_text("policies:\n  - {name: all, rate: 10/second}\n")
    on = {name: value for settings in OF_PARTS.values() for name, value in settings.items()}
    on |= {"LIMITS_FILE": str(limits), "OTEL_TRACES_EXPORTER": "otlp"}
    loaded = modules_of_service(tmp_path, **on, DATABASE_URL="postgresql+asyncpg://nobody@127.0.0.1:1/none")
    assert set(OF_PARTS) <= loaded
    assert not loaded & {*NEVER_AT_START, "sqlite3", "aiosqlite", "alembic"}
