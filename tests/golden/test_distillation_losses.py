"""What a job may add to the divergence (distill/losses.py) against numpy and scipy, at temperatures other than 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, pearsonr, zscore

from pu_ray.distill import losses

IMAGES, CLASSES = 7, 5
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0])


def pair(seed=0):
    generator = np.random.default_rng(seed)
    return [torch.from_numpy(generator.normal(0, 3, (IMAGES, CLASSES))) for _ in range(2)]


@TEMPERATURES
def test_distillation_is_the_scaled_divergence_from_the_teacher(temperature):
    student, teacher = pair()
    ours = losses.distillation(student, teacher, temperature)
    expected = [
        temperature**2 * entropy(softmax(t / temperature), softmax(s / temperature))
        for s, t in zip(student.numpy(), teacher.numpy(), strict=True)
    ]
    np.testing.assert_allclose(ours, expected)


def test_a_known_divergence():
    # softmax([ln 3, 0]) = (3/4, 1/4) against (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2.
    teacher, student = torch.tensor([[np.log(3.0), 0.0]]), torch.zeros(1, 2, dtype=torch.float64)
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert losses.distillation(student, teacher, 1.0).item() == pytest.approx(expected)
    # At temperature 2 the teacher's logits halve: softmax([ln sqrt 3, 0]).
    p = np.sqrt(3) / (1 + np.sqrt(3))
    expected = 4 * (p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p)))
    assert losses.distillation(student, teacher, 2.0).item() == pytest.approx(expected)


def test_the_gradient_of_distillation_does_not_shrink_with_the_temperature():
    student, teacher = pair()
    norms = []
    for temperature in (1e3, 1e4):
        given = student.clone().requires_grad_(True)
        losses.distillation(given, teacher, temperature).sum().backward()
        norms.append(given.grad.norm().item())
    # In the limit: (z_S - z_T) / K with both centred (Hinton et al. 2015, equation 4).
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    centred = [logits - logits.mean(dim=1, keepdim=True) for logits in (student, teacher)]
    assert norms[1] == pytest.approx(((centred[0] - centred[1]) / CLASSES).norm().item(), rel=1e-3)


def test_standardised_logits_are_z_scores_of_each_image():
    logits = pair()[0]
    np.testing.assert_allclose(losses.standardised(logits), zscore(logits.numpy(), axis=1), rtol=1e-5)


def test_standardised_logits_forget_scale_and_shift_and_survive_a_constant():
    logits = pair()[0]
    torch.testing.assert_close(losses.standardised(7 * logits + 3), losses.standardised(logits), rtol=1e-5, atol=1e-6)
    assert losses.standardised(torch.full((2, 3), 4.0)).abs().max() == 0


@TEMPERATURES
def test_dist_is_one_minus_pearson_over_classes_and_over_images(temperature):
    student, teacher = pair()
    one, other = (softmax(logits.numpy() / temperature, axis=1) for logits in (student, teacher))
    inter = 1 - np.mean([pearsonr(one[n], other[n])[0] for n in range(IMAGES)])
    intra = 1 - np.mean([pearsonr(one[:, k], other[:, k])[0] for k in range(CLASSES)])
    expected = temperature**2 * (inter + intra)
    assert losses.correlation_distance(student, teacher, temperature).item() == pytest.approx(expected)


def test_dist_of_equal_networks_is_zero_and_a_lonely_image_is_no_nan():
    student, _ = pair()
    assert losses.correlation_distance(student, student, 2.0).item() == pytest.approx(0, abs=1e-9)
    alone = student[:1].clone().requires_grad_(True)
    losses.correlation_distance(alone, student[:1], 2.0).backward()
    assert torch.isfinite(alone.grad).all()


def test_the_noise_matrix_begins_near_the_identity_and_keeps_rows_that_add_up():
    matrix = losses.NoiseMatrix(CLASSES, trust=0.8).matrix().detach().numpy()
    np.testing.assert_allclose(np.diag(matrix), 0.8, rtol=1e-6)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)


def test_the_noise_loss_is_the_cross_entropy_behind_the_matrix():
    noise = losses.NoiseMatrix(CLASSES)
    with torch.no_grad():
        noise.logits_KK += torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(1))
    student = pair()[0].float()
    answers = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    behind = softmax(student.numpy(), axis=1) @ softmax(noise.logits_KK.detach().numpy(), axis=1)
    expected = -np.log(behind[np.arange(IMAGES), answers.numpy()]).mean()
    assert noise(student, answers).item() == pytest.approx(expected, rel=1e-5)


def test_the_noise_matrix_learns_who_is_taken_for_whom():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (4000,), generator=generator)
    # A teacher that takes 30 % of class 2 for class 0.
    wrong = (truth == 2) & (torch.rand(4000, generator=generator) < 0.3)
    answers = torch.where(wrong, 0, truth)
    noise = losses.NoiseMatrix(3)
    optimizer = torch.optim.Adam(noise.parameters(), lr=0.1)
    sure = 20 * torch.nn.functional.one_hot(truth, 3).float()
    for _ in range(300):
        optimizer.zero_grad()
        noise(sure, answers).backward()
        optimizer.step()
    matrix = noise.matrix().detach().numpy()
    np.testing.assert_allclose(matrix[2], [0.3, 0, 0.7], atol=0.03)
    assert matrix[0, 0] > 0.98


def test_the_cross_entropy_of_labeled_images_counts_them_alone_and_adds_up_over_parts():
    student = pair()[0]
    labels = torch.tensor([2, -1, 0, -1, -1, 4, -1])
    values = -log_softmax(student.numpy(), axis=1)
    expected = (values[0, 2] + values[2, 0] + values[5, 4]) / IMAGES
    assert losses.labeled_cross_entropy(student, labels).item() == pytest.approx(expected)
    parts = [losses.labeled_cross_entropy(student[rows], labels[rows]) for rows in (slice(0, 3), slice(3, 7))]
    assert (parts[0] * 3 + parts[1] * 4).item() / IMAGES == pytest.approx(expected)
    assert losses.labeled_cross_entropy(student, torch.full((IMAGES,), -1)).item() == 0


def test_class_means_and_weights_agree_with_numpy():
    values, classes = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 2, 0])
    sums, counts = losses.class_means(values, classes, 4)
    assert sums.tolist() == [9, 0, 6, 0]
    assert counts.tolist() == [2, 0, 2, 0]
    weights = torch.tensor([1.0, 10.0, 0.5, 10.0])
    assert losses.weighted(values, classes, weights).item() == (1 + 1 + 2 + 8) / 4
