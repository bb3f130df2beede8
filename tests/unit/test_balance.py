"""pu_ray/balance.py: fair quotas and tame class weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pu_ray.balance import class_weights, quotas

COUNTS = st.lists(st.integers(0, 400), min_size=1, max_size=12)


@given(COUNTS, st.integers(0, 3000))
def test_quotas_hand_out_the_whole_budget_and_never_more_than_there_is(available, budget):
    quota = quotas(available, budget)
    assert quota.dtype == np.int64
    assert quota.sum() == min(budget, sum(available))
    assert (quota >= 0).all()
    assert (quota <= available).all()


@given(COUNTS, st.integers(0, 3000))
@example([100, 2, 100], 32)
def test_no_class_gets_two_images_more_than_one_that_still_has_candidates(available, budget):
    # [100, 2, 100] and 32: fair is 15, 2, 15.
    quota = quotas(available, budget)
    unfilled = quota[quota < available]
    if len(unfilled):
        assert quota.max() - unfilled.min() <= 1


@given(COUNTS)
def test_a_budget_that_does_not_bind_takes_everything(available):
    assert quotas(available, sum(available)).tolist() == available
    assert quotas(available, sum(available) + 7).tolist() == available


def test_what_a_class_cannot_fill_passes_to_the_others():
    assert quotas([100, 2, 100], 30).tolist() == [14, 2, 14]
    assert quotas([100, 0, 0], 32).tolist() == [32, 0, 0]


def test_an_odd_remainder_goes_to_the_classes_with_the_lowest_index():
    assert quotas([9, 9, 9], 8).tolist() == [3, 3, 2]
    assert quotas([9, 9, 9], 2).tolist() == [1, 1, 0]


# -- weights -----------------------------------------------------------------------------------------------


@st.composite
def counted(draw):
    classes = draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(0, 5000), min_size=classes, max_size=classes).filter(any))
    soft = [count + draw(st.floats(0, 50)) for count in counts]
    return soft, counts


@given(counted(), st.floats(1, 100))
def test_the_mean_weight_of_an_image_is_one_and_no_weight_exceeds_the_clip(case, clip):
    soft, counts = case
    weights = class_weights(soft, counts, clip)
    assert np.dot(weights, counts) == pytest.approx(sum(counts), rel=1e-9)
    assert weights.min() > 0
    assert weights.max() <= clip * (1 + 1e-9)
    assert weights.max() <= clip * weights.min() * (1 + 1e-9)


@given(counted(), st.floats(1, 100))
def test_a_rarer_class_never_weighs_less(case, clip):
    soft, counts = case
    weights = class_weights(soft, counts, clip)
    assert (np.diff(weights[np.argsort(soft)]) <= 1e-12).all()


def test_below_the_clip_weights_are_inverse_to_the_soft_counts():
    # Soft counts 30, 10 and as many images: inverse weights 1 : 3, and (30 w + 10 * 3 w) / 40 = 1 gives w = 2/3.
    np.testing.assert_allclose(class_weights([30.0, 10.0], [30, 10], 10.0), [2 / 3, 2.0])


def test_the_clip_holds_a_nearly_empty_class_down():
    # Ratio 1000 : 1 clipped to 4: (1000 w + 1 * 4 w) / 1001 = 1.
    np.testing.assert_allclose(class_weights([1000.0, 1.0], [1000, 1], 4.0), np.array([1, 4]) * 1001 / 1004)


def test_an_empty_class_gets_the_clip_and_disturbs_nobody():
    weights = class_weights([50.0, 50.0, 0.0], [50, 50, 0], 10.0)
    np.testing.assert_allclose(weights, [1.0, 1.0, 10.0])


def test_equal_classes_weigh_one():
    np.testing.assert_allclose(class_weights([7.0] * 5, [7] * 5, 3.0), np.ones(5))


def test_a_clip_of_one_turns_weighting_off():
    np.testing.assert_allclose(class_weights([100.0, 1.0], [100, 1], 1.0), [1.0, 1.0])


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="class weights need at least one image"):
        class_weights([0.0, 0.0], [0, 0], 10.0)
