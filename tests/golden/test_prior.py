"""pu_ray/pu/prior.py on lakes whose prior is known, and its bands against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from pu_ray.pu import prior
from pu_ray.pu.prior import estimate_prior

DRAWS = 200


def lake(seed, true_prior, separation, positives=150, unlabeled=5000):
    """Scores of held-out positives N(separation, 1), and of a lake whose negatives are N(0, 1)."""
    generator = np.random.default_rng([seed, 17])
    hidden = generator.binomial(unlabeled, true_prior)
    lake_scores = np.r_[generator.normal(separation, 1, hidden), generator.normal(0, 1, unlabeled - hidden)]
    return generator.normal(separation, 1, positives), lake_scores


@pytest.mark.parametrize("true_prior", [0.01, 0.05, 0.2, 0.5])
def test_well_separated_scores_give_the_prior_and_an_interval_that_covers_it(true_prior):
    results = [estimate_prior(*lake(seed, true_prior, separation=6)) for seed in range(DRAWS)]
    estimates = np.array([result.estimate for result in results])
    # The lake itself holds a binomial share of positives; an estimate cannot scatter less, and should not much more.
    # (Rarely one stray low positive lets negatives in, which lifts the estimate; the interval still covers.)
    scatter = math.sqrt(true_prior * (1 - true_prior) / 5000)
    assert estimates.mean() == pytest.approx(true_prior, rel=0.04)
    assert np.quantile(np.abs(estimates - true_prior), 0.95) < 3 * scatter
    covered = np.mean([result.low <= true_prior <= result.high for result in results])
    assert covered >= 0.95
    # An interval that said (0, 1) would cover too.
    assert np.mean([result.high for result in results]) < 2 * true_prior
    assert np.mean([result.low for result in results]) > true_prior / 4
    assert np.mean([result.is_upper_bound for result in results]) <= 0.02
    assert all(0 < result.low <= result.estimate <= result.high <= 1 for result in results)


def test_positives_that_are_hard_to_tell_from_some_negatives_give_an_upper_bound_and_say_so():
    results = [estimate_prior(*lake(seed, 0.05, separation=1, positives=500)) for seed in range(40)]
    assert np.mean([result.is_upper_bound for result in results]) >= 0.95
    assert all(result.high >= 0.05 for result in results), "an upper bound must lie above"
    assert np.mean([result.estimate for result in results]) > 0.1, "and nobody can do better here"


def test_scores_that_tell_nothing_give_an_upper_bound_and_say_so():
    results = [estimate_prior(*lake(seed, 0.05, separation=0)) for seed in range(10)]
    assert all(result.high >= 0.95 for result in results)
    assert all(result.is_upper_bound for result in results)


def test_a_lake_of_positives_only_has_the_prior_one():
    result = estimate_prior(*lake(3, 1.0, separation=6))
    assert result.estimate > 0.95
    assert result.high == 1.0


def test_a_lake_without_positives_has_a_prior_next_to_zero():
    result = estimate_prior(*lake(3, 0.0, separation=8))
    assert result.estimate == pytest.approx(1 / 5000)  # not zero: later stages divide by it
    assert 0 <= result.low <= result.estimate
    assert result.high < 0.005


def test_more_confidence_means_a_wider_interval():
    scores = lake(5, 0.2, separation=6)
    narrow, wide = estimate_prior(*scores, confidence=0.5), estimate_prior(*scores, confidence=0.999)
    assert wide.low < narrow.low
    assert narrow.high < wide.high
    assert (narrow.confidence, wide.confidence) == (0.5, 0.999)


def test_only_the_order_of_the_scores_matters():
    positive, unlabeled = lake(6, 0.2, separation=3)
    assert estimate_prior(np.exp(positive), np.exp(unlabeled)) == estimate_prior(positive, unlabeled)
    assert estimate_prior(positive[::-1], unlabeled[::-1]) == estimate_prior(positive, unlabeled)


def test_tied_scores_are_counted_on_both_sides():
    # Every positive scores 1; so do 300 of 1000 lake images: the only useful threshold keeps 100 % and 30 %.
    result = estimate_prior(np.ones(50), np.r_[np.ones(300), np.zeros(700)])
    assert result.estimate == pytest.approx(0.3)
    assert not result.is_upper_bound


# -- the bands ---------------------------------------------------------------------------------------------


def kl(p, q):
    return float(stats.entropy([p, 1 - p], [q, 1 - q]))


@pytest.mark.parametrize("count", [10, 137, 20_000])
@pytest.mark.parametrize("delta", [0.05, 1e-4])
@pytest.mark.parametrize("share", [0.001, 0.03, 0.5, 0.97])
def test_the_bands_solve_the_divergence_equation(share, delta, count):
    budget = math.log(1 / delta) / count
    excess = lambda q: kl(share, q) - budget  # noqa: E731
    tiny = 1e-300
    upper = optimize.brentq(excess, share, 1 - 1e-16, xtol=1e-15) if excess(1 - 1e-16) > 0 else 1.0
    lower = optimize.brentq(excess, tiny, share, xtol=1e-15) if excess(tiny) > 0 else 0.0
    assert prior.kl_upper(np.array([share]), count, delta)[0] == pytest.approx(upper, abs=1e-9)
    assert prior.kl_lower(np.array([share]), count, delta)[0] == pytest.approx(lower, abs=1e-9)


def test_the_bands_at_the_ends_on_paper():
    # Nothing seen in n: KL(0 || q) = -ln(1 - q), so q = 1 - delta^(1/n); all seen: q = delta^(1/n).
    ends = np.array([0.0, 1.0])
    np.testing.assert_allclose(prior.kl_upper(ends, 40, 0.05), [1 - 0.05 ** (1 / 40), 1.0], atol=1e-12)
    np.testing.assert_allclose(prior.kl_lower(ends, 40, 0.05), [0.0, 0.05 ** (1 / 40)], atol=1e-12)


def test_the_bands_rise_with_the_share_tighten_with_the_count_and_widen_with_confidence():
    shares = np.linspace(0, 1, 101)
    upper, lower = prior.kl_upper(shares, 50, 0.01), prior.kl_lower(shares, 50, 0.01)
    assert (np.diff(upper) >= 0).all()
    assert (np.diff(lower) >= 0).all()
    assert (lower <= shares).all()
    assert (shares <= upper).all()
    assert (prior.kl_upper(shares, 500, 0.01)[1:-1] < upper[1:-1]).all()
    assert (prior.kl_lower(shares, 500, 0.01)[1:-1] > lower[1:-1]).all()
    assert (prior.kl_upper(shares, 50, 0.1)[1:-1] < upper[1:-1]).all()


@pytest.mark.parametrize(("share", "count"), [(0.02, 100), (0.4, 60)])
def test_the_bands_hold_as_often_as_they_promise(share, count):
    delta = 0.05
    hits = np.arange(count + 1)
    probability = stats.binom.pmf(hits, count, share)
    assert probability[prior.kl_upper(hits / count, count, delta) < share].sum() <= delta
    assert probability[prior.kl_lower(hits / count, count, delta) > share].sum() <= delta


# -- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positives", "unlabeled"), [(9, 100), (100, 9), (0, 0)])
def test_too_few_scores_are_refused_with_both_counts(positives, unlabeled):
    with pytest.raises(ValueError, match=f"at least 10 scores are needed on either side, got {positives}, {unlabeled}"):
        estimate_prior(np.arange(positives), np.arange(unlabeled))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    good = np.arange(20.0)
    for scores in ((np.r_[good, bad], good), (good, np.r_[good, bad])):
        with pytest.raises(ValueError, match="scores must be finite"):
            estimate_prior(*scores)


def test_ten_scores_on_either_side_are_enough():
    assert estimate_prior(np.arange(10.0) + 100, np.arange(10.0)).estimate == pytest.approx(0.1)
