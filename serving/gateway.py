"""The HTTP face of the students: routes, limits, and one form for every error. Starlette, without Ray.

Handlers read the raw body, because clients of the Open Inference Protocol send JSON without a Content-Type. Every
error is `{"error": "..."}`, the framework's own (404, 405, 500) included. Log lines name students, counts and
times, never what was sent.

    GET  /v2   /v2/health/live   /v2/health/ready   /v2/models   /v2/models/{m}   /v2/models/{m}/ready
    POST /v2/models/{m}/infer          each of the three also as /v2/models/{m}/versions/{v}...
    POST /v1/classify?model=&top_k=    body: one encoded image
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pu_ray.images import ImageError
from serving import protocol
from serving.predictor import Images, Predictions
from serving.protocol import ProtocolError
from serving.registry import Student
from serving.settings import ServingSettings

# Replicas of Ray Serve show this logger and its children; any other name would be swallowed there.
_log = logging.getLogger("ray.serve.pu_ray")

_DEFAULT_TOP_K = 5
_IMAGE_STATUS = {"too_large": 413, "not_an_image": 415, "unsupported": 415}

Handler = Callable[[Request], Awaitable[Response]]


class Unavailable(Exception):
    """The student cannot answer now, but may soon: too many wait already, or its process is being replaced."""


class Backend(Protocol):
    """Where a student's answers come from."""

    async def predict(self, images: Images) -> Predictions:
        """Answer N images.

        Raises:
            Unavailable: Not now.
        """
        ...

    async def ready(self) -> bool:
        """Whether a request would be answered."""
        ...


def application(
    students: Sequence[Student], backends: Mapping[str, Backend], settings: ServingSettings, max_requests: int
) -> Starlette:
    """The web application.

    Args:
        students: Whom to announce; names are unique.
        backends: By student's name.
        settings: Limits of body, images and time.
        max_requests: Requests with a body that may be inside at once, and so of the memory they take; more are told
            to come back (503) before their bodies are read.
    """
    gateway = _Gateway({student.name: student for student in students}, backends, settings)
    admission = _Admission(max_requests)
    model = "/v2/models/{model}"
    version = model + "/versions/{version}"
    routes: list[tuple[str, str, Handler]] = [
        ("GET", "/v2", gateway.server),
        ("GET", "/v2/health/live", gateway.live),
        ("GET", "/v2/health/ready", gateway.ready),
        ("GET", "/v2/models", gateway.models),
        ("POST", "/v1/classify", admission.limit(gateway.classify)),
    ]
    for base in (model, version):
        routes += [
            ("GET", base, gateway.model),
            ("GET", f"{base}/ready", gateway.model_ready),
            ("POST", f"{base}/infer", admission.limit(gateway.infer)),
        ]
    app = Starlette(
        routes=[Route(path, _with_json_errors(handler), methods=[method]) for method, path, handler in routes],
        exception_handlers={HTTPException: _framework_error},
    )
    app.router.redirect_slashes = False
    return app


class _Admission:
    """Counts the requests inside; documents and probes are never counted."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._inside = 0

    def limit(self, handler: Handler) -> Handler:
        async def admitted(request: Request) -> Response:
            if self._inside >= self._max_requests:
                raise Unavailable("too many requests are being answered")
            self._inside += 1
            try:
                return await handler(request)
            finally:
                self._inside -= 1

        return admitted


class _Gateway:
    def __init__(
        self, students: Mapping[str, Student], backends: Mapping[str, Backend], settings: ServingSettings
    ) -> None:
        self._students = students
        self._backends = backends
        self._settings = settings

    # -- what there is ------------------------------------------------------------------------------------

    async def server(self, _request: Request) -> Response:
        return JSONResponse(protocol.server_metadata())

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, _request: Request) -> Response:
        names = list(self._students)
        answers = await asyncio.gather(*(self._backends[name].ready() for name in names))
        waiting = [name for name, is_ready in zip(names, answers, strict=True) if not is_ready]
        if waiting:
            return JSONResponse({"ready": False, "error": f"not ready: {', '.join(waiting)}"}, 503)
        return JSONResponse({"ready": True})

    async def models(self, _request: Request) -> Response:
        listed = [{"name": student.name, "versions": [student.version]} for student in self._students.values()]
        return JSONResponse({"models": listed})

    async def model(self, request: Request) -> Response:
        return JSONResponse(protocol.model_metadata(self._addressed(request)))

    async def model_ready(self, request: Request) -> Response:
        student = self._addressed(request)
        if not await self._backends[student.name].ready():
            return JSONResponse({"name": student.name, "ready": False, "error": f"not ready: {student.name}"}, 503)
        return JSONResponse({"name": student.name, "ready": True})

    # -- answers ------------------------------------------------------------------------------------------

    async def infer(self, request: Request) -> Response:
        student = self._addressed(request)
        body = await self._read_body(request)
        header_length = request.headers.get(protocol.HEADER_LENGTH)
        wanted = protocol.parse_infer(body, header_length, student, self._settings.max_images)
        reply = protocol.format_infer(wanted, await self._predict(student, wanted.images), student)
        return Response(reply.body, headers=reply.headers)

    async def classify(self, request: Request) -> Response:
        student = self._chosen(request)
        count = _top_k(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind != "application/octet-stream":
            raise ProtocolError(415, "the body must be one encoded image with a Content-Type of image/...")
        image = await self._read_body(request)
        predictions = await self._predict(student, [image])
        if 0 in predictions.failures:
            raise _image_error(predictions.failures[0])
        best = [
            {"label": student.labels[index], "index": index, "probability": probability}
            for index, probability in predictions.top(0, count)
        ]
        return JSONResponse({"model": student.name, "version": student.version, "predictions": best})

    def _addressed(self, request: Request) -> Student:
        """The student that the path names."""
        student = self._named(request.path_params["model"])
        version = request.path_params.get("version", student.version)
        if version != student.version:
            raise ProtocolError(404, f"{student.name!r} has no such version; it is {student.version}")
        return student

    def _chosen(self, request: Request) -> Student:
        """The student that the query names, or the only one."""
        name = request.query_params.get("model")
        if name is not None:
            return self._named(name)
        if len(self._students) > 1:
            raise ProtocolError(400, f"there are several students, choose one with ?model=: {self._names()}")
        return next(iter(self._students.values()))

    def _named(self, name: str) -> Student:
        if name not in self._students:
            raise ProtocolError(404, f"there is no student of this name; there is: {self._names()}")
        return self._students[name]

    def _names(self) -> str:
        return ", ".join(self._students)

    async def _read_body(self, request: Request) -> bytes:
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ProtocolError(415, "compressed bodies are not supported; send it without Content-Encoding")
        limit = self._settings.max_body_bytes
        too_large = ProtocolError(413, f"the body is larger than {limit} bytes")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
            raise too_large
        chunks: list[bytes] = []
        received = 0
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                async for chunk in request.stream():
                    received += len(chunk)
                    if received > limit:
                        raise too_large
                    chunks.append(chunk)
        except TimeoutError as error:
            raise ProtocolError(408, f"the body took longer than {self._settings.request_timeout_s:g} s") from error
        except ClientDisconnect as error:
            raise ProtocolError(400, "the client went away") from error
        return b"".join(chunks)

    async def _predict(self, student: Student, images: Images) -> Predictions:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                predictions = await self._backends[student.name].predict(images)
        except TimeoutError as error:
            raise ProtocolError(504, f"no answer within {self._settings.request_timeout_s:g} s") from error
        _log.info(
            "predicted model=%s images=%d failed=%d seconds=%.4f",
            student.name,
            len(images),
            len(predictions.failures),
            time.monotonic() - started,
        )
        return predictions


def _top_k(request: Request) -> int:
    text = request.query_params.get("top_k", str(_DEFAULT_TOP_K))
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 9) or int(text) < 1:
        raise ProtocolError(400, "top_k must be a whole number of at least 1")
    return int(text)


def _image_error(error: ImageError) -> ProtocolError:
    return ProtocolError(_IMAGE_STATUS.get(error.code, 422), f"the image cannot be used: {error}")


def _with_json_errors(handler: Handler) -> Handler:
    # Not an exception handler of Starlette: for unexpected errors it answers, but then raises again, and Ray Serve
    # would report a failed replica call with its own text.
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ProtocolError as error:
            return _error(error.status, error.message)
        except Unavailable as error:
            return _error(503, str(error), {"Retry-After": "1"})
        except Exception:
            _log.exception("a request failed unexpectedly")
            return _error(500, "internal error; the server's log tells more")

    return guarded


async def _framework_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, error.headers)


def _error(status: int, message: str, headers: Mapping[str, Any] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers)
