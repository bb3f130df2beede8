"""pu_ray/distill/crops.py: crops are numbers, and cutting them gives what the numbers say."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pu_ray.config import AugmentConfig
from pu_ray.distill import crops

NONE = AugmentConfig(crop_padding_px=0, horizontal_flip=False)


def textured(count=40, side=12, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def drawn(augment, count=400, side=12, seed=0):
    return crops.draw(count, (side, side), augment, np.random.default_rng(seed))


def test_without_augmentation_images_stay_as_they_are():
    pixels = textured()
    np.testing.assert_array_equal(crops.cut(pixels, drawn(NONE, 40)), pixels)


def test_crops_depend_on_the_generator_alone():
    np.testing.assert_array_equal(drawn(AugmentConfig()), drawn(AugmentConfig()))
    assert not np.array_equal(drawn(AugmentConfig()), drawn(AugmentConfig(), seed=1))


def test_flips_mirror_about_half_of_the_images_left_to_right():
    pixels = textured(400)
    ours = crops.cut(pixels, drawn(AugmentConfig(crop_padding_px=0)))
    same = (ours == pixels).all(axis=(1, 2, 3))
    mirrored = (ours == pixels[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_moved_crops_are_windows_of_the_padded_image_at_every_offset():
    pixels = textured(400)
    chosen = drawn(AugmentConfig(crop_padding_px=2, horizontal_flip=False))
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    for image, (top, left, *_), ours in zip(padded, chosen, crops.cut(pixels, chosen), strict=True):
        np.testing.assert_array_equal(ours, image[top + 2 : top + 14, left + 2 : left + 14])
    assert len({(top, left) for top, left, *_ in chosen}) == 25


@pytest.mark.parametrize("shape", [(3, 2, 1), (5, 9, 3)])
def test_a_window_may_miss_a_tiny_image_and_sees_its_edge_go_on(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    height, width = shape[:2]
    padded = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="edge")
    for top, left, flip in np.ndindex(17, 17, 2):
        crop = np.array([[top - 8, left - 8, height, width, flip]], np.int16)
        window = padded[top : top + height, left : left + width]
        np.testing.assert_array_equal(crops.cut(image[None], crop)[0], window[:, ::-1] if flip else window)


def test_resized_crops_lie_inside_and_cover_what_was_asked_for():
    chosen = drawn(AugmentConfig(crop_scale=(0.25, 1.0), horizontal_flip=False), count=3000, side=64)
    top, left, height, width, flip = chosen.T.astype(int)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 64).all()
    assert (left + width <= 64).all()
    assert not flip.any()
    share = height * width / 64**2
    # Sides are whole pixels, and those of the largest crops are cut at the edge.
    assert 0.23 < share.min() < 0.3
    assert 0.95 < share.max() <= 1
    ratio = width / height
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.43
    assert 0.45 < (ratio > 1).mean() < 0.55


@pytest.mark.parametrize("channels", [1, 3])
def test_a_resized_crop_is_what_pillow_makes_of_it(channels):
    pixels = textured(20, 32, channels)
    chosen = drawn(AugmentConfig(crop_scale=(0.2, 0.9)), 20, 32)
    for image, (top, left, height, width, flip), ours in zip(pixels, chosen, crops.cut(pixels, chosen), strict=True):
        picture = Image.fromarray(image.squeeze()).crop((left, top, left + width, top + height))
        expected = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)).reshape(image.shape)
        np.testing.assert_array_equal(ours, expected[:, ::-1] if flip else expected)


@pytest.mark.parametrize("augment", [NONE, AugmentConfig(), AugmentConfig(crop_scale=(0.3, 1.0))])
def test_shape_type_and_layout_stay(augment):
    ours = crops.cut(textured(), drawn(augment, 40))
    assert ours.shape == (40, 12, 12, 3)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
