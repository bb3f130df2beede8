"""pu_ray/engine.py: both engines give the same answers, for any batch.

A freshly initialised network gives nearly the same answer to every image, and then every engine agrees with every
other. So batch norm is fitted to the images first, and the tests check that the answers differ between images.
"""

from __future__ import annotations

import io
import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from pu_ray import engine, models
from pu_ray.config import PreprocessingConfig
from pu_ray.engine import OnnxEngine, TorchEngine, in_batches, to_onnx

PREPROCESSING = PreprocessingConfig(size_px=12)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small networks lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pixels():
    """Images of different colours, so that averages over space differ."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (23, 1, 1, 3))
    return np.clip(colours + generator.normal(0, 40, (23, 12, 12, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def teacher(pixels):
    """A teacher from pixels to features and logits whose batch norm fits the images."""
    torch.manual_seed(0)
    network = models.CifarResNet(depth=8, width=8, classes=4)
    normalise = models.Normalised(nn.Identity(), PREPROCESSING)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average
    with torch.no_grad():
        network.train()(normalise(torch.from_numpy(pixels)))
        logits = network.eval()(normalise(torch.from_numpy(pixels)))
        network.head.bias -= logits.mean(dim=0)
    return models.Normalised(models.Teacher(network), PREPROCESSING).eval()


@pytest.fixture(scope="module")
def graph(teacher):
    example = models.example_pixels(PREPROCESSING)
    return to_onnx(teacher, example, input_name="pixels", output_names=["features", "logits"])


def test_the_test_images_have_different_answers(teacher, pixels):
    features, logits = TorchEngine(teacher, "cpu").run(pixels)
    assert len(set(logits.argmax(axis=1))) >= 3
    assert np.median(features.std(axis=0) / np.abs(features).mean(axis=0)) > 0.1


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 23])
def test_onnx_gives_torchs_answers_for_any_batch(teacher, graph, pixels, images):
    ours = OnnxEngine(graph).run(pixels[:images])
    reference = TorchEngine(teacher, "cpu").run(pixels[:images])
    assert [output.shape for output in ours] == [(images, 56), (images, 4)]
    for one, other in zip(ours, reference, strict=True):
        assert one.dtype == other.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_torch_engine_agrees_with_the_module_itself(teacher, pixels):
    features, logits = TorchEngine(teacher, "cpu").run(pixels)
    with torch.no_grad():
        expected = teacher(torch.from_numpy(pixels))
    np.testing.assert_array_equal(features, expected[0].numpy())
    np.testing.assert_array_equal(logits, expected[1].numpy())


def test_an_answer_does_not_depend_on_its_neighbours(graph, pixels):
    onnx = OnnxEngine(graph)
    alone = np.concatenate([onnx.run(pixels[row : row + 1])[1] for row in range(5)])
    np.testing.assert_allclose(alone, onnx.run(pixels[:5])[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 100])
def test_batches_of_any_size_give_the_same_rows_in_the_same_order(graph, pixels, batch_size):
    onnx = OnnxEngine(graph)
    together = onnx.run(pixels)
    apart = in_batches(onnx, pixels, batch_size)
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_graph_is_read_from_bytes_or_from_a_file(graph, pixels, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph)
    for source in (path, str(path)):
        np.testing.assert_array_equal(OnnxEngine(source).run(pixels)[1], OnnxEngine(graph).run(pixels)[1])


def test_the_graph_names_its_input_and_outputs_and_leaves_the_batch_open(graph):
    import onnx

    model = onnx.load(io.BytesIO(graph)).graph
    assert [value.name for value in model.input] == ["pixels"]
    assert [value.name for value in model.output] == ["features", "logits"]
    dims = model.input[0].type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [dim.dim_value for dim in dims[1:]] == [12, 12, 3]


def test_a_module_with_one_output_gives_a_list_of_one(pixels):
    module = models.Normalised(nn.Flatten(), PREPROCESSING)
    assert [output.shape for output in TorchEngine(module, "cpu").run(pixels[:3])] == [(3, 432)]


def test_read_only_batches_are_taken_without_a_warning(teacher, graph, pixels):
    locked = pixels[:2].copy()
    locked.flags.writeable = False
    torch.set_warn_always(True)  # otherwise once per process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for one in (TorchEngine(teacher, "cpu"), OnnxEngine(graph)):
                assert one.run(locked)[1].shape == (2, 4)
    finally:
        torch.set_warn_always(False)


def test_the_torch_engine_puts_its_module_into_eval_mode(pixels):
    module = nn.Sequential(models.Normalised(nn.Flatten(), PREPROCESSING), nn.Dropout(0.5)).train()
    first, second = (TorchEngine(module, "cpu").run(pixels[:2])[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not module.training


def test_the_export_says_nothing_on_stdout_and_leaves_the_logger_as_it_was(capfd):
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    engine.to_onnx(nn.Linear(3, 1).eval(), torch.randn(2, 3), input_name="x", output_names=["y"])
    assert capfd.readouterr().out == ""
    assert logger.level == before


def test_threads_may_share_an_engine(teacher, graph, pixels):
    # A CPU actor that waits for a remote storage works on another block meanwhile.
    from concurrent.futures import ThreadPoolExecutor

    for shared in (TorchEngine(teacher, "cpu"), OnnxEngine(graph)):
        expected = shared.run(pixels)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(shared.run, [pixels] * 24))
        for answer in answers:
            for one, other in zip(answer, expected, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)


class Halves:
    """A network whose features are the pixels' mean; with a gate it rejects the darker half."""

    def __init__(self, gated: bool) -> None:
        self._gated = gated

    def run(self, batch):
        features = batch.reshape(len(batch), -1).mean(axis=1, keepdims=True).astype(np.float32)
        outputs = [features, np.concatenate([features, -features], axis=1)]
        return [*outputs, features[:, 0] - np.median(features)] if self._gated else outputs


class Double:
    """A head."""

    def run(self, batch):
        return [2 * batch[:, 0]]


class Third:
    """Cosines."""

    def run(self, batch):
        return [batch[:, 0] / 3]


def test_a_scorer_is_a_head_behind_a_network(pixels):
    scores, logits, cosines = engine.Scorer(Halves(gated=False), Double(), Third()).run(pixels)
    features, expected = Halves(gated=False).run(pixels)
    np.testing.assert_array_equal(scores, 2 * features[:, 0])
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(cosines, features[:, 0] / 3)


def test_a_finetuned_scorer_keeps_the_networks_answers_and_adds_the_cosines(pixels):
    class Whole:
        def run(self, batch):
            features, logits = Halves(gated=False).run(batch)
            return [7 * features[:, 0], logits, features]

    scores, logits, cosines = engine.FinetunedScorer(Whole(), Third()).run(pixels)
    features, expected = Halves(gated=False).run(pixels)
    np.testing.assert_array_equal(scores, 7 * features[:, 0])
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(cosines, features[:, 0] / 3)


def test_a_scorer_gives_what_the_gate_rejected_minus_infinity(pixels):
    scores, _, cosines = engine.Scorer(Halves(gated=True), Double(), Third()).run(pixels)
    margins = Halves(gated=True).run(pixels)[2]
    assert (cosines[margins < 0] == 0).all()
    assert (np.isneginf(scores) == (margins < 0)).all()
    assert 0 < np.isneginf(scores).sum() < len(pixels)
    dark = pixels[margins < 0]
    gated = Halves(gated=True)
    gated.run = lambda batch: [*Halves(gated=False).run(batch), np.full(len(batch), -1.0)]
    assert np.isneginf(engine.Scorer(gated, Double(), Third()).run(dark)[0]).all()


def test_a_graph_is_cut_where_a_tensor_separates_it_and_nowhere_else(pixels):
    class Two(nn.Module):
        def forward(self, x_NHWC):
            half = x_NHWC.float().mean(dim=(1, 2)) / 255
            return half, half * 3, half + x_NHWC.float().amax(dim=(1, 2))

    example = torch.from_numpy(pixels[:2])
    graph = to_onnx(Two().eval(), example, input_name="pixels", output_names=["half", "triple", "mixed"])
    first = OnnxEngine(engine.cut_onnx(graph, ["pixels"], ["half"]))
    second = OnnxEngine(engine.cut_onnx(graph, ["half"], ["triple"]))
    (half,) = first.run(pixels)
    np.testing.assert_allclose(second.run(half)[0], 3 * half, rtol=1e-6)
    # `mixed` needs the pixels beside the half.
    assert engine.cut_onnx(graph, ["half"], ["mixed"]) is None


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_answers_for_any_batch(teacher, pixels):
    plain, compiled = TorchEngine(teacher, "cpu"), TorchEngine(teacher, "cpu", compiled=True)
    for images in (1, 5, 23):
        for one, other in zip(plain.run(pixels[:images]), compiled.run(pixels[:images]), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
