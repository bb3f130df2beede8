"""Files that start clusters and jobs, against what Ray itself would say of them. KubeRay: test_kuberay_files.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pu_ray import config

ROOT = Path(__file__).parents[2]
CLUSTER_FILES = ("ray-cluster.yaml", "cluster/on-prem.yaml")
JOBS = sorted((ROOT / "cluster" / "jobs").glob("*.yaml"))


def parsed(path: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    return content


def prepared(path: str) -> dict[str, Any]:
    filled: dict[str, Any] = prepare_config(parsed(path))
    validate_config(filled)
    return filled


@pytest.mark.parametrize("path", CLUSTER_FILES)
def test_ray_accepts_the_cluster_file(path: str) -> None:
    prepared(path)


def test_ray_s_check_can_fail() -> None:
    broken = parsed("ray-cluster.yaml") | {"max_wrokers": 1}
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("path", CLUSTER_FILES)
def test_every_ray_start_demands_the_token_and_the_head_takes_no_work(path: str) -> None:
    filled = prepared(path)
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in filled[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token ray start" in command
    assert "--num-cpus=0" in starts[0]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in starts[0]
    assert "--dashboard-host=" in starts[0]
    assert "--address=$RAY_HEAD_IP:6379" in starts[1]
    assert "--object-spilling-directory=" in starts[1]
    assert list(filled["file_mounts"]) == ["~/.ray/auth_token"]


def test_aws_asks_for_spot_first_and_lets_everything_but_the_head_go() -> None:
    filled = prepared("ray-cluster.yaml")
    kinds = filled["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert all(kind["min_workers"] == 0 for kind in kinds.values())
    spot, on_demand = kinds["gpu-spot"], kinds["gpu-on-demand"]
    assert spot["priority"] > on_demand["priority"]
    assert spot["resources"] == on_demand["resources"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in on_demand["node_config"]
    assert filled["provider"]["cache_stopped_nodes"] is False


def test_aws_gets_nothing_from_ray_s_open_defaults() -> None:
    for kind in prepared("ray-cluster.yaml")["available_node_types"].values():
        for key in ("ImageId", "SubnetIds", "SecurityGroupIds", "IamInstanceProfile", "KeyName"):
            assert kind["node_config"].get(key), key


@pytest.mark.parametrize("path", CLUSTER_FILES)
def test_setup_checks_for_the_ray_that_is_installed_here_and_needs_no_internet(path: str) -> None:
    filled = prepared(path)
    for key in ("head_setup_commands", "worker_setup_commands"):
        (command,) = filled[key]
        assert f"ray.__version__ != '{ray.__version__}'" in command


def test_the_image_is_built_from_the_ray_that_is_installed_here() -> None:
    text = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG RAY_VERSION=(\S+)$", text, re.MULTILINE).group(1) == ray.__version__  # type: ignore[union-attr]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_file_is_valid(path: Path) -> None:
    config.load(path, environment={})


def test_the_paper_s_settings_are_the_paper_s() -> None:
    job = config.load(ROOT / "cluster" / "jobs" / "paper-cifar10.yaml", environment={}).job
    assert (job.recipe, job.scorer.prior, job.scorer.features) == ("paper", 0.21, "finetuned")
    assert (job.scorer.epochs, job.scorer.batch_size) == (170, 4096)
    assert (job.distill.epochs, job.distill.batch_size) == (200, 2048)
    assert (job.teacher.architecture, job.student.architecture) == ("cifar/resnet34-w64", "cifar/resnet18-w64")
