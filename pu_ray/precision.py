"""Which numbers training multiplies: bfloat16 where the device does that natively, else float32.

Weights, optimiser state, losses and batch statistics stay float32 (mixed precision, Micikevicius et al. 2018); bfloat16
has float32's range, so gradients need no scaling.
"""

from __future__ import annotations

import torch

from pu_ray.config import Precision


def uses_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Whether `precision` means bfloat16 on this device.

    `auto` asks the device: every GPU since Ampere, and CPUs with AVX512-BF16 or AMX, where a training step takes
    0.56 of the time (docs/LOG.md). Elsewhere bfloat16 is emulated, and slower than float32.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context to run forward passes in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, precision))
