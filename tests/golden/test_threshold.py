"""pu_ray/pu/threshold.py against exact fractions and brute force, and the promises against hundreds of draws."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import special

from pu_ray.pu.threshold import (
    classes_short_of_positives,
    count_between,
    discard_threshold,
    fewest_positives,
    fewest_positives_to_discard,
    recall_threshold,
    recall_thresholds_per_class,
)


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


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="scores must not be NaN"):
        recall_threshold(np.r_[np.zeros(99), math.nan], 0.9, 0.9)


# -- for each class ----------------------------------------------------------------------------------------

SPREAD = np.array([0.2, 1.0, 5.0])  # positives of the later classes score far lower now and then


def draw_of_classes(generator, n):
    """Scores and predicted classes of n positives; class k is drawn with share (3 - k) / 6."""
    classes = generator.choice(3, n, p=[3 / 6, 2 / 6, 1 / 6])
    return -generator.exponential(SPREAD[classes]), classes


def test_each_class_keeps_its_promise_and_one_threshold_for_all_would_not():
    recall, confidence, draws = 0.9, 0.9, 600
    generator = np.random.default_rng(4)
    kept, kept_by_one = np.empty((draws, 3)), np.empty((draws, 3))
    for draw in range(draws):
        scores, classes = draw_of_classes(generator, 400)
        found = recall_thresholds_per_class(scores, classes, 3, recall, confidence)
        # A threshold -t keeps the share 1 - exp(-t / spread) of a class.
        kept[draw] = 1 - np.exp(np.array([threshold.value for threshold in found]) / SPREAD)
        kept_by_one[draw] = 1 - np.exp(recall_threshold(scores, recall, confidence).value / SPREAD)
    noise = 3 * math.sqrt(confidence * (1 - confidence) / draws)
    missed = (kept < recall).mean(axis=0)
    assert (missed <= 1 - confidence + noise).all()
    assert (missed > 0).all(), "thresholds that keep everything would also never miss"
    assert (kept.mean(axis=0) < recall + 0.06).all()
    assert (kept_by_one < recall).mean(axis=0)[2] > 0.9


def test_each_classs_threshold_is_that_of_its_own_positives():
    scores, classes = draw_of_classes(np.random.default_rng(5), 300)
    found = recall_thresholds_per_class(scores, classes, 3, 0.8, 0.9)
    assert found == tuple(recall_threshold(scores[classes == k], 0.8, 0.9) for k in range(3))
    assert [threshold.calibration for threshold in found] == np.bincount(classes).tolist()


def test_classes_with_too_few_positives_are_named_with_their_counts_and_the_need():
    classes = np.repeat([0, 1, 3], [22, 21, 5])
    assert fewest_positives(0.9, 0.9) == 22
    assert classes_short_of_positives(classes, 4, 0.9, 0.9) == {1: 21, 2: 0, 3: 5}
    with pytest.raises(
        ValueError,
        match=r"recall 0\.9 with confidence 0\.9 needs at least 22 calibration positives of each predicted class, "
        r"got 21 of class 1, 0 of class 2, 5 of class 3$",
    ):
        recall_thresholds_per_class(np.zeros(48), classes, 4, 0.9, 0.9)
    assert classes_short_of_positives(np.repeat([0, 1], 22), 2, 0.9, 0.9) == {}


@pytest.mark.parametrize("wrong", [-1, 2])
def test_a_class_that_the_teacher_does_not_have_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"classes must lie in 0 \.\. 1, got {wrong}"):
        recall_thresholds_per_class(np.zeros(60), np.r_[np.repeat([0, 1], 29), wrong, wrong], 2, 0.9, 0.9)


# -- discards ----------------------------------------------------------------------------------------------


def p_values(calibration, lake):
    """Conformal p-values of "is a positive", by definition and exactly."""
    return [Fraction(1 + sum(c <= score for c in calibration), len(calibration) + 1) for score in lake]


def benjamini_hochberg(p, rate):
    """Which hypotheses fall, by definition: all with p <= p_(k), for the last k with p_(k) <= rate * k / N."""
    ordered = sorted(p)
    passing = [k for k, value in enumerate(ordered, start=1) if value <= rate * k / len(p)]
    return [bool(passing) and value <= ordered[passing[-1] - 1] for value in p]


@pytest.mark.parametrize("rate", [Fraction(1, 20), Fraction(29, 100), Fraction(7, 10)])
@pytest.mark.parametrize("decimals", [0, 1, 9])
@pytest.mark.parametrize("seed", range(8))
def test_the_binned_procedure_is_the_one_on_the_whole_list_of_p_values(seed, decimals, rate):
    generator = np.random.default_rng([seed, decimals])
    n = int(generator.integers(19, 60))
    calibration = generator.normal(2, 1, n).round(decimals)
    lake = np.r_[generator.normal(2, 1, 60), generator.normal(0, 1, 140)].round(decimals)
    lake[:5] = -math.inf  # rejected by the gate
    if seed % 2:
        calibration[:2] = -math.inf
    counts = count_between(calibration, lake)
    assert np.repeat(np.arange(n + 1) + 1, counts).tolist() == [
        p * (n + 1) for p in sorted(p_values(calibration, lake))
    ]
    found = discard_threshold(calibration, counts, float(rate))
    assert (lake < found.value).tolist() == benjamini_hochberg(p_values(calibration, lake), rate)
    assert found.discarded == (lake < found.value).sum()
    assert (found.calibration, found.lake, found.rate) == (n, 200, float(rate))
    if found.rank:
        assert found.value == np.sort(calibration)[found.rank - 1]


def test_where_the_procedure_is_met_exactly_the_images_are_discarded():
    # One image in two below all of 19 positives: p = 1/20 = 0.1 * 50 / 100.
    half = np.r_[50, np.zeros(18, int), 50]
    assert discard_threshold(np.arange(19), half, 0.1).discarded == 50
    assert discard_threshold(np.arange(19), half, 0.0999).discarded == 0
    # All of a lake of two at p = 29/100 = 0.29 * 2 / 2, where 0.29 * 100 * 2 is a hair below 58.
    counts = np.zeros(100, int)
    counts[28] = 2
    assert 0.29 * 100 * 2 < 58
    assert discard_threshold(np.arange(99), counts, 0.29).discarded == 2


def test_the_counts_of_blocks_add_up_to_those_of_the_lake():
    generator = np.random.default_rng(6)
    calibration, lake = generator.normal(size=40).round(1), generator.normal(size=1000).round(1)
    parts = sum(count_between(calibration, block) for block in np.array_split(lake, 7))
    np.testing.assert_array_equal(parts, count_between(calibration, lake))
    assert parts.sum() == 1000
    assert count_between(calibration, []).tolist() == [0] * 41


def test_an_image_that_scores_like_a_calibration_positive_counts_it_as_at_or_below():
    assert count_between([1.0, 2.0, 2.0], [0.9, 1.0, 1.5, 2.0, -math.inf]).tolist() == [2, 2, 0, 1]


@pytest.mark.parametrize(("true_prior", "rate"), [(0.1, 0.1), (0.5, 0.1), (0.5, 0.3)])
def test_the_discarded_hold_no_more_positives_than_promised(true_prior, rate):
    draws, size = 600, 1000
    generator = np.random.default_rng([int(100 * true_prior), int(100 * rate)])
    shares, lost, discarded = [], [], []
    for _ in range(draws):
        calibration = generator.normal(1.5, 1, 100)
        positive = generator.random(size) < true_prior
        lake = generator.normal(np.where(positive, 1.5, -1.5), 1)
        out = lake < discard_threshold(calibration, count_between(calibration, lake), rate).value
        shares.append(positive[out].mean() if out.any() else 0.0)
        lost.append(out[positive].mean())
        discarded.append(out[~positive].mean())
    noise = 3 * np.std(shares) / math.sqrt(draws)
    assert np.mean(shares) <= rate + noise
    # The sharper bound of the theorem, which a p-value without its 1 + would already break.
    assert np.mean(shares) <= rate * true_prior + noise
    assert np.mean(shares) > rate * true_prior / 2, "discarding nothing would also keep the promise"
    assert np.mean(discarded) > 0.85
    assert np.mean(lost) < rate


def test_a_lake_of_positives_only_loses_almost_nothing():
    generator = np.random.default_rng(7)
    draws = [generator.normal(size=(2, 200)) for _ in range(500)]
    anything = [discard_threshold(c, count_between(c, lake), 0.1).discarded > 0 for c, lake in draws]
    # All hypotheses are true, so the chance of discarding any image at all is the rate.
    assert np.mean(anything) <= 0.1 + 3 * math.sqrt(0.09 / 500)
    assert any(anything)


def test_where_nothing_can_be_discarded_everything_is_kept():
    found = discard_threshold(np.arange(30), count_between(np.arange(30), np.arange(100) + 50), 0.1)
    assert (found.value, found.rank, found.discarded, found.lake) == (-math.inf, 0, 0, 100)
    empty = discard_threshold(np.arange(30), np.zeros(31, int), 0.1)
    assert (empty.value, empty.lake) == (-math.inf, 0)


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 19), (0.1, 9), (0.3, 3), (0.5, 1), (0.9, 1)])
def test_with_fewer_positives_nothing_could_ever_be_discarded(rate, needed):
    assert fewest_positives_to_discard(rate) == needed
    all_below = np.r_[1000, np.zeros(needed, int)]
    assert discard_threshold(np.arange(needed), all_below, rate).discarded == 1000
    with pytest.raises(
        ValueError, match=rf"rate {rate:g} needs at least {needed} calibration positives, got {needed - 1}"
    ):
        discard_threshold(np.arange(needed - 1), all_below[:-1], rate)


def test_what_makes_no_sense_is_refused():
    scores = np.arange(30.0)
    for rate in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"rate must lie in \(0, 1\), got"):
            discard_threshold(scores, np.zeros(31, int), rate)
    with pytest.raises(ValueError, match="30 calibration scores need 31 counts, got 30"):
        discard_threshold(scores, np.zeros(30, int), 0.1)
    for bad in ((np.r_[scores, math.nan], scores), (scores, np.r_[scores, math.nan])):
        with pytest.raises(ValueError, match="scores must not be NaN"):
            count_between(*bad)
