"""Stage `score`: one PU logit for every image of the lake (paper, section 3.1).

With a frozen scorer this reads `features/` and never the lake; with a fine-tuned one it streams the lake through the
scorer and the teacher. Scoring has no randomness. Writes `scores/`: data/*.parquet, ledger/, index.parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pu_ray import config as settings_of
from pu_ray import engine, images, lake, lake_pass, ledger, manifest, schema
from pu_ray.config import JobConfig, PreprocessingConfig
from pu_ray.engine import Engine
from pu_ray.errors import ClusterError
from pu_ray.lake import Shard
from pu_ray.lake_pass import Unit
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage

FOLDER = "scores"
_SCORER_FILE = "scorer.onnx"


def answer(block: pa.Table, scores: Any, logits: Any, broken: Any) -> pa.Table:
    """Rows of `schema.scores` from a scorer's and the teacher's outputs.

    Args:
        block: Source of identity and error columns.
        scores: float [M], for the M rows that are not broken.
        logits: float [M, K] of the teacher.
        broken: bool [N]; broken rows get nulls.
    """
    usable = ~broken
    shifted = logits - logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(shifted).sum(axis=1)
    columns = [block[name].combine_chunks() for name in schema.IDENTITY_COLUMNS]
    for values, kind in ((scores, np.float32), (logits.argmax(axis=1), np.int32), (confidence, np.float32)):
        full = np.zeros(len(broken), kind)
        full[usable] = values
        columns.append(pa.array(full, mask=broken))
    return pa.table([*columns, block[schema.ERROR]], schema=schema.scores())


class FeatureScorer:
    """Loads the head once, then scores feature rows."""

    def __init__(self, scorer: Storage, batch_size: int) -> None:
        self._engine = engine.OnnxEngine(scorer.read_bytes(_SCORER_FILE))
        self._batch_size = batch_size

    def __call__(self, block: pa.Table) -> pa.Table:
        """Rows of `schema.features` to rows of `schema.scores`."""
        broken = np.array([error is not None for error in block[schema.ERROR].to_pylist()], bool)
        scores, logits = np.zeros(0, np.float32), np.zeros((0, 1), np.float32)
        if not broken.all():
            features = lake.to_matrix(block[schema.FEATURES])[~broken].astype(np.float32)
            logits = lake.to_matrix(block[schema.LOGITS])[~broken]
            (scores,) = engine.in_batches(self._engine, features, self._batch_size)
        return answer(block, scores, logits, broken)


def _open_onnx(scorer: Storage, threads: int) -> Engine:
    return engine.OnnxEngine(scorer.read_bytes(_SCORER_FILE), threads)


def _open_torch(config: JobConfig, scorer: Storage) -> Engine:
    from pu_ray import models
    from pu_ray.pu import scorers

    finetuned = scorers.new_finetuned(config)
    models.load_weights(finetuned, f"{scorer.uri}/scorer.safetensors")
    return engine.TorchEngine(scorers.with_teacher(finetuned, config), "cuda")


class PixelScorer:
    """Loads a fine-tuned scorer and the teacher once, then scores decoded rows."""

    def __init__(self, open_engine: Callable[[], Engine], preprocessing: PreprocessingConfig, batch_size: int) -> None:
        self._engine = open_engine()
        self._shape = preprocessing.shape_hwc
        self._batch_size = batch_size

    def __call__(self, block: pa.Table) -> pa.Table:
        """Rows of `schema.decoded` to rows of `schema.scores`."""
        broken = np.array([error is not None for error in block[schema.ERROR].to_pylist()], bool)
        scores, logits = np.zeros(0, np.float32), np.zeros((0, 1), np.float32)
        if not broken.all():
            pixels = lake.to_matrix(block[schema.PIXELS]).reshape(-1, *self._shape)[~broken]
            scores, logits = engine.in_batches(self._engine, pixels, self._batch_size)
        return answer(block, scores, logits, broken)


def _feature_units(features: Storage, shards: Sequence[Shard]) -> list[Unit]:
    by_path = {shard.path: shard for shard in shards}
    index = ledger.read_index(features).to_pylist()
    return [
        Unit(by_path[entry["shard"]], entry["rows"], partial(features.read_table, entry["file"]), entry["rows"] * 1024)
        for entry in index
        if entry["shard"] in by_path
    ]


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Score every shard that is not finished, and publish.

    Raises:
        DataError: An upstream artifact is missing, or the lake cannot be read.
        ClusterError: The scored rows are not the lake's rows.
    """
    publication = Publication("score", identity, inputs, config.seed)
    target, scorer, features = storage.child(FOLDER), storage.child("scorer"), storage.child("features")
    shards = lake.list_shards(config.lake)
    # The scorer's identity stands for its settings; the lake's listing is left out, see features.py.
    records = ledger.Ledger(target, settings_of.digest({"scorer": inputs["fit"]}))
    finished = records.finished(shards)
    todo = [shard for shard in shards if shard.path not in finished]
    embedded = manifest.require(features, "features")
    preprocessing = config.teacher.preprocessing
    arguments: dict[str, Any] = {"batch_size": config.features.batch_size}
    actor: type[Any] = FeatureScorer
    if config.scorer.features == "frozen":
        units, prepare = _feature_units(features, todo), None
        arguments["scorer"] = scorer
    else:
        units = lake_pass.lake_units(config.lake, todo, preprocessing)
        prepare = partial(lake.decode_table, preprocessing=preprocessing, limits=images.Limits.of(config.lake))
        threads = max(1, int(config.resources.embed.cpus))
        on_gpu = config.resources.embed.gpus > 0
        open_engine = partial(_open_torch, config, scorer) if on_gpu else partial(_open_onnx, scorer, threads)
        arguments |= {"preprocessing": preprocessing, "open_engine": open_engine}
        actor = PixelScorer
    entries = lake_pass.run(
        units,
        storage=target,
        ledger=records,
        finished=finished,
        prepare=prepare,
        actor=actor,
        actor_arguments=arguments,
        resources=config.resources,
        progress=progress,
        row_group_rows=65_536,
    )
    errors = ledger.write_index(target, entries)
    rows = sum(entry.rows for entry in entries.values())
    if rows != embedded.counts["rows"]:
        raise ClusterError(
            "scored rows are not the lake's rows",
            where=str(target),
            allowed=str(embedded.counts["rows"]),
            got=str(rows),
            hint="the lake changed between stages: run the whole job again",
        )
    return publication.publish(
        target,
        counts={
            "rows": rows,
            "errors": sum(errors.values()),
            "shards": len(shards),
            "rows_done_now": sum(entries[shard.path].rows for shard in todo if shard.path in entries),
        },
        facts={"errors": dict(errors)},
    )
