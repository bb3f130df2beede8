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


# -- bars, where somebody has one --------------------------------------------------------------------------


@pytest.fixture
def terminal() -> tuple[Narrator, io.StringIO]:
    """A narrator on a terminal that a test can read."""
    narrator, screen = Narrator(), io.StringIO()
    narrator._console = Console(file=screen, force_terminal=True, width=120, highlight=False)
    return narrator, screen


def test_a_terminal_shows_a_bar_with_count_unit_and_rate(terminal):
    narrator, screen = terminal
    with narrator.stage("features") as counter:
        counter.start(40, "images")
        counter.advance(10)
        counter.advance(5)
        (task,) = counter._bars.tasks
        assert (task.total, task.completed) == (40, 15)
        assert task.fields["unit"] == "images"
        assert task.fields["rate"].endswith("/s")
        counter.broken(2)
        counter.note("in passing")
        counter._bars.refresh()
    assert "15/40" in screen.getvalue()
    assert "2 broken" in screen.getvalue()
    assert "in passing" in screen.getvalue()


def test_a_bar_that_starts_anew_is_empty_again(terminal):
    narrator, _ = terminal
    with narrator.stage("fit") as counter:
        counter.start(40, "images")
        counter.advance(10)
        counter.start(7, "steps")
        (task,) = counter._bars.tasks
        assert (task.total, task.completed, task.fields["unit"]) == (7, 0, "steps")


def test_a_bar_is_taken_down_when_the_stage_fails(terminal):
    narrator, _ = terminal
    bars = []

    def fail():
        with narrator.stage("fit") as counter:
            bars.append(counter._bars)
            assert bars[0].live.is_started
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert not bars[0].live.is_started


def test_silence_counts_nothing(capsys):
    counter = Silent()
    counter.start(10, "images")
    counter.advance(5)
    counter.note("nobody hears")
    assert capsys.readouterr() == ("", "")
