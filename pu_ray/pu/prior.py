"""The class prior with an interval: what share of the lake are positives?

Best-bin estimation (Garg et al. 2021): for any threshold t, share_U(t) / share_P(t) bounds the prior from above,
and at thresholds above which no negative lies it equals the prior. The bands are binomial-KL (Chernoff) bounds
on a geometric grid of thresholds with a union bound: at small priors the published DKW slack swamps the answer.

Shapes: B resamples, P positives, U unlabeled images, G thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_GRID_RATIO = 0.85
_SMALLEST_BIN = 10  # held-out positives; smaller bins have bands too wide to win
_SEPARABLE_SHARE = 0.5
_MOST_DEVIATION = 3.0  # of the weights: at least a tenth of the positives must count, however uneven the lake
_MOST_VALUES = 4_000_000  # unlabeled images resampled at a time


@dataclass(frozen=True)
class Prior:
    """An estimate of the prior.

    Attributes:
        estimate: Ratio at the best threshold, in (0, 1].
        low: Lower end; holds if no negative scores above the upper half of the positives.
        high: Upper end; holds without that assumption.
        confidence: Of the two-sided intervals.
        is_upper_bound: The best threshold keeps only a small part of the positives, so positives could not be
            told from some negatives and the estimate is an upper bound rather than a value.
        bootstrap_low: Lower end of the bootstrap interval (`pooled_prior`), or None without one.
        bootstrap_high: Its upper end, or None.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    is_upper_bound: bool
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None


def estimate_prior(positive_scores: Any, unlabeled_scores: Any, confidence: float = 0.95) -> Prior:
    """Best-bin estimate with binomial-KL bands.

    Args:
        positive_scores: Scores of held-out labeled positives, float [n_P]; never trained on.
        unlabeled_scores: Scores of held-out unlabeled images, float [n_U].
        confidence: Of the interval, in (0, 1).

    Raises:
        ValueError: Fewer than ten scores on either side, or scores that are not finite.
    """
    (fold,) = _checked([Fold(positive_scores, unlabeled_scores)])
    positive, unlabeled = fold.positive, fold.unlabeled
    n_p, n_u = len(positive), len(unlabeled)
    thresholds = positive[n_p - _bin_sizes(n_p)]
    share_p = 1 - np.searchsorted(positive, thresholds, side="left") / n_p
    share_u = 1 - np.searchsorted(unlabeled, thresholds, side="left") / n_u
    return _Bins.of(share_p[None], share_u[None], n_p, n_u, confidence).prior()


@dataclass(frozen=True)
class Fold:
    """What a scorer says of images it was not trained on.

    Attributes:
        positive: Scores of its held-out positives, float [P].
        unlabeled: Scores of its held-out unlabeled images, float [U].
        positive_class: What the teacher takes each of them for, int [P]; None: all for the same.
        unlabeled_class: The same of the unlabeled, int [U].
    """

    positive: Any
    unlabeled: Any
    positive_class: Any = None
    unlabeled_class: Any = None

    def sorted(self) -> Fold:
        """By score, with classes for all."""
        sides = []
        for scores, classes in ((self.positive, self.positive_class), (self.unlabeled, self.unlabeled_class)):
            values = np.asarray(scores, np.float64)
            order = np.argsort(values, kind="stable")
            sides.append((values[order], np.zeros(len(values), int) if classes is None else np.asarray(classes)[order]))
        (positive, positive_class), (unlabeled, unlabeled_class) = sides
        return Fold(positive, unlabeled, positive_class, unlabeled_class)


def pooled_prior(folds: Sequence[Fold], confidence: float = 0.95, resamples: int = 200, seed: int = 0) -> Prior:
    """Best-bin estimate from several cross-fitted folds, with binomial-KL bands and a bootstrap interval.

    Each fold has its own scorer, and scores of different scorers cannot be compared. So the score of a positive becomes
    its *rank*, the share of its own fold's unlabeled images that score at least as high, which means the same in every
    fold. At a rank r the share of the unlabeled is r itself, so r / share_P(r) over the pooled positives is the bin's
    ratio: it bounds the prior in every fold, hence on average. The bands stay as they are, because the count of
    positives is a sum of binomials of unlike shares, which keeps the Chernoff bound of their mean (Hoeffding 1963).

    Labeled images are often balanced over the classes and the lake seldom is. Then the labeled positives are no sample
    of the lake's, and a class that is rare in the lake, at whose head a scorer likes to put its highest scores, makes
    the lake look emptier than it is (0.033 for 0.102 on a long tail, docs/LOG.md). So each positive is weighted by how
    much of the lake's positives its class is (`class_weights`); the bands then go with the effective sample size
    (Kish 1965), and are no longer a theorem.

    The bootstrap interval is the percentile interval of the whole estimate, choice of the bin included, over resamples
    of positives and unlabeled images within their folds. It covers what the draw of these images adds, and neither that
    other images would have given other scorers, nor negatives that score like positives: where `is_upper_bound`, it is
    an interval of the bound and may lie above the prior altogether. In simulations with separable scores it covers as
    often as it says from 150 positives on; with 60 positives and half the lake positive it covered in four draws of
    five, where the bands still hold.

    Args:
        folds: No image is in two of them.
        confidence: Of both intervals, in (0, 1).
        resamples: Of the bootstrap; each tail must hold at least one.
        seed: Of the bootstrap.

    Raises:
        ValueError: A fold without scores on one side, fewer than ten scores on either side over all, scores that are
            not finite, or too few resamples.
    """
    fewest = math.ceil(2 / (1 - confidence) - 1e-9)
    if resamples < fewest:
        raise ValueError(f"confidence {confidence:g} needs at least {fewest} resamples, got {resamples}")
    folds = _checked(folds)
    n_u = sum(len(fold.unlabeled) for fold in folds)
    pooled = np.concatenate([_ranks(fold.positive, fold.unlabeled) for fold in folds])
    weights = class_weights(folds)
    prior = _bins_of_ranks(pooled[None], weights[None], n_u, confidence).prior()
    generator = np.random.default_rng(seed)
    own = np.split(weights, np.cumsum([len(fold.positive) for fold in folds])[:-1])
    at_a_time = max(1, _MOST_VALUES // max(len(fold.unlabeled) for fold in folds))
    estimates = []
    for start in range(0, resamples, at_a_time):
        count = min(at_a_time, resamples - start)
        drawn = [_resampled_ranks(fold.positive, fold.unlabeled, count, generator) for fold in folds]
        ranks_BP = np.concatenate([ranks for ranks, _ in drawn], axis=1)
        weights_BP = np.concatenate([each[chosen] for each, (_, chosen) in zip(own, drawn, strict=True)], axis=1)
        estimates.append(_bins_of_ranks(ranks_BP, weights_BP, n_u, confidence).estimate_B)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(estimates), [tail, 1 - tail])
    return replace(prior, bootstrap_low=float(low), bootstrap_high=float(high))


def class_weights(folds: Sequence[Fold]) -> Floats:
    """How much each positive counts, float [P] over all folds in their order, mean 1.

    The better half of a class's positives marks a place in the ranking. As many unlabeled images of that predicted
    class lie above it as the lake holds of the class's better half, so their number tells the classes' shares among
    the lake's positives. Near the top of a class few negatives disturb that.

    Where few would speak for all, the weights are drawn towards 1.

    Args:
        folds: Sorted by score, with classes.
    """
    classes = np.unique(np.concatenate([fold.positive_class for fold in folds]))
    found, kept, labeled = (np.zeros(len(classes)) for _ in range(3))
    for fold in folds:
        for place, k in enumerate(classes):
            positive = fold.positive[fold.positive_class == k]
            if len(positive):
                middle = positive[len(positive) // 2]
                found[place] += np.count_nonzero(fold.unlabeled[fold.unlabeled_class == k] >= middle)
                # The expected share of the class above its m-th best of n.
                kept[place] += np.count_nonzero(positive >= middle) / (len(positive) + 1) * len(fold.unlabeled)
                labeled[place] += len(positive)
    mix = found / kept + 1 / sum(len(fold.unlabeled) for fold in folds)
    weights = (mix / labeled)[np.searchsorted(classes, np.concatenate([fold.positive_class for fold in folds]))]
    weights /= weights.mean()
    # The effective sample size is P / (1 + variance).
    shrunk: Floats = 1 + (weights - 1) * min(1.0, _MOST_DEVIATION / max(float(weights.std()), 1e-12))
    return shrunk


def _checked(folds: Sequence[Fold]) -> list[Fold]:
    """The folds, sorted by score."""
    ordered = [fold.sorted() for fold in folds]
    n_p, n_u = (sum(len(getattr(fold, side)) for fold in ordered) for side in ("positive", "unlabeled"))
    if min(n_p, n_u) < _SMALLEST_BIN:
        raise ValueError(f"at least {_SMALLEST_BIN} scores are needed on either side, got {n_p}, {n_u}")
    for place, fold in enumerate(ordered):
        if not (len(fold.positive) and len(fold.unlabeled)):
            raise ValueError(f"fold {place} has no scores on one side, got {len(fold.positive)}, {len(fold.unlabeled)}")
        if not (np.isfinite(fold.positive).all() and np.isfinite(fold.unlabeled).all()):
            raise ValueError("scores must be finite")
    return ordered


def _bin_sizes(n_p: int) -> npt.NDArray[np.int_]:
    """How many positives each bin of the grid keeps, rising."""
    steps = int(np.floor(np.log(_SMALLEST_BIN / n_p) / np.log(_GRID_RATIO)))
    return np.unique(np.ceil(n_p * _GRID_RATIO ** np.arange(steps + 1)).astype(int))


# -- ranks, for pooling ------------------------------------------------------------------------------------

# A positive lies between two unlabeled images. Counting only those above it would make a lake with few hidden
# positives look emptier than it is (a fifth, where eight are hidden in a fold), counting the next one too would make
# it look fuller.
_HALF_WAY = 0.5


def _above(positive: Floats, unlabeled: Floats) -> npt.NDArray[np.intp]:
    """How many of the sorted unlabeled scores are at least as high as each positive's."""
    return len(unlabeled) - np.searchsorted(unlabeled, positive, side="left")


def _ranks(positive: Floats, unlabeled: Floats) -> Floats:
    return np.minimum((_above(positive, unlabeled) + _HALF_WAY) / len(unlabeled), 1.0)


def _resampled_ranks(
    positive: Floats, unlabeled: Floats, resamples: int, generator: np.random.Generator
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Ranks [B, P] in samples drawn with replacement from both sides of a fold, and which positives were drawn."""
    n_p, n_u = len(positive), len(unlabeled)
    positive_BP = generator.integers(0, n_p, (resamples, n_p))
    unlabeled_BU = generator.integers(0, n_u, (resamples, n_u))
    # How often each unlabeled image was drawn; then, how many of those drawn are among the best 0, 1, 2, ...
    place_BU = unlabeled_BU + np.arange(resamples)[:, None] * n_u
    times_BU = np.bincount(place_BU.ravel(), minlength=resamples * n_u).reshape(resamples, n_u)
    among_best = np.zeros((resamples, n_u + 1), np.int64)
    np.cumsum(times_BU, axis=1, out=among_best[:, 1:])
    above_BP = np.take_along_axis(among_best, _above(positive, unlabeled)[positive_BP], axis=1)
    return np.minimum((above_BP + _HALF_WAY) / n_u, 1.0), positive_BP


def _bins_of_ranks(ranks_BP: Floats, weights_BP: Floats, n_u: int, confidence: float) -> _Bins:
    order = np.argsort(ranks_BP, axis=1, kind="stable")
    ranks_BP, weights_BP = (np.take_along_axis(values, order, axis=1) for values in (ranks_BP, weights_BP))
    total_B1 = weights_BP.sum(axis=1, keepdims=True)
    # One size for all resamples, so that all have the same bins.
    n_p = max(_SMALLEST_BIN, int(np.median(total_B1[:, 0] ** 2 / (weights_BP**2).sum(axis=1))))
    share_BP = np.cumsum(weights_BP, axis=1) / total_B1
    wanted = _bin_sizes(n_p) / n_p
    # The first positive with which the wanted share is there; ties are kept together.
    place_BG = np.stack([(share_BP < share - 1e-9).sum(axis=1) for share in wanted], axis=1)
    thresholds_BG = np.take_along_axis(ranks_BP, np.minimum(place_BG, ranks_BP.shape[1] - 1), axis=1)
    kept = [((ranks_BP <= column[:, None]) * weights_BP).sum(axis=1) for column in thresholds_BG.T]
    return _Bins.of(np.minimum(np.stack(kept, axis=1) / total_B1, 1.0), thresholds_BG, n_p, n_u, confidence)


# -- the best bin ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bins:
    """Shares kept at every threshold of every resample [B, G], and what the best bin of each says [B]."""

    share_p_BG: Floats
    share_u_BG: Floats
    n_p: int
    n_u: int
    confidence: float
    upper_BG: Floats
    best_B: npt.NDArray[np.intp]
    estimate_B: Floats

    @classmethod
    def of(cls, share_p_BG: Floats, share_u_BG: Floats, n_p: int, n_u: int, confidence: float) -> _Bins:
        delta = _per_band(share_p_BG, confidence)
        upper_BG = kl_upper(share_u_BG, n_u, delta) / np.maximum(kl_lower(share_p_BG, n_p, delta), 1e-12)
        best_B = np.argmin(upper_BG, axis=1)
        every = np.arange(len(best_B))
        estimate_B = np.clip(share_u_BG[every, best_B] / share_p_BG[every, best_B], 1 / n_u, 1.0)
        return cls(share_p_BG, share_u_BG, n_p, n_u, confidence, upper_BG, best_B, estimate_B)

    def prior(self) -> Prior:
        """The estimate and its bands, of the only sample."""
        (share_p,), (share_u,), (upper,), (best,) = self.share_p_BG, self.share_u_BG, self.upper_BG, self.best_B
        delta, estimate = _per_band(share_p, self.confidence), float(self.estimate_B[0])
        # The best threshold may already let some negatives in, which lifts the ratio; a stricter one shows by how much.
        lower = kl_lower(share_u, self.n_u, delta) / kl_upper(share_p, self.n_p, delta)
        low = float(lower[(share_p >= min(_SEPARABLE_SHARE, share_p[best]))].min())
        return Prior(
            estimate=estimate,
            low=min(low, estimate),
            high=float(np.clip(upper[best], estimate, 1.0)),
            confidence=self.confidence,
            # At the far ends of the scale the bins say nothing: all positive, or not to be told apart.
            is_upper_bound=bool(share_p[best] < _SEPARABLE_SHARE or upper[best] >= 1),
        )


def _per_band(shares: Floats, confidence: float) -> float:
    # Four one-sided bands at every threshold share what may go wrong.
    thresholds: int = shares.shape[-1]
    return (1 - confidence) / (4 * thresholds)


def kl_upper(share: Floats, count: int, delta: float) -> Floats:
    """Largest q with count * KL(share || q) <= ln(1/delta): an upper confidence bound of a binomial share."""
    return _invert(np.asarray(share, np.float64), np.ones_like(share), count, delta)


def kl_lower(share: Floats, count: int, delta: float) -> Floats:
    """Smallest q with count * KL(share || q) <= ln(1/delta): a lower confidence bound of a binomial share."""
    return _invert(np.asarray(share, np.float64), np.zeros_like(share), count, delta)


def _invert(share: Floats, far: Floats, count: int, delta: float) -> Floats:
    budget = np.log(1 / delta) / count
    inside, outside = share.copy(), far.copy()
    for _ in range(60):
        middle = (inside + outside) / 2
        fits = _bernoulli_kl(share, middle) <= budget
        inside, outside = np.where(fits, middle, inside), np.where(fits, outside, middle)
    return inside


def _bernoulli_kl(p: Floats, q: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        ones = np.where(p > 0, p * np.log(p / q), 0.0)
        zeros = np.where(p < 1, (1 - p) * np.log((1 - p) / (1 - q)), 0.0)
    divergence: Floats = np.nan_to_num(ones + zeros, nan=np.inf, posinf=np.inf)
    return divergence
