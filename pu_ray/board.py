"""The live view of a terminal: every stage of a run in a row of one table that stands still below what is said.

Rows change a few times a second and are never reordered. Rows of one group (a control) share a line until one of them
is at work, and what the terminal has no room for is folded into a line before and a line after the stage at work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WAITING, WORKING, DONE, BEFORE, FAILED, STOPPED, NOT_RUN = (
    "waiting",
    "at work",
    "done",
    "done before",
    "failed",
    "stopped",
    "not run",
)
_STYLES = {WORKING: "bold", DONE: "green", FAILED: "bold red", STOPPED: "yellow"}
_STATE_CHARS = max(map(len, (WAITING, WORKING, DONE, BEFORE, FAILED, STOPPED, NOT_RUN)))
_TIME_CHARS = 7
_GAP_CHARS = 2
_FACTS_CHARS = 64  # what the facts of a stage at work take beside its bar, more or less
_LEAST_BAR_CHARS, _MOST_BAR_CHARS = 8, 30
_REFRESHES_PER_S = 4
_SPARE_LINES = 2  # of the terminal's height: for the cursor, and what a person types


def clock(seconds: float) -> str:
    """A length of time, as people read it: `12 s`, `3:25`, `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _spent(seconds: float) -> str:
    """The same of what is over, where a tenth of a second tells quick from instant."""
    return f"{seconds:.1f} s" if seconds < 9.95 else clock(seconds)


def counted(count: int, unit: str) -> str:
    """A number of things that have a plural in s."""
    return f"{count:,} {unit.removesuffix('s') if count == 1 else unit}"


class Row:
    """One stage: a `Progress` that a table shows.

    Args:
        name: Of the stage; no two rows of a board share it.
        group: Name of what it is a part of, or nothing.
        say: Prints a line above the table.
    """

    def __init__(self, name: str, group: str | None, say: Callable[[str], None]) -> None:
        self.name = name
        self.group = group
        self.state = WAITING
        self.seconds = 0.0
        self.words = ""
        self._say = say
        self._began = 0.0
        self._reset(None, "")

    def _reset(self, total: int | None, unit: str) -> None:
        self._counted_from = time.monotonic()
        self._total, self._unit, self._count, self._broken = total, unit, 0, 0
        self._listed = 0
        self._workers: tuple[int, str] | None = None

    # -- a Progress --

    def start(self, total: int, unit: str) -> None:
        """See `Progress`."""
        workers = self._workers
        self._reset(total, unit)
        self._workers = workers

    def advance(self, count: int) -> None:
        """See `Progress`."""
        self._count += count

    def note(self, message: str) -> None:
        """See `Progress`."""
        self._say(message)

    def found(self, files: int) -> None:
        """See `Progress`."""
        self._listed = files

    def broken(self, count: int) -> None:
        """See `Progress`."""
        self._broken += count

    def workers(self, count: int, unit: str) -> None:
        """See `Progress`."""
        self._workers = count, unit

    # -- its life --

    def begin(self) -> None:
        """It is at work from now on."""
        self._reset(None, "")
        self._began = time.monotonic()
        self.state = WORKING

    def end(self, state: str) -> None:
        """It no longer is."""
        self.seconds = time.monotonic() - self._began
        self.state = state

    @property
    def elapsed_s(self) -> float:
        """How long it has been at work, or was."""
        return time.monotonic() - self._began if self.state == WORKING else self.seconds

    @property
    def share(self) -> float | None:
        """How much of the count is done, from 0 to 1; None where there is nothing to count."""
        return min(self._count / self._total, 1.0) if self._total else None

    def facts(self) -> list[str]:
        """What is known of a stage at work, the most important first."""
        if self._total is None:
            told = [f"listing, {counted(self._listed, 'files')} so far"] if self._listed else []
        else:
            rate = self._count / max(time.monotonic() - self._counted_from, 1e-9)
            told = [f"{self._count:,} of {self._total:,} {self._unit}"]
            if self._count:
                left = max(self._total - self._count, 0) / rate
                told += [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s", f"{clock(left)} left"]
        # They are counted now and then: where something was done, there was somebody who did it.
        if self._workers is not None and (self._workers[0] or not self._count):
            told.append(counted(*self._workers))
        if self._broken:
            told.append(f"{self._broken:,} broken")
        return told


@dataclass(frozen=True)
class Line:
    """A line of the table, made of one row or of several.

    Attributes:
        name: What it is about.
        state: How it stands.
        time: How long it took so far; empty where that says nothing.
        facts: What else there is to say; of a stage at work they are packed into as many lines as they need.
        share: For the bar; None: no bar.
    """

    name: str
    state: str
    time: str = ""
    facts: list[str] = field(default_factory=list)
    share: float | None = None


class Board:
    """The rows, and how they are shown.

    Args:
        rows: Group, or nothing, and name of each.
        say: Prints a line above the table.
    """

    def __init__(self, rows: Sequence[tuple[str | None, str]], say: Callable[[str], None]) -> None:
        self._rows = {name: Row(name, group, say) for group, name in rows}
        self._ended = False
        # Fixed from the start: a column that changes its width makes everything jump.
        titles = [row.group or row.name for row in self._rows.values()]
        self._name_chars = max(map(len, [*self._rows, *titles, "99 more"]))

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    @contextmanager
    def shown(self, console: Console, transient: bool) -> Iterator[None]:
        """Keep the table on the screen during the block; afterwards its last state stays there, or nothing does."""
        live = Live(
            get_renderable=lambda: self,
            console=console,
            refresh_per_second=_REFRESHES_PER_S,
            transient=transient,
            # Results go to stdout, which may be a file.
            redirect_stdout=sys.stdout.isatty(),
        )
        with live:
            try:
                yield
            finally:
                self._end()

    @contextmanager
    def at_work(self, name: str) -> Iterator[Row]:
        """The row of a stage that works during the block."""
        row = self._rows[name]
        row.begin()
        try:
            yield row
        except Exception:
            row.end(FAILED)
            raise
        except BaseException:
            row.end(STOPPED)
            raise
        row.end(DONE)

    def _end(self) -> None:
        for row in self._rows.values():
            if row.state == WAITING:
                row.state = NOT_RUN
        self._ended = True

    # -- lines --

    def _lines(self) -> list[Line]:
        lines: list[Line] = []
        seen: set[str] = set()
        for row in self._rows.values():
            if row.group is None:
                lines.append(_of_row(row))
            elif row.group not in seen:
                seen.add(row.group)
                lines += _of_group(row.group, [each for each in self._rows.values() if each.group == row.group])
        return lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        beside = self._name_chars + _STATE_CHARS + _TIME_CHARS + 3 * _GAP_CHARS
        chars = max(10, options.max_width - beside)
        table = Table.grid(padding=(0, _GAP_CHARS, 0, 0))
        table.add_column(width=self._name_chars, no_wrap=True, overflow="ellipsis")
        table.add_column(width=_STATE_CHARS, no_wrap=True)
        table.add_column(width=_TIME_CHARS, no_wrap=True, justify="right")
        table.add_column(width=chars, no_wrap=True, overflow="ellipsis")
        lines = self._lines()
        if not self._ended:
            lines = _fitting(lines, max(1, console.size.height - _SPARE_LINES), lambda line: _height(line, chars))
        for line in lines:
            style = _STYLES.get(line.state, "dim")
            name = Text(line.name, "" if line.state in _STYLES else "dim")
            table.add_row(name, Text(line.state, style), Text(line.time), _details(line, chars))
        yield table


def _of_row(row: Row) -> Line:
    if row.state == WORKING:
        return Line(row.name, row.state, clock(row.elapsed_s), row.facts(), row.share)
    spent = _spent(row.seconds) if row.state in (DONE, FAILED, STOPPED) else ""
    return Line(row.name, row.state, spent, [row.words] if row.words else [])


def _of_group(name: str, rows: Sequence[Row]) -> list[Line]:
    """One line for all, or while it is under way one for each."""
    states = {row.state for row in rows}
    stages = counted(len(rows), "stages")
    for state in (WAITING, NOT_RUN, BEFORE):
        if states == {state}:
            return [Line(name, state, facts=[stages])]
    if states <= {DONE, BEFORE}:
        return [Line(name, DONE, _spent(sum(row.seconds for row in rows if row.state == DONE)), [stages])]
    return [_of_row(row) for row in rows]


def _fitting(lines: list[Line], height: int, height_of: Callable[[Line], int]) -> list[Line]:
    """As many lines around the one at work as there is room for, what is before and after them folded into one each."""
    if sum(map(height_of, lines)) <= height:
        return lines
    unfinished = [place for place, line in enumerate(lines) if line.state not in (DONE, BEFORE)]
    at = next((place for place in unfinished if lines[place].state == WORKING), (unfinished or [len(lines) - 1])[0])
    room = height - height_of(lines[at]) - 2  # of the folds
    first, last = at, at
    while room > 0 and (first > 0 or last < len(lines) - 1):
        # What comes next is worth more than what is over.
        if last < len(lines) - 1:
            last, room = last + 1, room - 1
        if room > 0 and first > 0:
            first, room = first - 1, room - 1
    if room < 0:
        return [lines[at]]
    return [*_fold(lines[:first]), *lines[first : last + 1], *_fold(lines[last + 1 :])]


def _fold(lines: list[Line]) -> list[Line]:
    if len(lines) < 2:
        return lines
    states = {line.state for line in lines}
    return [Line(f"{len(lines)} more", WAITING if WAITING in states else DONE if DONE in states else lines[0].state)]


# -- the facts of a line -----------------------------------------------------------------------------------


def _bar_chars(line: Line, chars: int) -> int:
    room = min(chars - _FACTS_CHARS - _GAP_CHARS, _MOST_BAR_CHARS)
    return room if line.share is not None and room >= _LEAST_BAR_CHARS else 0


def _packed(line: Line, chars: int) -> list[str]:
    """The facts, as many to a line as there is room for; of what is over, one line."""
    gap = " " * _GAP_CHARS
    if line.state != WORKING:
        return [gap.join(line.facts)]
    bar = _bar_chars(line, chars)
    room = chars - bar - (_GAP_CHARS if bar else 0)
    packed: list[str] = []
    for fact in line.facts:
        if packed and len(packed[-1]) + len(gap) + len(fact) <= room:
            packed[-1] += gap + fact
        else:
            packed.append(fact)
    return packed or [""]


def _height(line: Line, chars: int) -> int:
    return len(_packed(line, chars))


def _details(line: Line, chars: int) -> RenderableType:
    text = Text("\n".join(_packed(line, chars)), "" if line.state in _STYLES else "dim", overflow="ellipsis")
    bar = _bar_chars(line, chars)
    if not bar or line.share is None:
        return text
    side_by_side = Table.grid(padding=(0, _GAP_CHARS, 0, 0))
    side_by_side.add_row(ProgressBar(1.0, line.share, bar, complete_style="cyan", finished_style="cyan"), text)
    return side_by_side
