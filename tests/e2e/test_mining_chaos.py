"""Drivers, actors and nodes die at random moments; the scores are those of an undisturbed run all the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from pu_ray import ledger
from pu_ray.storage import Storage
from tests.chaos_driver import COUNTER
from tests.e2e.conftest import ROOT, pu_ray, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHARDS, ROWS = 15, 100
NODE_CPUS = 3


@dataclass
class Mine:
    """A cluster of a head without work and two workers, a lake of small shards, and a fitted scorer."""

    cluster: Cluster
    workers: list[Any]
    task: Path
    prepared: Path

    def job(self, folder: Path) -> Path:
        """A job of its own on copies of the features and the scorer."""
        shutil.copytree(self.prepared / "run", folder / "run")
        return _job(self.task, folder)

    def start(self, job: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.chaos_driver", "score", str(job), "--quiet"]
        environment = os.environ | {COUNTER: str(job.parent / "counter"), "PYTHONPATH": str(ROOT)}
        with open(job.parent / "stderr", "ab") as errors:
            return subprocess.Popen(
                [*command, "--address", self.cluster.address],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def replace_a_worker(self, which: int) -> None:
        self.cluster.remove_node(self.workers.pop(which), allow_graceful=False)
        self.workers.append(self.cluster.add_node(num_cpus=NODE_CPUS))


def _job(task: Path, folder: Path) -> Path:
    return write_job(
        task,
        folder,
        lake={"chunk_rows": 50},
        features={"cache": False},
        scorer={"unlabeled_sample": 400},
        resources={"embed": {"cpus": 1, "min_actors": 2, "max_actors": 2, "memory_gib": 0.5}, "train": {"cpus": 1}},
    )


@pytest.fixture(scope="module")
def mine(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mine]:
    cut = tmp_path_factory.mktemp("chaos") / "task"
    shutil.copytree(task, cut)
    whole = pa.concat_tables(pq.read_table(file) for file in sorted((cut / "lake").glob("*.parquet")))
    shutil.rmtree(cut / "lake")
    (cut / "lake").mkdir()
    for shard in range(SHARDS):
        part = whole.slice(shard * ROWS, ROWS)
        pq.write_table(part, cut / f"lake/{shard:02d}.parquet", row_group_size=50)
    prepared = tmp_path_factory.mktemp("prepared")
    job = _job(cut, prepared)
    for verb in ("features", "fit"):
        done = pu_ray(verb, str(job))
        assert done.returncode == 0, done.stderr
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=NODE_CPUS) for _ in range(2)]
    yield Mine(cluster, workers, cut, prepared)
    cluster.shutdown()


def scores(folder: Path) -> pa.Table:
    """Every row of the artifact, in the lake's order."""
    storage = Storage(str(folder / "run/scores"))
    parts = [storage.read_table(file) for file in ledger.data_files(storage)]
    return pa.concat_tables(parts).sort_by([("shard", "ascending"), ("row", "ascending")])


def finish(process: subprocess.Popen[bytes], job: Path) -> None:
    assert process.wait(timeout=240) == 0, (job.parent / "stderr").read_text()


@pytest.fixture(scope="module")
def undisturbed(mine: Mine, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The scores of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = mine.job(folder)
    finish(mine.start(job), job)
    assert counted(folder) == SHARDS * ROWS
    return scores(folder)


def counted(folder: Path) -> int:
    return sum(map(int, (folder / "counter").read_text().split()))


def scoring_actors() -> list[int]:
    """Process ids of the actor pool, on whichever node of whichever Ray of ours."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = place.read_text()
        except OSError:  # it ended meanwhile
            continue
        if title.startswith("ray::") and "MapWorker(" in title:
            found.append(int(place.parent.name))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_whatever_dies_the_scores_are_those_of_an_undisturbed_run(
    seed: int, mine: Mine, undisturbed: pa.Table, tmp_path: Path, record_property: Any
) -> None:
    chance = random.Random(seed)
    victim = ("driver", "actor", "node")[seed % 3]
    job = mine.job(tmp_path)
    process = mine.start(job)
    # At a random moment of the work, counted in images: on a busy machine a moment in seconds may be past the end.
    least = chance.uniform(0, 0.6) * SHARDS * ROWS
    deadline = time.monotonic() + 120
    while not (tmp_path / "counter").exists() or counted(tmp_path) <= least:
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if victim == "driver":
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = mine.start(job)
    elif victim == "actor":
        actors = scoring_actors()
        assert actors
        os.kill(chance.choice(actors), signal.SIGKILL)
    else:
        mine.replace_a_worker(chance.randrange(2))
    finish(process, job)
    found = scores(tmp_path)
    assert found.num_rows == SHARDS * ROWS
    assert found == undisturbed
    twice = counted(tmp_path) / (SHARDS * ROWS) - 1
    record_property("victim", victim)
    record_property("scored_twice", twice)
    print(f"seed {seed}: killed a {victim}; scored twice: {100 * twice:.1f} %")
    # At most a block at work on each actor, and for a driver the shards that were begun.
    assert twice <= 0.25
