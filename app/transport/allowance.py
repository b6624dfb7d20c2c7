"""What is left of a limit, as HTTP headers: RateLimit-Limit, -Remaining, -Reset in the three-header form of
draft-ietf-httpapi-ratelimit-headers-06 (later drafts have no field that clients read yet), and Retry-After (RFC 9110).
"""

from __future__ import annotations

import math

from app.limits.admission import Allowance


def limit_headers(allowance: Allowance | None, retry_after_ms: int | None = None) -> list[tuple[bytes, bytes]]:
    """Headers of a single call that met a limit; seconds are rounded up, so that who waits them finds it open."""
    headers: list[tuple[bytes, bytes]] = []
    if allowance is not None:
        headers += (
            (b"ratelimit-limit", b"%d" % allowance.terms.amount),
            (b"ratelimit-remaining", b"%d" % allowance.remaining),
            (b"ratelimit-reset", b"%d" % math.ceil(allowance.reset_s)),
        )
    if retry_after_ms is not None:
        headers.append((b"retry-after", b"%d" % retry_after_s(retry_after_ms)))
    return headers


def limit_lines(allowance: Allowance, retry_after_ms: int | None) -> bytes:
    """The same as lines, for a door that writes its head itself."""
    lines = b"ratelimit-limit: %d\r\nratelimit-remaining: %d\r\nratelimit-reset: %d\r\n" % (
        allowance.terms.amount,
        allowance.remaining,
        math.ceil(allowance.reset_s),
    )
    return lines if retry_after_ms is None else lines + b"retry-after: %d\r\n" % retry_after_s(retry_after_ms)


def retry_after_s(retry_after_ms: int) -> int:
    """Whole seconds, at least 1."""
    return max(1, math.ceil(retry_after_ms / 1000))
