"""pu_ray/board.py: a table of the stages that says how each stands, on any terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pu_ray import board
from pu_ray.board import Board

STAGES = ["features", "fit", "score", "select", "materialise", "distill", "evaluate"]
CONTROL = ["select", "materialise", "distill", "evaluate"]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when told to."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(board.time, "monotonic", lambda: Clock.now)
    return Clock


def run(*controls: str) -> Board:
    rows = [(None, name) for name in STAGES]
    rows += [(f"control {control}", f"{control}: {name}") for control in controls for name in CONTROL]
    return Board([*rows, (None, "export")], lambda message: None)


def show(made: Board, width: int = 120, height: int = 40) -> list[str]:
    """What is on the screen."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(made)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def finish(made: Board, name: str, clock, seconds: float = 1.0) -> None:
    with made.at_work(name):
        clock.now += seconds


# -- how a stage stands ------------------------------------------------------------------------------------


def test_each_stage_says_how_it_stands(clock):
    made = run()
    made["features"].state = board.BEFORE
    finish(made, "fit", clock, 12.3)
    made["fit"].words = "labeled train 300, unlabeled 8,975"
    with made.at_work("score"):
        clock.now += 5
        assert show(made)[:4] == [
            "features     done before",
            "fit          done            12 s  labeled train 300, unlabeled 8,975",
            "score        at work          5 s",
            "select       waiting",
        ]


def test_a_stage_at_work_says_count_rate_time_left_actors_and_broken_images(clock):
    made = run()
    with made.at_work("features") as row:
        clock.now += 100  # before anything could be counted
        row.start(21_000, "images")
        row.workers(2, "actors")
        clock.now += 10
        row.advance(10_000)
        row.advance(500)
        row.broken(20)
        row.broken(5)
        line = show(made)[0]
    for fact in ("at work", "1:50", "10,500 of 21,000 images", "1,050/s", "10 s left", "2 actors", "25 broken"):
        assert fact in line
    assert line.index("━") < line.index("10,500")


def test_the_bar_is_as_long_as_what_is_done(clock):
    made = run()

    def filled(count: int) -> float:
        with made.at_work("fit") as row:
            row.start(100, "images")
            row.advance(count)
            console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="truecolor")
            console.print(made)
        line = next(line for line in console.file.getvalue().splitlines() if line.startswith("fit"))
        bars = [part.split("m", 1)[1].count("━") for part in line.split("\x1b[") if "━" in part]
        return bars[0] / sum(bars)

    assert filled(25) == pytest.approx(0.25, abs=0.05)
    assert filled(75) == pytest.approx(0.75, abs=0.05)


def test_what_is_not_known_is_not_said(clock):
    made = run()
    with made.at_work("features") as row:
        clock.now += 3
        assert row.facts() == []
        row.found(1)
        assert row.facts() == ["listing, 1 file so far"]
        row.start(10, "images")
        assert row.facts() == ["0 of 10 images"]
        row.workers(0, "actors")
        assert row.facts() == ["0 of 10 images", "0 actors"]
        row.workers(1, "actors")
        assert row.facts() == ["0 of 10 images", "1 actor"]
        row.workers(0, "actors")
        row.advance(10)
        assert row.facts() == ["10 of 10 images", "10,000,000,000/s", "0 s left"]


def test_counting_anew_forgets_what_was_counted_but_not_who_works(clock):
    made = run()
    with made.at_work("fit") as row:
        row.workers(3, "workers")
        row.start(40, "images")
        row.advance(10)
        row.broken(1)
        row.start(7, "steps")
        assert row.facts() == ["0 of 7 steps", "3 workers"]


@pytest.mark.parametrize(("total", "count"), [(0, 0), (0, 5), (10, 25)])
def test_odd_counts_break_nothing(clock, total, count):
    made = run()
    with made.at_work("fit") as row:
        row.start(total, "images")
        clock.now += 2
        row.advance(count)
        line = show(made)[1]
    assert f"{count} of {total} images" in line
    assert "-" not in line


@pytest.mark.parametrize(("error", "state"), [(RuntimeError, "failed"), (KeyboardInterrupt, "stopped")])
def test_the_last_thing_shown_is_where_it_ended(clock, error, state):
    made = run("random")
    console = Console(file=io.StringIO(), width=120, height=40, force_terminal=True, color_system=None)

    def end():
        with made.shown(console, transient=False), made.at_work("features"):
            clock.now += 4
            raise error

    with pytest.raises(error):
        end()
    lines = show(made)
    assert lines[0].split() == ["features", state, "4.0", "s"]
    assert len(lines) == len(STAGES) + 2
    assert all("not run" in line for line in lines[1:])


def test_lengths_of_time_are_those_people_read():
    assert [board.clock(seconds) for seconds in (0.4, 59.4, 59.6, 3599.4, 3600, 360_000)] == [
        "0 s",
        "59 s",
        "1:00",
        "59:59",
        "1:00:00",
        "100:00:00",
    ]


# -- controls ----------------------------------------------------------------------------------------------


def test_controls_are_one_line_each_but_the_one_at_work(clock):
    made = run("random", "oracle", "energy")
    for name in STAGES:
        finish(made, name, clock)
    for name in CONTROL:
        finish(made, f"random: {name}", clock, 15)
    finish(made, "oracle: select", clock)
    with made.at_work("oracle: materialise"):
        lines = show(made)
    shown = [" ".join(line.split()) for line in lines[len(STAGES) :]]
    assert shown == [
        "control random done 1:00 4 stages",
        "oracle: select done 1.0 s",
        "oracle: materialise at work 0 s",
        "oracle: distill waiting",
        "oracle: evaluate waiting",
        "control energy waiting 4 stages",
        "export waiting",
    ]


def test_a_control_that_was_there_before_is_one_line_too(clock):
    made = run("random")
    for name in CONTROL:
        made[f"random: {name}"].state = board.BEFORE
    assert show(made)[len(STAGES)].split() == ["control", "random", "done", "before", "4", "stages"]


# -- small terminals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", range(1, 60))
@pytest.mark.parametrize("at", ["features", "distill", "c12: distill", "c29: evaluate", "export"])
def test_it_fits_any_height_and_shows_what_is_at_work(clock, height, at):
    made = run(*(f"c{number}" for number in range(30)))
    for name in list(made._rows):
        if name == at:
            break
        finish(made, name, clock)
    with made.at_work(at) as row:
        row.start(1000, "images")
        row.workers(2, "actors")
        lines = show(made, width=70, height=height)
        # A narrow terminal breaks the facts into lines, which count.
        assert len(lines) <= max(height - 2, 2)
        assert sum("at work" in line for line in lines) == 1


def test_what_there_is_no_room_for_is_counted(clock):
    made = run()
    for name in STAGES[:4]:
        finish(made, name, clock)
    with made.at_work("materialise"):
        shown = [" ".join(line.split()) for line in show(made, height=7)]
    assert shown == ["3 more done", "select done 1.0 s", "materialise at work 0 s", "distill waiting", "2 more waiting"]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost_from_80_on(clock, width):
    made = run("random")
    made["fit"].words = "words " * 100
    made["fit"].state = board.DONE
    with made.at_work("features") as row:
        row.start(1_000_000_000, "images")
        row.workers(1000, "actors")
        clock.now += 100_000
        row.advance(123_456_789)
        row.broken(1_234_567)
        lines = show(made, width=width)
    assert all(len(line) <= max(width, 60) for line in lines)
    if width >= 80:
        text = " ".join(" ".join(lines).split())
        for fact in ("123,456,789 of 1,000,000,000 images", "1,235/s", "left", "1,000 actors", "1,234,567 broken"):
            assert fact in text


def test_columns_stay_where_they_are(clock):
    made = run("random", "neighbours")
    before = show(made)[0].index("waiting")
    for name in STAGES:
        finish(made, name, clock)
    with made.at_work("neighbours: materialise"):
        assert show(made)[0].index("done") == before
