"""What an operator may choose about a server, in one closed and typed place."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ServingSettings(BaseModel):
    """Sizes and limits of a server; every student of one server shares them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    replicas: int = Field(default=1, ge=1, description="Processes per student.")
    cpus_per_replica: int = Field(default=1, ge=1, description="Cores, and so decoding and network threads, of each.")
    max_batch_images: int = Field(default=32, ge=1, description="Images in one forward pass, of any requests.")
    batch_wait_s: float = Field(default=0.005, ge=0, le=10, description="How long the first image waits for company.")
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
