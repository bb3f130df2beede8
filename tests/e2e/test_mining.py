"""The ways through the lake agree: from cached features, from images, behind a cascade, on a lake that grew."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from pu_ray import config, ledger, manifest
from pu_ray.manifest import Manifest
from pu_ray.pipeline import Pipeline
from pu_ray.progress import Narrator
from pu_ray.storage import Storage
from tests.e2e.conftest import ROOT, SMALL, write_job

pytestmark = pytest.mark.usefixtures("ray_cluster")


def mine(job: Path, *verbs: str) -> dict[str, Manifest]:
    """Run stages in this process, on the Ray that the tests share; returns the manifests by stage."""
    made: dict[str, Manifest] = {}
    for verb in verbs or ("features", "fit", "score", "select"):
        narrator = Narrator(quiet=True)
        pipeline = Pipeline(config.load(job, [], {}).job, narrator, contextlib.nullcontext)
        made |= {document.stage: document for document in pipeline.run_verb(verb)}
    return made


def job(task: Path, folder: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_job(task, folder, selection={"recall": 0.9}, **sections)


def rows(folder: Path, artifact: str) -> pa.Table:
    storage = Storage(str(folder / "run" / artifact))
    parts = [storage.read_table(file) for file in ledger.data_files(storage)]
    return pa.concat_tables(parts).sort_by([("shard", "ascending"), ("row", "ascending")])


def selected(folder: Path) -> set[bytes]:
    return set(pq.read_table(folder / "run/selection/selection.parquet")["sample_id"].to_pylist())


@pytest.fixture(scope="module")
def cached(task: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on cached features, shared with other runs."""
    folder = tmp_path_factory.mktemp("cached")
    mine(job(task, folder, features={"cache_uri": str(folder / "shared")}))
    return folder


def test_scores_from_images_are_those_from_features(task: Path, cached: Path, tmp_path: Path) -> None:
    made = mine(job(task, tmp_path, features={"cache": False}))
    assert made["features"].facts["whole_lake"] is False
    assert made["score"].counts["rows"] == SMALL.lake_rows
    one, other = rows(cached, "scores"), rows(tmp_path, "scores")
    for name in ("sample_id", "shard", "row", "predicted", "error"):
        assert one[name] == other[name]
    # Cached features are float16 and those in flight float32.
    scores = [table["score"].drop_null().to_numpy() for table in (one, other)]
    np.testing.assert_allclose(*scores, atol=0.1)
    common = selected(cached) & selected(tmp_path)
    assert len(common) > 0.98 * len(selected(cached) | selected(tmp_path))


def test_a_pass_says_what_it_held_and_how_much_memory_it_took(cached: Path) -> None:
    for folder in ("features", "scores"):
        made = manifest.read(Storage(str(cached / "run" / folder)))
        assert made is not None
        assert made.usage is not None
        assert made.usage.workers is not None
        workers = made.usage.workers
        # What is read of Ray Data's executor is not public: this is what tells of a version that has it elsewhere.
        assert (workers.unit, workers.gpu_hours) == ("actors", 0)
        assert workers.most is not None
        assert 1 <= workers.most <= 2
        assert workers.cpu_hours is not None
        assert 0 < workers.cpu_hours * 3600 <= 10 * made.seconds
        assert workers.peak_bytes is not None
        assert 2**26 < workers.peak_bytes < 2**32


# A Ray of its own with a GPU that is only a number: scheduling does not ask what it is.
WITH_A_GPU = """
import sys
import ray
if __name__ == "__main__":
    ray.init(address="local", num_cpus=6, num_gpus=1, include_dashboard=False, log_to_driver=False)
    from pu_ray.cli import main
    sys.argv = ["pu-ray", "features", sys.argv[1], "--set", "resources.embed.gpus=0.5", "--set", "features.engine=onnx"]
    main()
"""


@pytest.mark.timeout(240)
def test_actors_with_a_gpu_get_decoded_blocks_from_tasks_and_see_the_same(
    task: Path, cached: Path, tmp_path: Path
) -> None:
    script = tmp_path / "with_a_gpu.py"
    script.write_text(WITH_A_GPU)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(job(task, tmp_path))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = rows(tmp_path, "features"), rows(cached, "features")
    for name in ("sample_id", "shard", "row", "error"):
        assert ours[name] == theirs[name]
    # In batches of another size, so in another order of adding up.
    answers = [np.stack(table.filter(pc.is_null(table["error"]))["logits"].to_numpy()) for table in (ours, theirs)]
    np.testing.assert_allclose(*answers, atol=0.02)


def test_a_cascade_spares_most_of_the_lake_and_keeps_what_would_be_mined(
    task: Path, cached: Path, tmp_path: Path
) -> None:
    made = mine(
        job(task, tmp_path, features={"cascade": True, "cascade_sample": 800}, scorer={"unlabeled_sample": 600})
    )
    features, scores = rows(tmp_path, "features"), rows(tmp_path, "scores")
    assert features.num_rows == scores.num_rows == SMALL.lake_rows
    usable = features["error"].is_null().to_numpy()
    rejected = usable & (features["gate"].fill_null(1.0).to_numpy() < 0)
    assert rejected.sum() > 0.2 * SMALL.lake_rows
    # Half of the lake is the fit's sample, and has features all the same.
    embedded = features["features"].is_valid().to_numpy(zero_copy_only=False)
    assert 0.2 < embedded[rejected].mean() < 0.8
    assert made["features"].counts["spared"] == (rejected & ~embedded).sum()
    assert np.isneginf(scores["score"].to_numpy(zero_copy_only=False)[rejected]).all()
    assert np.isfinite(scores["score"].to_numpy(zero_copy_only=False)[usable & ~rejected]).all()
    assert scores["score"].null_count == SMALL.broken
    assert len(selected(tmp_path) & selected(cached)) > 0.85 * len(selected(cached))
    prior, other = made["fit"].facts["prior"], manifest.require(Storage(str(cached / "run/scorer")), "fit")
    assert prior["low"] <= other.facts["prior"]["high"]
    assert other.facts["prior"]["low"] <= prior["high"]
    # Straight from the images, behind the same gate: the same rows are rejected.
    direct = tmp_path / "direct"
    features = {"cascade": True, "cascade_sample": 800, "cache": False}
    mine(job(task, direct, features=features, scorer={"unlabeled_sample": 600}))
    rejected_too = np.isneginf(rows(direct, "scores")["score"].to_numpy(zero_copy_only=False))
    assert (rejected_too == rejected).all()


def test_what_another_run_embedded_is_not_embedded_again(task: Path, cached: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(cached / "shared", shared)
    # Marked, so that it shows whose features these are.
    files = list(shared.rglob("*.parquet"))
    assert files
    for file in files:
        table = pq.read_table(file)
        place = table.column_names.index("thumbnail")
        marks = pa.array([[7] * 144] * table.num_rows, table.schema.field(place).type)
        pq.write_table(table.set_column(place, table.schema.field(place), marks), file)
    other = tmp_path / "other"
    mine(job(task, other, features={"cache_uri": str(shared)}), "features")
    one, again = rows(cached, "features"), rows(other, "features")
    for name in ("sample_id", "shard", "row", "features", "logits", "error"):
        assert one[name] == again[name]
    assert set(np.unique(np.array(again["thumbnail"].to_pylist()))) == {7}


def test_new_shards_cost_their_own_work_and_no_more(task: Path, tmp_path: Path) -> None:
    grown = tmp_path / "task"
    shutil.copytree(task, grown)
    (file,) = (grown / "lake").glob("*.parquet")
    whole = pq.read_table(file)
    file.unlink()
    for shard in range(10):
        pq.write_table(whole.slice(shard * 150, 150), grown / f"lake/{shard}.parquet", row_group_size=50)
    new = grown / "lake/9.parquet"
    new.rename(grown / "9.parquet")
    made = mine(job(grown, tmp_path / "run"))
    assert made["features"].counts["rows_done_now"] == made["score"].counts["rows_done_now"] == 1350
    scorer = (tmp_path / "run/run/scorer/manifest.json").read_bytes()
    before = rows(tmp_path / "run", "scores")

    (grown / "9.parquet").rename(new)
    made = mine(tmp_path / "run/job.yaml")
    assert made["features"].counts["rows_done_now"] == made["score"].counts["rows_done_now"] == 150
    assert made["score"].counts["rows"] == 1500
    assert (tmp_path / "run/run/scorer/manifest.json").read_bytes() == scorer
    after = rows(tmp_path / "run", "scores")
    assert after.slice(0, 1350) == before

    # A changed shard is redone alone, but the scorer has then learned on another lake.
    pq.write_table(whole.slice(0, 140), grown / "lake/3.parquet", row_group_size=50)
    made = mine(tmp_path / "run/job.yaml")
    assert made["features"].counts["rows_done_now"] == 140
    assert made["score"].counts["rows"] == 1490
    assert (tmp_path / "run/run/scorer/manifest.json").read_bytes() != scorer


@pytest.mark.slow
def test_the_papers_scorer_is_trained_by_two_workers_and_looks_at_every_image(
    task: Path, cached: Path, tmp_path: Path
) -> None:
    scorer = {
        "features": "finetuned",
        "kind": "nnpu",
        "workers": 2,
        "unlabeled_sample": 400,
        "epochs": 4,
        "batch_size": 32,
        "optimizer": {"kind": "sgd", "lr": 0.05, "weight_decay": 5e-3},
    }
    made = mine(job(task, tmp_path, features={"cache_uri": str(cached / "shared")}, scorer=scorer))
    assert made["fit"].facts["features"] == "finetuned"
    assert len(made["fit"].facts["curve"]) == 4
    assert not (tmp_path / "run/scorer/_train").exists()
    scores = rows(tmp_path, "scores")
    assert scores.num_rows == SMALL.lake_rows
    assert scores["score"].null_count == SMALL.broken
    # A few steps from a teacher of the very classes rank digits above letters.
    truth = pq.read_table(task / "truth.parquet")
    classes = dict(zip(truth["sample_id"].to_pylist(), truth["class"].to_pylist(), strict=True))
    usable = scores.filter(scores["error"].is_null())
    positive = np.array([classes[sample] >= 0 for sample in usable["sample_id"].to_pylist()])
    assert roc_auc_score(positive, usable["score"].to_numpy()) > 0.8
    # What controls rank by is the frozen teacher's, as it is beside a head on frozen features.
    other = rows(cached, "scores")
    for name in ("energy", "entropy"):
        np.testing.assert_allclose(
            scores[name].to_numpy(zero_copy_only=False), other[name].to_numpy(zero_copy_only=False), atol=0.05
        )
