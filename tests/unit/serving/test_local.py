"""serving/local.py: how requests share forward passes, and whom it refuses to open."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from ray import serve

from pu_ray.errors import DataError
from serving import local
from serving.predictor import Floats, Predictions, Predictor
from serving.registry import Student
from serving.settings import ServingSettings
from tests.unit.serving.students import png

SETTINGS = ServingSettings(max_batch_images=8, batch_wait_s=0.2, authentication="off")


def test_a_student_that_changed_since_is_refused(student: Student) -> None:
    planned = dataclasses.replace(student, version="another")
    with pytest.raises(DataError, match="changed since the server was started") as refusal:
        local.LocalStudent(planned, SETTINGS)
    assert refusal.value.allowed == "version another"


def test_requests_share_batches_and_get_their_own_rows(
    student: Student, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predictor, "best_batch", lambda _self, most: most)
    batches: list[list[int]] = []
    together = local._forward_together

    def counting(network: Predictor, pieces: Sequence[Floats]) -> list[Floats]:
        batches.append([len(piece) for piece in pieces])
        return together(network, pieces)

    monkeypatch.setattr(local, "_forward_together", counting)
    # Serve's batching asks its replica for one number, even in Serve's own mode for local tests.
    deployment = SimpleNamespace(max_ongoing_requests=2 * SETTINGS.max_batch_images)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(_deployment_config=deployment))
    requests = [[png(0)], [png(1), b"bad", png(2)], [png(seed) for seed in range(3, 14)], [b"bad"], [png(20)]]

    async def asking() -> list[Predictions]:
        one = local.LocalStudent(student, SETTINGS)
        return await asyncio.gather(*map(one.predict, requests))

    for images, answer in zip(requests, asyncio.run(asking()), strict=True):
        expected = predictor.predict(images)
        np.testing.assert_allclose(answer.logits_NK, expected.logits_NK, rtol=1e-5, atol=1e-5)
        assert {position: error.code for position, error in answer.failures.items()} == {
            position: error.code for position, error in expected.failures.items()
        }
    assert max(map(sum, batches)) <= SETTINGS.max_batch_images
    assert sum(map(sum, batches)) == 15
    assert any(len(pieces) > 1 for pieces in batches)


def test_requests_go_alone_where_a_batch_gains_nothing(
    student: Student, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predictor, "best_batch", lambda _self, _most: 1)
    requests = [[png(0)], [png(1), b"bad", png(2)], [png(seed) for seed in range(3, 24)], [b"bad"]]

    async def asking() -> list[Predictions]:
        one = local.LocalStudent(student, SETTINGS)
        return await asyncio.gather(*map(one.predict, requests))

    for images, answer in zip(requests, asyncio.run(asking()), strict=True):
        expected = predictor.predict(images)
        np.testing.assert_allclose(answer.logits_NK, expected.logits_NK, rtol=1e-5, atol=1e-5)
        assert list(answer.failures) == list(expected.failures)
