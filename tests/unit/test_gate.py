"""pu_ray/gate.py: one verdict, one message."""

from __future__ import annotations

import math

import pytest

from pu_ray import gate
from pu_ray.errors import GateError
from pu_ray.manifest import Manifest


def evaluation(judged):
    return Manifest(
        stage="evaluate",
        identity="0",
        inputs={},
        seed=0,
        facts={"gate": judged},
        seconds=0.0,
        finished_at="2026-01-01T00:00:00Z",
    )


@pytest.mark.parametrize(
    ("gap", "allowed", "passed"),
    [
        (1.0, 2.0, True),
        (2.0, 2.0, True),
        (2.01, 2.0, False),
        (-3.0, 0.0, True),
        (0.1, 0.0, False),
        (90.0, None, True),
        (math.nan, 2.0, False),
    ],
)
def test_a_gap_passes_up_to_the_bound_and_without_one_always(gap, allowed, passed):
    judged = gate.verdict(gap, allowed)
    assert judged["passed"] is passed
    assert judged["allowed"] == allowed
    assert judged["gap_to_teacher"] is gap


@pytest.mark.parametrize("allowed", [None, 2.0])
def test_a_student_that_passed_may_go_on(allowed):
    gate.require(evaluation(gate.verdict(1.5, allowed)), "student/")


def test_a_student_that_failed_is_stopped_with_both_numbers_and_the_setting():
    with pytest.raises(GateError) as caught:
        gate.require(evaluation(gate.verdict(3.456, 2.5)), "runs/x/student")
    assert caught.value.exit_status == 5
    assert str(caught.value).splitlines() == [
        "runs/x/student: the student is too far behind its teacher",
        "  allowed: a gap of 2.5 percentage points (evaluation.gate.max_gap_to_teacher)",
        "  got: 3.46",
        "  what to do: read report.html; train longer, mine more, take a larger student, or change the gate",
    ]
