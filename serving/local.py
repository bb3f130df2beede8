"""A student that answers in this process: threads that take whatever waits, up to what one forward pass runs fastest.

No request waits for company. While a thread works others arrive, and it takes them together the next time: under load
batches fill, and a lone request has a pass of its own at once.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pu_ray.errors import DataError
from pu_ray.images import Limits
from serving import registry
from serving.metrics import StudentMeter
from serving.predictor import Images, Predictions, Predictor, join
from serving.registry import LoadedStudent, Student
from serving.settings import ServingSettings


@dataclass(frozen=True, eq=False)
class _Piece:
    """Images of one request that go through the network together.

    Attributes:
        images: At least one, at most a batch.
        answered: Cancelled where nobody waits any more.
        since: When it began to wait, in monotonic seconds.
    """

    images: Images
    answered: asyncio.Future[Predictions]
    since: float


class LocalStudent:
    """One student: `desk.Backend` without a hop. All its requests come from one event loop.

    A thread decodes every piece that it takes on its own and runs what came out of them through the network together,
    so a bad image never reaches its neighbours, and memory holds one batch of pixels per thread. One thread does both:
    a change of thread costs a request more than all its checks.

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
        self._threads = settings.cpus_per_replica
        self._turns = ThreadPoolExecutor(self._threads, "predict")
        self._waiting: deque[_Piece] = deque()
        self._taking = threading.Lock()
        self._meter = StudentMeter(student)

    async def predict(self, images: Images) -> Predictions:
        """Answer the N images of one request, at least one."""
        size = self._batch_images
        if len(images) <= size:
            return await self._enqueued(images)
        pieces = [images[start : start + size] for start in range(0, len(images), size)]
        return join(await asyncio.gather(*map(self._enqueued, pieces)))

    async def ready(self) -> bool:
        """True: it has warmed up."""
        return True

    def _enqueued(self, images: Images) -> asyncio.Future[Predictions]:
        piece = _Piece(images, asyncio.get_running_loop().create_future(), time.monotonic())
        self._waiting.append(piece)
        # A turn for each piece: one whose piece was taken along by an earlier turn finds less to do, or nothing.
        self._turns.submit(self._turn)
        return piece.answered

    def _turn(self) -> None:
        pieces = self._taken()
        if not pieces:
            return
        answers: Sequence[Predictions | BaseException]
        try:
            answers = self._answers(pieces)
        except BaseException as error:  # nobody sees it here, and whoever asked would wait for ever
            answers = [error] * len(pieces)
        pieces[0].answered.get_loop().call_soon_threadsafe(_settle, pieces, answers)

    def _taken(self) -> list[_Piece]:
        """This thread's share of what waits, at most a batch."""
        pieces: list[_Piece] = []
        images = 0
        with self._taking:
            share = math.ceil(len(self._waiting) / self._threads)
            while self._waiting and len(pieces) < share:
                if self._waiting[0].answered.cancelled():
                    self._waiting.popleft()
                    continue
                images += len(self._waiting[0].images)
                if pieces and images > self._batch_images:
                    break
                pieces.append(self._waiting.popleft())
        return pieces

    def _answers(self, pieces: Sequence[_Piece]) -> list[Predictions]:
        prepared = []
        before = time.monotonic()
        for piece in pieces:
            self._meter.queued(before - piece.since)
            prepared.append(self._predictor.prepare(piece.images))
            after = time.monotonic()
            self._meter.decoded(after - before)
            before = after
        counts = [len(each.pixels_MCHW) for each in prepared]
        logits_MK = self._predictor.forward(
            prepared[0].pixels_MCHW if len(prepared) == 1 else np.concatenate([each.pixels_MCHW for each in prepared])
        )
        self._meter.ran(time.monotonic() - before)
        self._meter.batched(sum(counts))
        rows = np.split(logits_MK, np.cumsum(counts)[:-1])
        return [each.answer(own) for each, own in zip(prepared, rows, strict=True)]


def _settle(pieces: Sequence[_Piece], answers: Sequence[Predictions | BaseException]) -> None:
    for piece, answer in zip(pieces, answers, strict=True):
        if piece.answered.done():
            continue  # nobody waits any more
        if isinstance(answer, BaseException):
            piece.answered.set_exception(answer)
        else:
            piece.answered.set_result(answer)


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
