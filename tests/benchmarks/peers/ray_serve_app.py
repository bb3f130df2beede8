"""Ray Serve as its documentation has it: FastAPI on two replicas, `serve.batch`, the body is the JPEG itself.

Decoding happens in the batch, in the replica's event loop; a thread of its own would take the one core from the
network.
"""

# No `from __future__ import annotations`: Ray sends the class by value, and FastAPI would look in vain for what the
# annotations name.

import signal
from typing import Any

import ray
from fastapi import FastAPI, Request
from ray import serve

from tests.benchmarks.peers import network

app = FastAPI()


@serve.deployment(num_replicas=2, max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
@serve.ingress(app)
class Service:
    """One replica."""

    def __init__(self) -> None:
        self.classifier = network.Classifier(network.folder())

    @app.post("/classify")
    async def classify(self, request: Request) -> dict[str, Any]:
        """Answer one request."""
        return await self.classify_batch(await request.body())

    @serve.batch(max_batch_size=network.MAX_BATCH, batch_wait_timeout_s=0.002)
    async def classify_batch(self, bodies: list[bytes]) -> list[dict[str, Any]]:
        """Answers of a batch."""
        return self.classifier.answers([network.pixels_of(body) for body in bodies])


def main() -> None:
    """Serve until SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": network.port()})
    serve.run(Service.bind(), name="mobilenet")  # type: ignore[attr-defined]  # the decorator made it one
    try:
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


if __name__ == "__main__":
    main()
