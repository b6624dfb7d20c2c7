"""What k8s/ renders to: valid, closed where it says so, and in agreement with the service that it runs."""

from __future__ import annotations

import copy
import ipaddress
import re
import tomllib
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.clients import CLOSE_TIMEOUT_S
from app.egress.rules import is_metadata, is_public
from app.limits.limits_file import read_policies
from app.service import LOG_DRAIN_S
from app.settings import PROFILES, Settings, read_settings
from app.transport.server import FINISH_MARGIN_S
from tests.conftest import ROOT, Running
from tests.deploy.kustomize import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    Object,
    needs_kustomize,
    of_kind,
    pod_template,
    render,
    render_with,
    the,
)
from tests.deploy.prometheus_rule import WRITTEN, made

VERSIONS = ("1.30", "1.33", "1.37")
"""The oldest that has every field in use, and two later ones."""

CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds that the schemas of Kubernetes do not know."""

OPTIONAL = ("forecast", "journal-volume", "managed-stores")
"""Components that no overlay has."""

WORKLOADS = ("Deployment", "StatefulSet", "Job")

ENUMS = {
    ("spec", "metrics", "type"): {"Resource", "Pods", "External"},
    ("target", "type"): {"Utilization", "AverageValue"},
    ("strategy", "type"): {"RollingUpdate"},
    ("spec", "type"): {"ClusterIP"},
    ("policies", "type"): {"Percent", "Pods"},
    ("spec", "policyTypes"): {"Ingress", "Egress"},
    ("ports", "protocol"): {"TCP", "UDP"},
    ("seccompProfile", "type"): {"RuntimeDefault"},
    ("drop",): {"ALL"},
    ("topologySpreadConstraints", "whenUnsatisfiable"): {"ScheduleAnyway"},
    ("accessModes",): {"ReadWriteOnce"},
    ("selectPolicy",): {"Max"},
    ("restartPolicy",): {"Never"},
    ("imagePullPolicy",): {"IfNotPresent"},
    ("fsGroupChangePolicy",): {"OnRootMismatch"},
    ("podManagementPolicy",): {"Parallel"},
    ("unhealthyPodEvictionPolicy",): {"AlwaysAllow"},
    ("matchExpressions", "operator"): {"In"},
    ("updateStrategy", "type"): {"RollingUpdate"},
    ("whenScaled",): {"Retain"},
    ("whenDeleted",): {"Retain"},
}
"""Texts of which an API server takes only some, and schemas take any: what we use of them, by the end of their path."""


@pytest.fixture(autouse=True)
def _kustomize() -> None:
    needs_kustomize()


@pytest.fixture(params=[*OVERLAYS, *(f"+{name}" for name in OPTIONAL)])
def objects(request: pytest.FixtureRequest) -> list[Object]:
    """Every overlay, and production with each component that no overlay has."""
    name: str = request.param
    if name.startswith("+"):
        return render_with("production", name[1:])
    return render(K8S / "overlays" / name)


@pytest.fixture
def production() -> list[Object]:
    return render(K8S / "overlays" / "production")


def workloads(objects: list[Object]) -> list[Object]:
    return [one for one in objects if one["kind"] in WORKLOADS]


def service_of(objects: list[Object]) -> Object:
    """The Deployment, or what stands in its place."""
    (found,) = [one for one in workloads(objects) if one["metadata"]["name"] == "agentcore-tools"]
    return found


def settings_of(objects: list[Object]) -> dict[str, str]:
    data: dict[str, str] = the(objects, "ConfigMap", "agentcore-tools-settings")["data"]
    return data


def read(objects: list[Object]) -> Settings:
    """As the service would, with a Secret like the one that the documents describe."""
    secret = {"DATABASE_URL": "postgresql+asyncpg://u:p@db/agentcore", "REDIS_URL": "redis://redis:6379/0"}
    return read_settings({**secret, **settings_of(objects)})


def size(text: str | int) -> int:
    """Bytes of a Kubernetes quantity."""
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", str(text))
    assert found, text
    return int(found[1]) << {None: 0, "Ki": 10, "Mi": 20, "Gi": 30}[found[2]]


# Rendering and schemas


def test_every_component_is_in_an_overlay_or_tested_by_itself() -> None:
    used = {
        Path(one).name
        for overlay in OVERLAYS
        for one in yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text()).get("components", ())
    }
    assert used | set(OPTIONAL) == set(COMPONENTS)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_fits_the_schema_of_its_kind(objects: list[Object], version: str) -> None:
    for one in objects:
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)


def test_the_schemas_refuse_what_is_misspelt_or_of_another_type(production: list[Object]) -> None:
    deployment = the(production, "Deployment")
    for name, value in (("replica", 2), ("minReadySeconds", "5"), ("selector", [])):
        spoilt = copy.deepcopy(deployment)
        spoilt["spec"][name] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(spoilt, VERSIONS[-1], strict=True)


def words(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value that is no container, with the names that lead to it; places in lists are no names."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from words(value, (*path, name))
    elif isinstance(node, list):
        for value in node:
            yield from words(value, path)
    else:
        yield path, node


def test_words_that_schemas_do_not_check_are_those_that_an_api_server_takes(objects: list[Object]) -> None:
    for one in objects:
        for path, word in words(one["spec"] if one["kind"] not in CUSTOM and "spec" in one else {}, ("spec",)):
            for ending, allowed in ENUMS.items():
                if path[-len(ending) :] == ending:
                    assert word in allowed, (one["kind"], path, word)


def test_every_word_of_the_list_is_met_so_that_a_misspelt_path_is_noticed() -> None:
    met = set()
    everything = [*render(K8S / "overlays" / "production"), *render_with("production", *OPTIONAL)]
    for one in everything:
        for path, word in words(one.get("spec", {}), ("spec",)):
            met |= {(ending, word) for ending in ENUMS if path[-len(ending) :] == ending}
    assert {(ending, word) for ending, allowed in ENUMS.items() for word in allowed} <= met


def test_no_object_is_there_twice_and_all_are_in_one_namespace(objects: list[Object]) -> None:
    namespace = the(objects, "Namespace")["metadata"]["name"]
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))
    assert {one["metadata"]["namespace"] for one in objects if one["kind"] != "Namespace"} == {namespace}


# Pod security


def restricted(pod: Object) -> list[str]:
    """What the restricted profile of Pod Security Standards would refuse in a pod's spec."""
    problems = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    problems += [f"volume {one['name']}" for one in pod.get("volumes", ()) if not set(one) - {"name"} <= kinds]
    shared = pod.get("securityContext", {})
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        own = {**shared, **container.get("securityContext", {})}
        if own.get("allowPrivilegeEscalation") is not False:
            problems.append("allowPrivilegeEscalation")
        if own.get("privileged"):
            problems.append("privileged")
        if own.get("capabilities", {}).get("drop") != ["ALL"] or set(own["capabilities"].get("add", ())) - {
            "NET_BIND_SERVICE"
        }:
            problems.append("capabilities")
        if own.get("runAsNonRoot") is not True or not own.get("runAsUser"):
            problems.append("runAsNonRoot")
        if own.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            problems.append("seccompProfile")
        problems += ["hostPort" for port in container.get("ports", ()) if port.get("hostPort")]
    return problems


def test_every_pod_fits_the_restricted_profile_that_its_namespace_enforces(objects: list[Object]) -> None:
    labels = the(objects, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert [restricted(pod_template(one)["spec"]) for one in workloads(objects)] == [[]] * len(workloads(objects))


SPOILERS: dict[str, Callable[[Object], object]] = {
    "hostNetwork": lambda pod: pod.update(hostNetwork=True),
    "volume host": lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    "allowPrivilegeEscalation": lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"),
    "privileged": lambda pod: pod["containers"][0]["securityContext"].update(privileged=True),
    "capabilities": lambda pod: pod["containers"][0]["securityContext"].update(capabilities={"drop": ["CHOWN"]}),
    "runAsNonRoot": lambda pod: pod["securityContext"].pop("runAsNonRoot"),
    "seccompProfile": lambda pod: pod["securityContext"].pop("seccompProfile"),
    "hostPort": lambda pod: pod["containers"][0]["ports"][0].update(hostPort=8001),
}


@pytest.mark.parametrize("problem", SPOILERS)
def test_the_profile_refuses_a_pod_that_is_not_restricted(production: list[Object], problem: str) -> None:
    pod = pod_template(the(production, "Deployment"))["spec"]
    SPOILERS[problem](pod)
    assert restricted(pod) == [problem]


def test_no_pod_can_write_to_its_root_or_holds_a_token(objects: list[Object]) -> None:
    for one in workloads(objects):
        pod = pod_template(one)["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert all(each["securityContext"]["readOnlyRootFilesystem"] for each in pod["containers"])
    assert the(objects, "ServiceAccount")["automountServiceAccountToken"] is False


def test_the_user_is_the_one_of_the_image(production: list[Object]) -> None:
    users = {pod_template(one)["spec"]["securityContext"]["runAsUser"] for one in workloads(production)}
    (image_user,) = re.findall(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1:]
    assert users == {int(image_user)}


# Scaling


def test_the_hpa_is_the_one_that_was_asked_for(production: list[Object]) -> None:
    hpa = the(production, "HorizontalPodAutoscaler")
    assert hpa["apiVersion"] == "autoscaling/v2" and hpa["metadata"]["name"] == "agentcore-tools-hpa"
    spec = hpa["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "agentcore-tools"}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 20)
    assert spec["metrics"] == [
        {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}},
        {
            "type": "Pods",
            "pods": {
                "metric": {"name": "tool_execution_concurrency"},
                "target": {"type": "AverageValue", "averageValue": "1000"},
            },
        },
    ]


def test_an_overlay_has_one_autoscaler_at_most(objects: list[Object]) -> None:
    autoscalers = [one["kind"] for one in objects if one["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    is_dev = the(objects, "Namespace")["metadata"]["name"] == "agentcore-tools-dev"
    assert len(autoscalers) == (0 if is_dev else 1)
    assert ("replicas" in service_of(objects)["spec"]) == is_dev


def test_keda_scales_within_the_same_bounds_by_the_same_metrics(production: list[Object]) -> None:
    objects = render(K8S / "overlays" / "keda")
    assert not of_kind(objects, "HorizontalPodAutoscaler")
    scaled, hpa = the(objects, "ScaledObject")["spec"], the(production, "HorizontalPodAutoscaler")
    assert scaled["scaleTargetRef"] == hpa["spec"]["scaleTargetRef"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (2, 20)
    own = scaled["advanced"]["horizontalPodAutoscalerConfig"]
    assert own == {"name": hpa["metadata"]["name"], "behavior": hpa["spec"]["behavior"]}
    cpu, prometheus = scaled["triggers"]
    assert (cpu["type"], cpu["metricType"], cpu["metadata"]["value"]) == ("cpu", "Utilization", "70")
    assert (prometheus["metricType"], prometheus["metadata"]["threshold"]) == ("AverageValue", "1000")
    assert prometheus["metadata"]["ignoreNullValues"] == "false" and "fallback" not in scaled
    namespace = the(objects, "Namespace")["metadata"]["name"]
    assert f'namespace="{namespace}"' in prometheus["metadata"]["query"]


def test_an_autoscaler_scales_something_that_is_there(objects: list[Object]) -> None:
    for one in objects:
        if one["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            target = one["spec"]["scaleTargetRef"]
            the(objects, target["kind"], target["name"])


def test_the_concurrency_target_leaves_a_third_of_the_slots_free(objects: list[Object]) -> None:
    for hpa in of_kind(objects, "HorizontalPodAutoscaler"):
        target = int(hpa["spec"]["metrics"][1]["pods"]["target"]["averageValue"])
        slots = read(objects).max_concurrent_executions
        assert 0.65 <= target / slots <= 0.7, (target, slots)


def test_the_connections_of_all_replicas_are_those_that_the_page_counts(production: list[Object]) -> None:
    settings, hpa = read(production), the(production, "HorizontalPodAutoscaler")["spec"]
    most = hpa["maxReplicas"] * 5 // 4 * (settings.database_pool_size + settings.database_max_overflow)
    page = (ROOT / "docs" / "operations" / "scaling.md").read_text()
    assert f"{most} connections" in page


def test_the_forecast_is_a_metric_beside_the_others(production: list[Object]) -> None:
    metrics = the(render_with("production", "forecast"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metrics[:2] == the(production, "HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metrics[2]["external"]["metric"]["name"]
    rules = yaml.safe_load((K8S / "prometheus-adapter" / "config.yaml").read_text())["externalRules"]
    assert [rule["name"]["as"] for rule in rules] == [name]


@pytest.mark.parametrize("overlay", sorted({*OVERLAYS} - {"dev", "keda"}))
def test_the_forecast_asks_for_as_many_calls_a_replica_as_the_present(overlay: str) -> None:
    _, present, forecast = the(render_with(overlay, "forecast"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert forecast["external"]["target"] == present["pods"]["target"]


@pytest.mark.parametrize("overlay", ["dev", "keda"])
def test_the_forecast_is_refused_where_there_is_no_hpa(overlay: str) -> None:
    with pytest.raises(AssertionError, match="HorizontalPodAutoscaler"):
        render_with(overlay, "forecast")


@pytest.mark.parametrize("profile", sorted(PROFILES.keys() - {"default"}))
def test_a_profile_scales_by_the_same_numbers_with_keda(profile: str) -> None:
    objects = render_with("keda", profile)
    hpa = the(render(K8S / "overlays" / profile), "HorizontalPodAutoscaler")["spec"]
    scaled = the(objects, "ScaledObject")["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    (cpu, prometheus), (of_cpu, of_calls) = scaled["triggers"], hpa["metrics"]
    assert int(cpu["metadata"]["value"]) == of_cpu["resource"]["target"]["averageUtilization"]
    assert prometheus["metadata"]["threshold"] == of_calls["pods"]["target"]["averageValue"]
    assert settings_of(objects)["PROFILE"] == profile


# Life cycle


def test_the_grace_is_longer_than_all_that_happens_in_it(objects: list[Object]) -> None:
    settings, pod = read(objects), pod_template(service_of(objects))["spec"]
    before_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    closing_s = LOG_DRAIN_S + 4 * CLOSE_TIMEOUT_S
    needed_s = before_s + settings.drain_seconds + settings.tool_execution_timeout + FINISH_MARGIN_S + closing_s
    assert pod["terminationGracePeriodSeconds"] > needed_s


def test_a_draining_replica_serves_until_its_probe_has_taken_it_out(objects: list[Object]) -> None:
    probe = pod_template(service_of(objects))["spec"]["containers"][0]["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < read(objects).drain_seconds


def test_liveness_allows_for_a_loop_that_a_tool_holds_for_ten_seconds(objects: list[Object]) -> None:
    probe = pod_template(service_of(objects))["spec"]["containers"][0]["livenessProbe"]
    assert probe["periodSeconds"] * (probe["failureThreshold"] - 1) + probe["timeoutSeconds"] > 10


def test_a_rollout_takes_no_replica_away_before_another_serves(production: list[Object]) -> None:
    spec = the(production, "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": "25%"}
    budget = the(production, "PodDisruptionBudget")["spec"]
    labels = pod_template(the(production, "Deployment"))["metadata"]["labels"]
    assert budget["selector"]["matchLabels"].items() <= labels.items() and budget["maxUnavailable"] == 1


def test_the_probes_ask_for_what_the_service_serves(service: Running, production: list[Object]) -> None:
    container = pod_template(the(production, "Deployment"))["spec"]["containers"][0]
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[name]["httpGet"]
        assert asked["port"] in {port["name"] for port in container["ports"]}
        assert service.http.get(asked["path"]).status_code == 200
    assert "readyz" not in container["livenessProbe"]["httpGet"]["path"]


# Settings, secrets, volumes


def test_settings_are_ones_that_the_service_knows_and_takes(objects: list[Object]) -> None:
    given = settings_of(objects)
    assert {name.lower() for name in given} <= set(Settings.model_fields)
    assert read(objects).auth_mode == ("none" if given.get("DATABASE_URL", "").startswith("sqlite") else "required")


def test_a_profile_overlay_has_what_its_profile_says() -> None:
    for name in ("high-throughput", "low-latency", "constrained"):
        assert read(render(K8S / "overlays" / name)).profile == name
    assert read(render(K8S / "overlays" / "constrained")).max_concurrent_executions == 500


def test_the_limits_file_is_one_that_the_service_reads(objects: list[Object], tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(the(objects, "ConfigMap", "agentcore-tools-limits")["data"]["limits.yaml"])
    assert read_policies(path) == ()
    container = pod_template(service_of(objects))["spec"]["containers"][0]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert settings_of(objects)["LIMITS_FILE"] == f"{mounts['limits']}/limits.yaml"


def test_changed_settings_are_a_new_revision(production: list[Object]) -> None:
    name = the(production, "ConfigMap", "agentcore-tools-settings")["metadata"]["name"]
    assert re.search(r"-[a-z0-9]{10}$", name)
    sources = pod_template(the(production, "Deployment"))["spec"]["containers"][0]["envFrom"]
    assert {"configMapRef": {"name": name}} in sources


def test_no_secret_is_in_the_repository(objects: list[Object]) -> None:
    assert not of_kind(objects, "Secret")
    for one in of_kind(objects, "ConfigMap"):
        for name, value in one["data"].items():
            assert not re.search(r"SECRET|PASSWORD|TOKEN", name) and not re.search(r"://[^/\s]*:[^/\s]*@", value), name


def test_what_the_service_writes_goes_to_its_volumes(objects: list[Object]) -> None:
    pod = pod_template(service_of(objects))["spec"]
    written = [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if not m.get("readOnly")]
    settings = settings_of(objects)
    places = [settings["JOURNAL_DIR"], settings.get("DATABASE_URL", "").partition("sqlite+aiosqlite:///")[2]]
    assert all(any(place.startswith(f"{mount}/") for mount in written) for place in places if place)
    assert "/tmp" in written


def test_a_full_journal_does_not_get_its_pod_evicted(objects: list[Object]) -> None:
    owner = service_of(objects)
    volumes = {one["name"]: one.get("emptyDir") for one in pod_template(owner)["spec"]["volumes"]}
    journal_bytes = read(objects).journal_max_bytes
    if owner["kind"] == "StatefulSet":
        assert "journal" not in volumes
        (claim,) = owner["spec"]["volumeClaimTemplates"]
        assert claim["metadata"]["name"] == "journal"
        assert size(claim["spec"]["resources"]["requests"]["storage"]) > 1.25 * journal_bytes
        return
    limit = size(volumes["journal"]["sizeLimit"])
    assert limit > 1.25 * journal_bytes
    resources = pod_template(owner)["spec"]["containers"][0]["resources"]
    assert size(resources["limits"]["ephemeral-storage"]) >= limit + size(volumes["tmp"]["sizeLimit"])


def test_every_volume_that_is_mounted_is_there(objects: list[Object]) -> None:
    for owner in workloads(objects):
        pod = pod_template(owner)["spec"]
        there = {one["name"] for one in pod["volumes"]}
        there |= {one["metadata"]["name"] for one in owner["spec"].get("volumeClaimTemplates", ())}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == there


def test_a_journal_volume_is_of_one_replica_and_stays() -> None:
    objects = render_with("production", "journal-volume")
    assert not of_kind(objects, "Deployment")
    spec = the(objects, "StatefulSet")["spec"]
    the(objects, "Service", spec["serviceName"])
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert spec["volumeClaimTemplates"][0]["spec"]["accessModes"] == ["ReadWriteOnce"]
    hpa = the(objects, "HorizontalPodAutoscaler")["spec"]
    assert hpa["scaleTargetRef"]["kind"] == "StatefulSet" and hpa["minReplicas"] == 3
    assert (
        spec["template"]["spec"]["securityContext"]["fsGroup"]
        == spec["template"]["spec"]["securityContext"]["runAsUser"]
    )


def test_a_journal_volume_is_scaled_by_keda_too() -> None:
    objects = render_with("keda", "journal-volume")
    scaled = the(objects, "ScaledObject")["spec"]
    assert the(objects, scaled["scaleTargetRef"]["kind"], scaled["scaleTargetRef"]["name"])["kind"] == "StatefulSet"
    assert scaled["minReplicaCount"] == 3


def test_dev_needs_nothing_that_is_not_in_it() -> None:
    objects = render(K8S / "overlays" / "dev")
    sources = pod_template(the(objects, "Deployment"))["spec"]["containers"][0]["envFrom"]
    assert [list(source) for source in sources] == [["configMapRef"]]
    assert not {one["kind"] for one in objects} & {*CUSTOM, "Job", "PodDisruptionBudget"}


# The migration


def test_the_migration_is_of_the_same_image_and_needs_only_the_namespace_and_the_secret(
    production: list[Object],
) -> None:
    job, deployment = the(production, "Job"), the(production, "Deployment")
    pod, service_pod = pod_template(job)["spec"], pod_template(deployment)["spec"]
    container = pod["containers"][0]
    assert container["image"] == service_pod["containers"][0]["image"]
    assert [*container["command"], *container["args"]] == ["agentcore-tools", "migrate"]
    (variable,) = container["env"]
    reference = variable["valueFrom"]["secretKeyRef"]["name"]
    assert {"secretRef": {"name": reference}} in service_pod["containers"][0]["envFrom"]
    assert pod["serviceAccountName"] == "default" and "envFrom" not in container
    assert all("emptyDir" in volume for volume in pod["volumes"])


def test_the_image_is_of_this_version(production: list[Object]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {pod_template(one)["spec"]["containers"][0]["image"] for one in workloads(production)}
    assert images == {f"agentcore-tools:{version}"}


# Monitoring


def test_the_operators_rules_are_those_of_the_rule_files() -> None:
    assert WRITTEN.read_text() == made(), "python -m tests.deploy.prometheus_rule"


def test_the_service_monitor_finds_one_service_and_its_port(objects: list[Object]) -> None:
    for monitor in of_kind(objects, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (found,) = [
            one for one in of_kind(objects, "Service") if wanted.items() <= one["metadata"].get("labels", {}).items()
        ]
        assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in found["spec"]["ports"]}
        assert "agentcore-tools" in found["metadata"]["name"]


def test_services_reach_the_pods(objects: list[Object]) -> None:
    template = pod_template(service_of(objects))
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    for one in of_kind(objects, "Service"):
        assert one["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports


def test_dashboards_are_given_as_they_are() -> None:
    (given,) = render(K8S / "monitoring" / "dashboards")
    files = {path.name: path.read_text() for path in (K8S / "monitoring" / "dashboards").glob("*.json")}
    assert given["data"] == files


# Network


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def reaches(objects: list[Object], labels: dict[str, str], address: Address, port: int) -> bool:
    """Whether some egress rule lets a pod with these labels out to an address outside of the cluster."""
    for policy in of_kind(objects, "NetworkPolicy"):
        if not policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items():
            continue
        for rule in policy["spec"].get("egress", ()):
            if port in {one["port"] for one in rule["ports"]} and any(
                _holds(to["ipBlock"], address) for to in rule["to"] if "ipBlock" in to
            ):
                return True
    return False


def _holds(block: Object, address: Address) -> bool:
    within = [ipaddress.ip_network(one) for one in (block["cidr"], *block.get("except", ()))]
    return address in within[0] and not any(address in one for one in within[1:])


ADDRESSES = """8.8.8.8 1.1.1.1 93.184.216.34 2606:4700::1111 2a00:1450:4001:829::200e
10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 127.0.0.1 169.254.169.254 169.254.170.2 100.100.100.200
168.63.129.16 192.0.0.192 198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255 0.0.0.0 192.0.2.1 203.0.113.9 198.51.100.1
::1 fd00:ec2::254 fd20:ce::254 fe80::1 fec0::1 ff02::1 2002:a9fe:a9fe::1 64:ff9b::a9fe:a9fe ::ffff:169.254.169.254
2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 3fff::1 192.88.99.1"""


@pytest.mark.parametrize("text", ADDRESSES.split())
def test_packets_go_where_the_service_itself_would_let_tools_go(production: list[Object], text: str) -> None:
    labels = pod_template(the(production, "Deployment"))["metadata"]["labels"]
    address = ipaddress.ip_address(text)
    out = reaches(production, labels, address, 443)
    if is_public(address) or is_metadata(address):
        assert out == is_public(address)
    assert not (out and not is_public(address)), "the policy is wider than the service"


def test_nothing_but_the_web_and_names_is_open_to_the_internet(objects: list[Object]) -> None:
    labels = pod_template(service_of(objects))["metadata"]["labels"]
    public = ipaddress.ip_address("93.184.216.34")
    assert {port for port in range(1, 65_536) if port < 30_000 and reaches(objects, labels, public, port)} == {80, 443}


def test_a_migration_reaches_no_internet(production: list[Object]) -> None:
    labels = pod_template(the(production, "Job"))["metadata"]["labels"]
    assert not reaches(production, labels, ipaddress.ip_address("93.184.216.34"), 443)


def test_what_is_not_named_is_closed_in_both_directions(objects: list[Object]) -> None:
    deny = the(objects, "NetworkPolicy", "agentcore-tools-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in of_kind(objects, "NetworkPolicy"):
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(direction, ()):
                assert rule[peers] and rule["ports"], "an empty list means everybody"


def test_no_peer_is_a_pod_of_whatever_namespace(objects: list[Object]) -> None:
    for policy in of_kind(objects, "NetworkPolicy"):
        rules = [*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())]
        for peer in (peer for rule in rules for peer in rule.get("from", rule.get("to"))):
            assert peer.get("namespaceSelector") != {}, "anybody may give a pod a label"


def test_only_the_service_takes_connections_and_only_on_its_port(objects: list[Object]) -> None:
    takes = [one for one in of_kind(objects, "NetworkPolicy") if one["spec"].get("ingress")]
    (policy,) = takes
    labels = pod_template(service_of(objects))["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": "http", "protocol": "TCP"}]


def test_stores_in_the_cluster_are_reached_by_service_and_migration(production: list[Object]) -> None:
    policy = the(production, "NetworkPolicy", "agentcore-tools-stores")["spec"]
    for owner in workloads(production):
        assert policy["podSelector"]["matchLabels"].items() <= pod_template(owner)["metadata"]["labels"].items()
    for rule in policy["egress"]:
        here, labelled = rule["to"]
        assert labelled == {**here, "namespaceSelector": {"matchLabels": {"agentcore-tools/server": "true"}}}
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert {5432, 6432, 6379, 26379, 4317, 4318} == ports


def test_requests_are_within_limits(objects: list[Object]) -> None:
    for owner in workloads(objects):
        resources = pod_template(owner)["spec"]["containers"][0]["resources"]
        assert resources["requests"].keys() == resources["limits"].keys() == {"cpu", "memory", "ephemeral-storage"}
        assert size(resources["requests"]["memory"]) <= size(resources["limits"]["memory"])
        assert cores(resources["requests"]["cpu"]) <= cores(resources["limits"]["cpu"])


BODY_TIMES_MAX = 20
"""What a large body takes until its answer, as many small values; docs/operations/scaling.md."""

IDLE_BYTES = 128 << 20


def test_large_bodies_and_unread_answers_do_not_get_a_pod_killed_for_its_memory(objects: list[Object]) -> None:
    limit = size(pod_template(service_of(objects))["spec"]["containers"][0]["resources"]["limits"]["memory"])
    settings = read(objects)
    bodies = BODY_TIMES_MAX * settings.max_request_bytes_in_flight
    assert IDLE_BYTES + bodies + settings.max_response_bytes_in_flight <= limit


def cores(text: str) -> Decimal:
    return Decimal(text.removesuffix("m")) / (1000 if text.endswith("m") else 1)
