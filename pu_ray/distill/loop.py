"""The one training loop of robust knowledge distillation: with Ray or without, on one device or many.

It knows torch and `torch.distributed`, not Ray: whoever calls it decides where checkpoints go and who watches.
Paper, section 3.2 and equations 7 to 9; METHOD lists where we differ. Axes: N images of a batch, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pu_ray import models, optim, workers
from pu_ray.config import DistillConfig, Precision, PreprocessingConfig
from pu_ray.distill.adversary import Adversary
from pu_ray.distill.data import Batch, Batches, Source, ahead
from pu_ray.distill.objective import Learner, Objective
from pu_ray.precision import autocast

_EVALUATION_BATCH = 512
_NOTICE_STEPS = 16  # between two looks for a notice that the machine will be taken away


@dataclass
class State:
    """What a checkpoint holds.

    Attributes:
        step: Steps done.
        history: One record per validation: step, loss, lr, validation accuracy in [0, 1], time (Unix, seconds).
        highest_accuracy: The best validation accuracy so far.
        best_step: Step of the student to keep: the last whose accuracy lies within a standard error of the highest.
        best_accuracy: Its accuracy.
        best_weights: Its state dict.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    highest_accuracy: float = -1.0
    best_step: int = 0
    best_accuracy: float = -1.0
    best_weights: dict[str, Tensor] = field(default_factory=dict)


# From uint8 [N, H, W, C] to features [N, D] and logits [N, K].
Teacher = Callable[[Tensor], tuple[Tensor, Tensor]]
# Called with the state and, lazily, the bytes of a checkpoint.
Report = Callable[[State, Callable[[], bytes]], None]


def total_steps(settings: DistillConfig, images: int) -> int:
    """Optimiser steps of a run over this many images (all workers)."""
    by_epochs = settings.epochs * max(1, -(-images // settings.batch_size))
    return min(by_epochs, settings.max_steps) if settings.max_steps is not None else by_epochs


def train(
    student: nn.Module,
    teacher: Teacher | None,
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
    leaving: Callable[[], bool] = lambda: False,
) -> State:
    """Train the student until the configured number of steps.

    Args:
        student: From normalised images [N, C, H, W] to logits [N, K].
        teacher: Frozen, on the device; None where the batches bring its answers.
        batches: This worker's images.
        validation: Pixels uint8 [M, H, W, C] and labels int64 [M]; choose the epoch, teach nothing.
        settings: The job's distillation settings.
        preprocessing: How the student's images are resized and normalised.
        classes: K.
        seed: Of the paper's perturbation.
        device: Where to train.
        precision: Of the matrix products.
        checkpoint: Bytes of an earlier checkpoint, to go on from.
        report: Called after every `checkpoint_steps` steps and every validation, by every worker equally often.
        count_images: Called after every step with the number of images of all workers.
        leaving: Whether a machine will soon be taken away; asked by every worker equally often.

    Returns:
        The final state; `best_weights` is the student to keep.
    """
    normalise = models.Normalised(nn.Identity(), preprocessing).to(device)
    images, soft_K, counts_K = class_statistics(teacher, batches, classes, device)
    steps = total_steps(settings, images)
    # Channels last is the layout of tensor cores, and takes a third off the step on a CPU too (docs/LOG.md).
    student = student.to(device).to(memory_format=torch.channels_last)
    if settings.compile:
        student.compile()
    learner = Learner(student, settings.losses, classes).to(device)
    wrapped: nn.Module = DistributedDataParallel(learner) if workers.count() > 1 else learner
    optimizer, schedule = optim.build(learner.parameters(), settings.optimizer, steps)
    adversary = Adversary(settings.losses, soft_K, counts_K, seed)
    objective = Objective(settings.losses, adversary)
    state = State()
    if checkpoint is not None:
        state = _restore(checkpoint, learner, optimizer, schedule, adversary)
    every = max(1, steps // settings.validations)
    running_loss = torch.zeros((), device=device)
    since, left_note = 0, False

    def loss_of(part: Batch) -> Tensor:
        pixels = torch.from_numpy(part.pixels).to(device, non_blocking=True)
        with autocast(device, precision):
            teacher_NK = _answers(part, teacher, pixels)
            inputs = normalise(pixels).contiguous(memory_format=torch.channels_last)
            student_NK, noise = wrapped(inputs, teacher_NK)
        return objective(student_NK, teacher_NK, torch.from_numpy(part.labels).to(device), noise)

    def save() -> None:
        report(state, lambda: _checkpoint(state, learner, optimizer, schedule, adversary))

    for batch in ahead(batches.at, state.step, steps, settings.loader_threads):
        wrapped.train()
        optimizer.zero_grad(set_to_none=True)
        parts = list(batch.parts(settings.accumulate))
        for number, part in enumerate(parts):
            # Workers add their gradients up once per step, with the last part.
            with _alone(wrapped) if number < len(parts) - 1 else contextlib.nullcontext():
                loss = loss_of(part) * (len(part) / len(batch))
                loss.backward()  # type: ignore[no-untyped-call]
            running_loss += loss.detach()
        optimizer.step()
        schedule.step()
        adversary.step()
        since += 1
        state.step += 1
        count_images(len(batch) * workers.count())
        validated = state.step % every == 0 or state.step == steps
        if validated:
            record = {"loss": float(running_loss) / since, "lr": float(schedule.get_last_lr()[0])}
            _validate(state, record, student, normalise, validation, device)
            running_loss.zero_()
            since = 0
        if validated or state.step % settings.checkpoint_steps == 0:
            save()
        elif not left_note and state.step % _NOTICE_STEPS == 0 and leaving():
            left_note = True
            save()
    return state


def _answers(part: Batch, teacher: Teacher | None, pixels: Tensor) -> Tensor:
    """The teacher's logits float32 [N, K]: stored, or asked for now."""
    if part.teacher is not None:
        return torch.from_numpy(part.teacher).to(pixels.device, non_blocking=True)
    assert teacher is not None, "a batch without stored answers needs a teacher"
    with torch.no_grad():
        return teacher(pixels)[1].float()


def _alone(wrapped: nn.Module) -> AbstractContextManager[Any]:
    if isinstance(wrapped, DistributedDataParallel):
        return wrapped.no_sync()
    return contextlib.nullcontext()


def _validate(
    state: State,
    record: dict[str, float],
    student: nn.Module,
    normalise: nn.Module,
    validation: tuple[Any, Any],
    device: torch.device,
) -> None:
    """Judge the student and remember which one to keep.

    Held-out labeled images are few, and the best of ten noisy judgements often is an early student whom the end of the
    schedule would have improved (docs/LOG.md). An earlier one is kept only where it is better by more than a standard
    error (Breiman et al. 1984; of a share as Agresti and Coull 1998 put it, which is not zero for 100 %).
    """
    accuracy = accuracy_of(student, normalise, validation, device)
    state.history.append({"step": state.step, **record, "validation_accuracy": accuracy, "time": time.time()})
    state.highest_accuracy = max(state.highest_accuracy, accuracy)
    count = len(validation[1]) + 4
    share = (state.highest_accuracy * len(validation[1]) + 2) / count
    error = math.sqrt(share * (1 - share) / count)
    if accuracy >= state.highest_accuracy - error:
        state.best_step, state.best_accuracy = state.step, accuracy
        state.best_weights = {key: value.detach().cpu().clone() for key, value in student.state_dict().items()}


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


def class_statistics(
    teacher: Teacher | None, batches: Batches, classes: int, device: torch.device
) -> tuple[int, Any, Any]:
    """Over all workers' images: their number, soft counts [K] and counts by predicted class [K]."""
    statistics = torch.zeros(2, classes, dtype=torch.float64)
    for source in batches.sources:
        for start in range(0, len(source), _EVALUATION_BATCH):
            rows = np.arange(start, min(start + _EVALUATION_BATCH, len(source)))
            probabilities = _probabilities(source, rows, teacher, device)
            statistics[0] += probabilities.sum(dim=0)
            statistics[1] += torch.bincount(probabilities.argmax(dim=1), minlength=classes)
    statistics = workers.total(statistics.to(device)).cpu()
    return int(statistics[1].sum()), statistics[0].numpy(), statistics[1].numpy()


def _probabilities(source: Source, rows: Any, teacher: Teacher | None, device: torch.device) -> Tensor:
    """The teacher's, float64 [N, K]."""
    if source.answers is not None:
        return torch.from_numpy(source.answers.mean_probabilities(rows))
    assert teacher is not None, "images without stored answers need a teacher"
    with torch.inference_mode():
        logits = teacher(torch.from_numpy(source.images.take(rows)).to(device))[1]
    return torch.softmax(logits.double().cpu(), dim=1)


def _checkpoint(state: State, learner: Learner, optimizer: Any, schedule: Any, adversary: Adversary) -> bytes:
    content = {
        "step": state.step,
        "history": copy.deepcopy(state.history),
        "highest_accuracy": state.highest_accuracy,
        "best": {"step": state.best_step, "accuracy": state.best_accuracy, "weights": state.best_weights},
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "adversary": adversary.state(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _restore(content: bytes, learner: Learner, optimizer: Any, schedule: Any, adversary: Adversary) -> State:
    saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    learner.load_state_dict(saved["learner"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    adversary.restore(saved["adversary"])
    best = saved["best"]
    return State(
        saved["step"], saved["history"], saved["highest_accuracy"], best["step"], best["accuracy"], best["weights"]
    )
