"""What a stage tells the person who waits: how many images are done, of how many, and until when.

Stages know only `Progress`; how it looks is the console's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console

from pu_ray.board import BEFORE, Board, counted

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

    def workers(self, count: int, unit: str) -> None:
        """Say how many work at it now: `actors` of a pool, or `workers` of a training."""
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

    def workers(self, count: int, unit: str) -> None:
        """See `Progress`."""


class Narrator:
    """Narration on stderr: one live table of the stages on a terminal, plain lines elsewhere.

    Args:
        quiet: Say nothing.
        live: Whether a terminal gets the table; Ray's own logs would tear it.
    """

    def __init__(self, quiet: bool = False, live: bool = True) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._live = live
        self._board: Board | None = None

    def say(self, message: str) -> None:
        """One line of narration; no markup is interpreted."""
        self._console.print(message, markup=False)

    @contextmanager
    def stages(self, rows: Sequence[tuple[str | None, str]]) -> Iterator[None]:
        """Show these stages during the block, where somebody has a terminal.

        Args:
            rows: Of each the name of what it is a part of, or None, and its own name.
        """
        if not self._has_terminal:
            yield
            return
        with self._shown(rows, transient=False):
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Progress of one stage: one of `stages`, or one that is all there is."""
        if not self._has_terminal:
            yield _Lines(self, name)
        elif self._board is not None:
            with self._board.at_work(name) as row:
                yield row
        else:
            with self._shown([(None, name)], transient=True) as board, board.at_work(name) as row:
                yield row

    def done(self, name: str, seconds: float, counts: Mapping[str, int]) -> None:
        """A stage has published its result."""
        words = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in counts.items())
        if self._board is None:
            self.say(f"{name:<12} {seconds:6.1f} s  {words}")
            return
        self._board[name].seconds, self._board[name].words = seconds, words

    def done_before(self, name: str) -> None:
        """A stage's result is there already; only a table has a place for that."""
        if self._board is not None:
            self._board[name].state = BEFORE

    @property
    def _has_terminal(self) -> bool:
        console = self._console
        return self._live and console.is_terminal and not console.is_dumb_terminal and not console.quiet

    @contextmanager
    def _shown(self, rows: Sequence[tuple[str | None, str]], transient: bool) -> Iterator[Board]:
        board = Board(rows, self.say)
        with board.shown(self._console, transient):
            self._board = board
            try:
                yield board
            finally:
                self._board = None


class _Lines:
    def __init__(self, narrator: Narrator, name: str) -> None:
        self._narrator = narrator
        self._name = name
        self._total, self._done, self._broken, self._unit = 0, 0, 0, ""
        self._workers: tuple[int, str] | None = None
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
                f"{self._who()}"
            )
            return
        rate = self._done / max(now - self._started, 1e-9)
        remaining = max(self._total - self._done, 0) / rate
        broken = f", {self._broken:,} broken" if self._broken else ""
        self._narrator.say(
            f"  {self._name}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, "
            f"{remaining:,.0f} s left{self._who()}{broken}"
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

    def workers(self, count: int, unit: str) -> None:
        self._workers = count, unit

    def _who(self) -> str:
        known = self._workers is not None and (self._workers[0] or not self._done)
        return f", {counted(*self._workers)}" if known and self._workers is not None else ""
