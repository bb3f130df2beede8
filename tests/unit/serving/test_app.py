"""serving/app.py without a cluster: whom it listens to, what it refuses to start, and how requests share batches."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray import serve
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ReplicaState,
)

from pu_ray.errors import ClusterError, ConfigError, DataError
from serving import app, auth, replica
from serving.predictor import Floats, Predictions, Predictor
from serving.registry import Student
from serving.settings import ServingSettings
from tests.unit.serving.students import onnx_network, png, write_student

SETTINGS = ServingSettings(max_batch_images=8, batch_wait_s=0.2, authentication="off")


@pytest.mark.parametrize("variable", ["RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_ENABLE_DIRECT_INGRESS"])
def test_serve_settings_that_open_every_interface_are_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match="nobody is asked for a token") as refusal:
        app.deploy(["unread"], SETTINGS)
    assert refusal.value.where == variable


def test_grpc_that_opens_every_interface_is_refused() -> None:
    with pytest.raises(ConfigError, match="nobody is asked for a token") as refusal:
        app.deploy(["unread"], SETTINGS.model_copy(update={"grpc_port": 9000}))
    assert refusal.value.where == "grpc_port"


GUARDED = ServingSettings(token_digests=(auth.digest("secret"),), grpc_port=9000)


@pytest.mark.parametrize(
    ("host", "settings"),
    [("127.0.0.1", SETTINGS), ("127.0.0.9", SETTINGS), ("::1", SETTINGS), ("0.0.0.0", SETTINGS), ("0.0.0.0", GUARDED)],
)
def test_a_permitted_host_gets_as_far_as_its_students(tmp_path: Path, host: str, settings: ServingSettings) -> None:
    with pytest.raises(DataError, match="does not exist yet"):
        app.deploy([str(tmp_path)], settings, host=host)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_an_impossible_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="not a TCP port"):
        app.deploy(["unread"], SETTINGS, port=port)


def test_a_taken_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ClusterError, match="cannot listen there"):
            app._check_port_is_free("127.0.0.1", taken.getsockname()[1])


def test_a_network_that_does_not_fit_stops_before_serve_starts(tmp_path: Path) -> None:
    uri = write_student(tmp_path, files={"model.onnx": onnx_network(classes=9)})
    with pytest.raises(DataError, match="does not fit its labels"):
        app.deploy([uri], SETTINGS)


def test_a_student_that_changed_since_is_refused(student: Student) -> None:
    planned = dataclasses.replace(student, version="another")
    with pytest.raises(DataError, match="changed since the server was started") as refusal:
        replica.StudentReplica(planned, SETTINGS)
    assert refusal.value.allowed == "version another"


def test_requests_share_batches_and_get_their_own_rows(
    student: Student, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []
    together = replica._forward_together

    def counting(network: Predictor, pieces: Sequence[Floats]) -> list[Floats]:
        batches.append([len(piece) for piece in pieces])
        return together(network, pieces)

    monkeypatch.setattr(replica, "_forward_together", counting)
    # Serve's batching asks its replica for one number, even in Serve's own mode for local tests.
    deployment = SimpleNamespace(max_ongoing_requests=replica.ongoing(SETTINGS))
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(_deployment_config=deployment))
    requests = [[png(0)], [png(1), b"bad", png(2)], [png(seed) for seed in range(3, 14)], [b"bad"], [png(20)]]

    async def asking() -> list[Predictions]:
        one = replica.StudentReplica(student, SETTINGS)
        return await asyncio.gather(*map(one.predict, requests))

    for images, answer in zip(requests, asyncio.run(asking()), strict=True):
        expected = predictor.predict(images)
        np.testing.assert_allclose(answer.logits_NK, expected.logits_NK, rtol=1e-5, atol=1e-5)
        assert {position: error.code for position, error in answer.failures.items()} == {
            position: error.code for position, error in expected.failures.items()
        }
    assert max(map(sum, batches)) <= SETTINGS.max_batch_images
    assert sum(map(sum, batches)) == 15
    assert any(len(pieces) > 1 for pieces in batches)


def test_ctrl_c_stops_serve_and_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(app, "deploy", lambda *_given, **_named: "http://127.0.0.1:1")
    monkeypatch.setattr(serve, "shutdown", lambda: calls.append("stopped"))

    def interrupted(url: str) -> None:
        calls.append(url)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        app.run_until_interrupted(["unread"], SETTINGS, on_ready=interrupted)
    assert calls == ["http://127.0.0.1:1", "stopped"]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("no CPUs", "no CPUs"),
        ("Traceback:\n  File x\npu_ray.errors.DataError: /x: changed\n  got: y\n", "DataError: /x: changed\n  got: y"),
    ],
)
def test_a_failed_start_says_what_serve_knows(message: str, told: str) -> None:
    deployment = DeploymentStatusOverview(
        DeploymentStatus.UPDATING, DeploymentStatusTrigger.UNSPECIFIED, {ReplicaState.STARTING: 2}, message
    )
    overview = ApplicationStatusOverview(ApplicationStatus.DEPLOYING, "", 0.0, {"student-pets": deployment})
    assert app._messages(overview) == f"student-pets: updating (2 starting) {told}"
