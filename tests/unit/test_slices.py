"""pu_ray/slices.py: metadata that fits, metadata that does not, and accuracies counted by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pu_ray import slices
from pu_ray.errors import ConfigError, DataError
from pu_ray.measures import share_of

NAMES = ["cat/a.png", "cat/b.png", "dog/c.png"]
ROWS = {
    "name": ["dog/c.png", "cat/a.png", "cat/b.png", "cat/unused.png"],
    "site": ["007", "12", "007", "99"],
    "year": [2024, 2023, None, 2020],
}


def csv(tmp_path, text: str) -> str:
    path = tmp_path / "about.csv"
    path.write_text(text)
    return str(path)


def parquet(tmp_path, columns=ROWS) -> str:
    path = tmp_path / "about.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


CSV = "name,site,year\ndog/c.png,007,2024\ncat/a.png,12,2023\ncat/b.png,007,\ncat/unused.png,99,2020\n"


@pytest.mark.parametrize("make", [lambda path: csv(path, CSV), parquet], ids=["csv", "parquet"])
def test_values_come_in_the_order_of_the_images_as_text(tmp_path, make):
    assert slices.read(make(tmp_path), ["site", "year"], NAMES) == {
        "site": ["12", "007", "007"],  # not 7
        "year": ["2023", None, "2024"],
    }


def test_columns_that_nobody_asks_for_may_hold_anything(tmp_path):
    assert slices.read(csv(tmp_path, CSV), ["year"], NAMES).keys() == {"year"}


@pytest.mark.parametrize(
    ("text", "where", "got"),
    [
        ("name,place\n", "evaluation.slices", "site"),
        ("file,site\n", "evaluation.metadata", "name"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, text, where, got):
    with pytest.raises(ConfigError, match="no such column") as caught:
        slices.read(csv(tmp_path, text), ["site"], NAMES)
    assert (caught.value.where, caught.value.got) == (where, got)
    assert caught.value.allowed == text.strip().replace(",", ", ")


def test_images_without_a_row_are_counted_and_named(tmp_path):
    with pytest.raises(DataError, match="lacks test images") as caught:
        slices.read(csv(tmp_path, "name,site\n./cat/a.png,1\ndog/c.png,1\n"), ["site"], NAMES)
    assert caught.value.got == "none for 2 of 3: cat/a.png, cat/b.png"
    assert caught.value.hint == "its names look like ./cat/a.png"


def test_an_empty_table_is_said_to_be_empty(tmp_path):
    with pytest.raises(DataError, match="lacks test images") as caught:
        slices.read(csv(tmp_path, "name,site\n"), ["site"], NAMES)
    assert caught.value.hint == "it is empty"


def test_an_image_with_two_rows_has_no_value(tmp_path):
    with pytest.raises(DataError, match="there twice") as caught:
        slices.read(csv(tmp_path, CSV + "cat/a.png,13,2023\n"), ["site"], NAMES)
    assert caught.value.got == "cat/a.png"


def test_a_column_with_a_value_for_every_image_is_no_slice(tmp_path):
    names = [f"cat/{k}.png" for k in range(101)]
    path = parquet(tmp_path, {"name": names, "id": list(range(101)), "half": [k // 2 for k in range(101)]})
    assert len(set(slices.read(path, ["half"], names)["half"])) == 51
    assert len(set(slices.read(path, ["id"], names[:100])["id"])) == 100
    with pytest.raises(DataError, match="too many values") as caught:
        slices.read(path, ["id"], names)
    assert caught.value.where.endswith("about.parquet, column id")
    assert (caught.value.allowed, caught.value.got) == ("at most 100", "101")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("about.csv", b"name,site\na,b,c\n", "not a readable CSV file"),
        ("about.csv", b"", "not a readable CSV file"),
        ("about.parquet", b"PAR1", "not a readable Parquet file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, problem):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        slices.read(str(tmp_path / file), ["site"], NAMES)
    assert caught.value.where.endswith(file)


def test_accuracies_are_those_of_each_value_and_images_without_one_come_last():
    values = {"site": ["b", None, "a", "b", "b"]}
    right = {
        "student": np.array([True, False, True, False, True]),
        "teacher": np.array([True, True, False, True, True]),
    }
    told = slices.accuracies(values, right)["site"]
    assert [(row["value"], row["n"]) for row in told] == [("a", 1), ("b", 3), (None, 1)]
    assert [row["student_accuracy"]["value"] for row in told] == [1.0, pytest.approx(2 / 3), 0.0]
    assert [row["teacher_accuracy"]["value"] for row in told] == [0.0, 1.0, 1.0]
    assert told[1]["student_accuracy"] == share_of([True, False, True])


def test_without_metadata_nothing_is_told():
    assert slices.accuracies({}, {"student": np.array([True])}) == {}
