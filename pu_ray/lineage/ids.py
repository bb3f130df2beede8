"""How a person names images: by sample ids, by a file, or in a list of ids."""

from __future__ import annotations

import csv
import re

from pu_ray import images, schema
from pu_ray.errors import ConfigError, DataError
from pu_ray.storage import Storage

_HEX = re.compile(rf"[0-9a-f]{{{2 * schema.SAMPLE_ID_BYTES}}}")


def parse(text: str) -> bytes | None:
    """A sample id in hexadecimal, or None for any other text."""
    text = text.strip().lower()
    return bytes.fromhex(text) if _HEX.fullmatch(text) else None


def sample_of(text: str) -> bytes:
    """The id that a person means: given as such, or as the path or URI of an image file.

    Raises:
        ConfigError: It is neither.
        DataError: The file may not be read.
    """
    if (sample := parse(text)) is not None:
        return sample
    folder, name = Storage(text).split()
    if not name or folder.kind(name) != "file":
        raise ConfigError(
            "neither a sample id nor a file",
            slug="not-an-image-or-id",
            where="SAMPLE_ID|FILE",
            allowed=f"{2 * schema.SAMPLE_ID_BYTES} hexadecimal digits, or the path or URI of an image",
            got=text,
            hint="sample ids are in selection/selection.parquet and in what `pu-ray audit` writes",
        )
    return images.sample_id(folder.read_bytes(name))


def read_list(content: bytes, where: str) -> list[bytes]:
    """Sample ids from a list: one a line, or a CSV with a column sample_id or the id first; `#` begins a comment.

    Args:
        content: The file.
        where: Its name, for errors.

    Returns:
        The ids in their order, each once.

    Raises:
        DataError: Names the line, what is allowed and what is there; or the list names no image.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "not UTF-8 text", slug="not-utf8", where=where, got=str(error), hint="save it in UTF-8"
        ) from error
    lines = ["" if line.lstrip().startswith("#") else line for line in text.splitlines()]
    first = next((line for line in lines if line.strip()), "")
    rows = csv.reader(lines, delimiter=max(",;\t", key=first.count))
    column: int | None = None
    found: dict[bytes, None] = {}
    for row in rows:
        cells = [cell.partition("#")[0].strip() for cell in row]
        if not any(cells):
            continue
        if column is None:
            names = [cell.lower() for cell in cells]
            column = names.index(schema.SAMPLE_ID) if schema.SAMPLE_ID in names else 0
            if schema.SAMPLE_ID in names:
                continue
        words = cells[column].split() if column < len(cells) else []
        sample = parse(words[0]) if words else None
        if sample is None:
            raise DataError(
                "this is no sample id",
                slug="not-a-sample-id",
                where=f"{where}, line {rows.line_num}",
                allowed=f"{2 * schema.SAMPLE_ID_BYTES} hexadecimal digits first, or a column {schema.SAMPLE_ID}",
                got=repr(cells[column] if column < len(cells) else ""),
                hint="`pu-ray trace FILE RUN` tells the id of an image",
            )
        found[sample] = None
    if not found:
        raise DataError(
            "the list names no image",
            slug="no-image-listed",
            where=where,
            allowed="one sample id a line",
            got="none",
            hint="`pu-ray trace FILE RUN` tells the id of an image",
        )
    return list(found)
