"""Asking a server from Python: typed answers, patience with a busy one, errors that say what to do.

A request that was refused for lack of room (503, 429) or whose connection was lost is sent again, after what
`Retry-After` says or a growing pause: classifying an image twice changes nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import tenacity

from pu_ray.errors import ClusterError, ConfigError, DataError, PuRayError
from serving import auth

_COME_BACK = (429, 503)
_LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True)
class Prediction:
    """One class: its name, its position among the labels, its probability in [0, 1]."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Classification:
    """What a student says about one image; the most probable class comes first."""

    model: str
    version: str
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class ServedModel:
    """A student that a server offers."""

    name: str
    versions: tuple[str, ...]


class _Busy(Exception):
    """The server asks to come back.

    Attributes:
        pause_s: When, if it says so.
    """

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(response.status_code)
        self.response = response
        told = response.headers.get("retry-after", "")
        self.pause_s = float(told) if told.isdigit() else None


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    arguments: Mapping[str, Any]


class _Asking:
    """What both clients share: addresses, tokens, patience, and reading answers."""

    def __init__(self, url: str, token: str | None, timeout_s: float, attempts: int) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise _no_url(url, str(error)) from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise _no_url(url, "no http:// or https:// address")
        own = _is_loopback(parsed.host)
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._attempts = attempts
        token = token if token is not None else auth.token_for(loopback=own)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # A proxy of the environment cannot reach this machine's own loopback.
        self.options: dict[str, Any] = {
            "base_url": self.url,
            "timeout": timeout_s,
            "trust_env": not own,
            "headers": headers,
        }

    def retrying(self) -> dict[str, Any]:
        """For tenacity."""
        return {
            "retry": tenacity.retry_if_exception_type((_Busy, httpx.NetworkError, httpx.RemoteProtocolError)),
            "stop": tenacity.stop_after_attempt(self._attempts),
            "wait": _pause,
            "reraise": True,
        }

    @staticmethod
    def checked(response: httpx.Response) -> httpx.Response:
        """The response, unless it asks to come back, or a proxy speaks for a process that is gone."""
        status = response.status_code
        if status in _COME_BACK or (status >= 500 and _message(response) is None):
            raise _Busy(response)
        return response

    def failed(self, error: Exception) -> PuRayError:
        """What an exception of the last attempt means."""
        if isinstance(error, _Busy):
            return self._refusal(error.response)
        if isinstance(error, httpx.TimeoutException):
            return ClusterError(
                f"the server did not answer within {self._timeout_s:g} s",
                slug="server-timeout",
                where=self.url,
                hint="it is busy or far away: try again, or send fewer images at once",
            )
        return ClusterError(
            "the server cannot be reached",
            slug="server-unreachable",
            where=self.url,
            got=str(error) or type(error).__name__,
            hint="start one with `pu-ray serve EXPORTED`, or check --url",
        )

    def document(self, response: httpx.Response) -> Any:
        """The answer's JSON.

        Raises:
            DataError, ClusterError: The server refused, or is none of ours.
        """
        if not response.is_success:
            raise self._refusal(response)
        try:
            return response.json()
        except ValueError as error:
            raise self.stranger() from error

    def _refusal(self, response: httpx.Response) -> PuRayError:
        message, status = _message(response), response.status_code
        if message is None:
            return self.stranger()
        told = {"where": self.url, "got": f"HTTP {status}"}
        if status == 401:
            return ConfigError(
                message,
                slug="token-refused",
                hint=f"set {auth.TOKEN_VARIABLE} to a token that the server knows",
                **told,
            )
        if status in (408, 429, 503, 504):
            return ClusterError(message, slug="server-busy", hint="try again", **told)
        if status >= 500:
            return ClusterError(message, slug="server-fault", hint="look at the server's log", **told)
        return DataError(message, slug="request-refused", **told)

    def stranger(self) -> ClusterError:
        """Somebody else answers there."""
        return ClusterError(
            "something answers there, but it is not a PU-Ray server",
            slug="not-a-pu-ray-server",
            where=self.url,
            hint="check --url",
        )

    # -- requests and what comes back ---------------------------------------------------------------------

    @staticmethod
    def classify_request(image: bytes, model: str | None, version: str | None, top_k: int) -> _Request:
        """For `classify`."""
        query = {"top_k": str(top_k), "model": model, "version": version}
        return _Request(
            "POST",
            "/v1/classify",
            {
                "params": {key: value for key, value in query.items() if value is not None},
                "content": image,
                "headers": {"Content-Type": "application/octet-stream"},
            },
        )

    def classification(self, document: Any) -> Classification:
        """What `classify` gives."""
        try:
            predictions = tuple(
                Prediction(str(entry["label"]), int(entry["index"]), float(entry["probability"]))
                for entry in document["predictions"]
            )
            return Classification(str(document["model"]), str(document["version"]), predictions)
        except (KeyError, TypeError, ValueError) as error:
            raise self.stranger() from error

    def served_models(self, document: Any) -> tuple[ServedModel, ...]:
        """What `models` gives."""
        try:
            return tuple(ServedModel(str(entry["name"]), tuple(entry["versions"])) for entry in document["models"])
        except (KeyError, TypeError) as error:
            raise self.stranger() from error


class Client:
    """Asks a server, one request at a time; a context manager.

    Args:
        url: The server, like `http://127.0.0.1:8000`.
        token: To be shown; None: that of PU_RAY_TOKEN, else, to this machine's own loopback, this user's own.
        timeout_s: Without a sign of life from the server.
        attempts: How often a request is sent before it counts as failed.

    Raises:
        ConfigError: `url` is not one.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 60.0, attempts: int = 5) -> None:
        self._asking = _Asking(url, token, timeout_s, attempts)
        self._http = httpx.Client(**self._asking.options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def classify(
        self, image: bytes, *, model: str | None = None, version: str | None = None, top_k: int = 5
    ) -> Classification:
        """Ask for the class of one encoded image.

        Args:
            image: Encoded (JPEG, PNG, WebP, ...).
            model: The student's name; None for the only one.
            version: A version or an alias; None: as the server's route says.
            top_k: How many classes to return.

        Raises:
            DataError: The server refused the request: the image, the name, or no name where there are several.
            ConfigError: The server does not know the token.
            ClusterError: The server is not there or failed.
        """
        request = self._asking.classify_request(image, model, version, top_k)
        return self._asking.classification(self._ask(request))

    def models(self) -> tuple[ServedModel, ...]:
        """The students that the server offers.

        Raises:
            ConfigError: The server does not know the token.
            ClusterError: The server is not there or failed.
        """
        return self._asking.served_models(self._ask(_Request("GET", "/v2/models", {})))

    def _ask(self, request: _Request) -> Any:
        def once() -> httpx.Response:
            return self._asking.checked(self._http.request(request.method, request.path, **request.arguments))

        try:
            response = tenacity.Retrying(**self._asking.retrying())(once)
        except (_Busy, httpx.TransportError) as error:
            raise self._asking.failed(error) from error
        return self._asking.document(response)


class AsyncClient:
    """The same for asyncio; an asynchronous context manager.

    Args:
        url: See `Client`.
        token: See `Client`.
        timeout_s: See `Client`.
        attempts: See `Client`.

    Raises:
        ConfigError: `url` is not one.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 60.0, attempts: int = 5) -> None:
        self._asking = _Asking(url, token, timeout_s, attempts)
        self._http = httpx.AsyncClient(**self._asking.options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def classify(
        self, image: bytes, *, model: str | None = None, version: str | None = None, top_k: int = 5
    ) -> Classification:
        """See `Client.classify`."""
        request = self._asking.classify_request(image, model, version, top_k)
        return self._asking.classification(await self._ask(request))

    async def models(self) -> tuple[ServedModel, ...]:
        """See `Client.models`."""
        return self._asking.served_models(await self._ask(_Request("GET", "/v2/models", {})))

    async def _ask(self, request: _Request) -> Any:
        async def once() -> httpx.Response:
            return self._asking.checked(await self._http.request(request.method, request.path, **request.arguments))

        try:
            response: httpx.Response = await tenacity.AsyncRetrying(**self._asking.retrying())(once)
        except (_Busy, httpx.TransportError) as error:
            raise self._asking.failed(error) from error
        return self._asking.document(response)


def _message(response: httpx.Response) -> str | None:
    """What a server of ours says went wrong; None: this is not one of its errors."""
    try:
        document = response.json()
    except ValueError:
        return None
    message = document.get("error") if isinstance(document, dict) else None
    return message if isinstance(message, str) else None


_growing = tenacity.wait_exponential_jitter(initial=0.2, max=_LONGEST_PAUSE_S)


def _pause(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, _Busy) and error.pause_s is not None:
        return min(error.pause_s, _LONGEST_PAUSE_S)
    return _growing(state)


def _no_url(url: str, got: str) -> ConfigError:
    return ConfigError(
        "not the URL of a server", slug="not-a-server-url", where=url, allowed="like http://127.0.0.1:8000", got=got
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
