"""Bodies of requests and replies: counted while they stream, inflated within the same limit, deflated on demand."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.tensors import ProtocolError

# zlib's window bits: what tritonclient calls deflate, as RFC 9110 does, has zlib's header around it.
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_LEAST_WORTH = 1024  # bytes; what is smaller fits a packet anyway
_FAST = 1  # zlib's level: the network is rarely so slow that more pays


class Inflater:
    """Undoes a content encoding piece by piece.

    Args:
        encoding: Value of `Content-Encoding`, or empty.
        limit: Most bytes of what comes out.

    Raises:
        ProtocolError: 415 for an encoding that is not known.
    """

    def __init__(self, encoding: str, limit: int) -> None:
        self._left = limit
        self._too_large = ProtocolError(413, f"the body is larger than {limit} bytes")
        self._zlib = None
        if encoding not in ("", "identity"):
            if encoding not in _WINDOW_BITS:
                raise ProtocolError(415, f"Content-Encoding must be one of: {', '.join(_WINDOW_BITS)}")
            self._zlib = zlib.decompressobj(_WINDOW_BITS[encoding])

    def feed(self, chunk: bytes) -> bytes:
        """The next piece.

        Raises:
            ProtocolError: 413 beyond the limit, 400 for what is not compressed as it says.
        """
        if self._zlib is not None:
            try:
                # One byte more than allowed tells a bomb, and never more of it is made.
                chunk = self._zlib.decompress(chunk, self._left + 1)
            except zlib.error as error:
                raise ProtocolError(400, "the body is not compressed as its Content-Encoding says") from error
        self._left -= len(chunk)
        if self._left < 0:
            raise self._too_large
        return chunk

    def end(self) -> None:
        """Nothing more comes.

        Raises:
            ProtocolError: 400 where the compressed body is cut off.
        """
        if self._zlib is not None and not self._zlib.eof:
            raise ProtocolError(400, "the compressed body is cut off")


async def read(request: Request, limit: int, timeout_s: float) -> bytes:
    """The body of a request, inflated.

    Args:
        request: Of which nothing was read yet.
        limit: Most bytes, on the wire and inflated.
        timeout_s: For all of it.

    Raises:
        ProtocolError: 400, 408, 413 or 415.
    """
    inflater = Inflater(request.headers.get("content-encoding", "").strip().lower(), limit)
    too_large = ProtocolError(413, f"the body is larger than {limit} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise too_large
    chunks: list[bytes] = []
    received = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                # Compressed bytes may be many and hold nothing.
                received += len(chunk)
                if received > limit:
                    raise too_large
                chunks.append(inflater.feed(chunk))
    except TimeoutError as error:
        raise ProtocolError(408, f"the body took longer than {timeout_s:g} s") from error
    except ClientDisconnect as error:
        raise ProtocolError(400, "the client went away") from error
    inflater.end()
    return b"".join(chunks)


def deflated(response: Response, headers: Mapping[str, str]) -> Response:
    """The reply as the client's `Accept-Encoding` asks for it; small ones stay as they are."""
    content = bytes(response.body)
    accepted = [part.partition(";")[0].strip() for part in headers.get("accept-encoding", "").lower().split(",")]
    wanted = [name for name in accepted if name in _WINDOW_BITS]
    if not wanted or len(content) < _LEAST_WORTH:
        return response
    deflater = zlib.compressobj(_FAST, zlib.DEFLATED, _WINDOW_BITS[wanted[0]])
    response.body = deflater.compress(content) + deflater.flush()
    response.headers["Content-Encoding"] = wanted[0]
    response.headers["Content-Length"] = str(len(response.body))
    response.headers["Vary"] = "Accept-Encoding"
    return response
