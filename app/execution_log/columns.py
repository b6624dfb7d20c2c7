"""The row of one execution: its columns, in the order in which a record holds them.

A record is a JSON array of these values as UTF-8 bytes: what the journal keeps, the writer reads and every store takes.
Times are Unix seconds with microseconds, durations milliseconds, payloads JSON values that are redacted and capped
already (null when they are not kept), sizes bytes of the whole payload, digests hexadecimal SHA-256 of it.
"""

from __future__ import annotations

COLUMNS = (
    "execution_id",
    "tool_id",
    "tool_version",
    "tenant",
    "subject",
    "agent_id",
    "status",
    "error_type",
    "error_code",
    "started_at",
    "finished_at",
    "execution_ms",
    "overhead_ms",
    "attempts",
    "cached",
    "client_gone",
    "trace_id",
    "cost",
    "parameters",
    "parameters_bytes",
    "parameters_sha256",
    "result",
    "result_bytes",
    "result_sha256",
)
