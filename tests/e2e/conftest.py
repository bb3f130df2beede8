"""A task small enough to run the whole chain in a test: real digits, real letters, a real teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pu_ray import demo
from pu_ray.progress import Silent

ROOT = Path(__file__).parents[2]
SMALL = demo.DemoSize(
    lake_rows=1500,
    test_per_class=30,
    teacher_per_class=80,
    labeled_per_class=60,
    hidden_per_class=50,
    teacher_steps=60,
    leaks=6,
    broken=5,
    copies=10,
)


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher, labeled and test images and a lake."""
    folder = tmp_path_factory.mktemp("task") / "demo"
    demo.build(str(folder), SMALL, 0, Silent())
    return folder


def write_job(task: Path, folder: Path, **sections: Any) -> Path:
    """The quickstart's job on the small task, with a shorter distillation."""
    job = yaml.safe_load((ROOT / "cluster/jobs/smoke.yaml").read_text())
    job["output"] = str(folder / "run")
    for section, key, name in (
        ("teacher", "weights", "teacher.safetensors"),
        ("teacher", "classes", "labels.txt"),
        ("labeled", "uri", "labeled"),
        ("test", "uri", "test"),
        ("lake", "uri", "lake"),
        ("lake", "truth", "truth.parquet"),
    ):
        job[section][key] = str(task / name)
    job["lake"]["chunk_rows"] = 250
    job["distill"] |= {"max_steps": 60, "batch_size": 32, "validations": 3}
    job["evaluation"] = {"gate": {"max_gap_to_teacher": 100.0}, "controls": []}
    for section, settings in sections.items():
        job[section] = job.get(section, {}) | settings if isinstance(settings, dict) else settings
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def pu_ray(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line, as a user runs it, from a folder that is not the project's."""
    command = [sys.executable, "-m", "pu_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd="/", check=False, **options)


@pytest.fixture(scope="session")
def finished(task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A finished run: its folder, its summary as printed, and the finished process."""
    folder = tmp_path_factory.mktemp("chain")
    done = pu_ray("run", str(write_job(task, folder, evaluation={"controls": ["random"]})), "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done
