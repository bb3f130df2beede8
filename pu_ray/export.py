"""Stage `export`: the student as a folder that others' tools open, each format proven to be the same model.

Every format is run on real images beside the checkpoint before anything is published; one that differs means no
artifact. The eight-bit one is another model, and held to bounds of its own. Writes `exported/`: model.safetensors,
model.pt2, model.onnx, model.int8.onnx, config.json (timm's layout), labels.txt, preprocess.json, a model card and
SHA256SUMS.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from pu_ray import card, cost, engine, gate, images, lake, ledger, manifest, models, quantise, schema, tracking
from pu_ray.config import ExportConfig, JobConfig, PreprocessingConfig
from pu_ray.distill import data
from pu_ray.errors import ClusterError, DataError
from pu_ray.manifest import Manifest, Publication
from pu_ray.measures import wilson
from pu_ray.progress import Progress
from pu_ray.storage import Storage, sha256_of

FOLDER = "exported"
INPUT_NAME = "pixels"
OUTPUT_NAME = "logits"
INT8 = "onnx-int8"
SUMS_FILE = "SHA256SUMS"
_PARITY_IMAGES = 256
_CALIBRATION_IMAGES = 256
_BATCH_IMAGES = 64

# Normalised float32 [N, C, H, W] to logits float32 [N, K].
Forward = Callable[[Any], Any]


# -- formats: bytes, and how to run them -------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """What the formats are made from.

    Attributes:
        config: The job.
        student: The checkpoint, in eval mode.
        classes: Number of logits.
        calibration_NCHW: Normalised images for the eight-bit one, which no format is judged on.
    """

    config: JobConfig
    student: nn.Module
    classes: int
    calibration_NCHW: Any

    @property
    def example(self) -> torch.Tensor:
        """Two blank inputs."""
        preprocessing = self.config.student_preprocessing
        return torch.zeros(2, preprocessing.channels, preprocessing.size_px, preprocessing.size_px)

    @cached_property
    def graph(self) -> bytes:
        """The float ONNX graph."""
        return engine.to_onnx(
            self.student,
            self.example,
            input_name=INPUT_NAME,
            output_names=[OUTPUT_NAME],
            opset=self.config.export.opset,
        )


def _safetensors(material: Material) -> tuple[bytes, Forward]:
    from safetensors.torch import load

    content = models.save_weights(material.student)
    config = material.config
    again = models.build(config.student, material.classes, config.student_preprocessing.channels)
    again.load_state_dict(load(content))
    return content, _torch_forward(again.eval())


def _pt2(material: Material) -> tuple[bytes, Forward]:
    batch = torch.export.Dim("batch", min=1, max=65_536)
    program = torch.export.export(material.student, (material.example,), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return buffer.getvalue(), _torch_forward(torch.export.load(buffer).module())


def _onnx(material: Material) -> tuple[bytes, Forward]:
    return material.graph, _onnx_forward(material.graph)


def _int8(material: Material) -> tuple[bytes, Forward]:
    if not len(material.calibration_NCHW):
        raise DataError(
            "there are too few mined images to quantise by",
            slug="too-few-images-to-quantise",
            where=f"export.formats ({INT8})",
            allowed="two or more, to calibrate on one and judge on the other",
            got="fewer",
            hint=f"mine more, or leave {INT8} out",
        )
    content = quantise.to_int8(material.graph, INPUT_NAME, material.calibration_NCHW)
    return content, _onnx_forward(content)


_FORMATS: Mapping[str, tuple[str, Callable[[Material], tuple[bytes, Forward]]]] = {
    "safetensors": ("model.safetensors", _safetensors),
    "pt2": ("model.pt2", _pt2),
    "onnx": ("model.onnx", _onnx),
    INT8: ("model.int8.onnx", _int8),
}


def _torch_forward(module: nn.Module) -> Forward:
    def forward(batch: Any) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(batch)).numpy()

    return forward


def _onnx_forward(graph: bytes) -> Forward:
    session = engine.OnnxEngine(graph)
    return lambda batch: session.run(batch)[0]


# -- parity ------------------------------------------------------------------------------------------------


def _compared(forward: Forward, reference_NK: Any, batch_NCHW: Any) -> dict[str, float]:
    """Largest absolute logit difference, and share of equal answers; also of one image alone, since batches vary."""
    logits_NK = _in_batches(forward, batch_NCHW)
    alone = forward(batch_NCHW[:1])
    return {
        "max_logit_difference": float(
            max(np.abs(logits_NK - reference_NK).max(), np.abs(alone - reference_NK[:1]).max())
        ),
        "agreement": float((logits_NK.argmax(1) == reference_NK.argmax(1)).mean()),
    }


def _in_batches(forward: Forward, batch_NCHW: Any) -> Any:
    starts = range(0, len(batch_NCHW), _BATCH_IMAGES)
    return np.concatenate([forward(batch_NCHW[start : start + _BATCH_IMAGES]) for start in starts])


def parity(name: str, forward: Forward, reference_NK: Any, batch_NCHW: Any, settings: ExportConfig) -> dict[str, float]:
    """Compare a float format with the checkpoint on real images.

    Returns:
        Largest absolute logit difference and share of equal answers.

    Raises:
        DataError: It is not the same model.
    """
    measured = _compared(forward, reference_NK, batch_NCHW)
    difference, agreement = measured["max_logit_difference"], measured["agreement"]
    if not (difference <= settings.max_logit_difference and agreement >= settings.min_agreement):
        raise DataError(
            f"the exported {name} is not the model that was trained",
            slug="export-differs",
            where=f"export.formats ({name})",
            allowed=f"logits within {settings.max_logit_difference:g}, agreement >= {settings.min_agreement:g}",
            got=f"logits differ by {difference:.2g}, agreement {agreement:.4f}",
            hint="nothing was published; leave this format out, or report the network",
        )
    return measured


@dataclass(frozen=True)
class Judges:
    """Labeled images with their true classes, and how the checkpoint does on them.

    Attributes:
        pixels_NHWC: uint8.
        labels_N: True classes.
        hits: How often the checkpoint is right.
        preprocessing: How the pixels become the input.
    """

    pixels_NHWC: Any
    labels_N: Any
    hits: int
    preprocessing: PreprocessingConfig

    @classmethod
    def of(cls, config: JobConfig, scorer: Storage, classes: list[str], checkpoint: Forward) -> Judges:
        """Those of validation and calibration; the test images are evaluation's alone.

        Some of them may have taught the student: what is asked is not how good it is but what eight bits lose, and
        that needs many images more than new ones.

        Raises:
            DataError: They cannot be read, or have changed.
        """
        labeled = lake.read_labeled(config.labeled.uri, classes)
        validate, calibrate = (data.labeled_by_role(labeled, scorer, role) for role in ("validate", "calibrate"))
        chosen = validate + calibrate
        preprocessing = config.student_preprocessing
        pixels = chosen.pixels(preprocessing, config.labeled.uri)
        hits = hits_of(checkpoint, pixels, chosen.labels, preprocessing)
        return cls(pixels, chosen.labels, hits, preprocessing)


def hits_of(forward: Forward, pixels_NHWC: Any, labels_N: Any, preprocessing: PreprocessingConfig) -> int:
    """How often a network is right; normalises a batch at a time."""
    hits = 0
    for start in range(0, len(labels_N), _BATCH_IMAGES):
        rows = slice(start, start + _BATCH_IMAGES)
        logits_NK = forward(images.normalise(pixels_NHWC[rows], preprocessing))
        hits += int((logits_NK.argmax(1) == labels_N[rows]).sum())
    return hits


def int8_parity(
    forward: Forward, reference_NK: Any, batch_NCHW: Any, judges: Judges, settings: ExportConfig
) -> dict[str, float]:
    """Compare the eight-bit network with the checkpoint: answers on mined images, accuracy on labeled ones.

    Returns:
        What `parity` returns, the accuracy lost in percentage points, and on how many images.

    Raises:
        DataError: It lost too much.
    """
    count = len(judges.labels_N)
    hits = hits_of(forward, judges.pixels_NHWC, judges.labels_N, judges.preprocessing)
    drop = 100 * (judges.hits - hits) / count
    measured = _compared(forward, reference_NK, batch_NCHW)
    # One answer of thirty is 3 %: what speaks against the network is an interval that lies below the bound.
    best = wilson(round(measured["agreement"] * len(batch_NCHW)), len(batch_NCHW)).high
    if not (drop <= settings.max_int8_accuracy_drop and best >= settings.min_int8_agreement):
        raise DataError(
            "the student loses too much in eight bits",
            slug="int8-loses-too-much",
            where=f"export.formats ({INT8})",
            allowed=f"at most {settings.max_int8_accuracy_drop:g} percentage points of accuracy "
            "(export.max_int8_accuracy_drop), "
            f"agreement >= {settings.min_int8_agreement:g} (export.min_int8_agreement)",
            got=f"{drop:.2f} points on {count} labeled images, agreement {measured['agreement']:.4f} on "
            f"{len(batch_NCHW)} mined ones (at most {best:.4f})",
            hint=f"nothing was published; leave {INT8} out of export.formats, or change the bounds",
        )
    return {**measured, "accuracy_drop_points": drop, "labeled_images": count}


def _real_images(config: JobConfig, mined: Storage, most: int = _PARITY_IMAGES) -> Any:
    """Normalised mined images, float32 [N, C, H, W]."""
    preprocessing = config.student_preprocessing

    def contents() -> Iterator[bytes]:
        for file in ledger.data_files(mined):
            yield from mined.read_table(file, [schema.BYTES])[schema.BYTES].to_pylist()

    limits = images.Limits.of(config.lake)
    pixels = [images.decode(content, preprocessing, limits) for content in islice(contents(), most)]
    return images.normalise(np.stack(pixels), preprocessing)


def confidence_deciles(logits_NK: Any) -> list[float]:
    """The nine inner deciles of the largest probability."""
    largest_N = softmax(np.asarray(logits_NK, np.float64), axis=1).max(axis=1)
    return [float(value) for value in np.quantile(largest_N, np.linspace(0.1, 0.9, 9))]


# -- what goes beside the weights --------------------------------------------------------------------------


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def sums(contents: Mapping[str, bytes]) -> bytes:
    """Digests as `sha256sum -c` reads them."""
    return "".join(f"{sha256_of(content)}  {name}\n" for name, content in sorted(contents.items())).encode()


# -- the stage ---------------------------------------------------------------------------------------------


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Export, check every format, and publish all or nothing.

    Raises:
        GateError: The student failed its quality gate.
        DataError: A format differs from the checkpoint, or the eight-bit one loses too much.
    """
    publication = Publication("export", identity, inputs, config.seed)
    evaluation = manifest.require(storage.child("evaluation"), "evaluate")
    gate.require(evaluation, str(storage.child("evaluation")))
    distilled = manifest.require(storage.child("student"), "distill")
    classes = models.read_classes(config.teacher.classes)
    student = models.load_student(config, storage.child("student"), len(classes))
    checkpoint = _torch_forward(student)
    if INT8 in config.export.formats:
        real = _real_images(config, storage.child("mined"), _PARITY_IMAGES + _CALIBRATION_IMAGES)
        # By lot, so that both see the same mixture whatever order the images come in.
        lot = np.random.default_rng(config.seed).permutation(len(real))
        batch, calibration = real[lot[::2]], real[lot[1::2]]
    else:
        batch = _real_images(config, storage.child("mined"))
        calibration = batch[:0]
    reference = _in_batches(checkpoint, batch)
    material = Material(config, student, len(classes), calibration)
    progress.start(len(config.export.formats), "formats")
    contents: dict[str, bytes] = {}
    checks: dict[str, dict[str, float]] = {}
    formats: dict[str, dict[str, Any]] = {}
    for name in config.export.formats:
        file, make = _FORMATS[name]
        contents[file], forward = make(material)
        if name == INT8:
            judges = Judges.of(config, storage.child("scorer"), classes, checkpoint)
            checks[name] = int8_parity(forward, reference, batch, judges, config.export)
        else:
            checks[name] = parity(name, forward, reference, batch, config.export)
        formats[name] = {
            "file": file,
            "bytes": len(contents[file]),
            "cpu_latency_ms": cost.latency_ms(lambda forward=forward: forward(batch[:1])),  # type: ignore[misc]
        }
        progress.advance(1)
    made = card.Made(
        classes=classes,
        mined=manifest.require(storage.child("mined"), "select").counts["rows"],
        labeled=manifest.require(storage.child("scorer"), "fit").counts["labeled"],
        parameters=distilled.counts["parameters"],
        formats=formats,
        parity=checks,
    )
    contents |= {
        "config.json": _json(card.timm_config(config, classes)),
        "preprocess.json": _json(config.student_preprocessing.model_dump(mode="json")),
        "labels.txt": ("\n".join(classes) + "\n").encode(),
        "README.md": card.model_card(config, evaluation, made).encode(),
    }
    contents[SUMS_FILE] = sums(contents)
    target = storage.child(FOLDER)
    target.delete()
    for file, content in contents.items():
        target.write_bytes(file, content)
    registered = _register(config, contents, len(classes), distilled, evaluation, identity, progress)
    return publication.publish(
        target,
        counts={
            "parity_images": len(batch),
            "calibration_images": len(calibration),
            "parameters": distilled.counts["parameters"],
        },
        facts={
            "name": config.name,
            "architecture": config.student.architecture,
            "options": config.student.options,
            "sha256": {name: sha256_of(content) for name, content in contents.items()},
            "parity": checks,
            "formats": formats,
            "gate_passed": True,
            # What serving compares its own traffic with.
            "confidence_deciles": confidence_deciles(reference),
            "student_accuracy": evaluation.facts["student_accuracy"],
            **registered,
        },
    )


def _register(
    config: JobConfig,
    contents: Mapping[str, bytes],
    classes: int,
    distilled: Manifest,
    evaluation: Manifest,
    identity: str,
    progress: Progress,
) -> dict[str, str]:
    """Bring the student to MLflow's model registry, where there is one; a server that is away stops no export."""
    if config.tracking.mlflow_uri is None:
        return {}
    graph, run = contents.get(_FORMATS["onnx"][0]), distilled.facts.get("mlflow_run")
    if graph is None or run is None:
        missing = "no ONNX file in export.formats" if graph is None else "the training did not reach MLflow"
        progress.note(f"the student is not registered in MLflow: {missing}")
        return {}
    name = config.tracking.registered_model or config.name
    preprocessing = config.student_preprocessing
    size = preprocessing.size_px
    shapes = {INPUT_NAME: (-1, preprocessing.channels, size, size), OUTPUT_NAME: (-1, classes)}
    facts = evaluation.facts
    metrics = {f"test_{who}_accuracy": facts[f"{who}_accuracy"]["value"] for who in ("teacher", "student")}
    metrics |= {f"test_{figure}": facts[figure] for figure in ("gap_to_teacher", "agreement")}
    tags = {"pu_ray.identity": identity}
    try:
        version = tracking.register(config.tracking, name, run, graph, shapes, metrics, tags)
    except ClusterError as error:
        progress.note(str(error))
        return {}
    return {"mlflow_model": f"models:/{name}/{version}"}
