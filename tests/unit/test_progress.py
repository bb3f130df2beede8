"""pu_ray/progress.py: narration goes to stderr, rarely and as it is meant."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pu_ray import progress
from pu_ray.progress import Narrator, Silent


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when told to."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_narration_is_on_stderr_and_stdout_stays_empty(capsys):
    narrator = Narrator()
    narrator.say("starting")
    with narrator.stage("features") as counter:
        counter.start(10, "images")
        counter.note("in passing")
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.splitlines() == ["starting", "in passing"]


def test_a_quiet_narrator_says_nothing(capsys, clock):
    narrator = Narrator(quiet=True)
    narrator.say("starting")
    with narrator.stage("features") as counter:
        counter.start(10, "images")
        clock.now += 100
        counter.advance(5)
        counter.note("in passing")
    assert capsys.readouterr() == ("", "")


def test_what_looks_like_markup_is_said_as_it_is(capsys):
    Narrator().say("[red]s3://bucket/[0].png[/red] \\[x] 12:34 'text'")
    assert capsys.readouterr().err == "[red]s3://bucket/[0].png[/red] \\[x] 12:34 'text'\n"


def test_long_lines_are_not_broken(capsys):
    Narrator().say("word " * 200)
    assert capsys.readouterr().err.count("\n") == 1


# -- lines, where nobody has a terminal --------------------------------------------------------------------


def test_a_line_is_said_once_a_minute_with_rate_and_time_left(capsys, clock):
    with Narrator().stage("score") as counter:
        counter.start(10_000, "images")
        for _ in range(20):
            clock.now += 8
            counter.advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  score: 800 of 10,000 images, 12/s, 736 s left",
        "  score: 1,600 of 10,000 images, 12/s, 672 s left",
    ]


def test_a_line_says_how_many_images_were_broken_so_far(capsys, clock):
    with Narrator().stage("features") as counter:
        counter.start(1000, "images")
        for _ in range(2):
            clock.now += 100
            counter.broken(3)
            counter.advance(100)
        counter.start(1000, "images")
        clock.now += 100
        counter.broken(0)
        counter.advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "  features: 100 of 1,000 images, 1/s, 900 s left, 3 broken",
        "  features: 200 of 1,000 images, 1/s, 800 s left, 6 broken",
        "  features: 100 of 1,000 images, 1/s, 900 s left",
    ]


def test_a_quick_stage_says_nothing(capsys, clock):
    with Narrator().stage("select") as counter:
        counter.start(10, "images")
        clock.now += 59
        counter.advance(10)
    assert capsys.readouterr().err == ""


def test_starting_anew_counts_anew(capsys, clock):
    with Narrator().stage("fit") as counter:
        counter.start(100, "images")
        counter.advance(90)
        clock.now += 1000
        counter.start(200, "steps")
        clock.now += 80
        counter.advance(160)
    assert capsys.readouterr().err == "  fit: 160 of 200 steps, 2/s, 20 s left\n"


@pytest.mark.parametrize(("total", "counts"), [(0, [0]), (10, [0]), (10, [25]), (0, [5])])
def test_odd_counts_break_nothing(capsys, clock, total, counts):
    with Narrator().stage("fit") as counter:
        counter.start(total, "images")
        for count in counts:
            clock.now += 70
            counter.advance(count)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("  fit: ")
    assert "-" not in line


def test_a_line_says_how_many_work_at_it_where_that_is_known(capsys, clock):
    with Narrator().stage("distill") as counter:
        counter.start(1000, "images")
        counter.workers(1, "workers")
        clock.now += 100
        counter.advance(0)
        counter.workers(12, "workers")
        counter.broken(3)
        clock.now += 100
        counter.advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "  distill: 100 s, nothing done yet of 1,000 images, 1 worker",
        "  distill: 100 of 1,000 images, 0/s, 1,800 s left, 12 workers, 3 broken",
    ]


def test_stages_are_lines_too_where_nobody_has_a_terminal(capsys):
    narrator = Narrator()
    with narrator.stages([(None, "features"), (None, "fit")]):
        narrator.done_before("features")
        with narrator.stage("fit"):
            pass
        narrator.done("fit", 12.34, {"labeled_train": 1200})
    assert capsys.readouterr().err == "fit            12.3 s  labeled train 1,200\n"


# -- a table, where somebody has one -----------------------------------------------------------------------


@pytest.fixture
def terminal() -> tuple[Narrator, io.StringIO]:
    """A narrator on a terminal that a test can read."""
    narrator, screen = Narrator(), io.StringIO()
    narrator._console = Console(
        file=screen, force_terminal=True, width=120, height=40, highlight=False, color_system=None
    )
    return narrator, screen


def test_a_terminal_shows_the_stages_and_what_is_said_above_them(terminal):
    narrator, screen = terminal
    with narrator.stages([(None, "features"), (None, "fit"), (None, "score")]):
        narrator.done_before("features")
        with narrator.stage("fit") as counter:
            counter.note("in passing")
        narrator.done("fit", 12.34, {"labeled_train": 1200})
    last = screen.getvalue().split("in passing\n")[1]
    shown = last[last.rindex("features") :]
    for words in ("done before", "done", "12 s", "labeled train 1,200", "not run"):
        assert words in shown


def test_one_stage_alone_is_a_table_that_goes_away(terminal):
    narrator, screen = terminal
    with narrator.stage("inspect") as counter:
        counter.start(40, "images")
        counter.advance(10)
        narrator._console.print("above")
        assert "10 of 40 images" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # erased
    assert narrator._board is None


def test_the_cursor_comes_back_when_a_stage_fails_or_is_interrupted(terminal):
    narrator, screen = terminal

    def end(error):
        with narrator.stages([(None, "fit")]), narrator.stage("fit"):
            raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            end(error)
        assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")
        assert narrator._board is None


@pytest.mark.parametrize("why", ["quiet", "verbose", "dumb"])
def test_no_table_where_it_would_be_torn_or_is_not_wanted(monkeypatch, why):
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    narrator, screen = Narrator(live=why != "verbose"), io.StringIO()
    narrator._console = Console(file=screen, force_terminal=True, width=120, quiet=why == "quiet", color_system=None)
    with narrator.stages([(None, "fit")]), narrator.stage("fit") as counter:
        counter.start(10, "images")
    narrator.done("fit", 1.0, {"rows": 3})
    assert screen.getvalue() == ("" if why == "quiet" else "fit             1.0 s  rows 3\n")


def test_silence_counts_nothing(capsys):
    counter = Silent()
    counter.start(10, "images")
    counter.advance(5)
    counter.note("nobody hears")
    assert capsys.readouterr() == ("", "")
