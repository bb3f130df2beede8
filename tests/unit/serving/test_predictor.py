"""serving/predictor.py: one answer per image, whatever its neighbours are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pu_ray.errors import DataError
from pu_ray.images import ImageError, Limits, normalise
from serving.predictor import Predictions, Predictor, join
from serving.registry import LoadedStudent
from tests.unit.serving.students import LABELS, PREPROCESSING, onnx_network, picture, png

LIMITS = Limits()


def _with_model(loaded: LoadedStudent, model: bytes) -> LoadedStudent:
    return dataclasses.replace(loaded, model=model)


def test_images_differ_in_their_answers(predictor: Predictor) -> None:
    predictions = predictor.predict([png(seed) for seed in range(30)])
    assert predictions.logits_NK.shape == (30, len(LABELS))
    assert predictions.logits_NK.dtype == np.float32
    assert set(predictions.logits_NK.argmax(axis=1)) == {0, 1, 2}
    assert predictions.failures == {}


def test_the_three_kinds_of_images_agree(predictor: Predictor) -> None:
    pictures = np.stack([picture(seed) for seed in range(5)])
    encoded = predictor.predict([png(seed) for seed in range(5)]).logits_NK
    np.testing.assert_array_equal(predictor.predict(pictures).logits_NK, encoded)
    np.testing.assert_array_equal(predictor.predict(normalise(pictures, PREPROCESSING)).logits_NK, encoded)


def test_an_answer_does_not_depend_on_its_neighbours(predictor: Predictor) -> None:
    together = predictor.predict([png(seed) for seed in range(6)]).logits_NK
    alone = np.concatenate([predictor.predict([png(seed)]).logits_NK for seed in range(6)])
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-6)


def test_a_bad_image_fails_alone(predictor: Predictor) -> None:
    predictions = predictor.predict([png(0), b"no image", png(1), png(2)[:60], b""])
    assert {position: error.code for position, error in predictions.failures.items()} == {
        1: "not_an_image",
        3: "truncated",
        4: "truncated",
    }
    good = predictor.predict([png(0), png(1)]).logits_NK
    np.testing.assert_array_equal(predictions.logits_NK[[0, 2]], good)
    assert np.isnan(predictions.logits_NK[[1, 3, 4]]).all()


def test_only_bad_images(predictor: Predictor) -> None:
    predictions = predictor.predict([b"x", b"y"])
    assert predictions.logits_NK.shape == (2, len(LABELS))
    assert list(predictions.failures) == [0, 1]


def test_limits_hold(loaded: LoadedStudent) -> None:
    predictor = Predictor(loaded, Limits(max_bytes=10_000, max_px=100))
    predictions = predictor.predict([png(0, side_px=8), png(0, side_px=12), bytes(10_001)])
    assert list(predictions.failures) == [1, 2]
    assert {error.code for error in predictions.failures.values()} == {"too_large"}


def test_probabilities_and_top() -> None:
    predictions = Predictions(np.array([[1.0, 3.0, 2.0], [1e4, -1e4, 0.0]], np.float32), {})
    np.testing.assert_allclose(predictions.probabilities_NK.sum(axis=1), 1, rtol=1e-6)
    top = predictions.top(0, 2)
    assert [index for index, _ in top] == [1, 2]
    assert top[0][1] == pytest.approx(np.e**2 / (1 + np.e + np.e**2), rel=1e-6)
    assert predictions.top(1, 99) == [(0, 1.0), (1, 0.0), (2, 0.0)]


def test_pieces_join_in_order() -> None:
    error = ImageError("truncated")
    first = Predictions(np.zeros((2, 3), np.float32), {1: error})
    second = Predictions(np.ones((3, 3), np.float32), {0: error})
    whole = join([first, second])
    assert whole.logits_NK[:, 0].tolist() == [0, 0, 1, 1, 1]
    assert list(whole.failures) == [1, 2]


def test_warm_up_accepts_a_proper_student(predictor: Predictor) -> None:
    predictor.warm_up()


def test_warm_up_refuses_a_network_of_other_classes(loaded: LoadedStudent) -> None:
    with pytest.raises(DataError, match="does not fit its labels") as refusal:
        Predictor(_with_model(loaded, onnx_network(classes=5)), LIMITS).warm_up()
    assert refusal.value.allowed == "float32 [2, 3] for two images"
    assert refusal.value.got == "float32 [2, 5]"


def test_warm_up_refuses_a_network_of_other_inputs(loaded: LoadedStudent) -> None:
    larger = PREPROCESSING.model_copy(update={"size_px": 16})
    with pytest.raises(DataError, match="images of its own preprocessing") as refusal:
        Predictor(_with_model(loaded, onnx_network(preprocessing=larger)), LIMITS).warm_up()
    assert refusal.value.allowed == "3 x 8 x 8"


def test_a_damaged_network_is_refused(loaded: LoadedStudent) -> None:
    with pytest.raises(DataError, match="cannot be loaded"):
        Predictor(_with_model(loaded, b"not an ONNX graph"), LIMITS)


@pytest.mark.parametrize(
    ("costs_ms", "best"),
    [
        ({1: 10, 2: 6, 4: 4, 8: 5}, 4),  # the caches are full at eight
        ({1: 10, 2: 6, 4: 4, 8: 3, 16: 2, 32: 1}, 16),  # as many as may be
        ({1: 10, 2: 9.9, 4: 1}, 2),  # nobody looks further
        ({1: 10, 2: 11, 4: 1}, 1),
    ],
)
def test_a_batch_is_as_large_as_the_machine_runs_fastest(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, costs_ms: dict[int, float], best: int
) -> None:
    now = [0.0]

    def forward(self: Predictor, pixels: np.ndarray) -> np.ndarray:
        now[0] += costs_ms[len(pixels)] * len(pixels) / 1000
        return pixels

    monkeypatch.setattr(Predictor, "forward", forward)
    monkeypatch.setattr("serving.predictor.time.perf_counter", lambda: now[0])
    assert predictor.best_batch(16) == best
