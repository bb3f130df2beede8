"""What one answer of a network costs: multiply-adds, and milliseconds on one core."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# The clock is read for about this long, and at least so often; a slow network is not run more.
_CLOCKED_S = 0.2
_FEWEST_RUNS = 3
_MOST_RUNS = 50


def multiply_adds(network: nn.Module, example_1CHW: torch.Tensor) -> int:
    """Multiply-adds of one image, in convolutions, matrix products and attention; the rest is small and not counted.

    torch's counter counts a multiply-add as two operations; here it is one, as in papers about small networks.

    Args:
        network: In eval mode.
        example_1CHW: One input, float32 [1, C, H, W], on the network's device.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the fused attention of CPUs; of the plain one it sees the matrix products. And not
    # inference_mode: under it composite operations stay whole, and what is in them is not seen.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(example_1CHW)
    return int(counter.get_total_flops()) // 2


def latency_ms(run: Callable[[], Any]) -> float:
    """Median wall time of a call in ms, torch limited to one thread; the first call only warms up.

    A number for comparison on one machine: what else runs there slows it down.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
        times: list[float] = []
        while len(times) < _FEWEST_RUNS or (sum(times) < _CLOCKED_S and len(times) < _MOST_RUNS):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return round(1000 * statistics.median(times), 4)
