"""Stage `fit`: learn the PU scorer from labeled positives and a sample of the lake (paper, section 3.1).

Two streams feed every step: a fixed number of positives and a batch of unlabeled images. (In the published code
both lie in one shuffled list, and with 20 labeled images per class half of the batches hold no positive.) The epoch
is chosen by the AUC of held-out positives against held-out unlabeled images, never by true labels. The labeled images
are shared out once: for training, for choosing the epoch, and for the promises; a calibration image does nothing else.

Writes `scorer/`: scorer.safetensors, scorer.onnx, labeled.parquet (who plays which role), calibration.parquet
(scores of calibration positives) and unlabeled.parquet (scores of held-out lake images).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pu_ray import engine, lake, ledger, models, optim, schema
from pu_ray.config import JobConfig, ScorerConfig, SplitConfig
from pu_ray.errors import DataError
from pu_ray.lake import LabeledImages
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.pu import risk, scorers, threshold
from pu_ray.pu.prior import Prior, estimate_prior
from pu_ray.storage import Storage

ROLES = ("train", "validate", "calibrate")
_EVALUATION_BATCH = 1024
# Files are drawn at random until they hold this many times the sample, so that a large lake is not read whole.
_OVERSAMPLING = 4


@dataclass
class Fitted:
    """A fitted scorer.

    Attributes:
        module: The module that was given, with the parameters of the chosen epoch.
        epoch: Counted from 1.
        proxy_auc: AUC of held-out positives against held-out unlabeled images, at that epoch.
        curve: Risk and proxy AUC after each epoch.
    """

    module: nn.Module
    epoch: int
    proxy_auc: float
    curve: list[dict[str, float]]


@dataclass(frozen=True)
class Streams:
    """Inputs of the fit: features [., D] float32, or pixels [., H, W, C] uint8 for a fine-tuned scorer."""

    positive_train: Tensor
    positive_validate: Tensor
    positive_calibrate: Tensor
    unlabeled_train: Tensor
    unlabeled_validate: Tensor


# -- pure functions ----------------------------------------------------------------------------------------


def assign_roles(ids: list[bytes], labels: Any, split: SplitConfig, seed: int) -> list[str]:
    """Share labeled images out by class, independent of their order in the listing.

    Images with the same bytes get the same role, so that a copy never tells a secret.

    Returns:
        One of `ROLES` for each image.
    """
    order = sorted(
        set(zip(np.asarray(labels).tolist(), ids, strict=True)), key=lambda item: (item[0], _rank(item[1], seed))
    )
    roles: dict[bytes, str] = {}
    # Walking class by class along one running count keeps the shares exact overall and nearly so in each class.
    bounds = (split.train, split.train + split.validate_)
    for position, (_, sample) in enumerate(order):
        # A golden-ratio sequence spreads the roles evenly over every class.
        place = (position * 0.6180339887498949) % 1.0
        roles.setdefault(sample, ROLES[sum(place >= bound for bound in bounds)])
    return [roles[sample] for sample in ids]


def _rank(sample: bytes, seed: int) -> bytes:
    return hashlib.blake2b(sample, digest_size=8, key=seed.to_bytes(8, "big")).digest()


def fit_scorer(
    module: nn.Module,
    streams: Streams,
    objective: scorers.Objective,
    settings: ScorerConfig,
    seed: int,
    progress: Progress,
) -> Fitted:
    """Descend the risk with two streams; keep the epoch with the best proxy AUC.

    Args:
        module: Maps a stream's inputs to logits [N]; changed in place.
        streams: Training and held-out inputs.
        objective: The risk of one step.
        settings: Batch sizes, epochs, optimiser.
        seed: Of the order of the images.
        progress: Advanced by unlabeled images.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(module.parameters()).device
    positives_per_step = min(max(1, round(settings.batch_size * settings.positive_share)), settings.batch_size - 1)
    unlabeled_per_step = min(settings.batch_size - positives_per_step, len(streams.unlabeled_train))
    steps_per_epoch = len(streams.unlabeled_train) // unlabeled_per_step
    optimizer, schedule = optim.build(module.parameters(), settings.optimizer, settings.epochs * steps_per_epoch)
    progress.start(settings.epochs * steps_per_epoch * unlabeled_per_step, "unlabeled images")
    positive_order = _Cycle(len(streams.positive_train), generator)
    best_auc, best_epoch, best_state = -1.0, 0, copy.deepcopy(module.state_dict())
    curve: list[dict[str, float]] = []
    for epoch in range(1, settings.epochs + 1):
        module.train()
        values = []
        order = torch.randperm(len(streams.unlabeled_train), generator=generator)
        for step in range(steps_per_epoch):
            positive = streams.positive_train[positive_order.take(positives_per_step)]
            unlabeled = streams.unlabeled_train[order[step * unlabeled_per_step :][:unlabeled_per_step]]
            # One forward pass for both streams: batch norm must see the mixture, not tell the streams apart.
            logits = module(torch.cat([positive, unlabeled]).to(device))
            current = objective(logits[:positives_per_step], logits[positives_per_step:])
            optimizer.zero_grad(set_to_none=True)
            current.objective.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            values.append(float(current.value))
            progress.advance(unlabeled_per_step)
        auc = proxy_auc(scores_of(module, streams.positive_validate), scores_of(module, streams.unlabeled_validate))
        curve.append({"epoch": epoch, "risk": float(np.mean(values)), "proxy_auc": auc})
        if auc > best_auc:
            best_auc, best_epoch, best_state = auc, epoch, copy.deepcopy(module.state_dict())
    module.load_state_dict(best_state)
    return Fitted(module, best_epoch, best_auc, curve)


class _Cycle:
    """Endless order of positives: each is used once before any is used again."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._count = count
        self._generator = generator
        self._left = torch.empty(0, dtype=torch.int64)

    def take(self, number: int) -> Tensor:
        while len(self._left) < number:
            self._left = torch.cat([self._left, torch.randperm(self._count, generator=self._generator)])
        taken, self._left = self._left[:number], self._left[number:]
        return taken


def scores_of(module: nn.Module, inputs: Tensor) -> Any:
    """Logits of many inputs in eval mode, float32 [N] array."""
    module.eval()
    device = next(module.parameters()).device
    with torch.inference_mode():
        parts = [
            module(inputs[start : start + _EVALUATION_BATCH].to(device)).float().cpu()
            for start in range(0, len(inputs), _EVALUATION_BATCH)
        ]
    return torch.cat(parts).numpy()


def proxy_auc(positive_scores: Any, unlabeled_scores: Any) -> float:
    """AUC of positives against unlabeled: needs no true labels, and rises with the true AUC."""
    truth = np.r_[np.ones(len(positive_scores)), np.zeros(len(unlabeled_scores))]
    return float(roc_auc_score(truth, np.r_[positive_scores, unlabeled_scores]))


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
    sample = draw_unlabeled(features_storage, settings.unlabeled_sample, config.seed, exclude=set(labeled.ids))
    half = sample.num_rows // 2
    if half < 10:
        raise DataError(
            "the lake is too small to learn from",
            where=config.lake.uri,
            allowed="20 usable images or more",
            got=str(sample.num_rows),
        )
    frozen = _streams(
        _features_of(normalised, pixels),
        torch.from_numpy(lake.to_matrix(sample[schema.FEATURES]).astype(np.float32)),
        roles,
        half,
    )

    torch.manual_seed(config.seed)
    ranking = _ranking_head(config, frozen, progress)
    prior, prior_source = _prior(config, ranking.module, frozen)
    if settings.features == "finetuned":
        streams = _streams(pixels, _lake_pixels(config, sample), roles, half)
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


def draw_unlabeled(features: Storage, count: int, seed: int, exclude: set[bytes]) -> pa.Table:
    """A random sample of the lake's usable, distinct images, the same whatever order the lake was read in.

    Returns:
        Rows of `schema.features`, at most `count`, in random order.
    """
    index = ledger.read_index(features).to_pylist()
    index.sort(key=lambda entry: _rank(entry["file"].encode(), seed))
    candidates: dict[bytes, tuple[bytes, str, int]] = {}
    rows = 0
    for entry in index:
        if rows >= _OVERSAMPLING * count:
            break
        table = features.read_table(entry["file"], [schema.SAMPLE_ID, schema.ERROR])
        rows += table.num_rows
        pairs = zip(table[schema.SAMPLE_ID].to_pylist(), table[schema.ERROR].to_pylist(), strict=True)
        for position, (sample, error) in enumerate(pairs):
            if error is None and sample not in exclude and sample not in candidates:
                candidates[sample] = (_rank(sample, seed), entry["file"], position)
    chosen = sorted(candidates.values())[:count]
    by_file: dict[str, list[tuple[bytes, int]]] = {}
    for rank, file, position in chosen:
        by_file.setdefault(file, []).append((rank, position))
    parts, ranks = [], []
    for file, places in by_file.items():
        parts.append(features.read_table(file).take(pa.array([position for _, position in places])))
        ranks += [rank for rank, _ in places]
    if not parts:
        raise DataError("the lake holds no usable image", where=str(features))
    return pa.concat_tables(parts).take(pa.array(sorted(range(len(ranks)), key=ranks.__getitem__)))


def _features_of(normalised: nn.Module, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        parts = [normalised(pixels[start : start + 256])[0] for start in range(0, len(pixels), 256)]
    return torch.cat(parts).clone()


def _streams(positive: Tensor, unlabeled: Tensor, roles: list[str], half: int) -> Streams:
    train, validate, calibrate = (torch.tensor([r == role for r in roles]) for role in ROLES)
    return Streams(positive[train], positive[validate], positive[calibrate], unlabeled[:half], unlabeled[half:])


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
    from pu_ray import images

    shards = {shard.path: shard for shard in lake.list_shards(config.lake)}
    places: dict[str, list[int]] = {}
    for shard, row in zip(sample[schema.SHARD].to_pylist(), sample[schema.ROW].to_pylist(), strict=True):
        places.setdefault(shard, []).append(row)
    pixels: dict[bytes, Any] = {}
    preprocessing = config.teacher.preprocessing
    for chunk in lake.plan_chunks(config.lake, [shards[path] for path in places], config.lake.chunk_rows):
        table = lake.read_chunk(config.lake.uri, chunk, places[chunk.shard.path])
        decoded = lake.decode_table(table, preprocessing, images.Limits.of(config.lake))
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
