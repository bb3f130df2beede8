"""pu_ray/distill/store.py: images on disk, by number, without memory that grows."""

from __future__ import annotations

import io
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pu_ray import images
from pu_ray.config import PreprocessingConfig
from pu_ray.distill import store

PREPROCESSING = PreprocessingConfig(size_px=4)
LIMITS = images.Limits()
STORES = pytest.mark.parametrize("kind", ["decoded", "encoded"])


def png(value, side=4):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def opened(kind, values):
    return store.open_store(kind, (png(value) for value in values), len(values), PREPROCESSING, LIMITS)


@STORES
def test_images_are_found_by_number_in_any_order_and_more_than_once(kind):
    opened_store = opened(kind, [3, 1, 2])
    assert len(opened_store) == 3
    pixels = opened_store.take(np.array([2, 0, 0]))
    assert pixels.shape == (3, 4, 4, 3)
    assert pixels.dtype == np.uint8
    assert pixels[:, 0, 0, 0].tolist() == [2, 3, 3]


@STORES
def test_an_empty_store_is_possible(kind):
    empty = opened(kind, [])
    assert len(empty) == 0
    assert empty.take(np.array([], np.int64)).shape == (0, 4, 4, 3)


@STORES
def test_threads_do_not_disturb_each_other(kind):
    values = list(range(200))
    shared = opened(kind, values)
    orders = [np.random.default_rng(seed).permutation(200) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for order, pixels in zip(orders, pool.map(shared.take, orders), strict=True):
            np.testing.assert_array_equal(pixels[:, 0, 0, 0], order)


def test_both_kinds_hold_the_same_images():
    noise = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    encoded = []
    for image in noise:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG")
        encoded.append(buffer.getvalue())
    rows = np.arange(5)
    kinds = [store.open_store(kind, encoded, 5, PREPROCESSING, LIMITS).take(rows) for kind in ("decoded", "encoded")]
    np.testing.assert_array_equal(*kinds)


@pytest.mark.parametrize(("free", "kind"), [(480 * 10, store.DecodedStore), (480 * 10 - 1, store.EncodedStore)])
def test_auto_keeps_pixels_where_they_need_a_tenth_of_the_disk(monkeypatch, free, kind):
    monkeypatch.setattr(store, "_free_bytes", lambda: free)
    assert type(opened("auto", list(range(10)))) is kind  # ten images of 48 bytes


@STORES
def test_memory_does_not_grow_with_the_number_of_images(kind):
    content = png(7, side=64)
    large = PreprocessingConfig(size_px=64)

    def peak(count):
        tracemalloc.start()
        held = store.open_store(kind, (content for _ in range(count)), count, large, LIMITS)
        for start in range(0, count, 16):
            held.take(np.arange(start, min(start + 16, count)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, great = peak(32), peak(512)
    pixels = 480 * 64 * 64 * 3
    assert great - small < pixels / 50
