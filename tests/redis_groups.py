"""Several Redis processes that work together: a master with replicas under Sentinels, and a Cluster of three masters.

Both are ready when they come out of their context manager's start, and gone after it. Knows nothing of the service.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import redis

from tests.servers import HOST, PORT_TRIES, PortTaken, RedisServer, free_port, wait_until

SERVICE = "agentcore"

SENTINELS = 3

QUORUM = 2

DOWN_AFTER_MS = 1000
"""Shorter would fail over whenever a loaded machine makes a server late."""

FAILOVER_TIMEOUT_MS = 3000
"""Twice this passes before a failover that went wrong is tried again."""

SLOTS = 16_384
"""Of every Cluster: its specification."""

CLUSTER_NODES = 3

Address = tuple[str, int]

Group = TypeVar("Group")


class SentinelServer(RedisServer):
    """One Sentinel. It is told of all others at once: left to find one another they take seconds."""

    name = "sentinel"

    def __init__(self, flavour: str | None) -> None:
        super().__init__(flavour)
        self.port = free_port()
        self.id = secrets.token_hex(20)
        self.watched: list[str] = []

    def watch(self, master: RedisServer, replicas: list[RedisServer], sentinels: list[SentinelServer]) -> None:
        self.watched = [
            f"sentinel monitor {SERVICE} {HOST} {master.port} {QUORUM}",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {SERVICE} {FAILOVER_TIMEOUT_MS}",
            *(f"sentinel known-replica {SERVICE} {HOST} {replica.port}" for replica in replicas),
            *(f"sentinel known-sentinel {SERVICE} {HOST} {one.port} {one.id}" for one in sentinels if one is not self),
        ]

    def lines(self) -> list[str]:
        return [f"bind {HOST}", f"port {self.port}", f"dir {self.folder}", f"sentinel myid {self.id}", *self.watched]

    def command(self) -> list[str]:
        return [*super().command(), "--sentinel"]

    def master_address(self) -> Address:
        host, port = self.cli("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE).split("\n")
        return host, int(port)

    def can_fail_over(self, replicas: int) -> bool:
        """It sees the other Sentinels, and enough replicas whose link to the master is up."""
        with contextlib.suppress(redis.ResponseError):
            if self.cli("SENTINEL", "CKQUORUM", SERVICE).startswith(f"OK {SENTINELS} "):
                return self.cli("SENTINEL", "REPLICAS", SERVICE).split("\n").count("ok") >= replicas
        return False


@dataclass
class SentinelGroup:
    """A master, its replicas and the Sentinels that watch them."""

    servers: list[RedisServer]
    sentinels: list[SentinelServer]
    service: str = SERVICE

    @property
    def addresses(self) -> list[Address]:
        """Of the Sentinels."""
        return [(HOST, sentinel.port) for sentinel in self.sentinels]

    @property
    def url(self) -> str:
        return f"redis+sentinel://{_joined(self.addresses)}/{self.service}"

    @property
    def master(self) -> RedisServer:
        """Whom the first running Sentinel takes for it."""
        address = next(sentinel for sentinel in self.sentinels if sentinel.is_running).master_address()
        return next(server for server in self.servers if (HOST, server.port) == address)

    def failover(self) -> RedisServer:
        """Kill the master, wait until every running Sentinel names another that takes writes; the new master."""
        killed = self.master
        killed.kill()
        wait_until(lambda: self._agree_on_another_than(killed), "another master")
        return self.master

    def _agree_on_another_than(self, killed: RedisServer) -> bool:
        named = {sentinel.master_address() for sentinel in self.sentinels if sentinel.is_running}
        return len(named) == 1 and (HOST, killed.port) not in named and self.master.cli("ROLE").startswith("master")


@contextlib.contextmanager
def start_sentinel_group(
    replicas: int = 1, flavour: str | None = None, **configuration: object
) -> Iterator[SentinelGroup]:
    """A master, `replicas` and three Sentinels, ready to fail over. Keywords configure master and replicas."""
    with contextlib.ExitStack() as stack:
        yield _retried(stack, lambda tried: _open_sentinel_group(tried, replicas, flavour, configuration))


def _open_sentinel_group(
    stack: contextlib.ExitStack, replicas: int, flavour: str | None, configuration: dict[str, object]
) -> SentinelGroup:
    # Without the delay, a replica's first copy begins at once.
    settings = {"repl-diskless-sync-delay": 0, **configuration}
    master = stack.enter_context(RedisServer(flavour, **settings))
    followers = [
        stack.enter_context(RedisServer(flavour, replicaof=f"{HOST} {master.port}", **settings))
        for _ in range(replicas)
    ]
    sentinels = [SentinelServer(flavour) for _ in range(SENTINELS)]
    for sentinel in sentinels:
        stack.callback(sentinel.close)
        sentinel.watch(master, followers, sentinels)
    for sentinel in sentinels:
        sentinel.start()
    for sentinel in sentinels:
        wait_until(lambda one=sentinel: one.can_fail_over(replicas), "Sentinels that can fail over")  # type: ignore[misc]
    return SentinelGroup([master, *followers], sentinels)


@dataclass
class Cluster:
    """Masters that share the slots; each keeps its part when it is killed and started again."""

    nodes: list[RedisServer]

    @property
    def addresses(self) -> list[Address]:
        return [(HOST, node.port) for node in self.nodes]

    @property
    def url(self) -> str:
        return f"redis+cluster://{_joined(self.addresses)}"

    def node_of(self, key: str) -> RedisServer:
        """Who holds a key."""
        slot = int(self.nodes[0].cli("CLUSTER", "KEYSLOT", key))
        return next(node for node, slots in zip(self.nodes, _shares(), strict=True) if slot in slots)

    def is_whole(self) -> bool:
        """Whether every node says that all slots are served and knows all nodes."""
        wanted = {"cluster_state:ok", f"cluster_slots_ok:{SLOTS}", f"cluster_known_nodes:{len(self.nodes)}"}
        return all(wanted <= set(node.cli("CLUSTER", "INFO").split()) for node in self.nodes)


@contextlib.contextmanager
def start_cluster(flavour: str | None = None, **configuration: object) -> Iterator[Cluster]:
    """Three masters with all slots. Keywords configure each of them."""
    with contextlib.ExitStack() as stack:
        yield _retried(stack, lambda tried: _open_cluster(tried, flavour, configuration))


def _open_cluster(stack: contextlib.ExitStack, flavour: str | None, configuration: dict[str, object]) -> Cluster:
    bus_ports = [free_port() for _ in range(CLUSTER_NODES)]
    nodes = [
        stack.enter_context(
            RedisServer(
                flavour,
                **{"cluster-enabled": "yes", "cluster-port": port, "cluster-node-timeout": 2000, **configuration},
            )
        )
        for port in bus_ports
    ]
    for epoch, (node, slots) in enumerate(zip(nodes, _shares(), strict=True), start=1):
        node.cli("CLUSTER", "ADDSLOTSRANGE", slots.start, slots.stop - 1)
        # Left to themselves all begin with the same epoch and settle that conflict first.
        node.cli("CLUSTER", "SET-CONFIG-EPOCH", epoch)
    for node, bus_port in zip(nodes[1:], bus_ports[1:], strict=True):
        nodes[0].cli("CLUSTER", "MEET", HOST, node.port, bus_port)
    cluster = Cluster(nodes)
    wait_until(cluster.is_whole, "a whole Cluster")
    return cluster


def _shares() -> list[range]:
    """The slots of each node."""
    bounds = [SLOTS * number // CLUSTER_NODES for number in range(CLUSTER_NODES + 1)]
    return [range(first, last) for first, last in itertools.pairwise(bounds)]


def _retried(stack: contextlib.ExitStack, opened: Callable[[contextlib.ExitStack], Group]) -> Group:
    """Some ports are chosen before they are bound: where somebody was faster, everything begins again."""
    for _ in range(PORT_TRIES - 1):
        with contextlib.ExitStack() as tried, contextlib.suppress(PortTaken):
            group = opened(tried)
            stack.push(tried.pop_all())
            return group
    return opened(stack)


def _joined(addresses: list[Address]) -> str:
    return ",".join(f"{host}:{port}" for host, port in addresses)
