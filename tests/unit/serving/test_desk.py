"""serving/desk.py: who answers, how many may be inside, and what a shadow may do."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter

import numpy as np
import pytest

from serving.desk import Desk, Offer, Served, Unavailable
from serving.predictor import Predictions, Predictor
from serving.registry import Student
from serving.routing import Route
from serving.settings import ServingSettings
from serving.tensors import ProtocolError
from tests.unit.serving.desks import InProcess, desk_of
from tests.unit.serving.students import png

SETTINGS = ServingSettings(authentication="off", request_timeout_s=0.5)


class Counting:
    """A meter that remembers."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, int]] = []
        self.shadows: list[tuple[str, int, int]] = []

    def responded(self, route: str, status: int) -> None:
        pass

    def answered(self, student: Student, predictions: Predictions, seconds: float) -> None:
        assert seconds >= 0
        self.answers.append((student.version, len(predictions.logits_NK)))

    def shadowed(self, student: Student, same: int, images: int) -> None:
        self.shadows.append((student.version, same, images))


def versions(student: Student, route: Route, *backends: InProcess) -> dict[str, Offer]:
    names = [student.version, *(f"v{number}" for number in range(2, 2 + len(backends) - 1))]
    served = [
        Served(dataclasses.replace(student, version=name), backend)
        for name, backend in zip(names, backends, strict=True)
    ]
    return {"pets": Offer(route, {each.student.version: each for each in served})}


def test_requests_are_shared_out_as_the_route_says(student: Student, backend: InProcess) -> None:
    route = Route(stable=student.version, canary="v2", canary_share=0.3)
    desk = Desk(versions(student, route, backend, backend), SETTINGS, 2)
    counts = Counter(desk.served("pets").student.version for _ in range(4000))
    assert 0.26 < counts["v2"] / 4000 < 0.34
    assert desk.served("pets", "v2").student.version == "v2"
    assert desk.served("pets", "").student.version in (student.version, "v2")


@pytest.mark.parametrize(("name", "version"), [("cars", None), ("pets", "v3"), ("pets", "../v2"), ("", None)])
def test_whom_nobody_knows_is_not_found(student: Student, backend: InProcess, name: str, version: str | None) -> None:
    with pytest.raises(ProtocolError) as refusal:
        desk_of(SETTINGS, Served(student, backend)).served(name, version)
    assert refusal.value.status == 404


def test_places_are_given_back(student: Student, backend: InProcess) -> None:
    desk = desk_of(SETTINGS, Served(student, backend), max_requests=1)
    with desk.admitted(), pytest.raises(Unavailable), desk.admitted():
        pass
    with pytest.raises(RuntimeError), desk.admitted():
        raise RuntimeError
    with desk.admitted():
        pass


def test_answers_are_counted(student: Student, backend: InProcess) -> None:
    meter = Counting()
    desk = desk_of(SETTINGS, Served(student, backend), meter=meter)
    asyncio.run(desk.predict(desk.served("pets"), [png(0), png(1)]))
    assert meter.answers == [(student.version, 2)]


def test_a_meter_that_breaks_costs_no_request(
    student: Student, backend: InProcess, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Counting):
        def answered(self, student: Student, predictions: Predictions, seconds: float) -> None:
            raise UnicodeEncodeError("ascii", "Ü", 0, 1, "no")

    desk = desk_of(SETTINGS, Served(student, backend), meter=Broken())
    assert len(asyncio.run(desk.predict(desk.served("pets"), [png(0)])).logits_NK) == 1
    assert "a metric could not be recorded" in caplog.text


def test_a_request_under_way_ends_as_it_began(student: Student, predictor: Predictor) -> None:
    slow, other = InProcess(predictor), InProcess(predictor)
    slow.delay_s = 0.2
    desk = desk_of(SETTINGS, Served(student, slow))

    async def replaced_meanwhile() -> Predictions:
        task = asyncio.create_task(desk.predict(desk.served("pets"), [png(0)]))
        await asyncio.sleep(0.05)
        newer = dataclasses.replace(student, version="v2")
        desk.replace({"pets": Offer(Route(stable="v2"), {"v2": Served(newer, other)})}, 2)
        assert desk.served("pets").student.version == "v2"
        return await task

    answer = asyncio.run(replaced_meanwhile())
    np.testing.assert_allclose(answer.logits_NK, predictor.predict([png(0)]).logits_NK)
    assert (slow.asked, other.asked) == (1, 0)


# -- shadows --------------------------------------------------------------------------------------------------


def shadowed(student: Student, stable: InProcess, shadow: InProcess, meter: Counting, requests: int = 1) -> float:
    desk = Desk(versions(student, Route(stable=student.version, shadow="v2"), stable, shadow), SETTINGS, 200, meter)

    async def asking() -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await asyncio.gather(*(desk.predict(desk.served("pets"), [png(0), b"bad", png(1)]) for _ in range(requests)))
        taken = loop.time() - started
        await asyncio.sleep(0.7)
        return taken

    return asyncio.run(asking())


def test_a_shadow_is_compared_and_keeps_nobody_waiting(student: Student, predictor: Predictor) -> None:
    meter, shadow = Counting(), InProcess(predictor)
    shadow.delay_s = 0.4
    assert shadowed(student, InProcess(predictor), shadow, meter) < 0.3
    assert meter.shadows == [("v2", 2, 2)]


@pytest.mark.parametrize("failure", [Unavailable("gone"), RuntimeError("broken"), MemoryError()])
def test_what_a_shadow_does_reaches_no_client(student: Student, predictor: Predictor, failure: Exception) -> None:
    meter, shadow = Counting(), InProcess(predictor)
    shadow.failure = failure
    shadowed(student, InProcess(predictor), shadow, meter)
    assert meter.shadows == []
    assert meter.answers == [(student.version, 3)]


def test_copies_do_not_pile_up(student: Student, predictor: Predictor) -> None:
    meter, shadow = Counting(), InProcess(predictor)
    shadow.delay_s = 0.4
    shadowed(student, InProcess(predictor), shadow, meter, requests=100)
    assert len(meter.answers) == 100
    assert shadow.asked == 64
