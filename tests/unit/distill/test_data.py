"""pu_ray/distill/data.py: a batch is a function of its step, and every image has its turn."""

from __future__ import annotations

import hashlib
from threading import Event

import numpy as np
import pyarrow as pa
import pytest

from pu_ray import ledger, schema
from pu_ray.config import AugmentConfig
from pu_ray.distill.data import NO_LABEL, Batches, Source, ahead, labeled_by_role, mined_images, taught_images
from pu_ray.distill.store import InMemory
from pu_ray.errors import DataError
from pu_ray.lake import LabeledImages
from pu_ray.ledger import ShardEntry
from pu_ray.storage import Storage

PLAIN = AugmentConfig(crop_padding_px=0, horizontal_flip=False)
FULL = AugmentConfig()


def numbered(first, count, side=1):
    """Images whose every pixel holds the image's number, below 256."""
    numbers = np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(numbers[:, None, None, None], (count, side, side, 3)).copy()


def numbers(batch):
    return batch[:, 0, 0, 0].tolist()


def batches(mined=20, labeled=6, size=8, share="auto", augment=PLAIN, seed=0, rank=0):
    sources = (Source(InMemory(numbered(*place))) for place in ((0, mined), (200, labeled)))
    return Batches(*sources, size, share, augment, seed, rank)


# -- which images ------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_rank_and_step_alone():
    one, same = batches(augment=FULL), batches(augment=FULL)
    for step in (7, 0, 3, 7):  # in any order, as after a restart
        np.testing.assert_array_equal(one.at(step).pixels, same.at(step).pixels)
    reference = numbers(batches().at(3).pixels)
    assert numbers(batches(seed=1).at(3).pixels) != reference
    assert numbers(batches(rank=1).at(3).pixels) != reference
    assert numbers(batches().at(4).pixels) != reference


@pytest.mark.parametrize(("mined", "labeled", "size"), [(20, 6, 8), (20, 6, 13), (3, 2, 8), (50, 0, 7), (0, 9, 4)])
def test_auto_shows_every_image_once_per_epoch_across_the_ends_of_batches(mined, labeled, size):
    draw = batches(mined, labeled, size)
    images = draw.images
    assert images == mined + labeled
    stream = []
    for step in range(4 * images):
        batch = draw._draw(step)
        rows = np.concatenate([source.images.take(rows) for source, rows, _ in batch])
        assert len(rows) == size
        stream.append(sorted(numbers(rows)))
    # Within a batch the order is free, so epochs are compared by counts: after every whole number of epochs that is
    # also a whole number of batches, every image has been seen that many times.
    everything = sorted(number for batch in stream for number in batch)
    expected = sorted(list(range(mined)) + list(range(200, 200 + labeled)))
    assert everything == sorted(expected * (4 * size))
    # In between, no image is ever ahead of another by more than the two epochs a batch may touch.
    for end in range(1, len(stream)):
        counts = np.bincount([number for batch in stream[:end] for number in batch], minlength=256)[expected]
        assert counts.max() - counts.min() <= 1 + -(-size // images)


def test_epochs_are_shuffled_anew():
    draw = batches(mined=16, labeled=0, size=16)
    epochs = [numbers(draw.at(step).pixels) for step in range(3)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("share", "expected"), [(0.25, 2), (0.5, 4), (0.0, 0), (1.0, 8), (0.3, 2)])
def test_an_explicit_share_of_labeled_images_is_met_in_every_batch(share, expected):
    draw = batches(share=share)
    for step in range(10):
        batch = numbers(draw.at(step).pixels)
        assert len(batch) == 8
        assert sum(number >= 200 for number in batch) == expected


def test_with_an_explicit_share_both_sources_go_round():
    draw = batches(mined=20, labeled=6, size=8, share=0.25)
    seen = [number for step in range(10) for number in numbers(draw.at(step).pixels)]
    mined, labeled = [n for n in seen if n < 200], [n for n in seen if n >= 200]
    assert sorted(mined) == sorted(list(range(20)) * 3)  # 60 draws
    assert sorted(labeled[:18]) == sorted(list(range(200, 206)) * 3)  # 20 draws: three rounds and two more


def test_a_share_of_labeled_images_is_dropped_where_there_are_none():
    assert sorted(numbers(batches(mined=8, labeled=0, share=0.5).at(0).pixels)) == list(range(8))


# -- what a batch brings -----------------------------------------------------------------------------------


def textured(count=40, side=12):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def source(pixels, **more):
    return Source(InMemory(pixels), **more)


def test_crops_differ_from_step_to_step_and_images_are_never_changed():
    pixels = textured()
    before = pixels.copy()
    draw = Batches(source(pixels), source(pixels[:0]), 16, "auto", FULL, 0)
    seen = set()
    for step in range(6):
        batch = draw.at(step).pixels
        seen.add(batch.tobytes())
        batch[:] = 0
    assert len(seen) == 6
    np.testing.assert_array_equal(pixels, before)


def test_labeled_images_bring_their_class_and_mined_ones_none():
    labels = np.arange(6) % 3
    draw = Batches(source(numbered(0, 20)), source(numbered(200, 6), labels=labels), 8, "auto", PLAIN, 0)
    for step in range(8):
        batch = draw.at(step)
        for number, label in zip(numbers(batch.pixels), batch.labels, strict=True):
            assert label == (labels[number - 200] if number >= 200 else NO_LABEL)


class Stored:
    """Answers that tell which visit of which image they belong to; the crop flips every other visit."""

    def take(self, rows, visits):
        crops = np.tile(np.array([0, 0, 4, 4, 0], np.int16), (len(rows), 1))
        crops[:, 4] = visits % 2
        return crops, np.stack([rows, visits], axis=1).astype(np.float32)

    def mean_probabilities(self, rows):
        raise AssertionError


def test_stored_answers_come_with_their_own_crops_and_count_the_visits():
    pixels = textured(10, side=4)
    stored = Source(InMemory(pixels), Stored())
    draw = Batches(stored, Source(InMemory(pixels[:0]), Stored()), 4, "auto", FULL, 0)
    visits = {row: [] for row in range(10)}
    for step in range(10):
        batch = draw.at(step)
        for image, (row, visit) in zip(batch.pixels, batch.teacher.astype(int), strict=True):
            visits[row].append(visit)
            expected = pixels[row][:, ::-1] if visit % 2 else pixels[row]
            np.testing.assert_array_equal(image, expected)
    assert all(seen == [0, 1, 2, 3] for seen in visits.values())


def test_without_stored_answers_a_batch_has_none():
    assert batches().at(0).teacher is None


@pytest.mark.parametrize(("count", "sizes"), [(1, [8]), (3, [3, 3, 2]), (8, [1] * 8), (20, [1] * 8)])
def test_the_parts_of_a_batch_are_the_batch(count, sizes):
    pixels = textured(10, side=4)
    draw = Batches(Source(InMemory(pixels), Stored()), Source(InMemory(pixels[:0]), Stored()), 8, "auto", PLAIN, 0)
    batch = draw.at(0)
    parts = list(batch.parts(count))
    assert [len(part) for part in parts] == sizes
    for name in ("pixels", "labels", "teacher"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(batch, name))


# -- ahead of time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_that_are_prepared_ahead_come_in_order(threads):
    def slow_for_even(step):
        Event().wait(0.005 * (step % 2 == 0))
        return step

    assert list(ahead(slow_for_even, 5, 25, threads)) == list(range(5, 25))


def test_no_more_is_prepared_than_threads_can_hold():
    prepared = []
    stream = ahead(lambda step: prepared.append(step) or step, 0, 100, 2)
    assert next(stream) == 0
    assert max(prepared) <= 2


def test_what_goes_wrong_while_preparing_stops_the_training():
    def broken(step):
        if step == 2:
            raise DataError("an image is broken", slug="labeled-image-unusable")
        return step

    stream = ahead(broken, 0, 5, 1)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(DataError, match="an image is broken"):
        next(stream)


# -- dealing to workers ------------------------------------------------------------------------------------


@pytest.fixture
def mined(tmp_path):
    """Three files of mined images; the bytes are the row's place in the order."""
    storage = Storage(str(tmp_path))
    order = np.random.default_rng(1).permutation(50)
    entries = {}
    for name, part in {"a": order[:20], "b": order[20:21], "c": order[21:]}.items():
        count = len(part)
        table = pa.table(
            {
                schema.SAMPLE_ID: pa.array([bytes([n]) * 16 for n in part], schema.SAMPLE_ID_TYPE),
                schema.SHARD: pa.array([name] * count),
                schema.ROW: pa.array(np.arange(count)),
                schema.NAME: pa.array([None] * count, pa.string()),
                schema.SCORE: pa.array(np.zeros(count, np.float32)),
                schema.PREDICTED: pa.array(np.zeros(count, np.int32)),
                schema.CONFIDENCE: pa.array(np.zeros(count, np.float32)),
                schema.ORDER: pa.array(part),
                schema.WHY: pa.array(["x"] * count),
                schema.BYTES: pa.array([b"%d" % n for n in part], pa.large_binary()),
            },
            schema=schema.mined(),
        )
        storage.write_table(f"data/{name}.parquet", table)
        entries[name] = ShardEntry(name, "f", {f"data/{name}.parquet": count})
    ledger.write_index(storage, entries)
    return storage


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_mined_image_goes_to_exactly_one_worker(mined, world):
    dealt = []
    for rank in range(world):
        stream, count = mined_images(mined, rank, world)
        rows = [int(content) for content in stream]
        assert len(rows) == count
        assert all(row % world == rank for row in rows)
        dealt += rows
    assert sorted(dealt) == list(range(50))


def test_a_single_worker_reads_files_in_their_order(mined):
    stream, _ = mined_images(mined, 0, 1)
    assert [int(content) for content in stream] == np.random.default_rng(1).permutation(50).tolist()


# -- labeled images by role --------------------------------------------------------------------------------


def labeled_images(count):
    encoded = [b"%d" % n for n in range(count)]
    ids = [hashlib.blake2b(content, digest_size=16).digest() for content in encoded]
    return LabeledImages(ids, [f"c/{n}.png" for n in range(count)], np.arange(count) % 3, encoded)


def test_labeled_images_are_found_again_by_content_and_not_by_place(tmp_path):
    labeled, storage = labeled_images(6), Storage(str(tmp_path))
    roles = ["train", "validate", "train", "calibrate", "train", "validate"]
    backwards = slice(None, None, -1)
    table = {schema.SAMPLE_ID: pa.array(labeled.ids[backwards], schema.SAMPLE_ID_TYPE), "role": roles[backwards]}
    storage.write_table("labeled.parquet", pa.table(table))
    train = labeled_by_role(labeled, storage, "train")
    assert train.names == ["c/0.png", "c/2.png", "c/4.png"]
    assert train.labels.tolist() == [0, 2, 1]
    assert train.encoded == [b"0", b"2", b"4"]
    assert sum(len(labeled_by_role(labeled, storage, role)) for role in set(roles)) == 6
    taught = taught_images(labeled, storage)
    assert taught.names == ["c/0.png", "c/2.png", "c/4.png", "c/3.png"], "all but those that choose the student"
    assert taught.labels.tolist() == [0, 2, 1, 0]


def test_a_labeled_image_that_the_fit_never_saw_is_named(tmp_path):
    labeled, storage = labeled_images(3), Storage(str(tmp_path))
    table = {schema.SAMPLE_ID: pa.array(labeled.ids[:2], schema.SAMPLE_ID_TYPE), "role": ["train", "validate"]}
    storage.write_table("labeled.parquet", pa.table(table))
    with pytest.raises(DataError, match="the labeled images have changed since the fit") as caught:
        labeled_by_role(labeled, storage, "train")
    assert caught.value.where == "c/2.png"
    assert caught.value.hint == "run the whole job again"
