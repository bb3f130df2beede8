"""pu_ray/distill/losses.py against NumPy and hand calculation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pu_ray.distill import losses


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def pair(seed, scale=3.0, images=7, classes=5):
    generator = np.random.default_rng(seed)
    return generator.normal(0, scale, (images, classes)), generator.normal(0, scale, (images, classes))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("seed", range(5))
def test_distillation_agrees_with_numpy(seed, temperature):
    student, teacher = pair(seed)
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=1)
    ours = losses.distillation(torch.tensor(student), torch.tensor(teacher), temperature)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)


def test_distillation_on_paper():
    # Teacher (3/4, 1/4) from logits (ln 3, 0), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2).
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert losses.distillation(student, teacher, 1.0).item() == pytest.approx(expected, abs=1e-6)
    # Logits twice as large at tau = 2 are the same distributions; only the factor tau^2 = 4 remains.
    assert losses.distillation(student, 2 * teacher, 2.0).item() == pytest.approx(4 * expected, abs=1e-6)


def test_it_is_the_divergence_from_teacher_to_student_and_not_the_other_way():
    # A student that puts nothing where the teacher has mass pays without bound; the reverse would cost ln 2.
    teacher, student = torch.zeros(1, 2), torch.tensor([[40.0, 0.0]])
    assert losses.distillation(student, teacher, 1.0).item() == pytest.approx(20 - math.log(2), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_tau_times_the_difference_of_the_softmaxes(temperature):
    # d/ds of tau^2 KL(p || softmax(s / tau)) = tau^2 (q - p) / tau.
    student, teacher = pair(11)
    tensor = torch.tensor(student, requires_grad=True)
    losses.distillation(tensor, torch.tensor(teacher), temperature).sum().backward()
    expected = temperature * (softmax(student / temperature) - softmax(teacher / temperature))
    np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_small_logits_have_the_same_gradient_at_every_temperature(temperature):
    # To first order softmax(z / tau) = (1 + (z - mean z) / tau) / K, so the gradient is the difference of the
    # centred logits over K, free of tau (Hinton et al. 2015, equation 4).
    student, teacher = pair(12, scale=1e-3)
    tensor = torch.tensor(student, requires_grad=True)
    losses.distillation(tensor, torch.tensor(teacher), temperature).sum().backward()
    difference = student - teacher
    expected = (difference - difference.mean(axis=1, keepdims=True)) / student.shape[1]
    np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=0, atol=3e-3 * np.abs(expected).max())


def test_a_student_like_its_teacher_pays_nothing_and_shifted_logits_change_nothing():
    _, teacher = pair(13)
    logits = torch.tensor(teacher)
    np.testing.assert_allclose(losses.distillation(logits + 5.0, logits, 4.0).numpy(), 0.0, atol=1e-12)


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    value = losses.distillation(student, torch.tensor([[-1e4, 1e4]]), 1.0)
    value.sum().backward()
    assert value.item() == pytest.approx(2e4)
    assert torch.isfinite(student.grad).all()


def test_class_means_gives_sums_and_counts_of_every_class_empty_ones_too():
    sums, counts = losses.class_means(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 2]), 4)
    assert sums.tolist() == [2.0, 0.0, 13.0, 0.0]
    assert counts.tolist() == [1.0, 0.0, 3.0, 0.0]


def test_weighted_is_the_mean_over_images_of_the_weight_of_their_class():
    # (2*1 + 1/2*2 + 2*4) / 3 = 11/3; dividing by the weights instead would give 11/4.5.
    values, classes = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1])
    assert losses.weighted(values, classes, torch.tensor([0.5, 2.0])).item() == pytest.approx(11 / 3)


def test_class_sums_and_shares_reproduce_the_weighted_loss():
    # What the adversary maximises, sum_k share_k * mean_k * v_k, is the loss the student pays.
    generator = torch.Generator().manual_seed(0)
    values, classes = torch.rand(50, generator=generator), torch.randint(0, 4, (50,), generator=generator)
    weights = torch.rand(4, generator=generator)
    sums, counts = losses.class_means(values, classes, 4)
    by_class = (counts / 50 * sums / counts * weights).sum()
    assert losses.weighted(values, classes, weights).item() == pytest.approx(by_class.item(), rel=1e-5)
