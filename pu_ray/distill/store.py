"""A worker's images on its own disk: read once from `mined/`, then drawn at random in every epoch.

Random access is what makes a batch a function of the step number. Rows are read from the file on demand and nothing is
mapped, so the memory of a worker does not grow with its share; the operating system caches what it can spare.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pu_ray import images
from pu_ray.config import PreprocessingConfig
from pu_ray.distill.crops import Pixels

_MOST_OF_THE_DISK = 0.1  # several workers may share a disk

Rows = npt.NDArray[np.int64]


class Images(Protocol):
    """Decoded images by number."""

    def __len__(self) -> int: ...

    def take(self, rows: Rows) -> Pixels:
        """Pixels uint8 [N, H, W, C] of these rows; safe to call from several threads."""
        ...


class InMemory:
    """Images that fit: the labeled ones, and small sets in tests and benchmarks.

    Args:
        pixels: uint8 [N, H, W, C].
    """

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, rows: Rows) -> Pixels:
        """Pixels uint8 [N, H, W, C] of these rows."""
        return self._pixels[rows]


class RecordFile:
    """Byte strings in a temporary file, found by number; the file goes with the object.

    Args:
        records: In their order.
    """

    def __init__(self, records: Iterable[bytes | memoryview]) -> None:
        self._file = tempfile.TemporaryFile(prefix="pu-ray-")  # noqa: SIM115 - it lives as long as the object
        bounds = [0]
        for record in records:
            self._file.write(record)
            bounds.append(bounds[-1] + len(record))
        self._file.flush()
        self._bounds = np.array(bounds, np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, row: int) -> bytes:
        start, stop = int(self._bounds[row]), int(self._bounds[row + 1])
        return os.pread(self._file.fileno(), stop - start, start)


class DecodedStore:
    """Pixels, decoded once: no epoch pays for the decoder.

    Args:
        encoded: Encoded images, in the order of their rows.
        preprocessing: How they become pixels.
        limits: Of bytes and pixels of one image.
    """

    def __init__(self, encoded: Iterable[bytes], preprocessing: PreprocessingConfig, limits: images.Limits) -> None:
        self._shape = preprocessing.shape_hwc
        self._records = RecordFile(images.decode(content, preprocessing, limits).data.cast("B") for content in encoded)

    def __len__(self) -> int:
        return len(self._records)

    def take(self, rows: Rows) -> Pixels:
        """Pixels uint8 [N, H, W, C] of these rows."""
        pixels = np.empty((len(rows), *self._shape), np.uint8)
        for place, row in enumerate(rows):
            pixels[place] = np.frombuffer(self._records[int(row)], np.uint8).reshape(self._shape)
        return pixels


class EncodedStore:
    """Encoded images, decoded whenever they are drawn: a tenth of the space, and work for the loader's threads.

    Args:
        encoded: Encoded images, in the order of their rows.
        preprocessing: How they become pixels.
        limits: Of bytes and pixels of one image.
    """

    def __init__(self, encoded: Iterable[bytes], preprocessing: PreprocessingConfig, limits: images.Limits) -> None:
        self._preprocessing = preprocessing
        self._limits = limits
        self._records = RecordFile(encoded)

    def __len__(self) -> int:
        return len(self._records)

    def take(self, rows: Rows) -> Pixels:
        """Pixels uint8 [N, H, W, C] of these rows."""
        pixels = np.empty((len(rows), *self._preprocessing.shape_hwc), np.uint8)
        for place, row in enumerate(rows):
            pixels[place] = images.decode(self._records[int(row)], self._preprocessing, self._limits)
        return pixels


def open_store(
    kind: Literal["auto", "decoded", "encoded"],
    encoded: Iterable[bytes],
    count: int,
    preprocessing: PreprocessingConfig,
    limits: images.Limits,
) -> Images:
    """The store that fits.

    Args:
        kind: auto: decoded where that needs at most a tenth of the free disk.
        encoded: Encoded images.
        count: How many they are, for `auto`.
        preprocessing: How they become pixels.
        limits: Of bytes and pixels of one image.
    """
    if kind == "auto":
        needed = count * int(np.prod(preprocessing.shape_hwc))
        kind = "decoded" if needed <= _MOST_OF_THE_DISK * _free_bytes() else "encoded"
    return (DecodedStore if kind == "decoded" else EncodedStore)(encoded, preprocessing, limits)


def _free_bytes() -> Any:
    return shutil.disk_usage(tempfile.gettempdir()).free
