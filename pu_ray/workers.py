"""Sums, means and agreement over the workers of one training; with a single process all of it is the identity.

Knows `torch.distributed`, not who started the workers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor


def count() -> int:
    """How many train together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return torch.distributed.get_rank() if count() > 1 else 0


def total(values: Tensor) -> Tensor:
    """Elementwise sum over the workers; of the same shape, detached."""
    values = values.detach().clone()
    if count() > 1:
        torch.distributed.all_reduce(values)
    return values


def mean(values: Tensor) -> Tensor:
    """Elementwise mean over the workers; of the same shape, detached."""
    return total(values) / count()


def least(value: int, device: torch.device) -> int:
    """The smallest of the workers' values: how many steps all of them can do."""
    if count() == 1:
        return value
    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MIN)
    return int(shared)


def gathered(values: Any) -> Any:
    """The workers' arrays, one behind the other; every worker gets all of them."""
    if count() == 1:
        return values
    parts: list[Any] = [None] * count()
    torch.distributed.all_gather_object(parts, values)
    return np.concatenate(parts)


def together(values: Tensor) -> Tensor:
    """The workers' rows, one behind the other, with gradients to everyone's own; all bring equally many."""
    if count() == 1:
        return values
    import torch.distributed.nn.functional

    return torch.cat(torch.distributed.nn.functional.all_gather(values))  # type: ignore[no-untyped-call]
