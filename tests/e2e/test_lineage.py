"""A takedown as a platform engineer does it: find the image, forget it, run again, look again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import pu_ray, write_job


@pytest.fixture
def copied(finished: tuple[Path, Any, Any], task: Path, tmp_path: Path) -> Path:
    """The finished run once more, to be changed."""
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    write_job(task, tmp_path, evaluation={"controls": ["random"]})
    return tmp_path


def test_forgotten_images_are_gone_after_the_next_run_and_nothing_before_the_choice_is_redone(copied: Path) -> None:
    job, run = str(copied / "job.yaml"), copied / "run"
    mined = pq.read_table(sorted((run / "mined/data").glob("*.parquet"))).to_pylist()
    gone = [mined[0], mined[-1]]
    ids = [row["sample_id"].hex() for row in gone]
    (copied / "ids.txt").write_text("# takedown 17\n" + "\n".join(ids) + "\n")
    kept = [path for name in ("features", "scorer", "scores") for path in (run / name).rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in kept}
    old_student = json.loads((run / "student/manifest.json").read_text())["identity"]
    # A page for people, with their faces on it.
    assert pu_ray("audit", job, "--images", "5000").returncode == 0

    traced = json.loads(pu_ray("trace", ids[0], str(run), "--json").stdout)[0]
    assert traced["choices"][0]["student"] == traced["choices"][0]["student"] | {
        "identity": old_student,
        "taught": True,
    }

    done = pu_ray("forget", "--list", str(copied / "ids.txt"), str(run), "--apply", "--json")
    assert done.returncode == 0, done.stderr
    forgotten = json.loads(done.stdout)
    assert (forgotten["selected"], forgotten["mined"], forgotten["unknown"]) == (2, 2, [])
    assert {"report.html", "audit/sheet.html"} <= set(forgotten["erased"])
    assert not (run / "report.html").exists()

    again = pu_ray("run", job, "--json")
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    redone = [line.split()[0] for line in again.stderr.splitlines() if " s  " in line]
    for stage in ("select", "materialise", "distill", "evaluate", "export"):
        assert stage in redone
    assert not {"features", "fit", "score"} & set(redone)

    contents = {row["bytes"] for row in gone}
    for folder in (run, run / "controls/random"):
        chosen = pq.read_table(folder / "selection/selection.parquet")["sample_id"].to_pylist()
        copies = pq.read_table(sorted((folder / "mined/data").glob("*.parquet")), columns=["sample_id", "bytes"])
        assert sorted(copies["sample_id"].to_pylist()) == sorted(chosen)
        assert not set(ids) & {sample.hex() for sample in chosen}
        assert not contents & set(copies["bytes"].to_pylist())
    assert (run / "report.html").exists()
    assert summary["controls"]["random"]["mined_rows"] == summary["mined_rows"]
    selected = json.loads((run / "selection/manifest.json").read_text())["counts"]
    assert selected["forgotten"] == 2
    assert summary["student_accuracy"]["value"] > 0.2

    text = pu_ray("trace", ids[0], str(run)).stdout
    assert "not selected: it is in forgotten.txt" in text
    student = json.loads((run / "student/manifest.json").read_text())["identity"]
    assert student != old_student
    assert f"student    not taught with it; identity {student[:16]}" in text
    # Another choice from the same scores forgets them as well.
    other = pu_ray("select", job, "--set", "selection.duplicates=exact", "--json")
    assert other.returncode == 0, other.stderr
    assert json.loads(other.stdout)[0]["counts"]["forgotten"] == 2
    chosen = pq.read_table(run / "selection/selection.parquet")["sample_id"].to_pylist()
    assert not set(ids) & {sample.hex() for sample in chosen}


def test_a_run_before_and_one_after_are_compared(finished: tuple[Path, Any, Any], copied: Path) -> None:
    one, two = str(finished[0] / "run"), str(copied / "run")
    again = pu_ray("run", str(copied / "job.yaml"), "--set", "evaluation.gate.max_gap_to_teacher=99")
    assert again.returncode == 0, again.stderr
    page = copied / "compare.html"
    done = pu_ray("compare", one, two, "--html", str(page), "--json")
    assert done.returncode == 0, done.stderr
    compared = json.loads(done.stdout)
    assert compared["differing_settings"] == {"evaluation.gate.max_gap_to_teacher": [100.0, 99.0]}
    assert compared["warnings"] == []
    assert compared["runs"][0]["student_accuracy"] == finished[1]["student_accuracy"]
    assert "evaluation.gate.max_gap_to_teacher" in page.read_text()
    text = pu_ray("compare", one, two).stdout
    assert "student accuracy" in text
