"""The Kubernetes manifests, against KubeRay's schemas, the rules that its operator adds, and who may reach whom.

What is not covered: a Kubernetes that runs them. KubeRay's code is cited as of v1.7: `ray-operator/controllers/ray`.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
import typer.main
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from pu_ray.cli import app
from serving.app import FrontArguments

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
SCHEMA = json.loads(Path(__file__).with_name("kuberay.schema.json").read_text(encoding="utf-8"))
CLUSTER = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
OVERLAYS = ("kueue", "redis", "incremental")

Manifest = dict[str, Any]


# -- the manifests, as they reach the API server -----------------------------------------------------------


def documents(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def patched(document: Manifest, operations: list[dict[str, Any]]) -> Manifest:
    """What a JSON patch (RFC 6902) makes of it: the operations that our overlays use."""
    changed = copy.deepcopy(document)
    for operation in operations:
        *above, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        parent = changed
        for part in above:
            parent = parent[part]
        if operation["op"] in ("replace", "remove"):
            del parent[last]  # as kustomize does, fails where there is nothing
        if operation["op"] in ("replace", "add"):
            parent[last] = operation["value"]
    return changed


def overlaid(name: str) -> Manifest:
    """What `kubectl kustomize` prints for one of the folders."""
    (overlay,) = documents(KUBERAY / name / "kustomization.yaml")
    assert set(overlay) == {"apiVersion", "kind", "resources", "patches"}
    (resource,) = overlay["resources"]
    (document,) = documents(KUBERAY / name / resource)
    for patch in overlay["patches"]:
        assert patch["target"] == {"kind": document["kind"]}
        document = patched(document, yaml.safe_load(patch["patch"]))
    return document


def manifests() -> dict[str, Manifest]:
    (job,), (service,) = documents(KUBERAY / "rayjob.yaml"), documents(KUBERAY / "rayservice.yaml")
    return {"rayjob": job, "rayservice": service} | {name: overlaid(name) for name in OVERLAYS}


MANIFESTS = manifests()
POLICIES = documents(KUBERAY / "networkpolicy.yaml")

every_manifest = pytest.mark.parametrize("name", MANIFESTS)


def cluster_of(manifest: Manifest) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"][CLUSTER[manifest["kind"]]]
    return spec


def groups(manifest: Manifest) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def ray_containers(manifest: Manifest) -> list[dict[str, Any]]:
    # KubeRay takes a pod's first container for Ray's (utils.RayContainerIndex); ours have no other.
    return [container for group in groups(manifest) for container in group["template"]["spec"]["containers"]]


def containers(manifest: Manifest) -> list[dict[str, Any]]:
    submitter = manifest["spec"].get("submitterPodTemplate", {"spec": {"containers": []}})
    return [*ray_containers(manifest), *submitter["spec"]["containers"]]


def inside(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in a document, with the fields that lead there."""
    yield path, node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from inside(value, (*path, key))
    if isinstance(node, list):
        for number, value in enumerate(node):
            yield from inside(value, (*path, str(number)))


def with_change(name: str, path: str, value: Any) -> Manifest:
    """A manifest with one value set, or taken out where it is None."""
    changed = copy.deepcopy(MANIFESTS[name])
    *above, last = path.split("/")
    parent: Any = changed
    for part in above:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    if value is None:
        del parent[last]
    else:
        parent[last] = value
    return changed


# -- KubeRay's schemas -------------------------------------------------------------------------------------


def schema_errors(manifest: Manifest) -> list[str]:
    validator = Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{manifest['kind']}"})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def written_rules(schema: dict[str, Any], value: Any) -> Iterator[tuple[str, Any]]:
    """The rules that the CRD writes in CEL beside its types, each with the value that it is about."""
    schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    for each in schema.get("x-kubernetes-validations", []):
        yield each["rule"], value
    if isinstance(value, dict):
        for key, child in value.items():
            inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from written_rules(inner, child)
    if isinstance(value, list) and "items" in schema:
        for child in value:
            yield from written_rules(schema["items"], child)


# The CRD's own sentences, in Python. `oldSelf` is about changes.
CEL: dict[str, Callable[[Any], bool]] = {
    "!((has(self.onSuccess) || has(self.onFailure)) && has(self.deletionRules))": lambda self: (
        not (("onSuccess" in self or "onFailure" in self) and "deletionRules" in self)
    ),
    "((has(self.onSuccess) && has(self.onFailure)) || has(self.deletionRules))": lambda self: (
        ("onSuccess" in self and "onFailure" in self) or "deletionRules" in self
    ),
    "!(has(self.jobStatus) && has(self.jobDeploymentStatus))": lambda self: (
        not ("jobStatus" in self and "jobDeploymentStatus" in self)
    ),
    "has(self.jobStatus) || has(self.jobDeploymentStatus)": lambda self: (
        "jobStatus" in self or "jobDeploymentStatus" in self
    ),
    "self == oldSelf": lambda _self: True,
    "self in ['ray.io/kuberay-operator', 'kueue.x-k8s.io/multikueue']": lambda self: (
        self in ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
    ),
}


def broken_rules(manifest: Manifest) -> list[str]:
    found = written_rules(SCHEMA["$defs"][manifest["kind"]], manifest)
    return [rule for rule, value in found if not CEL[rule](value)]


@every_manifest
def test_kuberay_s_schema_accepts_the_manifest(name: str) -> None:
    assert schema_errors(MANIFESTS[name]) == []
    assert broken_rules(MANIFESTS[name]) == []


HEAD_CONTAINER = "spec/rayClusterSpec/headGroupSpec/template/spec/containers/0"


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("rayjob", "spec/backofLimit", 2),
        ("rayjob", "spec/rayClusterSpec/rayVersion", 2.6),
        ("rayjob", "spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("rayjob", "spec/rayClusterSpec/workerGroupSpecs/0/groupName", None),
        ("rayjob", "spec/deletionStrategy/deletionRules/0/policy", "DeletePods"),
        ("rayjob", "spec/deletionStrategy/deletionRules/0/condition/ttlSeconds", -1),
        ("rayjob", f"{HEAD_CONTAINER}/imagePullPolcy", "Always"),
        ("rayjob", f"{HEAD_CONTAINER}/resources/limits/memory", "16 GiB"),
        ("rayservice", "spec/rayClusterConfig/authOptions/mode", "tokens"),
        ("incremental", "spec/upgradeStrategy/clusterUpgradeOptions/stepSizePercent", None),
        ("redis", "spec/rayClusterConfig/gcsFaultToleranceOptions/redisPassword", "a password"),
    ],
)
def test_the_schema_would_refuse(name: str, path: str, value: Any) -> None:
    assert schema_errors(with_change(name, path, value))


def test_the_written_rules_would_refuse() -> None:
    both = with_change("rayjob", "spec/deletionStrategy/onSuccess", {"policy": "DeleteSelf"})
    assert len(broken_rules(both)) == 1
    assert len(broken_rules(with_change("rayjob", "spec/deletionStrategy", {}))) == 1
    neither = with_change("rayjob", "spec/deletionStrategy/deletionRules/0/condition/jobStatus", None)
    assert len(broken_rules(neither)) == 1


def test_all_rules_that_the_schema_writes_are_known_here() -> None:
    assert {
        each["rule"] for path, node in inside(SCHEMA) if path[-1:] == ("x-kubernetes-validations",) for each in node
    } == set(CEL)


def test_the_schema_says_whose_it_is() -> None:
    assert "KubeRay v1.7" in SCHEMA["$comment"]
    assert "Apache License 2.0" in SCHEMA["$comment"]


# -- what the operator refuses besides (utils/validation.go) -------------------------------------------------


def refusals(manifest: Manifest) -> list[str]:
    spec, cluster = manifest["spec"], cluster_of(manifest)
    autoscaled = cluster.get("enableInTreeAutoscaling", False)
    found = []
    if manifest["kind"] == "RayJob":
        rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
        shut_down = spec.get("shutdownAfterJobFinishes", False)
        if spec.get("submissionMode", "K8sJobMode") not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
            found.append("nobody submits")  # the CRD takes any word, and the operator then starts no submitter
        if spec.get("suspend") and not shut_down:
            found.append("suspend needs shutdownAfterJobFinishes")
        if spec.get("ttlSecondsAfterFinished") and not shut_down:
            found.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        if rules and shut_down:
            found.append("deletionRules and shutdownAfterJobFinishes")
        if autoscaled and any(rule["policy"] == "DeleteWorkers" for rule in rules):
            found.append("DeleteWorkers with the autoscaler")
        deadlines: dict[str, dict[str, int]] = {}
        for rule in rules:
            condition = rule["condition"]
            about = deadlines.setdefault(condition.get("jobStatus") or condition["jobDeploymentStatus"], {})
            if rule["policy"] in about:
                found.append("the same rule twice")
            about[rule["policy"]] = condition.get("ttlSeconds", 0)
        for about in deadlines.values():
            order = [about[policy] for policy in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if policy in about]
            if order != sorted(order):
                found.append("the larger goes before the smaller")
    else:
        strategy = spec["upgradeStrategy"]
        if strategy["type"] not in ("None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
            found.append("an unknown upgrade")
        if strategy["type"] == "NewClusterWithIncrementalUpgrade":
            options = strategy["clusterUpgradeOptions"]
            if not autoscaled:
                found.append("an incremental upgrade needs the autoscaler")
            if not 0 < options["stepSizePercent"] <= 100 or not 0 < options["maxSurgePercent"] <= 100:
                found.append("not a percentage")
            if options["stepSizePercent"] > options["maxSurgePercent"]:
                found.append("more requests than the new cluster can take")
            if options["intervalSeconds"] <= 0 or not options["gatewayClassName"]:
                found.append("no interval or no gateway")
    head = cluster["headGroupSpec"]
    variables = {each["name"] for each in head["template"]["spec"]["containers"][0].get("env", [])}
    if variables & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}:
        found.append("a variable for what has a field")
    for group in groups(manifest):
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"]):
            found.append("resources twice")
        if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31):
            found.append("more at least than at most")
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            found.append("autoscaler v2 wants pods that are not restarted")
    name = manifest["metadata"]["name"]
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append("not a name")
    return found


@every_manifest
def test_the_operator_accepts_the_manifest(name: str) -> None:
    assert refusals(MANIFESTS[name]) == []


DELETION = "spec/deletionStrategy/deletionRules"
CLUSTER_AT_ONCE = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED"}}


@pytest.mark.parametrize(
    ("name", "path", "value", "problem"),
    [
        ("rayjob", "spec/submissionMode", "K8sJob", "nobody submits"),
        ("rayjob", "spec/suspend", True, "suspend needs"),
        ("rayjob", "spec/ttlSecondsAfterFinished", 600, "ttlSecondsAfterFinished needs"),
        ("rayjob", "spec/shutdownAfterJobFinishes", True, "deletionRules and"),
        ("rayjob", f"{DELETION}/1/policy", "DeleteWorkers", "DeleteWorkers with"),
        ("rayjob", DELETION, [CLUSTER_AT_ONCE, CLUSTER_AT_ONCE], "twice"),
        (
            "rayjob",
            DELETION,
            [
                {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 1}},
                {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 2}},
            ],
            "the larger",
        ),
        ("kueue", "spec/shutdownAfterJobFinishes", None, "suspend needs"),
        ("incremental", "spec/upgradeStrategy/type", "Incremental", "unknown"),
        ("incremental", "spec/rayClusterConfig/enableInTreeAutoscaling", False, "needs the autoscaler"),
        ("incremental", "spec/upgradeStrategy/clusterUpgradeOptions/stepSizePercent", 60, "more requests"),
        ("redis", "spec/rayClusterConfig/headGroupSpec/template/spec/restartPolicy", "Always", "not restarted"),
        ("rayservice", "spec/rayClusterConfig/workerGroupSpecs/0/minReplicas", 5, "more at least"),
        ("rayservice", "metadata/name", "PU-Ray", "not a name"),
    ],
)
def test_the_operator_would_refuse(name: str, path: str, value: Any, problem: str) -> None:
    assert any(problem in each for each in refusals(with_change(name, path, value)))


# -- what every manifest keeps to ----------------------------------------------------------------------------


@every_manifest
def test_ray_its_autoscaler_and_the_token_are_pinned(name: str) -> None:
    cluster = cluster_of(MANIFESTS[name])
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token", "secretName": "pu-ray-token"}
    for group in groups(MANIFESTS[name]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@every_manifest
def test_every_container_is_ours_and_keeps_to_kubernetes_restricted_profile(name: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    found = containers(MANIFESTS[name])
    for container in found:
        assert container["image"] == f"pu-ray:{version}"
        assert container["resources"]["limits"] == container["resources"]["requests"]
    for holder in [*found, cluster_of(MANIFESTS[name])["autoscalerOptions"]]:
        context = holder["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}


@every_manifest
def test_ray_has_the_storage_s_credentials_by_reference_where_there_are_any(name: str) -> None:
    for container in ray_containers(MANIFESTS[name]):
        assert container["envFrom"] == [{"secretRef": {"name": "pu-ray-storage", "optional": True}}]
    for group in groups(MANIFESTS[name]):
        assert group["template"]["spec"]["serviceAccountName"] == "pu-ray"


def told_secrets(document: Manifest) -> list[str]:
    """Fields that say a secret instead of where it is kept."""
    found = ["a Secret"] if document["kind"] == "Secret" else []
    for path, node in inside(document):
        where = "/".join(path)
        if isinstance(node, dict) and {"name", "value"} <= set(node) and _SECRET.search(node["name"]):
            found.append(f"{where}: {node['name']}")
        if path[-1:] == ("redisPassword",) and set(node) != {"valueFrom"}:
            found.append(where)
        if isinstance(node, str) and _LOOKS_SECRET.search(node):
            found.append(where)
    return found


_SECRET = re.compile("password|token|secret|key|credential", re.IGNORECASE)
# Amazon's key ids, our clients' tokens and their digests, passwords in URLs, and what `openssl rand -hex 32` prints.
_LOOKS_SECRET = re.compile(r"AKIA[0-9A-Z]{12}|\bpu_[\w-]{20}|sha256:|://[^/\s]*:[^/\s]*@|\b[0-9a-f]{32}")


@every_manifest
def test_no_manifest_tells_a_secret(name: str) -> None:
    assert told_secrets(MANIFESTS[name]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kind", "Secret"),
        ("spec/rayClusterConfig/gcsFaultToleranceOptions/redisPassword", {"value": "hunter2"}),
        ("spec/rayClusterConfig/gcsFaultToleranceOptions/redisAddress", "redis://default:hunter2@redis:6379"),
        (
            "spec/rayClusterConfig/headGroupSpec/template/spec/containers/0/env",
            [{"name": "AWS_SECRET_ACCESS_KEY", "value": "hunter2"}],
        ),
        ("spec/serveConfigV2", f"token_digests: ['sha256:{'0' * 64}']"),
    ],
)
def test_a_told_secret_would_be_found(path: str, value: Any) -> None:
    assert len(told_secrets(with_change("redis", path, value))) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rayjob", {"headgroup": (0, 0), "cpu-decode": (0, 8), "gpu-spot": (0, 16), "gpu-on-demand": (0, 4)}),
        ("rayservice", {"headgroup": (0, 0), "cpu-serve": (2, 4)}),
    ],
)
def test_the_autoscaler_sees_the_groups(name: str, expected: dict[str, tuple[int, int]]) -> None:
    seen = seen_groups(name)
    assert {group: (kind["min_workers"], kind["max_workers"]) for group, kind in seen.items()} == expected
    assert seen["headgroup"]["resources"]["CPU"] == 0
    assert all("idle_timeout_s" in kind for group, kind in seen.items() if group != "headgroup")


def seen_groups(name: str) -> dict[str, Any]:
    custom_resource = {"metadata": {"name": "any", "namespace": "any"}, "spec": cluster_of(MANIFESTS[name])}
    seen: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(custom_resource)["available_node_types"]
    return seen


# -- the job -------------------------------------------------------------------------------------------------


def test_kubernetes_asks_for_spot_first() -> None:
    seen = seen_groups("rayjob")
    assert seen["gpu-spot"]["priority"] > seen["gpu-on-demand"]["priority"]
    assert seen["gpu-spot"]["resources"] == seen["gpu-on-demand"]["resources"]
    assert seen["gpu-spot"]["resources"]["GPU"] == 1


def test_on_demand_is_tried_five_minutes_after_spot_was_asked_for_in_vain() -> None:
    (variable,) = MANIFESTS["rayjob"]["spec"]["rayClusterSpec"]["autoscalerOptions"]["env"]
    ask = (
        "from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig\n"
        "print(InstanceReconcileConfig().allocate_status_timeout_s)"
    )
    environment = os.environ | {variable["name"]: variable["value"]}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "300"


def test_the_job_runs_the_chain_on_the_file_that_is_mounted() -> None:
    spec = MANIFESTS["rayjob"]["spec"]
    python, m, module, verb, file, *flags = spec["entrypoint"].split()
    assert (python, m, module) == ("python", "-m", "pu_ray")
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert set(flags) <= {flag for parameter in command.params for flag in parameter.opts}
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = (each for each in head["containers"][0]["volumeMounts"] if each["name"] == "job")
    assert str(Path(file).parent) == mount["mountPath"]
    assert {"name": "job", "configMap": {"name": "pu-ray-job"}} in head["volumes"]


def test_a_success_takes_the_cluster_down_at_once_and_a_failure_leaves_time_to_look() -> None:
    rules = MANIFESTS["rayjob"]["spec"]["deletionStrategy"]["deletionRules"]
    when = {tuple(sorted(rule["condition"].items())): rule["policy"] for rule in rules}
    assert when == {
        (("jobStatus", "SUCCEEDED"), ("ttlSeconds", 0)): "DeleteCluster",
        (("jobDeploymentStatus", "Failed"), ("ttlSeconds", 3600)): "DeleteCluster",
    }
    # What DeleteWorkers would do, the autoscaler must: every group may go to nothing.
    for group in MANIFESTS["rayjob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] == 0
        assert group["idleTimeoutSeconds"] <= 300


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", ["rayjob", "kueue"])
def test_what_does_not_fit_into_memory_goes_to_a_disk_that_was_asked_for(name: str) -> None:
    for group in groups(MANIFESTS[name]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (scratch,) = (each for each in container["volumeMounts"] if each["name"] == "scratch")
        # Python's temporary files, where distillation keeps its images, go there as well.
        assert scratch["mountPath"] == "/tmp"
        assert group["rayStartParams"]["object-spilling-directory"].startswith("/tmp/")
        (volume,) = (each for each in pod["volumes"] if each["name"] == "scratch")
        asked = gibibytes(container["resources"]["requests"]["ephemeral-storage"])
        assert gibibytes(volume["emptyDir"]["sizeLimit"]) < asked


def test_ray_start_knows_the_flags_of_every_group() -> None:
    from ray.scripts.scripts import start

    flags = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    for manifest in MANIFESTS.values():
        for group in groups(manifest):
            assert set(group["rayStartParams"]) <= flags


def test_kueue_may_queue_the_job() -> None:
    # Kueue, pkg/controller/jobs/{rayjob/rayjob_webhook.go,raycluster/common.go}
    job = MANIFESTS["kueue"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in job["spec"]
    names = [group["groupName"] for group in cluster_of(job)["workerGroupSpecs"]]
    assert len(names) <= 7
    assert "head" not in names


def test_without_kueue_nothing_keeps_the_job_waiting() -> None:
    job = MANIFESTS["rayjob"]
    assert "suspend" not in job["spec"]
    assert not any("kueue" in key for key in {**job["metadata"].get("labels", {})})
    assert cluster_of(job) == cluster_of(MANIFESTS["kueue"])


# -- the students ----------------------------------------------------------------------------------------------


def application(name: str = "rayservice") -> ServeApplicationSchema:
    text = MANIFESTS[name]["spec"]["serveConfigV2"]
    (found,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    return found


def test_serve_finds_the_builder_and_it_takes_the_arguments() -> None:
    module, _, function = application().import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    arguments = FrontArguments.model_validate(application().args)
    assert arguments.students == ["s3://your-bucket/runs/shop/exported"]
    assert arguments.settings.authentication == "required"


def test_the_clients_tokens_are_mounted_where_the_server_reads_them() -> None:
    uri = FrontArguments.model_validate(application().args).settings.tokens_uri
    assert uri is not None
    (group,) = cluster_of(MANIFESTS["rayservice"])["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert str(Path(uri).parent) == mount["mountPath"]
    assert "subPath" not in mount  # such a mount would never change
    assert pod["volumes"] == [{"name": mount["name"], "secret": {"secretName": "pu-ray-clients"}}]


def test_the_workers_hold_as_many_processes_as_the_settings_want() -> None:
    settings = FrontArguments.model_validate(application().args).settings
    kind = seen_groups("rayservice")["cpu-serve"]
    per_worker = kind["resources"]["CPU"] // settings.cpus_per_replica
    assert settings.replicas == per_worker * kind["min_workers"]
    assert settings.max_replicas == per_worker * kind["max_workers"]


def test_a_worker_is_asked_whether_serve_answers_there_and_kuberay_asks_the_rest() -> None:
    (head,), (worker,) = (group["template"]["spec"]["containers"] for group in groups(MANIFESTS["rayservice"]))
    # A probe of ours takes the place of KubeRay's (common/pod.go), which also ask whether GCS and the raylet live.
    assert not {"readinessProbe", "livenessProbe", "startupProbe"} & set(head)
    assert not {"livenessProbe", "startupProbe"} & set(worker)
    probe = worker["readinessProbe"]
    assert probe["httpGet"] == {"path": "/-/healthz", "port": "serve"}
    (port,) = (each["containerPort"] for each in worker["ports"] if each["name"] == "serve")
    assert port == yaml.safe_load(MANIFESTS["rayservice"]["spec"]["serveConfigV2"])["http_options"]["port"]
    assert MANIFESTS["rayservice"]["spec"]["excludeHeadPodFromServeSvc"] is True


def test_the_overlays_change_what_they_are_about_and_nothing_else() -> None:
    plain = MANIFESTS["rayservice"]
    redis, incremental = copy.deepcopy(MANIFESTS["redis"]), copy.deepcopy(MANIFESTS["incremental"])
    options = redis["spec"]["rayClusterConfig"].pop("gcsFaultToleranceOptions")
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "pu-ray-redis", "key": "password"}
    assert redis == plain
    strategy = incremental["spec"].pop("upgradeStrategy")
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    assert incremental["spec"] == {key: value for key, value in plain["spec"].items() if key != "upgradeStrategy"}


# -- who may reach whom ----------------------------------------------------------------------------------------

Labels = dict[str, str]


@dataclass(frozen=True)
class Pod:
    labels: Labels = field(default_factory=dict)
    namespace: str = "ours"
    namespace_labels: Labels = field(default_factory=dict)


def ray_pods(name: str) -> list[Pod]:
    """The pods of a manifest with the labels that KubeRay gives them (labelPod in common/pod.go)."""
    cluster = cluster_of(MANIFESTS[name])
    kinds = [("head", "headgroup", cluster["headGroupSpec"])]
    kinds += [("worker", group["groupName"], group) for group in cluster["workerGroupSpecs"]]
    return [
        Pod(
            {
                "ray.io/is-ray-node": "yes",
                "ray.io/identifier": f"{name}-x7k2p-{kind}",
                "app.kubernetes.io/name": "kuberay",
                "app.kubernetes.io/created-by": "kuberay-operator",
                **group["template"]["metadata"]["labels"],
                "ray.io/cluster": f"{name}-x7k2p",  # drawn anew for every cluster
                "ray.io/node-type": kind,
                "ray.io/group": group_name,
            }
        )
        for kind, group_name, group in kinds
    ]


def matches(selector: dict[str, Any], labels: Labels) -> bool:
    assert set(selector) <= {"matchLabels"}, "more than this test understands"
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def lets_in(peer: dict[str, Any], source: Pod) -> bool:
    assert peer
    assert set(peer) <= {"podSelector", "namespaceSelector"}, "more than this test understands"
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], source.namespace_labels):
            return False
    elif source.namespace != "ours":
        return False
    return matches(peer.get("podSelector", {}), source.labels)


def reaches(source: Pod, target: Pod, port: int, policies: list[Manifest] = POLICIES) -> bool:
    """Whether Kubernetes lets a TCP connection through, by the rules of NetworkPolicy."""
    about = [each["spec"] for each in policies if matches(each["spec"]["podSelector"], target.labels)]
    if not about:
        return True
    return any(
        all(each["protocol"] == "TCP" for each in rule.get("ports", []))
        and port in [each["port"] for each in rule.get("ports", [])] + ([port] if "ports" not in rule else [])
        and any(lets_in(peer, source) for peer in rule["from"])
        for spec in about
        for rule in spec.get("ingress", [])
    )


JOB, STUDENTS = ray_pods("rayjob"), ray_pods("rayservice")
STRANGER = Pod({"app": "stranger"})
ELSEWHERE = Pod(STUDENTS[1].labels, namespace="elsewhere")  # with all the right labels, in another namespace
FOREIGN = Pod({**{key: value for key, value in JOB[1].labels.items() if key != "pu-ray/part"}, "ray.io/cluster": "b"})
GATEWAY = Pod({}, "gateways", {"pu-ray/may-ask-students": "yes"})
BESIDE = Pod({"pu-ray/may-ask-students": "yes"})
MADE_GATEWAY = Pod({"gateway.networking.k8s.io/gateway-name": "pu-ray-students-gateway"})
PROMETHEUS = Pod({}, "monitoring", {"pu-ray/may-read-metrics": "yes"})
# The labels of the operator's Helm chart.
OPERATOR = Pod({"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"}, "ops")
SUBMITTER = Pod(
    {
        **MANIFESTS["rayjob"]["spec"]["submitterPodTemplate"]["metadata"]["labels"],
        "batch.kubernetes.io/job-name": "pu-ray",
    }
)
# GCS, dashboard, Serve, Ray Client, HAProxy's processes, the dashboard's agent, what Ray draws by chance
PORTS = (6379, 8265, 8000, 10001, 30000, 31000, 40000, 41000, 52365, 20123)


def test_among_themselves_the_pods_of_a_cluster_reach_every_port() -> None:
    for pods in (JOB, STUDENTS):
        assert all(reaches(one, other, port) for one in pods for other in pods for port in PORTS)


@pytest.mark.parametrize(
    ("source", "target", "ports"),
    [
        (STRANGER, JOB, ()),
        (STRANGER, STUDENTS, ()),
        (ELSEWHERE, STUDENTS, ()),
        (FOREIGN, JOB, ()),
        (JOB[1], STUDENTS, ()),
        (STUDENTS[1], JOB, ()),
        (STRANGER, [FOREIGN], ()),
        (GATEWAY, STUDENTS, (8000,)),
        (BESIDE, STUDENTS, (8000,)),
        (MADE_GATEWAY, STUDENTS, (8000,)),
        (GATEWAY, JOB, ()),
        (OPERATOR, STUDENTS, (8265,)),
        (OPERATOR, JOB, (8265,)),
        (SUBMITTER, JOB, (8265,)),
        (SUBMITTER, STUDENTS, ()),
        (PROMETHEUS, STUDENTS, (8080,)),
        (PROMETHEUS, JOB, (8080,)),
    ],
)
def test_from_outside_only_these_ports_are_reached(source: Pod, target: list[Pod], ports: tuple[int, ...]) -> None:
    for pod in target:
        assert [port for port in (*PORTS, 8080) if reaches(source, pod, port)] == list(ports)


def test_the_policies_are_what_keeps_the_stranger_out() -> None:
    for missing in ("pu-ray-deny", "pu-ray-job", "pu-ray-students"):
        fewer = [policy for policy in POLICIES if policy["metadata"]["name"] != missing]
        assert not any(reaches(STRANGER, pod, 8000, fewer) for pod in (*JOB, *STUDENTS)), "the others still deny"
        if missing != "pu-ray-deny":
            assert not all(reaches(one, two, 6379, fewer) for pods in (JOB, STUDENTS) for one in pods for two in pods)
    assert reaches(STRANGER, STUDENTS[1], 30000, policies=[])
    assert reaches(
        STRANGER, FOREIGN, 8265, [policy for policy in POLICIES if policy["metadata"]["name"] != "pu-ray-deny"]
    )


def test_the_policies_are_about_ingress_alone_and_their_rules_are_well_formed() -> None:
    for policy in POLICIES:
        assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
        assert policy["spec"]["policyTypes"] == ["Ingress"]
        assert set(policy["spec"]) <= {"podSelector", "policyTypes", "ingress"}
        # KubeRay's CRD holds Kubernetes' own schema of such rules.
        holder = with_change(
            "rayservice",
            "spec/rayClusterConfig/networkPolicy",
            {"worker": {"ingressRules": policy["spec"].get("ingress", [])}},
        )
        assert schema_errors(holder) == []


# -- what must be there before, and what the document says of it --------------------------------------------------


def named_objects() -> set[tuple[str, str]]:
    """Secrets, ConfigMaps and the service account that the manifests expect."""
    found = set()
    for manifest in MANIFESTS.values():
        found.add(("secret generic", cluster_of(manifest)["authOptions"]["secretName"]))
        for path, node in inside(manifest):
            if path[-1:] in (("secretRef",), ("secretKeyRef",)):
                found.add(("secret generic", node["name"]))
            if path[-1:] == ("secretName",) and "volumes" in path:
                found.add(("secret generic", node))
            if path[-1:] == ("configMap",):
                found.add(("configmap", node["name"]))
            if path[-1:] == ("serviceAccountName",):
                found.add(("serviceaccount", node))
    return found


def test_the_document_makes_everything_that_the_manifests_expect() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert len(named_objects()) == 6
    for kind, name in named_objects():
        assert f"kubectl create {kind} {name}" in text
    for overlay in OVERLAYS:
        assert f"kubectl kustomize --load-restrictor LoadRestrictionsNone cluster/kuberay/{overlay} |" in text


def test_every_file_that_the_document_names_exists() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    named = set(re.findall(r"cluster/[\w./-]*[\w]", text))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
