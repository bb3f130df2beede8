"""Bad weather on order: an HTTP proxy on this machine that disturbs what passes between a client and an S3 server.

What goes wrong is drawn from a seed, a request's method and target and how often it was seen, so that threads and
processes do not change it. What is promised: a target that had its share of faults is left in peace for a while, so
that whoever tries an operation five times gets through. SigV4 signs the Host header, which names the proxy; moto does
not verify signatures.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

_XML = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>{}</Message></Error>'
# Fault: status, content type, body; as S3, MinIO and the gateways before them answer.
ANSWERS: dict[str, tuple[int, str, str]] = {
    "slow_down": (503, "application/xml", _XML.format("SlowDown", "Please reduce your request rate.")),
    "unavailable": (503, "application/xml", _XML.format("ServiceUnavailable", "Please try again.")),
    "too_many": (429, "application/xml", _XML.format("TooManyRequests", "Too many requests.")),
    "internal": (500, "application/xml", _XML.format("InternalError", "We encountered an internal error.")),
    "bad_gateway": (502, "text/html", "<html>502 Bad Gateway</html>"),
    "gateway_timeout": (504, "text/html", "<html>504 Gateway Time-out</html>"),
    "forbidden": (403, "application/xml", _XML.format("AccessDenied", "Access Denied")),
    "bad_key": (403, "application/xml", _XML.format("InvalidAccessKeyId", "The key does not exist in our records.")),
    "bad_signature": (403, "application/xml", _XML.format("SignatureDoesNotMatch", "The signature does not match.")),
    "expired": (400, "application/xml", _XML.format("ExpiredToken", "The provided token has expired.")),
    "no_bucket": (404, "application/xml", _XML.format("NoSuchBucket", "The specified bucket does not exist")),
    "full": (507, "application/xml", _XML.format("XMinioStorageFull", "Storage reached its minimum free drive limit.")),
    "not_implemented": (501, "application/xml", _XML.format("NotImplemented", "A header implies what is not there.")),
}
# reset: before the request has any effect. lost: it took effect, the answer is lost. cut and short: half of the body,
# then a reset or a polite end. stall: silence. stall_body: silence after half of the body. slow: it takes its time.
# Where there is no body to halve, the answer is lost.
CONNECTION = ("reset", "lost", "cut", "short", "stall", "stall_body", "slow")
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
_NOT_FORWARDED = {"content-length", "transfer-encoding", "expect", "connection"}
_CONDITIONS = {"if-none-match", "if-match"}


@dataclass(frozen=True)
class Request:
    """One request that arrived.

    Attributes:
        method: GET, PUT, ...
        target: Path and query, as sent.
        headers: Names in lower case.
        fault: What was done to it, if anything.
    """

    method: str
    target: str
    headers: dict[str, str]
    fault: str | None


class FaultProxy:
    """A proxy in front of one server; a context manager.

    Args:
        upstream: URL of the server.
        seed: Of the draws.
        rates: Probability of each fault, by name.
        stall_s: How long a stall lasts; longer than the client's patience.
        at_most: Faults that a target (method, path and query) may have before it is left in peace ...
        calm: ... for as many requests.
        ignores_conditions: Drop If-None-Match and If-Match, as a store does that never heard of them.
    """

    def __init__(
        self,
        upstream: str,
        *,
        seed: int = 0,
        rates: Mapping[str, float] | None = None,
        stall_s: float = 5.0,
        at_most: int = 2,
        calm: int = 20,
        ignores_conditions: bool = False,
    ) -> None:
        self.rates = dict(rates or {})
        assert set(self.rates) <= {*ANSWERS, *CONNECTION}
        self.stall_s = stall_s
        self.ignores_conditions = ignores_conditions
        self.counts: Counter[str] = Counter()
        self.requests: list[Request] = []
        self._upstream = urlsplit(upstream).netloc
        self._seed, self._at_most, self._calm = seed, at_most, calm
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str]] = Counter()
        self._faults: Counter[tuple[str, str]] = Counter()
        self._peace: Counter[tuple[str, str]] = Counter()
        self._planned: deque[tuple[str, Callable[[str, str], bool]]] = deque()
        self._stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def plan(self, *faults: str, method: str = "", target: str = "") -> None:
        """Do this to the next requests whose method is this and whose target holds that, before anything is drawn."""
        assert set(faults) <= {*ANSWERS, *CONNECTION, "none"}

        def fits(its_method: str, its_target: str) -> bool:
            return (not method or its_method == method) and target in its_target

        with self._lock:
            self._planned.extend((fault, fits) for fault in faults)

    def forget(self) -> None:
        """Drop what is planned and what was counted."""
        with self._lock:
            self._planned.clear()
            self.counts.clear()
            self.requests.clear()

    def seen(self, method: str = "", target: str = "") -> int:
        """How many requests of this kind arrived."""
        with self._lock:
            return sum((not method or r.method == method) and target in r.target for r in self.requests)

    def choose(self, method: str, target: str, headers: Mapping[str, str]) -> str | None:
        """What happens to this request."""
        key = (method, target)
        with self._lock:
            fault = self._choose(key)
            if fault:
                self.counts[fault] += 1
            self.requests.append(
                Request(method, target, {name.lower(): value for name, value in headers.items()}, fault)
            )
        return fault

    def _choose(self, key: tuple[str, str]) -> str | None:
        for place, (fault, fits) in enumerate(self._planned):
            if fits(*key):
                del self._planned[place]
                return None if fault == "none" else fault
        self._seen[key] += 1
        if self._peace[key]:
            self._peace[key] -= 1
            return None
        draw = random.Random(f"{self._seed} {key} {self._seen[key]}").random()
        for fault, rate in self.rates.items():
            draw -= rate
            if draw < 0:
                self._faults[key] += 1
                if self._faults[key] == self._at_most:
                    self._faults[key], self._peace[key] = 0, self._calm
                return fault
        return None

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the proxy's end."""
        self._stopping.wait(seconds)

    def forward(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> Any:
        """The server's answer, read to its end: status, headers, body."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                dropped = _NOT_FORWARDED | (_CONDITIONS if self.ignores_conditions else set())
                if name.lower() not in dropped:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        super().__init__(address, _Handler)
        self.proxy = proxy

    def shutdown_request(self, request: Any) -> None:
        # The base class says goodbye first; a reset does not.
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) != struct.pack("ii", 1, 0):
            super().shutdown_request(request)
        else:
            self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _answer(self, status: int, headers: Iterable[tuple[str, str]], length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _any(self) -> None:
        proxy = self.server.proxy
        body = self._body()
        fault = proxy.choose(self.command, self.path, self.headers)
        if fault in ANSWERS:
            status, kind, text = ANSWERS[fault]
            content = b"" if self.command == "HEAD" else text.encode()
            self._answer(status, [("Content-Type", kind)], len(content))
            self.wfile.write(content)
            return
        if fault in ("reset", "stall"):
            if fault == "stall":
                proxy.wait(proxy.stall_s)
            self._reset()
            return
        status, headers, content = proxy.forward(self.command, self.path, self.headers.items(), body)
        if fault == "lost" or (fault in ("cut", "short", "stall_body") and len(content) < 2):
            self._reset()  # no body that could be halved
            return
        told = dict((name.lower(), value) for name, value in headers).get("content-length")
        self._answer(status, headers, int(told) if self.command == "HEAD" and told else len(content))
        half = len(content) // 2
        if fault in ("cut", "short", "stall_body"):
            self.wfile.write(content[:half])
            self.wfile.flush()
            proxy.wait(proxy.stall_s if fault == "stall_body" else 0.02)  # the first half arrives before the reset
            self._reset() if fault != "short" else setattr(self, "close_connection", True)
        elif fault == "slow":
            for start in range(0, len(content), max(1, len(content) // 8)):
                self.wfile.write(content[start : start + max(1, len(content) // 8)])
                proxy.wait(0.05)
        else:
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any
