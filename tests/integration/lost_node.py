"""A training on two Ray nodes one of which is lost; a program of its own, since its cluster must not be the tests'.

    python lost_node.py none|kill|notice|elastic FOLDER

`none`: nothing happens. `kill`: a node is gone from one moment to the next, and another one is free. `notice`: it is
announced to go, as spot machines are, and no checkpoint was due. `elastic`: it is gone, and no other one is there.
Writes FOLDER/result.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

STEPS, INTERVAL, BATCH, CLASSES = 400, 100, 16, 3
STEP_S = 0.03  # an interval takes seconds: a checkpoint needs one or two to reach the storage and the controller
NOTICE_S = 20
PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION


def pictures(count: int, seed: int) -> tuple[Any, Any]:
    """Noise with one channel brighter; and which."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count)
    pixels = generator.integers(0, 150, (count, 8, 8, 3))
    pixels[np.arange(count), :, :, labels] += 80
    return pixels.astype(np.uint8), labels


def work(folder: str, interval: int, worker: Any) -> None:
    """What every worker does: the product's loop on small pictures."""
    import torch

    from pu_ray import models
    from pu_ray.config import AugmentConfig, DistillConfig, OptimizerConfig, PreprocessingConfig
    from pu_ray.distill import data, loop
    from pu_ray.distill.store import InMemory

    preprocessing = PreprocessingConfig(size_px=8)

    def teacher(pixels: Any) -> tuple[Any, Any]:
        means = pixels.float().mean(dim=(1, 2)) / 8
        return means, means

    def count(images: int) -> None:
        time.sleep(STEP_S)  # long enough to be interrupted
        worker.count_images(images)

    mined = pictures(96, 1)[0][worker.rank :: worker.world]
    sources = (data.Source(InMemory(mined)), data.Source(InMemory(mined[:0])))
    batches = data.Batches(*sources, BATCH // worker.world, "auto", AugmentConfig(crop_padding_px=1), 0, worker.rank)
    settings = DistillConfig(
        epochs=1000,
        max_steps=STEPS,
        batch_size=BATCH,
        validations=1,
        checkpoint_steps=interval,
        optimizer=OptimizerConfig(kind="sgd", lr=0.05, weight_decay=5e-4, schedule="one_cycle"),
    )
    torch.manual_seed(0)
    student = models.CifarResNet(depth=8, width=16, classes=CLASSES)
    first = 0
    if worker.checkpoint is not None:
        import io

        first = torch.load(io.BytesIO(worker.checkpoint), weights_only=True)["step"]
    if worker.rank == worker.world - 1:
        import ray

        Path(folder, "node").write_text(ray.get_runtime_context().get_node_id())
    if worker.rank == 0:
        with Path(folder, "attempts.jsonl").open("a") as attempts:
            attempts.write(json.dumps({"first": first, "world": worker.world, "at": time.time()}) + "\n")

    def report(state: Any, content: Any) -> None:
        if worker.rank == 0:
            with Path(folder, "saved.jsonl").open("a") as saved:
                saved.write(json.dumps({"step": state.step, "at": time.time()}) + "\n")
        worker.report({"step": float(state.step)}, content)

    state = loop.train(
        student,
        teacher,
        batches,
        pictures(300, 3),
        settings,
        preprocessing=preprocessing,
        classes=CLASSES,
        seed=0,
        device=torch.device("cpu"),
        precision="float32",
        checkpoint=worker.checkpoint,
        report=report,
        count_images=count,
        leaving=worker.leaving,
    )
    if worker.rank == 0:
        learned = torch.cat([value.double().flatten() for value in student.state_dict().values()])
        result = {
            "steps": state.step,
            "accuracy": state.history[-1]["validation_accuracy"],
            "world": worker.world,
            "weights": hashlib.sha256(learned.numpy().tobytes()).hexdigest(),
        }
        Path(folder, "trained.json").write_text(json.dumps(result))


def lines(file: Path) -> list[dict[str, Any]]:
    """Records of a file that may not be there yet."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def disturb(mode: str, folder: Path, cluster: Any) -> None:
    """Wait until the training is under way, then take away the node of its last worker."""
    # The third checkpoint: the first may still be on its way to the storage.
    sign, count = ("attempts.jsonl", 1) if mode == "notice" else ("saved.jsonl", 3)
    while len(lines(folder / sign)) < count:
        time.sleep(0.05)
    last = (folder / "node").read_text()
    (node,) = [each for each in cluster.list_all_nodes() if each.node_id == last]
    if mode == "notice":
        from ray._raylet import GcsClient

        time.sleep(1)
        deadline = int((time.time() + NOTICE_S) * 1000)
        GcsClient(address=cluster.address).drain_node(node.node_id, PREEMPTION, "spot", deadline)
        while time.time() * 1000 < deadline:
            time.sleep(0.1)
    else:
        time.sleep(5 * STEP_S)  # in the middle of an interval
    (folder / "lost.json").write_text(json.dumps({"at": time.time()}))
    cluster.remove_node(node, allow_graceful=False)


def main(mode: str, folder: Path) -> None:
    """Train, disturbed."""
    import ray
    from ray.cluster_utils import Cluster

    from pu_ray import ray_train
    from pu_ray.config import TrainResources
    from pu_ray.progress import Silent
    from pu_ray.storage import Storage

    # The controller and the counter live on the head, which is not lost; the workers need a CPU each.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2 if mode == "elastic" else 3):
        cluster.add_node(num_cpus=1)
    # Ray Train's helpers look for a cluster by themselves, and there may be others on this machine.
    os.environ["RAY_ADDRESS"] = cluster.address
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_ADDRESS": cluster.address}
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": variables})
    try:
        if mode != "none":
            threading.Thread(target=disturb, args=(mode, folder, cluster), daemon=True).start()
        ray_train.run(
            partial(work, str(folder), 10**6 if mode == "notice" else INTERVAL),
            identity=f"{mode}-of-a-node",
            target=Storage(str(folder / "student")),
            workers=(1, 2) if mode == "elastic" else 2,
            resources=TrainResources(cpus=1, precision="float32"),
            max_failures=0 if mode == "notice" else 1,
            progress=Silent(),
        )
    finally:
        ray.shutdown()
        cluster.shutdown()
    (folder / "result.json").write_text(
        json.dumps(
            {
                "attempts": lines(folder / "attempts.jsonl"),
                "saved": lines(folder / "saved.jsonl"),
                "lost": [lost["at"] for lost in lines(folder / "lost.json")],
                **json.loads((folder / "trained.json").read_text()),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
