"""What a HorizontalPodAutoscaler of k8s/ decides, worked out as Kubernetes does, on a clock of one's choosing.

Owns the arithmetic: the ratio and its tolerance, pods without a value, several metrics of which one may be missing,
stabilisation and the policies of `behavior`. Knows no cluster; `load.autoscale` feeds it and acts. The source is the
page "Horizontal Pod Autoscaling" of Kubernetes' documentation, section "Algorithm details".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 0.1
"""The controller's default: a ratio that is nearer to 1 changes nothing."""


def wanted_by_pods(
    values: Mapping[str, float], pods: Sequence[str], starting: Sequence[str], target: float
) -> int | None:
    """Replicas that a metric by pod asks for; None when nobody has a value.

    `starting` pods are not ready yet. Of a pod without a value the least useful is supposed: nothing when scaling up,
    the whole target when down.
    """
    ready = {pod: values[pod] for pod in pods if pod in values and pod not in starting}
    if not ready:
        return None
    ratio = sum(ready.values()) / len(ready) / target
    missing = [pod for pod in pods if pod not in values and pod not in starting]
    if not missing and not (starting and ratio > 1):
        return len(pods) if abs(ratio - 1) <= TOLERANCE else math.ceil(ratio * len(ready))
    supposed = dict(ready)
    if ratio != 1:
        supposed |= dict.fromkeys(missing, target if ratio < 1 else 0.0)
    if ratio > 1:
        supposed |= dict.fromkeys(starting, 0.0)
    again = sum(supposed.values()) / len(supposed) / target
    if abs(again - 1) <= TOLERANCE or (ratio < 1) != (again < 1):
        return len(pods)
    replicas = math.ceil(again * len(supposed))
    turned = replicas > len(pods) if again < 1 else replicas < len(pods)
    return len(pods) if turned else replicas


@dataclass
class Autoscaler:
    """One HPA over time. Seconds of its specification pass `haste` times as fast."""

    spec: Mapping[str, Any]
    haste: float = 1.0
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def replicas(self, now: float, current: int, wanted: Sequence[int | None]) -> int:
        """How many there shall be, when each metric asks for so many, or is missing."""
        asked = [one for one in wanted if one is not None]
        if not asked or (len(asked) < len(wanted) and max(asked) < current):
            return current
        steady = self._steady(now, current, max(asked))
        steady = min(max(steady, int(self.spec["minReplicas"])), int(self.spec["maxReplicas"]))
        bounded = self._bounded(now, current, steady)
        if bounded != current:
            self._changes.append((now, bounded - current))
        return bounded

    def _steady(self, now: float, current: int, wanted: int) -> int:
        """The least of what was wanted within the window when growing, the most when shrinking."""
        up, down = (self._window_s(name) for name in ("scaleUp", "scaleDown"))
        self._recommended = [(at, one) for at, one in self._recommended if now - at <= max(up, down)]
        self._recommended.append((now, wanted))
        least = min(one for at, one in self._recommended if now - at <= up)
        most = max(one for at, one in self._recommended if now - at <= down)
        return least if least > current else min(current, most)

    def _window_s(self, direction: str) -> float:
        return float(self.spec["behavior"][direction]["stabilizationWindowSeconds"]) / self.haste

    def _bounded(self, now: float, current: int, wanted: int) -> int:
        """As far as the policies let it go now: what changed within a policy's period counts."""
        if wanted == current:
            return current
        sign = 1 if wanted > current else -1
        bounds: list[int] = []
        for policy in self.spec["behavior"]["scaleUp" if sign > 0 else "scaleDown"]["policies"]:
            period_s = policy["periodSeconds"] / self.haste
            changed = sum(change for at, change in self._changes if now - at < period_s and change * sign > 0)
            began, value = current - changed, int(policy["value"])
            if policy["type"] == "Pods":
                bounds.append(began + sign * value)
            else:
                share = began * (1 + sign * value / 100)
                bounds.append(math.ceil(share) if sign > 0 else math.floor(share))
        # selectPolicy Max: the policy that allows most.
        return min(wanted, max(current, *bounds)) if sign > 0 else max(wanted, min(current, *bounds))
