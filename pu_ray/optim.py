"""Optimisers and learning-rate schedules by configuration, shared by the PU fit and distillation."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pu_ray.config import OptimizerConfig

_WARM_UP = 0.15  # of a one-cycle schedule


def build(
    parameters: Iterable[nn.Parameter], settings: OptimizerConfig, steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """An optimiser and its schedule over `steps` optimiser steps."""
    optimizer: torch.optim.Optimizer
    if settings.kind == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov and settings.momentum > 0,
        )
    return optimizer, LambdaLR(optimizer, lambda step: rate(settings, step, steps))


def rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate at a step, as a factor of `settings.lr`."""
    done = step / max(steps, 1)
    if settings.schedule == "milestones":
        return float(0.1 ** sum(done >= milestone for milestone in settings.milestones))
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if settings.schedule == "one_cycle":
        if done < _WARM_UP:
            return 0.04 + 0.96 * done / _WARM_UP
        return max(0.0, 1 - (done - _WARM_UP) / (1 - _WARM_UP))
    return 1.0
