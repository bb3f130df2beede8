"""The processes that speak HTTP and gRPC, before students in the same process or in processes of their own.

`serving.gateway` and `serving.rpc` take the requests; `serving.local` or `serving.replica` answers them.

It follows the registry it serves: a route counts as soon as every version that it names answers, and until then the old
one does. No request waits for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from starlette.types import ASGIApp

from pu_ray.errors import PuRayError
from pu_ray.storage import Storage
from serving import gateway, replica, rpc
from serving.auth import Guard
from serving.desk import Backend, Desk, Offer, Served, Unavailable
from serving.local import LocalStudent
from serving.metrics import FrontMeter
from serving.plan import Plan
from serving.predictor import Images, Predictions
from serving.registry import Student
from serving.settings import ServingSettings

_log = logging.getLogger("ray.serve.pu_ray")

_PROBE_TIMEOUT_S = 2.0


class ServeBackend:
    """`desk.Backend` over a deployment handle; Ray's exceptions end here."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def predict(self, images: Images) -> Predictions:
        """Answer N images.

        Raises:
            Unavailable: Not now.
        """
        try:
            answer: Predictions = await _cancellable(self._handle.predict.remote(images))
        except BackPressureError as error:
            raise Unavailable("too many requests are waiting for this student") from error
        except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
            raise Unavailable("the student's process is gone; another one is being started") from error
        return answer

    async def ready(self) -> bool:
        """Whether a request would be answered."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                return bool(await _cancellable(self._handle.ready.remote()))
        except BackPressureError:
            return True  # busy, not absent
        except (TimeoutError, RayActorError, DeploymentUnavailableError, ReplicaUnavailableError):
            return False


class TailBackend(ServeBackend):
    """A student that shares its processes: it is ready although none may run, because asking starts one."""

    async def ready(self) -> bool:
        """True."""
        return True


async def _cancellable(response: object) -> Any:
    assert isinstance(response, DeploymentResponse)
    try:
        return await response
    except asyncio.CancelledError:
        # Serve does not do it for a caller that merely stopped waiting, and the replica would work for nobody.
        response.cancel()  # type: ignore[no-untyped-call]
        raise


class Front:
    """The ingress.

    Args:
        plan: Who is served at first; every version's application is running. A registry is read again.
        settings: Limits and tokens.
    """

    def __init__(self, plan: Plan, settings: ServingSettings) -> None:
        self._plan = plan = _by_now(plan)
        self._settings = settings
        read = None if settings.tokens_uri is None else _reader(settings.tokens_uri)
        where = settings.tokens_uri or "tokens"
        guard = None if settings.authentication == "off" else Guard(settings.token_digests, read, where)
        self._desk = Desk(_offers(plan, settings), settings, _most_requests(plan, settings), FrontMeter())
        self._rpc = rpc.Servicer(self._desk, guard)
        self._guard = guard
        self._following = asyncio.get_running_loop().create_task(self._follow()) if plan.registry_uri else None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray Serve asks for the ASGI application here."""
        return gateway.application(self._desk, self._guard)

    # -- gRPC: Serve's proxy calls these by name -----------------------------------------------------------

    async def ServerLive(self, request: Any, grpc_context: Any = None) -> Any:
        """Whether the server lives."""
        return await self._rpc.call("ServerLive", request, grpc_context)

    async def ServerReady(self, request: Any, grpc_context: Any = None) -> Any:
        """Whether every student answers."""
        return await self._rpc.call("ServerReady", request, grpc_context)

    async def ModelReady(self, request: Any, grpc_context: Any = None) -> Any:
        """Whether a student answers."""
        return await self._rpc.call("ModelReady", request, grpc_context)

    async def ServerMetadata(self, request: Any, grpc_context: Any = None) -> Any:
        """Name, version and extensions."""
        return await self._rpc.call("ServerMetadata", request, grpc_context)

    async def ModelMetadata(self, request: Any, grpc_context: Any = None) -> Any:
        """A student's tensors."""
        return await self._rpc.call("ModelMetadata", request, grpc_context)

    async def ModelInfer(self, request: Any, grpc_context: Any = None) -> Any:
        """A student's answer."""
        return await self._rpc.call("ModelInfer", request, grpc_context)

    async def RepositoryIndex(self, request: Any, grpc_context: Any = None) -> Any:
        """All versions of all students."""
        return await self._rpc.call("RepositoryIndex", request, grpc_context)

    # -- following the registry ----------------------------------------------------------------------------

    async def applications(self) -> list[str]:
        """Names of the applications that may get a request now."""
        every = (offer for offer in self._desk.offers.values())
        students = (served.student for offer in every for served in offer.versions.values())
        return sorted(replica.applications(students, self._settings))

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.reload_s)
            try:
                await self._refresh()
            except PuRayError as error:
                _log.warning("the registry cannot be followed, what is served stays: %s", error)
            except Exception:
                _log.exception("the registry cannot be followed, what is served stays")

    async def _refresh(self) -> None:
        plan = await asyncio.to_thread(self._plan.renewed)
        if plan == self._plan:
            return
        # In a thread: it may open students.
        offers = await asyncio.to_thread(_offers, plan, self._settings, self._desk.offers)
        for name, offer in offers.items():
            before = self._desk.offers.get(name)
            new = [
                served for version, served in offer.versions.items() if before is None or version not in before.versions
            ]
            if not all(await asyncio.gather(*(served.backend.ready() for served in new))):
                return  # next time
        self._plan = plan
        self._desk.replace(offers, _most_requests(plan, self._settings))
        _log.info("routes changed: %s", "; ".join(f"{name} {offer.route!r}" for name, offer in offers.items()))


def _by_now(plan: Plan) -> Plan:
    """What is to be served: whoever takes a dead front's place was told what there was when the server started."""
    if plan.registry_uri is None:
        return plan
    try:
        return plan.renewed()
    except PuRayError as error:
        _log.warning("the registry cannot be read, what was served at first is served: %s", error)
        return plan


def _offers(plan: Plan, settings: ServingSettings, known: Mapping[str, Offer] | None = None) -> dict[str, Offer]:
    offers = {}
    for name, route in plan.routes.items():
        before = {} if known is None or name not in known else dict(known[name].versions)
        offers[name] = Offer(
            route,
            {
                student.version: before.get(student.version) or Served(student, _backend(student, settings))
                for student in plan.students
                if student.name == name
            },
        )
    return offers


def _backend(student: Student, settings: ServingSettings) -> Backend:
    application = replica.application_of(student, settings)
    if application is None:
        return LocalStudent(student, settings)
    handle = serve.get_deployment_handle(replica.DEPLOYMENT, application, _check_exists=False)
    if application == replica.TAIL:
        return TailBackend(handle.options(multiplexed_model_id=student.uri))
    return ServeBackend(handle)


def _most_requests(plan: Plan, settings: ServingSettings) -> int:
    """All that the students' queues may hold, and as much again for requests whose bodies are still arriving."""
    if settings.placement == "inside":
        return replica.ongoing(settings) + settings.max_queued_requests  # this process is the queue
    of_each = max(settings.replicas, settings.max_replicas) * replica.ongoing(settings) + settings.max_queued_requests
    return 2 * len(plan.students) * of_each


def _reader(uri: str) -> Any:
    folder, name = Storage(uri).split()
    return lambda: folder.read_bytes(name)
