"""Checks before a job starts on a running Ray: enough logical resources, and nodes that can do the work.

Ray waits without a word for resources that never come, and actors that fill a cluster starve the reads that feed
them (ray#44687): both look like a hang. So the sums are made before anything starts, and where a cluster may grow its
autoscaler is asked (growth.py). What each node has is looked at on the node (node_checks.py).

Not covered: whether the cloud has capacity to sell.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import ray
from ray._private.state import state as cluster_state

from cluster import growth, node_checks
from pu_ray.config import JobConfig
from pu_ray.errors import ClusterError, PuRayError
from pu_ray.storage import Storage

CPU: Final = "CPU"
GPU: Final = "GPU"
MEMORY: Final = "memory"

_GIB = 2**30
_SEPARATOR = "\n       "
_READERS = 1  # without a free slot for one read and one write, a pipeline whose actors are all up cannot move
_TRAIN_SPARE_CPUS = 1.0
# `ray up` and KubeRay label the nodes they start; whoever starts nodes may start more.
_NODE_GROUP_LABEL = "ray.io/node-group"


@dataclass(frozen=True)
class Part:
    """Equal processes of a stage that must all be placed before it can move.

    Attributes:
        what: What they do.
        count: How many.
        each: Logical resources of one (`CPU`, `GPU`: slots; `memory`: bytes), which one node must have.
        setting: The setting that lowers it.
    """

    what: str
    count: int
    each: Mapping[str, float]
    setting: str


@dataclass(frozen=True)
class Requirement:
    """The least a stage needs at once.

    Attributes:
        stage: `mining` (features and scores over the lake) or `distill`.
        parts: What has to be placed.
    """

    stage: str
    parts: tuple[Part, ...]

    @property
    def total(self) -> dict[str, float]:
        """Sum over the parts, by resource."""
        total: dict[str, float] = {}
        for part in self.parts:
            for resource, amount in part.each.items():
                total[resource] = total.get(resource, 0.0) + part.count * amount
        return total

    @property
    def cpus(self) -> float:
        """Logical CPUs at once: what a private Ray must offer."""
        return self.total[CPU]


@dataclass(frozen=True)
class Capacity:
    """What a cluster has.

    Attributes:
        total: Logical resources of all nodes that are up.
        nodes: The same, node by node.
        may_grow: Whether something manages the nodes that may add more.
    """

    total: Mapping[str, float]
    nodes: tuple[Mapping[str, float], ...]
    may_grow: bool


@dataclass(frozen=True)
class PreflightReport:
    """What was checked.

    Attributes:
        requirements: What each stage needs.
        capacity: What the cluster has now.
        waiting_for: Shortages that an autoscaling cluster is expected to fill; empty on a fixed one.
        output: Where the probe was written, read and deleted.
    """

    requirements: tuple[Requirement, ...]
    capacity: Capacity
    waiting_for: tuple[str, ...]
    output: str


def required(config: JobConfig) -> list[Requirement]:
    """The least resources of each stage: arithmetic only, no Ray."""
    embed, decode, write = config.resources.embed, config.resources.decode, config.resources.write
    train = config.resources.train
    actor = {CPU: embed.cpus, GPU: embed.gpus, MEMORY: embed.memory_gib * _GIB}
    worker = {CPU: train.cpus, GPU: train.gpus}
    fewest = config.distill.fewest_workers
    return [
        Requirement(
            "mining",
            (
                Part("embedding actors", embed.min_actors, _positive(actor), "resources.embed"),
                Part(
                    "read and decode tasks",
                    _READERS,
                    {CPU: decode.cpus, MEMORY: decode.memory_gib * _GIB},
                    "resources.decode",
                ),
                Part("write tasks", 1, {CPU: write.cpus, MEMORY: write.memory_gib * _GIB}, "resources.write"),
            ),
        ),
        Requirement(
            "distill",
            (
                Part("training workers", fewest, _positive(worker), "resources.train or distill.workers"),
                Part("validation and checkpoints", 1, {CPU: _TRAIN_SPARE_CPUS}, "resources.train"),
            ),
        ),
    ]


def shortages(requirements: Sequence[Requirement], capacity: Capacity) -> list[str]:
    """One sentence for each resource of which there is too little, in total or on every single node."""
    found = []
    for requirement in requirements:
        for resource, needed in requirement.total.items():
            available = capacity.total.get(resource, 0.0)
            if needed > available:
                settings = " or ".join(
                    dict.fromkeys(part.setting for part in requirement.parts if resource in part.each)
                )
                found.append(
                    f"{requirement.stage} needs {_amount(resource, needed)} at once ({_sum(requirement, resource)}), "
                    f"the cluster has {_amount(resource, available)}: lower {settings}"
                )
        for part in requirement.parts:
            # A total may be met by nodes of which none can hold the part.
            met = all(part.each[resource] <= capacity.total.get(resource, 0.0) for resource in part.each)
            if met and not any(_fits(part.each, node) for node in capacity.nodes):
                found.append(
                    f"{requirement.stage}: no single node has the {_one(part)} that one of the {part.what} needs: "
                    f"lower {part.setting}"
                )
    return found


def capacity_now() -> Capacity:
    """Capacity of the Ray this process is connected to."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    up: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = tuple(node["Resources"] for node in alive)
    # Where the provider tells Ray its ceiling, that is what counts. Open-source autoscalers do not, so that a label
    # on a node is the only sign that there may be more.
    ceiling = cluster_state.get_max_resources_from_cluster_config()
    if ceiling is not None:
        total = up | {resource: max(up.get(resource, 0.0), amount) for resource, amount in ceiling.items()}
        return Capacity(total, (total,), may_grow=False)
    return Capacity(up, nodes, any(_NODE_GROUP_LABEL in node["Labels"] for node in alive))


def check(config: JobConfig, *, every_node: bool = True) -> PreflightReport:
    """Refuse a job that could not run; Ray must be connected.

    Args:
        config: The job.
        every_node: Look at each node too; a private Ray on this machine has none but this one.

    Raises:
        ClusterError: Too few resources on a cluster that does not grow, processes that no kind of node could hold on
            one that does, an output that cannot be written, or a node that would fail the job.
    """
    requirements = required(config)
    capacity = capacity_now()
    found = shortages(requirements, capacity)
    if found and not capacity.may_grow:
        raise ClusterError(
            "the cluster is too small for this job, which would wait forever",
            slug="too-small",
            where="resources",
            got=_SEPARATOR.join(found),
            hint=_hint(requirements, capacity),
        )
    probe_output(config.output)
    if every_node:
        _check_nodes(config)
    if found:
        _ask_autoscaler(requirements, capacity)
    return PreflightReport(tuple(requirements), capacity, tuple(found), config.output)


def probe_output(uri: str) -> None:
    """Write, read and delete a small object where the job will publish.

    Raises:
        ClusterError: One of the three failed.
    """
    try:
        node_checks.probe(Storage(uri), f".probe-{uuid.uuid4().hex}")
    except (OSError, PuRayError) as error:
        raise ClusterError(
            "the output cannot be used: a small object could not be written, read back and deleted",
            slug="output-unusable",
            where=f"output ({uri})",
            allowed="a folder or bucket that this job may write, read and delete in",
            got=str(error).splitlines()[0],
            hint="check the URI, and the credentials and endpoint in the environment",
        ) from error


def _check_nodes(config: JobConfig) -> None:
    embeds = config.features.engine != "onnx" and config.resources.embed.gpus > 0
    asked = node_checks.ask_all(config.output, config.lake.uri)
    found = node_checks.problems(asked, needs_gpus=embeds or config.resources.train.gpus > 0)
    if found:
        raise ClusterError(
            "not every node could do its part of this job",
            slug="node-checks-failed",
            where="cluster",
            got=_SEPARATOR.join(found),
            hint="mend these nodes or take them out of the cluster; all need the same image, storage and credentials",
        )


def _ask_autoscaler(requirements: Sequence[Requirement], capacity: Capacity) -> None:
    """Refuse what the autoscaler would leave waiting for ever."""
    homeless = [
        (requirement.stage, part)
        for requirement in requirements
        for part in requirement.parts
        if not any(_fits(part.each, node) for node in capacity.nodes)
    ]
    refused = growth.refused([part.each for _, part in homeless]) if homeless else []
    if refused:
        raise ClusterError(
            "this cluster may start no kind of node that could hold this job's processes, so it would wait forever",
            slug="no-fitting-node",
            where="resources",
            got=_SEPARATOR.join(
                f"{stage}: one of the {part.what} needs {_one(part)} on one node: lower {part.setting}"
                for stage, part in homeless
                if part.each in refused
            ),
            hint="lower the settings named above, or add a kind of node to the cluster's file; a kind whose "
            "`resources` name no memory offers none",
        )


def _positive(resources: Mapping[str, float]) -> dict[str, float]:
    return {resource: amount for resource, amount in resources.items() if amount > 0}


def _fits(each: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(amount <= node.get(resource, 0.0) for resource, amount in each.items())


def _sum(requirement: Requirement, resource: str) -> str:
    terms = [
        f"{part.count} {part.what} x {_amount(resource, part.each[resource])}"
        for part in requirement.parts
        if resource in part.each
    ]
    return " + ".join(terms)


def _one(part: Part) -> str:
    return ", ".join(_amount(resource, amount) for resource, amount in part.each.items())


def _amount(resource: str, amount: float) -> str:
    return f"{amount / _GIB:.3g} GiB memory" if resource == MEMORY else f"{amount:g} {resource}"


def _hint(requirements: Sequence[Requirement], capacity: Capacity) -> str:
    wants_gpu = any(GPU in requirement.total for requirement in requirements)
    if wants_gpu and capacity.total.get(GPU, 0.0) == 0:
        return "Ray sees no GPU: set resources.embed.gpus and resources.train.gpus to 0, or use a cluster with GPUs"
    return "lower the settings named above, or use a bigger cluster"
