"""Recipe `paper` against METHOD, section 1, written down anew: ten steps of the fine-tuned scorer in plain torch.

The gradient of the risk is typed from its derivative by hand, in both branches; only the scorer's own backward pass is
autograd's. Nothing of pu_ray computes the reference but the order of the images and the initial weights.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pu_ray import models
from pu_ray.config import RECIPES, PreprocessingConfig, ScorerConfig
from pu_ray.pu import scorers
from pu_ray.pu.training import Streams, fit_scorer

PREPROCESSING = PreprocessingConfig(size_px=8)
PRIOR, SEED = 0.85, 4
POSITIVES, UNLABELED = 4, 12  # of one step: a quarter, as everywhere
EPOCHS, STEPS_PER_EPOCH = 2, 5


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Silent:
    """Nobody watches."""

    def start(self, total, unit):
        pass

    def advance(self, count):
        pass

    def note(self, message):
        pass

    def found(self, files):
        pass


def settings_of_the_recipe(**changes):
    recipe = RECIPES["paper"]["scorer"]
    return ScorerConfig(**{**recipe, "batch_size": POSITIVES + UNLABELED, "epochs": EPOCHS} | changes)


def fit(module, streams, settings):
    """The fit as it is called; adapt here. Gives the module as it was after the last epoch."""
    last = {}
    fit_scorer(
        module,
        streams,
        scorers.objective(settings, PRIOR),
        settings,
        SEED,
        Silent(),
        # The best epoch is kept; the last is what ten steps lead to.
        report=lambda _state, _bytes: last.update(copy.deepcopy(module.state_dict())),
    )
    return last


def new_scorer():
    """The paper's scorer on a small network: pooled stages, squeeze-and-excitation, one linear layer."""
    torch.manual_seed(0)
    # 16 channels: narrower ones crash on CPUs (https://github.com/uxlfoundation/oneDNN/issues/6035).
    network = models.CifarResNet(depth=8, width=16, classes=3)
    settings = settings_of_the_recipe()
    head = scorers.Head(16 + 32 + 64, settings.attention, settings.hidden)
    with torch.no_grad():
        # Bright images score higher from the beginning, so that the correction is active in some steps.
        head.last.weight.mul_(-6)
    scorer = scorers.FinetunedScorer(models.TappedNetwork(network), head)
    return models.Normalised(scorer, PREPROCESSING)


def pictures(count, seed, brightness):
    generator = np.random.default_rng(seed)
    return torch.from_numpy((generator.integers(0, 140, (count, 8, 8, 3)) + brightness).astype(np.uint8))


def new_streams():
    """Bright positives; unlabeled images that are dark, but for few: the risk of the negatives falls below zero."""
    train = torch.cat([pictures(54, 1, 0), pictures(6, 2, 110)])
    return Streams(pictures(10, 3, 110), pictures(6, 4, 110), pictures(6, 5, 110), train, pictures(20, 6, 0))


def logits_of(scorer, pixels):
    """g(x), from the scorer's parts alone."""
    network, head = scorer.network.tapped.network, scorer.network.head
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    x = (pixels.permute(0, 3, 1, 2).contiguous() / 255 - mean) / std
    x = network.stem(x)
    pooled = []
    for stage in (network.layer1, network.layer2, network.layer3):
        x = stage(x)
        pooled.append(x.mean(dim=(2, 3)))
    features = torch.cat(pooled, dim=1)
    squeeze, excite = head.attention.squeeze, head.attention.excite
    gate = torch.sigmoid(torch.relu(features @ squeeze.weight.T + squeeze.bias) @ excite.weight.T + excite.bias)
    return (features * gate) @ head.last.weight[0] + head.last.bias[0]


def risk_gradient(g_positive, g_unlabeled, beta, gamma, keep_positive):
    """dR/dg of both streams, and whether the correction is active; l(z) = sigmoid(-z), so l'(z) = -s(z) (1 - s(z))."""
    s_p, s_u = 1 / (1 + np.exp(-g_positive)), 1 / (1 + np.exp(-g_unlabeled))
    slope_p, slope_u = s_p * (1 - s_p) / len(s_p), s_u * (1 - s_u) / len(s_u)
    # R_U- = mean sigmoid(g), R_P- = mean sigmoid(g), R_P+ = mean sigmoid(-g)
    negative = s_u.mean() - PRIOR * s_p.mean()
    if negative < -beta:
        # The gradient of -gamma * (R_U- - pi * R_P-), and nothing of pi * R_P+: a well-known library keeps it.
        kept = PRIOR * slope_p if keep_positive else 0.0
        return gamma * PRIOR * slope_p - kept, -gamma * slope_u, True
    # The gradient of pi * R_P+ + R_U- - pi * R_P-.
    return -PRIOR * slope_p - PRIOR * slope_p, slope_u, False


def order(count, turn, stream):
    """The documented generator of the order of images: seed, turn, rank 0, stream."""
    return np.random.default_rng([SEED, turn, 0, stream]).permutation(count)


def by_hand(scorer, streams, *, beta=0.0, gamma=1.0, nesterov=False, keep_positive=False):
    """Ten steps of nnPU; gives for each step whether the correction was active."""
    parameters = [value for name, value in scorer.named_parameters() if "network.tapped.network.head." not in name]
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    turns = np.concatenate([order(len(streams.positive_train), turn, 1) for turn in range(10)])
    corrected = []
    for step in range(EPOCHS * STEPS_PER_EPOCH):
        epoch, place = divmod(step, STEPS_PER_EPOCH)
        positive = streams.positive_train[turns[step * POSITIVES :][:POSITIVES]]
        unlabeled = streams.unlabeled_train[order(60, epoch, 0)[place * UNLABELED :][:UNLABELED]]
        scorer.train()
        g = logits_of(scorer, torch.cat([positive, unlabeled]))
        values = g.detach().double().numpy()
        by_positive, by_unlabeled, active = risk_gradient(
            values[:POSITIVES], values[POSITIVES:], beta, gamma, keep_positive
        )
        corrected.append(active)
        outer = torch.tensor(np.r_[by_positive, by_unlabeled], dtype=torch.float32)
        gradients = torch.autograd.grad(g, parameters, outer)
        # /10 at epochs 50, 100 and 150 of 170: of ten steps, at 2.9, 5.9 and 8.8.
        lr = 1e-3 * 0.1 ** sum(step >= 10 * milestone / 170 for milestone in (50, 100, 150))
        with torch.no_grad():
            for parameter, moving, gradient in zip(parameters, velocity, gradients, strict=True):
                gradient = gradient + 5e-3 * parameter
                moving.mul_(0.9).add_(gradient)
                parameter.sub_(lr * (gradient + 0.9 * moving if nesterov else moving))
    return corrected


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def test_the_recipe_says_what_the_paper_says():
    settings = ScorerConfig(**RECIPES["paper"]["scorer"])
    assert (settings.kind, settings.features, settings.loss) == ("nnpu", "finetuned", "sigmoid")
    assert (settings.positive_weight, settings.beta, settings.gamma) == ("prior", 0.0, 1.0)
    assert (settings.attention, settings.hidden) == (True, 0)
    assert (settings.epochs, settings.batch_size) == (170, 4096)
    optimizer = settings.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 1e-3, 0.9, 5e-3)
    assert optimizer.schedule == "milestones"
    assert [170 * share for share in optimizer.milestones] == pytest.approx([50, 100, 150])


def test_ten_steps_of_the_recipe_are_those_of_the_method():
    streams, ours, reference = new_streams(), new_scorer(), new_scorer()
    initial = copy.deepcopy(reference.state_dict())
    last = fit(ours, streams, settings_of_the_recipe())
    corrected = by_hand(reference, streams)
    assert set(corrected) == {True, False}, "both branches must be taken"
    assert largest_difference(initial, reference.state_dict()) > 1e-4
    assert largest_difference(last, reference.state_dict()) < 1e-6


@pytest.mark.parametrize("change", [{"keep_positive": True}, {"gamma": 0.9}, {"beta": 1.0}, {"nesterov": True}])
def test_a_reference_with_another_rule_ends_elsewhere(change):
    # Guards the test above: what it compares depends on each of these.
    streams, as_it_is, changed = new_streams(), new_scorer(), new_scorer()
    by_hand(as_it_is, streams)
    by_hand(changed, streams, **change)
    assert largest_difference(as_it_is.state_dict(), changed.state_dict()) > 1e-5
