"""pu_ray/schema.py: every artifact's columns, and that Parquet gives back what was put in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pu_ray import images, lake, schema

TABLES = {
    "encoded": schema.encoded(),
    "decoded": schema.decoded(12),
    "features": schema.features(5, 3),
    "scores": schema.scores(),
    "selection": schema.selection(),
    "mined": schema.mined(),
}
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TABLES)
def test_every_stage_says_which_image_a_row_is_in_the_same_columns(name):
    assert TABLES[name].names[:4] == ["sample_id", "shard", "row", "name"]
    assert [field.type for field in TABLES[name]][:4] == [pa.binary(16), pa.string(), pa.int64(), pa.string()]
    assert TABLES[name].names[:4] == schema.IDENTITY_COLUMNS


@pytest.mark.parametrize("name", ["encoded", "decoded", "features", "scores"])
def test_every_table_of_lake_rows_carries_errors(name):
    assert TABLES[name].field(schema.ERROR).type == pa.string()


@pytest.mark.parametrize("name", ["selection", "mined"])
def test_what_was_chosen_has_no_error_to_carry(name):
    assert schema.ERROR not in TABLES[name].names


def test_the_error_codes_are_those_of_the_design_and_of_the_type():
    assert get_args(schema.ErrorCode) == schema.ERROR_CODES
    assert set(schema.ERROR_CODES) == {"truncated", "not_an_image", "too_large", "unsupported", "unreadable"}


def test_every_error_code_is_given_somewhere():
    sources = [path.read_text() for path in (ROOT / "pu_ray").rglob("*.py") if path.name != "schema.py"]
    for code in schema.ERROR_CODES:
        assert any(re.search(rf'"{code}"', source) for source in sources), code


def test_the_thumbnail_column_fits_the_thumbnails():
    assert images.THUMBNAIL_SIDE_PX**2 == schema.THUMBNAIL_PX
    small = images.thumbnails(np.zeros((2, 20, 20, 3), np.uint8))
    assert TABLES["features"].field(schema.THUMBNAIL).type == pa.list_(pa.uint8(), small.shape[1])


def test_the_id_column_fits_the_ids():
    assert pa.binary(len(images.sample_id(b"x"))) == schema.SAMPLE_ID_TYPE


def test_mined_rows_are_selected_rows_with_their_bytes():
    assert schema.mined().names == [*schema.selection().names, schema.BYTES]


# -- Parquet -----------------------------------------------------------------------------------------------

# Ids that a careless reader would cut: zero bytes at the end, at the start, and nothing but zeros.
IDS = [b"\xff" * 12 + b"\0" * 4, b"\0" * 4 + b"\xff" * 12, b"\0" * 16, bytes(range(16)), None]


def _values(field: pa.Field) -> pa.Array:
    """Five values of a column: extremes, and a null where nulls may be."""
    if field.name == schema.SAMPLE_ID:
        return pa.array(IDS, field.type)
    if pa.types.is_fixed_size_list(field.type):
        kind, width = field.type.value_type.to_pandas_dtype(), field.type.list_size
        limits = np.finfo(kind) if np.issubdtype(kind, np.floating) else np.iinfo(kind)
        values = np.zeros((5, width), kind)
        values[1], values[2] = limits.max, limits.min
        values[3] = np.arange(width)
        return lake.fixed_list(values, [False, False, False, False, True])
    if pa.types.is_large_binary(field.type):
        return pa.array([b"", b"\0", b"\xff\0" * 1000, b"x\0\0", None], field.type)
    if pa.types.is_string(field.type):
        return pa.array(["", "é ü/?#", "a" * 500, "truncated", None], field.type)
    if pa.types.is_float32(field.type):
        return pa.array([0.0, -3.4e38, 1e-45, 0.1, None], field.type)
    assert pa.types.is_integer(field.type)
    return pa.array([0, -1, 2**31 - 1, 7, None], field.type)


@pytest.mark.parametrize("name", [*TABLES, "truth"])
@pytest.mark.parametrize("row_group_rows", [1, 2, 100])
def test_parquet_gives_back_every_value_and_every_type(tmp_path, name, row_group_rows):
    wanted = schema.truth() if name == "truth" else TABLES[name]
    table = pa.table([_values(field) for field in wanted], schema=wanted)
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", row_group_size=row_group_rows)
    read = pq.read_table(tmp_path / "x.parquet")
    assert read.schema == wanted
    for column in wanted.names:
        assert read[column].to_pylist() == table[column].to_pylist(), column


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.uint8])
def test_lists_of_numbers_survive_parquet_bit_by_bit(tmp_path, kind):
    values = np.random.default_rng(0).integers(0, 200, (50, 7)).astype(kind) / kind(1)
    if kind is not np.uint8:
        values = (values / 7).astype(kind)
    values = values.astype(kind)
    pq.write_table(pa.table({"x": lake.fixed_list(values, np.zeros(50, bool))}), tmp_path / "x.parquet")
    read = lake.to_matrix(pq.read_table(tmp_path / "x.parquet")["x"])
    assert read.dtype == kind
    assert read.tobytes() == values.tobytes()
