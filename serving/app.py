"""The students as one Ray Serve application: a gateway, and a deployment per student with dynamic batching.

Ray must have been initialised (`cluster.session` does it). Nothing authenticates clients yet, so the server listens
on this machine's loopback address unless the operator says otherwise.

Every replica opens its student from the exported folder itself: weights travel through storage, not through Serve's
controller. The folder must therefore be readable from every node of the cluster.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview
from starlette.applications import Starlette

from pu_ray.errors import ClusterError, ConfigError, DataError
from pu_ray.images import Limits
from serving import gateway, registry
from serving.predictor import Floats, Images, Predictions, Predictor, join
from serving.registry import LoadedStudent, Student
from serving.settings import ServingSettings

APPLICATION = "pu-ray"

_GATEWAY_CPUS = 0.25  # it waits for the network and for replicas most of the time
_NO_LIMIT = 100_000
_PROBE_TIMEOUT_S = 2.0
_POLL_S = 0.2
# More attempts only delay the message: what stops a student from loading is in its files.
_CONSTRUCTOR_ATTEMPTS = 2
# Both make Serve listen on every interface, whatever host was asked for.
_OPEN_TO_ALL = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS")


def _images_in(pieces: list[Floats]) -> int:
    return sum(map(len, pieces))


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
        loaded = registry.load(student.uri)
        if loaded.student != student:
            raise DataError(
                "the exported student changed since the server was started",
                where=student.uri,
                allowed=f"version {student.version}",
                got=f"version {loaded.student.version}",
                hint="start the server again",
            )
        self._predictor = _predictor(loaded, settings)
        self._predictor.warm_up()
        self._batch_images = settings.max_batch_images
        self._decoding = ThreadPoolExecutor(settings.cpus_per_replica, "decode")
        self._running = ThreadPoolExecutor(1, "forward")
        self._forward.set_max_batch_size(settings.max_batch_images)  # type: ignore[attr-defined]
        self._forward.set_batch_wait_timeout_s(settings.batch_wait_s)  # type: ignore[attr-defined]

    async def predict(self, images: Images) -> Predictions:
        """Answer the N images of one request, at least one."""
        loop = asyncio.get_running_loop()
        parts = []
        for start in range(0, len(images), self._batch_images):
            piece = images[start : start + self._batch_images]
            prepared = await loop.run_in_executor(self._decoding, self._predictor.prepare, piece)
            parts.append(prepared.answer(await self._forward(prepared.pixels_MCHW)))
        return join(parts)

    async def ready(self) -> bool:
        """True: a replica that exists has warmed up."""
        return True

    @serve.batch(batch_size_fn=_images_in)
    async def _forward(self, pieces: list[Floats]) -> list[Floats]:
        """Logits [M, K] of each piece [M, C, H, W], from one forward pass over all of them."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._running, _forward_together, self._predictor, pieces)


def _forward_together(predictor: Predictor, pieces: Sequence[Floats]) -> list[Floats]:
    logits_MK = predictor.forward(np.concatenate(pieces))
    return np.split(logits_MK, np.cumsum([len(piece) for piece in pieces])[:-1])


class Gateway:
    """The process that speaks HTTP: `serving.gateway` before the students' replicas.

    Args:
        students: Whom to announce.
        settings: Limits.
        handles: The students' deployments, by name.
        max_requests: Requests with a body that may be inside at once.
    """

    def __init__(
        self,
        students: Sequence[Student],
        settings: ServingSettings,
        handles: Mapping[str, DeploymentHandle[Any]],
        max_requests: int,
    ) -> None:
        self._students = students
        self._settings = settings
        self._max_requests = max_requests
        self._backends = {name: _ServeBackend(handle) for name, handle in handles.items()}

    def __serve_build_asgi_app__(self) -> Starlette:
        """Ray Serve asks for the ASGI application here."""
        return gateway.application(self._students, self._backends, self._settings, self._max_requests)


class _ServeBackend:
    """`gateway.Backend` over a deployment handle; Ray's exceptions end here."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def predict(self, images: Images) -> Predictions:
        try:
            answer: Predictions = await _cancellable(self._handle.predict.remote(images))
        except BackPressureError as error:
            raise gateway.Unavailable("too many requests are waiting for this student") from error
        except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
            raise gateway.Unavailable("the student's process is gone; another one is being started") from error
        return answer

    async def ready(self) -> bool:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                return bool(await _cancellable(self._handle.ready.remote()))
        except BackPressureError:
            return True  # busy, not absent
        except (TimeoutError, RayActorError, DeploymentUnavailableError, ReplicaUnavailableError):
            return False


async def _cancellable(response: object) -> Any:
    assert isinstance(response, DeploymentResponse)
    try:
        return await response
    except asyncio.CancelledError:
        # Serve does not do it for a caller that merely stopped waiting, and the replica would work for nobody.
        response.cancel()  # type: ignore[no-untyped-call]
        raise


def build(exported_uris: Sequence[str], settings: ServingSettings) -> serve.Application:
    """Describe the application; every student is opened and tried once, so that a wrong one stops here.

    Args:
        exported_uris: Folders that the export stage published, readable from every node.
        settings: Sizes and limits.

    Raises:
        ConfigError: No student, or two of one name.
        DataError, GateError: A student cannot be served.
    """
    students = []
    for loaded in registry.load_all(exported_uris):
        _predictor(loaded, settings).warm_up()
        students.append(loaded.student)
    handles = {student.name: _student_deployment(student, settings) for student in students}
    waiting = len(students) * (settings.replicas * _ongoing(settings) + settings.max_queued_requests)
    as_gateway = serve.deployment(
        name="gateway",
        # The gateway refuses by itself, with an error document. Serve's proxy would answer in plain text, or queue
        # requests and swallow their bodies meanwhile.
        max_ongoing_requests=_NO_LIMIT,
        ray_actor_options={"num_cpus": _GATEWAY_CPUS},
    )
    # All that the students' queues may hold, and as much again for requests whose bodies are still arriving.
    return as_gateway(serve.ingress()(Gateway)).bind(students, settings, handles, 2 * waiting)


class ApplicationArguments(BaseModel):
    """Arguments of `app_from_args` in a Serve config file.

    Attributes:
        students: See `build`.
        settings: See `build`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    students: list[str]
    settings: ServingSettings = ServingSettings()


def app_from_args(arguments: ApplicationArguments) -> serve.Application:
    """The application for Ray Serve's declarative way: `serve deploy`, and RayService on Kubernetes.

    Raises:
        PuRayError: See `build`.
    """
    return build(arguments.students, arguments.settings)


def deploy(
    exported_uris: Sequence[str],
    settings: ServingSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_remote: bool = False,
) -> str:
    """Start the server and wait until every student is warm.

    Args:
        exported_uris: See `build`.
        settings: See `build`.
        host: Address to listen on, on the cluster's head node.
        port: TCP port.
        allow_remote: Whether `host` may be more than this machine's loopback, although nobody is authenticated.

    Returns:
        The server's URL.

    Raises:
        ConfigError: A host that is open to others without `allow_remote`, an impossible port, or see `build`.
        DataError, GateError: See `build`.
        ClusterError: Serve runs already, the port is taken, or the students did not get ready.
    """
    _check_address(host, port, allow_remote)
    application = build(exported_uris, settings)
    # Serve would start a Ray of its own, with settings that nobody chose.
    assert ray.is_initialized(), "cluster.session comes first"
    if serve.status().proxies:
        # Serve would keep its old address without saying so, and it may be open to others.
        raise ClusterError("Ray Serve runs on this cluster already", hint="stop that server first: `serve shutdown`")
    _check_port_is_free(host, port)
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port))
        serve.run_many(
            [serve.RunTarget(target=application, name=APPLICATION, route_prefix="/")],
            # Serve's own waiting knows no deadline, and a cluster that is too small keeps it waiting for ever.
            wait_for_applications_running=False,
        )
        _wait_until_ready(settings.ready_timeout_s)
    except BaseException:
        serve.shutdown()  # type: ignore[no-untyped-call]
        raise
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_until_interrupted(
    exported_uris: Sequence[str],
    settings: ServingSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_remote: bool = False,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C, then stop Serve and pass the KeyboardInterrupt on.

    Args:
        exported_uris: See `build`.
        settings: See `build`.
        host: See `deploy`.
        port: See `deploy`.
        allow_remote: See `deploy`.
        on_ready: Called once with the server's URL.

    Raises:
        KeyboardInterrupt: The way this ends.
        PuRayError: See `deploy`.
    """
    url = deploy(exported_uris, settings, host=host, port=port, allow_remote=allow_remote)
    try:
        on_ready(url)
        threading.Event().wait()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


def _predictor(loaded: LoadedStudent, settings: ServingSettings) -> Predictor:
    limits = Limits(max_bytes=settings.max_body_bytes, max_px=settings.max_image_px)
    return Predictor(loaded, limits, settings.cpus_per_replica)


def _ongoing(settings: ServingSettings) -> int:
    # One batch in the network and one gathering; with Serve's default of 5 no batch would ever fill.
    return 2 * settings.max_batch_images


def _student_deployment(student: Student, settings: ServingSettings) -> serve.Application:
    environment = {
        # Idle OpenMP threads that spin starve whoever shares their cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(settings.cpus_per_replica),
    }
    as_replicas = serve.deployment(
        name=f"student-{student.name}",
        num_replicas=settings.replicas,
        max_ongoing_requests=_ongoing(settings),
        max_queued_requests=settings.max_queued_requests,
        max_constructor_retry_count=_CONSTRUCTOR_ATTEMPTS,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "runtime_env": {"env_vars": environment}},
    )
    return as_replicas(StudentReplica).bind(student, settings)


def _check_address(host: str, port: int, allow_remote: bool) -> None:
    if not 1 <= port <= 65535:
        raise ConfigError("not a TCP port", where="port", allowed="1 to 65535", got=str(port))
    if allow_remote:
        return
    hint = "pass --no-auth if the network itself keeps strangers out: the server knows no passwords yet"
    if not _is_loopback(host):
        raise ConfigError(
            "the server would be open to other machines", where="host", allowed="127.0.0.1 or ::1", got=host, hint=hint
        )
    for variable in _OPEN_TO_ALL:
        if os.environ.get(variable, "0") not in ("", "0"):
            raise ConfigError(
                "this setting of Ray Serve opens the server to other machines",
                where=variable,
                allowed="unset",
                got=os.environ[variable],
                hint=hint,
            )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port_is_free(host: str, port: int) -> None:
    # Serve's proxy would try for a minute and then report a timeout. Where the head node is another machine, this
    # says little and the minute remains.
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ClusterError(
            "the server cannot listen there", where=f"{host}:{port}", got=str(error), hint="choose another --port"
        ) from error


def _wait_until_ready(timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        overview = serve.status().applications.get(APPLICATION)
        if overview is not None and overview.status == ApplicationStatus.RUNNING:
            return
        if overview is not None and overview.status == ApplicationStatus.DEPLOY_FAILED:
            raise ClusterError(
                "the students could not be started", got=_messages(overview), hint="look at the replicas' logs"
            )
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the students were not ready after {timeout_s:g} s",
                got=_messages(overview) if overview is not None else "no status from Ray Serve",
                hint="give the cluster more CPUs, ask for fewer replicas, or look at the replicas' logs",
            )
        time.sleep(_POLL_S)


def _messages(overview: ApplicationStatusOverview) -> str:
    """What Serve knows about a start that goes wrong, in one line."""
    told = [overview.message]
    for name, deployment in overview.deployments.items():
        # Serve declares enums here and hands out their values.
        replicas = ", ".join(f"{count} {_word(state)}" for state, count in deployment.replica_states.items())
        told.append(
            f"{name}: {_word(deployment.status)} ({replicas or 'no replica'}) {_essence(deployment.message)}".strip()
        )
    return "; ".join(filter(None, told))


def _essence(message: str) -> str:
    # Serve quotes the whole traceback of a replica that could not start; an error of ours says it all by itself.
    return message.rpartition("pu_ray.errors.")[2].strip()


def _word(state: str) -> str:
    return str(getattr(state, "value", state)).lower()
