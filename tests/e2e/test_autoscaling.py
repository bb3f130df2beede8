"""GPU nodes come for the mining and go when it is done: Ray's own autoscaler, with nodes that are processes.

The GPUs are numbers that Ray schedules by, so that two cores can hold three of them; the networks run on ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, write_job
from tests.head import Head, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GPU_NODES = {
    "gpu-spot": {
        "resources": {"CPU": 1, "GPU": 1, "memory": 4 * 2**30},
        "min_workers": 0,
        "max_workers": 3,
        "labels": {"pu-ray-role": "gpu"},
    }
}


def gpus(head: Head) -> float:
    """Logical GPUs of the nodes that are up."""
    nodes = [node["raylet"] for node in head.get("/nodes?view=summary")["data"]["summary"]]
    return sum(node["resourcesTotal"].get("GPU", 0.0) for node in nodes if node.get("state") == "ALIVE")


def job(task: Path, folder: Path, gpus: float) -> Path:
    (folder / "home").mkdir()
    return write_job(
        task,
        folder,
        # Large pictures, so that a node is worth its start.
        teacher={"preprocessing": {"size_px": 160, "channels": 1, "mean": [0.13], "std": [0.31]}},
        lake={"chunk_rows": 20},
        features={"engine": "onnx"},
        resources={
            "embed": {"gpus": gpus, "cpus": 1, "min_actors": 1, "max_actors": 3},
            "train": {"gpus": 0, "cpus": 1},
        },
    )


def test_a_job_that_no_kind_of_node_could_hold_is_refused_instead_of_waiting_for_ever(
    task: Path, tmp_path: Path
) -> None:
    wanting = job(task, tmp_path, gpus=2)
    with started(tmp_path / "home", cpus=4, node_types=GPU_NODES) as head:
        status, said = head.run("features", wanting)
        assert status == "FAILED"
        assert "no kind of node" in said
        assert "one of the embedding actors needs 1 CPU, 2 GPU" in said
        assert gpus(head) == 0


def test_nodes_come_for_the_mining_and_go_when_it_is_done(task: Path, tmp_path: Path) -> None:
    growing = job(task, tmp_path, gpus=1)
    seen: list[tuple[float, float]] = []
    done = threading.Event()
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(started(tmp_path / "home", cpus=4, node_types=GPU_NODES))

        def watch() -> None:
            while not done.wait(0.5):
                seen.append((time.time(), gpus(head)))

        assert gpus(head) == 0
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        stack.callback(watcher.join)
        stack.callback(done.set)
        status, said = head.run("features", growing)
        assert status == "SUCCEEDED", said
        deadline = time.monotonic() + 60
        while gpus(head) > 0:
            assert time.monotonic() < deadline, "nodes stayed though nobody needed them"
            time.sleep(0.5)
    made = json.loads((tmp_path / "run/features/manifest.json").read_text())["counts"]
    assert (made["rows"], made["errors"]) == (SMALL.lake_rows, SMALL.broken)
    assert 2 <= max(count for _, count in seen) <= 3
