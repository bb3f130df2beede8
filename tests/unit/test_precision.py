"""Tests of pu_ray/precision.py."""

import pytest
import torch
from torch import nn

from pu_ray import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("asked", "expected"), [("bfloat16", True), ("float32", False)])
def test_what_is_asked_for_is_used_whatever_the_device(asked, expected):
    assert precision.uses_bfloat16(CPU, asked) is expected
    assert precision.uses_bfloat16(torch.device("cuda"), asked) is expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)],
)
def test_a_cpu_gets_it_where_it_is_native(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.uses_bfloat16(CPU, "auto") is expected


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_gets_it_where_it_is_native(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert precision.uses_bfloat16(torch.device("cuda"), "auto") is native


@pytest.mark.parametrize(("asked", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_products_have_that_type_and_weights_and_gradients_stay_float32(asked, dtype):
    layer = nn.Linear(3, 2)
    with precision.autocast(CPU, asked):
        product = layer(torch.ones(4, 3))
    assert product.dtype == dtype
    product.float().sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32
