"""What stands beside exported weights: timm's configuration, and a model card with what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pu_ray.config import JobConfig
from pu_ray.manifest import Manifest

_MOST_CLASSES = 20
_WEAKEST = 3


def timm_config(config: JobConfig, classes: list[str]) -> dict[str, Any]:
    """`config.json` in timm's layout; `timm.create_model("local-dir:...")` reads it where the network is timm's."""
    preprocessing = config.student_preprocessing
    side = preprocessing.size_px
    return {
        "architecture": config.student.architecture.removeprefix("timm/"),
        "num_classes": len(classes),
        "model_args": dict(config.student.options),
        "pretrained_cfg": {
            "input_size": [preprocessing.channels, side, side],
            "interpolation": preprocessing.interpolation,
            "crop_pct": _crop_pct(side, preprocessing.resize_px or side),
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(classes),
        },
        "label_names": classes,
    }


def _crop_pct(side: int, resize: int) -> float:
    """The share whose quotient timm rounds down to `resize`; the plain one may end up a pixel below."""
    share = side / resize
    while math.floor(side / share) < resize:
        share = math.nextafter(share, 0.0)
    return share


@dataclass(frozen=True)
class Made:
    """What the export knows of the student.

    Attributes:
        classes: Class names in the order of the logits.
        mined: Mined images that taught it.
        labeled: Labeled images of the job.
        parameters: Of the student.
        formats: By format: `file`, `bytes`, `cpu_latency_ms`.
        parity: By format: `max_logit_difference`, `agreement`; for onnx-int8 also `accuracy_drop_points` and
            `labeled_images`.
    """

    classes: list[str]
    mined: int
    labeled: int
    parameters: int
    formats: Mapping[str, Mapping[str, Any]]
    parity: Mapping[str, Mapping[str, Any]]


def model_card(config: JobConfig, evaluation: Manifest, made: Made) -> str:
    """Markdown behind the YAML that model hubs read."""
    front = yaml.safe_dump(
        {
            # Nobody told us, and a guess would be a promise.
            "license": "unknown",
            "library_name": "timm" if config.student.architecture.startswith("timm/") else "pytorch",
            "pipeline_tag": "image-classification",
            "tags": ["knowledge-distillation", "positive-unlabeled-learning"],
        },
        sort_keys=False,
    )
    named = ", ".join(made.classes[:_MOST_CLASSES]) + (", ..." if len(made.classes) > _MOST_CLASSES else "")
    gap = evaluation.facts["gap_to_teacher"]
    return f"""---
{front}---

# {config.name}

A {config.student.architecture} student ({made.parameters:,} parameters) of a {config.teacher.architecture} teacher
({evaluation.counts["teacher_parameters"]:,} parameters).

License: unknown. It follows from the licenses of the teacher and of the images, which PU-Ray does not know; whoever
publishes this model has to find it and say it here.

## Intended use

It tells {len(made.classes):,} classes of images apart: {named}. It answers with one of them whatever it is shown, so
images of anything else must be kept from it, or sorted out by other means.

## Training

Distilled on {made.mined:,} images that a positive-unlabeled classifier found in an unlabeled lake, with
{made.labeled:,} labeled images to find them by and to choose the best student. Recipe {config.recipe},
seed {config.seed}.

## Evaluation

On {evaluation.counts["test"]:,} test images that were not used before; copies of them were kept out of the training.

{_accuracies(evaluation.facts)}

The student is {abs(gap):.2f} percentage points {"behind" if gap >= 0 else "ahead of"} its teacher and says the same
as it for {100 * evaluation.facts["agreement"]:.1f} % of the images. {_weakest(evaluation.facts)}

## Files

{_formats(made)}

Compared with the checkpoint on mined images; milliseconds for one image on one thread of the machine that exported it.
{_int8(made)}`preprocess.json` says how images become the input, `labels.txt` names the logits in order. The networks
take normalised float32 [N, C, H, W] and return logits [N, K]. `sha256sum -c SHA256SUMS` checks the files.

## Limits

The student knows the teacher's classes only, and inherits its mistakes and those of the images that taught it. The
figures hold for images like the test images: check it on your own.
"""


def _accuracies(facts: Mapping[str, Any]) -> str:
    rows = ["| | measure | value | 95 % interval | test images |", "|---|---|---|---|---|"]
    for who in ("teacher", "student"):
        for key, measure in (("accuracy", "accuracy"), ("top5_accuracy", "top-5 accuracy")):
            if (rate := facts.get(f"{who}_{key}")) is not None:
                interval = f"{rate['low']:.4f} to {rate['high']:.4f}"
                rows.append(f"| {who} | {measure} | {rate['value']:.4f} | {interval} | {rate['n']:,} |")
        rows.append(f"| {who} | calibration error | {facts[f'{who}_calibration_error']:.4f} | | |")
        cost = facts["cost"][who]
        rows.append(f"| {who} | multiply-adds | {cost['multiply_adds']:,} | | |")
    return "\n".join(rows)


def _weakest(facts: Mapping[str, Any]) -> str:
    rates = sorted(facts["student_accuracy_per_class"].items(), key=lambda item: (item[1]["value"], item[0]))
    told = ", ".join(f"{name} {rate['value']:.3f} of {rate['n']:,}" for name, rate in rates[:_WEAKEST])
    return f"Its weakest classes: {told}."


def _formats(made: Made) -> str:
    rows = ["| file | bytes | ms | largest difference of a logit | same answers |", "|---|---|---|---|---|"]
    for name, about in made.formats.items():
        same = made.parity[name]
        rows.append(
            f"| {about['file']} | {about['bytes']:,} | {about['cpu_latency_ms']:.2f} "
            f"| {same['max_logit_difference']:.2g} | {100 * same['agreement']:.2f} % |"
        )
    return "\n".join(rows)


def _int8(made: Made) -> str:
    measured = made.parity.get("onnx-int8")
    if measured is None:
        return ""
    drop, images = measured["accuracy_drop_points"], measured["labeled_images"]
    return (
        f"`model.int8.onnx` holds eight-bit numbers and is another model: on {images:,} labeled images it loses\n"
        f"{drop:.2f} percentage points of accuracy. Where its ms are no fewer, it saves space alone.\n"
    )
