"""pu_ray/tracking.py: curves, read again by others' readers."""

from __future__ import annotations

import builtins
import importlib.util

import pytest

from pu_ray import tracking
from pu_ray.config import TrackingConfig
from pu_ray.errors import ClusterError, ConfigError

CURVE = [
    {"step": 5, "time": 1700000000.5, "loss": 2.0, "validation_accuracy": 0.25},
    {"step": 10, "time": 1700000009.0, "loss": 1.5, "validation_accuracy": 0.5},
]


def events_in(content, tmp_path):
    """(name, step, value, time), by tensorboardX's own record layout and protocol buffers."""
    import struct

    from tensorboardX.proto.event_pb2 import Event

    found, place = [], 0
    while place < len(content):
        (length,) = struct.unpack("<Q", content[place : place + 8])
        event = Event.FromString(content[place + 12 : place + 12 + length])
        found += [(value.tag, event.step, value.simple_value, event.wall_time) for value in event.summary.value]
        place += 16 + length
    return found


def test_tensorboard_gets_every_number_with_its_step_and_time(tmp_path):
    found = events_in(tracking.tensorboard_events(CURVE), tmp_path)
    assert sorted(found) == [
        ("loss", 5, 2.0, 1700000000.5),
        ("loss", 10, 1.5, 1700000009.0),
        ("validation_accuracy", 5, 0.25, 1700000000.5),
        ("validation_accuracy", 10, 0.5, 1700000009.0),
    ]


def test_a_longer_curve_begins_with_what_was_told_before(tmp_path):
    short, long = (events_in(tracking.tensorboard_events(curve), tmp_path) for curve in (CURVE[:1], CURVE))
    assert long[: len(short)] == short


def test_mlflow_gets_parameters_tags_and_the_curve(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    settings = TrackingConfig(mlflow_uri=f"file://{tmp_path}/mlruns", experiment="shop")
    parameters = {f"distill.option_{n}": n for n in range(120)}
    run = tracking.log_to_mlflow(settings, "job", parameters, CURVE, {"pu_ray.identity": "abc"})
    client = MlflowClient(settings.mlflow_uri)
    found = client.get_run(run)
    assert found.info.run_name == "job"
    assert found.info.status == "FINISHED"
    assert found.data.params == {name: str(value) for name, value in parameters.items()}
    assert found.data.tags["pu_ray.identity"] == "abc"
    history = client.get_metric_history(run, "loss")
    assert [(point.step, point.value, point.timestamp) for point in history] == [
        (5, 2.0, 1700000000500),
        (10, 1.5, 1700000009000),
    ]
    assert client.get_experiment_by_name("shop").experiment_id == found.info.experiment_id
    again = tracking.log_to_mlflow(settings, "job", {}, CURVE, {})
    assert client.get_run(again).info.experiment_id == found.info.experiment_id, "the experiment is found again"


def test_a_server_that_is_away_is_told(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = TrackingConfig(mlflow_uri="http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="MLflow does not take the run") as caught:
        tracking.log_to_mlflow(settings, "job", {}, CURVE, {})
    assert caught.value.where == "tracking.mlflow_uri"


def test_without_mlflow_a_job_that_wants_it_stops_before_it_trains(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracking.check(TrackingConfig())
    with pytest.raises(ConfigError, match="MLflow is not installed") as caught:
        tracking.check(TrackingConfig(mlflow_uri="file:runs"))
    assert caught.value.hint == "pip install 'pu-ray[mlflow]', or leave the setting out"


def test_nobody_pays_for_mlflow_who_does_not_want_it(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        assert not name.startswith("mlflow")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    tracking.check(TrackingConfig())
    tracking.tensorboard_events(CURVE)
