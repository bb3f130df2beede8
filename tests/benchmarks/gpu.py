"""What one GPU does: images/s of the lake pass's network, of the distillation and of a served student.

`make bench NAME=gpu` on a machine with a GPU; needs no Ray. Random weights and pictures: a network works as hard for
them as for anything. A figure is the median of the turns.

- the teacher over the lake (embedding): uint8 pixels from pageable memory in, pooled features and logits out, in
  float32, bfloat16 and bfloat16 compiled;
- distillation at 224 px: teacher in the loop, stored soft labels, each with and without torch.compile;
- a served student: batches of 1, 8 and 32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

SIDE, CLASSES = 224, 1000
TEACHER, STUDENT = "resnet34", "resnet18"
EMBEDDERS = ("resnet34", "resnet50")
SERVED = "mobilenet_v3_small"
EMBED_BATCH, TRAIN_BATCH = 256, 256
_WARM_UP = 8


def preprocessing() -> Any:
    """ImageNet's."""
    from pu_ray.config import PreprocessingConfig

    return PreprocessingConfig(size_px=SIDE)


def network(name: str) -> Any:
    """With random weights."""
    import torch

    from pu_ray import models
    from pu_ray.config import NetworkConfig

    torch.manual_seed(0)
    return models.build(NetworkConfig(architecture=name), CLASSES, 3)


def pictures(count: int) -> Any:
    """Noise uint8 [N, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def _per_second(run: Callable[[], Any], images: int, seconds: float) -> float:
    for _ in range(3):
        run()
    runs, started = 0, time.perf_counter()
    while (taken := time.perf_counter() - started) < seconds:
        run()
        runs += 1
    return runs * images / taken


def embedding(name: str, turns: int) -> Iterator[tuple[str, float]]:
    """Images/s of the teacher with its pooled stages, for each way of computing."""
    from pu_ray import engine, models

    module = models.Normalised(models.Teacher(network(name)), preprocessing())
    batch = pictures(EMBED_BATCH)
    ways = {"float32": {"half": False}, "bfloat16": {}, "bfloat16, compiled": {"compiled": True}}
    for way, options in ways.items():
        opened = engine.TorchEngine(module, "cuda", **options)

        def stream(opened: Any = opened) -> None:
            # As the lake pass does it: the next batch is copied while this one is computed.
            waiting = opened.submit(batch)
            for _ in range(3):
                following = opened.submit(batch)
                opened.collect(waiting)
                waiting = following
            opened.collect(waiting)

        yield way, statistics.median(_per_second(stream, 4 * EMBED_BATCH, 1.0) for _ in range(turns))


def distillation(cached: bool, compiled: bool, steps: int) -> float:
    """Images/s of the loop, behind the first steps."""
    import torch

    from pu_ray import models
    from pu_ray.config import AugmentConfig, DistillConfig, OptimizerConfig
    from pu_ray.distill import answers, crops, data, loop
    from pu_ray.distill.store import InMemory

    augment = AugmentConfig(crop_padding_px=8)
    pixels = pictures(2048)
    stored = None
    if cached:
        drawn = crops.draw(len(pixels) * 2, (SIDE, SIDE), augment, np.random.default_rng(1))
        said = answers.compress(np.random.default_rng(2).normal(size=(len(drawn), CLASSES)))
        parts = [part.reshape(len(pixels), 2, *part.shape[1:]) for part in (drawn, *said)]
        stored = answers.SoftLabels(iter([parts]), CLASSES)
    teacher = None if cached else models.Normalised(models.Teacher(network(TEACHER)), preprocessing()).eval().cuda()
    times: list[float] = []

    def count(_images: int) -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    loop.train(
        network(STUDENT),
        teacher,
        data.Batches(
            data.Source(InMemory(pixels), stored),
            data.Source(InMemory(pixels[:0]), stored),
            TRAIN_BATCH,
            "auto",
            augment,
            0,
        ),
        (pixels[:1], np.zeros(1, np.int64)),
        DistillConfig(
            epochs=10**6,
            max_steps=steps + _WARM_UP,
            batch_size=TRAIN_BATCH,
            validations=1,
            compile=compiled,
            optimizer=OptimizerConfig(kind="sgd", lr=1e-3, schedule="constant"),
        ),
        preprocessing=preprocessing(),
        classes=CLASSES,
        seed=0,
        device=torch.device("cuda"),
        precision="auto",
        checkpoint=None,
        report=lambda _state, _content: None,
        count_images=count,
    )
    return (len(times) - 1 - _WARM_UP) * TRAIN_BATCH / (times[-1] - times[_WARM_UP])


def served(turns: int) -> Iterator[tuple[str, float]]:
    """Milliseconds of a batch in the engine `torch` of a replica, for each size."""
    from pu_ray import engine

    opened = engine.TorchEngine(network(SERVED), "cuda", compiled=True)
    for size in (1, 8, 32):
        batch = np.random.default_rng(0).standard_normal((size, 3, SIDE, SIDE)).astype(np.float32)
        speed = statistics.median(_per_second(partial(opened.run, batch), size, 0.5) for _ in range(turns))
        yield str(size), 1000 * size / speed


def measure(turns: int, steps: int) -> Iterator[str]:
    """Lines of the report, as they are found."""
    yield "| teacher over the lake | float32 | bfloat16 | bfloat16, compiled |"
    yield "|---|---|---|---|"
    for name in EMBEDDERS:
        yield f"| {name}, images/s | {' | '.join(f'{speed:,.0f}' for _, speed in embedding(name, turns))} |"
    yield ""
    yield f"| {TEACHER} teaches {STUDENT}, images/s | eager | compiled |"
    yield "|---|---|---|"
    for says, cached in (("teacher in the loop", False), ("stored soft labels", True)):
        speeds = [distillation(cached, compiled, steps) for compiled in (False, True)]
        yield f"| {says} | {' | '.join(f'{speed:,.0f}' for speed in speeds)} |"
    yield ""
    yield f"| {SERVED}, a batch of | 1 | 8 | 32 |"
    yield "|---|---|---|---|"
    yield f"| ms | {' | '.join(f'{taken:.2f}' for _, taken in served(turns))} |"


def main() -> None:
    """Measure and print."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="clocked steps of a distillation")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}.\n")
    for line in measure(arguments.turns, arguments.steps):
        print(line, flush=True)


if __name__ == "__main__":
    main()
