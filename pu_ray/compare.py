"""`pu-ray compare`: the numbers of several runs side by side, and what was set differently.

Reads what runs published: summary.json, and the manifests of evaluation and export as far as the summary speaks of the
same. Nothing is computed anew. Accuracies of runs that were judged on different test images are no comparison, and
milliseconds are those of the machine that each run was judged on; both are said.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from pu_ray import manifest, page
from pu_ray.errors import ConfigError, DataError
from pu_ray.manifest import Manifest
from pu_ray.page import BLUE, GREY, ORANGE
from pu_ray.storage import Storage

_SUMMARY_FILE = "summary.json"
_NONE = "-"
_OWN_SETTINGS = ("name", "output")  # which every run has to itself
_CELL_CHARS = 34
# Artifacts whose manifests say more than the summary: folder, name in the summary, outside sources they name.
_MORE = (
    ("scorer", "fit", ("labeled",)),
    ("scores", "score", ("teacher", "lake")),
    ("evaluation", "evaluate", ("test", "truth")),
    ("exported", "export", ()),
)

Run = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Lines of a table that belong together.

    Attributes:
        title: What they are about.
        rows: Name and one cell for each run; cells are text.
        note: What must be known to read them.
    """

    title: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    note: str = ""


# -- reading -----------------------------------------------------------------------------------------------


def read(uri: str) -> Run:
    """The numbers of one run, as plain JSON; None for what it does not know.

    Raises:
        DataError: It has no summary.json, or another program's.
    """
    run = Storage(uri)
    if run.kind(_SUMMARY_FILE) != "file":
        raise DataError(
            f"this run has no {_SUMMARY_FILE}",
            slug="no-summary",
            where=run.uri,
            allowed="the output of a job that has got as far as a report",
            got="a folder without it" if run.exists() else "nothing is there",
            hint="give the folder that `output` names in the job file; `pu-ray report JOB.yaml` writes the summary",
        )
    summary = run.read_json(_SUMMARY_FILE)
    if not isinstance(summary, dict) or not {"name", "recipe", "stages_done", "verdict", "seconds"} <= set(summary):
        raise DataError(
            f"this is no {_SUMMARY_FILE} of PU-Ray",
            slug="not-a-summary",
            where=f"{run}/{_SUMMARY_FILE}",
            got="other contents",
            hint="`pu-ray report JOB.yaml` writes it anew",
        )
    more = {stage: document for folder, stage, _ in _MORE if (document := _same(run.child(folder), stage, summary))}
    sources = {
        name: more[stage].inputs[name]
        for _, stage, names in _MORE
        for name in names
        if stage in more and more[stage].inputs.get(name, "none") != "none"
    }
    plain = (
        ("name", "recipe", "seed", "verdict", "stages_done", "lake_rows", "error_rows", "mined_rows"),
        ("prior", "true_prior", "mined_precision", "mined_recall", "recall_promise"),
        ("teacher_accuracy", "student_accuracy", "gap_to_teacher", "agreement"),
        ("teacher_parameters", "student_parameters", "controls", "seconds", "images_per_s", "usage_in_all", "prices"),
    )
    return {
        "run": run.uri,
        **{key: summary.get(key) for keys in plain for key in keys},
        "audited_precision": summary["audit"]["precision"] if "audit" in summary else None,
        "cost": more["evaluate"].facts["cost"] if "evaluate" in more else None,
        "formats": more["export"].facts["formats"] if "export" in more else None,
        "sources": sources,
        "settings": summary.get("settings"),
    }


def _same(artifact: Storage, stage: str, summary: Mapping[str, Any]) -> Manifest | None:
    """The manifest that the summary was made from; None where there is none or a later one."""
    document = manifest.read(artifact)
    return document if document is not None and summary["seconds"].get(stage) == document.seconds else None


def runs(uris: Sequence[str]) -> list[Run]:
    """The numbers of several runs.

    Raises:
        ConfigError: There are fewer than two.
        DataError: One of them cannot be read.
    """
    if len(uris) < 2:
        raise ConfigError(
            "there is nothing to compare with",
            slug="nothing-to-compare",
            where="RUN...",
            allowed="two runs or more",
            got="one",
        )
    return [read(uri) for uri in uris]


# -- what differs ------------------------------------------------------------------------------------------


def differing(found: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs that recorded theirs; None for a run that did not, or has no such."""
    recorded = [run["settings"] for run in found if run["settings"] is not None]
    names = dict.fromkeys(name for settings in recorded for name in settings if name not in _OWN_SETTINGS)
    return {
        name: [(run["settings"] or {}).get(name) for run in found]
        for name in names
        if any(settings.get(name) != recorded[0].get(name) for settings in recorded)
    }


def warnings(found: Sequence[Run]) -> list[str]:
    """What makes numbers of these runs hard to compare."""
    said = []
    for source, consequence in (
        ("test", "the runs were judged on different test images: their accuracies are no comparison"),
        ("teacher", "the runs have different teachers"),
        ("lake", "the runs mined different lakes, or the lake has changed between them"),
        ("labeled", "the runs had different labeled images"),
    ):
        if len({run["sources"][source] for run in found if source in run["sources"]}) > 1:
            said.append(consequence)
    if unrecorded := [run["run"] for run in found if run["settings"] is None]:
        said.append(f"settings are not recorded of {', '.join(unrecorded)}: `pu-ray report JOB.yaml` records them")
    return said


# -- tables ------------------------------------------------------------------------------------------------


def _share(rate: Mapping[str, Any] | None) -> str:
    return _NONE if rate is None else f"{page.percent(rate)} ({page.interval(rate)})"


def _prior(prior: Mapping[str, Any] | None) -> str:
    return _NONE if prior is None else f"{prior['estimate']:.4f} ({prior['low']:.4f} to {prior['high']:.4f})"


def _number(form: str) -> Callable[[Any], str]:
    return lambda value: _NONE if value is None else form.format(value)


def _hours(value: float | None) -> str:
    return _NONE if value is None else page.hours(value)


def _text(value: Any) -> str:
    return _NONE if value is None else str(value)


_count = _number("{:,}")


def _rows(found: Sequence[Run], lines: Sequence[tuple[str, Callable[[Run], Any], Callable[[Any], str]]]) -> Any:
    """Lines that at least one run has something to say to."""
    values = [(title, [get(run) for run in found], form) for title, get, form in lines]
    return tuple(
        (title, tuple(form(value) for value in cells))
        for title, cells, form in values
        if any(cell is not None for cell in cells)
    )


def _get(*path: str) -> Callable[[Run], Any]:
    """A value by its path; None where any part of it is missing."""

    def get(run: Run) -> Any:
        value: Any = run
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return get


def _money(run: Run) -> str | None:
    """What the run's own prices make of what it held; currencies differ."""
    cost = _get("usage_in_all", "cost")(run)
    return None if cost is None else f"{page.money(cost)} {run['prices']['currency']}"


def _union(found: Sequence[Run], name: str) -> list[str]:
    """Keys of a mapping that runs may have, in their order."""
    return list(dict.fromkeys(key for run in found for key in run[name] or ()))


def _accuracies(found: Sequence[Run]) -> Any:
    lines = [
        ("teacher accuracy", _get("teacher_accuracy"), _share),
        ("student accuracy", _get("student_accuracy"), _share),
        ("gap to the teacher, points", _get("gap_to_teacher"), _number("{:.2f}")),
        ("agreement with the teacher", _get("agreement"), _number("{:.4f}")),
    ]
    for name in _union(found, "controls"):
        lines.append((f"student of control {name}", _get("controls", name, "student_accuracy"), _share))
    return _rows(found, lines)


def headings(found: Sequence[Run]) -> list[str]:
    """A name for each run; runs of one name are told apart by their folders."""
    names = [run["name"] for run in found]
    return [
        name if names.count(name) == 1 else f"{name} ({run['run'].rpartition('/')[2]})"
        for name, run in zip(names, found, strict=True)
    ]


def blocks(found: Sequence[Run]) -> list[Block]:
    """Everything that is shown, as text."""
    mining = [
        ("images in the lake", _get("lake_rows"), _count),
        ("unusable", _get("error_rows"), _count),
        ("mined", _get("mined_rows"), _count),
        ("prior", _get("prior"), _prior),
        ("prior, in truth", _get("true_prior"), _number("{:.4f}")),
        ("precision, by the truth", _get("mined_precision"), _share),
        ("recall, by the truth", _get("mined_recall"), _share),
        ("precision, judged by a person", _get("audited_precision"), _share),
    ]
    size = [
        ("teacher's parameters", _get("teacher_parameters"), _count),
        ("student's parameters", _get("student_parameters"), _count),
        ("bytes of the student's weights", _get("cost", "student", "weights_bytes"), _count),
        ("multiply-adds of one image", _get("cost", "student", "multiply_adds"), _count),
        ("teacher, ms for one image", _get("cost", "teacher", "cpu_latency_ms"), _number("{:.2f}")),
        ("student, ms for one image", _get("cost", "student", "cpu_latency_ms"), _number("{:.2f}")),
    ]
    for name in _union(found, "formats"):
        size.append((f"{name}, bytes", _get("formats", name, "bytes"), _count))
        size.append((f"{name}, ms for one image", _get("formats", name, "cpu_latency_ms"), _number("{:.2f}")))
    stages = _union(found, "seconds")
    time = [(f"{stage}, s", _get("seconds", stage), _number("{:,.1f}")) for stage in stages]
    rates = [
        (f"{stage}, images/s", _get("images_per_s", stage), _number("{:,.0f}"))
        for stage in stages
        if stage in _union(found, "images_per_s")
    ]
    in_all = [
        ("in all, controls too, s", _get("usage_in_all", "seconds"), _number("{:,.1f}")),
        ("CPU-hours", _get("usage_in_all", "cpu_hours"), _hours),
        ("GPU-hours", _get("usage_in_all", "gpu_hours"), _hours),
        ("money", _money, _text),
    ]
    sources = [
        (name, _get("sources", name), lambda value: _NONE if value is None else value[:12])
        for name in ("teacher", "labeled", "lake", "test", "truth")
    ]
    settings = differing(found)
    head = [("recipe", _get("recipe"), _text), ("seed", _get("seed"), _text), ("verdict", _get("verdict"), _text)]
    made = [
        Block("Run", (("folder", tuple(run["run"] for run in found)), *_rows(found, head))),
        Block("Mining", _rows(found, mining)),
        Block("Teacher and student", _accuracies(found)),
        Block("Size", _rows(found, size), "Milliseconds on one thread of the machine that each run was judged on."),
        Block(
            "Time",
            _rows(found, [*time, *rates, *in_all]),
            "Of the attempt that finished each stage. Hours are of what Ray had reserved, busy or not.",
        ),
        Block("Sources", _rows(found, sources), "By their content; the same digits are the same images."),
        Block(
            "Settings that differ",
            tuple((name, tuple(_text(value) for value in values)) for name, values in settings.items()),
        ),
    ]
    return [block for block in made if block.rows]


def render(found: Sequence[Run]) -> str:
    """A table for a terminal."""
    # As wide as it takes: a line of numbers that is broken in two cannot be read, and `less -S` scrolls.
    console = Console(file=io.StringIO(), width=40 + (_CELL_CHARS + 3) * len(found), highlight=False)
    columns = [Column(escape(name), max_width=_CELL_CHARS, overflow="fold") for name in headings(found)]
    table = Table(Column("", max_width=_CELL_CHARS, overflow="fold"), *columns)
    for block in blocks(found):
        table.add_section()
        table.add_row(f"[bold]{escape(block.title)}")
        for name, cells in block.rows:
            table.add_row(f"  {escape(name)}", *map(escape, cells))
    console.print(table)
    for block in blocks(found):
        if block.note:
            console.print(f"{block.title.lower()}: {block.note}", markup=False, soft_wrap=True)
    for warning in warnings(found):
        console.print(f"note: {warning}", markup=False, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


# -- the page ----------------------------------------------------------------------------------------------


def html(found: Sequence[Run]) -> str:
    """The same as one page without external requests."""
    names = headings(found)
    judged = {name: run for name, run in zip(names, found, strict=True) if run["student_accuracy"] is not None}
    return page.template("compare.html.j2").render(
        names=names,
        runs=found,
        blocks=blocks(found),
        warnings=warnings(found),
        accuracies=_accuracy_plot(judged) if judged else None,
    )


def _accuracy_plot(judged: Mapping[str, Run]) -> str:
    def draw(axes: Any) -> None:
        for key, shift, colour in (("teacher_accuracy", -0.12, GREY), ("student_accuracy", 0.12, BLUE)):
            for place, run in enumerate(judged.values()):
                rate = {end: 100 * run[key][end] for end in ("value", "low", "high")}
                axes.plot([rate["low"], rate["high"]], [place + shift] * 2, color=colour, linewidth=2)
                label = key.partition("_")[0] if place == 0 else None
                axes.plot([rate["value"]], [place + shift], "o", color=colour, label=label)
        controls = [
            (place, 100 * control["student_accuracy"]["value"])
            for place, run in enumerate(judged.values())
            for control in (run["controls"] or {}).values()
        ]
        if controls:
            axes.plot([x for _, x in controls], [y for y, _ in controls], "|", color=ORANGE, label="controls")
        axes.set_yticks(range(len(judged)), list(judged))
        axes.set_ylim(len(judged) - 0.5, -0.5)
        axes.set_xlabel("% right, test images, with 95 % intervals")
        axes.legend(frameon=False, labelcolor=GREY, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    return page.plot(draw, height=1.1 + 0.5 * len(judged))


def write_page(uri: str, found: Sequence[Run]) -> None:
    """Publish the page atomically at a path or URI.

    Raises:
        DataError: It cannot be written.
    """
    folder, name = Storage(uri).split()
    folder.write_bytes(name, html(found).encode())
