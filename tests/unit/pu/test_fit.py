"""pu_ray/pu/fit.py: who plays which role, what the fit learns, and which part of the lake it sees."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from pu_ray import embedding, ledger, schema
from pu_ray.config import OptimizerConfig, ScorerConfig, SplitConfig
from pu_ray.errors import DataError
from pu_ray.lake import fixed_list, to_matrix
from pu_ray.ledger import ShardEntry
from pu_ray.progress import Silent
from pu_ray.pu import risk, scorers, training
from pu_ray.pu.sample import draw_unlabeled
from pu_ray.pu.training import ROLES, Streams, assign_roles, fit_scorer
from pu_ray.storage import Storage

SPLIT = SplitConfig()


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def content_id(number):
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def ids(count):
    return [content_id(number) for number in range(count)]


# -- roles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [SPLIT, SplitConfig(train=0.2, validate=0.3, calibrate=0.5)])
@pytest.mark.parametrize("count", [40, 200, 999])
def test_the_shares_of_the_roles_are_the_configured_ones(count, split):
    roles = assign_roles(ids(count), np.arange(count) % 7, split, seed=3)
    for role, share in zip(ROLES, (split.train, split.validate_, split.calibrate), strict=True):
        assert roles.count(role) == pytest.approx(share * count, abs=3), role


@pytest.mark.parametrize("per_class", [10, 20, 31])
@pytest.mark.parametrize("seed", range(5))
def test_every_class_has_every_role_in_nearly_its_share(per_class, seed):
    labels = np.arange(10 * per_class) % 10
    roles = np.array(assign_roles(ids(10 * per_class), labels, SPLIT, seed))
    for label in range(10):
        for role, share in zip(ROLES, (0.5, 0.15, 0.35), strict=True):
            count = np.sum(roles[labels == label] == role)
            assert count >= 1
            assert count == pytest.approx(share * per_class, abs=2.5)


def test_roles_do_not_depend_on_the_order_of_the_listing():
    samples, labels = ids(60), np.arange(60) % 4
    roles = dict(zip(samples, assign_roles(samples, labels, SPLIT, 1), strict=True))
    order = np.random.default_rng(0).permutation(60)
    shuffled = [samples[row] for row in order]
    assert dict(zip(shuffled, assign_roles(shuffled, labels[order], SPLIT, 1), strict=True)) == roles


def test_the_seed_decides_who_plays_which_role():
    samples, labels = ids(60), np.zeros(60, int)
    assert assign_roles(samples, labels, SPLIT, 1) != assign_roles(samples, labels, SPLIT, 2)


def test_copies_share_a_role_even_in_different_classes():
    samples = ids(30) * 2
    labels = np.r_[np.zeros(30, int), np.arange(30) % 2]
    roles = assign_roles(samples, labels, SPLIT, 0)
    assert roles[:30] == roles[30:]
    assert set(roles) == set(ROLES)


def test_a_copy_in_the_same_class_changes_nobody_elses_role():
    samples, labels = ids(40), np.arange(40) % 2
    roles = assign_roles(samples, labels, SPLIT, 0)
    again = assign_roles([*samples, samples[4]], np.r_[labels, labels[4]], SPLIT, 0)
    assert again == [*roles, roles[4]]


# -- the fit -----------------------------------------------------------------------------------------------

WIDTH = 12


def gaussian_streams(seed=0, prior=0.3, unlabeled=1200, positives=120):
    """Positives around +1, negatives around -1 along one direction; and held-out truth."""
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=WIDTH)
    direction /= np.linalg.norm(direction)

    def draw(is_positive):
        side = np.where(is_positive, 1.5, -1.5)[:, None]
        return torch.tensor(side * direction + generator.normal(size=(len(is_positive), WIDTH)), dtype=torch.float32)

    def all_positive(count):
        return draw(np.ones(count, bool))

    truth = generator.random(unlabeled) < prior
    streams = Streams(
        all_positive(positives),
        all_positive(60),
        all_positive(60),
        draw(generator.random(unlabeled) < prior),
        draw(truth),
    )
    return streams, truth


def fitted(streams, kind="pvu", seed=0, module_seed=0, epochs=4, **settings):
    torch.manual_seed(module_seed)
    head = scorers.Head(WIDTH, attention=True, hidden=8)
    head.standardise_like(streams.unlabeled_train)
    config = ScorerConfig(
        **{"kind": kind, "batch_size": 128, "epochs": epochs, "optimizer": OptimizerConfig(lr=0.01)} | settings
    )
    return fit_scorer(head, streams, scorers.objective(config, 0.3), config, seed, Silent())


@pytest.mark.parametrize("kind", ["pvu", "nnpu"])
def test_two_gaussians_are_told_apart(kind):
    streams, truth = gaussian_streams()
    result = fitted(streams, kind)
    assert roc_auc_score(truth, training.scores_of(result.module, streams.unlabeled_validate)) > 0.95


def test_the_same_seed_gives_the_same_scorer_and_another_seed_another():
    streams, _ = gaussian_streams()
    one, same, other = fitted(streams, seed=5), fitted(streams, seed=5), fitted(streams, seed=6)
    assert one.curve == same.curve
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, same.module.state_dict()[name]), name
    assert one.curve != other.curve


def test_the_kept_epoch_is_the_one_with_the_best_proxy_auc():
    # A rate far too high makes the curve go up and down.
    streams, _ = gaussian_streams(unlabeled=600)
    result = fitted(streams, epochs=8, optimizer=OptimizerConfig(lr=3.0, schedule="constant"))
    curve = [point["proxy_auc"] for point in result.curve]
    assert [point["epoch"] for point in result.curve] == list(range(1, 9))
    assert result.epoch != 8, "choose another seed: the last epoch must not be the best for this test to say anything"
    assert result.proxy_auc == max(curve) == curve[result.epoch - 1]
    again = training.proxy_auc(
        training.scores_of(result.module, streams.positive_validate),
        training.scores_of(result.module, streams.unlabeled_validate),
    )
    assert again == result.proxy_auc, "the module must hold that epoch's parameters"


class Recorder(nn.Module):
    """A scorer that remembers which rows it was trained on; a row's first feature is its number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches = []

    def forward(self, x):
        if self.training:
            self.batches.append(x[:, 0].long().tolist())
        return x[:, 0] * self.weight * 1e-6


def numbered(first, count):
    return torch.arange(first, first + count, dtype=torch.float32)[:, None]


def test_every_step_holds_the_same_number_of_positives_and_every_epoch_every_unlabeled_image_once():
    streams = Streams(numbered(0, 7), numbered(0, 5), numbered(0, 5), numbered(100, 24), numbered(200, 5))
    module = Recorder()
    config = ScorerConfig(batch_size=8, positive_share=0.25, epochs=3)
    fit_scorer(module, streams, risk.positive_versus_unlabeled, config, 0, Silent())
    assert len(module.batches) == 3 * 4  # 24 unlabeled images, 8 - 2 in each step
    for batch in module.batches:
        assert [number < 100 for number in batch] == [True] * 2 + [False] * 6
    for epoch in range(3):
        seen = [number for batch in module.batches[4 * epoch : 4 * epoch + 4] for number in batch[2:]]
        assert sorted(seen) == list(range(100, 124))
    # Positives come round: 24 draws of 7 images are 3 whole rounds and 3 more, across the ends of batches and epochs.
    positives = [number for batch in module.batches for number in batch[:2]]
    for turn in range(3):
        assert sorted(positives[7 * turn : 7 * turn + 7]) == list(range(7))


def test_few_positives_are_repeated_within_a_step():
    streams = Streams(numbered(0, 3), numbered(0, 5), numbered(0, 5), numbered(100, 24), numbered(200, 5))
    module = Recorder()
    fit_scorer(
        module, streams, risk.positive_versus_unlabeled, ScorerConfig(batch_size=16, positive_share=0.5), 0, Silent()
    )
    for batch in module.batches:
        counts = np.bincount(batch[:8], minlength=3)
        assert counts.sum() == 8
        assert counts.min() >= 2


def test_a_large_share_of_positives_still_leaves_room_for_an_unlabeled_image():
    streams = Streams(numbered(0, 7), numbered(0, 5), numbered(0, 5), numbered(100, 24), numbered(200, 5))
    module = Recorder()
    config = ScorerConfig(batch_size=2, positive_share=0.9, epochs=1)
    fit_scorer(module, streams, risk.positive_versus_unlabeled, config, 0, Silent())
    assert all(len(batch) == 2 for batch in module.batches)


class Counter(Silent):
    """What somebody who watches would have seen."""

    def __init__(self):
        self.total, self.done = 0, 0

    def start(self, total, unit):
        self.total = total

    def advance(self, count):
        self.done += count


def test_progress_arrives_at_its_total():
    streams, _ = gaussian_streams(unlabeled=300)
    counter = Counter()
    torch.manual_seed(0)
    head = scorers.Head(WIDTH, True, 0)
    fit_scorer(head, streams, risk.positive_versus_unlabeled, ScorerConfig(batch_size=64, epochs=2), 0, counter)
    assert counter.done == counter.total > 0


def test_proxy_auc_on_paper():
    # Pairs (P, U) in the right order: 2 > 1, 2 > 0, 1 = 1 (half), 1 > 0: 3.5 of 4.
    assert training.proxy_auc([2.0, 1.0], [1.0, 0.0]) == 3.5 / 4


def test_scores_are_those_of_eval_mode_whatever_the_batch():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5), nn.Flatten(0))
    inputs = torch.randn(2500, 3)
    scores = training.scores_of(module.train(), inputs)
    assert scores.shape == (2500,)
    np.testing.assert_allclose(scores, module[0](inputs).detach().numpy()[:, 0], rtol=1e-5, atol=1e-6)


# -- leaving out what looks positive -----------------------------------------------------------------------


def test_ted_leaves_out_as_many_as_the_prior_says_and_those_that_look_most_positive():
    streams, _ = gaussian_streams(prior=0.3, unlabeled=4000, positives=400)
    module = fitted(streams).module
    scores = training.scores_of(module, streams.unlabeled_train)
    assert not training.most_positive(module, streams, 0.0).any()
    out = training.most_positive(module, streams, 1.0).numpy()
    assert out.mean() == 0.9, "a step needs someone to learn from"
    out = training.most_positive(module, streams, 0.3).numpy()
    assert out.mean() == 0.3
    assert scores[out].min() >= scores[~out].max()


def test_what_is_left_out_is_not_trained_on_and_the_choice_is_made_anew_each_epoch():
    streams = Streams(numbered(0, 7), numbered(0, 5), numbered(0, 5), numbered(100, 24), numbered(200, 5))
    module, calls = Recorder(), []

    def leave_out(network):
        assert network is module
        calls.append(len(module.batches))
        network.eval()  # as whoever computes scores does
        return torch.arange(24) >= 12 if len(calls) == 1 else torch.arange(24) < 12

    config = ScorerConfig(batch_size=8, positive_share=0.25, epochs=2)
    fit_scorer(module, streams, risk.positive_versus_unlabeled, config, 0, Silent(), leave_out=leave_out)
    assert calls == [0, 2]
    for epoch, first in ((0, 100), (1, 112)):
        seen = [number for batch in module.batches[2 * epoch : 2 * epoch + 2] for number in batch[2:]]
        assert sorted(seen) == list(range(first, first + 12))


def test_leaving_out_mends_a_ranking_that_took_hidden_positives_for_negatives():
    streams, truth = gaussian_streams(prior=0.5, unlabeled=2000, positives=300, seed=3)
    ranking = fitted(streams).module
    before = roc_auc_score(truth, training.scores_of(ranking, streams.unlabeled_validate))
    config = ScorerConfig(kind="ted", batch_size=128, epochs=6, optimizer=OptimizerConfig(lr=0.01))
    result = fit_scorer(
        ranking,
        streams,
        scorers.objective(config, 0.5),
        config,
        0,
        Silent(),
        leave_out=lambda head: training.most_positive(head, streams, 0.5),
    )
    after = roc_auc_score(truth, training.scores_of(result.module, streams.unlabeled_validate))
    assert after > before - 0.005
    # Positives among the unlabeled are no longer pushed below zero.
    assert np.mean(training.scores_of(result.module, streams.unlabeled_validate)[truth] > 0) > 0.8


# -- going on from a checkpoint ----------------------------------------------------------------------------


class Interrupted(Exception):
    """The machine went away."""


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_fit_that_goes_on_ends_where_an_undisturbed_one_does(stop_after):
    streams, _ = gaussian_streams()
    config = ScorerConfig(kind="pvu", batch_size=128, epochs=5, optimizer=OptimizerConfig(lr=0.01))
    kept = []

    def head():
        torch.manual_seed(0)
        new = scorers.Head(WIDTH, attention=True, hidden=8)
        new.standardise_like(streams.unlabeled_train)
        return new

    def stop(state, checkpoint):
        if state.epoch == stop_after:
            kept.append(checkpoint())
            raise Interrupted

    def run(module, **options):
        return fit_scorer(module, streams, risk.positive_versus_unlabeled, config, 0, Silent(), **options)

    undisturbed = run(head())
    with pytest.raises(Interrupted):
        run(head(), report=stop)
    torch.manual_seed(99)
    resumed = run(scorers.Head(WIDTH, attention=True, hidden=8), checkpoint=kept[0])
    assert resumed.curve == undisturbed.curve
    for name, value in undisturbed.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name


# -- the sample of the lake --------------------------------------------------------------------------------


def features_table(numbers, shard, errors=(), margins=None):
    """Rows of `schema.features`; the content is the number, and so is its first feature."""
    count = len(numbers)
    failed = np.isin(np.arange(count), list(errors))
    values = np.repeat(np.asarray(numbers, np.float16)[:, None], 2, axis=1)
    columns = [
        pa.array([content_id(number) for number in numbers], schema.SAMPLE_ID_TYPE),
        pa.array([shard] * count),
        pa.array(np.arange(count)),
        pa.array([None] * count, pa.string()),
        fixed_list(values, failed),
        fixed_list(np.zeros((count, 3), np.float32), failed),
        fixed_list(np.zeros((count, schema.THUMBNAIL_PX), np.uint8), failed),
        pa.nulls(count, pa.float32()) if margins is None else pa.array(margins, pa.float32()),
        pa.array(["truncated" if bad else None for bad in failed], pa.string()),
    ]
    return pa.table(columns, schema=schema.features(2, 3))


def artifact(folder, files):
    """A features artifact of one data file per table."""
    storage = Storage(str(folder))
    entries = {}
    for name, table in files.items():
        storage.write_table(f"data/{name}.parquet", table)
        entries[name] = ShardEntry(name, "f", {f"data/{name}.parquet": table.num_rows})
    ledger.write_index(storage, entries)
    return storage


def numbers_of(table):
    return to_matrix(table[schema.FEATURES])[:, 0].astype(int).tolist()


def test_the_sample_has_the_asked_size_and_rows_that_belong_together(tmp_path):
    storage = artifact(
        tmp_path, {f"s{i}": features_table(range(100 * i, 100 * i + 50), f"s{i}.parquet") for i in range(4)}
    )
    sample = draw_unlabeled(storage, 30, seed=0, exclude=set())
    assert sample.schema == schema.features(2, 3)
    assert sample.num_rows == 30
    for number, sample_id, shard, row in zip(
        numbers_of(sample),
        sample[schema.SAMPLE_ID].to_pylist(),
        sample[schema.SHARD].to_pylist(),
        sample[schema.ROW].to_pylist(),
        strict=True,
    ):
        assert sample_id == content_id(number)
        assert (shard, row) == (f"s{number // 100}.parquet", number % 100)


def test_the_sample_is_the_same_whatever_order_the_lake_was_read_in(tmp_path):
    order = np.random.default_rng(0).permutation(60)
    numbers = {"a": np.arange(60), "b": np.arange(100, 160)}
    one = artifact(tmp_path / "1", {name: features_table(numbers[name], name) for name in ("a", "b")})
    other = artifact(tmp_path / "2", {name: features_table(numbers[name][order], name) for name in ("b", "a")})
    for count in (10, 15, 200):
        assert numbers_of(draw_unlabeled(one, count, 7, set())) == numbers_of(draw_unlabeled(other, count, 7, set()))


def test_the_seed_decides_which_images_are_drawn(tmp_path):
    storage = artifact(tmp_path, {"a": features_table(range(200), "a")})
    draws = {tuple(numbers_of(draw_unlabeled(storage, 20, seed, set()))) for seed in range(4)}
    assert len(draws) == 4


def test_errors_labeled_images_and_copies_are_never_drawn(tmp_path):
    files = {
        "a": features_table([1, 2, 3, 3, 4], "a", errors=[1]),  # 2 is broken, 3 is there twice
        "b": features_table([3, 4, 5, 6], "b", errors=[3]),  # 3 and 4 again; 6 is broken
    }
    storage = artifact(tmp_path, files)
    for seed in range(5):
        sample = draw_unlabeled(storage, 100, seed, exclude={content_id(5)})
        assert sorted(numbers_of(sample)) == [1, 3, 4]
        assert sample[schema.ERROR].null_count == 3


def test_an_image_that_is_broken_in_one_place_may_be_drawn_from_another(tmp_path):
    storage = artifact(tmp_path, {"a": features_table([1], "a", errors=[0]), "b": features_table([1], "b")})
    assert draw_unlabeled(storage, 5, 0, set())[schema.SHARD].to_pylist() == ["b"]


def test_the_rows_of_a_sample_come_in_random_order(tmp_path):
    # Half of the sample trains and half judges, so no half may be one end of the lake.
    storage = artifact(tmp_path, {"a": features_table(range(400), "a"), "b": features_table(range(400, 800), "b")})
    drawn = np.array(numbers_of(draw_unlabeled(storage, 800, 0, set())))
    assert sorted(drawn) == list(range(800))
    assert abs(np.mean(drawn[:400] < 400) - 0.5) < 0.1


def test_every_image_is_drawn_about_equally_often(tmp_path):
    storage = artifact(tmp_path, {"a": features_table(range(50), "a"), "b": features_table(range(50, 100), "b")})
    draws = 150
    counts = np.bincount(
        [number for seed in range(draws) for number in numbers_of(draw_unlabeled(storage, 25, seed, set()))],
        minlength=100,
    )
    # Each image is in a sample with probability 1/4: 37.5 times with a standard deviation of 5.3.
    assert counts.min() > 37.5 - 5 * 5.3
    assert counts.max() < 37.5 + 5 * 5.3


def test_a_large_lake_is_not_read_whole(tmp_path):
    storage = artifact(tmp_path, {f"{i:02d}": features_table(range(10 * i, 10 * i + 10), "x") for i in range(30)})
    read = []

    class Watched(Storage):
        def read_table(self, path, columns=None):
            read.append(path)
            return super().read_table(path, columns)

    sample = draw_unlabeled(Watched(storage.uri), 10, 0, set())
    assert sample.num_rows == 10
    assert len({path for path in read if path.startswith("data/")}) <= 5


def test_a_lake_without_a_usable_image_says_so(tmp_path):
    storage = artifact(tmp_path, {"a": features_table([1, 2], "a", errors=[0, 1])})
    with pytest.raises(DataError, match="the lake holds no usable image") as caught:
        draw_unlabeled(storage, 10, 0, set())
    assert str(tmp_path) in str(caught.value)


def test_behind_a_gate_the_sample_is_drawn_from_what_was_embedded_whatever_the_gate_said(tmp_path):
    numbers = list(range(200))
    samples = [content_id(number) for number in numbers]
    chosen = embedding.spied(samples, 0.3)
    # Only a few of the others passed the gate; they must not tip the sample.
    margins = [0.5 if number % 10 == 0 else -0.5 for number in numbers]
    absent = [number for number in numbers if margins[number] < 0 and not chosen[number]]
    table = features_table(numbers, "a", margins=margins)
    place = table.column_names.index(schema.FEATURES)
    values = fixed_list(to_matrix(table[schema.FEATURES]), np.isin(numbers, absent))
    storage = artifact(tmp_path, {"a": table.set_column(place, table.schema.field(place), values)})
    drawn = draw_unlabeled(storage, 1000, 0, exclude=set(), spied_share=0.3)
    assert sorted(numbers_of(drawn)) == np.flatnonzero(chosen).tolist()
    assert drawn[schema.FEATURES].null_count == 0
