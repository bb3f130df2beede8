"""pu_ray/lake_build.py and `pu-ray lake build`: nothing lost, nothing done twice, whatever is killed on the way."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import png

from pu_ray import cli, images, lake, lake_build, schema
from pu_ray.config import LakeConfig
from pu_ray.errors import DataError
from pu_ray.lake_build import Built
from pu_ray.progress import Silent
from pu_ray.storage import Storage

ROOT = Path(__file__).parents[2]


def noise(seed: int, size: int = 20_000) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def write_source(folder: Path, images_per_shard: int = 12, size: int = 20_000) -> list[bytes]:
    """Parquet, tars, loose files and URIs, broken ones and a damaged shard among them; all that was put in."""
    folder.mkdir(parents=True)
    contents = [noise(seed, size) for seed in range(5 * images_per_shard)] + [b"<html>", b""]
    parts = [contents[start :: len(contents) // images_per_shard] for start in range(len(contents) // images_per_shard)]
    pq.write_table(pa.table({"bytes": pa.array(parts[0], pa.binary())}), folder / "a.parquet", row_group_size=5)
    for number, part in enumerate(parts[1:3]):
        with tarfile.open(folder / f"t{number}.tar", "w") as archive:
            for place, content in enumerate(part):
                entry = tarfile.TarInfo(f"{place}.jpg")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    (folder / "loose").mkdir()
    for place, content in enumerate(parts[3]):
        (folder / "loose" / f"{place:02d}.png").write_bytes(content)
    beside = folder.parent / "beside"
    beside.mkdir()
    lines = []
    for place, content in enumerate(part for rest in parts[4:] for part in rest):
        (beside / f"{place}.bin").write_bytes(content)
        lines.append(f"{beside}/{place}.bin\n")
    (folder / "all.uris").write_text("".join(lines))
    (folder / "bad.parquet").write_bytes(b"no parquet")
    return contents


def build(source: Path | str, target: Path | str, shard_mb: int = 1, **options) -> Built:
    return lake_build.build(LakeConfig(uri=str(source)), str(target), shard_mb, Silent(), **options)


def read(uri: Path | str) -> pa.Table:
    config = LakeConfig(uri=str(uri))
    chunks = lake.plan_chunks(config, lake.list_shards(config), 1000)
    return pa.concat_tables([lake.read_chunk(config.uri, chunk) for chunk in chunks])


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.glob("part-*"))}


# -- what is built -----------------------------------------------------------------------------------------


def test_every_row_is_there_with_its_bytes_name_and_identity(tmp_path):
    contents = write_source(tmp_path / "source")
    built = build(tmp_path / "source", tmp_path / "built")
    before, after = read(tmp_path / "source"), read(tmp_path / "built")
    assert built.rows_in == built.rows_out == before.num_rows == after.num_rows == len(contents) + 1
    assert built.unreadable == 1
    assert built.size_bytes == sum(map(len, contents))
    assert after.schema == schema.encoded()

    def rows(table: pa.Table) -> Counter[tuple]:
        columns = (schema.SAMPLE_ID, schema.NAME, schema.BYTES, schema.ERROR)
        return Counter(zip(*(table[name].to_pylist() for name in columns), strict=True))

    assert rows(after) == rows(before)
    assert Counter(after[schema.SAMPLE_ID].to_pylist()) == Counter([*map(images.sample_id, contents), None])


def test_the_files_say_where_each_row_came_from_and_carry_its_identity(tmp_path):
    write_source(tmp_path / "source")
    build(tmp_path / "source", tmp_path / "built")
    table = pa.concat_tables([pq.read_table(path) for path in (tmp_path / "built").glob("part-*")])
    assert table.column_names == ["bytes", "name", "sample_id", "source"]
    assert table.schema.field("bytes").type == pa.binary()
    for row in table.to_pylist():
        expected = None if row["bytes"] is None else images.sample_id(row["bytes"])
        assert row["sample_id"] == expected
    assert set(table["source"].to_pylist()) == {
        "a.parquet",
        "all.uris",
        "bad.parquet",
        "loose/00.png",
        "t0.tar",
        "t1.tar",
    }


@pytest.mark.parametrize(("size", "rows"), [(10, 1000), (100_000, 300), (3_000_000, 9)])
def test_row_groups_are_small_and_shards_of_the_wanted_size(tmp_path, size, rows):
    (tmp_path / "source").mkdir()
    table = pa.table({"bytes": pa.array([noise(seed, size) for seed in range(rows)], pa.binary())})
    pq.write_table(table, tmp_path / "source" / "a.parquet", row_group_size=rows)
    built = build(tmp_path / "source", tmp_path / "built", shard_mb=10)
    paths = sorted((tmp_path / "built").glob("part-*"))
    assert len(paths) == built.files
    assert abs(built.files - size * rows / 10e6) <= 1
    for path in paths:
        metadata = pq.read_metadata(path)
        assert path.stat().st_size < 10e6 + (10e6 / 8 + size) / 2 + 20_000
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        for group in groups:
            assert group.num_rows <= 256
            assert group.column(0).total_compressed_size < 10e6 / 8 + size + 5_000
        for group in groups[:-1]:  # each full, of rows or of bytes
            assert group.num_rows == 256 or group.column(0).total_compressed_size >= 10e6 / 8


def test_small_shards_are_joined_and_large_ones_cut(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(40):
        table = pa.table({"bytes": pa.array([noise(100 * number + k, 10_000) for k in range(10)], pa.binary())})
        pq.write_table(table, source / f"{number:02d}.parquet")
    large = pa.table({"bytes": pa.array([noise(k, 10_000) for k in range(5000, 5350)], pa.binary())})
    pq.write_table(large, source / "large.parquet", row_group_size=10)
    built = build(source, tmp_path / "built")
    assert 7 <= built.files <= 4 + 3 + 8
    sizes = [path.stat().st_size for path in (tmp_path / "built").glob("part-*")]
    assert sum(sizes) / len(sizes) > 400_000
    assert max(sizes) < 1.2e6


def test_memory_does_not_grow_with_the_shard(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with pq.ParquetWriter(source / "a.parquet", pa.schema([("bytes", pa.binary())])) as writer:
        for group in range(50):
            contents = [noise(8 * group + place, 1_000_000) for place in range(8)]
            writer.write_table(pa.table({"bytes": pa.array(contents, pa.binary())}))
    probe = f"""
from pathlib import Path
from pu_ray import lake_build
from pu_ray.config import LakeConfig
from pu_ray.progress import Silent
# Not ru_maxrss, which begins with that of the process that started this one.
peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])
before = peak()
built = lake_build.build(LakeConfig(uri={str(source)!r}), {str(tmp_path / "built")!r}, 1000, Silent(), threads=1)
assert built.files == 1, built
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 220e6  # the shard has 400 MB


def test_one_file_can_be_built_beside_itself(tmp_path):
    write_source(tmp_path / "source")
    built = build(tmp_path / "source" / "t0.tar", tmp_path / "source" / "built")
    assert (built.rows_in, built.source_shards) == (read(tmp_path / "source" / "t0.tar").num_rows, 1)
    assert built.rows_in > 10


# -- again -------------------------------------------------------------------------------------------------


def test_the_same_command_again_does_nothing(tmp_path, monkeypatch):
    write_source(tmp_path / "source")
    first = build(tmp_path / "source", tmp_path / "built")
    before = snapshot(tmp_path / "built")
    monkeypatch.setattr(lake, "read_chunk", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(lake, "plan_chunks", lambda *_, **__: pytest.fail("planned"))
    again = build(tmp_path / "source", tmp_path / "built")
    assert again == first.model_copy(update={"files_kept": first.files})
    assert snapshot(tmp_path / "built") == before


def test_the_plan_is_the_same_in_every_run(tmp_path):
    write_source(tmp_path / "source")
    for name in ("one", "two"):
        build(tmp_path / "source", tmp_path / name)
    assert {name: content for name, (content, _) in snapshot(tmp_path / "one").items()} == {
        name: content for name, (content, _) in snapshot(tmp_path / "two").items()
    }


def test_a_lost_or_cut_output_alone_is_made_again(tmp_path):
    write_source(tmp_path / "source")
    first = build(tmp_path / "source", tmp_path / "built")
    before = snapshot(tmp_path / "built")
    lost, cut, *kept = sorted(before)
    (tmp_path / "built" / lost).unlink()
    (tmp_path / "built" / cut).write_bytes(b"short")
    again = build(tmp_path / "source", tmp_path / "built")
    after = snapshot(tmp_path / "built")
    assert again.rows_out == first.rows_out
    assert again.files_kept == len(kept)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert [after[name][0] for name in (lost, cut)] == [before[name][0] for name in (lost, cut)]


@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_after_a_change_of_the_source_only_what_holds_it_is_redone(tmp_path, change):
    source, target = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    contents = {f"{number:03d}": [noise(100 * number + k, 10_000) for k in range(8)] for number in range(100)}

    def put(name: str) -> None:
        table = pa.table({"bytes": pa.array(contents[name], pa.binary())})
        pq.write_table(table, source / f"{name}.parquet")

    for name in contents:
        put(name)
    first = build(source, target)
    before = snapshot(target)
    if change == "changed":
        contents["050"] = [noise(9_000_000 + k, 10_000) for k in range(8)]
        put("050")
    elif change == "added":
        contents["050a"] = [noise(9_000_000 + k, 10_000) for k in range(8)]
        put("050a")
    else:
        del contents["050"]
        (source / "050.parquet").unlink()
    again = build(source, target)
    after = snapshot(target)
    assert Counter(read(target)[schema.BYTES].to_pylist()) == Counter(
        content for part in contents.values() for content in part
    )
    kept = [name for name in after if before.get(name) == after[name]]
    assert len(kept) == again.files_kept >= 0.6 * first.files
    assert again.files_removed == len(before) - len(kept)
    assert again.fingerprint != first.fingerprint
    records = list((target / "_build" / "pieces").iterdir())
    assert sum(len(json.loads(path.read_text())["files"]) for path in records) == len(after)


def test_another_size_of_shards_replaces_the_old_ones(tmp_path):
    contents = write_source(tmp_path / "source")
    build(tmp_path / "source", tmp_path / "built", shard_mb=1)
    again = build(tmp_path / "source", tmp_path / "built", shard_mb=100)
    assert again.files_kept == 0
    assert again.files == len(snapshot(tmp_path / "built"))
    assert read(tmp_path / "built").num_rows == len(contents) + 1


def test_a_build_killed_at_any_moment_goes_on_without_redoing_what_was_finished(tmp_path):
    source, target = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    for number in range(12):
        table = pa.table({"bytes": pa.array([noise(100 * number + k, 50_000) for k in range(40)], pa.binary())})
        pq.write_table(table, source / f"{number:02d}.parquet", row_group_size=5)
    reference = tmp_path / "reference"
    whole = build(source, reference)
    slow = (
        "import time\nfrom pu_ray import cli, lake\nread = lake.read_chunk\n"
        "lake.read_chunk = lambda *a: (time.sleep(0.04), read(*a))[1]\n"
        f"cli.main(['lake', 'build', {str(source)!r}, {str(target)!r}, '--shard-mb', '1'])\n"
    )
    finished_before: dict[str, tuple[bytes, int]] = {}
    kills = 0
    for wanted in (2, 4, 8):
        process = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(target.glob("_build/pieces/[!.]*"))) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        recorded = {
            name for path in target.glob("_build/pieces/[!.]*") for name in json.loads(path.read_text())["files"]
        }
        now = snapshot(target)
        for name, state in finished_before.items():
            assert now[name] == state
        finished_before = {name: now[name] for name in recorded}
        assert not (target / "_build.json").exists()
    assert kills == 3
    built = build(source, target)
    after = snapshot(target)
    assert {name: after[name] for name in finished_before} == finished_before
    assert built.files_kept == len(finished_before) >= 8
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in snapshot(reference).items()
    }
    assert built.rows_out == whole.rows_out == 480
    assert not list(target.glob("_build/partial/*"))


def test_an_error_leaves_what_was_finished_and_nothing_that_looks_like_data(tmp_path, monkeypatch):
    write_source(tmp_path / "source")
    read_chunk = lake.read_chunk

    def failing(uri, chunk):
        if chunk.shard.path == "t1.tar":
            raise DataError("reading failed, again and again", slug="storage-failed", where="t1.tar")
        return read_chunk(uri, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(lake, "read_chunk", failing)
        with pytest.raises(DataError, match="reading failed"):
            build(tmp_path / "source", tmp_path / "built", threads=1)
    assert not (tmp_path / "built" / "_build.json").exists()
    for path in (tmp_path / "built").glob("part-*"):
        pq.read_table(path)
    assert build(tmp_path / "source", tmp_path / "built").rows_out == read(tmp_path / "source").num_rows


def test_a_disk_without_room_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    write_source(tmp_path / "source")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(DataError, match="writing failed") as caught:
        build(tmp_path / "source", tmp_path / "built")
    assert "No space left" in caught.value.got
    assert "finished shards are kept" in caught.value.hint


# -- where it may be built ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "/built", "/loose", "/../source/deep/er"])
def test_a_destination_inside_the_source_is_refused(tmp_path, inside):
    write_source(tmp_path / "source")
    with pytest.raises(DataError, match="the destination lies inside the source") as caught:
        build(tmp_path / "source", f"{tmp_path}/source{inside}")
    assert caught.value.where == f"{tmp_path}/source{inside}"


def test_a_destination_inside_the_source_by_a_link_is_refused(tmp_path):
    write_source(tmp_path / "source")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    with pytest.raises(DataError, match="the destination lies inside the source"):
        build(tmp_path / "source", tmp_path / "link" / "built")


def test_a_destination_that_only_begins_like_the_source_is_fine(tmp_path):
    write_source(tmp_path / "source")
    assert build(tmp_path / "source", tmp_path / "source-built").files > 0


@pytest.mark.parametrize("name", ["notes.txt", "part-mine.parquet", "deep/er/x.png"])
def test_a_destination_that_holds_other_things_is_refused_and_left_alone(tmp_path, name):
    write_source(tmp_path / "source")
    path = tmp_path / "built" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match="the destination holds other things") as caught:
        build(tmp_path / "source", tmp_path / "built")
    assert caught.value.got == name
    assert [found for found in (tmp_path / "built").rglob("*") if found.is_file()] == [path]


def test_a_build_of_another_source_is_refused(tmp_path):
    write_source(tmp_path / "source")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.png").write_bytes(png(0))
    build(tmp_path / "source", tmp_path / "built")
    before = snapshot(tmp_path / "built")
    with pytest.raises(DataError, match="the destination is built from another source") as caught:
        build(tmp_path / "other", tmp_path / "built")
    assert caught.value.got == f"{tmp_path}/source"
    assert snapshot(tmp_path / "built") == before


def test_a_source_without_images_leaves_no_mark_on_the_destination(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match="the lake holds no images"):
        build(tmp_path / "source", tmp_path / "built")
    assert not (tmp_path / "built").exists()


# -- on S3 -------------------------------------------------------------------------------------------------


def test_a_lake_is_built_on_s3_from_s3_and_again_without_work(tmp_path, s3_bucket, monkeypatch):
    write_source(tmp_path / "local")
    for path in (tmp_path / "local").rglob("*.*"):
        Storage(f"{s3_bucket}/source").write_bytes(str(path.relative_to(tmp_path / "local")), path.read_bytes())
    built = build(f"{s3_bucket}/source", f"{s3_bucket}/built")
    before, after = read(f"{s3_bucket}/source"), read(f"{s3_bucket}/built")
    assert Counter(after[schema.SAMPLE_ID].to_pylist()) == Counter(before[schema.SAMPLE_ID].to_pylist())
    listed = [file.path for file in Storage(f"{s3_bucket}/built").list_files()]
    assert len(listed) == built.files
    assert all(name.startswith("part-") for name in listed)
    monkeypatch.setattr(lake, "read_chunk", lambda *_: pytest.fail("read"))
    assert build(f"{s3_bucket}/source", f"{s3_bucket}/built").files_kept == built.files
    with pytest.raises(DataError, match="inside the source"):
        build(f"{s3_bucket}/source", f"{s3_bucket}/source/built")


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    """Runs the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli._run(list(arguments))
        seen = capsys.readouterr()
        return status, seen.out, seen.err

    return run


def test_the_command_says_rows_in_and_out(tmp_path, call):
    write_source(tmp_path / "source")
    status, out, err = call("lake", "build", str(tmp_path / "source"), str(tmp_path / "built"), "--shard-mb", "1")
    assert status == 0
    assert out.startswith(f"{tmp_path}/built: 63 rows in, 63 rows out, 1 without bytes\n")
    assert f"listing {tmp_path}/source" in err
    status, out, _ = call(
        "lake", "build", str(tmp_path / "source"), str(tmp_path / "built"), "--shard-mb", "1", "--json"
    )
    document = json.loads(out)
    assert (status, document["rows_in"], document["rows_out"]) == (0, 63, 63)
    assert document["files_kept"] == document["files"]
    assert json.loads((tmp_path / "built" / "_build.json").read_text())["fingerprint"] == document["fingerprint"]


def test_a_refused_destination_exits_with_3_and_a_wrong_size_with_2(tmp_path, call):
    write_source(tmp_path / "source")
    status, out, err = call("lake", "build", str(tmp_path / "source"), str(tmp_path / "source" / "x"))
    assert (status, out) == (3, "")
    assert err.startswith("error (data/destination-inside-source): ")
    assert call("lake", "build", str(tmp_path / "source"), str(tmp_path / "x"), "--shard-mb", "0")[0] == 2
