"""pu_ray/cost.py: multiply-adds by hand, and a clock that is read a bounded number of times."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from pu_ray import cost


def test_a_convolution_and_a_linear_layer_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 5, 4))
    # Every one of 8 x 5 x 5 outputs sums over 3 x 3 x 3 inputs; every one of 4 over 200.
    by_hand = 8 * 5 * 5 * 3 * 3 * 3 + 4 * 200
    assert cost.multiply_adds(network.eval(), torch.zeros(1, 3, 10, 10)) == by_hand


def test_groups_and_matrix_products_by_hand():
    class Product(nn.Module):
        def forward(self, x):
            return x[:, 0] @ x[:, 0].transpose(1, 2)

    assert cost.multiply_adds(nn.Conv2d(4, 4, 3, groups=4), torch.zeros(1, 4, 3, 3)) == 4 * 9
    assert cost.multiply_adds(Product(), torch.zeros(1, 1, 2, 5)) == 2 * 2 * 5


def test_an_attention_counts_its_two_products():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    # Two products of 6 x 6 x 8, in each of 2 heads.
    assert cost.multiply_adds(Attention(), torch.zeros(1, 2, 6, 8)) == 2 * 2 * 6 * 6 * 8


def test_a_published_figure():
    # ResNet-18 at 224 px has 1.8 billion multiply-adds (He et al. 2016, table 1).
    from torchvision.models import resnet18

    with torch.device("meta"):
        network, example = resnet18().eval(), torch.zeros(1, 3, 224, 224)
    assert cost.multiply_adds(network, example) == pytest.approx(1.8e9, rel=0.02)


def test_the_latency_is_the_median_in_ms_and_the_first_call_does_not_count(monkeypatch):
    durations = [5.0, 0.03, 0.01, 0.02, 0.05, 0.1]  # the last one passes the time that is clocked
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls = []

    def run():
        now[0] += durations[len(calls)]
        calls.append(1)

    assert cost.latency_ms(run) == pytest.approx(30.0)
    assert len(calls) == 6


@pytest.mark.parametrize(("seconds", "calls"), [(1e-6, 51), (10.0, 4)])
def test_a_quick_network_and_a_slow_one_are_run_a_bounded_number_of_times(monkeypatch, seconds, calls):
    now, ran = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run():
        now[0] += seconds
        ran.append(1)

    cost.latency_ms(run)
    assert len(ran) == calls


def test_torch_has_one_thread_while_it_is_clocked_and_its_own_number_afterwards():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = set()
    try:
        cost.latency_ms(lambda: seen.add(torch.get_num_threads()))
        assert seen == {1}
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            cost.latency_ms(lambda: 1 / 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
