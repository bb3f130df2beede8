"""pu_ray/distill/soft_labels.py: which crops, and the teacher's answers for them."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from scipy.special import softmax

from pu_ray import config as settings_of
from pu_ray import embedding, lake, ledger, ray_train, schema
from pu_ray.config import AugmentConfig, ImagesConfig
from pu_ray.distill import answers, crops, fit, soft_labels
from pu_ray.distill.answers import SoftLabels
from pu_ray.distill.soft_labels import SoftLabeller
from pu_ray.errors import DataError
from pu_ray.images import sample_id
from pu_ray.storage import Storage

# -- crops by content --------------------------------------------------------------------------------------

AUGMENT = AugmentConfig(crop_padding_px=2)


def test_the_crops_of_an_image_depend_on_its_content_and_the_seed():
    one = soft_labels.crops_of(b"a" * 16, 4, (8, 8), AUGMENT, 0)
    assert one.shape == (4, 5)
    np.testing.assert_array_equal(one, soft_labels.crops_of(b"a" * 16, 4, (8, 8), AUGMENT, 0))
    assert not np.array_equal(one, soft_labels.crops_of(b"b" * 16, 4, (8, 8), AUGMENT, 0))
    assert not np.array_equal(one, soft_labels.crops_of(b"a" * 16, 4, (8, 8), AUGMENT, 1))


# -- the actor, and what a worker reads of it --------------------------------------------------------------


class Means:
    """A teacher whose logits are the mean of the left half, of the right half, and nothing."""

    def run(self, pixels):
        halves = [pixels[:, :, :4].mean(axis=(1, 2, 3)), pixels[:, :, 4:].mean(axis=(1, 2, 3))]
        logits = np.stack([*halves, np.zeros(len(pixels))], axis=1).astype(np.float32) / 16
        return [np.zeros((len(pixels), 2), np.float32), logits]


def job(crops_per_image):
    return settings_of.resolve(
        [
            (
                "test",
                {
                    "name": "x",
                    "output": "o",
                    "teacher": {
                        "architecture": "cifar/resnet8-w16",
                        "weights": "w",
                        "classes": "c",
                        "preprocessing": {"size_px": 8},
                    },
                    "labeled": {"uri": "l"},
                    "test": {"uri": "t"},
                    "lake": {"uri": "lake"},
                    "student": {"architecture": "cifar/resnet8-w16"},
                    "distill": {
                        "soft_labels": "cached",
                        "crops": crops_per_image,
                        "augment": {"crop_padding_px": 2, "horizontal_flip": True},
                    },
                },
            )
        ]
    ).job


def encoded(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    contents = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    table = pa.table(
        {
            schema.SAMPLE_ID: pa.array([sample_id(content) for content in contents], schema.SAMPLE_ID_TYPE),
            schema.SHARD: ["s"] * count,
            schema.ROW: pa.array(np.arange(count)),
            schema.NAME: pa.array([f"{n}.png" for n in range(count)], pa.string()),
            schema.BYTES: pa.array(contents, pa.large_binary()),
            schema.ERROR: pa.nulls(count, pa.string()),
        },
        schema=schema.encoded(),
    )
    return images, table


def labeller(crops_per_image=3):
    config = job(crops_per_image)
    return SoftLabeller(Means, config, embedding.decoder(config)), config


def stored(crops_per_image=3, count=6):
    images, table = encoded(count)
    actor, config = labeller(crops_per_image)
    answered = actor(table)
    assert answered.schema.equals(schema.soft_labels(crops_per_image, 3))
    parts = answers.arrays_of(answered)
    return images, SoftLabels(iter([[part[:2] for part in parts], [part[2:] for part in parts]]), 3), config


def test_a_visit_gets_its_crop_and_what_the_teacher_says_of_that_very_crop():
    images, found_again, _ = stored()
    assert len(found_again) == 6
    rows, visits = np.array([4, 0, 5, 4]), np.array([0, 1, 2, 7])
    chosen, found = found_again.take(rows, visits)
    seen = crops.cut(images[rows], chosen)
    np.testing.assert_allclose(softmax(found, axis=1), softmax(Means().run(seen)[1], axis=1), atol=5e-3)


def test_the_crops_of_an_image_take_turns():
    _, found_again, config = stored()
    turns = [found_again.take(np.array([3]), np.array([visit]))[0][0].tolist() for visit in range(6)]
    assert turns[:3] == turns[3:]
    assert len(set(map(tuple, turns[:3]))) > 1
    assert config.distill.crops == 3


def test_mean_probabilities_are_over_an_images_crops():
    _, found_again, _ = stored()
    rows = np.array([1, 3])
    each = [softmax(found_again.take(rows, np.full(2, visit))[1].astype(float), axis=1) for visit in range(3)]
    np.testing.assert_allclose(found_again.mean_probabilities(rows), np.mean(each, axis=0), rtol=1e-6)


def test_an_image_that_broke_since_it_was_chosen_stops_the_pass_and_is_named():
    _, table = encoded(3)
    broken = [table[schema.BYTES][0].as_py(), b"no image", table[schema.BYTES][2].as_py()]
    at = table.schema.get_field_index(schema.BYTES)
    actor, _ = labeller()
    with pytest.raises(DataError, match="a chosen image cannot be decoded") as caught:
        actor(table.set_column(at, schema.BYTES, pa.array(broken, pa.large_binary())))
    assert caught.value.where == "1.png"
    assert caught.value.got == "not_an_image"


# -- the pass and the worker's share, without Ray ----------------------------------------------------------


def mined_and_labeled(root, mined, labeled):
    """Artifacts as the stages before leave them: three files of mined images, and labeled images with their roles."""
    storage = Storage(str(root))
    order, entries = np.random.default_rng(1).permutation(mined), {}
    _, table = encoded(mined + labeled)
    contents, ids = table[schema.BYTES].to_pylist(), table[schema.SAMPLE_ID].to_pylist()
    for name, rows in {"a": range(0, 9), "b": range(9, 10), "c": range(10, mined)}.items():
        columns = {
            schema.SAMPLE_ID: pa.array([ids[row] for row in rows], schema.SAMPLE_ID_TYPE),
            schema.NAME: pa.array([None] * len(rows), pa.string()),
            schema.ORDER: pa.array(order[list(rows)]),
            schema.BYTES: pa.array([contents[row] for row in rows], pa.large_binary()),
        }
        storage.child("mined").write_table(f"data/{name}.parquet", pa.table(columns))
        entries[name] = ledger.ShardEntry(name, "f", {f"data/{name}.parquet": len(rows)})
    ledger.write_index(storage.child("mined"), entries)
    roles = ["train", "validate", "calibrate", "train"] * (labeled // 4)
    table = {schema.SAMPLE_ID: pa.array(ids[mined:], schema.SAMPLE_ID_TYPE), "role": roles}
    storage.child("scorer").write_table("labeled.parquet", pa.table(table))
    for row in range(mined, mined + labeled):
        file = root / f"labeled/one/{row:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[row])
    return storage


def passed(config, storage, taught):
    """What the Ray pass does, unit by unit."""
    folder, files = storage.child("soft_labels"), {}
    actor = SoftLabeller(Means, config, embedding.decoder(config))
    for unit in soft_labels._units(config, storage, ["one", "two"], taught):
        name = f"data/{unit.shard.key}-{unit.first_row}.parquet"
        answered = actor(unit.read())
        assert answered.num_rows == unit.rows
        folder.write_table(name, answered)
        files.setdefault(unit.shard.path, {})[name] = unit.rows
    ledger.write_index(folder, {path: ledger.ShardEntry(path, "f", found) for path, found in files.items()})


@pytest.mark.parametrize("world", [1, 3])
def test_every_worker_finds_the_answers_for_its_own_images(tmp_path, monkeypatch, world):
    monkeypatch.setattr(soft_labels, "_UNIT_ROWS", 4)
    config = job(3).model_copy(update={"labeled": ImagesConfig(uri=str(tmp_path / "labeled"))})
    storage = mined_and_labeled(tmp_path, mined=25, labeled=8)
    passed(config, storage, taught=6)
    labeled = lake.read_labeled(config.labeled.uri, ["one", "two"])
    seen = 0
    for rank in range(world):
        worker = ray_train.Worker(rank, world, torch.device("cpu"), "float32", None, None, None, None)
        batches = fit.batches_of(config, storage, labeled, 3, worker)
        seen += batches.images
        for source in batches.sources:
            rows = np.arange(len(source))
            pixels = source.images.take(rows)
            for visit in range(3):
                chosen, found = source.answers.take(rows, np.full(len(rows), visit))
                theirs = Means().run(crops.cut(pixels, chosen))[1]
                np.testing.assert_allclose(softmax(found, axis=1), softmax(theirs, axis=1), atol=5e-3)
        assert batches.labeled.labels.tolist() == [0] * len(batches.labeled)
    assert seen == 25 + 6, "all that teach, and those that choose the student are not among them"
