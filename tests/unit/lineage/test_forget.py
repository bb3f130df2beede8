"""pu_ray/lineage/forget.py: a run that never chooses some images again."""

from __future__ import annotations

import json

import pytest

from pu_ray import cli, lease, manifest, schema
from pu_ray.errors import ClusterError, DataError
from pu_ray.lineage import forget as forgetting
from pu_ray.lineage import forgotten_list, lookup
from pu_ray.progress import Silent
from pu_ray.storage import Storage
from tests.unit.lineage.runs import (
    CHOSEN,
    LABELED,
    LOW,
    STRANGER,
    TEST,
    choose,
    files,
    forget,
    hexes,
    id_of,
    teach,
    trace,
)


def test_without_apply_nothing_changes_and_everything_is_said(run):
    run.write_bytes("report.html", b"<p>")
    before = files(run)
    done = forget(run, CHOSEN[0], CHOSEN[4], LOW, STRANGER, apply=False)
    assert files(run) == before
    assert (done.applied, done.asked, done.already) == (False, 4, 0)
    assert (done.lake, done.selected, done.mined, done.controls) == (3, 2, 3, {"random": 2})
    assert done.unknown == hexes(STRANGER)
    below = ["selection", "mined", "student", "evaluation", "exported"]
    assert done.outdated == [*below, *(f"controls/random/{name}" for name in below)]
    copies = ["mined/data/000.parquet", "mined/data/001.parquet", "controls/random/mined/data/000.parquet"]
    assert done.erased == [*copies, "report.html"]
    assert done.students == {
        "student": "student",
        "exported": "exported student",
        "controls/random/student": "random student",
        "controls/random/exported": "exported random student",
    }


def test_what_is_forgotten_is_listed_and_no_byte_of_it_stays(run):
    everything = b"".join(files(run).values())
    assert forget(run, CHOSEN[0], STRANGER).applied
    assert forgotten_list.read(run) == {id_of(CHOSEN[0]): "selected", id_of(STRANGER): "unknown"}
    left = [run.read_table(path) for path in files(run) if path.endswith(".parquet")]
    kept = {content for table in left if schema.BYTES in table.column_names for content in table["bytes"].to_pylist()}
    assert CHOSEN[0] not in kept
    assert CHOSEN[5] in kept, "files without it stay until the next run"
    assert everything != b"".join(files(run).values())
    # What is not whole is no artifact; what is untouched still is.
    assert manifest.read(run.child("mined")) is None
    assert manifest.read(run.child("controls/random/mined")) is None
    assert manifest.read(run.child("scores")) is not None
    # Until the next run the student is the one that knew it, and the list says so.
    found = trace(run, CHOSEN[0])
    assert found.forgotten
    assert found.choices[0].student is not None
    assert found.choices[0].student.taught is True
    assert "taught with some of them: student student, exported exported student" in run.read_text(
        forgotten_list.LIST_FILE
    )


def test_a_forgetting_that_was_interrupted_is_finished_by_doing_it_again(run, monkeypatch):
    run.write_bytes("report.html", b"<p>")
    monkeypatch.setattr(Storage, "delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        forget(run, CHOSEN[0])
    monkeypatch.undo()
    assert id_of(CHOSEN[0]) in forgotten_list.read(run), "the list comes first"
    done = forget(run, CHOSEN[0])
    assert done.erased == ["mined/data/000.parquet", "controls/random/mined/data/000.parquet", "report.html"]
    assert not set(done.erased) & set(files(run))


def test_only_what_was_made_without_the_list_is_out_of_date(run):
    forget(run, CHOSEN[0])
    digest = forgotten_list.digest(run)
    assert digest is not None
    inputs = {"score": "scores", "fit": "scorer", "forgotten": digest}
    choose(run, CHOSEN[1:], "choice without it", inputs)
    control = [f"controls/random/{name}" for name in ("selection", "student", "evaluation", "exported")]
    assert forget(run, CHOSEN[0], apply=False).outdated == ["student", "evaluation", "exported", *control]
    teach(run, "choice without it", "new student")
    done = forget(run, CHOSEN[0], apply=False)
    assert done.outdated == control
    assert done.erased == []
    assert set(done.students) == {"controls/random/student", "controls/random/exported"}
    assert forget(run, CHOSEN[1], apply=False).outdated[0] == "selection"


def test_labeled_and_test_images_are_named_because_a_choice_does_not_touch_them(run):
    done = forget(run, LABELED, TEST, apply=False)
    assert (done.labeled, done.test, done.unknown) == (hexes(LABELED), hexes(TEST), [])
    text = forgetting.render(done, "again")
    assert (
        f"1 of them are labeled images: they go on teaching until you take them out of labeled.uri: {done.labeled[0]}"
        in text
    )
    assert "1 of them are test images" in text


def test_pages_that_show_an_image_go_and_answers_stay(run):
    for drawn, gone in (([CHOSEN[1]], False), ([CHOSEN[1], CHOSEN[0]], True)):
        run.write_bytes("audit/sheet.html", b"<img>")
        run.write_bytes("audit/audit.csv", b"answers")
        run.write_bytes("report.html", b"<p>")
        run.write_json("audit/drawn.json", {"selection": "choice", "samples": hexes(*drawn)})
        forget(run, CHOSEN[0])
        assert run.exists("audit/sheet.html") is not gone
        assert run.exists("audit/audit.csv")
        assert not run.exists("report.html")


def test_pages_stay_where_nothing_of_the_run_is_forgotten(run):
    run.write_bytes("report.html", b"<p>")
    forget(run, STRANGER)
    assert run.exists("report.html")


def test_nothing_is_forgotten_while_a_run_is_at_work_but_one_may_look(run):
    with lease.hold(run, "run of job job"):
        assert forget(run, CHOSEN[0], apply=False).selected == 1
        with pytest.raises(ClusterError):
            forget(run, CHOSEN[0])
    assert not run.exists(forgotten_list.LIST_FILE)


def test_a_folder_of_runs_is_refused_with_the_name_of_one(run, tmp_path):
    with pytest.raises(DataError) as caught:
        forgetting.forget(f"{tmp_path}/runs", [id_of(LOW)], Silent(), apply=True, note=lambda _: None)
    assert caught.value.got == f"a folder with runs below it, such as {run.uri}"
    assert not run.exists(forgotten_list.LIST_FILE)


def test_forgetting_is_printed_for_people_and_for_machines(run, capsys, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("\n".join(hexes(CHOSEN[0], STRANGER)))
    assert cli._run(["forget", "--list", str(ids), run.uri]) == 0
    text = capsys.readouterr().out
    for part in (
        "2 images to forget\n  in the lake        1\n  selected           1\n",
        f"unknown here       1: {id_of(STRANGER).hex()}",
        "would be out of date: selection, mined, student, evaluation, exported, controls/random/selection",
        "would be erased at once: 1 file of mined, 1 file of controls/random/mined",
        f"Nothing was changed. To do it:\n  pu-ray forget --list {ids} {run.uri} --apply",
    ):
        assert part in text
    assert cli._run(["forget", "--list", str(ids), run.uri, "--apply"]) == 0
    text = capsys.readouterr().out
    for part in ("2 images forgotten", "\nout of date: selection", "pu-ray run JOB.yaml", "exported/ is the old one"):
        assert part in text
    assert cli._run(["forget", "--list", str(ids), run.uri, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["applied"], document["already"], document["unknown"]) == (False, 2, hexes(STRANGER))


def test_a_forgetting_without_a_list_has_an_exit_code(run, tmp_path):
    assert cli._run(["forget", run.uri]) == 2
    assert cli._run(["forget", "--list", f"{tmp_path}/absent.txt", run.uri]) == 3


def test_runs_on_s3_are_traced_and_made_to_forget(run, s3_bucket):
    remote = Storage(f"{s3_bucket}/runs/one")
    for path, content in files(run).items():
        remote.write_bytes(path, content)
    assert lookup.runs_below(f"{s3_bucket}/runs") == [remote.uri]
    there, here = (trace(one, CHOSEN[0]).model_dump(exclude={"run"}) for one in (remote, run))
    assert there == here
    assert forget(remote, CHOSEN[0]).mined == 1
    assert forgotten_list.read(remote) == {id_of(CHOSEN[0]): "selected"}
    assert not remote.exists("mined/data/000.parquet")
    assert remote.exists("mined/data/001.parquet")
