"""Clients that are not ours, each in an environment of its own, get the right answers from the real server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import serve

from pu_ray.images import Limits
from serving import app, auth, registry
from serving.predictor import Predictor
from serving.settings import ServingSettings
from tests.integration.test_serving import free_port
from tests.unit.serving.students import LABELS, picture, png, write_student

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "clients"
TOKEN = "for-the-clients"
PICTURES = np.stack([picture(seed) for seed in range(3)])


@dataclass(frozen=True)
class Server:
    """A running server, and the same student in this process to compare with."""

    http: str
    grpc: str
    predictor: Predictor
    folder: Path

    @property
    def logits(self) -> Any:
        return self.predictor.predict(PICTURES).logits_NK

    @property
    def labels(self) -> list[str]:
        return [LABELS[index] for index in self.logits.argmax(axis=1)]


@pytest.fixture(scope="module")
def server(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("conformity")
    uri = write_student(folder / "pets")
    np.save(folder / "pictures.npy", PICTURES)
    (folder / "encoded").mkdir()
    for seed in range(3):
        (folder / "encoded" / f"{seed}.png").write_bytes(png(seed))
    settings = ServingSettings(token_digests=(auth.digest(TOKEN),), grpc_port=free_port())
    url = app.deploy([uri], settings, port=free_port())
    yield Server(url, f"127.0.0.1:{settings.grpc_port}", Predictor(registry.load(uri), Limits()), folder)
    serve.shutdown()


def told(environment: str, script: str, *arguments: str) -> Any:
    python = ROOT / environment / "bin" / "python"
    assert python.exists(), f"`make clients` makes {environment}"
    done = subprocess.run([python, SCRIPTS / script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def triton(server: Server) -> dict[str, Any]:
    return told(
        ".venv-triton",
        "triton_client.py",
        server.http.removeprefix("http://"),
        server.grpc,
        TOKEN,
        "pets",
        str(server.folder / "pictures.npy"),
        str(server.folder / "encoded"),
    )


@pytest.fixture(scope="module")
def kserve(server: Server) -> dict[str, Any]:
    return told(
        ".venv-kserve", "kserve_client.py", server.http, server.grpc, TOKEN, "pets", str(server.folder / "pictures.npy")
    )


@pytest.mark.parametrize("client", ["http", "grpc"])
def test_triton_finds_what_there_is(server: Server, triton: dict[str, Any], client: str) -> None:
    answers = triton[client]
    assert answers["live"] is answers["ready"] is answers["model_ready"] is True
    assert "binary_tensor_data" in answers["server"]["extensions"]
    assert answers["model"]["name"] == "pets"
    assert [tensor["name"] for tensor in answers["model"]["inputs"]] == ["image", "image_uint8", "pixels"]
    (entry,) = answers["index"]
    assert (entry["name"], entry["state"]) == ("pets", "READY")


@pytest.mark.parametrize(
    ("client", "way"),
    [("http", "binary"), ("http", "json"), ("http", "gzip"), ("http", "deflate"), ("grpc", "binary")],
)
def test_triton_gets_the_students_numbers(server: Server, triton: dict[str, Any], client: str, way: str) -> None:
    np.testing.assert_allclose(triton[client][way], server.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("client", ["http", "grpc"])
def test_triton_sends_encoded_images_and_reads_classifications(
    server: Server, triton: dict[str, Any], client: str
) -> None:
    assert triton[client]["encoded"] == server.labels
    probabilities = server.predictor.predict(PICTURES).probabilities_NK
    for row, found in zip(probabilities, triton[client]["classified"], strict=True):
        expected = [f"{row[index]:.6f}:{index}:{LABELS[index]}" for index in np.argsort(-row)[:2]]
        for text, wanted in zip(found, expected, strict=True):
            assert text.split(":")[1:] == wanted.split(":")[1:]
            assert float(text.split(":")[0]) == pytest.approx(float(wanted.split(":")[0]), abs=2e-6)


@pytest.mark.parametrize(
    ("client", "what", "status", "message"),
    [
        ("http", "stranger", "401", "wants a token"),
        ("http", "absent", "404", "no student of this name"),
        ("http", "bad", "422", "image 3 of input 'image' cannot be used"),
        ("grpc", "stranger", "StatusCode.UNAUTHENTICATED", "wants a token"),
        ("grpc", "absent", "StatusCode.NOT_FOUND", "no student of this name"),
        ("grpc", "bad", "StatusCode.INVALID_ARGUMENT", "image 3 of input 'image' cannot be used"),
    ],
)
def test_triton_is_told_why(triton: dict[str, Any], client: str, what: str, status: str, message: str) -> None:
    answered, told_why = triton[client][what]
    assert answered == status
    assert message in told_why


@pytest.mark.parametrize(
    ("client", "way"), [("rest", "binary"), ("rest", "json"), ("grpc", "binary"), ("grpc", "contents")]
)
def test_kserve_gets_the_students_numbers(server: Server, kserve: dict[str, Any], client: str, way: str) -> None:
    answers = kserve[client]
    assert answers["live"] is answers["ready"] is answers["model_ready"] is True
    assert answers["id"] == "k"
    np.testing.assert_allclose(answers[way], server.logits, rtol=1e-5, atol=1e-5)
