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
    parts = np.empty_like(pixels)
    resized = bool((crops[:, 2] != height).any() or (crops[:, 3] != width).any())
    for image, part, crop in zip(pixels, parts, crops, strict=True):
        # Written through a mirror, a crop needs no second copy to be flipped.
        target = part[:, ::-1] if crop[4] else part
        if resized:
            target[:] = _resized(image, crop)
        else:
            _shift(image, int(crop[0]), int(crop[1]), target)
    return parts


def _shift(image: Any, top: int, left: int, target: Any) -> None:
    """Write the window of the image's own size at this corner; outside the image its edge goes on."""
    height, width = image.shape[:2]
    if abs(top) >= height or abs(left) >= width:  # pixels so few that the window may miss them all
        rows, columns = (np.clip(at + np.arange(side), 0, side - 1) for at, side in ((top, height), (left, width)))
        target[:] = image[rows[:, None], columns]
        return
    first, stop = max(0, -top), min(height, height - top)
    begin, end = max(0, -left), min(width, width - left)
    target[first:stop, begin:end] = image[first + top : stop + top, begin + left : end + left]
    target[first:stop, :begin] = target[first:stop, begin : begin + 1]
    target[first:stop, end:] = target[first:stop, end - 1 : end]
    target[:first] = target[first]
    target[stop:] = target[stop - 1]


def _resized(image: Any, crop: Any) -> Any:
    top, left, height, width = (int(number) for number in crop[:4])
    size = (image.shape[1], image.shape[0])
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    part = picture.crop((left, top, left + width, top + height))
    return np.asarray(part.resize(size, Image.Resampling.BILINEAR)).reshape(image.shape)
