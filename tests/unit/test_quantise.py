"""pu_ray/quantise.py: eight bits, a scale per channel, and ranges that come from the calibration images."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime import quantization
from torch import nn

from pu_ray import engine, quantise
from pu_ray.errors import DataError

SIDE = 8
# More than one batch of the calibration, and the last one not full.
CALIBRATION = np.random.default_rng(0).uniform(-1, 1, (70, 3, SIDE, SIDE)).astype(np.float32)


def network(scales=(1.0, 1.0, 1.0, 1.0)) -> nn.Module:
    """A convolution whose output channels have these magnitudes, averaged to one logit each."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, len(scales), 3, padding=1, bias=False)
    with torch.no_grad():
        convolution.weight *= torch.tensor(scales).view(-1, 1, 1, 1)
    return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def graph(module: nn.Module) -> bytes:
    example = torch.zeros(2, 3, SIDE, SIDE)
    return engine.to_onnx(module, example, input_name="pixels", output_names=["logits"])


def weights(content: bytes) -> dict[str, np.ndarray]:
    """The convolution's eight-bit weights with their scales."""
    model = onnx.load_from_string(content)
    known = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    node = next(
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and getattr(known.get(node.input[0]), "ndim", 0) == 4
    )
    return {"values": known[node.input[0]], "scales": known[node.input[1]], "zeros": known[node.input[2]]}


def test_weights_are_eight_bits_with_a_scale_per_channel_that_gives_them_back():
    module = network((1.0, 0.1, 10.0, 0.001))
    found = weights(quantise.to_int8(graph(module), "pixels", CALIBRATION))
    exact = module[0].weight.detach().numpy()
    assert found["values"].dtype == np.int8
    assert found["scales"].shape == (4,)
    assert not found["zeros"].any()
    again = found["values"] * found["scales"][:, None, None, None]
    # Half a step of 64 to either side, of each channel's own largest weight.
    largest = np.abs(exact).max(axis=(1, 2, 3), keepdims=True)
    assert (np.abs(again - exact) <= 0.51 / 63 * largest).all()


def test_seven_bits_of_the_eight_are_used_so_that_old_processors_do_not_overflow():
    values = weights(quantise.to_int8(graph(network()), "pixels", CALIBRATION))["values"]
    assert 60 <= np.abs(values.astype(int)).max() <= 64


def test_inputs_beyond_those_of_the_calibration_are_cut_off():
    int8 = engine.OnnxEngine(quantise.to_int8(graph(network()), "pixels", CALIBRATION))
    ones = np.ones((1, 3, SIDE, SIDE), np.float32)
    (edge,), (beyond,) = int8.run(ones), int8.run(10 * ones)
    np.testing.assert_allclose(edge, beyond, atol=1e-6)
    assert np.abs(int8.run(0.5 * ones)[0] - edge).max() > 1e-3


def test_every_batch_of_the_calibration_is_looked_at():
    wide = CALIBRATION.copy()
    wide[-1] *= 10  # in the last batch, which is not full
    int8 = engine.OnnxEngine(quantise.to_int8(graph(network()), "pixels", wide))
    ones = np.ones((1, 3, SIDE, SIDE), np.float32)
    assert np.abs(int8.run(8 * ones)[0] - int8.run(ones)[0]).max() > 0.1


def test_the_graph_is_called_like_the_float_one_whatever_the_batch():
    content = graph(network())
    exact, int8 = engine.OnnxEngine(content), engine.OnnxEngine(quantise.to_int8(content, "pixels", CALIBRATION))
    for rows in (1, 5):
        (logits,), (expected,) = int8.run(CALIBRATION[:rows]), exact.run(CALIBRATION[:rows])
        assert logits.dtype == np.float32
        # Rounding of the inputs averages out over 64 positions; the outputs' own step is what is left.
        np.testing.assert_allclose(logits, expected, atol=0.03)


def test_the_tools_warnings_neither_show_nor_set_logging_up(capfd, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level, real = root.level, quantization.quantize_static

    def warns(*args, **options):
        logging.warning("the tool has something to say")  # noqa: LOG015 - as the tool does
        return real(*args, **options)

    monkeypatch.setattr(quantization, "quantize_static", warns)
    quantise.to_int8(graph(network()), "pixels", CALIBRATION[:2])
    assert capfd.readouterr() == ("", "")
    assert (root.level, root.handlers) == (level, [])


def test_a_graph_that_the_tool_cannot_read_is_refused_with_its_words():
    with pytest.raises(DataError, match="cannot be quantised") as caught:
        quantise.to_int8(b"no graph at all", "pixels", CALIBRATION)
    assert caught.value.where == "export.formats (onnx-int8)"
    assert "\n" not in caught.value.got
    assert caught.value.hint == "leave onnx-int8 out of export.formats"
