"""`python -m tests.deploy.prometheus_rule`: k8s/monitoring's rules as a PrometheusRule for the Prometheus operator.

kustomize cannot put a file into an object's field. A test holds the written file to what this makes.
"""

from __future__ import annotations

import yaml

from tests.conftest import ROOT
from tests.prometheus import RULE_FILES

WRITTEN = ROOT / "k8s" / "components" / "monitoring" / "prometheus-rule.yaml"

HEAD = """# Made from k8s/monitoring/rules.yaml and alerts.yaml by python -m tests.deploy.prometheus_rule; change those.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: agentcore-tools
  labels: {app.kubernetes.io/name: agentcore-tools, app.kubernetes.io/part-of: agentcore-tools}
spec:
"""


def made() -> str:
    groups = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"]]
    text = yaml.safe_dump({"groups": groups}, sort_keys=False, width=1_000, allow_unicode=True)
    return HEAD + "".join(f"  {line}" if line.strip() else line for line in text.splitlines(keepends=True))


if __name__ == "__main__":
    WRITTEN.write_text(made())
