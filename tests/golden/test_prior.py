"""pu_ray/pu/prior.py on lakes whose prior is known, and its bands against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from pu_ray.pu import prior
from pu_ray.pu.prior import Fold, estimate_prior, pooled_prior

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


# -- pooled folds ------------------------------------------------------------------------------------------


def cross_fitted(seed, true_prior, separation, positives=30, unlabeled=800):
    """Five folds as `lake` makes them, each scored on a scale of its own."""
    folds = [lake([seed, k], true_prior, separation, positives, unlabeled) for k in range(5)]
    return [Fold(*(10.0 ** (k - 2) * side + 3 * k for side in fold)) for k, fold in enumerate(folds)]


@pytest.mark.parametrize("true_prior", [0.01, 0.05, 0.2, 0.5])
def test_pooled_folds_give_the_prior_and_both_intervals_cover_it(true_prior):
    results = [pooled_prior(cross_fitted(seed, true_prior, 6), resamples=60, seed=seed) for seed in range(DRAWS)]
    noise = 3 * math.sqrt(0.95 * 0.05 / DRAWS)
    assert np.mean([result.estimate for result in results]) == pytest.approx(true_prior, rel=0.08)
    assert np.mean([result.low <= true_prior <= result.high for result in results]) >= 0.95
    covered = np.mean([result.bootstrap_low <= true_prior <= result.bootstrap_high for result in results])
    assert covered >= 0.95 - noise
    # Both say something, and what the bands pay for holding always is width.
    widths = np.mean([(r.bootstrap_high - r.bootstrap_low, r.high - r.low) for r in results], axis=0)
    assert widths[0] < widths[1] < 2.5 * true_prior


def test_scores_of_unlike_scorers_are_pooled_as_if_they_were_of_one():
    alike = [Fold(*lake([3, k], 0.1, 4, 40, 1000)) for k in range(5)]
    unlike = [Fold(np.exp(f.positive * k), np.exp(f.unlabeled * k)) for k, f in enumerate(alike, start=1)]
    assert pooled_prior(unlike) == pooled_prior(alike)
    # Put together as they are, the fold with the largest scores would speak for all.
    folds = cross_fitted(3, 0.1, 6)
    sides = ([fold.positive for fold in folds], [fold.unlabeled for fold in folds])
    naive = estimate_prior(*(np.concatenate(side) for side in sides))
    pooled = pooled_prior(cross_fitted(3, 0.1, 6))
    assert naive.is_upper_bound
    assert not pooled.is_upper_bound
    assert pooled.high - pooled.low < (naive.high - naive.low) / 2
    assert pooled.estimate == pytest.approx(0.1, rel=0.2)


def test_one_fold_says_what_the_plain_estimate_says():
    for seed in range(10):
        scores = lake(seed, 0.2, separation=6)
        one, plain = pooled_prior([Fold(*scores)]), estimate_prior(*scores)
        assert one.estimate == pytest.approx(plain.estimate, rel=0.02)
        assert (one.low, one.high) == pytest.approx((plain.low, plain.high), rel=0.05)
        assert (plain.bootstrap_low, plain.bootstrap_high) == (None, None)


def test_pooled_folds_that_are_hard_to_tell_apart_give_an_upper_bound_and_say_so():
    results = [pooled_prior(cross_fitted(seed, 0.05, 1, 100, 1000), resamples=40) for seed in range(40)]
    assert np.mean([result.is_upper_bound for result in results]) >= 0.95
    assert all(result.high >= 0.05 for result in results), "an upper bound must lie above"
    assert np.mean([result.estimate >= 0.05 for result in results]) >= 0.95
    assert np.mean([result.estimate for result in results]) > 0.1


def uneven(seed, true_prior, labeled_per_class=20, unlabeled=4000):
    """Five folds of three classes: labeled evenly, 70 : 20 : 10 in the lake, and the rarest scores highest."""
    folds = []
    for k in range(5):
        generator = np.random.default_rng([seed, k])
        heights = np.array([6.0, 7.0, 9.0])
        positive_class = np.repeat([0, 1, 2], labeled_per_class // 5)
        hidden = generator.choice(3, round(true_prior * unlabeled / 5), p=[0.7, 0.2, 0.1])
        rest = unlabeled // 5 - len(hidden)
        scores = np.r_[generator.normal(heights[hidden]), generator.normal(0, 1, rest)]
        classes = np.r_[hidden, generator.integers(0, 3, rest)]
        folds.append(Fold(generator.normal(heights[positive_class]), scores, positive_class, classes))
    return folds


@pytest.mark.parametrize(("true_prior", "labeled", "off"), [(0.05, 20, 0.12), (0.2, 20, 0.12), (0.1, 100, 0.05)])
def test_labeled_images_of_another_mix_than_the_lakes_are_weighted_to_it(true_prior, labeled, off):
    draws = [uneven(seed, true_prior, labeled) for seed in range(60)]
    ours = [pooled_prior(folds, resamples=40) for folds in draws]
    assert np.mean([result.estimate for result in ours]) == pytest.approx(true_prior, rel=off)
    assert np.mean([result.low <= true_prior <= result.high for result in ours]) >= 0.95
    blind = [pooled_prior([Fold(f.positive, f.unlabeled) for f in folds], resamples=40) for folds in draws]
    assert np.mean([result.estimate for result in blind]) < 0.7 * true_prior, "or the weights would not matter"


def test_the_weights_are_the_classes_shares_among_the_lakes_positives():
    folds = [fold.sorted() for fold in uneven(0, 0.2, 500, 40_000)]
    weights = prior.class_weights(folds)
    classes = np.concatenate([fold.positive_class for fold in folds])
    assert weights.mean() == pytest.approx(1)
    for k, share in enumerate([0.7, 0.2, 0.1]):
        assert weights[classes == k] == pytest.approx(np.full(500, 3 * share), rel=0.2)


def test_a_class_that_the_lake_is_full_of_does_not_speak_alone():
    generator = np.random.default_rng(0)
    fold = Fold(np.zeros(100) + 5, generator.normal(5, 0.1, 1000), np.repeat([0, 1], [1, 99]), np.zeros(1000, int))
    weights = prior.class_weights([fold.sorted()])
    assert weights.max() > 20
    assert weights.mean() == pytest.approx(1)
    assert weights.sum() ** 2 / (weights**2).sum() == pytest.approx(10), "of the hundred"


def test_folds_of_unlike_size_and_quality_are_pooled_too():
    sizes = [(8, 100, 3000), (3, 20, 500), (6, 40, 1500)]
    folds = [Fold(*lake([7, k], 0.2, *size)) for k, size in enumerate(sizes)]
    result = pooled_prior(folds)
    assert result.estimate == pytest.approx(0.2, rel=0.15)
    assert result.low <= 0.2 <= result.high


def test_a_bootstrap_can_be_repeated_and_is_not_always_the_same():
    folds = cross_fitted(4, 0.2, 4)
    assert pooled_prior(folds, seed=1) == pooled_prior(folds, seed=1)
    one, other = pooled_prior(folds, seed=1), pooled_prior(folds, seed=2)
    assert (one.bootstrap_low, one.bootstrap_high) != (other.bootstrap_low, other.bootstrap_high)
    assert (one.estimate, one.low, one.high) == (other.estimate, other.low, other.high)


def test_resampled_ranks_are_those_of_the_resampled_scores():
    # The same draw, taken the slow way: pick the scores, count for each positive the unlabeled at or above it.
    positive, unlabeled = (np.sort(side.round(1)) for side in lake(8, 0.3, 1, positives=20, unlabeled=50))
    assert len(set(unlabeled)) < 50, "there are ties"
    assert set(positive) & set(unlabeled), "on both sides"
    fast = prior._resampled_ranks(positive, unlabeled, 7, np.random.default_rng(5))
    generator = np.random.default_rng(5)
    chosen_p, chosen_u = generator.integers(0, 20, (7, 20)), generator.integers(0, 50, (7, 50))
    above = (unlabeled[::-1][chosen_u][:, None, :] >= positive[chosen_p][:, :, None]).sum(axis=2)
    np.testing.assert_array_equal(fast[0], np.minimum((above + 0.5) / 50, 1))
    np.testing.assert_array_equal(fast[1], chosen_p)


def test_a_bootstrap_in_parts_is_as_wide_as_one_in_one_piece(monkeypatch):
    folds = cross_fitted(5, 0.2, 4)
    whole = pooled_prior(folds)
    monkeypatch.setattr(prior, "_MOST_VALUES", 800 * 7)  # 28 full parts and a rest
    parts = pooled_prior(folds)
    assert parts.bootstrap_high - parts.bootstrap_low == pytest.approx(
        whole.bootstrap_high - whole.bootstrap_low, rel=0.3
    )


def test_folds_that_cannot_be_used_are_refused():
    scores = np.arange(20.0)
    with pytest.raises(ValueError, match="fold 1 has no scores on one side, got 0, 20"):
        pooled_prior([Fold(scores, scores), Fold(scores[:0], scores)])
    with pytest.raises(ValueError, match="at least 10 scores are needed on either side, got 8, 40"):
        pooled_prior([Fold(scores[:4], scores), Fold(scores[:4], scores)])
    with pytest.raises(ValueError, match="at least 10 scores are needed on either side, got 0, 0"):
        pooled_prior([])
    with pytest.raises(ValueError, match="scores must be finite"):
        pooled_prior([Fold(scores, scores), Fold(scores, np.full(20, math.nan))])
    with pytest.raises(ValueError, match=r"confidence 0\.95 needs at least 40 resamples, got 39"):
        pooled_prior([Fold(scores, scores)], resamples=39)


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
