"""pu_ray/embedding.py: the embedder keeps every row, in order, and its numbers in range; the cache keeps its word."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from artifacts import encode, identity_columns, job, picture, png

from pu_ray import embedding, images, lake, schema
from pu_ray.config import PreprocessingConfig
from pu_ray.embedding import Embedder, FeatureCache, Gate
from pu_ray.errors import DataError
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
    assert embedding.engine_kind(config) == expected


def test_a_torch_engine_is_a_recipe_that_travels_to_workers():
    config = job(features={"engine": "torch"})
    nowhere = Storage("/nowhere")
    recipe = pickle.loads(pickle.dumps(embedding.engine_recipe(config, nowhere, None, "content")))
    assert recipe.args == (config.teacher, None, "cpu", False)
    on_gpu = job(features={"engine": "torch", "compile": True}, resources={"embed": {"gpus": 1}})
    assert embedding.engine_recipe(on_gpu, nowhere, None, "content").args[2:] == ("cuda", True)


@pytest.mark.parametrize(
    ("size_px", "channels", "gpus", "asked", "expected"),
    [
        (28, 1, 0, "auto", 128),
        (32, 3, 0, "auto", 128),
        (224, 3, 0, "auto", 16),
        (600, 3, 0, "auto", 8),
        (224, 3, 1, "auto", 256),
        (224, 3, 0, 48, 48),
    ],
)
def test_a_batch_is_as_large_as_pays(size_px, channels, gpus, asked, expected):
    preprocessing = {"size_px": size_px, "channels": channels, "mean": [0.5] * channels, "std": [0.2] * channels}
    config = job(
        teacher={"preprocessing": preprocessing},
        features={"batch_size": asked},
        resources={"embed": {"gpus": gpus}},
    )
    assert embedding.batch_size(config) == expected


def test_a_gpu_is_decoded_for_and_a_cpu_actor_decodes_itself():
    in_task, in_actor = embedding.decode_where(job())
    assert in_task is None
    assert in_actor is not None
    in_task, in_actor = embedding.decode_where(job(resources={"embed": {"gpus": 0.5}}))
    assert in_task is not None
    assert in_actor is None


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
        ({"features": {"cache_uri": "s3://shared"}}, True),
        ({"lake": {"max_image_px": 10}}, False),
        ({"lake": {"max_image_bytes": 10}}, False),
        ({"teacher": {"preprocessing": {"size_px": 8}}}, False),
        ({"teacher": {"stages": ["layer1"]}}, False),
    ],
)
def test_rows_are_kept_unless_what_determines_them_changes(sections, same):
    inputs = {"teacher": "content", "lake": "listing"}
    before = embedding.row_settings(job(), inputs)
    assert (embedding.row_settings(job(**sections), inputs) == before) is same


def test_another_content_of_the_teacher_makes_other_rows_and_another_listing_does_not():
    before = embedding.row_settings(job(), {"teacher": "a", "lake": "x"})
    assert embedding.row_settings(job(), {"teacher": "a", "lake": "y"}) == before
    assert embedding.row_settings(job(), {"teacher": "b", "lake": "x"}) != before


def test_another_gate_makes_other_rows():
    before = embedding.row_settings(job(), {"teacher": "a"})
    assert embedding.row_settings(job(), {"teacher": "a", "cascade": "gate"}) != before


# -- encoded rows and a gate -------------------------------------------------------------------------------


def encoded_block() -> pa.Table:
    contents = [b"not an image" if gone else content for content, gone in zip(CONTENTS, BROKEN, strict=True)]
    columns = {
        **identity_columns(CONTENTS),
        schema.BYTES: pa.array(contents, pa.large_binary()),
        schema.ERROR: pa.nulls(len(contents), pa.string()),
    }
    return pa.table(columns, schema=schema.encoded())


def test_an_actor_that_decodes_makes_the_rows_of_one_that_does_not():
    decode = embedding.decoder(job())
    itself = Embedder(FakeEngine, PREPROCESSING, 2, decode=decode)(encoded_block())
    handed = Embedder(FakeEngine, PREPROCESSING, 2)(decode(encoded_block()))
    assert itself == handed
    assert itself[schema.ERROR].to_pylist() == ["not_an_image" if gone else None for gone in BROKEN]


class GatedEngine(FakeEngine):
    """Rejects images darker than their mean allows."""

    def run(self, batch):
        outputs = super().run(batch)
        return [*outputs, outputs[0][:, 0] - 128]


def test_rejected_rows_have_a_negative_margin_a_thumbnail_and_no_features():
    table = Embedder(GatedEngine, PREPROCESSING, batch_size=3)(block())
    assert table.schema == schema.features(2, 3)
    for row, gone in enumerate(BROKEN):
        found = table.slice(row, 1).to_pylist()[0]
        margin = np.asarray(picture(row)).mean() - 128
        assert (found[schema.GATE] is None) == gone
        assert (found[schema.THUMBNAIL] is None) == gone
        assert (found[schema.FEATURES] is None) == (gone or margin < 0)
        assert (found[schema.LOGITS] is None) == (gone or margin < 0)
        if not gone:
            assert found[schema.GATE] == pytest.approx(margin, abs=1e-3)
    margins = [m for m in table[schema.GATE].to_pylist() if m is not None]
    assert min(margins) < 0 < max(margins)  # else this proves nothing


# -- the cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(Storage(str(tmp_path / "cache")), "settings")


def renamed(table: pa.Table) -> pa.Table:
    """The same images in another shard, at other rows."""
    table = table.set_column(1, schema.SHARD, pa.array(["b.tar"] * table.num_rows))
    return table.set_column(2, schema.ROW, pa.array(range(100, 100 + table.num_rows), pa.int64()))


def test_what_one_run_embedded_another_finds_wherever_the_images_lie(cache):
    decode = embedding.decoder(job())
    made = Embedder(FakeEngine, PREPROCESSING, 2, decode=decode, cache=cache)(encoded_block())
    found = embedding.find_or_decode(renamed(encoded_block()), cache, None)
    assert found == renamed(made)
    assert found[schema.SHARD].to_pylist() == ["b.tar"] * len(CONTENTS)

    class Idle(FakeEngine):
        def run(self, batch):
            assert len(batch) == 1, "only the probe for the widths"
            return super().run(batch)

    assert Embedder(Idle, PREPROCESSING, 2, decode=decode, cache=cache)(found) == found


@pytest.mark.parametrize("change", ["another image", "another order", "other settings", "fewer images"])
def test_what_was_not_embedded_like_this_is_not_found(cache, change):
    Embedder(FakeEngine, PREPROCESSING, 2, decode=embedding.decoder(job()), cache=cache)(encoded_block())
    wanted = encoded_block()
    if change == "another image":
        wanted = wanted.set_column(0, schema.SAMPLE_ID, pa.array([bytes(16)] * len(CONTENTS), schema.SAMPLE_ID_TYPE))
    elif change == "another order":
        wanted = wanted.take(pa.array(range(len(CONTENTS) - 1, -1, -1)))
    elif change == "fewer images":
        wanted = wanted.slice(1)
    else:
        cache = FeatureCache(cache.storage, "others")
    assert cache.find(wanted) is None
    assert embedding.find_or_decode(wanted, cache, None) is wanted


def test_a_block_with_an_image_that_could_not_be_read_is_never_kept(cache):
    unread = encoded_block()
    samples = unread[schema.SAMPLE_ID].to_pylist()
    unread = unread.set_column(0, schema.SAMPLE_ID, pa.array([None, *samples[1:]], schema.SAMPLE_ID_TYPE))
    Embedder(FakeEngine, PREPROCESSING, 2, decode=embedding.decoder(job()), cache=cache)(unread)
    assert cache.storage.list_files() == []


# -- the cascade's network ---------------------------------------------------------------------------------


@pytest.fixture
def gate(tmp_path) -> Gate:
    """A gate on the first stage's four channels in 4 x 4 cells, which lets about half of the images pass."""
    import torch

    from pu_ray import engine
    from pu_ray.pu import scorers

    torch.manual_seed(0)
    head = scorers.Head(64, attention=False, hidden=0)
    graph = engine.to_onnx(head.eval(), torch.randn(2, 64), input_name="features", output_names=["scores"])
    storage = Storage(str(tmp_path / "cascade"))
    storage.write_bytes(embedding.GATE_FILE, graph)
    return Gate(storage, stages=1, threshold=0.0, spied_share=0.0)


@pytest.fixture
def teacher_job(tmp_path):
    """A job whose teacher has weights, with batch-norm statistics of real images."""
    import torch

    from pu_ray import models
    from pu_ray.config import NetworkConfig

    torch.manual_seed(1)
    network = models.build(NetworkConfig(architecture="cifar/resnet8-w4"), classes=2, in_channels=3)
    config = job(tmp_path)
    pixels = torch.from_numpy(np.stack([np.asarray(picture(seed)) for seed in range(32)]))
    network.train()
    with torch.no_grad():
        for _ in range(20):
            models.Normalised(network, config.teacher.preprocessing)(pixels)
    (tmp_path / "teacher.safetensors").write_bytes(models.save_weights(network.eval()))
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    return config


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_cascade_gives_the_whole_networks_answers_to_those_that_pass(teacher_job, gate, kind, tmp_path):
    target = Storage(str(tmp_path / "engines"))
    config = teacher_job.model_copy(update={"features": teacher_job.features.model_copy(update={"engine": kind})})
    whole = embedding.engine_recipe(config, target, None, "content")()
    pixels = np.stack([np.asarray(picture(seed)) for seed in range(64)])
    features, logits = whole.run(pixels)
    margins = embedding.engine_recipe(config, target, gate, "content")().run(pixels)[2]
    middle = Gate(gate.storage, 1, float(np.median(margins)), 0.0)
    cascade = pickle.loads(pickle.dumps(embedding.engine_recipe(config, target, middle, "content")))()
    some, some_logits, margins = cascade.run(pixels)
    passed = margins >= 0
    assert 0.3 < passed.mean() < 0.7
    np.testing.assert_allclose(some[passed], features[passed], atol=1e-4)
    np.testing.assert_allclose(some_logits[passed], logits[passed], atol=1e-4)
    assert not some_logits[~passed].any()
    np.testing.assert_allclose(some[:, :4], features[:, :4], atol=1e-4)  # the early features are everybody's
    # A batch of which nobody passes still has the widths.
    none, none_logits, _ = cascade.run(pixels[~passed][:3])
    assert none.shape == (3, features.shape[1])
    assert not none_logits.any()


def test_a_gate_that_spares_nothing_or_everything_is_refused(teacher_job, gate, tmp_path):
    from pu_ray.errors import ConfigError

    for stages in (3, 4):
        with pytest.raises(ConfigError, match="cascade_stages"):
            embedding.engine_recipe(
                teacher_job, Storage(str(tmp_path / "x")), Gate(gate.storage, stages, 0.0, 0.0), "content"
            )


# -- scaled decoding ---------------------------------------------------------------------------------------


def photographs() -> pa.Table:
    """Large JPEGs, a PNG, and a file that is no image."""
    contents = [encode(picture(seed, side=400), "JPEG", quality=92) for seed in range(6)]
    contents += [png(7, side=400), b"not an image"]
    columns = {
        **identity_columns(contents),
        schema.BYTES: pa.array(contents, pa.large_binary()),
        schema.ERROR: pa.nulls(len(contents), pa.string()),
    }
    return pa.table(columns, schema=schema.encoded())


class Pernickety(FakeEngine):
    """Its answer is the parity of the pixels' sum, which any change of a pixel may change."""

    def run(self, batch):
        odd = batch.reshape(len(batch), -1).sum(axis=1) % 2
        return [np.zeros((len(batch), 2), np.float32), np.stack([odd, 1 - odd], axis=1).astype(np.float32)]


def test_scaled_decoding_is_compared_on_a_sample_and_recorded():
    found = embedding.check_scaled_decode(job(lake={"scaled_decode": True}), FakeEngine(), photographs())
    assert (found["images"], found["decoded_smaller"]) == (7, 6)
    assert 0 < found["mean_pixel_difference"] < 6
    assert found["mean_pixel_difference"] < found["largest_pixel_difference"]
    assert found["agreement"] >= 0.95


def test_scaled_decoding_that_changes_the_answers_is_refused():
    with pytest.raises(DataError, match=r"scaled_decode(.|\n)*min_scaled_agreement"):
        embedding.check_scaled_decode(job(lake={"scaled_decode": True}), Pernickety(), photographs())
    lenient = job(lake={"scaled_decode": True, "min_scaled_agreement": 0.0})
    assert embedding.check_scaled_decode(lenient, Pernickety(), photographs())["agreement"] < 0.95


def test_a_lake_without_a_usable_image_cannot_be_compared_and_is_not_refused():
    found = embedding.check_scaled_decode(job(), FakeEngine(), photographs().slice(7))
    assert (found["images"], found["agreement"]) == (0, None)


def test_the_decoder_of_a_job_decodes_as_the_job_says():
    plain, scaled = (
        embedding.decoder(job(lake={"scaled_decode": choice}))(photographs())[schema.PIXELS] for choice in (False, True)
    )
    assert plain != scaled
    assert plain.slice(6) == scaled.slice(6)  # no JPEG, no difference


@pytest.mark.parametrize("gated", [False, True])
def test_graphs_are_written_once_and_found_again_without_torch(teacher_job, gate, tmp_path, monkeypatch, gated):
    target = Storage(str(tmp_path / "engines"))
    used = gate if gated else None
    embedding.engine_recipe(teacher_job, target, used, "content")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "engines").rglob("*") if path.is_file()}
    assert len(before) == (3 if gated else 1)

    def never(*_):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("pu_ray.models.load_teacher", never)
    network = embedding.engine_recipe(teacher_job, target, used, "content")()
    assert network.run(np.zeros((2, 24, 24, 3), np.uint8))[1].shape == (2, 2)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    # Another teacher, or its weights exchanged, is another graph.
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        embedding.engine_recipe(teacher_job, target, used, "other content")


# -- the sample that no gate keeps from the fit ------------------------------------------------------------


def test_the_sample_is_as_large_as_asked_and_chosen_by_content_alone():
    samples = [images.sample_id(bytes([k % 256, k // 256])) for k in range(4000)]
    chosen = embedding.spied(samples, 0.25)
    assert abs(chosen.mean() - 0.25) < 0.03
    assert (embedding.spied(samples[::-1], 0.25) == chosen[::-1]).all()
    # A larger share holds the smaller one.
    assert (embedding.spied(samples, 0.5) >= chosen).all()
    assert not embedding.spied(samples, 0.0).any()
    assert embedding.spied(samples, 1.0).all()
    assert embedding.spied([None], 1.0).tolist() == [False]


def test_images_of_the_sample_have_features_whatever_the_gate_says(teacher_job, gate, tmp_path):
    target = Storage(str(tmp_path / "engines"))
    open_whole = embedding.engine_recipe(teacher_job, target, None, "content")
    shut = Gate(gate.storage, 1, 1e6, 0.0)
    open_cascade = embedding.engine_recipe(teacher_job, target, shut, "content")
    whole = Embedder(open_whole, PREPROCESSING, 2)(block())
    none = Embedder(open_cascade, PREPROCESSING, 2)(block())
    some = Embedder(open_cascade, PREPROCESSING, 2, spied_share=0.5)(block())
    assert none[schema.FEATURES].null_count == len(CONTENTS)
    chosen = embedding.spied(block()[schema.SAMPLE_ID].to_pylist(), 0.5) & ~BROKEN
    assert 0 < chosen.sum() < (~BROKEN).sum()
    assert some[schema.FEATURES].is_valid().to_pylist() == chosen.tolist()
    assert max(margin for margin in some[schema.GATE].to_pylist() if margin is not None) < 0
    for name in (schema.FEATURES, schema.LOGITS):
        np.testing.assert_allclose(
            lake.to_matrix(some[name])[chosen].astype(float), lake.to_matrix(whole[name])[chosen], rtol=2e-2, atol=1e-2
        )
