"""`python -m load.shard`: how many calls a second one Redis can decide limits for, by its own CPU.

Starts a Redis and asks it as the service does, in so many callers at once: the calls of an event-loop tick share one
script. Prints Redis's CPU for each call by INFO, and its inverse: Redis runs scripts on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time

import redis

from app.clients import redis_locator
from app.limits.limit import DAILY, KEY_PREFIX, RATE, Limit, counter_key
from app.limits.redis_store import RedisStore
from app.limits.store import Ask, Verdict
from tests.servers import RedisServer

CALLERS = (1, 16, 64)
LIMITS = (1, 2, 4)
SECONDS = 2.0
TENANTS = 100
BUDGET_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of one row")
    seconds: float = parser.parse_args().seconds
    print(f"{'limits':>7}{'at once':>9}{'calls/s here':>14}{'Redis us a call':>17}{'calls/s of one shard':>22}")
    with RedisServer() as server:
        for limits, callers in itertools.product(LIMITS, CALLERS):
            calls, cpu_s = asyncio.run(measured(server.url, limits, callers, seconds))
            us = cpu_s / calls * 1e6
            print(f"{limits:>7}{callers:>9}{calls / seconds:>14,.0f}{us:>17.1f}{1e6 / us:>22,.0f}")


async def measured(url: str, limits: int, callers: int, seconds: float) -> tuple[int, float]:
    """Calls that were decided in so many seconds, and Redis's CPU for them."""
    store = RedisStore(redis_locator(url, KEY_PREFIX, BUDGET_S), BUDGET_S)
    task = asyncio.create_task(store.run(), name="limit-store")
    await store.settled()
    asks = [Ask(tuple(_limits(tenant, limits)), 1) for tenant in range(TENANTS)]
    ends = time.monotonic() + seconds
    before_s = cpu_seconds(url)
    counts = await asyncio.gather(*(_caller(store, asks, number, ends) for number in range(callers)))
    used_s = cpu_seconds(url) - before_s
    task.cancel()
    await asyncio.wait([task])
    await store.close()
    return sum(counts), used_s


def _limits(tenant: int, count: int) -> list[Limit]:
    """Rates and quotas in turn, all of them wide enough."""
    made = []
    for number in range(count):
        name = f"{tenant}-{number}"
        if number % 2:
            made.append(Limit(counter_key(name), name, DAILY, 10**9))
        else:
            made.append(Limit(counter_key(name), name, RATE, 10**6, period_us=10**6, burst=10**6))
    return made


async def _caller(store: RedisStore, asks: list[Ask], number: int, ends: float) -> int:
    count = 0
    while time.monotonic() < ends:
        verdict = store.ask(asks[(number + count) % len(asks)])
        if not isinstance(verdict, Verdict):
            await verdict
        count += 1
    return count


def cpu_seconds(url: str) -> float:
    with redis.Redis.from_url(url) as client:
        info = client.info("cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


if __name__ == "__main__":
    main()
