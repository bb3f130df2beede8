"""Stage `fit`: learn the PU scorer from labeled positives and a sample of the lake (paper, section 3.1).

The labeled images are shared out once: for training, for choosing the epoch, and for the promises; a calibration image
does nothing else. How the scorer learns is in training.py. Behind a cascade it learns on the same random sample as
without (embedding.spied), and a calibration positive that the gate rejects counts as lost.

Writes `scorer/`: scorer.safetensors, scorer.onnx, labeled.parquet (who plays which role), calibration.parquet
(scores of calibration positives) and unlabeled.parquet (scores of held-out lake images).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from pu_ray import embedding, engine, lake, ledger, manifest, models, schema
from pu_ray.config import JobConfig, ScorerConfig
from pu_ray.errors import DataError
from pu_ray.lake import LabeledImages
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.pu import risk, scorers, threshold
from pu_ray.pu.prior import Prior, estimate_prior
from pu_ray.pu.training import ROLES, Fitted, Streams, assign_roles, fit_scorer, rank, scores_of, streams_of
from pu_ray.storage import Storage

# Files are drawn at random until they hold this many times the sample, so that a large lake is not read whole.
_OVERSAMPLING = 4


# -- the stage ---------------------------------------------------------------------------------------------


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Fit the scorer and publish it.

    Raises:
        DataError: Too few labeled images for the split or for the recall promise.
    """
    publication = Publication("fit", identity, inputs, config.seed)
    settings = config.scorer
    teacher, classes = models.load_teacher(config.teacher)
    labeled = lake.read_labeled(config.labeled.uri, classes)
    roles = assign_roles(labeled.ids, labeled.labels, settings.split, config.seed)
    _require_enough(roles, config)

    pixels = torch.from_numpy(labeled.pixels(config.teacher.preprocessing, config.labeled.uri))
    normalised = models.Normalised(teacher, config.teacher.preprocessing).eval()
    features_storage = storage.child("features")
    sample = draw_unlabeled(
        features_storage,
        settings.unlabeled_sample,
        config.seed,
        exclude=set(labeled.ids),
        spied_share=_spied_share(config, storage),
    )
    if sample.num_rows < 20:
        raise DataError(
            "the lake is too small to learn from",
            where=config.lake.uri,
            allowed="20 usable images or more",
            got=str(sample.num_rows),
        )
    frozen = streams_of(
        _features_of(normalised, pixels),
        torch.from_numpy(lake.to_matrix(sample[schema.FEATURES]).astype(np.float32)),
        roles,
    )

    torch.manual_seed(config.seed)
    ranking = _ranking_head(config, frozen, progress)
    prior, prior_source = _prior(config, ranking.module, frozen)
    if settings.features == "finetuned":
        streams = streams_of(pixels, _lake_pixels(config, sample), roles)
        module: nn.Module = scorers.new_finetuned(config).to("cuda" if torch.cuda.is_available() else "cpu")
        fitted = _fit(module, streams, config, prior, progress)
    elif settings.kind == "nnpu":
        # Started from random weights, non-negative PU stops at whichever optimum is near; from a good ranking it
        # mends that ranking (docs/LOG.md).
        streams = frozen
        fitted = _fit(ranking.module, streams, config, prior, progress)
    else:
        streams, fitted = frozen, ranking

    target = storage.child("scorer")
    target.delete()
    calibration = scores_of(fitted.module, streams.positive_calibrate)
    calibration[~_passed_gate(config, storage, labeled)[[role == "calibrate" for role in roles]]] = -np.inf
    held_out = scores_of(fitted.module, streams.unlabeled_validate)
    _write(target, config, fitted.module, frozen.positive_train.shape[1])
    _write_tables(target, labeled, roles, calibration, held_out)
    return publication.publish(
        target,
        counts={f"labeled_{role}": roles.count(role) for role in ROLES}
        | {"unlabeled": sample.num_rows, "labeled": len(labeled)},
        facts={
            "kind": settings.kind,
            "features": settings.features,
            "prior": asdict(prior) | {"source": prior_source},
            "lake_rows": manifest.require(features_storage, "features").counts["rows"],
            "epoch": fitted.epoch,
            "proxy_auc": fitted.proxy_auc,
            "curve": fitted.curve,
            "classes": classes,
        },
    )


def _require_enough(roles: list[str], config: JobConfig) -> None:
    counts = {role: roles.count(role) for role in ROLES}
    needed = dict.fromkeys(ROLES, 10)
    if config.selection.rule == "recall":
        fewest = threshold.fewest_positives(config.selection.recall, config.selection.confidence)
        needed["calibrate"] = max(needed["calibrate"], fewest)
    short = [role for role in ROLES if counts[role] < needed[role]]
    if short:
        raise DataError(
            f"too few labeled images for {' and '.join(short)}",
            where=config.labeled.uri,
            allowed=", ".join(f"{role} >= {needed[role]}" for role in ROLES),
            got=", ".join(f"{role} {counts[role]}" for role in ROLES),
            hint="label more images, change scorer.split, or lower selection.recall or selection.confidence",
        )


def draw_unlabeled(features: Storage, count: int, seed: int, exclude: set[bytes], spied_share: float = 1.0) -> pa.Table:
    """A random sample of the lake's usable, distinct images, the same whatever order the lake was read in.

    Args:
        features: The artifact.
        count: Most rows.
        seed: Of the choice.
        exclude: Contents that are never drawn.
        spied_share: Behind a gate, only this share of the images has features whatever the gate says.

    Returns:
        Rows of `schema.features`, at most `count`, in random order.

    Raises:
        DataError: There is none.
    """
    index = ledger.read_index(features).to_pylist()
    index.sort(key=lambda entry: rank(entry["file"].encode(), seed))
    candidates: dict[bytes, tuple[bytes, str, int]] = {}
    rows = 0.0
    for entry in index:
        if rows >= _OVERSAMPLING * count:
            break
        table = features.read_table(entry["file"], [schema.SAMPLE_ID, schema.ERROR])
        rows += table.num_rows * spied_share
        samples = table[schema.SAMPLE_ID].to_pylist()
        usable = embedding.spied(samples, spied_share) & table[schema.ERROR].is_null().to_numpy()
        for position in np.flatnonzero(usable).tolist():
            sample = samples[position]
            if sample not in exclude and sample not in candidates:
                candidates[sample] = (rank(sample, seed), entry["file"], position)
    chosen = sorted(candidates.values())[:count]
    by_file: dict[str, list[tuple[bytes, int]]] = {}
    for place, file, position in chosen:
        by_file.setdefault(file, []).append((place, position))
    parts, ranks = [], []
    for file, places in by_file.items():
        parts.append(features.read_table(file).take(pa.array([position for _, position in places])))
        ranks += [place for place, _ in places]
    if not parts:
        raise DataError("the lake holds no usable image", where=str(features))
    return pa.concat_tables(parts).take(pa.array(sorted(range(len(ranks)), key=ranks.__getitem__)))


def _spied_share(config: JobConfig, storage: Storage) -> float:
    """Without a cascade, and in a sample drawn for the fit, every image has features."""
    if not (config.features.cascade and config.features.cache):
        return 1.0
    folder = storage.child("cascade")
    return embedding.Gate.of(folder, manifest.require(folder, "features")).spied_share


def _passed_gate(config: JobConfig, storage: Storage, labeled: LabeledImages) -> npt.NDArray[np.bool_]:
    """Which labeled images the cascade's gate lets pass; all of them without a cascade."""
    if not config.features.cascade:
        return np.ones(len(labeled), bool)
    table = storage.child("cascade").read_table("labeled.parquet")
    margins = dict(zip(table[schema.SAMPLE_ID].to_pylist(), table["margin"].to_pylist(), strict=True))
    return np.array([margins[sample] >= 0 for sample in labeled.ids])


def _features_of(normalised: nn.Module, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        parts = [normalised(pixels[start : start + 256])[0] for start in range(0, len(pixels), 256)]
    return torch.cat(parts).clone()


def _fit(module: nn.Module, streams: Streams, config: JobConfig, prior: Prior, progress: Progress) -> Fitted:
    objective = scorers.objective(config.scorer, prior.estimate)
    return fit_scorer(module, streams, objective, config.scorer, config.seed, progress)


def _ranking_head(config: JobConfig, streams: Streams, progress: Progress) -> Fitted:
    """A positive-versus-unlabeled head on frozen features: it needs no prior, and ranks well."""
    settings = config.scorer if config.scorer.features == "frozen" else ScorerConfig(attention=config.scorer.attention)
    head = scorers.Head(streams.unlabeled_train.shape[1], settings.attention, settings.hidden)
    head.standardise_like(streams.unlabeled_train)
    return fit_scorer(head, streams, risk.positive_versus_unlabeled, settings, config.seed, progress)


def _prior(config: JobConfig, ranking: nn.Module, streams: Streams) -> tuple[Prior, str]:
    if config.scorer.prior != "auto":
        value = float(config.scorer.prior)
        return Prior(value, value, value, 1.0, is_upper_bound=False), "given"
    positive = np.r_[scores_of(ranking, streams.positive_validate), scores_of(ranking, streams.positive_calibrate)]
    return estimate_prior(positive, scores_of(ranking, streams.unlabeled_validate)), "estimated"


def _lake_pixels(config: JobConfig, sample: pa.Table) -> Tensor:
    shards = {shard.path: shard for shard in lake.list_shards(config.lake)}
    places: dict[str, list[int]] = {}
    for shard, row in zip(sample[schema.SHARD].to_pylist(), sample[schema.ROW].to_pylist(), strict=True):
        places.setdefault(shard, []).append(row)
    pixels: dict[bytes, Any] = {}
    preprocessing = config.teacher.preprocessing
    for chunk in lake.plan_chunks(config.lake, [shards[path] for path in places], config.lake.chunk_rows):
        table = lake.read_chunk(config.lake.uri, chunk, places[chunk.shard.path])
        decoded = embedding.decoder(config)(table)
        matrix = lake.to_matrix(decoded[schema.PIXELS])
        pixels.update(zip(decoded[schema.SAMPLE_ID].to_pylist(), matrix, strict=True))
    stacked = np.stack([pixels[sample_id] for sample_id in sample[schema.SAMPLE_ID].to_pylist()])
    return torch.from_numpy(stacked.reshape(len(stacked), *preprocessing.shape_hwc))


def _write(target: Storage, config: JobConfig, module: nn.Module, width: int) -> None:
    module = module.cpu().eval()
    target.write_bytes("scorer.safetensors", models.save_weights(module))
    if config.scorer.features == "frozen":
        example = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
        graph = engine.to_onnx(module, example, input_name="features", output_names=["scores"])
    else:
        assert isinstance(module, models.Normalised)
        graph = engine.to_onnx(
            scorers.with_teacher(module, config).eval(),
            models.example_pixels(config.teacher.preprocessing),
            input_name="pixels",
            output_names=["scores", "logits"],
        )
    target.write_bytes("scorer.onnx", graph)


def _write_tables(target: Storage, labeled: LabeledImages, roles: list[str], calibration: Any, held_out: Any) -> None:
    table = {
        schema.SAMPLE_ID: pa.array(labeled.ids, schema.SAMPLE_ID_TYPE),
        schema.NAME: pa.array(labeled.names),
        schema.CLASS: pa.array(labeled.labels.astype(np.int32)),
        "role": pa.array(roles),
    }
    target.write_table("labeled.parquet", pa.table(table))
    target.write_table("calibration.parquet", pa.table({schema.SCORE: pa.array(calibration, pa.float32())}))
    target.write_table("unlabeled.parquet", pa.table({schema.SCORE: pa.array(held_out, pa.float32())}))
