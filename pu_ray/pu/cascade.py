"""Stage `cascade`: a gate on the teacher's early stages, so that far negatives are spared the rest of it.

Most of a lake is far from the teacher's classes, and early features tell: a small head on them ranks positives against
a sample of the lake. Its threshold lies below the validated positives by a margin, so that only what is far from all
of them is rejected. What it loses all the same is measured on the calibration positives, and the recall promise
counts those losses (pu/fit.py), so that a careless gate costs images but never the truth of a promise.

Writes `cascade/`: gate.onnx and labeled.parquet (margin of each labeled image).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pu_ray import embedding, engine, lake, lake_pass, models, schema
from pu_ray.config import JobConfig, OptimizerConfig, ScorerConfig
from pu_ray.errors import DataError
from pu_ray.lake import Shard
from pu_ray.lake_pass import Unit
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.pu import risk, scorers, training
from pu_ray.storage import Storage

FOLDER = "cascade"
MARGIN = "margin"
# Each training positive is seen at places around its own as well, or the gate would learn where a few hundred lay.
_SHIFTED_COPIES = 8
_MOST_TRAINING_POSITIVES = 4096
_SHIFT_SHARE = 1 / 14
_READERS = 4
_RESERVE = 1.25
# A gate is a small head on few features: no attention, and no more passes than it needs to converge.
_FIT = ScorerConfig(
    attention=False, hidden=64, epochs=20, batch_size=256, optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.1)
)


def gate_threshold(positive_logits: Any, recall: float, margin: float) -> float:
    """Least logit that passes.

    Args:
        positive_logits: Of positives that the gate was not trained on, float [n].
        recall: Share of them that must pass.
        margin: How far the threshold lies below the weakest of those, in units of that one's distance to the median.
    """
    ordered = np.sort(np.asarray(positive_logits, np.float64))
    weakest = ordered[max(0, math.floor((1 - recall) * (len(ordered) + 1) + 1e-9) - 1)]
    return float(weakest - margin * (np.median(ordered) - weakest))


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Fit the gate and publish it.

    Raises:
        ConfigError: The network leaves nothing to spare.
        DataError: Too few labeled or lake images.
    """
    publication = Publication("cascade", identity, inputs, config.seed)
    settings, preprocessing = config.features, config.teacher.preprocessing
    teacher, classes = models.load_teacher(config.teacher)
    staged = models.Normalised(models.StagedTeacher(teacher, settings.cascade_stages), preprocessing).eval()
    labeled = lake.read_labeled(config.labeled.uri, classes)
    roles = training.assign_roles(labeled.ids, labeled.labels, config.scorer.split, config.seed)
    labeled_pixels = labeled.pixels(preprocessing, config.labeled.uri)
    positive = _gate_inputs(staged, labeled_pixels)
    shards = lake.list_shards(config.lake, progress.found)
    units = lake_pass.sample_units(config, shards, settings.cascade_sample)
    pixels = _decoded(config, units, set(labeled.ids))
    if min(len(pixels) // 2, roles.count("train"), roles.count("validate")) < 10:
        raise DataError(
            "too few images to fit the cascade's gate on",
            slug="too-few-images-for-cascade",
            where="features.cascade",
            allowed="20 usable lake images, 10 labeled images to train on and 10 to validate",
            got=f"{len(pixels)}, {roles.count('train')} and {roles.count('validate')}",
            hint="label more images, or set features.cascade to false",
        )
    streams = training.streams_of(positive, _gate_inputs(staged, pixels), roles)
    shifted = _shifted(labeled_pixels[[role == "train" for role in roles]], config.seed)
    streams = replace(streams, positive_train=torch.cat([streams.positive_train, _gate_inputs(staged, shifted)]))
    torch.manual_seed(config.seed)
    head = scorers.Head(positive.shape[1], _FIT.attention, _FIT.hidden)
    head.standardise_like(streams.unlabeled_train)
    fitted = training.fit_scorer(head, streams, risk.positive_versus_unlabeled, _FIT, config.seed, progress)
    threshold = gate_threshold(
        training.scores_of(head, streams.positive_validate), settings.cascade_recall, settings.cascade_margin
    )
    margins = training.scores_of(head, positive) - np.float32(threshold)
    passing = float((training.scores_of(head, streams.unlabeled_validate) >= threshold).mean())

    target = storage.child(FOLDER)
    target.delete()
    example = torch.randn(2, positive.shape[1], generator=torch.Generator().manual_seed(0))
    graph = engine.to_onnx(head.eval(), example, input_name="features", output_names=["scores"])
    target.write_bytes(embedding.GATE_FILE, graph)
    table = {schema.SAMPLE_ID: pa.array(labeled.ids, schema.SAMPLE_ID_TYPE), MARGIN: pa.array(margins, pa.float32())}
    target.write_table("labeled.parquet", pa.table(table))
    calibrate = np.array([role == "calibrate" for role in roles])
    return publication.publish(
        target,
        counts={
            "labeled": len(labeled),
            "unlabeled": len(pixels),
            "calibrate": int(calibrate.sum()),
            "calibrate_lost": int((margins[calibrate] < 0).sum()),
        },
        facts={
            "stages": settings.cascade_stages,
            "threshold": threshold,
            "proxy_auc": fitted.proxy_auc,
            "passing_share": passing,
            "spied_share": _spied_share(config, shards, units),
        },
    )


def _spied_share(config: JobConfig, shards: Sequence[Shard], units: Sequence[Unit]) -> float:
    """What share of the lake is a sample for the fit, with a reserve for copies and unusable images.

    The lake's rows are reckoned by bytes from the shards of the units, which have been opened already.
    """
    opened = {unit.shard.path: unit.shard.size_bytes for unit in units}
    rows = sum(unit.rows for unit in lake_pass.lake_units(config, shards, list({u.shard for u in units})))
    lake_rows = rows * sum(shard.size_bytes for shard in shards) / max(1, sum(opened.values()))
    return min(1.0, _RESERVE * config.scorer.unlabeled_sample / max(lake_rows, 1.0))


def _gate_inputs(staged: models.Normalised, pixels: Any) -> torch.Tensor:
    """What the gate sees of the early stages, float32 [N, G]."""
    with torch.inference_mode():
        parts = [
            staged(torch.from_numpy(pixels[start : start + 256]))[1].clone() for start in range(0, len(pixels), 256)
        ]
    return torch.cat(parts).clone()


def _shifted(pixels: Any, seed: int) -> Any:
    """Copies at random places a little off, uint8 [M, H, W, C]; what moves in is the edge."""
    copies = max(1, min(_SHIFTED_COPIES, _MOST_TRAINING_POSITIVES // len(pixels)))
    height, width = pixels.shape[1:3]
    most = max(1, round(min(height, width) * _SHIFT_SHARE))
    padded = np.pad(pixels, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    places = np.random.default_rng(seed).integers(0, 2 * most + 1, size=(copies, len(pixels), 2))
    return np.stack(
        [
            image[top : top + height, left : left + width]
            for copy in places
            for image, (top, left) in zip(padded, copy, strict=True)
        ]
    )


def _decoded(config: JobConfig, units: list[Unit], exclude: set[bytes]) -> Any:
    """Pixels of the units' usable, distinct images, uint8 [N, H, W, C], in an order that hides the shards."""
    decode = embedding.decoder(config)
    found: dict[bytes, Any] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for table in pool.map(lambda unit: decode(unit.read()), units):
            usable = ~embedding.broken_rows(table)
            pixels = embedding.usable_pixels(table, ~usable, config.teacher.preprocessing.shape_hwc)
            samples = np.array(table[schema.SAMPLE_ID].to_pylist(), object)[usable]
            found.update(
                (sample, image) for sample, image in zip(samples, pixels, strict=True) if sample not in exclude
            )
    order = sorted(found, key=lambda sample: training.rank(sample, config.seed))[: config.features.cascade_sample]
    return np.stack([found[sample] for sample in order]) if order else np.empty((0,), np.uint8)
