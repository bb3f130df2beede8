"""The worst class weights near given ones: the inner maximum of robust knowledge distillation.

The paper's theory is min over the student, max over class weights v in an uncertainty set around w. Its code
draws one non-negative perturbation, which raises the sum of the weights and so always wins: no maximum is taken.
Here the maximum is exact. Axis: K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BISECTIONS = 60  # more than a float64 has bits


def worst_weights(weights_K: Any, losses_K: Any, shares_K: Any, radius: float) -> Floats:
    """Maximise sum_k share_k * loss_k * v_k over {v >= 0, sum_k share_k v_k = sum_k share_k w_k, |v - w|_2 <= radius}.

    The Karush-Kuhn-Tucker conditions give v = max(0, w + s * (c - mu * a)) with c_k = share_k * loss_k and
    a_k = share_k; mu solves the linear constraint (exactly, by sorting), and the step s is bisected until the
    distance is the radius, or the best vertex lies inside the ball.

    Args:
        weights_K: w, the centre, float [K], non-negative.
        losses_K: Mean loss of each class, float [K].
        shares_K: Share of each class among the images, float [K]; a class with share 0 keeps its weight.
        radius: epsilon, at least 0; 0 returns w.

    Returns:
        v, float64 [K].

    Raises:
        ValueError: Negative weights, shares or radius, or values that are not finite.
    """
    w = np.asarray(weights_K, np.float64)
    a = np.asarray(shares_K, np.float64)
    c = a * np.asarray(losses_K, np.float64)
    if not all(np.isfinite(values).all() for values in (w, a, c)) or min(w.min(), a.min(), radius) < 0:
        raise ValueError("weights, shares and radius must be finite and not negative")
    if radius == 0:
        return w.copy()
    live = a > 0
    worst = w.copy()
    worst[live] = _maximise(w[live], c[live], a[live], radius)
    return worst


def _maximise(w: Floats, c: Floats, a: Floats, radius: float) -> Floats:
    total = float(a @ w)
    direction = c - a * (a @ c) / (a @ a)
    scale = float(np.abs(direction).max(initial=0.0))
    # Losses in proportion to the constraint leave nothing to gain.
    if scale <= 1e-12 * max(float(np.abs(c).max(initial=0.0)), 1e-300):
        return w.copy()

    # Adding a multiple of `a` changes no projection; this one keeps the largest coordinate small at any step.
    climb = c - a * (c / a).max()

    def point(step: float) -> Floats:
        return _project(w + step * climb, a, total)

    low, high = 0.0, radius / scale
    while np.linalg.norm(point(high) - w) < radius:
        if high * scale > 1e12 * (1 + float(w.max())):  # the best face lies inside the ball
            return point(high)
        low, high = high, high * 4
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if np.linalg.norm(point(middle) - w) <= radius:
            low = middle
        else:
            high = middle
    return point(low)


def _project(target: Floats, a: Floats, total: float) -> Floats:
    """max(0, target - mu * a) with a @ result = total: Euclidean projection, mu by sorting the breakpoints."""
    breakpoints = target / a
    order = np.argsort(-breakpoints)
    dot = np.cumsum((a * target)[order])
    square = np.cumsum((a * a)[order])
    mu = (dot - total) / square
    # The right set of positive coordinates is the largest whose own mu lies below all its breakpoints.
    valid = np.flatnonzero(mu < breakpoints[order])
    chosen = mu[valid[-1]] if len(valid) else mu[0]
    result: Floats = np.maximum(0.0, target - chosen * a)
    return result


def paper_perturbation(weights_K: Any, radius: float, generator: np.random.Generator) -> Floats:
    """The published code's candidate: w + radius * Uniform[0, 1]^K; the larger of the two losses is used."""
    w = np.asarray(weights_K, np.float64)
    return w + radius * generator.random(len(w))
