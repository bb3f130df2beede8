"""What a Ray Data pipeline holds of the cluster while it runs: told by its executor, at no cost to the rows.

Ray Data calls back at each step of its scheduling loop (`DataContext.custom_execution_callback_classes`), in a thread
of its own. That is public; what is read there of the executor is not, so nothing that goes wrong in it reaches the run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.data import DataContext

from pu_ray.progress import Progress
from pu_ray.usage import Meter, Workers

_COUNT_EVERY_S = 1.0  # they are numbers that lie in this process; nobody is asked

_LOGGER = logging.getLogger(__name__)


class Watch:
    """What was seen of one pass.

    Args:
        progress: Is told how many actors live; tasks come and go too fast for anybody to read.
        of_actors: Whether a pool of actors does the work.
    """

    def __init__(self, progress: Progress, of_actors: bool) -> None:
        self._progress = progress
        self._of_actors = of_actors
        self._meter = Meter()
        self._lock = threading.Lock()
        self._counted_at = float("-inf")
        self._most = 0
        self._steps = 0
        self._broken = False

    def step(self, executor: Any) -> None:
        """Look at the executor; runs in its thread."""
        if self._broken:
            return
        try:
            self._look(executor)
        except Exception:
            # Figures for people: another version of Ray may keep them elsewhere, and the images matter more.
            self._broken = True
            _LOGGER.debug("what Ray Data holds is not known", exc_info=True)

    def _look(self, executor: Any) -> None:
        held = executor._resource_manager.get_global_running_usage()
        with self._lock:
            self._meter.hold(held.cpu, held.gpu)
            self._steps += 1
        # Until there is somebody at every step: a short pass is over before it would be looked at twice.
        if (now := time.monotonic()) - self._counted_at < _COUNT_EVERY_S and self._most:
            return
        self._counted_at = now
        operators = list(executor._topology)
        if self._of_actors:
            count = sum(operator.get_actor_info().running for operator in operators)
            self._progress.workers(count, "actors")
        else:
            count = sum(operator.num_active_tasks() for operator in operators)
        self._most = max(self._most, count)

    def seen(self, peak_bytes: int | None, gpu_peak_bytes: int | None) -> Workers:
        """What the pass has taken so far, its processes' own peaks put beside it."""
        with self._lock:
            cpu_hours, gpu_hours = self._meter.hours()
        known = self._steps > 0 and not self._broken
        return Workers(
            unit="actors" if self._of_actors else "tasks",
            most=self._most or None,
            peak_bytes=peak_bytes,
            gpu_peak_bytes=gpu_peak_bytes,
            cpu_hours=round(cpu_hours, 6) if known else None,
            gpu_hours=round(gpu_hours, 6) if known else None,
        )


_watch: Watch | None = None


class _Callback:
    """What Ray Data makes for each execution; travels to workers with the context, so it holds nothing."""

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing is held yet."""

    def on_execution_step(self, executor: Any) -> None:
        """Tell whoever watches."""
        if (watch := _watch) is not None:
            watch.step(executor)

    def after_execution_succeeds(self, executor: Any) -> None:
        """The watch ends with its block."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """The watch ends with its block."""


@contextmanager
def watching(progress: Progress, of_actors: bool) -> Iterator[Watch]:
    """Watch what is executed inside the block; the dataset must be made inside, too."""
    global _watch
    context = DataContext.get_current()
    before = list(context.custom_execution_callback_classes)
    context.custom_execution_callback_classes = [*before, _Callback]  # type: ignore[list-item]
    _watch = Watch(progress, of_actors)
    try:
        yield _watch
    finally:
        _watch = None
        if of_actors:
            progress.workers(0, "actors")
        context.custom_execution_callback_classes = before
