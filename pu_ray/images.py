"""Encoded bytes become pixels: limits before decode, one way to resize, and an error code for every failure.

Used by the lake, by distillation and by serving, so that a student sees in production what it saw in training.
Needs neither Ray nor torch.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pu_ray.config import LakeConfig, PreprocessingConfig
from pu_ray.schema import SAMPLE_ID_BYTES, ErrorCode

Pixels = npt.NDArray[np.uint8]

# Decoders that read what customers send; everything else that Pillow could open (PDF, EPS, ...) is refused.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# How they begin: what begins so and cannot be identified has lost the rest of its header.
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"II*\x00", b"MM\x00*", b"GIF8")
# JPEG 2000, JPEG XL and Photoshop; HEIC and AVIF say "ftyp" a little later.
_OTHER_MAGIC = (b"\x00\x00\x00\x0cjP", b"\x00\x00\x00\x0cJXL", b"\xff\x0a", b"8BPS")
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


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


def sample_id(encoded: bytes) -> bytes:
    """128-bit identity of an image: BLAKE2b of its encoded bytes.

    A cryptographic hash, so that nobody can craft an image that collapses with somebody else's.
    """
    return hashlib.blake2b(encoded, digest_size=SAMPLE_ID_BYTES).digest()


def decode(encoded: bytes, preprocessing: PreprocessingConfig, limits: Limits = Limits()) -> Pixels:
    """Decode one image and bring it to the network's size, without randomness.

    Args:
        encoded: A JPEG, PNG, WebP, BMP, TIFF or GIF (first frame); EXIF orientation is applied.
        preprocessing: Target size, crop, interpolation and channels.
        limits: Byte and pixel limits.

    Returns:
        uint8 array of shape [size_px, size_px, channels], values 0..255.

    Raises:
        ImageError: With the reason's code.
    """
    if len(encoded) > limits.max_bytes:
        raise ImageError("too_large", f"{len(encoded)} bytes, at most {limits.max_bytes} are allowed")
    # The explicit limit replaces Pillow's own, which warns where nobody reads and knows nothing of the job.
    Image.MAX_IMAGE_PIXELS = None
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except UnidentifiedImageError as error:
        cut = not encoded or encoded.startswith(_MAGIC)
        other = encoded[4:8] == b"ftyp" or encoded.startswith(_OTHER_MAGIC)
        code: ErrorCode = "truncated" if cut else "unsupported" if other else "not_an_image"
        raise ImageError(code, f"{len(encoded)} bytes") from error
    except Exception as error:  # a hostile header can make a decoder raise anything
        raise _decoder_failed(error, encoded) from error
    if image.width * image.height > limits.max_px:
        raise ImageError("too_large", f"{image.width} x {image.height} px, at most {limits.max_px} are allowed")
    try:
        return _to_pixels(image, preprocessing)
    except Exception as error:
        raise _decoder_failed(error, encoded) from error


def _decoder_failed(error: Exception, encoded: bytes) -> ImageError:
    # Pillow has no kind of its own for files that break off, only several spellings of the word, and none for WebP.
    cut = "truncated" in str(error).lower()
    if encoded.startswith(b"RIFF"):
        cut = len(encoded) < 8 + int.from_bytes(encoded[4:8], "little")
    code: ErrorCode = "truncated" if cut else "unreadable"
    return ImageError(code, f"{type(error).__name__}: {error}")


def _to_pixels(image: Image.Image, preprocessing: PreprocessingConfig) -> Pixels:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image)
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        # Transparent pixels may hide any colour; a white ground is what a person would see.
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    image = image.convert("RGB" if preprocessing.channels == 3 else "L")
    side, resize = preprocessing.size_px, preprocessing.resize_px or preprocessing.size_px
    # Resize and centre crop in one step: only the pixels that survive the crop are interpolated.
    window = min(image.width, image.height) * side / resize
    left, top = (image.width - window) / 2, (image.height - window) / 2
    if image.size != (side, side) or window != side:
        box = (left, top, left + window, top + window)
        image = image.resize((side, side), _RESAMPLING[preprocessing.interpolation], box=box)
    return np.asarray(image, dtype=np.uint8).reshape(preprocessing.shape_hwc)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    # 16-bit files use the full range; 32-bit and float ones have no agreed range, so theirs is stretched.
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (float(values.min()), float(values.max()))
    if image.mode == "I" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (values - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def normalise(pixels_NHWC: Pixels, preprocessing: PreprocessingConfig) -> npt.NDArray[np.float32]:
    """uint8 [N, H, W, C] to the network's float32 [N, C, H, W]: (x / 255 - mean) / std."""
    mean = np.asarray(preprocessing.mean, np.float32) * 255
    scale = 1 / (np.asarray(preprocessing.std, np.float32) * 255)
    values = (pixels_NHWC.astype(np.float32) - mean) * scale
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


THUMBNAIL_SIDE_PX = 12
_CORRELATION_ROUNDING = 1e-5  # float32 sums of 144 products


def thumbnails(pixels_NHWC: Pixels) -> Pixels:
    """Greyscale miniatures by area averaging, uint8 [N, 12 * 12]: enough to recognise a copy, too little to be one."""
    grey = pixels_NHWC.mean(axis=3, dtype=np.float32)
    rows, columns = (_area_weights(length) for length in grey.shape[1:])
    small = np.rint(rows @ grey @ columns.T).astype(np.uint8)
    return np.ascontiguousarray(small.reshape(len(small), -1))


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
