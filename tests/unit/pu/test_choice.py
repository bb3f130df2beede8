"""pu_ray/pu/choice.py: which scorer is kept, without a look at a true label."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pu_ray.config import OptimizerConfig, ScorerConfig
from pu_ray.progress import Silent
from pu_ray.pu import choice, scorers, training
from pu_ray.pu.choice import ClassMix, clearly_better
from pu_ray.pu.training import Streams

WIDTH = 8
SETTINGS = {"epochs": 4, "batch_size": 64, "hidden": 8, "optimizer": OptimizerConfig(lr=0.01)}


def gaussians(seed=0, positives=60, unlabeled=600, share=0.2, distance=4.0) -> Streams:
    """Positives to the right of the lake's negatives; a share of the lake is positive, the first rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count, of_which_positive):
        rows = torch.randn(count, WIDTH, generator=generator)
        rows[:of_which_positive] += distance / WIDTH**0.5
        return rows

    lake = [draw(unlabeled, round(share * unlabeled)) for _ in range(2)]
    return Streams(*(draw(positives, positives) for _ in range(3)), *lake)


def one_class(streams: Streams) -> ClassMix:
    return ClassMix(*(np.zeros(len(part), int) for part in (streams.positive_validate, streams.unlabeled_validate)))


def chosen(streams, mix=None, **settings):
    config = ScorerConfig(**SETTINGS | settings)
    return choice.best_scorer(config, streams, mix or one_class(streams), 0.2, 0, Silent())


# -- a clear difference ------------------------------------------------------------------------------------


def shares(seed, mean, count=80):
    return np.clip(np.random.default_rng(seed).normal(mean, 0.05, count), 0, 1)


def test_only_a_clear_difference_counts():
    even = np.ones(80)
    good, as_good, bad = shares(0, 0.9), shares(1, 0.9), shares(2, 0.8)
    assert clearly_better(good, bad, even)
    assert not clearly_better(bad, good, even)
    assert not clearly_better(good, as_good, even)
    assert not clearly_better(as_good, good, even)
    assert not clearly_better(good, good, even)


def test_with_even_weights_it_is_a_paired_t_test_at_two_standard_errors():
    for seed in range(40):
        one, other = shares(seed, 0.9, 25), shares(100 + seed, 0.88, 25)
        difference = one - other
        statistic = difference.mean() / (difference.std(ddof=1) / 5)
        assert clearly_better(one, other, np.full(25, 3.0)) == (statistic > 2)


def test_who_counts_for_nothing_decides_nothing():
    one, other = shares(0, 0.9), shares(1, 0.9)
    one[:20] = 1.0
    weights = np.r_[np.full(20, 1e-9), np.ones(60)]
    assert clearly_better(one, other, np.ones(80))
    assert not clearly_better(one, other, weights)


def test_positives_count_as_their_class_does_in_the_lake():
    # Two classes, evenly labeled; the lake holds nine times as much of the first.
    generator = np.random.default_rng(0)
    positive_class = np.repeat([0, 1], 100)
    lake_class = np.repeat([0, 1, 0], [450, 50, 4500])
    positive = torch.from_numpy(generator.normal(4, 1, (200, 1)).astype(np.float32))
    lake = torch.from_numpy(generator.normal(np.repeat([4, 0], [500, 4500]), 1)[:, None].astype(np.float32))
    streams = Streams(positive[:0], positive, positive[:0], lake[:0], lake)
    weights = choice._weights(
        torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Flatten(0)), streams, one_class(streams)
    )
    np.testing.assert_allclose(weights, 1.0)
    head = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Flatten(0))
    torch.nn.init.ones_(head[0].weight)
    weights = choice._weights(head, streams, ClassMix(positive_class, lake_class))
    assert weights[:100].mean() / weights[100:].mean() > 3


# -- which one is kept -------------------------------------------------------------------------------------


def test_auto_prefers_the_joined_scorer_where_nothing_is_clearly_better():
    kind, fitted, candidates = chosen(gaussians())
    assert set(candidates) == {"nnpu+neighbours", "nnpu", "ted", "pvu"}
    assert kind == "nnpu+neighbours"
    assert isinstance(fitted.module, scorers.Joined)
    assert candidates[kind] == pytest.approx(fitted.proxy_auc)


def test_auto_leaves_out_neighbours_that_only_add_noise():
    # One direction of eight tells the two apart; the nearest labeled image is near for the sake of the other seven.
    kind, fitted, candidates = chosen(gaussians(distance=2.0))
    assert "+neighbours" not in kind, candidates
    assert candidates[kind] > candidates["nnpu+neighbours"]
    assert isinstance(fitted.module, scorers.Head)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"kind": "pvu"}, {"pvu"}),
        ({"kind": "ted", "neighbours": True}, {"ted+neighbours"}),
        ({"kind": "auto", "neighbours": False}, {"nnpu", "ted", "pvu"}),
        ({"kind": "auto", "neighbours": True}, {"nnpu+neighbours", "ted+neighbours", "pvu+neighbours"}),
    ],
)
def test_what_is_asked_for_is_tried(settings, kinds):
    kind, _, candidates = chosen(gaussians(), **settings)
    assert set(candidates) == kinds
    assert kind in kinds


def test_the_choice_is_the_same_every_time():
    one, other = (chosen(gaussians(seed=3)) for _ in range(2))
    assert (one[0], one[2]) == (other[0], other[2])
    rows = gaussians(seed=4).unlabeled_validate
    np.testing.assert_array_equal(*(training.scores_of(result[1].module, rows) for result in (one, other)))
