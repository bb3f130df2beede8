"""The whole chain as a user runs it, and what must hold of its results."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.e2e.conftest import SMALL, pu_ray, write_job


def test_the_summary_holds_what_the_design_promises(finished: tuple[Path, Any, Any]) -> None:
    folder, summary, _ = finished
    assert summary == json.loads((folder / "run/summary.json").read_text())
    assert summary["lake_rows"] == SMALL.lake_rows
    assert summary["scored_rows"] + summary["error_rows"] == summary["lake_rows"]
    assert summary["error_rows"] == SMALL.broken
    for name in ("teacher_accuracy", "student_accuracy", "mined_precision", "mined_recall"):
        rate = summary[name]
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    assert summary["teacher_parameters"] > 4 * summary["student_parameters"]
    assert summary["prior"]["low"] <= summary["prior"]["estimate"] <= summary["prior"]["high"]
    assert summary["recall_promise"] == {"recall": 0.96, "confidence": 0.95}
    assert set(summary["seconds"]) == set(summary["stages_done"])
    assert summary["controls"]["random"]["mined_rows"] == summary["mined_rows"]


def test_mining_beats_chance_by_far(finished: tuple[Path, Any, Any]) -> None:
    _, summary, _ = finished
    # A lake of a few hundred images and a teacher of a few steps: the promise of recall costs precision here.
    assert summary["mined_precision"]["value"] > 2 * summary["true_prior"]
    assert summary["mined_recall"]["value"] > 0.8
    assert summary["controls"]["random"]["mined_precision"]["value"] < 0.5


def test_no_planted_test_image_is_mined(finished: tuple[Path, Any, Any], task: Path) -> None:
    folder, summary, _ = finished
    test_ids = {hashlib.blake2b(file.read_bytes(), digest_size=16).digest() for file in (task / "test").glob("*/*.png")}
    mined = pq.read_table(folder / "run/selection/selection.parquet")
    assert not test_ids & set(mined["sample_id"].to_pylist())
    assert summary["leaks_exact"] >= 1
    assert summary["leaks_near"] >= 1


def test_a_quiet_run_says_what_it_does_and_nothing_of_ray_s(finished: tuple[Path, Any, Any]) -> None:
    _, _, process = finished
    lines = process.stderr.splitlines()
    assert any(line.startswith("features") for line in lines)
    noise = [line for line in lines if any(word in line for word in ("INFO", "WARN", "raylet", "(pid="))]
    assert not noise


def test_running_again_does_nothing_says_so_and_is_quick(finished: tuple[Path, Any, Any]) -> None:
    folder, summary, _ = finished
    before = {file: file.stat().st_mtime_ns for file in (folder / "run").rglob("*") if file.is_file()}
    started = time.monotonic()
    again = pu_ray("run", str(folder / "job.yaml"), "--json")
    assert time.monotonic() - started < 15
    assert "nothing to do" in again.stderr
    assert json.loads(again.stdout) == summary
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "run").rglob("*") if file.is_file()}


def test_each_stage_alone_finds_its_work_done(finished: tuple[Path, Any, Any]) -> None:
    folder, _, _ = finished
    done = pu_ray("select", str(folder / "job.yaml"))
    assert done.returncode == 0
    assert done.stderr.count("nothing to do") == 2  # the choice, and its images


def test_a_stage_without_what_it_needs_names_the_command_that_makes_it(task: Path, tmp_path: Path) -> None:
    done = pu_ray("score", str(write_job(task, tmp_path)))
    assert done.returncode == 3
    assert "pu-ray features" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def copied(finished: tuple[Path, Any, Any], task: Path, tmp_path: Path) -> Path:
    """The finished run once more, to be changed."""
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    write_job(task, tmp_path, evaluation={"controls": ["random"]})
    return tmp_path


def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_before(copied: Path) -> None:
    job, run = str(copied / "job.yaml"), copied / "run"
    before = {name: (run / name / "manifest.json").read_bytes() for name in ("features", "scorer", "scores")}
    done = pu_ray("select", job, "--set", "selection.budget=40", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["counts"]["selected"] == 40
    classes = pq.read_table(run / "selection/selection.parquet")["predicted"].to_numpy()
    assert set(np.bincount(classes, minlength=10)) == {4}
    assert before == {name: (run / name / "manifest.json").read_bytes() for name in before}


def test_the_exported_student_is_the_same_in_every_format(finished: tuple[Path, Any, Any], task: Path) -> None:
    folder, summary, _ = finished
    exported = folder / "run/exported"
    manifest = json.loads((exported / "manifest.json").read_text())
    for name, digest in manifest["facts"]["sha256"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    files = sorted((task / "test").glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file), np.float32) for file in files])[:, None]
    batch = ((pixels / 255 - 0.1307) / 0.3081).astype(np.float32)
    onnx = onnxruntime.InferenceSession(exported / "model.onnx").run(["logits"], {"pixels": batch})[0]
    program = torch.export.load(exported / "model.pt2").module()
    with torch.inference_mode():
        pt2 = program(torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(onnx, pt2, atol=1e-3)
    labels = (exported / "labels.txt").read_text().split()
    right = np.mean([labels[k] == file.parent.name for k, file in zip(onnx.argmax(1), files, strict=True)])
    assert right == pytest.approx(summary["student_accuracy"]["value"])


def test_a_student_that_fails_its_gate_is_reported_but_not_exported(copied: Path) -> None:
    strict = ("--set", "evaluation.gate.max_gap_to_teacher=0.0", "--set", "evaluation.controls=[]")
    hopeless = ("--set", "distill.max_steps=1", "--set", "distill.validations=1")
    job, output = str(copied / "job.yaml"), copied / "run"
    exported_before = (output / "exported/manifest.json").read_bytes()
    done = pu_ray("run", job, *strict, *hopeless)
    assert done.returncode == 5, done.stderr
    assert "what to do" in done.stderr
    assert "failed the quality gate" in (output / "report.html").read_text()
    alone = pu_ray("export", job, *strict, *hopeless)
    assert alone.returncode == 5
    assert (output / "exported/manifest.json").read_bytes() == exported_before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_stored_soft_labels_the_teacher_is_asked_once_and_the_student_learns(
    copied: Path, finished: tuple[Path, Any, Any]
) -> None:
    job, run = str(copied / "job.yaml"), copied / "run"
    cached = ("--set", "distill.soft_labels=cached", "--set", "distill.crops=2", "--set", "evaluation.controls=[]")
    done = pu_ray("run", job, *cached, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    mined, stored = (json.loads((run / name / "manifest.json").read_text()) for name in ("mined", "soft_labels"))
    labeled = json.loads((run / "scorer/manifest.json").read_text())["counts"]
    images = mined["counts"]["rows"] + labeled["labeled_train"] + labeled["labeled_calibrate"]
    assert stored["counts"] == {"images": images, "crops": 2 * images}
    # Few steps teach neither much: as much as with the teacher in the loop, and far more than chance, which is 0.1.
    _, in_loop, _ = finished
    assert summary["student_accuracy"]["high"] > in_loop["student_accuracy"]["low"]
    assert summary["student_accuracy"]["low"] > 0.2
    again = pu_ray("distill", job, *cached, "--set", "distill.max_steps=20")
    assert again.returncode == 0, again.stderr
    assert "soft_labels: nothing to do" in again.stderr, "another training asks the teacher nothing"
