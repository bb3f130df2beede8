"""Stage `distill`: the student learns from the teacher on the mined images (paper, section 3.2).

This file brings `distill/loop.py` to the cluster (ray_train.py), or with `train_locally` to this process alone. Writes
`student/`: model.safetensors (of the best step on held-out labeled images) and history.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from pu_ray import engine, lake, manifest, models, ray_train
from pu_ray.config import JobConfig
from pu_ray.distill import data, loop
from pu_ray.errors import DataError
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.ray_train import Worker
from pu_ray.storage import Storage

FOLDER = "student"


def teacher_on(config: JobConfig, device: torch.device) -> tuple[loop.Teacher, list[str]]:
    """The frozen teacher, fast on this device, and its class names: on CPUs ONNX Runtime halves its share of a step."""
    teacher, classes = models.load_teacher(config.teacher)
    module = models.Normalised(teacher, config.teacher.preprocessing).eval()
    if device.type != "cpu":
        return module.to(device), classes
    example = models.example_pixels(config.teacher.preprocessing)
    graph = engine.to_onnx(module, example, input_name="pixels", output_names=["features", "logits"])
    network = engine.OnnxEngine(graph, torch.get_num_threads())

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network.run(pixels.numpy())
        return torch.from_numpy(features), torch.from_numpy(logits)

    return run, classes


def _train(config: JobConfig, storage: Storage, worker: Worker) -> None:
    """Load everything a worker needs and train; rank 0 leaves the student in the artifact's folder."""
    torch.manual_seed(config.seed)
    teacher, classes = teacher_on(config, worker.device)
    labeled = lake.read_labeled(config.labeled.uri, classes)
    mined, taught, validation = data.student_data(config, storage, labeled, worker.rank, worker.world)
    settings = config.distill
    batches = data.Batches(
        mined.pixels,
        taught.pixels,
        max(2, settings.batch_size // worker.world),
        settings.labeled_share,
        settings.augment,
        config.seed,
        worker.rank,
    )
    student = models.build(config.student, len(classes), config.teacher.preprocessing.channels)
    state = loop.train(
        student,
        teacher,
        batches,
        validation,
        settings,
        preprocessing=config.teacher.preprocessing,
        classes=len(classes),
        seed=config.seed,
        device=worker.device,
        precision=worker.precision,
        checkpoint=worker.checkpoint,
        report=lambda state, content: worker.report(
            {"step": state.step, "validation_accuracy": state.history[-1]["validation_accuracy"]}, content
        ),
        count_images=worker.count_images,
    )
    if worker.rank == 0:
        student.load_state_dict(state.best_weights)
        target = storage.child(FOLDER)
        target.write_bytes("model.safetensors", models.save_weights(student))
        history = {"validations": state.history, "best_step": state.best_step, "best_accuracy": state.best_accuracy}
        target.write_json("history.json", history | {"steps": state.step})


def train_locally(config: JobConfig, storage: Storage, progress: Progress) -> None:
    """The same training in this process, on one device, without Ray and without checkpoints."""
    _train(config, storage, ray_train.alone(progress, config.resources.train.precision))


# -- the stage ---------------------------------------------------------------------------------------------


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Distil, and publish the student.

    Raises:
        DataError: An upstream artifact is missing, or the labeled images have changed.
        ClusterError: Training failed.
    """
    publication = Publication("distill", identity, inputs, config.seed)
    mined = manifest.require(storage.child("mined"), "select")
    fitted = manifest.require(storage.child("scorer"), "fit")
    labeled = fitted.counts["labeled_train"] + fitted.counts["labeled_calibrate"]
    images = mined.counts["rows"] + labeled
    if config.distill.batch_size > images * 50:
        raise DataError(
            "too few images for such batches",
            where="distill.batch_size",
            allowed=f"at most {images * 50}",
            got=str(config.distill.batch_size),
        )
    steps = loop.total_steps(config.distill, images)
    progress.start(steps * config.distill.batch_size, "images")
    target = storage.child(FOLDER)
    ray_train.run(
        partial(_train, config, storage),
        identity=identity,
        target=target,
        workers=config.distill.workers,
        resources=config.resources.train,
        max_failures=config.distill.max_failures,
        progress=progress,
    )
    history = target.read_json("history.json")
    classes = fitted.facts["classes"]
    student = models.build(config.student, len(classes), config.teacher.preprocessing.channels)
    target.delete(ray_train.FOLDER)
    return publication.publish(
        target,
        counts={
            "steps": history["steps"],
            "images_seen": history["steps"] * config.distill.batch_size,
            "images": images,
            "parameters": models.parameter_count(student),
        },
        facts={
            "best_step": history["best_step"],
            "validation_accuracy": history["best_accuracy"],
            "architecture": config.student.architecture,
        },
    )
