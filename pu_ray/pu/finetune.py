"""The paper's path: the whole PU network, started from the teacher, trained on the cluster (paper, section 3.1).

Every worker decodes its own share of the sample; the loop is training.py's. Rank 0 leaves the network and the curve in
the artifact's folder.
"""

from __future__ import annotations

from functools import partial

import torch

from pu_ray import lake, models
from pu_ray.config import JobConfig
from pu_ray.pu import sample, scorers, training
from pu_ray.ray_train import Worker
from pu_ray.storage import Storage

WEIGHTS_FILE = "scorer.safetensors"
_CURVE_FILE = "curve.json"


class _Counting:
    """A progress that hands the images on to whoever counts them."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def start(self, total: int, unit: str) -> None:
        """The driver has started the bar."""

    def advance(self, count: int) -> None:
        """Hand them on."""
        self._worker.count_images(count)

    def note(self, message: str) -> None:
        """Nobody listens."""

    def found(self, files: int) -> None:
        """Nothing is listed."""

    def broken(self, count: int) -> None:
        """The sample holds usable images only."""

    def workers(self, count: int, unit: str) -> None:
        """The driver knows."""


def train(config: JobConfig, storage: Storage, prior: float, worker: Worker) -> None:
    """Train one worker's share and, on rank 0, keep the result."""
    torch.manual_seed(config.seed)
    _, classes = models.load_teacher(config.teacher)
    labeled = lake.read_labeled(config.labeled.uri, classes)
    roles = training.assign_roles(labeled.ids, labeled.labels, config.scorer.split, config.seed)
    features = storage.child("features")
    rows = sample.draw_unlabeled(features, config.scorer.unlabeled_sample, config.seed, exclude=set(labeled.ids))
    half = rows.num_rows // 2
    # Halves first, then shares: what is held out stays held out, however many workers there are.
    learn, hold = (
        torch.from_numpy(sample.lake_pixels(config, part.take(list(range(worker.rank, part.num_rows, worker.world)))))
        for part in (rows.slice(0, half), rows.slice(half))
    )
    positive = torch.from_numpy(labeled.pixels(config.teacher.preprocessing, config.labeled.uri))
    by_role = {role: positive[[row for row, played in enumerate(roles) if played == role]] for role in training.ROLES}
    mine = {role: part[worker.rank :: worker.world] for role, part in by_role.items()}
    streams = training.Streams(mine["train"], mine["validate"], mine["calibrate"], learn, hold)
    module = scorers.new_finetuned(config).to(worker.device)
    settings = config.scorer
    fitted = training.fit_scorer(
        module,
        streams,
        scorers.objective(settings, prior),
        settings,
        config.seed,
        _Counting(worker),
        leave_out=partial(training.most_positive, streams=streams, prior=prior) if settings.kind == "ted" else None,
        precision=worker.precision,
        checkpoint=worker.checkpoint,
        report=lambda state, content: worker.report(
            {"epoch": state.epoch, "proxy_auc": state.curve[-1]["proxy_auc"]}, content
        ),
    )
    if worker.rank == 0:
        target = storage.child("scorer")
        target.write_bytes(WEIGHTS_FILE, models.save_weights(module.cpu()))
        target.write_json(_CURVE_FILE, {"epoch": fitted.epoch, "proxy_auc": fitted.proxy_auc, "curve": fitted.curve})


def result(config: JobConfig, storage: Storage) -> training.Fitted:
    """What the workers left."""
    target = storage.child("scorer")
    module = scorers.new_finetuned(config)
    models.load_weights(module, f"{target.uri}/{WEIGHTS_FILE}")
    found = target.read_json(_CURVE_FILE)
    return training.Fitted(module, found["epoch"], found["proxy_auc"], found["curve"])
