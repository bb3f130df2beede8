"""Stage `soft_labels`: the teacher's answers for a few stored crops of every image, so that no epoch pays for it.

As in FKD (Shen and Xing 2022), a crop is drawn once, kept as numbers with what the teacher says of it, and cut again
whenever the student sees it. Written by one pass over `mined/` and the labeled images that teach; exists when
`distill.soft_labels` is `cached`. Writes `soft_labels/`: data/*.parquet as `schema.soft_labels`, ledger/ and the index.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from pu_ray import config as settings_of
from pu_ray import embedding, engine, lake, lake_pass, ledger, manifest, models, schema
from pu_ray.config import AugmentConfig, JobConfig
from pu_ray.distill import answers, data
from pu_ray.distill import crops as cropping
from pu_ray.distill.answers import FOLDER, LABELED
from pu_ray.distill.crops import Crops
from pu_ray.engine import Engine
from pu_ray.errors import DataError
from pu_ray.lake import Shard
from pu_ray.lake_pass import Unit
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage

_ROW_GROUP_ROWS = 4096
_UNIT_ROWS = 1024


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
                slug="chosen-image-unusable",
                where=str(block[schema.NAME][first].as_py() or block[schema.SHARD][first].as_py()),
                got=str(block[schema.ERROR][first].as_py()),
                hint="run the whole job again; images that cannot be used are left out of the choice",
            )
        settings, seed = self._config.distill, self._config.seed
        pixels = embedding.usable_pixels(block, broken, self._config.teacher.preprocessing.shape_hwc)
        samples = block[schema.SAMPLE_ID].to_pylist()
        shape = pixels.shape[1:3]
        crops = np.stack([crops_of(sample, settings.crops, shape, settings.augment, seed) for sample in samples])
        said = []
        for number in range(settings.crops):
            seen = cropping.cut(pixels, crops[:, number])
            said.append(engine.in_batches(self._engine, seen, embedding.batch_size(self._config))[1])
        logits = np.stack(said, axis=1)
        values, classes, rest = answers.compress(logits.reshape(-1, logits.shape[2]))
        none = np.zeros(len(samples), bool)
        rows = len(samples)
        columns = [block[name].combine_chunks() for name in schema.IDENTITY_COLUMNS]
        columns += [lake.fixed_list(part.reshape(rows, -1), none) for part in (crops, values, classes, rest)]
        return pa.table(columns, schema=schema.soft_labels(settings.crops, values.shape[1]))


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
    return _as_encoded(pa.table(arrays, names=list(columns)), LABELED, 0)


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
    units.append(Unit(Shard(LABELED, "folder", "labeled", 0), 0, taught, read_labeled, taught * pixel_bytes))
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
        facts={"kept_classes": answers.kept_classes(len(classes)), "storage_retries": passed.weather},
        workers=passed.workers,
    )
