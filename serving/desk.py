"""What REST and gRPC share: who is served, which version answers, how long it may take. No web, no Ray."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from serving.predictor import Images, Predictions
from serving.registry import Student
from serving.routing import Route
from serving.settings import ServingSettings
from serving.tensors import ProtocolError

# Replicas of Ray Serve show this logger and its children; any other name would be swallowed there.
_log = logging.getLogger("ray.serve.pu_ray")

_MOST_SHADOWED = 64  # copies under way; more are left out rather than queued


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


class Meter(Protocol):
    """Where counts and times go."""

    def responded(self, route: str, status: int) -> None:
        """A request has ended, whatever came of it."""
        ...

    def answered(self, student: Student, predictions: Predictions, seconds: float) -> None:
        """A request was answered."""
        ...

    def shadowed(self, student: Student, same: int, images: int) -> None:
        """A shadow answered copies of `images` images, `same` of them as the stable version did."""
        ...


class NoMeter:
    """Counts nothing."""

    def responded(self, route: str, status: int) -> None:
        """Nothing."""

    def answered(self, student: Student, predictions: Predictions, seconds: float) -> None:
        """Nothing."""

    def shadowed(self, student: Student, same: int, images: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Served:
    """One version of a student, and where its answers come from."""

    student: Student
    backend: Backend


@dataclass(frozen=True)
class Offer:
    """All versions of one name.

    Attributes:
        route: Which of them answers.
        versions: By version.
    """

    route: Route
    versions: Mapping[str, Served]


class Desk:
    """Takes requests for students.

    Args:
        offers: By the students' name.
        settings: Limits.
        max_requests: With images, inside at once, and so of the memory they take; more are told to come back.
        meter: Where counts go.
    """

    def __init__(
        self, offers: Mapping[str, Offer], settings: ServingSettings, max_requests: int, meter: Meter | None = None
    ) -> None:
        self.offers = dict(offers)
        self.settings = settings
        self._max_requests = max_requests
        self._meter = meter or NoMeter()
        self._inside = 0
        self._shadows: set[asyncio.Task[None]] = set()

    def replace(self, offers: Mapping[str, Offer], max_requests: int) -> None:
        """Serve others from now on; requests that are under way end as they began."""
        self.offers = dict(offers)
        self._max_requests = max_requests

    # -- who there is -------------------------------------------------------------------------------------

    @property
    def names(self) -> str:
        """Of all students."""
        return ", ".join(self.offers)

    def offer(self, name: str) -> Offer:
        """All versions of a student.

        Raises:
            ProtocolError: 404.
        """
        if name not in self.offers:
            raise ProtocolError(404, f"there is no student of this name; there is: {self.names}")
        return self.offers[name]

    def served(self, name: str, version: str | None = None) -> Served:
        """Who answers a request.

        Args:
            name: Of the student.
            version: A version or an alias; None, or empty as in gRPC: as the route says.

        Raises:
            ProtocolError: 404.
        """
        offer = self.offer(name)
        if not version:
            return offer.versions[offer.route.pick(random.random())]
        found = offer.versions.get(offer.route.named(version))
        if found is None:
            raise ProtocolError(404, f"{name!r} has no such version; it has: {', '.join(offer.versions)}")
        return found

    async def waiting_for(self) -> list[str]:
        """Names of the students whose stable version would not answer."""
        stable = {name: offer.versions[offer.route.stable].backend for name, offer in self.offers.items()}
        answers = await asyncio.gather(*(backend.ready() for backend in stable.values()))
        return [name for name, is_ready in zip(stable, answers, strict=True) if not is_ready]

    async def index(self) -> list[dict[str, str]]:
        """Name, version, state and reason of every version, as Triton's repository index has them."""
        every = [served for offer in self.offers.values() for served in offer.versions.values()]
        ready = await asyncio.gather(*(served.backend.ready() for served in every))
        return [
            {
                "name": served.student.name,
                "version": served.student.version,
                "state": "READY" if is_ready else "UNAVAILABLE",
                "reason": "" if is_ready else "not ready",
            }
            for served, is_ready in zip(every, ready, strict=True)
        ]

    def count(self, note: Callable[[Meter], None]) -> None:
        """Tell the meter something; whatever goes wrong there costs no request."""
        try:
            note(self._meter)
        except Exception:
            _log.exception("a metric could not be recorded")

    # -- answers ------------------------------------------------------------------------------------------

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place for one request with images.

        Raises:
            Unavailable: There is none.
        """
        if self._inside >= self._max_requests:
            raise Unavailable("too many requests are being answered")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def predict(self, served: Served, images: Images) -> Predictions:
        """The answer to N images.

        Raises:
            ProtocolError: 504 where it takes too long.
            Unavailable: Not now.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                predictions = await served.backend.predict(images)
        except TimeoutError as error:
            raise ProtocolError(504, f"no answer within {self.settings.request_timeout_s:g} s") from error
        seconds = time.monotonic() - started
        self.count(lambda meter: meter.answered(served.student, predictions, seconds))
        self._shadow(served, images, predictions)
        return predictions

    def _shadow(self, served: Served, images: Images, predictions: Predictions) -> None:
        offer = self.offers.get(served.student.name)
        if offer is None or offer.route.shadow is None or served.student.version != offer.route.stable:
            return
        if len(self._shadows) < _MOST_SHADOWED:
            task = asyncio.create_task(self._compare(served, offer.versions[offer.route.shadow], images, predictions))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _compare(self, served: Served, shadow: Served, images: Images, stable: Predictions) -> None:
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                own = await shadow.backend.predict(images)
        except Exception as error:
            # Whatever a shadow does must not reach a client.
            _log.warning("the shadow %s did not answer: %s", shadow.student.name, type(error).__name__)
            return
        # By name: another version may have its classes in another order.
        told = [
            (_label(served.student, stable, position), _label(shadow.student, own, position))
            for position in range(len(images))
            if position not in stable.failures
        ]
        same = sum(one == other for one, other in told)
        self.count(lambda meter: meter.shadowed(shadow.student, same, len(told)))


def _label(student: Student, predictions: Predictions, position: int) -> str:
    return student.labels[int(predictions.logits_NK[position].argmax())]
