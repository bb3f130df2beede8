"""pu_ray/lineage.py: where an image went, and a run that never chooses it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import CLASSES, COUNTS, FACTS, identity_columns, png, write_shards

from pu_ray import cli, images, lease, lineage, manifest, schema
from pu_ray.errors import ClusterError, ConfigError, DataError
from pu_ray.manifest import Publication
from pu_ray.progress import Silent
from pu_ray.storage import Storage

CHOSEN = [png(k) for k in range(6)]
LOW, LEAK, BROKEN, GATED, CUT = (png(k) for k in range(6, 11))
LABELED, JUDGE, TEST, STRANGER = (png(k) for k in range(11, 15))


def id_of(content: bytes) -> bytes:
    return images.sample_id(content)


def hexes(*contents: bytes) -> list[str]:
    return [id_of(content).hex() for content in contents]


def publish(storage: Storage, stage: str, identity: str, inputs: dict[str, str], **facts: Any) -> None:
    told = {**FACTS.get(stage, {}), **facts}
    Publication(stage, identity, inputs, 0).publish(storage, counts=COUNTS[stage], facts=told)


def rows(contents: list[bytes], scores: list[float | None], shard: str, errors: list[str | None]) -> pa.Table:
    nothing = pa.array([0.5] * len(contents), pa.float32())
    columns = {
        **identity_columns(contents, shard),
        schema.SCORE: pa.array(scores, pa.float32()),
        schema.PREDICTED: pa.array([None if error else k % 2 for k, error in enumerate(errors)], pa.int32()),
        **dict.fromkeys((schema.CONFIDENCE, schema.ENERGY, schema.ENTROPY, schema.NEIGHBOUR), nothing),
        schema.ERROR: pa.array(errors, pa.string()),
    }
    return pa.table(columns, schema=schema.scores())


def choose(folder: Storage, contents: list[bytes], identity: str, inputs: dict[str, str], rule: str = "recall") -> None:
    """`selection/` and `mined/` of these images, three to a shard."""
    count = len(contents)
    columns = {
        **identity_columns(contents),
        schema.SHARD: pa.array([f"{k // 3}.parquet" for k in range(count)]),
        schema.SCORE: pa.array([1.0] * count, pa.float32()),
        schema.PREDICTED: pa.array([k % 2 for k in range(count)], pa.int32()),
        schema.CONFIDENCE: pa.array([0.9] * count, pa.float32()),
        schema.ORDER: pa.array(range(count), pa.int64()),
        schema.WHY: pa.array([rule] * count),
    }
    table = pa.table(columns, schema=schema.selection())
    selection = folder.child("selection")
    selection.write_table("selection.parquet", table)
    left_out = {schema.SAMPLE_ID: pa.array([id_of(LEAK)], schema.SAMPLE_ID_TYPE), schema.WHY: pa.array(["leak"])}
    selection.write_table("left_out.parquet", pa.table(left_out))
    threshold = 0.25 if rule == "recall" else None
    publish(selection, "select", identity, inputs, rule=rule, threshold=threshold)
    mined = table.append_column(schema.BYTES, pa.array(contents, pa.large_binary()))
    write_shards(folder.child("mined"), {f"{k}.parquet": mined.slice(3 * k, 3) for k in range(-(-count // 3))})
    publish(folder.child("mined"), "materialise", f"mined of {identity}", {"select": identity})


def teach(folder: Storage, choice: str, name: str) -> None:
    """A student of a choice, judged and exported."""
    mined = f"mined of {choice}"
    publish(folder.child("student"), "distill", name, {"fit": "scorer", "materialise": mined})
    test = {schema.SAMPLE_ID: pa.array([id_of(TEST)], schema.SAMPLE_ID_TYPE)}
    folder.child("evaluation").write_table("answers.parquet", pa.table(test))
    publish(folder.child("evaluation"), "evaluate", f"judged {name}", {"select": choice, "distill": name})
    inputs = {"fit": "scorer", "materialise": mined, "distill": name, "evaluate": f"judged {name}"}
    sums = {"model.safetensors": f"sum of {name}"}
    publish(folder.child("exported"), "export", f"exported {name}", inputs, sha256=sums)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """A finished run with one control; five of the lake's eleven images are not chosen, each for another reason."""
    made = Storage(f"{tmp_path}/runs/one")
    ids = pa.array([id_of(LABELED), id_of(JUDGE)], schema.SAMPLE_ID_TYPE)
    roles = {schema.SAMPLE_ID: ids, "role": pa.array(["train", "validate"])}
    made.child("scorer").write_table("labeled.parquet", pa.table(roles))
    publish(made.child("scorer"), "fit", "scorer", {})
    first = rows(CHOSEN, [3.0, 2.5, 2.0, 1.5, 1.0, 0.5], "a.parquet", [None] * 6)
    scores = [-1.0, 4.0, None, -float("inf"), 0.4, 2.9]
    # The first image lies in the lake twice.
    second = rows(
        [LOW, LEAK, BROKEN, GATED, CUT, CHOSEN[0]], scores, "b.parquet", [None, None, "truncated", *[None] * 3]
    )
    write_shards(made.child("scores"), {"a.parquet": first, "b.parquet": second})
    publish(made.child("scores"), "score", "scores", {"fit": "scorer"})
    choose(made, CHOSEN, "choice", {"score": "scores", "fit": "scorer"})
    teach(made, "choice", "student")
    control = made.child("controls/random")
    choose(control, [CHOSEN[0], LOW], "random choice", {"score": "scores"}, rule="random")
    teach(control, "random choice", "random student")
    return made


def trace(run: Storage, content: bytes) -> lineage.Trace:
    return lineage.trace(run, id_of(content), Silent())


def forget(run: Storage, *contents: bytes, apply: bool = True) -> lineage.Forgetting:
    return lineage.forget(run.uri, [id_of(one) for one in contents], Silent(), apply=apply, note=lambda _: None)


def files(run: Storage) -> dict[str, bytes]:
    return {file.path: run.read_bytes(file.path) for file in run.list_files()}


# -- ids ---------------------------------------------------------------------------------------------------


def test_an_image_is_meant_by_its_id_or_by_its_file(tmp_path):
    file = tmp_path / "photo.png"
    file.write_bytes(CHOSEN[0])
    for text in (str(file), id_of(CHOSEN[0]).hex(), f" {id_of(CHOSEN[0]).hex().upper()} "):
        assert lineage.sample_of(text) == id_of(CHOSEN[0])


@pytest.mark.parametrize("text", ["", "/", "abc", "f" * 31, "g" * 32, "/absent.png", "."])
def test_what_is_neither_id_nor_file_is_a_configuration_error(text):
    with pytest.raises(ConfigError) as caught:
        lineage.sample_of(text)
    assert caught.value.allowed == "32 hexadecimal digits, or the path or URI of an image"
    assert caught.value.got == text


ONE, TWO = hexes(*CHOSEN[:2])


@pytest.mark.parametrize(
    "text",
    [
        f"{ONE}\n{TWO}\n",
        f'# why\n\n  {ONE}  \n{TWO.upper()}\t# a comment, "quoted\n{ONE}\n',
        f"\ufeff{ONE}\r\n{TWO}\r\n",
        f"{ONE},a.png,cat\n{TWO},b.png,dog\n",
        f'number,sample_id,name,predicted_class,correct\n1,{ONE},\'=a.png,cat,\n2,{TWO},"b, c.png",dog,yes\n',
        f"number;Sample_ID;name\n1;{ONE};x\n2;{TWO};y\n",
        f"{ONE} selected\n{TWO} unknown\n",
    ],
)
def test_lists_come_as_people_and_programs_write_them(text):
    assert [one.hex() for one in lineage.read_ids(text.encode(), "ids.txt")] == [ONE, TWO]


@pytest.mark.parametrize(
    ("content", "where", "got"),
    [
        (f"{ONE}\n# note\n{TWO[:-1]}\n".encode(), "ids.txt, line 3", repr(TWO[:-1])),
        (f"name,id\na.png,{ONE}\n".encode(), "ids.txt, line 1", "'name'"),
        (f"number,sample_id\n1,{ONE}\n2\n".encode(), "ids.txt, line 3", "''"),
        (b"# nothing but a comment\n", "ids.txt", "none"),
        (b"", "ids.txt", "none"),
        ("é".encode("latin-1"), "ids.txt", "decode"),
    ],
)
def test_a_list_that_cannot_be_used_names_the_line(content, where, got):
    with pytest.raises(DataError) as caught:
        lineage.read_ids(content, "ids.txt")
    assert caught.value.where == where
    assert got in (caught.value.got or "")


# -- finding rows ------------------------------------------------------------------------------------------


def test_rows_are_found_in_any_row_group_and_other_columns_are_read_of_those_groups_alone(tmp_path, monkeypatch):
    contents = [png(k) for k in range(8)]
    storage = Storage(str(tmp_path))
    table = pa.table({**identity_columns(contents), schema.BYTES: pa.array(contents, pa.large_binary())})
    storage.write_table("data/0.parquet", table, row_group_rows=2)
    asked: list[tuple[int, tuple[str, ...]]] = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, columns: asked.append((group, tuple(columns))) or read(self, group, columns),
    )
    wanted = [id_of(contents[2]), id_of(contents[7]), id_of(STRANGER)]
    [(file, found)] = lineage.find(storage, ["data/0.parquet"], wanted, [schema.ROW])
    assert (file, found[schema.ROW].to_pylist()) == ("data/0.parquet", [2, 7])
    whole = (schema.SAMPLE_ID, schema.ROW)
    assert [group for group, columns in asked if columns == whole] == [1, 3]
    assert all(schema.BYTES not in columns for _, columns in asked)
    assert len(asked) == 6


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "0.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError) as caught:
        list(lineage.find(Storage(str(tmp_path)), ["0.parquet"], [id_of(TEST)], []))
    assert caught.value.where == f"{tmp_path}/0.parquet"


def test_runs_are_found_below_a_folder_and_controls_are_no_runs(run, tmp_path):
    publish(Storage(f"{tmp_path}/runs/deep/two").child("scores"), "score", "x", {})
    assert lineage.runs_below(run.uri) == [run.uri]
    assert lineage.runs_below(f"{tmp_path}/runs/") == [f"{tmp_path}/runs/deep/two", f"{tmp_path}/runs/one"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.txt").write_text("nothing")
    for place, got in ((f"{tmp_path}/empty", "no manifest of any stage"), (f"{tmp_path}/absent", "nothing")):
        with pytest.raises(DataError) as caught:
            lineage.runs_below(place)
        assert (caught.value.where, caught.value.got) == (place, got)


# -- trace -------------------------------------------------------------------------------------------------


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
    assert "made from an earlier choice: nobody can say" in lineage.render_traces([trace(run, CHOSEN[5])])


def test_a_stranger_is_not_found_and_a_run_that_has_not_looked_says_so(run, tmp_path):
    assert not trace(run, STRANGER).found
    young = Storage(f"{tmp_path}/young")
    publish(young.child("scorer"), "fit", "scorer", {})
    found = trace(young, STRANGER)
    assert (found.searched, found.choices[0].selected) == (None, None)
    text = lineage.render_traces([trace(run, STRANGER), found])
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
    assert cli._run(["forget", run.uri]) == 2
    assert cli._run(["forget", "--list", f"{tmp_path}/absent.txt", run.uri]) == 3


# -- forget ------------------------------------------------------------------------------------------------


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
    assert lineage.forgotten(run) == {id_of(CHOSEN[0]): "selected", id_of(STRANGER): "unknown"}
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
    assert "taught with some of them: student student, exported exported student" in run.read_text(lineage.LIST_FILE)


def test_the_list_grows_and_keeps_what_somebody_wrote(run):
    forget(run, CHOSEN[0])
    run.write_bytes(lineage.LIST_FILE, run.read_bytes(lineage.LIST_FILE) + f"{id_of(LOW).hex()} # by hand".encode())
    done = forget(run, CHOSEN[0], CHOSEN[1])
    assert (done.asked, done.already) == (2, 1)
    assert set(lineage.forgotten(run)) == {id_of(one) for one in (CHOSEN[0], LOW, CHOSEN[1])}
    assert "# by hand" in run.read_text(lineage.LIST_FILE)
    assert lineage.read_ids(run.read_bytes(lineage.LIST_FILE), "x") == list(lineage.forgotten(run))
    before = run.read_bytes(lineage.LIST_FILE)
    assert forget(run, CHOSEN[0], CHOSEN[1]).already == 2
    assert run.read_bytes(lineage.LIST_FILE) == before


def test_a_forgetting_that_was_interrupted_is_finished_by_doing_it_again(run, monkeypatch):
    run.write_bytes("report.html", b"<p>")
    monkeypatch.setattr(Storage, "delete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        forget(run, CHOSEN[0])
    monkeypatch.undo()
    assert id_of(CHOSEN[0]) in lineage.forgotten(run), "the list comes first"
    done = forget(run, CHOSEN[0])
    assert done.erased == ["mined/data/000.parquet", "controls/random/mined/data/000.parquet", "report.html"]
    assert not set(done.erased) & set(files(run))


def test_only_what_was_made_without_the_list_is_out_of_date(run):
    forget(run, CHOSEN[0])
    digest = lineage.forgotten_digest(run)
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


def test_images_that_the_lake_does_not_hold_outdate_nothing(run):
    done = forget(run, STRANGER)
    assert (done.outdated, done.erased, done.students) == ([], [], {})
    assert lineage.forgotten_digest(run) is None
    assert set(lineage.forgotten(run)) == {id_of(STRANGER)}
    forget(run, LOW)
    one = lineage.forgotten_digest(run)
    assert one is not None
    forget(run, CUT)
    assert lineage.forgotten_digest(run) not in (None, one)


def test_labeled_and_test_images_are_named_because_a_choice_does_not_touch_them(run):
    done = forget(run, LABELED, TEST, apply=False)
    assert (done.labeled, done.test, done.unknown) == (hexes(LABELED), hexes(TEST), [])
    text = lineage.render_forgetting(done, "again")
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


def test_what_nearly_equals_a_forgotten_image_is_not_shown_either(run):
    assert lineage.not_to_be_shown(run) == set()
    forget(run, CHOSEN[0])
    ids = pa.array([id_of(LEAK), id_of(CHOSEN[1])], schema.SAMPLE_ID_TYPE)
    left_out = pa.table({schema.SAMPLE_ID: ids, schema.WHY: pa.array(["leak", "near_forgotten"])})
    run.child("selection").write_table("left_out.parquet", left_out)
    assert lineage.not_to_be_shown(run) == {id_of(CHOSEN[0]), id_of(CHOSEN[1])}


@pytest.mark.parametrize("line", ["not-an-id selected", f"{ONE} elsewhere", ONE[:-2]])
def test_a_damaged_list_stops_whoever_reads_it(run, line):
    run.write_bytes(lineage.LIST_FILE, f"# list\n{line}\n".encode())
    with pytest.raises(DataError) as caught:
        lineage.forgotten(run)
    assert (caught.value.where, caught.value.got) == (f"{run.uri}/forgotten.txt, line 2", line)


def test_nothing_is_forgotten_while_a_run_is_at_work_but_one_may_look(run):
    with lease.hold(run, "run of job job"):
        assert forget(run, CHOSEN[0], apply=False).selected == 1
        with pytest.raises(ClusterError):
            forget(run, CHOSEN[0])
    assert not run.exists(lineage.LIST_FILE)


def test_a_folder_of_runs_is_refused_with_the_name_of_one(run, tmp_path):
    with pytest.raises(DataError) as caught:
        lineage.forget(f"{tmp_path}/runs", [id_of(LOW)], Silent(), apply=True, note=lambda _: None)
    assert caught.value.got == f"a folder with runs below it, such as {run.uri}"
    assert not run.exists(lineage.LIST_FILE)


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


def test_runs_on_s3_are_traced_and_made_to_forget(run, s3_bucket):
    remote = Storage(f"{s3_bucket}/runs/one")
    for path, content in files(run).items():
        remote.write_bytes(path, content)
    assert lineage.runs_below(f"{s3_bucket}/runs") == [remote.uri]
    there, here = (trace(one, CHOSEN[0]).model_dump(exclude={"run"}) for one in (remote, run))
    assert there == here
    assert forget(remote, CHOSEN[0]).mined == 1
    assert lineage.forgotten(remote) == {id_of(CHOSEN[0]): "selected"}
    assert not remote.exists("mined/data/000.parquet")
    assert remote.exists("mined/data/001.parquet")
