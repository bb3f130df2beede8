"""pu_ray/features.py and pu_ray/score.py: which shards are work, and how a sample of the lake is drawn."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import FACTS, job, png, publish

from pu_ray import embedding, features, lake, lake_pass, score
from pu_ray.ledger import Ledger, ShardEntry, write_index
from pu_ray.progress import Silent
from pu_ray.storage import Storage

CONTENTS = [png(seed) for seed in range(7)]

# -- shards without rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["features", "score"])
def test_an_empty_shard_beside_finished_ones_is_no_work_and_no_error(tmp_path, monkeypatch, stage):
    (tmp_path / "lake").mkdir()
    for name, contents in (("a", CONTENTS[:3]), ("empty", [])):
        pq.write_table(pa.table({"bytes": pa.array(contents, pa.binary())}), tmp_path / "lake" / f"{name}.parquet")
    config = job(tmp_path, features={"engine": "torch"})
    full = next(shard for shard in lake.list_shards(config.lake) if shard.path == "a.parquet")
    inputs = {"teacher": "content", "lake": "listing", "features": "f", "fit": "s"}
    settings = (
        embedding.row_settings(config, inputs)
        if stage == "features"
        else score.settings_of.digest({"scorer": "s", "rows": embedding.row_settings(config, inputs)})
    )
    storage = Storage(config.output)
    target = storage.child({"features": "features", "score": "scores"}[stage])
    size = target.write_table("data/a.parquet", pa.table({"row": range(3)}))
    Ledger(target, settings).commit(
        full, ShardEntry("a.parquet", full.fingerprint, {"data/a.parquet": 3}), {"data/a.parquet": size}
    )
    if stage == "score":
        write_index(storage.child("features"), {})
        publish(storage.child("features"), "features", counts={"rows": 3})
        publish(storage.child("scorer"), "fit", facts=FACTS["fit"])
    run = {"features": features.run, "score": score.run}[stage]
    published = run(config, storage, inputs, "identity", Silent())
    assert published.counts["rows"] == 3
    assert published.counts["rows_done_now"] == 0


# -- samples -----------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Forty shards of thirty rows, in row groups of ten."""
    (tmp_path / "lake").mkdir()
    for shard in range(40):
        rows = pa.table({"bytes": pa.array([b"%d-%d" % (shard, row) for row in range(30)], pa.binary())})
        pq.write_table(rows, tmp_path / f"lake/{shard:02d}.parquet", row_group_size=10)
    return lake.list_shards(job(tmp_path).lake)


def places(units) -> list[tuple[str, int, int]]:
    return [(unit.shard.path, unit.first_row, unit.rows) for unit in units]


def test_a_sample_is_as_large_as_asked_the_same_every_time_and_spread_over_shards(tmp_path, shards):
    drawn = lake_pass.sample_units(job(tmp_path), shards, 200)
    assert 200 <= sum(unit.rows for unit in drawn) < 200 + 30
    assert places(drawn) == places(lake_pass.sample_units(job(tmp_path), list(reversed(shards)), 200))
    assert len({unit.shard.path for unit in drawn}) > 3
    assert places(drawn) != places(lake_pass.sample_units(job(tmp_path, seed=1), shards, 200))


def test_a_sample_opens_few_shards_of_a_large_lake(tmp_path, shards, monkeypatch):
    opened = []
    plan = lake.plan_chunks

    def watched(config, some, *arguments, **options):
        opened.extend(some)
        return plan(config, some, *arguments, **options)

    monkeypatch.setattr(lake, "plan_chunks", watched)
    lake_pass.sample_units(job(tmp_path), shards, 100)
    assert len(opened) == 16


def test_a_sample_larger_than_the_lake_is_the_lake(tmp_path, shards):
    assert sum(unit.rows for unit in lake_pass.sample_units(job(tmp_path), shards, 10**6)) == 1200


def test_units_do_not_depend_on_what_is_left_to_do(tmp_path, shards):
    config = job(tmp_path)
    every = lake_pass.lake_units(config, shards, shards)
    rest = lake_pass.lake_units(config, shards, shards[25:])
    assert places(rest) == [place for place in places(every) if place[0] >= "25"]
