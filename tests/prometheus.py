"""A real Prometheus and its promtool for the tests: from the PATH, or where `.ci/prometheus` puts Debian's package.

Rule files are used as they are but for their time, which `hastened` runs 60 times as fast. Knows no metric.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from tests.conftest import ROOT
from tests.servers import HOST, Server

MONITORING = ROOT / "k8s" / "monitoring"
RULE_FILES = (MONITORING / "rules.yaml", MONITORING / "alerts.yaml")
FETCHED = Path(sys.prefix) / "prometheus" / "usr" / "bin"

HASTE = 60
"""A minute of the rules is a second of the test."""

SCRAPE_MS = 500


@functools.cache
def binary(name: str) -> Path | None:
    found = shutil.which(name) or shutil.which(name, path=str(FETCHED))
    return Path(found) if found else None


def needs_prometheus() -> None:
    """Skip, and say so: the summary of the run lists it."""
    if binary("prometheus") is None or binary("promtool") is None:
        pytest.skip("NOT TESTED: no Prometheus here. `.ci/prometheus` fetches it, or: apt install prometheus")


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = binary("promtool")
    assert program is not None
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def hastened(text: str) -> str:
    """PromQL or a rule file with every duration divided by HASTE."""
    text = re.sub(r"(?<!\w)(\d+)m\b", lambda found: f"{int(found[1]) * 60_000 // HASTE}ms", text)
    text = re.sub(r"(?<!\w)(\d+)h\b", lambda found: f"{int(found[1]) * 3_600_000 // HASTE}ms", text)
    return text.replace("5 * 60", f"5 * {60 // HASTE}")


class Prometheus(Server):
    """Scrapes one target as the job `agentcore-tools` under the hastened rules, and tells alerts to `alertmanager`."""

    name = "prometheus"

    def __init__(self, target: str, alertmanager: str | None = None) -> None:
        super().__init__()
        for path in RULE_FILES:
            (self.folder / path.name).write_text(hastened(path.read_text()))
        labels = {"namespace": "tests"}
        config: dict[str, Any] = {
            "global": {
                "scrape_interval": f"{SCRAPE_MS}ms",
                "scrape_timeout": f"{SCRAPE_MS}ms",
                "evaluation_interval": "500ms",
            },
            "rule_files": [path.name for path in RULE_FILES],
            "scrape_configs": [
                {"job_name": "agentcore-tools", "static_configs": [{"targets": [target], "labels": labels}]}
            ],
        }
        if alertmanager is not None:
            config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    def command(self) -> list[str]:
        return [
            str(binary("prometheus")),
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            f"--web.listen-address={HOST}:{self.port}",
            "--enable-feature=exemplar-storage",
            "--rules.alert.resend-delay=500ms",
        ]

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def ask(self, path: str, **parameters: str) -> Any:
        """What the API answers; a refusal raises, with its text."""
        url = f"http://{HOST}:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return orjson.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that it gives now. Values that are no number count as none: no panel shows them."""
        rows = self.ask("query", query=expression)["result"]
        return [row for row in rows if row["value"][1] != "NaN"]
