"""Distillation losses. Axes: N images of a batch, K classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def distillation(student_logits_NK: Tensor, teacher_logits_NK: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(softmax(T / tau) || softmax(S / tau)) of each image, float [N] (Hinton et al. 2015, section 2).

    The factor keeps gradients comparable across temperatures; it is 1 at the paper's tau = 1.
    """
    student = functional.log_softmax(student_logits_NK / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits_NK / temperature, dim=1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=1)
    return divergence * temperature**2


def class_means(losses_N: Tensor, classes_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum of the losses and number of images of each class, both float [K]; means follow after reduction."""
    zeros = torch.zeros(classes, dtype=losses_N.dtype, device=losses_N.device)
    sums = zeros.index_add(0, classes_N, losses_N)
    counts = zeros.index_add(0, classes_N, torch.ones_like(losses_N))
    return sums, counts


def weighted(losses_N: Tensor, classes_N: Tensor, weights_K: Tensor) -> Tensor:
    """mean_x v[class of x] * loss(x) (paper, equation 9); a scalar."""
    return (weights_K[classes_N] * losses_N).mean()
