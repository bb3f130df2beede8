"""pu_ray/pu/cascade.py: where the gate stands, and what it publishes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pu_ray import demo, embedding, engine, lake, lake_pass, schema
from pu_ray.config import resolve
from pu_ray.errors import ConfigError, DataError
from pu_ray.progress import Silent
from pu_ray.pu import cascade
from pu_ray.storage import Storage


def test_the_gate_stands_below_the_weakest_that_must_pass_by_its_distance_to_the_median():
    # 99 positives from 0 to 98: of 100 places 1 % lie below the weakest.
    assert cascade.gate_threshold(np.arange(99.0), recall=0.99, margin=0.75) == pytest.approx(0 - 0.75 * 49)
    assert cascade.gate_threshold(np.arange(99.0), recall=0.9, margin=0.75) == pytest.approx(9 - 0.75 * 40)
    shuffled = np.random.default_rng(0).permutation(np.arange(99.0))
    assert cascade.gate_threshold(shuffled, recall=0.9, margin=0.75) == pytest.approx(9 - 0.75 * 40)
    assert cascade.gate_threshold(shuffled, recall=0.9, margin=0.0) == 9


def test_more_recall_never_raises_the_gate():
    logits = np.random.default_rng(1).normal(size=200)
    thresholds = [cascade.gate_threshold(logits, recall, 0.25) for recall in (0.5, 0.8, 0.9, 0.99, 0.999)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[-1] < logits.min()


def test_few_positives_still_have_a_gate_below_all_of_them():
    assert cascade.gate_threshold([1.0, 2.0, 3.0], recall=0.995, margin=0.75) == pytest.approx(1 - 0.75)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The demo in small."""
    folder = tmp_path_factory.mktemp("gate") / "demo"
    size = demo.DemoSize(
        lake_rows=900,
        test_per_class=10,
        teacher_per_class=60,
        labeled_per_class=40,
        hidden_per_class=30,
        teacher_steps=40,
        leaks=4,
        broken=5,
        copies=5,
    )
    demo.build(str(folder), size, 0, Silent())
    return folder


def job(task, output, **features):
    settings = {
        "name": "gate",
        "output": str(output),
        "teacher": {
            "architecture": "cifar/resnet14-w16",
            "weights": f"{task}/teacher.safetensors",
            "classes": f"{task}/labels.txt",
            "preprocessing": {"size_px": 28, "channels": 1, "mean": [0.1307], "std": [0.3081]},
        },
        "labeled": {"uri": f"{task}/labeled"},
        "test": {"uri": f"{task}/test"},
        "lake": {"uri": f"{task}/lake"},
        "student": {"architecture": "cifar/resnet8-w4"},
        "features": {"cascade": True, "cascade_sample": 800, "cascade_stages": 2, **features},
    }
    return resolve([("test", settings)]).job


def test_the_gate_rejects_most_letters_and_hardly_a_digit(task, tmp_path):
    config = job(task, tmp_path)
    storage = Storage(config.output)
    published = cascade.run(config, storage, {}, "identity", Silent())
    folder = storage.child("cascade")
    gate = embedding.Gate.of(folder, published)
    assert gate.stages == 2
    margins = folder.read_table("labeled.parquet")["margin"].to_numpy()
    assert len(margins) == 400
    assert (margins >= 0).mean() > 0.97
    assert published.counts["calibrate_lost"] <= 0.05 * published.counts["calibrate"]
    assert published.facts["passing_share"] < 0.9

    # On the lake, by its truth: the graph that was published does what the manifest says.
    network = embedding.engine_recipe(config, Storage(str(tmp_path / "engines")), gate, "content")()
    known = pq.read_table(task / "truth.parquet")
    truth = dict(zip(known["sample_id"].to_pylist(), known["class"].to_pylist(), strict=True))
    shards = lake.list_shards(config.lake)
    tables = [embedding.decoder(config)(unit.read()) for unit in lake_pass.lake_units(config, shards, shards)]
    table = pa.concat_tables(tables)
    broken = embedding.broken_rows(table)
    pixels = embedding.usable_pixels(table, broken, (28, 28, 1))
    passed = engine.in_batches(network, pixels, 128)[2] >= 0
    digit = np.array([truth[sample] >= 0 for sample in table[schema.SAMPLE_ID].to_pylist()])[~broken]
    assert passed[digit].mean() > 0.95
    assert passed[~digit].mean() < 0.9


def test_the_same_job_makes_the_same_gate(task, tmp_path):
    digests = []
    for name in ("one", "other"):
        config = job(task, tmp_path / name)
        cascade.run(config, Storage(config.output), {}, "identity", Silent())
        digests.append((tmp_path / name / "cascade/labeled.parquet").read_bytes())
    assert digests[0] == digests[1]


def test_a_gate_before_the_last_stage_has_nothing_to_spare(task, tmp_path):
    config = job(task, tmp_path, cascade_stages=3)
    with pytest.raises(ConfigError, match="stages to spare"):
        cascade.run(config, Storage(config.output), {}, "identity", Silent())


def test_too_small_a_sample_is_refused(task, tmp_path, monkeypatch):
    monkeypatch.setattr(cascade.lake_pass, "sample_units", lambda *_: [])
    config = job(task, tmp_path)
    with pytest.raises(DataError, match="too few images to fit the cascade's gate"):
        cascade.run(config, Storage(config.output), {}, "identity", Silent())


def test_shifted_copies_hold_the_same_picture_a_little_off():
    pixels = np.zeros((2, 28, 28, 1), np.uint8)
    pixels[0, 10, 12], pixels[1, 20, 5] = 255, 200
    copies = cascade._shifted(pixels, seed=3)
    assert copies.shape == (2 * cascade._SHIFTED_COPIES, 28, 28, 1)
    places = [np.unravel_index(copy.argmax(), copy.shape)[:2] for copy in copies]
    assert {copy.max() for copy in copies[::2]} == {255}
    offsets = np.array(places[::2]) - (10, 12)
    assert np.abs(offsets).max() == 2  # a fourteenth of the side
    assert len(np.unique(offsets, axis=0)) > 3
    np.testing.assert_array_equal(cascade._shifted(pixels, seed=3), copies)


def test_many_positives_need_no_copies_by_the_dozen():
    assert len(cascade._shifted(np.zeros((3000, 8, 8, 1), np.uint8), seed=0)) == 3000
