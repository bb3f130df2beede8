"""Which scorer on frozen features: the heads that are tried, and a choice among them that looks at no true label."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pu_ray.config import ScorerConfig
from pu_ray.progress import Progress
from pu_ray.pu import risk, scorers, training
from pu_ray.pu.prior import Fold, class_weights
from pu_ray.pu.training import Fitted, Streams, fit_scorer, scores_of

# The first is taken unless another is clearly better: differences of proxy AUCs are mostly noise (docs/LOG.md).
_CANDIDATES = ("nnpu", "ted", "pvu")
_CLEARLY = 2.0  # standard errors


def ranking_head(settings: ScorerConfig, streams: Streams, seed: int, progress: Progress) -> Fitted:
    """A positive-versus-unlabeled head on frozen features: it needs no prior, and ranks well.

    Args:
        settings: Of the job.
        streams: Features.
        seed: Of weights and the order of the images.
        progress: Advanced by unlabeled images.
    """
    torch.manual_seed(seed)
    head = scorers.Head(streams.unlabeled_train.shape[1], settings.attention, settings.hidden)
    head.standardise_like(streams.unlabeled_train)
    return fit_scorer(head, streams, risk.positive_versus_unlabeled, settings, seed, progress)


@dataclass(frozen=True)
class ClassMix:
    """What the teacher takes held-out images for: of `positive_validate` int64 [P], of `unlabeled_validate` [U]."""

    positive: npt.NDArray[np.int64]
    unlabeled: npt.NDArray[np.int64]


def best_scorer(
    settings: ScorerConfig,
    streams: Streams,
    mix: ClassMix,
    prior: float,
    seed: int,
    progress: Progress,
) -> tuple[str, Fitted, dict[str, float]]:
    """The scorer of the configured kind; of `auto` the preferred one, unless another is clearly better.

    Args:
        settings: Of the job.
        streams: Features.
        mix: Of what is held out.
        prior: Share of positives in the lake.
        seed: Of weights and the order of the images.
        progress: Advanced by unlabeled images.

    Returns:
        Its kind, the scorer, and the proxy AUC, weighted to the lake's classes, of all that were tried.
    """
    heads = _heads(settings, streams, prior, seed, progress)
    alone = settings.neighbours is not True
    fitted: dict[str, Fitted] = {}
    if not alone or (settings.neighbours == "auto" and settings.kind == "auto"):
        neighbours = scorers.Neighbours(streams.positive_train, streams.unlabeled_train)
        for kind in _CANDIDATES[:1] if alone else heads:
            joined = scorers.Joined(heads[kind].module, neighbours, streams.unlabeled_train)
            auc = training.proxy_auc_of(joined, streams)
            fitted[f"{kind}+neighbours"] = replace(heads[kind], module=joined, proxy_auc=auc)
    if alone:
        fitted |= heads
    shares = {kind: _shares_below(each.module, streams) for kind, each in fitted.items()}
    best, *others = fitted
    weights = _weights(fitted[best].module, streams, mix)
    for kind in others:
        if clearly_better(shares[kind], shares[best], weights):
            best = kind
    return best, fitted[best], {kind: float(np.average(each, weights=weights)) for kind, each in shares.items()}


def _heads(settings: ScorerConfig, streams: Streams, prior: float, seed: int, progress: Progress) -> dict[str, Fitted]:
    """Heads on frozen features, of the configured kind or of all that `auto` tries."""
    ranking = ranking_head(settings, streams, seed, progress)
    fitted: dict[str, Fitted] = {}
    for kind in _CANDIDATES if settings.kind == "auto" else (settings.kind,):
        if kind == "pvu":
            fitted[kind] = ranking
            continue
        # Started from random weights, non-negative PU stops at whichever optimum is near; from a good ranking it
        # mends that ranking (docs/LOG.md). (TED)^n needs one to know whom to leave out.
        fitted[kind] = fit_scorer(
            copy.deepcopy(ranking.module),
            streams,
            scorers.objective(settings.model_copy(update={"kind": kind}), prior),
            settings,
            seed,
            progress,
            leave_out=partial(training.most_positive, streams=streams, prior=prior) if kind == "ted" else None,
        )
    return fitted


def _shares_below(module: nn.Module, streams: Streams) -> Any:
    """For each held-out positive, the share of the held-out lake that scores below it; the mean is the proxy AUC."""
    positive = scores_of(module, streams.positive_validate)
    unlabeled = np.sort(scores_of(module, streams.unlabeled_validate))
    below, up_to = (np.searchsorted(unlabeled, positive, side=side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(unlabeled))


def _weights(module: nn.Module, streams: Streams, mix: ClassMix) -> Any:
    """How much each held-out positive counts, float [P]: labeled images are balanced, lakes are not.

    Without, a scorer that puts the lake's rare classes on top looks better than one that ranks the lake's positives
    better as a whole (docs/LOG.md).
    """
    scores = scores_of(module, streams.positive_validate)
    fold = Fold(scores, scores_of(module, streams.unlabeled_validate), mix.positive, mix.unlabeled)
    weights = np.empty(len(scores))
    weights[np.argsort(scores, kind="stable")] = class_weights([fold.sorted()])
    return weights


def clearly_better(one: Any, other: Any, weights: Any) -> bool:
    """Whether one proxy AUC exceeds another by twice the standard error of their difference.

    A proxy AUC is the mean over held-out positives of the share of the lake below each, so the difference is a mean of
    pairs (DeLong et al. 1988, without the lake's own part, which is small beside that of few positives).

    Args:
        one: Those shares by one scorer, float [P].
        other: By another.
        weights: How much each positive counts, float [P].
    """
    difference = one - other
    mean = np.average(difference, weights=weights)
    count = len(difference)
    error = np.sqrt(np.sum((weights * (difference - mean)) ** 2) * count / (count - 1)) / np.sum(weights)
    return bool(mean > _CLEARLY * error)
