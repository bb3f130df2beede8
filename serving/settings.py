"""What an operator may choose about a server, in one closed and typed place."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pu_ray.errors import RefusedSetting, wrong_setting


class ServingSettings(BaseModel):
    """Sizes, limits and tokens of a server; every student of one server shares them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    replicas: int = Field(default=1, ge=1, description="Processes per student, and the fewest where they scale.")
    max_replicas: int = Field(
        default=1, ge=1, description="Most processes per student; more than `replicas`: they scale."
    )
    gpus_per_replica: float = Field(
        default=0.0, ge=0, description="GPUs of each, or a share of one; with any, `auto` is the torch engine."
    )
    cpus_per_replica: int = Field(default=1, ge=1, description="Cores, and so decoding and network threads, of each.")
    engine: Literal["auto", "onnx", "onnx-int8", "torch"] = Field(
        default="auto", description="Which exported network answers; auto: the fastest, as its export measured them."
    )
    placement: Literal["auto", "inside", "apart"] = Field(
        default="auto",
        description="inside: the processes that speak HTTP answer themselves; apart: every version has processes of "
        "its own, and one front asks them; auto: inside where one name is served.",
    )
    fronts: int = Field(
        default=1, ge=1, description="Processes that speak HTTP and gRPC, where versions have processes of their own."
    )
    tail: tuple[str, ...] = Field(
        default=(), description="Students that share processes, which open them on demand; * stands for all."
    )
    tail_replicas: tuple[int, int] = Field(
        default=(0, 1), description="Fewest and most of the processes that the tail shares; 0: none while nobody asks."
    )
    tail_open: int = Field(default=8, ge=1, description="Students that one such process keeps open.")
    max_batch_images: int = Field(
        default=32, ge=1, description="Most images in one forward pass, of any requests; fewer where that is faster."
    )
    max_queued_requests: int = Field(
        default=128, ge=1, description="Requests that may wait for a student; more are told to come back (503)."
    )
    max_body_bytes: int = Field(default=32 * 2**20, ge=1, description="Larger requests are refused (413).")
    max_images: int = Field(default=64, ge=1, description="Images in one request; more are refused (422).")
    max_image_px: int = Field(default=50_000_000, ge=1, description="Width x height, checked before decoding.")
    request_timeout_s: float = Field(
        default=60.0, gt=0, description="For reading a request's body (408), and again for its answer (504)."
    )
    ready_timeout_s: float = Field(default=120.0, gt=0, description="Until every student must be warm.")
    reload_s: float = Field(default=5.0, gt=0, description="Between two looks at a registry.")
    authentication: Literal["required", "off"] = Field(
        default="required", description="Whether every request but health probes must bring a token."
    )
    token_digests: tuple[str, ...] = Field(
        default=(), description="Digests `sha256:HEX` of tokens that are known; `pu-ray token` makes them."
    )
    tokens_uri: str | None = Field(
        default=None, description="File of such digests, read again while serving; readable from every node."
    )
    grpc_port: int | None = Field(
        default=None, ge=1, le=65535, description="Port for gRPC, which Ray Serve opens on every interface."
    )

    @property
    def wanted_engine(self) -> str:
        """The engine for `registry.load`."""
        return "torch" if self.engine == "auto" and self.gpus_per_replica else self.engine

    def in_tail(self, name: str) -> bool:
        """Whether the student of this name shares processes with others."""
        return name in self.tail or "*" in self.tail

    @model_validator(mode="after")
    def _tail_can_be_served(self) -> Self:
        fewest, most = self.tail_replicas
        if not 0 <= fewest <= most or most < 1:
            raise RefusedSetting(
                f"tail_replicas must be [fewest, most] with at least one, got {list(self.tail_replicas)}",
                slug="tail-replicas-out-of-order",
            )
        return self

    @model_validator(mode="after")
    def _somebody_may_ask(self) -> Self:
        if self.authentication == "required" and not self.token_digests and self.tokens_uri is None:
            raise RefusedSetting(
                "authentication needs token_digests or tokens_uri; or set authentication to off",
                slug="authentication-without-tokens",
            )
        return self


def settings_from(changes: dict[str, Any]) -> ServingSettings:
    """The settings with these changes.

    Raises:
        ConfigError: One of them is impossible.
    """
    try:
        return ServingSettings(**changes)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise wrong_setting(problem, where=where or "settings") from error
