"""pu_ray/pu/threshold.py against exact fractions, and the promise against thousands of draws."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import special

from pu_ray.pu.threshold import fewest_positives, recall_threshold


def at_least(rank, n, share):
    """P(Binomial(n, share) >= rank), exactly."""
    below = sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(rank))
    return 1 - below


@pytest.mark.parametrize("recall", range(2, 100, 7))
@pytest.mark.parametrize("confidence", [1, 10, 19, 36, 50, 75, 90, 95, 99])
def test_fewest_positives_is_the_first_number_that_brute_force_finds(recall, confidence):
    exact_recall, allowed = Fraction(recall, 100), 1 - Fraction(confidence, 100)
    expected = next(n for n in range(1, 1000) if exact_recall**n <= allowed)
    assert fewest_positives(recall / 100, confidence / 100) == expected


def test_fewest_positives_where_the_promise_is_met_exactly():
    # 1/2 * 1/2 = 1/4; 0.9 * 0.9 = 0.81; a hair of rounding must not ask for one image more.
    assert fewest_positives(0.5, 0.75) == 2
    assert fewest_positives(0.9, 0.19) == 2
    assert fewest_positives(0.1, 0.9) == 1


def test_the_usual_promise_needs_fiftynine_positives():
    # 0.95^58 = 0.0510 and 0.95^59 = 0.0485.
    assert fewest_positives(0.95, 0.95) == 59


@pytest.mark.parametrize("n", [59, 60, 93, 200])
def test_the_rank_is_the_largest_that_exact_fractions_allow(n):
    recall, confidence = Fraction(19, 20), Fraction(19, 20)
    ours = recall_threshold(np.arange(n), 0.95, 0.95)
    assert at_least(ours.rank, n, 1 - recall) >= confidence
    assert at_least(ours.rank + 1, n, 1 - recall) < confidence
    assert ours.value == ours.rank - 1  # the rank-th smallest of 0, 1, 2, ...


@pytest.mark.parametrize(("recall", "confidence"), [(0.8, 0.9), (0.95, 0.95), (0.99, 0.8)])
@pytest.mark.parametrize("n", [300, 1777])
def test_the_rank_agrees_with_the_beta_distribution_of_order_statistics(n, recall, confidence):
    # The share of positives below the k-th smallest of n is Beta(k, n + 1 - k); recall >= r where it is <= 1 - r.
    holds = [k for k in range(1, n + 1) if special.betainc(k, n + 1 - k, 1 - recall) >= confidence]
    assert recall_threshold(np.arange(n), recall, confidence).rank == max(holds)


@pytest.mark.parametrize(("n", "recall", "confidence"), [(59, 0.95, 0.95), (400, 0.9, 0.9), (1000, 0.95, 0.95)])
def test_the_promise_is_missed_as_seldom_as_it_says_and_not_much_more_seldom(n, recall, confidence):
    draws, delta = 2000, 1 - confidence
    generator = np.random.default_rng(n)
    # Uniform scores: a threshold t keeps the share 1 - t of all positives.
    kept = np.array([1 - recall_threshold(generator.random(n), recall, confidence).value for _ in range(draws)])
    missed = np.mean(kept < recall)
    noise = 4 * math.sqrt(delta * (1 - delta) / draws)
    assert missed <= delta + noise
    # The next rank would break the promise, so what is given away is less than one rank's probability.
    rank = recall_threshold(np.arange(n), recall, confidence).rank
    slack = float(at_least(rank, n, 1 - Fraction(recall).limit_denominator(100))) - confidence
    assert missed >= delta - slack - noise
    assert missed > 0, "a threshold that keeps everything would also never miss"
    if n >= 400:
        assert kept.mean() < recall + 0.03


def test_the_promise_does_not_depend_on_the_distribution_of_the_scores():
    scores = np.random.default_rng(2).normal(size=200)
    plain, transformed = recall_threshold(scores, 0.9, 0.9), recall_threshold(np.exp(5 * scores), 0.9, 0.9)
    assert plain.rank == transformed.rank
    assert transformed.value == pytest.approx(math.exp(5 * plain.value))


def test_the_order_of_the_calibration_scores_does_not_matter():
    scores = np.random.default_rng(3).normal(size=100)
    assert recall_threshold(scores, 0.9, 0.9) == recall_threshold(np.sort(scores)[::-1], 0.9, 0.9)


def test_ties_keep_more_and_never_less():
    # All alike: score >= value keeps every one of them.
    result = recall_threshold(np.full(100, 0.25), 0.9, 0.9)
    assert result.value == 0.25


def test_too_few_positives_are_refused_with_the_number_that_is_needed():
    with pytest.raises(
        ValueError, match=r"recall 0\.95 with confidence 0\.95 needs at least 59 calibration positives, got 58$"
    ):
        recall_threshold(np.zeros(58), 0.95, 0.95)
    assert recall_threshold(np.zeros(59), 0.95, 0.95).rank == 1


@pytest.mark.parametrize(("recall", "confidence"), [(0.9, 0.1), (0.9, 0.19), (0.8, 0.36), (0.8, 0.2)])
def test_the_fewest_positives_suffice_even_where_the_promise_is_met_exactly(recall, confidence):
    assert recall_threshold(np.zeros(fewest_positives(recall, confidence)), recall, confidence).rank == 1


def test_the_answer_says_what_was_promised_from_how_many():
    result = recall_threshold(np.arange(100.0), 0.9, 0.8)
    assert (result.recall, result.confidence, result.calibration) == (0.9, 0.8, 100)
