"""pu_ray/pu/risk.py against numbers from paper and pencil and against NumPy with gradients derived by hand.

The gradients below are typed from the derivatives, never asked of autograd: the correction branch is the place where
published code goes wrong, and a second autograd of the same formula would repeat the mistake.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pu_ray.pu import risk

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3/4, and its derivative there is 3/16


def logits(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradients(result, *inputs):
    result.objective.backward()
    return [item.grad.numpy() for item in inputs]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def loss_and_slope(name, z):
    """l(z) and dl/dz, by hand."""
    if name == "sigmoid":
        return 1 - sigmoid(z), -sigmoid(z) * (1 - sigmoid(z))
    return np.log1p(np.exp(-z)), -(1 - sigmoid(z))


def reference(positive, unlabeled, prior, loss, a, beta, gamma):
    """Value, gradients with respect to both kinds of logits, and whether the correction is active."""
    l_plus, slope_plus = loss_and_slope(loss, positive)
    l_minus, slope_minus = loss_and_slope(loss, -positive)  # d l(-g) / dg is minus the slope
    l_unlabeled, slope_unlabeled = loss_and_slope(loss, -unlabeled)
    n_p, n_u = len(positive), len(unlabeled)
    rest = (1 - a) / (1 - prior)
    negative_part = l_unlabeled.sum() / n_u - prior * l_minus.sum() / n_p
    corrected = negative_part < -beta
    value = a * l_plus.sum() / n_p + rest * max(-beta, negative_part)
    if corrected:
        return value, -gamma * rest * prior * slope_minus / n_p, gamma * rest * slope_unlabeled / n_u, corrected
    from_positive = a * slope_plus / n_p + rest * prior * slope_minus / n_p
    return value, from_positive, -rest * slope_unlabeled / n_u, corrected


def cases():
    """Random logits: confident ones fall into the correction branch, timid ones stay outside."""
    for seed in range(24):
        generator = np.random.default_rng(seed)
        confident = seed % 2 == 0
        positive = generator.normal(3.0 if confident else 0.0, 1.0, generator.integers(1, 9))
        unlabeled = generator.normal(-3.0 if confident else 0.5, 1.0, generator.integers(1, 17))
        yield pytest.param(positive, unlabeled, 0.1 + 0.03 * seed, confident, id=f"seed{seed}")


@pytest.mark.parametrize("loss", ["sigmoid", "logistic"])
@pytest.mark.parametrize("a", [None, 0.5, 0.9])
@pytest.mark.parametrize(("positive", "unlabeled", "prior", "confident"), cases())
def test_value_and_gradients_agree_with_the_derivation_by_hand(positive, unlabeled, prior, confident, a, loss):
    p, u = logits(*positive), logits(*unlabeled)
    beta, gamma = 0.01, 0.3
    ours = risk.non_negative_pu(p, u, prior, loss=loss, positive_weight=a, beta=beta, gamma=gamma)
    value, by_positive, by_unlabeled, corrected = reference(
        positive, unlabeled, prior, loss, prior if a is None else a, beta, gamma
    )
    assert ours.corrected == corrected == confident, "the cases were chosen to visit both branches"
    assert ours.value.item() == pytest.approx(value, abs=1e-12)
    positive_gradient, unlabeled_gradient = gradients(ours, p, u)
    np.testing.assert_allclose(positive_gradient, by_positive, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(unlabeled_gradient, by_unlabeled, rtol=1e-10, atol=1e-14)


def test_the_plain_risk_on_paper():
    # P = {ln 3}, U = {0, -ln 3}, pi = 1/4, sigmoid loss.
    # R_P+ = 1 - 3/4 = 1/4;  R_P- = 3/4;  R_U- = (1/2 + 1/4) / 2 = 3/8.
    # R_U- - pi R_P- = 3/8 - 3/16 = 3/16 >= 0, so R = 1/16 + 3/16 = 1/4.
    # Slopes: dR_P+/dg = -3/16, dR_P-/dg = 3/16, so dR/dg_P = 1/4 (-3/16 - 3/16) = -3/32;
    # dR/dg_U = (1/2) (1/4, 3/16) = (1/8, 3/32).
    p, u = logits(LN3), logits(0.0, -LN3)
    result = risk.non_negative_pu(p, u, 0.25)
    assert not result.corrected
    assert result.value.item() == pytest.approx(1 / 4, abs=1e-12)
    by_positive, by_unlabeled = gradients(result, p, u)
    np.testing.assert_allclose(by_positive, [-3 / 32], atol=1e-12)
    np.testing.assert_allclose(by_unlabeled, [1 / 8, 3 / 32], atol=1e-12)


def test_inside_the_correction_the_positive_term_has_no_gradient_of_its_own():
    # P = {ln 3}, U = {-ln 3, -ln 3}, pi = 1/2, sigmoid loss.
    # R_U- - pi R_P- = 1/4 - 3/8 = -1/8 < 0: the step follows the gradient of +1/8 = -(R_U- - pi R_P-).
    # d/dg_P = + pi * 3/16 = 3/32.  With a positive term of its own it would be 3/32 - 3/32 = 0, the known mistake.
    # d/dg_U = - (1/2) (3/16) = -3/32 each.  The risk itself is pi R_P+ + 0 = 1/8.
    p, u = logits(LN3), logits(-LN3, -LN3)
    result = risk.non_negative_pu(p, u, 0.5)
    assert result.corrected
    assert result.value.item() == pytest.approx(1 / 8, abs=1e-12)
    by_positive, by_unlabeled = gradients(result, p, u)
    np.testing.assert_allclose(by_positive, [3 / 32], atol=1e-12)
    np.testing.assert_allclose(by_unlabeled, [-3 / 32, -3 / 32], atol=1e-12)


def test_gamma_scales_the_corrected_step_and_nothing_else():
    p, u = logits(LN3), logits(-LN3, -LN3)
    result = risk.non_negative_pu(p, u, 0.5, gamma=0.25)
    assert result.value.item() == pytest.approx(1 / 8, abs=1e-12)
    by_positive, _ = gradients(result, p, u)
    np.testing.assert_allclose(by_positive, [3 / 128], atol=1e-12)
    outside = logits(LN3), logits(0.0, -LN3)
    assert risk.non_negative_pu(*outside, 0.25, gamma=0.25).objective.item() == pytest.approx(1 / 4, abs=1e-12)


@pytest.mark.parametrize(
    ("beta", "corrected", "value", "by_positive"),
    [
        # As above, R_U- - pi R_P- = -1/8. Below the tolerance 1/4 nothing is corrected: R = 1/8 - 1/8 = 0, and
        # dR/dg_P = 1/2 (-3/16 - 3/16) = -3/16.
        (1 / 4, False, 0.0, -3 / 16),
        # With the tolerance 1/16 the correction acts, and the risk counts -beta: R = 1/8 - 1/16 = 1/16.
        (1 / 16, True, 1 / 16, 3 / 32),
    ],
)
def test_beta_is_the_tolerance_below_zero(beta, corrected, value, by_positive):
    p, u = logits(LN3), logits(-LN3, -LN3)
    result = risk.non_negative_pu(p, u, 0.5, beta=beta)
    assert result.corrected is corrected
    assert result.value.item() == pytest.approx(value, abs=1e-12)
    np.testing.assert_allclose(gradients(result, p, u)[0], [by_positive], atol=1e-12)


def test_a_positive_weight_of_one_half_on_paper():
    # P = {ln 3}, U = {0, 0}, pi = 1/4, a = 1/2, sigmoid loss. R_U- - pi R_P- = 1/2 - 3/16 = 5/16.
    # (1 - a) / (1 - pi) = 2/3, so R = 1/2 * 1/4 + 2/3 * 5/16 = 1/8 + 5/24 = 1/3.
    # dR/dg_P = 1/2 (-3/16) - 2/3 * 1/4 * 3/16 = -3/32 - 1/32 = -1/8;  dR/dg_U = 2/3 * (1/4) / 2 = 1/12 each.
    p, u = logits(LN3), logits(0.0, 0.0)
    result = risk.non_negative_pu(p, u, 0.25, positive_weight=0.5)
    assert result.value.item() == pytest.approx(1 / 3, abs=1e-12)
    by_positive, by_unlabeled = gradients(result, p, u)
    np.testing.assert_allclose(by_positive, [-1 / 8], atol=1e-12)
    np.testing.assert_allclose(by_unlabeled, [1 / 12, 1 / 12], atol=1e-12)


@pytest.mark.parametrize("unlabeled", [(0.3, -1.0, 2.0), (-4.0, -5.0, -3.0)], ids=["outside", "inside"])
def test_the_prior_as_positive_weight_gives_back_the_plain_risk(unlabeled):
    plain, weighted = [
        (logits(2.0, 1.0), logits(*unlabeled), weight) for weight in (None, 0.3)
    ]  # a = pi makes (1 - a) / (1 - pi) = 1
    results = [risk.non_negative_pu(p, u, 0.3, positive_weight=weight) for p, u, weight in (plain, weighted)]
    assert results[0].corrected == results[1].corrected == (unlabeled[0] < 0)
    assert results[0].value.item() == pytest.approx(results[1].value.item(), abs=1e-14)
    for one, other in zip(gradients(results[0], *plain[:2]), gradients(results[1], *weighted[:2]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-14)


def test_the_logistic_risk_on_paper():
    # P = {ln 3}: l(g) = ln(1 + 1/3) = ln 4/3, l(-g) = ln 4. U = {0}: l(0) = ln 2. pi = 1/4:
    # R_U- - pi R_P- = ln 2 - (1/4) ln 4 = (1/2) ln 2;  R = (1/4) ln 4/3 + (1/2) ln 2.
    p, u = logits(LN3), logits(0.0)
    result = risk.non_negative_pu(p, u, 0.25, loss="logistic")
    assert result.value.item() == pytest.approx(math.log(4 / 3) / 4 + math.log(2) / 2, abs=1e-12)


def test_positive_versus_unlabeled_on_paper():
    # P = {ln 3}, U = {ln 3}: R = (ln 4/3 + ln 4) / 2 = ln(16/3) / 2; slopes (1/2)(-1/4) and (1/2)(3/4).
    p, u = logits(LN3), logits(LN3)
    result = risk.positive_versus_unlabeled(p, u)
    assert not result.corrected
    assert result.value.item() == pytest.approx(math.log(16 / 3) / 2, abs=1e-12)
    by_positive, by_unlabeled = gradients(result, p, u)
    np.testing.assert_allclose(by_positive, [-1 / 8], atol=1e-12)
    np.testing.assert_allclose(by_unlabeled, [3 / 8], atol=1e-12)


def test_positive_versus_unlabeled_weighs_both_streams_alike_whatever_their_sizes():
    p, u = logits(0.0), logits(*[0.0] * 100)
    by_positive, by_unlabeled = gradients(risk.positive_versus_unlabeled(p, u), p, u)
    assert -by_positive.sum() == pytest.approx(by_unlabeled.sum(), abs=1e-12)
    assert by_unlabeled.sum() == pytest.approx(1 / 4, abs=1e-12)


def test_the_value_carries_no_graph():
    p, u = logits(LN3), logits(0.0)
    for result in (risk.non_negative_pu(p, u, 0.25), risk.positive_versus_unlabeled(p, u)):
        assert not result.value.requires_grad
        assert result.objective.requires_grad


def test_extreme_logits_stay_finite():
    p, u = logits(-1e4, 1e4), logits(-1e4, 1e4)
    for loss in risk.LOSSES:
        result = risk.non_negative_pu(p, u, 0.5, loss=loss)
        assert torch.isfinite(result.value)
        assert all(np.isfinite(gradient).all() for gradient in gradients(result, p, u))


def test_all_workers_take_the_branch_of_their_mean():
    p, u = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([-3.0, -4.0], requires_grad=True)
    alone = risk.non_negative_pu(p, u, 0.4)
    assert alone.corrected
    seen = []

    def across(value):
        seen.append(float(value))
        return torch.tensor(0.1)  # the other workers' batches are not negative

    together = risk.non_negative_pu(p, u, 0.4, across=across)
    assert seen[0] < 0
    assert not together.corrected
