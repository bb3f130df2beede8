"""What the servers of the serving benchmark answer with and are asked: one network in every form, and pictures.

The network is torchvision's mobilenet_v3_small with random weights. Its batch-norm statistics and the bias of its last
layer are those of generated pictures, so that activations keep to the range that trained networks have and pictures
differ in their answers. The folder `exported` is made by the functions with which `pu_ray.export` makes one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tests.benchmarks.peers import network

NAME = "mobilenet"
ARCHITECTURE = "torchvision/mobilenet_v3_small"
WIDTH_PX, HEIGHT_PX = 500, 375
_FORMAT = 1  # of the folder; another number makes it anew
_CALIBRATION = 128  # pictures; half of them for the eight-bit network
_CANDIDATES = 80  # pictures to choose the asked ones from
_ASKED = 8


@dataclass(frozen=True)
class Material:
    """A folder with everything.

    Attributes:
        folder: Holds `weights.pt` and `exported`.
        pictures: JPEGs; the first is the one of the load.
        labels: The right answer to each.
    """

    folder: Path
    pictures: Sequence[bytes]
    labels: Sequence[int]


def picture(seed: int) -> bytes:
    """A JPEG of 500 x 375 px and about 50 KB: a gradient, soft shapes, hard shapes, and noise as of a sensor."""
    generator = np.random.default_rng(seed)
    corners = Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    image = corners.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.BICUBIC)
    for soft in (True, False):
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y = generator.integers(0, (WIDTH_PX, HEIGHT_PX))
            half_width, half_height = generator.integers(8, 90, 2)
            box = [int(x - half_width), int(y - half_height), int(x + half_width), int(y + half_height)]
            shape = draw.ellipse if generator.random() < 0.5 else draw.rectangle
            shape(box, fill=tuple(int(value) for value in generator.integers(0, 256, 3)))
        if soft:
            image = image.filter(ImageFilter.GaussianBlur(6))
    noisy = np.asarray(image, np.float32) + generator.normal(0, 5, (HEIGHT_PX, WIDTH_PX, 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepare(folder: Path) -> Material:
    """The material, made where it is not there."""
    index = folder / "material.json"
    if index.exists():
        known = json.loads(index.read_text())
        if known["format"] == _FORMAT:
            return Material(folder, [picture(seed) for seed in known["seeds"]], known["labels"])
    folder.mkdir(parents=True, exist_ok=True)
    seeds, labels = _make(folder)
    index.write_text(json.dumps({"format": _FORMAT, "seeds": seeds, "labels": labels}) + "\n")
    return Material(folder, [picture(seed) for seed in seeds], labels)


def _make(folder: Path) -> tuple[list[int], list[int]]:
    """Write everything; seeds and answers of the asked pictures."""
    import torch

    from pu_ray import engine
    from pu_ray.config import PreprocessingConfig
    from pu_ray.images import decode, normalise

    preprocessing = PreprocessingConfig(mean=network.MEAN, std=network.STD)

    def pixels(first: int, count: int) -> Any:
        decoded = [decode(picture(seed), preprocessing) for seed in range(first, first + count)]
        return normalise(np.stack(decoded), preprocessing)

    calibration = pixels(1_000_000, _CALIBRATION)
    student = _calibrated(torch.from_numpy(calibration))
    torch.save(student.state_dict(), folder / network.WEIGHTS_FILE)
    graphs = _export(folder / "exported", student, calibration)
    candidates = pixels(0, _CANDIDATES)
    with torch.inference_mode():
        logits = student(torch.from_numpy(candidates)).numpy()
    ours = [engine.OnnxEngine(graph, 2).run(candidates)[0].argmax(1) for graph in graphs]
    answers = logits.argmax(1)
    ordered = np.sort(logits, axis=1)
    margins = (ordered[:, -1] - ordered[:, -2]) / logits.std()
    # Those that nobody can get wrong by rounding, and no two with the same answer.
    chosen: dict[int, int] = {}
    for seed in np.argsort(-margins):
        if all(int(other[seed]) == int(answers[seed]) for other in ours) and len(chosen) < _ASKED:
            chosen.setdefault(int(answers[seed]), int(seed))
    assert len(chosen) == _ASKED, f"only {len(chosen)} of {_CANDIDATES} pictures have an answer of their own"
    return list(chosen.values()), list(chosen)


def _calibrated(pixels: Any) -> Any:
    """The network, in eval mode, with the statistics of these pictures."""
    import torch

    from pu_ray import models
    from pu_ray.config import NetworkConfig

    torch.manual_seed(0)
    student = models.build(NetworkConfig(architecture=ARCHITECTURE), network.CLASSES, 3)
    norms = [module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the mean of all batches
    dropouts = [module for module in student.modules() if isinstance(module, torch.nn.Dropout)]
    student.train()
    for dropout in dropouts:
        dropout.eval()
    with torch.no_grad():
        for batch in pixels.split(64):
            student(batch)
        student.eval()
        last = [module for module in student.modules() if isinstance(module, torch.nn.Linear)][-1]
        logits = torch.cat([student(batch) for batch in pixels.split(64)])
        # As sure of itself as trained networks are.
        scale = 3 / (logits - logits.mean(dim=0)).std()
        last.weight.mul_(scale)
        last.bias.copy_(last.bias * scale - scale * logits.mean(dim=0))
    return student


def _export(folder: Path, student: Any, calibration: Any) -> list[bytes]:
    """Publish as `pu_ray.export.run` does, which wants a whole run behind it; the ONNX graphs, float and eight bits."""
    from pu_ray import card, config, cost, export, manifest
    from pu_ray.storage import Storage, sha256_of

    labels = [str(position) for position in range(network.CLASSES)]
    preprocessing = {"size_px": network.SIDE_PX, "mean": list(network.MEAN), "std": list(network.STD)}
    settings = {
        "name": NAME,
        "output": "runs",
        "teacher": {
            "architecture": ARCHITECTURE,
            "weights": "weights",
            "classes": "labels",
            "preprocessing": preprocessing,
        },
        "student": {"architecture": ARCHITECTURE},
        **{source: {"uri": source} for source in ("labeled", "test", "lake")},
    }
    job = config.resolve([("benchmark", settings)]).job
    judged, calibrating = calibration[::2], calibration[1::2]
    material = export.Material(job, student, network.CLASSES, calibrating)
    contents: dict[str, bytes] = {}
    formats: dict[str, dict[str, Any]] = {}
    for name in job.export.formats:
        file, make = export._FORMATS[name]
        contents[file], forward = make(material)
        latency = cost.latency_ms(lambda forward=forward: forward(judged[:1]))  # type: ignore[misc]
        formats[name] = {"file": file, "bytes": len(contents[file]), "cpu_latency_ms": latency}
    graphs = [contents[formats[name]["file"]] for name in ("onnx", export.INT8)]
    reference = export._onnx_forward(graphs[0])(judged)
    contents |= {
        "config.json": export._json(card.timm_config(job, labels)),
        "preprocess.json": export._json(job.student_preprocessing.model_dump(mode="json")),
        "labels.txt": ("\n".join(labels) + "\n").encode(),
    }
    contents[export.SUMS_FILE] = export.sums(contents)
    storage = Storage(str(folder))
    storage.delete()
    for file, content in contents.items():
        storage.write_bytes(file, content)
    identity = manifest.identity("export", settings, {}, 0)
    manifest.Publication("export", identity, {}, 0).publish(
        storage,
        counts={},
        facts={
            "name": NAME,
            "architecture": ARCHITECTURE,
            "sha256": {file: sha256_of(content) for file, content in contents.items()},
            "formats": formats,
            "gate_passed": True,
            "confidence_deciles": export.confidence_deciles(reference),
        },
    )
    return graphs
