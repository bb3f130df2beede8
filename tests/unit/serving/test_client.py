"""serving/client.py: answers, and what each kind of failure becomes."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pu_ray.errors import ClusterError, ConfigError, DataError, PuRayError
from serving import auth, client


class Stub(HTTPServer):
    """A server that gives one prepared answer and remembers what it was asked."""

    status = 200
    answer = b"{}"
    asked = ""
    body = b""
    delay_s = 0.0
    headers: ClassVar[dict[str, str]] = {}
    authorization: str | None = None
    requests = 0
    failures = 0  # of the first requests: told to come back, or cut off where the status is 0
    failure_status = 503

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def _answer(self) -> None:
        self.server.asked = f"{self.command} {self.path}"
        self.server.authorization = self.headers.get("Authorization")
        self.server.requests += 1
        self.server.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        threading.Event().wait(self.server.delay_s)
        if self.server.requests <= self.server.failures:
            if self.server.failure_status == 0:
                self.close_connection = True
                return
            self.send_response(self.server.failure_status)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(url: str, question: Callable[[Any], Any], **options: Any) -> Any:
    """Ask both clients, which must agree: in what they say, and in how they fail."""

    async def asynchronously() -> Any:
        async with client.AsyncClient(url, **options) as each:
            return await question(each)

    answers: list[Any] = []
    for way in (lambda: asyncio.run(asynchronously()), lambda: _synchronously(url, question, **options)):
        try:
            answers.append(way())
        except PuRayError as error:
            answers.append(error)
    one, other = answers
    assert type(one) is type(other)
    # What a socket says of itself differs.
    assert getattr(one, "problem", one) == getattr(other, "problem", other)
    if isinstance(other, PuRayError):
        raise other
    return other


def _synchronously(url: str, question: Callable[[Any], Any], **options: Any) -> Any:
    with client.Client(url, **options) as each:
        return question(each)


def test_classify(stub: Stub) -> None:
    entry = {"label": "dog", "index": 1, "probability": 0.75}
    stub.answer = json.dumps({"model": "pets", "version": "v1", "predictions": [entry]}).encode()
    answer = ask(f"{stub.url}/", lambda each: each.classify(b"image", model="pets", version="stable", top_k=1))
    assert answer == client.Classification("pets", "v1", (client.Prediction("dog", 1, 0.75),))
    assert stub.asked == "POST /v1/classify?top_k=1&model=pets&version=stable"
    assert stub.body == b"image"


def test_no_model_leaves_the_choice_to_the_server(stub: Stub) -> None:
    stub.status = 400
    stub.answer = b'{"error": "there are several students, choose one with ?model=: pets, shoes"}'
    with pytest.raises(DataError, match="pets, shoes") as refusal:
        ask(stub.url, lambda each: each.classify(b"image"))
    assert stub.asked == "POST /v1/classify?top_k=5"
    assert refusal.value.got == "HTTP 400"


def test_models(stub: Stub) -> None:
    stub.answer = b'{"models": [{"name": "pets", "versions": ["v1"]}]}'
    assert ask(stub.url, lambda each: each.models()) == (client.ServedModel("pets", ("v1",)),)


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [
        (404, DataError, None),
        (413, DataError, None),
        (422, DataError, None),
        (408, ClusterError, "try again"),
        (503, ClusterError, "try again"),
        (429, ClusterError, "try again"),
        (401, ConfigError, "set PU_RAY_TOKEN to a token that the server knows"),
        (504, ClusterError, "try again"),
        (500, ClusterError, "look at the server's log"),
    ],
)
def test_error_documents(stub: Stub, status: int, kind: type[Exception], hint: str | None) -> None:
    stub.status, stub.answer = status, b'{"error": "what went wrong"}'
    with pytest.raises(kind, match="what went wrong") as refusal:
        ask(stub.url, lambda each: each.models(), attempts=1)
    assert getattr(refusal.value, "hint", None) == hint


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (200, b"<html>"),
        (502, b"<html>"),
        (404, b"[]"),
        (404, b'{"detail": "x"}'),
        (200, b"[]"),
        (200, b'{"models": [{}]}'),
    ],
)
def test_a_stranger_is_told_apart(stub: Stub, status: int, answer: bytes) -> None:
    stub.status, stub.answer = status, answer
    with pytest.raises(ClusterError, match="not a PU-Ray server"):
        ask(stub.url, lambda each: each.models())
    with pytest.raises(ClusterError, match="not a PU-Ray server"):
        ask(stub.url, lambda each: each.classify(b""))


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ClusterError, match="the server cannot be reached") as refusal:
            ask(url, lambda each: each.models(), attempts=2)
    assert refusal.value.where == url
    assert "pu-ray serve" in str(refusal.value.hint)


def test_a_silent_server(stub: Stub) -> None:
    stub.delay_s = 1.0
    with pytest.raises(ClusterError, match=r"did not answer within 0\.1 s"):
        ask(stub.url, lambda each: each.models(), timeout_s=0.1)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port"])
def test_not_a_url(url: str) -> None:
    with pytest.raises(ConfigError, match="not the URL of a server"):
        client.Client(url)
    with pytest.raises(ConfigError, match="not the URL of a server"):
        client.AsyncClient(url)


# -- patience -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [503, 429, 0, 500, 502])  # the last two without a word of ours: a proxy's
def test_a_busy_server_and_a_lost_connection_are_tried_again(stub: Stub, status: int) -> None:
    stub.answer, stub.failures, stub.failure_status = b'{"models": []}', 3, status
    with client.Client(stub.url) as each:
        assert each.models() == ()
    assert stub.requests == 4
    assert stub.asked == "GET /v2/models"


@pytest.mark.parametrize("status", [500, 400, 504])
def test_what_will_not_get_better_is_not_tried_again(stub: Stub, status: int) -> None:
    stub.status, stub.answer = status, b'{"error": "no"}'
    with client.Client(stub.url) as each, pytest.raises(PuRayError):
        each.models()
    assert stub.requests == 1


def test_patience_ends(stub: Stub) -> None:
    stub.failures = 100
    with client.Client(stub.url, attempts=3) as each, pytest.raises(ClusterError):
        each.classify(b"image")
    assert stub.requests == 3


# -- tokens ---------------------------------------------------------------------------------------------------


def test_the_token_is_shown(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(auth.TOKEN_VARIABLE, raising=False)
    stub.answer = b'{"models": []}'
    shown = []
    for prepare in (
        lambda: None,
        auth.own_token,
        lambda: monkeypatch.setenv(auth.TOKEN_VARIABLE, "from-the-environment"),
    ):
        prepare()
        ask(stub.url, lambda each: each.models())
        shown.append(stub.authorization)
    ask(stub.url, lambda each: each.models(), token="given")
    assert [*shown, stub.authorization] == [
        None,
        f"Bearer {auth.own_token()}",
        "Bearer from-the-environment",
        "Bearer given",
    ]
