"""How good answers are: shares with intervals, calibration, the commonest mistakes, and what was mined.

Axes: N images, K classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

_CALIBRATION_BINS = 15
_MOST_PAIRS = 20
_EXAMPLES = 5


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % Wilson interval; all in [0, 1]."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: int, n: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval of a binomial share (Wilson 1927).

    Raises:
        ValueError: n is not positive, or hits lie outside 0..n.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"need 0 <= hits <= n and n >= 1, got {hits} of {n}")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    share = hits / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Rate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def share_of(hits_N: Any) -> dict[str, Any]:
    """The `Rate` of a boolean array [N], N >= 1, as plain data."""
    return asdict(wilson(int(np.count_nonzero(hits_N)), len(hits_N)))


def expected_calibration_error(confidence_N: Any, right_N: Any) -> float:
    """Mean gap between confidence and accuracy over 15 equal bins, weighted by their size (Guo et al. 2017)."""
    confidence, right = np.asarray(confidence_N), np.asarray(right_N, float)
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    error = 0.0
    for index in np.unique(bins):
        inside = bins == index
        error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return float(error)


def among_the_best(probabilities_NK: Any, labels_N: Any, places: int) -> Any:
    """Whether the true class is among the most probable ones, bool [N]; of equal ones the first classes come first."""
    best_NP = np.argsort(-np.asarray(probabilities_NK), axis=1, kind="stable")[:, :places]
    return (best_NP == np.asarray(labels_N)[:, None]).any(axis=1)


def confusion_pairs(
    labels_N: Any, student_N: Any, teacher_N: Any, classes: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The student's commonest mistakes, at most 20, commonest first.

    Args:
        labels_N: True classes, int [N].
        student_N: Its answers, int [N].
        teacher_N: The teacher's answers, int [N].
        classes: Class names [K].
        names: Of the images [N].

    Returns:
        For each the names of the true class and of the one said instead, how often, how often the teacher says the
        same of that class, and up to five of the student's images.
    """
    mistakes = {
        who: Counter((int(true), int(said)) for true, said in zip(labels_N, answers, strict=True) if true != said)
        for who, answers in (("student", student_N), ("teacher", teacher_N))
    }
    commonest = sorted(mistakes["student"].items(), key=lambda item: (-item[1], item[0]))[:_MOST_PAIRS]
    pairs = []
    for (true, said), count in commonest:
        rows = np.flatnonzero((np.asarray(labels_N) == true) & (np.asarray(student_N) == said))
        pairs.append(
            {
                "true": classes[true],
                "predicted": classes[said],
                "count": count,
                "teacher_count": mistakes["teacher"][true, said],
                "examples": [names[row] for row in rows[:_EXAMPLES]],
            }
        )
    return pairs


def mining_quality(
    selected: set[bytes], truth: Mapping[bytes, int], lake_ids: set[bytes], excluded: set[bytes]
) -> dict[str, Any]:
    """Precision and recall of the selection, where the lake's truth is known.

    Args:
        selected: Chosen contents.
        truth: Class of each content; -1 for none of the teacher's classes.
        lake_ids: Usable contents of the lake.
        excluded: Contents that may not be mined (labeled, leaks); they count on neither side.
    """
    positives = {sample for sample in lake_ids if truth.get(sample, -1) >= 0} - excluded
    hits = len(selected & positives)
    return {
        "mined_precision": asdict(wilson(hits, len(selected))),
        "mined_recall": asdict(wilson(hits, len(positives))) if positives else None,
        "true_prior": len({s for s in lake_ids if truth.get(s, -1) >= 0}) / max(len(lake_ids), 1),
    }
