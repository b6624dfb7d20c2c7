"""What the pages for operators tell them to run and to write exists, and does what the page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from app.settings import PROFILES, Settings
from tests.conftest import ROOT
from tests.deploy.kustomize import COMPONENTS, K8S, OVERLAYS, Object, needs_kustomize, of_kind, render, the
from tests.servers import make_folder, remove_folder

KUBERNETES = ROOT / "docs" / "operations" / "kubernetes.md"
SCALING = ROOT / "docs" / "operations" / "scaling.md"
PAGES = (KUBERNETES, SCALING)

VERSION = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]

SHORT = {"job": "Job", "deployment": "Deployment", "hpa": "HorizontalPodAutoscaler", "secret": "Secret"}

PROMETHEUS = {
    "framework_overhead_seconds",
    "process_cpu_seconds_total",
}
"""Series that no metric of ours names: of the process collector."""


def code(page: Path) -> list[str]:
    """Every block and every span of code of a page."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [*blocks, *spans]


def all_code() -> str:
    return "\n".join(piece for page in PAGES for piece in code(page))


def yaml_blocks(page: Path) -> list[Object]:
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)]


@pytest.fixture
def production() -> list[Object]:
    needs_kustomize()
    return render(K8S / "overlays" / "production")


@pytest.fixture
def folder() -> Iterator[Path]:
    path = make_folder("agentcore-pages-")
    yield path
    remove_folder(path)


# Commands


def test_every_module_that_a_page_runs_is_there_with_the_options_that_it_names() -> None:
    text = " ".join(piece for page in PAGES for piece in [*code(page), page.read_text()])
    runs = re.findall(r"python -m ([\w.]+)((?: --[a-z]+(?: [a-z0-9]+)?)*)", text)
    assert {"load.rollout", "load.autoscale", "load.ladder"} <= {module for module, _ in runs}
    for module, options in runs:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert "__main__" in source
        assert all(f'"{option}"' in source for option in re.findall(r"--[a-z]+", options)), (module, options)


def test_the_rollouts_options_that_the_page_explains_are_there() -> None:
    said = re.findall(r"`(--[a-z]+)[^`]*`", KUBERNETES.read_text())
    assert {"--drain", "--end", "--before"} <= set(said)
    assert all(f'"{option}"' in (ROOT / "load" / "rollout.py").read_text() for option in said)


def test_every_make_target_and_what_it_is_given_is_there() -> None:
    targets = re.findall(r"make (\w+)(?: PYTEST_ARGS=\"([^\"]+)\")?", all_code())
    assert targets
    for target, tests in targets:
        assert f".PHONY: {target}\n" in (ROOT / "Makefile").read_text()
        assert (ROOT / tests).exists(), tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    named = re.findall(r"(?<![\w/.-])((?:docs|k8s|load|tests|app|\.ci)/[\w./-]*[\w/])", page.read_text())
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_kustomization_that_is_applied_is_there() -> None:
    text = all_code()
    built = set(re.findall(r"(?:-k|kubectl kustomize) (\S+)", text))
    assert {"k8s/overlays/production", "k8s/prometheus-adapter", "k8s/monitoring/dashboards"} <= built
    assert all((ROOT / path / "kustomization.yaml").is_file() for path in built)
    assert all((ROOT / path).is_file() for path in re.findall(r"-f ([^-\s]\S*)", text))


def test_commands_name_objects_that_production_has(production: list[Object]) -> None:
    text = all_code()
    names = {(one["kind"], one["metadata"]["name"]) for one in production}
    named = {(SHORT[kind], name) for kind, name in re.findall(r"\b(job|deployment|hpa)/(agentcore[\w-]*)", text)}
    assert {kind for kind, _ in named} == {"Job", "Deployment", "HorizontalPodAutoscaler"} and named <= names
    namespaces = set(re.findall(r"-n (agentcore[\w-]*)", text))
    assert namespaces == {name for kind, name in names if kind == "Namespace"}


def test_the_first_installation_applies_the_migration_alone(production: list[Object]) -> None:
    (label,) = set(re.findall(r"apply -f - -l (\S+)", all_code()))
    name, value = label.split("=")
    chosen = [one for one in production if one["metadata"].get("labels", {}).get(name) == value]
    assert [one["kind"] for one in chosen] == ["Job"]


def test_the_secret_that_is_made_is_the_one_that_is_read(production: list[Object]) -> None:
    (made,) = set(re.findall(r"create secret generic (\S+)", all_code()))
    sources = the(production, "Deployment")["spec"]["template"]["spec"]["containers"][0]["envFrom"]
    assert {"secretRef": {"name": made}} in sources
    external = next(one for one in yaml_blocks(KUBERNETES) if one.get("kind") == "ExternalSecret")
    assert external["spec"]["target"]["name"] == external["metadata"]["name"] == made


def test_the_adapters_chart_is_told_the_configuration_that_is_made() -> None:
    needs_kustomize()
    (config,) = of_kind(render(K8S / "prometheus-adapter"), "ConfigMap")
    text = all_code()
    assert f"rules.existing={config['metadata']['name']}" in text
    assert f"--namespace {config['metadata']['namespace']}" in text
    (path,) = re.findall(r"get --raw '([^']+)'", text)
    assert path.endswith("/namespaces/agentcore-tools/pods/*/tool_execution_concurrency")


# What is written


def test_the_tables_are_of_every_overlay_and_every_optional_component() -> None:
    rows = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \|", KUBERNETES.read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    profiles = PROFILES.keys() - {"default"}
    assert named & {*OVERLAYS, *COMPONENTS} == {*OVERLAYS, *COMPONENTS} and profiles <= named


def test_the_kustomization_that_is_shown_renders(production: list[Object], folder: Path) -> None:
    shown = next(block for block in yaml_blocks(KUBERNETES) if block.get("kind") == "Kustomization")
    text = yaml.safe_dump(shown)
    assert text.count(f"?ref=v{VERSION}") == text.count("?ref=")
    local = os.path.relpath(ROOT, folder.resolve())
    text = re.sub(r"https://example\.com/agentcore-tools//([\w/-]+)\?ref=v[\d.]+", rf"{local}/\1", text)
    (folder / "kustomization.yaml").write_text(text)
    shutil.copy(K8S / "base" / "limits.yaml", folder)
    (folder / "limits.yaml").write_text("policies: [] # ours\n")
    objects = render(folder)
    assert the(objects, "ConfigMap", "agentcore-tools-limits")["data"] == {"limits.yaml": "policies: [] # ours\n"}
    images = {one["spec"]["template"]["spec"]["containers"][0]["image"] for one in of_kind(objects, "Deployment")}
    assert images == {f"registry.example.com/agentcore-tools:{VERSION}"}
    assert len(the(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]) == 3
    assert {one["kind"] for one in objects} == {one["kind"] for one in production}


def test_a_secret_that_is_generated_keeps_its_name_and_the_limits_their_hash(folder: Path) -> None:
    needs_kustomize()
    shown = next(block for block in yaml_blocks(KUBERNETES) if block.get("kind") == "Kustomization")
    (options,) = re.findall(r"`options: (\{.*?\})`", KUBERNETES.read_text())
    secrets = {"name": "agentcore-tools-secrets", "envs": ["secrets.env"], "options": yaml.safe_load(options)}
    ours = {
        **shown,
        "components": [],
        "resources": [os.path.relpath(K8S / "overlays" / "production", folder.resolve())],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({**ours, "secretGenerator": [secrets]}))
    (folder / "limits.yaml").write_text("policies: [] # ours\n")
    (folder / "secrets.env").write_text("DATABASE_URL=postgresql+asyncpg://nobody@127.0.0.1/none\n")
    objects = render(folder)
    (pod,) = (one["spec"]["template"]["spec"] for one in of_kind(objects, "Deployment"))
    secret = next(source["secretRef"] for source in pod["containers"][0]["envFrom"] if "secretRef" in source)
    assert secret["name"] == of_kind(objects, "Secret")[0]["metadata"]["name"] == "agentcore-tools-secrets"
    limits = next(volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume)
    assert re.fullmatch(r"agentcore-tools-limits-\w{10}", limits)


def test_the_patch_that_opens_managed_stores_does_so(folder: Path) -> None:
    needs_kustomize()
    shown = next(block for block in yaml_blocks(KUBERNETES) if "patches" in block and "kind" not in block)
    local = Path(os.path.relpath(K8S, folder.resolve()))
    mine = {
        "resources": [str(local / "overlays" / "production")],
        "components": [str(local / "components" / "managed-stores")],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({**mine, **shown}))
    (rule,) = the(render(folder), "NetworkPolicy", "agentcore-tools-managed-stores")["spec"]["egress"]
    assert rule["to"] == [{"ipBlock": {"cidr": "10.20.0.0/16"}}]


def test_settings_metrics_and_alerts_are_ones_that_there_are() -> None:
    text = all_code()
    settings = {name.upper() for name in Settings.model_fields}
    words = set(re.findall(r"(?<![\w-])[A-Z]+(?:_[A-Z]+)+(?!\w)", text)) - {"PYTEST_ARGS"}
    assert words - settings <= {"OTEL_EXPORTER_OTLP_HEADERS"}
    rules = (K8S / "monitoring" / "alerts.yaml").read_text()
    alerts = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`", KUBERNETES.read_text())) - {"PreSync"}
    assert alerts and all(f"alert: {name}\n" in rules for name in alerts), alerts
    metrics = (ROOT / "docs" / "metrics.md").read_text()
    ours = set(re.findall(r"\b(?:tool|execution|system|framework)_[a-z_]+\b", text)) - PROMETHEUS
    assert ours and all(f"`{name}" in metrics for name in ours), ours


def test_the_seconds_of_a_rollout_are_those_of_the_manifest(production: list[Object]) -> None:
    pod = the(production, "Deployment")["spec"]["template"]["spec"]
    before_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = int(the(production, "ConfigMap", "agentcore-tools-settings")["data"]["DRAIN_SECONDS"])
    rows = re.findall(r"^\| ([\w ]*\d+) \| (.+) \|$", KUBERNETES.read_text(), re.MULTILINE)
    assert next(second for second, said in rows if said.startswith("SIGTERM")) == str(before_s)
    assert next(s for s, said in rows if said.startswith("`DRAIN_SECONDS`")) == f"{before_s} to {before_s + drain_s}"
    grace_s = pod["terminationGracePeriodSeconds"]
    assert next(s for s, said in rows if said.startswith("`terminationGrace")) == str(grace_s)


def test_the_resources_on_the_page_are_those_of_the_manifest(production: list[Object]) -> None:
    resources = the(production, "Deployment")["spec"]["template"]["spec"]["containers"][0]["resources"]
    text = SCALING.read_text()
    requested, limit = (resources[name]["memory"] for name in ("requests", "limits"))
    assert requested.replace("Mi", " MiB requested") in text and f"limit of {limit.replace('Gi', ' GiB')}" in text
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"] == "1"


def test_kubectl_knows_every_command_of_the_pages() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("NOT TESTED: no kubectl here")

    def known(*command: str) -> set[str]:
        done = subprocess.run([kubectl, *command, "--help"], capture_output=True, text=True, check=True)
        return set(re.findall(r"^  ([a-z-]+) {2,}", done.stdout, re.MULTILINE))

    text = all_code()
    assert set(re.findall(r"kubectl ([a-z]+)", text)) <= known()
    for group in ("rollout", "create"):
        named = set(re.findall(rf"kubectl {group} ([a-z]+)", text))
        assert named and named <= known(group)
