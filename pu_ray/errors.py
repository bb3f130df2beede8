"""What can go wrong, for users: one base class, few kinds, each with a code and an exit status.

Every error says what was wrong, where, what was allowed, what was got and what to do. All of them
survive pickling between processes, because a Ray worker raises what the driver reports.
"""

from __future__ import annotations


class PuRayError(Exception):
    """Base of every error a user can cause or must act on.

    Attributes:
        code: Stable identifier of the kind, for machines and for the error catalogue.
        exit_status: Exit status of the command line (DESIGN: 0 ok, 2 usage, 3 data, 4 cluster, 5 gate).
    """

    code = "error"
    exit_status = 1

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        allowed: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = where
        self.allowed = allowed
        self.got = got
        self.hint = hint

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.problem}" if self.where else self.problem]
        if self.allowed is not None:
            parts.append(f"  allowed: {self.allowed}")
        if self.got is not None:
            parts.append(f"  got: {self.got}")
        if self.hint is not None:
            parts.append(f"  what to do: {self.hint}")
        return "\n".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds from args alone and would lose every keyword on its way through Ray.
        return (_rebuild, (type(self), self.problem, self.as_dict()))

    def as_dict(self) -> dict[str, str | None]:
        """The parts that are not the problem itself."""
        return {"where": self.where, "allowed": self.allowed, "got": self.got, "hint": self.hint}


def _rebuild(kind: type[PuRayError], problem: str, parts: dict[str, str | None]) -> PuRayError:
    return kind(problem, **parts)


class ConfigError(PuRayError):
    """The job file, a flag or a combination of them cannot be used. Raised before Ray starts."""

    code = "config"
    exit_status = 2


class DataError(PuRayError):
    """What the customer brought (lake, labeled images, teacher, artifact) cannot be used."""

    code = "data"
    exit_status = 3


class ClusterError(PuRayError):
    """The cluster is missing, too small, or refused the work."""

    code = "cluster"
    exit_status = 4


class GateError(PuRayError):
    """A quality gate failed: the student exists, but must not be exported or served."""

    code = "gate"
    exit_status = 5


INTERRUPTED_EXIT_STATUS = 130
