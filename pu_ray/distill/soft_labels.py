"""Stage `soft_labels`: the teacher's answers for a few stored crops of every image, so that no epoch pays for it.

As in FKD (Shen and Xing 2022), a crop is drawn once, kept as numbers with what the teacher says of it, and cut again
whenever the student sees it. Written by one pass over `mined/` and the labeled images that teach; exists when
`distill.soft_labels` is `cached`. Writes `soft_labels/`: data/*.parquet as `schema.soft_labels`, ledger/, index.

Axes: N images, M crops of each, K classes, J classes kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import logsumexp, softmax

from pu_ray import config as settings_of
from pu_ray import embedding, engine, lake, lake_pass, ledger, manifest, models, schema
from pu_ray.config import AugmentConfig, JobConfig
from pu_ray.distill import crops as cropping
from pu_ray.distill import data
from pu_ray.distill.crops import CROP_NUMBERS, Crops
from pu_ray.distill.store import RecordFile, Rows
from pu_ray.engine import Engine
from pu_ray.errors import DataError
from pu_ray.lake import Shard
from pu_ray.lake_pass import Unit
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage

FOLDER = "soft_labels"
_LABELED = "labeled images"  # as a shard
_MOST_WHOLE = 64  # up to so many classes every logit is kept
_KEPT = 32  # of more classes
_ROW_GROUP_ROWS = 4096
_UNIT_ROWS = 1024


# -- pure functions ----------------------------------------------------------------------------------------


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


def crops_of(sample: bytes, count: int, shape_hw: tuple[int, int], augment: AugmentConfig, seed: int) -> Crops:
    """The stored crops of one image, int16 [M, 5]: a function of its content and the seed, wherever it lies."""
    return cropping.draw(count, shape_hw, augment, np.random.default_rng([seed, 4, *sample]))


# -- the actor ---------------------------------------------------------------------------------------------


class SoftLabeller:
    """Loads the teacher once, then answers for the crops of every image.

    Args:
        open_engine: Opens the network that maps uint8 [N, H, W, C] to features and logits [N, K].
        config: The job.
        decode: For encoded rows; None where they come decoded.
    """

    def __init__(self, open_engine: Callable[[], Engine], config: JobConfig, decode: embedding.Decode | None) -> None:
        self._engine = open_engine()
        self._config = config
        self._decode = decode

    def __call__(self, block: pa.Table) -> pa.Table:
        """Rows of `schema.encoded` or `schema.decoded` to rows of `schema.soft_labels`.

        Raises:
            DataError: An image that was usable when it was mined no longer is.
        """
        if self._decode is not None:
            block = self._decode(block)
        broken = embedding.broken_rows(block)
        if broken.any():
            first = int(np.flatnonzero(broken)[0])
            raise DataError(
                "a chosen image cannot be decoded",
                where=str(block[schema.NAME][first].as_py() or block[schema.SHARD][first].as_py()),
                got=str(block[schema.ERROR][first].as_py()),
                hint="run the whole job again; images that cannot be used are left out of the choice",
            )
        settings, seed = self._config.distill, self._config.seed
        pixels = embedding.usable_pixels(block, broken, self._config.teacher.preprocessing.shape_hwc)
        samples = block[schema.SAMPLE_ID].to_pylist()
        shape = pixels.shape[1:3]
        crops = np.stack([crops_of(sample, settings.crops, shape, settings.augment, seed) for sample in samples])
        answers = []
        for number in range(settings.crops):
            seen = cropping.cut(pixels, crops[:, number])
            answers.append(engine.in_batches(self._engine, seen, embedding.batch_size(self._config))[1])
        logits = np.stack(answers, axis=1)
        values, classes, rest = compress(logits.reshape(-1, logits.shape[2]))
        none = np.zeros(len(samples), bool)
        rows = len(samples)
        columns = [block[name].combine_chunks() for name in schema.IDENTITY_COLUMNS]
        columns += [lake.fixed_list(part.reshape(rows, -1), none) for part in (crops, values, classes, rest)]
        return pa.table(columns, schema=schema.soft_labels(settings.crops, values.shape[1]))


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
        yield [part[list(rows)] for part in _arrays(folder, _files_by_shard(folder)[_LABELED])]


def _files_by_shard(folder: Storage) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for entry in ledger.read_index(folder).to_pylist():
        files.setdefault(entry["shard"], []).append(entry["file"])
    return files


def _arrays(folder: Storage, files: Sequence[str]) -> list[Any]:
    return _arrays_of(pa.concat_tables([folder.read_table(file) for file in files]).sort_by(schema.ROW))


def _arrays_of(table: pa.Table) -> list[Any]:
    count, crops = table.num_rows, table.schema.field(schema.REST).type.list_size
    shapes = {
        schema.CROPS: (crops, CROP_NUMBERS),
        schema.LOGITS: (crops, -1),
        schema.KEPT: (crops, -1),
        schema.REST: (crops,),
    }
    return [lake.to_matrix(table[name]).reshape(count, *shape) for name, shape in shapes.items()]


# -- the stage ---------------------------------------------------------------------------------------------


def _read_mined(mined: Storage, file: str, first: int, rows: int) -> pa.Table:
    """Rows of `schema.encoded` from one file of the mined images; the file is the shard, and rows count within it."""
    table = mined.read_table(file, [schema.SAMPLE_ID, schema.NAME, schema.BYTES]).slice(first, rows)
    return _as_encoded(table, file, first)


def _read_labeled(config: JobConfig, storage: Storage, classes: Sequence[str]) -> pa.Table:
    images = data.taught_images(lake.read_labeled(config.labeled.uri, classes), storage.child("scorer"))
    columns = {schema.SAMPLE_ID: images.ids, schema.NAME: images.names, schema.BYTES: images.encoded}
    types = (schema.SAMPLE_ID_TYPE, pa.string(), pa.large_binary())
    arrays = [pa.array(values, kind) for values, kind in zip(columns.values(), types, strict=True)]
    return _as_encoded(pa.table(arrays, names=list(columns)), _LABELED, 0)


def _as_encoded(table: pa.Table, shard: str, first: int) -> pa.Table:
    rows = table.num_rows
    columns = {
        schema.SAMPLE_ID: table[schema.SAMPLE_ID],
        schema.SHARD: pa.array([shard] * rows, pa.string()),
        schema.ROW: pa.array(range(first, first + rows), pa.int64()),
        schema.NAME: table[schema.NAME],
        schema.BYTES: table[schema.BYTES],
        schema.ERROR: pa.nulls(rows, pa.string()),
    }
    return pa.table(columns, schema=schema.encoded())


def _units(config: JobConfig, storage: Storage, classes: Sequence[str], taught: int) -> list[Unit]:
    mined = storage.child("mined")
    pixel_bytes = int(np.prod(config.teacher.preprocessing.shape_hwc))
    units = []
    for entry in ledger.read_index(mined).to_pylist():
        shard = Shard(entry["file"], "parquet", entry["fingerprint"], 0)
        for first in range(0, entry["rows"], _UNIT_ROWS):
            rows = min(_UNIT_ROWS, entry["rows"] - first)
            read = partial(_read_mined, mined, entry["file"], first, rows)
            units.append(Unit(shard, first, rows, read, rows * pixel_bytes))
    read_labeled = partial(_read_labeled, config, storage, classes)
    units.append(Unit(Shard(_LABELED, "folder", "labeled", 0), 0, taught, read_labeled, taught * pixel_bytes))
    return units


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Ask the teacher once, and publish.

    Raises:
        DataError: An upstream artifact is missing, or an image has changed.
        ClusterError: Rows were lost on the way.
    """
    publication = Publication("soft_labels", identity, inputs, config.seed)
    target = storage.child(FOLDER)
    manifest.require(storage.child("mined"), "select")
    fitted = manifest.require(storage.child("scorer"), "fit")
    classes = models.read_classes(config.teacher.classes)
    taught = fitted.counts["labeled_train"] + fitted.counts["labeled_calibrate"]
    units = _units(config, storage, classes, taught)
    records = ledger.Ledger(target, settings_of.digest({"soft_labels": identity}))
    shards = {unit.shard.path: unit.shard for unit in units}
    finished = records.finished(shards.values())
    in_task, in_actor = embedding.decode_where(config)
    passed = lake_pass.run(
        [unit for unit in units if unit.shard.path not in finished],
        storage=target,
        ledger=records,
        finished=finished,
        prepare=in_task,
        actor=SoftLabeller,
        actor_arguments={
            "open_engine": embedding.engine_recipe(config, storage.child("features"), None, inputs["teacher"]),
            "config": config,
            "decode": in_actor,
        },
        resources=config.resources,
        progress=progress,
        row_group_rows=_ROW_GROUP_ROWS,
    )
    ledger.write_index(target, passed.entries)
    return publication.publish(
        target,
        counts={"images": passed.rows, "crops": passed.rows * config.distill.crops},
        facts={"kept_classes": kept_classes(len(classes)), "storage_retries": passed.weather},
    )
