"""The students over Ray Serve, asked by an independent HTTP client."""

from __future__ import annotations

import base64
import dataclasses
import json
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from ray import serve

from pu_ray.errors import ClusterError, DataError
from pu_ray.images import Limits
from serving import app, client, registry
from serving.predictor import Predictor
from serving.settings import ServingSettings
from tests.unit.serving.students import LABELS, picture, png, write_student

pytestmark = pytest.mark.timeout(300)

SETTINGS = ServingSettings(
    max_batch_images=8, max_images=20, max_body_bytes=200_000, authentication="off", reload_s=0.5
)
PNG = {"Content-Type": "image/png"}


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server, and the same students in this process to compare with."""

    url: str
    exported: tuple[str, ...]
    predictors: dict[str, Predictor]
    versions: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    exported = tuple(
        write_student(tmp_path_factory.mktemp(name), name, seed) for seed, name in enumerate(["pets", "shoes"])
    )
    url = app.deploy(exported, SETTINGS, port=free_port())
    opened = [registry.load(uri) for uri in exported]
    yield Server(
        url,
        exported,
        {loaded.student.name: Predictor(loaded, Limits()) for loaded in opened},
        {loaded.student.name: loaded.student.version for loaded in opened},
    )
    serve.shutdown()


@pytest.fixture
def web(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        yield http


def error_of(response: httpx.Response) -> tuple[int, str]:
    document = response.json()
    assert list(document) == ["error"]
    return response.status_code, document["error"]


def tensor(name: str, datatype: str, shape: list[int], **rest: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, **rest}


def test_health_and_metadata(web: httpx.Client, server: Server) -> None:
    assert web.get("/v2/health/live").json() == {"live": True}
    assert web.get("/v2/health/ready").json() == {"ready": True}
    assert web.get("/v2").json()["extensions"][0] == "binary_tensor_data"
    names = [entry["name"] for entry in web.get("/v2/models").json()["models"]]
    assert names == ["pets", "shoes"]
    document = web.get(f"/v2/models/shoes/versions/{server.versions['shoes']}").json()
    assert document["inputs"][0] == {"name": "image", "datatype": "BYTES", "shape": [-1]}
    assert web.get("/v2/models/shoes/ready").json() == {"name": "shoes", "ready": True}


def test_json_request_in_three_kinds(web: httpx.Client, server: Server) -> None:
    pictures = np.stack([picture(seed) for seed in range(3)])
    expected = server.predictors["pets"].predict(pictures).logits_NK
    pixels = server.predictors["pets"].prepare(pictures).pixels_MCHW
    inputs = [
        tensor("image", "BYTES", [3], data=[base64.b64encode(png(seed)).decode() for seed in range(3)]),
        tensor("image_uint8", "UINT8", [3, 8, 8, 3], data=pictures.tolist()),
        tensor("pixels", "FP32", [3, 3, 8, 8], data=pixels.ravel().tolist()),
    ]
    for given in inputs:
        # Bytes without a Content-Type, as tritonclient sends them.
        body = json.dumps({"id": given["name"], "inputs": [given], "outputs": [{"name": "logits"}, {"name": "label"}]})
        document = web.post("/v2/models/pets/infer", content=body.encode()).json()
        assert document["id"] == given["name"]
        assert document["model_version"] == server.versions["pets"]
        logits, label = document["outputs"]
        np.testing.assert_allclose(np.array(logits["data"]).reshape(3, -1), expected, rtol=1e-5, atol=1e-5)
        assert label["data"] == [LABELS[index] for index in expected.argmax(axis=1)]


def test_binary_request_and_answer_larger_than_a_batch(web: httpx.Client, server: Server) -> None:
    images = [png(seed) for seed in range(20)]
    content = b"".join(struct.pack("<I", len(image)) + image for image in images)
    given = tensor("image", "BYTES", [20], parameters={"binary_data_size": len(content)})
    header = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    response = web.post(
        "/v2/models/shoes/infer",
        content=header + content,
        headers={"Inference-Header-Content-Length": str(len(header)), "Content-Type": "application/octet-stream"},
    )
    assert response.status_code == 200
    length = int(response.headers["Inference-Header-Content-Length"])
    outputs = json.loads(response.content[:length])["outputs"]
    assert [output["name"] for output in outputs] == ["logits", "probabilities", "label"]
    size = outputs[0]["parameters"]["binary_data_size"]
    logits = np.frombuffer(response.content[length : length + size], "<f4").reshape(outputs[0]["shape"])
    np.testing.assert_allclose(logits, server.predictors["shoes"].predict(images).logits_NK, rtol=1e-5, atol=1e-5)


def test_concurrent_requests_share_batches_and_keep_their_rows(web: httpx.Client, server: Server) -> None:
    def ask(seed: int) -> dict[str, float]:
        name = ("pets", "shoes")[seed % 2]
        image = png(seed) if seed % 5 else b"bad"
        response = web.post(f"/v1/classify?model={name}", content=image, headers=PNG)
        if seed % 5 == 0:
            assert error_of(response)[0] == 415
            return {}
        return {entry["label"]: entry["probability"] for entry in response.json()["predictions"]}

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(60)))
    for seed, answer in enumerate(answers):
        if seed % 5:
            predictions = server.predictors[("pets", "shoes")[seed % 2]].predict([png(seed)])
            expected = dict(zip(LABELS, predictions.probabilities_NK[0].tolist(), strict=True))
            assert answer == pytest.approx(expected, rel=1e-5)


def test_a_bad_image_in_a_batch_is_named(web: httpx.Client) -> None:
    images = [base64.b64encode(image).decode() for image in (png(0), png(1), png(2)[:60], png(3))]
    body = json.dumps({"inputs": [tensor("image", "BYTES", [4], data=images)]})
    status, message = error_of(web.post("/v2/models/pets/infer", content=body))
    assert status == 422
    assert message.startswith("image 2 of input 'image' cannot be used: truncated")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nothing", b"", 404),
        ("PUT", "/v2/models/pets", b"", 405),
        ("GET", "/v2/models/cars", b"", 404),
        ("POST", "/v2/models/pets/versions/7/infer", b"{}", 404),
        ("POST", "/v2/models/pets/infer", b"not json", 400),
        ("POST", "/v2/models/pets/infer", b'{"inputs": []}', 422),
        ("POST", "/v1/classify", png(0), 400),
        ("POST", "/v1/classify?model=pets", b"not an image", 415),
        ("POST", "/v1/classify?model=pets", bytes(200_001), 413),
        ("POST", "/v1/classify?model=pets", bytes(30_000_000), 413),
    ],
)
def test_every_error_is_a_document(web: httpx.Client, method: str, path: str, body: bytes, status: int) -> None:
    response = web.request(method, path, content=body, headers=PNG)
    assert error_of(response)[0] == status


def test_a_body_without_length_is_counted(web: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield bytes(10_000)

    response = web.post("/v1/classify?model=pets", content=endless(), headers=PNG)
    assert error_of(response) == (413, "the body is larger than 200000 bytes")


def test_our_own_client(server: Server) -> None:
    with client.Client(server.url) as own:
        answer = own.classify(png(5), model="shoes", top_k=2)
        expected = server.predictors["shoes"].predict([png(5)]).top(0, 2)
        assert (answer.model, answer.version) == ("shoes", server.versions["shoes"])
        assert [prediction.index for prediction in answer.predictions] == [index for index, _ in expected]
        assert [model.name for model in own.models()] == ["pets", "shoes"]
        with pytest.raises(DataError, match="choose one with \\?model=: pets, shoes"):
            own.classify(png(5))


def test_a_second_server_is_refused(server: Server) -> None:
    with pytest.raises(ClusterError, match="runs on this cluster already"):
        app.deploy(server.exported, SETTINGS, port=free_port())
