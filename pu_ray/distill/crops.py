"""Random crops as numbers, so that they can be drawn, stored and cut apart from each other.

A crop is (top, left, height, width, flip), int16, in pixels of the decoded image; it may reach over the edge, where the
edge's pixels go on. Teacher and student get the same crop: a good teacher is consistent (Beyer et al. 2022).
Axes: N images, H, W, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pu_ray.config import AugmentConfig

Pixels = npt.NDArray[np.uint8]
Crops = npt.NDArray[np.int16]

CROP_NUMBERS = 5
_LONGEST_SIDE_RATIO = 4 / 3  # of a resized crop, as everywhere since GoogLeNet (Szegedy et al. 2015)


def draw(count: int, shape_hw: tuple[int, int], augment: AugmentConfig, generator: np.random.Generator) -> Crops:
    """One crop for each of `count` images of this height and width, int16 [N, 5]."""
    height, width = shape_hw
    crops = np.tile(np.array([0, 0, height, width, 0], np.int16), (count, 1))
    if augment.crop_scale is not None:
        area = generator.uniform(*augment.crop_scale, size=count) * height * width
        ratio = np.exp(generator.uniform(-1, 1, size=count) * math.log(_LONGEST_SIDE_RATIO))
        sides = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=1).round()
        crops[:, 2:4] = np.clip(sides, 1, (height, width))
        crops[:, :2] = (generator.random((count, 2)) * ((height, width) - crops[:, 2:4] + 1)).astype(np.int16)
    elif padding := augment.crop_padding_px:
        crops[:, :2] = generator.integers(0, 2 * padding + 1, size=(count, 2)) - padding
    if augment.horizontal_flip:
        crops[:, 4] = generator.random(count) < 0.5
    return crops


def cut(pixels: Pixels, crops: Crops) -> Pixels:
    """Each image's crop, resized to the image's own size, uint8 [N, H, W, C]."""
    height, width = pixels.shape[1:3]
    if (crops[:, 2] != height).any() or (crops[:, 3] != width).any():
        parts = np.stack([_resized(image, crop) for image, crop in zip(pixels, crops, strict=True)])
    elif crops[:, :2].any():
        reach = int(np.abs(crops[:, :2]).max())
        padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
        corners = crops[:, :2].astype(int) + reach
        parts = np.stack(
            [image[top : top + height, left : left + width] for image, (top, left) in zip(padded, corners, strict=True)]
        )
    else:
        parts = pixels
    flipped = crops[:, 4].astype(bool)
    if flipped.any():
        parts = np.where(flipped[:, None, None, None], parts[:, :, ::-1], parts)
    return np.ascontiguousarray(parts)


def _resized(image: Any, crop: Any) -> Any:
    top, left, height, width = (int(number) for number in crop[:4])
    size = (image.shape[1], image.shape[0])
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    part = picture.crop((left, top, left + width, top + height))
    return np.asarray(part.resize(size, Image.Resampling.BILINEAR)).reshape(image.shape)
