"""What a stage tells the person who waits: how many images are done, of how many, and until when.

Stages know only `Progress`; how it looks is the console's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY_S = 60.0


class Progress(Protocol):
    """A counter somebody may be watching."""

    def start(self, total: int, unit: str) -> None:
        """Begin counting to `total`; a second call begins anew."""
        ...

    def advance(self, count: int) -> None:
        """Count further."""
        ...

    def note(self, message: str) -> None:
        """Say something in passing."""
        ...

    def found(self, files: int) -> None:
        """Show that a listing goes on: this many files so far."""
        ...

    def broken(self, count: int) -> None:
        """Count images that turned out unusable; `advance` counts them too."""
        ...


class Silent:
    """A counter nobody watches."""

    def start(self, total: int, unit: str) -> None:
        """See `Progress`."""

    def advance(self, count: int) -> None:
        """See `Progress`."""

    def note(self, message: str) -> None:
        """See `Progress`."""

    def found(self, files: int) -> None:
        """See `Progress`."""

    def broken(self, count: int) -> None:
        """See `Progress`."""


class Narrator:
    """Narration on stderr: bars with ETA on a terminal, plain lines elsewhere."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """One line of narration; no markup is interpreted."""
        self._console.print(message, markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Progress of one stage."""
        if not self._console.is_terminal:
            yield _Lines(self, name)
            return
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  {task.fields[rate]}{task.fields[broken]}"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console, transient=True) as bars:
            yield _Bar(bars, name, self)


class _Bar:
    def __init__(self, bars: RichProgress, name: str, narrator: Narrator) -> None:
        self._bars = bars
        self._narrator = narrator
        self._task = bars.add_task(name, total=None, unit="", rate="", broken="")
        self._started = time.monotonic()
        self._broken = 0

    def start(self, total: int, unit: str) -> None:
        self._started = time.monotonic()
        self._broken = 0
        self._bars.reset(self._task, total=total, unit=unit, rate="", broken="")

    def advance(self, count: int) -> None:
        done = self._bars.tasks[self._task].completed + count
        rate = done / max(time.monotonic() - self._started, 1e-9)
        self._bars.update(self._task, advance=count, rate=f"{rate:,.0f}/s")

    def note(self, message: str) -> None:
        self._narrator.say(message)

    def found(self, files: int) -> None:
        self._bars.reset(self._task, total=None, completed=files, unit="files listed", rate="")

    def broken(self, count: int) -> None:
        self._broken += count
        if self._broken:
            self._bars.update(self._task, broken=f"  {self._broken:,} broken")


class _Lines:
    def __init__(self, narrator: Narrator, name: str) -> None:
        self._narrator = narrator
        self._name = name
        self._total, self._done, self._broken, self._unit = 0, 0, 0, ""
        self._started = self._spoken = time.monotonic()

    def start(self, total: int, unit: str) -> None:
        self._total, self._done, self._broken, self._unit = total, 0, 0, unit
        self._started = self._spoken = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._spoken < _LINE_EVERY_S:
            return
        self._spoken = now
        if not self._done:
            self._narrator.say(
                f"  {self._name}: {now - self._started:.0f} s, nothing done yet of {self._total:,} {self._unit}"
            )
            return
        rate = self._done / max(now - self._started, 1e-9)
        remaining = max(self._total - self._done, 0) / rate
        broken = f", {self._broken:,} broken" if self._broken else ""
        self._narrator.say(
            f"  {self._name}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, "
            f"{remaining:,.0f} s left{broken}"
        )

    def note(self, message: str) -> None:
        self._narrator.say(message)

    def found(self, files: int) -> None:
        now = time.monotonic()
        if now - self._spoken >= _LINE_EVERY_S:
            self._spoken = now
            self._narrator.say(f"  {self._name}: listing, {files:,} files so far")

    def broken(self, count: int) -> None:
        self._broken += count
