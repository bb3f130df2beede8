from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from cluster import submit
from pu_ray import config
from pu_ray.config import JobConfig
from pu_ray.errors import ClusterError, ConfigError

MakeJob = Callable[..., JobConfig]


class FakeClient:
    """Ray's client, as far as submit.py uses it."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobDetails] = {}
        self.calls: list[str] = []
        self.packed: dict[str, str] = {}
        self.runtime_env: dict[str, Any] = {}
        self.log = "all of it"

    def put(
        self, submission_id: str, status: JobStatus, message: str | None = None, driver_exit_code: int | None = None
    ) -> None:
        self.jobs[submission_id] = JobDetails(
            type=JobType.SUBMISSION,
            submission_id=submission_id,
            status=status,
            entrypoint="",
            message=message,
            driver_exit_code=driver_exit_code,
        )

    def list_jobs(self) -> list[JobDetails]:
        return list(self.jobs.values())

    def submit_job(self, *, submission_id: str, runtime_env: dict[str, Any], **others: object) -> None:
        assert submission_id not in self.jobs
        self.calls.append("submit")
        self.runtime_env = runtime_env
        folder = Path(runtime_env["working_dir"])
        self.packed = {str(path.relative_to(folder)): "" for path in folder.rglob("*")}
        self.put(submission_id, JobStatus.PENDING)

    def delete_job(self, submission_id: str) -> None:
        self.calls.append("delete")
        del self.jobs[submission_id]

    def stop_job(self, submission_id: str) -> bool:
        return not self.jobs[submission_id].status.is_terminal()

    def get_job_logs(self, submission_id: str) -> str:
        return self.log

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        for piece in ("one\n", "two\n"):
            yield piece


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(submit, "JobSubmissionClient", lambda address: fake)
    return fake


def test_the_id_follows_from_the_settings(make_job: MakeJob) -> None:
    wanted = submit.submission_id(make_job())
    assert wanted.startswith("pu-ray-small-")
    assert len(wanted) == len("pu-ray-small-") + 12
    assert submit.submission_id(make_job()) == wanted
    assert submit.submission_id(make_job(seed=1)) != wanted


def test_a_new_job_is_submitted(make_job: MakeJob, client: FakeClient) -> None:
    result = submit.submit(make_job(), "http://head:8265", wait=False)
    assert (result.action, result.status, result.exit_status) == ("submitted", "PENDING", 0)
    assert client.calls == ["submit"]
    assert "job.yaml" in client.packed


def test_a_running_job_is_left_alone(make_job: MakeJob, client: FakeClient) -> None:
    client.put(submit.submission_id(make_job()), JobStatus.RUNNING)
    assert submit.submit(make_job(), None, wait=False).action == "already_running"
    assert client.calls == []


@pytest.mark.parametrize("ended", [JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED])
def test_a_job_that_ended_is_replaced(make_job: MakeJob, client: FakeClient, ended: JobStatus) -> None:
    client.put(submit.submission_id(make_job()), ended)
    assert submit.submit(make_job(), None, wait=False).action == "resubmitted"
    assert client.calls == ["delete", "submit"]


def test_waiting_ends_with_the_job_s_own_exit_status(
    make_job: MakeJob, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = submit.submission_id(make_job())

    def sleep(seconds: float) -> None:
        client.put(wanted, JobStatus.FAILED, message="gate failed, logs:\nlong", driver_exit_code=5)

    monkeypatch.setattr("time.sleep", sleep)
    result = submit.submit(make_job(), None, wait=True)
    assert (result.status, result.exit_status, result.message) == ("FAILED", 5, "gate failed, logs:")


def test_waiting_tells_what_the_job_narrates_and_outlives_a_lost_connection(
    make_job: MakeJob, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = submit.submission_id(make_job())
    client.put(wanted, JobStatus.FAILED)
    client.log = "what the attempt before said\n"
    moments = iter(
        [
            (JobStatus.RUNNING, "features: 10 of 100 images\nfeatu"),
            (None, ""),
            (JobStatus.RUNNING, "res: 90 of 100 images\n"),
            (JobStatus.SUCCEEDED, 'report\n{\n  "a": {\n  }\n}\nthe end\n'),
        ]
    )
    jobs = client.list_jobs

    def lost() -> list[JobDetails]:
        monkeypatch.setattr(client, "list_jobs", jobs)
        raise ConnectionError("the head is away")

    def sleep(seconds: float) -> None:
        status, said = next(moments)
        if status is None:
            monkeypatch.setattr(client, "list_jobs", lost)
        else:
            client.put(wanted, status)
            client.log += said

    monkeypatch.setattr("time.sleep", sleep)
    told: list[str] = []
    result = submit.submit(make_job(), None, wait=True, say=told.append)
    assert result.status == "SUCCEEDED"
    assert told == ["features: 10 of 100 images", "features: 90 of 100 images", "report", "the end"]


def test_a_head_that_stays_away_ends_the_wait(
    make_job: MakeJob, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def gone() -> list[JobDetails]:
        raise ConnectionError("the head is away")

    def sleep(seconds: float) -> None:
        now[0] += seconds
        monkeypatch.setattr(client, "list_jobs", gone)

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with pytest.raises(ClusterError, match="Jobs API") as raised:
        submit.submit(make_job(), None, wait=True)
    assert raised.value.got == "the head is away"
    assert now[0] >= 60


def test_a_job_without_an_exit_code_of_its_own_counts_as_the_cluster_s_fault(client: FakeClient) -> None:
    client.put("stopped", JobStatus.STOPPED)
    assert submit.status("stopped", None).exit_status == 4


def test_logs_come_whole_or_in_pieces(client: FakeClient) -> None:
    client.put("id", JobStatus.RUNNING)
    assert list(submit.logs("id", None, follow=False)) == ["all of it"]
    assert list(submit.logs("id", None, follow=True)) == ["one\n", "two\n"]


def test_stopping_says_whether_it_ran(client: FakeClient) -> None:
    client.put("running", JobStatus.RUNNING)
    client.put("done", JobStatus.SUCCEEDED)
    assert submit.stop("running", None) is True
    assert submit.stop("done", None) is False


def test_an_unknown_job_is_named(client: FakeClient) -> None:
    for ask in (submit.status, submit.stop, lambda name, address: list(submit.logs(name, address, follow=False))):
        with pytest.raises(ClusterError, match="knows no such job") as raised:
            ask("missing", None)
        assert raised.value.got == "missing"


def test_what_travels_loads_as_the_same_job_without_junk(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(recipe="paper", distill={"workers": [1, 2], "epochs": 7}, scorer={"prior": 0.21})
    folder = tmp_path / "packed"
    folder.mkdir()
    submit.pack(job, folder)
    assert config.load(folder / "job.yaml", environment={}).job == job
    assert {path.name for path in folder.iterdir()} == {"job.yaml", "pyproject.toml", "pu_ray", "serving", "cluster"}
    names = [path.name for path in folder.rglob("*")]
    assert not [name for name in names if name.startswith(".") or name == "__pycache__"]


def test_no_token_travels(make_job: MakeJob, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    submit.submit(make_job(), None, wait=False)
    assert client.runtime_env["env_vars"] == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("section", "value", "where"),
    [("output", "runs/x", "output"), ("lake", {"uri": "./lake"}, "lake.uri"), ("test", {"uri": "~/test"}, "test.uri")],
)
def test_a_path_of_this_machine_is_refused(
    make_job: MakeJob, client: FakeClient, section: str, value: object, where: str
) -> None:
    with pytest.raises(ConfigError, match="relative to this machine") as raised:
        submit.submit(make_job(**{section: value}), None, wait=False)
    assert raised.value.where == where
    assert client.calls == []


def test_a_refused_token_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str | None) -> None:
        raise RuntimeError("Authentication failed: Forbidden: Invalid authentication token")

    monkeypatch.setattr(submit, "JobSubmissionClient", refuse)
    with pytest.raises(ClusterError, match="refused the token") as raised:
        submit.status("id", "http://head:8265")
    assert "RAY_AUTH_TOKEN_PATH" in str(raised.value.hint)


def test_a_cluster_that_is_not_there_is_named() -> None:
    with pytest.raises(ClusterError) as raised:
        submit.status("id", "http://127.0.0.1:1")
    assert raised.value.where == "http://127.0.0.1:1"
    assert "8265" in str(raised.value.hint)
