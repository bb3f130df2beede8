"""Learning curves for others' viewers: TensorBoard always, MLflow where it is configured, with the exported student.

A curve is a list of records, each a mapping from names to numbers with `step` and `time` (Unix, seconds) among them.
"""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from pu_ray.config import TrackingConfig
from pu_ray.errors import ClusterError, ConfigError

EVENTS_FILE = "events.out.tfevents.0.pu-ray"
_PLACES = ("step", "time")
_MODEL_FOLDER = "model"  # of the run's artifacts, as MLflow's own `log_model` calls it
_MLFLOW_BATCH = 1000  # metrics of one request, MLflow's limit


def tensorboard_events(curve: Sequence[Mapping[str, float]]) -> bytes:
    """The curve as a TensorBoard event file.

    The file is made from the whole curve each time, so that a run that was resumed leaves one, without gaps and
    without steps told twice.
    """
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder, write_to_disk=True) as writer:
            for record in curve:
                for name in sorted(record.keys() - set(_PLACES)):
                    writer.add_scalar(name, record[name], int(record["step"]), walltime=record["time"])
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


def check(settings: TrackingConfig) -> None:
    """Stop before hours of training whose curve nobody would receive.

    Raises:
        ConfigError: MLflow is configured and not installed.
    """
    if settings.mlflow_uri is not None and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            "MLflow is not installed",
            slug="mlflow-not-installed",
            where="tracking.mlflow_uri",
            got=settings.mlflow_uri,
            hint="pip install 'pu-ray[mlflow]', or leave the setting out",
        )


def log_to_mlflow(
    settings: TrackingConfig,
    name: str,
    parameters: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
    tags: Mapping[str, str],
) -> str:
    """A finished run with its parameters and curve.

    Args:
        settings: Where to; `mlflow_uri` is set.
        name: Of the run.
        parameters: Settings by dotted path.
        curve: See above.
        tags: What else tells this run from others.

    Returns:
        MLflow's id of the run.

    Raises:
        ClusterError: MLflow does not take it.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    metrics = [
        Metric(key, float(record[key]), int(record["time"] * 1000), int(record["step"]))
        for record in curve
        for key in sorted(record.keys() - set(_PLACES))
    ]
    with _told("the run"):
        client = MlflowClient(settings.mlflow_uri)
        found = client.get_experiment_by_name(settings.experiment)
        experiment = found.experiment_id if found else client.create_experiment(settings.experiment)
        run: str = client.create_run(experiment, run_name=name).info.run_id
        given = [Param(key, str(value)[:500]) for key, value in parameters.items()]
        for start in range(0, len(given), 100):
            client.log_batch(run, params=given[start : start + 100])
        client.log_batch(run, tags=[RunTag(key, value) for key, value in tags.items()])
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            client.log_batch(run, metrics=metrics[start : start + _MLFLOW_BATCH])
        client.set_terminated(run)
    return run


def register(
    settings: TrackingConfig,
    name: str,
    run: str,
    graph: bytes,
    shapes: Mapping[str, Sequence[int]],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> str:
    """The exported student as a new version in the model registry, in MLflow's ONNX flavour with its signature.

    Args:
        settings: Where to; `mlflow_uri` is set.
        name: Of the model; it is made where there is none.
        run: MLflow's id of the training.
        graph: The ONNX model.
        shapes: Of the graph's input and output, in this order, by name; float32, -1 for any number of images.
        metrics: Of the finished student, for the run.
        tags: Of the version.

    Returns:
        The version.

    Raises:
        ClusterError: MLflow does not take it.
    """
    import mlflow.onnx
    import onnx
    import onnxruntime
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
    from mlflow.types.schema import Schema, TensorSpec

    taken, given = (Schema([TensorSpec(np.dtype(np.float32), tuple(shapes[each]), each)]) for each in shapes)
    with _told("the model"), tempfile.TemporaryDirectory() as folder:
        mlflow.onnx.save_model(
            onnx.load_from_string(graph),
            f"{folder}/{_MODEL_FOLDER}",
            signature=ModelSignature(inputs=taken, outputs=given),
            pip_requirements=[f"onnx=={onnx.__version__}", f"onnxruntime=={onnxruntime.__version__}"],
        )
        client = MlflowClient(settings.mlflow_uri)
        client.log_artifacts(run, f"{folder}/{_MODEL_FOLDER}", _MODEL_FOLDER)
        for key, value in metrics.items():
            client.log_metric(run, key, value)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        source = f"{client.get_run(run).info.artifact_uri}/{_MODEL_FOLDER}"
        return str(client.create_model_version(name, source, run, tags=dict(tags)).version)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """MLflow's exceptions end here, and what it prints: stdout belongs to results."""
    from mlflow.exceptions import MlflowException

    try:
        with redirect_stdout(io.StringIO()):
            yield
    except MlflowException as error:
        raise ClusterError(
            f"MLflow does not take {what}",
            slug="mlflow-refuses",
            where="tracking.mlflow_uri",
            got=str(error).partition("\n")[0],
            hint="check that the server is up, or leave the setting out, and give the same command again",
        ) from error
