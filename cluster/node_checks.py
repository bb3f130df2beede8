"""Checks on every node of a cluster before a job starts: storage, versions, GPUs, clock, disk.

A node that differs from the others makes a run fail hours later, on the one shard that it happened to read. So each is
asked first, by a small task of its own. Nodes that an autoscaler starts later are not: they come from the same image.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import pu_ray
from pu_ray.errors import ClusterError, PuRayError
from pu_ray.storage import Storage

PACKAGES = ("ray", "torch", "pyarrow", "numpy")
LEAST_FREE_DISK = 0.05  # Ray refuses to spill to a disk that is fuller than 95 %
MOST_SKEW_S = 60.0  # a lease is renewed every few seconds; S3 itself refuses requests that are 15 minutes off

_NODE_TIMEOUT_S = 60.0
_GIB = 2**30


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself.

    Attributes:
        node: Its address.
        versions: Of Python, ours and `PACKAGES`, by name; "" where absent.
        storage_problem: Why the output could not be written, read or deleted there; "" where it could.
        lake_problem: Why the lake could not be looked into there; "" where it could.
        gpus_promised: Logical GPUs that Ray gives away there.
        gpus_seen: NVIDIA devices that are there.
        clock_s: Seconds since the epoch.
        spill_free_bytes: Free space where Ray spills.
        spill_size_bytes: Of that disk.
    """

    node: str
    versions: Mapping[str, str]
    storage_problem: str
    lake_problem: str
    gpus_promised: float
    gpus_seen: int
    clock_s: float
    spill_free_bytes: int
    spill_size_bytes: int


@dataclass(frozen=True)
class Asked:
    """A node's facts and when they were true, by the clock of who asked.

    Attributes:
        facts: See there.
        sent_s: When the question left.
        answered_s: When the answer came.
    """

    facts: NodeFacts
    sent_s: float
    answered_s: float

    @property
    def skew_s(self) -> float:
        """Seconds that the node's clock is off for certain; the way there and back is not counted against it."""
        if self.facts.clock_s > self.answered_s:
            return self.facts.clock_s - self.answered_s
        return min(0.0, self.facts.clock_s - self.sent_s)


def look(node: str, gpus_promised: float, output: str, lake: str) -> NodeFacts:
    """Facts of the machine this runs on.

    Args:
        node: What it is called.
        gpus_promised: Logical GPUs that Ray gives away there.
        output: URI of the run's folder.
        lake: URI of the lake.
    """
    disk = shutil.disk_usage(_spill_folder())
    return NodeFacts(
        node=node,
        versions=versions(),
        storage_problem=_problem(lambda: probe(Storage(output), f".probe-{node}-{time.time_ns()}")),
        lake_problem=_problem(lambda: _require(Storage(lake))),
        gpus_promised=gpus_promised,
        gpus_seen=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        clock_s=time.time(),
        spill_free_bytes=disk.free,
        spill_size_bytes=disk.total,
    )


def versions() -> dict[str, str]:
    """Versions that must be the same on all nodes."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "pu-ray": pu_ray.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


def probe(storage: Storage, name: str) -> None:
    """Write, read and delete a small object.

    Raises:
        OSError: What was read is not what was written.
        PuRayError: The storage's own refusal.
    """
    content = b"pu-ray"
    storage.write_bytes(name, content)
    try:
        if storage.read_bytes(name) != content:
            raise OSError("the object read differs from the one written")
    finally:
        storage.delete(name)


def ask_all(output: str, lake: str) -> list[Asked]:
    """Every node's facts, asked at once; Ray must be connected.

    Raises:
        ClusterError: A node did not answer within a minute, or could not even run the question.
    """
    question = ray.remote(num_cpus=0, max_retries=0)(look)
    pending = {}
    sent = time.time()
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            promised = node["Resources"].get("GPU", 0.0)
            answer = question.options(scheduling_strategy=where).remote(
                node["NodeManagerAddress"], promised, output, lake
            )
            pending[answer] = node["NodeManagerAddress"]
    asked = []
    waiting = list(pending)
    deadline = time.monotonic() + _NODE_TIMEOUT_S
    while waiting and time.monotonic() < deadline:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        answered = time.time()
        for answer in ready:
            try:
                asked.append(Asked(ray.get(answer), sent, answered))
            except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                continue  # gone meanwhile, as spot nodes do: nothing will run there
            except ray.exceptions.RayError as error:
                raise ClusterError(
                    "a node cannot run PU-Ray",
                    slug="node-cannot-run",
                    where=f"node {pending[answer]}",
                    got=str(error).strip().splitlines()[-1],
                    hint="every node needs the same image, or packages as in requirements.lock",
                ) from error
    if waiting:
        raise ClusterError(
            "nodes do not answer",
            slug="nodes-do-not-answer",
            where=", ".join(sorted(pending[answer] for answer in waiting)),
            allowed=f"an answer to a small task within {_NODE_TIMEOUT_S:.0f} s",
            hint="look at `ray status` and at those nodes' logs; take them out of the cluster if they hang",
        )
    return asked


def problems(asked: Sequence[Asked], *, needs_gpus: bool) -> list[str]:
    """One sentence for each thing that would make the job fail on a node.

    Args:
        asked: The nodes' answers.
        needs_gpus: Whether networks run on GPUs.
    """
    found = []
    ours = versions()
    for each in asked:
        facts = each.facts
        for name, version in facts.versions.items():
            if version != ours[name]:
                found.append(f"node {facts.node} has {name} {version or 'missing'}, the driver {ours[name] or 'none'}")
        if facts.storage_problem:
            found.append(f"node {facts.node} cannot use the output: {facts.storage_problem}")
        if facts.lake_problem:
            found.append(f"node {facts.node} cannot read the lake: {facts.lake_problem}")
        if needs_gpus and facts.gpus_seen < facts.gpus_promised:
            found.append(
                f"node {facts.node} promises {facts.gpus_promised:g} GPUs and has {facts.gpus_seen}: "
                "does its container see them?"
            )
        if abs(each.skew_s) > MOST_SKEW_S:
            found.append(f"the clock of node {facts.node} is {each.skew_s:+.0f} s off the driver's")
        if facts.spill_free_bytes < LEAST_FREE_DISK * facts.spill_size_bytes:
            found.append(
                f"node {facts.node} has {facts.spill_free_bytes / _GIB:.3g} of {facts.spill_size_bytes / _GIB:.3g} GiB "
                f"free where Ray spills; under {LEAST_FREE_DISK:.0%} it spills no more"
            )
    return found


def _problem(action: Any) -> str:
    try:
        action()
    except (OSError, PuRayError) as error:
        return str(error).strip().splitlines()[0]
    return ""


def _require(storage: Storage) -> None:
    if not storage.exists():
        raise FileNotFoundError("nothing is there")


def _spill_folder() -> str:
    """Ray's session folder, where it spills unless told otherwise."""
    from ray._private.worker import global_worker

    node = global_worker.node
    return str(node.get_session_dir_path()) if node is not None else "/tmp"
