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
    scores, logits = both.eval()(pixels)
    assert not torch.allclose(scores, before)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_both_answers_come_from_one_call(job):
    scorer = scorers.new_finetuned(job).eval()
    both = scorers.with_teacher(scorer, job).eval()
    pixels = models.example_pixels(job.teacher.preprocessing, images=3)
    scores, logits = both(pixels)
    assert scores.shape == (3,)
    assert logits.shape == (3, 3)
    torch.testing.assert_close(scores, scorer(pixels))


def test_the_attention_and_hidden_settings_reach_the_finetuned_scorer(job):
    plain = job.model_copy(update={"scorer": ScorerConfig(features="finetuned", attention=False, hidden=0)})
    assert isinstance(scorers.new_finetuned(plain).network.head.attention, nn.Identity)
    assert isinstance(scorers.new_finetuned(job).network.head.attention, Attention)
    # Three stages of 16, 32 and 64 channels.
    assert scorers.new_finetuned(plain).network.head.last.in_features == 112
