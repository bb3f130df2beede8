"""Thresholds with promises that hold.

The recall promise is an order statistic of calibration positives: distribution-free, if labeled and lake positives
are exchangeable and the calibration positives were used for nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


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
    return math.ceil(math.log(1 - confidence) / math.log(recall) - 1e-12)


def recall_threshold(calibration_scores: Any, recall: float, confidence: float) -> RecallThreshold:
    """The highest threshold that keeps the recall promise.

    With n calibration scores and the rank-k smallest as threshold, recall is Beta-distributed and
    P(recall >= r) = P(Binomial(n, 1 - r) >= k) (order statistics; Wilks 1941).

    Args:
        calibration_scores: Scores of calibration positives, float [n].
        recall: r, in (0, 1).
        confidence: In (0, 1).

    Raises:
        ValueError: Too few calibration positives; says how many are needed.
    """
    scores = np.sort(np.asarray(calibration_scores, np.float64))
    n = len(scores)
    needed = fewest_positives(recall, confidence)
    if n < needed:
        raise ValueError(
            f"recall {recall:g} with confidence {confidence:g} needs at least {needed} calibration positives, got {n}"
        )
    ranks = np.arange(1, n + 1)
    holds = stats.binom.sf(ranks - 1, n, 1 - recall) >= confidence - 1e-12  # where the promise is met exactly
    rank = int(ranks[holds].max())
    return RecallThreshold(float(scores[rank - 1]), recall, confidence, n, rank)
