"""Scorers: networks that give one score per image, positive for images of the teacher's classes.

Axes: N images, D feature width (all stages), R reduced width of the attention, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pu_ray import models, workers
from pu_ray.config import JobConfig, ScorerConfig
from pu_ray.models import TappedNetwork, Teacher
from pu_ray.pu import risk

_ATTENTION_REDUCTION = 16  # paper: 960 -> 60 -> 960
_LEAST_STD = 1e-4  # a constant feature must not explode

Objective = Callable[[Tensor, Tensor], risk.Risk]


class Attention(nn.Module):
    """Squeeze-and-excitation gate over the concatenated stage features (paper, equation 2; Hu et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        reduced = max(width // _ATTENTION_REDUCTION, 1)
        self.squeeze = nn.Linear(width, reduced)
        self.excite = nn.Linear(reduced, width)

    def forward(self, features_ND: Tensor) -> Tensor:
        """Gated features [N, D]."""
        gate_ND = torch.sigmoid(self.excite(torch.relu(self.squeeze(features_ND))))
        return features_ND * gate_ND


class Head(nn.Module):
    """Standardised multi-scale features to one logit.

    Args:
        width: D.
        attention: Whether a squeeze-and-excitation gate comes first.
        hidden: Width of a hidden layer; 0 for none.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, attention: bool, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.attention: nn.Module = Attention(width) if attention else nn.Identity()
        self.body: nn.Module = nn.Sequential(nn.Linear(width, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.last = nn.Linear(hidden or width, 1)

    def standardise_like(self, features_ND: Tensor) -> None:
        """Take mean and standard deviation from these features."""
        self.mean.copy_(features_ND.mean(dim=0))
        self.std.copy_(features_ND.std(dim=0).clamp_min(_LEAST_STD))

    def forward(self, features_ND: Tensor) -> Tensor:
        """Logits [N]."""
        standard_ND = (features_ND - self.mean) / self.std
        return cast(Tensor, self.last(self.body(self.attention(standard_ND)))).squeeze(1)


class Neighbours(nn.Module):
    """How near the nearest of some reference images is: cosine in standardised feature space.

    Args:
        reference_MD: Features of the reference images.
        unlabeled_ND: Features that give the standardisation.
    """

    mean: Tensor
    std: Tensor
    reference: Tensor

    def __init__(self, reference_MD: Tensor, unlabeled_ND: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", unlabeled_ND.mean(dim=0))
        self.register_buffer("std", unlabeled_ND.std(dim=0).clamp_min(_LEAST_STD))
        self.register_buffer("reference", self._direction(reference_MD))

    def forward(self, features_ND: Tensor) -> Tensor:
        """Largest cosine [N], in [-1, 1]."""
        return (self._direction(features_ND) @ self.reference.T).amax(dim=1)

    def _direction(self, features_ND: Tensor) -> Tensor:
        return functional.normalize((features_ND - self.mean) / self.std, dim=1)


class Joined(nn.Module):
    """A head's logit and the nearest reference image's cosine, each standardised over the lake, added.

    The two err differently: where one ranks badly the other holds the sum up (docs/LOG.md). As much of the lake scores
    above 0 as has a logit above 0, so that the paper's rule means what it did.

    Args:
        head: Features to logits [N]; trained.
        neighbours: Features to cosines [N].
        unlabeled_ND: Features that give the standardisation.
    """

    per_std: Tensor
    zero: Tensor

    def __init__(self, head: nn.Module, neighbours: Neighbours, unlabeled_ND: Tensor) -> None:
        super().__init__()
        self.head = head
        self.neighbours = neighbours
        with torch.no_grad():
            both_2N = torch.stack([head.eval()(unlabeled_ND), neighbours(unlabeled_ND)])
        self.register_buffer("per_std", 1 / both_2N.std(dim=1).clamp_min(_LEAST_STD))
        sum_N = self.per_std @ both_2N
        self.register_buffer("zero", torch.quantile(sum_N, (both_2N[0] <= 0).float().mean()))

    def forward(self, features_ND: Tensor) -> Tensor:
        """Scores [N]."""
        logits_N, cosines_N = self.head(features_ND), self.neighbours(features_ND)
        return cast(Tensor, self.per_std[0] * logits_N + self.per_std[1] * cosines_N - self.zero)


class FinetunedScorer(nn.Module):
    """The paper's scorer: the whole network, initialised from the teacher, with attention over its stages."""

    def __init__(self, tapped: TappedNetwork, head: Head) -> None:
        super().__init__()
        self.tapped = tapped
        self.head = head

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits [N]."""
        features_ND, _ = self.tapped(x_NCHW)
        return cast(Tensor, self.head(features_ND))


class ScorerWithTeacher(nn.Module):
    """All answers the selection needs, in one pass over the pixels."""

    def __init__(self, scorer: FinetunedScorer, teacher: Teacher) -> None:
        super().__init__()
        self.scorer = scorer
        self.teacher = teacher

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [N], the teacher's logits [N, K] and features [N, D]."""
        features_ND, logits_NK = self.teacher(x_NCHW)
        return self.scorer(x_NCHW), logits_NK, features_ND


def objective(settings: ScorerConfig, prior: float) -> Objective:
    """The risk a scorer of this kind descends, from the logits of positives and of unlabeled images."""
    if settings.kind in ("pvu", "ted"):
        return risk.positive_versus_unlabeled
    weight = None if settings.positive_weight == "prior" else float(settings.positive_weight)
    return partial(
        risk.non_negative_pu,
        prior=prior,
        loss=settings.loss,
        positive_weight=weight,
        beta=settings.beta,
        gamma=settings.gamma,
        across=workers.mean,
    )


def new_finetuned(config: JobConfig) -> models.Normalised:
    """A trainable scorer from pixels uint8 [N, H, W, C], initialised from the teacher (paper, section 3.1)."""
    teacher, _ = models.load_teacher(config.teacher)
    probe = models.Normalised(teacher, config.teacher.preprocessing)(
        models.example_pixels(config.teacher.preprocessing)
    )
    head = Head(probe[0].shape[1], config.scorer.attention, config.scorer.hidden)
    # This copy of the teacher's network may be trained; the frozen one is loaded apart.
    tapped = teacher.tapped.requires_grad_(True)
    return models.Normalised(FinetunedScorer(tapped, head), config.teacher.preprocessing)


def with_teacher(scorer: models.Normalised, config: JobConfig) -> models.Normalised:
    """What `ScorerWithTeacher` gives, from pixels uint8 [N, H, W, C], for one pass over the lake."""
    teacher, _ = models.load_teacher(config.teacher)
    assert isinstance(scorer.network, FinetunedScorer)
    return models.Normalised(ScorerWithTeacher(scorer.network, teacher), config.teacher.preprocessing)
