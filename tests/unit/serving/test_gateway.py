"""serving/gateway.py: routes, limits and error documents, over the real ASGI application without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette

from serving import gateway
from serving.predictor import Images, Predictions, Predictor
from serving.registry import Student
from serving.settings import ServingSettings
from tests.unit.serving.students import LABELS, picture, png

PNG = {"Content-Type": "image/png"}
SETTINGS = ServingSettings(max_body_bytes=4096, max_images=4, request_timeout_s=0.2)


class InProcess:
    """A backend without processes; misbehaves on demand."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.is_ready = True
        self.failure: Exception | None = None
        self.delay_s = 0.0

    async def predict(self, images: Images) -> Predictions:
        await asyncio.sleep(self.delay_s)
        if self.failure:
            raise self.failure
        return self._predictor.predict(images)

    async def ready(self) -> bool:
        return self.is_ready


@pytest.fixture
def backend(predictor: Predictor) -> InProcess:
    return InProcess(predictor)


@pytest.fixture
def app(student: Student, backend: InProcess) -> Starlette:
    return gateway.application([student], {"pets": backend}, SETTINGS, max_requests=2)


@pytest.fixture
def app_of_two(student: Student, backend: InProcess) -> Starlette:
    other = dataclasses.replace(student, name="shoes")
    return gateway.application([student, other], {"pets": backend, "shoes": backend}, SETTINGS, max_requests=2)


def ask(app: Starlette, method: str, path: str, **request: Any) -> httpx.Response:
    async def asking() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, path, **request)

    return asyncio.run(asking())


def infer_body(*images: int, **changes: Any) -> bytes:
    pictures = np.stack([picture(seed) for seed in images])
    tensor = {"name": "image_uint8", "datatype": "UINT8", "shape": list(pictures.shape), "data": pictures.tolist()}
    return json.dumps({"inputs": [tensor], **changes}).encode()


def error_of(response: httpx.Response) -> tuple[int, str]:
    document = response.json()
    assert list(document) == ["error"]
    return response.status_code, document["error"]


# -- documents ------------------------------------------------------------------------------------------------


def test_what_there_is(app: Starlette, student: Student) -> None:
    assert ask(app, "GET", "/v2").json()["name"] == "pu-ray"
    assert ask(app, "GET", "/v2/health/live").json() == {"live": True}
    assert ask(app, "GET", "/v2/health/ready").json() == {"ready": True}
    assert ask(app, "GET", "/v2/models").json() == {"models": [{"name": "pets", "versions": [student.version]}]}
    for base in ("/v2/models/pets", f"/v2/models/pets/versions/{student.version}"):
        assert ask(app, "GET", base).json()["name"] == "pets"
        assert ask(app, "GET", f"{base}/ready").json() == {"name": "pets", "ready": True}


def test_not_ready(app_of_two: Starlette, backend: InProcess) -> None:
    backend.is_ready = False
    response = ask(app_of_two, "GET", "/v2/health/ready")
    assert response.status_code == 503
    assert response.json() == {"ready": False, "error": "not ready: pets, shoes"}
    response = ask(app_of_two, "GET", "/v2/models/shoes/ready")
    assert response.status_code == 503
    assert response.json() == {"name": "shoes", "ready": False, "error": "not ready: shoes"}
    assert ask(app_of_two, "GET", "/v2/health/live").status_code == 200


# -- answers --------------------------------------------------------------------------------------------------


def test_infer_without_content_type(app: Starlette, student: Student, predictor: Predictor) -> None:
    for base in ("/v2/models/pets", f"/v2/models/pets/versions/{student.version}"):
        response = ask(app, "POST", f"{base}/infer", content=infer_body(1, 2, id="a"))
        assert response.status_code == 200
        document = response.json()
        assert (document["id"], document["model_version"]) == ("a", student.version)
        expected = predictor.predict([png(1), png(2)]).logits_NK
        logits = next(output for output in document["outputs"] if output["name"] == "logits")
        np.testing.assert_allclose(np.array(logits["data"]).reshape(2, -1), expected, rtol=1e-6)


def test_classify(app: Starlette, student: Student, predictor: Predictor) -> None:
    response = ask(app, "POST", "/v1/classify?top_k=2", content=png(3), headers=PNG)
    document = response.json()
    assert (document["model"], document["version"]) == ("pets", student.version)
    expected = predictor.predict([png(3)]).top(0, 2)
    assert [(entry["index"], entry["probability"]) for entry in document["predictions"]] == expected
    assert [entry["label"] for entry in document["predictions"]] == [LABELS[index] for index, _ in expected]


def test_classify_never_returns_more_classes_than_there_are(app: Starlette) -> None:
    response = ask(app, "POST", "/v1/classify?top_k=999999999", content=png(3), headers=PNG)
    assert len(response.json()["predictions"]) == len(LABELS)


def test_classify_with_several_students(app_of_two: Starlette) -> None:
    status, message = error_of(ask(app_of_two, "POST", "/v1/classify", content=png(3), headers=PNG))
    assert (status, message) == (400, "there are several students, choose one with ?model=: pets, shoes")
    response = ask(app_of_two, "POST", "/v1/classify?model=shoes", content=png(3), headers=PNG)
    assert response.json()["model"] == "shoes"


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 404, "Not Found"),
        ("GET", "/v2/", 404, "Not Found"),
        ("GET", "/v3", 404, "Not Found"),
        ("POST", "/v2", 405, "Method Not Allowed"),
        ("GET", "/v2/models/pets/infer", 405, "Method Not Allowed"),
        ("DELETE", "/v2/models/pets", 405, "Method Not Allowed"),
        ("GET", "/v2/models/cars", 404, "there is no student of this name; there is: pets"),
        ("GET", "/v2/models/cars/ready", 404, "there is no student of this name; there is: pets"),
        ("POST", "/v2/models/cars/infer", 404, "there is no student of this name; there is: pets"),
        ("POST", "/v1/classify?model=cars", 404, "there is no student of this name; there is: pets"),
        ("GET", "/v2/models/pets/versions/2", 404, "'pets' has no such version; it is "),
        ("POST", "/v2/models/pets/versions/2/infer", 404, "'pets' has no such version; it is "),
        ("POST", "/v2/models/pets/infer", 400, "not valid UTF-8 JSON"),
        ("POST", "/v1/classify", 415, "Content-Type of image/..."),
        ("POST", "/v1/classify?top_k=0", 400, "top_k must be"),
        ("POST", "/v1/classify?top_k=-1", 400, "top_k must be"),
        ("POST", "/v1/classify?top_k=", 400, "top_k must be"),
        ("POST", "/v1/classify?top_k=9999999999", 400, "top_k must be"),
        ("POST", "/v1/classify?top_k=%D9%A3", 400, "top_k must be"),
    ],
)
def test_refusals(app: Starlette, method: str, path: str, status: int, message: str) -> None:
    answered, text = error_of(ask(app, method, path))
    assert answered == status
    assert message in text


def test_a_wrong_method_names_the_right_one(app: Starlette) -> None:
    assert ask(app, "POST", "/v1/classify/").status_code == 404
    assert ask(app, "GET", "/v1/classify").headers["Allow"] == "POST"


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [(b"hello", 415, "not_an_image"), (png(1)[:60], 422, "truncated"), (png(1, side_px=200), 413, "too_large")],
)
def test_classify_refuses_a_bad_image(app: Starlette, image: bytes, status: int, code: str) -> None:
    answered, message = error_of(ask(app, "POST", "/v1/classify", content=image, headers=PNG))
    assert answered == status
    assert message.startswith(f"the image cannot be used: {code}")


def test_too_many_images(app: Starlette) -> None:
    status, message = error_of(ask(app, "POST", "/v2/models/pets/infer", content=_five_images()))
    assert status == 422
    assert "with 1 to 4 images" in message


def _five_images() -> bytes:
    return json.dumps({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [5], "data": [""] * 5}]}).encode()


def test_a_declared_body_over_the_limit_is_refused_unread(app: Starlette) -> None:
    status, message = error_of(ask(app, "POST", "/v1/classify", content=bytes(4097), headers=PNG))
    assert (status, message) == (413, "the body is larger than 4096 bytes")
    headers = PNG | {"Content-Length": "9" * 30}
    assert ask(app, "POST", "/v1/classify", content=b"", headers=headers).status_code == 413


def test_a_streamed_body_is_counted(app: Starlette) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < 1000:
            taken += 1
            yield bytes(1000)

    response = ask(app, "POST", "/v1/classify", content=endless(), headers=PNG)
    assert response.status_code == 413
    assert taken == 5


def test_a_compressed_body_is_refused(app: Starlette) -> None:
    headers = PNG | {"Content-Encoding": "gzip"}
    assert ask(app, "POST", "/v1/classify", content=b"", headers=headers).status_code == 415


def test_a_body_that_never_ends_is_given_up(app: Starlette) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(30)

    status, message = error_of(ask(app, "POST", "/v1/classify", content=stalled(), headers=PNG))
    assert (status, message) == (408, "the body took longer than 0.2 s")


def test_an_answer_that_never_comes_is_given_up(app: Starlette, backend: InProcess) -> None:
    backend.delay_s = 30
    status, message = error_of(ask(app, "POST", "/v1/classify", content=png(1), headers=PNG))
    assert (status, message) == (504, "no answer within 0.2 s")


def test_an_absent_student_asks_to_come_back(app: Starlette, backend: InProcess) -> None:
    backend.failure = gateway.Unavailable("too many requests are waiting for this student")
    response = ask(app, "POST", "/v1/classify", content=png(1), headers=PNG)
    assert error_of(response) == (503, "too many requests are waiting for this student")
    assert response.headers["Retry-After"] == "1"


def test_requests_over_the_limit_are_refused_and_probes_are_not(app: Starlette, backend: InProcess) -> None:
    backend.delay_s = 0.1

    async def asking() -> tuple[list[httpx.Response], httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            posts = [client.post("/v1/classify", content=png(1), headers=PNG) for _ in range(3)]
            *answers, live = await asyncio.gather(*posts, client.get("/v2/health/live"))
            answers.append(await client.post("/v1/classify", content=png(1), headers=PNG))
            return answers, live

    answers, live = asyncio.run(asking())
    assert [response.status_code for response in answers] == [200, 200, 503, 200]
    assert error_of(answers[2]) == (503, "too many requests are being answered")
    assert answers[2].headers["Retry-After"] == "1"
    assert live.status_code == 200


def test_an_unexpected_error_tells_the_log_and_not_the_client(
    app: Starlette, backend: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    backend.failure = RuntimeError("secret detail")
    response = ask(app, "POST", "/v1/classify", content=png(1), headers=PNG)
    assert error_of(response) == (500, "internal error; the server's log tells more")
    assert "secret detail" in caplog.text


def test_log_lines_carry_counts_and_no_payload(app: Starlette, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ask(app, "POST", "/v2/models/pets/infer", content=infer_body(1, 2, id="my-private-id"))
    messages = [record.getMessage() for record in caplog.records if record.name == "ray.serve.pu_ray"]
    assert len(messages) == 1
    assert messages[0].startswith("predicted model=pets images=2 failed=0 seconds=")
    assert "my-private-id" not in caplog.text
