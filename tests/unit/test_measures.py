"""pu_ray/measures.py: intervals, calibration error, mistakes and mining quality, from paper and pencil."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from pu_ray.measures import (
    Rate,
    among_the_best,
    confusion_pairs,
    expected_calibration_error,
    mining_quality,
    share_of,
    wilson,
)


@pytest.mark.parametrize(("hits", "n"), [(1, 10), (5, 10), (9, 10), (940, 1000), (3, 10_000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilsons_ends_are_the_shares_that_a_score_test_just_accepts(hits, n, confidence):
    # The interval's definition: |share - p| = z sqrt(p (1 - p) / n).
    z = stats.norm.isf((1 - confidence) / 2)
    share = hits / n
    score = lambda p: (share - p) ** 2 - z**2 * p * (1 - p) / n  # noqa: E731
    rate = wilson(hits, n, confidence)
    assert rate.low == pytest.approx(optimize.brentq(score, 1e-12, share, xtol=1e-14), abs=1e-10)
    assert rate.high == pytest.approx(optimize.brentq(score, share, 1 - 1e-12, xtol=1e-14), abs=1e-10)
    assert (rate.value, rate.n) == (share, n)


def test_wilson_agrees_with_a_published_example():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263 gives 0.2553 to 0.3662, 15 of 148 gives
    # 0.0624 to 0.1605, 0 of 20 gives 0 to 0.1611, 1 of 29 gives 0.0061 to 0.1718.
    for hits, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        rate = wilson(hits, n)
        assert (round(rate.low, 4), round(rate.high, 4)) == (low, high)


def test_the_ends_of_the_scale_stay_inside_it():
    assert wilson(0, 5).low == 0.0
    assert wilson(5, 5).high == 1.0
    assert 0 < wilson(0, 5).high < 0.6
    # All right: low = 1 / (1 + z^2 / n).
    assert wilson(5, 5).low == pytest.approx(1 / (1 + stats.norm.ppf(0.975) ** 2 / 5))


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(hits, n):
    with pytest.raises(ValueError, match=rf"need 0 <= hits <= n and n >= 1, got {hits} of {n}"):
        wilson(hits, n)


def test_calibration_error_on_paper():
    # Two answers at 0.9, one right: gap 0.4. Three at 0.5, all right: gap 0.5. Weighted: (2 * 0.4 + 3 * 0.5) / 5.
    confidence, right = [0.9, 0.9, 0.5, 0.5, 0.5], [True, False, True, True, True]
    assert expected_calibration_error(confidence, right) == pytest.approx((0.8 + 1.5) / 5)


def test_over_and_underconfidence_cancel_inside_a_bin_only():
    # Bins are a fifteenth wide: 0.81 and 0.85 share one, 0.81 and 0.95 do not.
    assert expected_calibration_error([0.81, 0.85], [0, 1]) == pytest.approx(abs(0.83 - 0.5))
    assert expected_calibration_error([0.81, 0.95], [0, 1]) == pytest.approx((0.81 + 0.05) / 2)


def test_the_last_bin_includes_certainty():
    assert expected_calibration_error([1.0, 0.95], [0, 1]) == pytest.approx(0.975 - 0.5)


def test_certain_and_right_is_perfectly_calibrated():
    assert expected_calibration_error(np.ones(4), np.ones(4, bool)) == 0.0
    assert expected_calibration_error(np.ones(4), np.zeros(4, bool)) == 1.0


def test_honest_probabilities_have_a_small_error():
    generator = np.random.default_rng(0)
    confidence = generator.random(20_000)
    assert expected_calibration_error(confidence, generator.random(20_000) < confidence) < 0.02


def test_the_share_of_hits_is_plain_data():
    assert share_of(np.array([True, False, True, True])) == {
        "value": 0.75,
        "low": wilson(3, 4).low,
        "high": wilson(3, 4).high,
        "n": 4,
    }


@pytest.mark.parametrize("places", [1, 2, 5])
def test_among_the_best_agrees_with_sklearn(places):
    generator = np.random.default_rng(places)
    probabilities = generator.dirichlet(np.ones(8), 400)
    labels = generator.integers(0, 8, 400)
    found = among_the_best(probabilities, labels, places)
    assert found.mean() == top_k_accuracy_score(labels, probabilities, k=places, labels=np.arange(8))
    assert (found >= among_the_best(probabilities, labels, places - 1)).all()


def test_of_equal_probabilities_no_more_than_five_count():
    # A network that says nothing gets five of eight classes right, not all.
    assert among_the_best(np.full((8, 8), 1 / 8), np.arange(8), 5).sum() == 5


def test_confusion_pairs_on_paper():
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    student = np.array([1, 1, 0, 0, 1, 1, 2])
    teacher = np.array([1, 0, 0, 1, 2, 2, 2])
    names = [f"{k}.png" for k in range(7)]
    assert confusion_pairs(labels, student, teacher, ["cat", "dog", "elk"], names) == [
        {"true": "cat", "predicted": "dog", "count": 2, "teacher_count": 1, "examples": ["0.png", "1.png"]},
        {"true": "dog", "predicted": "cat", "count": 1, "teacher_count": 0, "examples": ["3.png"]},
        {"true": "elk", "predicted": "dog", "count": 1, "teacher_count": 0, "examples": ["5.png"]},
    ]


def test_confusion_pairs_are_the_largest_entries_off_the_diagonal():
    generator = np.random.default_rng(0)
    labels, student, teacher = generator.integers(0, 10, (3, 3000))
    names = [f"{k}.png" for k in range(3000)]
    pairs = confusion_pairs(labels, student, teacher, [str(k) for k in range(10)], names)
    by_student, by_teacher = confusion_matrix(labels, student), confusion_matrix(labels, teacher)
    np.fill_diagonal(by_student, 0)
    assert [pair["count"] for pair in pairs] == sorted(by_student.ravel(), reverse=True)[:20]
    for pair in pairs:
        true, said = int(pair["true"]), int(pair["predicted"])
        assert pair["count"] == by_student[true, said]
        assert pair["teacher_count"] == by_teacher[true, said]
        rows = [names.index(name) for name in pair["examples"]]
        assert len(rows) == min(5, pair["count"])
        assert all(labels[row] == true and student[row] == said for row in rows)


def test_without_mistakes_there_are_no_pairs():
    assert confusion_pairs([0, 1], [0, 1], [1, 0], ["a", "b"], ["x", "y"]) == []


def ids(*numbers):
    return {bytes([number]) * 16 for number in numbers}


def truth(classes):
    return {bytes([number]) * 16: label for number, label in classes.items()}


def test_mining_quality_on_paper():
    # Positives of the lake: 1, 2, 3, 4. Selected: 1, 2, 9, of which 9 is no positive.
    labels = truth({1: 0, 2: 1, 3: 0, 4: 1, 8: -1, 9: -1})
    quality = mining_quality(ids(1, 2, 9), labels, ids(1, 2, 3, 4, 8, 9), set())
    assert quality["mined_precision"]["value"] == pytest.approx(2 / 3)
    assert quality["mined_precision"]["n"] == 3
    assert quality["mined_recall"]["value"] == pytest.approx(2 / 4)
    assert quality["true_prior"] == pytest.approx(4 / 6)
    assert Rate(**quality["mined_recall"]) == wilson(2, 4)


def test_excluded_contents_are_not_missed():
    labels = truth({1: 0, 2: 0, 3: 0})
    quality = mining_quality(ids(1, 2), labels, ids(1, 2, 3), excluded=ids(3))
    assert quality["mined_recall"]["value"] == 1.0


def test_a_content_of_unknown_truth_counts_as_no_positive():
    quality = mining_quality(ids(1, 2), truth({1: 0}), ids(1, 2, 3), set())
    assert quality["mined_precision"]["value"] == 0.5
    assert quality["mined_recall"]["value"] == 1.0


def test_truth_about_contents_that_are_not_in_the_lake_changes_nothing():
    labels = truth({1: 0, 2: -1})
    more = labels | truth({7: 0, 8: 1})
    assert mining_quality(ids(1), labels, ids(1, 2), set()) == mining_quality(ids(1), more, ids(1, 2), set())


def test_a_lake_without_positives_has_no_recall():
    quality = mining_quality(ids(1), truth({1: -1}), ids(1, 2), set())
    assert quality["mined_recall"] is None
    assert quality["mined_precision"]["value"] == 0.0
    assert quality["true_prior"] == 0.0
    assert not math.isnan(quality["mined_precision"]["high"])
