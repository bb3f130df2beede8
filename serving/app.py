"""Starting, following and stopping the students as Ray Serve applications: one per version, and one front before them.

Ray must have been initialised (`cluster.session` does it). The server listens on this machine's loopback address unless
the operator says otherwise, and wants a token of everybody unless told to ask nobody.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import ray
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from pu_ray.errors import ClusterError, ConfigError, PuRayError
from serving import local, registry, replica
from serving.front import Front
from serving.plan import Plan, plan
from serving.registry import Student
from serving.settings import ServingSettings

FRONT = "pu-ray"

_FRONT_CPUS = 0.25  # it waits for the network and for replicas most of the time
_NO_LIMIT = 100_000
_POLL_S = 0.2
# Both make Serve listen on every interface, whatever host was asked for.
_OPEN_TO_ALL = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS")
STUBS = "serving.inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"


_Arguments = TypeVar("_Arguments", bound=BaseModel)

# -- applications ------------------------------------------------------------------------------------------


def front_application(served: Plan, settings: ServingSettings) -> serve.Application:
    """The ingress for these students."""
    inside = settings.placement == "inside"
    as_front = serve.deployment(
        name="front",
        # It refuses by itself, with an error document. Serve's proxy would answer in plain text, or queue requests and
        # swallow their bodies meanwhile.
        max_ongoing_requests=_NO_LIMIT,
        ray_actor_options=replica.actor_options(settings) if inside else {"num_cpus": _FRONT_CPUS},
        # It writes a line per request itself.
        logging_config={"enable_access_log": False},
        **(replica.scaling(settings) if inside else {"num_replicas": settings.fronts}),
    )
    return as_front(serve.ingress()(Front)).bind(served, settings)


def placed(served: Plan, settings: ServingSettings) -> ServingSettings:
    """The settings with a placement that is decided: it stays when a registry changes."""
    if settings.placement != "auto":
        return settings
    named = {student.name for student in served.students if not settings.in_tail(student.name)}
    return settings.model_copy(update={"placement": "inside" if len(named) == 1 else "apart"})


class FrontArguments(BaseModel):
    """Arguments of `front_from_args` in a Serve config file.

    Attributes:
        students: Exported folders, or one registry.
        settings: Sizes, limits and tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    students: list[str]
    settings: ServingSettings


class TailArguments(BaseModel):
    """Arguments of `tail_from_args` in a Serve config file.

    Attributes:
        settings: Sizes and limits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: ServingSettings


class StudentArguments(BaseModel):
    """Arguments of `student_from_args` in a Serve config file.

    Attributes:
        student: Exported folder.
        settings: Sizes and limits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: str
    settings: ServingSettings


def front_from_args(args: dict[str, Any]) -> serve.Application:
    """The front for Ray Serve's declarative way: `serve deploy`, and RayService on Kubernetes.

    Args:
        args: See `FrontArguments`.

    Raises:
        PuRayError: See `plan`.
    """
    arguments = _checked(FrontArguments, args)
    served = plan(arguments.students, arguments.settings.wanted_engine)
    return front_application(served, placed(served, arguments.settings))


def student_from_args(args: dict[str, Any]) -> serve.Application:
    """One version of a student for Ray Serve's declarative way.

    Args:
        args: See `StudentArguments`.

    Raises:
        PuRayError: It cannot be served.
    """
    arguments = _checked(StudentArguments, args)
    return replica.application(
        _tried(registry.load(arguments.student, arguments.settings.wanted_engine).student, arguments.settings),
        arguments.settings,
    )


def tail_from_args(args: dict[str, Any]) -> serve.Application:
    """What the tail shares, for Ray Serve's declarative way.

    Args:
        args: See `TailArguments`.

    Raises:
        ConfigError: They are others.
    """
    return replica.tail_application(_checked(TailArguments, args).settings)


def _checked(kind: type[_Arguments], args: dict[str, Any]) -> _Arguments:
    # Serve would do it by the builder's annotation, but not where annotations are strings, as they are here.
    try:
        return kind.model_validate(args)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(
            str(problem["msg"]), slug="invalid-serve-arguments", where=".".join(("args", *map(str, problem["loc"])))
        ) from error


def _tried(student: Student, settings: ServingSettings) -> Student:
    """The student, once it has answered here, so that a wrong one stops before Serve tries it again and again."""
    local.reopened(student, settings)
    return student


# -- the server --------------------------------------------------------------------------------------------


def deploy(uris: Sequence[str], settings: ServingSettings, *, host: str = "127.0.0.1", port: int = 8000) -> str:
    """Start the server and wait until every student is warm.

    Args:
        uris: See `serving.plan.plan`.
        settings: Sizes, limits and tokens.
        host: Address to listen on, on the cluster's head node.
        port: TCP port.

    Returns:
        The server's URL.

    Raises:
        ConfigError: An impossible port, something that opens the server to strangers, or see `plan`.
        DataError, GateError: See `plan`.
        ClusterError: Serve runs already, the port is taken, or the students did not get ready.
    """
    _check_address(host, port, settings)
    served = plan(uris, settings.wanted_engine)
    settings = placed(served, settings)
    for student in served.students:
        _tried(student, settings)
    # Serve would start a Ray of its own, with settings that nobody chose.
    assert ray.is_initialized(), "cluster.session comes first"
    if serve.status().proxies:
        # Serve would keep its old address without saying so, and it may be open to others.
        raise ClusterError(
            "Ray Serve runs on this cluster already",
            slug="serve-already-runs",
            hint="stop that server first: `serve shutdown`",
        )
    _check_port_is_free(host, port)
    try:
        grpc = None
        if settings.grpc_port is not None:
            grpc = gRPCOptions(port=settings.grpc_port, grpc_servicer_functions=[STUBS])
        serve.start(
            proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port), grpc_options=grpc
        )
        _start(served.students, settings)
        _run({FRONT: front_application(served, settings)}, settings, route="/")
    except BaseException:
        serve.shutdown()  # type: ignore[no-untyped-call]
        raise
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _start(students: Iterable[Student], settings: ServingSettings) -> None:
    named = replica.applications(students, settings)
    _run({name: _application(each, settings) for name, each in named.items()}, settings, None)


def _application(student: Student, settings: ServingSettings) -> serve.Application:
    in_tail = settings.in_tail(student.name)
    return replica.tail_application(settings) if in_tail else replica.application(student, settings)


def _run(applications: dict[str, serve.Application], settings: ServingSettings, route: str | None) -> None:
    if not applications:
        return
    serve.run_many(
        [serve.RunTarget(target=each, name=name, route_prefix=route) for name, each in applications.items()],
        # Serve's own waiting knows no deadline, and a cluster that is too small keeps it waiting for ever.
        wait_for_applications_running=False,
    )
    _wait_until_ready(list(applications), settings.ready_timeout_s)


def run_until_interrupted(
    uris: Sequence[str],
    settings: ServingSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_ready: Callable[[str], None],
    on_change: Callable[[str], None] = lambda _told: None,
) -> None:
    """Serve until Ctrl-C, then stop Serve and pass the KeyboardInterrupt on. A registry is followed meanwhile.

    Args:
        uris: See `deploy`.
        settings: See `deploy`.
        host: See `deploy`.
        port: See `deploy`.
        on_ready: Called once with the server's URL.
        on_change: Told of versions that come and go, and of what stops them.

    Raises:
        KeyboardInterrupt: The way this ends.
        PuRayError: See `deploy`.
    """
    served = plan(uris, settings.wanted_engine)
    settings = placed(served, settings)
    url = deploy(uris, settings, host=host, port=port)
    try:
        on_ready(url)
        while True:
            time.sleep(settings.reload_s)
            if served.registry_uri is not None:
                served = follow(served, settings, on_change)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]


def follow(served: Plan, settings: ServingSettings, on_change: Callable[[str], None]) -> Plan:
    """Start the versions that a registry names by now, and stop those that no request reaches any more.

    The front moves over by itself once the new ones answer (`serving.front`); until it has, the old ones stay. It also
    opens by itself what it answers itself.

    Returns:
        The registry as it is served now.
    """
    try:
        renewed = served.renewed()
        running = {name for name in serve.status().applications if name != FRONT}
        wanted = replica.applications(renewed.students, settings)
        for name, student in wanted.items():
            if name not in running:
                _start([_tried(student, settings)], settings)
                on_change(f"{student.name} {student.version[:12]} is ready")
    except PuRayError as error:
        on_change(f"the registry cannot be followed, what is served stays: {error}")
        return served
    try:
        # Of every front: each moves over when it looks next.
        told = serve.get_app_handle(FRONT).broadcast("applications").results(timeout_s=settings.request_timeout_s)
        if not told:
            raise TimeoutError  # none is running at this moment
        reachable = {name for each in told for name in each}
    except (RayError, RayServeException, DeploymentUnavailableError, TimeoutError) as error:
        # Serve replaces it; what might still be reached stays until it can be asked.
        on_change(f"the front does not answer: {type(error).__name__}")
        return renewed
    for name in sorted(running - set(wanted) - reachable):
        serve.delete(name)
        on_change(f"{name} has stopped")
    return renewed


# -- checks ------------------------------------------------------------------------------------------------


def _check_address(host: str, port: int, settings: ServingSettings) -> None:
    if not 1 <= port <= 65535:
        raise ConfigError("not a TCP port", slug="invalid-port", where="port", allowed="1 to 65535", got=str(port))
    if settings.authentication == "required" or not _is_loopback(host):
        return  # guarded; or open to others, as somebody has asked for
    opened = [variable for variable in _OPEN_TO_ALL if os.environ.get(variable, "0") not in ("", "0")]
    if opened or settings.grpc_port is not None:
        raise ConfigError(
            "this opens the server to other machines, and nobody is asked for a token",
            slug="open-without-tokens",
            where=opened[0] if opened else "grpc_port",
            allowed="unset",
            got=os.environ[opened[0]] if opened else str(settings.grpc_port),
            hint="leave out --no-auth, or name the address with --host if the network itself keeps strangers out",
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
            "the server cannot listen there",
            slug="cannot-listen",
            where=f"{host}:{port}",
            got=str(error),
            hint="choose another --port",
        ) from error


def _wait_until_ready(names: Sequence[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        applications = serve.status().applications
        overviews = [applications.get(name) for name in names]
        known = [overview for overview in overviews if overview is not None]
        if len(known) == len(names) and all(each.status == ApplicationStatus.RUNNING for each in known):
            return
        failed = [overview for overview in known if overview.status == ApplicationStatus.DEPLOY_FAILED]
        if failed:
            raise ClusterError(
                "the students could not be started",
                slug="students-not-started",
                got="; ".join(map(_messages, failed)),
                hint="look at the replicas' logs",
            )
        if time.monotonic() > deadline:
            late = [overview for overview in known if overview.status != ApplicationStatus.RUNNING]
            raise ClusterError(
                f"the students were not ready after {timeout_s:g} s",
                slug="students-not-ready",
                got="; ".join(map(_messages, late)) if known else "no status from Ray Serve",
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
