"""pu_ray/score.py: one row out for every row in, scored or broken."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from artifacts import identity_columns, png
from scipy import stats

from pu_ray import images, lake, schema, score
from pu_ray.config import PreprocessingConfig
from pu_ray.storage import Storage

CONTENTS = [png(seed, side=4) for seed in range(5)]
BROKEN = np.array([False, True, False, False, True])


def errors(broken) -> pa.Array:
    return pa.array(["truncated" if gone else None for gone in broken], pa.string())


COSINES = np.array([0.5, -0.25, 1.0], np.float32)


def features_block(broken=BROKEN) -> pa.Table:
    """Feature rows whose values say which row they are."""
    values = np.arange(len(broken))[:, None] + np.zeros((1, 3))
    columns = {
        **identity_columns(CONTENTS[: len(broken)]),
        schema.FEATURES: lake.fixed_list(values.astype(np.float16), broken),
        schema.LOGITS: lake.fixed_list((values[:, :2] * [1, -1]).astype(np.float32), broken),
        schema.THUMBNAIL: lake.fixed_list(np.zeros((len(broken), schema.THUMBNAIL_PX), np.uint8), broken),
        schema.GATE: pa.nulls(len(broken), pa.float32()),
        schema.ERROR: errors(broken),
    }
    return pa.table(columns, schema=schema.features(3, 2))


class FakeEngine:
    """Adds its input up; knows how many rows each call brought."""

    def __init__(self, *_: object) -> None:
        self.batches: list[int] = []

    def run(self, batch):
        self.batches.append(len(batch))
        sums = batch.reshape(len(batch), -1).sum(axis=1, dtype=np.float32)
        return [sums]


class FakePixelEngine(FakeEngine):
    def run(self, batch):
        (sums,) = super().run(batch)
        return [sums, np.stack([sums, -sums], axis=1), sums / 100]


# -- answer ------------------------------------------------------------------------------------------------


def test_the_confidence_is_the_softmax_probability_of_the_predicted_class():
    logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32) * 5
    table = score.answer(features_block(), [1.5, -2.0, 0.25], logits, COSINES, BROKEN)
    assert table.schema == schema.scores()
    expected = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(axis=1, keepdims=True)
    for place, row in zip((0, 2, 3), range(3), strict=True):
        answer = table.slice(place, 1).to_pylist()[0]
        assert answer[schema.PREDICTED] == expected[row].argmax()
        assert answer[schema.CONFIDENCE] == pytest.approx(expected[row].max(), rel=1e-5)
    assert table[schema.SCORE].to_pylist() == [1.5, None, -2.0, 0.25, None]
    assert table[schema.NEIGHBOUR].drop_null().to_pylist() == pytest.approx(COSINES.tolist())


def test_energy_and_entropy_are_those_of_the_teachers_answer():
    logits = np.random.default_rng(1).normal(size=(3, 4)) * 3
    table = score.answer(features_block(), np.zeros(3), logits.astype(np.float32), COSINES, BROKEN)
    energy = [float(np.log(sum(np.exp(value) for value in row))) for row in logits]
    assert table[schema.ENERGY].drop_null().to_pylist() == pytest.approx(energy, rel=1e-5)
    entropy = [float(stats.entropy(np.exp(row) / np.exp(row).sum())) for row in logits]
    assert table[schema.ENTROPY].drop_null().to_pylist() == pytest.approx(entropy, rel=1e-4)


def test_large_logits_do_not_overflow():
    logits = np.array([[1000.0, 0.0], [-1000.0, -1001.0], [0.0, 0.0]], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        table = score.answer(features_block(), np.zeros(3), logits, COSINES, BROKEN)
    confidence = table[schema.CONFIDENCE].drop_null().to_pylist()
    assert confidence == pytest.approx([1.0, 1 / (1 + np.exp(-1)), 0.5])


def test_broken_rows_get_nulls_and_keep_identity_and_reason():
    block = features_block()
    table = score.answer(block, np.ones(3), np.ones((3, 2)), COSINES, BROKEN)
    answers = (schema.SCORE, schema.PREDICTED, schema.CONFIDENCE, schema.ENERGY, schema.ENTROPY, schema.NEIGHBOUR)
    for name in answers:
        assert table[name].is_null().to_pylist() == BROKEN.tolist()
    for name in (*schema.IDENTITY_COLUMNS, schema.ERROR):
        assert table[name] == block[name]


def test_a_block_of_several_chunks_is_answered_in_order():
    block = pa.concat_tables([features_block().slice(0, 2), features_block().slice(2)])
    assert block[schema.ROW].num_chunks == 2
    table = score.answer(block, [10.0, 20.0, 30.0], np.zeros((3, 2)), COSINES, BROKEN)
    assert table[schema.SCORE].to_pylist() == [10.0, None, 20.0, 30.0, None]
    assert table[schema.ROW].to_pylist() == [0, 1, 2, 3, 4]


# -- the actors --------------------------------------------------------------------------------------------


@pytest.fixture
def feature_scorer(tmp_path, monkeypatch) -> score.FeatureScorer:
    scorer = Storage(str(tmp_path))
    scorer.write_bytes("scorer.onnx", b"graph")
    scorer.write_bytes("neighbours.onnx", b"graph")
    monkeypatch.setattr(score.engine, "OnnxEngine", FakeEngine)
    return score.FeatureScorer(scorer, batch_size=2)


def test_features_are_scored_in_order_in_batches_without_the_broken_rows(feature_scorer):
    table = feature_scorer(features_block())
    assert table.schema == schema.scores()
    assert table[schema.SCORE].to_pylist() == [0.0, None, 6.0, 9.0, None]
    assert table[schema.PREDICTED].to_pylist() == [0, None, 0, 0, None]
    assert feature_scorer._head.batches == [2, 1]


@pytest.mark.parametrize("broken", [[True, True], []])
def test_a_block_without_a_usable_row_needs_no_engine(feature_scorer, broken):
    table = feature_scorer(features_block(np.array(broken, bool)))
    assert table.schema == schema.scores()
    assert table[schema.SCORE].to_pylist() == [None] * len(broken)
    assert feature_scorer._head.batches == []


def test_pixels_are_scored_in_their_shape():
    pixels = np.arange(5, dtype=np.uint8)[:, None] + np.zeros((1, 2 * 2 * 3), np.uint8)
    columns = {
        **identity_columns(CONTENTS),
        schema.PIXELS: lake.fixed_list(pixels, BROKEN),
        schema.ERROR: errors(BROKEN),
    }
    block = pa.table(columns, schema=schema.decoded(12))
    shapes = []

    class Watched(FakePixelEngine):
        def run(self, batch):
            shapes.append((batch.shape, batch.dtype))
            return super().run(batch)

    scorer = score.ImageScorer(Watched, PreprocessingConfig(size_px=2), batch_size=2, classes=2)
    table = scorer(block)
    assert shapes == [((2, 2, 2, 3), np.uint8), ((1, 2, 2, 3), np.uint8)]
    assert table[schema.SCORE].to_pylist() == [0.0, None, 24.0, 36.0, None]
    assert scorer(block.filter(pa.array(BROKEN)))[schema.SCORE].to_pylist() == [None, None]


# -- behind a cascade, and without a feature cache ---------------------------------------------------------


def test_what_the_gate_rejected_scores_minus_infinity_and_has_no_class(feature_scorer):
    block = features_block()
    rejected = np.array([False, False, True, False, False])
    values = lake.to_matrix(block[schema.FEATURES]).copy()
    columns = {name: block[name] for name in block.column_names}
    columns[schema.FEATURES] = lake.fixed_list(values, BROKEN | rejected)
    columns[schema.LOGITS] = lake.fixed_list(np.zeros((5, 2), np.float32), BROKEN | rejected)
    columns[schema.GATE] = pa.array([0.5, None, -0.5, 0.5, None], pa.float32())
    table = feature_scorer(pa.table(columns, schema=schema.features(3, 2)))
    assert table[schema.SCORE].to_pylist() == [0.0, None, -np.inf, 9.0, None]
    assert table[schema.PREDICTED].to_pylist() == [0, None, schema.NO_CLASS, 0, None]
    assert table[schema.CONFIDENCE].to_pylist()[2] == 0.0
    assert table[schema.ENERGY].to_pylist()[2] == -np.inf
    assert table[schema.NEIGHBOUR].to_pylist()[2] == -1.0
    assert table[schema.ERROR] == block[schema.ERROR]
    assert feature_scorer._head.batches == [2]


def test_images_are_scored_with_their_thumbnails_where_no_cache_keeps_them():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 24 * 24 * 3)).astype(np.uint8)
    columns = {
        **identity_columns(CONTENTS),
        schema.PIXELS: lake.fixed_list(pixels, BROKEN),
        schema.ERROR: errors(BROKEN),
    }
    block = pa.table(columns, schema=schema.decoded(24 * 24 * 3))
    scorer = score.ImageScorer(FakePixelEngine, PreprocessingConfig(size_px=24), 2, classes=2, thumbnails=True)
    table = scorer(block)
    assert table.schema == schema.scores(thumbnails=True)
    expected = images.thumbnails(pixels.reshape(5, 24, 24, 3))
    np.testing.assert_array_equal(lake.to_matrix(table[schema.THUMBNAIL])[~BROKEN], expected[~BROKEN])
    assert table[schema.THUMBNAIL].is_null().to_pylist() == BROKEN.tolist()
    assert scorer(block.filter(pa.array(BROKEN))).schema == schema.scores(thumbnails=True)
