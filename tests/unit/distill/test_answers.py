"""pu_ray/distill/answers.py: what is kept of the teacher's logits, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from pu_ray.distill import answers

# -- storing logits ----------------------------------------------------------------------------------------


def logits(classes, count=50, scale=4):
    return np.random.default_rng(classes).normal(0, scale, (count, classes)).astype(np.float32)


@pytest.mark.parametrize("classes", [2, 10, 64])
def test_all_logits_of_few_classes_come_back_but_for_rounding(classes):
    given = logits(classes)
    again = answers.expand(*answers.compress(given), classes)
    np.testing.assert_allclose(again, given - given.max(axis=1, keepdims=True), atol=0.02)
    np.testing.assert_array_equal(again.argmax(axis=1), given.argmax(axis=1))


def test_of_many_classes_the_largest_are_kept_and_the_others_share_what_they_had():
    given = logits(1000)
    values, kept, rest = answers.compress(given)
    assert values.shape == kept.shape == (50, 32)
    assert (values.dtype, kept.dtype, rest.dtype) == (np.float16, np.int32, np.float16)
    again = answers.expand(values, kept, rest, 1000)
    ours, theirs = softmax(again, axis=1), softmax(given, axis=1)
    order = np.argsort(-given, axis=1)
    for row in range(50):
        top, others = order[row, :32], order[row, 32:]
        assert set(kept[row]) == set(top)
        np.testing.assert_allclose(ours[row, top], theirs[row, top], rtol=0.02)
        np.testing.assert_allclose(ours[row, others], theirs[row, others].mean(), rtol=0.05)


def test_the_rest_is_the_summed_mass_below_the_largest():
    given = logits(100)
    _, kept, rest = answers.compress(given)
    below = given - given.max(axis=1, keepdims=True)
    for row in range(50):
        others = np.setdiff1d(np.arange(100), kept[row])
        assert rest[row] == pytest.approx(logsumexp(below[row, others]), rel=2e-3)


def test_large_logits_lose_nothing_that_a_softmax_would_see():
    given = logits(10, scale=1) + 50_000
    again = answers.expand(*answers.compress(given), 10)
    np.testing.assert_allclose(softmax(again, axis=1), softmax(given, axis=1), atol=2e-3)
