"""Processes that answer for the front: one version of one student, or the tail. Ray Serve's deployments.

Every replica opens its student from the exported folder itself: weights travel through storage, not through Serve's
controller. The folder must therefore be readable from every node of the cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from serving import registry
from serving.local import LocalStudent, warm
from serving.predictor import Images, Predictions, Predictor
from serving.registry import Student
from serving.settings import ServingSettings

# More attempts only delay the message: what stops a student from loading is in its files.
_CONSTRUCTOR_ATTEMPTS = 2


class StudentReplica:
    """One process that answers for one student: `serving.local`, asked by the front.

    Args:
        student: Whom to open; the folder must still hold exactly this one.
        settings: Batch sizes, threads and limits.

    Raises:
        DataError, GateError: The exported folder cannot be served, or changed since the server was started.
    """

    def __init__(self, student: Student, settings: ServingSettings) -> None:
        self._student = LocalStudent(student, settings)

    async def predict(self, images: Images) -> Predictions:
        """Answer the N images of one request, at least one."""
        return await self._student.predict(images)

    async def ready(self) -> bool:
        """True: a replica that exists has warmed up."""
        return True


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
        return warm(registry.load(uri, self._settings.wanted_engine), self._settings)


def ongoing(settings: ServingSettings) -> int:
    """Requests that a replica takes at once."""
    # One batch in the network and one gathering; with Serve's default of 5 no batch would ever fill.
    return 2 * settings.max_batch_images


DEPLOYMENT = "replica"
TAIL = "student-tail"  # the application that shares its processes


def application_of(student: Student, settings: ServingSettings) -> str | None:
    """The name of the Serve application that answers for a version; None: the front answers itself."""
    if settings.in_tail(student.name):
        return TAIL
    return None if settings.placement == "inside" else f"student-{student.name}-{student.version[:12]}"


def applications(students: Iterable[Student], settings: ServingSettings) -> dict[str, Student]:
    """The applications that answer for these students, each with the first of its students."""
    found: dict[str, Student] = {}
    for student in students:
        name = application_of(student, settings)
        if name is not None:
            found.setdefault(name, student)
    return found


def tail_application(settings: ServingSettings) -> serve.Application:
    """The Serve application whose processes the tail shares."""
    fewest, most = settings.tail_replicas
    as_replicas = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=ongoing(settings),
        max_queued_requests=settings.max_queued_requests,
        ray_actor_options=actor_options(settings),
        autoscaling_config={
            "min_replicas": fewest,
            "initial_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": settings.cpus_per_replica,
            "upscale_delay_s": 1.0,
        },
    )
    return as_replicas(TailReplica).bind(settings)


def actor_options(settings: ServingSettings) -> dict[str, Any]:
    """Resources and environment of a process that runs networks."""
    environment = {
        # Idle OpenMP threads that spin starve whoever shares their cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(settings.cpus_per_replica),
        # Ours never blocks its event loop, and a loop of its own costs every request two changes of thread.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }
    return {
        "num_cpus": settings.cpus_per_replica,
        "num_gpus": settings.gpus_per_replica,
        "runtime_env": {"env_vars": environment},
    }


def scaling(settings: ServingSettings) -> dict[str, Any]:
    """How many such processes there are."""
    if settings.max_replicas <= settings.replicas:
        return {"num_replicas": settings.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.replicas,
            "max_replicas": settings.max_replicas,
            # Half of what a replica takes: the other half is what arrives while another one starts.
            "target_ongoing_requests": max(1, ongoing(settings) // 2),
        }
    }


def application(student: Student, settings: ServingSettings) -> serve.Application:
    """A Serve application of its own for this version, so that versions come and go without disturbing each other."""
    as_replicas = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=ongoing(settings),
        max_queued_requests=settings.max_queued_requests,
        max_constructor_retry_count=_CONSTRUCTOR_ATTEMPTS,
        ray_actor_options=actor_options(settings),
        **scaling(settings),
    )
    return as_replicas(StudentReplica).bind(student, settings)
