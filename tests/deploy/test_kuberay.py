"""The Kubernetes manifests: of one piece, confined, and what the published schemas take.

The own checks read the files. `kubectl kustomize`, the PyPI package kubernetes-validate (Kubernetes
own JSON schemas) and a folder of custom resource definitions check the rendered manifests; what is
missing of these is named.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from loraplex.cluster.local_ray import ray_environment
from loraplex.cluster.settings import Settings
from loraplex.cluster.settings_sources import ENV_PREFIX, parse_assignments
from ray.serve.schema import ServeDeploySchema

KUBERAY = Path(__file__).resolve().parents[2] / "deploy/kuberay"
OVERLAYS = ("base", "ha", "workload-identity")
# Of the folder: ray.io_rayservices.yaml of KubeRay 1.7's ray-operator/config/crd/bases, and the
# Prometheus operator's monitoring.coreos.com_podmonitors.yaml.
CRDS = os.environ.get("LORAPLEX_TEST_CRDS", "")

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


@pytest.fixture(scope="module")
def service() -> Manifest:
    return documents(KUBERAY / "base/rayservice.yaml")[0]["spec"]


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    lines = (KUBERAY / "base/settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def groups(service: Manifest) -> dict[str, Manifest]:
    cluster = service["rayClusterConfig"]
    workers = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **workers}


def test_settings_are_known_and_together_fit_a_cluster(variables: dict[str, str]) -> None:
    own = {k: v for k, v in variables.items() if k.startswith(ENV_PREFIX)}
    settings = Settings.load(**parse_assignments(f"{k}={v}" for k, v in own.items()))
    assert settings.device == "cuda"
    assert settings.internal_host == settings.metrics_host == "0.0.0.0"
    # Ray's processes get what `loraplex up` gives them.
    rest = {k: v for k, v in variables.items() if k not in own}
    assert rest == ray_environment(settings, None)


def test_a_gpu_pod_is_one_worker_group(service: Manifest, variables: dict[str, str]) -> None:
    gpu = groups(service)["gpu"]
    tp = variables["LORAPLEX_TP"]
    (container,) = gpu["template"]["spec"]["containers"]
    assert gpu["rayStartParams"]["num-gpus"] == tp
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["nvidia.com/gpu"] == int(tp)
    assert gpu["minReplicas"] == int(variables["LORAPLEX_GROUPS"])
    assert gpu["maxReplicas"] == int(variables["LORAPLEX_MAX_GROUPS"])


def test_every_pod_is_confined_and_has_the_settings_and_memory_to_share(
    service: Manifest, variables: dict[str, str]
) -> None:
    for name, group in groups(service).items():
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > float(variables["LORAPLEX_DRAIN_S"])
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["enableServiceLinks"] is False, name
        assert pod["automountServiceAccountToken"] is (name == "head")
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        sources = [next(iter(s.values()))["name"] for s in container["envFrom"]]
        assert sources == ["loraplex-settings", "loraplex-cluster", "loraplex-s3"]
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounts = {m["name"]: m for m in container["volumeMounts"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"]["mountPath"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert group["template"]["metadata"]["labels"] == {"app.kubernetes.io/part-of": "loraplex"}


def test_resources_that_actors_ask_for_are_some_groups(
    service: Manifest, variables: dict[str, str]
) -> None:
    resources = {
        name: json.loads(json.loads(g["rayStartParams"].get("resources", '"{}"')))
        for name, g in groups(service).items()
    }
    control = variables["LORAPLEX_CONTROL_RESOURCE"]
    assert [name for name, r in resources.items() if control in r] == ["control"]
    serve = yaml.safe_load((KUBERAY / "base/serve.yaml").read_text())
    asked = serve["applications"][0]["deployments"][0]["ray_actor_options"]["resources"]
    assert [name for name, r in resources.items() if asked.keys() <= r.keys()] == ["gateway"]


def test_rays_ports_ask_for_a_token_and_only_the_api_is_open_to_tenants(
    service: Manifest, variables: dict[str, str]
) -> None:
    auth = service["rayClusterConfig"]["authOptions"]
    assert auth == {"mode": "token", "secretName": "loraplex-ray-token"}
    assert "loraplex-ray-token auth_token" in (KUBERAY / "make_secrets.sh").read_text()
    (policy,) = documents(KUBERAY / "base/network-policy.yaml")
    by_namespace = {}
    for rule in policy["spec"]["ingress"]:
        for source in rule["from"]:
            if "namespaceSelector" in source:
                labels = source["namespaceSelector"]["matchLabels"]
                ports = {port["port"] for port in rule["ports"]}
                by_namespace[labels["kubernetes.io/metadata.name"]] = ports
            else:
                assert source == {"podSelector": policy["spec"]["podSelector"]}
    metrics = int(variables["LORAPLEX_METRICS_PORT"])
    assert by_namespace == {
        "ingress-nginx": {8000}, "kuberay-system": {8265, 8000}, "monitoring": {metrics}
    }  # fmt: skip


def test_budgets_and_monitors_select_pods_that_there_are(service: Manifest) -> None:
    names = set(groups(service)) - {"head"}
    selectors = [
        d["spec"]["selector"]["matchLabels"]
        for file in ("pod-disruption-budgets.yaml", "pod-monitor.yaml")
        for d in documents(KUBERAY / "base" / file)
    ]
    assert len(selectors) == 4
    for labels in selectors:
        assert labels["app.kubernetes.io/part-of"] == "loraplex"
        assert labels.get("ray.io/group", "gpu") in names
    control = groups(service)["control"]["template"]["spec"]["containers"][0]
    (endpoint,) = documents(KUBERAY / "base/pod-monitor.yaml")[0]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in control["ports"]]


def test_serve_takes_its_config() -> None:
    config = ServeDeploySchema.model_validate(
        yaml.safe_load((KUBERAY / "base/serve.yaml").read_text())
    )
    for application in config.applications:
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    routes = {application.name: application.route_prefix for application in config.applications}
    assert routes == {"gateway": "/", "groups": None}


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> list[Manifest]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is missing: its `kustomize` renders the overlays")
    shown = subprocess.run(
        ["kubectl", "kustomize", str(KUBERAY / request.param)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    return [d for d in yaml.safe_load_all(shown.stdout) if d]


def test_rendered_names_agree(rendered: list[Manifest]) -> None:
    kinds = [d["kind"] for d in rendered]
    assert len(set(kinds)) >= 7
    by_name = {(d["kind"], d["metadata"]["name"]): d for d in rendered}
    assert len(by_name) == len(rendered)
    assert all(
        d["metadata"].get("namespace") == "loraplex" for d in rendered if d["kind"] != "Namespace"
    )
    service = by_name["RayService", "loraplex"]["spec"]
    assert service["serveConfigV2"] == (KUBERAY / "base/serve.yaml").read_text()
    for group in groups(service).values():
        pod = group["template"]["spec"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in by_name
        used = pod["containers"][0]["envFrom"][0]["configMapRef"]["name"]
        assert ("ConfigMap", used) in by_name
        assert used != "loraplex-settings"  # a change of a setting changes the pods


def test_rendered_manifests_fit_kubernetes_schemas(rendered: list[Manifest]) -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is missing (pip install '.[test]')"
    )
    for document in rendered:
        pods = []
        if document["kind"] == "RayService":
            pods = [group["template"] for group in groups(document["spec"]).values()]
        elif document["kind"] != "PodMonitor":
            validate.validate(document, "1.34", strict=True)
        for template in pods:
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            validate.validate(pod, "1.34", strict=True)


def test_rendered_manifests_fit_the_custom_resources(rendered: list[Manifest]) -> None:
    if not CRDS:
        pytest.skip("LORAPLEX_TEST_CRDS isn't set: the folder of KubeRay's and Prometheus' CRDs")
    files = {
        "RayService": "ray.io_rayservices.yaml",
        "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
    }
    for document in rendered:
        if document["kind"] not in files:
            continue
        text = (Path(CRDS) / files[document["kind"]]).read_text()
        crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        version = document["apiVersion"].rpartition("/")[2]
        (schema,) = [
            v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == version
        ]
        errors = list(Draft202012Validator(closed(schema)).iter_errors(document))
        assert errors == []


def closed(schema: Any) -> Any:
    """The schema with every listed set of properties complete: what Kubernetes would prune is told.

    `x-kubernetes-int-or-string` and quantities become what JSON Schema can say.
    """
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: closed(value) for key, value in schema.items() if key != "format"}
    if "properties" in schema and "type" in schema and "additionalProperties" not in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
        if {"apiVersion", "kind", "metadata"} <= schema["properties"].keys():
            made["properties"]["metadata"] = {"type": "object"}
    return made
