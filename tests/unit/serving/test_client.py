"""serving/client.py: answers, and what each kind of failure becomes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pu_ray.errors import ClusterError, ConfigError, DataError
from serving import client


class Stub(HTTPServer):
    """A server that gives one prepared answer and remembers what it was asked."""

    status = 200
    answer = b"{}"
    asked = ""
    body = b""
    delay_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def _answer(self) -> None:
        self.server.asked = f"{self.command} {self.path}"
        self.server.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        threading.Event().wait(self.server.delay_s)
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


def test_classify(stub: Stub) -> None:
    entry = {"label": "dog", "index": 1, "probability": 0.75}
    stub.answer = json.dumps({"model": "pets", "version": "v1", "predictions": [entry]}).encode()
    answer = client.classify(f"{stub.url}/", "pets", b"image", top_k=1)
    assert answer == client.Classification("pets", "v1", (client.Prediction("dog", 1, 0.75),))
    assert stub.asked == "POST /v1/classify?top_k=1&model=pets"
    assert stub.body == b"image"


def test_no_model_leaves_the_choice_to_the_server(stub: Stub) -> None:
    stub.status = 400
    stub.answer = b'{"error": "there are several students, choose one with ?model=: pets, shoes"}'
    with pytest.raises(DataError, match="pets, shoes") as refusal:
        client.classify(stub.url, None, b"image")
    assert stub.asked == "POST /v1/classify?top_k=5"
    assert refusal.value.got == "HTTP 400"


def test_models(stub: Stub) -> None:
    stub.answer = b'{"models": [{"name": "pets", "versions": ["v1"]}]}'
    assert client.models(stub.url) == (client.ServedModel("pets", ("v1",)),)


@pytest.mark.parametrize(
    ("status", "kind", "hint"),
    [
        (404, DataError, None),
        (413, DataError, None),
        (422, DataError, None),
        (408, ClusterError, "try again"),
        (503, ClusterError, "try again"),
        (504, ClusterError, "try again"),
        (500, ClusterError, "look at the server's log"),
    ],
)
def test_error_documents(stub: Stub, status: int, kind: type[Exception], hint: str | None) -> None:
    stub.status, stub.answer = status, b'{"error": "what went wrong"}'
    with pytest.raises(kind, match="what went wrong") as refusal:
        client.models(stub.url)
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
        client.models(stub.url)
    with pytest.raises(ClusterError, match="not a PU-Ray server"):
        client.classify(stub.url, None, b"")


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ClusterError, match="the server cannot be reached") as refusal:
            client.models(url)
    assert refusal.value.where == url
    assert "pu-ray serve" in str(refusal.value.hint)


def test_a_silent_server(stub: Stub) -> None:
    stub.delay_s = 1.0
    with pytest.raises(ClusterError, match=r"did not answer within 0\.1 s"):
        client.models(stub.url, timeout_s=0.1)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port"])
def test_not_a_url(url: str) -> None:
    with pytest.raises(ConfigError, match="not the URL of a server"):
        client.models(url)
