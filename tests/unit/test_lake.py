"""pu_ray/lake.py: every format is the same stream of rows, each row exactly once, the broken ones included."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import picture, png
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from pu_ray import images, lake, schema
from pu_ray.config import LakeConfig, PreprocessingConfig
from pu_ray.errors import DataError
from pu_ray.storage import Storage

CONTENTS = [png(seed, side=6) for seed in range(23)]
IDS = [images.sample_id(content) for content in CONTENTS]
PREPROCESSING = PreprocessingConfig(size_px=6)
FORMATS = ("parquet", "huggingface", "tar", "folder", "uris", "uri column")


def write_parquet(folder: Path, contents, name="part.parquet", row_group_rows=4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"caption": ["x"] * len(contents), "bytes": pa.array(contents, pa.binary())})
    pq.write_table(table, folder / name, row_group_size=row_group_rows)


def write_huggingface(folder: Path, contents) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [content and {"bytes": content, "path": f"{k:03d}.png"} for k, content in enumerate(contents)]
    pq.write_table(pa.table({"image": pa.array(rows, image)}), folder / "part.parquet", row_group_size=4)


def write_tar(folder: Path, contents, name="part.tar", extra=()) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w") as archive:
        for member, content in [*((f"{k:03d}.PNG", content) for k, content in enumerate(contents)), *extra]:
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_folder(folder: Path, contents) -> None:
    for k, content in enumerate(contents):
        path = folder / ("ab"[k % 2]) / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_behind_uris(folder: Path, contents) -> list[str]:
    """The images beside the lake; their URIs, relative and absolute by turns."""
    beside = folder.parent / f"{folder.name}-images"
    beside.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    uris = []
    for k, content in enumerate(contents):
        (beside / f"{k:03d}.bin").write_bytes(content)
        root = (f"../{beside.name}", str(beside), f"file://{beside}")[k % 3]
        uris.append(f"{root}/{k:03d}.bin")
    return uris


def write_uris(folder: Path, contents, name="part.uris.txt") -> None:
    lines = [f"# line {k}\r\n\r\n  {uri} \r\n" for k, uri in enumerate(write_behind_uris(folder, contents))]
    (folder / name).write_bytes(b"\xef\xbb\xbf" + "".join(lines).encode())


def write_uri_column(folder: Path, contents, column="uri") -> None:
    table = pa.table({column: write_behind_uris(folder, contents), "caption": ["x"] * len(contents)})
    pq.write_table(table, folder / "part.parquet", row_group_size=4)


WRITERS = dict(
    zip(
        FORMATS,
        (write_parquet, write_huggingface, write_tar, write_folder, write_uris, write_uri_column),
        strict=True,
    )
)


@pytest.fixture(params=FORMATS)
def any_lake(request, tmp_path) -> LakeConfig:
    WRITERS[request.param](tmp_path / "lake", CONTENTS)
    return LakeConfig(uri=str(tmp_path / "lake"))


def config_of(folder: Path, **settings) -> LakeConfig:
    return LakeConfig(uri=str(folder), **settings)


def chunks_of(config: LakeConfig, chunk_rows: int = 5) -> list[lake.Chunk]:
    return lake.plan_chunks(config, lake.list_shards(config), chunk_rows)


@pytest.fixture
def no_waiting(monkeypatch):
    """Retries happen at once."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)


@pytest.fixture
def ranges(monkeypatch) -> list[tuple[int, int]]:
    """The bytes that shards are asked for, as (start, length)."""
    asked: list[tuple[int, int]] = []
    read_at = lake._File._read_at

    def recorded(self, position, length):
        asked.append((position, length))
        return read_at(self, position, length)

    monkeypatch.setattr(lake._File, "_read_at", recorded)
    return asked


def read_all(config: LakeConfig, chunk_rows: int = 5) -> pa.Table:
    return pa.concat_tables([lake.read_chunk(config.uri, chunk) for chunk in chunks_of(config, chunk_rows)])


# -- the formats -------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_ids_for_the_same_images(any_lake):
    table = read_all(any_lake)
    assert table.schema == schema.encoded()
    found = table[schema.SAMPLE_ID].to_pylist()
    assert sorted(found) == sorted(IDS)
    assert table[schema.ERROR].null_count == len(CONTENTS)
    by_id = dict(zip(IDS, CONTENTS, strict=True))
    assert [by_id[sample] for sample in found] == table[schema.BYTES].to_pylist()


def test_a_row_is_named_where_its_format_has_names(tmp_path):
    expected = {
        "parquet": [None] * 2,
        "huggingface": ["000.png", "001.png"],
        "tar": ["000.PNG", "001.PNG"],
        "folder": ["a/000.png", "b/001.png"],
        "uris": ["../uris-images/000.bin", f"{tmp_path}/uris-images/001.bin"],
        "uri column": ["../uri column-images/000.bin", f"{tmp_path}/uri column-images/001.bin"],
    }
    for kind, write in WRITERS.items():
        write(tmp_path / kind, CONTENTS[:2])
        assert sorted(read_all(config_of(tmp_path / kind))[schema.NAME].to_pylist(), key=str) == expected[kind]


def test_the_kind_of_each_shard_is_found_and_a_wanted_kind_leaves_out_the_others(tmp_path):
    write_parquet(tmp_path, CONTENTS[:1], "z.parquet")
    write_tar(tmp_path, CONTENTS[:1], "m.tar")
    write_folder(tmp_path / "loose", CONTENTS[:1])
    (tmp_path / "notes.txt").write_text("no image")
    found = [(shard.path, shard.format) for shard in lake.list_shards(config_of(tmp_path))]
    assert found == [("loose/a/000.png", "folder"), ("m.tar", "tar"), ("z.parquet", "parquet")]
    only = lake.list_shards(config_of(tmp_path, format="tar"))
    assert [(shard.path, shard.format) for shard in only] == [("m.tar", "tar")]


def test_a_tar_holds_images_and_other_files_and_folders(tmp_path):
    write_tar(tmp_path, CONTENTS[:2], extra=[("000.json", b"{}"), ("README", b"text"), ("x/y.jpg", b"broken")])
    table = read_all(config_of(tmp_path))
    assert table[schema.NAME].to_pylist() == ["000.PNG", "001.PNG", "x/y.jpg"]
    assert table[schema.ROW].to_pylist() == [0, 1, 2]


def test_a_webdataset_brings_its_images_alone(tmp_path):
    parts = [(f"{k:03d}.{kind}", content) for k in range(3) for kind, content in (("cls", b"7"), ("json", b"{}"))]
    write_tar(tmp_path, CONTENTS[:2], extra=[*parts, ("a/002.seg.png", CONTENTS[2])])
    table = read_all(config_of(tmp_path))
    assert table[schema.NAME].to_pylist() == ["000.PNG", "001.PNG", "a/002.seg.png"]
    assert table[schema.BYTES].to_pylist() == CONTENTS[:3]


def test_links_folders_and_sparse_files_of_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "part.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind in (("a.png", tarfile.REGTYPE), ("b.png", tarfile.SYMTYPE), ("c.png", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a.png"
            entry.size = len(CONTENTS[0]) if kind == tarfile.REGTYPE else 0
            archive.addfile(entry, io.BytesIO(CONTENTS[0]))
        folder = tarfile.TarInfo("d.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        sparse = tarfile.TarInfo("e.png")
        sparse.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(sparse)
    assert read_all(config_of(tmp_path))[schema.NAME].to_pylist() == ["a.png"]


@pytest.mark.parametrize("name", ["ü" * 120 + ".png", "x/" * 150 + "long.png"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_a_tar_are_kept_in_every_chunk(tmp_path, name, form):
    with tarfile.open(tmp_path / "part.tar", "w", format=form) as archive:
        for k in range(3):
            entry = tarfile.TarInfo(f"{k}{name}")
            entry.size = len(CONTENTS[k])
            archive.addfile(entry, io.BytesIO(CONTENTS[k]))
    table = read_all(config_of(tmp_path), chunk_rows=1)
    assert table[schema.NAME].to_pylist() == [f"{k}{name}" for k in range(3)]
    assert table[schema.BYTES].to_pylist() == CONTENTS[:3]


def test_a_name_in_a_tar_that_is_not_utf8_keeps_its_row(tmp_path):
    with tarfile.open(tmp_path / "part.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        entry = tarfile.TarInfo("caf\xe9.png")
        entry.size = len(CONTENTS[0])
        archive.addfile(entry, io.BytesIO(CONTENTS[0]))
    table = read_all(config_of(tmp_path))
    assert table[schema.NAME].to_pylist() == ["caf\ufffd.png"]
    assert table[schema.BYTES].to_pylist() == CONTENTS[:1]


@pytest.mark.parametrize("name", ["a.tar.gz", "b.TGZ", "c.tar.zst"])
def test_a_compressed_tar_is_refused_and_not_passed_over(tmp_path, name):
    write_tar(tmp_path, CONTENTS[:1])
    (tmp_path / name).write_bytes(b"anything")
    for where in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match="a compressed tar cannot be read in parts") as caught:
            lake.list_shards(config_of(where))
        assert caught.value.got == name
        assert "gunzip" in caught.value.hint
    write_parquet(tmp_path, CONTENTS[:1])
    assert len(lake.list_shards(config_of(tmp_path, format="parquet"))) == 1


@pytest.mark.parametrize(
    ("column", "kind"),
    [("name", pa.string()), ("path", pa.large_string()), ("name", pa.dictionary(pa.int32(), pa.string()))],
)
def test_a_text_column_beside_the_bytes_names_the_rows(tmp_path, column, kind):
    names = ["a.png", None, "ü.png"]
    table = pa.table({"bytes": pa.array(CONTENTS[:3], pa.binary()), column: pa.array(names, pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "part.parquet")
    assert read_all(config_of(tmp_path))[schema.NAME].to_pylist() == names


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(70), pa.binary_view()])
def test_every_type_of_bytes_is_read(tmp_path, kind):
    contents = [content.ljust(70, b"\0")[:70] for content in CONTENTS[:3]]
    pq.write_table(pa.table({"bytes": pa.array(contents, kind)}), tmp_path / "part.parquet")
    assert read_all(config_of(tmp_path))[schema.BYTES].to_pylist() == contents


# -- one file as a lake ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_parquet, "part.parquet"),
        (write_tar, "part.tar"),
        (write_uris, "part.uris.txt"),
        (write_uri_column, "part.parquet"),
        (lambda folder, contents: write_folder(folder, contents[:1]), "a/000.png"),
    ],
    ids=["parquet", "tar", "uris", "uri column", "an image"],
)
def test_one_file_is_a_lake_as_its_folder_is(tmp_path, write, name):
    write(tmp_path / "lake", CONTENTS)
    (tmp_path / "lake" / "other.parquet").write_bytes(b"not part of it")
    config = config_of(tmp_path / "lake" / name)
    (shard,) = lake.list_shards(config)
    assert (shard.path, shard.alone) == (Path(name).name, True)
    assert read_all(config)[schema.SAMPLE_ID].to_pylist() == IDS[: 1 if "/" in name else None]
    before = shard.fingerprint
    os.utime(tmp_path / "lake" / name, ns=(1, 1))
    assert lake.list_shards(config)[0].fingerprint != before


def test_a_folder_with_the_name_of_a_file_is_a_folder(tmp_path):
    write_parquet(tmp_path / "x.parquet", CONTENTS[:2], "x.parquet")
    config = config_of(tmp_path / "x.parquet")
    assert [(shard.path, shard.alone) for shard in lake.list_shards(config)] == [("x.parquet", False)]
    assert read_all(config)[schema.SAMPLE_ID].to_pylist() == IDS[:2]


def test_a_file_of_another_kind_than_wanted_is_no_lake(tmp_path):
    write_parquet(tmp_path, CONTENTS[:1])
    with pytest.raises(DataError, match="the lake holds no images"):
        lake.list_shards(config_of(tmp_path / "part.parquet", format="tar"))


# -- URIs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["uri", "url"])
def test_what_cannot_be_fetched_is_an_error_row_named_by_its_uri(tmp_path, column, no_waiting):
    uris = write_behind_uris(tmp_path / "lake", CONTENTS[:1])
    uris += ["../gone.png", None, "nosuchscheme://x/y.png", "s3:/", str(tmp_path), "", "bucket:\0/x"]
    pq.write_table(pa.table({column: uris}), tmp_path / "lake" / "part.parquet")
    table = read_all(config_of(tmp_path / "lake"))
    assert table[schema.NAME].to_pylist() == uris
    assert table[schema.ERROR].to_pylist() == [None] + ["unreadable"] * 7
    assert table[schema.SAMPLE_ID].to_pylist() == [IDS[0]] + [None] * 7


def test_bytes_are_preferred_to_uris(tmp_path):
    table = {"uri": ["gone.png"], "bytes": pa.array(CONTENTS[:1], pa.binary())}
    pq.write_table(pa.table(table), tmp_path / "part.parquet")
    assert read_all(config_of(tmp_path))[schema.BYTES].to_pylist() == CONTENTS[:1]


@pytest.mark.parametrize("write", [write_uris, write_uri_column, write_folder, write_tar])
def test_what_is_longer_than_allowed_is_never_read(tmp_path, write, monkeypatch):
    contents = [CONTENTS[0], b"x" * 1_000_000, CONTENTS[2]]
    write(tmp_path / "lake", contents)
    limit = max(map(len, CONTENTS))
    config = config_of(tmp_path / "lake", max_image_bytes=limit, format="tar" if write is write_tar else "auto")
    read: list[int] = []
    as_it_is = lake._read_member if write is write_tar else lake._read_file

    def recorded(*arguments):
        row = as_it_is(*arguments)
        read.append(len(row.content or b""))
        return row

    monkeypatch.setattr(lake, "_read_member" if write is write_tar else "_read_file", recorded)
    by_name = sorted(read_all(config).to_pylist(), key=lambda row: row[schema.NAME][-7:])
    assert [row[schema.ERROR] for row in by_name] == [None, "too_large", None]
    assert [row[schema.BYTES] for row in by_name] == [CONTENTS[0], None, CONTENTS[2]]
    assert max(read) <= limit


def test_what_is_exactly_as_long_as_allowed_is_read(tmp_path):
    write_uris(tmp_path / "lake", CONTENTS[:1])
    for limit, expected in ((len(CONTENTS[0]), None), (len(CONTENTS[0]) - 1, "too_large")):
        config = config_of(tmp_path / "lake", max_image_bytes=limit)
        assert read_all(config)[schema.ERROR].to_pylist() == [expected]


def test_a_list_that_is_not_utf8_loses_the_line_and_not_its_place(tmp_path):
    (tmp_path / "a.png").write_bytes(CONTENTS[0])
    (tmp_path / "all.uris").write_bytes(b"a.png\ncaf\xe9.png\na.png")
    table = read_all(config_of(tmp_path, format="uris"))
    assert table[schema.ERROR].to_pylist() == [None, "unreadable", None]
    assert table[schema.NAME].to_pylist() == ["a.png", "caf\ufffd.png", "a.png"]


def test_uris_are_fetched_in_parallel(tmp_path, monkeypatch):
    write_uris(tmp_path / "lake", CONTENTS[:8])
    together = threading.Barrier(8, timeout=30)
    read_file = lake._read_file

    def waiting(*arguments):
        together.wait()
        return read_file(*arguments)

    monkeypatch.setattr(lake, "_read_file", waiting)
    assert read_all(config_of(tmp_path / "lake"), chunk_rows=8)[schema.ERROR].null_count == 8


def test_an_empty_list_or_one_of_comments_has_no_rows(tmp_path):
    (tmp_path / "a.uris").write_bytes(b"")
    (tmp_path / "b.uris").write_bytes(b"# nothing\n\n   \n#")
    assert chunks_of(config_of(tmp_path)) == []


# -- chunks: every row exactly once ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 4, 5, 8, 22, 23, 24, 1000])
def test_every_row_is_in_exactly_one_chunk(any_lake, chunk_rows):
    chunks = chunks_of(any_lake, chunk_rows)
    for shard in lake.list_shards(any_lake):
        mine = [chunk for chunk in chunks if chunk.shard == shard]
        positions = [row for chunk in mine for row in range(chunk.first_row, chunk.first_row + chunk.rows)]
        assert positions == list(range(len(positions)))
    tables = [lake.read_chunk(any_lake.uri, chunk) for chunk in chunks]
    assert [table.num_rows for table in tables] == [chunk.rows for chunk in chunks]
    table = pa.concat_tables(tables)
    assert sorted(table[schema.SAMPLE_ID].to_pylist()) == sorted(IDS)
    places = set(zip(table[schema.SHARD].to_pylist(), table[schema.ROW].to_pylist(), strict=True))
    assert len(places) == len(CONTENTS)


@pytest.mark.parametrize(
    ("chunk_rows", "sizes", "groups"),
    [
        (4, [4, 4, 4, 4, 4, 3], [(0,), (1,), (2,), (3,), (4,), (5,)]),
        (8, [8, 8, 7], [(0, 1), (2, 3), (4, 5)]),
        (11, [8, 8, 7], [(0, 1), (2, 3), (4, 5)]),
        (3, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3], [(0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,), (4,), (4,), (5,)]),
        (100, [23], [(0, 1, 2, 3, 4, 5)]),
    ],
)
def test_chunks_of_parquet_are_whole_row_groups_where_they_fit(tmp_path, chunk_rows, sizes, groups):
    write_parquet(tmp_path, CONTENTS, row_group_rows=4)
    chunks = chunks_of(config_of(tmp_path), chunk_rows)
    assert [chunk.rows for chunk in chunks] == sizes
    assert [chunk.row_groups for chunk in chunks] == groups


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12))
def test_row_groups_of_any_sizes_are_covered_once_and_in_order(sizes, chunk_rows):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with pq.ParquetWriter(f"{folder}/x.parquet", pa.schema([("bytes", pa.binary())])) as writer:
            for size in sizes:
                writer.write_table(pa.table({"bytes": pa.array([b"x"] * size, pa.binary())}))
        chunks = chunks_of(config_of(Path(folder)), chunk_rows)
    positions = [row for chunk in chunks for row in range(chunk.first_row, chunk.first_row + chunk.rows)]
    assert positions == list(range(sum(sizes)))
    for chunk in chunks:
        assert 1 <= chunk.rows <= chunk_rows


@pytest.mark.parametrize(("chunk_rows", "chunk_bytes", "pieces"), [(7, 10**9, 4), (1000, 1, 16), (1000, 10**9, 1)])
def test_one_huge_row_group_is_cut_for_memory_and_within_reason_for_the_pool(tmp_path, chunk_rows, chunk_bytes, pieces):
    write_parquet(tmp_path, CONTENTS, row_group_rows=1000)
    config = config_of(tmp_path)
    chunks = lake.plan_chunks(config, lake.list_shards(config), chunk_rows, chunk_bytes)
    assert len(chunks) == pieces
    tables = [lake.read_chunk(config.uri, chunk) for chunk in chunks]
    assert [table.num_rows for table in tables] == [chunk.rows for chunk in chunks]
    assert pa.concat_tables(tables)[schema.SAMPLE_ID].to_pylist() == IDS
    # A subset of the rows, too.
    last = chunks[-1]
    wanted = [last.first_row, last.first_row + last.rows - 1]
    found = lake.read_chunk(config.uri, last, wanted)
    assert found[schema.SAMPLE_ID].to_pylist() == [IDS[row] for row in dict.fromkeys(wanted)]


@pytest.mark.parametrize("chunk_bytes", [1, 300, 1000, 10**9])
@pytest.mark.parametrize("kind", ["parquet", "huggingface", "tar", "folder"])
def test_chunks_hold_about_as_many_bytes_as_wanted(tmp_path, kind, chunk_bytes):
    WRITERS[kind](tmp_path, CONTENTS)
    config = config_of(tmp_path)
    shards = lake.list_shards(config)
    chunks = lake.plan_chunks(config, shards, 1000, chunk_bytes)
    tables = [lake.read_chunk(config.uri, chunk) for chunk in chunks]
    assert sorted(pa.concat_tables(tables)[schema.SAMPLE_ID].to_pylist()) == sorted(IDS)
    uncut = 4 if kind in ("parquet", "huggingface") else 1  # a row group of four, or an image
    for table in tables:
        size = sum(len(content) for content in table[schema.BYTES].to_pylist())
        assert size <= chunk_bytes or table.num_rows <= uncut
    assert (len(chunks) > len(shards)) == (chunk_bytes < 10**9)


@pytest.mark.parametrize("kind", ["uris", "uri column"])
def test_the_bytes_behind_uris_are_not_known_and_not_counted(tmp_path, kind):
    WRITERS[kind](tmp_path / "lake", CONTENTS)
    config = config_of(tmp_path / "lake")
    assert [chunk.rows for chunk in lake.plan_chunks(config, lake.list_shards(config), 20, 1)] == [20, 3]


@pytest.mark.parametrize(("write", "least"), [(write_tar, 0.9), (write_parquet, 0.5)])
def test_a_late_chunk_is_read_without_what_lies_before_it(tmp_path, write, least, ranges, monkeypatch):
    monkeypatch.setattr(lake, "_SEARCH_BUFFER_BYTES", 512)
    monkeypatch.setattr(lake, "_STREAM_BUFFER_BYTES", 512)
    contents = [content + bytes(20_000) for content in CONTENTS]
    write(tmp_path, contents)
    chunks = chunks_of(config_of(tmp_path), 4)
    ranges.clear()
    table = lake.read_chunk(str(tmp_path), chunks[-1])
    assert table[schema.BYTES].to_pylist() == contents[-chunks[-1].rows :]
    if write is write_tar:
        assert min(start for start, _ in ranges) >= least * chunks[-1].offset > 0
    assert sum(length for _, length in ranges) < 5 * 21_000


@pytest.mark.parametrize("write", [write_tar, write_parquet, write_huggingface])
def test_of_wanted_rows_only_their_members_and_row_groups_are_read(tmp_path, write, ranges, monkeypatch):
    monkeypatch.setattr(lake, "_SEARCH_BUFFER_BYTES", 512)
    generator = np.random.default_rng(0)
    contents = [generator.bytes(50_000) for _ in CONTENTS]  # nothing that Parquet could compress
    write(tmp_path, contents)
    (chunk,) = chunks_of(config_of(tmp_path), 1000)
    ranges.clear()
    table = lake.read_chunk(str(tmp_path), chunk, [9, 10])
    assert table[schema.BYTES].to_pylist() == contents[9:11]
    # Two members, or the one row group of four that holds both; and headers or the footer.
    assert sum(length for _, length in ranges) < (2 if write is write_tar else 4) * 50_000 + 80_000


def test_planning_a_tar_reads_headers_and_not_images(tmp_path, ranges, monkeypatch):
    monkeypatch.setattr(lake, "_SEARCH_BUFFER_BYTES", 512)
    write_tar(tmp_path, [bytes(100_000)] * 20)
    assert sum(chunk.rows for chunk in chunks_of(config_of(tmp_path))) == 20
    assert sum(length for _, length in ranges) < 20 * 5_000


def test_wanted_rows_alone_are_read(any_lake):
    everything = read_all(any_lake)
    chunks = chunks_of(any_lake)
    for shard in lake.list_shards(any_lake):
        wanted = [0, 3, 4, 5, 9]
        parts = [lake.read_chunk(any_lake.uri, chunk, wanted) for chunk in chunks if chunk.shard == shard]
        table = pa.concat_tables(parts)
        assert table[schema.ROW].to_pylist() == wanted
        mine = everything.filter(pa.compute.equal(everything[schema.SHARD], shard.path))
        assert table == mine.take(wanted).combine_chunks()
    assert lake.read_chunk(any_lake.uri, chunks[0], []).num_rows == 0


# -- broken rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_parquet, write_huggingface])
def test_a_row_without_bytes_keeps_its_place_and_says_so(tmp_path, write):
    contents = [CONTENTS[0], None, CONTENTS[2], None]
    write(tmp_path, contents)
    table = read_all(config_of(tmp_path))
    assert table[schema.ROW].to_pylist() == [0, 1, 2, 3]
    assert table[schema.ERROR].to_pylist() == [None, "unreadable", None, "unreadable"]
    assert table[schema.SAMPLE_ID].to_pylist() == [IDS[0], None, IDS[2], None]
    assert table[schema.BYTES].to_pylist() == contents


def test_decoding_keeps_every_row_in_place_and_marks_the_broken_ones(tmp_path):
    contents = [CONTENTS[0], b"<html>", None, CONTENTS[3], b"", CONTENTS[5][:60], b"x" * 10_000]
    write_parquet(tmp_path, contents, row_group_rows=100)
    encoded = read_all(config_of(tmp_path))
    table = lake.decode_table(encoded, PREPROCESSING, images.Limits(max_bytes=9_999))
    assert table.schema == schema.decoded(6 * 6 * 3)
    codes = [None, "not_an_image", "unreadable", None, "truncated", "truncated", "too_large"]
    assert table[schema.ERROR].to_pylist() == codes
    assert table[schema.PIXELS].is_null().to_pylist() == [code is not None for code in codes]
    for name in schema.IDENTITY_COLUMNS:
        assert table[name] == encoded[name]
    # A broken image has an identity all the same: it can be found and taken down.
    assert table[schema.SAMPLE_ID].to_pylist()[1] == images.sample_id(b"<html>")
    matrix = lake.to_matrix(table[schema.PIXELS])
    for row in (0, 3):
        np.testing.assert_array_equal(matrix[row].reshape(6, 6, 3), np.asarray(picture(row, side=6)))


def test_decoding_nothing_gives_nothing(tmp_path):
    write_parquet(tmp_path, CONTENTS[:1])
    empty = read_all(config_of(tmp_path)).slice(0, 0)
    table = lake.decode_table(empty, PREPROCESSING, images.Limits())
    assert table.num_rows == 0
    assert table.schema == schema.decoded(6 * 6 * 3)


# -- damaged shards ----------------------------------------------------------------------------------------


def rows_of(table: pa.Table) -> list[tuple]:
    return [tuple(row[name] for name in ("sample_id", "row", "name", "bytes", "error")) for row in table.to_pylist()]


LOST = (None, 0, None, None, "unreadable")


@pytest.mark.parametrize("name", ["bad.parquet", "bad.tar"])
@pytest.mark.parametrize(
    "content", [b"", b"<html>no shard</html>" * 100, b"PAR1" + b"\xff" * 500 + b"\xff\x01\x00\x00PAR1", b"\0" * 700]
)
def test_a_shard_that_cannot_be_read_is_one_error_row_beside_the_others(tmp_path, name, content):
    if content == b"\0" * 700 and name == "bad.tar":
        content = b"\1" * 700  # zeros are a whole, empty tar
    (tmp_path / name).write_bytes(content)
    write_tar(tmp_path, CONTENTS[:2], "good.tar")
    bad, good = chunks_of(config_of(tmp_path))
    assert (bad.shard.path, bad.first_row, bad.rows, bad.damaged) == (name, 0, 1, True)
    assert (good.rows, good.damaged) == (2, False)
    table = lake.read_chunk(str(tmp_path), bad)
    assert table.schema == schema.encoded()
    assert rows_of(table) == [LOST]
    assert lake.read_chunk(str(tmp_path), bad, [0]) == table
    assert lake.read_chunk(str(tmp_path), bad, [1]).num_rows == 0
    decoded = lake.decode_table(table, PREPROCESSING, images.Limits())
    assert decoded[schema.ERROR].to_pylist() == ["unreadable"]


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "folder"])
def test_a_shard_that_has_gone_since_it_was_listed_is_one_error_row(tmp_path, kind):
    WRITERS[kind](tmp_path / "lake", CONTENTS)
    config = config_of(tmp_path / "lake")
    shards = lake.list_shards(config)
    Path(config.uri, shards[0].path).unlink()
    (chunk,) = lake.plan_chunks(config, shards, 5)
    assert rows_of(lake.read_chunk(config.uri, chunk)) == [LOST]


def test_what_goes_after_planning_is_as_many_error_rows_as_were_planned(any_lake):
    chunks = chunks_of(any_lake)
    everything = read_all(any_lake)
    lost = chunks[0].shard
    for path in lost.members or (lost.path,):
        Path(any_lake.uri, path).unlink()
    for chunk in chunks:
        table = lake.read_chunk(any_lake.uri, chunk)
        assert table.num_rows == chunk.rows
        assert table[schema.ROW].to_pylist() == list(range(chunk.first_row, chunk.first_row + chunk.rows))
        if chunk.shard == lost:
            assert set(table[schema.ERROR].to_pylist()) == {"unreadable"}
        else:
            assert table[schema.ERROR].null_count == chunk.rows
    assert everything[schema.ERROR].null_count == len(CONTENTS)


def test_one_loose_file_that_has_gone_is_one_error_row_with_its_name(tmp_path):
    write_folder(tmp_path, CONTENTS[:4])
    chunks = chunks_of(config_of(tmp_path))
    (tmp_path / "a" / "002.png").unlink()
    table = pa.concat_tables([lake.read_chunk(str(tmp_path), chunk) for chunk in chunks])
    assert table[schema.NAME].to_pylist() == ["a/000.png", "a/002.png", "b/001.png", "b/003.png"]
    assert table[schema.ERROR].to_pylist() == [None, "unreadable", None, None]


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "uri column"])
def test_a_lake_that_has_gone_as_a_whole_stops_the_run(tmp_path, kind):
    WRITERS[kind](tmp_path / "lake", CONTENTS)
    config = config_of(tmp_path / "lake")
    shards, chunks = lake.list_shards(config), chunks_of(config)
    (tmp_path / "lake").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="there is no such file"):
        lake.read_chunk(config.uri, chunks[0])
    if kind != "folder":
        with pytest.raises(DataError, match="there is no such file") as caught:
            lake.plan_chunks(config, shards, 5)
        assert caught.value.where == f"{config.uri}/{shards[0].path}"


@pytest.mark.parametrize("kind", FORMATS)
def test_what_may_not_be_read_stops_the_run_and_becomes_no_row(tmp_path, kind, monkeypatch):
    WRITERS[kind](tmp_path / "lake", CONTENTS)
    config = config_of(tmp_path / "lake")
    shards, chunks = lake.list_shards(config), chunks_of(config)

    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Storage, "filesystem", refused)
    with pytest.raises(DataError, match="reading is not permitted"):
        lake.read_chunk(config.uri, chunks[0])
    if kind != "folder":
        with pytest.raises(DataError, match="reading is not permitted"):
            lake.plan_chunks(config, shards, 5)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "folder"])
def test_weather_is_waited_out_and_never_taken_for_damage(tmp_path, kind, monkeypatch, no_waiting):
    WRITERS[kind](tmp_path / "lake", CONTENTS)
    config = config_of(tmp_path / "lake")
    shards = lake.list_shards(config)
    read_at = lake._File._read_at
    storm = {"left": 2}

    def stormy(self, position, length):
        if storm["left"]:
            storm["left"] -= 1
            raise OSError("AWS Error SLOW_DOWN during GetObject operation")
        return read_at(self, position, length)

    monkeypatch.setattr(lake._File, "_read_at", stormy)
    chunks = lake.plan_chunks(config, shards, 5)
    storm["left"] = 2
    tables = [lake.read_chunk(config.uri, chunk) for chunk in chunks]
    assert pa.concat_tables(tables)[schema.SAMPLE_ID].to_pylist() == IDS
    storm["left"] = 10**9
    with pytest.raises(DataError, match="reading failed, again and again"):
        lake.read_chunk(config.uri, chunks[-1])
    with pytest.raises(DataError, match="reading failed, again and again"):
        lake.plan_chunks(config, shards, 5)


@pytest.mark.parametrize("damaged_group", [0, 2, 5])
def test_a_damaged_row_group_is_its_rows_and_no_others(tmp_path, damaged_group):
    write_parquet(tmp_path, CONTENTS)
    config = config_of(tmp_path)
    path = tmp_path / "part.parquet"
    metadata = pq.read_metadata(path)
    column = metadata.row_group(damaged_group).column(1)
    assert column.path_in_schema == "bytes"
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    chunks = chunks_of(config, 8)
    tables = [lake.read_chunk(config.uri, chunk) for chunk in chunks]
    assert [table.num_rows for table in tables] == [8, 8, 7]
    table = pa.concat_tables(tables)
    lost = [row // 4 == damaged_group for row in range(len(CONTENTS))]
    assert table[schema.ERROR].to_pylist() == ["unreadable" if gone else None for gone in lost]
    expected = [None if gone else content for gone, content in zip(lost, CONTENTS, strict=True)]
    assert table[schema.BYTES].to_pylist() == expected
    # The damaged group is not even opened where no row of it is wanted.
    wanted = [row for row in range(len(CONTENTS)) if not lost[row]][:2]
    parts = [lake.read_chunk(config.uri, chunk, wanted) for chunk in chunks]
    assert pa.concat_tables(parts)[schema.ERROR].null_count == 2


def test_a_page_that_changed_silently_is_found_where_the_file_has_checksums(tmp_path):
    table = pa.table({"bytes": pa.array(CONTENTS, pa.binary())})
    path = tmp_path / "part.parquet"
    pq.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    place = content.index(CONTENTS[5]) + 20
    content[place] ^= 1
    path.write_bytes(content)
    errors = read_all(config_of(tmp_path))[schema.ERROR].to_pylist()
    assert [row for row, error in enumerate(errors) if error] == [4, 5, 6, 7]


def test_a_tar_that_breaks_off_keeps_what_it_has_and_one_row_for_the_rest(tmp_path):
    write_tar(tmp_path, CONTENTS)
    path = tmp_path / "part.tar"
    whole = path.read_bytes()
    for length in range(600, len(whole) - 10_240, 777):
        path.write_bytes(whole[:length])
        chunks = chunks_of(config_of(tmp_path))
        table = pa.concat_tables([lake.read_chunk(str(tmp_path), chunk) for chunk in chunks])
        assert table.num_rows == sum(chunk.rows for chunk in chunks)
        assert table[schema.ROW].to_pylist() == list(range(table.num_rows))
        kept = table[schema.ERROR].null_count
        assert table[schema.SAMPLE_ID].to_pylist()[:kept] == IDS[:kept]
        codes = table[schema.ERROR].to_pylist()[kept:]
        # Cut between two members nothing tells; in a header the rest is lost; in an image, the image as well.
        assert codes in ([], ["unreadable"], ["truncated", "unreadable"])
        assert (codes == []) == (length % 512 == 0 and whole[length : length + 3].isdigit())


def test_a_damaged_header_in_the_middle_of_a_tar_is_not_its_end(tmp_path):
    write_tar(tmp_path, CONTENTS)
    path = tmp_path / "part.tar"
    content = bytearray(path.read_bytes())
    place = content.index(b"011.PNG")
    content[place : place + 512] = b"\x55" * 512
    path.write_bytes(content)
    chunks = chunks_of(config_of(tmp_path))
    table = pa.concat_tables([lake.read_chunk(str(tmp_path), chunk) for chunk in chunks])
    assert table[schema.SAMPLE_ID].to_pylist() == [*IDS[:11], None]
    assert rows_of(table)[-1] == (None, 11, None, None, "unreadable")


@pytest.mark.parametrize("kind", ["parquet", "tar", "uris"])
def test_a_shard_replaced_since_it_was_planned_brings_as_many_rows_as_were_planned(tmp_path, kind):
    WRITERS[kind](tmp_path / "lake", CONTENTS)
    config = config_of(tmp_path / "lake")
    chunks = chunks_of(config)
    WRITERS[kind](tmp_path / "lake", CONTENTS[:7])
    for chunk in chunks:
        assert lake.read_chunk(config.uri, chunk).num_rows == chunk.rows


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["parquet", "tar"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_no_damage_to_a_shard_raises_anything_or_changes_the_number_of_rows(kind, flips, kept_share):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        WRITERS[kind](Path(folder), CONTENTS[:9])
        (path,) = Path(folder).iterdir()
        content = bytearray(path.read_bytes())
        content = content[: int(len(content) * max(kept_share, 0.5 if flips else 0))]
        for place, value in flips:
            content[min(int(place * len(content)), len(content) - 1)] = value
        path.write_bytes(content)
        chunks, problem = [], None
        try:
            chunks = chunks_of(config_of(Path(folder)))
        except DataError as error:
            problem = error.problem
        assert problem in (None, "the Parquet file has no image column")  # its name was hit
        rows = 0
        for chunk in chunks:
            assert chunk.first_row == rows
            assert lake.read_chunk(folder, chunk).num_rows == chunk.rows
            rows += chunk.rows


# -- messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: (folder / "a.txt").write_text("x")])
def test_a_lake_without_images_says_what_was_looked_for_and_what_is_there(tmp_path, make):
    folder = tmp_path / "lake"
    folder.mkdir()
    make(folder)
    with pytest.raises(DataError, match="the lake holds no images") as caught:
        lake.list_shards(config_of(folder))
    assert caught.value.where == str(folder)
    assert ".parquet" in caught.value.allowed
    assert ".jpg" in caught.value.allowed
    assert caught.value.got == ("1 files, for example a.txt" if (folder / "a.txt").exists() else "0 files")


def test_a_lake_of_another_format_than_wanted_names_that_format_alone(tmp_path):
    write_parquet(tmp_path, CONTENTS[:1])
    with pytest.raises(DataError, match="the lake holds no images") as caught:
        lake.list_shards(config_of(tmp_path, format="tar"))
    assert caught.value.allowed == "files ending in .tar"
    assert "part.parquet" in caught.value.got


@pytest.mark.parametrize("columns", [{"label": [1]}, {"image": [b"plain bytes"]}, {"Bytes": [b"x"]}])
def test_parquet_without_an_image_column_names_the_columns_it_has(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "part.parquet")
    with pytest.raises(DataError, match="no image column") as caught:
        chunks_of(config_of(tmp_path))
    assert caught.value.where == f"{tmp_path}/part.parquet"
    assert next(iter(columns)) in caught.value.got
    assert "`bytes`" in caught.value.allowed


@pytest.mark.parametrize(
    "columns",
    [{"bytes": [12_345]}, {"bytes": ["text"]}, {"image": [{"path": "a.png"}]}, {"image": [{"bytes": 3}]}],
    ids=["a size", "text", "a struct without bytes", "a struct of numbers"],
)
def test_a_column_of_the_right_name_and_another_type_is_no_image_column(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "part.parquet")
    with pytest.raises(DataError, match="no image column"):
        chunks_of(config_of(tmp_path))


# -- shards and fingerprints -------------------------------------------------------------------------------


def test_loose_files_are_grouped_by_folder_and_cut_into_groups_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(lake, "_FILES_PER_GROUP", 5)
    write_folder(tmp_path, CONTENTS)  # 12 in a, 11 in b
    shards = lake.list_shards(config_of(tmp_path))
    assert [len(shard.members) for shard in shards] == [5, 5, 2, 5, 5, 1]
    assert [shard.path for shard in shards] == [shard.members[0] for shard in shards]
    assert sorted(member for shard in shards for member in shard.members) == sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")
    )
    assert all(len({member.split("/")[0] for member in shard.members}) == 1 for shard in shards)
    assert sum(shard.size_bytes for shard in shards) == sum(map(len, CONTENTS))


def test_who_waits_for_a_long_listing_is_told_how_far_it_is(tmp_path, monkeypatch):
    write_folder(tmp_path, CONTENTS)
    told: list[int] = []
    listing = Storage.list_files

    def slow(self, path="", *, on_progress=None):
        on_progress(7)
        return listing(self, path)

    monkeypatch.setattr(Storage, "list_files", slow)
    assert len(lake.list_shards(config_of(tmp_path), told.append)) == 2
    assert told == [7]


def test_a_new_folder_leaves_the_other_groups_alone(tmp_path):
    write_folder(tmp_path, CONTENTS)
    before = lake.list_shards(config_of(tmp_path))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "new.png").write_bytes(CONTENTS[0])
    after = lake.list_shards(config_of(tmp_path))
    assert after[:2] == before
    assert [shard.path for shard in after[2:]] == ["c/new.png"]


@pytest.mark.parametrize("subfolder", ["a/005", "a/005/deep"])
def test_a_new_folder_inside_another_leaves_its_group_alone(tmp_path, subfolder):
    write_folder(tmp_path, CONTENTS)
    before = lake.list_shards(config_of(tmp_path))
    (tmp_path / subfolder).mkdir(parents=True)
    (tmp_path / subfolder / "new.png").write_bytes(CONTENTS[0])
    after = {shard.path: shard for shard in lake.list_shards(config_of(tmp_path))}
    assert [after.get(shard.path) for shard in before] == before


def test_the_fingerprint_changes_with_the_content_of_one_shard_and_of_the_lake(any_lake):
    before = lake.list_shards(any_lake)
    path = Path(any_lake.uri, (before[0].members or (before[0].path,))[-1])
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x00")  # same size
    after = lake.list_shards(any_lake)
    assert after[0].fingerprint != before[0].fingerprint
    assert [shard.fingerprint for shard in after[1:]] == [shard.fingerprint for shard in before[1:]]
    assert lake.fingerprint(after) != lake.fingerprint(before)


def test_the_fingerprint_stays_when_nothing_changed(any_lake):
    assert lake.fingerprint(lake.list_shards(any_lake)) == lake.fingerprint(lake.list_shards(any_lake))


def test_a_missing_file_changes_the_fingerprint_of_its_group(tmp_path):
    write_folder(tmp_path, CONTENTS)
    before = lake.list_shards(config_of(tmp_path))
    (tmp_path / "a" / "022.png").unlink()
    after = lake.list_shards(config_of(tmp_path))
    assert after[0].path == before[0].path
    assert after[0].fingerprint != before[0].fingerprint
    assert after[1] == before[1]


def test_the_key_of_a_shard_is_safe_as_a_file_name_and_its_own():
    paths = ["a b/ü?.parquet", "a/b.tar", "a-b.tar", "../x", "x" * 3000]
    keys = [lake.Shard(path, "tar", "f", 1).key for path in paths]
    assert len(set(keys)) == len(paths)
    assert all(key.isalnum() and key.isascii() and len(key) == 16 for key in keys)
    assert keys == [lake.Shard(path, "parquet", "other", 2).key for path in paths]


# -- on S3 -------------------------------------------------------------------------------------------------


def upload(folder: Path, uri: str) -> None:
    storage = Storage(uri)
    for path in sorted(folder.rglob("*.*")):
        if path.is_file():
            storage.write_bytes(str(path.relative_to(folder)), path.read_bytes())


@pytest.mark.parametrize("kind", ["parquet", "huggingface", "tar", "folder"])
def test_a_lake_on_s3_is_read_as_on_disk_and_so_is_one_file_of_it(tmp_path, s3_bucket, kind):
    WRITERS[kind](tmp_path, CONTENTS)
    upload(tmp_path, f"{s3_bucket}/lake")
    config = LakeConfig(uri=f"{s3_bucket}/lake")
    assert sorted(read_all(config)[schema.SAMPLE_ID].to_pylist()) == sorted(IDS)
    shard = lake.list_shards(config)[0]
    alone = LakeConfig(uri=f"{s3_bucket}/lake/{shard.path}")
    expected = 1 if kind == "folder" else len(CONTENTS)
    assert read_all(alone).num_rows == expected
    (one,) = lake.list_shards(alone)
    Storage(f"{s3_bucket}/lake").write_bytes(shard.path, b"other")
    assert lake.list_shards(alone)[0].fingerprint != one.fingerprint


def test_uris_lead_from_one_bucket_to_another_and_back_to_the_root(tmp_path, s3_bucket, s3_server):
    httpx.put(f"{s3_server}/other").raise_for_status()
    Storage("s3://other/deep").write_bytes("a b#?.png", CONTENTS[0])
    Storage(f"{s3_bucket}/lake").write_bytes("images/1.png", CONTENTS[1])
    lines = "s3://other/deep/a b#?.png\nimages/1.png\ns3://other/gone.png\ns3://nobucket/x.png\n"
    Storage(f"{s3_bucket}/lake").write_bytes("lists/all.uris", lines.encode())
    table = read_all(LakeConfig(uri=f"{s3_bucket}/lake", format="uris"))
    assert table[schema.SAMPLE_ID].to_pylist() == [*IDS[:2], None, None]
    assert table[schema.NAME].to_pylist() == lines.splitlines()


def test_a_shard_gone_from_s3_is_a_row_and_a_bucket_gone_stops_the_run(tmp_path, s3_bucket, s3_server):
    write_parquet(tmp_path, CONTENTS[:4], "a.parquet")
    write_tar(tmp_path, CONTENTS[:2], "b.tar")
    upload(tmp_path, f"{s3_bucket}/lake")
    config = LakeConfig(uri=f"{s3_bucket}/lake")
    shards = lake.list_shards(config)
    Storage(config.uri).delete("a.parquet")
    gone, there = lake.plan_chunks(config, shards, 5)
    assert (gone.damaged, gone.rows, there.damaged, there.rows) == (True, 1, False, 2)
    httpx.post(f"{s3_server}/moto-api/reset").raise_for_status()
    with pytest.raises(DataError, match="there is no such"):
        lake.plan_chunks(config, shards, 5)
    with pytest.raises(DataError, match="there is no such"):
        lake.read_chunk(config.uri, there)


# -- arrays in Arrow ---------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=80, deadline=None)
@given(
    st_numpy.arrays(
        st.sampled_from([np.uint8, np.float16, np.float32]),
        st.tuples(st.integers(1, 12), st.integers(1, 5)),
        elements=st.integers(0, 100),
    ),
    st.data(),
)
def test_matrices_survive_arrow_sliced_and_in_chunks(values, data):
    rows = len(values)
    null = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    array = lake.fixed_list(values, null)
    assert array.is_null().to_pylist() == null.tolist()
    start = data.draw(st.integers(0, rows))
    cut = data.draw(st.integers(0, rows - start))
    whole, part = lake.to_matrix(array), lake.to_matrix(array.slice(start))
    pieces = pa.chunked_array([array.slice(start, cut), array.slice(start + cut)], type=array.type)
    for matrix, expected, gone in (
        (whole, values, null),
        (part, values[start:], null[start:]),
        (lake.to_matrix(pieces), values[start:], null[start:]),
    ):
        assert matrix.shape == expected.shape
        assert matrix.dtype == values.dtype
        np.testing.assert_array_equal(matrix[~gone], expected[~gone])


def test_a_chunked_column_of_no_chunks_is_an_empty_matrix():
    empty = pa.chunked_array([], type=pa.list_(pa.float32(), 3))
    assert lake.to_matrix(empty).shape == (0, 3)


def test_matrices_survive_a_parquet_file_with_null_rows(tmp_path):
    values = np.arange(12, dtype=np.float16).reshape(4, 3)
    null = [False, True, False, True]
    pq.write_table(pa.table({"x": lake.fixed_list(values, null)}), tmp_path / "x.parquet", row_group_size=1)
    read = pq.read_table(tmp_path / "x.parquet")["x"]
    assert read.is_null().to_pylist() == null
    np.testing.assert_array_equal(lake.to_matrix(read)[[0, 2]], values[[0, 2]])


# -- labeled collections -----------------------------------------------------------------------------------


@pytest.fixture
def labeled(tmp_path) -> Path:
    for name, seeds in (("dog", (0, 1)), ("cat", (2,))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            (tmp_path / name / f"{seed}.png").write_bytes(CONTENTS[seed])
    return tmp_path


def test_labels_follow_the_class_list_and_rows_the_paths(labeled):
    (labeled / "notes.txt").write_text("not an image")
    read = lake.read_labeled(str(labeled), ["dog", "bird", "cat"])
    assert read.names == ["cat/2.png", "dog/0.png", "dog/1.png"]
    assert read.labels.tolist() == [2, 0, 0]
    assert read.labels.dtype == np.int64
    assert read.ids == [IDS[2], IDS[0], IDS[1]]
    assert read.encoded == [CONTENTS[2], CONTENTS[0], CONTENTS[1]]
    assert len(read) == 3
    pixels = read.pixels(PREPROCESSING, str(labeled))
    assert pixels.shape == (3, 6, 6, 3)
    np.testing.assert_array_equal(pixels[0], np.asarray(picture(2, side=6)))


def test_images_below_subfolders_of_a_class_belong_to_it(labeled):
    (labeled / "dog" / "puppies").mkdir()
    (labeled / "dog" / "puppies" / "3.png").write_bytes(CONTENTS[3])
    assert lake.read_labeled(str(labeled), ["dog", "cat"]).labels.tolist() == [1, 0, 0, 0]


def test_a_folder_that_is_no_class_is_named_and_the_nearest_class_suggested(labeled):
    (labeled / "dgo").mkdir()
    (labeled / "dgo" / "9.png").write_bytes(CONTENTS[9])
    with pytest.raises(DataError, match="not in a class folder") as caught:
        lake.read_labeled(str(labeled), ["cat", "dog"])
    assert caught.value.where == f"{labeled}/dgo/9.png"
    assert caught.value.allowed == "cat, dog"
    assert caught.value.got == "dgo"
    assert caught.value.hint == "did you mean 'dog'?"


def test_a_class_like_no_other_gets_no_suggestion(labeled):
    with pytest.raises(DataError) as caught:
        lake.read_labeled(str(labeled), ["xxxx", "yyyy"])
    assert "named as in teacher.classes" in caught.value.hint


def test_an_image_outside_every_folder_is_named(labeled):
    (labeled / "dog.png").write_bytes(CONTENTS[9])
    with pytest.raises(DataError, match="not in a class folder") as caught:
        lake.read_labeled(str(labeled), ["cat", "dog"])
    assert caught.value.where == f"{labeled}/dog.png"
    assert caught.value.got == "no folder"


def test_no_labeled_images_is_an_error(tmp_path):
    with pytest.raises(DataError, match="there are no labeled images") as caught:
        lake.read_labeled(str(tmp_path / "nowhere"), ["cat"])
    assert caught.value.where == str(tmp_path / "nowhere")


def test_a_broken_labeled_image_is_named_and_never_dropped(labeled):
    (labeled / "dog" / "0.png").write_bytes(b"<html>")
    read = lake.read_labeled(str(labeled), ["cat", "dog"])
    with pytest.raises(DataError, match="a labeled image cannot be used") as caught:
        read.pixels(PREPROCESSING, str(labeled))
    assert caught.value.where == f"{labeled}/dog/0.png"
    assert caught.value.got.startswith("not_an_image")


def test_the_fingerprint_of_a_labeled_collection_follows_its_content_and_its_classes(labeled):
    before = lake.labeled_fingerprint(str(labeled))
    assert lake.labeled_fingerprint(str(labeled)) == before
    (labeled / "dog").rename(labeled / "wolf")
    renamed = lake.labeled_fingerprint(str(labeled))
    assert renamed != before
    (labeled / "cat" / "3.png").write_bytes(CONTENTS[3])
    assert lake.labeled_fingerprint(str(labeled)) not in (before, renamed)


# -- the web -----------------------------------------------------------------------------------------------


@pytest.fixture
def website(tmp_path):
    """A web server on this machine; gives its address and its folder."""
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    folder = tmp_path / "site"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_images_on_the_web_are_fetched_and_missing_ones_are_error_rows(tmp_path, website):
    address, folder = website
    for k in range(3):
        (folder / f"{k} ö.png").write_bytes(CONTENTS[k])
    uris = [f"{address}/{k}%20%C3%B6.png" for k in range(3)] + [f"{address}/gone.png"]
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake/list.uris").write_text("\n".join(uris))
    table = read_all(config_of(tmp_path / "lake"))
    assert table[schema.SAMPLE_ID].to_pylist() == [*IDS[:3], None]
    assert table[schema.NAME].to_pylist() == uris
    assert table[schema.ERROR].to_pylist() == [None, None, None, "unreadable"]
