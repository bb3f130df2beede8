"""serving/gateway.py: routes, limits and error documents, over the real ASGI application without Ray."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gzip
import json
import logging
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import openapi_spec_validator
import pytest
from starlette.types import ASGIApp

from serving import auth, gateway
from serving.desk import Desk, Offer, Served, Unavailable
from serving.predictor import Predictor
from serving.registry import Student
from serving.routing import Route
from serving.settings import ServingSettings
from tests.unit.serving.desks import InProcess, desk_of
from tests.unit.serving.students import LABELS, picture, png

PNG = {"Content-Type": "image/png"}
SETTINGS = ServingSettings(max_body_bytes=4096, max_images=4, request_timeout_s=0.2, authentication="off")


@pytest.fixture
def app(student: Student, backend: InProcess) -> ASGIApp:
    return gateway.application(desk_of(SETTINGS, Served(student, backend)), None)


@pytest.fixture
def app_of_two(student: Student, backend: InProcess) -> ASGIApp:
    other = dataclasses.replace(student, name="shoes")
    return gateway.application(desk_of(SETTINGS, Served(student, backend), Served(other, backend)), None)


def ask(app: ASGIApp, method: str, path: str, **request: Any) -> httpx.Response:
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


def test_what_there_is(app: ASGIApp, student: Student) -> None:
    assert ask(app, "GET", "/v2").json()["name"] == "pu-ray"
    assert ask(app, "GET", "/v2/health/live").json() == {"live": True}
    assert ask(app, "GET", "/v2/health/ready").json() == {"ready": True}
    (listed,) = ask(app, "GET", "/v2/models").json()["models"]
    assert (listed["name"], listed["versions"], listed["route"]["stable"]) == (
        "pets",
        [student.version],
        student.version,
    )
    assert ask(app, "POST", "/v2/repository/index").json() == [
        {"name": "pets", "version": student.version, "state": "READY", "reason": ""}
    ]
    for base in ("/v2/models/pets", f"/v2/models/pets/versions/{student.version}"):
        assert ask(app, "GET", base).json()["name"] == "pets"
        assert ask(app, "GET", f"{base}/ready").json() == {"name": "pets", "ready": True}


def test_not_ready(app_of_two: ASGIApp, backend: InProcess) -> None:
    backend.is_ready = False
    response = ask(app_of_two, "GET", "/v2/health/ready")
    assert response.status_code == 503
    assert response.json() == {"ready": False, "error": "not ready: pets, shoes"}
    response = ask(app_of_two, "GET", "/v2/models/shoes/ready")
    assert response.status_code == 503
    assert response.json() == {"name": "shoes", "ready": False, "error": "not ready: shoes"}
    assert ask(app_of_two, "GET", "/v2/health/live").status_code == 200


# -- answers --------------------------------------------------------------------------------------------------


def test_infer_without_content_type(app: ASGIApp, student: Student, predictor: Predictor) -> None:
    for base in ("/v2/models/pets", f"/v2/models/pets/versions/{student.version}"):
        response = ask(app, "POST", f"{base}/infer", content=infer_body(1, 2, id="a"))
        assert response.status_code == 200
        document = response.json()
        assert (document["id"], document["model_version"]) == ("a", student.version)
        expected = predictor.predict([png(1), png(2)]).logits_NK
        logits = next(output for output in document["outputs"] if output["name"] == "logits")
        np.testing.assert_allclose(np.array(logits["data"]).reshape(2, -1), expected, rtol=1e-6)


def test_classify(app: ASGIApp, student: Student, predictor: Predictor) -> None:
    response = ask(app, "POST", "/v1/classify?top_k=2", content=png(3), headers=PNG)
    document = response.json()
    assert (document["model"], document["version"]) == ("pets", student.version)
    expected = predictor.predict([png(3)]).top(0, 2)
    assert [(entry["index"], entry["probability"]) for entry in document["predictions"]] == expected
    assert [entry["label"] for entry in document["predictions"]] == [LABELS[index] for index, _ in expected]


def test_classify_never_returns_more_classes_than_there_are(app: ASGIApp) -> None:
    response = ask(app, "POST", "/v1/classify?top_k=999999999", content=png(3), headers=PNG)
    assert len(response.json()["predictions"]) == len(LABELS)


def test_classify_with_several_students(app_of_two: ASGIApp) -> None:
    status, message = error_of(ask(app_of_two, "POST", "/v1/classify", content=png(3), headers=PNG))
    assert (status, message) == (400, "there are several students, choose one with ?model=: pets, shoes")
    response = ask(app_of_two, "POST", "/v1/classify?model=shoes", content=png(3), headers=PNG)
    assert response.json()["model"] == "shoes"


# -- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v2/", 404, "Not Found"),
        ("GET", "/v3", 404, "Not Found"),
        ("POST", "/v2", 405, "Method Not Allowed"),
        ("GET", "/v2/models/pets/infer", 405, "Method Not Allowed"),
        ("DELETE", "/v2/models/pets", 405, "Method Not Allowed"),
        ("GET", "/v2/models/cars", 404, "there is no student of this name; there is: pets"),
        ("GET", "/v2/models/cars/ready", 404, "there is no student of this name; there is: pets"),
        ("POST", "/v2/models/cars/infer", 404, "there is no student of this name; there is: pets"),
        ("POST", "/v1/classify?model=cars", 404, "there is no student of this name; there is: pets"),
        ("GET", "/v2/models/pets/versions/2", 404, "'pets' has no such version; it has: "),
        ("POST", "/v2/models/pets/versions/2/infer", 404, "'pets' has no such version; it has: "),
        ("POST", "/v2/models/pets/infer", 400, "not valid UTF-8 JSON"),
        ("POST", "/v1/classify", 415, "Content-Type of image/..."),
        ("POST", "/v1/classify?topk=3", 400, "no such parameter: 'topk'; there are: model, version, top_k"),
        ("POST", "/v1/classify?top_k=0", 400, "top_k must be"),
        ("POST", "/v1/classify?top_k=-1", 400, "top_k must be"),
        ("POST", "/v1/classify?top_k=", 400, "top_k must be"),
        ("POST", "/v1/classify?top_k=9999999999", 400, "top_k must be"),
        ("POST", "/v1/classify?top_k=%D9%A3", 400, "top_k must be"),
    ],
)
def test_refusals(app: ASGIApp, method: str, path: str, status: int, message: str) -> None:
    answered, text = error_of(ask(app, method, path))
    assert answered == status
    assert message in text


def test_a_wrong_method_names_the_right_one(app: ASGIApp) -> None:
    assert ask(app, "POST", "/v1/classify/").status_code == 404
    assert ask(app, "GET", "/v1/classify").headers["Allow"] == "POST"


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [(b"hello", 415, "not_an_image"), (png(1)[:60], 422, "truncated"), (png(1, side_px=200), 413, "too_large")],
)
def test_classify_refuses_a_bad_image(app: ASGIApp, image: bytes, status: int, code: str) -> None:
    answered, message = error_of(ask(app, "POST", "/v1/classify", content=image, headers=PNG))
    assert answered == status
    assert message.startswith(f"the image cannot be used: {code}")


def test_too_many_images(app: ASGIApp) -> None:
    status, message = error_of(ask(app, "POST", "/v2/models/pets/infer", content=_five_images()))
    assert status == 422
    assert "with 1 to 4 images" in message


def _five_images() -> bytes:
    return json.dumps({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [5], "data": [""] * 5}]}).encode()


def test_a_declared_body_over_the_limit_is_refused_unread(app: ASGIApp) -> None:
    status, message = error_of(ask(app, "POST", "/v1/classify", content=bytes(4097), headers=PNG))
    assert (status, message) == (413, "the body is larger than 4096 bytes")
    headers = PNG | {"Content-Length": "9" * 30}
    assert ask(app, "POST", "/v1/classify", content=b"", headers=headers).status_code == 413


def test_a_streamed_body_is_counted(app: ASGIApp) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < 1000:
            taken += 1
            yield bytes(1000)

    response = ask(app, "POST", "/v1/classify", content=endless(), headers=PNG)
    assert response.status_code == 413
    assert taken == 5


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_may_be_compressed_both_ways(app: ASGIApp, encoding: str, compress: Callable[[bytes], bytes]) -> None:
    plain = ask(app, "POST", "/v2/models/pets/infer", content=infer_body(1, 2, 3, 4))
    headers = {"Content-Encoding": encoding, "Accept-Encoding": encoding}
    content = infer_body(1, 2, 3, 4)
    response = ask(app, "POST", "/v2/models/pets/infer", content=compress(content), headers=headers)
    assert response.json() == plain.json()
    # A small answer stays as it is.
    assert "Content-Encoding" not in response.headers


@pytest.mark.parametrize(
    ("encoding", "content", "status", "message"),
    [
        ("gzip", gzip.compress(bytes(10_000_000)), 413, "larger than 4096 bytes"),
        ("deflate", zlib.compress(bytes(10_000_000)), 413, "larger than 4096 bytes"),
        ("gzip", b"no gzip", 400, "not compressed as its Content-Encoding says"),
        ("gzip", gzip.compress(png(1))[:-9], 400, "cut off"),
        ("br", b"", 415, "must be one of: gzip, deflate"),
    ],
)
def test_what_is_compressed_badly_is_refused(
    app: ASGIApp, encoding: str, content: bytes, status: int, message: str
) -> None:
    headers = PNG | {"Content-Encoding": encoding}
    answered, text = error_of(ask(app, "POST", "/v1/classify", content=content, headers=headers))
    assert answered == status
    assert message in text


def test_compressed_bytes_that_hold_nothing_are_counted_too(app: ASGIApp) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        yield b"\x78\x9c"
        while taken < 10_000:
            taken += 1
            yield b"\x00\x00\x00\xff\xff" * 100  # stored blocks of no bytes (RFC 1951)

    headers = PNG | {"Content-Encoding": "deflate"}
    response = ask(app, "POST", "/v1/classify", content=endless(), headers=headers)
    assert error_of(response) == (413, "the body is larger than 4096 bytes")
    assert taken < 20


def test_a_body_that_never_ends_is_given_up(app: ASGIApp) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(30)

    status, message = error_of(ask(app, "POST", "/v1/classify", content=stalled(), headers=PNG))
    assert (status, message) == (408, "the body took longer than 0.2 s")


def test_an_answer_that_never_comes_is_given_up(app: ASGIApp, backend: InProcess) -> None:
    backend.delay_s = 30
    status, message = error_of(ask(app, "POST", "/v1/classify", content=png(1), headers=PNG))
    assert (status, message) == (504, "no answer within 0.2 s")


def test_an_absent_student_asks_to_come_back(app: ASGIApp, backend: InProcess) -> None:
    backend.failure = Unavailable("too many requests are waiting for this student")
    response = ask(app, "POST", "/v1/classify", content=png(1), headers=PNG)
    assert error_of(response) == (503, "too many requests are waiting for this student")
    assert response.headers["Retry-After"] == "1"


def test_requests_over_the_limit_are_refused_and_probes_are_not(app: ASGIApp, backend: InProcess) -> None:
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
    app: ASGIApp, backend: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    backend.failure = RuntimeError("secret detail")
    response = ask(app, "POST", "/v1/classify", content=png(1), headers=PNG)
    assert error_of(response) == (500, "internal error; the server's log tells more")
    assert "secret detail" in caplog.text


def _own_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ray.serve.pu_ray"]


def test_log_lines_carry_counts_and_no_payload(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ask(app, "POST", "/v2/models/pets/infer", content=infer_body(1, 2, id="my-private-id"))
    (line,) = _own_lines(caplog)
    for told in ("route=/v2/models/{model}/infer", "model=pets", "images=2", "failed=0", "status=200", "client=anyone"):
        assert told in line
    assert "my-private-id" not in caplog.text


# -- for people -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Type": "application/octet-stream"}, png(3)),
        ({"Content-Type": "application/json"}, json.dumps({"image": base64.b64encode(png(3)).decode()}).encode()),
        (
            {"Content-Type": "application/json"},
            json.dumps({"image": "data:image/png;base64," + base64.b64encode(png(3)).decode()}).encode(),
        ),
    ],
)
def test_a_picture_comes_in_several_ways(app: ASGIApp, headers: dict[str, str], body: bytes) -> None:
    expected = ask(app, "POST", "/v1/classify", content=png(3), headers=PNG).json()
    assert ask(app, "POST", "/v1/classify", content=body, headers=headers).json() == expected
    assert ask(app, "POST", "/v1/classify", files={"file": ("a.png", png(3), "image/png")}).json() == expected


@pytest.mark.parametrize(
    ("kind", "body", "status", "message"),
    [
        ("application/json", b"{", 400, "not valid UTF-8 JSON"),
        ("application/json", b"[" * 3000, 400, "not valid UTF-8 JSON"),
        ("application/json", b"[]", 422, "base64 under 'image', got nothing"),
        ("application/json", b'{"image": 3}', 422, "got a number"),
        ("application/json", b'{"image": "%%%"}', 422, "not base64"),
        ("multipart/form-data", b"", 400, "the form cannot be read"),
        ("multipart/form-data; boundary=b", b"--b\r\nnonsense", 422, "exactly one file"),
        ("multipart/form-data; boundary=b", b"nonsense", 400, "the form cannot be read"),
        ("multipart/form-data; boundary=b", b"--b--\r\n", 422, "exactly one file"),
        ("text/plain", png(3), 415, "the body must be one encoded image"),
    ],
)
def test_a_picture_that_comes_otherwise_is_refused(
    app: ASGIApp, kind: str, body: bytes, status: int, message: str
) -> None:
    answered, text = error_of(ask(app, "POST", "/v1/classify", content=body, headers={"Content-Type": kind}))
    assert answered == status
    assert message in text


def test_a_form_needs_one_file_of_that_name(app: ASGIApp) -> None:
    for files in ([("picture", ("a.png", png(3)))], [("file", ("a.png", png(3)))] * 2):
        assert error_of(ask(app, "POST", "/v1/classify", files=files)) == (
            422,
            f"the form needs exactly one file in a field 'file', got {len(files) if files[0][0] == 'file' else 0}",
        )


def test_the_page_needs_nothing_from_elsewhere(app: ASGIApp) -> None:
    page = ask(app, "GET", "/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert "http" not in page.text.replace("https://", "http://").replace('content="', "")
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        assert f"page/{name}" in page.text
        assert ask(app, "GET", f"/page/{name}").headers["Content-Type"].startswith(kind)
    assert ask(app, "GET", "/page/docs.html.j2").status_code == 404


def test_the_documentation_lists_every_route(app: ASGIApp) -> None:
    described = ask(app, "GET", "/openapi.json").json()
    page = ask(app, "GET", "/docs").text
    for path, methods in described["paths"].items():
        assert path in page
        example = path.replace("{model}", "pets").replace("{version}", "stable")
        for method in methods:
            assert ask(app, method.upper(), example).status_code not in (404, 405), example


def test_the_description_is_valid(app_of_two: ASGIApp) -> None:
    described = ask(app_of_two, "GET", "/openapi.json").json()
    openapi_spec_validator.validate(described)
    assert described["paths"]["/v1/classify"]["post"]["parameters"][0]["schema"]["enum"] == ["pets", "shoes"]


# -- tokens ---------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(student: Student, backend: InProcess) -> ASGIApp:
    return gateway.application(
        desk_of(SETTINGS, Served(student, backend)), auth.Guard([auth.digest("secret")], read=None)
    )


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "secret"}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}]
)
def test_strangers_are_sent_away_before_their_body_is_read(guarded: ASGIApp, headers: dict[str, str]) -> None:
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        taken += 1
        yield png(1)

    for method, path in (("POST", "/v1/classify"), ("GET", "/v2/models"), ("GET", "/v2"), ("GET", "/nothing")):
        response = ask(guarded, method, path, content=body(), headers=headers)
        assert error_of(response)[0] == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert taken == 0


def test_a_token_opens_and_probes_are_open(guarded: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        headers = PNG | {"Authorization": "Bearer secret"}
        assert ask(guarded, "POST", "/v1/classify", content=png(1), headers=headers).status_code == 200
    (line,) = _own_lines(caplog)
    assert "client=token 1" in line
    assert "secret" not in line
    for path in ("/v2/health/live", "/v2/health/ready", "/", "/docs", "/openapi.json", "/page/page.js"):
        assert ask(guarded, "GET", path).status_code == 200


# -- one line for every request -------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 65, False), ("", False)])
def test_every_answer_has_an_id(app: ASGIApp, given: str, kept: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        response = ask(app, "GET", "/v2/nothing?token=x", headers={"X-Request-ID": given})
    number = response.headers["X-Request-ID"]
    assert (number == given) == kept
    (line,) = _own_lines(caplog)
    assert f"id={number} " in line
    assert "token=x" not in line
    assert "/v2/nothing" not in line


# -- versions -------------------------------------------------------------------------------------------------


def test_a_version_is_asked_for_by_name_or_alias(student: Student, backend: InProcess) -> None:
    other = dataclasses.replace(student, version="second")
    desk = Desk(
        {"pets": Offer(Route(stable=student.version, aliases={"next": "second"}), {
            each.version: Served(each, backend) for each in (student, other)})},
        SETTINGS,
        2,
    )  # fmt: skip
    app = gateway.application(desk, None)
    assert ask(app, "GET", "/v2/models/pets").json()["versions"] == [student.version, "second"]
    for asked, version in (("stable", student.version), ("next", "second"), ("second", "second")):
        response = ask(app, "POST", f"/v2/models/pets/versions/{asked}/infer", content=infer_body(1))
        assert response.json()["model_version"] == version
        response = ask(app, "POST", f"/v1/classify?version={asked}", content=png(1), headers=PNG)
        assert response.json()["version"] == version
