"""pu_ray/optim.py: the optimiser asked for, and the rate at every step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from pu_ray import optim
from pu_ray.config import OptimizerConfig


def rates(settings, steps):
    """The rates an optimiser really uses, step by step."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, schedule = optim.build([parameter], settings, steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.zeros(1)
        optimizer.step()
        schedule.step()
    return used


def test_sgd_is_nesterov_with_the_configured_momentum_and_decay():
    optimizer, _ = optim.build(
        [nn.Parameter(torch.zeros(1))], OptimizerConfig(kind="sgd", lr=0.3, momentum=0.8, weight_decay=0.02), 10
    )
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["nesterov"] is True
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.8, 0.02)


def test_sgd_is_plain_without_momentum_or_where_asked():
    for settings in ({"momentum": 0.0}, {"nesterov": False}):
        optimizer, _ = optim.build([nn.Parameter(torch.zeros(1))], OptimizerConfig(kind="sgd", **settings), 10)
        assert optimizer.defaults["nesterov"] is False


def test_adamw_takes_the_rate_and_the_decay():
    optimizer, _ = optim.build([nn.Parameter(torch.zeros(1))], OptimizerConfig(lr=0.02, weight_decay=1.0), 10)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["weight_decay"] == 1.0
    assert optimizer.defaults["lr"] == 0.02


def test_constant_stays():
    assert rates(OptimizerConfig(lr=0.5, schedule="constant"), 4) == [0.5] * 4


def test_cosine_falls_from_the_full_rate_through_half_of_it():
    used = rates(OptimizerConfig(lr=0.2, schedule="cosine"), 8)
    expected = [0.1 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert used == pytest.approx(expected)
    assert used[0] == pytest.approx(0.2)
    assert used[4] == pytest.approx(0.1)


def test_one_cycle_rises_to_the_full_rate_and_falls_to_zero():
    settings = OptimizerConfig(lr=1.0, schedule="one_cycle")
    used = rates(settings, 100)
    assert used[0] == pytest.approx(0.04)
    assert used[15] == max(used) == pytest.approx(1.0)
    assert all(later > earlier for earlier, later in itertools.pairwise(used[:16]))
    assert all(later < earlier for earlier, later in itertools.pairwise(used[15:]))
    assert optim.rate(settings, 100, 100) == 0.0
    assert used[-1] > 0


def test_milestones_drop_the_rate_tenfold_each():
    settings = OptimizerConfig(lr=1.0, schedule="milestones", milestones=(0.25, 0.5, 0.75))
    assert rates(settings, 8) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_step_past_the_end_never_raises_the_rate_or_turns_it_negative(schedule, step):
    settings = OptimizerConfig(schedule=schedule)
    assert 0 <= optim.rate(settings, 10 + step, 10) <= optim.rate(settings, 9, 10)


def test_no_steps_at_all_are_no_reason_to_divide_by_zero():
    assert optim.rate(OptimizerConfig(schedule="cosine"), 0, 0) == 1.0
