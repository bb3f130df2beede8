"""Learning one logit from two streams, without Ray and without files: what the PU fit and the cascade's gate share.

Two streams feed every step: a fixed number of positives and a batch of unlabeled images. (In the published code
both lie in one shuffled list, and with 20 labeled images per class half of the batches hold no positive.) The epoch
is chosen by the AUC of held-out positives against held-out unlabeled images, never by true labels.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pu_ray import optim, workers
from pu_ray.config import Precision, ScorerConfig, SplitConfig
from pu_ray.precision import autocast
from pu_ray.progress import Progress
from pu_ray.pu import scorers

ROLES = ("train", "validate", "calibrate")
_EVALUATION_BATCH = 1024
_MOST_LEFT_OUT = 0.9  # an estimate near 1 must not leave a step without unlabeled images


@dataclass
class Fitted:
    """A fitted scorer.

    Attributes:
        module: The module that was given, with the parameters of the chosen epoch.
        epoch: Counted from 1.
        proxy_auc: AUC of held-out positives against held-out unlabeled images, at that epoch.
        curve: Risk and proxy AUC after each epoch.
    """

    module: nn.Module
    epoch: int
    proxy_auc: float
    curve: list[dict[str, float]]


@dataclass(frozen=True)
class Streams:
    """Inputs of the fit: features [., D] float32, or pixels [., H, W, C] uint8 for a fine-tuned scorer."""

    positive_train: Tensor
    positive_validate: Tensor
    positive_calibrate: Tensor
    unlabeled_train: Tensor
    unlabeled_validate: Tensor


def assign_roles(ids: list[bytes], labels: Any, split: SplitConfig, seed: int) -> list[str]:
    """Share labeled images out by class, independent of their order in the listing.

    Images with the same bytes get the same role, so that a copy never tells a secret.

    Returns:
        One of `ROLES` for each image.
    """
    order = sorted(
        set(zip(np.asarray(labels).tolist(), ids, strict=True)), key=lambda item: (item[0], rank(item[1], seed))
    )
    roles: dict[bytes, str] = {}
    # Walking class by class along one running count keeps the shares exact overall and nearly so in each class.
    for position, (_, sample) in enumerate(order):
        roles.setdefault(sample, role_at(position, split))
    return [roles[sample] for sample in ids]


def role_at(position: int, split: SplitConfig) -> str:
    """The role of one image in the running count: one of `ROLES`."""
    # A golden-ratio sequence spreads the roles evenly over every class.
    place = (position * 0.6180339887498949) % 1.0
    return ROLES[sum(place >= bound for bound in (split.train, split.train + split.validate_))]


def rank(sample: bytes, seed: int) -> bytes:
    """A random place in an order that depends on the sample and the seed alone."""
    return hashlib.blake2b(sample, digest_size=8, key=seed.to_bytes(8, "big")).digest()


@dataclass
class State:
    """What a checkpoint holds.

    Attributes:
        epoch: Epochs done.
        step: Steps done.
        best_epoch: The one with the best proxy AUC so far, counted from 1.
        best_auc: That AUC.
        best_weights: Its state dict.
        curve: Risk and proxy AUC after each epoch.
    """

    epoch: int
    step: int
    best_epoch: int
    best_auc: float
    best_weights: dict[str, Tensor]
    curve: list[dict[str, float]]


# Called after every epoch with the state and, lazily, the bytes of a checkpoint.
Report = Callable[[State, Callable[[], bytes]], None]


def fit_scorer(
    module: nn.Module,
    streams: Streams,
    objective: scorers.Objective,
    settings: ScorerConfig,
    seed: int,
    progress: Progress,
    *,
    leave_out: Callable[[nn.Module], Tensor] | None = None,
    precision: Precision = "float32",
    checkpoint: bytes | None = None,
    report: Report = lambda _state, _bytes: None,
) -> Fitted:
    """Descend the risk with two streams; keep the epoch with the best proxy AUC.

    Several workers train together where `torch.distributed` is up; each brings its own streams.

    Args:
        module: Maps a stream's inputs to logits [N]; changed in place.
        streams: Training and held-out inputs.
        objective: The risk of one step.
        settings: Batch sizes (over all workers), epochs, optimiser.
        seed: Of the order of the images.
        progress: Advanced by unlabeled images.
        leave_out: Before each epoch, which unlabeled training images it does without, bool [N]; see `most_positive`.
        precision: Of the matrix products; a head on features is too small to gain from less than float32.
        checkpoint: Bytes of an earlier checkpoint, to go on from.
        report: Called after every epoch.
    """
    device = next(module.parameters()).device
    world = workers.count()
    batch = max(2, settings.batch_size // world)
    positives_per_step = min(max(1, round(batch * settings.positive_share)), batch - 1)
    unlabeled_per_step = min(batch - positives_per_step, len(streams.unlabeled_train))
    steps_per_epoch = workers.least(len(streams.unlabeled_train) // unlabeled_per_step, device)
    optimizer, schedule = optim.build(module.parameters(), settings.optimizer, settings.epochs * steps_per_epoch)
    progress.start(settings.epochs * steps_per_epoch * unlabeled_per_step * world, "unlabeled images")
    state = State(0, 0, 0, -1.0, copy.deepcopy(module.state_dict()), [])
    if checkpoint is not None:
        state = _restore(checkpoint, module, optimizer, schedule)
        progress.advance(state.epoch * steps_per_epoch * unlabeled_per_step * world)
    wrapped: nn.Module = DistributedDataParallel(module, find_unused_parameters=True) if world > 1 else module
    while state.epoch < settings.epochs:
        order = _permutation(len(streams.unlabeled_train), seed, state.epoch, stream=0)
        if leave_out is not None:
            order = order[~leave_out(module)[order]]
        wrapped.train()
        values = []
        for step in range(workers.least(max(1, len(order) // unlabeled_per_step), device)):
            positive = streams.positive_train[
                _endless(len(streams.positive_train), state.step, positives_per_step, seed)
            ]
            unlabeled = streams.unlabeled_train[order[step * unlabeled_per_step :][:unlabeled_per_step]]
            # One forward pass for both streams: batch norm must see the mixture, not tell the streams apart.
            with autocast(device, precision):
                logits = wrapped(torch.cat([positive, unlabeled]).to(device)).float()
            current = objective(logits[:positives_per_step], logits[positives_per_step:])
            optimizer.zero_grad(set_to_none=True)
            current.objective.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            state.step += 1
            values.append(float(workers.mean(current.value)))
            progress.advance(unlabeled_per_step * world)
        state.epoch += 1
        auc = proxy_auc_of(module, streams)
        state.curve.append({"epoch": state.epoch, "risk": float(np.mean(values)), "proxy_auc": auc})
        if auc > state.best_auc:
            state.best_auc, state.best_epoch = auc, state.epoch
            state.best_weights = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
        report(state, lambda: _checkpoint(state, module, optimizer, schedule))
    module.load_state_dict(state.best_weights)
    return Fitted(module, state.best_epoch, state.best_auc, state.curve)


def _checkpoint(state: State, module: nn.Module, optimizer: Any, schedule: Any) -> bytes:
    content = {
        "state": {field.name: getattr(state, field.name) for field in fields(state)},
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _restore(content: bytes, module: nn.Module, optimizer: Any, schedule: Any) -> State:
    saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    module.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    return State(**saved["state"])


def most_positive(module: nn.Module, streams: Streams, prior: float) -> Tensor:
    """The unlabeled training images that look most positive, as many as the prior says, bool [N].

    Conditional value ignoring risk (Garg et al. 2021, algorithm 1): what is left are negatives, as far as the scorer
    can tell, and learning from them makes it tell better. They estimate the prior anew each time, on what is held out;
    ours is estimated once, by cross-fitting and for the lake's own mix of classes, which so few cannot tell.
    """
    scores = scores_of(module, streams.unlabeled_train)
    out = torch.zeros(len(scores), dtype=torch.bool)
    out[np.argsort(-scores, kind="stable")[: int(min(prior, _MOST_LEFT_OUT) * len(scores))]] = True
    return out


def _endless(count: int, step: int, number: int, seed: int) -> Tensor:
    """What a step takes of an endless row of permutations: each is used once before any is used again."""
    positions = np.arange(step * number, (step + 1) * number)
    turns = range(positions[0] // count, positions[-1] // count + 1)
    row = torch.cat([_permutation(count, seed, turn, stream=1) for turn in turns])
    return row[torch.from_numpy(positions - turns[0] * count)]


def _permutation(count: int, seed: int, turn: int, stream: int) -> Tensor:
    """Seeded by its own number, so that a fit that goes on draws what it would have drawn."""
    return torch.from_numpy(np.random.default_rng([seed, turn, workers.rank(), stream]).permutation(count))


def scores_of(module: nn.Module, inputs: Tensor) -> Any:
    """Logits of many inputs in eval mode, float32 [N] array."""
    module.eval()
    device = next(module.parameters()).device
    with torch.inference_mode():
        parts = [
            module(inputs[start : start + _EVALUATION_BATCH].to(device)).float().cpu()
            for start in range(0, len(inputs), _EVALUATION_BATCH)
        ]
    return torch.cat(parts).numpy()


def proxy_auc_of(module: nn.Module, streams: Streams) -> float:
    """Proxy AUC on what is held out, of all workers: the criterion for epochs and for kinds of scorers."""
    return proxy_auc(*_held_out(module, streams))


def _held_out(module: nn.Module, streams: Streams) -> list[Any]:
    parts = (streams.positive_validate, streams.unlabeled_validate)
    return [workers.gathered(scores_of(module, part)) for part in parts]


def proxy_auc(positive_scores: Any, unlabeled_scores: Any) -> float:
    """AUC of positives against unlabeled: needs no true labels, and rises with the true AUC."""
    truth = np.r_[np.ones(len(positive_scores)), np.zeros(len(unlabeled_scores))]
    return float(roc_auc_score(truth, np.r_[positive_scores, unlabeled_scores]))


def streams_of(positive: Tensor, unlabeled: Tensor, roles: list[str]) -> Streams:
    """Positives by their role, the unlabeled in two halves: one to learn from, one held out."""
    train, validate, calibrate = (torch.tensor([r == role for r in roles]) for role in ROLES)
    half = len(unlabeled) // 2
    return Streams(positive[train], positive[validate], positive[calibrate], unlabeled[:half], unlabeled[half:])
