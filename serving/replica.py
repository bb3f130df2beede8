"""One process that answers for one version of one student, with dynamic batching. Ray Serve's deployments.

Every replica opens its student from the exported folder itself: weights travel through storage, not through Serve's
controller. The folder must therefore be readable from every node of the cluster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve

from pu_ray.errors import DataError
from pu_ray.images import Limits
from serving import registry
from serving.metrics import ReplicaMeter
from serving.predictor import Floats, Images, Predictions, Predictor, join
from serving.registry import LoadedStudent, Student
from serving.settings import ServingSettings

# More attempts only delay the message: what stops a student from loading is in its files.
_CONSTRUCTOR_ATTEMPTS = 2


# Normalised images [M, C, H, W] of one request, and when they were ready (monotonic seconds).
Piece = tuple[Floats, float]


def _images_in(pieces: list[Piece]) -> int:
    return sum(len(pixels) for pixels, _ in pieces)


class StudentReplica:
    """One process that answers for one student.

    Each request is decoded on its own, in threads; what came out of it joins other requests for the forward pass. So a
    bad image never reaches its neighbours, and memory holds at most one batch of pixels per request.

    Args:
        student: Whom to open; the folder must still hold exactly this one.
        settings: Batch sizes, threads and limits.

    Raises:
        DataError, GateError: The exported folder cannot be served, or changed since the server was started.
    """

    def __init__(self, student: Student, settings: ServingSettings) -> None:
        loaded = registry.load(student.uri, settings.engine)
        if loaded.student != student:
            raise DataError(
                "the exported student changed since the server was started",
                where=student.uri,
                allowed=f"version {student.version}",
                got=f"version {loaded.student.version}",
                hint="start the server again",
            )
        self._predictor = predictor_of(loaded, settings)
        self._predictor.warm_up()
        self._batch_images = settings.max_batch_images
        self._decoding = ThreadPoolExecutor(settings.cpus_per_replica, "decode")
        self._running = ThreadPoolExecutor(1, "forward")
        self._meter = ReplicaMeter(student)
        self._forward.set_max_batch_size(settings.max_batch_images)  # type: ignore[attr-defined]
        self._forward.set_batch_wait_timeout_s(settings.batch_wait_s)  # type: ignore[attr-defined]

    async def predict(self, images: Images) -> Predictions:
        """Answer the N images of one request, at least one."""
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
        """True: a replica that exists has warmed up."""
        return True

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


class TailReplica:
    """One process for many students, each opened when it is first asked for; the least recently asked one goes first.

    Requests are few here, so each has a forward pass of its own.

    Args:
        settings: Threads, limits, and how many students stay open.
    """

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._running = ThreadPoolExecutor(settings.cpus_per_replica, "predict")

        # Serve takes functions and methods of classes here, and no bound method.
        @serve.multiplexed(max_num_models_per_replica=settings.tail_open)  # type: ignore[untyped-decorator]
        async def opened(uri: str) -> Predictor:
            return await asyncio.get_running_loop().run_in_executor(self._running, self._open, uri)

        self._opened: Callable[[str], Awaitable[Predictor]] = opened

    async def predict(self, images: Images) -> Predictions:
        """Answer the N images of one request to the student that the handle names."""
        predictor = await self._opened(serve.get_multiplexed_model_id())
        return await asyncio.get_running_loop().run_in_executor(self._running, predictor.predict, images)

    def _open(self, uri: str) -> Predictor:
        predictor = predictor_of(registry.load(uri, self._settings.engine), self._settings)
        predictor.warm_up()
        return predictor


def _forward_together(predictor: Predictor, pieces: Sequence[Floats]) -> list[Floats]:
    logits_MK = predictor.forward(np.concatenate(pieces))
    return np.split(logits_MK, np.cumsum([len(piece) for piece in pieces])[:-1])


def predictor_of(loaded: LoadedStudent, settings: ServingSettings) -> Predictor:
    """The student with this server's limits and threads.

    Raises:
        DataError: The network cannot be loaded.
    """
    limits = Limits(max_bytes=settings.max_body_bytes, max_px=settings.max_image_px)
    return Predictor(loaded, limits, settings.cpus_per_replica)


def ongoing(settings: ServingSettings) -> int:
    """Requests that a replica takes at once."""
    # One batch in the network and one gathering; with Serve's default of 5 no batch would ever fill.
    return 2 * settings.max_batch_images


DEPLOYMENT = "replica"
TAIL = "student-tail"  # the application that shares its processes


def application_of(student: Student, settings: ServingSettings) -> str:
    """The name of the Serve application that answers for a version."""
    return TAIL if settings.in_tail(student.name) else f"student-{student.name}-{student.version[:12]}"


def tail_application(settings: ServingSettings) -> serve.Application:
    """The Serve application whose processes the tail shares."""
    fewest, most = settings.tail_replicas
    as_replicas = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=ongoing(settings),
        max_queued_requests=settings.max_queued_requests,
        ray_actor_options=_actor_options(settings),
        autoscaling_config={
            "min_replicas": fewest,
            "initial_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": settings.cpus_per_replica,
            "upscale_delay_s": 1.0,
        },
    )
    return as_replicas(TailReplica).bind(settings)


def _actor_options(settings: ServingSettings) -> dict[str, Any]:
    environment = {
        # Idle OpenMP threads that spin starve whoever shares their cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(settings.cpus_per_replica),
    }
    return {"num_cpus": settings.cpus_per_replica, "runtime_env": {"env_vars": environment}}


def application(student: Student, settings: ServingSettings) -> serve.Application:
    """A Serve application of its own for this version, so that versions come and go without disturbing each other."""
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas > settings.replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                # Half of what a replica takes: the other half is what arrives while another one starts.
                "target_ongoing_requests": max(1, ongoing(settings) // 2),
            }
        }
    as_replicas = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=ongoing(settings),
        max_queued_requests=settings.max_queued_requests,
        max_constructor_retry_count=_CONSTRUCTOR_ATTEMPTS,
        ray_actor_options=_actor_options(settings),
        **scaling,
    )
    return as_replicas(StudentReplica).bind(student, settings)
