"""Which version of a student answers: stable, a share of requests for a canary, copies of requests for a shadow."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pu_ray.errors import RefusedSetting

STABLE = "stable"
CANARY = "canary"


class Route(BaseModel):
    """How requests for one name are shared out.

    A request that names a version or an alias gets that one; all others go to the stable version, but for the canary's
    share. The shadow sees copies of what the stable version answers; its own answers only count in the metrics.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stable: str = Field(min_length=1, description="Version that answers.")
    canary: str | None = Field(default=None, description="Version that answers a share of the requests.")
    canary_share: float = Field(default=0.0, ge=0.0, le=1.0, description="Of the requests that name no version.")
    shadow: str | None = Field(default=None, description="Version that gets copies of the stable version's requests.")
    aliases: dict[str, str] = Field(default_factory=dict, description="Further names of versions.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.canary is None and self.canary_share:
            raise RefusedSetting("canary_share needs a canary", slug="share-without-canary")
        if self.canary == self.stable:
            raise RefusedSetting("the canary must be another version than the stable one", slug="canary-is-stable")
        if self.shadow == self.stable:
            raise RefusedSetting("the shadow must be another version than the stable one", slug="shadow-is-stable")
        if taken := sorted({STABLE, CANARY} & set(self.aliases)):
            raise RefusedSetting(f"these names are taken: {', '.join(taken)}", slug="name-taken")
        return self

    @property
    def versions(self) -> frozenset[str]:
        """All that must be running."""
        named = (self.stable, self.canary, self.shadow, *self.aliases.values())
        return frozenset(version for version in named if version is not None)

    def pick(self, chance: float) -> str:
        """The version for a request that names none.

        Args:
            chance: Drawn from [0, 1) for this request.
        """
        return self.canary if self.canary is not None and chance < self.canary_share else self.stable

    def named(self, name: str) -> str:
        """The version behind an alias; anything else is a version already."""
        own = {STABLE: self.stable, **self.aliases} | ({} if self.canary is None else {CANARY: self.canary})
        return own.get(name, name)
