"""What a stage took: memory at its worst, and how much of a cluster for how long.

Memory is resident memory of one process as the kernel accounts it, the pages that it shares with others included (Ray's
object store among them), so processes of one machine do not add up. Hours are of what Ray had reserved, busy or not.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_PROCESS = Path("/proc/self")
_RESET_HIGH_WATER = "5"  # man 5 proc, clear_refs
_RUSAGE_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


class Workers(BaseModel):
    """The processes that did a stage's work on the cluster, in the attempt that finished it.

    Attributes:
        unit: `actors`, `tasks` or `workers`.
        most: How many were seen at work at once; None: not known.
        peak_bytes: Most resident memory of any one of them; None: not known.
        gpu_peak_bytes: Most GPU memory that torch gave to any one of them; None: it used none.
        cpu_hours: Logical CPUs that Ray had reserved for the stage, times the time; None: not known.
        gpu_hours: The same of GPUs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str
    most: int | None = None
    peak_bytes: int | None = None
    gpu_peak_bytes: int | None = None
    cpu_hours: float | None = None
    gpu_hours: float | None = None


class Usage(BaseModel):
    """What a stage took.

    Attributes:
        driver_peak_bytes: Most resident memory of the process that ran the stage; None: not known.
        workers: None: that process did all the work.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    driver_peak_bytes: int | None = None
    workers: Workers | None = None


class HourPrices(BaseModel):
    """What is paid for what is held, in a currency.

    Attributes:
        currency: For people.
        cpu_hour: One core for an hour.
        gpu_hour: One GPU for an hour, with its share of the cores of its machine.
        cores_with_gpu: That share.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    currency: str
    cpu_hour: float
    gpu_hour: float
    cores_with_gpu: float

    def cost(self, cpu_hours: float, gpu_hours: float) -> float:
        """Of what was held: cores beyond those that came with the GPUs are paid apart."""
        beyond = max(0.0, cpu_hours - gpu_hours * self.cores_with_gpu)
        return gpu_hours * self.gpu_hour + beyond * self.cpu_hour


# -- memory ------------------------------------------------------------------------------------------------

_reached_earlier_bytes = 0  # a high water that could not be wiped away


def take_peak_bytes() -> int | None:
    """Most resident memory of this process since the last call, or since it began.

    Returns:
        None where nobody can know: the kernel does not let go of an earlier, higher mark.
    """
    global _reached_earlier_bytes
    peak = _high_water_bytes()
    known = peak if peak > _reached_earlier_bytes else None
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_HIGH_WATER)
        _reached_earlier_bytes = 0
    except OSError:
        _reached_earlier_bytes = peak
    return known


def _high_water_bytes() -> int:
    # Not getrusage first: what it says outlives `exec`, so a worker would answer with its parent's memory.
    with contextlib.suppress(OSError):
        for line in (_PROCESS / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RUSAGE_UNIT_BYTES


def take_gpu_peak_bytes() -> int | None:
    """Most GPU memory that torch held allocated in this process since the last call; None where it used none.

    Not covered: what others allocate, ONNX Runtime for one, and what CUDA itself takes.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak or None


def larger(one: int | None, other: int | None) -> int | None:
    """The larger of two peaks, either of which may not be known."""
    known = [peak for peak in (one, other) if peak is not None]
    return max(known, default=None)


# -- what is held ------------------------------------------------------------------------------------------


class Meter:
    """Adds up what is held over time: what was told last counts until something else is told."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._held = (0.0, 0.0)
        self._spent_s = (0.0, 0.0)

    def hold(self, cpus: float, gpus: float) -> None:
        """From now on so much is held."""
        now = self._clock()
        passed = now - self._since
        self._spent_s = (self._spent_s[0] + passed * self._held[0], self._spent_s[1] + passed * self._held[1])
        self._held, self._since = (cpus, gpus), now

    def hours(self) -> tuple[float, float]:
        """CPU-hours and GPU-hours so far."""
        self.hold(*self._held)
        return self._spent_s[0] / 3600, self._spent_s[1] / 3600
