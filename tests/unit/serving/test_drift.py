"""serving/drift.py: certainty that has moved, told by an independent reckoning."""

from __future__ import annotations

import numpy as np
import pytest

from serving.drift import Drift

REFERENCE = np.random.default_rng(0).beta(5, 2, size=5000)
EDGES = np.quantile(REFERENCE, np.linspace(0.1, 0.9, 9)).tolist()


def index_of(values: np.ndarray, edges: list[float] = EDGES) -> float:
    drift = Drift(edges)
    drift.add(values.tolist())
    assert drift.index is not None
    return drift.index


def test_the_same_certainty_is_stable() -> None:
    assert index_of(np.random.default_rng(1).beta(5, 2, size=2000)) < 0.02


def test_another_certainty_is_told_by_how_much_it_moved() -> None:
    moved = [index_of(np.random.default_rng(1).beta(a, 2, size=2000)) for a in (5, 4, 3, 1)]
    assert moved == sorted(moved)
    assert moved[-1] > 0.25


def test_it_is_jeffreys_divergence_of_the_shares() -> None:
    values = np.random.default_rng(2).beta(3, 2, size=2000)
    counts = np.histogram(values, [-np.inf, *EDGES, np.inf])[0] + 0.5
    shares = counts / counts.sum()
    kl = (shares * np.log(shares / 0.1)).sum() + (0.1 * np.log(0.1 / shares)).sum()
    assert index_of(values) == pytest.approx(kl, rel=1e-9)


@pytest.mark.parametrize("certain", [0.3, 0.6, 0.8])
def test_a_student_that_is_always_certain_does_not_drift_by_that(certain: float) -> None:
    def draw(seed: int, count: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return np.where(generator.random(count) < certain, 1.0, generator.beta(5, 2, count))

    edges = np.quantile(draw(0, 5000), np.linspace(0.1, 0.9, 9)).tolist()
    assert index_of(draw(1, 2000), edges) < 0.02
    assert index_of(np.full(2000, 0.4), edges) > 0.25


def test_few_images_say_nothing_and_old_ones_are_forgotten() -> None:
    drift = Drift(EDGES)
    drift.add([0.1] * 199)
    assert drift.index is None
    drift.add([0.1] * 2000)
    assert drift.index is not None
    assert drift.index > 1
    drift.add(np.random.default_rng(1).beta(5, 2, size=2000).tolist())
    assert drift.index < 0.02
