"""BentoML: one service of two worker processes with its adaptive batching.

The picture comes as the documentation has it, a file of a form that BentoML opens with Pillow. One service alone: its
guide puts decoding into a service before the model where that runs on a GPU, and a hop more costs on two cores.
"""

from __future__ import annotations

from typing import Any

import bentoml
from PIL import Image

from tests.benchmarks.peers import network


@bentoml.service(name="mobilenet", workers=2, traffic={"timeout": 60})
class Service:
    """One worker."""

    def __init__(self) -> None:
        self.classifier = network.Classifier(network.folder())

    @bentoml.api(batchable=True, max_batch_size=network.MAX_BATCH)
    def classify(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        """Answers of a batch."""
        return self.classifier.answers([network.pixels_in(image) for image in images])
