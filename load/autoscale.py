"""`python -m load.autoscale`: the HPA of k8s/, fed by a real Prometheus, scales real processes up and down under load.

There is no cluster: `load.hpa` decides as the controller would, on the shipped specification and the shipped rules of
prometheus-adapter. Calls go round robin to what is ready. Concurrency is divided by --shrink, time by 60. Between, the
load falls while Prometheus is gone: nothing may be scaled down then. Exit 1 where a call failed or a phase did not
end with the replicas that its load asks for.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson
import yaml

from load.durability import Service
from load.hpa import Autoscaler, wanted_by_pods
from load.rollout import made
from tests.conftest import ROOT
from tests.prometheus import HASTE, Prometheus, binary
from tests.servers import HOST

NAMESPACE = "agentcore-tools"
HPA_FILE = ROOT / "k8s" / "base" / "hpa.yaml"
ADAPTER_FILE = ROOT / "k8s" / "prometheus-adapter" / "config.yaml"

SYNC_S = 15 / HASTE
"""The controller looks every 15 s."""

CALL_S = 0.5
"""A call waits so long in the service: concurrency is then the number of callers, and costs little CPU."""

SETTLED_S_MAX = 60.0
DRAIN_S = 0.3


def hpa_spec(shrink: float = 1.0) -> dict[str, Any]:
    """The shipped one, its concurrency divided."""
    spec: dict[str, Any] = yaml.safe_load(HPA_FILE.read_text())["spec"]
    target = spec["metrics"][1]["pods"]["target"]
    target["averageValue"] = str(int(target["averageValue"]) / shrink)
    return spec


def adapter_rules(kind: str = "rules") -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = yaml.safe_load(ADAPTER_FILE.read_text())[kind]
    return rules


def adapter_query(rule: dict[str, Any], series: str, matchers: str, group_by: str) -> str:
    """The template of a rule filled in as the adapter does."""
    filled: str = rule["metricsQuery"]
    for name, value in (("Series", series), ("LabelMatchers", matchers), ("GroupBy", group_by)):
        filled = filled.replace(f"<<.{name}>>", value)
    return filled


class Scraping(Prometheus):
    """Scrapes whatever pods there are, with the labels that a ServiceMonitor gives."""

    def __init__(self) -> None:
        super().__init__(f"{HOST}:1")
        path = self.folder / "prometheus.yml"
        config = yaml.safe_load(path.read_text())
        (job,) = config["scrape_configs"]
        del job["static_configs"]
        job["file_sd_configs"] = [{"files": ["pods.json"], "refresh_interval": "100ms"}]
        path.write_text(yaml.safe_dump(config))
        self.scrape({})

    def scrape(self, pods: dict[str, int]) -> None:
        """From now on these, at their ports."""
        groups = [
            {"targets": [f"{HOST}:{port}"], "labels": {"namespace": NAMESPACE, "pod": pod}}
            for pod, port in pods.items()
        ]
        new = self.folder / "pods.json.new"
        new.write_bytes(orjson.dumps(groups))
        new.rename(self.folder / "pods.json")

    def concurrency_by_pod(self, pods: list[str]) -> dict[str, float] | None:
        """What the adapter answers to the HPA; None when it has no answer."""
        (rule,) = adapter_rules()
        series, _, _ = rule["seriesQuery"].partition("{")
        matchers = f'namespace="{NAMESPACE}",pod=~"{"|".join(pods)}"'
        try:
            rows = self.query(adapter_query(rule, series, matchers, "pod"))
        except OSError:
            return None
        return {row["metric"]["pod"]: float(row["value"][1]) for row in rows} or None

    def has_seen(self, pods: list[str], since: float) -> bool:
        """Whether it has scraped all of these after that Unix time; True where it does not answer."""
        series, _, _ = adapter_rules()[0]["seriesQuery"].partition("{")
        try:
            rows = self.query(f'timestamp({series}{{namespace="{NAMESPACE}",pod=~"{"|".join(pods)}"}})')
        except OSError:
            return True
        seen = {row["metric"]["pod"] for row in rows if float(row["value"][1]) > since}
        return seen.issuperset(pods)


@dataclass
class Callers:
    """So many at once, each waiting for its answer, spread over the ports in turn."""

    ports: Callable[[], list[int]]
    count: int = 0
    answered: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    _turn: itertools.count[int] = field(default_factory=itertools.count)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), name="callers")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()

    async def _all(self) -> None:
        running: set[asyncio.Task[None]] = set()
        while not self._ended.is_set():
            for _ in range(self.count - len(running)):
                task = asyncio.create_task(self._call())
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.sleep(0.005)
        await asyncio.gather(*running)

    async def _call(self) -> None:
        ports = self.ports()
        port = ports[next(self._turn) % len(ports)]
        try:
            async with asyncio.timeout(40):
                reader, writer = await asyncio.open_connection(HOST, port)
                writer.write(WAIT)
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                answer = orjson.loads(await reader.readexactly(int(length[1]) if length else 0))
                writer.close()
            status = answer["result"]["status"] if "result" in answer else str(answer["error"]["code"])
        except (OSError, EOFError, TimeoutError) as error:
            status = type(error).__name__
        self.answered += 1
        if status != "success":
            self.failures[status] += 1


BODY = orjson.dumps(
    {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools.execute",
        "params": {"tool_id": "wait", "parameters": {"seconds": CALL_S}},
    }
)
WAIT = (
    b"POST /api/v1/jsonrpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


class Cluster:
    """Pods that are processes, what scrapes them, and the loop that an HPA runs."""

    def __init__(self, folder: Path, shrink: float) -> None:
        self.spec = hpa_spec(shrink)
        self.target = float(self.spec["metrics"][1]["pods"]["target"]["averageValue"])
        self.prometheus = Scraping()
        self.history: list[tuple[float, int]] = []
        """When there were how many pods, from the beginning."""
        self._folder = folder
        self._autoscaler = Autoscaler(self.spec, HASTE)
        self._numbers = itertools.count()
        self._pods: dict[str, Service] = {}
        self._starting: dict[str, Future[Any]] = {}
        self._cpu: dict[str, tuple[float, float]] = {}
        self._starter = ThreadPoolExecutor(2, "pods")
        self._began = time.monotonic()
        self._moved_at = 0.0
        """When calls last began to go to other pods than before."""

    @property
    def size(self) -> int:
        return len(self._pods)

    @property
    def ready(self) -> list[str]:
        return [pod for pod in self._pods if pod not in self._starting]

    def ports(self) -> list[int]:
        return [self._pods[pod].port for pod in self.ready]

    def __enter__(self) -> Self:
        self.prometheus.start()
        self._scale(int(self.spec["minReplicas"]))
        for started in self._starting.values():
            started.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._starter.shutdown()
        for service in self._pods.values():
            service.kill()
        self.prometheus.close()

    def step(self) -> None:
        """One look of the controller. Calls that went from one pod to another between two scrapes would be counted at
        both: with 60 times the haste, a scrape is as long as the controller's interval, and it waits for them."""
        self._note_ready()
        if not self.prometheus.has_seen(self.ready, self._moved_at):
            return
        pods = list(self._pods)
        values = self.prometheus.concurrency_by_pod(self.ready)
        by_concurrency = None if values is None else wanted_by_pods(values, pods, list(self._starting), self.target)
        cpu = {pod: self._cpu_percent(pod) for pod in self.ready}
        by_cpu = wanted_by_pods(cpu, pods, list(self._starting), self._cpu_target)
        self._scale(self._autoscaler.replicas(time.monotonic(), self.size, [by_cpu, by_concurrency]))

    @property
    def _cpu_target(self) -> float:
        return float(self.spec["metrics"][0]["resource"]["target"]["averageUtilization"])

    def _note_ready(self) -> None:
        for pod, started in list(self._starting.items()):
            if started.done():
                started.result()
                del self._starting[pod]
                self._moved_at = time.time()
        self.prometheus.scrape({pod: self._pods[pod].port for pod in self.ready})

    def _cpu_percent(self, pod: str) -> float:
        """Of a core, which is what a pod requests, since the last look."""
        running = self._pods[pod].running
        assert running is not None
        used, now = cpu_seconds(running.process.pid), time.monotonic()
        before, since = self._cpu.get(pod, (used, now - 1))
        self._cpu[pod] = used, now
        return 100 * (used - before) / (now - since)

    def _scale(self, replicas: int) -> None:
        if replicas != self.size or not self.history:
            self.history.append((time.monotonic() - self._began, replicas))
        for _ in range(replicas - self.size):
            pod = f"agentcore-tools-{next(self._numbers)}"
            folder = made(self._folder / pod)
            database = f"sqlite+aiosqlite:///{folder}/agentcore.db"
            self._pods[pod] = Service(folder, database, DRAIN_SECONDS=str(DRAIN_S))
            self._starting[pod] = self._starter.submit(self._pods[pod].start)
        for pod in self.ready[: max(0, self.size - replicas)]:
            service = self._pods.pop(pod)  # no calls from now on
            self._moved_at = time.time()
            self.prometheus.scrape({one: self._pods[one].port for one in self.ready})
            self._starter.submit(service.terminate)

    def until(self, holds: Callable[[], bool], what: str, within_s: float = SETTLED_S_MAX) -> None:
        """Step until it holds."""
        ends = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > ends:
                raise TimeoutError(f"{what}: not within {within_s:g} s; {self.history}")
            self.step()
            time.sleep(SYNC_S)

    def go_on(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            self.step()
            time.sleep(SYNC_S)

    @property
    def settled(self) -> bool:
        return not self._starting


def cpu_seconds(pid: int) -> float:
    """That a process has used: utime and stime of proc_pid_stat(5), after the name, which may hold spaces."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=float, default=20.0, help="divides the target of concurrency")
    parser.add_argument("--replicas", type=int, default=5, help="what the load is made for")
    options = parser.parse_args()
    if binary("prometheus") is None:
        sys.exit("no Prometheus here: .ci/prometheus fetches it, or: apt install prometheus")
    with (
        tempfile.TemporaryDirectory(prefix="agentcore-autoscale-") as folder,
        Cluster(Path(folder), options.shrink) as cluster,
        Callers(cluster.ports) as callers,
    ):
        phases(cluster, callers, options.replicas, print)
    print(f"{callers.answered} calls, {sum(callers.failures.values())} failed {dict(callers.failures)}")
    print("replicas: " + ", ".join(f"{count} at {at:.1f} s" for at, count in cluster.history))
    sys.exit(1 if callers.failures else 0)


def phases(cluster: Cluster, callers: Callers, replicas: int, say: Callable[[str], object]) -> None:
    """Up with the load, nothing while Prometheus is gone, down without load. Raises where one does not end so."""
    least = int(cluster.spec["minReplicas"])
    # Nine tenths of what so many are for: by the tolerance neither more nor fewer.
    callers.count = math.ceil(cluster.target * (replicas - 0.4))
    cluster.until(lambda: cluster.size >= replicas and cluster.settled, "scaled up")
    cluster.go_on(2.0)
    say(f"{callers.count} calls at once, {cluster.target:g} a replica: {cluster.size} replicas")
    assert_size(cluster, replicas)
    cluster.prometheus.kill()
    callers.count = 0
    cluster.go_on(1.5 * cluster.spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] / HASTE)
    say(f"no calls and no Prometheus, past the time after which it may shrink: {cluster.size} replicas")
    assert_size(cluster, replicas)
    cluster.prometheus.start()
    cluster.until(lambda: cluster.size == least, "scaled down")
    say(f"no calls, Prometheus is back: {cluster.size} replicas")


def assert_size(cluster: Cluster, replicas: int) -> None:
    if cluster.size != replicas:
        raise RuntimeError(f"{cluster.size} replicas instead of {replicas}: {cluster.history}")


if __name__ == "__main__":
    main()
