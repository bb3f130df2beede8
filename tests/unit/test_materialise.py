"""pu_ray/materialise.py: the chosen images' bytes and no others, or an error where the lake has changed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import identity_columns, job, png, publish

from pu_ray import lake, materialise, schema
from pu_ray.errors import DataError
from pu_ray.progress import Silent
from pu_ray.storage import Storage

CONTENTS = {"a.parquet": [png(k, side=6) for k in range(10)], "b.parquet": [png(k, side=6) for k in range(10, 16)]}


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "lake").mkdir()
    for name, contents in CONTENTS.items():
        table = pa.table({"bytes": pa.array(contents, pa.binary())})
        pq.write_table(table, tmp_path / "lake" / name, row_group_size=3)
    return tmp_path


def selection(*places: tuple[str, int]) -> pa.Table:
    """Rows of selection.parquet for places in the lake, in the order given."""
    parts = []
    for order, (shard, row) in enumerate(places):
        columns = {
            **identity_columns([CONTENTS[shard][row]], shard, row),
            schema.SCORE: pa.array([float(row)], pa.float32()),
            schema.PREDICTED: pa.array([0], pa.int32()),
            schema.CONFIDENCE: pa.array([0.5], pa.float32()),
            schema.ORDER: pa.array([order], pa.int64()),
            schema.WHY: pa.array(["recall"]),
        }
        parts.append(pa.table(columns, schema=schema.selection()))
    return pa.concat_tables(parts)


def read(root, chosen: pa.Table, chunk_rows=4) -> tuple[list[lake.Chunk], pa.Table]:
    config = job(root, lake={"chunk_rows": chunk_rows})
    wanted = set(chosen[schema.SHARD].to_pylist())
    shards = {shard.path: shard for shard in lake.list_shards(config.lake) if shard.path in wanted}
    units = materialise._units(config, chosen, shards)
    return units, pa.concat_tables([unit.read() for unit in units])


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 100])
def test_each_chosen_image_comes_once_with_its_own_bytes(root, chunk_rows):
    chosen = selection(("b.parquet", 5), ("a.parquet", 9), ("a.parquet", 0), ("a.parquet", 4), ("a.parquet", 3))
    units, table = read(root, chosen, chunk_rows)
    assert table.schema == schema.mined()
    assert sum(unit.rows for unit in units) == 5
    assert [unit.rows for unit in units] == [unit.read().num_rows for unit in units]
    found = {(row["shard"], row["row"]): row for row in table.to_pylist()}
    expected = {(row["shard"], row["row"]): row for row in chosen.to_pylist()}
    assert set(found) == set(expected)
    for place, row in found.items():
        assert row.pop(schema.BYTES) == CONTENTS[place[0]][place[1]]
        assert row == expected[place]


def test_chunks_without_a_chosen_image_are_not_read(root):
    units, _ = read(root, selection(("a.parquet", 9), ("a.parquet", 0)), chunk_rows=3)
    assert len(units) == 2
    assert {unit.shard.path for unit in units} == {"a.parquet"}


def test_an_image_that_is_not_what_was_scored_stops_the_run(root):
    chosen = selection(("a.parquet", 4))
    changed = list(CONTENTS["a.parquet"])
    changed[4] = png(99, side=6)
    pq.write_table(pa.table({"bytes": pa.array(changed, pa.binary())}), root / "lake" / "a.parquet", row_group_size=3)
    with pytest.raises(DataError, match="the lake has changed since it was scored") as caught:
        read(root, chosen)
    assert caught.value.where == f"{root}/lake/a.parquet"
    assert "run the whole job again" in caught.value.hint


def test_a_shard_that_became_shorter_stops_the_run(root):
    chosen = selection(("a.parquet", 9), ("a.parquet", 0))
    config = job(root)
    shards = {shard.path: shard for shard in lake.list_shards(config.lake)}
    units = materialise._units(config, chosen, {"a.parquet": shards["a.parquet"]})
    table = pa.table({"bytes": pa.array(CONTENTS["a.parquet"][:5], pa.binary())})
    pq.write_table(table, root / "lake" / "a.parquet", row_group_size=3)
    with pytest.raises(DataError) as caught:
        units[0].read()
    assert "a.parquet" in caught.value.where


def test_a_shard_that_has_gone_is_named_before_anything_is_read(root):
    config = job(root)
    storage = Storage(config.output)
    target = storage.child("selection")
    target.write_table("selection.parquet", selection(("a.parquet", 0), ("b.parquet", 0)))
    publish(target, "select")
    (root / "lake" / "b.parquet").unlink()
    with pytest.raises(DataError, match="shards of the lake have gone") as caught:
        materialise.run(config, storage, {"select": "x"}, "identity", Silent())
    assert caught.value.got == "b.parquet"
    assert caught.value.where == f"{root}/lake"
