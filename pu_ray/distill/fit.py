"""Stage `distill`: the student learns from the teacher on the mined images (paper, section 3.2).

This file brings `distill/loop.py` to a cluster: Ray Train places the workers, keeps the checkpoints in the run's
storage and restarts what was lost. `train_locally` runs the same loop in this process, without Ray. Writes `student/`:
model.safetensors (of the best step on held-out labeled images) and history.json.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pu_ray import lake, manifest, models
from pu_ray.config import JobConfig
from pu_ray.distill import data, loop
from pu_ray.errors import ClusterError, DataError, PuRayError
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage, storage_for_ray

FOLDER = "student"
_CHECKPOINT_FILE = "checkpoint.pt"
_TRAIN_FOLDER = "_train"  # Ray Train's own; hidden from listings
_POLL_S = 0.5
# A short spin between operators: passive waiting alone costs a third of the throughput of two threads, and endless
# spinning stalls a busy machine (docs/LOG.md).
_WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "100000"}


def _run_loop(
    config: JobConfig,
    storage: Storage,
    *,
    rank: int,
    world: int,
    device: torch.device,
    checkpoint: bytes | None,
    report: loop.Report,
    count_images: Callable[[int], None],
) -> loop.State:
    """Load everything a worker needs and train; rank 0 leaves the student in the artifact's folder."""
    torch.manual_seed(config.seed)
    teacher, classes = models.load_teacher(config.teacher)
    labeled = lake.read_labeled(config.labeled.uri, classes)
    mined, taught, validation = data.student_data(config, storage, labeled, rank, world)
    settings = config.distill
    batches = data.Batches(
        mined.pixels,
        taught.pixels,
        max(2, settings.batch_size // world),
        settings.labeled_share,
        settings.augment,
        config.seed,
        rank,
    )
    student = models.build(config.student, len(classes), config.teacher.preprocessing.channels)
    state = loop.train(
        student,
        models.Normalised(teacher, config.teacher.preprocessing),
        batches,
        validation,
        settings,
        classes=len(classes),
        seed=config.seed,
        device=device,
        checkpoint=checkpoint,
        report=report,
        count_images=count_images,
    )
    if rank == 0:
        student.load_state_dict(state.best_weights)
        target = storage.child(FOLDER)
        target.write_bytes("model.safetensors", models.save_weights(student))
        history = {"validations": state.history, "best_step": state.best_step, "best_accuracy": state.best_accuracy}
        target.write_json("history.json", history | {"steps": state.step})
    return state


def train_locally(config: JobConfig, storage: Storage, progress: Progress) -> loop.State:
    """The same training in this process, on one device, without Ray and without checkpoints."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _run_loop(
        config,
        storage,
        rank=0,
        world=1,
        device=device,
        checkpoint=None,
        report=lambda _state, _bytes: None,
        count_images=progress.advance,
    )


# -- on Ray ------------------------------------------------------------------------------------------------


class _Counter:
    """Counts images for the driver to show."""

    def __init__(self) -> None:
        self._images = 0

    def add(self, images: int) -> None:
        self._images += images

    def images(self) -> int:
        return self._images


def _worker(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    import ray.train
    import ray.train.torch

    config, counter = arguments["config"], arguments["counter"]
    context = ray.train.get_context()
    torch.set_num_threads(max(1, int(config.resources.train.cpus)))

    def report(state: loop.State, checkpoint: Callable[[], bytes]) -> None:
        metrics = {"step": state.step, "validation_accuracy": state.history[-1]["validation_accuracy"]}
        if context.get_world_rank() != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / _CHECKPOINT_FILE).write_bytes(checkpoint())
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    saved: bytes | None = None
    if (latest := ray.train.get_checkpoint()) is not None:
        with latest.as_directory() as folder:
            saved = (Path(folder) / _CHECKPOINT_FILE).read_bytes()
    _run_loop(
        config,
        arguments["storage"],
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=ray.train.torch.get_device(),
        checkpoint=saved,
        report=report,
        count_images=lambda images: counter.add.remote(images) if context.get_world_rank() == 0 else None,
    )


def train_on_ray(config: JobConfig, storage: Storage, identity: str, progress: Progress) -> None:
    """Train with Ray Train; an interrupted run with the same identity goes on from its last checkpoint.

    Raises:
        DataError: Raised by a worker.
        ClusterError: Training failed more often than `distill.max_failures` allows.
    """
    import ray
    import ray.train
    import ray.train.torch

    counter = ray.remote(num_cpus=0)(_Counter).remote()
    filesystem, root = storage_for_ray(storage.child(FOLDER).child(_TRAIN_FOLDER))
    if storage.is_local:
        Path(root).mkdir(parents=True, exist_ok=True)
    resources = config.resources.train
    demand: dict[str, float] = {"CPU": resources.cpus}
    if resources.gpus:
        demand["GPU"] = resources.gpus
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"config": config, "storage": storage, "counter": counter},
        scaling_config=ray.train.ScalingConfig(
            # Ray Train V2 takes (fewest, most); the annotation is still the older one's.
            num_workers=config.distill.workers,  # type: ignore[arg-type]
            use_gpu=resources.gpus > 0,
            resources_per_worker=demand,
        ),
        run_config=ray.train.RunConfig(
            # The name is the identity: Ray Train goes on from the checkpoints of a run of the same name.
            name=identity[:32],
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.distill.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": dict(_WORKER_ENVIRONMENT)},  # type: ignore[call-arg]  # V2 has it
        ),
    )
    with _watching(counter, progress):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _reason(error) from error


class _watching:
    """Forwards the counter to the progress bar while the trainer blocks the driver."""

    def __init__(self, counter: Any, progress: Progress) -> None:
        self._counter = counter
        self._progress = progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        import ray

        shown = 0
        while not self._stop.wait(_POLL_S):
            images = ray.get(self._counter.images.remote())
            self._progress.advance(images - shown)
            shown = images


def _reason(error: BaseException) -> PuRayError:
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, PuRayError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    text = "; ".join(f"worker {rank}: {failure}" for rank, failure in failures.items()) or str(error)
    return ClusterError(
        "distillation failed", got=text[:2000], hint="run the same command again: it goes on from the last checkpoint"
    )


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
    train_on_ray(config, storage, identity, progress)
    target = storage.child(FOLDER)
    history = target.read_json("history.json")
    classes = fitted.facts["classes"]
    student = models.build(config.student, len(classes), config.teacher.preprocessing.channels)
    target.delete(_TRAIN_FOLDER)
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
