"""pu_ray/features.py: the embedder keeps every row, in order, and its numbers in range."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import identity_columns, job, picture, png, publish

from pu_ray import features, images, lake, schema, score
from pu_ray.config import PreprocessingConfig
from pu_ray.features import Embedder
from pu_ray.ledger import Ledger, ShardEntry
from pu_ray.progress import Silent
from pu_ray.storage import Storage

PREPROCESSING = PreprocessingConfig(size_px=24)
CONTENTS = [png(seed) for seed in range(7)]
BROKEN = np.array([False, True, False, False, True, False, False])


class FakeEngine:
    """Features: mean and a constant; logits: one per corner pixel, so that order and place show."""

    constant = 2.0

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def run(self, batch):
        self.batches.append(batch.shape)
        mean = batch.reshape(len(batch), -1).mean(axis=1, dtype=np.float32)
        outputs = np.stack([mean, np.full(len(batch), self.constant, np.float32)], axis=1)
        return [outputs, batch[:, 0, 0].astype(np.float32)]


def block(broken=BROKEN) -> pa.Table:
    pixels = np.stack([np.asarray(picture(seed)).reshape(-1) for seed in range(len(CONTENTS))])
    columns = {
        **identity_columns(CONTENTS),
        schema.PIXELS: lake.fixed_list(pixels, broken),
        schema.ERROR: pa.array(["truncated" if gone else None for gone in broken], pa.string()),
    }
    return pa.table(columns, schema=schema.decoded(24 * 24 * 3))


def test_every_row_is_embedded_in_its_place_and_error_rows_pass_through():
    table = Embedder(FakeEngine, PREPROCESSING, batch_size=2)(block())
    assert table.schema == schema.features(2, 3)
    assert table[schema.ERROR] == block()[schema.ERROR]
    for name in schema.IDENTITY_COLUMNS:
        assert table[name] == block()[name]
    for name in (schema.FEATURES, schema.LOGITS, schema.THUMBNAIL):
        assert table[name].is_null().to_pylist() == BROKEN.tolist()
    values, logits = lake.to_matrix(table[schema.FEATURES]), lake.to_matrix(table[schema.LOGITS])
    for row in np.flatnonzero(~BROKEN):
        pixels = np.asarray(picture(int(row)))
        assert values[row, 0] == pytest.approx(pixels.mean(), rel=1e-3)
        np.testing.assert_array_equal(logits[row], pixels[0, 0])


def test_the_network_sees_batches_of_the_given_size_and_no_broken_row():
    engine = FakeEngine()
    embedder = Embedder(lambda: engine, PREPROCESSING, batch_size=2)
    engine.batches.clear()  # the probe for the widths
    embedder(block())
    assert engine.batches == [(2, 24, 24, 3), (2, 24, 24, 3), (1, 24, 24, 3)]


def test_thumbnails_are_those_of_the_pixels():
    table = Embedder(FakeEngine, PREPROCESSING, batch_size=64)(block())
    found = lake.to_matrix(table[schema.THUMBNAIL])
    for row in np.flatnonzero(~BROKEN):
        expected = images.thumbnails(np.asarray(picture(int(row)))[None])[0]
        np.testing.assert_array_equal(found[row], expected)


@pytest.mark.parametrize("rows", [7, 0])
def test_a_block_without_a_usable_image_still_has_the_networks_widths(rows):
    broken = block(np.ones(7, bool)).slice(0, rows)
    table = Embedder(FakeEngine, PREPROCESSING, batch_size=2)(broken)
    assert table.schema == schema.features(2, 3)
    assert table.num_rows == rows
    assert table[schema.FEATURES].null_count == rows


@pytest.mark.parametrize(("value", "stored"), [(1e9, 65504.0), (-1e9, -65504.0), (float("inf"), 65504.0), (1e-3, 1e-3)])
def test_features_beyond_float16_are_clipped_not_infinite(value, stored):
    class Loud(FakeEngine):
        constant = value

    table = Embedder(Loud, PREPROCESSING, batch_size=8)(block())
    values = lake.to_matrix(table[schema.FEATURES])[~BROKEN, 1]
    assert values.dtype == np.float16
    np.testing.assert_allclose(values.astype(float), stored, rtol=1e-3)


def test_the_result_does_not_depend_on_the_batch_size():
    one, other = (Embedder(FakeEngine, PREPROCESSING, batch_size=size)(block()) for size in (1, 100))
    assert one == other


# -- which engine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "gpus", "expected"),
    [("auto", 0, "onnx"), ("auto", 0.5, "torch"), ("onnx", 1, "onnx"), ("torch", 0, "torch")],
)
def test_torch_runs_on_gpus_and_onnx_elsewhere_unless_the_job_says_otherwise(engine, gpus, expected):
    config = job(features={"engine": engine}, resources={"embed": {"gpus": gpus}})
    assert features.engine_kind(config) == expected


def test_a_torch_engine_is_a_recipe_that_travels_to_workers():
    config = job(features={"engine": "torch"})
    recipe = pickle.loads(pickle.dumps(features._prepare_engine(config, None)))
    assert recipe.args == (config.teacher, "cpu")
    on_gpu = job(features={"engine": "torch"}, resources={"embed": {"gpus": 1}})
    assert features._prepare_engine(on_gpu, None).args[1] == "cuda"


# -- when rows must be made anew ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "same"),
    [
        ({"lake": {"uri": "s3://elsewhere"}}, True),
        ({"lake": {"max_error_share": 0.5}}, True),
        ({"lake": {"chunk_rows": 7}}, True),
        ({"scorer": {"epochs": 3}}, True),
        ({"features": {"batch_size": 7}}, False),
        ({"features": {"engine": "torch"}}, False),
        ({"lake": {"max_image_px": 10}}, False),
        ({"lake": {"max_image_bytes": 10}}, False),
        ({"teacher": {"preprocessing": {"size_px": 8}}}, False),
        ({"teacher": {"stages": ["layer1"]}}, False),
    ],
)
def test_rows_are_kept_unless_what_determines_them_changes(sections, same):
    inputs = {"teacher": "content", "lake": "listing"}
    before = features._row_settings(job(), inputs)
    assert (features._row_settings(job(**sections), inputs) == before) is same


def test_another_content_of_the_teacher_makes_other_rows_and_another_listing_does_not():
    before = features._row_settings(job(), {"teacher": "a", "lake": "x"})
    assert features._row_settings(job(), {"teacher": "a", "lake": "y"}) == before
    assert features._row_settings(job(), {"teacher": "b", "lake": "x"}) != before


# -- shards without rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["features", "score"])
def test_an_empty_shard_beside_finished_ones_is_no_work_and_no_error(tmp_path, monkeypatch, stage):
    (tmp_path / "lake").mkdir()
    for name, contents in (("a", CONTENTS[:3]), ("empty", [])):
        pq.write_table(pa.table({"bytes": pa.array(contents, pa.binary())}), tmp_path / "lake" / f"{name}.parquet")
    config = job(tmp_path, features={"engine": "torch"})
    full = next(shard for shard in lake.list_shards(config.lake) if shard.path == "a.parquet")
    inputs = {"teacher": "content", "lake": "listing", "features": "f", "fit": "s"}
    settings = (
        features._row_settings(config, inputs) if stage == "features" else score.settings_of.digest({"scorer": "s"})
    )
    storage = Storage(config.output)
    target = storage.child({"features": "features", "score": "scores"}[stage])
    size = target.write_table("data/a.parquet", pa.table({"row": range(3)}))
    Ledger(target, settings).commit(
        full, ShardEntry("a.parquet", full.fingerprint, {"data/a.parquet": 3}), {"data/a.parquet": size}
    )
    if stage == "score":
        features.ledger.write_index(storage.child("features"), {})
        publish(storage.child("features"), "features", counts={"rows": 3})
    run = {"features": features.run, "score": score.run}[stage]
    published = run(config, storage, inputs, "identity", Silent())
    assert published.counts["rows"] == 3
    assert published.counts["rows_done_now"] == 0
