"""pu_ray/usage.py: memory at its worst, and what was held for how long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pu_ray import usage
from pu_ray.usage import HourPrices, Meter

MIB = 2**20


def test_a_peak_is_that_of_now_and_not_of_before():
    usage.take_peak_bytes()
    before = usage.take_peak_bytes()
    assert before is not None
    large = np.ones(200 * MIB, np.uint8)
    del large
    peak = usage.take_peak_bytes()
    assert peak is not None
    assert peak >= before + 190 * MIB
    after = usage.take_peak_bytes()
    assert after is not None
    assert after < peak - 150 * MIB


@pytest.fixture
def process(tmp_path, monkeypatch):
    """A process whose mark is what the test writes, and which may not be wiped."""

    def stands_at(mib: int) -> int | None:
        (tmp_path / "status").write_text(f"Name:\tpython\nVmHWM:\t{mib * 1024} kB\nVmRSS:\t1 kB\n")
        return usage.take_peak_bytes()

    monkeypatch.setattr(usage, "_PROCESS", tmp_path)
    monkeypatch.setattr(usage, "_reached_earlier_bytes", 0)
    return stands_at


def test_a_mark_that_cannot_be_wiped_says_nothing_of_what_came_after_unless_it_rose(process, tmp_path):
    (tmp_path / "clear_refs").mkdir()
    assert [process(mib) for mib in (100, 100, 150, 150)] == [100 * MIB, None, 150 * MIB, None]


def test_a_mark_that_was_wiped_may_be_lower(process, tmp_path):
    assert [process(mib) for mib in (100, 50)] == [100 * MIB, 50 * MIB]
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_without_proc_there_is_the_mark_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "_PROCESS", tmp_path / "none")
    monkeypatch.setattr(usage, "_reached_earlier_bytes", 0)
    first = usage.take_peak_bytes()
    assert first is not None
    assert first > 10 * MIB
    assert usage.take_peak_bytes() in (None, first) or usage._high_water_bytes() > first


def test_a_process_does_not_answer_with_its_parents_memory(tmp_path):
    probe = "from pu_ray import usage; print(usage.take_peak_bytes())"
    large = np.ones(600 * MIB, np.uint8)
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert large[-1] == 1
    assert 5 * MIB < int(done.stdout) < 300 * MIB


def test_memory_of_a_gpu_is_not_asked_for_where_torch_was_not_loaded(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert usage.take_gpu_peak_bytes() is None
    assert "torch" not in sys.modules


@pytest.mark.parametrize(("peak", "told"), [(7 * MIB, 7 * MIB), (0, None)])
def test_memory_of_a_gpu_is_torchs_own_account_since_the_last_time(monkeypatch, peak, told):
    class Cuda:
        reset = 0

        def is_initialized(self):
            return True

        def max_memory_allocated(self):
            return peak

        def reset_peak_memory_stats(self):
            self.reset += 1

    cuda = Cuda()
    monkeypatch.setitem(sys.modules, "torch", type("Torch", (), {"cuda": cuda}))
    assert usage.take_gpu_peak_bytes() == told
    assert cuda.reset == 1


@pytest.mark.parametrize(
    ("one", "other", "larger"), [(1, 2, 2), (2, 1, 2), (None, 1, 1), (1, None, 1), (None, None, None)]
)
def test_of_two_peaks_the_larger_that_is_known(one, other, larger):
    assert usage.larger(one, other) == larger


def test_hours_are_what_was_held_times_how_long():
    now = 0.0
    meter = Meter(lambda: now)
    now = 3600.0
    assert meter.hours() == (0, 0)
    meter.hold(4, 0.5)
    now += 1800
    meter.hold(2, 1)
    now += 3600
    assert meter.hours() == pytest.approx((4, 1.25))
    meter.hold(0, 0)
    now += 3600
    assert meter.hours() == pytest.approx((4, 1.25))


def test_cores_that_come_with_a_gpu_are_not_paid_twice():
    prices = HourPrices(currency="EUR", cpu_hour=0.1, gpu_hour=2.0, cores_with_gpu=8)
    assert prices.cost(10, 0) == pytest.approx(1.0)
    assert prices.cost(8, 1) == pytest.approx(2.0)
    assert prices.cost(4, 1) == pytest.approx(2.0)
    assert prices.cost(28, 1) == pytest.approx(4.0)
