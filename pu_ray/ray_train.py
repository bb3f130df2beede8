"""Ray Train around a loop that does not know it: places workers, keeps checkpoints, shows progress, explains failure.

A run is named by the identity of what it makes. Started again with the same identity it goes on from its last
checkpoint, whoever was killed: a worker, a node or the driver.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pu_ray.config import Precision, TrainResources
from pu_ray.errors import ClusterError, PuRayError
from pu_ray.progress import Progress
from pu_ray.storage import Storage, storage_for_ray
from pu_ray.usage import Meter, Workers, larger, take_gpu_peak_bytes, take_peak_bytes

FOLDER = "_train"  # Ray Train's own, below the artifact's folder; hidden from listings
_CHECKPOINT_FILE = "checkpoint.pt"
_POLL_S = 0.5
_LAST_WORD_S = 5.0
# A short spin between operators: passive waiting alone costs a third of the throughput of two threads, and endless
# spinning stalls a busy machine (docs/LOG.md).
_WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "100000"}


# Makes the bytes of a checkpoint.
Content = Callable[[], bytes]


@dataclass(frozen=True)
class Worker:
    """What a loop needs to know of its surroundings.

    Attributes:
        rank: Which worker this is, from 0.
        world: How many there are.
        device: Where to compute.
        precision: Of the matrix products.
        checkpoint: Bytes of the last checkpoint, to go on from.
        report: Called by every worker equally often, with figures and, lazily, the bytes of a checkpoint.
        count_images: Called with the number of images that all workers together have just seen.
        leaving: Whether a worker's machine has been given notice; asked by every worker equally often.
    """

    rank: int
    world: int
    device: torch.device
    precision: Precision
    checkpoint: bytes | None
    report: Callable[[dict[str, float], Content], None]
    count_images: Callable[[int], None]
    leaving: Callable[[], bool]


def alone(progress: Progress, precision: Precision = "auto") -> Worker:
    """A single worker in this process, without Ray and without checkpoints."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Worker(0, 1, device, precision, None, lambda _figures, _checkpoint: None, progress.advance, lambda: False)


@dataclass(frozen=True)
class _Told:
    """What the workers have said so far.

    Attributes:
        images: Seen by all of them together.
        world: How many there are; 0: none yet.
        peak_bytes: Most resident memory of one of them.
        gpu_peak_bytes: Most GPU memory of one of them.
    """

    images: int = 0
    world: int = 0
    peak_bytes: int | None = None
    gpu_peak_bytes: int | None = None


class _Counter:
    """Keeps what the workers say, for the driver to show."""

    def __init__(self) -> None:
        self._told = _Told()

    def begin(self, world: int) -> None:
        self._told = replace(self._told, world=world)

    def add(self, images: int) -> None:
        self._told = replace(self._told, images=self._told.images + images)

    def peaks(self, peak_bytes: int | None, gpu_peak_bytes: int | None) -> None:
        told = self._told
        self._told = replace(
            told,
            peak_bytes=larger(told.peak_bytes, peak_bytes),
            gpu_peak_bytes=larger(told.gpu_peak_bytes, gpu_peak_bytes),
        )

    def told(self) -> _Told:
        return self._told


def _report(figures: dict[str, float], checkpoint: Content) -> None:
    import ray.train

    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(figures)
        return
    folder = tempfile.mkdtemp(prefix="pu-ray-checkpoint-")
    (Path(folder) / _CHECKPOINT_FILE).write_bytes(checkpoint())
    # Training goes on while it travels to the run's storage, and the folder is gone when it has arrived.
    ray.train.report(
        figures,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _work(arguments: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    take_peak_bytes()  # of what this process did for others
    torch.set_num_threads(arguments["threads"])
    saved: bytes | None = None
    if (latest := ray.train.get_checkpoint()) is not None:
        with latest.as_directory() as folder:
            saved = (Path(folder) / _CHECKPOINT_FILE).read_bytes()
    counter = arguments["counter"]
    first = context.get_world_rank() == 0
    if first:
        counter.begin.remote(context.get_world_size())

    def report(figures: dict[str, float], checkpoint: Content) -> None:
        _report(figures, checkpoint)
        counter.peaks.remote(take_peak_bytes(), take_gpu_peak_bytes())

    arguments["loop"](
        Worker(
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            device=ray.train.torch.get_device(),
            precision=arguments["precision"],
            checkpoint=saved,
            report=report,
            count_images=lambda images: counter.add.remote(images) if first else None,
            leaving=lambda: ray.train.get_preemption_info() is not None,
        )
    )
    # Without waiting it would go with the process; waited for, but never failing a training that is done.
    ray.wait([counter.peaks.remote(take_peak_bytes(), take_gpu_peak_bytes())], timeout=_LAST_WORD_S)


def run(
    loop: Callable[[Worker], None],
    *,
    identity: str,
    target: Storage,
    workers: int | tuple[int, int],
    resources: TrainResources,
    max_failures: int,
    progress: Progress,
) -> Workers:
    """Train, and forget the checkpoints.

    Args:
        loop: Picklable; leaves its result in the artifact's folder.
        identity: Of what it makes.
        target: The artifact's folder.
        workers: How many, or the fewest and the most.
        resources: Of one worker.
        max_failures: Losses of workers that a restart may mend.
        progress: Advanced by images.

    Returns:
        What the workers took.

    Raises:
        DataError: Raised by a worker.
        ClusterError: Training failed more often than `max_failures` allows.
    """
    import ray
    import ray.train
    import ray.train.torch

    counter = ray.remote(num_cpus=0)(_Counter).remote()
    filesystem, root = storage_for_ray(target.child(FOLDER))
    if target.is_local:
        Path(root).mkdir(parents=True, exist_ok=True)
    demand: dict[str, float] = {"CPU": resources.cpus}
    if resources.gpus:
        demand["GPU"] = resources.gpus
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={
            "loop": loop,
            "counter": counter,
            "threads": max(1, int(resources.cpus)),
            "precision": resources.precision,
        },
        scaling_config=ray.train.ScalingConfig(
            # Ray Train V2 takes (fewest, most); the annotation is still the older one's.
            num_workers=workers,  # type: ignore[arg-type]
            use_gpu=resources.gpus > 0,
            resources_per_worker=demand,
        ),
        run_config=ray.train.RunConfig(
            # The name is the identity: Ray Train goes on from the checkpoints of a run of the same name.
            name=identity[:32],
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": dict(_WORKER_ENVIRONMENT)},  # type: ignore[call-arg]  # V2 has it
        ),
    )
    # Ray Train's own handler of Ctrl-C leaves with status 1 and without a word, and would stay after the training.
    # Without it Ctrl-C ends the driver as in every other stage, and what is left is what a killed driver leaves.
    trainer._register_sigint_handler = lambda _controller: None  # type: ignore[attr-defined]
    watching = _watching(counter, progress, resources)
    with watching:
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _reason(error) from error
    return watching.seen()


class _watching:
    """Forwards what the workers say to the progress while the trainer blocks the driver."""

    def __init__(self, counter: Any, progress: Progress, resources: TrainResources) -> None:
        self._counter = counter
        self._progress = progress
        self._resources = resources
        self._meter = Meter()
        self._told = _Told()
        self._most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def seen(self) -> Workers:
        """What the workers took; a group that was lost counts until the next one has begun."""
        cpu_hours, gpu_hours = self._meter.hours()
        return Workers(
            unit="workers",
            most=self._most or None,
            peak_bytes=self._told.peak_bytes,
            gpu_peak_bytes=self._told.gpu_peak_bytes,
            cpu_hours=round(cpu_hours, 6) if self._most else None,
            gpu_hours=round(gpu_hours, 6) if self._most else None,
        )

    def _poll(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(_POLL_S)  # once more after the end, for the workers' last words
            self._ask()
        self._meter.hold(0, 0)

    def _ask(self) -> None:
        import ray

        try:
            told: _Told = ray.get(self._counter.told.remote(), timeout=_LAST_WORD_S)
        except ray.exceptions.RayError:
            return  # figures for people: it is the trainer that says what a lost node means
        if told.world != self._told.world:
            self._progress.workers(told.world, "workers")
            self._most = max(self._most, told.world)
            self._meter.hold(told.world * self._resources.cpus, told.world * self._resources.gpus)
        self._progress.advance(told.images - self._told.images)
        self._told = told


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
        "training failed",
        slug="training-failed",
        got=text[:2000],
        hint="run the same command again: it goes on from the last checkpoint",
    )
