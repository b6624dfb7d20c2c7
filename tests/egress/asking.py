"""An egress client of one test, and what it is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.egress import EgressClient, EgressResponse, parse_egress_allow
from app.errors import ToolError
from tests.origin import WAIT_S_MAX

LOOPBACK = "127.0.0.1"


@asynccontextmanager
async def egress(allow: str = LOOPBACK, pool_size: int = 4, **options: Any) -> AsyncIterator[EgressClient]:
    client = EgressClient(parse_egress_allow(allow), pool_size, **options)
    try:
        yield client
    finally:
        await client.aclose()


async def get(client: EgressClient, url: str, **options: Any) -> EgressResponse:
    return await client.request("GET", url, **{"timeout_s": WAIT_S_MAX, **options})


async def failure_of(call: Awaitable[object]) -> ToolError:
    with pytest.raises(ToolError) as caught:
        await call
    return caught.value


def answering(*answers: Sequence[str]) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    """A resolver that gives these answers one after another, the last one for ever; counts in `asked`."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    resolve.asked = asked  # type: ignore[attr-defined]
    return resolve
