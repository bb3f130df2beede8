"""Distillation losses. Axes: N images of a batch, K classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEAST_DEVIATION = 1e-7


def distillation(student_logits_NK: Tensor, teacher_logits_NK: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(softmax(T / tau) || softmax(S / tau)) of each image, float [N] (Hinton et al. 2015, section 2).

    The factor keeps gradients comparable across temperatures; it is 1 at the paper's tau = 1.
    """
    student = functional.log_softmax(student_logits_NK / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits_NK / temperature, dim=1)
    divergence = (teacher.exp() * (teacher - student)).sum(dim=1)
    return divergence * temperature**2


def standardised(logits_NK: Tensor) -> Tensor:
    """Each image's logits with mean 0 and standard deviation 1 over the classes (Sun et al. 2024, equation 9)."""
    deviation = logits_NK.std(dim=1, keepdim=True, unbiased=False)
    return (logits_NK - logits_NK.mean(dim=1, keepdim=True)) / (deviation + _LEAST_DEVIATION)


def correlation_distance(student_logits_NK: Tensor, teacher_logits_NK: Tensor, temperature: float) -> Tensor:
    """DIST: tau^2 * (inter + intra), a scalar (Huang et al. 2022, equations 7 to 9).

    `inter` is 1 - Pearson's correlation of the two networks' probabilities over the classes, mean over the images;
    `intra` is the same over the images, mean over the classes. It asks for the teacher's order, not for its values.
    """
    student = torch.softmax(student_logits_NK / temperature, dim=1)
    teacher = torch.softmax(teacher_logits_NK / temperature, dim=1)
    inter = 1 - _pearson(student, teacher).mean()
    intra = 1 - _pearson(student.T, teacher.T).mean()
    return temperature**2 * (inter + intra)


def _pearson(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of the rows; 0 where a row is constant."""
    one = one - one.mean(dim=1, keepdim=True)
    other = other - other.mean(dim=1, keepdim=True)
    return functional.cosine_similarity(one, other, dim=1)


class NoiseMatrix(nn.Module):
    """The teacher's mistakes on lake images as a learned matrix (DFND, Chen et al. 2021, section 3.3).

    Row k of `matrix()` is what the teacher says of an image that the student takes for class k. It begins near the
    identity, and takes the blame for answers that no student could explain.

    Args:
        classes: K.
        trust: The diagonal at the beginning.
    """

    def __init__(self, classes: int, trust: float = 0.9) -> None:
        super().__init__()
        # A softmax over each row keeps it a distribution; this gap gives `trust` on the diagonal.
        gap = math.log(trust * (classes - 1) / (1 - trust))
        self.logits_KK = nn.Parameter(gap * torch.eye(classes))

    def matrix(self) -> Tensor:
        """Probabilities [K, K]; rows add up to 1."""
        return torch.softmax(self.logits_KK, dim=1)

    def forward(self, student_logits_NK: Tensor, answers_N: Tensor) -> Tensor:
        """Mean cross entropy of the teacher's answers int64 [N] with the student's, seen through the matrix."""
        probabilities = torch.softmax(student_logits_NK, dim=1) @ self.matrix()
        least = torch.finfo(probabilities.dtype).tiny
        return functional.nll_loss(probabilities.clamp_min(least).log(), answers_N)


def labeled_cross_entropy(student_logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over the labeled images of a batch of the cross entropy with their true class, divided by N; a scalar.

    Dividing by all N keeps the weight of one labeled image the same however many a batch holds, and adds up over parts
    of a batch and over workers.

    Args:
        student_logits_NK: The student's logits.
        labels_N: True classes int64; -1 for an image without one.
    """
    total = functional.cross_entropy(student_logits_NK, labels_N, ignore_index=-1, reduction="sum")
    return total / len(labels_N)


def class_means(losses_N: Tensor, classes_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum of the losses and number of images of each class, both float [K]; means follow after reduction."""
    zeros = torch.zeros(classes, dtype=losses_N.dtype, device=losses_N.device)
    sums = zeros.index_add(0, classes_N, losses_N)
    counts = zeros.index_add(0, classes_N, torch.ones_like(losses_N))
    return sums, counts


def weighted(losses_N: Tensor, classes_N: Tensor, weights_K: Tensor) -> Tensor:
    """mean_x v[class of x] * loss(x) (paper, equation 9); a scalar."""
    return (weights_K[classes_N] * losses_N).mean()
