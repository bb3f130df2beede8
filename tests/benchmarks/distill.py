"""Speed and memory of the distillation and of what it exports: `make bench NAME=distill`.

Whatever is compared is measured in turns in one run, so that a busy moment of the machine meets all alike; a figure is
the median of the turns, a ratio the median of the ratios within each turn. One thread everywhere. Teacher, student and
pictures are those of fmnist-open in shape; nothing is learnt that matters.

- our loop, one worker, against a plain loop of PyTorch with the same networks, batches and precision;
- stored soft labels against the teacher in the loop, for a teacher of about twice the student's multiply-adds;
- two workers (gloo) against one, each on a thread of its own;
- the exported formats against eager torch, one image and a batch;
- memory of a worker whose share of the mined images grows tenfold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 128
SIDE, CLASSES = 28, 10
TEACHER, STUDENT = "cifar/resnet14-w16", "cifar/resnet8-w16"
ROLES = {"Teacher": TEACHER, "student": STUDENT}
_WARM_UP = 4  # steps that no clock sees
_FLAT = {"rows": 20_000, "grown": 200_000}


# -- networks and pictures ---------------------------------------------------------------------------------


def preprocessing() -> Any:
    """Of fmnist-open."""
    from pu_ray.config import PreprocessingConfig

    return PreprocessingConfig(size_px=SIDE, channels=1, mean=(0.286,), std=(0.353,))


def network(name: str, seed: int) -> Any:
    """With random weights."""
    import torch

    from pu_ray import models
    from pu_ray.config import NetworkConfig

    torch.manual_seed(seed)
    return models.build(NetworkConfig(architecture=name), CLASSES, 1)


def pictures(count: int) -> Any:
    """Noise uint8 [N, H, W, 1]: a network works as hard for it as for anything."""
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 1), dtype=np.uint8)


def teacher_in_loop() -> Callable[[Any], Any]:
    """As `pu_ray.distill.fit.teacher_on` opens it on a CPU."""
    import torch

    from pu_ray import engine, models

    teacher = models.Normalised(models.Teacher(network(TEACHER, 1)), preprocessing()).eval()
    example = models.example_pixels(preprocessing())
    graph = engine.to_onnx(teacher, example, input_name="pixels", output_names=["features", "logits"])
    opened = engine.OnnxEngine(graph, 1)

    def run(pixels: Any) -> Any:
        features, logits = opened.run(pixels.numpy())
        return torch.from_numpy(features), torch.from_numpy(logits)

    return run


class Stored:
    """Stored soft labels in the product's own record file."""

    def __init__(self, count: int, crops: int = 4) -> None:
        from pu_ray.config import AugmentConfig
        from pu_ray.distill import answers
        from pu_ray.distill import crops as cropping

        generator = np.random.default_rng(2)
        drawn = cropping.draw(count * crops, (SIDE, SIDE), AugmentConfig(crop_padding_px=2), generator)
        values, classes, rest = answers.compress(generator.normal(size=(count * crops, CLASSES)))
        shape = (count, crops)
        parts = [
            drawn.reshape(*shape, -1),
            values.reshape(*shape, -1),
            classes.reshape(*shape, -1),
            rest.reshape(shape),
        ]
        self.answers = answers.SoftLabels(iter([parts]), CLASSES)


# -- one turn ----------------------------------------------------------------------------------------------


class Clock:
    """Images per second between the end of the warm-up and the last step."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._images: list[int] = []

    def count(self, images: int) -> None:
        """A step is done."""
        self._times.append(time.perf_counter())
        self._images.append(images)

    @property
    def images_per_s(self) -> float:
        """Over all clocked steps."""
        return sum(self._images[_WARM_UP + 1 :]) / (self._times[-1] - self._times[_WARM_UP])


def ours(pixels: Any, teacher: Any, answers: Any, steps: int, rank: int = 0, world: int = 1) -> float:
    """Images per second of the product's loop, of all workers."""
    import torch

    from pu_ray.config import AugmentConfig, DistillConfig, OptimizerConfig
    from pu_ray.distill import data, loop
    from pu_ray.distill.store import InMemory

    clock = Clock()
    sources = (data.Source(InMemory(pixels), answers), data.Source(InMemory(pixels[:0]), answers))
    batches = data.Batches(*sources, BATCH // world, "auto", AugmentConfig(crop_padding_px=2), 0, rank)
    loop.train(
        network(STUDENT, 0),
        teacher,
        batches,
        (pixels[:1], np.zeros(1, np.int64)),
        DistillConfig(
            epochs=10**6,
            max_steps=steps + _WARM_UP + 1,
            batch_size=BATCH,
            validations=1,
            optimizer=OptimizerConfig(kind="sgd", lr=1e-3, schedule="constant"),
        ),
        preprocessing=preprocessing(),
        classes=CLASSES,
        seed=0,
        device=torch.device("cpu"),
        precision="auto",
        checkpoint=None,
        report=lambda _state, _content: None,
        count_images=clock.count,
    )
    return clock.images_per_s


def plain(pixels: Any, teacher: Any, steps: int) -> float:
    """Images per second of what one would write for a single process: a loop, KL divergence, SGD."""
    import torch
    from torch.nn import functional

    from pu_ray.precision import autocast

    student = network(STUDENT, 0).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.from_numpy(pixels)
    clock = Clock()
    for _ in range(steps + _WARM_UP + 1):
        batch = images[torch.randint(len(images), (BATCH,), generator=generator)]
        padded = functional.pad(batch.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
        corners = torch.randint(0, 5, (BATCH, 2), generator=generator).tolist()
        crops = [image[:, y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(padded, corners, strict=True)]
        batch = torch.stack([crop.flip(2) if k % 2 else crop for k, crop in enumerate(crops)]).permute(0, 2, 3, 1)
        batch = batch.contiguous()
        with torch.no_grad():
            target = torch.softmax(teacher(batch)[1] / 4, dim=1)
        inputs = ((batch.permute(0, 3, 1, 2).float() / 255 - 0.286) / 0.353).contiguous(
            memory_format=torch.channels_last
        )
        with autocast(torch.device("cpu"), "auto"):
            logits = student(inputs)
        loss = 16 * functional.kl_div(functional.log_softmax(logits.float() / 4, dim=1), target, reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        clock.count(BATCH)
    return clock.images_per_s


def _as_worker(rank: int, world: int, folder: str, steps: int) -> None:
    import torch

    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    speed = ours(pictures(4096)[rank::world], teacher_in_loop(), None, steps, rank, world)
    Path(folder, f"{rank}.json").write_text(json.dumps(speed))
    if world > 1:
        torch.distributed.destroy_process_group()


def workers(world: int, steps: int) -> float:
    """Images per second of so many processes together."""
    from torch import multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
            _as_worker, (world, folder, steps), nprocs=world, start_method="forkserver"
        )
        return float(statistics.median(json.loads(file.read_text()) for file in Path(folder).glob("*.json")))


# -- exported formats --------------------------------------------------------------------------------------


def latencies(turns: int) -> dict[str, list[float]]:
    """Milliseconds of each format, for one image and for 32, one entry for each turn."""
    import torch

    from pu_ray import cost, engine, quantise

    student = network(STUDENT, 0).eval()
    example = torch.zeros(2, 1, SIDE, SIDE)
    graph = engine.to_onnx(student, example, input_name="pixels", output_names=["logits"])
    real = np.random.default_rng(0).normal(size=(256, 1, SIDE, SIDE)).astype(np.float32)
    engines = {
        "ONNX": engine.OnnxEngine(graph, 1),
        "ONNX int8": engine.OnnxEngine(quantise.to_int8(graph, "pixels", real), 1),
    }

    def eager(batch: Any) -> Any:
        with torch.inference_mode():
            return student(torch.from_numpy(batch))

    runs: dict[str, Callable[[Any], Any]] = {"eager torch": eager, **{name: each.run for name, each in engines.items()}}
    found: dict[str, list[float]] = {}
    for _ in range(turns):
        for images in (1, 32):
            for name, run in runs.items():
                taken = cost.latency_ms(lambda run=run, images=images: run(real[:images]))  # type: ignore[misc]
                found.setdefault(f"{name}, {images}", []).append(taken)
    return found


# -- memory ------------------------------------------------------------------------------------------------


def _memory(rows: int) -> None:
    """In a process of its own: train from the product's store and print the largest resident size, in MiB."""
    import io
    import resource

    from PIL import Image

    from pu_ray import images
    from pu_ray.distill.store import open_store

    def encoded() -> Iterator[bytes]:
        for seed in range(rows):
            buffer = io.BytesIO()
            noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
            Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
            yield buffer.getvalue()

    store = open_store("decoded", encoded(), rows, preprocessing(), images.Limits())

    import torch

    from pu_ray.config import AugmentConfig, DistillConfig
    from pu_ray.distill import data, loop

    torch.set_num_threads(1)
    batches = data.Batches(
        data.Source(store),
        data.Source(open_store("decoded", [], 0, preprocessing(), images.Limits())),
        BATCH,
        "auto",
        AugmentConfig(crop_padding_px=2),
        0,
    )
    loop.train(
        network(STUDENT, 0),
        teacher_in_loop(),
        batches,
        (pictures(1), np.zeros(1, np.int64)),
        DistillConfig(epochs=10**6, max_steps=60, batch_size=BATCH, validations=1),
        preprocessing=preprocessing(),
        classes=CLASSES,
        seed=0,
        device=torch.device("cpu"),
        precision="auto",
        checkpoint=None,
        report=lambda _state, _content: None,
        count_images=lambda _images: None,
    )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory_mib(rows: int) -> float:
    """Largest resident size of a worker with so many images, MiB."""
    command = [sys.executable, "-m", "tests.benchmarks.distill", "--memory-of", str(rows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


# -- the command -------------------------------------------------------------------------------------------


def _median_ratio(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def measure(turns: int, steps: int) -> Iterator[str]:
    """Lines of the report, as they are found."""
    import torch

    from pu_ray import cost

    torch.set_num_threads(1)
    example = torch.zeros(1, 1, SIDE, SIDE)
    adds = {name: cost.multiply_adds(network(name, 0).eval(), example) for name in (TEACHER, STUDENT)}
    told = [f"{role} {name}, {adds[name] / 1e6:.1f} M multiply-adds" for role, name in ROLES.items()]
    yield f"{'; '.join(told)}."
    yield ""
    yield "| what | images/s | against | images/s | ratio (turns) | wanted |"
    yield "|---|---|---|---|---|---|"
    pixels, teacher, stored = pictures(4096), teacher_in_loop(), Stored(4096).answers
    speeds: dict[str, list[float]] = {name: [] for name in ("ours", "plain", "cached", "one", "two")}
    for _ in range(turns):
        speeds["ours"].append(ours(pixels, teacher, None, steps))
        speeds["plain"].append(plain(pixels, teacher, steps))
        speeds["cached"].append(ours(pixels, None, stored, steps))
    for _ in range(turns):
        speeds["one"].append(workers(1, steps))
        speeds["two"].append(workers(2, steps))
    rows = (
        ("our loop, one worker", "ours", "a plain loop", "plain", ">= 0.95"),
        ("stored soft labels", "cached", "teacher in the loop", "ours", ">= 1.5"),
        ("two workers", "two", "one", "one", ">= 1.6"),
    )
    for what, one, against, other, wanted in rows:
        middle, low, high = _median_ratio(speeds[one], speeds[other])
        first, second = (statistics.median(speeds[name]) for name in (one, other))
        ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        yield f"| {what} | {first:,.0f} | {against} | {second:,.0f} | {ratio} | {wanted} |"
    yield ""
    yield "| format | ms, 1 image | against eager | ms, 32 images | against eager |"
    yield "|---|---|---|---|---|"
    found = latencies(turns)
    for name in ("eager torch", "ONNX", "ONNX int8"):
        cells = []
        for images in (1, 32):
            mine, eager = found[f"{name}, {images}"], found[f"eager torch, {images}"]
            cells += [f"{statistics.median(mine):.2f}", f"{_median_ratio(eager, mine)[0]:.2f} x as fast"]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    small, grown = (memory_mib(rows) for rows in _FLAT.values())
    yield (
        f"Peak memory of a worker: {small:.0f} MiB with {_FLAT['rows']:,} mined images, {grown:.0f} MiB with "
        f"{_FLAT['grown']:,} ({grown / small:.2f} times)."
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="clocked steps of one turn")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of is not None:
        _memory(arguments.memory_of)
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime"))
    print(f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, {packages}.\n")
    for line in measure(arguments.turns, arguments.steps):
        print(line, flush=True)


if __name__ == "__main__":
    main()
