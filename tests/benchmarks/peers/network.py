"""What every peer's server runs: the same network in eager torch, and the same way from a JPEG to its input.

Written as one would write it for a server of one's own, with care for speed: the pixels stay uint8 until they are a
batch, and the crop is resized alone. Needs torch, torchvision, NumPy and Pillow, and nothing of this project, because
it is imported in the peers' own environments.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.models import mobilenet_v3_small

CLASSES = 1000
SIDE_PX = 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
WEIGHTS_FILE = "weights.pt"
# Where the material lies, and the port to listen on; servers differ in the arguments that they pass on.
FOLDER_VARIABLE, PORT_VARIABLE = "BENCHMARK_FOLDER", "BENCHMARK_PORT"
MAX_BATCH = 16

_MEAN = torch.tensor(MEAN).mul(255).view(1, 3, 1, 1)
_SCALE = torch.tensor(STD).mul(255).reciprocal().view(1, 3, 1, 1)


def folder() -> Path:
    """Where the weights lie."""
    return Path(os.environ[FOLDER_VARIABLE])


def port() -> int:
    """Where to listen."""
    return int(os.environ[PORT_VARIABLE])


def pixels_of(encoded: bytes) -> Any:
    """An encoded picture as the network sees it before normalisation, uint8 [224, 224, 3]."""
    return pixels_in(Image.open(io.BytesIO(encoded)))


def pixels_in(image: Image.Image) -> Any:
    """The same of a picture that was opened already."""
    image = image.convert("RGB")
    width, height = image.size
    window = min(width, height)
    left, top = (width - window) / 2, (height - window) / 2
    box = (left, top, left + window, top + window)
    return np.asarray(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, box=box))


class Classifier:
    """The network with one thread.

    Args:
        weights: The material's folder.
    """

    def __init__(self, weights: Path) -> None:
        torch.set_num_threads(1)
        self.network = mobilenet_v3_small(num_classes=CLASSES)
        self.network.load_state_dict(torch.load(weights / WEIGHTS_FILE, weights_only=True))
        self.network.eval()

    def probabilities(self, pixels: Sequence[Any]) -> torch.Tensor:
        """Of every class, float32 [N, 1000], for N pictures of `pixels_of`."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            logits: torch.Tensor = self.network(((batch - _MEAN) * _SCALE).contiguous())
            return logits.softmax(dim=1)

    def answers(self, pixels: Sequence[Any]) -> list[dict[str, Any]]:
        """The best class of each picture, as plain JSON data."""
        best, labels = self.probabilities(pixels).max(dim=1)
        return [
            {"label": label, "probability": probability}
            for label, probability in zip(labels.tolist(), best.tolist(), strict=True)
        ]
