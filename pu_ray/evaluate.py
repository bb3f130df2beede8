"""Stage `evaluate`: the one look at the test images, by teacher and student alike.

Accuracies carry Wilson intervals; where the truth of the lake is known, so do precision and recall of what was mined.
The quality gate stands here: a student that fails it is kept for study, but neither exported nor served. Writes
`evaluation/`: answers.parquet (one row per test image).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy import stats
from torch import nn

from pu_ray import gate, lake, ledger, manifest, models, schema
from pu_ray.config import JobConfig
from pu_ray.errors import DataError
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage

FOLDER = "evaluation"
_CALIBRATION_BINS = 15


# -- pure functions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % Wilson interval; all in [0, 1]."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: int, n: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval of a binomial share (Wilson 1927).

    Raises:
        ValueError: n is not positive, or hits lie outside 0..n.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"need 0 <= hits <= n and n >= 1, got {hits} of {n}")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    share = hits / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Rate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def expected_calibration_error(confidence_N: Any, right_N: Any) -> float:
    """Mean gap between confidence and accuracy over 15 equal bins, weighted by their size (Guo et al. 2017)."""
    confidence, right = np.asarray(confidence_N), np.asarray(right_N, float)
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    error = 0.0
    for index in np.unique(bins):
        inside = bins == index
        error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return float(error)


def mining_quality(
    selected: set[bytes], truth: Mapping[bytes, int], lake_ids: set[bytes], excluded: set[bytes]
) -> dict[str, Any]:
    """Precision and recall of the selection, where the lake's truth is known.

    Args:
        selected: Chosen contents.
        truth: Class of each content; -1 for none of the teacher's classes.
        lake_ids: Usable contents of the lake.
        excluded: Contents that may not be mined (labeled, leaks); they count on neither side.
    """
    positives = {sample for sample in lake_ids if truth.get(sample, -1) >= 0} - excluded
    hits = len(selected & positives)
    return {
        "mined_precision": asdict(wilson(hits, len(selected))),
        "mined_recall": asdict(wilson(hits, len(positives))) if positives else None,
        "true_prior": len({s for s in lake_ids if truth.get(s, -1) >= 0}) / max(len(lake_ids), 1),
    }


# -- the stage ---------------------------------------------------------------------------------------------


def _answers(network: nn.Module, pixels: Any, config: JobConfig) -> tuple[Any, Any]:
    """Predicted class int64 [N] and its probability float64 [N]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    normalised = models.Normalised(network, config.teacher.preprocessing).eval().to(device)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), config.evaluation.batch_size):
            batch = torch.from_numpy(pixels[start : start + config.evaluation.batch_size]).to(device)
            parts.append(torch.softmax(normalised(batch).double(), dim=1).cpu())
    probabilities = torch.cat(parts)
    confidence, predicted = probabilities.max(dim=1)
    return predicted.numpy(), confidence.numpy()


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Evaluate, publish, and then judge.

    Raises:
        DataError: The test images cannot be used.
    """
    publication = Publication("evaluate", identity, inputs, config.seed)
    distilled = manifest.require(storage.child("student"), "distill")
    teacher, classes = models.load_teacher(config.teacher)
    test = lake.read_labeled(config.test.uri, classes)
    pixels = test.pixels(config.teacher.preprocessing, config.test.uri)
    progress.start(2 * len(test), "images")
    facts: dict[str, Any] = {}
    columns: dict[str, Any] = {
        schema.SAMPLE_ID: pa.array(test.ids, schema.SAMPLE_ID_TYPE),
        schema.NAME: pa.array(test.names),
        schema.CLASS: pa.array(test.labels.astype(np.int32)),
    }
    networks = {
        "teacher": teacher.tapped.network,
        "student": models.load_student(config, storage.child("student"), len(classes)),
    }
    right = {}
    for name, network in networks.items():
        predicted, confidence = _answers(network, pixels, config)
        right[name] = predicted == test.labels
        facts[f"{name}_accuracy"] = asdict(wilson(int(right[name].sum()), len(test)))
        facts[f"{name}_calibration_error"] = expected_calibration_error(confidence, right[name])
        columns[f"{name}_predicted"] = pa.array(predicted.astype(np.int32))
        columns[f"{name}_confidence"] = pa.array(confidence.astype(np.float32))
        progress.advance(len(test))
    gap = 100 * (right["teacher"].mean() - right["student"].mean())
    per_class = {
        classes[k]: asdict(wilson(int(right["student"][test.labels == k].sum()), int((test.labels == k).sum())))
        for k in np.unique(test.labels)
    }
    facts |= {
        "gap_to_teacher": float(gap),
        "agreement": float((columns["teacher_predicted"].to_numpy() == columns["student_predicted"].to_numpy()).mean()),
        "student_accuracy_per_class": per_class,
        "gate": gate.verdict(float(gap), config.evaluation.gate.max_gap_to_teacher),
    }
    if config.lake.truth is not None:
        facts |= _against_truth(config.lake.truth, storage)
    target = storage.child(FOLDER)
    target.delete()
    target.write_table("answers.parquet", pa.table(columns))
    return publication.publish(
        target,
        counts={
            "test": len(test),
            "teacher_parameters": models.parameter_count(teacher),
            "student_parameters": distilled.counts["parameters"],
        },
        facts=facts,
    )


def _against_truth(uri: str, storage: Storage) -> dict[str, Any]:
    folder, name = Storage(uri).split()
    table = folder.read_table(name)
    if missing := {schema.SAMPLE_ID, schema.CLASS} - set(table.column_names):
        raise DataError(
            "the truth table lacks columns", where=uri, allowed=str(schema.truth()), got=f"no {', '.join(missing)}"
        )
    truth = dict(zip(table[schema.SAMPLE_ID].to_pylist(), table[schema.CLASS].to_pylist(), strict=True))
    scores = storage.child("scores")
    lake_ids: set[bytes] = set()
    for part in (scores.read_table(file, [schema.SAMPLE_ID, schema.ERROR]) for file in ledger.data_files(scores)):
        lake_ids.update(part.filter(part[schema.ERROR].is_null())[schema.SAMPLE_ID].to_pylist())
    selection = storage.child("selection")
    selected = set(selection.read_table("selection.parquet", [schema.SAMPLE_ID])[schema.SAMPLE_ID].to_pylist())
    excluded = set(selection.read_table("left_out.parquet", [schema.SAMPLE_ID])[schema.SAMPLE_ID].to_pylist())
    return mining_quality(selected, truth, lake_ids, excluded)
