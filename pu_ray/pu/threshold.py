"""Thresholds with promises that hold.

The recall promise is an order statistic of calibration positives, for the lake or for each class. The discard promise
is a Benjamini-Hochberg procedure on conformal p-values. Both are distribution-free, if labeled and lake positives are
exchangeable and the calibration positives were used for nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

_ROUNDING = 1e-12  # so that a promise that is met exactly is met


@dataclass(frozen=True)
class RecallThreshold:
    """A threshold with P(recall >= `recall`) >= `confidence`.

    Attributes:
        value: Keep images with score >= value.
        recall: The promised share of lake positives kept.
        confidence: The promise's probability, over draws of the calibration positives.
        calibration: Number of calibration positives.
        rank: The threshold is their rank-th smallest score, counting from 1.
    """

    value: float
    recall: float
    confidence: float
    calibration: int
    rank: int


def fewest_positives(recall: float, confidence: float) -> int:
    """Fewest calibration positives that can keep the promise: the smallest n with recall^n <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(recall) - _ROUNDING)


def recall_threshold(calibration_scores: Any, recall: float, confidence: float) -> RecallThreshold:
    """The highest threshold that keeps the recall promise.

    With n calibration scores and the rank-k smallest as threshold, recall is Beta-distributed and
    P(recall >= r) = P(Binomial(n, 1 - r) >= k) (order statistics; Wilks 1941).

    Args:
        calibration_scores: Scores of calibration positives, float [n].
        recall: r, in (0, 1).
        confidence: In (0, 1).

    Raises:
        ValueError: Too few calibration positives; says how many are needed. Or a score is NaN.
    """
    scores = _sorted(calibration_scores)
    n = len(scores)
    needed = fewest_positives(recall, confidence)
    if n < needed:
        raise ValueError(
            f"recall {recall:g} with confidence {confidence:g} needs at least {needed} calibration positives, got {n}"
        )
    ranks = np.arange(1, n + 1)
    holds = stats.binom.sf(ranks - 1, n, 1 - recall) >= confidence - _ROUNDING
    rank = int(ranks[holds].max())
    return RecallThreshold(float(scores[rank - 1]), recall, confidence, n, rank)


# -- for each class ----------------------------------------------------------------------------------------


def recall_thresholds_per_class(
    calibration_scores: Any, classes: Any, n_classes: int, recall: float, confidence: float
) -> tuple[RecallThreshold, ...]:
    """The highest threshold of each class that keeps the recall promise within the class.

    The classes are the teacher's: of the lake images that it predicts as k, those that are positives are exchangeable
    with the calibration positives that it predicts as k (Mondrian conformal prediction; Vovk et al. 2005, section 4.5).
    True classes would not do, because a lake image's is unknown. Each class keeps its promise with `confidence` of its
    own; that all of K keep theirs together, ask for 1 - (1 - confidence) / K.

    Args:
        calibration_scores: Scores of calibration positives, float [n].
        classes: The class that the teacher predicts for each, int [n], in 0 .. n_classes - 1.
        n_classes: K.
        recall: In (0, 1).
        confidence: In (0, 1).

    Returns:
        One threshold for each class, in their order.

    Raises:
        ValueError: Classes with too few calibration positives, with their counts and how many are needed; or a class
            outside 0 .. K - 1.
    """
    scores, predicted = np.asarray(calibration_scores, np.float64), np.asarray(classes)
    if short := classes_short_of_positives(predicted, n_classes, recall, confidence):
        raise ValueError(
            f"recall {recall:g} with confidence {confidence:g} needs at least {fewest_positives(recall, confidence)} "
            "calibration positives of each predicted class, got "
            + ", ".join(f"{count} of class {k}" for k, count in short.items())
        )
    return tuple(recall_threshold(scores[predicted == k], recall, confidence) for k in range(n_classes))


def classes_short_of_positives(classes: Any, n_classes: int, recall: float, confidence: float) -> dict[int, int]:
    """Classes that have too few calibration positives for the promise, with how many they have.

    Args:
        classes: The class that the teacher predicts for each calibration positive, int [n].
        n_classes: K.
        recall: In (0, 1).
        confidence: In (0, 1).

    Raises:
        ValueError: A class outside 0 .. K - 1.
    """
    predicted = np.asarray(classes)
    if len(outside := predicted[(predicted < 0) | (predicted >= n_classes)]):
        raise ValueError(f"classes must lie in 0 .. {n_classes - 1}, got {outside[0]}")
    counts = np.bincount(predicted, minlength=n_classes).tolist()
    needed = fewest_positives(recall, confidence)
    return {k: count for k, count in enumerate(counts) if count < needed}


# -- discards ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscardThreshold:
    """A threshold below which, in expectation, at most the share `rate` of the images are positives.

    Attributes:
        value: Keep images with score >= value; minus infinity where nothing can be discarded.
        rate: The promised share of positives among the discarded.
        calibration: Number of calibration positives.
        rank: The threshold is their rank-th smallest score, counting from 1; 0 where nothing can be discarded.
        lake: Number of lake images that were looked at.
        discarded: How many of them score below.
    """

    value: float
    rate: float
    calibration: int
    rank: int
    lake: int
    discarded: int


def fewest_positives_to_discard(rate: float) -> int:
    """Fewest calibration positives with which anything can be discarded: with n, no p-value is below 1 / (n + 1)."""
    return math.ceil(1 / rate - _ROUNDING) - 1


def count_between(calibration_scores: Any, lake_scores: Any) -> npt.NDArray[np.int64]:
    """How many lake scores fall between consecutive calibration scores; add up the counts of a lake's blocks.

    Args:
        calibration_scores: Scores of calibration positives, float [n].
        lake_scores: Scores of lake images, float [N]; minus infinity for an image that the gate rejected.

    Returns:
        int64 [n + 1]; at position j the images with exactly j calibration scores at or below theirs, whose conformal
        p-value is (1 + j) / (n + 1).

    Raises:
        ValueError: A score is NaN.
    """
    calibration, lake = _sorted(calibration_scores), _not_nan(lake_scores)
    bins = np.searchsorted(calibration, lake, side="right")
    return np.bincount(bins, minlength=len(calibration) + 1).astype(np.int64)


def discard_threshold(calibration_scores: Any, lake_counts: Any, rate: float) -> DiscardThreshold:
    """The highest threshold below which at most the share `rate` of the images are positives, in expectation.

    For each lake image the hypothesis "is a positive" has the conformal p-value
    (1 + #{calibration <= score}) / (n + 1). The Benjamini-Hochberg procedure at level `rate` says which hypotheses fall
    (Benjamini and Hochberg 1995), and holds because conformal p-values depend on each other positively (Bates et al.
    2023, theorem 2). The expectation is over draws of calibration positives and lake; one unlucky calibration set may
    discard more. The promise is kept with
    room to spare: the expected share is at most `rate` times the prior. It speaks of the discarded images, not of
    the positives lost: where most of the lake is discarded, about the share `rate` of the positives goes with it.

    Args:
        calibration_scores: Scores of calibration positives, float [n].
        lake_counts: From `count_between`, over the whole lake, int [n + 1].
        rate: In (0, 1).

    Raises:
        ValueError: Too few calibration positives to discard anything, with how many are needed; a rate outside (0, 1);
            counts of other calibration scores.
    """
    calibration, counts = _sorted(calibration_scores), np.asarray(lake_counts, np.int64)
    n = len(calibration)
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate:g}")
    if n < (needed := fewest_positives_to_discard(rate)):
        raise ValueError(f"rate {rate:g} needs at least {needed} calibration positives, got {n}")
    if len(counts) != n + 1:
        raise ValueError(f"{n} calibration scores need {n + 1} counts, got {len(counts)}")
    lake, at_most = int(counts.sum()), np.cumsum(counts)
    # p_(k) <= rate * k / N, for the images of one bin at once: they share a p-value, and the last one's k decides.
    falls = (1 + np.arange(n + 1)) * lake <= rate * (1 + _ROUNDING) * (n + 1) * at_most
    last = np.flatnonzero(falls & (counts > 0))
    if not len(last):
        return DiscardThreshold(-math.inf, rate, n, 0, lake, 0)
    # Where j calibration scores are at or below, the next one is the lowest score that is kept; the p-value 1 of the
    # last bin exceeds every rate, so there is a next one.
    j = int(last[-1])
    return DiscardThreshold(float(calibration[j]), rate, n, j + 1, lake, int(at_most[j]))


def _sorted(scores: Any) -> npt.NDArray[np.float64]:
    return np.sort(_not_nan(scores))


def _not_nan(scores: Any) -> npt.NDArray[np.float64]:
    values = np.asarray(scores, np.float64)
    if np.isnan(values).any():
        raise ValueError("scores must not be NaN")
    return values
