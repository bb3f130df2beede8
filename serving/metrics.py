"""Counts and times for Prometheus, over Ray's own metrics port. `cluster/grafana/serving.json` draws them."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from ray.serve import metrics

from serving.drift import Drift
from serving.predictor import Predictions
from serving.registry import Student

_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]
_IMAGES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
_PERIOD_S = 1.0
# Ray declares these as tuples of one.
_OF: Any = ("model", "version")
_BY_LABEL: Any = (*_OF, "label")
_BY_ROUTE: Any = ("route", "status")


def _own(student: Student) -> tuple[str, str]:
    return student.name, student.version[:12]


def _tags(student: Student) -> dict[str, str]:
    return dict(zip(_OF, _own(student), strict=True))


def _ascii(label: str) -> str:
    # Ray 2.60 encodes tags as ASCII and raises where it cannot.
    return label.encode("ascii", "backslashreplace").decode()


class FrontMeter:
    """What the front counts: `serving.desk.Meter`.

    Counts are kept here and passed on once a second: passing one on costs more than what it counts.
    """

    def __init__(self) -> None:
        self._counters = {
            "responses": metrics.Counter("pu_ray_responses", "Answers by route and status.", _BY_ROUTE),
            "images": metrics.Counter("pu_ray_images", "Images that were answered.", _OF),
            "failed": metrics.Counter("pu_ray_failed_images", "Images that could not be used.", _OF),
            "predicted": metrics.Counter("pu_ray_predictions", "Answers by class.", _BY_LABEL),
            "copies": metrics.Counter("pu_ray_shadow_images", "Images that a shadow answered too.", _OF),
            "same": metrics.Counter("pu_ray_shadow_agreements", "Of these, answered as the stable version did.", _OF),
        }
        self._seconds = metrics.Histogram("pu_ray_request_seconds", "Time to an answer.", _SECONDS, _OF)
        self._drift = metrics.Gauge(
            "pu_ray_score_drift", "Population stability index of certainty against the mined images.", _OF
        )
        self._drifts: dict[tuple[str, str], Drift] = {}
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._is_due = False

    def responded(self, route: str, status: int) -> None:
        """A request has ended."""
        self._count("responses", 1, route, str(status))

    def answered(self, student: Student, predictions: Predictions, seconds: float) -> None:
        """A request was answered."""
        own = _own(student)
        self._seconds.observe(seconds, _tags(student))
        failed, count = len(predictions.failures), len(predictions.logits_NK)
        self._count("failed", failed, *own)
        if failed == count:
            return
        self._count("images", count - failed, *own)
        probabilities_NK = predictions.probabilities_NK
        certain = probabilities_NK.max(axis=1)  # NaN where the image failed
        for position, index in enumerate(probabilities_NK.argmax(axis=1)):
            if position not in predictions.failures:
                self._count("predicted", 1, *own, student.labels[index])
        if student.confidence_deciles:
            if own not in self._drifts:
                self._drifts[own] = Drift(student.confidence_deciles)
            self._drifts[own].add(certain[~np.isnan(certain)].tolist())

    def shadowed(self, student: Student, same: int, images: int) -> None:
        """A shadow answered copies."""
        self._count("copies", images, *_own(student))
        self._count("same", same, *_own(student))

    def _count(self, name: str, amount: int, *tags: str) -> None:
        if not amount:
            return  # Ray refuses to count nothing
        self._counts[name, tags] += amount
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(_PERIOD_S, self.flush)

    def flush(self) -> None:
        """Pass the counts on to Ray."""
        self._is_due = False
        counts, self._counts = self._counts, Counter()
        for (name, tags), amount in counts.items():
            keys = {"responses": _BY_ROUTE, "predicted": _BY_LABEL}.get(name, _OF)
            self._counters[name].inc(amount, dict(zip(keys, map(_ascii, tags), strict=True)))
        for own, drift in self._drifts.items():
            if (value := drift.index) is not None:
                self._drift.set(value, dict(zip(_OF, own, strict=True)))


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
        metrics.Histogram("pu_ray_queue_seconds", "Time that images wait for their turn.", _SECONDS, _OF),
        metrics.Histogram("pu_ray_inference_seconds", "Time of a forward pass.", _SECONDS, _OF),
        metrics.Histogram("pu_ray_batch_images", "Images of a forward pass.", _IMAGES, _OF),
    )
