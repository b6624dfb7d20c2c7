"""One row for each execution, by month on PostgreSQL, and the records that no row could be made of.

Frozen as any migration is: `app/execution_log/partitions.py` makes the months that come later and has its own words.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

MONTHS = range(-1, 4)
"""Last month, for records that waited in a journal, this one, and three ahead."""


def upgrade() -> None:
    for statement in statements(op.get_context().dialect.name, datetime.now(UTC)):
        op.execute(statement)


def statements(dialect: str, now: datetime) -> Iterator[str]:
    """All that makes the tables, one statement each."""
    if dialect == "sqlite":
        yield SQLITE_TABLE
    else:
        yield POSTGRESQL_TABLE
        # Nothing is ever refused for its id: what belongs to no month goes here.
        yield "CREATE TABLE tool_executions_other PARTITION OF tool_executions DEFAULT"
    for name, columns in INDEXES.items():
        yield f"CREATE INDEX {name} ON tool_executions {columns}"
    if dialect == "sqlite":
        yield SQLITE_DEAD
        return
    yield from months(now)
    yield POSTGRESQL_DEAD


def months(now: datetime) -> Iterator[str]:
    this = now.year * 12 + now.month - 1
    for month in range(this + MONTHS.start, this + MONTHS.stop):
        year, before = divmod(month, 12)
        yield (
            f"CREATE TABLE tool_executions_{year:04d}_{before + 1:02d} PARTITION OF tool_executions "
            f"FOR VALUES FROM ('{first_id(month)}') TO ('{first_id(month + 1)}')"
        )


def first_id(month: int) -> str:
    """The least UUIDv7 of a month (RFC 9562, section 5.7), months counted from year 0."""
    year, before = divmod(month, 12)
    digits = f"{int(datetime(year, before + 1, 1, tzinfo=UTC).timestamp()) * 1000:012x}"
    return f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000"


# An entry of a B-tree holds at most 2,704 bytes (a third of a page): longer texts must not get near an index.
POSTGRESQL_TABLE = """
CREATE TABLE tool_executions (
    execution_id uuid NOT NULL PRIMARY KEY,
    tool_id text NOT NULL CONSTRAINT tool_id_length CHECK (octet_length(tool_id) <= 1024),
    tool_version text,
    tenant text NOT NULL CONSTRAINT tenant_length CHECK (octet_length(tenant) <= 1024),
    subject text NOT NULL CONSTRAINT subject_length CHECK (octet_length(subject) <= 1024),
    agent_id text,
    status text NOT NULL CONSTRAINT status_length CHECK (octet_length(status) <= 64),
    error_type text,
    error_code text,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    execution_ms double precision,
    overhead_ms double precision,
    attempts integer,
    cached boolean,
    client_gone boolean,
    trace_id text,
    cost bigint,
    parameters jsonb,
    parameters_bytes bigint,
    parameters_sha256 text,
    result jsonb,
    result_bytes bigint,
    result_sha256 text
) PARTITION BY RANGE (execution_id)
"""

SQLITE_TABLE = """
CREATE TABLE tool_executions (
    execution_id text NOT NULL PRIMARY KEY,
    tool_id text NOT NULL CONSTRAINT tool_id_length CHECK (length(CAST(tool_id AS blob)) <= 1024),
    tool_version text,
    tenant text NOT NULL CONSTRAINT tenant_length CHECK (length(CAST(tenant AS blob)) <= 1024),
    subject text NOT NULL CONSTRAINT subject_length CHECK (length(CAST(subject AS blob)) <= 1024),
    agent_id text,
    status text NOT NULL CONSTRAINT status_length CHECK (length(CAST(status AS blob)) <= 64),
    error_type text,
    error_code text,
    started_at integer NOT NULL, -- microseconds since 1970, as is finished_at
    finished_at integer NOT NULL,
    execution_ms real,
    overhead_ms real,
    attempts integer,
    cached integer,
    client_gone integer,
    trace_id text,
    cost integer,
    parameters text, -- JSON, as is result
    parameters_bytes integer,
    parameters_sha256 text,
    result text,
    result_bytes integer,
    result_sha256 text
)
"""

INDEXES = {
    "tool_executions_by_tenant": "(tenant, execution_id)",
    "tool_executions_by_tool": "(tenant, tool_id, execution_id)",
    "tool_executions_by_subject": "(tenant, subject, execution_id)",
    "tool_executions_by_failure": "(tenant, status, execution_id) WHERE status <> 'success'",
}
"""Why these: docs/adr/0014-rows-by-month.md."""

# A record that is offered twice is dead once.
POSTGRESQL_DEAD = """
CREATE TABLE tool_executions_dead (
    record_sha256 bytea NOT NULL PRIMARY KEY,
    execution_id text,
    record bytea NOT NULL,
    sqlstate text NOT NULL,
    reason text NOT NULL,
    at timestamptz NOT NULL DEFAULT now()
)
"""

SQLITE_DEAD = """
CREATE TABLE tool_executions_dead (
    record_sha256 blob NOT NULL PRIMARY KEY,
    execution_id text,
    record blob NOT NULL,
    sqlstate text NOT NULL,
    reason text NOT NULL,
    at integer NOT NULL -- microseconds since 1970
)
"""
