"""What an HPA decides, on a clock of the test's own and the specification that is shipped."""

from __future__ import annotations

import itertools

import pytest

from load.autoscale import hpa_spec
from load.hpa import Autoscaler, wanted_by_pods

TARGET = 1000.0


def pods(*values: float | None) -> tuple[dict[str, float], list[str]]:
    """Pods by these values; None is one that has none."""
    names = [f"pod-{number}" for number in range(len(values))]
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}, names


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((1000, 1000), 2),
        ((1090, 1090), 2),  # within the tolerance
        ((910, 910), 2),
        ((1200, 1200), 3),
        ((1500, 0), 2),  # round robin mends that, more replicas do not
        ((5000, 5000), 10),
        ((100, 100, 100), 1),
        ((0, 0), 0),
        ((None, None), None),
        ((2000, None), 2),  # going up, what is not known is idle: 1000 each
        ((3000, None), 3),
        ((100, None, None), 3),  # going down, it is full: 700 each
        ((100, 100, 100, None), 2),
    ],
)
def test_the_replicas_that_a_metric_asks_for(values: tuple[float | None, ...], wanted: int | None) -> None:
    assert wanted_by_pods(*pods(*values), [], TARGET) == wanted


def test_a_pod_that_starts_counts_as_idle_so_that_it_is_not_joined_by_more() -> None:
    values, names = pods(1500, 1500, None)
    assert wanted_by_pods(values, names, ["pod-2"], TARGET) == 3
    assert wanted_by_pods(values, names[:2], [], TARGET) == 3


def followed(autoscaler: Autoscaler, replicas: int, wanted: list[int | None], since: float, until: float) -> list[int]:
    """The replicas at every look, 15 s apart."""
    found = []
    for second in range(int(since), int(until), 15):
        replicas = autoscaler.replicas(float(second), replicas, wanted)
        found.append(replicas)
    return found


def test_it_grows_at_once_by_twice_as_many_or_four() -> None:
    assert followed(Autoscaler(hpa_spec()), 2, [20], 0, 60) == [6, 12, 20, 20]


def test_it_shrinks_after_five_quiet_minutes_by_a_tenth_or_one_a_minute() -> None:
    autoscaler = Autoscaler(hpa_spec())
    autoscaler.replicas(0.0, 20, [20])
    found = followed(autoscaler, 20, [2], 15, 900)
    assert found[:20] == [20] * 20 and found[20] == 18 and found[24] == 16
    assert all(before - after in (0, 1, 2) for before, after in itertools.pairwise(found))


def test_a_burst_within_the_window_keeps_the_replicas() -> None:
    autoscaler = Autoscaler(hpa_spec())
    autoscaler.replicas(0.0, 10, [10])
    assert followed(autoscaler, 10, [2], 15, 300) == [10] * 19
    autoscaler.replicas(300.0, 10, [9])
    assert followed(autoscaler, 10, [2], 315, 600)[-1] == 9


def test_it_never_passes_its_bounds() -> None:
    assert followed(Autoscaler(hpa_spec()), 16, [500], 0, 30) == [20, 20]
    assert followed(Autoscaler(hpa_spec()), 2, [0], 0, 900)[-1] == 2


def test_while_a_metric_is_missing_it_grows_by_the_other_and_never_shrinks() -> None:
    assert followed(Autoscaler(hpa_spec()), 10, [1, None], 0, 1800) == [10] * 120
    assert followed(Autoscaler(hpa_spec()), 10, [12, None], 0, 30)[-1] == 12
    assert followed(Autoscaler(hpa_spec()), 10, [None, None], 0, 900)[-1] == 10
