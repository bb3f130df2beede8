"""URIs become filesystems here and nowhere else: the sole importer of pyarrow.fs, fsspec and s3fs.

A `Storage` is a folder on local disk, on S3 (or anything that speaks it), or on any fsspec scheme. Endpoint
and credentials come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...) and are never part of
the object, so that it can be pickled to workers and printed in logs.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import tenacity

from pu_ray.errors import DataError

T = TypeVar("T")

_PARTIAL = ".partial-"

# Weather passes, mistakes do not: a missing object or a refused key fails at once.
_retry_weather = tenacity.retry(
    retry=tenacity.retry_if_exception(
        lambda error: (
            isinstance(error, OSError)
            and not isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError)
            and "ACCESS_DENIED" not in str(error)
        )
    ),
    stop=tenacity.stop_after_attempt(5),
    wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=10),
    reraise=True,
)


@dataclass(frozen=True)
class FileInfo:
    """One stored file.

    Attributes:
        path: Relative to the storage it was listed from.
        size_bytes: Length.
        tag: What changes when the content does: the ETag where there is one, else the modification time.
    """

    path: str
    size_bytes: int
    tag: str


@dataclass(frozen=True)
class Storage:
    """A folder addressed by URI; every path argument is relative to it and uses '/'."""

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", self.uri.rstrip("/") or "/")

    @property
    def scheme(self) -> str:
        """`file` for plain paths."""
        # Not urlsplit: keys may hold '#', '?' and colons.
        scheme, separator, _ = self.uri.partition("://")
        return scheme if separator else "file"

    @property
    def is_local(self) -> bool:
        """Whether this is a folder of the machine that asks."""
        return self.scheme == "file"

    @property
    def local_path(self) -> Path:
        """The folder as a local path.

        Raises:
            DataError: The storage is remote.
        """
        if not self.is_local:
            raise DataError("a local folder is needed", where=self.uri, allowed="a path on this machine")
        return Path(self.root())

    def root(self) -> str:
        """The path inside the filesystem: absolute for local folders, `bucket/key` for S3."""
        place = self.uri.partition("://")[2] if "://" in self.uri else self.uri
        return os.path.abspath(os.path.expanduser(place)) if self.is_local else place

    def absolute(self) -> str:
        """The URI, independent of the current directory."""
        return self.root() if self.is_local else self.uri

    def filesystem(self) -> pafs.FileSystem:
        """A fresh handle; workers make their own, so that no credential is ever pickled."""
        if self.is_local:
            return pafs.LocalFileSystem()
        if self.scheme == "s3":
            return _s3_filesystem()
        import fsspec

        try:
            return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(self.scheme)))
        except (ValueError, ImportError) as error:
            raise DataError(
                "this kind of storage is not available",
                where=self.uri,
                allowed="a local path, s3://, or an installed fsspec scheme",
                got=self.scheme,
                hint=str(error),
            ) from error

    def path(self, *parts: str) -> str:
        """Path inside the filesystem of something below this folder."""
        return "/".join([self.root(), *parts]) if parts else self.root()

    def child(self, name: str) -> Storage:
        """The folder `name` below this one."""
        return Storage(f"{self.uri}/{name}")

    def split(self) -> tuple[Storage, str]:
        """The folder that holds this entry, and its name in it: for URIs that mean a file."""
        parent, _, name = self.uri.rpartition("/")
        return Storage(parent or ("/" if self.uri.startswith("/") else ".")), name

    # -- reading ------------------------------------------------------------------------------------------

    def exists(self, path: str = "") -> bool:
        """Whether a file or a folder with content is there."""
        return self.kind(path) != "missing"

    def kind(self, path: str = "") -> str:
        """`file`, `folder` or `missing`.

        Raises:
            DataError: The storage refuses the question.
        """
        place = self.path(path) if path else self.root()
        info = self._try("reading", path, lambda: self.filesystem().get_file_info(place))
        if info.type == pafs.FileType.NotFound:
            return "missing"
        return "file" if info.type == pafs.FileType.File else "folder"

    def read_bytes(self, path: str) -> bytes:
        """The whole file.

        Raises:
            DataError: It is missing or may not be read; the URI is named.
        """

        def read() -> bytes:
            with self.filesystem().open_input_stream(self.path(path)) as stream:
                return bytes(stream.read())

        return self._try("reading", path, read)

    def read_text(self, path: str) -> str:
        """The whole file as UTF-8.

        Raises:
            DataError: Missing, or not UTF-8.
        """
        try:
            return self.read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8 text", where=f"{self.uri}/{path}", got=str(error)) from error

    def read_json(self, path: str) -> Any:
        """The parsed JSON file.

        Raises:
            DataError: Missing, or not JSON.
        """
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise DataError("not valid JSON", where=f"{self.uri}/{path}", got=str(error)) from error

    def open_input(self, path: str) -> pa.NativeFile:
        """A seekable reader.

        Raises:
            DataError: It is missing or may not be read.
        """
        return self._try("reading", path, lambda: self.filesystem().open_input_file(self.path(path)))

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as one table.

        Raises:
            DataError: Missing, or not a Parquet file.
        """
        try:
            with self.open_input(path) as source:
                return pq.read_table(source, columns=columns)
        except pa.ArrowInvalid as error:
            raise DataError("not a readable Parquet file", where=f"{self.uri}/{path}", got=str(error)) from error

    def list_files(self, path: str = "") -> list[FileInfo]:
        """Every file below, sorted by path; hidden and unfinished files are left out."""
        files = _list_s3(self, path) if self.scheme == "s3" else self._list_arrow(path)
        visible = (file for file in files if not any(part[:1] in "._" for part in file.path.split("/")))
        return sorted(visible, key=lambda file: file.path)

    def _list_arrow(self, path: str) -> list[FileInfo]:
        selector = pafs.FileSelector(self.path(path) if path else self.root(), recursive=True, allow_not_found=True)
        prefix = len(self.root().rstrip("/")) + 1
        return [
            FileInfo(info.path[prefix:], info.size, f"mtime-{info.mtime_ns}")
            for info in self._try("listing", path, lambda: self.filesystem().get_file_info(selector))
            if info.type == pafs.FileType.File
        ]

    def _try(self, doing: str, path: str, operation: Callable[[], T]) -> T:
        """Run an operation through the weather; what stays wrong becomes an error that names the URI."""
        try:
            return _retry_weather(operation)()
        except OSError as error:
            raise _explain(f"{self.uri}/{path}" if path else self.uri, error, doing) from error

    # -- writing ------------------------------------------------------------------------------------------

    def write_bytes(self, path: str, content: bytes) -> None:
        """Publish a file atomically: a reader sees the old content or the new one, never a part.

        Raises:
            DataError: The storage refuses it, or keeps failing.
        """
        self._try("writing", path, lambda: self._write(self.path(path), content))

    def _write(self, target: str, content: bytes) -> None:
        if not self.is_local:
            # An object store shows an object when its upload is complete.
            with self.filesystem().open_output_stream(target) as stream:
                stream.write(content)
            return
        folder, _, name = target.rpartition("/")
        os.makedirs(folder, exist_ok=True)
        partial = f"{folder}/{_PARTIAL}{uuid.uuid4().hex}-{name}"
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def write_json(self, path: str, value: Any) -> None:
        """Publish a JSON file atomically."""
        self.write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def write_table(self, path: str, table: pa.Table, row_group_rows: int | None = None) -> int:
        """Publish a Parquet file atomically; returns its size in bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=row_group_rows)
        content = sink.getvalue()
        self.write_bytes(path, content)
        return int(content.size)

    def delete(self, path: str = "") -> None:
        """Remove a file or a folder with all it holds; nothing there is fine.

        Raises:
            DataError: The storage refuses it.
        """
        kind = self.kind(path)
        target = self.path(path) if path else self.root()
        if kind != "missing":
            filesystem = self.filesystem()
            remove = filesystem.delete_file if kind == "file" else filesystem.delete_dir
            self._try("deleting", path, lambda: remove(target))

    def __str__(self) -> str:
        return self.uri


def sha256_of(content: bytes) -> str:
    """Hex digest for manifests."""
    return hashlib.sha256(content).hexdigest()


def iter_tables(storage: Storage, files: list[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Parquet files one after the other; memory holds one."""
    for file in files:
        yield storage.read_table(file, columns)


def storage_for_ray(storage: Storage) -> tuple[pafs.FileSystem, str]:
    """Filesystem and scheme-less path, the pair that Ray's libraries take for custom endpoints."""
    return storage.filesystem(), storage.root()


def _s3_filesystem() -> pafs.FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 60}
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme or "https"}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    return pafs.S3FileSystem(**options)


def _list_s3(storage: Storage, path: str) -> list[FileInfo]:
    # pyarrow's listing has no ETag, the only honest sign of changed content; s3fs has, and lists concurrently.
    import s3fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    filesystem = s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)
    prefix = len(storage.root().rstrip("/")) + 1
    try:
        entries = _retry_weather(filesystem.find)(storage.path(path) if path else storage.root(), detail=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _explain(storage.uri, error, "listing") from error
    return [
        FileInfo(key[prefix:], int(entry["size"]), str(entry["ETag"]).strip('"'))
        for key, entry in entries.items()
        if entry["type"] == "file"
    ]


def _is_lasting(error: BaseException) -> bool:
    """Whether trying again is pointless: something is missing, refused, or not a file."""
    kinds = FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError
    if isinstance(error, kinds):
        return True
    # pyarrow tells these by their text alone.
    text = str(error)
    return any(word in text for word in ("ACCESS_DENIED", "NO_SUCH_BUCKET", "Is a directory", "regular file"))


def _explain(uri: str, error: OSError, doing: str) -> DataError:
    text = str(error)
    if isinstance(error, PermissionError) or "ACCESS_DENIED" in text:
        return DataError(f"{doing} is not permitted", where=uri, hint="check the credentials in the environment")
    if isinstance(error, FileNotFoundError) or "NO_SUCH_BUCKET" in text:
        problem = "there is no such bucket" if "NO_SUCH_BUCKET" in text else "there is no such file"
        return DataError(problem, where=uri, hint="check the URI and the endpoint in the environment")
    if _is_lasting(error):
        return DataError("not a file", where=uri, got="a folder")
    return DataError(f"{doing} failed, again and again", where=uri, got=text, hint="check the storage, then run again")
