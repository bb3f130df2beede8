"""pu_ray/lineage/trace.py: where an image went."""

from __future__ import annotations

import json

import pytest

from pu_ray import cli, schema
from pu_ray.lineage import trace as tracing
from pu_ray.storage import Storage
from tests.unit.artifacts import CLASSES, write_shards
from tests.unit.lineage.runs import (
    BROKEN,
    CHOSEN,
    CUT,
    GATED,
    JUDGE,
    LABELED,
    LEAK,
    LOW,
    STRANGER,
    TEST,
    choose,
    id_of,
    publish,
    rows,
    trace,
)


def test_a_chosen_image_is_followed_from_its_places_in_the_lake_to_the_student(run):
    found = trace(run, CHOSEN[0])
    assert found.found
    assert [(row.shard, row.row, row.score) for row in found.lake] == [
        ("a.parquet", 0, 3.0),
        ("b.parquet", 5, pytest.approx(2.9)),
    ]
    assert (found.lake[0].predicted, found.lake[0].confidence) == (CLASSES[0], 0.5)
    own, control = found.choices
    assert (own.control, own.selected, own.why, own.place, own.of) == ("", True, "rule recall", 1, 8)
    assert own.mined == "data/000.parquet"
    assert own.student is not None
    assert (own.student.identity, own.student.taught) == ("student", True)
    assert own.exported is not None
    assert (own.exported.identity, own.exported.taught) == ("exported student", True)
    assert own.exported.sha256 == {"model.safetensors": "sum of student"}
    assert (control.control, control.selected, control.student and control.student.taught) == ("random", True, True)
    assert (found.labeled, found.test, found.forgotten) == (None, False, False)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (LOW, "its score is below the threshold 0.250 of rule recall"),
        (LEAK, "it is one of the test images"),
        (BROKEN, "it cannot be used: truncated"),
        (GATED, "it has no score: the cascade's gate rejected it"),
        (CUT, "rule recall took others: its budget, its balance, or a higher threshold of its class"),
    ],
)
def test_an_image_that_was_not_chosen_has_a_reason(run, content, why):
    own, control = trace(run, content).choices
    assert (own.selected, own.why, own.mined, own.place) == (False, why, None, None)
    assert own.student is not None
    assert own.student.taught is False
    assert (control.selected, control.why.startswith("rule random")) == (content == LOW, content in (LOW, GATED, CUT))


def test_labeled_images_teach_and_those_that_choose_the_step_do_not(run):
    taught, judge, test = trace(run, LABELED), trace(run, JUDGE), trace(run, TEST)
    assert (taught.labeled, judge.labeled, test.labeled) == ("train", "validate", None)
    assert [one.choices[0].student.taught for one in (taught, judge, test)] == [True, False, False]
    assert (taught.test, test.test) == (False, True)
    assert all(one.found and not one.lake for one in (taught, judge, test))


def test_a_student_of_another_choice_is_not_vouched_for(run):
    choose(run, CHOSEN[:2], "later choice", {"score": "scores"})
    for content in (CHOSEN[0], CHOSEN[5]):
        own = trace(run, content).choices[0]
        assert own.student is not None
        assert own.exported is not None
        assert (own.student.taught, own.exported.taught) == (None, None)
    assert "made from an earlier choice: nobody can say" in tracing.render([trace(run, CHOSEN[5])])


def test_a_stranger_is_not_found_and_a_run_that_has_not_looked_says_so(run, tmp_path):
    assert not trace(run, STRANGER).found
    young = Storage(f"{tmp_path}/young")
    publish(young.child("scorer"), "fit", "scorer", {})
    found = trace(young, STRANGER)
    assert (found.searched, found.choices[0].selected) == (None, None)
    text = tracing.render([trace(run, STRANGER), found])
    assert text.startswith(f"image {id_of(STRANGER).hex()}: in 0 of 2 runs")
    assert "not in the lake (by scores/)" in text
    assert "its lake was not looked at yet" in text


def test_before_there_are_scores_the_features_know_the_lake(run):
    table = rows([LOW], [0.0], "c.parquet", [None]).select([*schema.IDENTITY_COLUMNS, schema.ERROR])
    write_shards(run.child("features"), {"c.parquet": table})
    assert trace(run, LOW).searched == "scores"
    run.delete("scores")
    found = trace(run, LOW)
    assert (found.searched, found.lake[0].shard, found.lake[0].score) == ("features", "c.parquet", None)


def test_what_a_killed_pass_left_is_found_too(run):
    for folder in ("scores", "mined"):
        run.delete(f"{folder}/manifest.json")
        run.delete(f"{folder}/index.parquet")
    found = trace(run, CHOSEN[4])
    assert found.lake
    assert found.choices[0].mined == "data/001.parquet"


def test_a_trace_is_printed_for_people_and_for_machines(run, capsys, tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(CHOSEN[0])
    assert cli._run(["trace", str(file), f"{tmp_path}/runs", run.uri]) == 0
    text = capsys.readouterr().out
    for part in (
        "in 1 of 1 run\n",  # named twice, looked at once
        "lake       a.parquet row 0, score 3.000, looks like cat (0.500)",
        "selection  selected by rule recall, number 1 of 8",
        "mined      its bytes are in data/000.parquet",
        "student    taught with it; identity student",
        "model.safetensors has sha256 sum of student",
        "selection  control random: selected by rule random",
    ):
        assert part in text
    assert cli._run(["trace", id_of(GATED).hex(), run.uri, "--json"]) == 0
    [document] = json.loads(capsys.readouterr().out)
    assert (document["found"], document["run"], document["lake"][0]["score"]) == (True, run.uri, None)
    assert cli._run(["trace", id_of(STRANGER).hex(), run.uri]) == 0
    assert "not found" in capsys.readouterr().out


def test_wrong_questions_have_exit_codes(run, capsys, tmp_path):
    assert cli._run(["trace", "no-such-image", run.uri]) == 2
    assert "neither a sample id nor a file" in capsys.readouterr().err
    assert cli._run(["trace", id_of(LOW).hex(), f"{tmp_path}/absent"]) == 3
    assert cli._run(["trace", id_of(LOW).hex()]) == 2
