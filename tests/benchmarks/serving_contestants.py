"""Who takes part in the serving benchmark: how each server is started, asked, and understood."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.load import Request
from tests.benchmarks.peers import network
from tests.benchmarks.serving_material import NAME

ROOT = Path(__file__).parents[2]
_HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
_PEERS = "tests.benchmarks.peers"


@dataclass(frozen=True)
class Contestant:
    """One row of the tables.

    Attributes:
        name: As --contestants says it.
        about: What it is and how it is asked, for the document.
        engine: What runs the network; one of `peers.in_process.ENGINES`.
        packages: Whose versions are told.
    """

    name: str
    about: str
    engine: str
    packages: tuple[str, ...] = ("torch",)

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return Path(sys.executable)


@dataclass(frozen=True)
class Limit(Contestant):
    """No server at all."""


@dataclass(frozen=True)
class Server(Contestant):
    """A server.

    Attributes:
        command: From the material's folder and a port to what starts it.
        request: From a JPEG to what is asked.
        label: From the answer's body to the number of the class.
        environment: Variables of its own.
        venv: Folder of its environment in the repository; empty: the one that runs the benchmark.
    """

    command: Callable[[Path, int], Sequence[str]] = field(kw_only=True)
    request: Callable[[bytes], Request] = field(kw_only=True)
    label: Callable[[bytes], int] = field(kw_only=True)
    environment: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    venv: str = field(default="", kw_only=True)

    @property
    def python(self) -> Path:
        """See `Contestant.python`."""
        return ROOT / self.venv / "bin" / "python" if self.venv else Path(sys.executable)

    def variables(self, folder: Path, port: int) -> dict[str, str]:
        """The whole environment: this process's, one thread each, Ray without tokens of its own."""
        return {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            network.FOLDER_VARIABLE: str(folder),
            network.PORT_VARIABLE: str(port),
            **self.environment,
        }


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# -- ours --------------------------------------------------------------------------------------------------


def _pu_ray() -> str:
    return str(Path(sys.executable).with_name("pu-ray"))


def _v2_request(token: str) -> Callable[[bytes], Request]:
    """One BYTES element behind the JSON, and the best class of Triton's classification extension as the answer."""

    def request(jpeg: bytes) -> Request:
        tensor = len(jpeg).to_bytes(4, "little") + jpeg
        asked = {
            "inputs": [
                {
                    "name": "image",
                    "shape": [1],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(tensor)},
                }
            ],
            "outputs": [{"name": "probabilities", "parameters": {"classification": 1}}],
        }
        head = json.dumps(asked, separators=(",", ":")).encode()
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
        return Request(f"/v2/models/{NAME}/infer", headers, head + tensor)

    return request


def _v2_label(body: bytes) -> int:
    _, index, *_ = json.loads(body)["outputs"][0]["data"][0].split(":")
    return int(index)


def _ours(work: Path) -> Iterator[Server]:
    environment = {**os.environ, "COLUMNS": "300", "PYTHONPATH": str(ROOT)}

    def pu_ray(*arguments: str) -> str:
        command = [_pu_ray(), *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout

    offered = pu_ray("serve", "--help")
    tokens = work / "tokens.txt"
    tokens.unlink(missing_ok=True)
    token = pu_ray("token", "benchmark", "--add-to", str(tokens)).split()[-1]
    has_flag = "--haproxy" in offered
    for engine in ("onnx", "onnx-int8", "torch"):
        if not re.search(rf"\b{engine}\b", offered):
            print(f"`pu-ray serve` knows no engine {engine}: left out", file=sys.stderr)
            continue
        for haproxy in (False, True):

            def command(folder: Path, port: int, engine: str = engine, haproxy: bool = haproxy) -> list[str]:
                flags = ["--engine", engine, "--replicas", "2", "--tokens", str(tokens)]
                flags += ["--haproxy"] if haproxy and has_flag else []
                where = ["--host", "127.0.0.1", "--port", str(port)]
                return [_pu_ray(), "serve", str(folder / "exported"), *where, *flags]

            yield Server(
                name=f"ours-{engine.removeprefix('onnx-')}" + ("-haproxy" if haproxy else ""),
                about=f"`pu-ray serve --engine {engine} --replicas 2`, tokens, "
                + ("HAProxy" if haproxy else "Ray's Python proxy")
                + "; v2 with one binary tensor",
                engine=engine,
                packages=("ray", "torch" if engine == "torch" else "onnxruntime"),
                command=command,
                request=_v2_request(token),
                label=_v2_label,
                environment=_HAPROXY if haproxy and not has_flag else {},
            )


# -- peers -------------------------------------------------------------------------------------------------


def _raw(path: str) -> Callable[[bytes], Request]:
    return lambda jpeg: Request(path, {"Content-Type": "image/jpeg"}, jpeg)


def _form(jpeg: bytes) -> Request:
    boundary = "a-line-that-no-picture-holds"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="picture.jpg"\r\n'
    body = f"{head}Content-Type: image/jpeg\r\n\r\n".encode() + jpeg + f"\r\n--{boundary}--\r\n".encode()
    return Request("/classify", {"Content-Type": f"multipart/form-data; boundary={boundary}"}, body)


def _base64(jpeg: bytes) -> Request:
    tensor = {
        "name": "image",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(jpeg).decode()],
    }
    body = json.dumps({"inputs": [tensor]}).encode()
    return Request(f"/v2/models/{NAME}/infer", {"Content-Type": "application/json"}, body)


def _label_of(body: bytes) -> int:
    said: Any = json.loads(body)
    return int((said[0] if isinstance(said, list) else said)["label"])


def _mlserver(folder: Path, port: int) -> list[str]:
    settings = {
        "debug": False,
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "metrics_dir": str(folder / "mlserver" / "metrics"),
        "parallel_workers": 2,
    }
    model = {
        "name": NAME,
        "implementation": f"{_PEERS}.mlserver_app.Runtime",
        "max_batch_size": network.MAX_BATCH,
        "max_batch_time": 0.002,
    }
    home = folder / "mlserver"
    # The metrics that a server left behind trouble the next one.
    shutil.rmtree(home, ignore_errors=True)
    (home / "metrics").mkdir(parents=True)
    (home / "settings.json").write_text(json.dumps(settings))
    (home / "model-settings.json").write_text(json.dumps(model))
    return [str(ROOT / ".venv-mlserver/bin/mlserver"), "start", str(home)]


def _bentoml(folder: Path, port: int) -> list[str]:
    where = ["--host", "127.0.0.1", "--port", str(port), "--working-dir", str(ROOT)]
    return [str(ROOT / ".venv-bentoml/bin/bentoml"), "serve", f"{_PEERS}.bentoml_app:Service", *where]


def _peers(work: Path) -> Iterator[Server]:
    yield Server(
        name="litserve",
        about="LitServe, two workers, batches; the JPEG as the body",
        engine="torch",
        packages=("litserve", "torch"),
        command=lambda folder, port: [str(ROOT / ".venv-litserve/bin/python"), "-m", f"{_PEERS}.litserve_app"],
        request=_raw("/predict"),
        label=_label_of,
        venv=".venv-litserve",
    )
    yield Server(
        name="bentoml",
        about="BentoML, two workers, adaptive batching; the JPEG as a form's file",
        engine="torch",
        packages=("bentoml", "torch"),
        command=_bentoml,
        request=_form,
        label=_label_of,
        environment={"BENTOML_HOME": str(work / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"},
        venv=".venv-bentoml",
    )
    yield Server(
        name="mlserver",
        about="MLServer, two parallel workers, adaptive batching; v2 with base64 in JSON",
        engine="torch",
        packages=("mlserver", "torch"),
        command=_mlserver,
        request=_base64,
        label=lambda body: int(json.loads(body)["outputs"][0]["data"][0]),
        venv=".venv-mlserver",
    )
    for name, environment in (("ray-serve", {}), ("ray-serve-haproxy", _HAPROXY)):
        yield Server(
            name=name,
            about="a plain FastAPI application on Ray Serve, two replicas, `serve.batch`, "
            + ("HAProxy" if environment else "Ray's Python proxy")
            + "; the JPEG as the body",
            engine="torch",
            packages=("ray", "torch"),
            command=lambda folder, port: [sys.executable, "-m", f"{_PEERS}.ray_serve_app"],
            request=_raw("/classify"),
            label=_label_of,
            environment=environment,
        )


def everybody(work: Path) -> list[Contestant]:
    """All that can take part here; `work` holds what they need."""
    limits = [
        Limit(f"limit-{engine.removeprefix('onnx-')}", "no server: decoding and network in two processes", engine)
        for engine in ("torch", "onnx", "onnx-int8")
    ]
    return [*_ours(work), *_peers(work), *limits]
