"""pu_ray/gate.py: one verdict, one message."""

from __future__ import annotations

import math

import pytest

from pu_ray import gate
from pu_ray.config import GateConfig
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


def judge(*, gap=1.0, accuracy=0.9, calibration_error=0.05, **bounds):
    return gate.verdict(GateConfig(**bounds), gap=gap, accuracy=accuracy, calibration_error=calibration_error)


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
    judged = judge(gap=gap, max_gap_to_teacher=allowed)
    assert judged["passed"] is passed
    assert judged["bounds"] == ({} if allowed is None else {"max_gap_to_teacher": allowed})
    assert judged["gap_to_teacher"] is gap


@pytest.mark.parametrize(
    ("measured", "setting", "bound", "passed"),
    [
        (0.9, "min_accuracy", 0.9, True),
        (0.899, "min_accuracy", 0.9, False),
        (math.nan, "min_accuracy", 0.0, False),
        (0.05, "max_calibration_error", 0.05, True),
        (0.051, "max_calibration_error", 0.05, False),
        (0.0, "max_calibration_error", 0.0, True),
        (math.nan, "max_calibration_error", 1.0, False),
    ],
)
def test_accuracy_has_a_floor_and_calibration_error_a_ceiling(measured, setting, bound, passed):
    name = {"min_accuracy": "accuracy", "max_calibration_error": "calibration_error"}[setting]
    judged = judge(**{name: measured, setting: bound})
    assert judged["passed"] is passed
    assert [each["setting"] for each in judged["violated"]] == ([] if passed else [setting])


def test_each_bound_looks_at_its_own_figure():
    # A gap of 50 points and a calibration error of 0.9 violate no bound on accuracy.
    assert judge(gap=50.0, calibration_error=0.9, min_accuracy=0.9)["passed"]
    assert judge(gap=50.0, accuracy=0.0, max_calibration_error=0.05)["passed"]
    assert judge(accuracy=0.0, calibration_error=0.9, max_gap_to_teacher=1.0)["passed"]


@pytest.mark.parametrize("allowed", [None, 2.0])
def test_a_student_that_passed_may_go_on(allowed):
    gate.require(evaluation(judge(gap=1.5, max_gap_to_teacher=allowed)), "student/")


def test_a_student_that_failed_is_stopped_with_both_numbers_and_the_setting():
    with pytest.raises(GateError) as caught:
        gate.require(evaluation(judge(gap=3.456, max_gap_to_teacher=2.5)), "runs/x/student")
    assert caught.value.exit_status == 5
    assert str(caught.value).splitlines() == [
        "runs/x/student: the student is too far behind its teacher",
        "  allowed: a gap of 2.5 percentage points (evaluation.gate.max_gap_to_teacher)",
        "  got: 3.46",
        "  what to do: read report.html; train longer, mine more, take a larger student, or change the gate",
    ]


def test_all_violated_bounds_are_told_at_once_and_those_that_hold_are_not():
    judged = judge(
        gap=3.0, accuracy=0.81, calibration_error=0.2, max_gap_to_teacher=5, min_accuracy=0.9, max_calibration_error=0.1
    )
    with pytest.raises(GateError) as caught:
        gate.require(evaluation(judged), "x")
    assert caught.value.problem == "the student is right too rarely, and is wrong about how sure it is"
    assert caught.value.allowed == (
        "an accuracy of 0.9 or more (evaluation.gate.min_accuracy); "
        "a calibration error of 0.1 or less (evaluation.gate.max_calibration_error)"
    )
    assert caught.value.got == "0.8100; 0.2000"


def test_every_bound_of_the_configuration_has_its_words():
    bounds = dict.fromkeys(GateConfig.model_fields, 0.5)
    judged = judge(gap=1.0, accuracy=0.1, calibration_error=0.9, **bounds)
    with pytest.raises(GateError) as caught:
        gate.require(evaluation(judged), "x")
    for setting in GateConfig.model_fields:
        assert f"(evaluation.gate.{setting})" in caught.value.allowed
