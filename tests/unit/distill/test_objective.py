"""pu_ray/distill/objective.py: a job's loss is the weighted sum of what it names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pu_ray.config import LossesConfig
from pu_ray.distill import losses
from pu_ray.distill.adversary import Adversary
from pu_ray.distill.objective import Learner, Objective

CLASSES = 4
PLAIN = {"robust": "none", "class_weights": False, "temperature": 3.0}


def batch(seed=0, images=10):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(images, CLASSES, generator=generator) for _ in range(2))
    return student, teacher, torch.tensor([0, -1] * (images // 2))


def value(noise=None, **changes):
    settings = LossesConfig(**PLAIN | changes)
    adversary = Adversary(settings, np.full(CLASSES, 5.0), np.full(CLASSES, 5), 0)
    return Objective(settings, adversary)(*batch(), noise).item()


def test_the_plain_objective_is_distillation():
    student, teacher, _ = batch()
    assert value() == pytest.approx(losses.distillation(student, teacher, 3.0).mean().item())


def test_standardising_happens_before_the_temperature():
    student, teacher, _ = batch()
    pair = (losses.standardised(student), losses.standardised(teacher))
    assert value(standardise=True) == pytest.approx(losses.distillation(*pair, 3.0).mean().item())


def test_each_addition_has_its_weight():
    student, teacher, labels = batch()
    dist = losses.correlation_distance(student, teacher, 3.0).item()
    labeled = losses.labeled_cross_entropy(student, labels).item()
    assert value(dist=0.5) - value() == pytest.approx(0.5 * dist, rel=1e-4)
    assert value(labeled=2.0) - value() == pytest.approx(2 * labeled, rel=1e-4)
    assert value(noise=torch.tensor(1.5), noise_matrix=0.2) - value() == pytest.approx(0.3, rel=1e-4)
    together = value(dist=0.5, labeled=2.0, noise=torch.tensor(1.5), noise_matrix=0.2)
    assert together - value() == pytest.approx(0.5 * dist + 2 * labeled + 0.3, rel=1e-4)


def test_the_adversary_weighs_the_divergence_alone():
    settings = LossesConfig(**PLAIN | {"labeled": 1.0, "class_weights": True, "class_weight_clip": 10.0})
    adversary = Adversary(settings, np.array([1.0, 2.0, 3.0, 4.0]), np.array([1, 2, 3, 4]), 0)
    student, teacher, labels = batch()
    expected = adversary.weights[teacher.argmax(dim=1)] * losses.distillation(student, teacher, 3.0).numpy()
    ours = Objective(settings, adversary)(student, teacher, labels, None).item()
    assert ours == pytest.approx(expected.mean() + losses.labeled_cross_entropy(student, labels).item(), rel=1e-5)


def test_a_learner_has_a_noise_matrix_only_where_it_is_asked_for():
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    plain = Learner(student, LossesConfig(), CLASSES)
    assert len(list(plain.parameters())) == len(list(student.parameters()))
    logits, nothing = plain(torch.ones(2, 3, 2, 2), torch.zeros(2, CLASSES))
    assert nothing is None
    assert logits.shape == (2, CLASSES)
    noisy = Learner(student, LossesConfig(noise_matrix=1.0), CLASSES)
    teacher = torch.tensor([[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0]])
    logits, loss = noisy(torch.ones(2, 3, 2, 2), teacher)
    assert loss.item() == pytest.approx(noisy.noise(logits, torch.tensor([1, 2])).item())
    loss.backward()
    assert noisy.noise.logits_KK.grad.abs().sum() > 0
    assert student[1].weight.grad.abs().sum() > 0
