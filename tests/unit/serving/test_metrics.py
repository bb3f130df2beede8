"""serving/metrics.py and the dashboard that draws it: every number has a name, and no panel asks for another."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from pu_ray.images import ImageError
from serving import metrics
from serving.predictor import Predictions
from serving.registry import Student

DASHBOARD = Path(__file__).parents[3] / "cluster" / "grafana" / "serving.json"


class Recorder:
    """Stands for any of Ray's metrics."""

    made: ClassVar[dict[str, Recorder]] = {}

    def __init__(self, name: str, description: str, *rest: Any) -> None:
        self.values: list[tuple[float, dict[str, str]]] = []
        self.allowed = set(rest[-1])
        assert description.endswith(".") or "index" in description
        Recorder.made[name] = self

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert value > 0, "Ray refuses to count nothing"
        assert all(text.isascii() for text in (tags or {}).values()), "and what is not ASCII"
        assert set(tags or {}) == self.allowed
        self.values.append((value, tags or {}))

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert set(tags or {}) == self.allowed
        self.values.append((value, tags or {}))

    set = observe


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    Recorder.made = {}
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics.metrics, kind, Recorder)
    metrics._stages.cache_clear()
    monkeypatch.setattr(metrics, "_PERIOD_S", 0.01)
    return Recorder.made


def counting(*calls: Callable[[metrics.FrontMeter], None]) -> None:
    """Make these calls to a meter in an event loop, and wait until it has passed them on."""

    async def counted() -> None:
        meter = metrics.FrontMeter()
        for call in calls:
            call(meter)
        await asyncio.sleep(0.05)

    asyncio.run(counted())


def total(recorder: Recorder) -> float:
    return sum(value for value, _ in recorder.values)


def test_answers_are_counted_by_class_and_failures_apart(student: Student, recorded: dict[str, Recorder]) -> None:
    logits = np.array([[9, 0, 0], [np.nan] * 3, [0, 9, 0], [0, 0, 9]], np.float32)
    predictions = Predictions(logits, {1: ImageError("truncated", "")})
    counting(
        lambda meter: meter.answered(student, predictions, 0.25),
        lambda meter: meter.responded("/v1/classify", 200),
        lambda meter: meter.responded("/v1/classify", 200),
    )
    assert total(recorded["pu_ray_images"]) == 3
    assert total(recorded["pu_ray_failed_images"]) == 1
    assert [tags["label"] for _, tags in recorded["pu_ray_predictions"].values] == ["cat", "dog", r"\xdcnicorn"]
    assert recorded["pu_ray_request_seconds"].values[0][0] == 0.25
    assert recorded["pu_ray_responses"].values == [(2, {"route": "/v1/classify", "status": "200"})]


def test_nothing_usable_counts_no_class(student: Student, recorded: dict[str, Recorder]) -> None:
    nothing = Predictions(np.full((1, 3), np.nan, np.float32), {0: ImageError("truncated", "")})
    counting(lambda meter: meter.answered(student, nothing, 0.1), lambda meter: meter.shadowed(student, 0, 0))
    assert total(recorded["pu_ray_failed_images"]) == 1
    assert recorded["pu_ray_predictions"].values == recorded["pu_ray_images"].values == []


def test_drift_is_told_where_the_export_knows_its_certainty(student: Student, recorded: dict[str, Recorder]) -> None:
    certain = Predictions(np.tile(np.array([[9, 0, 0]], np.float32), (300, 1)), {})
    counting(lambda meter: meter.answered(student, certain, 0.1))
    assert recorded["pu_ray_score_drift"].values == []
    unsure = dataclasses.replace(student, confidence_deciles=tuple(np.linspace(0.4, 0.8, 9).tolist()))
    counting(lambda meter: meter.answered(unsure, certain, 0.1))
    ((value, _),) = recorded["pu_ray_score_drift"].values
    assert value > 1


def test_shadows_are_compared(student: Student, recorded: dict[str, Recorder]) -> None:
    counting(lambda meter: meter.shadowed(student, 3, 4), lambda meter: meter.shadowed(student, 0, 1))
    assert total(recorded["pu_ray_shadow_images"]) == 5
    assert total(recorded["pu_ray_shadow_agreements"]) == 3


def test_the_dashboard_draws_what_is_measured(student: Student, recorded: dict[str, Recorder]) -> None:
    metrics.FrontMeter()
    metrics.StudentMeter(student)
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {
        name
        for text in expressions
        for name in re.findall(r"ray_(pu_ray_[a-z_]+?)(?:_total|_bucket|_sum|_count)?\b(?=[{\[])", text)
    }
    assert asked == set(recorded)
    for text in expressions:
        assert text.count("(") == text.count(")")
    corners = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(corners)) == len(corners)
