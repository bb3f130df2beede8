"""Stage `score`: one PU score for every image of the lake (paper, section 3.1).

A frozen scorer on cached features reads `features/` and never the lake. Without the cache, or with a fine-tuned
scorer, the lake's images go through the networks here. Scoring has no randomness. Writes `scores/`: data/*.parquet,
ledger/, index.parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pu_ray import config as settings_of
from pu_ray import embedding, engine, images, lake, lake_pass, ledger, manifest, schema
from pu_ray.config import JobConfig, PreprocessingConfig
from pu_ray.embedding import Decode, broken_rows
from pu_ray.engine import Engine
from pu_ray.errors import ClusterError
from pu_ray.lake import Shard
from pu_ray.lake_pass import Unit
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage

FOLDER = "scores"
_SCORER_FILE = "scorer.onnx"
_NEIGHBOURS_FILE = "neighbours.onnx"
_HEAD_BATCH = 1024  # feature rows are small


def answer(
    block: pa.Table, scores: Any, logits: Any, cosines: Any, broken: Any, thumbnails: pa.Array | None = None
) -> pa.Table:
    """Rows of `schema.scores` from a scorer's and the teacher's outputs.

    Args:
        block: Source of identity and error columns.
        scores: float [M], for the M rows that are not broken; minus infinity where the cascade's gate rejected.
        logits: float [M, K] of the teacher; arbitrary for rejected rows.
        cosines: float [M], with the nearest labeled image; arbitrary for rejected rows.
        broken: bool [N]; broken rows get nulls.
        thumbnails: To keep, where no feature cache does.
    """
    usable = ~broken
    scores = np.asarray(scores, np.float32)
    spared = np.isneginf(scores)
    largest = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - largest).sum(axis=1)
    log_probabilities = logits - largest - np.log(total)[:, None]
    entropy = -(np.exp(log_probabilities) * log_probabilities).sum(axis=1)
    # Of a rejected image the teacher said nothing: nobody who ranks by these must find it near the top.
    last = [schema.NO_CLASS, 0.0, -np.inf, 0.0, -1.0]
    found = [logits.argmax(axis=1), 1 / total, largest[:, 0] + np.log(total), entropy, cosines]
    kinds: list[Any] = [np.int32, *[np.float32] * 4]
    columns = [block[name].combine_chunks() for name in schema.IDENTITY_COLUMNS]
    answers: list[tuple[Any, Any]] = [(scores, np.float32)]
    answers += [(np.where(spared, none, value), kind) for none, value, kind in zip(last, found, kinds, strict=True)]
    for values, kind in answers:
        full = np.zeros(len(broken), kind)
        full[usable] = values
        columns.append(pa.array(full, mask=broken))
    if thumbnails is not None:
        columns.append(thumbnails)
    return pa.table([*columns, block[schema.ERROR]], schema=schema.scores(thumbnails is not None))


# -- the actors --------------------------------------------------------------------------------------------


class FeatureScorer:
    """Loads the head once, then scores feature rows."""

    def __init__(self, scorer: Storage, batch_size: int) -> None:
        self._head = engine.OnnxEngine(scorer.read_bytes(_SCORER_FILE))
        self._neighbours = engine.OnnxEngine(scorer.read_bytes(_NEIGHBOURS_FILE))
        self._batch_size = batch_size

    def __call__(self, block: pa.Table) -> pa.Table:
        """Rows of `schema.features` to rows of `schema.scores`."""
        broken = broken_rows(block)
        spared = pc.fill_null(pc.less(block[schema.GATE], 0), False).to_numpy()[~broken]
        logits = lake.to_matrix(block[schema.LOGITS])[~broken]
        scores = np.full(len(logits), -np.inf, np.float32)
        cosines = np.zeros(len(logits), np.float32)
        if not spared.all():
            features = lake.to_matrix(block[schema.FEATURES])[~broken][~spared].astype(np.float32)
            (scores[~spared],) = engine.in_batches(self._head, features, self._batch_size)
            (cosines[~spared],) = engine.in_batches(self._neighbours, features, self._batch_size)
        return answer(block, scores, logits, cosines, broken)


class ImageScorer:
    """Loads scorer and teacher once, then scores encoded or decoded rows.

    Args:
        open_engine: Opens the network that maps uint8 [N, H, W, C] to scores [N], logits [N, K] and cosines [N].
        preprocessing: Shape of the pixels.
        batch_size: Images of one forward pass.
        classes: K.
        decode: For encoded rows; None where they come decoded.
        thumbnails: Whether to keep them with the scores.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        preprocessing: PreprocessingConfig,
        batch_size: int,
        classes: int,
        decode: Decode | None = None,
        thumbnails: bool = False,
    ) -> None:
        self._engine = open_engine()
        self._shape = preprocessing.shape_hwc
        self._batch_size = batch_size
        self._classes = classes
        self._decode = decode
        self._thumbnails = thumbnails

    def __call__(self, block: pa.Table) -> pa.Table:
        """Rows of `schema.encoded` or `schema.decoded` to rows of `schema.scores`."""
        if self._decode is not None:
            block = self._decode(block)
        broken = broken_rows(block)
        scores, logits, cosines = (np.zeros(shape, np.float32) for shape in (0, (0, self._classes), 0))
        miniatures = np.zeros((len(broken), schema.THUMBNAIL_PX), np.uint8)
        if not broken.all():
            pixels = embedding.usable_pixels(block, broken, self._shape)
            scores, logits, cosines = engine.in_batches(self._engine, pixels, self._batch_size)
            if self._thumbnails:
                miniatures[~broken] = images.thumbnails(pixels)
        kept = lake.fixed_list(miniatures, broken) if self._thumbnails else None
        return answer(block, scores, logits, cosines, broken, kept)


# -- opening the networks on a worker ----------------------------------------------------------------------


def _open_neighbours(scorer: Storage) -> Engine:
    return engine.OnnxEngine(scorer.read_bytes(_NEIGHBOURS_FILE))


def _open_head(open_teacher: Callable[[], Engine], scorer: Storage) -> Engine:
    head = engine.OnnxEngine(scorer.read_bytes(_SCORER_FILE))
    return engine.Scorer(open_teacher(), head, _open_neighbours(scorer))


def _open_finetuned_onnx(scorer: Storage, threads: int) -> Engine:
    network = engine.OnnxEngine(scorer.read_bytes(_SCORER_FILE), threads)
    return engine.FinetunedScorer(network, _open_neighbours(scorer))


def _open_finetuned_torch(config: JobConfig, scorer: Storage) -> Engine:
    from pu_ray import models
    from pu_ray.pu import scorers

    finetuned = scorers.new_finetuned(config)
    models.load_weights(finetuned, f"{scorer.uri}/scorer.safetensors")
    network = engine.TorchEngine(scorers.with_teacher(finetuned, config), "cuda", config.features.compile)
    return engine.FinetunedScorer(network, _open_neighbours(scorer))


def _image_engine(config: JobConfig, storage: Storage, teacher_content: str) -> Callable[[], Engine]:
    """A picklable recipe for the networks that look at images."""
    scorer = storage.child("scorer")
    if config.scorer.features == "finetuned":
        if config.resources.embed.gpus > 0:
            return partial(_open_finetuned_torch, config, scorer)
        return partial(_open_finetuned_onnx, scorer, max(1, int(config.resources.embed.cpus)))
    gate = None
    if config.features.cascade:
        cascade = storage.child("cascade")
        gate = embedding.Gate.of(cascade, manifest.require(cascade, "features"))
    open_teacher = embedding.engine_recipe(config, storage.child("features"), gate, teacher_content)
    return partial(_open_head, open_teacher, scorer)


# -- the stage ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What goes through the pass, and what the actors do with it."""

    units: list[Unit]
    prepare: Decode | None
    actor: type[Any]
    arguments: dict[str, Any]


def _from_features(config: JobConfig, storage: Storage, todo: Sequence[Shard]) -> _Work:
    features = storage.child("features")
    by_path = {shard.path: shard for shard in todo}
    units = [
        Unit(
            by_path[entry["shard"]], 0, entry["rows"], partial(features.read_table, entry["file"]), entry["rows"] * 1024
        )
        for entry in ledger.read_index(features).to_pylist()
        if entry["shard"] in by_path
    ]
    arguments = {"scorer": storage.child("scorer"), "batch_size": _HEAD_BATCH}
    return _Work(units, None, FeatureScorer, arguments)


def _from_images(
    config: JobConfig,
    storage: Storage,
    shards: Sequence[Shard],
    todo: Sequence[Shard],
    classes: int,
    teacher_content: str,
) -> _Work:
    in_task, in_actor = embedding.decode_where(config)
    arguments = {
        "open_engine": _image_engine(config, storage, teacher_content),
        "preprocessing": config.teacher.preprocessing,
        "batch_size": embedding.batch_size(config),
        "classes": classes,
        "decode": in_actor,
        "thumbnails": not config.features.cache,
    }
    return _Work(lake_pass.lake_units(config, shards, todo), in_task, ImageScorer, arguments)


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Score every shard that is not finished, and publish.

    Raises:
        DataError: An upstream artifact is missing, the lake cannot be read, or too many images are broken.
        ClusterError: The scored rows are not the lake's rows.
    """
    publication = Publication("score", identity, inputs, config.seed)
    target = storage.child(FOLDER)
    shards = lake.list_shards(config.lake, progress.found)
    embedded = manifest.require(storage.child("features"), "features")
    fitted = manifest.require(storage.child("scorer"), "fit")
    # The scorer's identity stands for its settings; the lake's listing is left out, see embedding.row_settings.
    records = ledger.Ledger(
        target,
        settings_of.digest({"scorer": inputs["fit"], "rows": embedding.row_settings(config, inputs)}),
    )
    finished = records.finished(shards)
    todo = [shard for shard in shards if shard.path not in finished]
    passed = lake_pass.Passed(finished, {})
    if todo:
        cached = config.features.cache and config.scorer.features == "frozen"
        work = (
            _from_features(config, storage, todo)
            if cached
            else _from_images(config, storage, shards, todo, len(fitted.facts["classes"]), inputs["teacher"])
        )
        passed = lake_pass.run(
            work.units,
            storage=target,
            ledger=records,
            finished=finished,
            prepare=work.prepare,
            actor=work.actor,
            actor_arguments=work.arguments,
            resources=config.resources,
            progress=progress,
            row_group_rows=65_536,
        )
    errors = ledger.write_index(target, passed.entries)
    if config.features.cache and passed.rows != embedded.counts["rows"]:
        raise ClusterError(
            "scored rows are not the lake's rows",
            slug="scores-do-not-match-lake",
            where=str(target),
            allowed=str(embedded.counts["rows"]),
            got=str(passed.rows),
            hint="the lake changed between stages: run the whole job again",
        )
    ledger.check_error_share(errors, passed.rows, config.lake.max_error_share, config.lake.uri)
    return publication.publish(
        target,
        counts={
            "rows": passed.rows,
            "errors": sum(errors.values()),
            "shards": len(shards),
            "shards_done_now": len(todo),
            "rows_done_now": passed.rows_of(todo),
        },
        facts={"errors": dict(errors), "storage_retries": passed.weather},
        workers=passed.workers,
    )
