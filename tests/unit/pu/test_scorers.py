"""pu_ray/pu/scorers.py: what a scorer computes, and that training one never touches the teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pu_ray import models
from pu_ray.config import JobConfig, ScorerConfig, resolve
from pu_ray.pu import risk, scorers
from pu_ray.pu.scorers import Attention, Head


@pytest.fixture
def job(tmp_path) -> JobConfig:
    """A job with a tiny teacher on disk."""
    # Narrower networks crash in the backward pass on CPUs (https://github.com/uxlfoundation/oneDNN/issues/6035).
    torch.manual_seed(0)
    teacher = models.CifarResNet(depth=8, width=16, classes=3)
    (tmp_path / "teacher.safetensors").write_bytes(models.save_weights(teacher))
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    settings = {
        "name": "small",
        "output": str(tmp_path / "run"),
        "teacher": {
            "architecture": "cifar/resnet8-w16",
            "weights": str(tmp_path / "teacher.safetensors"),
            "classes": str(tmp_path / "classes.txt"),
            "preprocessing": {"size_px": 8},
        },
        "labeled": {"uri": str(tmp_path / "labeled")},
        "test": {"uri": str(tmp_path / "test")},
        "lake": {"uri": str(tmp_path / "lake")},
        "student": {"architecture": "cifar/resnet8-w4"},
        "scorer": {"features": "finetuned"},
    }
    return resolve([("test", settings)]).job


def test_attention_gates_every_feature_by_numpys_reckoning():
    torch.manual_seed(1)
    attention = Attention(40)
    features = torch.randn(6, 40)
    w1, b1 = attention.squeeze.weight.detach().numpy(), attention.squeeze.bias.detach().numpy()
    w2, b2 = attention.excite.weight.detach().numpy(), attention.excite.bias.detach().numpy()
    assert w1.shape == (2, 40), "the reduction is sixteenfold (paper: 960 to 60)"
    squeezed = np.maximum(features.numpy() @ w1.T + b1, 0)
    expected = features.numpy() / (1 + np.exp(-(squeezed @ w2.T + b2)))
    np.testing.assert_allclose(attention(features).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_narrow_features_still_have_an_attention():
    assert Attention(5).squeeze.out_features == 1


@pytest.mark.parametrize("hidden", [0, 7])
@pytest.mark.parametrize("attention", [True, False])
def test_a_head_gives_one_logit_per_row(attention, hidden):
    head = Head(20, attention, hidden)
    assert head(torch.randn(5, 20)).shape == (5,)
    assert isinstance(head.attention, Attention) == attention
    assert head.last.in_features == (hidden or 20)


def test_a_head_without_attention_and_hidden_layer_is_a_linear_function_of_standard_features():
    torch.manual_seed(2)
    head = Head(6, attention=False, hidden=0)
    features = torch.randn(50, 6) * torch.arange(1.0, 7.0) + 3
    head.standardise_like(features)
    values = features.numpy()
    standard = (values - values.mean(axis=0)) / values.std(axis=0, ddof=1)
    expected = standard @ head.last.weight.detach().numpy()[0] + head.last.bias.item()
    np.testing.assert_allclose(head(features).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_constant_feature_does_not_explode():
    head = Head(2, attention=False, hidden=0)
    head.standardise_like(torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    assert torch.isfinite(head(torch.tensor([[2.0, 5.0]]))).all()
    assert head.std.min() > 0


def test_the_standardisation_travels_with_the_weights():
    head, other = Head(4, True, 3), Head(4, True, 3)
    features = torch.randn(30, 4) + 9
    head.standardise_like(features)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(features), head(features))
    assert not any(name in ("mean", "std") for name, _ in head.named_parameters())


# -- the nearest labeled image -----------------------------------------------------------------------------


def test_the_nearest_is_found_by_cosine_in_standardised_space():
    generator = np.random.default_rng(0)
    reference, unlabeled, rows = (generator.normal(3, 2, size=(n, 6)).astype(np.float32) for n in (5, 50, 7))
    unlabeled[:, 5] = 4.0  # a constant feature
    reference[:, 5] = rows[:, 5] = 4.0
    cosines = scorers.Neighbours(torch.from_numpy(reference), torch.from_numpy(unlabeled))(torch.from_numpy(rows))
    mean, std = unlabeled.mean(axis=0), np.maximum(unlabeled.std(axis=0, ddof=1), 1e-4)
    a, b = (rows - mean) / std, (reference - mean) / std
    by_hand = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(cosines.numpy(), by_hand.max(axis=1), atol=1e-5)


def test_a_reference_image_is_its_own_nearest():
    generator = torch.Generator().manual_seed(0)
    reference, unlabeled = torch.randn(4, 8, generator=generator), torch.randn(30, 8, generator=generator)
    torch.testing.assert_close(scorers.Neighbours(reference, unlabeled)(reference), torch.ones(4))


def test_a_joined_scorer_adds_what_is_standardised_over_the_lake():
    generator = torch.Generator().manual_seed(0)
    reference, unlabeled, rows = (torch.randn(n, 6, generator=generator) for n in (5, 400, 7))
    torch.manual_seed(0)
    head, neighbours = Head(6, attention=False, hidden=3), scorers.Neighbours(reference, unlabeled)
    joined = scorers.Joined(head, neighbours, unlabeled)

    def by_hand(features):
        parts = [(each(features).detach().numpy(), each(unlabeled).detach().numpy()) for each in (head, neighbours)]
        return sum((values - lake.mean()) / lake.std(ddof=1) for values, lake in parts)

    difference = joined(rows).detach().numpy() - by_hand(rows)
    np.testing.assert_allclose(difference, difference[0], atol=1e-5, err_msg="but for where zero lies")
    above = int((joined(unlabeled) > 0).sum()), int((head(unlabeled) > 0).sum())
    assert 0 < above[1] < 400
    assert abs(above[0] - above[1]) <= 1


def test_a_joined_scorer_travels_with_its_weights():
    generator = torch.Generator().manual_seed(0)
    unlabeled, rows = (torch.randn(n, 6, generator=generator) for n in (40, 7))
    one, other = (
        scorers.Joined(Head(6, attention=True, hidden=3), scorers.Neighbours(part[:5], part), part)
        for part in (unlabeled, unlabeled + 1)
    )
    assert not torch.allclose(one(rows), other(rows))
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(rows), one(rows))


# -- objectives --------------------------------------------------------------------------------------------

POSITIVE, UNLABELED = torch.tensor([0.3, 1.2]), torch.tensor([-0.4, 0.1, 0.9])


def test_the_objective_of_pvu_needs_no_prior():
    result = scorers.objective(ScorerConfig(kind="pvu"), 0.1)(POSITIVE, UNLABELED)
    assert result.value == risk.positive_versus_unlabeled(POSITIVE, UNLABELED).value


@pytest.mark.parametrize("weight", ["prior", 0.7])
@pytest.mark.parametrize("loss", ["sigmoid", "logistic"])
def test_the_objective_of_nnpu_hands_every_setting_on(loss, weight):
    settings = ScorerConfig(kind="nnpu", loss=loss, positive_weight=weight, beta=0.02, gamma=0.5)
    # These logits are in the correction branch, so that beta and gamma matter.
    positive, unlabeled = torch.tensor([3.0, 4.0]), torch.tensor([-3.0, -4.0])
    ours = scorers.objective(settings, 0.4)(positive, unlabeled)
    expected = risk.non_negative_pu(
        positive,
        unlabeled,
        0.4,
        loss=loss,
        positive_weight=None if weight == "prior" else 0.7,
        beta=0.02,
        gamma=0.5,
    )
    assert ours.corrected
    assert (ours.value, ours.objective) == (expected.value, expected.objective)


# -- the paper's scorer ------------------------------------------------------------------------------------


def test_a_finetuned_scorer_starts_from_the_teacher_and_may_be_trained(job):
    scorer = scorers.new_finetuned(job)
    teacher, _ = models.load_teacher(job.teacher)
    own = scorer.network.tapped.network.state_dict()
    for name, value in teacher.tapped.network.state_dict().items():
        assert torch.equal(own[name], value), name
    # The teacher's last layer plays no part in the score; all others must learn.
    pixels = models.example_pixels(job.teacher.preprocessing, images=4)
    scorer.train()
    assert scorer.network.tapped.network.training
    scorer(pixels).sum().backward()
    without = [name for name, parameter in scorer.named_parameters() if parameter.grad is None]
    assert without == ["network.tapped.network.head.weight", "network.tapped.network.head.bias"]


@pytest.mark.parametrize(
    ("architecture", "size_px"),
    [
        ("torchvision/resnet18", 32),
        ("torchvision/mobilenet_v3_small", 64),
        ("torchvision/efficientnet_b0", 64),
        ("torchvision/convnext_tiny", 64),
        ("torchvision/regnet_y_400mf", 64),
        ("torchvision/densenet121", 64),
        ("torchvision/swin_t", 64),
        ("timm/test_vit", 160),
        ("timm/test_efficientnet", 64),
    ],
)
def test_a_teacher_of_any_family_is_fine_tuned_from_head_to_stem(job, tmp_path, architecture, size_px):
    torch.manual_seed(0)
    preprocessing = job.teacher.preprocessing.model_copy(update={"size_px": size_px})
    settings = job.teacher.model_copy(update={"architecture": architecture, "preprocessing": preprocessing})
    (tmp_path / "teacher.safetensors").write_bytes(models.save_weights(models.build(settings, 3, 3)))
    scorer = scorers.new_finetuned(job.model_copy(update={"teacher": settings})).train()
    assert isinstance(scorer.network.head.attention, Attention)
    logits = scorer(models.example_pixels(preprocessing, images=4))
    assert logits.shape == (4,)
    (logits * torch.tensor([1.0, -1.0, 2.0, -2.0])).sum().backward()
    gradients = {name: value.grad for name, value in scorer.named_parameters() if value.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    for part in ("network.head.", "network.tapped.network."):
        assert any(name.startswith(part) and gradient.abs().max() > 0 for name, gradient in gradients.items())
    # The stem is as far from the score as anything is.
    stem = next(name for name, value in scorer.network.tapped.network.named_parameters() if value.ndim == 4)
    assert gradients[f"network.tapped.network.{stem}"].abs().max() > 0


def test_training_the_scorer_never_moves_the_teacher_beside_it(job):
    scorer = scorers.new_finetuned(job)
    both = scorers.with_teacher(scorer, job)
    pixels = models.example_pixels(job.teacher.preprocessing, images=8)
    teacher, _ = models.load_teacher(job.teacher)
    expected = models.Normalised(teacher, job.teacher.preprocessing)(pixels)[1]
    before = both(pixels)[0].detach().clone()
    optimizer = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], lr=0.5)
    both.train()
    for _ in range(3):
        optimizer.zero_grad()
        both(pixels)[0].mean().backward()
        optimizer.step()
    scores, logits, _ = both.eval()(pixels)
    assert not torch.allclose(scores, before)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_all_answers_come_from_one_call(job):
    scorer = scorers.new_finetuned(job).eval()
    both = scorers.with_teacher(scorer, job).eval()
    pixels = models.example_pixels(job.teacher.preprocessing, images=3)
    scores, logits, features = both(pixels)
    assert scores.shape == (3,)
    assert logits.shape == (3, 3)
    teacher, _ = models.load_teacher(job.teacher)
    torch.testing.assert_close(features, models.Normalised(teacher, job.teacher.preprocessing)(pixels)[0])
    torch.testing.assert_close(scores, scorer(pixels))


def test_the_attention_and_hidden_settings_reach_the_finetuned_scorer(job):
    plain = job.model_copy(update={"scorer": ScorerConfig(features="finetuned", attention=False, hidden=0)})
    assert isinstance(scorers.new_finetuned(plain).network.head.attention, nn.Identity)
    assert isinstance(scorers.new_finetuned(job).network.head.attention, Attention)
    # Three stages of 16, 32 and 64 channels.
    assert scorers.new_finetuned(plain).network.head.last.in_features == 112
