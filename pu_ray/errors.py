"""What can go wrong, for users: one base class, few kinds, each with an exit status; every error with a code.

Every error says what was wrong, where, what was allowed, what was got and what to do. Its code, such as
`config/unknown-key`, stays when the wording changes; docs/errors.md lists all of them. All errors survive pickling
between processes, because a Ray worker raises what the driver reports.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Self


class PuRayError(Exception):
    """Base of every error a user can cause or must act on.

    Attributes:
        kind: The kind in a word, the first half of every code of it.
        exit_status: Exit status of the command line (DESIGN: 0 ok, 2 usage, 3 data, 4 cluster, 5 gate).
        slug: What happened in a few words and for good, the second half: written where the error is made.
    """

    kind = "error"
    exit_status = 1

    def __init__(
        self,
        problem: str,
        *,
        slug: str,
        where: str | None = None,
        allowed: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.slug = slug
        self.where = where
        self.allowed = allowed
        self.got = got
        self.hint = hint

    @property
    def code(self) -> str:
        """Stable identifier of the mistake, for machines and for docs/errors.md."""
        return f"{self.kind}/{self.slug}"

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
        return (_rebuild, (type(self), self.problem, self.slug, self.as_dict()))

    def as_dict(self) -> dict[str, str | None]:
        """The parts that are neither the problem itself nor its code."""
        return {"where": self.where, "allowed": self.allowed, "got": self.got, "hint": self.hint}

    def at(self, where: str) -> Self:
        """The same error, said of another place."""
        return type(self)(self.problem, slug=self.slug, **(self.as_dict() | {"where": where}))


def _rebuild(kind: type[PuRayError], problem: str, slug: str, parts: dict[str, str | None]) -> PuRayError:
    return kind(problem, slug=slug, **parts)


class ConfigError(PuRayError):
    """The job file, a flag or a combination of them cannot be used. Raised before Ray starts."""

    kind = "config"
    exit_status = 2


class DataError(PuRayError):
    """What the customer brought (lake, labeled images, teacher, artifact) cannot be used."""

    kind = "data"
    exit_status = 3


class ClusterError(PuRayError):
    """The cluster is missing, too small, or refused the work."""

    kind = "cluster"
    exit_status = 4


class GateError(PuRayError):
    """A quality gate failed: the student exists, but must not be exported or served."""

    kind = "gate"
    exit_status = 5


class RefusedSetting(ValueError):
    """What a validator of settings raises: pydantic carries it to `wrong_setting`, which makes an error for users."""

    def __init__(self, problem: str, *, slug: str) -> None:
        super().__init__(problem)
        self.slug = slug

    def __reduce__(self) -> tuple[object, ...]:
        return (functools.partial(type(self), slug=self.slug), self.args)


def wrong_setting(
    found: Mapping[str, Any], *, where: str, allowed: str | None = None, got: str | None = None
) -> ConfigError:
    """The error for one of the things that pydantic found (`ValidationError.errors()`)."""
    refused = found.get("ctx", {}).get("error")
    if isinstance(refused, RefusedSetting):
        return ConfigError(str(refused), slug=refused.slug, where=where, allowed=allowed, got=got)
    return ConfigError(str(found["msg"]), slug="invalid-value", where=where, allowed=allowed, got=got)


INTERRUPTED_EXIT_STATUS = 130
