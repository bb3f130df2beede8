"""`pu-ray lake build`: folders, tars, lists of URIs or ill-cut Parquet become well-cut Parquet shards.

Bytes are copied as they are, the broken ones too: every row of the source is a row of the result, with the same
`sample_id`. The work is cut into pieces of about one output shard, each a function of the source's listing alone. A
piece is finished when its record is there, which is written after its files; so a build that was killed goes on, and
after a change of the source only the pieces that hold the change are redone.

    part-<piece>-<number>.parquet    columns bytes, name, sample_id, source
    _build/source.json               which source this folder is built from; written first
    _build/pieces/<piece>.json       rows and sizes of a finished piece's files
    _build.json                      the whole, written last

Not covered: images behind URIs that change while their list does not, and two builds of one folder at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pu_ray import config as settings_of
from pu_ray import lake, schema
from pu_ray.config import LakeConfig
from pu_ray.errors import DataError
from pu_ray.lake import Chunk, Shard
from pu_ray.progress import Progress
from pu_ray.storage import Storage

BUILD_FILE = "_build.json"
_WORK = "_build"
_SOURCE_FILE = "source.json"
_PIECES = "pieces"
_PARTIAL = "partial"
_PART = "part-"

_ROW_GROUP_ROWS = 256
_ROW_GROUP_BYTES = 8 * 2**20
_LEAST_ROW_GROUPS = 8  # of a shard: what is small is read in small parts too
# Behind URIs the bytes are not known before they are fetched: pieces are cut as if images had this size.
_ASSUMED_IMAGE_BYTES = 100_000
# A longer file cannot be a value of a binary column next to others; as an image it is a mistake.
_MAX_IMAGE_BYTES = 2**30
_COPY_BYTES = 8 * 2**20
_THREADS = 4

_SOURCE = "source"  # path of the source shard, where the row comes from
_SCHEMA = pa.schema(
    [
        pa.field(schema.BYTES, pa.binary()),
        pa.field(schema.NAME, pa.string()),
        pa.field(schema.SAMPLE_ID, schema.SAMPLE_ID_TYPE),
        pa.field(_SOURCE, pa.string()),
    ]
)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PieceRecord(_Document):
    """A finished piece.

    Attributes:
        files: Size in bytes of each file.
        rows: Of all files.
        unreadable: Rows without bytes: the source could not give them.
        size_bytes: Encoded images, without Parquet's own bytes.
    """

    files: dict[str, int]
    rows: int
    unreadable: int
    size_bytes: int


class Built(_Document):
    """What a build made.

    Attributes:
        source: Where from.
        destination: Where to.
        fingerprint: Of the source's listing.
        shard_mb: Wanted size of a shard.
        source_shards: Shards of the source.
        rows_in: Rows of the source.
        rows_out: Rows of the result; the same number.
        unreadable: Rows without bytes, in the source as in the result.
        files: Shards of the result.
        files_kept: How many of them were there before.
        files_removed: Shards of an earlier state of the source.
        size_bytes: Encoded images.
    """

    source: str
    destination: str
    fingerprint: str
    shard_mb: int
    source_shards: int
    rows_in: int
    rows_out: int
    unreadable: int
    files: int
    files_kept: int
    files_removed: int
    size_bytes: int


class _Piece:
    """Chunks that become one output shard, or a few where their size was underestimated.

    Attributes:
        chunks: What to copy, in order.
        key: Changes when one of the chunks' shards does, or the cut.
        rows: Of all chunks.
    """

    def __init__(self, chunks: Sequence[Chunk], target_bytes: int) -> None:
        self.chunks = chunks
        identity = [[chunk.shard.path, chunk.shard.fingerprint, chunk.first_row, chunk.rows] for chunk in chunks]
        digest = settings_of.digest([identity, target_bytes])
        self.key = hashlib.blake2b(digest.encode(), digest_size=8).hexdigest()
        self.rows = sum(chunk.rows for chunk in chunks)

    @property
    def record(self) -> str:
        """Path of its record, below the work folder."""
        return f"{_PIECES}/{self.key}.json"


def build(source: LakeConfig, destination: str, shard_mb: int, progress: Progress, *, threads: int = _THREADS) -> Built:
    """Copy a lake into Parquet shards; run again, it goes on where it was.

    Args:
        source: Any lake; its size limit does not apply, nothing is decoded.
        destination: Folder or URI; empty, or a build of the same source.
        shard_mb: Encoded megabytes (10^6 bytes) per shard.
        progress: Advanced by rows.
        threads: Pieces at a time; each holds one row group of the source and one of the result in memory.

    Raises:
        DataError: The source cannot be read; or the destination lies inside it, holds other things or cannot be
            written.
    """
    target = Storage(destination)
    _refuse_nesting(source.uri, target)
    progress.note(f"listing {source.uri}")
    source = source.model_copy(update={"max_image_bytes": _MAX_IMAGE_BYTES})
    shards = lake.list_shards(source, lambda files: progress.note(f"  {files:,} files so far"))
    work = target.child(_WORK)
    records = _claim(source.uri, target, work)
    sizes = {file.path: file.size_bytes for file in target.list_files()}
    if (whole := _whole(target, lake.fingerprint(shards), shard_mb, records, sizes)) is not None:
        return whole
    progress.note(f"{len(shards):,} shards; planning")
    pieces = list(_cut(source, shards, shard_mb * 10**6))
    work.delete(_PARTIAL)
    finished = {
        piece.key: record
        for piece in pieces
        if (record := records.get(piece.record)) is not None
        and all(sizes.get(file) == size for file, size in record.files.items())
    }
    kept = sum(len(record.files) for record in finished.values())
    todo = [piece for piece in pieces if piece.key not in finished]
    target.delete(BUILD_FILE)  # no longer the truth
    progress.start(sum(piece.rows for piece in todo), "images")
    finished |= _copy_all(source, target, todo, shard_mb * 10**6, progress, threads)
    removed = _remove_stale(target, work, pieces, finished, records, sizes)
    made = [finished[piece.key] for piece in pieces]
    built = Built(
        source=Storage(source.uri).absolute(),
        destination=target.absolute(),
        fingerprint=lake.fingerprint(shards),
        shard_mb=shard_mb,
        source_shards=len(shards),
        rows_in=sum(piece.rows for piece in pieces),
        rows_out=sum(record.rows for record in made),
        unreadable=sum(record.unreadable for record in made),
        files=sum(len(record.files) for record in made),
        files_kept=kept,
        files_removed=removed,
        size_bytes=sum(record.size_bytes for record in made),
    )
    assert built.rows_in == built.rows_out
    work.delete(_PARTIAL)
    target.write_json(BUILD_FILE, built.model_dump(mode="json"))
    return built


def render(built: Built) -> str:
    """A few lines for people."""
    lines = [
        f"{built.destination}: {built.rows_in:,} rows in, {built.rows_out:,} rows out,"
        f" {built.unreadable:,} without bytes",
        f"  {built.files:,} shards of {built.size_bytes / 1e6:,.1f} MB in all, from {built.source_shards:,} of"
        f" {built.source}",
        f"  {built.files - built.files_kept:,} written now, {built.files_kept:,} kept, {built.files_removed:,} removed",
    ]
    return "\n".join(lines)


# -- the destination ---------------------------------------------------------------------------------------


def _refuse_nesting(source: str, target: Storage) -> None:
    inside, outside = _place(target), _place(Storage(source))
    if inside == outside or inside.startswith(outside.rstrip("/") + "/"):
        raise DataError(
            "the destination lies inside the source, which would then hold its own copy",
            slug="destination-inside-source",
            where=str(target),
            allowed=f"a folder outside {source}",
            hint="build beside the source, or elsewhere",
        )


def _place(storage: Storage) -> str:
    return os.path.realpath(storage.root()) if storage.is_local else storage.absolute()


def _claim(source: str, target: Storage, work: Storage) -> dict[str, PieceRecord]:
    """The records of an earlier build of this source, by path; the destination is marked as this source's.

    Raises:
        DataError: The destination holds something else.
    """
    here = Storage(source).absolute()
    hint = "choose an empty folder, or remove what is there"
    present = work.list_files()
    ours = any(file.path == _SOURCE_FILE for file in present)
    if ours:
        before = work.read_json(_SOURCE_FILE)["source"]
        if before != here:
            raise DataError(
                "the destination is built from another source",
                slug="destination-of-another-source",
                where=str(target),
                allowed=here,
                got=before,
                hint=hint,
            )
    foreign = [file.path for file in target.list_files() if not (ours and file.path.startswith(_PART))]
    if foreign:
        raise DataError(
            "the destination holds other things",
            slug="destination-in-use",
            where=str(target),
            allowed="an empty folder, or one that an earlier build of the same source made",
            got=foreign[0] + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""),
            hint=hint,
        )
    work.write_json(_SOURCE_FILE, {"source": here})
    paths = [file.path for file in present if file.path.startswith(f"{_PIECES}/")]
    with ThreadPoolExecutor(_THREADS) as pool:
        documents = pool.map(work.read_json, paths)
        return {path: PieceRecord.model_validate(found) for path, found in zip(paths, documents, strict=True)}


def _whole(
    target: Storage, fingerprint: str, shard_mb: int, records: Mapping[str, PieceRecord], sizes: Mapping[str, int]
) -> Built | None:
    """What an earlier build made, if it is all there and the source is what it was."""
    content = target.read_if_there(BUILD_FILE)
    if content is None:
        return None
    built = Built.model_validate_json(content)
    recorded = {file: size for record in records.values() for file, size in record.files.items()}
    if (built.fingerprint, built.shard_mb) != (fingerprint, shard_mb) or recorded != sizes:
        return None
    return built.model_copy(update={"files_kept": built.files, "files_removed": 0})


def _remove_stale(
    target: Storage,
    work: Storage,
    pieces: Sequence[_Piece],
    finished: Mapping[str, PieceRecord],
    records: Mapping[str, PieceRecord],
    sizes: Mapping[str, int],
) -> int:
    """Remove what an earlier state of the source left, and files of pieces that were never finished."""
    wanted = {file for record in finished.values() for file in record.files}
    stale = [file for file in sizes if file not in wanted]
    for path in set(records) - {piece.record for piece in pieces}:
        work.delete(path)
    for file in stale:
        target.delete(file)
    return len(stale)


# -- the cut -----------------------------------------------------------------------------------------------


def _cut(source: LakeConfig, shards: Sequence[Shard], target_bytes: int) -> Iterator[_Piece]:
    """Pieces of about `target_bytes`, cut so that a changed, new or missing shard moves few of the other cuts.

    A shard of half the target or more is cut by itself. Smaller ones are joined, and a join may also end, from half
    the target on, after a shard whose key says so: behind it the cuts are what they would have been anyway.
    """
    chunks = lake.plan_chunks(source, shards, _ROW_GROUP_ROWS, chunk_bytes=_row_group_bytes(target_bytes))
    by_shard: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_shard.setdefault(chunk.shard.path, []).append(chunk)
    joined: list[Chunk] = []
    joined_bytes = 0
    for planned in by_shard.values():
        shard, rows = planned[0].shard, sum(chunk.rows for chunk in planned)
        mean_bytes = _ASSUMED_IMAGE_BYTES if shard.format == "uris" else shard.size_bytes / max(1, rows)
        if mean_bytes * rows >= target_bytes / 2:
            if joined:
                yield _Piece(joined, target_bytes)
                joined, joined_bytes = [], 0
            yield from _cut_alone(planned, mean_bytes, target_bytes)
            continue
        joined += planned
        joined_bytes += round(mean_bytes * rows)
        if joined_bytes >= target_bytes or (joined_bytes >= target_bytes / 2 and int(shard.key, 16) % 4 == 0):
            yield _Piece(joined, target_bytes)
            joined, joined_bytes = [], 0
    if joined:
        yield _Piece(joined, target_bytes)


def _row_group_bytes(target_bytes: int) -> int:
    return min(_ROW_GROUP_BYTES, target_bytes // _LEAST_ROW_GROUPS)


def _cut_alone(chunks: Sequence[Chunk], mean_bytes: float, target_bytes: int) -> Iterator[_Piece]:
    # Evenly, so that the last piece is no remnant.
    pieces = max(1, round(mean_bytes * sum(chunk.rows for chunk in chunks) / target_bytes))
    share = sum(chunk.rows for chunk in chunks) / pieces
    taken: list[Chunk] = []
    rows, done = 0, 1
    for chunk in chunks:
        taken.append(chunk)
        rows += chunk.rows
        if rows >= done * share:
            yield _Piece(taken, target_bytes)
            taken = []
            while rows >= done * share and done <= pieces:
                done += 1
    if taken:
        yield _Piece(taken, target_bytes)


# -- copying -----------------------------------------------------------------------------------------------


def _copy_all(
    source: LakeConfig, target: Storage, todo: Sequence[_Piece], target_bytes: int, progress: Progress, threads: int
) -> dict[str, PieceRecord]:
    lock, stopped = threading.Lock(), threading.Event()

    def advance(rows: int) -> None:
        if stopped.is_set():
            raise CancelledError
        with lock:
            progress.advance(rows)

    with ThreadPoolExecutor(threads) as pool:
        futures = {piece.key: pool.submit(_copy, source.uri, target, piece, target_bytes, advance) for piece in todo}
        try:
            return {key: future.result() for key, future in futures.items()}
        finally:
            # After an error or Ctrl-C nobody finishes a shard first; after success nothing is left to stop.
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _copy(
    source: str, target: Storage, piece: _Piece, target_bytes: int, advance: Callable[[int], None]
) -> PieceRecord:
    """Write one piece's files, and then its record."""
    files: dict[str, int] = {}
    rows = unreadable = size = 0
    groups = _row_groups(source, piece, _row_group_bytes(target_bytes), advance)
    group = next(groups, None)
    while group is not None:
        name = f"{_PART}{piece.key}-{len(files):03d}.parquet"
        with _publishing(target, name) as path:
            written = 0
            with pq.ParquetWriter(
                path,
                _SCHEMA,
                # Images are compressed already, and statistics over them would be images.
                compression={schema.BYTES: "none", schema.NAME: "zstd", schema.SAMPLE_ID: "none", _SOURCE: "zstd"},
                use_dictionary=[_SOURCE],
                write_statistics=[_SOURCE],
                write_page_checksum=True,
            ) as writer:
                # To the nearest row group, and never none.
                while group is not None and written + _content_bytes(group) / 2 <= max(
                    target_bytes, _content_bytes(group)
                ):
                    writer.write_table(group, row_group_size=group.num_rows)
                    rows += group.num_rows
                    unreadable += group[schema.BYTES].null_count
                    written += _content_bytes(group)
                    group = next(groups, None)
            files[name] = path.stat().st_size
        size += written
    if rows != piece.rows:
        raise DataError(
            "rows were lost or doubled on the way",
            slug="rows-lost",
            where=str(target),
            allowed=f"{piece.rows} rows",
            got=f"{rows} rows",
            hint="give the same command again; if the source did not change meanwhile, please report it",
        )
    record = PieceRecord(files=files, rows=rows, unreadable=unreadable, size_bytes=size)
    target.child(_WORK).write_json(piece.record, record.model_dump(mode="json"))
    return record


def _row_groups(source: str, piece: _Piece, most_bytes: int, advance: Callable[[int], None]) -> Iterator[pa.Table]:
    """The piece's rows in tables of up to `_ROW_GROUP_ROWS` rows and about `most_bytes`."""
    held: list[pa.Table] = []
    rows = size = 0
    for chunk in piece.chunks:
        read = lake.read_chunk(source, chunk)
        names = [read[schema.BYTES], read[schema.NAME], read[schema.SAMPLE_ID], read[schema.SHARD]]
        table = pa.table(names, names=_SCHEMA.names)
        for start, stop in _slices(table, rows, size, most_bytes):
            # Taken, not sliced: a slice would keep the whole chunk in memory, and its offsets.
            part = table.take(pa.array(range(start, stop))).cast(_SCHEMA)
            held.append(part)
            rows += part.num_rows
            size += _content_bytes(part)
            if rows >= _ROW_GROUP_ROWS or size >= most_bytes:
                yield pa.concat_tables(held)
                held, rows, size = [], 0, 0
        advance(chunk.rows)
    if held:
        yield pa.concat_tables(held)


def _slices(table: pa.Table, rows: int, size: int, most_bytes: int) -> Iterator[tuple[int, int]]:
    """Where to cut a table that follows `rows` rows of `size` bytes; each cut but the last fills a row group."""
    start = 0
    for stop, length in enumerate(_lengths(table), start=1):
        rows += 1
        size += length
        if rows >= _ROW_GROUP_ROWS or size >= most_bytes:
            yield start, stop
            start, rows, size = stop, 0, 0
    if start < table.num_rows:
        yield start, table.num_rows


def _lengths(table: pa.Table) -> list[int]:
    lengths: list[int] = pc.fill_null(pc.binary_length(table[schema.BYTES]), 0).to_pylist()
    return lengths


def _content_bytes(table: pa.Table) -> int:
    return sum(_lengths(table))


@contextmanager
def _publishing(target: Storage, name: str) -> Iterator[Path]:
    """A local path to write a file to; it is published atomically when the block ends, and only if it ends well.

    Raises:
        DataError: The destination cannot be written.
    """
    partial = f"{_WORK}/{_PARTIAL}/{name}"
    with tempfile.TemporaryDirectory() if not target.is_local else nullcontext(target.path(_WORK, _PARTIAL)) as folder:
        path = Path(folder, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
            with open(path, "rb") as content:
                os.fsync(content.fileno())
        except OSError as error:
            raise DataError(
                "writing failed",
                slug="write-failed",
                where=str(path),
                got=str(error),
                hint="make room or mend it, then give the same command again: finished shards are kept",
            ) from error
        if target.is_local:
            target.attempt("writing", name, lambda: os.replace(path, target.path(name)))
            return

        def upload() -> None:
            filesystem = target.filesystem()
            # Under a hidden name first: a stream that breaks may leave a part of the file behind.
            with open(path, "rb") as content, filesystem.open_output_stream(target.path(partial)) as stream:
                shutil.copyfileobj(content, stream, _COPY_BYTES)
            filesystem.move(target.path(partial), target.path(name))

        target.attempt("writing", name, upload)
