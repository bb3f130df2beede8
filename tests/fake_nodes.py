"""Nodes that are processes on this machine, for Ray's autoscaler to start and end."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):
    """Ray's own, for kinds of nodes that say how much memory they have, as every real one does.

    Ray's takes `memory` for a custom resource and starts no such node. The raylet counts this machine's instead.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, Any], labels: Any
    ) -> None:
        counted = {name: amount for name, amount in resources.items() if name != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, counted, labels)
