"""pu_ray/distill/robust.py against SciPy's solvers, brute force, and geometry on paper."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from pu_ray.distill import robust


def problem(seed, zero_shares=False, ties=False):
    generator = np.random.default_rng(seed)
    classes = 2 + seed % 7
    weights = generator.uniform(0.0, 2.0, classes)
    losses = generator.uniform(0.0, 3.0, classes)
    shares = generator.dirichlet(np.ones(classes))
    if ties:
        losses[: max(2, classes // 2)] = losses.max()
        weights[-1] = 0.0
    if zero_shares:
        shares[seed % classes] = 0.0
        shares /= shares.sum()
    return weights, losses, shares


def gain(candidate, losses, shares):
    return float((shares * losses) @ candidate)


def slsqp(weights, losses, shares, radius):
    """The same maximum by sequential quadratic programming, from several starts."""
    objective = shares * losses
    best = gain(weights, losses, shares)
    generator = np.random.default_rng(0)
    for _ in range(3):
        start = np.clip(weights + generator.normal(0, radius / 4, len(weights)), 0, None)
        found = optimize.minimize(
            lambda v: -objective @ v,
            start,
            jac=lambda _: -objective,
            method="SLSQP",
            bounds=[(0, None)] * len(weights),
            constraints=[
                {"type": "eq", "fun": lambda v: shares @ (v - weights), "jac": lambda _: shares},
                {
                    "type": "ineq",
                    "fun": lambda v: radius**2 - (v - weights) @ (v - weights),
                    "jac": lambda v: -2 * (v - weights),
                },
            ],
            options={"ftol": 1e-13, "maxiter": 300},
        )
        v = found.x
        feasible = v.min() > -1e-9 and abs(shares @ (v - weights)) < 1e-8
        if feasible and np.linalg.norm(v - weights) <= radius + 1e-7:
            best = max(best, -float(found.fun))
    return best


def assert_feasible(worst, weights, shares, radius):
    assert worst.min() >= 0
    assert shares @ worst == pytest.approx(shares @ weights, rel=1e-9, abs=1e-12)
    assert np.linalg.norm(worst - weights) <= radius * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("kind", ["plain", "ties", "zero share"])
@pytest.mark.parametrize("radius", [0.01, 0.3, 1.5])
@pytest.mark.parametrize("seed", range(10))
def test_the_maximum_is_the_one_that_scipy_finds(seed, radius, kind):
    weights, losses, shares = problem(seed, kind == "zero share", kind == "ties")
    worst = robust.worst_weights(weights, losses, shares, radius)
    assert_feasible(worst, weights, shares, radius)
    # A class without images must keep its weight, so SciPy is asked about the others.
    live = shares > 0
    np.testing.assert_array_equal(worst[~live], weights[~live])
    expected = slsqp(weights[live], losses[live], shares[live], radius)
    assert gain(worst, losses, shares) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("seed", range(21))
def test_no_random_feasible_point_is_worse_for_the_student(seed):
    weights, losses, shares = problem(seed)
    radius = [0.05, 0.5, 3.0][seed % 3]
    worst = gain(robust.worst_weights(weights, losses, shares, radius), losses, shares)
    generator = np.random.default_rng([seed, 1])
    steps = generator.normal(size=(4000, len(weights)))
    steps -= np.outer(steps @ shares, shares) / (shares @ shares)  # keeps the normalisation
    length = radius * generator.uniform(0, 1, (4000, 1)) ** (1 / len(weights))
    points = weights + steps / np.linalg.norm(steps, axis=1, keepdims=True) * length
    points = points[points.min(axis=1) >= 0]
    assert len(points) > 0
    assert (points @ (shares * losses)).max() <= worst + 1e-9


@pytest.mark.parametrize("radius", [1e3, 1e6, 1e12])
@pytest.mark.parametrize("seed", range(14))
def test_a_huge_radius_leaves_a_linear_program(seed, radius):
    weights, losses, shares = problem(seed, ties=seed % 2 == 1)
    shares = (shares + 0.05) / (shares + 0.05).sum()  # so that the ball of 1e3 holds every vertex
    worst = robust.worst_weights(weights, losses, shares, radius)
    assert_feasible(worst, weights, shares, radius)
    program = optimize.linprog(-shares * losses, A_eq=shares[None], b_eq=[shares @ weights])
    assert gain(worst, losses, shares) == pytest.approx(-program.fun, rel=1e-9)


def test_two_classes_on_paper():
    # Equal shares 1/2, w = (1, 1): the line v_0 + v_1 = 2 in direction (1, -1) / sqrt 2. Radius sqrt(2) / 2 reaches
    # v = (3/2, 1/2); beyond sqrt(2) the corner (2, 0) is the end.
    for radius, expected in [(np.sqrt(2) / 2, (1.5, 0.5)), (np.sqrt(2), (2, 0)), (50.0, (2, 0))]:
        worst = robust.worst_weights([1.0, 1.0], [3.0, 1.0], [0.5, 0.5], radius)
        np.testing.assert_allclose(worst, expected, atol=1e-6)


def test_three_classes_on_paper():
    # Equal shares, w = (1, 1, 1), losses (2, 1, 0): inside the simplex the step is along the centred losses (1, 0, -1).
    worst = robust.worst_weights([1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1 / 3] * 3, 0.5 * np.sqrt(2))
    np.testing.assert_allclose(worst, [1.5, 1.0, 0.5], atol=1e-9)


@pytest.mark.parametrize("seed", range(21))
def test_the_answer_is_never_worse_than_the_given_weights_and_grows_with_the_radius(seed):
    weights, losses, shares = problem(
        seed, zero_shares=seed % 7 == 3, ties=seed % 7 == 5
    )  # with five and seven classes
    gains = [gain(weights, losses, shares)]
    for radius in (1e-6, 0.01, 0.1, 1.0, 10.0, 1e4):
        gains.append(gain(robust.worst_weights(weights, losses, shares, radius), losses, shares))
    assert (np.diff(gains) >= -1e-10).all(), gains
    assert gains[-1] > gains[0], "losses that differ leave something to gain"


def test_radius_zero_gives_back_the_weights_as_a_copy():
    weights = np.array([0.5, 1.5])
    worst = robust.worst_weights(weights, [3.0, 1.0], [0.5, 0.5], 0.0)
    np.testing.assert_array_equal(worst, weights)
    worst[0] = 9.0
    assert weights[0] == 0.5


@pytest.mark.parametrize("radius", [0.1, 100.0])
@pytest.mark.parametrize(
    ("weights", "losses", "shares"),
    [
        ([0.7], [2.0], [1.0]),
        ([0.7, 0.4], [2.0, 5.0], [1.0, 0.0]),
        ([0.2, 1.0, 1.8], [2.0, 2.0, 2.0], [0.2, 0.3, 0.5]),
        ([0.2, 1.0, 1.8], [0.0, 0.0, 0.0], [0.2, 0.3, 0.5]),
        ([0.0, 2.0], [1.0, 3.0], [0.5, 0.5]),
        ([0.0, 0.0], [1.0, 3.0], [0.5, 0.5]),
    ],
    ids=["one class", "one live class", "equal losses", "no loss", "already in the corner", "no weight"],
)
def test_where_nothing_can_be_gained_the_weights_stay(weights, losses, shares, radius):
    np.testing.assert_allclose(robust.worst_weights(weights, losses, shares, radius), weights, atol=1e-9)


def test_losses_that_are_nearly_equal_are_still_told_apart():
    # The last class is pushed out at once; between the first two only a millionth decides, and takes a long way.
    worst = robust.worst_weights([1.0, 1.0, 1.0], [1.0, 1.0 + 1e-6, 0.0], [1 / 3] * 3, 100.0)
    np.testing.assert_allclose(worst, [0.0, 3.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_the_unit_of_the_losses_does_not_matter(scale):
    weights, losses, shares = problem(5)
    np.testing.assert_allclose(
        robust.worst_weights(weights, losses * scale, shares, 0.4),
        robust.worst_weights(weights, losses, shares, 0.4),
        atol=1e-7,
    )


def test_a_thousand_classes_meet_the_constraints():
    generator = np.random.default_rng(7)
    weights, losses = generator.uniform(0, 10, 1000), generator.exponential(1, 1000)
    shares = generator.dirichlet(np.full(1000, 0.1))
    for radius in (0.1, 30.0, 1e4):
        worst = robust.worst_weights(weights, losses, shares, radius)
        assert_feasible(worst, weights, shares, radius)
        assert gain(worst, losses, shares) > gain(weights, losses, shares)


@pytest.mark.parametrize(
    ("weights", "losses", "shares", "radius"),
    [
        ([-0.1, 1.0], [1.0, 2.0], [0.5, 0.5], 0.1),
        ([1.0, 1.0], [1.0, 2.0], [1.5, -0.5], 0.1),
        ([1.0, 1.0], [1.0, 2.0], [0.5, 0.5], -0.1),
        ([1.0, 1.0], [1.0, float("nan")], [0.5, 0.5], 0.1),
        ([1.0, float("inf")], [1.0, 2.0], [0.5, 0.5], 0.1),
    ],
)
def test_impossible_inputs_are_refused(weights, losses, shares, radius):
    with pytest.raises(ValueError, match="weights, shares and radius must be finite and not negative"):
        robust.worst_weights(weights, losses, shares, radius)


def test_the_papers_perturbation_only_adds_and_stays_below_the_radius():
    weights = np.array([0.5, 1.0, 1.5])
    candidates = np.stack([robust.paper_perturbation(weights, 0.1, np.random.default_rng(s)) for s in range(2000)])
    added = candidates - weights
    assert added.min() >= 0
    assert added.max() < 0.1
    # Uniform on [0, 0.1]: mean 0.05, standard deviation 0.1 / sqrt 12 = 0.0289; independent between classes.
    np.testing.assert_allclose(added.mean(axis=0), 0.05, atol=4 * 0.0289 / np.sqrt(2000))
    np.testing.assert_allclose(added.std(axis=0), 0.0289, rtol=0.05)
    assert abs(np.corrcoef(added.T)[0, 1]) < 0.1
