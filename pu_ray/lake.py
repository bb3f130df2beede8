"""The lake: formats become one stream of rows, without Ray and without surprises.

A lake is a set of shards: Parquet files, tar files, or groups of loose image files. A shard is read in chunks,
the unit of work that one task handles. Every row keeps its identity (`schema.IDENTITY_COLUMNS`); an image that
cannot be used stays a row, with an error code instead of pixels.
"""

from __future__ import annotations

import difflib
import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pu_ray import config, images, schema
from pu_ray.config import LakeConfig, PreprocessingConfig
from pu_ray.errors import DataError
from pu_ray.storage import FileInfo, Storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
Format = Literal["parquet", "tar", "folder"]

_SUFFIXES: dict[Format, tuple[str, ...]] = {"parquet": (".parquet",), "tar": (".tar",), "folder": IMAGE_SUFFIXES}
_FILES_PER_GROUP = 1024
_LISTING_THREADS = 16


@dataclass(frozen=True)
class Shard:
    """One unit of the ledger.

    Attributes:
        path: Below the lake's root; for loose files, the first file's path.
        format: How to read it.
        fingerprint: Changes when the content does: digest of names, sizes and tags.
        size_bytes: Encoded size.
        members: The loose files of a `folder` shard.
    """

    path: str
    format: Format
    fingerprint: str
    size_bytes: int
    members: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name for files made from this shard: safe on every storage, and the same in every run."""
        return hashlib.blake2b(self.path.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one shard: what one read task handles.

    Attributes:
        shard: The shard.
        first_row: Position of the chunk's first row in its shard.
        rows: Number of rows.
        row_groups: Parquet row groups that hold the rows.
    """

    shard: Shard
    first_row: int
    rows: int
    row_groups: tuple[int, ...] = ()


# -- listing -----------------------------------------------------------------------------------------------


def list_shards(lake: LakeConfig) -> list[Shard]:
    """The lake's shards, sorted by path.

    Raises:
        DataError: Nothing there, or nothing that is an image, a Parquet or a tar file.
    """
    storage = Storage(lake.uri)
    files = storage.list_files()
    formats: list[Format] = ["parquet", "tar", "folder"] if lake.format == "auto" else [lake.format]
    shards: list[Shard] = []
    for kind in formats:
        matching = [file for file in files if file.path.lower().endswith(_SUFFIXES[kind])]
        if kind == "folder":
            shards += _group_loose_files(matching)
        else:
            shards += [Shard(file.path, kind, _fingerprint([file]), file.size_bytes) for file in matching]
    if not shards:
        raise DataError(
            "the lake holds no images",
            where=lake.uri,
            allowed="files ending in " + ", ".join(suffix for kind in formats for suffix in _SUFFIXES[kind]),
            got=f"{len(files)} files" + (f", for example {files[0].path}" if files else ""),
            hint="check lake.uri and lake.format",
        )
    return sorted(shards, key=lambda shard: shard.path)


def fingerprint(shards: Sequence[Shard]) -> str:
    """Digest of the whole lake's listing."""
    return config.digest([[shard.path, shard.fingerprint] for shard in shards])


def _group_loose_files(files: Sequence[FileInfo]) -> Iterator[Shard]:
    # Groups follow folders, so that a new folder of images leaves the finished ones alone.
    def parent(file: FileInfo) -> str:
        return file.path.rpartition("/")[0]

    for _, members in groupby(sorted(files, key=lambda file: (parent(file), file.path)), key=parent):
        folder = list(members)
        for start in range(0, len(folder), _FILES_PER_GROUP):
            group = folder[start : start + _FILES_PER_GROUP]
            yield Shard(
                group[0].path,
                "folder",
                _fingerprint(group),
                sum(file.size_bytes for file in group),
                tuple(file.path for file in group),
            )


def _fingerprint(files: Sequence[FileInfo]) -> str:
    return config.digest([[file.path, file.size_bytes, file.tag] for file in files])


# -- chunks ------------------------------------------------------------------------------------------------


def plan_chunks(lake: LakeConfig, shards: Sequence[Shard], chunk_rows: int) -> list[Chunk]:
    """Cut shards into chunks of about `chunk_rows` rows, reading Parquet footers and tar headers in parallel.

    Raises:
        DataError: A shard that is not what its name says, or Parquet without an image column.
    """
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        per_shard = pool.map(lambda shard: _plan_shard(Storage(lake.uri), shard, chunk_rows), shards)
        return [chunk for chunks in per_shard for chunk in chunks]


def _plan_shard(storage: Storage, shard: Shard, chunk_rows: int) -> list[Chunk]:
    if shard.format == "parquet":
        return _plan_parquet(storage, shard, chunk_rows)
    if shard.format == "folder":
        rows = len(shard.members)
    else:
        with _tar_members(storage, shard) as (_, members):
            rows = len(members)
    return [Chunk(shard, first, min(chunk_rows, rows - first)) for first in range(0, rows, chunk_rows)]


def _plan_parquet(storage: Storage, shard: Shard, chunk_rows: int) -> list[Chunk]:
    with _open_parquet(storage, shard) as file:
        _image_column(file.schema_arrow, f"{storage}/{shard.path}")
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    chunks: list[Chunk] = []
    groups: list[int] = []
    first, rows = 0, 0
    for index, size in enumerate(sizes):
        if groups and rows + size > chunk_rows:
            chunks.append(Chunk(shard, first, rows, tuple(groups)))
            first, groups, rows = first + rows, [], 0
        groups.append(index)
        rows += size
    if rows:
        chunks.append(Chunk(shard, first, rows, tuple(groups)))
    return chunks


def _open_parquet(storage: Storage, shard: Shard) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(storage.open_input(shard.path))
    except pa.ArrowInvalid as error:
        raise DataError(
            "a shard is not a readable Parquet file",
            where=f"{storage}/{shard.path}",
            got=str(error),
            hint="replace or remove the file; finished shards are kept",
        ) from error


def _image_column(arrow: pa.Schema, where: str) -> str:
    """`bytes`, or Hugging Face's struct `image` with fields bytes and path."""

    def is_bytes(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))

    if schema.BYTES in arrow.names and is_bytes(arrow.field(schema.BYTES).type):
        return schema.BYTES
    if "image" in arrow.names and pa.types.is_struct(kind := arrow.field("image").type):
        place = kind.get_field_index("bytes")
        if place >= 0 and is_bytes(kind.field(place).type):
            return "image"
    raise DataError(
        "the Parquet file has no image column",
        where=where,
        allowed="a binary column `bytes`, or a struct column `image` with a field `bytes`",
        got=", ".join(f"{field.name} ({field.type})" for field in arrow),
    )


@contextmanager
def _tar_members(storage: Storage, shard: Shard) -> Iterator[tuple[tarfile.TarFile, list[tarfile.TarInfo]]]:
    try:
        with storage.open_input(shard.path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            yield archive, [m for m in archive if m.isfile() and m.name.lower().endswith(IMAGE_SUFFIXES)]
    except tarfile.TarError as error:
        raise DataError(
            "a shard is not a readable tar file", where=f"{storage}/{shard.path}", got=str(error)
        ) from error


# -- reading -----------------------------------------------------------------------------------------------


def read_chunk(lake_uri: str, chunk: Chunk, rows: Sequence[int] | None = None) -> pa.Table:
    """Encoded images of one chunk, as `schema.encoded()`.

    Args:
        lake_uri: The lake's root.
        chunk: What to read.
        rows: Positions within the shard to keep; None keeps all.

    Raises:
        DataError: The shard has gone or is damaged.
    """
    storage = Storage(lake_uri)
    reader = {"parquet": _read_parquet, "tar": _read_tar, "folder": _read_files}[chunk.shard.format]
    positions = np.arange(chunk.first_row, chunk.first_row + chunk.rows)
    if rows is not None:
        positions = positions[np.isin(positions, rows)]
    names, contents = reader(storage, chunk, positions - chunk.first_row)
    errors = [None if content is not None else "unreadable" for content in contents]
    ids = [None if content is None else images.sample_id(content) for content in contents]
    return pa.table([ids, [chunk.shard.path] * len(ids), positions, names, contents, errors], schema=schema.encoded())


_Rows = tuple[list[str | None], list[bytes | None]]


def _read_parquet(storage: Storage, chunk: Chunk, offsets: Any) -> _Rows:
    with _open_parquet(storage, chunk.shard) as file:
        column = _image_column(file.schema_arrow, chunk.shard.path)
        try:
            values = file.read_row_groups(list(chunk.row_groups), columns=[column])[column].take(pa.array(offsets))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                "a shard is damaged", where=f"{storage}/{chunk.shard.path}", got=str(error), hint="replace the file"
            ) from error
    if column == schema.BYTES:
        return [None] * len(values), values.to_pylist()
    rows = values.to_pylist()
    return [row and row.get("path") for row in rows], [row and row.get("bytes") for row in rows]


def _read_tar(storage: Storage, chunk: Chunk, offsets: Any) -> _Rows:
    with _tar_members(storage, chunk.shard) as (archive, members):
        wanted = [members[chunk.first_row + offset] for offset in offsets]
        files = [archive.extractfile(member) for member in wanted]
        return [member.name for member in wanted], [file.read() if file else None for file in files]


def _read_files(storage: Storage, chunk: Chunk, offsets: Any) -> _Rows:
    names = [chunk.shard.members[chunk.first_row + offset] for offset in offsets]
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        return list(names), list(pool.map(storage.read_bytes, names))


def decode_table(table: pa.Table, preprocessing: PreprocessingConfig, limits: images.Limits) -> pa.Table:
    """Encoded rows to decoded ones; an image that fails keeps its row and gets an error code.

    Args:
        table: Rows of `schema.encoded()`.
        preprocessing: The network's input.
        limits: Byte and pixel limits.

    Returns:
        Rows of `schema.decoded()`, in the same order.
    """
    width = int(np.prod(preprocessing.shape_hwc))
    pixels = np.zeros((table.num_rows, width), np.uint8)
    errors: list[str | None] = table[schema.ERROR].to_pylist()
    for row, content in enumerate(table[schema.BYTES]):
        if errors[row] is None:
            try:
                pixels[row] = images.decode(content.as_py(), preprocessing, limits).reshape(-1)
            except images.ImageError as error:
                errors[row] = error.code
    identity = [table[name].combine_chunks() for name in schema.IDENTITY_COLUMNS]
    return pa.table(
        [*identity, fixed_list(pixels, [error is not None for error in errors]), errors], schema=schema.decoded(width)
    )


# -- arrays in Arrow ---------------------------------------------------------------------------------------


def fixed_list(values: Any, null: Any) -> pa.FixedSizeListArray:
    """A 2-D array as fixed-size lists, with whole rows null."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(null, pa.bool_()))


def to_matrix(column: pa.ChunkedArray) -> Any:
    """Fixed-size lists [N] of width D as an array [N, D]; null rows hold arbitrary values."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    width = array.type.list_size
    flat = array.values.slice(array.offset * width, len(array) * width)
    return flat.to_numpy(zero_copy_only=False).reshape(len(array), width)


# -- labeled collections -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabeledImages:
    """A small labeled collection in memory; rows are sorted by path.

    Attributes:
        ids: `sample_id` of each image.
        names: Path of each image.
        labels: int64 [N], index into the class list.
        encoded: Encoded bytes of each image.
    """

    ids: list[bytes]
    names: list[str]
    labels: Any
    encoded: list[bytes]

    def __len__(self) -> int:
        return len(self.ids)

    def pixels(self, preprocessing: PreprocessingConfig, where: str) -> Any:
        """All images decoded, uint8 [N, H, W, C].

        Raises:
            DataError: One cannot be decoded; a labeled image is too precious to drop silently.
        """
        decoded = np.empty((len(self), *preprocessing.shape_hwc), np.uint8)
        for row, content in enumerate(self.encoded):
            try:
                decoded[row] = images.decode(content, preprocessing)
            except images.ImageError as error:
                raise DataError(
                    "a labeled image cannot be used",
                    where=f"{where}/{self.names[row]}",
                    got=str(error),
                    hint="replace or remove it",
                ) from error
        return decoded


def labeled_fingerprint(uri: str) -> str:
    """Digest of a labeled collection's listing."""
    return _fingerprint(Storage(uri).list_files())


def read_labeled(uri: str, classes: Sequence[str]) -> LabeledImages:
    """Images in one folder per class.

    Raises:
        DataError: Nothing there, or a folder that is not a class; the nearest class is suggested.
    """
    storage = Storage(uri)
    files = [file.path for file in storage.list_files() if file.path.lower().endswith(IMAGE_SUFFIXES)]
    index = {name: position for position, name in enumerate(classes)}
    labels = []
    for path in files:
        name, slash, _ = path.partition("/")
        if not slash or name not in index:
            close = difflib.get_close_matches(name, classes, n=1)
            raise DataError(
                "an image is not in a class folder",
                where=f"{uri}/{path}",
                allowed=", ".join(classes[:20]) + ("..." if len(classes) > 20 else ""),
                got=name if slash else "no folder",
                hint=f"did you mean '{close[0]}'?" if close else "one folder per class, named as in teacher.classes",
            )
        labels.append(index[name])
    if not files:
        raise DataError("there are no labeled images", where=uri, allowed="one folder per class with image files")
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        encoded = list(pool.map(storage.read_bytes, files))
    return LabeledImages(
        [images.sample_id(content) for content in encoded], files, np.asarray(labels, np.int64), encoded
    )
