"""The lake: formats become one stream of rows, without Ray and without surprises.

A lake is a set of shards: Parquet files, tar files, lists of URIs, or groups of loose image files. A shard is read
in chunks, the unit of work that one task handles. Every row keeps its identity (`schema.IDENTITY_COLUMNS`); an image
that cannot be used stays a row, with an error code instead of pixels, and so does a shard that cannot be read. What
may not be read or cannot be reached is no row: it stops the run, which then goes on where it was.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pu_ray import config, images, schema
from pu_ray.config import LakeConfig, PreprocessingConfig
from pu_ray.errors import DataError
from pu_ray.storage import FileInfo, Storage, classify

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
Format = Literal["parquet", "tar", "uris", "folder"]

_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "tar": (".tar",),
    "uris": (".uris.txt", ".uris"),
    "folder": IMAGE_SUFFIXES,
}
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_FILES_PER_GROUP = 1024
_LISTING_THREADS = 16
_MOST_PIECES = 16
# Of a tar: large enough that headers between small images are not a request each, small enough to skip large ones.
_SEARCH_BUFFER_BYTES = 256 * 2**10
_STREAM_BUFFER_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Shard:
    """One unit of the ledger.

    Attributes:
        path: Below the lake's root; for loose files, the first file's path.
        format: How to read it.
        fingerprint: Changes when the content does: digest of names, sizes and tags. What a list of URIs points to is
            not part of it.
        size_bytes: Encoded size; of a list of URIs, the list's own.
        members: The loose files of a `folder` shard.
        alone: Whether the lake's URI names this very file, so that the root is the folder around it.
    """

    path: str
    format: Format
    fingerprint: str
    size_bytes: int
    members: tuple[str, ...] = ()
    alone: bool = False

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
        rows_in_groups: Rows of these groups together.
        skip: Rows before the chunk's first one in its first group: a group too large for one chunk is cut, and its
            pieces each read the whole group.
        offset: Byte where the rows begin: the first member's header in a tar, the first line in a list of URIs.
        max_bytes: Longer files are not read where they lie alone, in a tar or behind a URI: they become error rows.
        damaged: One row that stands for what cannot be read: the whole shard, or the rest of a tar that breaks off.
    """

    shard: Shard
    first_row: int
    rows: int
    row_groups: tuple[int, ...] = ()
    rows_in_groups: int = 0
    skip: int = 0
    offset: int = 0
    max_bytes: int = images.Limits().max_bytes
    damaged: bool = False


class _DamagedError(Exception):
    """The bytes are there and make no sense, or the file has gone; never a matter of network or permission."""


# -- listing -----------------------------------------------------------------------------------------------


def list_shards(lake: LakeConfig, on_progress: Callable[[int], None] | None = None) -> list[Shard]:
    """The lake's shards, sorted by path.

    Args:
        lake: Where they are.
        on_progress: Is told the number of files found so far, about once a second.

    Raises:
        DataError: Nothing there, or nothing that is an image or a shard, or a compressed tar.
    """
    alone, files = _list_files(lake.uri, on_progress)
    formats: list[Format] = list(_SUFFIXES) if lake.format == "auto" else [lake.format]
    if "tar" in formats:
        _refuse_compressed(lake.uri, files)
    shards: list[Shard] = []
    for kind in formats:
        matching = [file for file in files if file.path.lower().endswith(_SUFFIXES[kind])]
        if kind == "folder":
            shards += _group_loose_files(matching, alone)
        else:
            shards += [Shard(file.path, kind, _fingerprint([file]), file.size_bytes, (), alone) for file in matching]
    if not shards:
        raise DataError(
            "the lake holds no images",
            slug="lake-without-images",
            where=lake.uri,
            allowed="files ending in " + ", ".join(suffix for kind in formats for suffix in _SUFFIXES[kind]),
            got=f"{len(files)} files" + (f", for example {files[0].path}" if files else ""),
            hint="check lake.uri and lake.format",
        )
    return sorted(shards, key=lambda shard: shard.path)


def fingerprint(shards: Sequence[Shard]) -> str:
    """Digest of the whole lake's listing."""
    return config.digest([[shard.path, shard.fingerprint] for shard in shards])


def _list_files(uri: str, on_progress: Callable[[int], None] | None) -> tuple[bool, list[FileInfo]]:
    """Whether the URI means one file, and the files below its root."""
    suffixes = (*_COMPRESSED_TARS, *(suffix for kind in _SUFFIXES.values() for suffix in kind))
    # A folder may be called x.parquet as well: only a name like that is worth the question.
    if not (uri.lower().endswith(suffixes) and Storage(uri).kind() == "file"):
        return False, Storage(uri).list_files(on_progress=on_progress)
    folder, name = Storage(uri).split()
    info = folder.attempt("reading", name, lambda: folder.filesystem().get_file_info(folder.path(name)))
    tag = folder.tag(name) if folder.scheme == "s3" else None
    return True, [FileInfo(name, info.size, tag or f"mtime-{info.mtime_ns}")]


def _root(lake_uri: str, shard: Shard) -> Storage:
    return Storage(lake_uri).split()[0] if shard.alone else Storage(lake_uri)


def _refuse_compressed(uri: str, files: Sequence[FileInfo]) -> None:
    compressed = [file.path for file in files if file.path.lower().endswith(_COMPRESSED_TARS)]
    if compressed:
        raise DataError(
            "a compressed tar cannot be read in parts",
            slug="compressed-tar",
            where=uri,
            allowed=".tar, or lake.format set to another kind to leave such files out",
            got=f"{compressed[0]}" + (f" and {len(compressed) - 1} more" if len(compressed) > 1 else ""),
            hint="unpack the compression (for example `gunzip FILE.tar.gz`): images hardly shrink by it",
        )


def _group_loose_files(files: Sequence[FileInfo], alone: bool) -> Iterator[Shard]:
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
                alone,
            )


def _fingerprint(files: Sequence[FileInfo]) -> str:
    return config.digest([[file.path, file.size_bytes, file.tag] for file in files])


# -- chunks ------------------------------------------------------------------------------------------------


def plan_chunks(
    lake: LakeConfig, shards: Sequence[Shard], chunk_rows: int, chunk_bytes: int = sys.maxsize
) -> list[Chunk]:
    """Cut shards into chunks, reading Parquet footers, tar headers and lists of URIs in parallel.

    A shard that cannot be read, or has gone since it was listed, becomes a chunk of one row that stands for it.

    Args:
        lake: Where the shards are.
        shards: Some or all of the lake's.
        chunk_rows: Most rows of a chunk. Parquet row groups are kept together as long as this allows.
        chunk_bytes: About the most encoded bytes of a chunk; a row group is cut into 16 pieces at most for its sake.
            Loose files count with their folder's mean; what lies behind URIs is not known, and not counted.

    Raises:
        DataError: Parquet without an image column; or the lake has gone, may not be read or cannot be reached.
    """
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        per_shard = pool.map(lambda shard: list(_plan_shard(lake, shard, chunk_rows, chunk_bytes)), shards)
        return [chunk for chunks in per_shard for chunk in chunks]


class _Part(NamedTuple):
    """What is read as a whole: an image, or a Parquet row group.

    Attributes:
        rows: How many images it holds.
        size: Encoded bytes.
        offset: See `Chunk`.
    """

    rows: int
    size: int
    offset: int = 0


def _plan_shard(lake: LakeConfig, shard: Shard, chunk_rows: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of one shard; where it breaks off, one more row says so."""
    row, first_part = 0, 0
    parts: list[_Part] = []

    def chunk() -> Chunk:
        groups = tuple(range(first_part, first_part + len(parts))) if shard.format == "parquet" else ()
        rows = sum(part.rows for part in parts)
        return Chunk(shard, row, rows, groups, rows, offset=parts[0].offset, max_bytes=lake.max_image_bytes)

    damaged = False
    try:
        for part in _parts(_root(lake.uri, shard), shard):
            rows, size = sum(known.rows for known in parts), sum(known.size for known in parts)
            if parts and (rows + part.rows > chunk_rows or size + part.size > chunk_bytes):
                if rows:
                    yield chunk()
                row, first_part, parts = row + rows, first_part + len(parts), []
            pieces = _pieces(part, chunk_rows, chunk_bytes)
            if pieces == 1:
                parts.append(part)
                continue
            for piece in range(pieces):
                start, stop = part.rows * piece // pieces, part.rows * (piece + 1) // pieces
                groups = (first_part,)
                yield Chunk(
                    shard, row + start, stop - start, groups, part.rows, skip=start, max_bytes=lake.max_image_bytes
                )
            row, first_part = row + part.rows, first_part + 1
    except _DamagedError:
        damaged = True
    if any(part.rows for part in parts):
        yield chunk()
    if damaged:
        yield Chunk(shard, row + sum(part.rows for part in parts), 1, damaged=True)


def _pieces(part: _Part, chunk_rows: int, chunk_bytes: int) -> int:
    """Into how many chunks a part is cut: as memory needs, and as parallel work would like within reason."""
    for_work = min(-(-part.size // chunk_bytes), _MOST_PIECES, part.rows)
    return max(1, -(-part.rows // chunk_rows), for_work)


def _parts(storage: Storage, shard: Shard) -> Iterable[_Part]:
    if shard.format == "folder":
        mean_bytes = shard.size_bytes // max(1, len(shard.members))
        return [_Part(1, mean_bytes)] * len(shard.members)
    if shard.format == "parquet":
        with _open_parquet(storage, shard) as parquet:
            return parquet.groups
    if shard.format == "tar":
        return (_Part(1, member.size, member.offset) for member in _tar_members(storage, shard))
    return (_Part(1, 0, line.offset) for line in _uri_lines(storage, shard))


# -- opening shards ----------------------------------------------------------------------------------------


class _File(io.RawIOBase):
    """A file of the lake for decoders: waits out the weather, and remembers what did not pass.

    Decoders report damage and weather alike, as whatever exception comes first; `sound` tells which it was.

    Raises:
        _DamagedError: There is no such file, in a lake that is there.
        DataError: The lake has gone, may not be read or cannot be reached.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        super().__init__()
        self._storage = storage
        self._path = path
        self._position = 0
        self._failure: DataError | None = None
        try:
            self._source = storage.open_input(path)
            self._size = storage.attempt("reading", path, self._source.size)
        except DataError as error:
            raise _lasting(error, storage) from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        length = left if size is None or size < 0 else min(size, left)
        try:
            content = self._storage.attempt("reading", self._path, lambda: self._read_at(self._position, length))
        except DataError as error:
            self._failure = error
            raise
        self._position += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _read_at(self, position: int, length: int) -> bytes:
        if length == 0:
            return b""
        self._source.seek(position)
        return bytes(self._source.read(length))

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()

    def damage(self, error: Exception) -> Exception:
        """What to raise for what a decoder raised: the bytes' own failure, or else that they make no sense."""
        return _DamagedError(str(error)) if self._failure is None else _lasting(self._failure, self._storage)


def _lasting(error: DataError, storage: Storage) -> DataError | _DamagedError:
    """A file that is missing from a lake that is there is damage; network, permission and a missing bucket are not."""
    missing = isinstance(error.__cause__, OSError) and classify(error.__cause__) in ("missing", "not-a-file")
    return _DamagedError(str(error)) if missing and storage.exists() else error


class _Columns(NamedTuple):
    """Where a Parquet file keeps its images: as bytes, as Hugging Face's struct, or behind URIs."""

    kind: Literal["bytes", "struct", "uri"]
    image: str
    name: str | None = None

    @property
    def leaf(self) -> str:
        """The image column's path in the Parquet schema."""
        return f"{self.image}.bytes" if self.kind == "struct" else self.image


class _Parquet(NamedTuple):
    """An open Parquet shard: its bytes, its reader, where its images are, and its row groups."""

    source: _File
    file: pq.ParquetFile
    columns: _Columns
    groups: list[_Part]


@contextmanager
def _open_parquet(storage: Storage, shard: Shard) -> Iterator[_Parquet]:
    """A Parquet shard. What is raised while it is open passes unchanged.

    Raises:
        _DamagedError: It has gone, or its footer makes no sense.
        DataError: No image column; or out of reach.
    """
    with _File(storage, shard.path) as source:
        try:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            arrow = file.schema_arrow
        except Exception as error:  # a damaged footer can make the reader raise anything
            raise source.damage(error) from error
        columns = _image_columns(arrow, f"{storage}/{shard.path}")
        yield _Parquet(source, file, columns, _row_groups(file.metadata, columns))


def _row_groups(metadata: pq.FileMetaData, where: _Columns) -> list[_Part]:
    parts = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(place) for place in range(group.num_columns))
        column = next((column for column in columns if column.path_in_schema == where.leaf), None)
        # Told twice, so that a damaged number does not become a billion rows.
        if column is None or not 0 <= group.num_rows == column.num_values:
            raise _DamagedError(where.leaf)
        parts.append(_Part(group.num_rows, 0 if where.kind == "uri" else column.total_compressed_size))
    return parts


def _image_columns(arrow: pa.Schema, where: str) -> _Columns:
    """`bytes` and its name, Hugging Face's struct `image` with fields bytes and path, or `uri`."""

    def kind_of(name: str) -> pa.DataType:
        place = arrow.get_field_index(name)  # -1 where there is none, or more than one
        return arrow.field(place).type if place >= 0 else pa.null()

    if _is_bytes(kind_of(schema.BYTES)):
        name = next((name for name in (schema.NAME, "path") if _is_text(kind_of(name))), None)
        return _Columns("bytes", schema.BYTES, name)
    if pa.types.is_struct(kind := kind_of("image")):
        place = kind.get_field_index("bytes")
        if place >= 0 and _is_bytes(kind.field(place).type):
            return _Columns("struct", "image")
    uri = next((name for name in ("uri", "url") if _is_text(kind_of(name))), None)
    if uri is not None:
        return _Columns("uri", uri)
    raise DataError(
        "the Parquet file has no image column",
        slug="no-image-column",
        where=where,
        allowed="a binary column `bytes`, a struct column `image` with a field `bytes`, or a text column `uri`, `url`",
        got=", ".join(f"{field.name} ({field.type})" for field in arrow),
        hint="rename its column, or keep the file out of lake.uri",
    )


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


class _Place(NamedTuple):
    """One image of a file that is read from the front.

    Attributes:
        offset: Where reading may start to find it.
        name: Member or URI.
        start: First byte of its content, in a tar.
        size: Bytes of its content, in a tar.
    """

    offset: int
    name: str
    start: int = 0
    size: int = 0


def _tar_members(
    storage: Storage, shard: Shard, offset: int = 0, buffered: io.BufferedReader[_File] | None = None
) -> Iterator[_Place]:
    """The images of a tar from a member's header on; other files, links and sparse files are passed over.

    Args:
        storage: The lake's root.
        shard: The tar.
        offset: Of a member's header.
        buffered: The open file, for a caller that reads the members' content meanwhile.

    Raises:
        _DamagedError: It has gone, is no tar, or breaks off.
        DataError: Out of reach.
    """
    if buffered is None:
        with _File(storage, shard.path) as source:
            yield from _tar_members(storage, shard, offset, io.BufferedReader(source, _SEARCH_BUFFER_BYTES))
        return
    try:
        buffered.seek(offset)
        archive = tarfile.TarFile(fileobj=buffered, encoding="utf-8", errors="replace")
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every member it has seen
            if member.isreg() and not member.issparse() and member.name.lower().endswith(IMAGE_SUFFIXES):
                yield _Place(member.offset, member.name, member.offset_data, member.size)
            if member.offset_data + member.size > shard.size_bytes:
                raise tarfile.ReadError("unexpected end of data")
        # tarfile takes a damaged header for the end; the end is an empty block, or that of the file.
        buffered.seek(archive.offset)
        if buffered.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("invalid header")
    except Exception as error:  # a damaged header can make tarfile raise anything
        raise buffered.raw.damage(error) from error


def _uri_lines(storage: Storage, shard: Shard, offset: int = 0) -> Iterator[_Place]:
    """The URIs of a list from a line's first byte on; empty lines and comments are passed over.

    Raises:
        _DamagedError: It has gone.
        DataError: Out of reach.
    """
    with _File(storage, shard.path) as source:
        source.seek(offset)
        try:
            for line in io.BufferedReader(source, _SEARCH_BUFFER_BYTES):
                uri = line.decode("utf-8", "replace").lstrip("\ufeff").strip()
                if uri and not uri.startswith("#"):
                    yield _Place(offset, uri)
                offset += len(line)
        except DataError as error:
            raise source.damage(error) from error


# -- reading -----------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    name: str | None
    content: bytes | None
    error: str | None


_LOST = _Row(None, None, "unreadable")


def read_chunk(lake_uri: str, chunk: Chunk, rows: Sequence[int] | None = None) -> pa.Table:
    """Encoded images of one chunk, as `schema.encoded()`: as many rows as were planned, whatever became of the shard.

    Only the row groups, members and files that hold wanted rows are read.

    Args:
        lake_uri: The lake's root, or its only file.
        chunk: What to read.
        rows: Positions within the shard to keep; None keeps all.

    Raises:
        DataError: The lake has gone, may not be read or cannot be reached.
    """
    positions = np.arange(chunk.first_row, chunk.first_row + chunk.rows)
    if rows is not None:
        positions = positions[np.isin(positions, rows)]
    found = [_LOST] * len(positions)
    if not chunk.damaged and len(positions):
        reader = {"parquet": _read_parquet, "tar": _read_tar, "uris": _read_uris, "folder": _read_files}
        storage = _root(lake_uri, chunk.shard)
        try:
            for place, row in reader[chunk.shard.format](storage, chunk, positions - chunk.first_row):
                found[place] = row
        except _DamagedError:
            pass  # what was not found stays lost
        except DataError as error:
            if isinstance(failure := _lasting(error, storage), DataError):
                raise failure from error
    ids = [None if row.content is None else images.sample_id(row.content) for row in found]
    names, contents, errors = ([row[field] for row in found] for field in range(3))
    return pa.table([ids, [chunk.shard.path] * len(ids), positions, names, contents, errors], schema=schema.encoded())


# What a reader finds: the place among the wanted rows, and the row.
_Found = Iterator[tuple[int, _Row]]


def _read_parquet(storage: Storage, chunk: Chunk, offsets: Any) -> _Found:
    with _open_parquet(storage, chunk.shard) as parquet:
        groups = parquet.groups
        # A shard that was replaced since it was planned may hold other rows.
        if sum(groups[group].rows for group in chunk.row_groups if group < len(groups)) != chunk.rows_in_groups:
            return
        first = -chunk.skip
        for group in chunk.row_groups:
            last = first + groups[group].rows
            places = np.flatnonzero((offsets >= first) & (offsets < last))
            if len(places):
                rows = _row_group(storage, chunk, parquet, group, pa.array(offsets[places] - first))
                yield from zip(places.tolist(), rows, strict=False)
            first = last


def _row_group(storage: Storage, chunk: Chunk, parquet: _Parquet, group: int, inside: pa.Array) -> list[_Row]:
    """The wanted rows of one row group; none where it is damaged."""
    columns = parquet.columns
    wanted = [columns.image] if columns.name is None else [columns.image, columns.name]
    try:
        names, values = _names_and_values(parquet.file.read_row_group(group, columns=wanted), columns, inside)
    except Exception as error:  # damaged pages can make the reader raise anything
        if isinstance(failure := parquet.source.damage(error), DataError):
            raise failure from error
        return []
    if columns.kind == "uri":
        return _fetch_all(storage, [_text(value) for value in values], chunk.max_bytes)
    return [
        _Row(_text(name), value, None if value is not None else "unreadable")
        for name, value in zip(names, values, strict=True)
    ]


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _names_and_values(
    table: pa.Table, columns: _Columns, inside: pa.Array
) -> tuple[list[bytes | None], list[bytes | None]]:
    def chosen(column: pa.ChunkedArray) -> list[bytes | None]:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        # Large, so that no row group overflows 32-bit offsets; bytes, because nobody has checked that text is UTF-8.
        values: list[bytes | None] = column.cast(pa.large_binary()).take(inside).to_pylist()
        return values

    image = table[columns.image]
    nameless: list[bytes | None] = [None] * len(inside)
    if columns.kind != "struct":
        return chosen(table[columns.name]) if columns.name is not None else nameless, chosen(image)
    path = image.type.get_field_index("path")
    has_path = path >= 0 and _is_text(image.type.field(path).type)
    names = chosen(pc.struct_field(image, "path")) if has_path else nameless
    return names, chosen(pc.struct_field(image, "bytes"))


def _read_tar(storage: Storage, chunk: Chunk, offsets: Any) -> _Found:
    wanted = {int(offset): place for place, offset in enumerate(offsets)}
    buffer_bytes = _STREAM_BUFFER_BYTES if len(wanted) == chunk.rows else _SEARCH_BUFFER_BYTES
    with _File(storage, chunk.shard.path) as source:
        buffered = io.BufferedReader(source, buffer_bytes)
        members = _tar_members(storage, chunk.shard, chunk.offset, buffered)
        for offset, member in zip(range(max(wanted) + 1), members, strict=False):
            if offset in wanted:
                yield wanted[offset], _read_member(chunk, member, buffered)


def _read_member(chunk: Chunk, member: _Place, buffered: io.BufferedReader[_File]) -> _Row:
    if member.size > chunk.max_bytes:
        return _Row(member.name, None, "too_large")
    buffered.seek(member.start)
    content = buffered.read(member.size)
    if len(content) < member.size:
        return _Row(member.name, None, "truncated")
    return _Row(member.name, content, None)


def _read_uris(storage: Storage, chunk: Chunk, offsets: Any) -> _Found:
    lines = _uri_lines(storage, chunk.shard, chunk.offset)
    uris = [line.name for _, line in zip(range(int(max(offsets)) + 1), lines, strict=False)]
    wanted = [uris[offset] if offset < len(uris) else None for offset in offsets]
    yield from enumerate(_fetch_all(storage, wanted, chunk.max_bytes))


def _fetch_all(root: Storage, uris: Sequence[str | None], max_bytes: int) -> list[_Row]:
    """What lies behind URIs; relative ones start at the lake's root. One that cannot be fetched is an error row."""

    def fetch(uri: str | None) -> _Row:
        if uri is None:
            return _LOST
        try:
            absolute = "://" in uri or uri.startswith("/")
            return _read_file(*(Storage(uri).split() if absolute else (root, uri)), max_bytes)._replace(name=uri)
        except Exception:  # somebody else's server, name or permission: whatever it raises concerns this image alone
            return _LOST._replace(name=uri)

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        return list(pool.map(fetch, uris))


def _read_files(storage: Storage, chunk: Chunk, offsets: Any) -> _Found:
    def read(path: str) -> _Row:
        try:
            return _read_file(storage, path, chunk.max_bytes)
        except DataError as error:
            if isinstance(failure := _lasting(error, storage), DataError):
                raise failure from error
            return _LOST._replace(name=path)

    names = [chunk.shard.members[chunk.first_row + offset] for offset in offsets]
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        yield from enumerate(pool.map(read, names))


def _read_file(storage: Storage, path: str, max_bytes: int) -> _Row:
    """One file of one image, unless it is longer than allowed.

    Raises:
        DataError: It is missing, may not be read or cannot be reached.
    """

    def read() -> bytes | None:
        with storage.filesystem().open_input_file(storage.path(path)) as source:
            return bytes(source.read()) if source.size() <= max_bytes else None

    content = storage.attempt("reading", path, read)
    return _Row(path, content, None if content is not None else "too_large")


def decode_table(
    table: pa.Table, preprocessing: PreprocessingConfig, limits: images.Limits, scaled: bool = False
) -> pa.Table:
    """Encoded rows to decoded ones; an image that fails keeps its row and gets an error code.

    Args:
        table: Rows of `schema.encoded()`.
        preprocessing: The network's input.
        limits: Byte and pixel limits.
        scaled: See `images.decode`.

    Returns:
        Rows of `schema.decoded()`, in the same order.
    """
    width = int(np.prod(preprocessing.shape_hwc))
    pixels = np.zeros((table.num_rows, width), np.uint8)
    errors: list[str | None] = table[schema.ERROR].to_pylist()
    for row, content in enumerate(table[schema.BYTES]):
        if errors[row] is None:
            try:
                pixels[row] = images.decode(content.as_py(), preprocessing, limits, scaled).reshape(-1)
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

    def __add__(self, other: LabeledImages) -> LabeledImages:
        labels = np.concatenate([self.labels, other.labels])
        return LabeledImages(self.ids + other.ids, self.names + other.names, labels, self.encoded + other.encoded)

    def rows(self, rows: Sequence[int]) -> LabeledImages:
        """Some of them."""
        return LabeledImages(
            [self.ids[row] for row in rows],
            [self.names[row] for row in rows],
            self.labels[list(rows)],
            [self.encoded[row] for row in rows],
        )

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
                    slug="labeled-image-unusable",
                    where=f"{where}/{self.names[row]}",
                    got=str(error),
                    hint="replace or remove it",
                ) from error
        return decoded


def labeled_fingerprint(uri: str) -> str:
    """Digest of a labeled collection's listing."""
    return _fingerprint(Storage(uri).list_files())


def list_labeled(uri: str, classes: Sequence[str]) -> dict[str, int]:
    """Images in one folder per class, none of them opened: the class's index, by path.

    Raises:
        DataError: Nothing there, or a folder that is not a class; the nearest class is suggested.
    """
    storage = Storage(uri)
    files = [file.path for file in storage.list_files() if file.path.lower().endswith(IMAGE_SUFFIXES)]
    index = {name: position for position, name in enumerate(classes)}
    labels = {}
    for path in files:
        name, slash, _ = path.partition("/")
        if not slash or name not in index:
            close = difflib.get_close_matches(name, classes, n=1)
            raise DataError(
                "an image is not in a class folder",
                slug="not-in-class-folder",
                where=f"{uri}/{path}",
                allowed=", ".join(classes[:20]) + ("..." if len(classes) > 20 else ""),
                got=name if slash else "no folder",
                hint=f"did you mean '{close[0]}'?" if close else "one folder per class, named as in teacher.classes",
            )
        labels[path] = index[name]
    if not labels:
        raise DataError(
            "there are no labeled images",
            slug="no-labeled-images",
            where=uri,
            allowed="one folder per class with image files",
            hint="check the URI; the folders have the names in teacher.classes",
        )
    return labels


def read_labeled(uri: str, classes: Sequence[str]) -> LabeledImages:
    """Images in one folder per class.

    Raises:
        DataError: As `list_labeled`.
    """
    storage, labels = Storage(uri), list_labeled(uri, classes)
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        encoded = list(pool.map(storage.read_bytes, labels))
    ids = [images.sample_id(content) for content in encoded]
    return LabeledImages(ids, list(labels), np.asarray(list(labels.values()), np.int64), encoded)
