"""serving/local.py: how requests share forward passes, and whom it refuses to open."""

from __future__ import annotations

import asyncio
import dataclasses
import threading

import numpy as np
import pytest

from pu_ray.errors import DataError
from serving import local
from serving.predictor import Floats, Images, Predictions, Predictor, Prepared
from serving.registry import Student
from serving.settings import ServingSettings
from tests.unit.serving.students import png

SETTINGS = ServingSettings(max_batch_images=8, authentication="off")


def test_a_student_that_changed_since_is_refused(student: Student) -> None:
    planned = dataclasses.replace(student, version="another")
    with pytest.raises(DataError, match="changed since the server was started") as refusal:
        local.LocalStudent(planned, SETTINGS)
    assert refusal.value.allowed == "version another"


REQUESTS = [[png(0)], [png(1), b"bad", png(2)], [png(seed) for seed in range(3, 14)], [b"bad"], [png(20)]]


def answers(student: Student, requests: list[list[bytes]], **changes: int) -> list[Predictions]:
    """What a student says to requests that come all at once."""

    async def asking() -> list[Predictions]:
        one = local.LocalStudent(student, SETTINGS.model_copy(update=changes))
        return await asyncio.gather(*map(one.predict, requests))

    return asyncio.run(asking())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each forward pass, once a student is open."""
    images: list[int] = []
    forward = Predictor.forward

    def counting(self: Predictor, pixels: Floats) -> Floats:
        images.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(Predictor, "forward", counting)
    return images


@pytest.fixture
def all_wait(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keeps every thread at its first image until it is set."""
    go, prepare = threading.Event(), Predictor.prepare

    def waiting(self: Predictor, images: Images) -> Prepared:
        assert go.wait(30)
        return prepare(self, images)

    monkeypatch.setattr(Predictor, "prepare", waiting)
    return go


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("threads", [1, 3])
def test_requests_share_passes_and_get_their_own_rows(
    student: Student,
    predictor: Predictor,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[int],
    batch: int,
    threads: int,
) -> None:
    monkeypatch.setattr(Predictor, "best_batch", lambda _self, _most: batch)
    expected = [predictor.predict(images) for images in REQUESTS]
    passes.clear()
    for one, other in zip(answers(student, REQUESTS, cpus_per_replica=threads), expected, strict=True):
        np.testing.assert_allclose(one.logits_NK, other.logits_NK, rtol=1e-5, atol=1e-5)
        assert {position: error.code for position, error in one.failures.items()} == {
            position: error.code for position, error in other.failures.items()
        }
    assert max(passes) <= batch
    assert sum(passes) == 15


def test_what_comes_meanwhile_goes_together(
    student: Student, monkeypatch: pytest.MonkeyPatch, passes: list[int], all_wait: threading.Event
) -> None:
    monkeypatch.setattr(Predictor, "best_batch", lambda _self, _most: 4)

    async def asking() -> None:
        one = local.LocalStudent(student, SETTINGS)
        first = asyncio.create_task(one.predict([png(0)]))
        await asyncio.sleep(0.2)  # it is at work
        others = [asyncio.create_task(one.predict([png(seed)])) for seed in range(1, 8)]
        await asyncio.sleep(0)
        all_wait.set()
        await asyncio.gather(first, *others)

    asyncio.run(asking())
    assert passes == [1, 4, 3]


def test_nobody_works_for_whoever_stopped_waiting(
    student: Student, monkeypatch: pytest.MonkeyPatch, passes: list[int], all_wait: threading.Event
) -> None:
    monkeypatch.setattr(Predictor, "best_batch", lambda _self, _most: 1)

    async def asking() -> None:
        one = local.LocalStudent(student, SETTINGS)
        first, left, last = (asyncio.create_task(one.predict([png(seed)])) for seed in range(3))
        await asyncio.sleep(0.2)
        left.cancel()
        await asyncio.sleep(0)
        all_wait.set()
        await asyncio.gather(first, last)
        assert left.cancelled()

    asyncio.run(asking())
    assert passes == [1, 1]


def test_an_unexpected_failure_reaches_whoever_asked(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "best_batch", lambda _self, _most: 4)

    async def asking() -> None:
        one = local.LocalStudent(student, SETTINGS)
        with monkeypatch.context() as broken:
            broken.setattr(Predictor, "forward", lambda _self, _pixels: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await one.predict([png(0)])
        assert np.isfinite((await one.predict([png(0)])).logits_NK).all()

    asyncio.run(asking())
