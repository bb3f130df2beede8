"""The teacher's stored answers: how few bytes hold them, and how a worker finds them again.

A softmax does not see a shift, so logits are kept below the image's largest; of many classes only the largest are kept.
Written by soft_labels.py. Axes: N images, M crops of each, K classes, J classes kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import logsumexp, softmax

from pu_ray import lake, ledger, schema
from pu_ray.distill.crops import CROP_NUMBERS, Crops
from pu_ray.distill.store import RecordFile, Rows
from pu_ray.storage import Storage

FOLDER = "soft_labels"
LABELED = "labeled images"  # as a shard
_MOST_WHOLE = 64  # up to so many classes every logit is kept
_KEPT = 32  # of more classes


# -- storing logits ----------------------------------------------------------------------------------------


def kept_classes(classes: int) -> int:
    """How many of an image's logits are stored: all of few classes, the largest of many."""
    return classes if classes <= _MOST_WHOLE else _KEPT


def compress(logits_NK: Any) -> tuple[Any, Any, Any]:
    """The largest logits as float16, and what the others add up to.

    Logits are stored below the image's largest, where float16 is finest; a softmax does not see the difference.

    Returns:
        Logits float16 [N, J], their classes int16 or int32 [N, J] (largest first; in class order where J = K), and the
        log of the summed exponentials of the rest, float16 [N], minus infinity where there is none.
    """
    logits = np.asarray(logits_NK, np.float32)
    logits = logits - logits.max(axis=1, keepdims=True)
    count, classes = logits.shape
    kept = kept_classes(classes)
    if kept == classes:
        every = np.broadcast_to(np.arange(classes, dtype=np.int32), logits.shape)
        return logits.astype(np.float16), every, np.full(count, -np.inf, np.float16)
    order = np.argsort(-logits, axis=1, kind="stable")
    chosen, rest = order[:, :kept], order[:, kept:]
    left = logsumexp(np.take_along_axis(logits, rest, axis=1), axis=1)
    return (
        np.take_along_axis(logits, chosen, axis=1).astype(np.float16),
        chosen.astype(np.int32),
        left.astype(np.float16),
    )


def expand(values_NJ: Any, classes_NJ: Any, rest_N: Any, classes: int) -> Any:
    """Logits float32 [N, K] again; what was left out shares its probability evenly (FKD's marginal smoothing)."""
    count, kept = values_NJ.shape
    logits = np.empty((count, classes), np.float32)
    if kept < classes:
        logits[:] = (rest_N.astype(np.float32) - np.log(classes - kept))[:, None]
    np.put_along_axis(logits, classes_NJ.astype(np.int64), values_NJ.astype(np.float32), axis=1)
    return logits


# -- what a worker reads -----------------------------------------------------------------------------------


class SoftLabels:
    """Stored answers for one worker's images, in a file on its disk.

    Args:
        parts: (crops [N, M, 5], logits [N, M, J], classes [N, M, J], rest [N, M]) in the order of the images.
        classes: K.
    """

    def __init__(self, parts: Iterator[Sequence[Any]], classes: int) -> None:
        self._classes = classes
        self._record = np.dtype([])
        self._records = RecordFile(self._packed(parts))

    def _packed(self, parts: Iterator[Sequence[Any]]) -> Iterator[bytes]:
        for part in parts:
            names = ("crops", "logits", "classes", "rest")
            self._record = np.dtype(
                [(name, array.dtype, array.shape[1:]) for name, array in zip(names, part, strict=True)]
            )
            rows = np.empty(len(part[0]), self._record)
            for name, array in zip(names, part, strict=True):
                rows[name] = array
            for row in rows:
                yield row.tobytes()

    def __len__(self) -> int:
        return len(self._records)

    def take(self, rows: Rows, visits: Rows) -> tuple[Crops, Any]:
        """Crops int16 [N, 5] and the teacher's logits float32 [N, K] for these visits of these images.

        The crops of an image take turns: visit v gets crop v modulo M.
        """
        found = np.frombuffer(b"".join(self._records[int(row)] for row in rows), self._record)
        turn = visits % found["rest"].shape[1]
        place = np.arange(len(rows))
        logits, classes, rest = (found[name][place, turn] for name in ("logits", "classes", "rest"))
        return found["crops"][place, turn], expand(logits, classes, rest, self._classes)

    def mean_probabilities(self, rows: Rows) -> Any:
        """The teacher's probabilities, mean over an image's crops, float64 [N, K]."""
        found = np.frombuffer(b"".join(self._records[int(row)] for row in rows), self._record)
        count, crops = found["rest"].shape
        values, kept = (found[name].reshape(count * crops, -1) for name in ("logits", "classes"))
        logits = expand(values, kept, found["rest"].reshape(-1), self._classes)
        return softmax(logits.astype(np.float64), axis=1).reshape(count, crops, -1).mean(axis=1)


def mined_labels(storage: Storage, rank: int, world: int) -> Iterator[Sequence[Any]]:
    """What is stored for one worker's mined images, in the order in which `data.mined_images` streams them."""
    mined, folder = storage.child("mined"), storage.child(FOLDER)
    by_shard = _files_by_shard(folder)
    for file in ledger.data_files(mined):
        order = mined.read_table(file, [schema.ORDER])[schema.ORDER].to_numpy()
        mine = order % world == rank
        if mine.any():
            yield [part[mine] for part in _arrays(folder, by_shard[file])]


def labeled_labels(storage: Storage, rows: Sequence[int]) -> Iterator[Sequence[Any]]:
    """What is stored for these rows of the labeled images that teach, as `data.taught_images` orders them."""
    folder = storage.child(FOLDER)
    if len(rows):
        yield [part[list(rows)] for part in _arrays(folder, _files_by_shard(folder)[LABELED])]


def _files_by_shard(folder: Storage) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for entry in ledger.read_index(folder).to_pylist():
        files.setdefault(entry["shard"], []).append(entry["file"])
    return files


def _arrays(folder: Storage, files: Sequence[str]) -> list[Any]:
    return arrays_of(pa.concat_tables([folder.read_table(file) for file in files]).sort_by(schema.ROW))


def arrays_of(table: pa.Table) -> list[Any]:
    """Crops int16 [N, M, 5], logits float16 [N, M, J], their classes int32 [N, M, J] and the rest float16 [N, M]."""
    count, crops = table.num_rows, table.schema.field(schema.REST).type.list_size
    shapes = {
        schema.CROPS: (crops, CROP_NUMBERS),
        schema.LOGITS: (crops, -1),
        schema.KEPT: (crops, -1),
        schema.REST: (crops,),
    }
    return [lake.to_matrix(table[name]).reshape(count, *shape) for name, shape in shapes.items()]
