"""The quality gate: one verdict, made at evaluation and asked wherever a student would leave the house."""

from __future__ import annotations

from typing import Any

from pu_ray.errors import GateError
from pu_ray.manifest import Manifest


def verdict(gap: float, allowed: float | None) -> dict[str, Any]:
    """Whether a gap to the teacher, in percentage points, is allowed; without a bound every student passes."""
    return {"passed": allowed is None or gap <= allowed, "gap_to_teacher": gap, "allowed": allowed}


def require(evaluation: Manifest, where: str) -> None:
    """Stop what must not happen with a student that failed.

    Raises:
        GateError: It failed.
    """
    judged = evaluation.facts["gate"]
    if not judged["passed"]:
        raise GateError(
            "the student is too far behind its teacher",
            where=where,
            allowed=f"a gap of {judged['allowed']:g} percentage points (evaluation.gate.max_gap_to_teacher)",
            got=f"{judged['gap_to_teacher']:.2f}",
            hint="read report.html; train longer, mine more, take a larger student, or change the gate",
        )
