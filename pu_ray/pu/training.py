"""Learning one logit from two streams, without Ray and without files: what the PU fit and the cascade's gate share.

Two streams feed every step: a fixed number of positives and a batch of unlabeled images. (In the published code
both lie in one shuffled list, and with 20 labeled images per class half of the batches hold no positive.) The epoch
is chosen by the AUC of held-out positives against held-out unlabeled images, never by true labels.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pu_ray import optim
from pu_ray.config import ScorerConfig, SplitConfig
from pu_ray.progress import Progress
from pu_ray.pu import scorers

ROLES = ("train", "validate", "calibrate")
_EVALUATION_BATCH = 1024


@dataclass
class Fitted:
    """A fitted scorer.

    Attributes:
        module: The module that was given, with the parameters of the chosen epoch.
        epoch: Counted from 1.
        proxy_auc: AUC of held-out positives against held-out unlabeled images, at that epoch.
        curve: Risk and proxy AUC after each epoch.
    """

    module: nn.Module
    epoch: int
    proxy_auc: float
    curve: list[dict[str, float]]


@dataclass(frozen=True)
class Streams:
    """Inputs of the fit: features [., D] float32, or pixels [., H, W, C] uint8 for a fine-tuned scorer."""

    positive_train: Tensor
    positive_validate: Tensor
    positive_calibrate: Tensor
    unlabeled_train: Tensor
    unlabeled_validate: Tensor


def assign_roles(ids: list[bytes], labels: Any, split: SplitConfig, seed: int) -> list[str]:
    """Share labeled images out by class, independent of their order in the listing.

    Images with the same bytes get the same role, so that a copy never tells a secret.

    Returns:
        One of `ROLES` for each image.
    """
    order = sorted(
        set(zip(np.asarray(labels).tolist(), ids, strict=True)), key=lambda item: (item[0], rank(item[1], seed))
    )
    roles: dict[bytes, str] = {}
    # Walking class by class along one running count keeps the shares exact overall and nearly so in each class.
    bounds = (split.train, split.train + split.validate_)
    for position, (_, sample) in enumerate(order):
        # A golden-ratio sequence spreads the roles evenly over every class.
        place = (position * 0.6180339887498949) % 1.0
        roles.setdefault(sample, ROLES[sum(place >= bound for bound in bounds)])
    return [roles[sample] for sample in ids]


def rank(sample: bytes, seed: int) -> bytes:
    """A random place in an order that depends on the sample and the seed alone."""
    return hashlib.blake2b(sample, digest_size=8, key=seed.to_bytes(8, "big")).digest()


def fit_scorer(
    module: nn.Module,
    streams: Streams,
    objective: scorers.Objective,
    settings: ScorerConfig,
    seed: int,
    progress: Progress,
) -> Fitted:
    """Descend the risk with two streams; keep the epoch with the best proxy AUC.

    Args:
        module: Maps a stream's inputs to logits [N]; changed in place.
        streams: Training and held-out inputs.
        objective: The risk of one step.
        settings: Batch sizes, epochs, optimiser.
        seed: Of the order of the images.
        progress: Advanced by unlabeled images.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(module.parameters()).device
    positives_per_step = min(max(1, round(settings.batch_size * settings.positive_share)), settings.batch_size - 1)
    unlabeled_per_step = min(settings.batch_size - positives_per_step, len(streams.unlabeled_train))
    steps_per_epoch = len(streams.unlabeled_train) // unlabeled_per_step
    optimizer, schedule = optim.build(module.parameters(), settings.optimizer, settings.epochs * steps_per_epoch)
    progress.start(settings.epochs * steps_per_epoch * unlabeled_per_step, "unlabeled images")
    positive_order = _Cycle(len(streams.positive_train), generator)
    best_auc, best_epoch, best_state = -1.0, 0, copy.deepcopy(module.state_dict())
    curve: list[dict[str, float]] = []
    for epoch in range(1, settings.epochs + 1):
        module.train()
        values = []
        order = torch.randperm(len(streams.unlabeled_train), generator=generator)
        for step in range(steps_per_epoch):
            positive = streams.positive_train[positive_order.take(positives_per_step)]
            unlabeled = streams.unlabeled_train[order[step * unlabeled_per_step :][:unlabeled_per_step]]
            # One forward pass for both streams: batch norm must see the mixture, not tell the streams apart.
            logits = module(torch.cat([positive, unlabeled]).to(device))
            current = objective(logits[:positives_per_step], logits[positives_per_step:])
            optimizer.zero_grad(set_to_none=True)
            current.objective.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            values.append(float(current.value))
            progress.advance(unlabeled_per_step)
        auc = proxy_auc(scores_of(module, streams.positive_validate), scores_of(module, streams.unlabeled_validate))
        curve.append({"epoch": epoch, "risk": float(np.mean(values)), "proxy_auc": auc})
        if auc > best_auc:
            best_auc, best_epoch, best_state = auc, epoch, copy.deepcopy(module.state_dict())
    module.load_state_dict(best_state)
    return Fitted(module, best_epoch, best_auc, curve)


class _Cycle:
    """Endless order of positives: each is used once before any is used again."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._count = count
        self._generator = generator
        self._left = torch.empty(0, dtype=torch.int64)

    def take(self, number: int) -> Tensor:
        while len(self._left) < number:
            self._left = torch.cat([self._left, torch.randperm(self._count, generator=self._generator)])
        taken, self._left = self._left[:number], self._left[number:]
        return taken


def scores_of(module: nn.Module, inputs: Tensor) -> Any:
    """Logits of many inputs in eval mode, float32 [N] array."""
    module.eval()
    device = next(module.parameters()).device
    with torch.inference_mode():
        parts = [
            module(inputs[start : start + _EVALUATION_BATCH].to(device)).float().cpu()
            for start in range(0, len(inputs), _EVALUATION_BATCH)
        ]
    return torch.cat(parts).numpy()


def proxy_auc(positive_scores: Any, unlabeled_scores: Any) -> float:
    """AUC of positives against unlabeled: needs no true labels, and rises with the true AUC."""
    truth = np.r_[np.ones(len(positive_scores)), np.zeros(len(unlabeled_scores))]
    return float(roc_auc_score(truth, np.r_[positive_scores, unlabeled_scores]))


def streams_of(positive: Tensor, unlabeled: Tensor, roles: list[str]) -> Streams:
    """Positives by their role, the unlabeled in two halves: one to learn from, one held out."""
    train, validate, calibrate = (torch.tensor([r == role for r in roles]) for role in ROLES)
    half = len(unlabeled) // 2
    return Streams(positive[train], positive[validate], positive[calibrate], unlabeled[:half], unlabeled[half:])
