"""Recipe `paper` against METHOD, section 1, written down anew: ten steps of the student in plain torch and NumPy.

Nothing of pu_ray computes the reference but the images of a batch and the initial weights.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pu_ray import models
from pu_ray.config import RECIPES, DistillConfig, PreprocessingConfig
from pu_ray.distill import loop
from pu_ray.distill.adversary import Adversary
from pu_ray.distill.data import Batches, Source
from pu_ray.distill.store import InMemory

PREPROCESSING = PreprocessingConfig(size_px=8)
CLASSES, SEED, STEPS, BATCH = 4, 11, 10, 16


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(student, teacher, batches, validation, settings):
    """The loop as it is called; adapt here."""
    return loop.train(
        student,
        teacher,
        batches,
        validation,
        settings,
        preprocessing=PREPROCESSING,
        classes=CLASSES,
        seed=SEED,
        device=torch.device("cpu"),
        precision="float32",
        checkpoint=None,
        report=lambda _state, _bytes: None,
        count_images=lambda _images: None,
    )


def batches_of(mined, labeled, settings):
    """The images as the loop takes them; adapt here."""
    sources = (Source(InMemory(part)) for part in (mined, labeled))
    return Batches(*sources, BATCH, settings.labeled_share, settings.augment, SEED)


def settings_of_the_recipe(**changes):
    """As the recipe has them, but for size; the milestones stay where they are in the fit."""
    recipe = RECIPES["paper"]["distill"]
    return DistillConfig(
        **{**recipe, "batch_size": BATCH, "max_steps": STEPS, "validations": 1, "losses": recipe["losses"]} | changes
    )


def seeded(seed, make):
    torch.manual_seed(seed)
    return make()


def new_student():
    # 16 channels: narrower ones crash on CPUs (https://github.com/uxlfoundation/oneDNN/issues/6035).
    return seeded(1, lambda: models.CifarResNet(depth=8, width=16, classes=CLASSES))


class Linear(nn.Module):
    """A teacher that is sure of little, and sees some classes far more often than others."""

    def __init__(self):
        super().__init__()
        self.body = nn.Flatten()
        self.head = nn.Linear(3 * 8 * 8, CLASSES)
        with torch.no_grad():
            self.head.weight.mul_(3)
            self.head.bias.copy_(torch.tensor([0.8, 0.3, 0.0, -0.7]))

    def forward(self, x):
        return self.head(self.body(x))


def normalised(pixels):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    return (torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).contiguous() / 255 - mean) / std


def inverse_soft_counts(logits):
    """w_k in proportion to 1 / sum_x softmax(T(x))_k, with sum_k w_k = K."""
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    inverse = 1 / probabilities.sum(axis=0)
    return inverse / inverse.sum() * logits.shape[1]


class Sgd:
    """SGD with weight decay and momentum, plain or Nesterov's (Sutskever et al. 2013, in torch's form), by hand."""

    def __init__(self, parameters, momentum, weight_decay, nesterov):
        self.parameters = list(parameters)
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, gradients, lr):
        for parameter, velocity, gradient in zip(self.parameters, self.velocity, gradients, strict=True):
            gradient = gradient + self.weight_decay * parameter
            velocity.mul_(self.momentum).add_(gradient)
            parameter.sub_(lr * (gradient + self.momentum * velocity if self.nesterov else velocity))


def by_hand(student, teacher_network, batches, every_image, *, radius=0.1, nesterov=False):
    """Ten steps of robust distillation; gives the weights w and how often the perturbed ones won."""
    with torch.no_grad():
        w = inverse_soft_counts(teacher_network(normalised(every_image)).double().numpy())
    optimizer = Sgd(student.parameters(), 0.9, 5e-4, nesterov)
    won = 0
    for step in range(STEPS):
        x = normalised(batches.at(step).pixels)
        student.train()
        log_s = torch.log_softmax(student(x), dim=1)
        with torch.no_grad():
            logits = teacher_network(x)
            t = torch.softmax(logits, dim=1)
            answers = logits.argmax(dim=1)
        divergence = (t * (t.log() - log_s)).sum(dim=1)  # tau = 1
        # The documented generator: seed, the adversary's own stream, and the number of the draw.
        perturbed = w + radius * np.random.default_rng([SEED, 3, step]).random(CLASSES)
        losses = [(torch.tensor(v, dtype=torch.float32)[answers] * divergence).mean() for v in (w, perturbed)]
        won += int(losses[1] > losses[0])
        # /10 at epochs 50, 100 and 150 of 200: of ten steps, at 2.5, 5 and 7.5.
        lr = 0.1 * 0.1 ** sum(step >= milestone for milestone in (2.5, 5, 7.5))
        optimizer.step(torch.autograd.grad(max(losses), list(student.parameters())), lr)
    return w, won


@pytest.fixture
def task():
    generator = np.random.default_rng(5)
    images = generator.integers(0, 256, (70, 8, 8, 3)).astype(np.uint8)
    settings = settings_of_the_recipe()
    return images, batches_of(images[:60], images[60:], settings), seeded(2, Linear)


def largest_difference(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for (_, a), b in pairs)


def test_the_recipe_says_what_the_paper_says():
    settings = settings_of_the_recipe(batch_size=2048, max_steps=None)
    assert (settings.epochs, settings.batch_size) == (200, 2048)
    assert (settings.losses.temperature, settings.losses.robust, settings.losses.radius) == (1.0, "paper", 0.1)
    assert settings.losses.class_weights
    optimizer = settings.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.1, 0.9, 5e-4)
    assert (optimizer.schedule, optimizer.milestones) == ("milestones", (0.25, 0.5, 0.75))
    for field in ("standardise", "dist", "noise_matrix", "labeled"):
        assert not getattr(settings.losses, field), f"{field} is no part of the paper"


def test_ten_steps_of_the_recipe_are_those_of_the_method(task):
    images, batches, teacher_network = task
    ours, reference, initial = new_student(), new_student(), new_student()
    teacher = models.Normalised(models.Teacher(teacher_network, ["body"]), PREPROCESSING)
    train(ours, teacher, batches, (images[:8], np.zeros(8, np.int64)), settings_of_the_recipe())
    w, won = by_hand(reference, teacher_network, batches, images)
    assert w.max() > 1.5 * w.min(), "the class weights must matter"
    assert won == STEPS, "the published perturbation only adds, and always wins (METHOD, section 2)"
    assert largest_difference(initial, reference) > 0.1
    assert largest_difference(ours, reference) < 1e-5


@pytest.mark.parametrize("change", [{"radius": 0.0}, {"nesterov": True}])
def test_a_reference_with_another_setting_ends_elsewhere(task, change):
    # Guards the test above: what it compares depends on each of these.
    images, batches, teacher_network = task
    as_it_is, changed = new_student(), new_student()
    by_hand(as_it_is, teacher_network, batches, images)
    by_hand(changed, teacher_network, batches, images, **change)
    assert largest_difference(as_it_is, changed) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_class_weights_are_inverse_to_the_soft_counts_and_sum_to_the_number_of_classes(seed):
    logits = np.random.default_rng(seed).normal(0, 3, (200, CLASSES)) + np.array([5.0, 0.0, 0.0, -9.0])
    probabilities = torch.softmax(torch.tensor(logits), dim=1)
    counts = np.bincount(logits.argmax(axis=1), minlength=CLASSES)
    adversary = Adversary(settings_of_the_recipe().losses, probabilities.sum(dim=0).numpy(), counts, SEED)
    np.testing.assert_allclose(adversary.weights, inverse_soft_counts(logits), rtol=1e-9)
    assert adversary.weights.sum() == pytest.approx(CLASSES)
    # Neither clipped nor made to weigh one image as one, as the default recipe does.
    assert adversary.weights.max() / adversary.weights.min() > 20
    assert adversary.weights @ counts / counts.sum() < 0.9
