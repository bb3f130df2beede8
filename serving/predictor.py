"""Images in, logits out: one student in one process, without Ray and without torch.

Decoding and the forward pass are separate steps, so that a server can decode each request on its own and run
several requests through the network together. An image that cannot be used fails alone.

Axes: N images of a request, M of them usable; H, W, C; K classes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pu_ray.engine import Engine, OnnxEngine
from pu_ray.errors import DataError, PuRayError
from pu_ray.images import ImageError, Limits, Pixels, decode, normalise
from serving.registry import ENGINES, LoadedStudent

Floats = npt.NDArray[np.float32]

_TIMED_PASSES = 5
_CHEAPER = 0.97  # of the cost of an image that a batch twice as large must not exceed, to go on doubling

# Encoded images, decoded uint8 [N, H, W, C] at the network's size, or the network's own float32 [N, C, H, W].
Images = Sequence[bytes] | Pixels | Floats


@dataclass(frozen=True)
class Predictions:
    """The answer to N images.

    Attributes:
        logits_NK: float32; a row of NaN where the image failed.
        failures: Why an image could not be used, by its position.
    """

    logits_NK: Floats
    failures: dict[int, ImageError]

    @property
    def probabilities_NK(self) -> Floats:
        """Softmax of the logits, in [0, 1]; NaN rows stay NaN."""
        # Infinite logits come from infinite inputs; their NaN is the answer, not an accident.
        with np.errstate(invalid="ignore"):
            odds = np.exp(self.logits_NK - self.logits_NK.max(axis=1, keepdims=True))
            return np.asarray(odds / odds.sum(axis=1, keepdims=True), np.float32)

    def top(self, position: int, count: int) -> list[tuple[int, float]]:
        """The `count` most probable classes of one image: index and probability, best first."""
        probabilities_K = self.probabilities_NK[position]
        order = np.argsort(-probabilities_K, kind="stable")[:count]
        return [(int(index), float(probabilities_K[index])) for index in order]


def join(parts: Sequence[Predictions]) -> Predictions:
    """The answers to consecutive pieces of one request, as one."""
    if len(parts) == 1:
        return parts[0]
    failures: dict[int, ImageError] = {}
    start = 0
    for part in parts:
        failures |= {start + position: error for position, error in part.failures.items()}
        start += len(part.logits_NK)
    return Predictions(np.concatenate([part.logits_NK for part in parts]), failures)


@dataclass(frozen=True)
class Prepared:
    """N images on their way to the network.

    Attributes:
        pixels_MCHW: float32, normalised; the usable images in their order.
        failures: Why the others could not be used, by their position among the N.
    """

    pixels_MCHW: Floats
    failures: dict[int, ImageError]

    def answer(self, logits_MK: Floats) -> Predictions:
        """Put the network's rows back to where their images were."""
        count = len(self.pixels_MCHW) + len(self.failures)
        logits_NK = np.full((count, logits_MK.shape[1]), np.nan, np.float32)
        logits_NK[[position for position in range(count) if position not in self.failures]] = logits_MK
        return Predictions(logits_NK, self.failures)


def _engine_of(loaded: LoadedStudent, threads: int) -> Engine:
    if loaded.student.engine != "torch":
        return OnnxEngine(loaded.model, threads)
    from serving import torch_network  # its import costs seconds and hundreds of megabytes

    return torch_network.opened(loaded, threads)


class Predictor:
    """One student, ready to answer.

    Args:
        loaded: The student and its network.
        limits: What one encoded image may cost.
        threads: Threads of one forward pass.

    Raises:
        DataError: The network cannot be loaded.
    """

    def __init__(self, loaded: LoadedStudent, limits: Limits, threads: int = 1) -> None:
        self._student = loaded.student
        self._where = f"{loaded.student.uri}/{ENGINES[loaded.student.engine]}"
        self._limits = limits
        try:
            self._engine = _engine_of(loaded, threads)
        except PuRayError:
            raise  # it says what is wrong by itself
        except Exception as error:  # ONNX Runtime raises a private class per kind of damage
            raise DataError(
                "the network cannot be loaded",
                slug="network-not-loadable",
                where=self._where,
                got=str(error),
                hint="export again",
            ) from error

    def warm_up(self) -> None:
        """Run the network once, so that the first request does not pay for it and a wrong one never gets any.

        Raises:
            DataError: The network does not fit its preprocessing or its labels.
        """
        preprocessing, classes = self._student.preprocessing, len(self._student.labels)
        blank_NHWC = np.zeros((2, *preprocessing.shape_hwc), np.uint8)
        try:
            logits_NK = self._engine.run(normalise(blank_NHWC, preprocessing))[0]
        except Exception as error:
            raise DataError(
                "the network does not take images of its own preprocessing",
                slug="network-does-not-fit-preprocessing",
                where=self._where,
                allowed=f"{preprocessing.channels} x {preprocessing.size_px} x {preprocessing.size_px}",
                got=str(error),
                hint="export again",
            ) from error
        if logits_NK.shape != (2, classes) or logits_NK.dtype != np.float32:
            raise DataError(
                "the network's answer does not fit its labels",
                slug="network-does-not-fit-labels",
                where=self._where,
                allowed=f"float32 [2, {classes}] for two images",
                got=f"{logits_NK.dtype} {list(logits_NK.shape)}",
                hint="export again",
            )

    def best_batch(self, most: int) -> int:
        """How many images this machine runs fastest together.

        Args:
            most: Upper limit, at least 1.
        """
        preprocessing = self._student.preprocessing
        shape = (preprocessing.channels, preprocessing.size_px, preprocessing.size_px)
        costs_s: dict[int, float] = {}
        count = 1
        while count <= most:
            blank_MCHW = np.zeros((count, *shape), np.float32)
            self.forward(blank_MCHW)
            seconds = []
            for _ in range(_TIMED_PASSES):
                started = time.perf_counter()
                self.forward(blank_MCHW)
                seconds.append(time.perf_counter() - started)
            # The quickest: whatever else the machine does only ever adds.
            costs_s[count] = min(seconds) / count
            if count > 1 and costs_s[count] >= _CHEAPER * costs_s[count // 2]:
                break
            count *= 2
        return min(costs_s, key=costs_s.__getitem__)

    def prepare(self, images: Images) -> Prepared:
        """Decode and normalise; float32 images are passed on as they are.

        Args:
            images: Encoded, uint8 [N, H, W, C], or float32 [N, C, H, W].
        """
        preprocessing = self._student.preprocessing
        if isinstance(images, np.ndarray):
            if images.dtype == np.uint8:
                images = normalise(images.astype(np.uint8, copy=False), preprocessing)
            return Prepared(images.astype(np.float32, copy=False), {})
        pixels: list[Pixels] = []
        failures: dict[int, ImageError] = {}
        for position, encoded in enumerate(images):
            try:
                pixels.append(decode(encoded, preprocessing, self._limits))
            except ImageError as error:
                failures[position] = error
        usable_MHWC = np.stack(pixels) if pixels else np.empty((0, *preprocessing.shape_hwc), np.uint8)
        return Prepared(normalise(usable_MHWC, preprocessing), failures)

    def forward(self, pixels_MCHW: Floats) -> Floats:
        """Logits float32 [M, K] of normalised images float32 [M, C, H, W]; M may be 0."""
        if not len(pixels_MCHW):
            return np.empty((0, len(self._student.labels)), np.float32)
        return np.asarray(self._engine.run(pixels_MCHW)[0], np.float32)

    def predict(self, images: Images) -> Predictions:
        """Both steps for one request: see `prepare` and `forward`."""
        prepared = self.prepare(images)
        return prepared.answer(self.forward(prepared.pixels_MCHW))
