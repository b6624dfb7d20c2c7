"""The only way out for tools: one guarded HTTP client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EgressResponse:
    status_code: int
    headers: dict[str, str]
    body: bytes
    url: str


class EgressClient:
    pass
