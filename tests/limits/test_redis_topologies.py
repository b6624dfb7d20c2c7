"""Limits behind Sentinel and on a Cluster, of real processes: a failover and a moved slot need no restart."""

from __future__ import annotations

import asyncio

import pytest
from redis import RedisError

from app.limits.limit import KEY_PREFIX
from app.limits.store import Ask
from tests.limits.stores import answer, daily, rate, running, until_answered, until_away
from tests.redis_groups import Cluster, start_cluster, start_sentinel_group
from tests.servers import RedisServer
from tests.waiting import SOON_S

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("quiet")]

BUDGET_S = 2.0


async def test_a_failover_of_sentinel_is_followed() -> None:
    limits = daily(1_000), rate(1_000)
    with start_sentinel_group() as group:
        async with running(group.url, BUDGET_S) as store:
            assert store.up, store.reason
            assert (await answer(store, Ask(limits, 3))).passes
            promoted = await asyncio.to_thread(group.failover)
            await asyncio.wait_for(until_answered(store, *limits), SOON_S)
            assert (await answer(store, Ask(limits, 1))).passes
            assert promoted.cli("EXISTS", limits[0].key) == "1"


async def test_sentinels_that_are_away_but_one_are_enough() -> None:
    limit = daily(10)
    with start_sentinel_group() as group:
        for sentinel in group.sentinels[:2]:
            sentinel.kill()
        async with running(group.url, BUDGET_S) as store:
            assert store.up, store.reason
            assert (await answer(store, Ask((limit,), 1))).passes
        group.sentinels[2].pause()
        async with running(group.url, BUDGET_S) as store:
            assert not store.up


async def test_a_cluster_counts_all_limits_on_one_node_and_a_moved_slot_is_followed() -> None:
    limits = daily(1_000), rate(1_000), daily(1_000)
    with start_cluster() as cluster:
        owner = cluster.node_of(KEY_PREFIX)
        async with running(cluster.url, BUDGET_S) as store:
            assert store.up, store.reason
            assert (await answer(store, Ask(limits, 3))).passes
            assert all(owner.cli("EXISTS", limit.key) == "1" for limit in limits)
            other = next(node for node in cluster.nodes if node is not owner)
            move_slot(cluster, owner, other)
            await asyncio.wait_for(until_answered(store, *limits), SOON_S)
            assert (await answer(store, Ask(limits, 1))).states[0][2] == 4, "what was counted moved along"
            assert other.cli("EXISTS", limits[0].key) == "1"


async def test_a_node_of_a_cluster_that_comes_back_is_found_again() -> None:
    limit = daily(1_000)
    with start_cluster() as cluster:
        owner = cluster.node_of(KEY_PREFIX)
        async with running(cluster.url, BUDGET_S) as store:
            await answer(store, Ask((limit,), 1))
            await asyncio.to_thread(owner.kill)
            await until_away(store)
            await asyncio.to_thread(owner.start)
            await asyncio.wait_for(until_answered(store, limit), SOON_S)


def move_slot(cluster: Cluster, source: RedisServer, target: RedisServer) -> None:
    """As redis-cli --cluster reshard does, key by key."""
    slot = source.cli("CLUSTER", "KEYSLOT", KEY_PREFIX)
    source_id, target_id = source.cli("CLUSTER", "MYID"), target.cli("CLUSTER", "MYID")
    target.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    source.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    for key in source.cli("CLUSTER", "GETKEYSINSLOT", slot, 1000).split():
        source.cli("MIGRATE", target.host, target.port, key, 0, 5000)
    for node in (target, source, *cluster.nodes):
        try:
            node.cli("CLUSTER", "SETSLOT", slot, "NODE", target_id)
        except RedisError:
            assert node is not target, "a bystander may have heard of it already"
