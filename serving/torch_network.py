"""The engine `torch`: bfloat16 and compiled on a GPU, where that answers as float32 does; eager float32 on a CPU.

The only module of this room that needs torch, imported where that engine was chosen and nowhere else.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from pu_ray import models
from pu_ray.config import PreprocessingConfig
from pu_ray.engine import Engine, TorchEngine
from pu_ray.errors import DataError
from serving.registry import ENGINES, LoadedStudent

_log = logging.getLogger("ray.serve.pu_ray")

_JUDGED_IMAGES = 32
# Of the logits' range: what bfloat16's eight bits of mantissa leave after some tens of layers.
_TOLERANCE = 0.05


def opened(loaded: LoadedStudent, threads: int) -> Engine:
    """The network on this process's GPU, or on its CPUs where it has none.

    Args:
        loaded: With the weights of `model.safetensors`.
        threads: Of a forward pass on CPUs.

    Raises:
        ConfigError: The architecture is not to be had here.
        DataError: The export does not name it, names code of its own, or the weights are not its.
    """
    student = loaded.student
    where = f"{student.uri}/{ENGINES['torch']}"
    network = loaded.network
    if network is None or ":" in network.architecture:
        raise DataError(
            "the engine `torch` builds the network by name, and this export has none that it would follow",
            slug="network-not-buildable-here",
            where=where,
            allowed="a CIFAR ResNet, or a network of torchvision or timm; code that an artifact names is not run",
            got=network.architecture if network is not None else "no name",
            hint="serve it with the engine `onnx`",
        )
    torch.set_num_threads(threads)
    module = models.build(network, len(student.labels), student.preprocessing.channels)
    models.load_safetensors(module, loaded.model, where)
    if not torch.cuda.is_available():
        return TorchEngine(module, "cpu")
    images_NCHW = _images(student.preprocessing)
    exact_NK = TorchEngine(module, "cpu").run(images_NCHW)[0]
    fast = TorchEngine(module, "cuda", compiled=True)
    if agree(exact_NK, fast.run(images_NCHW)[0]):
        return fast
    _log.warning("%s: bfloat16 answers differently, float32 is used", student.name)
    return TorchEngine(module, "cuda", half=False)


def agree(exact_NK: np.ndarray, fast_NK: np.ndarray) -> bool:
    """Whether answers are the same but for rounding.

    Args:
        exact_NK: Logits float32 [N, K].
        fast_NK: The same images' logits, computed with fewer bits.
    """
    allowed = _TOLERANCE * float(np.ptp(exact_NK))
    return bool(np.abs(exact_NK - fast_NK).max() <= allowed)


def _images(preprocessing: PreprocessingConfig) -> np.ndarray:
    shape = (_JUDGED_IMAGES, preprocessing.channels, preprocessing.size_px, preprocessing.size_px)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
