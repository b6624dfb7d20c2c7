"""As many tools, keys and rows as a benchmark wants. Knows no benchmark."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from sqlalchemy import insert, text

from app.access.keys import NewKey, new_secret
from app.access.store import KEYS
from app.clients import create_engine
from app.tools.tool import FunctionTool, ToolSpec

ROWS_AT_ONCE = 1_000

FILLED_AT_ONCE = 50_000
"""Rows of one statement: some seconds, well under what a connection waits for."""

_WORDS = """account alert archive backup balance batch bridge calendar catalog channel client cluster contract country
customer dashboard dataset delivery deploy device document domain email event export feature file forecast graph group
history image import index inventory invoice journal key label ledger license location mail map message metric model
network note order page password payment person phone pipeline policy price product profile project query queue report
request resource review role rule schedule schema search secret server session shipment signal site snapshot source
stock storage stream subscription summary table tag task team template ticket token topic trace track user vendor video
volume wallet weather webhook widget workflow zone"""
WORDS = _WORDS.split()


def tool_id(number: int) -> str:
    """All of one length, so that requests are of one length."""
    return f"work_{number:05}"


def tools(count: int) -> list[FunctionTool]:
    """That many tools with ids, names and descriptions of their own, over one function."""
    choose = random.Random(7)

    async def work(message: str) -> dict[str, str]:
        """Return the message."""
        return {"message": message}

    first = FunctionTool(work, ToolSpec(id="work", name="Work", description="Return the message."))
    made = []
    for number in range(count):
        verb, noun, more = choose.sample(WORDS, 3)
        spec = ToolSpec(
            id=tool_id(number),
            name=f"{verb} {noun}".title(),
            description=f"Work on the {noun} of a {verb} by its {more}.",
            category=choose.choice(("utility", "search", "database")),
            tags=(noun, more),
        )
        one = object.__new__(FunctionTool)  # schemas are shared: what is measured is the registry
        for name in ("_context_parameter", "_hints", "blocking", "function", "never_waits", "parameters", "result"):
            setattr(one, name, getattr(first, name))
        one.spec = spec
        made.append(one)
    return made


async def make_keys(database: str, count: int, tenants: int) -> list[str]:
    """Credentials that may call everything, of subjects of their own and so many tenants in turn."""
    rows, credentials = [], []
    for number in range(count):
        secret = new_secret()
        caller = NewKey(tenant=f"tenant-{number % tenants}", subject=f"subject-{number}").caller()
        row = {"id": secret.key_id, "secret_sha256": secret.secret_sha256, "created_at": time.time()}
        row |= {"tenant": caller.tenant, "subject": caller.subject, "limit_class": caller.limit_class}
        rows.append({**row, "scopes": " ".join(sorted(caller.scopes)), "tools": " ".join(caller.tools)})
        credentials.append(secret.credential)
    engine = create_engine(database, 1, 1)
    try:
        async with engine.begin() as connection:
            for some in _chunks(rows):
                await connection.execute(insert(KEYS), some)
    finally:
        await engine.dispose()
    return credentials


def _chunks(rows: list[dict[str, object]]) -> Iterator[list[dict[str, object]]]:
    return (rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE))


FILL = """
INSERT INTO tool_executions (execution_id, tool_id, tool_version, tenant, subject, status, started_at, finished_at,
    execution_ms, overhead_ms, attempts, cached, client_gone, trace_id, cost, parameters_bytes, parameters_sha256)
SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - :rows + n), 12, '0') || '7' ||
        substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid,
    'tool_' || n % 40, '1.0.0', 'tenant-' || n % 20, 'subject-' || n % 1000, 'success', now(), now(),
    3.8, 0.1, 1, false, false, md5(n::text), 1, 31, md5(n::text) || md5(n::text)
FROM generate_series(CAST(:first AS integer), CAST(:last AS integer)) AS n
"""
"""A part of rows of the last thousand seconds, a millisecond apart, as ids of version 7 (RFC 9562, section 5.7)."""


async def fill_log(database: str, rows: int, at_once: int = FILLED_AT_ONCE) -> None:
    """PostgreSQL's own rows: what is measured is the log's size, not how it was written."""
    engine = create_engine(database, 1, 1)
    try:
        for first in range(1, rows + 1, at_once):
            last = min(first + at_once - 1, rows)
            async with engine.begin() as connection:
                await connection.execute(text(FILL), {"rows": rows, "first": first, "last": last})
        async with engine.begin() as connection:
            await connection.exec_driver_sql("ANALYZE tool_executions")
    finally:
        await engine.dispose()
