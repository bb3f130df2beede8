"""The one training loop of robust knowledge distillation: with Ray or without, on one device or many.

It knows torch and `torch.distributed`, not Ray: whoever calls it decides where checkpoints go and who watches.
Paper, section 3.2 and equations 7 to 9; METHOD lists where we differ. Axes: N images of a batch, K classes.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pu_ray import balance, models, optim, workers
from pu_ray.config import DistillConfig, LossesConfig, Precision, PreprocessingConfig
from pu_ray.distill import losses, robust
from pu_ray.distill.data import Batches
from pu_ray.precision import autocast

_RUNNING_DECAY = 0.9
_EVALUATION_BATCH = 512


@dataclass
class State:
    """What a checkpoint holds.

    Attributes:
        step: Steps done.
        history: One record per validation: step, loss, lr, validation accuracy in [0, 1].
        best_step: Step of the student with the best validation accuracy so far.
        best_accuracy: Its accuracy.
        best_weights: Its state dict.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_accuracy: float = -1.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)


# From uint8 [N, H, W, C] to features [N, D] and logits [N, K].
Teacher = Callable[[Tensor], tuple[Tensor, Tensor]]
# Called after every validation with the state and, lazily, the bytes of a checkpoint.
Report = Callable[[State, Callable[[], bytes]], None]


def total_steps(settings: DistillConfig, images: int) -> int:
    """Optimiser steps of a run over this many images (all workers)."""
    by_epochs = settings.epochs * max(1, -(-images // settings.batch_size))
    return min(by_epochs, settings.max_steps) if settings.max_steps is not None else by_epochs


def train(
    student: nn.Module,
    teacher: Teacher,
    batches: Batches,
    validation: tuple[Any, Any],
    settings: DistillConfig,
    *,
    preprocessing: PreprocessingConfig,
    classes: int,
    seed: int,
    device: torch.device,
    precision: Precision,
    checkpoint: bytes | None,
    report: Report,
    count_images: Callable[[int], None],
) -> State:
    """Train the student until the configured number of steps.

    Args:
        student: From normalised images [N, C, H, W] to logits [N, K].
        teacher: Frozen, on the device.
        batches: This worker's images.
        validation: Pixels uint8 [M, H, W, C] and labels int64 [M]; choose the epoch, teach nothing.
        settings: The job's distillation settings.
        preprocessing: How the student's images are normalised.
        classes: K.
        seed: Of the paper's perturbation.
        device: Where to train.
        precision: Of the matrix products.
        checkpoint: Bytes of an earlier checkpoint, to go on from.
        report: Called after every validation, by every worker equally often.
        count_images: Called after every step with the number of images of all workers.

    Returns:
        The final state; `best_weights` is the student to keep.
    """
    normalise = models.Normalised(nn.Identity(), preprocessing).to(device)
    images, soft_K, counts_K = _class_statistics(teacher, batches, classes, device)
    steps = total_steps(settings, images)
    # Channels last is the layout of tensor cores, and takes a third off the step on a CPU too (docs/LOG.md).
    student = student.to(device).to(memory_format=torch.channels_last)
    wrapped: nn.Module = DistributedDataParallel(student) if workers.count() > 1 else student
    optimizer, schedule = optim.build(student.parameters(), settings.optimizer, steps)
    adversary = Adversary(settings.losses, soft_K, counts_K, seed)
    state = State()
    if checkpoint is not None:
        state = _restore(checkpoint, student, optimizer, schedule, adversary)
    every = max(1, steps // settings.validations)
    running_loss = torch.zeros((), device=device)
    since = 0
    while state.step < steps:
        wrapped.train()
        pixels = torch.from_numpy(batches.at(state.step)).to(device, non_blocking=True)
        with autocast(device, precision):
            with torch.no_grad():
                # The same crop for both networks: a good teacher is consistent (Beyer et al. 2022).
                teacher_NK = teacher(pixels)[1].float()
            student_NK = wrapped(normalise(pixels).contiguous(memory_format=torch.channels_last)).float()
        divergence_N = losses.distillation(student_NK, teacher_NK, settings.losses.temperature)
        loss = adversary.loss(divergence_N, teacher_NK.argmax(dim=1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        running_loss += loss.detach()
        since += 1
        state.step += 1
        count_images(len(pixels) * workers.count())
        if state.step % every == 0 or state.step == steps:
            accuracy = accuracy_of(student, normalise, validation, device)
            record = {
                "step": state.step,
                "loss": float(running_loss) / since,
                "lr": float(schedule.get_last_lr()[0]),
                "validation_accuracy": accuracy,
            }
            state.history.append(record)
            running_loss.zero_()
            since = 0
            # Among equals the later one has seen more.
            if accuracy >= state.best_accuracy:
                state.best_step, state.best_accuracy = state.step, accuracy
                state.best_weights = {key: value.detach().cpu().clone() for key, value in student.state_dict().items()}
            report(state, lambda: _checkpoint(state, student, optimizer, schedule, adversary))
    return state


class Adversary:
    """Weighs the classes of every batch: as given, by the exact worst case, or as the paper's code does.

    Args:
        settings: Kind, radius, clip.
        soft_K: Sum over all images of the teacher's probabilities.
        counts_K: Images by the teacher's predicted class.
        seed: Of the paper's perturbation.
    """

    def __init__(self, settings: LossesConfig, soft_K: Any, counts_K: Any, seed: int) -> None:
        self._settings = settings
        self.shares = np.asarray(counts_K, np.float64) / np.sum(counts_K)
        classes = len(self.shares)
        if not settings.class_weights:
            self.weights = np.ones(classes)
        elif settings.robust == "paper":
            inverse = 1 / np.maximum(soft_K, 1e-12)
            self.weights = inverse * classes / inverse.sum()
        else:
            self.weights = balance.class_weights(soft_K, counts_K, settings.class_weight_clip)
        self._seed = seed
        self.draws = 0
        self.sums = np.zeros(classes)
        self.counts = np.zeros(classes)

    def loss(self, divergence_N: Tensor, predicted_N: Tensor) -> Tensor:
        """The weighted loss of one batch, a scalar."""
        settings = self._settings
        if settings.robust == "paper":
            # Seeded by the draw, so that a run that goes on from a checkpoint draws what it would have drawn.
            generator = np.random.default_rng([self._seed, 3, self.draws])
            self.draws += 1
            candidate = robust.paper_perturbation(self.weights, settings.radius, generator)
            pair = [
                losses.weighted(divergence_N, predicted_N, _like(w, divergence_N)) for w in (self.weights, candidate)
            ]
            return torch.maximum(*pair)
        weights = self.weights
        if settings.robust == "exact" and settings.radius > 0:
            self._observe(divergence_N.detach(), predicted_N)
            means = self.sums / np.maximum(self.counts, 1e-12)
            weights = robust.worst_weights(self.weights, means, self.shares, settings.radius)
        return losses.weighted(divergence_N, predicted_N, _like(weights, divergence_N))

    def _observe(self, divergence_N: Tensor, predicted_N: Tensor) -> None:
        sums, counts = losses.class_means(divergence_N, predicted_N, len(self.shares))
        current = workers.total(torch.stack([sums, counts])).double().cpu().numpy()
        self.sums = _RUNNING_DECAY * self.sums + current[0]
        self.counts = _RUNNING_DECAY * self.counts + current[1]

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"sums": self.sums.tolist(), "counts": self.counts.tolist(), "draws": self.draws}

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.sums, self.counts = np.array(state["sums"]), np.array(state["counts"])
        self.draws = state["draws"]


def _like(weights_K: Any, tensor: Tensor) -> Tensor:
    return torch.as_tensor(weights_K, dtype=tensor.dtype, device=tensor.device)


def accuracy_of(student: nn.Module, normalise: nn.Module, validation: tuple[Any, Any], device: torch.device) -> float:
    """Share of right answers, in [0, 1]."""
    pixels, labels = validation
    student.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(pixels), _EVALUATION_BATCH):
            part = torch.from_numpy(pixels[start : start + _EVALUATION_BATCH]).to(device)
            answers = student(normalise(part)).argmax(dim=1).cpu().numpy()
            right += int((answers == labels[start : start + _EVALUATION_BATCH]).sum())
    return right / max(len(pixels), 1)


def _class_statistics(teacher: Teacher, batches: Batches, classes: int, device: torch.device) -> tuple[int, Any, Any]:
    """Over all workers' images: their number, soft counts [K] and counts by predicted class [K]."""
    statistics = torch.zeros(2, classes, dtype=torch.float64)
    for source in (batches.mined, batches.labeled):
        for start in range(0, len(source), _EVALUATION_BATCH):
            with torch.inference_mode():
                logits = teacher(torch.from_numpy(source[start : start + _EVALUATION_BATCH].copy()).to(device))[
                    1
                ].float()
            statistics[0] += torch.softmax(logits, dim=1).sum(dim=0).double().cpu()
            statistics[1] += torch.bincount(logits.argmax(dim=1), minlength=classes).double().cpu()
    statistics = workers.total(statistics.to(device)).cpu()
    return int(statistics[1].sum()), statistics[0].numpy(), statistics[1].numpy()


def _checkpoint(state: State, student: nn.Module, optimizer: Any, schedule: Any, adversary: Adversary) -> bytes:
    content = {
        "step": state.step,
        "history": copy.deepcopy(state.history),
        "best": {"step": state.best_step, "accuracy": state.best_accuracy, "weights": state.best_weights},
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "adversary": adversary.state(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _restore(content: bytes, student: nn.Module, optimizer: Any, schedule: Any, adversary: Adversary) -> State:
    saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    student.load_state_dict(saved["student"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    adversary.restore(saved["adversary"])
    best = saved["best"]
    return State(saved["step"], saved["history"], best["step"], best["accuracy"], best["weights"])
