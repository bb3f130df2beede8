"""Stage `features`: one pass of the frozen teacher over the lake (paper, section 3.1: multi-scale features).

Every image is read and decoded once. What the later stages need is kept: each stage's pooled output as float16 and
the teacher's logits. Pixels are never written. Without `features.cache` only a random sample is embedded, for the
fit, and the stage `score` looks at the images itself. Writes `features/`: data/*.parquet, ledger/, index.parquet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pu_ray import config as settings_of
from pu_ray import embedding, lake, lake_pass, ledger, manifest, schema
from pu_ray.config import JobConfig
from pu_ray.lake import Shard
from pu_ray.lake_pass import Unit
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage

FOLDER = "features"
_CHECKED_IMAGES = 256
_SAMPLE_RESERVE = 1.25  # copies and unusable images drop out of a sample


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Embed every shard that is not finished, and publish.

    Raises:
        DataError: The lake or the teacher cannot be used, or too many images are broken.
        ClusterError: Rows were lost on the way.
    """
    publication = Publication("features", identity, inputs, config.seed)
    target = storage.child(FOLDER)
    shards = lake.list_shards(config.lake, progress.found)
    gate = _gate(config, storage)
    sample = None if config.features.cache else _sample(config, shards)
    records = ledger.Ledger(target, _settings(config, inputs, sample))
    wanted = shards if sample is None else list({unit.shard.path: unit.shard for unit in sample}.values())
    finished = records.finished(wanted)
    todo = [shard for shard in wanted if shard.path not in finished]
    if finished and todo:
        progress.note(f"  {len(finished)} of {len(wanted)} shards are finished already")
    checked = _check_scaled_decode(config, target, shards, inputs["teacher"]) if config.lake.scaled_decode else None
    passed = lake_pass.Passed(finished, {})
    if todo:
        units = _units(config, shards, todo, sample)
        in_task, in_actor = embedding.decode_where(config)
        cache = embedding.feature_cache(config, inputs)
        passed = lake_pass.run(
            units,
            storage=target,
            ledger=records,
            finished=finished,
            prepare=partial(embedding.find_or_decode, cache=cache, decode=in_task),
            actor=embedding.Embedder,
            actor_arguments={
                "open_engine": embedding.engine_recipe(config, target, gate, inputs["teacher"]),
                "preprocessing": config.teacher.preprocessing,
                "batch_size": embedding.batch_size(config),
                "decode": in_actor,
                "cache": cache,
                "spied_share": _spied_share(gate, sample),
            },
            resources=config.resources,
            progress=progress,
        )
    errors = ledger.write_index(target, passed.entries)
    ledger.check_error_share(errors, passed.rows, config.lake.max_error_share, config.lake.uri)
    facts: dict[str, Any] = {
        "scaled_decode": checked,
        "errors": dict(errors),
        "engine": embedding.engine_kind(config),
        "whole_lake": sample is None,
        "storage_retries": passed.weather,
    }
    counts = {
        "rows": passed.rows,
        "errors": sum(errors.values()),
        "shards": len(wanted),
        "shards_done_now": len(todo),
        "rows_done_now": passed.rows_of(todo),
    }
    if gate is not None:
        counts["spared"] = _spared(target, _spied_share(gate, sample))
    return publication.publish(target, counts=counts, facts=facts, workers=passed.workers)


def _gate(config: JobConfig, storage: Storage) -> embedding.Gate | None:
    if not config.features.cascade:
        return None
    folder = storage.child("cascade")
    return embedding.Gate.of(folder, manifest.require(folder, "features"))


def _sample(config: JobConfig, shards: list[Shard]) -> list[Unit]:
    return lake_pass.sample_units(config, shards, math.ceil(_SAMPLE_RESERVE * config.scorer.unlabeled_sample))


def _check_scaled_decode(config: JobConfig, target: Storage, shards: list[Shard], teacher: str) -> dict[str, Any]:
    units = lake_pass.sample_units(config, shards, _CHECKED_IMAGES)
    sample = pa.concat_tables(unit.read() for unit in units).slice(0, _CHECKED_IMAGES)
    network = embedding.engine_recipe(config, target, None, teacher)()
    return embedding.check_scaled_decode(config, network, sample)


def _settings(config: JobConfig, inputs: Mapping[str, str], sample: list[Unit] | None) -> str:
    """What the ledger's entries depend on; a sample's are of no use to another sample."""
    rows = embedding.row_settings(config, inputs)
    if sample is None:
        return rows
    return settings_of.digest([rows, [[unit.shard.path, unit.first_row, unit.rows] for unit in sample]])


def _units(config: JobConfig, shards: list[Shard], todo: list[Shard], sample: list[Unit] | None) -> list[Unit]:
    if sample is None:
        return lake_pass.lake_units(config, shards, todo)
    paths = {shard.path for shard in todo}
    return [unit for unit in sample if unit.shard.path in paths]


def _spied_share(gate: embedding.Gate | None, sample: list[Unit] | None) -> float:
    """A sample that is drawn for the fit is embedded as a whole."""
    if gate is None:
        return 0.0
    return gate.spied_share if sample is None else 1.0


def _spared(features: Storage, spied_share: float) -> int:
    """Images that were spared the late stages."""
    spared = 0
    for file in ledger.data_files(features):
        table = features.read_table(file, [schema.SAMPLE_ID, schema.GATE])
        rejected = pc.fill_null(pc.less(table[schema.GATE], 0), False).to_numpy()
        spared += int((rejected & ~embedding.spied(table[schema.SAMPLE_ID].to_pylist(), spied_share)).sum())
    return spared
