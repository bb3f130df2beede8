"""A job on a remote cluster, through Ray's Jobs API.

The submission id follows from the job's settings, so that submitting twice does not run twice: while such a job runs
nothing is submitted, and one that ended is replaced by a new one, which goes on from what its run's folder holds.

What travels is one folder: the resolved job file (overrides included) and, if this is a working copy, its packages.
An installed release is expected in the cluster's image. Secrets never travel: the cluster's own environment holds its
storage credentials. The token for the Jobs API comes from `RAY_AUTH_TOKEN` or `RAY_AUTH_TOKEN_PATH` (with
`RAY_AUTH_MODE=token`), which only Ray's client reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tenacity
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import pu_ray
from cluster import session
from pu_ray.config import JobConfig, digest
from pu_ray.errors import ClusterError, ConfigError
from pu_ray.storage import Storage

JOB_FILE = "job.yaml"
ENTRYPOINT = f"python -m pu_ray run {JOB_FILE} --json"

_PACKAGES = ("pu_ray", "serving", "cluster")
_DIGEST_CHARACTERS = 12
_POLL_S = 2.0
_PATIENCE_S = 60.0  # a head under load, a port-forward that is opened anew


@dataclass(frozen=True)
class SubmissionResult:
    """A job on the cluster.

    Attributes:
        submission_id: Its name there.
        action: `submitted`, `resubmitted` after an earlier one ended, `already_running`, or `none` where only asked.
        status: Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: Ray's remark on the status, its first line; the rest of it is in the logs.
        exit_status: The job's own exit status where it ended, 4 where it never started or was stopped, else 0.
    """

    submission_id: str
    action: Literal["submitted", "resubmitted", "already_running", "none"]
    status: str
    message: str
    exit_status: int


def submission_id(config: JobConfig) -> str:
    """The id under which this job, with exactly these settings, is submitted."""
    settings = config.model_dump(mode="json", by_alias=True)
    return f"pu-ray-{config.name}-{digest(settings)[:_DIGEST_CHARACTERS]}"


def submit(
    config: JobConfig, address: str | None, *, wait: bool, say: Callable[[str], None] | None = None
) -> SubmissionResult:
    """Start the job on a cluster, unless it is running there.

    Args:
        config: The job, overrides applied.
        address: The dashboard's URL (port 8265); None: `RAY_API_SERVER_ADDRESS`, else this machine.
        wait: Return when the job has ended, not when it was accepted. Interrupting the wait leaves the job running.
        say: Gets what the job narrates meanwhile, line by line.

    Raises:
        ConfigError: A path that only means something on this machine.
        ClusterError: The cluster cannot be reached or refuses the job.
    """
    require_shared_paths(config)
    wanted = submission_id(config)
    action: Literal["submitted", "resubmitted", "already_running"] = "submitted"
    with _client(address) as client:
        earlier = _find(client, wanted)
        if earlier is not None and not earlier.status.is_terminal():
            action = "already_running"
        else:
            if earlier is not None:
                action = "resubmitted"
                client.delete_job(wanted)
            with tempfile.TemporaryDirectory(prefix="pu-ray-") as folder:
                pack(config, Path(folder))
                client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=wanted,
                    runtime_env={"working_dir": folder, "env_vars": dict(session.WORKER_ENVIRONMENT)},
                    metadata={"pu-ray": pu_ray.__version__, "job": config.name},
                )
        details = _get(client, wanted)
        if wait:
            details = _follow(client, details, say)
    return _result(wanted, action, details)


def _follow(client: JobSubmissionClient, details: JobDetails, say: Callable[[str], None] | None) -> JobDetails:
    """Wait for the end of a job; a head that cannot be reached for a moment does not end the wait."""
    wanted = details.submission_id
    assert wanted is not None
    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OSError),  # also what requests raises
        stop=tenacity.stop_after_delay(_PATIENCE_S),
        wait=tenacity.wait_fixed(_POLL_S),
        reraise=True,
    )
    narration = Narration()
    if say is not None:
        # The log begins with what earlier attempts said, or this one before somebody else came to wait for it.
        narration.lines(client.get_job_logs(wanted))
    while True:
        ended = details.status.is_terminal()
        if say is not None:
            for line in narration.lines(patiently(client.get_job_logs, wanted)):
                say(line)
        if ended:
            return details
        time.sleep(_POLL_S)
        details = patiently(_get, client, wanted)


class Narration:
    """What is new in a job's log since the last look, without the JSON that the entrypoint prints for machines."""

    def __init__(self) -> None:
        self._read = 0
        self._in_json = False

    def lines(self, log: str) -> list[str]:
        """Whole lines that were not there before."""
        end = log.rfind("\n") + 1
        fresh, self._read = log[self._read : end], max(self._read, end)
        told = []
        for line in fresh.splitlines():
            if line in ("{", "}"):
                self._in_json = line == "{"
            elif not self._in_json:
                told.append(line)
        return told


def status(submission_id: str, address: str | None) -> SubmissionResult:
    """How a submitted job is doing.

    Raises:
        ClusterError: The cluster cannot be reached or knows no such job.
    """
    with _client(address) as client:
        return _result(submission_id, "none", _get(client, submission_id))


def logs(submission_id: str, address: str | None, *, follow: bool) -> Iterator[str]:
    """What the job's driver printed, in pieces; ends with the job if followed.

    Ray appends a new attempt's output to that of the earlier ones under the same id.

    Raises:
        ClusterError: The cluster cannot be reached or knows no such job.
    """
    with _client(address) as client:
        _get(client, submission_id)
        if not follow:
            yield client.get_job_logs(submission_id)
            return
        loop = asyncio.new_event_loop()
        pieces = client.tail_job_logs(submission_id)
        try:
            while True:
                try:
                    piece = loop.run_until_complete(anext(pieces))
                except StopAsyncIteration:
                    return
                yield piece
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


def stop(submission_id: str, address: str | None) -> bool:
    """End a job; what it finished stays. Returns whether it was running.

    Raises:
        ClusterError: The cluster cannot be reached or knows no such job.
    """
    with _client(address) as client:
        _get(client, submission_id)
        return bool(client.stop_job(submission_id))


def require_shared_paths(config: JobConfig) -> None:
    """Refuse relative paths: on the cluster they would lie in a folder that Ray throws away.

    Absolute paths pass, since they may be a file system that all nodes mount.

    Raises:
        ConfigError: Names the setting.
    """
    settings = {
        "output": config.output,
        "teacher.weights": config.teacher.weights,
        "teacher.classes": config.teacher.classes,
        "labeled.uri": config.labeled.uri,
        "test.uri": config.test.uri,
        "lake.uri": config.lake.uri,
        "lake.truth": config.lake.truth,
    }
    for where, uri in settings.items():
        if uri is not None and Storage(uri).is_local and not uri.startswith(("/", "file:/")):
            raise ConfigError(
                "a submitted job cannot use a path relative to this machine",
                slug="local-path-in-submitted-job",
                where=where,
                allowed="s3://..., or an absolute path that every node mounts",
                got=uri,
                hint="copy the data to shared storage and give its URI",
            )


def pack(config: JobConfig, folder: Path) -> None:
    """Write what travels to the cluster: the job file, and the packages of a working copy.

    Args:
        config: The job; written with every value resolved, so that overrides travel too.
        folder: An empty folder.
    """
    settings = config.model_dump(mode="json", by_alias=True)
    (folder / JOB_FILE).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    root = Path(pu_ray.__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        return
    shutil.copy(root / "pyproject.toml", folder)
    for package in _PACKAGES:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))


@contextlib.contextmanager
def _client(address: str | None) -> Iterator[JobSubmissionClient]:
    """The Jobs client; whatever fails inside becomes a ClusterError, and Ray's own remarks stay silent."""
    try:
        with session.errors_only():
            yield JobSubmissionClient(address)
    except (ClusterError, ConfigError):
        raise
    except Exception as error:
        # Ray's client raises ConnectionError, RuntimeError (any HTTP status), ValueError, AuthenticationError,
        # and lets errors of requests and aiohttp through.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        refused = "authentic" in reason.lower() or "status code 401" in reason or "status code 403" in reason
        raise ClusterError(
            "the cluster refused the token" if refused else "the cluster's Jobs API did not do what was asked",
            slug="token-refused" if refused else "jobs-api-failed",
            where=address or "this machine's cluster",
            allowed="the dashboard's URL, for example http://head:8265",
            got=reason,
            hint=f"set {session.AUTH_MODE_VARIABLE}=token and {session.TOKEN_PATH_VARIABLE} to the file with the token"
            if refused
            else "check the address, and that the head's port 8265 can be reached (`ray dashboard` or a port-forward)",
        ) from error


def _find(client: JobSubmissionClient, wanted: str) -> JobDetails | None:
    return next((job for job in client.list_jobs() if job.submission_id == wanted), None)


def _get(client: JobSubmissionClient, wanted: str) -> JobDetails:
    details = _find(client, wanted)
    if details is None:
        raise ClusterError(
            "the cluster knows no such job",
            slug="no-such-job",
            where="submission id",
            got=wanted,
            hint="submit it first; the id changes with every setting of the job file",
        )
    return details


def _result(
    wanted: str, action: Literal["submitted", "resubmitted", "already_running", "none"], details: JobDetails
) -> SubmissionResult:
    exit_status = 0
    if details.status in (JobStatus.FAILED, JobStatus.STOPPED):
        exit_status = details.driver_exit_code or ClusterError.exit_status
    message = (details.message or "").partition("\n")[0]
    return SubmissionResult(wanted, action, str(details.status), message, exit_status)
