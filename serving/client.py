"""Asking a server from Python or the command line: small answers, errors that say what to do."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

import httpx

from pu_ray.errors import ClusterError, ConfigError, DataError, PuRayError


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


def classify(url: str, model: str | None, image: bytes, top_k: int = 5, timeout_s: float = 60.0) -> Classification:
    """Ask for the class of one encoded image.

    Args:
        url: The server, like `http://127.0.0.1:8000`.
        model: The student's name; None for the only one.
        image: Encoded (JPEG, PNG, WebP, ...).
        top_k: How many classes to return.
        timeout_s: Without a sign of life from the server.

    Raises:
        DataError: The server refused the request: the image, the name, or no name where there are several.
        ClusterError: The server is not there or failed.
        ConfigError: `url` is not one.
    """
    query = {"top_k": str(top_k)} | ({} if model is None else {"model": model})
    document = _ask(
        "POST",
        url,
        "/v1/classify",
        timeout_s,
        params=query,
        content=image,
        headers={"Content-Type": "application/octet-stream"},
    )
    try:
        predictions = tuple(
            Prediction(str(entry["label"]), int(entry["index"]), float(entry["probability"]))
            for entry in document["predictions"]
        )
        return Classification(str(document["model"]), str(document["version"]), predictions)
    except (KeyError, TypeError, ValueError) as error:
        raise _stranger(url) from error


def models(url: str, timeout_s: float = 60.0) -> tuple[ServedModel, ...]:
    """The students that a server offers.

    Raises:
        ClusterError: The server is not there or failed.
        ConfigError: `url` is not one.
    """
    document = _ask("GET", url, "/v2/models", timeout_s)
    try:
        return tuple(ServedModel(str(entry["name"]), tuple(entry["versions"])) for entry in document["models"])
    except (KeyError, TypeError) as error:
        raise _stranger(url) from error


def _ask(method: str, url: str, path: str, timeout_s: float, **request: Any) -> Any:
    target = url.rstrip("/") + path
    try:
        # A proxy of the environment cannot reach this machine's own loopback.
        with httpx.Client(timeout=timeout_s, trust_env=not _is_loopback(httpx.URL(target).host)) as client:
            response = client.request(method, target, **request)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(
            "not the URL of a server", where=url, allowed="like http://127.0.0.1:8000", got=str(error)
        ) from error
    except httpx.TimeoutException as error:
        raise ClusterError(f"the server did not answer within {timeout_s:g} s", where=url) from error
    except httpx.TransportError as error:
        raise ClusterError(
            "the server cannot be reached",
            where=url,
            got=str(error) or type(error).__name__,
            hint="start one with `pu-ray serve EXPORTED`, or check --url",
        ) from error
    try:
        document = response.json()
    except ValueError as error:
        raise _stranger(url) from error
    if response.is_success:
        return document
    message = document.get("error") if isinstance(document, dict) else None
    if not isinstance(message, str):
        raise _stranger(url)
    raise _refusal(response.status_code, message, url)


def _refusal(status: int, message: str, url: str) -> PuRayError:
    if status in (408, 503, 504):
        return ClusterError(message, where=url, got=f"HTTP {status}", hint="try again")
    if status >= 500:
        return ClusterError(message, where=url, got=f"HTTP {status}", hint="look at the server's log")
    return DataError(message, where=url, got=f"HTTP {status}")


def _stranger(url: str) -> ClusterError:
    return ClusterError("something answers there, but it is not a PU-Ray server", where=url, hint="check --url")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
