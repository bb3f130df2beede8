"""pu_ray/ledger.py: what counts as finished, and what an interrupted pass leaves behind."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pu_ray import ledger
from pu_ray.errors import DataError
from pu_ray.lake import Shard
from pu_ray.ledger import Ledger, ShardEntry
from pu_ray.storage import Storage

SHARDS = [Shard(f"part-{k}.parquet", "parquet", f"fingerprint-{k}", 100) for k in range(3)]


@pytest.fixture
def folder(tmp_path) -> Storage:
    return Storage(str(tmp_path / "features"))


def finish(folder: Storage, shard: Shard, settings: str = "settings", errors: dict | None = None) -> ShardEntry:
    """What a pass does for one shard: two data files, then the entry."""
    entry, sizes = ShardEntry(shard.path, shard.fingerprint), {}
    for first_row, rows in ((0, 3), (3, 2)):
        file = f"data/{shard.key}-{first_row:09d}.parquet"
        sizes[file] = folder.write_table(file, pa.table({"row": range(rows)}))
        entry.files[file] = rows
    entry.errors.update(errors or {})
    Ledger(folder, settings).commit(shard, entry, sizes)
    return entry


def paths(folder: Storage) -> set[str]:
    return {file.path for file in folder.list_files()}


def test_a_committed_shard_is_finished_with_all_it_left(folder):
    entry = finish(folder, SHARDS[0], errors={"truncated": 2})
    before = paths(folder)
    found = Ledger(folder, "settings").finished(SHARDS)
    assert found == {"part-0.parquet": entry}
    assert found["part-0.parquet"].rows == 5
    assert found["part-0.parquet"].errors == {"truncated": 2}
    assert paths(folder) == before


def test_an_empty_folder_has_finished_nothing(folder):
    assert Ledger(folder, "settings").finished(SHARDS) == {}


@pytest.mark.parametrize("changed", ["fingerprint", "settings"])
def test_another_content_or_other_settings_redo_a_shard_and_remove_what_it_left(folder, changed):
    keep, stale = finish(folder, SHARDS[0]), finish(folder, SHARDS[1])
    shards, settings = list(SHARDS), "settings"
    if changed == "fingerprint":
        shards[1] = Shard(SHARDS[1].path, "parquet", "another", 100)
    else:
        settings = "others"
    found = Ledger(folder, settings).finished(shards)
    assert found == ({SHARDS[0].path: keep} if changed == "fingerprint" else {})
    assert not set(stale.files) & paths(folder)
    assert f"ledger/{SHARDS[1].key}.json" not in paths(folder)
    if changed == "fingerprint":
        assert set(keep.files) | {f"ledger/{SHARDS[0].key}.json"} == paths(folder)


@pytest.mark.parametrize("damage", ["missing", "cut", "grown", "empty"])
def test_a_missing_or_cut_data_file_redoes_its_shard_alone(folder, damage):
    keep, broken = finish(folder, SHARDS[0]), finish(folder, SHARDS[1])
    file = sorted(broken.files)[1]
    content = folder.read_bytes(file)
    if damage == "missing":
        folder.delete(file)
    else:
        folder.write_bytes(file, {"cut": content[:-1], "grown": content + b"x", "empty": b""}[damage])
    assert Ledger(folder, "settings").finished(SHARDS) == {SHARDS[0].path: keep}
    assert paths(folder) == {*keep.files, f"ledger/{SHARDS[0].key}.json"}


def test_data_of_an_interrupted_shard_is_removed_and_other_files_stay(folder):
    keep = finish(folder, SHARDS[0])
    folder.write_bytes(f"data/{SHARDS[1].key}-000000000.parquet", b"rows without an entry")
    folder.write_bytes("ledger/0000000000000000.json", b"{}")  # an entry of a shard that is gone
    for other in ("index.parquet", "manifest.json", "notes/a.txt", "_engine/teacher.onnx"):
        folder.write_bytes(other, b"x")
    Ledger(folder, "settings").finished(SHARDS)
    expected = {*keep.files, f"ledger/{SHARDS[0].key}.json", "index.parquet", "manifest.json", "notes/a.txt"}
    assert paths(folder) == expected
    assert folder.kind("_engine/teacher.onnx") == "file"


def test_a_shard_that_left_the_lake_is_forgotten_with_its_data(folder):
    kept = finish(folder, SHARDS[0])
    gone = finish(folder, SHARDS[1])
    assert Ledger(folder, "settings").finished(SHARDS[:1]) == {SHARDS[0].path: kept}
    assert not set(gone.files) & paths(folder)


def test_looking_twice_changes_nothing(folder):
    finish(folder, SHARDS[0])
    finish(folder, SHARDS[2])
    first = Ledger(folder, "settings").finished(SHARDS)
    assert Ledger(folder, "settings").finished(SHARDS) == first
    assert len(first) == 2


# -- the index ---------------------------------------------------------------------------------------------


def test_the_index_lists_every_data_file_sorted_and_adds_the_errors_up(folder):
    entries = {
        "z": ShardEntry("z", "fz", {"data/9": 1, "data/1": 2}, {"truncated": 1, "too_large": 1}),
        "a": ShardEntry("a", "fa", {"data/5": 3}, {"truncated": 4}),
        "none": ShardEntry("none", "fn"),
    }
    assert ledger.write_index(folder, entries) == {"truncated": 5, "too_large": 1}
    assert ledger.read_index(folder).to_pylist() == [
        {"file": "data/1", "shard": "z", "fingerprint": "fz", "rows": 2},
        {"file": "data/5", "shard": "a", "fingerprint": "fa", "rows": 3},
        {"file": "data/9", "shard": "z", "fingerprint": "fz", "rows": 1},
    ]
    assert ledger.data_files(folder) == ["data/1", "data/5", "data/9"]


def test_the_index_of_nothing_is_an_empty_table_with_the_same_columns(folder):
    assert not ledger.write_index(folder, {})
    assert ledger.data_files(folder) == []
    assert ledger.read_index(folder).column_names == ["file", "shard", "fingerprint", "rows"]


def test_the_index_does_not_depend_on_the_order_in_which_shards_finished(folder):
    entries = {name: ShardEntry(name, "f", {f"data/{name}": 1}) for name in "abc"}
    ledger.write_index(folder, entries)
    one = folder.read_bytes(ledger.INDEX_FILE)
    ledger.write_index(folder, dict(reversed(entries.items())))
    assert folder.read_bytes(ledger.INDEX_FILE) == one


# -- the share of errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("errors", "rows"), [({}, 0), ({}, 100), ({"truncated": 5}, 100), ({"a": 2, "b": 3}, 100)])
def test_errors_up_to_the_allowed_share_pass(errors, rows):
    ledger.check_error_share(errors, rows, 0.05, "s3://lake")


def test_more_errors_stop_the_run_with_each_reason_counted():
    with pytest.raises(DataError, match="too many images") as caught:
        ledger.check_error_share({"truncated": 4, "not_an_image": 2}, 100, 0.05, "s3://lake")
    assert caught.value.where == "s3://lake"
    assert caught.value.got == "6 of 100 images (0.060): not_an_image 2, truncated 4"
    assert "0.05" in caught.value.allowed
    assert "lake.max_error_share" in caught.value.allowed


def test_no_error_is_allowed_where_none_is():
    with pytest.raises(DataError):
        ledger.check_error_share({"truncated": 1}, 10**9, 0.0, "lake")
