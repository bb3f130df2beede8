"""MLServer: a custom runtime with two parallel workers and adaptive batching, asked over the V2 protocol.

MLServer's REST has no binary tensors (its issue 324 is open), so a picture travels as base64 in JSON: one BYTES element
of content type `base64`, as its own codecs write it. `serving_contestants.py` writes the two settings files.
"""

from __future__ import annotations

import base64
from itertools import chain
from typing import Any

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from tests.benchmarks.peers import network


class Runtime(MLModel):
    """One worker."""

    async def load(self) -> bool:
        """Open the network."""
        self.classifier = network.Classifier(network.folder())
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answers of a batch, which MLServer joined into one request."""
        encoded = chain.from_iterable(tensor.data for tensor in payload.inputs)
        answers = self.classifier.answers([network.pixels_of(base64.b64decode(each)) for each in encoded])
        return InferenceResponse(
            model_name=self.name,
            outputs=[
                self._output("label", "INT64", [answer["label"] for answer in answers]),
                self._output("probability", "FP32", [answer["probability"] for answer in answers]),
            ],
        )

    @staticmethod
    def _output(name: str, datatype: str, values: list[Any]) -> ResponseOutput:
        return ResponseOutput(name=name, shape=[len(values), 1], datatype=datatype, data=values)
