"""pu_ray/compare.py: the numbers of several runs side by side, and what was set differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from artifacts import COUNTS, FACTS, Page, rate

from pu_ray import cli, compare, manifest
from pu_ray.errors import ConfigError, DataError
from pu_ray.manifest import Publication
from pu_ray.storage import Storage

SETTINGS = {
    "name": "job",
    "output": "/run",
    "selection.rule": "recall",
    "distill.epochs": 3,
    "student.options": {},
    "evaluation.controls": [],
}
SUMMARY = {
    "name": "job",
    "recipe": "default",
    "seed": 0,
    "verdict": "passed: the student is 2.00 points behind its teacher, 3 are allowed",
    "stages_done": ["fit", "score", "evaluate", "export"],
    "lake_rows": 21_000,
    "error_rows": 25,
    "mined_rows": 1_234,
    "prior": {"estimate": 0.1, "low": 0.08, "high": 0.12},
    "teacher_accuracy": rate(0.9512, 1500),
    "student_accuracy": rate(0.9312, 1500),
    "gap_to_teacher": 2.0,
    "agreement": 0.94,
    "teacher_parameters": 12_340,
    "student_parameters": 1_234,
    "controls": {},
    "images_per_s": {"score": 8_006.1},
}
FORMATS = {"onnx": {"file": "model.onnx", "bytes": 7_777, "cpu_latency_ms": 0.0821}}


def make(root: Path, settings: dict[str, Any] | None = None, test: str = "test", **summary: Any) -> str:
    """What `compare` reads of a finished run; a value of None is left out of the summary."""
    run = Storage(str(root))
    inputs = {
        "fit": {"labeled": "labeled"},
        "score": {"teacher": "teacher", "lake": "lake"},
        "evaluate": {"test": test, "truth": "none"},
        "export": {},
    }
    seconds = {}
    for stage, folder in (("fit", "scorer"), ("score", "scores"), ("evaluate", "evaluation"), ("export", "exported")):
        facts = {**FACTS[stage], **({"formats": FORMATS} if stage == "export" else {})}
        publication = Publication(stage, f"identity of {stage}", inputs[stage], 0)
        publication._started -= 2.0
        seconds[stage] = publication.publish(run.child(folder), counts=COUNTS[stage], facts=facts).seconds
    told = {**SUMMARY, "settings": SETTINGS if settings is None else settings, "seconds": seconds, **summary}
    run.write_json("summary.json", {name: value for name, value in told.items() if value is not None})
    return run.uri


def rows(found: list[compare.Run]) -> dict[str, tuple[str, ...]]:
    return {name: cells for block in compare.blocks(found) for name, cells in block.rows}


def lines(text: str) -> dict[str, list[str]]:
    """Cells of a printed table by its first column."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    return {first: rest for first, *rest in cells}


def test_every_number_stands_beside_that_of_the_other_run(tmp_path):
    known = {"mined_precision": rate(0.9), "mined_recall": rate(0.8), "true_prior": 0.11}
    audit = {"precision": {**rate(0.97), "bound": 0.94}, "judged": 9}
    controls = {"random": {"student_accuracy": rate(0.75)}}
    one = make(tmp_path / "one", **known, controls=controls)
    two = make(tmp_path / "two", name="other", recipe="paper", seed=7, mined_rows=99, gap_to_teacher=-0.5, audit=audit)
    found = rows(compare.runs([one, two]))
    assert found["folder"] == (one, two)
    for name, cells in {
        "recipe": ("default", "paper"),
        "seed": ("0", "7"),
        "images in the lake": ("21,000", "21,000"),
        "mined": ("1,234", "99"),
        "prior": ("0.1000 (0.0800 to 0.1200)",) * 2,
        "prior, in truth": ("0.1100", "-"),
        "precision, by the truth": ("90.00 % (85.00 to 95.00)", "-"),
        "recall, by the truth": ("80.00 % (75.00 to 85.00)", "-"),
        "precision, judged by a person": ("-", "97.00 % (92.00 to 100.00)"),
        "teacher accuracy": ("95.12 % (90.12 to 100.00)",) * 2,
        "student accuracy": ("93.12 % (88.12 to 98.12)",) * 2,
        "gap to the teacher, points": ("2.00", "-0.50"),
        "student of control random": ("75.00 % (70.00 to 80.00)", "-"),
        "student's parameters": ("1,234", "1,234"),
        "bytes of the student's weights": ("5,500", "5,500"),
        "student, ms for one image": ("0.50", "0.50"),
        "onnx, bytes": ("7,777", "7,777"),
        "onnx, ms for one image": ("0.08", "0.08"),
        "score, images/s": ("8,006", "8,006"),
        "test": ("test", "test"),
    }.items():
        assert found[name] == cells, name
    assert found["fit, s"] == ("2.0", "2.0")
    assert found["verdict"][0].startswith("passed")
    assert "truth" not in found, "a line that no run has anything to say to is left out"


def test_only_settings_that_differ_are_listed_and_never_names_and_places(tmp_path):
    changed = {**SETTINGS, "name": "b", "output": "/b", "distill.epochs": 9, "evaluation.controls": ["random"]}
    del changed["student.options"]
    found = compare.runs([make(tmp_path / "one"), make(tmp_path / "two", settings=changed)])
    expected = {"distill.epochs": [3, 9], "student.options": [{}, None], "evaluation.controls": [[], ["random"]]}
    assert compare.differing(found) == expected
    assert rows(found)["distill.epochs"] == ("3", "9")
    assert rows(found)["evaluation.controls"] == ("[]", "['random']")
    assert compare.warnings(found) == []
    same = compare.runs([make(tmp_path / "one"), make(tmp_path / "two")])
    assert compare.differing(same) == {}
    assert "Settings that differ" not in {block.title for block in compare.blocks(same)}


def test_a_run_whose_settings_are_not_recorded_is_named_and_differs_in_nothing(tmp_path):
    old = make(tmp_path / "old")
    summary = Storage(old).read_json("summary.json")
    del summary["settings"]
    Storage(old).write_json("summary.json", summary)
    found = compare.runs(
        [make(tmp_path / "one"), old, make(tmp_path / "two", settings={**SETTINGS, "distill.epochs": 9})]
    )
    assert compare.differing(found) == {"distill.epochs": [3, None, 9]}
    assert compare.warnings(found) == [f"settings are not recorded of {old}: `pu-ray report JOB.yaml` records them"]


def test_runs_that_were_judged_on_different_images_are_no_comparison(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", test="other images")
    [warning] = compare.warnings(compare.runs([one, two]))
    assert "judged on different test images" in warning
    assert "note: the runs were judged on different test images" in compare.render(compare.runs([one, two]))


def test_an_unfinished_run_has_gaps(tmp_path):
    gone = dict.fromkeys(("student_accuracy", "teacher_accuracy", "gap_to_teacher", "agreement", "prior"))
    two = make(tmp_path / "two", verdict="unfinished: 3 of 8 stages are done", **gone)
    found = compare.runs([make(tmp_path / "one"), two])
    assert rows(found)["student accuracy"][1] == "-"
    assert rows(found)["prior"] == ("0.1000 (0.0800 to 0.1200)", "-")
    assert "unfinished: 3 of 8 stages" in compare.html(found)


def test_what_a_later_attempt_left_is_not_passed_off_as_the_summarys(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    evaluation = Storage(two).child("evaluation")
    later = manifest.require(evaluation, "evaluate").model_copy(update={"seconds": 77.0})
    evaluation.write_json("manifest.json", later.model_dump(mode="json"))
    found = compare.runs([one, two])
    assert rows(found)["student, ms for one image"] == ("0.50", "-")
    assert rows(found)["onnx, bytes"] == ("7,777", "7,777")
    assert "test" not in found[1]["sources"]


@pytest.mark.parametrize(
    ("content", "got", "problem"),
    [
        (None, "nothing is there", "this run has no summary.json"),
        ({}, "a folder without it", "this run has no summary.json"),
        ({"summary.json": b"{}"}, "other contents", "this is no summary.json"),
        ({"summary.json": b"[1]"}, "other contents", "this is no summary.json"),
        ({"summary.json": b"{"}, "", "not valid JSON"),
    ],
)
def test_what_is_no_run_is_named_with_what_is_missing(tmp_path, content, got, problem):
    place = tmp_path / "place"
    if content is not None:
        place.mkdir()
        for name, value in content.items():
            (place / name).write_bytes(value)
    with pytest.raises(DataError) as caught:
        compare.runs([make(tmp_path / "one"), str(place)])
    assert problem in caught.value.problem
    assert got in (caught.value.got or "")
    assert str(caught.value.where).startswith(str(place))


def test_one_run_is_nothing_to_compare(tmp_path):
    with pytest.raises(ConfigError, match="nothing to compare with"):
        compare.runs([make(tmp_path / "one")])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    found = compare.runs([make(tmp_path / "one"), make(tmp_path / "two"), make(tmp_path / "three", name="other")])
    assert compare.headings(found) == ["job (one)", "job (two)", "other"]


def test_the_page_asks_nobody_for_anything_and_shows_what_the_terminal_shows(tmp_path):
    controls = {"random": {"student_accuracy": rate(0.75)}}
    found = compare.runs(
        [make(tmp_path / "one", controls=controls), make(tmp_path / "two", name="other", mined_rows=99)]
    )
    html = compare.html(found)
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert all(
        (attributes.get(name) or "data:").startswith("data:") for _, attributes in page.tags for name in ("src", "href")
    )
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    for cells in rows(found).values():
        for cell in cells:
            assert cell in page.text
    assert compare.html(found) == html


def test_names_that_others_chose_are_shown_not_run(tmp_path):
    hostile = "<script>alert(1)</script>[bold]'\"&"
    found = compare.runs(
        [make(tmp_path / "one", verdict=hostile), make(tmp_path / "two", settings={**SETTINGS, "x": hostile})]
    )
    html = compare.html(found)
    assert "<script" not in html
    assert hostile in Page(html).text
    # The terminal folds it, and does not take it for its own markup.
    assert "[bold]" in compare.render(found)


def test_a_comparison_is_printed_for_people_and_for_machines_and_written_as_a_page(tmp_path, capsys):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", name="other", settings={**SETTINGS, "distill.epochs": 9})
    assert cli._run(["compare", one, two, "--html", f"{tmp_path}/pages/c.html"]) == 0
    printed = lines(capsys.readouterr().out)
    assert printed["student accuracy"] == ["93.12 % (88.12 to 98.12)"] * 2
    assert printed["distill.epochs"] == ["3", "9"]
    assert (tmp_path / "pages/c.html").read_text().startswith("<!DOCTYPE html>")
    assert cli._run(["compare", one, two, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in document["runs"]] == ["job", "other"]
    assert document["runs"][0]["student_accuracy"] == rate(0.9312, 1500)
    assert document["differing_settings"] == {"distill.epochs": [3, 9]}
    assert document["warnings"] == []
    assert cli._run(["compare", one]) == 2
    assert cli._run(["compare", one, f"{tmp_path}/absent"]) == 3
    assert "this run has no summary.json" in capsys.readouterr().err


def test_runs_on_s3_are_compared(tmp_path, s3_bucket):
    here = compare.read(make(tmp_path / "one"))
    remote = Storage(f"{s3_bucket}/one")
    for file in Storage(here["run"]).list_files():
        remote.write_bytes(file.path, Storage(here["run"]).read_bytes(file.path))
    assert compare.read(remote.uri) == here | {"run": remote.uri}


def test_what_the_runs_took_in_all_stands_beside_each_other(tmp_path):
    took = {"seconds": 100.5, "cpu_hours": 12.5, "gpu_hours": 0.25, "cost": 3.125}
    prices = {"currency": "EUR"}
    with_money = make(tmp_path / "one", usage_in_all=took, prices=prices)
    without = make(tmp_path / "two", usage_in_all={**took, "cpu_hours": None, "cost": None}, prices=None)
    old = make(tmp_path / "three")
    rows = {
        name: cells for block in compare.blocks(compare.runs([with_money, without, old])) for name, cells in block.rows
    }
    assert rows["in all, controls too, s"] == ("100.5", "100.5", "-")
    assert rows["CPU-hours"] == ("12.5000", "-", "-")
    assert rows["GPU-hours"] == ("0.2500", "0.2500", "-")
    assert rows["money"] == ("3.12 EUR", "-", "-")
