"""Deterministic lakes with teacher and labeled images: `python -m tests.benchmarks.lakes KIND --images N --out DIR`.

L1: 28 x 28 greyscale PNGs, letters with one digit in ten; small ResNet.
L2: photo-size JPEGs (3:2, about 540 x 360), smooth at many scales like photographs; mobilenet_v3_small at 224 px.
far: the letters and digits of L1, digits also shifted and turned; a ResNet-34, as the paper has, trained on digits.
Its labeled images are made as those in the lake are, of digits that neither the lake nor the teacher's training holds:
a promise of recall needs that.

The teachers of L1 and L2 have random weights and batch-norm statistics of the lake's own images: without these a random
network answers alike for every image, and comparing answers would prove nothing. Sides are 3:2 so that resizing the
shorter one to 224 px gives whole numbers of pixels, and everybody's resize and centre crop mean the same pixels.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter

SHARDS = 20
_CLASSES = 10
_PER_CLASS = (20, 10)  # labeled and test images
_POSITIVE_SHARE = 0.1
_CALIBRATION_IMAGES = 256
_TRAINING_STEPS = 320
_TRAINING_PER_CLASS = 150
_FAR_LABELED_PER_CLASS = 100
_PER_TASK = 200  # images rendered with one seed

Encoded = list[tuple[bytes, int]]  # images and their classes; -1 for none


@dataclass(frozen=True)
class Kind:
    """A lake's images and its teacher.

    Attributes:
        images: Rows of the lake, unless told otherwise.
        row_group_rows: Of the lake's Parquet files.
        teacher: The job file's section, without weights and classes.
        render: (images, share of the teacher's classes, seed) to encoded images and their classes.
        trained: Whether the teacher is trained.
        format: Raised when the content changes.
    """

    images: int
    row_group_rows: int
    teacher: Mapping[str, Any]
    render: Callable[[int, float, int], Encoded]
    trained: bool = False
    format: int = 1


# -- images ------------------------------------------------------------------------------------------------


@functools.cache
def _digits(used_by_teacher: bool) -> tuple[Any, Any]:
    """MNIST digits: those that teacher and labels may use, or the others, which hide in the lake."""
    from pu_ray import demo

    pixels, labels = demo.digits()
    first = _first_per_class(labels, _TRAINING_PER_CLASS + _PER_CLASS[1])
    chosen = first if used_by_teacher else ~first
    return pixels[chosen], labels[chosen]


def _first_per_class(labels: Any, count: int) -> Any:
    rank = np.empty(len(labels), np.int64)
    for k in range(_CLASSES):
        rank[labels == k] = np.arange((labels == k).sum())
    return rank < count


def characters(count: int, positive_share: float, seed: int, turned: bool) -> Encoded:
    """Letters and digits as PNG, in random order.

    Args:
        count: How many.
        positive_share: Share of digits.
        seed: Of everything random.
        turned: Shift and turn the digits a little, so that many differ although few were written.
    """
    from pu_ray import demo

    generator = np.random.default_rng(seed)
    pixels, labels = _digits(used_by_teacher=False)
    if turned:
        kept = ~_first_per_class(labels, _FAR_LABELED_PER_CLASS)
        pixels, labels = pixels[kept], labels[kept]
    positives = round(count * positive_share)
    images: Encoded = []
    for row in generator.integers(len(pixels), size=positives):
        tile = _turned(pixels[row], generator) if turned else pixels[row]
        images.append((demo.encode_png(tile), int(labels[row])))
    images += [(demo.encode_png(tile), -1) for tile in demo.letters(count - positives, generator)]
    return [images[place] for place in generator.permutation(len(images))]


def _turned(pixels: Any, generator: np.random.Generator) -> Any:
    angle = float(generator.uniform(-8, 8))
    across, down = (int(shift) for shift in generator.integers(-1, 2, size=2))
    tile = Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR, translate=(across, down))
    return np.asarray(tile)


def photos(count: int, positive_share: float, seed: int) -> Encoded:
    """Pictures with the statistics of photographs as JPEG, in random order.

    Structure at every scale with amplitude falling as the scale does, shaded shapes with edges, a little sensor noise.
    An image of a class has the class's own hue.
    """
    generator = np.random.default_rng(seed)
    images: Encoded = []
    for _ in range(count):
        label = int(generator.integers(_CLASSES)) if generator.random() < positive_share else -1
        images.append((_photo(label, generator), label))
    return images


def _photo(label: int, generator: np.random.Generator) -> bytes:
    size = [(480, 320), (540, 360), (600, 400)][generator.integers(3)]
    values = np.zeros((size[1], size[0], 3), np.float32)
    for level in range(8):
        # Colour changes more slowly than brightness.
        for channels, strength in ((1, 75), (3, 35))[: 2 if level < 4 else 1]:
            shape = (2 * 2**level, 3 * 2**level, channels)
            grid = generator.normal(128, strength / 2 ** (0.7 * level), shape).clip(0, 255).astype(np.uint8)
            layer = Image.fromarray(grid[..., 0] if channels == 1 else grid).resize(size, Image.Resampling.BICUBIC)
            values += np.asarray(layer, np.float32).reshape(size[1], size[0], channels) - 128
    picture = Image.fromarray((values + 128).clip(0, 255).astype(np.uint8))
    shapes = Image.new("L", size)
    draw = ImageDraw.Draw(shapes)
    for _ in range(int(generator.integers(3, 9))):
        corners = [(int(x), int(y)) for x, y in generator.integers(0, size, (int(generator.integers(3, 7)), 2))]
        draw.polygon(corners, fill=int(generator.integers(60, 220)))
    hue = label * 255 // _CLASSES if label >= 0 else int(generator.integers(256))
    tint = Image.new("HSV", size, (hue, 200 if label >= 0 else 60, int(generator.integers(60, 220)))).convert("RGB")
    picture = Image.composite(tint, picture, shapes.filter(ImageFilter.GaussianBlur(1)))
    noisy = np.asarray(picture, np.int16) + generator.integers(-4, 5, (size[1], size[0], 1), np.int16)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


_GREY = {"size_px": 28, "channels": 1, "mean": [0.1307], "std": [0.3081]}
KINDS = {
    "L1": Kind(
        images=40_000,
        row_group_rows=250,
        teacher={"architecture": "cifar/resnet8-w16", "preprocessing": _GREY},
        render=partial(characters, turned=False),
    ),
    "L2": Kind(
        images=3_000,
        row_group_rows=50,
        teacher={
            "architecture": "torchvision/mobilenet_v3_small",
            "preprocessing": {"size_px": 224, "channels": 3},
            # After these the resolution is halved; the last is the end of the trunk.
            "stages": ["features.1", "features.3", "features.8", "features.12"],
        },
        render=photos,
    ),
    "far": Kind(
        images=60_000,
        row_group_rows=250,
        teacher={"architecture": "cifar/resnet34-w16", "preprocessing": _GREY},
        render=partial(characters, turned=True),
        trained=True,
        format=2,
    ),
}


# -- teachers ----------------------------------------------------------------------------------------------


def _calibrated(kind: Kind, teacher: Any, contents: Sequence[bytes]) -> Any:
    """A random network whose batch-norm statistics are those of these images."""
    import torch

    from pu_ray import images, models

    torch.manual_seed(0)
    network = models.build(teacher, _CLASSES, teacher.preprocessing.channels)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # plain averages
    pixels = np.stack([images.decode(content, teacher.preprocessing) for content in contents])
    network.train()
    with torch.no_grad():
        for start in range(0, len(pixels), 128):
            network(torch.from_numpy(images.normalise(pixels[start : start + 128], teacher.preprocessing)))
        network.eval()
        logits = network(torch.from_numpy(images.normalise(pixels, teacher.preprocessing)))
        last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        scale = 2 / logits.std(dim=0)
        last.weight.copy_(last.weight * scale[:, None])
        last.bias.copy_((last.bias - logits.mean(dim=0)) * scale)
    return network


def _trained(teacher: Any) -> Any:
    """A network trained on digits that are not in the lake, as pu_ray.demo trains its own."""
    import torch

    from pu_ray import images, models, optim
    from pu_ray.config import OptimizerConfig

    torch.manual_seed(0)
    network = models.build(teacher, _CLASSES, teacher.preprocessing.channels)
    pixels, labels = _digits(used_by_teacher=True)
    kept = np.concatenate([np.flatnonzero(labels == k)[:_TRAINING_PER_CLASS] for k in range(_CLASSES)])
    pixels, labels = pixels[kept], labels[kept]
    generator = np.random.default_rng(0)
    settings = OptimizerConfig(kind="sgd", lr=0.2, weight_decay=5e-4, schedule="one_cycle")
    optimizer, schedule = optim.build(network.parameters(), settings, _TRAINING_STEPS)
    network.train()
    for _ in range(_TRAINING_STEPS):
        rows = generator.choice(len(pixels), 64, replace=False)
        top, left = generator.integers(0, 5, size=2)
        crop = np.pad(pixels[rows], ((0, 0), (2, 2), (2, 2)))[:, top : top + 28, left : left + 28, None]
        logits = network(torch.from_numpy(images.normalise(crop, teacher.preprocessing)))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network


# -- the folder --------------------------------------------------------------------------------------------


def build(name: str, images: int, shards: int, folder: Path) -> None:
    """Write lake/part-*.parquet (columns path and bytes), labeled/, test/, labels.txt, truth.parquet, the teacher.

    Args:
        name: One of `KINDS`.
        images: Rows of the lake.
        shards: Its files, of equal sizes.
        folder: Where to; a folder that holds the very same is left as it is.
    """
    recipe = {"format": KINDS[name].format, "kind": name, "images": images, "shards": shards}
    done = folder / "recipe.json"
    if done.exists() and json.loads(done.read_text()) == recipe:
        return
    kind = KINDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text("".join(f"{k}\n" for k in range(_CLASSES)))
    _write_labeled(name, folder)
    counts = [min(_PER_TASK, images - start) for start in range(0, images, _PER_TASK)]
    with ProcessPoolExecutor() as pool:
        seeds = range(1, len(counts) + 1)
        parts = pool.map(kind.render, counts, [_POSITIVE_SHARE] * len(counts), seeds)
        rows = [row for part in parts for row in part]
    _write_lake(folder, rows, shards, kind.row_group_rows)
    _write_teacher(kind, folder, [content for content, _ in rows[:_CALIBRATION_IMAGES]])
    done.write_text(json.dumps(recipe))


def _write_lake(folder: Path, rows: Encoded, shards: int, row_group_rows: int) -> None:
    from pu_ray.images import sample_id

    (folder / "lake").mkdir(exist_ok=True)
    cuts = np.linspace(0, len(rows), shards + 1).astype(int)
    for shard, (first, last) in enumerate(itertools.pairwise(cuts)):
        paths = [f"{row:07d}" for row in range(first, last)]
        table = pa.table({"path": paths, "bytes": pa.array([row[0] for row in rows[first:last]], pa.binary())})
        # Encoded images do not shrink.
        file = folder / f"lake/part-{shard:03d}.parquet"
        pq.write_table(table, file, compression="none", row_group_size=row_group_rows, use_dictionary=False)
    truth = sorted({sample_id(content): label for content, label in rows}.items())
    columns = {"sample_id": pa.array([key for key, _ in truth], pa.binary(16)), "class": [label for _, label in truth]}
    pq.write_table(pa.table(columns), folder / "truth.parquet")


def _write_labeled(name: str, folder: Path) -> None:
    from pu_ray import demo

    generator = np.random.default_rng(0)
    for k in range(_CLASSES):
        if name == "L2":
            labeled, test = ([_photo(k, generator) for _ in range(count)] for count in _PER_CLASS)
        else:
            # Those behind what the teacher is trained on are its test.
            own = _of_class(k, used_by_teacher=True)
            tiles = own[: _PER_CLASS[0]]
            if name == "far":
                others = _of_class(k, used_by_teacher=False)[:_FAR_LABELED_PER_CLASS]
                tiles = [_turned(tile, generator) for tile in others]
            labeled = [demo.encode_png(tile) for tile in tiles]
            test = [demo.encode_png(tile) for tile in own[_TRAINING_PER_CLASS:][: _PER_CLASS[1]]]
        for use, contents in (("labeled", labeled), ("test", test)):
            (folder / use / str(k)).mkdir(parents=True, exist_ok=True)
            for place, content in enumerate(contents):
                (folder / use / str(k) / f"{place:03d}").with_suffix(".jpg" if name == "L2" else ".png").write_bytes(
                    content
                )


def _of_class(k: int, used_by_teacher: bool) -> Any:
    pixels, labels = _digits(used_by_teacher)
    return pixels[labels == k]


def _write_teacher(kind: Kind, folder: Path, contents: Sequence[bytes]) -> None:
    from pu_ray import models
    from pu_ray.config import TeacherConfig

    settings = TeacherConfig(**kind.teacher, weights="", classes="")
    network = _trained(settings) if kind.trained else _calibrated(kind, settings, contents)
    (folder / "teacher.safetensors").write_bytes(models.save_weights(network))


def part_of(lake: Path, shards: slice, folder: Path) -> Path:
    """A lake of some of the shards of another, as links."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(lake.glob("*.parquet"))[shards]:
        (folder / file.name).unlink(missing_ok=True)
        os.link(file, folder / file.name)
    return folder


def rows_of(lake: Path) -> int:
    """Rows of all shards."""
    return sum(pq.read_metadata(file).num_rows for file in lake.glob("*.parquet"))


def job(name: str, data: Path, lake: Path, output: Path, sections: Mapping[str, Any]) -> Path:
    """Write a job file for `pu-ray` beside its output; JSON is YAML.

    Args:
        name: The kind.
        data: The folder that `build` made.
        lake: The lake, or a part of it.
        output: The run's folder.
        sections: Further sections of the job.
    """
    teacher = {"weights": f"{data}/teacher.safetensors", "classes": f"{data}/labels.txt", **KINDS[name].teacher}
    settings = {
        "name": "benchmark",
        "output": str(output),
        "teacher": teacher,
        "labeled": {"uri": f"{data}/labeled"},
        "test": {"uri": f"{data}/test"},
        "lake": {"uri": str(lake)},
        "student": {"architecture": "cifar/resnet8-w8"},
        **sections,
    }
    file = output.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1))
    return file


def main() -> None:
    """Build one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    build(arguments.kind, arguments.images, arguments.shards, arguments.out)


if __name__ == "__main__":
    main()
