"""A node that is lost in the middle of a lake pass changes nothing of what the pass makes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pu_ray import config, ledger
from pu_ray.pipeline import Pipeline
from pu_ray.progress import Narrator
from pu_ray.storage import Storage
from tests.e2e import lost_mining_node
from tests.e2e.conftest import ROOT, SMALL, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def job(task: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return write_job(
        task,
        folder,
        # Large pictures and small chunks, so that there is a middle.
        teacher={"preprocessing": {"size_px": 96, "channels": 1, "mean": [0.13], "std": [0.31]}},
        lake={"chunk_rows": 20},
        resources={"embed": {"min_actors": 3, "max_actors": 3}},
    )


def rows(folder: Path) -> pa.Table:
    storage = Storage(str(folder / "run/features"))
    parts = [storage.read_table(file) for file in ledger.data_files(storage)]
    return pa.concat_tables(parts).sort_by([("shard", "ascending"), ("row", "ascending")])


@pytest.fixture(scope="module")
def undisturbed(task: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = config.load(job(task, folder), [], {}).job
    Pipeline(settings, Narrator(quiet=True), contextlib.nullcontext).run_verb("features")
    return rows(folder)


@pytest.mark.parametrize("mode", ["kill", "notice"])
def test_a_node_that_is_lost_changes_nothing(mode: str, task: Path, undisturbed: pa.Table, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(lost_mining_node.__file__)), mode]
    command += [str(job(task, tmp_path)), str(tmp_path / "lost.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lost: dict[str, Any] = json.loads((tmp_path / "lost.json").read_text())
    assert lost["busy"] >= 2, "the work was spread"
    assert 0 < lost["files"] < lost["all_files"], "it was lost half-way"
    ours = rows(tmp_path)
    assert ours.num_rows == SMALL.lake_rows
    assert ours.equals(undisturbed)
