"""The shipped rules and queries give an HPA what it needs: a real Prometheus, several processes, calls under way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from load.autoscale import NAMESPACE, Callers, Cluster, adapter_query, adapter_rules, phases
from tests.deploy.kustomize import K8S
from tests.prometheus import needs_prometheus
from tests.servers import make_folder, remove_folder, wait_until

SHRINK = 50.0
"""Of the target of 1,000 concurrent calls: 20, which two cores and 100 connections can show."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    needs_prometheus()
    folder = make_folder("agentcore-autoscale-")
    with Cluster(folder, SHRINK) as running:
        yield running
    remove_folder(folder)


@pytest.fixture
def callers(cluster: Cluster) -> Iterator[Callers]:
    with Callers(cluster.ports) as running:
        yield running
    assert not running.failures and running.answered, running.failures


def value_of(cluster: Cluster, query: str) -> float:
    rows = cluster.prometheus.query(query)
    return float(rows[0]["value"][1]) if len(rows) == 1 else -1.0


def test_the_adapters_rule_finds_the_series_and_gives_a_value_for_each_pod(cluster: Cluster, callers: Callers) -> None:
    cluster.step()
    callers.count = 16
    wait_until(
        lambda: sum((cluster.prometheus.concurrency_by_pod(cluster.ready) or {}).values()) == 16,
        "all calls are counted, each at its pod",
    )
    values = cluster.prometheus.concurrency_by_pod(cluster.ready)
    assert values is not None and values.keys() == set(cluster.ready) and all(values.values())
    (rule,) = adapter_rules()
    found = cluster.prometheus.ask("series", **{"match[]": rule["seriesQuery"]})
    assert {one["pod"] for one in found} == set(cluster.ready)
    overrides = rule["resources"]["overrides"]
    assert all(label in one for one in found for label in overrides)
    assert {one["__name__"] for one in found} == {rule["name"]["as"]} == {"tool_execution_concurrency"}


def test_the_query_of_keda_is_the_sum_over_the_pods(cluster: Cluster, callers: Callers) -> None:
    cluster.step()
    scaled = yaml.safe_load((K8S / "overlays" / "keda" / "scaled-object.yaml").read_text())
    query = scaled["spec"]["triggers"][1]["metadata"]["query"]
    callers.count = 12
    wait_until(lambda: value_of(cluster, query) == 12, "all calls are in the sum")
    assert cluster.prometheus.query(query.replace(NAMESPACE, "nowhere")) == [], "nothing, not 0: then KEDA fails"


def test_the_forecast_is_found_by_the_external_rule(cluster: Cluster, callers: Callers) -> None:
    cluster.step()
    (rule,) = adapter_rules("externalRules")
    callers.count = 10
    name = rule["name"]["matches"].strip("^$")
    query = adapter_query(rule, name, f'namespace="{NAMESPACE}"', "namespace")
    wait_until(lambda: callers.answered > 0 and value_of(cluster, query) >= 10, "the recording rule has seen the calls")
    assert cluster.prometheus.ask("series", **{"match[]": rule["seriesQuery"]})


def test_replicas_follow_the_load_and_stay_while_nobody_knows_it(cluster: Cluster, callers: Callers) -> None:
    said: list[str] = []
    phases(cluster, callers, 4, said.append)
    assert len(said) == 3
    sizes = [size for _, size in cluster.history]
    assert sizes[0] == sizes[-1] == 2 and max(sizes) == 4
