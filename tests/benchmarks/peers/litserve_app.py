"""LitServe: two workers, decoding in `decode_request`, batches as its documentation describes them.

The body is the JPEG itself. A body that is no JSON is not documented, but FastAPI's annotation brings it through, and
it is cheaper than base64 in JSON or a form. Every worker decodes what it batched. LitServe's other queue
(`fast_queue`), longer waits and a single HTTP server were tried and were not faster.
"""

# No `from __future__ import annotations`: LitServe hands the annotation of `decode_request` on as it finds it.

from typing import Annotated, Any

import litserve
from fastapi import Body

from tests.benchmarks.peers import network

JPEG = Annotated[bytes, Body(media_type="image/jpeg")]


class Api(litserve.LitAPI):
    """One worker."""

    def setup(self, device: str) -> None:
        """Open the network."""
        self.classifier = network.Classifier(network.folder())

    def decode_request(self, request: JPEG) -> Any:
        """Pixels of one request."""
        return network.pixels_of(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """They are stacked once, with the normalisation."""
        return inputs

    def predict(self, x: list[Any]) -> list[dict[str, Any]]:
        """Answers of a batch."""
        return self.classifier.answers(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """They are apart already."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Plain JSON data already."""
        return output


if __name__ == "__main__":
    api = Api(max_batch_size=network.MAX_BATCH, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=2, fast_queue=False)
    server.run(host="127.0.0.1", port=network.port(), log_level="warning", generate_client_file=False)
