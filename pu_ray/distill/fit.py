"""Stage `distill`: the student learns from the teacher on the mined images (paper, section 3.2).

This file brings `distill/loop.py` to the cluster (ray_train.py), or with `train_locally` to this process alone. Writes
`student/`: model.safetensors (of the best step on held-out labeled images), history.json and TensorBoard's events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pu_ray import engine, images, lake, manifest, models, ray_train, tracking
from pu_ray.config import JobConfig
from pu_ray.distill import answers, data, loop
from pu_ray.distill.store import Images, InMemory, open_store
from pu_ray.errors import ClusterError, DataError
from pu_ray.lake import LabeledImages
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


def batches_of(
    config: JobConfig, storage: Storage, labeled: LabeledImages, classes: int, worker: Worker
) -> data.Batches:
    """One worker's share of the mined and of the labeled images that teach."""
    settings, preprocessing = config.distill, config.teacher.preprocessing
    limits = images.Limits.of(config.lake)
    stream, count = data.mined_images(storage.child("mined"), worker.rank, worker.world)
    pixels = open_store(settings.images, stream, count, preprocessing, limits)
    taught = data.taught_images(labeled, storage.child("scorer"))
    rows = range(worker.rank, len(taught), worker.world)
    mine = taught.rows(rows)
    sources: list[tuple[Images, Any, Any]] = [
        (pixels, answers.mined_labels(storage, worker.rank, worker.world), None),
        (
            InMemory(mine.pixels(preprocessing, config.labeled.uri)),
            answers.labeled_labels(storage, rows),
            mine.labels,
        ),
    ]
    cached = settings.soft_labels == "cached"
    mined_source, labeled_source = (
        data.Source(pixels, answers.SoftLabels(stored, classes) if cached else None, labels)
        for pixels, stored, labels in sources
    )
    return data.Batches(
        mined_source,
        labeled_source,
        max(2, settings.batch_size // worker.world),
        settings.labeled_share,
        settings.augment,
        config.seed,
        worker.rank,
    )


def _train(config: JobConfig, storage: Storage, worker: Worker) -> None:
    """Load everything a worker needs and train; rank 0 leaves the student in the artifact's folder."""
    torch.manual_seed(config.seed)
    settings = config.distill
    if settings.soft_labels == "cached":
        teacher, classes = None, models.read_classes(config.teacher.classes)
    else:
        teacher, classes = teacher_on(config, worker.device)
    labeled = lake.read_labeled(config.labeled.uri, classes)
    judge = data.labeled_by_role(labeled, storage.child("scorer"), "validate")
    preprocessing = config.student_preprocessing
    student = models.build(config.student, len(classes), preprocessing.channels)
    target = storage.child(FOLDER)

    def report(state: loop.State, content: ray_train.Content) -> None:
        if worker.rank == 0 and state.history:
            target.write_bytes(tracking.EVENTS_FILE, tracking.tensorboard_events(state.history))
        figures = {"step": float(state.step), "validation_accuracy": state.best_accuracy}
        worker.report(figures, content)

    state = loop.train(
        student,
        teacher,
        batches_of(config, storage, labeled, len(classes), worker),
        (judge.pixels(preprocessing, config.labeled.uri), judge.labels),
        settings,
        preprocessing=preprocessing,
        classes=len(classes),
        seed=config.seed,
        device=worker.device,
        precision=worker.precision,
        checkpoint=worker.checkpoint,
        report=report,
        count_images=worker.count_images,
        leaving=worker.leaving,
    )
    if worker.rank == 0:
        student.load_state_dict(state.best_weights)
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
        ConfigError: MLflow is asked for and not installed.
        DataError: An upstream artifact is missing, or the labeled images have changed.
        ClusterError: Training failed.
    """
    publication = Publication("distill", identity, inputs, config.seed)
    tracking.check(config.tracking)
    mined = manifest.require(storage.child("mined"), "select")
    fitted = manifest.require(storage.child("scorer"), "fit")
    labeled = fitted.counts["labeled_train"] + fitted.counts["labeled_calibrate"]
    count = mined.counts["rows"] + labeled
    if config.distill.batch_size > count * 50:
        raise DataError(
            "too few images for such batches",
            slug="too-few-images-for-batch",
            where="distill.batch_size",
            allowed=f"at most {count * 50}",
            got=str(config.distill.batch_size),
            hint="lower distill.batch_size, or choose more images",
        )
    steps = loop.total_steps(config.distill, count)
    progress.start(steps * config.distill.batch_size, "images")
    target = storage.child(FOLDER)
    workers = ray_train.run(
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
    student = models.build(config.student, len(classes), config.student_preprocessing.channels)
    target.delete(ray_train.FOLDER)
    facts: dict[str, Any] = {
        "best_step": history["best_step"],
        "validation_accuracy": history["best_accuracy"],
        "architecture": config.student.architecture,
    }
    if config.tracking.mlflow_uri is not None:
        facts["mlflow_run"] = _track(config, history["validations"], identity, progress)
    return publication.publish(
        target,
        counts={
            "steps": history["steps"],
            "images_seen": history["steps"] * config.distill.batch_size,
            "images": count,
            "parameters": models.parameter_count(student),
        },
        facts=facts,
        workers=workers,
    )


def _track(config: JobConfig, curve: Sequence[Mapping[str, float]], identity: str, progress: Progress) -> str | None:
    """MLflow's id of the run; a server that is away takes no student along."""
    flat: dict[str, Any] = {"seed": config.seed, "recipe": config.recipe}
    for section in ("student", "distill", "selection"):
        flat |= {f"{section}.{key}": value for key, value in config.section(section).items()}
    try:
        return tracking.log_to_mlflow(config.tracking, config.name, flat, curve, {"pu_ray.identity": identity})
    except ClusterError as error:
        progress.note(str(error))
        return None
