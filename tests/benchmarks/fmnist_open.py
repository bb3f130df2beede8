"""The workload of the quality table: garments hidden in an open lake.

A teacher is trained on all ten classes of Fashion-MNIST (60,000 images; Xiao et al. 2017). The lake holds some of those
images, unlabeled and on a long tail over the classes, among near-domain negatives (garments with shuffled quadrants,
halves of two garments joined) and far negatives (letters, handwritten digits). The customer brings a few labeled images
per class, none of which is in the lake; the test is Fashion-MNIST's own.

Fashion-MNIST comes from Debian's package dataset-fashion-mnist, else torchvision downloads it.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
PREPROCESSING = {"size_px": 28, "channels": 1, "mean": [0.286], "std": [0.353]}
TEACHER = "cifar/resnet18-w16"
STUDENT = "cifar/resnet8-w16"
MOST_LABELED = 100
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FORMAT = 1  # raised when the content changes
_SHARDS = 24
_ROW_GROUP_ROWS = 1000
_BATCH = 128


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        rows: Images of the lake.
        most_positives: Of the most frequent class; the rarest has a tenth.
        near: Near-domain negatives.
        digits: Handwritten digits; letters fill the rest.
        teacher_steps: Optimiser steps of the teacher.
        seeds: How many labeled sets there are.
    """

    rows: int
    most_positives: int
    near: int
    digits: int
    teacher_steps: int
    seeds: int = 3


SCALES = {
    "full": Scale(rows=120_000, most_positives=3_000, near=4_000, digits=20_000, teacher_steps=1_800),
    "small": Scale(rows=12_000, most_positives=300, near=400, digits=2_000, teacher_steps=200, seeds=2),
}


# -- Fashion-MNIST -----------------------------------------------------------------------------------------


def garments(train: bool) -> tuple[Any, Any]:
    """Images uint8 [N, 28, 28] and classes int64 [N].

    Raises:
        FileNotFoundError: The package is not installed, and nothing can be downloaded.
    """
    prefix = "train" if train else "t10k"
    folder = _DEBIAN
    if not folder.exists():
        from torchvision.datasets import FashionMNIST

        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pu-ray"
        FashionMNIST(str(root), train=train, download=True)
        folder = root / "FashionMNIST/raw"
    pixels = np.frombuffer(gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    labels = np.frombuffer(gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    return pixels.reshape(-1, 28, 28), labels.astype(np.int64)


# -- the lake ----------------------------------------------------------------------------------------------


def shuffled_quadrants(tiles: Any, generator: np.random.Generator) -> Any:
    """Each image with its quadrants in another order, uint8 [N, 28, 28]."""
    orders = [order for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)]
    mixed = np.empty_like(tiles)
    for row, tile in enumerate(tiles):
        quarters = [tile[y : y + 14, x : x + 14] for y in (0, 14) for x in (0, 14)]
        first, second, third, fourth = (quarters[place] for place in orders[generator.integers(len(orders))])
        mixed[row] = np.block([[first, second], [third, fourth]])
    return mixed


def joined_halves(tiles: Any, labels: Any, generator: np.random.Generator) -> Any:
    """Left half of each image beside the right half of one of another class, uint8 [N, 28, 28]."""
    others = generator.integers(len(tiles), size=len(tiles))
    while (same := labels[others] == labels).any():
        others[same] = generator.integers(len(tiles), size=int(same.sum()))
    return np.concatenate([tiles[:, :, :14], tiles[others][:, :, 14:]], axis=2)


def _digits(count: int, generator: np.random.Generator) -> Iterator[Any]:
    from pu_ray import demo

    pixels, _ = demo.digits()
    for row in generator.integers(len(pixels), size=count):
        angle = float(generator.uniform(-12, 12))
        across, down = (int(shift) for shift in generator.integers(-2, 3, size=2))
        tile = Image.fromarray(pixels[row]).rotate(angle, Image.Resampling.BILINEAR, translate=(across, down))
        yield np.asarray(tile)


def _long_tail(most: int) -> list[int]:
    """Images per class, geometrically from `most` down to a tenth."""
    return [round(most * 0.1 ** (k / (len(CLASSES) - 1))) for k in range(len(CLASSES))]


def _write_lake(folder: Path, scale: Scale, pixels: Any, labels: Any, generator: np.random.Generator) -> None:
    from pu_ray import demo
    from pu_ray.images import sample_id

    # Which class is frequent must not follow from its number.
    counts = generator.permutation(_long_tail(scale.most_positives))
    chosen = [np.flatnonzero(labels == k)[: counts[k]] for k in range(len(CLASSES))]
    rows = np.concatenate(chosen)
    tiles = list(zip(pixels[rows], labels[rows].tolist(), strict=True))
    spare = generator.permutation(np.setdiff1d(np.arange(len(labels)), rows))
    half = scale.near // 2
    tiles += [(tile, -1) for tile in shuffled_quadrants(pixels[spare[:half]], generator)]
    near = spare[half : scale.near]
    tiles += [(tile, -1) for tile in joined_halves(pixels[near], labels[near], generator)]
    tiles += [(tile, -1) for tile in _digits(scale.digits, generator)]
    tiles += [(tile, -1) for tile in demo.letters(scale.rows - len(tiles), generator)]
    order = generator.permutation(len(tiles))
    encoded = [(demo.encode_png(tiles[row][0]), tiles[row][1]) for row in order]
    (folder / "lake").mkdir(exist_ok=True)
    for shard, part in enumerate(np.array_split(np.arange(len(encoded)), _SHARDS)):
        table = pa.table({"bytes": pa.array([encoded[row][0] for row in part], pa.binary())})
        file = folder / f"lake/part-{shard:03d}.parquet"
        pq.write_table(table, file, compression="none", use_dictionary=False, row_group_size=_ROW_GROUP_ROWS)
    truth = sorted({sample_id(content): label for content, label in encoded}.items())
    columns = {"sample_id": pa.array([key for key, _ in truth], pa.binary(16)), "class": [label for _, label in truth]}
    pq.write_table(pa.table(columns), folder / "truth.parquet")


def _write_images(folder: Path, pixels: Any, labels: Any, rows: Sequence[int]) -> None:
    from pu_ray import demo

    for row in rows:
        target = folder / CLASSES[labels[row]]
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{row:05d}.png").write_bytes(demo.encode_png(pixels[row]))


# -- the teacher -------------------------------------------------------------------------------------------


def _train_teacher(pixels: Any, labels: Any, steps: int) -> Any:
    import torch

    from pu_ray import images, models, optim
    from pu_ray.config import AugmentConfig, NetworkConfig, OptimizerConfig, PreprocessingConfig
    from pu_ray.distill import crops

    torch.manual_seed(0)
    network = models.build(NetworkConfig(architecture=TEACHER), len(CLASSES), 1).to(memory_format=torch.channels_last)
    settings = OptimizerConfig(kind="sgd", lr=0.2, weight_decay=5e-4, schedule="one_cycle")
    optimizer, schedule = optim.build(network.parameters(), settings, steps)
    preprocessing = PreprocessingConfig(**PREPROCESSING)
    generator = np.random.default_rng(0)
    network.train()
    order = np.concatenate([generator.permutation(len(labels)) for _ in range(1 + steps * _BATCH // len(labels))])
    for step in range(steps):
        rows = order[step * _BATCH : (step + 1) * _BATCH]
        batch = pixels[rows][..., None]
        batch = crops.cut(batch, crops.draw(len(batch), batch.shape[1:3], AugmentConfig(crop_padding_px=2), generator))
        inputs = torch.from_numpy(images.normalise(batch, preprocessing))
        logits = network(inputs.contiguous(memory_format=torch.channels_last))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network


# -- the folder --------------------------------------------------------------------------------------------


def build(name: str, folder: Path) -> None:
    """Write lake/, truth.parquet, labeled-{n}-{seed}/, test/, labels.txt and teacher.safetensors.

    Args:
        name: One of `SCALES`.
        folder: Where to; a folder that holds the very same is left as it is.
    """
    from pu_ray import models

    scale = SCALES[name]
    recipe = {"format": _FORMAT, **asdict(scale)}
    done = folder / "recipe.json"
    if done.exists() and json.loads(done.read_text()) == recipe:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    pixels, labels = garments(train=True)
    generator = np.random.default_rng(0)
    # The customer's images are set aside first: none of them is in the lake.
    order = generator.permutation(len(labels))
    first = [order[labels[order] == k] for k in range(len(CLASSES))]
    reserved = np.concatenate([rows[: MOST_LABELED * scale.seeds] for rows in first])
    for seed in range(scale.seeds):
        for count in (100, 50, 20, 5):
            rows = [row for rows in first for row in rows[MOST_LABELED * seed :][:count]]
            _write_images(folder / f"labeled-{count}-{seed}", pixels, labels, rows)
    lake_rows = np.setdiff1d(np.arange(len(labels)), reserved)
    lake_rows = generator.permutation(lake_rows)
    _write_lake(folder, scale, pixels[lake_rows], labels[lake_rows], generator)
    test_pixels, test_labels = garments(train=False)
    _write_images(folder / "test", test_pixels, test_labels, range(len(test_labels)))
    network = _train_teacher(pixels, labels, scale.teacher_steps)
    (folder / "teacher.safetensors").write_bytes(models.save_weights(network))
    done.write_text(json.dumps(recipe))


def main() -> None:
    """Build it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    build(arguments.scale, arguments.out)


if __name__ == "__main__":
    main()
