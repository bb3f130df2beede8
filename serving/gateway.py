"""The HTTP face of the students: routes, one form for every error, one log line for every request. No Ray.

Handlers read the raw body, because clients of the Open Inference Protocol send JSON without a Content-Type. Every
error is `{"error": "..."}`, the framework's own (404, 405, 500) included. Log lines name students, counts and
times, never what was sent.

    GET  /v2   /v2/health/live   /v2/health/ready   /v2/models   /v2/models/{m}   /v2/models/{m}/ready
    POST /v2/models/{m}/infer          each of the three also as /v2/models/{m}/versions/{v}...
    POST /v2/repository/index          Triton's list of models
    POST /v1/classify?model=&top_k=    body: one encoded image, a form, or JSON
    GET  /   /docs   /openapi.json     for people

Health, the pages and the description of the interface are open; everything else wants a token, where there are any.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pu_ray.images import ImageError
from serving import bodies, openapi, protocol, uploads
from serving.auth import CHALLENGE, Guard
from serving.desk import Desk, Served, Unavailable
from serving.registry import Student
from serving.tensors import ProtocolError

_log = logging.getLogger("ray.serve.pu_ray")

REQUEST_ID = "X-Request-ID"

_DEFAULT_TOP_K = 5
_CLASSIFY_QUERY = ("model", "version", "top_k")
_IMAGE_STATUS = {"too_large": 413, "not_an_image": 415, "unsupported": 415}
_OPEN = {"/", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready"}
_PAGES = {"page.css": "text/css", "page.js": "text/javascript"}
_PROPER_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[Request], Awaitable[Response]]


def application(desk: Desk, guard: Guard | None) -> ASGIApp:
    """The web application.

    Args:
        desk: Whom requests are for.
        guard: Knows the tokens; None: everybody may ask.
    """
    gateway = _Gateway(desk)
    model = "/v2/models/{model}"
    version = model + "/versions/{version}"
    # Tried in this order: the busiest come first.
    routes: list[tuple[str, str, Handler]] = [
        ("POST", f"{model}/infer", gateway.infer),
        ("POST", "/v1/classify", gateway.classify),
        ("POST", f"{version}/infer", gateway.infer),
        ("GET", "/v2/health/ready", gateway.ready),
        ("GET", "/v2/health/live", gateway.live),
        ("GET", "/v2", gateway.server),
        ("GET", "/v2/models", gateway.models),
        ("POST", "/v2/repository/index", gateway.index),
        ("GET", "/", _page("index.html", "text/html")),
        ("GET", "/docs", gateway.docs),
        ("GET", "/openapi.json", gateway.openapi),
        *(("GET", f"/page/{name}", _page(name, kind)) for name, kind in _PAGES.items()),
    ]
    for base in (model, version):
        routes += [("GET", base, gateway.model), ("GET", f"{base}/ready", gateway.model_ready)]
    app = Starlette(
        routes=[Route(path, _with_json_errors(handler), methods=[method]) for method, path, handler in routes],
        exception_handlers={HTTPException: _framework_error},
    )
    app.router.redirect_slashes = False
    return _Door(app, guard, desk)


# -- before and after every request ------------------------------------------------------------------------


class _Door:
    """Asks for the token before anything is read, gives every request an id, and writes its line in the log."""

    def __init__(self, app: ASGIApp, guard: Guard | None, desk: Desk) -> None:
        self._app = app
        self._guard = guard
        self._desk = desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = Headers(scope=scope)
        asked = headers.get(REQUEST_ID, "")
        number = asked if _PROPER_ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = number
            await send(message)

        who = await self._known(scope["path"], headers)
        if who is None:
            refused = _error(401, "this server wants a token: Authorization: Bearer ...", CHALLENGE)
            await refused(scope, receive, sending)
        else:
            await self._app(scope, receive, sending)
        told = scope["state"]
        # The path as it was asked for may be anything; its pattern is ours.
        route = getattr(scope.get("route"), "path", "-")
        self._desk.count(lambda meter: meter.responded(route, status))
        _log.info(
            "request id=%s client=%s method=%s route=%s model=%s version=%s images=%d failed=%d status=%d seconds=%.4f",
            number,
            who or "-",
            scope["method"],
            route,
            told.get("model", "-"),
            told.get("version", "-")[:12],
            told.get("images", 0),
            told.get("failed", 0),
            status,
            time.monotonic() - started,
            # Into Serve's log file alone: writing every line twice costs a request more than its checks.
            extra={"log_to_stderr": False},
        )

    async def _known(self, path: str, headers: Headers) -> str | None:
        if self._guard is None or path in _OPEN or path.startswith("/page/"):
            return "anyone"
        await self._guard.refresh()
        return self._guard.name_of(headers.get("authorization"))


# -- the handlers ------------------------------------------------------------------------------------------


class _Gateway:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    # -- what there is ------------------------------------------------------------------------------------

    async def server(self, _request: Request) -> Response:
        return JSONResponse(protocol.server_metadata())

    async def live(self, _request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, _request: Request) -> Response:
        if waiting := await self._desk.waiting_for():
            return JSONResponse({"ready": False, "error": f"not ready: {', '.join(waiting)}"}, 503)
        return JSONResponse({"ready": True})

    async def models(self, _request: Request) -> Response:
        listed = [
            {"name": name, "versions": list(offer.versions), "route": offer.route.model_dump()}
            for name, offer in self._desk.offers.items()
        ]
        return JSONResponse({"models": listed})

    async def index(self, _request: Request) -> Response:
        return JSONResponse(await self._desk.index())

    async def model(self, request: Request) -> Response:
        served = self._addressed(request)
        versions = list(self._desk.offer(served.student.name).versions)
        return JSONResponse(protocol.model_metadata(served.student, versions))

    async def model_ready(self, request: Request) -> Response:
        served = self._addressed(request)
        name = served.student.name
        if not await served.backend.ready():
            return JSONResponse({"name": name, "ready": False, "error": f"not ready: {name}"}, 503)
        return JSONResponse({"name": name, "ready": True})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(openapi.document(self._students(), str(request.base_url)))

    async def docs(self, request: Request) -> Response:
        page = openapi.page(openapi.document(self._students(), str(request.base_url)))
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    def _students(self) -> list[Student]:
        return [offer.versions[offer.route.stable].student for offer in self._desk.offers.values()]

    # -- answers ------------------------------------------------------------------------------------------

    async def infer(self, request: Request) -> Response:
        with self._desk.admitted():
            served = self._addressed(request)
            body = await self._body_of(request)
            header_length = request.headers.get(protocol.HEADER_LENGTH)
            wanted = protocol.parse_infer(body, header_length, served.student, self._desk.settings.max_images)
            predictions = await self._desk.predict(served, wanted.images)
            _tell(request, served, len(wanted.images), len(predictions.failures))
            reply = protocol.format_infer(wanted, predictions, served.student)
            return bodies.deflated(Response(reply.body, headers=reply.headers), request.headers)

    async def classify(self, request: Request) -> Response:
        with self._desk.admitted():
            _check_query(request)
            served = self._chosen(request)
            count = _top_k(request)
            image = await uploads.image_in(request.headers, await self._body_of(request))
            predictions = await self._desk.predict(served, [image])
            _tell(request, served, 1, len(predictions.failures))
            if 0 in predictions.failures:
                raise _image_error(predictions.failures[0])
            student = served.student
            best = [
                {"label": student.labels[index], "index": index, "probability": probability}
                for index, probability in predictions.top(0, count)
            ]
            return JSONResponse({"model": student.name, "version": student.version, "predictions": best})

    def _addressed(self, request: Request) -> Served:
        """Whom the path names."""
        return self._desk.served(request.path_params["model"], request.path_params.get("version"))

    def _chosen(self, request: Request) -> Served:
        """Whom the query names, or the only one."""
        name = request.query_params.get("model")
        if name is None:
            if len(self._desk.offers) > 1:
                raise ProtocolError(400, f"there are several students, choose one with ?model=: {self._desk.names}")
            name = next(iter(self._desk.offers))
        return self._desk.served(name, request.query_params.get("version"))

    async def _body_of(self, request: Request) -> bytes:
        settings = self._desk.settings
        return await bodies.read(request, settings.max_body_bytes, settings.request_timeout_s)


def _tell(request: Request, served: Served, images: int, failed: int) -> None:
    """For the line in the log."""
    request.scope["state"] |= {
        "model": served.student.name,
        "version": served.student.version,
        "images": images,
        "failed": failed,
    }


def _check_query(request: Request) -> None:
    # A mistyped name would choose a default in silence.
    for name in request.query_params:
        if name not in _CLASSIFY_QUERY:
            raise ProtocolError(400, f"no such parameter: {name[:40]!r}; there are: {', '.join(_CLASSIFY_QUERY)}")


def _top_k(request: Request) -> int:
    text = request.query_params.get("top_k", str(_DEFAULT_TOP_K))
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 9) or int(text) < 1:
        raise ProtocolError(400, "top_k must be a whole number of at least 1")
    return int(text)


def _page(name: str, kind: str) -> Handler:
    content = resources.files("serving").joinpath("page", name).read_bytes()

    async def page(_request: Request) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return page


# -- errors ------------------------------------------------------------------------------------------------


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
