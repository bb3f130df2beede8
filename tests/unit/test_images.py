"""pu_ray/images.py: what customers send becomes the pixels a network expects, or an error code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle

import numpy as np
import pytest
from artifacts import encode, picture
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFile

from pu_ray import images, schema
from pu_ray.config import LakeConfig, PreprocessingConfig
from pu_ray.images import ImageError, Limits

COLOUR = PreprocessingConfig(size_px=16)
GREY = PreprocessingConfig(size_px=16, channels=1, mean=(0.5,), std=(0.25,))


def solid(colour, mode="RGB", side=16) -> Image.Image:
    return Image.new(mode, (side, side), colour)


def code_of(content: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        images.decode(content, COLOUR, limits or Limits())
    return caught.value.code


# -- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
    ],
)
def test_every_format_brings_the_picture_it_holds(kind, options):
    original = picture(1, side=16)
    pixels = images.decode(encode(original, kind, **options), COLOUR)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    allowed = {"JPEG": 12, "GIF": 40}.get(kind, 0)  # loss of the format: chroma, 256 colours
    assert np.abs(pixels.astype(int) - np.asarray(original)).mean() <= allowed
    assert np.abs(pixels.astype(int) - np.asarray(picture(2, side=16))).mean() > 20


def test_an_animation_brings_its_first_frame():
    frames = [solid("red"), solid("blue")]
    for kind in ("GIF", "WEBP", "TIFF"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(content)).n_frames == 2
        red, _, blue = images.decode(content, COLOUR).reshape(-1, 3).mean(axis=0)
        assert red > 240
        assert blue < 15


_STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize(("orientation", "stored_as"), _STORED_AS.items())
def test_exif_orientation_puts_the_picture_upright(orientation, stored_as):
    upright = picture(3, side=16)
    stored = upright if stored_as is None else upright.transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = images.decode(encode(stored, "PNG", exif=exif), COLOUR)
    np.testing.assert_array_equal(pixels, np.asarray(upright))


def test_the_crop_is_taken_after_the_picture_was_put_upright():
    upright = picture(3, side=32).crop((0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = images.decode(encode(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif), COLOUR)
    np.testing.assert_array_equal(pixels, np.asarray(upright.crop((8, 0, 24, 16))))


# -- colour modes ------------------------------------------------------------------------------------------


def test_cmyk_becomes_rgb():
    pixels = images.decode(encode(solid((0, 255, 255, 0), "CMYK"), "JPEG", quality=100), COLOUR)
    assert pixels[..., 0].min() > 240
    assert pixels[..., 1:].max() < 15


def test_a_palette_becomes_its_colours():
    paletted = solid((10, 200, 30)).quantize(4)
    assert paletted.mode == "P"
    np.testing.assert_array_equal(images.decode(encode(paletted), COLOUR), np.full((16, 16, 3), (10, 200, 30)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encode(solid((0, 0, 0, 0), "RGBA")), 255),
        (encode(solid((0, 0, 0, 128), "RGBA")), 127),
        (encode(solid((0, 0, 0, 255), "RGBA")), 0),
        (encode(solid((0, 0), "LA")), 255),
        (encode(solid((0, 0, 0)), transparency=(0, 0, 0)), 255),
        (encode(solid(0, "L"), transparency=0), 255),
        (encode(solid((0, 0, 0)).quantize(4), transparency=0), 255),
        (encode(solid((0, 0, 0, 0), "RGBA"), "WEBP", lossless=True, exact=True), 255),
    ],
    ids=["clear", "half", "opaque", "grey", "colour key", "grey key", "palette key", "webp"],
)
@pytest.mark.parametrize("preprocessing", [COLOUR, GREY], ids=["colour", "grey"])
def test_transparency_lies_on_white(content, expected, preprocessing):
    pixels = images.decode(content, preprocessing)
    assert abs(int(pixels.min()) - expected) <= 1
    assert abs(int(pixels.max()) - expected) <= 1


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (32768, 128), (65535, 255)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(kind, value, expected):
    deep = Image.fromarray(np.full((16, 16), value, np.uint16))
    assert deep.mode.startswith("I;16")
    pixels = images.decode(encode(deep, kind), COLOUR)
    assert set(pixels.reshape(-1)) == {expected}


def test_float_images_are_stretched_to_their_own_range():
    ramp = np.linspace(-3, 5, 256, dtype=np.float32).reshape(16, 16)
    pixels = images.decode(encode(Image.fromarray(ramp), "TIFF"), GREY)
    np.testing.assert_array_equal(pixels.reshape(-1), np.arange(256))


def test_a_flat_float_image_is_no_division_by_zero():
    pixels = images.decode(encode(Image.fromarray(np.full((16, 16), 0.5, np.float32)), "TIFF"), GREY)
    assert set(pixels.reshape(-1)) == {0}


def test_float_images_may_hold_what_is_no_number(recwarn):
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    ramp[0, 0], ramp[0, 1], ramp[0, 2] = np.nan, np.inf, -np.inf
    pixels = images.decode(encode(Image.fromarray(ramp), "TIFF"), GREY).reshape(-1)
    assert pixels[:3].tolist() == [0, 255, 0]
    assert pixels[3] == 0
    assert pixels[-1] == 255
    nothing = np.full((16, 16), np.nan, np.float32)
    assert set(images.decode(encode(Image.fromarray(nothing), "TIFF"), GREY).reshape(-1)) == {0}
    assert not recwarn.list


def test_grey_becomes_three_equal_channels_for_a_colour_network():
    grey = picture(4, side=16).convert("L")
    pixels = images.decode(encode(grey), COLOUR)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], np.asarray(grey))


def test_colour_becomes_luma_for_a_grey_network():
    colour = picture(4, side=16)
    pixels = images.decode(encode(colour), GREY)
    assert pixels.shape == (16, 16, 1)
    luma = np.asarray(colour, float) @ (0.299, 0.587, 0.114)  # ITU-R BT.601
    assert np.abs(pixels[..., 0] - luma).max() <= 1


def test_black_and_white_uses_the_whole_range():
    halves = Image.new("1", (16, 16))
    halves.paste(1, (8, 0, 16, 16))
    assert set(images.decode(encode(halves), COLOUR).reshape(-1)) == {0, 255}


# -- resize and crop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "resize_px", "size_px"),
    [((64, 48), 24, 16), ((48, 64), 24, 16), ((64, 64), 32, 32), ((96, 32), 32, 16), ((20, 20), 40, 24)],
)
def test_pixels_are_those_of_resizing_the_shorter_side_and_cropping_the_centre(size, resize_px, size_px, interpolation):
    original = picture(5, side=96).crop((0, 0, *size))
    preprocessing = PreprocessingConfig(size_px=size_px, resize_px=resize_px, interpolation=interpolation)
    scale = resize_px / min(size)
    resized = original.resize(
        (round(size[0] * scale), round(size[1] * scale)),
        {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation],
    )
    left, top = (resized.width - size_px) // 2, (resized.height - size_px) // 2
    expected = np.asarray(resized.crop((left, top, left + size_px, top + size_px)))
    pixels = images.decode(encode(original), preprocessing)
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_an_image_of_the_right_size_passes_untouched():
    original = picture(6, side=16)
    np.testing.assert_array_equal(images.decode(encode(original), COLOUR), np.asarray(original))


def test_a_single_pixel_fills_the_input():
    assert (images.decode(encode(solid((1, 2, 3), side=1)), COLOUR) == (1, 2, 3)).all()


def test_decoding_twice_gives_the_same_pixels():
    content = encode(picture(7, side=37), "JPEG")
    np.testing.assert_array_equal(images.decode(content, COLOUR), images.decode(content, COLOUR))


# -- limits ------------------------------------------------------------------------------------------------


def test_too_many_bytes_are_refused_before_anything_is_opened(monkeypatch):
    content = encode(picture(1))
    monkeypatch.setattr(images.Image, "open", lambda *_, **__: pytest.fail("opened"))
    assert code_of(content, Limits(max_bytes=len(content) - 1)) == "too_large"


def test_too_many_pixels_are_refused_before_any_is_decoded(monkeypatch):
    content = encode(picture(1, side=24))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert code_of(content, Limits(max_px=24 * 24 - 1)) == "too_large"


def test_what_is_exactly_at_the_limits_is_taken():
    content = encode(picture(1, side=24))
    assert images.decode(content, COLOUR, Limits(len(content), 24 * 24)).shape == (16, 16, 3)


def test_a_bomb_is_too_large_although_its_file_is_small():
    content = encode(Image.new("1", (20_000, 20_000)))
    assert len(content) < 100_000
    assert code_of(content, Limits(max_px=10**7)) == "too_large"


def test_the_limits_are_the_jobs():
    lake = LakeConfig(uri="x", max_image_bytes=5, max_image_px=7)
    assert Limits.of(lake) == Limits(max_bytes=5, max_px=7)
    assert Limits.of(LakeConfig(uri="x")) == Limits()


def test_the_jobs_limit_replaces_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert images.decode(encode(picture(1, side=24)), COLOUR, Limits(max_px=1000)).shape == (16, 16, 3)


@pytest.mark.parametrize("max_px", [10, 10**9])
def test_our_limit_never_lowers_pillows_for_others_in_this_process(max_px):
    with contextlib.suppress(ImageError):
        images.decode(encode(picture(1, side=24)), COLOUR, Limits(max_px=max_px))
    assert max(max_px, images._PILLOW_MAX_PX) == Image.MAX_IMAGE_PIXELS
    Image.new("L", (20, 20)).crop((0, 0, 20, 20))


# -- headers -----------------------------------------------------------------------------------------------


def test_the_header_is_told_without_decoding(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    content = encode(picture(1, side=24).crop((0, 0, 24, 10)), "JPEG")
    assert images.header(content) == images.Header("JPEG", "RGB", 24, 10)
    assert images.header(encode(solid(7, "L"))) == images.Header("PNG", "L", 16, 16)


def test_the_header_of_what_is_no_image_or_too_large_is_an_error():
    for content, code in ((b"<html>", "not_an_image"), (encode(picture(1, side=24)), "too_large")):
        with pytest.raises(ImageError) as caught:
            images.header(content, Limits(max_px=99))
        assert caught.value.code == code


# -- scaled decoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resize_px", "expected"),
    [
        ((640, 480), 240, (320, 240)),
        ((640, 480), 241, (640, 480)),  # half would be too small by one pixel
        ((640, 480), 100, (160, 120)),
        ((640, 480), 16, (80, 60)),  # an eighth is the smallest there is
        ((480, 640), 100, (120, 160)),
        ((100, 100), 200, (100, 100)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_holds_the_pixels_before_the_crop(size, resize_px, expected):
    preprocessing = PreprocessingConfig(size_px=min(16, resize_px), resize_px=resize_px)
    image = images._open(encode(solid("red", side=640).crop((0, 0, *size)), "JPEG"), Limits())
    assert images._shrink(image, preprocessing) == (size != expected)
    image.load()
    assert image.size == expected


def test_scaled_pixels_are_near_the_full_ones_and_others_than_they():
    content = encode(picture(8, side=256), "JPEG", quality=95)
    full, scaled = (images.decode(content, COLOUR, scaled=scaled).astype(int) for scaled in (False, True))
    assert 0 < np.abs(full - scaled).mean() < 3
    assert np.abs(full - np.asarray(picture(9, side=16))).mean() > 20


@pytest.mark.parametrize(
    "content",
    [encode(picture(8, side=256)), encode(picture(8, side=30), "JPEG"), encode(picture(8, side=256), "WEBP")],
    ids=["png", "small jpeg", "webp"],
)
def test_what_cannot_be_decoded_smaller_is_decoded_as_ever(content):
    np.testing.assert_array_equal(images.decode(content, COLOUR, scaled=True), images.decode(content, COLOUR))


def test_the_orientation_of_a_scaled_jpeg_is_kept():
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = Image.new("RGB", (256, 256), "red")
    halves.paste("blue", (0, 128, 256, 256))
    content = encode(halves.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    pixels = images.decode(content, COLOUR, scaled=True)
    assert pixels[:7, :, 0].min() > 230
    assert pixels[9:, :, 2].min() > 230


def test_the_difference_is_that_of_the_jpegs_decoded_smaller():
    contents = [encode(picture(seed, side=200), "JPEG") for seed in range(3)]
    both = [
        [images.decode(content, COLOUR, scaled=scaled).astype(int) for scaled in (False, True)] for content in contents
    ]
    differences = np.abs([full - scaled for full, scaled in both])
    found = images.scaled_difference([*contents, encode(picture(1)), b"<html>", b""], COLOUR)
    assert (found.images, found.scaled) == (4, 3)
    assert found.mean == pytest.approx(differences.mean())
    assert found.largest == differences.max() > 0


def test_without_jpegs_there_is_no_difference():
    assert images.scaled_difference([], COLOUR) == images.ScaledDifference(0, 0, 0.0, 0)
    assert images.scaled_difference([encode(picture(1))], COLOUR) == images.ScaledDifference(1, 0, 0.0, 0)


# -- what is no image --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "truncated"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        (b"%PDF-1.4\n", "not_an_image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
        (bytes(range(256)) * 8, "not_an_image"),
        (encode(picture(1), "PPM"), "not_an_image"),  # Pillow could, customers do not
    ],
)
def test_what_is_no_image_has_a_code(content, code):
    assert code_of(content) == code


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
def test_a_file_that_breaks_off_is_truncated(kind):
    content = encode(picture(1, side=64), kind)
    for share in (0.7, 0.9):
        assert code_of(content[: int(len(content) * share)]) == "truncated"


@pytest.mark.parametrize(("kind", "share"), [("JPEG", 0.03), ("WEBP", 0.5)])
def test_a_file_that_breaks_off_in_its_header_is_truncated(kind, share):
    content = encode(picture(1, side=64), kind)
    assert code_of(content[: int(len(content) * share)]) == "truncated"


def test_whatever_a_decoder_raises_is_a_code(monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a hostile header")

    content = encode(picture(1))
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert code_of(content) == "unreadable"
    monkeypatch.setattr(images.Image, "open", fail)
    assert code_of(content) == "unreadable"


_SEEDS = [encode(picture(9, side=12), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")]


@pytest.mark.filterwarnings("ignore:::PIL")
@hypothesis_settings(max_examples=300, deadline=None)
@given(st.sampled_from(_SEEDS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), st.data())
def test_no_damage_to_a_file_raises_anything_but_a_code(content, flips, data):
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for place, value in flips:
        if damaged:
            damaged[place % len(damaged)] = value
    code = None
    try:
        # The pixel limit keeps a flipped width from costing memory, which is what it is for.
        assert images.decode(bytes(damaged), COLOUR, Limits(max_px=10**6)).shape == (16, 16, 3)
    except ImageError as error:
        code = error.code
    assert code in (None, *schema.ERROR_CODES)


def test_an_image_error_survives_pickle():
    error = pickle.loads(pickle.dumps(ImageError("truncated", "12 bytes")))
    assert (error.code, error.detail, str(error)) == ("truncated", "12 bytes", "truncated: 12 bytes")
    assert str(ImageError("truncated")) == "truncated"


# -- identity ----------------------------------------------------------------------------------------------


def test_the_sample_id_is_128_bits_of_blake2b():
    assert images.sample_id(b"abc") == hashlib.blake2b(b"abc", digest_size=16).digest()
    assert len(images.sample_id(b"")) == schema.SAMPLE_ID_BYTES
    assert images.sample_id(b"abc") != images.sample_id(b"abd")


# -- normalise ---------------------------------------------------------------------------------------------


def test_normalise_is_the_formula():
    preprocessing = PreprocessingConfig(size_px=4, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    values = images.normalise(pixels_NHWC, preprocessing)
    assert values.dtype == np.float32
    assert values.shape == (2, 3, 4, 4)
    assert values.flags.c_contiguous
    for n, h, w, c in np.ndindex(pixels_NHWC.shape):
        expected = (pixels_NHWC[n, h, w, c] / 255 - preprocessing.mean[c]) / preprocessing.std[c]
        assert values[n, c, h, w] == pytest.approx(expected, abs=1e-5)


# -- thumbnails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [12, 24, 48, 240])
@pytest.mark.parametrize("channels", [1, 3])
def test_thumbnails_are_pillows_box_filter_within_rounding(side, channels):
    pixels = np.stack([np.asarray(picture(seed, side)) for seed in range(3)])[..., :channels]
    small = images.thumbnails(pixels)
    assert small.shape == (3, schema.THUMBNAIL_PX)
    assert small.dtype == np.uint8
    for tile, mine in zip(pixels, small, strict=True):
        grey = Image.fromarray(tile.mean(axis=2).astype(np.float32))
        expected = np.asarray(grey.resize((12, 12), Image.Resampling.BOX)).reshape(-1)
        # Large images are averaged in two steps, and rounded twice.
        assert np.abs(mine - expected).max() <= (0.51 if side < 96 else 1.01)


@pytest.mark.parametrize("side", [8, 13, 28, 32, 50, 224])
def test_thumbnails_are_area_averages_where_twelve_does_not_divide_the_side(side):
    # Pillow's box filter takes or leaves whole pixels there. Magnified twelvefold, every cell is whole.
    pixels = np.asarray(picture(0, side))[None, ..., :1]
    magnified = pixels[0, ..., 0].astype(float).repeat(12, axis=0).repeat(12, axis=1)
    expected = magnified.reshape(12, side, 12, side).mean(axis=(1, 3)).reshape(-1)
    assert np.abs(images.thumbnails(pixels)[0] - expected).max() <= (0.51 if side < 96 else 1.01)


def test_a_thumbnail_keeps_rows_and_columns_apart():
    pixels = np.zeros((1, 24, 24, 1), np.uint8)
    pixels[0, :12] = 200
    np.testing.assert_array_equal(images.thumbnails(pixels).reshape(12, 12)[:, 0], [200] * 6 + [0] * 6)


# -- near copies -------------------------------------------------------------------------------------------


def thumbnails_of(pictures: list[Image.Image], **options) -> images.Pixels:
    contents = [encode(image, **options) for image in pictures]
    return images.thumbnails(
        np.stack([images.decode(content, PreprocessingConfig(size_px=32)) for content in contents])
    )


ORIGINALS = [picture(seed, side=64) for seed in range(40)]


@pytest.mark.parametrize(
    "copies",
    [
        thumbnails_of([ImageEnhance.Brightness(image).enhance(0.8) for image in ORIGINALS]),
        thumbnails_of([ImageEnhance.Contrast(image).enhance(0.7) for image in ORIGINALS]),
        thumbnails_of([image.resize((40, 40), Image.Resampling.BICUBIC) for image in ORIGINALS]),
        thumbnails_of(ORIGINALS, kind="JPEG", quality=60),
        thumbnails_of(ORIGINALS, kind="WEBP", quality=80),
    ],
    ids=["darkened", "flatter", "resized", "jpeg", "webp"],
)
def test_changed_copies_are_found_among_the_others(copies):
    originals = thumbnails_of(ORIGINALS)
    assert images.near_copies(copies, originals, 0.995).all()
    assert images.near_copies(copies[:5], originals[::-1], 0.995).all()


def test_different_images_are_not_taken_for_copies():
    others = thumbnails_of([picture(seed, side=64) for seed in range(1000, 1200)])
    assert not images.near_copies(others, thumbnails_of(ORIGINALS), 0.995).any()


def test_the_negative_of_an_image_is_no_copy():
    originals = thumbnails_of(ORIGINALS)
    assert not images.near_copies(255 - originals, originals, 0.995).any()


def test_the_bound_decides():
    one, other = np.zeros((1, 144), np.uint8), np.zeros((1, 144), np.uint8)
    one[0, :72], other[0, :72] = 200, 200
    other[0, :36] = 0
    measured = np.corrcoef(one[0].astype(float), other[0].astype(float))[0, 1]
    assert images.near_copies(one, other, measured - 0.001).all()
    assert not images.near_copies(one, other, measured + 0.001).any()


def test_a_flat_image_correlates_with_nothing():
    flat = np.full((2, 144), 77, np.uint8)
    assert not images.near_copies(flat, flat, 0.1).any()
    assert not images.near_copies(flat, thumbnails_of(ORIGINALS), 0.1).any()


def test_without_others_nothing_is_a_copy():
    originals = thumbnails_of(ORIGINALS[:3])
    assert images.near_copies(originals, originals[:0], 0.5).tolist() == [False] * 3
    assert images.near_copies(originals[:0], originals, 0.5).tolist() == []


def test_equal_thumbnails_are_copies_at_the_strictest_bound():
    originals = thumbnails_of(ORIGINALS)
    assert images.near_copies(originals, originals, 1.0).all()
