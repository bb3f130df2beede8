"""Stage `export`: the student as a folder that others' tools open, each format proven to be the same model.

Every format is run on real images beside the checkpoint before anything is published; one that differs means no
artifact. Writes `exported/`: model.safetensors, model.pt2, model.onnx, config.json (timm's layout), labels.txt,
preprocess.json and a model card.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from pu_ray import engine, gate, images, ledger, manifest, models, schema
from pu_ray.config import ExportConfig, JobConfig
from pu_ray.errors import DataError
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage, sha256_of

FOLDER = "exported"
INPUT_NAME = "pixels"
OUTPUT_NAME = "logits"
_PARITY_IMAGES = 256

# Normalised float32 [N, C, H, W] to logits float32 [N, K].
Forward = Callable[[Any], Any]


# -- formats: bytes, and how to run them -------------------------------------------------------------------


def _safetensors(student: nn.Module, config: JobConfig, classes: int) -> tuple[bytes, Forward]:
    content = models.save_weights(student)
    from safetensors.torch import load

    again = models.build(config.student, classes, config.teacher.preprocessing.channels)
    again.load_state_dict(load(content))
    return content, _torch_forward(again.eval())


def _pt2(student: nn.Module, config: JobConfig, classes: int) -> tuple[bytes, Forward]:
    batch = torch.export.Dim("batch", min=1, max=65_536)
    program = torch.export.export(student, (_example(config),), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return buffer.getvalue(), _torch_forward(torch.export.load(buffer).module())


def _onnx(student: nn.Module, config: JobConfig, classes: int) -> tuple[bytes, Forward]:
    graph = engine.to_onnx(
        student, _example(config), input_name=INPUT_NAME, output_names=[OUTPUT_NAME], opset=config.export.opset
    )
    session = engine.OnnxEngine(graph)
    return graph, lambda batch: session.run(batch)[0]


_FORMATS = {"safetensors": _safetensors, "pt2": _pt2, "onnx": _onnx}


def _torch_forward(module: nn.Module) -> Forward:
    def forward(batch: Any) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(batch)).numpy()

    return forward


def _example(config: JobConfig) -> torch.Tensor:
    preprocessing = config.teacher.preprocessing
    return torch.zeros(2, preprocessing.channels, preprocessing.size_px, preprocessing.size_px)


# -- parity ------------------------------------------------------------------------------------------------


def parity(name: str, forward: Forward, reference_NK: Any, batch_NCHW: Any, settings: ExportConfig) -> dict[str, float]:
    """Compare a format with the checkpoint on real images; also one image alone, since batches are dynamic.

    Returns:
        Largest absolute logit difference and share of equal answers.

    Raises:
        DataError: It is not the same model.
    """
    logits_NK = forward(batch_NCHW)
    alone = forward(batch_NCHW[:1])
    difference = float(max(np.abs(logits_NK - reference_NK).max(), np.abs(alone - reference_NK[:1]).max()))
    agreement = float((logits_NK.argmax(1) == reference_NK.argmax(1)).mean())
    if not (difference <= settings.max_logit_difference and agreement >= settings.min_agreement):
        raise DataError(
            f"the exported {name} is not the model that was trained",
            where=f"export.formats ({name})",
            allowed=f"logits within {settings.max_logit_difference:g}, agreement >= {settings.min_agreement:g}",
            got=f"logits differ by {difference:.2g}, agreement {agreement:.4f}",
            hint="nothing was published; leave this format out, or report the network",
        )
    return {"max_logit_difference": difference, "agreement": agreement}


def _real_images(config: JobConfig, mined: Storage) -> Any:
    """Normalised mined images, float32 [N, C, H, W]."""
    preprocessing = config.teacher.preprocessing

    def contents() -> Iterator[bytes]:
        for file in ledger.data_files(mined):
            yield from mined.read_table(file, [schema.BYTES])[schema.BYTES].to_pylist()

    limits = images.Limits.of(config.lake)
    pixels = [images.decode(content, preprocessing, limits) for content in islice(contents(), _PARITY_IMAGES)]
    return images.normalise(np.stack(pixels), preprocessing)


# -- what goes beside the weights --------------------------------------------------------------------------


def timm_config(config: JobConfig, classes: list[str]) -> dict[str, Any]:
    """`config.json` in timm's layout; `timm.create_model("local-dir:...")` reads it where the network is timm's."""
    preprocessing = config.teacher.preprocessing
    side = preprocessing.size_px
    return {
        "architecture": config.student.architecture.removeprefix("timm/"),
        "num_classes": len(classes),
        "model_args": dict(config.student.options),
        "pretrained_cfg": {
            "input_size": [preprocessing.channels, side, side],
            "interpolation": preprocessing.interpolation,
            "crop_pct": side / (preprocessing.resize_px or side),
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(classes),
        },
        "label_names": classes,
    }


def model_card(config: JobConfig, evaluation: Manifest, mined: int, parameters: int) -> str:
    """A model card with the measured figures."""
    student, teacher = evaluation.facts["student_accuracy"], evaluation.facts["teacher_accuracy"]
    return f"""---
library_name: {"timm" if config.student.architecture.startswith("timm/") else "pytorch"}
pipeline_tag: image-classification
tags: [knowledge-distillation, positive-unlabeled-learning]
---

# {config.name}

A {config.student.architecture} student ({parameters:,} parameters) of a {config.teacher.architecture} teacher
({evaluation.counts["teacher_parameters"]:,} parameters), distilled on {mined:,} images that a positive-unlabeled
classifier found in an unlabeled lake.

| | accuracy | 95 % interval | test images |
|---|---|---|---|
| teacher | {teacher["value"]:.4f} | {teacher["low"]:.4f} to {teacher["high"]:.4f} | {teacher["n"]:,} |
| student | {student["value"]:.4f} | {student["low"]:.4f} to {student["high"]:.4f} | {student["n"]:,} |

`preprocess.json` says how images become the input; `labels.txt` names the logits in order. `model.onnx` and
`model.pt2` take normalised float32 [N, C, H, W] and return logits [N, K]; `manifest.json` holds SHA-256 digests.
The student knows the teacher's classes only, and inherits its mistakes: check it on your own images.
"""


# -- the stage ---------------------------------------------------------------------------------------------


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Export, check every format, and publish all or nothing.

    Raises:
        GateError: The student failed its quality gate.
        DataError: A format differs from the checkpoint.
    """
    publication = Publication("export", identity, inputs, config.seed)
    evaluation = manifest.require(storage.child("evaluation"), "evaluate")
    gate.require(evaluation, str(storage.child("evaluation")))
    distilled = manifest.require(storage.child("student"), "distill")
    classes = models.read_classes(config.teacher.classes)
    student = models.load_student(config, storage.child("student"), len(classes))
    batch = _real_images(config, storage.child("mined"))
    reference = _torch_forward(student)(batch)
    progress.start(len(config.export.formats), "formats")
    contents: dict[str, bytes] = {}
    checks = {}
    for name in config.export.formats:
        content, forward = _FORMATS[name](student, config, len(classes))
        checks[name] = parity(name, forward, reference, batch, config.export)
        contents[f"model.{name}"] = content
        progress.advance(1)
    mined = manifest.require(storage.child("mined"), "select").counts["rows"]
    contents |= {
        "config.json": _json(timm_config(config, classes)),
        "preprocess.json": _json(config.section("teacher.preprocessing")),
        "labels.txt": ("\n".join(classes) + "\n").encode(),
        "README.md": model_card(config, evaluation, mined, distilled.counts["parameters"]).encode(),
    }
    target = storage.child(FOLDER)
    target.delete()
    for file, content in contents.items():
        target.write_bytes(file, content)
    return publication.publish(
        target,
        counts={"parity_images": len(batch), "parameters": distilled.counts["parameters"]},
        facts={
            "name": config.name,
            "architecture": config.student.architecture,
            "sha256": {name: sha256_of(content) for name, content in contents.items()},
            "parity": checks,
            "gate_passed": True,
            "student_accuracy": evaluation.facts["student_accuracy"],
        },
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
