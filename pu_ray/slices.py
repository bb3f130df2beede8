"""What is known of each test image, so that accuracy can be told apart: by camera, by year, by site."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pu_ray import schema
from pu_ray.errors import ConfigError, DataError
from pu_ray.measures import share_of
from pu_ray.storage import Storage

# More would be a table that nobody reads, and intervals that say nothing.
_MOST_VALUES = 100

# Column to value of each image [N]; None where the table holds no value.
Values = Mapping[str, Sequence[str | None]]


def read(uri: str, columns: Sequence[str], names: Sequence[str]) -> Values:
    """The values of some columns, in the order of `names`, as text.

    Args:
        uri: A .parquet or a .csv with a column `name`.
        columns: The others that are asked for.
        names: Paths of the test images below test.uri.

    Raises:
        ConfigError: There is no such column.
        DataError: Not a table; images that are missing or there twice; a column of too many values.
    """
    table = _table(uri, columns)
    if missing := [name for name in (schema.NAME, *columns) if name not in table.column_names]:
        raise ConfigError(
            "the metadata has no such column",
            slug="no-such-column",
            where="evaluation.metadata" if schema.NAME in missing else "evaluation.slices",
            allowed=", ".join(table.column_names[:20]),
            got=", ".join(missing),
            hint=f"{uri} needs a column `{schema.NAME}` and one for each of evaluation.slices",
        )
    place: dict[str, int] = {}
    for row, name in enumerate(table[schema.NAME].to_pylist()):
        if place.setdefault(str(name), row) != row:
            raise DataError(
                "an image is there twice",
                slug="metadata-row-twice",
                where=uri,
                allowed="one row per image",
                got=str(name),
                hint="remove one",
            )
    if unknown := [name for name in names if name not in place]:
        raise DataError(
            "the metadata lacks test images",
            slug="metadata-incomplete",
            where=uri,
            allowed="a row for every test image, named by its path below test.uri",
            got=f"none for {len(unknown)} of {len(names)}: {', '.join(unknown[:3])}",
            hint=f"its names look like {next(iter(place))}" if place else "it is empty",
        )
    rows = [place[name] for name in names]
    values = {column: [_text(value) for value in table[column].take(rows).to_pylist()] for column in columns}
    for column, found in values.items():
        if (different := len(set(found))) > _MOST_VALUES:
            raise DataError(
                "too many values to slice by",
                slug="too-many-slices",
                where=f"{uri}, column {column}",
                allowed=f"at most {_MOST_VALUES}",
                got=str(different),
                hint="put values into groups, or leave the column out of evaluation.slices",
            )
    return values


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _table(uri: str, columns: Sequence[str]) -> pa.Table:
    folder, file = Storage(uri).split()
    if not file.lower().endswith(".csv"):
        return folder.read_table(file)
    from pyarrow import csv

    # As text: a site called 007 is not the number 7.
    text = csv.ConvertOptions(column_types={name: pa.string() for name in (schema.NAME, *columns)})
    try:
        return csv.read_csv(io.BytesIO(folder.read_bytes(file)), convert_options=text)
    except pa.ArrowInvalid as error:
        raise DataError(
            "not a readable CSV file",
            slug="not-csv",
            where=uri,
            got=str(error),
            hint="save it as CSV in UTF-8, with a line of column names and commas between",
        ) from error


def accuracies(values: Values, right: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Accuracy for every value of every column.

    Args:
        values: See `read`.
        right: Bool [N] of `student` and `teacher`.

    Returns:
        By column, the values in their order, those without one last: value, n, and a share for each network.
    """
    told: dict[str, list[dict[str, Any]]] = {}
    for column, found in values.items():
        groups = sorted(set(found), key=lambda value: (value is None, value or ""))
        told[column] = []
        for value in groups:
            rows = np.array([each == value for each in found])
            shares = {f"{who}_accuracy": share_of(hits[rows]) for who, hits in right.items()}
            told[column].append({"value": value, "n": int(rows.sum()), **shares})
    return told
