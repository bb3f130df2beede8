"""Exported folders with a tiny network, for every test of serving: no torch, no training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pu_ray import manifest
from pu_ray.config import PreprocessingConfig
from pu_ray.storage import Storage, sha256_of

PREPROCESSING = PreprocessingConfig(size_px=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
LABELS = ("cat", "dog", "Ünicorn")


def onnx_network(
    classes: int = len(LABELS), seed: int = 0, preprocessing: PreprocessingConfig = PREPROCESSING
) -> bytes:
    """A 2 x 2 mean of the pixels before a linear layer: `pixels` [N, C, H, W] to `logits` [N, K].

    Its weights are large enough that images differ in their answers, and small enough that no class is certain.
    """
    generator = np.random.default_rng(seed)
    height, width, channels = preprocessing.shape_hwc
    weights = generator.normal(size=(4 * channels, classes)).astype(np.float32)
    bias = generator.normal(scale=0.1, size=classes).astype(np.float32)
    half = [height // 2, width // 2]
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["pixels"], ["pooled"], kernel_shape=half, strides=half),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", channels, height, width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def write_student(folder: Path, name: str = "pets", seed: int = 0, **changes: Any) -> str:
    """Publish an exported folder as `pu_ray.export` does.

    Args:
        folder: Where.
        name: The student's name.
        seed: Of the network's weights, and so of its answers and of its version.
        changes: `files` (contents by name; None leaves one out), `facts` or `stage` that differ from a proper export.

    Returns:
        The folder's URI.
    """
    storage = Storage(str(folder))
    files = {
        "model.onnx": onnx_network(seed=seed),
        "labels.txt": "".join(f"{label}\n" for label in LABELS).encode(),
        "preprocess.json": PREPROCESSING.model_dump_json().encode(),
        "config.json": json.dumps({"architecture": "tiny"}).encode(),
        "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "README.md": f"# {name}\n".encode(),
    } | changes.get("files", {})
    files = {path: content for path, content in files.items() if content is not None}
    for path, content in files.items():
        storage.write_bytes(path, content)
    facts = {
        "name": name,
        "gate_passed": True,
        "sha256": {path: sha256_of(content) for path, content in files.items()},
    } | changes.get("facts", {})
    stage = changes.get("stage", "export")
    identity = manifest.identity(stage, {"name": name}, {"student": str(seed)}, seed)
    manifest.Publication(stage, identity, {"student": str(seed)}, seed).publish(storage, counts={}, facts=facts)
    return storage.uri


def picture(seed: int, side_px: int = 8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture uint8 [side_px, side_px, 3] of four flat quarters; every seed has other colours."""
    quarters = np.random.default_rng(seed).integers(0, 256, size=(2, 2, 3)).astype(np.uint8)
    return quarters.repeat(side_px // 2, axis=0).repeat(side_px // 2, axis=1)


def png(seed: int, side_px: int = 8) -> bytes:
    """`picture`, encoded without loss."""
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, side_px)).save(buffer, "PNG")
    return buffer.getvalue()
