"""What a cluster that grows would say to a job: whether any kind of node that it may start could hold its processes.

Ray's autoscaler never refuses: a request that no kind of node can hold waits for ever, without a word to the job. But
it keeps a list of such requests, and that is asked for here, before any work starts.

Not covered: autoscaler v1, which keeps no such list; a kind that fits but of which there may be too few nodes, or none
to be had today, which is worth waiting for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.util.placement_group import placement_group, remove_placement_group

Resources = Mapping[str, float]

# The autoscaler looks around every five seconds; the second look has surely seen the question.
_PATIENCE_S = 15.0
_POLL_S = 0.5


def refused(wanted: Sequence[Resources], patience_s: float = _PATIENCE_S) -> list[Resources]:
    """Which of these no node that the autoscaler may start could hold; Ray must be connected.

    The question is a request for room, withdrawn at the end: nodes that it calls up are those that the work would have
    called up a moment later.

    Args:
        wanted: Logical resources of one process each (`CPU`, `GPU`: slots; `memory`: bytes).
        patience_s: How long to wait for an answer. No answer is not a refusal.
    """
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    if _state(client).autoscaler_state_version == 0:
        return []
    groups = [placement_group([dict(resources)]) for resources in wanted]
    try:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            impossible = [
                dict(bundle.resources_bundle)
                for gang in _state(client).infeasible_gang_resource_requests
                for bundle in gang.requests
            ]
            found = [resources for resources in wanted if any(_equal(resources, each) for each in impossible)]
            if found or all(group.wait(0) for group in groups):
                return found
            time.sleep(_POLL_S)
        return []
    finally:
        for group in groups:
            remove_placement_group(group)


def _state(client: GcsClient) -> Any:
    """What the autoscaler last told the cluster's head; version 0 where there is none."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status())
    return reply.autoscaling_state


def _equal(one: Resources, other: Resources) -> bool:
    # Ray keeps resources in steps of 1/10,000.
    names = {name for name, amount in (*one.items(), *other.items()) if amount > 0}
    return all(abs(one.get(name, 0.0) - other.get(name, 0.0)) < 1e-3 for name in names)
