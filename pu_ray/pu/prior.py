"""The class prior with an interval: what share of the lake are positives?

Best-bin estimation (Garg et al. 2021): for any threshold t, share_U(t) / share_P(t) bounds the prior from above,
and at thresholds above which no negative lies it equals the prior. The bands are binomial-KL (Chernoff) bounds
on a geometric grid of thresholds with a union bound: at small priors the published DKW slack swamps the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_GRID_RATIO = 0.85
_SMALLEST_BIN = 10  # held-out positives; smaller bins have bands too wide to win
_SEPARABLE_SHARE = 0.5


@dataclass(frozen=True)
class Prior:
    """An estimate of the prior.

    Attributes:
        estimate: Ratio at the best threshold, in (0, 1].
        low: Lower end; holds if no negative scores above the upper half of the positives.
        high: Upper end; holds without that assumption.
        confidence: Of the two-sided interval.
        is_upper_bound: The best threshold keeps only a small part of the positives, so positives could not be
            told from some negatives and the estimate is an upper bound rather than a value.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    is_upper_bound: bool


def estimate_prior(positive_scores: Any, unlabeled_scores: Any, confidence: float = 0.95) -> Prior:
    """Best-bin estimate with binomial-KL bands.

    Args:
        positive_scores: Scores of held-out labeled positives, float [n_P]; never trained on.
        unlabeled_scores: Scores of held-out unlabeled images, float [n_U].
        confidence: Of the interval, in (0, 1).

    Raises:
        ValueError: Fewer than ten scores on either side, or scores that are not finite.
    """
    positive = np.sort(np.asarray(positive_scores, np.float64))
    unlabeled = np.sort(np.asarray(unlabeled_scores, np.float64))
    if min(len(positive), len(unlabeled)) < _SMALLEST_BIN:
        raise ValueError(
            f"at least {_SMALLEST_BIN} scores are needed on either side, got {len(positive)}, {len(unlabeled)}"
        )
    if not (np.isfinite(positive).all() and np.isfinite(unlabeled).all()):
        raise ValueError("scores must be finite")
    n_p, n_u = len(positive), len(unlabeled)
    steps = int(np.floor(np.log(_SMALLEST_BIN / n_p) / np.log(_GRID_RATIO)))
    kept = np.unique(np.ceil(n_p * _GRID_RATIO ** np.arange(steps + 1)).astype(int))
    thresholds = positive[n_p - kept]
    share_p = 1 - np.searchsorted(positive, thresholds, side="left") / n_p
    share_u = 1 - np.searchsorted(unlabeled, thresholds, side="left") / n_u
    # Four one-sided bands at every threshold share what may go wrong.
    delta = (1 - confidence) / (4 * len(thresholds))
    upper = kl_upper(share_u, n_u, delta) / np.maximum(kl_lower(share_p, n_p, delta), 1e-12)
    best = int(np.argmin(upper))
    # The best threshold may already let some negatives in, which lifts the ratio; a stricter one shows by how much.
    lower = kl_lower(share_u, n_u, delta) / kl_upper(share_p, n_p, delta)
    low = float(lower[(share_p >= min(_SEPARABLE_SHARE, share_p[best]))].min())
    estimate = float(np.clip(share_u[best] / share_p[best], 1 / n_u, 1.0))
    return Prior(
        estimate=estimate,
        low=min(low, estimate),
        high=float(np.clip(upper[best], estimate, 1.0)),
        confidence=confidence,
        # At the far ends of the scale the bins say nothing: all positive, or not to be told apart.
        is_upper_bound=bool(share_p[best] < _SEPARABLE_SHARE or upper[best] >= 1),
    )


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
