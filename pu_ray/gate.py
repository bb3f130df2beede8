"""The quality gate: one verdict, made at evaluation and asked wherever a student would leave the house."""

from __future__ import annotations

import operator
from typing import Any

from pu_ray.config import GateConfig
from pu_ray.errors import GateError
from pu_ray.manifest import Manifest


def verdict(bounds: GateConfig, *, gap: float, accuracy: float, calibration_error: float) -> dict[str, Any]:
    """Whether a student may go on; a bound that is not set holds for every one.

    Args:
        bounds: What it must reach.
        gap: Its gap to the teacher, in percentage points.
        accuracy: Share of right answers.
        calibration_error: In [0, 1].

    Returns:
        `passed`, `gap_to_teacher`, the `bounds` that are set, and `violated`: setting, bound and got of each that does
        not hold.
    """
    checks = (
        ("max_gap_to_teacher", bounds.max_gap_to_teacher, gap, operator.le),
        ("min_accuracy", bounds.min_accuracy, accuracy, operator.ge),
        ("max_calibration_error", bounds.max_calibration_error, calibration_error, operator.le),
    )
    violated = [
        {"setting": setting, "bound": bound, "got": got}
        for setting, bound, got, holds in checks
        if bound is not None and not holds(got, bound)  # NaN holds nowhere
    ]
    return {
        "passed": not violated,
        "gap_to_teacher": gap,
        "bounds": bounds.model_dump(exclude_none=True),
        "violated": violated,
    }


# For each setting what is wrong, what is allowed, and how what was got is written.
_WORDS = {
    "max_gap_to_teacher": ("is too far behind its teacher", "a gap of {:g} percentage points", "{:.2f}"),
    "min_accuracy": ("is right too rarely", "an accuracy of {:g} or more", "{:.4f}"),
    "max_calibration_error": ("is wrong about how sure it is", "a calibration error of {:g} or less", "{:.4f}"),
}


def require(evaluation: Manifest, where: str) -> None:
    """Stop what must not happen with a student that failed.

    Raises:
        GateError: It failed; tells every bound that it violates.
    """
    judged = evaluation.facts["gate"]
    if not judged["passed"]:
        told = [(*_WORDS[each["setting"]], each) for each in judged["violated"]]
        raise GateError(
            "the student " + ", and ".join(problem for problem, *_ in told),
            slug="bounds-violated",
            where=where,
            allowed="; ".join(
                f"{allowed.format(each['bound'])} (evaluation.gate.{each['setting']})" for _, allowed, _, each in told
            ),
            got="; ".join(got.format(each["got"]) for _, _, got, each in told),
            hint="read report.html; train longer, mine more, take a larger student, or change the gate",
        )
