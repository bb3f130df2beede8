"""pu_ray/ray_watch.py: what an executor holds is told, and nothing that goes wrong in it is felt."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from ray.data import DataContext

from pu_ray import ray_watch
from pu_ray.progress import Silent
from pu_ray.usage import Meter


class Listening(Silent):
    def __init__(self):
        self.told = []

    def workers(self, count, unit):
        self.told.append((count, unit))


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(ray_watch.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(ray_watch, "Meter", lambda: Meter(lambda: Clock.now))  # its default was bound before
    return Clock


def executor(running, tasks=0, cpu=0.0, gpu=0.0):
    """As much of Ray Data's as is looked at."""
    operators = [
        SimpleNamespace(get_actor_info=lambda: SimpleNamespace(running=0), num_active_tasks=lambda: 0),
        SimpleNamespace(get_actor_info=lambda: SimpleNamespace(running=running), num_active_tasks=lambda: tasks),
    ]
    manager = SimpleNamespace(get_global_running_usage=lambda: SimpleNamespace(cpu=cpu, gpu=gpu))
    return SimpleNamespace(_topology=operators, _resource_manager=manager)


def test_actors_and_what_they_hold_are_told(clock):
    progress = Listening()
    with ray_watch.watching(progress, of_actors=True) as watch:
        (callback,) = [made() for made in DataContext.get_current().custom_execution_callback_classes]
        callback.on_execution_step(executor(2, cpu=2, gpu=1))
        clock.now += 0.5
        callback.on_execution_step(executor(7, cpu=4, gpu=1))  # too soon to count again
        clock.now += 1799.5
        callback.on_execution_step(executor(3, cpu=0, gpu=0))
        seen = watch.seen(100, None)
    assert progress.told == [(2, "actors"), (3, "actors"), (0, "actors")]
    assert (seen.unit, seen.most, seen.peak_bytes) == ("actors", 3, 100)
    assert seen.cpu_hours == pytest.approx((2 * 0.5 + 4 * 1799.5) / 3600, abs=1e-5)
    assert seen.gpu_hours == pytest.approx(0.5, abs=1e-5)


def test_a_pass_that_is_over_within_a_second_had_actors_too(clock):
    with ray_watch.watching(Listening(), of_actors=True) as watch:
        for running in (0, 0, 2):
            watch.step(executor(running))
            clock.now += 0.1
        assert watch.seen(None, None).most == 2


def test_tasks_are_counted_but_not_told(clock):
    progress = Listening()
    with ray_watch.watching(progress, of_actors=False) as watch:
        watch.step(executor(0, tasks=5, cpu=1.25))
        seen = watch.seen(None, None)
    assert (seen.unit, seen.most) == ("tasks", 5)
    assert progress.told == []


def test_an_executor_that_looks_otherwise_costs_the_figures_and_nothing_else(clock):
    with ray_watch.watching(Listening(), of_actors=True) as watch:
        watch.step(executor(2, cpu=2))
        watch.step(SimpleNamespace())
        watch.step(executor(9, cpu=9))
        seen = watch.seen(7, None)
    assert (seen.cpu_hours, seen.gpu_hours, seen.peak_bytes) == (None, None, 7)


def test_a_pass_that_nothing_was_seen_of_knows_nothing():
    with ray_watch.watching(Listening(), of_actors=True) as watch:
        seen = watch.seen(None, None)
    assert (seen.most, seen.cpu_hours, seen.gpu_hours) == (None, None, None)


def test_the_context_is_left_as_it_was_and_what_travels_in_it_holds_nothing():
    context = DataContext.get_current()
    before = list(context.custom_execution_callback_classes)
    added = []

    def fail():
        with ray_watch.watching(Listening(), of_actors=True):
            added.extend(context.custom_execution_callback_classes[len(before) :])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    [callback] = added
    assert pickle.loads(pickle.dumps(callback)) is callback
    assert context.custom_execution_callback_classes == before
    callback().on_execution_step(SimpleNamespace())  # nobody watches any more
