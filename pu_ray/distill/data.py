"""What a student is taught with: which images, in which batches, with which crops and answers.

A batch is a function of (seed, rank, step) alone, so a run that goes on from a checkpoint sees the batches it would
have seen. Axes: N images of a batch, H, W, C channels, K classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from pu_ray import ledger, schema
from pu_ray.config import AugmentConfig
from pu_ray.distill import crops
from pu_ray.distill.crops import Crops, Pixels
from pu_ray.distill.store import Images, Rows
from pu_ray.errors import DataError
from pu_ray.lake import LabeledImages
from pu_ray.storage import Storage

NO_LABEL = -1


# -- which images ------------------------------------------------------------------------------------------


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
            "the labeled images have changed since the fit",
            slug="labeled-images-changed",
            where=missing[0],
            hint="run the whole job again",
        )
    return labeled.rows([row for row, sample in enumerate(labeled.ids) if roles[sample] == role])


def taught_images(labeled: LabeledImages, scorer: Storage) -> LabeledImages:
    """The labeled images that teach: those of the fit and, since promises were made before, those of its calibration.

    Those that choose the student (role validate) teach nothing.
    """
    return labeled_by_role(labeled, scorer, "train") + labeled_by_role(labeled, scorer, "calibrate")


# -- batches -----------------------------------------------------------------------------------------------


class Answers(Protocol):
    """The teacher's stored answers, see soft_labels.py."""

    def take(self, rows: Rows, visits: Rows) -> tuple[Crops, Any]:
        """Crops int16 [N, 5] and logits float32 [N, K] for these visits of these images."""
        ...

    def mean_probabilities(self, rows: Rows) -> Any:
        """The teacher's probabilities float64 [N, K], mean over an image's crops."""
        ...


@dataclass(frozen=True)
class Source:
    """Images of one kind.

    Attributes:
        images: Their pixels.
        answers: The teacher's, of the same images; None: the teacher is asked in the loop.
        labels: True classes int64 [N]; None where nobody knows them.
    """

    images: Images
    answers: Answers | None = None
    labels: Any = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Batch:
    """What one step needs.

    Attributes:
        pixels: uint8 [N, H, W, C], cropped.
        labels: int64 [N], `NO_LABEL` for a mined image.
        teacher: Its stored logits float32 [N, K], or None.
    """

    pixels: Pixels
    labels: Any
    teacher: Any

    def __len__(self) -> int:
        return len(self.pixels)

    def parts(self, count: int) -> Iterator[Batch]:
        """At most `count` parts of nearly equal size, none of them empty."""
        for rows in np.array_split(np.arange(len(self)), min(count, len(self))):
            inside = slice(rows[0], rows[-1] + 1)
            teacher = None if self.teacher is None else self.teacher[inside]
            yield Batch(self.pixels[inside], self.labels[inside], teacher)


@dataclass
class Batches:
    """Random batches of one worker.

    Args:
        mined: Mined images.
        labeled: Labeled images.
        batch_size: Images of one batch, of this worker.
        labeled_share: Share of labeled images in each batch; auto draws from both evenly.
        augment: Random crop and flip; stored answers bring their own.
        seed: Of everything random.
        rank: Which worker this is.
    """

    mined: Source
    labeled: Source
    batch_size: int
    labeled_share: Literal["auto"] | float
    augment: AugmentConfig
    seed: int
    rank: int = 0

    @property
    def images(self) -> int:
        """All images of this worker."""
        return len(self.mined) + len(self.labeled)

    @property
    def sources(self) -> tuple[Source, Source]:
        """Mined and labeled images."""
        return self.mined, self.labeled

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        drawn = [(source, rows, visits) for source, rows, visits in self._draw(step) if len(rows)]
        pixels = np.concatenate([source.images.take(rows) for source, rows, _ in drawn])
        labels = np.concatenate(
            [
                np.full(len(rows), NO_LABEL) if source.labels is None else source.labels[rows]
                for source, rows, _ in drawn
            ]
        )
        stored = [source.answers.take(rows, visits) for source, rows, visits in drawn if source.answers is not None]
        if stored:
            chosen, teacher = (np.concatenate(part) for part in zip(*stored, strict=True))
        else:
            generator = np.random.default_rng([self.seed, self.rank, step, 1])
            chosen, teacher = crops.draw(len(pixels), pixels.shape[1:3], self.augment, generator), None
        return Batch(crops.cut(pixels, chosen), labels, teacher)

    def _draw(self, step: int) -> list[tuple[Source, Rows, Rows]]:
        if self.labeled_share == "auto":
            rows, visits = self._endless(self.images, self.batch_size, step, stream=0)
            boundary = len(self.mined)
            first = rows < boundary
            return [
                (self.mined, rows[first], visits[first]),
                (self.labeled, rows[~first] - boundary, visits[~first]),
            ]
        labeled = round(self.batch_size * float(self.labeled_share)) if len(self.labeled) else 0
        return [
            (self.mined, *self._endless(len(self.mined), self.batch_size - labeled, step, stream=0)),
            (self.labeled, *self._endless(len(self.labeled), labeled, step, stream=1)),
        ]

    def _endless(self, count: int, number: int, step: int, stream: int) -> tuple[Rows, Rows]:
        """Rows `step * number ...` of the endless row of permutations, each seeded by its own number; and that number.

        It says how often an image has been seen before.
        """
        positions = np.arange(step * number, (step + 1) * number)
        rows = np.empty(number, np.int64)
        turns = positions // max(count, 1)
        for turn in np.unique(turns):
            permutation = np.random.default_rng([self.seed, self.rank, int(turn), 2 + stream]).permutation(count)
            inside = turns == turn
            rows[inside] = permutation[positions[inside] % count]
        return rows, turns


def ahead(at: Callable[[int], Batch], first: int, stop: int, threads: int) -> Iterator[Batch]:
    """Batches `first` to `stop - 1` in order, prepared by other threads while the caller is busy with one."""
    with ThreadPoolExecutor(threads, thread_name_prefix="batches") as pool:
        waiting: deque[Future[Batch]] = deque()
        for step in range(first, stop):
            waiting.append(pool.submit(at, step))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
