"""Stage `evaluate`: the one look at the test images, by teacher and student alike.

Accuracies carry Wilson intervals, overall, for each class and for each value of `evaluation.slices`; beside them stand
the commonest mistakes and what an answer costs. Where the truth of the lake is known, so do precision and recall of
what was mined. The quality gate stands here: a student that fails it is kept for study, but neither exported nor
served. Writes `evaluation/`: answers.parquet (one row per test image).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pu_ray import cost, gate, lake, ledger, manifest, models, schema, slices
from pu_ray.config import JobConfig, PreprocessingConfig
from pu_ray.errors import DataError
from pu_ray.lake import LabeledImages
from pu_ray.manifest import Manifest, Publication
from pu_ray.measures import (
    among_the_best,
    confusion_pairs,
    expected_calibration_error,
    mining_quality,
    share_of,
)
from pu_ray.progress import Progress
from pu_ray.storage import Storage

FOLDER = "evaluation"
_TOP = 5


@dataclass(frozen=True)
class Answers:
    """What one network says of N test images.

    Attributes:
        predicted: Class int64 [N].
        confidence: Its probability float64 [N].
        right: Whether it is the true one, bool [N].
        among_five: Whether the true one is among the five most probable, bool [N].
    """

    predicted: Any
    confidence: Any
    right: Any
    among_five: Any


def _answers(network: nn.Module, test: LabeledImages, preprocessing: PreprocessingConfig, config: JobConfig) -> Answers:
    pixels = test.pixels(preprocessing, config.test.uri)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    normalised = models.Normalised(network, preprocessing).eval().to(device)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), config.evaluation.batch_size):
            batch = torch.from_numpy(pixels[start : start + config.evaluation.batch_size]).to(device)
            parts.append(torch.softmax(normalised(batch).double(), dim=1).cpu())
    network.cpu()
    probabilities = torch.cat(parts)
    confidence, predicted = (values.numpy() for values in probabilities.max(dim=1))
    return Answers(
        predicted, confidence, predicted == test.labels, among_the_best(probabilities.numpy(), test.labels, _TOP)
    )


def _facts_of(name: str, answers: Answers, labels_N: Any, classes: list[str]) -> dict[str, Any]:
    """Accuracy and calibration of one network."""
    facts: dict[str, Any] = {
        f"{name}_accuracy": share_of(answers.right),
        f"{name}_calibration_error": expected_calibration_error(answers.confidence, answers.right),
        f"{name}_accuracy_per_class": {classes[k]: share_of(answers.right[labels_N == k]) for k in np.unique(labels_N)},
    }
    if len(classes) > _TOP:
        facts[f"{name}_top5_accuracy"] = share_of(answers.among_five)
    return facts


def _cost_of(network: nn.Module, preprocessing: PreprocessingConfig, weights_bytes: int) -> dict[str, Any]:
    """Parameters, multiply-adds and milliseconds of one image on a CPU, and bytes of the weights.

    The latency is that of torch without a compiler on one thread of this machine: a fact about the two networks beside
    each other, not about a server.
    """
    side = preprocessing.size_px
    example = torch.zeros(1, preprocessing.channels, side, side)

    def run() -> None:
        with torch.inference_mode():
            network(example)

    return {
        "parameters": models.parameter_count(network),
        "multiply_adds": cost.multiply_adds(network, example),
        "weights_bytes": weights_bytes,
        "cpu_latency_ms": cost.latency_ms(run),
    }


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Evaluate, publish, and then judge.

    Raises:
        ConfigError: The metadata has no column of this name.
        DataError: The test images or their metadata cannot be used.
    """
    publication = Publication("evaluate", identity, inputs, config.seed)
    distilled = manifest.require(storage.child("student"), "distill")
    loaded, classes = models.load_teacher(config.teacher)
    test = lake.read_labeled(config.test.uri, classes)
    known: slices.Values = {}
    if config.evaluation.metadata is not None:
        known = slices.read(config.evaluation.metadata, config.evaluation.slices, test.names)
    progress.start(2 * len(test), "images")
    teacher = loaded.tapped.network
    student = models.load_student(config, storage.child("student"), len(classes))
    sizes = {file.path: file.size_bytes for file in storage.child("student").list_files()}
    networks = {
        "teacher": (teacher, config.teacher.preprocessing, 4 * models.parameter_count(teacher)),
        "student": (student, config.student_preprocessing, sizes["model.safetensors"]),
    }
    facts: dict[str, Any] = {"cost": {}}
    columns: dict[str, Any] = {
        schema.SAMPLE_ID: pa.array(test.ids, schema.SAMPLE_ID_TYPE),
        schema.NAME: pa.array(test.names),
        schema.CLASS: pa.array(test.labels.astype(np.int32)),
    }
    said: dict[str, Answers] = {}
    for name, (network, preprocessing, weights_bytes) in networks.items():
        said[name] = answers = _answers(network, test, preprocessing, config)
        facts |= _facts_of(name, answers, test.labels, classes)
        facts["cost"][name] = _cost_of(network, preprocessing, weights_bytes)
        columns[f"{name}_predicted"] = pa.array(answers.predicted.astype(np.int32))
        columns[f"{name}_confidence"] = pa.array(answers.confidence.astype(np.float32))
        progress.advance(len(test))
    # Of whole numbers, so that a gap of exactly the bound is not above it by a rounding.
    gap = 100 * int(said["teacher"].right.sum() - said["student"].right.sum()) / len(test)
    agreement = share_of(said["teacher"].predicted == said["student"].predicted)
    facts |= {
        "gap_to_teacher": gap,
        "agreement": agreement["value"],
        "agreement_interval": agreement,
        "confusion_pairs": confusion_pairs(
            test.labels, said["student"].predicted, said["teacher"].predicted, classes, test.names
        ),
        "slices": slices.accuracies(known, {name: answers.right for name, answers in said.items()}),
        "gate": gate.verdict(
            config.evaluation.gate,
            gap=gap,
            accuracy=facts["student_accuracy"]["value"],
            calibration_error=facts["student_calibration_error"],
        ),
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
            "the truth table lacks columns",
            slug="truth-columns-missing",
            where=uri,
            allowed=str(schema.truth()),
            got=f"no {', '.join(missing)}",
            hint="mend the table, or leave lake.truth out",
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
