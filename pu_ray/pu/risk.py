"""Risks for learning from positives and unlabeled images.

Symbols (docs and papers): g the scorer's logit, pi the prior, l a loss of the margin z;
R_P+ = mean_P l(g), R_P- = mean_P l(-g), R_U- = mean_U l(-g).
Axes: P labeled positives, U unlabeled images of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Risk(NamedTuple):
    """A risk and what to descend.

    Attributes:
        value: The risk, a detached scalar.
        objective: Scalar whose gradient the optimiser follows; its value may differ from the risk.
        corrected: Whether the non-negative correction was active.
    """

    value: Tensor
    objective: Tensor
    corrected: bool


def sigmoid_loss(z: Tensor) -> Tensor:
    """l(z) = sigmoid(-z), bounded and symmetric: l(z) + l(-z) = 1 (the paper's)."""
    return torch.sigmoid(-z)


LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": sigmoid_loss,
    # log(1 + exp(-z)): convex, so a positive far on the wrong side still pulls.
    "logistic": lambda z: functional.softplus(-z),
}


def non_negative_pu(
    positive_logits_P: Tensor,
    unlabeled_logits_U: Tensor,
    prior: float,
    *,
    loss: str = "sigmoid",
    positive_weight: float | None = None,
    beta: float = 0.0,
    gamma: float = 1.0,
    across: Callable[[Tensor], Tensor] = lambda value: value,
) -> Risk:
    """Non-negative PU risk (Kiryo et al. 2017, equation 6 and algorithm 1; paper, equation 3).

    R = pi * R_P+ + max(-beta, R_U- - pi * R_P-). Where R_U- - pi * R_P- < -beta, the step follows the gradient of
    -gamma * (R_U- - pi * R_P-) instead, in which the positive term pi * R_P+ has no part.

    With a positive weight a, the risk is that of a population with prior a (Su et al. 2021, "imbalanced nnPU"):
    R = a * R_P+ + (1 - a) / (1 - pi) * max(-beta, R_U- - pi * R_P-). At a small pi the plain risk hardly asks for
    positives at all; a = 1/2 asks for both alike. a = pi gives back the plain risk.

    Args:
        positive_logits_P: g of labeled positives, float [P].
        unlabeled_logits_U: g of unlabeled images, float [U].
        prior: pi, share of positives among the unlabeled, in (0, 1).
        loss: One of `LOSSES`.
        positive_weight: a, in (0, 1), or None for the plain risk.
        beta: Tolerance, at least 0.
        gamma: Step of the correction, in (0, 1].
        across: Mean of a detached scalar over the workers of one step: all of them must take the same branch.
    """
    of = LOSSES[loss]
    weight = prior if positive_weight is None else positive_weight
    rest = (1 - weight) / (1 - prior)
    positive = weight * of(positive_logits_P).mean()
    negative = of(-unlabeled_logits_U).mean() - prior * of(-positive_logits_P).mean()
    corrected = bool(across(negative.detach()) < -beta)
    if corrected:
        return Risk((positive - rest * beta).detach(), -gamma * rest * negative, corrected)
    total = positive + rest * negative
    return Risk(total.detach(), total, corrected)


def positive_versus_unlabeled(positive_logits_P: Tensor, unlabeled_logits_U: Tensor) -> Risk:
    """Logistic risk that treats the unlabeled as negatives, both streams weighed alike (Elkan and Noto 2008).

    Not a risk of the true classes: its optimum orders images by the ratio of the densities of P and U.
    """
    total = 0.5 * (functional.softplus(-positive_logits_P).mean() + functional.softplus(unlabeled_logits_U).mean())
    return Risk(total.detach(), total, corrected=False)
