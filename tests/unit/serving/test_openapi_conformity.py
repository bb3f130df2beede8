"""What /openapi.json promises is what the server does: requests that schemathesis makes up from it, right and wrong."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode, checks

from serving import auth, gateway, openapi
from serving.desk import Served
from serving.predictor import Predictor
from serving.registry import Student
from serving.settings import ServingSettings
from tests.unit.serving.desks import InProcess, desk_of

TOKEN = "for-the-tests"
SETTINGS = ServingSettings(
    token_digests=(auth.digest(TOKEN),), max_images=4, max_body_bytes=100_000, max_image_px=10_000
)
# Not every string is a picture and not every tensor fits a student: no schema can say which.
UNDECIDABLE = [checks.positive_data_acceptance]
OPERATIONS = [
    (path, method, mode)
    for path, methods in openapi.document([], "http://server/")["paths"].items()
    for method in methods
    for mode in GenerationMode
    if mode == GenerationMode.POSITIVE or "/health/" not in path  # where there is nothing to get wrong
]


@pytest.fixture(scope="module")
def described(student: Student, predictor: Predictor) -> Any:
    desk = desk_of(SETTINGS, Served(student, InProcess(predictor)), max_requests=64)
    app = gateway.application(desk, auth.Guard(SETTINGS.token_digests, None, "tokens"))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_every_answer_is_one_that_was_promised(described: Any, path: str, method: str, mode: GenerationMode) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=described[path][method.upper()].as_strategy(generation_mode=mode))
    def asking(case: Case) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=UNDECIDABLE)

    asking()
