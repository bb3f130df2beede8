"""pu_ray/distill/adversary.py: the weights of the classes, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pu_ray.config import LossesConfig
from pu_ray.distill import robust
from pu_ray.distill.adversary import Adversary

SOFT, COUNTS = np.array([60.0, 30.0, 10.0]), np.array([58, 32, 10])


def a_batch(seed=0, images=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, generator=generator), torch.randint(0, 3, (images,), generator=generator)


def test_without_class_weights_and_adversary_the_loss_is_the_plain_mean():
    divergence, predicted = a_batch()
    adversary = Adversary(LossesConfig(class_weights=False, robust="none"), SOFT, COUNTS, 0)
    assert adversary.loss(divergence, predicted).item() == pytest.approx(divergence.mean().item())


@pytest.mark.parametrize(("kind", "radius"), [("none", 0.3), ("exact", 0.0)])
def test_a_radius_of_zero_is_plain_weighted_distillation(kind, radius):
    divergence, predicted = a_batch()
    adversary = Adversary(LossesConfig(robust=kind, radius=radius), SOFT, COUNTS, 0)
    weights = np.array([1.0, 2.0, 6.0])  # 60 / soft counts, before the mean image weighs one
    weights *= 100 / (weights @ COUNTS)
    expected = (weights[predicted.numpy()] * divergence.numpy()).mean()
    assert adversary.loss(divergence, predicted).item() == pytest.approx(expected, rel=1e-6)


def test_the_exact_adversary_answers_the_running_means_up_to_the_step_before():
    adversary = Adversary(LossesConfig(radius=0.4), SOFT, COUNTS, 0)
    sums, numbers = np.zeros(3), np.zeros(3)
    for seed in range(4):
        divergence, predicted = a_batch(seed)
        ours = adversary.loss(divergence, predicted).item()
        adversary.step()
        values, classes = divergence.numpy().astype(float), predicted.numpy()
        if seed == 0:
            worst = adversary.weights  # nobody has seen a loss yet
        else:
            worst = robust.worst_weights(adversary.weights, sums / numbers, COUNTS / 100, 0.4)
            assert not np.allclose(worst, adversary.weights)
        assert ours == pytest.approx((worst[classes] * values).mean(), rel=1e-5)
        sums = 0.9 * sums + [values[classes == k].sum() for k in range(3)]
        numbers = 0.9 * numbers + [(classes == k).sum() for k in range(3)]


@pytest.mark.parametrize("kind", ["exact", "paper", "none"])
def test_a_batch_in_parts_is_the_batch(kind):
    whole, parts = (Adversary(LossesConfig(robust=kind, radius=0.4), SOFT, COUNTS, 0) for _ in range(2))
    for seed in range(3):
        divergence, predicted = a_batch(seed)
        expected = whole.loss(divergence, predicted).item()
        pieces = [parts.loss(divergence[rows], predicted[rows]).item() for rows in (slice(0, 10), slice(10, 40))]
        assert pieces[0] * 0.25 + pieces[1] * 0.75 == pytest.approx(expected, rel=1e-5)
        whole.step()
        parts.step()
    np.testing.assert_allclose(parts.sums, whole.sums, rtol=1e-6)


def test_a_class_that_no_batch_has_shown_is_no_reason_to_divide_by_zero():
    adversary = Adversary(LossesConfig(radius=0.4), SOFT, COUNTS, 0)
    divergence, _ = a_batch()
    for _ in range(3):
        assert np.isfinite(adversary.loss(divergence, torch.zeros(40, dtype=torch.int64)).item())
        adversary.step()


def test_gradients_flow_through_the_loss_and_not_through_the_weights():
    adversary = Adversary(LossesConfig(radius=0.4), SOFT, COUNTS, 0)
    adversary.loss(*a_batch(1))
    adversary.step()
    divergence, predicted = a_batch()
    divergence.requires_grad_(True)
    adversary.loss(divergence, predicted).backward()
    means = adversary.sums / adversary.counts
    worst = robust.worst_weights(adversary.weights, means, COUNTS / 100, 0.4)
    np.testing.assert_allclose(divergence.grad.numpy(), worst[predicted.numpy()] / 40, rtol=1e-5)


@pytest.mark.parametrize("change", [0.5, -0.5])
def test_the_papers_recipe_takes_the_larger_of_the_two_losses(monkeypatch, change):
    # The published perturbation only ever adds; a maximum is a maximum only if it can also refuse the candidate.
    seen = []

    def candidate(weights, radius, generator):
        seen.append((radius, isinstance(generator, np.random.Generator)))
        return weights + change

    monkeypatch.setattr(robust, "paper_perturbation", candidate)
    adversary = Adversary(LossesConfig(robust="paper", radius=0.1), SOFT, COUNTS, 0)
    # The paper's weights: inverse to the soft counts, summing to the number of classes: 1/60 : 1/30 : 1/10 = 1 : 2 : 6.
    weights = np.array([1.0, 2.0, 6.0]) / 3
    np.testing.assert_allclose(adversary.weights, weights)
    divergence, predicted = a_batch()
    values, classes = divergence.numpy(), predicted.numpy()
    pair = [(v[classes] * values).mean() for v in (weights, weights + change)]
    assert adversary.loss(divergence, predicted).item() == pytest.approx(max(pair), rel=1e-6)
    assert seen == [(0.1, True)]


def test_the_papers_perturbation_is_drawn_anew_at_every_step_and_depends_on_the_seed():
    divergence, predicted = a_batch()
    config = LossesConfig(robust="paper", radius=0.3)
    one, same, other = (Adversary(config, SOFT, COUNTS, seed) for seed in (0, 0, 1))

    def losses_of(adversary):
        for _ in range(4):
            yield adversary.loss(divergence, predicted).item()
            adversary.step()

    values = [list(losses_of(adversary)) for adversary in (one, same, other)]
    assert values[0] == values[1] != values[2]
    assert len(set(values[0])) == 4


@pytest.mark.parametrize("kind", ["exact", "paper"])
def test_an_adversary_goes_on_from_its_state(kind):
    one, other = (Adversary(LossesConfig(robust=kind, radius=0.4), SOFT, COUNTS, 0) for _ in range(2))
    one.loss(*a_batch(1))
    one.step()
    assert one.loss(*a_batch(2)).item() != other.loss(*a_batch(2)).item()
    other.restore(one.state())
    assert one.loss(*a_batch(2)).item() == other.loss(*a_batch(2)).item()
