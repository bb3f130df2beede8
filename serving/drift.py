"""How far a student's certainty has moved from what it was on the images it was taught with. Arithmetic only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

_WINDOW = 2000  # latest images
_LEAST = 200  # of these before a number is told: a tenth of 200 is 20
_SMOOTHING = 0.5  # images added to every bin, so that an empty one has a logarithm


class Drift:
    """Population stability index of the largest probability, over the latest images.

    The bins are the tenths of the reference, so each should hold a tenth. The index is the sum over the bins of
    (share - wanted) ln(share / wanted): Jeffreys' divergence (Jeffreys 1946), zero for equal shares. Below 0.1 is
    customarily called stable, above 0.25 shifted (Siddiqi 2006).

    Args:
        edges: The nine inner deciles of the reference, rising.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        # Deciles that coincide, as those of a student that is mostly certain, are one bin of their common share. One
        # that was always certain has a single bin, and nothing to be told by.
        unique, times = np.unique(np.asarray(edges, np.float64), return_counts=True)
        if times[-1] > 1:
            self._edges, self._wanted = unique[:-1], times / 10
            self._wanted[-1] += 0.1
        else:
            self._edges, self._wanted = unique, np.append(times / 10, 0.1)
        self._bins: deque[int] = deque(maxlen=_WINDOW)

    def add(self, confidences: Sequence[float]) -> None:
        """Largest probabilities of further images."""
        self._bins.extend(np.searchsorted(self._edges, np.asarray(confidences, np.float64), side="left").tolist())

    @property
    def index(self) -> float | None:
        """The index; None while there are too few images."""
        if len(self._bins) < _LEAST:
            return None
        counts = np.bincount(np.asarray(self._bins), minlength=len(self._wanted)) + _SMOOTHING
        shares = counts / counts.sum()
        return float(np.sum((shares - self._wanted) * np.log(shares / self._wanted)))
