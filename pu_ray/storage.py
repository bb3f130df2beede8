"""URIs become filesystems here and nowhere else: the sole importer of pyarrow.fs, fsspec and s3fs.

A `Storage` is a folder on local disk, on S3 (or anything that speaks it), or on any fsspec scheme. Endpoint
and credentials come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...) and are never part of
the object, so that it can be pickled to workers and printed in logs.

Weather (throttling, resets, stalls, a server's bad moment) is waited out and counted, see `weather`; a mistake (no such
file, no permission, a full disk) fails at once. The libraries' own retries are off, so that none is hidden. An S3
connection is given up after 10 s without an answer and 30 s without a byte; `PU_RAY_S3_TIMEOUT_S` sets another time.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import queue
import re
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import tenacity

from pu_ray.errors import ConfigError, DataError

T = TypeVar("T")

_PARTIAL = ".partial-"

_THREADS = 16
_CONNECT_S = 10.0
_SILENCE_S = 30.0
_ATTEMPTS = 5
# Whoever says "slow down" is well, and gives way within a minute or so; giving up would cost hours of work.
_ATTEMPTS_WHEN_THROTTLED = 10

# -- weather -----------------------------------------------------------------------------------------------

WEATHER = ("throttled", "reset", "timeout", "server", "other")
_ERRNO_KINDS = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EROFS: "read-only",
    errno.ENAMETOOLONG: "rejected",
    errno.EFBIG: "rejected",
}
# pyarrow and s3fs tell most things by their text alone; docs: tests/unit/test_storage.py holds the texts as they come.
# The first that fits wins. What no line names is `other`, and tried again.
_TEXT_KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("no-bucket", "NO_SUCH_BUCKET|NoSuchBucket"),
        ("missing", "NO_SUCH_KEY|NoSuchKey|RESOURCE_NOT_FOUND|HTTP status 404"),
        (
            "refused",
            "ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|"
            "SignatureDoesNotMatch|EXPIRED_TOKEN|ExpiredToken|InvalidToken|INVALID_CLIENT_TOKEN_ID|TimeTooSkewed|"
            "CredentialsError|HTTP status 40[13]",
        ),
        ("full", "StorageFull|QuotaExceeded|HTTP status 507|No space left on device|Disk quota exceeded"),
        ("read-only", "Read-only file system"),
        (
            "throttled",
            "SLOW_DOWN|SlowDown|reduce your request rate|THROTTLING|Throttl|TooManyRequests|SERVICE_UNAVAILABLE|"
            "ServiceUnavailable|HTTP status (?:429|503)",
        ),
        ("timeout", "REQUEST_TIMEOUT|RequestTimeout|curlCode: 28|TimeoutError|[Tt]imed out|HTTP status (?:408|504)"),
        ("other", "HTTP status 409"),  # two conditional writes at once: one of them may try again
        ("rejected", "ParamValidationError|NotImplemented|HTTP status (?:4..|501)|curlCode: 60"),
        ("server", "INTERNAL_FAILURE|InternalError|HTTP status 5.."),
        (
            "reset",
            "NETWORK_CONNECTION|[Cc]onnection (?:was )?(?:reset|closed|aborted|refused)|ConnectionClosedError|"
            "EndpointConnectionError|ClientPayloadError|IncompleteRead|Broken pipe|Transferred a partial file",
        ),
        ("not-a-file", "Is a directory|regular file"),
    )
)

_weather: Counter[str] = Counter()
_weather_lock = threading.Lock()


def weather() -> dict[str, int]:
    """Retries of this process so far, by kind: throttled, reset, timeout, server, other; all five, zeros included.

    Not counted: a request that the HTTP client repeats by itself because a kept connection had been closed meanwhile.
    """
    with _weather_lock:
        return {kind: _weather[kind] for kind in WEATHER}


def take_weather() -> dict[str, int]:
    """`weather`, and begin anew: a task reports what it met itself, whatever ran in its process before."""
    with _weather_lock:
        taken = {kind: _weather[kind] for kind in WEATHER}
        _weather.clear()
        return taken


def classify(error: OSError) -> str:
    """What kind of trouble this is: one of `WEATHER`, which passes, or something lasting.

    Lasting are: missing, no-bucket, refused, full, read-only, not-a-file, rejected.
    """
    # pyarrow puts the object's key before this mark, and a key may hold any of the words below.
    text = str(error).rpartition("AWS Error ")[2]
    if isinstance(error, FileNotFoundError):
        return "no-bucket" if _TEXT_KINDS[0][1].search(text) else "missing"
    if isinstance(error, PermissionError):
        return "refused"
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return "not-a-file"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ConnectionError):
        return "reset"
    if error.errno in _ERRNO_KINDS:
        return _ERRNO_KINDS[error.errno]
    return next((kind for kind, pattern in _TEXT_KINDS if pattern.search(text)), "other")


def _passes(error: BaseException) -> bool:
    return isinstance(error, OSError) and classify(error) in WEATHER


def _out_of_patience(state: tenacity.RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    throttled = isinstance(error, OSError) and classify(error) == "throttled"
    return state.attempt_number >= (_ATTEMPTS_WHEN_THROTTLED if throttled else _ATTEMPTS)


def _count(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, OSError)
    with _weather_lock:
        _weather[classify(error)] += 1


# Any wait from nothing to the limit, so that a thousand tasks that were throttled together do not come back together.
_retry_weather = tenacity.retry(
    retry=tenacity.retry_if_exception(_passes),
    stop=_out_of_patience,
    wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
    before_sleep=_count,
    reraise=True,
)


def _explain(uri: str, error: OSError, doing: str) -> DataError:
    kind, text = classify(error), str(error)
    if kind == "refused":
        return DataError(
            f"{doing} is not permitted",
            slug="storage-not-permitted",
            where=uri,
            got=text,
            hint="check the credentials in the environment",
        )
    if kind in ("missing", "no-bucket"):
        hint = "check the URI and the endpoint in the environment"
        if kind == "no-bucket":
            return DataError("there is no such bucket", slug="no-such-bucket", where=uri, hint=hint)
        return DataError("there is no such file", slug="no-such-file", where=uri, hint=hint)
    if kind == "not-a-file":
        return DataError("not a file", slug="not-a-file", where=uri, got="a folder", hint="name one file in it")
    if kind == "full":
        hint = "make room, then give the same command again: finished work is kept, and it goes on"
        return DataError("there is no space left", slug="no-space-left", where=uri, got=text, hint=hint)
    if kind == "read-only":
        hint = "make it writable or choose another place; finished work is kept, and the same command goes on"
        return DataError("the file system is read-only", slug="read-only-storage", where=uri, got=text, hint=hint)
    if kind == "rejected":
        return DataError(
            f"the storage does not accept {doing}",
            slug="storage-rejects",
            where=uri,
            got=text,
            hint="check URI and storage",
        )
    hint = "check the storage, then give the same command again: finished work is kept, and it goes on"
    return DataError(f"{doing} failed, again and again", slug="storage-failed", where=uri, got=text, hint=hint)


_DAMAGED = "if PU-Ray wrote it, delete the folder and give the command again; else fetch the file anew"


# -- files -------------------------------------------------------------------------------------------------


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
            raise DataError(
                "a local folder is needed",
                slug="not-local",
                where=self.uri,
                allowed="a path on this machine",
                hint="copy it here first",
            )
        return Path(self.root())

    def root(self) -> str:
        """The path inside the filesystem: absolute for local folders, `bucket/key` for S3, the URL itself for HTTP."""
        if self.scheme in ("http", "https"):
            return self.uri
        place = self.uri.partition("://")[2] if "://" in self.uri else self.uri
        return os.path.abspath(os.path.expanduser(place)) if self.is_local else place

    def absolute(self) -> str:
        """The URI, independent of the current directory."""
        return self.root() if self.is_local else self.uri

    def filesystem(self) -> pafs.FileSystem:
        """A handle of this process; workers make their own, so that no credential is ever pickled."""
        if self.is_local:
            return pafs.LocalFileSystem()
        if self.scheme == "s3":
            return _client("pyarrow", _s3_filesystem)
        import fsspec

        try:
            return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(self.scheme)))
        except (ValueError, ImportError) as error:
            raise DataError(
                "this kind of storage is not available",
                slug="unknown-storage",
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
        info = self.attempt("reading", path, lambda: self.filesystem().get_file_info(place))
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

        return self.attempt("reading", path, read)

    def read_text(self, path: str) -> str:
        """The whole file as UTF-8.

        Raises:
            DataError: Missing, or not UTF-8.
        """
        try:
            return self.read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                "not UTF-8 text", slug="not-utf8", where=f"{self.uri}/{path}", got=str(error), hint="save it in UTF-8"
            ) from error

    def read_json(self, path: str) -> Any:
        """The parsed JSON file.

        Raises:
            DataError: Missing, or not JSON.
        """
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise DataError(
                "not valid JSON", slug="not-json", where=f"{self.uri}/{path}", got=str(error), hint=_DAMAGED
            ) from error

    def read_if_there(self, path: str) -> bytes | None:
        """The whole file, or None where there is none.

        Raises:
            DataError: It may not be read.
        """

        def read() -> bytes | None:
            try:
                with self.filesystem().open_input_stream(self.path(path)) as stream:
                    return bytes(stream.read())
            except OSError as error:
                if classify(error) == "missing":
                    return None
                raise

        return self.attempt("reading", path, read)

    def open_input(self, path: str) -> pa.NativeFile:
        """A seekable reader. What is read from it later meets the weather unprotected: see `attempt`.

        Raises:
            DataError: It is missing or may not be read.
        """
        return self.attempt("reading", path, lambda: self.filesystem().open_input_file(self.path(path)))

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as one table.

        Raises:
            DataError: Missing, or not a Parquet file.
        """

        def read() -> pa.Table:
            with self.filesystem().open_input_file(self.path(path)) as source:
                return pq.read_table(source, columns=columns)

        try:
            return self.attempt("reading", path, read)
        except pa.ArrowInvalid as error:
            raise DataError(
                "not a readable Parquet file",
                slug="not-parquet",
                where=f"{self.uri}/{path}",
                got=str(error),
                hint=_DAMAGED,
            ) from error

    def list_files(self, path: str = "", *, on_progress: Callable[[int], None] | None = None) -> list[FileInfo]:
        """Every file below, sorted by path; hidden and unfinished files are left out, hidden folders not entered.

        Folders are listed side by side, one flat folder page by page. Links are followed, but not in circles.

        Args:
            path: Folder to list; nothing there is an empty listing.
            on_progress: Is told the number of files found so far, about once a second.

        Raises:
            DataError: The storage refuses it, the bucket does not exist, `path` is a file, or a name is not UTF-8.
        """
        if _is_hidden(path):
            return []
        if self.is_local:
            files = _walk(_Place(path), self._look_local, on_progress, waits=False)
        elif self.scheme == "s3":
            files = _walk(_Place(path), self._look_s3, on_progress, waits=True)
        else:
            files = [file for file in self._list_arrow(path) if not _is_hidden(file.path)]
        return sorted(files, key=lambda file: file.path)

    def _look_local(self, place: _Place) -> tuple[list[FileInfo], list[_Place]]:
        return self.attempt("listing", place.path, lambda: self._scan(place))

    def _scan(self, place: _Place) -> tuple[list[FileInfo], list[_Place]]:
        folder = self.path(place.path) if place.path else self.root()
        prefix = f"{place.path}/" if place.path else ""
        files: list[FileInfo] = []
        folders: list[_Place] = []
        try:
            about = os.stat(folder)
            identity = (about.st_dev, about.st_ino)
            if identity in place.inside_of:
                return [], []  # a link to a folder that it lies in
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if _is_hidden(name):
                        continue
                    if not name.isascii():
                        _require_utf8(folder, name)
                    if entry.is_dir():
                        folders.append(_Place(prefix + name, inside_of=(*place.inside_of, identity)))
                    elif entry.is_file():  # no pipes, no sockets, no links to nowhere
                        stat = entry.stat()
                        files.append(FileInfo(prefix + name, stat.st_size, f"mtime-{stat.st_mtime_ns}"))
        except FileNotFoundError:
            pass  # it went while we looked, or was never there
        return files, folders

    def _look_s3(self, place: _Place) -> tuple[list[FileInfo], list[_Place]]:
        """One page of one folder; what remains of the folder is another place to look at."""
        bucket, prefix = self._s3_prefix(place.path)
        options = {"ContinuationToken": place.token} if place.token else {}
        page = self.attempt(
            "listing",
            place.path,
            # pyarrow's listing has no ETag, the only honest sign of changed content.
            lambda: _call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **options),
        )
        above = len(self._s3_prefix("")[1])
        files = [
            FileInfo(entry["Key"][above:], int(entry["Size"]), str(entry["ETag"]).strip('"'))
            for entry in page.get("Contents", ())
            if not entry["Key"].endswith("/") and not _is_hidden(entry["Key"][len(prefix) :])
        ]
        names = [entry["Prefix"][above:].rstrip("/") for entry in page.get("CommonPrefixes", ())]
        folders = [_Place(name) for name in names if not _is_hidden(name)]
        if page.get("NextContinuationToken"):
            folders.append(_Place(place.path, page["NextContinuationToken"]))
        return files, folders

    def _s3_prefix(self, path: str) -> tuple[str, str]:
        """Bucket, and what the keys of everything below this folder begin with."""
        bucket, _, key = (self.path(path) if path else self.root()).partition("/")
        return bucket, f"{key.rstrip('/')}/" if key else ""

    def _list_arrow(self, path: str) -> list[FileInfo]:
        selector = pafs.FileSelector(self.path(path) if path else self.root(), recursive=True, allow_not_found=True)
        # Some put a slash before every path.
        prefix = len(self.root().strip("/")) + 1
        return [
            FileInfo(info.path.lstrip("/")[prefix:], info.size, f"mtime-{info.mtime_ns}")
            for info in self.attempt("listing", path, lambda: self.filesystem().get_file_info(selector))
            if info.type == pafs.FileType.File
        ]

    def attempt(self, doing: str, path: str, operation: Callable[[], T]) -> T:
        """Run an operation through the weather; what stays wrong becomes an error that names the URI.

        For whatever reads lazily (Parquet row groups, ranges of a tar file): open and read inside the operation, which
        is repeated as a whole.

        Args:
            doing: What it does, for the error: reading, writing, ...
            path: The file or folder it does it to.
            operation: Safe to repeat.

        Raises:
            DataError: It is a mistake, a full disk, or weather that does not pass.
        """
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
        self.attempt("writing", path, lambda: self._write(self.path(path), content))

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
        if self.scheme == "s3":
            self._delete_s3(path)
            return
        kind = self.kind(path)
        target = self.path(path) if path else self.root()

        def remove() -> None:
            try:
                if kind == "file":
                    self.filesystem().delete_file(target)
                else:
                    self.filesystem().delete_dir(target)
            except FileNotFoundError:
                pass  # an attempt that seemed to fail did it, or somebody else

        if kind != "missing":
            self.attempt("deleting", path, remove)

    def _delete_s3(self, path: str) -> None:
        """Object by object: older stores know no bulk deletion without a Content-MD5, which nobody sends any more."""
        bucket, prefix = self._s3_prefix(path)

        def remove(key: str) -> None:
            where = f"{bucket}/{key}"[len(self.root()) + 1 :]
            self.attempt("deleting", where, lambda: _or_nothing("delete_object", Bucket=bucket, Key=key))

        keys = [prefix.rstrip("/")] if prefix else []
        with ThreadPoolExecutor(_THREADS) as pool:
            while True:
                list(pool.map(remove, keys))
                # What was deleted is listed no more, so the first page is always the next one.
                listed = self.attempt(
                    "deleting", path, lambda: _or_nothing("list_objects_v2", Bucket=bucket, Prefix=prefix)
                )
                keys = [entry["Key"] for entry in listed.get("Contents", ())]
                if not keys:
                    return

    # -- agreeing with other writers --------------------------------------------------------------------------

    def tag(self, path: str) -> str | None:
        """What changes when this file's content does, for `write_if`; None where there is no such file.

        Raises:
            DataError: The storage refuses the question.
        """
        if self.scheme != "s3":
            content = self.read_if_there(path)
            return None if content is None else sha256_of(content)
        bucket, _, key = self.path(path).partition("/")
        answer = self.attempt("reading", path, lambda: _or_nothing("head_object", Bucket=bucket, Key=key))
        return str(answer["ETag"]) if answer else None

    def write_if(self, path: str, content: bytes, tag: str | None) -> str | None:
        """Publish a file only where it is what it was.

        Stores that know no conditions write in any case, and say that they did: S3 before 2024, most of what imitates
        it, and every storage but S3. Whoever must know which kind this is repeats a write that has to be refused. A
        write whose answer was lost is repeated, and then refused because of itself.

        Args:
            path: The file.
            content: Its new content.
            tag: What it must have now (see `tag`); None: it must not exist.

        Returns:
            The new tag, or None if the condition did not hold and nothing was written.

        Raises:
            DataError: The storage refuses to write at all.
        """
        if self.scheme != "s3":
            self.write_bytes(path, content)
            return sha256_of(content)
        bucket, _, key = self.path(path).partition("/")
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}

        def put(condition: dict[str, str]) -> str | None:
            try:
                return str(_call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)["ETag"])
            except OSError as error:
                kind, text = classify(error), str(error)
                if "HTTP status 412" in text or (kind == "missing" and tag is not None):
                    return None
                if kind == "rejected" and condition:
                    return put({})
                raise

        return self.attempt("writing", path, lambda: put(condition))

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
    """Filesystem and scheme-less path, the pair that Ray's libraries take for custom endpoints.

    Ray calls the filesystem itself, so on S3 this one waits the weather out by itself, and counts it. It is made for
    checkpoints: a file is in memory as a whole while it is read or written.
    """
    if storage.scheme == "s3":
        return pafs.PyFileSystem(_PatientS3()), storage.root()
    return storage.filesystem(), storage.root()


class _PatientS3(pafs.FileSystemHandler):  # type: ignore[misc]
    """S3 with each call tried again in bad weather; pickled without state, so without credentials.

    Contents travel through s3fs: pyarrow copies folders in its own thread pool, and its S3 needs a thread of that pool
    to write, so that eight files at once would wait for each other for good.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PatientS3)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    @staticmethod
    def _call(method: str, *arguments: Any) -> Any:
        return _retry_weather(getattr(_client("pyarrow", _s3_filesystem), method))(*arguments)

    def get_type_name(self) -> str:
        return "patient-s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._call("get_file_info", paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:
        return self._call("get_file_info", selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        """An object store has no folders, and an empty object with a slash at its end is nobody's gain."""

    def delete_dir(self, path: str) -> None:
        Storage(f"s3://{path}").delete()

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        Storage(f"s3://{path}").delete()

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("nobody wants to empty every bucket")

    def delete_file(self, path: str) -> None:
        self._call("delete_file", path)

    def move(self, src: str, dest: str) -> None:
        self._call("move", src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._call("copy_file", src, dest)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        content = _retry_weather(_ask_s3)("get_object", lambda client: client.cat_file(path, max_concurrency=1))
        return pa.BufferReader(content)

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        return pa.PythonFile(_Upload(path), mode="w")

    def open_append_stream(self, path: str, metadata: object) -> pa.NativeFile:
        raise NotImplementedError("objects cannot be appended to")


class _Upload:
    """A file to write to, which becomes an object when it is closed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._content = io.BytesIO()

    @property
    def closed(self) -> bool:
        return self._content.closed

    def write(self, content: bytes) -> int:
        return self._content.write(content)

    def tell(self) -> int:
        return self._content.tell()

    def flush(self) -> None:
        """There is nothing that could be flushed halfway."""

    def close(self) -> None:
        if not self.closed:
            content = self._content.getvalue()
            self._content.close()
            bucket, _, key = self._path.partition("/")
            _retry_weather(_call_s3)("put_object", Bucket=bucket, Key=key, Body=content)


# -- listing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where to look next.

    Attributes:
        path: Folder, relative to the storage.
        token: Where in the folder to go on; None: at its beginning.
        inside_of: Device and inode of each folder on the way here.
    """

    path: str
    token: str | None = None
    inside_of: tuple[tuple[int, int], ...] = ()


_Look = Callable[[_Place], tuple[list[FileInfo], list[_Place]]]


def _walk(first: _Place, look: _Look, on_progress: Callable[[int], None] | None, *, waits: bool) -> list[FileInfo]:
    """Look everywhere, in threads if looking is mostly waiting.

    A local disk answers from memory, and threads would only get into each other's way: 100,000 files in 1,000 folders
    take 0.3 s without them and 0.9 s with sixteen. A network file system waits like an object store.
    """
    files: list[FileInfo] = []
    places = deque([first])
    started, cpu_started = time.monotonic(), time.thread_time()
    told = started

    def tell() -> None:
        nonlocal told
        if on_progress is not None and time.monotonic() - told >= 1:
            told = time.monotonic()
            on_progress(len(files))

    while places and not waits:
        found, more = look(places.popleft())
        files += found
        places += more
        tell()
        elapsed_s, cpu_s = time.monotonic() - started, time.thread_time() - cpu_started
        waits = elapsed_s > 0.5 and cpu_s < elapsed_s / 2

    pool = ThreadPoolExecutor(_THREADS)
    finished: queue.SimpleQueue[Future[tuple[list[FileInfo], list[_Place]]]] = queue.SimpleQueue()
    under_way = 0
    try:
        while places or under_way:
            while places:
                pool.submit(look, places.popleft()).add_done_callback(finished.put)
                under_way += 1
            try:
                found, more = finished.get(timeout=1.0).result()
            except queue.Empty:
                tell()
                continue
            under_way -= 1
            files += found
            places += more
            tell()
    finally:
        pool.shutdown(cancel_futures=True)
    return files


def _is_hidden(path: str) -> bool:
    return any(part[:1] in (".", "_") for part in path.split("/"))


def _require_utf8(folder: str, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "a file's name is not UTF-8",
            slug="file-name-not-utf8",
            where=folder,
            got=repr(os.fsencode(name)),
            hint="rename or remove it",
        ) from error


# -- S3 ----------------------------------------------------------------------------------------------------

_clients: dict[str, tuple[str, Any]] = {}
_clients_lock = threading.Lock()


def _client(library: str, make: Callable[[], Any]) -> Any:
    """This process's client of a library: connections are kept, until the environment says something else."""
    _endpoint()  # may add to the environment
    settings = sorted(item for item in os.environ.items() if item[0].startswith(("AWS_", "PU_RAY_S3_")))
    key = sha256_of(repr((os.getpid(), settings)).encode())
    with _clients_lock:
        if library not in _clients or _clients[library][0] != key:
            _clients[library] = (key, make())
        return _clients[library][1]


def _endpoint() -> str | None:
    """Where S3 is, if not at Amazon's; such a store is then not sent checksums, of which it may know nothing."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        # The one place that both libraries look at; pyarrow has no option for it.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    return endpoint


def _timeouts_s() -> tuple[float, float]:
    """To connect, and to wait for the next byte.

    Raises:
        ConfigError: The environment asks for no such time.
    """
    setting = os.environ.get("PU_RAY_S3_TIMEOUT_S")
    if setting is None:
        return _CONNECT_S, _SILENCE_S
    try:
        silence_s = float(setting)
    except ValueError:
        silence_s = 0.0
    if not 1 <= silence_s < float("inf"):
        raise ConfigError(
            "not a time to wait for the storage",
            slug="invalid-s3-timeout",
            where="PU_RAY_S3_TIMEOUT_S",
            allowed="seconds, 1 or more",
            got=setting,
        )
    return min(_CONNECT_S, silence_s), silence_s


def _s3_filesystem() -> pafs.FileSystem:
    connect_s, silence_s = _timeouts_s()
    options: dict[str, Any] = {
        "connect_timeout": connect_s,
        "request_timeout": silence_s,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=1),
        # Small files then take one request instead of three.
        "allow_delayed_open": True,
    }
    endpoint = _endpoint()
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme or "https"}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options["region"] = region
    return pafs.S3FileSystem(**options)


def _s3fs() -> Any:
    import s3fs
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]
    from botocore.utils import parse_timestamp  # type: ignore[import-untyped]

    def parse_quickly(value: Any) -> Any:
        # Three quarters of the time of a listing went into botocore's own way of reading dates.
        try:
            return datetime.fromisoformat(value)
        except (TypeError, ValueError):
            return parse_timestamp(value)

    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_quickly)
    connect_s, silence_s = _timeouts_s()
    settings: dict[str, Any] = {
        "connect_timeout": connect_s,
        "read_timeout": silence_s,
        "retries": {"max_attempts": 0},
        "max_pool_connections": _THREADS,
    }
    endpoint = _endpoint()
    if endpoint:
        settings["s3"] = {"addressing_style": "path"}
    filesystem = s3fs.S3FileSystem(
        endpoint_url=endpoint,
        session=session,
        config_kwargs=settings,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    filesystem.retries = 1
    return filesystem


def _call_s3(method: str, **arguments: Any) -> dict[str, Any]:
    """One request, see `_ask_s3`."""
    answer: dict[str, Any] = _ask_s3(method, lambda client: client.call_s3(method, **arguments))
    return answer


def _ask_s3(method: str, ask: Callable[[Any], Any]) -> Any:
    """Let s3fs do something, with what is wrong told as pyarrow tells it.

    Raises:
        FileNotFoundError: No such key or bucket.
        OSError: Anything else.
    """
    client = _client("s3fs", _s3fs)
    try:
        return ask(client)
    except Exception as error:
        # botocore's and aiohttp's own kinds are no OSError.
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and library not in ("botocore", "aiobotocore", "aiohttp"):
            raise
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        if not response:
            raise OSError(f"AWS Error {type(error).__name__} during {method}: {error}") from error
        about, status = response.get("Error", {}), response["ResponseMetadata"]["HTTPStatusCode"]
        text = f"AWS Error {about.get('Code')} (HTTP status {status}) during {method}: {about.get('Message')}"
        raise (FileNotFoundError(text) if status == 404 else OSError(text)) from error


def _or_nothing(method: str, **arguments: Any) -> dict[str, Any]:
    """The same, where a key or a bucket that is not there is an empty answer."""
    try:
        return _call_s3(method, **arguments)
    except FileNotFoundError:
        return {}
