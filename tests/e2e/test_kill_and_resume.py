"""SIGKILL in any stage, run again: the same selection as an undisturbed run, and no work lost that was finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import pu_ray, write_job

# Appears while a stage is at work.
SIGNS: dict[str, str] = {
    "features": "features/ledger/*.json",
    "fit": "features/manifest.json",
    "score": "scores/data/*.parquet",
    "select": "scores/manifest.json",
    "materialise": "mined/data/*.parquet",
    "distill": "student/_train/*/checkpoint*",
    "evaluate": "student/manifest.json",
    "export": "evaluation/manifest.json",
}


def kill_when(job: Path, sign: Callable[[], bool]) -> None:
    """Start a run and SIGKILL it, driver only, as soon as the sign is seen."""
    command = [sys.executable, "-m", "pu_ray", "run", str(job), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(process, sign)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[Any], sign: Callable[[], bool]) -> None:
    """Until the sign is seen."""
    deadline = time.monotonic() + 200
    while not sign():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def selection(folder: Path) -> bytes:
    return (folder / "run/selection/selection.parquet").read_bytes()


@pytest.fixture
def undisturbed(finished: tuple[Path, Any, Any]) -> Path:
    return finished[0]


def disturbed(task: Path, folder: Path, stages: list[str]) -> str:
    """Kill a run once in each of the stages, then let it finish; returns the last run's narration."""
    job = write_job(task, folder)
    for stage in stages:
        kill_when(job, lambda sign=SIGNS[stage]: any((folder / "run").glob(sign)))
    done = pu_ray("run", str(job))
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_killed_while_mining_and_while_distilling_it_ends_where_it_would_have(
    task: Path, undisturbed: Path, tmp_path: Path
) -> None:
    said = disturbed(task, tmp_path, ["features", "distill"])
    assert selection(tmp_path) == selection(undisturbed)
    assert not any(line.startswith(("features", "fit", "score", "select")) for line in said.splitlines())
    summaries = [json.loads((folder / "run/summary.json").read_text()) for folder in (tmp_path, undisturbed)]
    # Two threads add floats in no fixed order, so the students are twins, not one.
    accuracies = [summary["student_accuracy"] for summary in summaries]
    assert accuracies[0]["low"] <= accuracies[1]["value"] <= accuracies[0]["high"]
    assert summaries[0]["scored_rows"] == summaries[1]["scored_rows"]


@pytest.mark.slow
def test_ctrl_c_while_distilling_says_how_to_go_on(task: Path, undisturbed: Path, tmp_path: Path) -> None:
    # Ray Train has a handler of its own, which knows nothing of our exit status.
    shutil.copytree(undisturbed / "run", tmp_path / "run", ignore=shutil.ignore_patterns("student", "controls"))
    job = write_job(task, tmp_path, distill={"max_steps": 1500, "checkpoint_steps": 20})
    process = subprocess.Popen([sys.executable, "-m", "pu_ray", "run", str(job)], stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: any((tmp_path / "run").glob(SIGNS["distill"])))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted; run the same command again: what is finished is kept"
    assert not (tmp_path / "run/student/manifest.json").exists(), "it was trained to the end all the same"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", list(SIGNS))
def test_killed_in_any_stage_it_ends_where_it_would_have(
    stage: str, task: Path, undisturbed: Path, tmp_path: Path
) -> None:
    disturbed(task, tmp_path, [stage])
    assert selection(tmp_path) == selection(undisturbed)
