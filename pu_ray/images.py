"""Encoded bytes become pixels: limits before decode, one way to resize, and an error code for every failure.

Used by the lake, by distillation and by serving, so that a student sees in production what it saw in training.
Needs neither Ray nor torch.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pu_ray.config import LakeConfig, PreprocessingConfig
from pu_ray.schema import SAMPLE_ID_BYTES, ErrorCode

Pixels = npt.NDArray[np.uint8]

# Decoders that read what customers send; everything else that Pillow could open (PDF, EPS, ...) is refused.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_JPEG_MAGIC = b"\xff\xd8\xff"
# How they begin, and end where that can be told.
_MAGIC = {
    _JPEG_MAGIC: b"\xff\xd9",
    b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82",
    b"GIF8": b";",
    b"RIFF": None,
    b"BM": None,
    b"II*\x00": None,
    b"MM\x00*": None,
}
# JPEG 2000, JPEG XL and Photoshop; HEIC and AVIF say "ftyp" a little later.
_OTHER_MAGIC = (b"\x00\x00\x00\x0cjP", b"\x00\x00\x00\x0cJXL", b"\xff\x4f\xff\x51", b"\xff\x0a", b"8BPS")
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# Pillow's own limit, kept for whoever else uses Pillow in this process.
_PILLOW_MAX_PX = 89_478_485
# A JPEG scan of a few bytes costs a pass over all pixels. Encoders write about ten; thousands are an attack.
_MAX_JPEG_SCANS = 100
_JPEG_SCAN = b"\xff\xda"
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)

# Where a file keeps its orientation. TIFF is turned by Pillow while it loads.
_ORIENTATION_INFO = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))
_ORIENTATION_TAG = 0x0112
_TILE_WIDTH_TAG, _TILE_LENGTH_TAG = 322, 323
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ALPHA_MODES = frozenset(("LA", "PA", "RGBA", "RGBa", "La"))


class ImageError(Exception):
    """An image that cannot be used; `code` is one of `schema.ERROR_CODES`."""

    def __init__(self, code: ErrorCode, detail: str = "") -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}" if self.detail else self.code


@dataclass(frozen=True)
class Limits:
    """What an image may cost, checked before its pixels are decoded."""

    max_bytes: int = 64 * 2**20
    max_px: int = 100_000_000

    @classmethod
    def of(cls, lake: LakeConfig) -> Limits:
        """The limits a job sets for its lake."""
        return cls(lake.max_image_bytes, lake.max_image_px)


@dataclass(frozen=True)
class Header:
    """What a file says of itself before any pixel is decoded.

    Attributes:
        format: Pillow's name, for example `JPEG`; `MPO` is a JPEG with further pictures behind the first.
        mode: Pillow's colour mode, for example `RGB`.
        width: In pixels, as stored; EXIF may turn the picture.
        height: In pixels, as stored.
    """

    format: str
    mode: str
    width: int
    height: int


def sample_id(encoded: bytes) -> bytes:
    """128-bit identity of an image: BLAKE2b of its encoded bytes.

    A cryptographic hash, so that nobody can craft an image that collapses with somebody else's.
    """
    return hashlib.blake2b(encoded, digest_size=SAMPLE_ID_BYTES).digest()


def decode(
    encoded: bytes, preprocessing: PreprocessingConfig, limits: Limits = Limits(), scaled: bool = False
) -> Pixels:
    """Decode one image and bring it to the network's size, without randomness.

    Args:
        encoded: A JPEG, PNG, WebP, BMP, TIFF or GIF (first frame); EXIF orientation is applied.
        preprocessing: Target size, crop, interpolation and channels.
        limits: Byte and pixel limits.
        scaled: Decode a JPEG at the smallest of 1/1, 1/2, 1/4 and 1/8 that still holds the pixels needed: several
            times faster for photographs, and slightly different pixels (`scaled_difference`).

    Returns:
        uint8 array of shape [size_px, size_px, channels], values 0..255; may be read-only.

    Raises:
        ImageError: With the reason's code.
    """
    image = _open(encoded, limits)
    try:
        if scaled:
            _shrink(image, preprocessing)
        return _to_pixels(image, preprocessing)
    except Exception as error:
        raise _decoder_failed(error, encoded) from error


def header(encoded: bytes, limits: Limits = Limits()) -> Header:
    """Format, mode and size, without decoding.

    Raises:
        ImageError: With the reason's code.
    """
    image = _open(encoded, limits)
    return Header(image.format or "", image.mode, image.width, image.height)


def _open(encoded: bytes, limits: Limits) -> Image.Image:
    """The header, read and within the limits; the pixels are still to be decoded."""
    if len(encoded) > limits.max_bytes:
        raise ImageError("too_large", f"{len(encoded)} bytes, at most {limits.max_bytes} are allowed")
    _quiet_pillow()
    # Some decoders allocate while they read the header. Pillow stops them above twice this; ours is exact, below.
    Image.MAX_IMAGE_PIXELS = max(limits.max_px, _PILLOW_MAX_PX)
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
        tile_px = _tile_px(image) if image.format == "TIFF" else 0
    except UnidentifiedImageError as error:
        raise ImageError(_unidentified(encoded), f"{len(encoded)} bytes") from error
    except Exception as error:  # a hostile header can make a decoder raise anything
        raise _decoder_failed(error, encoded) from error
    if image.width * image.height > limits.max_px:
        raise ImageError("too_large", f"{image.width} x {image.height} px, at most {limits.max_px} are allowed")
    if tile_px > limits.max_px:
        raise ImageError("too_large", f"a tile of {tile_px} px, at most {limits.max_px} are allowed")
    if encoded.startswith(_JPEG_MAGIC) and encoded.count(_JPEG_SCAN) > _MAX_JPEG_SCANS:
        scans = _count_scans(encoded)
        if scans > _MAX_JPEG_SCANS:
            raise ImageError("unsupported", f"{scans} scans, at most {_MAX_JPEG_SCANS} are decoded")
    return image


def _unidentified(encoded: bytes) -> ErrorCode:
    if not encoded:
        return "truncated"
    for magic, end in _MAGIC.items():
        if encoded.startswith(magic):
            # Without its end it has most likely lost the rest of its header as well; with it, the header is wrong.
            return "unreadable" if end and encoded.endswith(end) else "truncated"
    other = encoded[4:8] == b"ftyp" or encoded.startswith(_OTHER_MAGIC)
    return "unsupported" if other else "not_an_image"


def _tile_px(image: Image.Image) -> int:
    """Pixels of one tile of a TIFF, which is decoded whole however little of it the picture covers."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    return int(tags.get(_TILE_WIDTH_TAG, 0)) * int(tags.get(_TILE_LENGTH_TAG, 0))


@functools.cache
def _quiet_pillow() -> None:
    # What Pillow warns of is a broken image, which has a code here; once per process, at first use.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _count_scans(encoded: bytes) -> int:
    """Scans of a JPEG up to its end; what follows (a video, another JPEG) may look like scans and is none."""
    scans, position = 0, 2
    while (marker := _JPEG_MARKER.search(encoded, position)) and marker[1] != b"\xd9":
        scans += marker[1] == _JPEG_SCAN[1:]
        position = marker.end() + max(2, int.from_bytes(encoded[marker.end() : marker.end() + 2], "big"))
    return scans


def _decoder_failed(error: Exception, encoded: bytes) -> ImageError:
    if isinstance(error, Image.DecompressionBombError):
        return ImageError("too_large", str(error))
    # Pillow has no kind of its own for files that break off, only several spellings of the word, and none for WebP.
    cut = "truncated" in str(error).lower()
    if encoded.startswith(b"RIFF"):
        cut = len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")
    code: ErrorCode = "truncated" if cut else "unreadable"
    return ImageError(code, f"{type(error).__name__}: {error}")


def _shrink(image: Image.Image, preprocessing: PreprocessingConfig) -> bool:
    """Have a JPEG decoded at the smallest scale that keeps the needed pixels; returns whether that is below 1."""
    before = image.size
    needed = preprocessing.resize_px or preprocessing.size_px
    image.draft(None, (needed, needed))
    return image.size != before


def _to_pixels(image: Image.Image, preprocessing: PreprocessingConfig) -> Pixels:
    image.load()
    if not _ORIENTATION_INFO.isdisjoint(image.info):
        image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        # Transparent pixels may hide any colour; a white ground is what a person would see.
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    mode = "RGB" if preprocessing.channels == 3 else "L"
    # Grey is interpolated once, not three times.
    if image.mode not in (mode, "L"):
        image = image.convert(mode)
    side, resize = preprocessing.size_px, preprocessing.resize_px or preprocessing.size_px
    # Resize and centre crop in one step: only the pixels that survive the crop are interpolated.
    width, height = image.size
    window = min(width, height) * side / resize
    if width != side or height != side or window != side:
        left, top = (width - window) / 2, (height - window) / 2
        box = (left, top, left + window, top + window)
        image = image.resize((side, side), _RESAMPLING[preprocessing.interpolation], box=box)
    if image.mode != mode:
        image = image.convert(mode)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(preprocessing.shape_hwc)


def _upright(image: Image.Image) -> Image.Image:
    try:
        # Not ImageOps.exif_transpose: it copies images that need no turning and rewrites the EXIF of those that do.
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata says nothing about the pixels
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = image.info
    return turned


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    # 32-bit and float files have no agreed range, so theirs is stretched, unless they hold 16 bits.
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    if image.mode == "I" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (np.clip(np.nan_to_num(values, nan=low), low, high) - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


@dataclass(frozen=True)
class ScaledDifference:
    """How far scaled decoding moves pixels, over the images that it decodes at less than full scale.

    Attributes:
        images: How many could be decoded.
        scaled: How many of them were decoded at less than full scale; the others do not differ.
        mean: Mean absolute difference of their pixels, 0..255; 0 where there are none.
        largest: Largest absolute difference of one pixel, 0..255.
    """

    images: int
    scaled: int
    mean: float
    largest: int


def scaled_difference(
    contents: Sequence[bytes], preprocessing: PreprocessingConfig, limits: Limits = Limits()
) -> ScaledDifference:
    """Decode every image both ways and compare; images that cannot be decoded are left out."""
    usable = scaled = total = largest = 0
    for encoded in contents:
        try:
            full = decode(encoded, preprocessing, limits)
            smaller = _shrink(_open(encoded, limits), preprocessing)
            quick = decode(encoded, preprocessing, limits, scaled=True) if smaller else full
        except ImageError:
            continue
        usable += 1
        if smaller:
            difference = np.abs(full.astype(np.int16) - quick)
            scaled += 1
            total += int(difference.sum())
            largest = max(largest, int(difference.max()))
    pixels = scaled * int(np.prod(preprocessing.shape_hwc))
    return ScaledDifference(usable, scaled, total / pixels if pixels else 0.0, largest)


def normalise(pixels_NHWC: Pixels, preprocessing: PreprocessingConfig) -> npt.NDArray[np.float32]:
    """uint8 [N, H, W, C] to the network's float32 [N, C, H, W]: (x / 255 - mean) / std."""
    mean = np.asarray(preprocessing.mean, np.float32) * 255
    scale = 1 / (np.asarray(preprocessing.std, np.float32) * 255)
    # Planes of bytes first, then whole planes at once. Broadcasting over a last axis of three takes NumPy ten times as
    # long, for the same values.
    values_NCHW = np.ascontiguousarray(pixels_NHWC.transpose(0, 3, 1, 2)).astype(np.float32)
    values_NCHW -= mean[:, None, None]
    values_NCHW *= scale[:, None, None]
    return values_NCHW


THUMBNAIL_SIDE_PX = 12
_CORRELATION_ROUNDING = 1e-5  # float32 sums of 144 products


def thumbnails(pixels_NHWC: Pixels) -> Pixels:
    """Greyscale miniatures by area averaging, uint8 [N, 12 * 12]: enough to recognise a copy, too little to be one."""
    pixels_NHWC = _reduced(pixels_NHWC)
    grey = pixels_NHWC.mean(axis=3, dtype=np.float32)
    rows, columns = (_area_weights(length) for length in grey.shape[1:])
    small = np.rint(rows @ grey @ columns.T).astype(np.uint8)
    return np.ascontiguousarray(small.reshape(len(small), -1))


def _reduced(pixels_NHWC: Pixels) -> Pixels:
    """Large images at a whole fraction of their size: four pixels a cell and more are enough, and much cheaper."""
    factor = min(pixels_NHWC.shape[1:3]) // (4 * THUMBNAIL_SIDE_PX)
    if factor < 2 or not len(pixels_NHWC):
        return pixels_NHWC
    smaller = [np.asarray(Image.fromarray(image.squeeze()).reduce(factor)) for image in pixels_NHWC]
    return np.stack(smaller).reshape(len(smaller), *smaller[0].shape[:2], -1)


def _area_weights(length: int) -> npt.NDArray[np.float32]:
    """[12, length]; row r averages the r-th twelfth of the axis."""
    edges = np.linspace(0, length, THUMBNAIL_SIDE_PX + 1)
    starts = np.arange(length)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    weights = np.maximum(overlap, 0)
    normalised: npt.NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalised


def near_copies(candidates_NT: Pixels, others_MT: Pixels, correlation: float) -> npt.NDArray[np.bool_]:
    """Which candidates' thumbnails correlate with one of the others at least this much.

    Correlation ignores brightness and contrast, so re-encoded, resized or toned copies are found. A flat image
    correlates with nothing.

    Args:
        candidates_NT: Thumbnails, uint8 [N, 144].
        others_MT: Thumbnails, uint8 [M, 144].
        correlation: Pearson's, in (0, 1].
    """

    def standardised(values: Pixels) -> npt.NDArray[np.float32]:
        centred = values.astype(np.float32) - values.mean(axis=1, dtype=np.float32, keepdims=True)
        unit: npt.NDArray[np.float32] = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
        return unit

    best = (standardised(candidates_NT) @ standardised(others_MT).T).max(axis=1, initial=-1.0)
    near: npt.NDArray[np.bool_] = best >= correlation - _CORRELATION_ROUNDING
    return near
