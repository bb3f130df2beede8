"""A lake pass on three Ray nodes one of which is lost; a program of its own, since its cluster must not be the tests'.

    python lost_mining_node.py kill|notice JOB.yaml RESULT.json

`kill`: a node is gone from one moment to the next. `notice`: it is announced to go, as spot machines are, and goes.
RESULT.json gets how many files were written and how many nodes were at work when it went.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

NOTICE_S = 2
PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION


def disturb(mode: str, files: Path, cluster: Any, lost: dict[str, Any]) -> None:
    """Wait until the pass is under way, then take away a node that works on it."""
    import ray
    from ray.util.state import list_actors

    def written() -> int:
        return len(list(files.glob("*.parquet")))

    while written() < 5:
        time.sleep(0.05)
    alive = list_actors(filters=[("state", "=", "ALIVE")])
    busy = {actor.node_id for actor in alive if "MapWorker" in actor.class_name}
    (node, *_) = [each for each in cluster.list_all_nodes() if each.node_id in busy]
    if mode == "notice":
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        deadline = int((time.time() + NOTICE_S) * 1000)
        GcsClient(address=cluster.address).drain_node(node.node_id, PREEMPTION, "spot", deadline)
        while time.time() * 1000 < deadline:
            time.sleep(0.1)
    lost.update(files=written(), busy=len(busy))
    cluster.remove_node(node, allow_graceful=False)
    assert ray.is_initialized(), "the pass ended before the node went"


def main(mode: str, job: str, result: str) -> None:
    """Embed the lake, disturbed."""
    import ray
    from ray.cluster_utils import Cluster

    from pu_ray import config
    from pu_ray.pipeline import Pipeline
    from pu_ray.progress import Narrator

    settings = config.load(Path(job), [], {}).job
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    for _ in range(3):
        cluster.add_node(num_cpus=2)
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": cluster.address}
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": variables})
    lost: dict[str, Any] = {}
    try:
        files = Path(settings.output) / "features" / "data"
        disturber = threading.Thread(target=disturb, args=(mode, files, cluster, lost), daemon=True)
        disturber.start()
        Pipeline(settings, Narrator(quiet=True), contextlib.nullcontext).run_verb("features")
        Path(result).write_text(json.dumps(lost | {"all_files": len(list(files.glob("*.parquet")))}))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
