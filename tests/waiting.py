"""How tests wait for what has no event of its own: bounded, and looking often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SOON_S = 60.0
"""Not a claim about speed: past it a test fails instead of hanging."""


async def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition, bounded by SOON_S."""
    async with asyncio.timeout(SOON_S):
        while not holds():
            await asyncio.sleep(0.001)
