"""Connection to Ray: the only place in the project that calls `ray.init`.

Without an address a private Ray is started on this machine and stopped at the end. With one ("auto",
"host:port", "ray://host:10001"), or with `RAY_ADDRESS` in the environment as inside a submitted job, the session
connects and at the end only disconnects. A Ray that already runs in this process is used and left alone.

Not covered: whether the cluster is big enough (preflight.py), and code for the workers of a remote cluster: that
comes with the image or with the submitted job (submit.py).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import ray

import pu_ray
from pu_ray.errors import ClusterError

ADDRESS_VARIABLE: Final = "RAY_ADDRESS"
AUTH_MODE_VARIABLE: Final = "RAY_AUTH_MODE"
TOKEN_VARIABLE: Final = "RAY_AUTH_TOKEN"
TOKEN_PATH_VARIABLE: Final = "RAY_AUTH_TOKEN_PATH"

# Fewer logical CPUs let the actors of a pipeline take every slot and starve its reads: a silent hang (ray#44687).
LEAST_LOGICAL_CPUS: Final = 6

# Idle OpenMP threads that spin on a busy machine made a 7 ms forward pass take 872 ms.
WORKER_ENVIRONMENT: Final[Mapping[str, str]] = {"OMP_WAIT_POLICY": "PASSIVE"}

_MIB = 2**20
_MOST_OBJECT_STORE_BYTES = 2048 * _MIB
_LEAST_OBJECT_STORE_BYTES = 80 * _MIB  # Ray refuses less than 75 MiB

_CONNECT_TIMEOUT_S = 10.0

# Ray's C++ core prints to the driver's stderr past every Python logger, for example that an actor pool's class is in
# the object store, which is how Ray Data always does it. A private Ray's daemons inherit the level, so their log files
# are thin too, except in a verbose session.
_BACKEND_LEVEL_VARIABLE = "RAY_BACKEND_LOG_LEVEL"

# A private Ray would start one worker per logical CPU, of which there are more than cores and than most passes use:
# each costs over a second and 100 MB.
_PRESTART_VARIABLE = "RAY_prestart_worker_first_driver"

# Ray sets this for the driver of a submitted job.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# ray.data and ray.serve install handlers of their own, so the level of the logger "ray" does not reach them.
_LOGGERS = ("ray", "ray.data", "ray.train", "ray.serve")


@dataclass(frozen=True)
class SessionInfo:
    """What the session is connected to.

    Attributes:
        kind: `started` a private Ray, `connected` to a cluster, or `found` one already running in this process.
        address: The GCS address, or the address that was asked for; holds no secret.
        cpus: Logical CPUs of the nodes that are up now.
        gpus: Logical GPUs of the nodes that are up now.
    """

    kind: Literal["started", "connected", "found"]
    address: str
    cpus: float
    gpus: float


@contextlib.contextmanager
def ray_session(
    *,
    address: str | None,
    verbose: bool,
    needed_cpus: float,
    worker_hook: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[SessionInfo]:
    """A running Ray for the length of a `with` block.

    Args:
        address: Where to connect; None: `RAY_ADDRESS` if set, else a private Ray on this machine.
        verbose: Let Ray's own logs and its workers' output through to stderr; otherwise errors only.
        needed_cpus: Logical CPUs the pipeline occupies at once; a private Ray offers at least these.
        worker_hook: Import path of a function that every worker of a private Ray calls first.
        variables: More of a private Ray's environment, where it does not have them.

    Raises:
        ClusterError: Ray cannot be started, reached, or refuses the token.
    """
    address = address or os.environ.get(ADDRESS_VARIABLE) or None
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(errors_only())
        if ray.is_initialized():
            yield _info("found", None)
            return
        options: dict[str, Any] = {
            "log_to_driver": verbose,
            "logging_level": logging.INFO if verbose else logging.ERROR,
        }
        if not verbose and _BACKEND_LEVEL_VARIABLE not in os.environ:
            stack.enter_context(_variables({_BACKEND_LEVEL_VARIABLE: "fatal"}))
        if address is None:
            # These stay for the life of the process, because Ray reads mode and token once per process.
            os.environ.update(private_token(os.environ))
            more = {name: value for name, value in (variables or {}).items() if name not in os.environ}
            stack.enter_context(_variables(more | local_environment(os.environ)))
            options |= local_options(needed_cpus)
            if worker_hook is not None:
                options["runtime_env"] = {"worker_process_setup_hook": worker_hook}
        else:
            _require_listener(address)
            options |= {"address": address}
            if _JOB_VARIABLE not in os.environ:
                # A submitted job brings these itself, and Ray refuses a variable that is set twice.
                options["runtime_env"] = {"env_vars": dict(WORKER_ENVIRONMENT)}
        stack.callback(ray.shutdown)
        try:
            with contextlib.nullcontext() if verbose else _no_stderr():
                ray.init(**options)
        except Exception as error:
            # Ray raises ConnectionError, RuntimeError, ValueError, AuthenticationError, gRPC errors and more here.
            raise _explain(address, error) from error
        yield _info("started" if address is None else "connected", address)


def logical_cpus(needed_cpus: float) -> int:
    """Logical CPUs a private Ray offers: a scheduling quota, deliberately above the cores of a small machine."""
    return max(os.cpu_count() or 1, math.ceil(needed_cpus), LEAST_LOGICAL_CPUS)


def object_store_bytes(free_memory_bytes: int, free_shared_bytes: int) -> int:
    """A modest object store: a quarter of the free memory, 2 GiB at most, and within shared memory.

    Args:
        free_memory_bytes: Memory this machine could give.
        free_shared_bytes: Free space of /dev/shm. A container's default of 64 MiB is too small for any store; Ray
            then maps a file instead, so it sets no bound.
    """
    size = min(_MOST_OBJECT_STORE_BYTES, free_memory_bytes // 4)
    if free_shared_bytes > 2 * _LEAST_OBJECT_STORE_BYTES:
        size = min(size, free_shared_bytes * 8 // 10)
    return max(size, _LEAST_OBJECT_STORE_BYTES)


def private_token(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that protect a private Ray; none where the user decided already.

    Ray's daemons listen on every interface of the machine, also when told to use the loopback address, and whoever
    reaches them unauthenticated can run code. So a private Ray gets a token that lives in memory only. Without it Ray
    would write one to the user's home, and every later `ray start` there would demand it.
    """
    if environment.get(AUTH_MODE_VARIABLE, "token").lower() != "token":
        return {}
    if TOKEN_VARIABLE in environment or TOKEN_PATH_VARIABLE in environment:
        return {}
    # The mode is left to Ray, whose default for a new local Ray it is: a mode set after `import ray` is not seen.
    return {TOKEN_VARIABLE: secrets.token_hex(32)}


def local_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables a private Ray and its workers run with, beyond or instead of the given ones."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", _PRESTART_VARIABLE: "0", **WORKER_ENVIRONMENT}
    changes = {key: value for key, value in wanted.items() if key not in environment}
    root = Path(pu_ray.__file__).parents[1]
    if root.name not in ("site-packages", "dist-packages"):
        # A working copy: the workers must import the same one, wherever the driver was started.
        changes["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    return changes


def local_options(needed_cpus: float) -> dict[str, Any]:
    """Arguments of `ray.init` for a private Ray, sized to this machine."""
    shared = Path("/dev/shm")
    return {
        # "local" never joins a Ray that somebody else runs on this machine.
        "address": "local",
        "num_cpus": logical_cpus(needed_cpus),
        "include_dashboard": False,
        "object_store_memory": object_store_bytes(
            _free_memory_bytes(), shutil.disk_usage(shared).free if shared.is_dir() else 0
        ),
    }


def _free_memory_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _require_listener(address: str) -> None:
    """Fail within seconds where nothing listens; Ray itself retries for many minutes.

    Raises:
        ClusterError: The address is of no known form, or nothing answers there.
    """
    if address == "auto":
        return
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    try:
        target = (parts.hostname, parts.port)
    except ValueError as error:
        raise _explain(address, error) from error
    if parts.scheme not in ("gcs", "ray") or None in target:
        raise _explain(address, ValueError("not an address a driver can connect to"))
    try:
        socket.create_connection(target, timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _explain(address, error) from error


def _info(kind: Literal["started", "connected", "found"], address: str | None) -> SessionInfo:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return SessionInfo(
        kind=kind,
        address=address or ray.get_runtime_context().gcs_address,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
    )


@contextlib.contextmanager
def _variables(changes: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """File descriptor 2 goes nowhere: Ray's C++ core announces there which log level it was told to keep."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Only errors reach the console; Ray's log files keep everything."""
    importlib.import_module("ray.data")  # installs its handlers, which must exist before they can be quietened

    consoles = [
        handler
        for name in _LOGGERS
        for handler in logging.getLogger(name).handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    before = [handler.level for handler in consoles]
    for handler in consoles:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler, level in zip(consoles, before, strict=True):
            handler.setLevel(level)


def _explain(address: str | None, error: Exception) -> ClusterError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if address is None:
        return ClusterError(
            "Ray could not be started on this machine",
            slug="ray-not-started",
            got=reason,
            hint="check free memory, free space in /tmp and /dev/shm, and the logs in Ray's session folder; "
            "--verbose shows Ray's own messages",
        )
    if "authentic" in reason.lower() or "token" in reason.lower():
        hint = f"set {AUTH_MODE_VARIABLE}=token and {TOKEN_PATH_VARIABLE} to the file that holds the cluster's token"
    elif address.startswith(("http://", "https://")):
        hint = "an http address takes jobs: use `pu-ray submit JOB.yaml --address URL`"
    else:
        hint = "check that the cluster is up (`ray status` on its head) and that this machine can reach the port"
    return ClusterError(
        "no connection to the Ray cluster",
        slug="not-connected",
        where=address,
        allowed='"auto", host:port of the head (6379), or ray://host:10001',
        got=reason,
        hint=hint,
    )
