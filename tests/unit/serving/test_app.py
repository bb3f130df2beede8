"""serving/app.py without a cluster: whom it listens to, what it refuses to start, and how requests share batches."""

from __future__ import annotations

import socket
from pathlib import Path

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
from serving import app, auth
from serving.plan import plan
from serving.settings import ServingSettings
from tests.unit.serving.students import onnx_network, write_student

SETTINGS = ServingSettings(max_batch_images=8, authentication="off")


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


@pytest.mark.parametrize(
    ("names", "tail", "placement"),
    [
        (["pets"], (), "inside"),
        (["pets", "shoes"], (), "apart"),
        (["pets", "shoes"], ("shoes",), "inside"),
        (["pets"], ("*",), "apart"),
    ],
)
def test_one_name_is_answered_where_http_arrives(
    tmp_path: Path, names: list[str], tail: tuple[str, ...], placement: str
) -> None:
    served = plan([write_student(tmp_path / name, name) for name in names])
    settings = SETTINGS.model_copy(update={"tail": tail})
    assert app.placed(served, settings).placement == placement
    for chosen in ("inside", "apart"):
        assert app.placed(served, settings.model_copy(update={"placement": chosen})).placement == chosen


def test_ctrl_c_stops_serve_and_passes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(app, "deploy", lambda *_given, **_named: "http://127.0.0.1:1")
    monkeypatch.setattr(serve, "shutdown", lambda: calls.append("stopped"))

    def interrupted(url: str) -> None:
        calls.append(url)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        app.run_until_interrupted([write_student(tmp_path)], SETTINGS, on_ready=interrupted)
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
