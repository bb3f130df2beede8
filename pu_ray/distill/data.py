"""Images for distillation: decoded once into a memory-mapped store, then drawn by step number.

Decoding once instead of once per epoch takes the decoder out of the training loop, and a file on local disk keeps
memory flat whatever the size of `mined/`. A batch is a function of (seed, rank, step) alone, so a run that goes on
from a checkpoint sees the batches it would have seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pu_ray import images, ledger, schema
from pu_ray.config import AugmentConfig, JobConfig, PreprocessingConfig
from pu_ray.errors import DataError
from pu_ray.lake import LabeledImages
from pu_ray.storage import Storage

Pixels = npt.NDArray[np.uint8]


class PixelStore:
    """Decoded images uint8 [N, H, W, C] in a temporary file, mapped into memory; the file goes with the object."""

    def __init__(
        self,
        encoded: Iterable[bytes],
        count: int,
        preprocessing: PreprocessingConfig,
        limits: images.Limits | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pu-ray-pixels-")
        shape = (max(count, 1), *preprocessing.shape_hwc)
        self.pixels: Pixels = np.lib.format.open_memmap(
            Path(self._folder.name) / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape
        )[:count]
        filled = 0
        for content in encoded:
            self.pixels[filled] = images.decode(content, preprocessing, limits or images.Limits())
            filled += 1
        assert filled == count, f"{filled} images came instead of {count}"

    def __len__(self) -> int:
        return len(self.pixels)


def mined_images(mined: Storage, rank: int, world: int) -> tuple[Iterator[bytes], int]:
    """The mined images of one worker, and their number.

    Rows are dealt out by `order`, which is class-stratified, so every worker sees the same mixture. The stream follows
    the files; `order` inside a worker does not matter, since batches are drawn at random.
    """
    files = ledger.data_files(mined)
    orders = [mined.read_table(file, [schema.ORDER])[schema.ORDER].to_numpy() for file in files]
    count = sum(int((order % world == rank).sum()) for order in orders)

    def stream() -> Iterator[bytes]:
        for file, order in zip(files, orders, strict=True):
            if (order % world == rank).any():
                contents = mined.read_table(file, [schema.BYTES])[schema.BYTES]
                for row in np.flatnonzero(order % world == rank):
                    yield contents[int(row)].as_py()

    return stream(), count


def labeled_by_role(labeled: LabeledImages, scorer: Storage, role: str) -> LabeledImages:
    """The labeled images that play one role, as the stage `fit` dealt them out."""
    table = scorer.read_table("labeled.parquet")
    roles = dict(zip(table[schema.SAMPLE_ID].to_pylist(), table["role"].to_pylist(), strict=True))
    if missing := [name for sample, name in zip(labeled.ids, labeled.names, strict=True) if sample not in roles]:
        raise DataError(
            "the labeled images have changed since the fit", where=missing[0], hint="run the whole job again"
        )
    rows = [row for row, sample in enumerate(labeled.ids) if roles[sample] == role]
    return LabeledImages(
        [labeled.ids[row] for row in rows],
        [labeled.names[row] for row in rows],
        labeled.labels[rows],
        [labeled.encoded[row] for row in rows],
    )


@dataclass
class Batches:
    """Random batches of one worker.

    Args:
        mined: Decoded mined images.
        labeled: Decoded labeled images.
        batch_size: Images of one batch, of this worker.
        labeled_share: Share of labeled images in each batch; auto draws from both evenly.
        augment: Random crop and flip.
        seed: Of everything random.
        rank: Which worker this is.
    """

    mined: Pixels
    labeled: Pixels
    batch_size: int
    labeled_share: Literal["auto"] | float
    augment: AugmentConfig
    seed: int
    rank: int = 0

    @property
    def images(self) -> int:
        """All images of this worker."""
        return len(self.mined) + len(self.labeled)

    def at(self, step: int) -> Pixels:
        """The batch of a step, uint8 [batch_size, H, W, C]."""
        batch = np.concatenate([source[rows] for source, rows in self._draw(step) if len(rows)])
        return augmented(batch, self.augment, np.random.default_rng([self.seed, self.rank, step, 1]))

    def _draw(self, step: int) -> list[tuple[Pixels, npt.NDArray[np.int64]]]:
        if self.labeled_share == "auto":
            rows = self._endless(self.images, self.batch_size, step, stream=0)
            boundary = len(self.mined)
            return [(self.mined, rows[rows < boundary]), (self.labeled, rows[rows >= boundary] - boundary)]
        labeled = round(self.batch_size * float(self.labeled_share)) if len(self.labeled) else 0
        return [
            (self.mined, self._endless(len(self.mined), self.batch_size - labeled, step, stream=0)),
            (self.labeled, self._endless(len(self.labeled), labeled, step, stream=1)),
        ]

    def _endless(self, count: int, number: int, step: int, stream: int) -> npt.NDArray[np.int64]:
        """Rows `step * number ...` of the endless row of permutations, each seeded by its own number."""
        positions = np.arange(step * number, (step + 1) * number)
        rows = np.empty(number, np.int64)
        for epoch in np.unique(positions // max(count, 1)):
            permutation = np.random.default_rng([self.seed, self.rank, int(epoch), 2 + stream]).permutation(count)
            inside = positions // count == epoch
            rows[inside] = permutation[positions[inside] % count]
        return rows


def augmented(batch: Pixels, augment: AugmentConfig, generator: np.random.Generator) -> Pixels:
    """One random crop and flip per image; teacher and student get the result."""
    padding = augment.crop_padding_px
    if padding:
        height, width = batch.shape[1:3]
        edge = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        padded = np.pad(batch, edge, mode="edge")
        offsets = generator.integers(0, 2 * padding + 1, size=(len(batch), 2))
        batch = np.stack(
            [image[top : top + height, left : left + width] for image, (top, left) in zip(padded, offsets, strict=True)]
        )
    if augment.horizontal_flip:
        flipped = generator.random(len(batch)) < 0.5
        batch = np.where(flipped[:, None, None, None], batch[:, :, ::-1], batch)
    return np.ascontiguousarray(batch)


def student_data(
    config: JobConfig, storage: Storage, labeled: LabeledImages, rank: int, world: int
) -> tuple[PixelStore, PixelStore, Any]:
    """Stores of mined and labeled images of one worker, and the validation images with their labels.

    Returns:
        Mined store, labeled store (roles train and calibrate: promises were made before, so both may teach), and
        (pixels uint8 [M, H, W, C], labels int64 [M]) of the role validate, which only judges.
    """
    scorer = storage.child("scorer")
    preprocessing = config.teacher.preprocessing
    stream, count = mined_images(storage.child("mined"), rank, world)
    mined = PixelStore(stream, count, preprocessing, images.Limits.of(config.lake))
    teach = [labeled_by_role(labeled, scorer, role) for role in ("train", "calibrate")]
    encoded = [content for part in teach for content in part.encoded][rank::world]
    judge = labeled_by_role(labeled, scorer, "validate")
    validation = (judge.pixels(preprocessing, config.labeled.uri), judge.labels)
    return mined, PixelStore(encoded, len(encoded), preprocessing), validation
