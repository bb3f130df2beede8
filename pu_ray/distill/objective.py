"""The loss that a job asks for, put together from losses.py, and the student as what it is computed from.

Axes: N images of a batch, K classes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pu_ray import workers
from pu_ray.config import LossesConfig
from pu_ray.distill import losses
from pu_ray.distill.adversary import Adversary


class Learner(nn.Module):
    """The student, with what learns beside it: one module, so that workers keep all of it equal.

    Args:
        student: From normalised images to logits [N, K].
        settings: Of the losses.
        classes: K.
    """

    def __init__(self, student: nn.Module, settings: LossesConfig, classes: int) -> None:
        super().__init__()
        self.student = student
        self.noise = losses.NoiseMatrix(classes) if settings.noise_matrix else None

    def forward(self, x_NCHW: Tensor, teacher_NK: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits float32 [N, K], and the loss behind the noise matrix where there is one."""
        student_NK = cast(Tensor, self.student(x_NCHW)).float()
        with torch.autocast(x_NCHW.device.type, enabled=False):
            return student_NK, None if self.noise is None else self.noise(student_NK, teacher_NK.argmax(dim=1))


class Objective:
    """The weighted sum of the losses of one part of a batch.

    DIST looks across images, so workers put their logits together for it; of a batch in parts it sees each part alone.

    Args:
        settings: Which losses.
        adversary: Weighs the classes of the divergence.
    """

    def __init__(self, settings: LossesConfig, adversary: Adversary) -> None:
        self._settings = settings
        self.adversary = adversary

    def __call__(self, student_NK: Tensor, teacher_NK: Tensor, labels_N: Tensor, noise: Tensor | None) -> Tensor:
        """A scalar.

        Args:
            student_NK: Logits of the student.
            teacher_NK: Logits of the teacher for the same crops.
            labels_N: True classes, -1 where nobody knows.
            noise: What `Learner` found.
        """
        settings = self._settings
        predicted_N = teacher_NK.argmax(dim=1)
        pair = (student_NK, teacher_NK)
        if settings.standardise:
            pair = (losses.standardised(student_NK), losses.standardised(teacher_NK))
        loss = self.adversary.loss(losses.distillation(*pair, settings.temperature), predicted_N)
        if settings.dist:
            together = [workers.together(part) for part in pair]
            loss = loss + settings.dist * losses.correlation_distance(together[0], together[1], settings.temperature)
        if settings.labeled:
            loss = loss + settings.labeled * losses.labeled_cross_entropy(student_NK, labels_N)
        if noise is not None:
            loss = loss + settings.noise_matrix * noise
        return loss
