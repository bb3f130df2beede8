"""pu_ray/storage.py: one interface to disk and S3; atomic, listed without litter, errors that name the URI."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from pu_ray import storage as storage_module
from pu_ray.errors import DataError
from pu_ray.storage import Storage

ROOT = Path(__file__).parents[2]
SECRET = "wJalr-topsecret-key"


@pytest.fixture
def local(tmp_path) -> Storage:
    return Storage(str(tmp_path / "folder"))


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch) -> Storage:
    """An empty folder of a bucket on a server of our own; credentials only in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    httpx.post(f"{s3_server}/moto-api/reset").raise_for_status()
    httpx.put(f"{s3_server}/bucket").raise_for_status()
    return Storage("s3://bucket/run")


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


def test_a_passing_failure_is_tried_again(local, monkeypatch, no_waiting):
    local.write_bytes("x", b"content")
    flaky = Flaky(OSError("connection reset"), failures=2)
    monkeypatch.setattr(Storage, "filesystem", lambda self: flaky)
    assert local.read_bytes("x") == b"content"
    assert flaky.calls == 3


def test_a_lasting_failure_is_given_up_after_five_tries(local, monkeypatch, no_waiting):
    flaky = Flaky(OSError("connection reset"), failures=99)
    monkeypatch.setattr(Storage, "filesystem", lambda self: flaky)
    with pytest.raises((OSError, DataError), match="connection reset"):
        local.read_bytes("x")
    assert flaky.calls == 5


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x")])
def test_a_mistake_is_not_tried_again(local, monkeypatch, no_waiting, error):
    flaky = Flaky(error, failures=99)
    monkeypatch.setattr(Storage, "filesystem", lambda self: flaky)
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


def test_s3_tags_are_etags(s3, s3_server):
    s3.write_bytes("x", b"content")
    (file,) = s3.list_files()
    etag = httpx.head(f"{s3_server}/bucket/run/x").headers["etag"].strip('"')
    assert file.tag == etag


def test_s3_listings_stay_inside_the_folder(s3):
    for uri in ("s3://bucket/run", "s3://bucket/run-2", "s3://bucket"):
        Storage(uri).write_bytes("x", b"")
    assert paths(s3) == ["x"]
    assert paths(Storage("s3://bucket")) == ["run-2/x", "run/x", "x"]


def test_a_missing_bucket_is_a_data_error_on_reading_and_empty_on_listing(s3):
    elsewhere = Storage("s3://absent/run")
    with pytest.raises(DataError, match="there is no such file") as caught:
        elsewhere.read_bytes("x")
    assert caught.value.where == "s3://absent/run/x"
    assert elsewhere.kind() == "missing"
    assert elsewhere.list_files() == []


def test_writing_to_a_missing_bucket_is_a_data_error_that_names_it(s3, no_waiting):
    with pytest.raises(DataError) as caught:
        Storage("s3://absent/run").write_bytes("x", b"1")
    assert "s3://absent/run" in caught.value.where


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
    memory.delete()


def test_digests_are_sha256():
    assert storage_module.sha256_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
