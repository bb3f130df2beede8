"""Balance between classes: quotas for the selection, weights for the loss. Pure arithmetic.

Axis: K classes, by the teacher's prediction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def quotas(available_K: Any, budget: int) -> npt.NDArray[np.int64]:
    """Share a budget equally; what a class cannot fill passes to the others (water-filling).

    Args:
        available_K: Candidates per class, int [K].
        budget: Images to hand out; all candidates if it exceeds their number.

    Returns:
        int64 [K], at most the candidates of each class, summing to min(budget, candidates).
        An odd remainder goes to the classes with the lowest index.
    """
    available = np.asarray(available_K, np.int64)
    quota = np.zeros_like(available)
    left = min(int(budget), int(available.sum()))
    while left > 0:
        open_classes = np.flatnonzero(quota < available)
        share = left // len(open_classes)
        if share == 0:
            quota[open_classes[:left]] += 1
            break
        taken = np.minimum(share, available[open_classes] - quota[open_classes])
        quota[open_classes] += taken
        left -= int(taken.sum())
    return quota


def class_weights(soft_counts_K: Any, counts_K: Any, clip: float) -> npt.NDArray[np.float64]:
    """Weights that raise rare classes, without exploding for empty ones (paper, equation 7, amended).

    The paper sets w_k proportional to 1 / sum_x softmax(T(x))_k with sum_k w_k = K. A nearly empty class then gets
    a weight without bound, and the mean weight of a *sample* shrinks. Here a weight is at most `clip` times the
    mean weight, and the mean sample weight is 1, so the learning rate keeps its meaning.

    Args:
        soft_counts_K: sum over images of the teacher's probability of each class, float [K].
        counts_K: Images whose predicted class is k, int [K].
        clip: Largest ratio of a weight to the unweighted mean of the weights before clipping, at least 1.

    Returns:
        float64 [K] with sum_k counts_k * w_k = sum_k counts_k.

    Raises:
        ValueError: No images.
    """
    soft = np.asarray(soft_counts_K, np.float64)
    counts = np.asarray(counts_K, np.float64)
    if counts.sum() <= 0:
        raise ValueError("class weights need at least one image")
    # The most frequent class is the reference: its weight is 1 before normalisation, and no other exceeds `clip`.
    weights = np.minimum(soft.max() / np.maximum(soft, 1e-12), clip)
    normalised: npt.NDArray[np.float64] = weights * counts.sum() / (weights * counts).sum()
    return normalised
