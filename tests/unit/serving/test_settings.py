"""serving/settings.py: closed and bounded."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serving.settings import ServingSettings


@pytest.mark.parametrize(
    "wrong",
    [
        {"replica": 2},
        {"replicas": 0},
        {"cpus_per_replica": 0},
        {"max_batch_images": 0},
        {"max_queued_requests": 0},
        {"max_body_bytes": 0},
        {"max_images": 0},
        {"max_image_px": 0},
        {"request_timeout_s": 0},
        {"ready_timeout_s": float("nan")},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ServingSettings(**wrong)
