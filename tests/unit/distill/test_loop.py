"""pu_ray/distill/loop.py: tiny networks, on one thread: what is learnt, what survives a stop, what workers share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed
from torch import nn

from pu_ray import models
from pu_ray.config import AugmentConfig, DistillConfig, LossesConfig, OptimizerConfig, PreprocessingConfig
from pu_ray.distill import loop
from pu_ray.distill.adversary import Adversary
from pu_ray.distill.data import Batch, Batches, Source
from pu_ray.distill.loop import State, total_steps
from pu_ray.distill.store import InMemory

PREPROCESSING = PreprocessingConfig(size_px=8)
CLASSES = 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Colours(nn.Module):
    """A teacher that knows which of the three channels is brightest."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.body.weight.copy_(3 * torch.eye(3)[:, :, None, None])
            self.body.bias.zero_()

    def forward(self, x):
        return self.body(x).mean(dim=(2, 3))


def new_teacher():
    return models.Normalised(models.Teacher(Colours(), ["body"]), PREPROCESSING)


def pictures(count, seed):
    """Noise with one channel brighter; and which."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count)
    pixels = generator.integers(0, 150, (count, 8, 8, 3))
    pixels[np.arange(count), :, :, labels] += 80
    return pixels.astype(np.uint8), labels


def new_batches(rank=0, world=1, size=16, **changes):
    mined, (labeled, labels) = pictures(80, 1)[0], pictures(16, 2)
    sources = (
        Source(InMemory(mined[rank::world])),
        Source(InMemory(labeled[rank::world]), labels=labels[rank::world]),
    )
    return Batches(*sources, size, "auto", AugmentConfig(crop_padding_px=1), 0, rank)


def new_student(seed=0):
    # Below 16 channels the backward pass of a strided 1x1 convolution writes past its workspace on CPUs
    # (https://github.com/uxlfoundation/oneDNN/issues/6035).
    torch.manual_seed(seed)
    return models.CifarResNet(depth=8, width=16, classes=CLASSES)


def settings(**changes):
    losses_changes = changes.pop("losses", {})
    return DistillConfig(
        **{
            "epochs": 100,
            "max_steps": 24,
            "batch_size": 16,
            "validations": 4,
            "losses": LossesConfig(**losses_changes),
            "optimizer": OptimizerConfig(kind="sgd", lr=0.05, weight_decay=5e-4, schedule="one_cycle"),
        }
        | changes
    )


class Stopped(Exception):
    """The machine went away."""


class Watcher:
    """Keeps the checkpoint of every report; stops the training at a given step."""

    def __init__(self, stop_at=None):
        self.checkpoints, self.states, self.images, self.stop_at = {}, [], 0, stop_at

    def report(self, state: State, checkpoint):
        self.checkpoints[state.step] = checkpoint()
        self.states.append(state.step)
        if state.step == self.stop_at:
            raise Stopped

    def count(self, images):
        self.images += images


def train(student, config, watcher=None, checkpoint=None, batches=None, **changes):
    watcher = watcher or Watcher()
    return loop.train(
        student,
        changes.pop("teacher", new_teacher()),
        batches or new_batches(),
        pictures(60, 3),
        config,
        preprocessing=PREPROCESSING,
        classes=CLASSES,
        seed=0,
        device=CPU,
        precision="float32",
        checkpoint=checkpoint,
        report=watcher.report,
        count_images=watcher.count,
        **changes,
    )


# -- steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "epochs", "batch", "cap", "steps"),
    [
        (100, 3, 10, None, 30),
        (101, 3, 10, None, 33),  # the last, smaller batch is a step too
        (5, 4, 10, None, 4),
        (0, 4, 10, None, 4),
        (100, 3, 10, 7, 7),
        (100, 3, 10, 31, 30),
    ],
)
def test_total_steps(images, epochs, batch, cap, steps):
    assert total_steps(DistillConfig(epochs=epochs, batch_size=batch, max_steps=cap), images) == steps


# -- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "paper", "none"])
def test_the_student_learns(kind):
    student = new_student()
    state = train(student, settings(max_steps=60, losses={"robust": kind}))
    curve = [record["loss"] for record in state.history]
    assert curve[-1] < 0.3 * curve[0], curve
    assert state.best_accuracy > 0.9
    assert state.step == 60


def test_history_has_a_record_for_every_validation_and_says_what_happened():
    watcher = Watcher()
    state = train(new_student(), settings(), watcher)
    assert [record["step"] for record in state.history] == watcher.states == [6, 12, 18, 24]
    assert watcher.images == 24 * 16
    assert state.history[0].keys() == {"step", "loss", "lr", "validation_accuracy", "time"}
    # Six steps into a one-cycle schedule of 24: past the warm-up, on the way down.
    assert state.history[0]["lr"] == pytest.approx(0.05 * (1 - (0.25 - 0.15) / 0.85))


def test_the_last_step_is_validated_even_when_the_intervals_do_not_meet_it():
    history = train(new_student(), settings(max_steps=11)).history
    assert [record["step"] for record in history] == [2, 4, 6, 8, 10, 11]


def test_the_kept_student_is_the_latest_that_is_not_clearly_worse_than_the_best():
    student = new_student()
    state = train(student, settings(max_steps=40, validations=10))
    accuracies = {record["step"]: record["validation_accuracy"] for record in state.history}
    highest = max(accuracies.values())
    share = (60 * highest + 2) / 64
    allowed = highest - (share * (1 - share) / 64) ** 0.5
    assert state.highest_accuracy == highest
    assert state.best_step == max(step for step, value in accuracies.items() if value >= allowed)
    assert state.best_accuracy == accuracies[state.best_step]
    other = new_student(9)
    other.load_state_dict(state.best_weights)
    normalise = models.Normalised(nn.Identity(), PREPROCESSING)
    assert loop.accuracy_of(other, normalise, pictures(60, 3), CPU) == state.best_accuracy


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [
        ([0.5, 0.9, 0.1, 0.87], 24),  # one standard error of 0.9 in 60 is 0.042
        ([0.5, 0.9, 0.1, 0.85], 12),
        ([0.5, 0.9, 0.88, 0.1], 18),
        ([1.0, 0.99, 0.97, 0.96], 12),  # of 1.0 it is 0.022
        ([0.0, 0.0, 0.0, 0.0], 24),
    ],
)
def test_an_earlier_student_is_kept_only_where_it_is_clearly_better(monkeypatch, accuracies, kept):
    told = iter(accuracies)
    monkeypatch.setattr(loop, "accuracy_of", lambda *_: next(told))
    state = train(new_student(), settings())
    assert (state.best_step, state.best_accuracy) == (kept, accuracies[kept // 6 - 1])


def test_the_kept_weights_do_not_change_with_further_training(monkeypatch):
    accuracies = iter([0.5, 0.9, 0.1, 0.8])
    monkeypatch.setattr(loop, "accuracy_of", lambda *_: next(accuracies))
    student, at_step = new_student(), {}

    class Peek(Watcher):
        def report(self, state, checkpoint):
            at_step[state.step] = {key: value.clone() for key, value in student.state_dict().items()}

    state = train(student, settings(), Peek())
    assert (state.best_step, state.best_accuracy) == (12, 0.9)
    assert not torch.equal(at_step[12]["head.weight"], at_step[24]["head.weight"])
    assert all(torch.equal(state.best_weights[key], value) for key, value in at_step[12].items())


def test_the_teacher_never_moves():
    teacher = new_teacher()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    watcher = Watcher()
    loop.train(
        new_student(),
        teacher,
        new_batches(),
        pictures(8, 3),
        settings(max_steps=4),
        preprocessing=PREPROCESSING,
        classes=CLASSES,
        seed=0,
        device=CPU,
        precision="float32",
        checkpoint=None,
        report=watcher.report,
        count_images=watcher.count,
    )
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in before.items())


def test_accuracy_is_taken_in_eval_mode_over_all_images():
    student = nn.Sequential(nn.Dropout(0.9), Colours())
    normalise = models.Normalised(nn.Identity(), PREPROCESSING)
    pixels, labels = pictures(1030, 5)  # more than two batches
    wrong = labels.copy()
    wrong[-103:] = (wrong[-103:] + 1) % CLASSES
    assert loop.accuracy_of(student.train(), normalise, (pixels, labels), CPU) == 1.0
    assert loop.accuracy_of(student.train(), normalise, (pixels, wrong), CPU) == pytest.approx(0.9)


def told(state):
    """The history without the times of the day."""
    return [{name: value for name, value in record.items() if name != "time"} for record in state.history]


# -- resume ------------------------------------------------------------------------------------------------


def assert_resumes_exactly(config):
    whole = new_student()
    expected = train(whole, config)
    watcher = Watcher(stop_at=12)
    with pytest.raises(Stopped):
        train(new_student(), config, watcher)
    resumed, again = new_student(seed=7), Watcher()  # whatever the new machine starts with is replaced
    state = train(resumed, config, again, watcher.checkpoints[12])
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert told(state) == told(expected)
    assert (state.best_step, state.best_accuracy) == (expected.best_step, expected.best_accuracy)
    assert all(torch.equal(state.best_weights[key], value) for key, value in expected.best_weights.items())
    assert again.images == 12 * 16, "the first half is not done again"


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("robust_kind", ["exact", "none"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(robust_kind, kind):
    optimizer = OptimizerConfig(kind=kind, lr=0.01, schedule="cosine")
    assert_resumes_exactly(settings(losses={"robust": robust_kind, "radius": 0.5}, optimizer=optimizer))


def test_a_run_of_the_papers_recipe_that_was_stopped_ends_as_one_that_was_not():
    assert_resumes_exactly(settings(losses={"robust": "paper", "radius": 0.5}))


def test_the_adversary_matters_so_that_its_restoring_is_tested():
    exact, none = new_student(), new_student()
    train(exact, settings(losses={"radius": 0.5}))
    train(none, settings(losses={"radius": 0.5, "robust": "none"}))
    assert not torch.equal(exact.head.weight, none.head.weight)


# -- batches in parts --------------------------------------------------------------------------------------


def plain_student():
    """No batch norm, which would see the parts."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


EVERYTHING = {"radius": 0.4, "standardise": True, "labeled": 0.7, "noise_matrix": 0.3}


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_a_step_in_parts_is_the_step(parts):
    whole, cut = plain_student(), plain_student()
    train(whole, settings(losses=EVERYTHING, max_steps=6))
    train(cut, settings(losses=EVERYTHING, max_steps=6, accumulate=parts))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], value, rtol=1e-4, atol=1e-5)


# -- stored answers ----------------------------------------------------------------------------------------


class Recorded:
    """What the teacher says of the plain images, as if it had been stored; one crop."""

    def __init__(self, pixels):
        self._pixels = pixels
        with torch.no_grad():
            self._logits = new_teacher()(torch.from_numpy(pixels))[1].numpy()

    def take(self, rows, visits):
        return np.tile(np.array([0, 0, 8, 8, 0], np.int16), (len(rows), 1)), self._logits[rows]

    def mean_probabilities(self, rows):
        return torch.softmax(torch.from_numpy(self._logits[rows]).double(), dim=1).numpy()


def test_with_stored_answers_the_teacher_is_not_needed_and_the_student_is_the_same():
    pixels = pictures(96, 1)[0]
    plain = AugmentConfig(crop_padding_px=0, horizontal_flip=False)

    def batches(answers):
        sources = (Source(InMemory(pixels), answers), Source(InMemory(pixels[:0]), answers))
        return Batches(*sources, 16, "auto", plain, 0)

    asked, stored = new_student(), new_student()
    train(asked, settings(), batches=batches(None))
    train(stored, settings(), batches=batches(Recorded(pixels)), teacher=None)
    for name, value in asked.state_dict().items():
        torch.testing.assert_close(stored.state_dict()[name], value, rtol=1e-4, atol=1e-5)


# -- checkpoints and notices -------------------------------------------------------------------------------


def test_checkpoints_come_as_often_as_asked_for_and_with_every_validation():
    watcher = Watcher()
    train(new_student(), settings(max_steps=10, validations=2, checkpoint_steps=4), watcher)
    assert watcher.states == [4, 5, 8, 10]


def test_before_its_machine_goes_a_worker_leaves_a_checkpoint_once():
    watcher = Watcher()
    notices = iter([False, True, True])
    config = settings(max_steps=60, validations=1, checkpoint_steps=1000)
    train(new_student(), config, watcher, leaving=lambda: next(notices, True))
    assert watcher.states == [32, 60]


def test_a_compiled_student_has_the_names_of_a_plain_one():
    student = new_student()
    compiled = []
    student.compile = lambda: compiled.append(True)
    state = train(student, settings(max_steps=2, compile=True))
    assert compiled == [True]
    assert state.best_weights.keys() == new_student().state_dict().keys()


# -- class statistics --------------------------------------------------------------------------------------


def test_class_statistics_agree_with_numpy():
    batches = new_batches()
    images, soft, counts = loop.class_statistics(new_teacher(), batches, CLASSES, CPU)
    pixels = np.concatenate([source.images.take(np.arange(len(source))) for source in batches.sources]) / 255
    mean, std = np.array(PREPROCESSING.mean), np.array(PREPROCESSING.std)
    logits = 3 * ((pixels - mean) / std).mean(axis=(1, 2))
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert images == 96
    np.testing.assert_allclose(soft, (exponentials / exponentials.sum(axis=1, keepdims=True)).sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(counts, np.bincount(logits.argmax(axis=1), minlength=CLASSES))


def test_class_statistics_count_classes_that_never_occur():
    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Identity()

        def forward(self, x):
            return torch.tensor([[5.0, 0.0, 0.0, 0.0]]).expand(len(self.body(x)), 4)

    teacher = models.Normalised(models.Teacher(Sure(), ["body"]), PREPROCESSING)
    _, soft, counts = loop.class_statistics(teacher, new_batches(), 4, CPU)
    assert counts.tolist() == [96, 0, 0, 0]
    assert soft.sum() == pytest.approx(96)


# -- two workers -------------------------------------------------------------------------------------------


SOFT, COUNTS = np.array([60.0, 30.0, 10.0]), np.array([58, 32, 10])


def a_batch(seed, images=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, generator=generator), torch.randint(0, 3, (images,), generator=generator)


def _as_one_of_two(rank, folder):
    """What each of two processes does: the halves of a batch, the halves of the data, and a short training."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    adversary = Adversary(LossesConfig(radius=0.4), SOFT, COUNTS, 0)
    for seed in range(3):
        divergence, predicted = a_batch(seed)
        adversary.loss(divergence[rank::2], predicted[rank::2])
        adversary.step()
    statistics = loop.class_statistics(new_teacher(), new_batches(rank, 2), CLASSES, CPU)
    student, watcher = new_student(), Watcher()
    state = train(student, settings(max_steps=4, validations=1), watcher, batches=new_batches(rank, 2, size=8))
    result = {
        "adversary": adversary.state(),
        "statistics": [statistics[0], statistics[1].tolist(), statistics[2].tolist()],
        "student": {name: value.detach() for name, value in student.named_parameters()},
        "steps": state.step,
        "images": watcher.images,
    }
    plain = plain_student()
    train(plain, settings(losses=EVERYTHING | {"dist": 0.5}, max_steps=5), batches=halves(rank, 2))
    result["plain"] = dict(plain.state_dict())
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


class Halves:
    """The batches of one worker, each dealt out to several."""

    def __init__(self, batches, rank, world):
        self._batches, self._rank, self._world = batches, rank, world
        self.sources = [] if rank else batches.sources  # counted once

    def at(self, step):
        batch = self._batches.at(step)
        rows = slice(self._rank, None, self._world)
        return Batch(batch.pixels[rows], batch.labels[rows], None)


def halves(rank, world):
    return Halves(new_batches(), rank, world)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    # Both are forked from one process that has paid for the imports (torch's optimisers import its compiler).
    torch.multiprocessing.set_forkserver_preload(["torch._dynamo", "pu_ray.distill.loop"])
    torch.multiprocessing.start_processes(_as_one_of_two, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_workers_have_the_adversary_of_one(two_workers):
    single = Adversary(LossesConfig(radius=0.4), SOFT, COUNTS, 0)
    for seed in range(3):
        single.loss(*a_batch(seed))
        single.step()
    for worker in two_workers:
        np.testing.assert_allclose(worker["adversary"]["sums"], single.sums, rtol=1e-6)
        np.testing.assert_allclose(worker["adversary"]["counts"], single.counts)


def test_two_workers_have_the_class_statistics_of_one(two_workers):
    images, soft, counts = loop.class_statistics(new_teacher(), new_batches(), CLASSES, CPU)
    for worker in two_workers:
        assert worker["statistics"][0] == images
        np.testing.assert_allclose(worker["statistics"][1], soft, rtol=1e-6)
        np.testing.assert_array_equal(worker["statistics"][2], counts)


def test_two_workers_end_with_the_same_student_and_count_all_images(two_workers):
    first, second = two_workers
    for name, value in first["student"].items():
        assert torch.equal(second["student"][name], value), name
    assert first["steps"] == second["steps"] == 4
    assert first["images"] == 4 * 16


def test_two_workers_descend_every_loss_as_one_does(two_workers):
    single = plain_student()
    train(single, settings(losses=EVERYTHING | {"dist": 0.5}, max_steps=5), batches=halves(0, 1))
    assert not torch.equal(single[0].weight, plain_student()[0].weight)
    for worker in two_workers:
        for name, value in single.state_dict().items():
            torch.testing.assert_close(worker["plain"][name], value, rtol=1e-4, atol=1e-5)
