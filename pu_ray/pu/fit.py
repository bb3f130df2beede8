"""Stage `fit`: learn the PU scorer from labeled positives and a sample of the lake (paper, section 3.1).

The labeled images are shared out once: for training, for choosing epoch and scorer, and for the promises; a calibration
image does nothing else. How a scorer learns is in training.py, which one is kept in choice.py; finetune.py trains the
whole network. Behind a cascade it learns on the same random sample as without (embedding.spied), and a calibration
positive that the gate rejects counts as lost.

Writes `scorer/`: scorer.safetensors, scorer.onnx, neighbours.onnx, labeled.parquet (who plays which role),
calibration.parquet (scores and classes of calibration positives), unlabeled.parquet (scores of held-out lake images).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from pu_ray import embedding, engine, lake, manifest, models, ray_train, schema
from pu_ray.config import JobConfig, ScorerConfig
from pu_ray.errors import DataError
from pu_ray.lake import LabeledImages
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.pu import choice, finetune, sample, scorers, threshold
from pu_ray.pu.choice import ClassMix
from pu_ray.pu.prior import Fold, Prior, pooled_prior
from pu_ray.pu.training import ROLES, Fitted, Streams, assign_roles, scores_of, streams_of
from pu_ray.storage import Storage
from pu_ray.usage import Workers

_BOOTSTRAP_RESAMPLES = 200


# -- the stage ---------------------------------------------------------------------------------------------


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Fit the scorer and publish it.

    Raises:
        DataError: Too few labeled images for the split or for the recall promise.
        ClusterError: Fine-tuning failed.
    """
    publication = Publication("fit", identity, inputs, config.seed)
    settings = config.scorer
    teacher, classes = models.load_teacher(config.teacher)
    labeled = lake.read_labeled(config.labeled.uri, classes)
    roles = assign_roles(labeled.ids, labeled.labels, settings.split, config.seed)
    require_enough(roles, config)

    positive = _seen_by(teacher, torch.from_numpy(_pixels(config, labeled)), config)
    features_storage = storage.child("features")
    drawn = sample.draw_unlabeled(
        features_storage,
        settings.unlabeled_sample,
        config.seed,
        exclude=set(labeled.ids),
        spied_share=_spied_share(config, storage),
    )
    if drawn.num_rows < 20:
        raise DataError(
            "the lake is too small to learn from",
            slug="lake-too-small",
            where=config.lake.uri,
            allowed="20 usable images or more",
            got=str(drawn.num_rows),
            hint="check lake.uri, and look at it with `pu-ray lake inspect URI`",
        )
    unlabeled = torch.from_numpy(lake.to_matrix(drawn[schema.FEATURES]).astype(np.float32))
    frozen = streams_of(positive.features, unlabeled, roles)
    unlabeled_class = lake.to_matrix(drawn[schema.LOGITS]).argmax(axis=1)
    prior, prior_source = _prior(config, positive, unlabeled, unlabeled_class, progress)

    target = storage.child("scorer")
    calibrate = torch.tensor([role == "calibrate" for role in roles])
    candidates: dict[str, float] = {}
    workers: Workers | None = None
    kind: str
    if settings.features == "finetuned":
        kind = "nnpu" if settings.kind == "auto" else settings.kind
        fitted, workers = _finetune(config, storage, kind, prior, identity, progress)
        held_out_pixels = torch.from_numpy(sample.lake_pixels(config, drawn.slice(drawn.num_rows // 2)))
        calibration = scores_of(fitted.module, torch.from_numpy(_pixels(config, labeled))[calibrate])
        held_out = scores_of(fitted.module, held_out_pixels)
    else:
        target.delete()
        mix = ClassMix(
            positive.predicted[torch.tensor([role == "validate" for role in roles])].numpy(),
            unlabeled_class[drawn.num_rows // 2 :],
        )
        kind, fitted, candidates = choice.best_scorer(settings, frozen, mix, prior.estimate, config.seed, progress)
        calibration = scores_of(fitted.module, frozen.positive_calibrate)
        held_out = scores_of(fitted.module, frozen.unlabeled_validate)
    calibration[~_passed_gate(config, storage, labeled)[calibrate.numpy()]] = -np.inf
    _write_networks(target, config, fitted.module, scorers.Neighbours(frozen.positive_train, frozen.unlabeled_train))
    _write_tables(target, labeled, roles, calibration, positive.predicted[calibrate].numpy(), held_out)
    return publication.publish(
        target,
        counts={f"labeled_{role}": roles.count(role) for role in ROLES}
        | {"unlabeled": drawn.num_rows, "labeled": len(labeled)},
        facts={
            "kind": kind,
            "candidates": candidates,
            "features": settings.features,
            "prior": asdict(prior) | {"source": prior_source},
            "lake_rows": manifest.require(features_storage, "features").counts["rows"],
            "epoch": fitted.epoch,
            "proxy_auc": fitted.proxy_auc,
            "curve": fitted.curve,
            "classes": classes,
        },
        workers=workers,
    )


def require_enough(roles: list[str], config: JobConfig) -> None:
    """Refuse a job with too few labeled images for its split, or for the recall that it promises.

    Args:
        roles: Those of the labeled images.
        config: The job.

    Raises:
        DataError: Says how many there are, and how many are needed.
    """
    counts = {role: roles.count(role) for role in ROLES}
    needed = dict.fromkeys(ROLES, 10)
    if config.selection.rule == "recall":
        fewest = threshold.fewest_positives(config.selection.recall, config.selection.confidence)
        needed["calibrate"] = max(needed["calibrate"], fewest)
    short = [role for role in ROLES if counts[role] < needed[role]]
    if short:
        raise DataError(
            f"too few labeled images for {' and '.join(short)}",
            slug="too-few-labeled-images",
            where=config.labeled.uri,
            allowed=", ".join(f"{role} >= {needed[role]}" for role in ROLES),
            got=", ".join(f"{role} {counts[role]}" for role in ROLES),
            hint="label more images, change scorer.split, or lower selection.recall or selection.confidence",
        )


# -- what the teacher sees ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """Features float32 [N, D] and predicted classes int64 [N]."""

    features: Tensor
    predicted: Tensor


def _pixels(config: JobConfig, labeled: LabeledImages) -> Any:
    return labeled.pixels(config.teacher.preprocessing, config.labeled.uri)


def _seen_by(teacher: models.Teacher, pixels: Tensor, config: JobConfig) -> _Seen:
    normalised = models.Normalised(teacher, config.teacher.preprocessing).eval()
    with torch.inference_mode():
        parts = [normalised(pixels[start : start + 256]) for start in range(0, len(pixels), 256)]
    features = torch.cat([part[0] for part in parts])
    return _Seen(features.clone(), torch.cat([part[1] for part in parts]).argmax(dim=1).clone())


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
    return np.array([margins[sample_id] >= 0 for sample_id in labeled.ids])


# -- learning ----------------------------------------------------------------------------------------------


def _finetune(
    config: JobConfig, storage: Storage, kind: str, prior: Prior, identity: str, progress: Progress
) -> tuple[Fitted, Workers]:
    settings = config.scorer.model_copy(update={"kind": kind})
    job = config.model_copy(update={"scorer": settings})
    target = storage.child("scorer")
    progress.start(settings.epochs * settings.unlabeled_sample // 2, "unlabeled images")
    workers = ray_train.run(
        partial(finetune.train, job, storage, prior.estimate),
        identity=identity,
        target=target,
        workers=settings.workers,
        resources=config.resources.train,
        max_failures=config.distill.max_failures,
        progress=progress,
    )
    target.delete(ray_train.FOLDER)
    return finetune.result(job, storage), workers


def _prior(
    config: JobConfig, labeled: _Seen, unlabeled: Tensor, unlabeled_class: Any, progress: Progress
) -> tuple[Prior, str]:
    """Given, or estimated by cross-fitting: every labeled image is held out once."""
    settings, positive = config.scorer, labeled.features
    if settings.prior != "auto":
        value = float(settings.prior)
        return Prior(value, value, value, 1.0, is_upper_bound=False), "given"
    head = settings if settings.features == "frozen" else ScorerConfig(attention=settings.attention)
    folds = settings.prior_folds
    generator = torch.Generator().manual_seed(config.seed)
    fold, lake_fold = (torch.randperm(len(part), generator=generator) % folds for part in (positive, unlabeled))
    scores = []
    for number in range(folds):
        # No image is held out twice, or the interval would count it as two; another fold chooses the epoch.
        judges = (number + 1) % folds
        learns, learns_lake = (~torch.isin(of, torch.tensor([number, judges])) for of in (fold, lake_fold))
        streams = Streams(
            positive[learns],
            positive[fold == judges],
            positive[:0],
            unlabeled[learns_lake],
            unlabeled[lake_fold == judges],
        )
        module = choice.ranking_head(head, streams, config.seed, progress).module
        held, held_lake = fold == number, lake_fold == number
        scores.append(
            Fold(
                scores_of(module, positive[held]),
                scores_of(module, unlabeled[held_lake]),
                labeled.predicted[held].numpy(),
                unlabeled_class[held_lake.numpy()],
            )
        )
    return pooled_prior(scores, resamples=_BOOTSTRAP_RESAMPLES, seed=config.seed), "estimated"


# -- what is kept ------------------------------------------------------------------------------------------


def _write_networks(target: Storage, config: JobConfig, module: nn.Module, neighbours: scorers.Neighbours) -> None:
    module = module.cpu().eval()
    width = neighbours.mean.shape[0]
    features = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    target.write_bytes(finetune.WEIGHTS_FILE, models.save_weights(module))
    if config.scorer.features == "frozen":
        graph = engine.to_onnx(module, features, input_name="features", output_names=["scores"])
    else:
        assert isinstance(module, models.Normalised)
        graph = engine.to_onnx(
            scorers.with_teacher(module, config).eval(),
            models.example_pixels(config.teacher.preprocessing),
            input_name="pixels",
            output_names=["scores", "logits", "features"],
        )
    target.write_bytes("scorer.onnx", graph)
    graph = engine.to_onnx(neighbours.eval(), features, input_name="features", output_names=["cosines"])
    target.write_bytes("neighbours.onnx", graph)


def _write_tables(
    target: Storage, labeled: LabeledImages, roles: list[str], calibration: Any, predicted: Any, held_out: Any
) -> None:
    table = {
        schema.SAMPLE_ID: pa.array(labeled.ids, schema.SAMPLE_ID_TYPE),
        schema.NAME: pa.array(labeled.names),
        schema.CLASS: pa.array(labeled.labels.astype(np.int32)),
        "role": pa.array(roles),
    }
    target.write_table("labeled.parquet", pa.table(table))
    promises = {
        schema.SCORE: pa.array(calibration, pa.float32()),
        schema.PREDICTED: pa.array(predicted.astype(np.int32)),
    }
    target.write_table("calibration.parquet", pa.table(promises))
    target.write_table("unlabeled.parquet", pa.table({schema.SCORE: pa.array(held_out, pa.float32())}))
