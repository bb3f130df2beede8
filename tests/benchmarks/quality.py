"""The quality table: what each way of choosing lake images teaches a student. `make bench NAME=quality`.

For every number of labeled images per class and every seed, features, fit, score and select are the product's own
stages; then every row's student trains on what that row chose, all for the same number of optimiser steps, with the
product's own loop, one process per core. Rows that need no choice (labeled images alone, all original data) train too.
The teacher answers once for a few crops of every lake image and the rows share that (`distill.soft_labels: cached`);
where nothing is shared it is asked in the loop.

Every finished row is appended to a file of results, so that a stopped run goes on where it was; the tables are made
from that file. Intervals are t-intervals of the mean over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
from scipy import stats

from tests.benchmarks import fmnist_open

RESULTS = Path(__file__).parent / "results"
_HELD_STEPS = 8  # validations of a student
_CROPS = {"lake": 8, "labeled": 16}  # stored of an image; a lake image is seen 1 to 12 times in 1,200 steps
_RECALL = 0.9  # at which precision is told, whatever a row chose
# Garments have no up and down to lose, but a shoe has a left and a right: both directions occur.
_AUGMENT = {"crop_padding_px": 2, "horizontal_flip": True}
_ASKED_AT_ONCE = 128
_KEY = ("scale", "steps", "labeled", "seed", "row")

# -- rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One way of choosing.

    Attributes:
        says: Its name in the table.
        job: Which of `JOBS` it belongs to; None for rows that look at no scores.
        selection: Changes to that job's selection; the budget is the default's choice unless `own_size`.
        distill: Changes to the distillation.
        own_size: Whether it takes as many images as it likes.
        rank: Column of the scores that it ranks by.
        in_loop: Whether the teacher is asked in the loop, rather than once.
    """

    says: str
    job: str | None
    selection: Mapping[str, Any] | None = None
    distill: Mapping[str, Any] | None = None
    own_size: bool = False
    rank: str | None = None
    in_loop: bool = False


# The fit's own variants: a job is features, fit and score.
JOBS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    # The paper fine-tunes for 170 epochs over a lake of 1.3 million: some 53,000 steps. Here as many as two cores
    # allow, 600, with the rate raised: at the paper's own 0.001 so few steps end where nothing scores above 0.
    "paper": {
        "recipe": "paper",
        "scorer": {
            "epochs": 12,
            "batch_size": 256,
            "unlabeled_sample": 20_000,
            "prior": 0.102,
            "optimizer": {"lr": 0.02},
        },
    },
    "no-attention": {"scorer": {"attention": False}},
    "nnpu": {"scorer": {"kind": "nnpu"}},
    "nnpu-plain": {"scorer": {"kind": "nnpu", "positive_weight": "prior", "loss": "sigmoid"}},
    "ted": {"scorer": {"kind": "ted"}},
    "pvu": {"scorer": {"kind": "pvu"}},
    "last-stage": {"teacher": {"stages": ["layer4"]}},
}
_ON: Mapping[str, Mapping[str, Any]] = {
    "cpu": {},
    "cuda": {"resources": {"embed": {"gpus": 0.5, "cpus": 0}, "train": {"gpus": 0.5}}},
}
# Quotas would fill the rare classes of a long tail with whatever is left, to the controls' harm.
_ANY_CLASS = {"balance": "none"}
_PAPER_LOSS = {"temperature": 1.0, "robust": "paper", "radius": 0.1}
ROWS: Mapping[str, Row] = {
    "all-data": Row("KD on all 60,000 original images", None),
    "labeled": Row("KD on the labeled images alone", None),
    "everything": Row("the whole lake", "default", {"rule": "everything"}, own_size=True),
    "random": Row("random, equal budget", "default", {"rule": "random"} | _ANY_CLASS),
    "confidence": Row(
        "teacher confidence (DFND), equal budget", "default", {"rule": "confidence"} | _ANY_CLASS, rank="confidence"
    ),
    "neighbours": Row(
        "nearest labeled image, equal budget", "default", {"rule": "neighbours"} | _ANY_CLASS, rank="neighbour"
    ),
    "energy": Row("energy, equal budget", "default", {"rule": "energy"} | _ANY_CLASS, rank="energy"),
    "oracle": Row("oracle: the true positives", "default", {"rule": "oracle"}, own_size=True),
    "paper": Row("recipe `paper`, equal budget", "paper", {"rule": "budget"}, {"losses": _PAPER_LOSS}, rank="score"),
    "paper-zero": Row("recipe `paper`, score > 0", "paper", {}, {"losses": _PAPER_LOSS}, own_size=True, rank="score"),
    "default": Row("recipe `default`", "default", {}, own_size=True, rank="score"),
    # Selection by value: half the budget, so that there is something to prefer.
    "half-purest": Row("half of it: the purest", "default", {"prefer": "purest"}),
    "half-any": Row("half of it: any", "default", {"prefer": "any"}),
    "half-uncertain": Row("half of it: the teacher is least sure of", "default", {"prefer": "uncertain"}),
    "half-spread": Row("half of it: from all over feature space", "default", {"prefer": "spread"}),
    # Ablation.
    "no-attention": Row("without attention", "no-attention", {}, own_size=True, rank="score"),
    "last-stage": Row("features of the last stage alone", "last-stage", {}, own_size=True, rank="score"),
    "nnpu": Row("imbalanced nnPU", "nnpu", {}, own_size=True, rank="score"),
    "nnpu-plain": Row("nnPU with the sigmoid loss", "nnpu-plain", {}, own_size=True, rank="score"),
    "ted": Row("(TED)^n", "ted", {}, own_size=True, rank="score"),
    "pvu": Row("positive versus unlabeled", "pvu", {}, own_size=True, rank="score"),
    "zero": Row("score > 0 instead of the recall promise", "default", {"rule": "zero"}, own_size=True, rank="score"),
    "no-balance": Row("budget without class quotas", "default", {"balance": "none"}),
    "no-rkd": Row("plain KD, no class weights", "default", {}, {"losses": {"robust": "none", "class_weights": False}}),
    "in-loop": Row("teacher in the loop", "default", {}, own_size=True, in_loop=True),
    "quarter-labeled": Row("a quarter of each batch labeled", "default", {}, {"labeled_share": 0.25}, own_size=True),
    "half-labeled": Row("half of each batch labeled", "default", {}, {"labeled_share": 0.5}, own_size=True),
}
TABLE = tuple(ROWS)[:11]
VALUE = ("half-purest", "half-any", "half-uncertain", "half-spread")
ABLATION = tuple(name for name in ROWS if name not in (*TABLE, *VALUE))


def job_of(data: Path, output: Path, labeled: int, seed: int, changes: Mapping[str, Any]) -> Any:
    """The job of a fit, as its YAML would be."""
    from pu_ray import config

    settings: dict[str, Any] = {
        "name": "fmnist-open",
        "seed": seed,
        "output": str(output),
        "teacher": {
            "architecture": fmnist_open.TEACHER,
            "weights": f"{data}/teacher.safetensors",
            "classes": f"{data}/labels.txt",
            "preprocessing": fmnist_open.PREPROCESSING,
        },
        "labeled": {"uri": f"{data}/labeled-{labeled}-{seed}"},
        "test": {"uri": f"{data}/test"},
        "lake": {"uri": f"{data}/lake", "truth": f"{data}/truth.parquet"},
        "features": {"cache_uri": str(output.parent / "features")},
        "student": {"architecture": fmnist_open.STUDENT},
        # A tenth of the labeled images would not do for a promise at 20 per class: n calibration images promise a
        # recall of r with confidence 1 - r^n.
        "scorer": {"split": _split(labeled)},
        "selection": {"duplicates": "exact"},
    }
    merged = _merged(settings, changes)
    if labeled < 20:
        merged = _merged(merged, {"selection": {"recall": 0.9, "confidence": 0.8}})
    return config.resolve([("benchmark", merged)]).job


def _split(labeled: int) -> dict[str, float]:
    return {"train": 0.5, "validate": 0.15, "calibrate": 0.35} if labeled >= 20 else dict(_SMALL_SPLIT)


_SMALL_SPLIT = {"train": 0.4, "validate": 0.2, "calibrate": 0.4}


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


# -- choosing: the product's own stages --------------------------------------------------------------------


@dataclass(frozen=True)
class Chooser:
    """Runs the stages of one fit and makes its rows' choices.

    Attributes:
        data: The workload.
        work: Runs.
        labeled: Images per class.
        seed: Of labeled set, fit and student.
        device: Where networks run.
    """

    data: Path
    work: Path
    labeled: int
    seed: int
    device: str = "cpu"

    def folder(self, name: str) -> Path:
        """Where a fit's artifacts are."""
        return self.work / f"{self.labeled}-{self.seed}-{name}"

    def choose(self, name: str, budget: int | None) -> tuple[list[bytes], dict[str, Any]]:
        """Contents that a row chooses, and what is known about them."""
        from pu_ray import manifest, select
        from pu_ray.pipeline import ControlStorage, identities
        from pu_ray.progress import Silent
        from pu_ray.storage import Storage

        row = ROWS[name]
        assert row.job is not None
        job, sources, known = _fitted(self, row.job)
        changes = {"budget": None if row.own_size else budget, **(row.selection or {})}
        selection = type(job.selection)(**(job.selection.model_dump() | changes))
        chosen_job = job.model_copy(update={"selection": selection})
        main = Storage(job.output)
        storage = ControlStorage(f"{job.output}/rows/{name}", shared=main)
        shared = {step: known[step] for step in ("features", "fit", "score")}
        identity, inputs = identities(chosen_job, sources, shared)["select"]
        if not manifest.is_current(storage.child("selection"), identity):
            select.run(chosen_job, storage, inputs, identity, Silent())
        table = storage.child("selection").read_table("selection.parquet", ["sample_id"])
        facts = self._judged(job, storage, row)
        fitted = manifest.require(main.child("scorer"), "fit").facts
        prior = {end: fitted["prior"][end] for end in ("estimate", "low", "high")}
        return table["sample_id"].to_pylist(), facts | {"prior": prior, "kind": fitted["kind"]}

    def _judged(self, job: Any, storage: Any, row: Row) -> dict[str, Any]:
        from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

        from pu_ray import ledger, measures

        truth = truth_of(self.data)
        columns = ["sample_id", "error", *([row.rank] if row.rank else [])]
        scores = storage.child("scores")
        keys: dict[bytes, float] = {}
        for file in ledger.data_files(scores):
            table = scores.read_table(file, columns)
            table = table.filter(table["error"].is_null())
            values = table[row.rank].to_pylist() if row.rank else [0.0] * table.num_rows
            keys.update(zip(table["sample_id"].to_pylist(), values, strict=True))
        selection = storage.child("selection")
        chosen, excluded = (
            set(selection.read_table(f"{name}.parquet", ["sample_id"])["sample_id"].to_pylist())
            for name in ("selection", "left_out")
        )
        quality = measures.mining_quality(chosen, truth, set(keys), excluded)
        found = {name: (quality[f"mined_{name}"] or {}).get("value") for name in ("precision", "recall")}
        if row.rank:
            positive = np.array([truth.get(sample, -1) >= 0 for sample in keys])
            values = np.nan_to_num(np.array(list(keys.values()), np.float64), neginf=-1e9)
            found |= {
                "average_precision": float(average_precision_score(positive, values)),
                "auroc": float(roc_auc_score(positive, values)),
            }
            precision, recall, _ = precision_recall_curve(positive, values)
            found["precision_at_recall"] = float(precision[recall >= _RECALL].max())
        return found | {"true_prior": quality["true_prior"]}


@functools.cache
def _fitted(chooser: Chooser, name: str) -> tuple[Any, Any, Any]:
    """The job, the sources of its identities and the identities, once features, fit and scores are there."""
    from pu_ray.pipeline import Pipeline, Sources, identities
    from pu_ray.progress import Narrator

    changes = _merged(_ON[chooser.device], JOBS[name])
    job = job_of(chooser.data, chooser.folder(name), chooser.labeled, chooser.seed, changes)
    sources = Sources(job)
    for verb in ("features", "fit", "score"):
        Pipeline(job, Narrator(quiet=True), contextlib.nullcontext).run_verb(verb)
    return job, sources, identities(job, sources)


@functools.cache
def truth_of(data: Path) -> dict[bytes, int]:
    """Class of every content of the lake; -1 for none of the teacher's."""
    table = pq.read_table(data / "truth.parquet")
    return dict(zip(table["sample_id"].to_pylist(), table["class"].to_pylist(), strict=True))


# -- teaching: the product's own loop, one process per core -------------------------------------------------


@functools.cache
def lake_of(data: Path) -> dict[bytes, int]:
    """Row of every content in `pixels_of`."""
    from pu_ray.images import sample_id

    contents = [content for file in sorted((data / "lake").glob("*.parquet")) for content in _bytes_of(file)]
    return {sample_id(content): row for row, content in enumerate(contents)}


def _bytes_of(file: Path) -> list[bytes]:
    column: list[bytes] = pq.read_table(file, columns=["bytes"])["bytes"].to_pylist()
    return column


def _decoded(data: Path, name: str, contents: Iterable[bytes]) -> Path:
    """Pixels uint8 [N, 28, 28, 1] in a file, for all processes."""
    import io

    from PIL import Image

    target = data / f"{name}.npy"
    if not target.exists():
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(content)))[..., None] for content in contents])
        temporary = target.with_suffix(".tmp.npy")
        np.save(temporary, pixels)
        temporary.rename(target)
    return target


def decode_all(data: Path) -> None:
    """Every image of the lake and of the test, decoded once."""
    from pu_ray import lake, models

    files = sorted((data / "lake").glob("*.parquet"))
    _decoded(data, "lake", (content for file in files for content in _bytes_of(file)))
    test = lake.read_labeled(f"{data}/test", models.read_classes(f"{data}/labels.txt"))
    _decoded(data, "test", test.encoded)
    np.save(data / "test-labels.npy", test.labels)


def _asked(teacher: Any, device: Any, pixels: Any, count: int, seed: int) -> Any:
    """The teacher's answers for `count` crops of each image: a record array [N] of crops and logits."""
    import torch

    from pu_ray.config import AugmentConfig
    from pu_ray.distill import answers, crops

    augment = AugmentConfig(**_AUGMENT)
    drawn = crops.draw(len(pixels) * count, pixels.shape[1:3], augment, np.random.default_rng([seed, 4]))
    records = np.empty(
        len(pixels), [("crops", np.int16, (count, crops.CROP_NUMBERS)), ("logits", np.float16, (count, 10))]
    )
    records["crops"] = drawn.reshape(len(pixels), count, -1)
    for number in range(count):
        seen = crops.cut(pixels, records["crops"][:, number])
        parts = [
            _answer(teacher, device, seen[start : start + _ASKED_AT_ONCE])
            for start in range(0, len(seen), _ASKED_AT_ONCE)
        ]
        records["logits"][:, number] = answers.compress(torch.cat(parts).float().numpy())[0]
    return records


def _answer(teacher: Any, device: Any, pixels: Any) -> Any:
    """Logits [N, 10] of pixels uint8 [N, 28, 28, 1]."""
    import torch

    with torch.inference_mode():
        return teacher(torch.from_numpy(pixels).to(device))[1].cpu()


def _lake_part(data: Path, device: str, first: int, stop: int) -> Any:
    pixels = np.load(data / "lake.npy", mmap_mode="r")[first:stop]
    return _asked(_teacher(data, device)[0], device, pixels, _CROPS["lake"], first)


def ask_all(data: Path, device: str, pool: ProcessPoolExecutor) -> None:
    """The teacher's answers for every image of the lake, once for all rows and seeds."""
    target = data / "lake-answers.npy"
    if not target.exists():
        _say("the teacher answers for the lake")
        images = len(np.load(data / "lake.npy", mmap_mode="r"))
        parts = pool.map(_lake_part, *zip(*[(data, device, a, a + 2000) for a in range(0, images, 2000)], strict=True))
        temporary = target.with_suffix(".tmp.npy")
        np.save(temporary, np.concatenate(list(parts)))
        temporary.rename(target)


def _stored(records: Any, classes: int) -> Any:
    """The same as the product keeps it."""
    from pu_ray.distill import answers

    count, crops = records["logits"].shape[:2]
    every = np.broadcast_to(np.arange(classes, dtype=np.int32), (count, crops, classes))
    parts = [records["crops"], records["logits"], every, np.full((count, crops), -np.inf, np.float16)]
    return answers.SoftLabels(iter([parts]), classes)


@functools.cache
def _teacher(data: Path, device: str) -> Any:
    """In a worker: the teacher, ready to run; one thread, since every core has a worker."""
    import torch

    from pu_ray.distill import fit

    torch.set_num_threads(1)
    return fit.teacher_on(job_of(data, data / "unused", 100, 0, {}), torch.device(device))


def teach(
    data: Path, device: str, labeled: int, seed: int, name: str, chosen: Sequence[int] | None, steps: int
) -> dict[str, Any]:
    """Train one student and test it.

    Args:
        data: The workload.
        device: Where; `cpu` or `cuda`.
        labeled: Images per class.
        seed: Of labeled set and student.
        name: The row.
        chosen: Rows of the lake; None for the row's own images.
        steps: Optimiser steps.
    """
    import torch

    from pu_ray import lake, models
    from pu_ray.config import DistillConfig
    from pu_ray.distill import loop
    from pu_ray.distill.data import Batches, Source
    from pu_ray.distill.store import InMemory
    from pu_ray.pu.training import assign_roles

    started = time.monotonic()
    teacher, classes = _teacher(data, device)
    job = job_of(data, data / "unused", labeled, seed, {})
    images = lake.read_labeled(job.labeled.uri, classes)
    roles = np.array(assign_roles(images.ids, images.labels, job.scorer.split, seed))
    pixels = images.pixels(job.teacher.preprocessing, job.labeled.uri)
    judge = roles == "validate"
    taught, labels = pixels[~judge], images.labels[~judge]
    said: tuple[Any, Any] = (None, None)
    if name == "all-data":
        mined, taught, labels = fmnist_open.garments(train=True)[0][..., None], taught[:0], labels[:0]
    elif name == "labeled":
        mined = taught[:0]
    else:
        rows = np.sort(np.asarray(chosen, np.int64))
        mined = np.load(data / "lake.npy", mmap_mode="r")[rows]
        if not ROWS[name].in_loop:
            said = (
                np.load(data / "lake-answers.npy", mmap_mode="r")[rows],
                _asked(teacher, device, taught, _CROPS["labeled"], seed),
            )
    stored = [None if records is None else _stored(records, len(classes)) for records in said]
    settings = DistillConfig(**{"max_steps": steps, "epochs": 10**6, "validations": _HELD_STEPS, **_distill_of(name)})
    torch.manual_seed(seed)
    student = models.build(job.student, len(classes), 1)
    state = loop.train(
        student,
        teacher if stored[0] is None else None,
        Batches(
            Source(InMemory(mined), stored[0]),
            Source(InMemory(taught), stored[1], labels),
            settings.batch_size,
            settings.labeled_share,
            settings.augment,
            seed,
        ),
        (pixels[judge], images.labels[judge]),
        settings,
        preprocessing=job.teacher.preprocessing,
        classes=len(classes),
        seed=seed,
        device=torch.device(device),
        precision=job.resources.train.precision,
        checkpoint=None,
        report=lambda _state, _bytes: None,
        count_images=lambda _images: None,
    )
    student.load_state_dict(state.best_weights)
    normalise = models.Normalised(torch.nn.Identity(), job.teacher.preprocessing)
    test = (np.load(data / "test.npy"), np.load(data / "test-labels.npy"))
    accuracy = loop.accuracy_of(student, normalise.to(device), test, torch.device(device))
    right = 0
    for start in range(0, len(test[0]), 500):
        answers = _answer(teacher, device, test[0][start : start + 500]).argmax(dim=1).numpy()
        right += int((answers == test[1][start : start + 500]).sum())
    return {
        "images": len(mined) + len(taught),
        "accuracy": accuracy,
        "teacher_accuracy": right / len(test[0]),
        "best_step": state.best_step,
        "seconds": time.monotonic() - started,
    }


def _distill_of(name: str) -> dict[str, Any]:
    changes = dict(ROWS[name].distill or {})
    return {"augment": _AUGMENT, **changes}


# -- the run -----------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Finished rows, in a file that grows."""

    file: Path

    def read(self) -> list[dict[str, Any]]:
        """All of them."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def add(self, record: Mapping[str, Any]) -> None:
        """One more."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def run(arguments: argparse.Namespace, data: Path, work: Path, results: Results) -> None:
    """Every row that is not there yet."""
    from cluster.session import ray_session

    done = {tuple(record[name] for name in _KEY) for record in results.read()}
    cores = arguments.processes or os.cpu_count() or 1
    with (
        ray_session(address=None, verbose=False, needed_cpus=4),
        ProcessPoolExecutor(cores, mp_context=_spawn()) as pool,
    ):
        ask_all(data, arguments.device, pool)
        waiting: dict[Future[dict[str, Any]], dict[str, Any]] = {}
        try:
            _submit(arguments, Trainees(pool, waiting, results, 3 * cores), data, work, done)
        finally:
            while waiting:
                _collect(waiting, results, block=True)


@dataclass(frozen=True)
class Trainees:
    """Students in training.

    Attributes:
        pool: Trains them.
        waiting: What is known of each.
        results: Where the finished go.
        most: How many may wait.
    """

    pool: ProcessPoolExecutor
    waiting: dict[Future[dict[str, Any]], dict[str, Any]]
    results: Results
    most: int


def _submit(arguments: argparse.Namespace, trainees: Trainees, data: Path, work: Path, done: set[Any]) -> None:
    from pu_ray.errors import DataError

    for labeled in arguments.labeled:
        for seed in arguments.seeds:
            chooser = Chooser(data, work, labeled, seed, arguments.device)
            for name in arguments.rows:
                record = {"scale": arguments.scale, "steps": arguments.steps, "labeled": labeled, "seed": seed}
                record["row"] = name
                # What looks at no labeled image is the same for any number of them.
                if name == "all-data":
                    record["labeled"] = fmnist_open.MOST_LABELED
                if tuple(record.values()) in done:
                    continue
                done.add(tuple(record.values()))
                try:
                    chosen, facts = _choice(chooser, name, data)
                except DataError as error:
                    # A scorer may find nothing; that is a result too.
                    trainees.results.add(record | {"refused": str(error)})
                    _say(f"{labeled:>3} labeled, seed {seed}, {name}: {error.problem}")
                    continue
                job = trainees.pool.submit(teach, data, arguments.device, labeled, seed, name, chosen, arguments.steps)
                trainees.waiting[job] = record | facts
                _say(f"{labeled:>3} labeled, seed {seed}, {name}: chosen")
                _collect(trainees.waiting, trainees.results, block=len(trainees.waiting) > trainees.most)


def _choice(chooser: Chooser, name: str, data: Path) -> tuple[list[int] | None, dict[str, Any]]:
    if ROWS[name].job is None:
        return None, {}
    budget = None
    if not ROWS[name].own_size:
        size = len(chooser.choose("default", None)[0])
        budget = size // 2 if name in (*VALUE, "no-balance") else size
    samples, facts = chooser.choose(name, budget)
    rows = lake_of(data)
    return [rows[sample] for sample in samples], facts | {"chosen": len(samples)}


def _collect(waiting: dict[Future[dict[str, Any]], dict[str, Any]], results: Results, block: bool) -> None:
    finished = [job for job in waiting if job.done()]
    if not finished and block:
        finished = [next(as_completed(waiting))]
    for job in finished:
        record = waiting.pop(job) | job.result()
        results.add(record)
        _say(f"{record['labeled']:>3} labeled, seed {record['seed']}, {record['row']}: {100 * record['accuracy']:.2f}")


def _spawn() -> Any:
    import multiprocessing

    return multiprocessing.get_context("spawn")


def _say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


# -- the tables --------------------------------------------------------------------------------------------


def mean_and_margin(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % t-interval; nan for a single value."""
    if len(values) < 2:
        return float(values[0]), math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(stats.t.ppf(0.975, len(values) - 1) * spread)


def tell(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: one table for each number of labeled images."""
    everywhere = [record for record in records if record["row"] == "all-data"]
    for labeled in sorted({record["labeled"] for record in records}, reverse=True):
        mine = [record for record in records if record["labeled"] == labeled and record["row"] != "all-data"]
        yield f"### {labeled} labeled images per class"
        yield ""
        yield "| row | images | precision | recall | AP | AUROC | at recall 0.9 | prior | student, % | gap | seeds |"
        yield "|" + "---|" * 11
        for name, row in ROWS.items():
            found = [record for record in (*everywhere, *mine) if record["row"] == name]
            refused = [record for record in found if "refused" in record]
            found = [record for record in found if "refused" not in record]
            if refused:
                yield f"| {row.says} | chose nothing, in {len(refused)} of {len(refused) + len(found)} |" + " |" * 9
            if found:
                yield f"| {row.says} | {' | '.join(_cells(found))} |"
        yield ""


def _cells(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"{statistics.mean(record['images'] for record in found):,.0f}"
    for column in ("precision", "recall", "average_precision", "auroc", "precision_at_recall"):
        values = [record[column] for record in found if record.get(column) is not None]
        yield f"{statistics.mean(values):.3f}" if values else ""
    priors = [record["prior"]["estimate"] for record in found if record.get("prior")]
    yield f"{statistics.mean(priors):.3f}" if priors else ""
    mean, margin = mean_and_margin([100 * record["accuracy"] for record in found])
    yield f"{mean:.2f}" if math.isnan(margin) else f"{mean:.2f} ± {margin:.2f}"
    gaps = [100 * (record["accuracy"] - record["teacher_accuracy"]) for record in found]
    yield f"{statistics.mean(gaps):+.2f}"
    yield str(len(found))


# -- the command -------------------------------------------------------------------------------------------


def main() -> None:
    """Run what is missing, print the tables."""
    groups = {"table": TABLE, "value": VALUE, "ablation": ABLATION, "all": tuple(ROWS)}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=fmnist_open.SCALES, default=os.environ.get("SCALE") or "full")
    parser.add_argument("--labeled", type=int, nargs="+", default=[100, 50, 20, 5], help="images per class")
    parser.add_argument("--seeds", type=int, nargs="+", help="which; default: all that the workload has")
    parser.add_argument("--device", choices=_ON, default="cpu", help="where networks run")
    parser.add_argument("--steps", type=int, help="optimiser steps of every student; default 1200, small 150")
    parser.add_argument("--rows", nargs="+", default=["table"], help=f"of {', '.join((*groups, *ROWS))}")
    parser.add_argument("--processes", type=int, help="students trained at once; default: one per core")
    parser.add_argument("--work", type=Path, help="keep workload and runs there; default: a temporary folder")
    parser.add_argument("--results", type=Path, help="finished rows; default: tests/benchmarks/results/")
    parser.add_argument("--tell", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    scale = fmnist_open.SCALES[arguments.scale]
    arguments.seeds = arguments.seeds or list(range(scale.seeds))
    if not set(arguments.seeds) <= set(range(scale.seeds)):
        parser.error(f"--seeds: the workload has 0 to {scale.seeds - 1}")
    arguments.steps = arguments.steps or (1200 if arguments.scale == "full" else 150)
    arguments.rows = list(dict.fromkeys(name for group in arguments.rows for name in groups.get(group, (group,))))
    if unknown := set(arguments.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    results = Results(arguments.results or RESULTS / f"quality-{arguments.scale}.jsonl")
    if not arguments.tell:
        with contextlib.ExitStack() as stack:
            work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pu-ray-quality-")))
            data = work.absolute() / f"fmnist-{arguments.scale}"
            fmnist_open.build(arguments.scale, data)
            decode_all(data)
            run(arguments, data, work.absolute() / f"runs-{_code_of(data)}", results)
    mine = [
        record for record in results.read() if record["scale"] == arguments.scale and record["steps"] == arguments.steps
    ]
    print("\n".join(tell(mine)))


def _code_of(data: Path) -> str:
    """Runs of another workload must not be taken for these."""
    return hashlib.blake2b((data / "recipe.json").read_bytes(), digest_size=4).hexdigest()


if __name__ == "__main__":
    cast(Any, main)()
