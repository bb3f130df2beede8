"""A desk without processes, for the tests of what stands before it."""

from __future__ import annotations

import asyncio

from serving.desk import Desk, Meter, Offer, Served
from serving.predictor import Images, Predictions, Predictor
from serving.routing import Route
from serving.settings import ServingSettings


class InProcess:
    """A backend without processes; misbehaves on demand."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.is_ready = True
        self.failure: Exception | None = None
        self.delay_s = 0.0
        self.asked = 0

    async def predict(self, images: Images) -> Predictions:
        self.asked += 1
        await asyncio.sleep(self.delay_s)
        if self.failure:
            raise self.failure
        return self._predictor.predict(images)

    async def ready(self) -> bool:
        return self.is_ready


def desk_of(settings: ServingSettings, *served: Served, max_requests: int = 2, meter: Meter | None = None) -> Desk:
    """One version of each student."""
    offers = {
        each.student.name: Offer(Route(stable=each.student.version), {each.student.version: each}) for each in served
    }
    return Desk(offers, settings, max_requests, meter)
