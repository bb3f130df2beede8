"""pu_ray/lineage/lookup.py: what the artifacts of a run know of some images."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pu_ray import schema
from pu_ray.errors import DataError
from pu_ray.lineage import lookup
from pu_ray.storage import Storage
from tests.unit.artifacts import identity_columns, png
from tests.unit.lineage.runs import STRANGER, TEST, id_of, publish


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
    [(file, found)] = lookup.find(storage, ["data/0.parquet"], wanted, [schema.ROW])
    assert (file, found[schema.ROW].to_pylist()) == ("data/0.parquet", [2, 7])
    whole = (schema.SAMPLE_ID, schema.ROW)
    assert [group for group, columns in asked if columns == whole] == [1, 3]
    assert all(schema.BYTES not in columns for _, columns in asked)
    assert len(asked) == 6


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "0.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError) as caught:
        list(lookup.find(Storage(str(tmp_path)), ["0.parquet"], [id_of(TEST)], []))
    assert caught.value.where == f"{tmp_path}/0.parquet"


def test_runs_are_found_below_a_folder_and_controls_are_no_runs(run, tmp_path):
    publish(Storage(f"{tmp_path}/runs/deep/two").child("scores"), "score", "x", {})
    assert lookup.runs_below(run.uri) == [run.uri]
    assert lookup.runs_below(f"{tmp_path}/runs/") == [f"{tmp_path}/runs/deep/two", f"{tmp_path}/runs/one"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.txt").write_text("nothing")
    for place, got in ((f"{tmp_path}/empty", "no manifest of any stage"), (f"{tmp_path}/absent", "nothing")):
        with pytest.raises(DataError) as caught:
            lookup.runs_below(place)
        assert (caught.value.where, caught.value.got) == (place, got)
