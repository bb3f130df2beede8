"""Class weights of every step: as given, the exact worst case near them, or what the paper's code draws.

The worst case answers the running mean loss of each class up to the step before, so that a batch may be taken in parts
and no worker waits for the others before its backward pass. Axes: N images of a batch, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pu_ray import balance, workers
from pu_ray.config import LossesConfig
from pu_ray.distill import losses, robust

_RUNNING_DECAY = 0.9


class Adversary:
    """Weighs the classes.

    Args:
        settings: Kind, radius, clip.
        soft_K: Sum over all images of the teacher's probabilities.
        counts_K: Images by the teacher's predicted class.
        seed: Of the paper's perturbation.
    """

    def __init__(self, settings: LossesConfig, soft_K: Any, counts_K: Any, seed: int) -> None:
        self._settings = settings
        self.shares = np.asarray(counts_K, np.float64) / np.sum(counts_K)
        classes = len(self.shares)
        if not settings.class_weights:
            self.weights = np.ones(classes)
        elif settings.robust == "paper":
            inverse = 1 / np.maximum(soft_K, 1e-12)
            self.weights = inverse * classes / inverse.sum()
        else:
            self.weights = balance.class_weights(soft_K, counts_K, settings.class_weight_clip)
        self._seed = seed
        self._steps = 0
        self.sums = np.zeros(classes)
        self.counts = np.zeros(classes)
        self._seen: Tensor | None = None

    def candidates(self) -> list[Any]:
        """Weight vectors float64 [K] of this step; the largest of their losses is the loss."""
        settings = self._settings
        if settings.robust == "paper":
            # Seeded by the step, so that a run that goes on from a checkpoint draws what it would have drawn.
            generator = np.random.default_rng([self._seed, 3, self._steps])
            return [self.weights, robust.paper_perturbation(self.weights, settings.radius, generator)]
        if settings.robust == "exact" and settings.radius > 0:
            means = self.sums / np.maximum(self.counts, 1e-12)
            return [robust.worst_weights(self.weights, means, self.shares, settings.radius)]
        return [self.weights]

    def loss(self, divergence_N: Tensor, predicted_N: Tensor) -> Tensor:
        """The weighted loss of a batch or of a part of it, a scalar."""
        with torch.no_grad():
            seen = torch.stack(losses.class_means(divergence_N.detach(), predicted_N, len(self.shares)))
            self._seen = seen if self._seen is None else self._seen + seen
        weighted = [
            losses.weighted(
                divergence_N, predicted_N, torch.as_tensor(each, dtype=divergence_N.dtype, device=divergence_N.device)
            )
            for each in self.candidates()
        ]
        return torch.stack(weighted).max()

    def step(self) -> None:
        """End a step: take what all workers have seen in it into the running means."""
        self._steps += 1
        if self._seen is not None and self._settings.robust == "exact" and self._settings.radius > 0:
            sums, counts = workers.total(self._seen).double().cpu().numpy()
            self.sums = _RUNNING_DECAY * self.sums + sums
            self.counts = _RUNNING_DECAY * self.counts + counts
        self._seen = None

    def state(self) -> dict[str, Any]:
        """For checkpoints, between steps."""
        return {"sums": self.sums.tolist(), "counts": self.counts.tolist(), "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.sums, self.counts = np.array(state["sums"]), np.array(state["counts"])
        self._steps = state["steps"]
