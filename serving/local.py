"""A student that answers in this process: decoding in threads, forward passes for several requests together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from ray import serve

from pu_ray.errors import DataError
from pu_ray.images import Limits
from serving import registry
from serving.metrics import StudentMeter
from serving.predictor import Floats, Images, Predictions, Predictor, join
from serving.registry import LoadedStudent, Student
from serving.settings import ServingSettings

# Normalised images [M, C, H, W] of one request, and when they were ready (monotonic seconds).
Piece = tuple[Floats, float]
_PIECE_IMAGES = 8  # of a request that shares no batch; bounds what it holds in memory


def _images_in(pieces: list[Piece]) -> int:
    return sum(len(pixels) for pixels, _ in pieces)


class LocalStudent:
    """One student: `desk.Backend` without a hop.

    Each request is decoded on its own, in threads; what came out of it joins other requests for the forward pass, where
    the network gains by that on this machine, and else goes through it alone, in the same thread. So a bad image never
    reaches its neighbours, and memory holds at most one batch of pixels per request.

    Args:
        student: Whom to open; the folder must still hold exactly this one.
        settings: Batch sizes, threads and limits.

    Raises:
        DataError, GateError: The exported folder cannot be served, or changed since the server was started.
    """

    def __init__(self, student: Student, settings: ServingSettings) -> None:
        self._predictor = reopened(student, settings)
        # A batch that outgrows the caches is slower per image than a small one, by how much is this machine's matter.
        self._batch_images = self._predictor.best_batch(settings.max_batch_images)
        self._decoding = ThreadPoolExecutor(settings.cpus_per_replica, "decode")
        self._running = ThreadPoolExecutor(1, "forward")
        self._meter = StudentMeter(student)
        if self._batch_images > 1:
            self._forward.set_max_batch_size(self._batch_images)  # type: ignore[attr-defined]
            self._forward.set_batch_wait_timeout_s(settings.batch_wait_s)  # type: ignore[attr-defined]

    async def predict(self, images: Images) -> Predictions:
        """Answer the N images of one request, at least one."""
        if self._batch_images == 1:
            return await asyncio.get_running_loop().run_in_executor(self._decoding, self._predict_alone, images)
        loop = asyncio.get_running_loop()
        parts = []
        for start in range(0, len(images), self._batch_images):
            piece = images[start : start + self._batch_images]
            started = time.monotonic()
            prepared = await loop.run_in_executor(self._decoding, self._predictor.prepare, piece)
            self._meter.decoded(time.monotonic() - started)
            parts.append(prepared.answer(await self._forward((prepared.pixels_MCHW, time.monotonic()))))
        return join(parts)

    async def ready(self) -> bool:
        """True: it has warmed up."""
        return True

    def _predict_alone(self, images: Images) -> Predictions:
        parts = []
        for start in range(0, len(images), _PIECE_IMAGES):
            began = time.monotonic()
            prepared = self._predictor.prepare(images[start : start + _PIECE_IMAGES])
            decoded = time.monotonic()
            parts.append(prepared.answer(self._predictor.forward(prepared.pixels_MCHW)))
            self._meter.decoded(decoded - began)
            self._meter.ran(time.monotonic() - decoded)
            self._meter.batched(len(prepared.pixels_MCHW))
        return join(parts)

    @serve.batch(batch_size_fn=_images_in)
    async def _forward(self, pieces: list[Piece]) -> list[Floats]:
        """Logits [M, K] of each piece [M, C, H, W], from one forward pass over all of them."""
        started = time.monotonic()
        for _, since in pieces:
            self._meter.queued(started - since)
        loop = asyncio.get_running_loop()
        pixels = [piece for piece, _ in pieces]
        logits = await loop.run_in_executor(self._running, _forward_together, self._predictor, pixels)
        self._meter.ran(time.monotonic() - started)
        self._meter.batched(_images_in(pieces))
        return logits


def _forward_together(predictor: Predictor, pieces: Sequence[Floats]) -> list[Floats]:
    if len(pieces) == 1:
        return [predictor.forward(pieces[0])]
    logits_MK = predictor.forward(np.concatenate(pieces))
    return np.split(logits_MK, np.cumsum([len(piece) for piece in pieces])[:-1])


def reopened(student: Student, settings: ServingSettings) -> Predictor:
    """The student from its folder once more, warm.

    Raises:
        DataError, GateError: The folder cannot be served, or holds another student by now.
    """
    loaded = registry.load(student.uri, student.engine)
    if loaded.student != student:
        raise DataError(
            "the exported student changed since the server was started",
            slug="student-changed",
            where=student.uri,
            allowed=f"version {student.version}",
            got=f"version {loaded.student.version}",
            hint="start the server again",
        )
    return warm(loaded, settings)


def warm(loaded: LoadedStudent, settings: ServingSettings) -> Predictor:
    """The student with this server's limits and threads, after a first forward pass.

    Raises:
        DataError: The network cannot be loaded, or does not fit its preprocessing or its labels.
    """
    limits = Limits(max_bytes=settings.max_body_bytes, max_px=settings.max_image_px)
    predictor = Predictor(loaded, limits, settings.cpus_per_replica)
    predictor.warm_up()
    return predictor
