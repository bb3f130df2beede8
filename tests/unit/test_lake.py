"""pu_ray/lake.py: every format is the same stream of rows, each row exactly once, the broken ones included."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

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

CONTENTS = [png(seed, side=6) for seed in range(23)]
IDS = [images.sample_id(content) for content in CONTENTS]
PREPROCESSING = PreprocessingConfig(size_px=6)
FORMATS = ("parquet", "huggingface", "tar", "folder")


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


WRITERS = dict(zip(FORMATS, (write_parquet, write_huggingface, write_tar, write_folder), strict=True))


@pytest.fixture(params=FORMATS)
def any_lake(request, tmp_path) -> LakeConfig:
    WRITERS[request.param](tmp_path / "lake", CONTENTS)
    return LakeConfig(uri=str(tmp_path / "lake"))


def config_of(folder: Path, **settings) -> LakeConfig:
    return LakeConfig(uri=str(folder), **settings)


def chunks_of(config: LakeConfig, chunk_rows: int = 5) -> list[lake.Chunk]:
    return lake.plan_chunks(config, lake.list_shards(config), chunk_rows)


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
        (1, [4, 4, 4, 4, 4, 3], [(0,), (1,), (2,), (3,), (4,), (5,)]),  # a row group is never cut
        (100, [23], [(0, 1, 2, 3, 4, 5)]),
    ],
)
def test_chunks_of_parquet_are_whole_row_groups(tmp_path, chunk_rows, sizes, groups):
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
        assert chunk.rows <= chunk_rows or len([g for g in chunk.row_groups if sizes[g]]) == 1


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


@pytest.mark.parametrize(
    ("name", "problem"),
    [("bad.parquet", "a shard is not a readable Parquet file"), ("bad.tar", "a shard is not a readable tar file")],
)
@pytest.mark.parametrize("content", [b"", b"<html>no shard</html>" * 100])
def test_a_shard_that_is_not_what_its_name_says_is_named(tmp_path, name, problem, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        chunks_of(config_of(tmp_path))
    assert caught.value.where == f"{tmp_path}/{name}"
    assert caught.value.got


def test_a_tar_that_breaks_off_is_named(tmp_path):
    write_tar(tmp_path, CONTENTS)
    path = tmp_path / "part.tar"
    path.write_bytes(path.read_bytes()[:9_000])
    with pytest.raises(DataError, match="a shard is not a readable tar file"):
        read_all(config_of(tmp_path))


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


def test_a_shard_that_vanished_is_named(any_lake):
    chunks = chunks_of(any_lake)
    Path(any_lake.uri, chunks[0].shard.path).unlink()
    with pytest.raises(DataError, match="there is no such file") as caught:
        lake.read_chunk(any_lake.uri, chunks[0])
    assert caught.value.where == f"{any_lake.uri}/{chunks[0].shard.path}"


def test_a_parquet_file_damaged_inside_is_named(tmp_path):
    write_parquet(tmp_path, CONTENTS)
    config = config_of(tmp_path)
    chunks = chunks_of(config)
    path = tmp_path / "part.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396  # the footer stays readable, the pages do not
    path.write_bytes(content)
    with pytest.raises(DataError, match="a shard is damaged") as caught:
        lake.read_chunk(config.uri, chunks[0])
    assert caught.value.where == str(path)


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
