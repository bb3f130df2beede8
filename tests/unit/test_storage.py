"""pu_ray/storage.py: one interface to disk and S3; atomic, listed without litter, errors that name the URI."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pu_ray import storage as storage_module
from pu_ray.errors import ConfigError, DataError
from pu_ray.storage import Storage
from tests.conftest import S3_SECRET as SECRET

ROOT = Path(__file__).parents[2]


@pytest.fixture
def local(tmp_path) -> Storage:
    return Storage(str(tmp_path / "folder"))


@pytest.fixture
def s3(s3_bucket) -> Storage:
    """An empty folder of a bucket on a server of our own; credentials only in the environment."""
    return Storage(f"{s3_bucket}/run")


@pytest.fixture(autouse=True)
def fair_weather():
    storage_module.take_weather()


@pytest.fixture(params=["local", "s3"])
def any_storage(request) -> Storage:
    return request.getfixturevalue(request.param)


@pytest.fixture
def no_waiting(monkeypatch):
    """Retries happen at once."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)


def paths(storage: Storage, below: str = "") -> list[str]:
    return [file.path for file in storage.list_files(below)]


# -- the same on every storage -----------------------------------------------------------------------------


def test_what_was_written_is_read_and_replaced(any_storage):
    any_storage.write_bytes("a/b.bin", b"old")
    any_storage.write_bytes("a/b.bin", b"new content")
    assert any_storage.read_bytes("a/b.bin") == b"new content"
    with any_storage.open_input("a/b.bin") as stream:
        stream.seek(4)
        assert stream.read() == b"content"
    any_storage.write_bytes("empty", b"")
    assert any_storage.read_bytes("empty") == b""


def test_kinds_tell_files_folders_and_nothing_apart(any_storage):
    assert any_storage.kind() == "missing"
    assert not any_storage.exists()
    any_storage.write_bytes("a/b.bin", b"x")
    assert [any_storage.kind(path) for path in ("", "a", "a/b.bin", "a/b", "c")] == [
        "folder",
        "folder",
        "file",
        "missing",
        "missing",
    ]
    assert any_storage.exists("a/b.bin")


def test_listings_are_sorted_and_relative_and_hide_what_starts_with_a_dot_or_an_underscore(any_storage):
    visible = ["b.bin", "a/2.bin", "a/10.bin", "a-b/1.bin", "z_/x.y_z"]
    hidden = [".hidden", "_engine/teacher.onnx", "a/_part", "a/.partial-123-b.bin", ".tmp/deep/x.bin"]
    for path in visible + hidden:
        any_storage.write_bytes(path, b"12345")
    assert paths(any_storage) == sorted(visible)
    assert paths(any_storage, "a") == ["a/10.bin", "a/2.bin"]
    assert paths(any_storage.child("a")) == ["10.bin", "2.bin"]
    assert {file.size_bytes for file in any_storage.list_files()} == {5}


def test_a_listing_of_nothing_is_empty(any_storage):
    assert any_storage.list_files() == []
    assert any_storage.list_files("nowhere") == []


def test_the_tag_changes_when_the_content_does_although_the_size_stays(any_storage):
    any_storage.write_bytes("a", b"one")
    any_storage.write_bytes("b", b"two")
    before = {file.path: file.tag for file in any_storage.list_files()}
    any_storage.write_bytes("a", b"eno")
    after = {file.path: file.tag for file in any_storage.list_files()}
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]


def test_deleting_removes_a_file_a_folder_or_nothing_and_only_that(any_storage):
    for path in ("keep", "a/1", "a/b/2", "ab/3"):
        any_storage.write_bytes(path, b"x")
    any_storage.delete("a/1")
    assert paths(any_storage) == ["a/b/2", "ab/3", "keep"]
    any_storage.delete("a")
    assert paths(any_storage) == ["ab/3", "keep"]
    any_storage.delete("a")
    any_storage.delete("never/was")
    assert paths(any_storage) == ["ab/3", "keep"]
    any_storage.delete()
    assert any_storage.kind() == "missing"
    any_storage.delete()


@pytest.mark.parametrize(
    "read",
    [
        lambda storage: storage.read_bytes("a/no.bin"),
        lambda storage: storage.open_input("a/no.bin"),
        lambda storage: storage.read_json("a/no.bin"),
        lambda storage: storage.read_table("a/no.bin"),
        lambda storage: storage.read_text("a/no.bin"),
    ],
)
def test_a_missing_file_is_a_data_error_that_names_the_uri(any_storage, read):
    with pytest.raises(DataError, match="there is no such file") as caught:
        read(any_storage)
    assert caught.value.where == f"{any_storage.uri}/a/no.bin"
    assert "environment" in caught.value.hint


def test_tables_come_back_as_they_were_and_their_size_is_told(any_storage):
    table = pa.table({"a": list(range(100)), "b": [b"x\0"] * 100})
    size = any_storage.write_table("t.parquet", table, row_group_rows=10)
    assert [file.size_bytes for file in any_storage.list_files()] == [size]
    assert any_storage.read_table("t.parquet") == table
    assert any_storage.read_table("t.parquet", ["b"]).column_names == ["b"]


def test_a_file_that_is_not_parquet_is_named(any_storage):
    any_storage.write_bytes("t.parquet", b"<html>no table here</html>")
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        any_storage.read_table("t.parquet")
    assert caught.value.where == f"{any_storage.uri}/t.parquet"


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}", b"nothing"])
def test_a_file_that_is_not_json_is_named(local, content):
    local.write_bytes("x.json", content)
    with pytest.raises(DataError, match="not valid JSON") as caught:
        local.read_json("x.json")
    assert caught.value.where == f"{local.uri}/x.json"


def test_json_comes_back_and_what_json_lacks_is_refused_before_anything_is_written(local):
    local.write_json("x.json", {"a": [1, None, "é"]})
    assert local.read_json("x.json") == {"a": [1, None, "é"]}
    with pytest.raises(ValueError, match="JSON"):
        local.write_json("y.json", {"a": float("nan")})
    assert paths(local) == ["x.json"]


def test_text_that_is_not_utf8_is_a_data_error_that_names_the_uri(local):
    local.write_bytes("labels.txt", "café\n".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        local.read_text("labels.txt")
    assert caught.value.where == f"{local.uri}/labels.txt"


def test_several_tables_are_read_one_after_the_other(local):
    for name in ("1", "2"):
        local.write_table(name, pa.table({"a": [name], "b": [0]}))
    read = storage_module.iter_tables(local, ["2", "1"], ["a"])
    assert isinstance(read, Iterator)
    assert [table.to_pylist() for table in read] == [[{"a": "2"}], [{"a": "1"}]]


# -- local disk: atomic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_no_litter(local, monkeypatch, step, error):
    local.write_bytes("a/x", b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(storage_module.os, step, fail)
    with pytest.raises(error):
        local.write_bytes("a/x", b"new")
    monkeypatch.undo()
    assert local.read_bytes("a/x") == b"old"
    assert [path.name for path in (local.local_path / "a").iterdir()] == ["x"]


def test_a_writer_that_is_killed_leaves_the_old_content_and_nothing_that_is_listed(local):
    local.write_bytes("x", b"old")
    killed = (
        "import os, signal, sys\nfrom pu_ray.storage import Storage\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Storage(sys.argv[1]).write_bytes('x', b'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", killed, local.uri], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    assert len(list(local.local_path.iterdir())) == 2  # the killed one's leftover is there, ...
    assert paths(local) == ["x"]  # ... but nobody sees it
    assert local.read_bytes("x") == b"old"


def test_a_reader_never_sees_a_part_of_a_write(local):
    size = 200_000
    local.write_bytes("x", b"a" * size)
    done = threading.Event()

    def write():
        for turn in range(20):
            local.write_bytes("x", (b"b" if turn % 2 else b"a") * size)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set():
        content = local.read_bytes("x")
        assert len(content) == size
        assert len(set(content)) == 1
        seen += 1
    writer.join()
    assert seen > 0


def test_many_writers_of_one_file_leave_one_whole_content(local):
    contents = [bytes([k]) * 10_000 for k in range(8)]
    threads = [threading.Thread(target=local.write_bytes, args=("x", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert local.read_bytes("x") in contents
    assert [path.name for path in local.local_path.iterdir()] == ["x"]


def test_a_folder_is_not_a_file(local, no_waiting):
    local.write_bytes("a/x", b"")
    with pytest.raises(DataError) as caught:
        local.read_bytes("a")
    assert caught.value.where == f"{local.uri}/a"


# -- weather -----------------------------------------------------------------------------------------------


class Flaky:
    """A filesystem whose first calls fail."""

    def __init__(self, error: Exception, failures: int) -> None:
        self.error, self.failures, self.calls = error, failures, 0

    def open_input_stream(self, path):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return pafs.LocalFileSystem().open_input_stream(path)


def disturb(monkeypatch, error: Exception, failures: int = 99) -> Flaky:
    flaky = Flaky(error, failures)
    monkeypatch.setattr(Storage, "filesystem", lambda self: flaky)
    return flaky


def test_a_passing_failure_is_tried_again_and_counted(local, monkeypatch, no_waiting):
    local.write_bytes("x", b"content")
    flaky = disturb(monkeypatch, OSError("connection reset"), failures=2)
    assert local.read_bytes("x") == b"content"
    assert flaky.calls == 3
    assert storage_module.weather() == {"throttled": 0, "reset": 2, "timeout": 0, "server": 0, "other": 0}


@pytest.mark.parametrize(
    ("text", "tries"), [("connection reset", 5), ("something new", 5), ("SlowDown", 10), ("HTTP status 503", 10)]
)
def test_a_lasting_failure_is_given_up_and_whoever_throttles_is_given_more_time(
    local, monkeypatch, no_waiting, text, tries
):
    flaky = disturb(monkeypatch, OSError(text))
    with pytest.raises(DataError, match=f"reading failed, again and again(.|\n)*{text}") as caught:
        local.read_bytes("x")
    assert flaky.calls == tries
    assert sum(storage_module.weather().values()) == tries - 1
    assert caught.value.where == f"{local.uri}/x"
    assert "finished work is kept" in caught.value.hint


def test_the_waits_grow_and_differ(local, monkeypatch):
    def waits() -> list[float]:
        slept: list[float] = []
        monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
        disturb(monkeypatch, OSError("SlowDown"))
        with pytest.raises(DataError):
            local.read_bytes("x")
        monkeypatch.undo()
        return slept

    first, second = waits(), waits()
    assert first != second
    assert all(wait <= min(20, 0.5 * 2**k) for k, wait in enumerate(first))
    assert max(max(waits()) for _ in range(5)) > 2


def test_weather_is_taken_once(local, monkeypatch, no_waiting):
    local.write_bytes("x", b"")
    disturb(monkeypatch, OSError("HTTP status 500"), failures=1)
    local.read_bytes("x")
    assert storage_module.take_weather()["server"] == 1
    assert set(storage_module.take_weather().values()) == {0}


def test_weather_of_many_threads_is_counted_in_full(local, no_waiting):
    def rough() -> None:
        tries = iter([OSError("connection reset")] * 4)

        def operation() -> None:
            for error in tries:
                raise error

        local.attempt("reading", "x", operation)

    threads = [threading.Thread(target=lambda: [rough() for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage_module.weather()["reset"] == 4 * 50 * 8


def test_what_is_read_lazily_is_tried_again_as_a_whole(local, no_waiting):
    opened: list[int] = []

    def operation() -> list[int]:
        opened.append(len(opened))
        part = [len(opened)]
        if len(opened) < 3:
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 18")
        return part

    assert local.attempt("reading", "x", operation) == [3]
    assert storage_module.weather()["reset"] == 2


def test_an_error_that_is_not_the_storages_passes_through(local):
    def operation() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        local.attempt("reading", "x", operation)
    assert sum(storage_module.weather().values()) == 0


def test_a_table_that_breaks_off_is_read_again(local, monkeypatch, no_waiting):
    local.write_table("t", pa.table({"a": [1, 2]}))
    whole = storage_module.pq.read_table
    calls: list[object] = []

    def breaks_off(source, **options):
        calls.append(source)
        if len(calls) == 1:
            raise OSError(
                "Could not open Parquet input source '<Buffer>': AWS Error NETWORK_CONNECTION during GetObject"
            )
        return whole(source, **options)

    monkeypatch.setattr(storage_module.pq, "read_table", breaks_off)
    assert local.read_table("t")["a"].to_pylist() == [1, 2]
    assert calls[0] is not calls[1]
    assert storage_module.weather()["reset"] == 1


# As they come from pyarrow 26 and s3fs 2026.9, see tests/fault_proxy.py.
HEAD = "When reading information for key 'x' in bucket 'b': AWS Error {} during HeadObject operation: No response body."
PART = "When uploading part for key 'y' in bucket 'bucket': AWS Error {}"
TABLE = "Could not open Parquet input source '<Buffer>': AWS Error {}"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("throttled", PART.format("SLOW_DOWN during UploadPart operation: Please reduce your request rate.")),
        ("throttled", "AWS Error SERVICE_UNAVAILABLE during GetObject operation: "),
        ("throttled", HEAD.format("UNKNOWN (HTTP status 503)")),
        ("throttled", HEAD.format("UNKNOWN (HTTP status 429)")),
        ("throttled", TABLE.format("SLOW_DOWN during GetObject operation: ")),
        (
            "throttled",
            PART.format("UNKNOWN (HTTP status 429) during UploadPart operation: Unable to parse ExceptionName"),
        ),
        ("throttled", "AWS Error SlowDown (HTTP status 503) during list_objects_v2: Please reduce your request rate."),
        ("throttled", "AWS Error TooManyRequests (HTTP status 429) during put_object: Too many requests."),
        ("server", "AWS Error INTERNAL_FAILURE during GetObject operation: "),
        ("server", HEAD.format("UNKNOWN (HTTP status 500)")),
        ("server", TABLE.format("UNKNOWN (HTTP status 502) during GetObject operation: ")),
        ("server", "AWS Error 502 (HTTP status 502) during list_objects_v2: Bad Gateway"),
        ("timeout", PART.format("REQUEST_TIMEOUT during UploadPart operation: ")),
        ("timeout", HEAD.format("UNKNOWN (HTTP status 504)")),
        ("timeout", "AWS Error RequestTimeout (HTTP status 400) during put_object: Idle connections will be closed."),
        (
            "timeout",
            "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached; Details: "
            "Operation too slow. Less than 1 bytes/sec transferred the last 2 seconds",
        ),
        ("timeout", 'AWS Error ReadTimeoutError during list_objects_v2: Read timeout on endpoint URL: "http://h/b"'),
        ("timeout", "AWS Error ConnectTimeoutError during put_object: Connect timeout on endpoint URL"),
        (
            "reset",
            PART.format(
                "NETWORK_CONNECTION during UploadPart operation: curlCode: 56, Failure when receiving data from the "
                "peer; Details: Recv failure: Connection reset by peer"
            ),
        ),
        (
            "reset",
            "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 18, Transferred a partial file; "
            "Details: end of response with 131072 bytes missing",
        ),
        ("reset", HEAD.format("NETWORK_CONNECTION").replace("No response body.", "curlCode: 7, Could not connect")),
        (
            "reset",
            "AWS Error ConnectionClosedError during list_objects_v2: Connection was closed before we received a valid "
            "response from endpoint URL",
        ),
        ("reset", "AWS Error EndpointConnectionError during list_objects_v2: Could not connect to the endpoint URL"),
        ("other", "AWS Error ConditionalRequestConflict (HTTP status 409) during put_object: A conflict occurred."),
        ("other", "a text that nobody foresaw"),
        ("refused", "AWS Error ACCESS_DENIED during GetObject operation: Access Denied"),
        ("refused", PART.format("INVALID_ACCESS_KEY_ID during UploadPart operation: The key does not exist.")),
        ("refused", PART.format("SIGNATURE_DOES_NOT_MATCH during UploadPart operation: It does not match.")),
        (
            "refused",
            "AWS Error UNKNOWN (HTTP status 400) during GetObject operation: Unable to parse ExceptionName: "
            "ExpiredToken Message: The provided token has expired.",
        ),
        ("refused", "AWS Error 403 (HTTP status 403) during head_object: Forbidden"),
        ("refused", "AWS Error NoCredentialsError during list_objects_v2: Unable to locate credentials"),
        ("no-bucket", PART.format("NO_SUCH_BUCKET during UploadPart operation: The specified bucket does not exist")),
        ("missing", "AWS Error NO_SUCH_KEY during GetObject operation: The specified key does not exist."),
        (
            "full",
            PART.format("UNKNOWN (HTTP status 507) during UploadPart operation: Unable to parse ExceptionName: XMinio"),
        ),
        ("full", "AWS Error XMinioStorageFull (HTTP status 507) during put_object: Minimum free drive limit."),
        ("rejected", HEAD.format("UNKNOWN (HTTP status 400)")),
        ("rejected", 'AWS Error ParamValidationError during put_object: Invalid bucket name "B?"'),
        (
            "rejected",
            "AWS Error NotImplemented (HTTP status 501) during put_object: A header implies what is not there.",
        ),
        # The object's name says nothing about the trouble.
        (
            "server",
            "When reading information for key 'NoSuchBucket HTTP status 403': AWS Error INTERNAL_FAILURE during",
        ),
    ],
)
def test_the_texts_of_the_libraries_are_told_apart(kind, text):
    assert storage_module.classify(OSError(text)) == kind


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("missing", FileNotFoundError(errno.ENOENT, "Path does not exist 'bucket/x'")),
        ("no-bucket", FileNotFoundError("AWS Error NoSuchBucket (HTTP status 404) during put_object: None")),
        ("refused", PermissionError(errno.EACCES, "Permission denied")),
        ("not-a-file", IsADirectoryError(errno.EISDIR, "Is a directory")),
        ("timeout", TimeoutError()),
        ("reset", ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
        ("full", OSError(errno.ENOSPC, "No space left on device")),
        ("full", OSError(errno.ENOSPC, "Auf dem Gerät ist kein Speicherplatz mehr verfügbar")),
        ("full", OSError(errno.EDQUOT, "Der zugewiesene Plattenplatz ist überschritten")),
        ("read-only", OSError(errno.EROFS, "Das Dateisystem ist nur lesbar")),
        ("rejected", OSError(errno.ENAMETOOLONG, "File name too long")),
        ("other", OSError(errno.EIO, "Input/output error")),
        ("other", OSError(errno.ESTALE, "Stale file handle")),
    ],
)
def test_the_kernels_errors_are_told_apart(kind, error):
    assert storage_module.classify(error) == kind


@pytest.mark.parametrize(
    ("number", "problem", "advice"),
    [
        (errno.ENOSPC, "there is no space left", "make room"),
        (errno.EDQUOT, "there is no space left", "make room"),
        (errno.EROFS, "the file system is read-only", "make it writable"),
    ],
)
def test_a_full_or_read_only_disk_is_told_at_once_and_leaves_no_litter(local, monkeypatch, number, problem, advice):
    local.write_bytes("a/x", b"old")
    calls: list[int] = []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage_module.os, "fsync", fail)
    with pytest.raises(DataError, match=problem) as caught:
        local.write_bytes("a/x", b"new")
    assert len(calls) == 1
    assert caught.value.where == f"{local.uri}/a/x"
    assert advice in caught.value.hint
    assert "finished work is kept" in caught.value.hint
    assert local.read_bytes("a/x") == b"old"
    assert [path.name for path in (local.local_path / "a").iterdir()] == ["x"]


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x")])
def test_a_mistake_is_not_tried_again(local, monkeypatch, no_waiting, error):
    flaky = disturb(monkeypatch, error)
    with pytest.raises(DataError) as caught:
        local.read_bytes("x")
    assert flaky.calls == 1
    assert caught.value.where == f"{local.uri}/x"


def test_a_refused_local_file_says_so(local, monkeypatch):
    monkeypatch.setattr(Storage, "filesystem", lambda self: Flaky(PermissionError("x"), 99))
    with pytest.raises(DataError, match="reading is not permitted"):
        local.read_bytes("x")


def test_a_key_that_s3_refuses_is_a_data_error_that_names_the_uri(s3, monkeypatch):
    # The text that pyarrow raises, as an OSError without an errno.
    refused = OSError(
        "When reading information for key 'run/x' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject"
    )
    monkeypatch.setattr(Storage, "filesystem", lambda self: Flaky(refused, 99))
    with pytest.raises(DataError, match="not permitted") as caught:
        s3.read_bytes("x")
    assert caught.value.where == f"{s3.uri}/x"


# -- S3 ----------------------------------------------------------------------------------------------------


def test_s3_tags_are_etags(s3):
    s3.write_bytes("x", b"content")
    (file,) = s3.list_files()
    # moto tells strangers nothing; this is the MD5 of the content.
    assert file.tag == "9a0364b9e99bb480dd25e1f0284c8555"
    assert s3.tag("x") == f'"{file.tag}"'


def test_s3_listings_stay_inside_the_folder(s3):
    for uri in ("s3://bucket/run", "s3://bucket/run-2", "s3://bucket"):
        Storage(uri).write_bytes("x", b"")
    assert paths(s3) == ["x"]
    assert paths(Storage("s3://bucket")) == ["run-2/x", "run/x", "x"]


def test_a_missing_bucket_is_a_data_error_that_names_the_uri(s3):
    elsewhere = Storage("s3://absent/run")
    with pytest.raises(DataError, match="there is no such file") as caught:
        elsewhere.read_bytes("x")
    assert caught.value.where == "s3://absent/run/x"
    assert elsewhere.kind() == "missing"
    with pytest.raises(DataError, match="there is no such bucket") as caught:
        elsewhere.list_files("a")
    assert caught.value.where == "s3://absent/run/a"
    elsewhere.delete()


def test_writing_to_a_missing_bucket_is_a_data_error_that_names_it(s3, no_waiting):
    with pytest.raises(DataError) as caught:
        Storage("s3://absent/run").write_bytes("x", b"1")
    assert "s3://absent/run" in caught.value.where


def test_keys_with_colons_and_other_web_characters_are_written_listed_read_and_deleted(s3):
    names = ["2024-01-01T10:00:00.bin", "a b+c%20d&e=f.bin", "run#2/what?.bin", "tag:x/é.bin"]
    for name in names:
        s3.write_bytes(name, name.encode())
    assert paths(s3) == sorted(names)
    assert [s3.read_bytes(name).decode() for name in names] == names
    assert s3.child("tag:x").list_files()[0].path == "é.bin"
    s3.delete("tag:x")
    s3.delete("2024-01-01T10:00:00.bin")
    assert paths(s3) == sorted(names[1:3])


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, dict[str, object]]]:
    """Every request that s3fs makes; listings come in pages of three."""
    made: list[tuple[str, dict[str, object]]] = []
    real = storage_module._call_s3

    def call(method, **arguments):
        made.append((method, arguments))
        if method == "list_objects_v2":
            arguments["MaxKeys"] = 3
        return real(method, **arguments)

    monkeypatch.setattr(storage_module, "_call_s3", call)
    return made


def test_a_flat_s3_folder_is_listed_page_after_page_and_many_side_by_side(s3, calls):
    names = [f"{k:02}.bin" for k in range(10)] + [f"{folder}/{k}" for folder in "abcd" for k in range(4)]
    for name in names:
        s3.write_bytes(name, b"")
    assert paths(s3) == sorted(names)
    prefixes = [arguments["Prefix"] for method, arguments in calls if method == "list_objects_v2"]
    assert prefixes.count("run/") == 5  # 10 files and 4 folders
    assert sorted(set(prefixes)) == ["run/", "run/a/", "run/b/", "run/c/", "run/d/"]


def test_a_hidden_s3_folder_is_not_entered(s3, calls):
    for name in ("x", "_train/1/2/3", ".tmp/a", "a/_b/c", "a/b"):
        s3.write_bytes(name, b"")
    assert paths(s3) == ["a/b", "x"]
    assert {arguments["Prefix"] for _, arguments in calls} == {"run/", "run/a/"}
    assert paths(s3, "_train") == []
    assert paths(s3.child("_train")) == ["1/2/3"]


def test_folders_that_a_console_made_are_not_files(s3, s3_server):
    httpx.put(f"{s3_server}/bucket/run/").raise_for_status()
    httpx.put(f"{s3_server}/bucket/run/a/").raise_for_status()
    s3.write_bytes("a/x", b"")
    assert paths(s3) == ["a/x"]
    s3.delete()
    assert not s3.exists()


def test_a_large_s3_folder_is_deleted_object_by_object_whatever_it_holds(s3, calls):
    names = [f"a/{folder}/{k}" for folder in ("b", "_hidden", ".partial") for k in range(4)]
    for name in [*names, "ab", "keep"]:
        s3.write_bytes(name, b"")
    s3.delete("a")
    assert paths(s3) == ["ab", "keep"]
    assert s3.kind("a") == "missing"
    assert "delete_objects" not in {method for method, _ in calls}


def test_clients_are_kept_until_the_environment_changes(s3, s3_server, monkeypatch):
    first = s3.filesystem()
    assert s3.filesystem() is first
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert s3.filesystem() is not first


@pytest.mark.parametrize("setting", ["soon", "-1", "0", "nan", "inf"])
def test_a_time_limit_that_is_none_is_refused(s3, monkeypatch, setting):
    monkeypatch.setenv("PU_RAY_S3_TIMEOUT_S", setting)
    with pytest.raises(ConfigError, match="PU_RAY_S3_TIMEOUT_S") as caught:
        s3.list_files()
    assert caught.value.got == setting


# -- agreeing with other writers ---------------------------------------------------------------------------


def test_s3_writes_only_where_the_file_is_what_it_was(s3):
    assert s3.tag("x") is None
    first = s3.write_if("x", b"1", None)
    assert first is not None
    assert first == s3.tag("x")
    assert s3.write_if("x", b"2", None) is None
    second = s3.write_if("x", b"2", first)
    assert second not in (None, first)
    assert s3.write_if("x", b"3", first) is None
    assert s3.read_bytes("x") == b"2"
    assert s3.write_if("gone", b"3", first) is None
    assert not s3.exists("gone")
    with pytest.raises(DataError, match="there is no such bucket"):
        Storage("s3://absent").write_if("x", b"", first)


@pytest.mark.parametrize("uri", ["memory://conditions", None])
def test_a_storage_without_conditions_writes_in_any_case(tmp_path, uri):
    storage = Storage(uri or str(tmp_path))
    assert storage.tag("x") is None
    first = storage.write_if("x", b"1", None)
    assert first == storage.tag("x")
    assert storage.write_if("x", b"2", None) == storage.tag("x") != first
    storage.delete("x")


def test_a_store_that_rejects_conditions_is_written_to_without(s3, monkeypatch):
    real = storage_module._call_s3

    def old_store(method, **arguments):
        if "IfNoneMatch" in arguments or "IfMatch" in arguments:
            raise OSError("AWS Error NotImplemented (HTTP status 501) during put_object: A header implies ...")
        return real(method, **arguments)

    monkeypatch.setattr(storage_module, "_call_s3", old_store)
    tag = s3.write_if("x", b"1", None)
    assert tag == s3.tag("x")
    assert s3.write_if("x", b"2", '"wrong"') == s3.tag("x") != tag


def test_what_is_not_there_is_none_and_not_an_error(any_storage):
    assert any_storage.read_if_there("x") is None
    any_storage.write_bytes("x", b"")
    assert any_storage.read_if_there("x") == b""


# -- listing local folders ---------------------------------------------------------------------------------


def test_links_are_followed_but_not_in_circles(local, tmp_path):
    local.write_bytes("a/x", b"1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/y").write_bytes(b"22")
    (local.local_path / "link").symlink_to(tmp_path / "elsewhere")
    (local.local_path / "file").symlink_to(tmp_path / "elsewhere/y")
    (local.local_path / "a/up").symlink_to(local.local_path)
    (tmp_path / "elsewhere/back").symlink_to(local.local_path / "a")
    (local.local_path / "nowhere").symlink_to(tmp_path / "absent")
    os.mkfifo(local.local_path / "pipe")
    assert [(file.path, file.size_bytes) for file in local.list_files()] == [
        ("a/x", 1),
        ("file", 2),
        ("link/back/x", 1),
        ("link/y", 2),
    ]


def test_a_hidden_local_folder_is_not_entered(local):
    local.write_bytes("a/x", b"")
    local.write_bytes("_train/x", b"")
    (local.local_path / "_train").chmod(0)
    looked: list[str] = []
    scan = os.scandir
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage_module.os, "scandir", lambda folder: looked.append(folder) or scan(folder))
            assert paths(local) == ["a/x"]
    finally:
        (local.local_path / "_train").chmod(0o700)
    assert looked == [local.uri, f"{local.uri}/a"]


def test_a_tree_deeper_than_the_recursion_limit_is_listed(local):
    depth = sys.getrecursionlimit() + 300
    local.local_path.mkdir()
    home = os.open(local.local_path, os.O_RDONLY)
    here = os.dup(home)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    os.close(home)
    assert paths(local) == ["d/" * depth + "x"]
    subprocess.run(["rm", "-r", local.uri], check=True)


def test_the_tag_of_a_local_file_is_its_modification_time(local):
    local.write_bytes("x", b"")
    os.utime(local.local_path / "x", ns=(1, 1_700_000_000_123_456_789))
    assert local.list_files()[0].tag == "mtime-1700000000123456789"


def test_a_name_that_is_not_utf8_is_told(local):
    local.write_bytes("a/x", b"")
    with open(os.fsencode(local.uri) + b"/a/caf\xe9.jpg", "w"):
        pass
    with pytest.raises(DataError, match="not UTF-8") as caught:
        local.list_files()
    assert caught.value.where == f"{local.uri}/a"
    assert "caf\\xe9.jpg" in caught.value.got


def test_listing_a_file_is_an_error(local):
    local.write_bytes("x", b"")
    with pytest.raises(DataError, match="not a file") as caught:
        local.list_files("x")
    assert caught.value.where == f"{local.uri}/x"


@pytest.fixture
def slow_folders(local, monkeypatch) -> set[str]:
    """A folder of forty, each of which takes a tenth of a second to look at; the threads that looked."""
    for k in range(40):
        local.write_bytes(f"{k}/x", b"")
    threads: set[str] = set()
    scan = Storage._scan

    def slow(self, place):
        threads.add(threading.current_thread().name)
        time.sleep(0.1)
        return scan(self, place)

    monkeypatch.setattr(Storage, "_scan", slow)
    return threads


def test_folders_are_looked_at_side_by_side_where_looking_is_waiting(local, slow_folders):
    assert len(local.list_files()) == 40
    assert len(slow_folders) > 8


def test_progress_is_told_about_once_a_second(local, slow_folders, monkeypatch):
    monkeypatch.setattr(storage_module, "_THREADS", 1)
    told: list[tuple[float, int]] = []
    local.list_files(on_progress=lambda count: told.append((time.monotonic(), count)))
    assert 2 <= len(told) <= 4
    counts = [count for _, count in told]
    assert counts == sorted(counts)
    assert 5 <= counts[0] < counts[-1] <= 40
    assert all(later - earlier >= 1 for (earlier, _), (later, _) in itertools.pairwise(told))


def test_a_listing_that_fails_ends_at_once(local, slow_folders, monkeypatch):
    slow = Storage._scan

    def fails(self, place):
        if place.path == "7":
            raise PermissionError("x")
        return slow(self, place)

    monkeypatch.setattr(Storage, "_scan", fails)
    with pytest.raises(DataError, match="listing is not permitted") as caught:
        local.list_files()
    assert caught.value.where == f"{local.uri}/7"


# -- S3 and web addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["run#2", "what?"])
def test_s3_keys_may_hold_characters_that_mean_something_in_web_addresses(s3, key):
    assert Storage(f"s3://bucket/{key}").root() == f"bucket/{key}"


def test_credentials_appear_neither_in_the_object_nor_in_its_pickle_nor_in_errors(s3):
    s3.write_bytes("x", b"content")
    with pytest.raises(DataError) as caught:
        s3.read_bytes("absent")
    for text in (repr(s3), str(s3), repr(pickle.dumps(s3)), str(caught.value), repr(vars(s3))):
        assert SECRET not in text
        assert "AKIAEXAMPLE" not in text
    assert pickle.loads(pickle.dumps(s3)).read_bytes("x") == b"content"


def test_the_endpoint_of_s3_alone_wins_over_the_general_one(s3, s3_server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    s3.write_bytes("x", b"content")
    assert s3.read_bytes("x") == b"content"
    assert paths(s3) == ["x"]


def test_ray_gets_a_filesystem_and_a_path_that_fit_together(any_storage):
    any_storage.write_bytes("x", b"content")
    filesystem, root = storage_module.storage_for_ray(any_storage)
    with filesystem.open_input_stream(f"{root}/x") as stream:
        assert stream.read() == b"content"


def test_checkpoints_travel_through_the_filesystem_that_ray_gets(any_storage, tmp_path):
    """What Ray Train does with it: a folder there and back, a listing, a deletion, in another process."""
    filesystem, root = pickle.loads(pickle.dumps(storage_module.storage_for_ray(any_storage)))
    assert SECRET.encode() not in pickle.dumps(filesystem)
    (tmp_path / "here/deep").mkdir(parents=True)
    (tmp_path / "here/model").write_bytes(b"weights" * 100_000)
    (tmp_path / "here/deep/empty").write_bytes(b"")
    filesystem.create_dir(f"{root}/c", recursive=True)
    source = pafs.LocalFileSystem()
    pafs.copy_files(str(tmp_path / "here"), f"{root}/c/1", source_filesystem=source, destination_filesystem=filesystem)
    listed = filesystem.get_file_info(pafs.FileSelector(f"{root}/c", recursive=True))
    assert {info.path for info in listed if info.type == pafs.FileType.File} == {
        f"{root}/c/1/model",
        f"{root}/c/1/deep/empty",
    }
    pafs.copy_files(f"{root}/c/1", str(tmp_path / "back"), source_filesystem=filesystem, destination_filesystem=source)
    assert (tmp_path / "back/model").read_bytes() == b"weights" * 100_000
    assert (tmp_path / "back/deep/empty").read_bytes() == b""
    filesystem.delete_file(f"{root}/c/1/model")
    assert paths(any_storage) == ["c/1/deep/empty"]
    filesystem.delete_dir(f"{root}/c")
    assert filesystem.get_file_info(f"{root}/c").type == pafs.FileType.NotFound
    with pytest.raises(FileNotFoundError):
        filesystem.open_input_stream(f"{root}/absent")
    assert filesystem == storage_module.storage_for_ray(any_storage)[0]


def test_a_checkpoint_that_nobody_finished_is_not_uploaded(s3):
    filesystem, root = storage_module.storage_for_ray(s3)
    stream = filesystem.open_output_stream(f"{root}/x")
    stream.write(b"half")
    del stream
    gc.collect()
    assert paths(s3) == []


# -- URIs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "parent", "name"),
    [
        ("s3://bucket/a/b.txt", "s3://bucket/a", "b.txt"),
        ("s3://bucket/b.txt", "s3://bucket", "b.txt"),
        ("/a/b.txt", "/a", "b.txt"),
        ("/b.txt", "/", "b.txt"),
        ("a/b.txt", "a", "b.txt"),
        ("b.txt", ".", "b.txt"),
    ],
)
def test_a_uri_of_a_file_splits_into_its_folder_and_its_name(uri, parent, name):
    folder, file = Storage(uri).split()
    assert (folder.uri, file) == (parent, name)


def test_trailing_slashes_do_not_make_another_folder():
    assert Storage("s3://bucket/run/") == Storage("s3://bucket/run")
    assert Storage("/").uri == "/"
    assert Storage("s3://bucket/run//").child("a").uri == "s3://bucket/run/a"


def test_local_paths_become_absolute_and_remote_ones_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Storage("a/../b").absolute() == str(tmp_path / "b")
    assert Storage("~/b").absolute() == "/home/someone/b"
    assert Storage("file:///a/b").absolute() == "/a/b"
    assert Storage("s3://bucket/a/").absolute() == "s3://bucket/a"


def test_paths_below_a_folder_are_joined():
    assert Storage("s3://bucket/a").path("b", "c") == "bucket/a/b/c"
    assert Storage("s3://bucket/a").path() == "bucket/a"
    assert Storage("/a").path("b") == "/a/b"


def test_a_remote_folder_has_no_local_path():
    with pytest.raises(DataError, match="a local folder is needed") as caught:
        _ = Storage("s3://bucket/a").local_path
    assert caught.value.where == "s3://bucket/a"
    assert Storage("/a").local_path == Path("/a")


def test_a_scheme_that_nobody_installed_is_named():
    with pytest.raises(DataError, match="not available") as caught:
        Storage("gopher9://a/b").filesystem()
    assert caught.value.got == "gopher9"


def test_other_fsspec_schemes_work_too():
    memory = Storage("memory://somewhere/run")
    memory.write_table("t.parquet", pa.table({"a": np.arange(3)}))
    assert memory.read_table("t.parquet")["a"].to_pylist() == [0, 1, 2]
    memory.write_bytes("_hidden/x", b"")
    assert paths(memory) == ["t.parquet"]
    memory.delete()
    assert paths(memory) == []


def test_digests_are_sha256():
    assert storage_module.sha256_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
