"""Counts and times for Prometheus, over Ray's own metrics port. `cluster/grafana/serving.json` draws them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ray.serve import metrics

from serving.drift import Drift
from serving.predictor import Predictions
from serving.registry import Student

_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]
_IMAGES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
# Ray declares these as tuples of one.
_OF: Any = ("model", "version")
_BY_LABEL: Any = (*_OF, "label")
_BY_ROUTE: Any = ("route", "status")


def _tags(student: Student) -> dict[str, str]:
    return {"model": student.name, "version": student.version[:12]}


def _ascii(label: str) -> str:
    # Ray 2.60 encodes tags as ASCII and raises where it cannot.
    return label.encode("ascii", "backslashreplace").decode()


class FrontMeter:
    """What the front counts: `serving.desk.Meter`."""

    def __init__(self) -> None:
        self._responses = metrics.Counter("pu_ray_responses", "Answers by route and status.", _BY_ROUTE)
        self._images = metrics.Counter("pu_ray_images", "Images that were answered.", _OF)
        self._failed = metrics.Counter("pu_ray_failed_images", "Images that could not be used.", _OF)
        self._seconds = metrics.Histogram("pu_ray_request_seconds", "Time to an answer.", _SECONDS, _OF)
        self._predicted = metrics.Counter("pu_ray_predictions", "Answers by class.", _BY_LABEL)
        self._copies = metrics.Counter("pu_ray_shadow_images", "Images that a shadow answered too.", _OF)
        self._same = metrics.Counter("pu_ray_shadow_agreements", "Of these, answered as the stable version did.", _OF)
        self._drift = metrics.Gauge(
            "pu_ray_score_drift", "Population stability index of certainty against the mined images.", _OF
        )
        self._drifts: dict[tuple[str, str], Drift] = {}

    def responded(self, route: str, status: int) -> None:
        """A request has ended."""
        self._responses.inc(tags={"route": route, "status": str(status)})

    def answered(self, student: Student, predictions: Predictions, seconds: float) -> None:
        """A request was answered."""
        tags = _tags(student)
        usable = [position for position in range(len(predictions.logits_NK)) if position not in predictions.failures]
        self._seconds.observe(seconds, tags)
        if predictions.failures:
            self._failed.inc(len(predictions.failures), tags)
        if not usable:
            return
        self._images.inc(len(usable), tags)
        probabilities_MK = predictions.probabilities_NK[usable]
        for index in probabilities_MK.argmax(axis=1):
            self._predicted.inc(tags=tags | {"label": _ascii(student.labels[index])})
        if student.confidence_deciles:
            key = (student.name, student.version)
            drift = self._drifts.setdefault(key, Drift(student.confidence_deciles))
            drift.add(probabilities_MK.max(axis=1).tolist())
            if (value := drift.index) is not None:
                self._drift.set(value, tags)

    def shadowed(self, student: Student, same: int, images: int) -> None:
        """A shadow answered copies."""
        tags = _tags(student)
        if images:
            self._copies.inc(images, tags)
        if same:
            self._same.inc(same, tags)


class StudentMeter:
    """What a process measures about one of its students.

    Args:
        student: Whom it answers for.
    """

    def __init__(self, student: Student) -> None:
        tags = _tags(student)

        decode, queue, inference, batch = _stages()
        self.decoded: Callable[[float], Any] = functools.partial(decode.observe, tags=tags)
        self.queued: Callable[[float], Any] = functools.partial(queue.observe, tags=tags)
        self.ran: Callable[[float], Any] = functools.partial(inference.observe, tags=tags)
        self.batched: Callable[[float], Any] = functools.partial(batch.observe, tags=tags)


@functools.cache
def _stages() -> tuple[metrics.Histogram, ...]:
    # Once per process, however many students it opens: Ray knows a metric by its name.
    return (
        metrics.Histogram("pu_ray_decode_seconds", "Time to decode a request's images.", _SECONDS, _OF),
        metrics.Histogram("pu_ray_queue_seconds", "Time that decoded images wait for a batch.", _SECONDS, _OF),
        metrics.Histogram("pu_ray_inference_seconds", "Time of a forward pass.", _SECONDS, _OF),
        metrics.Histogram("pu_ray_batch_images", "Images of a forward pass.", _IMAGES, _OF),
    )
