"""Storage in bad weather: a proxy disturbs what an S3 server answers; contents are right, every retry is counted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from pu_ray import lease
from pu_ray import storage as storage_module
from pu_ray.errors import DataError
from pu_ray.storage import Storage
from tests.fault_proxy import FaultProxy

ROOT = Path(__file__).parents[2]
PATIENCE_S = 1
# A server needs this long to be silent for good: curl measures speed over its last five seconds.
SILENCE_S = 60
AT_ONCE_S = 20  # far from any wait of ours, and from a busy machine's pauses


@pytest.fixture
def weather(s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FaultProxy]]:
    """Makes a proxy in front of a server with an empty bucket, and points the environment to it."""
    monkeypatch.setenv("PU_RAY_S3_TIMEOUT_S", str(PATIENCE_S))
    started: list[FaultProxy] = []

    def start(**options: object) -> FaultProxy:
        proxy = FaultProxy(s3_server, stall_s=SILENCE_S, **options)  # type: ignore[arg-type]
        started.append(proxy.__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        return proxy

    storage_module.take_weather()
    yield start
    for proxy in started:
        proxy.__exit__(None, None, None)
    # The library leaves them in the environment; here they would outlive the test.
    for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
        os.environ.pop(name, None)


STORAGE = Storage("s3://bucket/run")
CONTENT = np.random.default_rng(0).bytes(200_000)
TABLE = pa.table({"a": np.random.default_rng(0).random(20_000), "b": ["x"] * 20_000})


# -- one fault at a time -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("slow_down", "throttled"),
        ("unavailable", "throttled"),
        ("too_many", "throttled"),
        ("internal", "server"),
        ("bad_gateway", "server"),
        ("gateway_timeout", "timeout"),
        ("cut", "reset"),
        ("short", "reset"),
        ("stall", "timeout"),
        pytest.param("stall_body", "timeout", marks=pytest.mark.slow),
    ],
)
def test_a_disturbed_read_is_repeated_and_counted(weather, fault: str, kind: str) -> None:
    proxy = weather()
    STORAGE.write_bytes("x", CONTENT)
    STORAGE.write_table("t", TABLE)
    for read, right in ((lambda: STORAGE.read_bytes("x"), CONTENT), (lambda: STORAGE.read_table("t"), TABLE)):
        proxy.plan(fault, method="GET")
        assert read() == right
        taken = storage_module.take_weather()
        assert taken.pop(kind) == 1, proxy.requests
        assert not any(taken.values())
    assert proxy.counts[fault] == 2


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("slow_down", "throttled"),
        ("internal", "server"),
        ("gateway_timeout", "timeout"),
        ("lost", None),
        ("reset", None),
    ],
)
@pytest.mark.parametrize("size", [1000, 12_000_000], ids=["small", "in parts"])
def test_a_disturbed_write_is_repeated(weather, fault: str, kind: str | None, size: int) -> None:
    proxy = weather()
    content = np.random.default_rng(1).bytes(size)
    proxy.plan(fault, method="PUT")
    STORAGE.write_bytes("x", content)
    assert proxy.counts[fault] == 1
    assert STORAGE.read_bytes("x") == content
    # A kept connection that breaks is repeated by the HTTP client, unseen.
    assert kind is None or storage_module.weather()[kind] == 1


def test_a_write_that_meets_silence_is_repeated(weather) -> None:
    proxy = weather()
    proxy.plan("stall", method="PUT")
    started = time.monotonic()
    STORAGE.write_bytes("x", CONTENT)
    assert time.monotonic() - started < SILENCE_S / 2
    assert storage_module.weather()["timeout"] == 1
    assert STORAGE.read_bytes("x") == CONTENT


@pytest.mark.parametrize(
    ("fault", "kind"), [("slow_down", "throttled"), ("bad_gateway", "server"), ("cut", "reset"), ("stall", "timeout")]
)
def test_a_disturbed_listing_repeats_one_page(weather, fault: str, kind: str) -> None:
    proxy = weather()
    names = [f"{folder}/{k}" for folder in "abc" for k in range(3)]
    for name in names:
        STORAGE.write_bytes(name, b"")
    proxy.forget()
    proxy.plan(fault, method="GET", target="prefix=run%2Fb")
    assert [file.path for file in STORAGE.list_files()] == names
    assert proxy.counts[fault] == 1
    assert proxy.seen("GET") == 5  # the folder, three folders below, and one of them again
    assert storage_module.weather()[kind] == 1


@pytest.mark.parametrize(("fault", "kind"), [("slow_down", "throttled"), ("internal", "server"), ("lost", None)])
def test_a_disturbed_deletion_is_repeated(weather, fault: str, kind: str | None) -> None:
    proxy = weather()
    for name in ("a/1", "a/2", "b"):
        STORAGE.write_bytes(name, b"x")
    proxy.plan(fault, method="DELETE", target="a/2")
    STORAGE.delete("a")
    assert [file.path for file in STORAGE.list_files()] == ["b"]
    assert proxy.counts[fault] == 1
    assert kind is None or storage_module.weather()[kind] == 1


def test_a_slow_answer_is_waited_for(weather) -> None:
    proxy = weather()
    STORAGE.write_bytes("x", CONTENT)
    proxy.plan("slow", method="GET")
    assert STORAGE.read_bytes("x") == CONTENT
    assert proxy.counts["slow"] == 1
    assert not any(storage_module.weather().values())


# -- everything at once ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_in_a_storm_every_content_is_right(weather, seed: int) -> None:
    rates = {"slow_down": 0.1, "internal": 0.05, "reset": 0.05, "lost": 0.05, "cut": 0.1, "short": 0.05, "slow": 0.02}
    proxy = weather(seed=seed, rates=rates)
    contents = {f"{k % 7}/{k}.bin": np.random.default_rng(k).bytes(1000 + 997 * k) for k in range(60)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: STORAGE.write_bytes(*item), contents.items()))
        STORAGE.write_table("t.parquet", TABLE, row_group_rows=2000)
        assert {file.path: file.size_bytes for file in STORAGE.list_files()}.items() >= {
            name: len(content) for name, content in contents.items()
        }.items()
        assert list(pool.map(STORAGE.read_bytes, contents)) == list(contents.values())
        assert STORAGE.read_table("t.parquet", ["a"])["a"] == TABLE["a"]
    with lease.hold(STORAGE, "run", period_s=0.2) as held:
        time.sleep(1)
        held.check()
    STORAGE.delete()
    assert STORAGE.list_files() == []
    met = storage_module.weather()
    assert min(met["throttled"], met["reset"], met["server"]) > 0, met
    # Nothing is hidden but what the HTTP client repeats by itself on a kept connection.
    assert met["throttled"] == proxy.counts["slow_down"]
    assert met["server"] == proxy.counts["internal"]
    assert sum(proxy.counts.values()) > 30


def test_what_ray_does_with_checkpoints_survives_a_storm(weather, tmp_path: Path) -> None:
    rates = {"slow_down": 0.1, "too_many": 0.1, "internal": 0.1, "reset": 0.05, "lost": 0.05, "cut": 0.1}
    proxy = weather(seed=5, rates=rates)
    here = tmp_path / "here"
    here.mkdir()
    for k in range(40):  # more than pyarrow has threads
        (here / f"{k}.pt").write_bytes(CONTENT[: 1000 + k * 5_000])
    filesystem, root = storage_module.storage_for_ray(STORAGE)
    local = pafs.LocalFileSystem()
    filesystem.create_dir(f"{root}/c", recursive=True)
    pafs.copy_files(str(here), f"{root}/c/1", source_filesystem=local, destination_filesystem=filesystem)
    (tmp_path / "back").mkdir()
    pafs.copy_files(f"{root}/c/1", str(tmp_path / "back"), source_filesystem=filesystem, destination_filesystem=local)
    for k in range(40):
        assert (tmp_path / f"back/{k}.pt").read_bytes() == CONTENT[: 1000 + k * 5_000]
    filesystem.delete_dir(f"{root}/c")
    assert filesystem.get_file_info(f"{root}/c").type == pafs.FileType.NotFound
    met = storage_module.weather()
    assert met["throttled"] == proxy.counts["slow_down"] + proxy.counts["too_many"] > 0
    assert met["server"] == proxy.counts["internal"] > 0


# -- mistakes ----------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Storage], object]] = {
    "read": lambda storage: storage.read_bytes("x"),
    "table": lambda storage: storage.read_table("x"),
    "list": lambda storage: storage.list_files("x"),
    "write": lambda storage: storage.write_bytes("x", b"1"),
    "write_if": lambda storage: storage.write_if("x", b"1", None),
    "kind": lambda storage: storage.kind("x"),
    "tag": lambda storage: storage.tag("x"),
    "delete": lambda storage: storage.delete("x"),
}


@pytest.mark.parametrize("fault", ["forbidden", "bad_key", "bad_signature"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refusal_fails_at_once_and_names_the_uri(weather, operation: str, fault: str) -> None:
    proxy = weather(rates={fault: 1.0}, at_most=1000)
    started = time.monotonic()
    with pytest.raises(DataError, match="not permitted") as caught:
        OPERATIONS[operation](STORAGE)
    assert time.monotonic() - started < AT_ONCE_S
    assert caught.value.where == "s3://bucket/run/x"
    assert proxy.counts[fault] == 1
    assert not any(storage_module.weather().values())


@pytest.mark.parametrize("operation", ["read", "table", "list", "write", "write_if"])
def test_a_bucket_that_vanished_fails_at_once_and_names_the_uri(weather, s3_server: str, operation: str) -> None:
    weather()
    STORAGE.write_bytes("x", b"1")
    STORAGE.delete("x")
    httpx.delete(f"{s3_server}/bucket").raise_for_status()
    started = time.monotonic()
    with pytest.raises(DataError, match=r"there is no such (bucket|file)") as caught:
        OPERATIONS[operation](STORAGE)
    assert time.monotonic() - started < AT_ONCE_S
    assert caught.value.where == "s3://bucket/run/x"
    assert not any(storage_module.weather().values())


def test_a_store_without_space_fails_at_once(weather) -> None:
    proxy = weather()
    proxy.plan(*["full"] * 5, method="PUT")
    with pytest.raises(DataError, match="there is no space left") as caught:
        STORAGE.write_bytes("x", CONTENT)
    assert proxy.counts["full"] == 1
    assert caught.value.where == "s3://bucket/run/x"


@pytest.mark.slow
def test_an_endpoint_that_is_silent_for_good_is_given_up(weather) -> None:
    weather(rates={"stall": 1.0}, at_most=1000)
    started = time.monotonic()
    with pytest.raises(DataError, match="listing failed, again and again") as caught:
        STORAGE.list_files()
    assert time.monotonic() - started < SILENCE_S
    assert caught.value.where == "s3://bucket/run"
    assert storage_module.weather()["timeout"] == 4


# -- other stores than Amazon's ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["s3fs", "pyarrow"])
def test_what_is_sent_is_what_older_stores_understand(weather, first: str) -> None:
    proxy = weather()
    if first == "s3fs":
        STORAGE.write_if("z", b"1", None)
    STORAGE.write_bytes("small", b"1")
    STORAGE.write_bytes("2024-01-01T10:00:00", CONTENT * 40)
    STORAGE.write_if("y", b"1", None)
    STORAGE.delete("2024-01-01T10:00:00")
    STORAGE.delete()
    for request in proxy.requests:
        assert request.target.startswith("/bucket"), "path-style"
        assert not any("checksum" in name or name == "x-amz-trailer" for name in request.headers), request
        assert "aws-chunked" not in request.headers.get("content-encoding", "")
        assert "?delete" not in request.target


# -- full disks --------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_keeps_what_was_there_and_no_half_of_the_new(tiny_disk: Path) -> None:
    storage = Storage(str(tiny_disk))
    storage.write_bytes("a/x", b"old" * 1000)
    started = time.monotonic()
    for name in ("a/x", "a/y", "b/z"):
        with pytest.raises(DataError, match="there is no space left") as caught:
            storage.write_bytes(name, bytes(5_000_000))
        assert caught.value.where == f"{storage}/{name}"
        assert "finished work is kept" in str(caught.value.hint)
    assert time.monotonic() - started < AT_ONCE_S
    assert storage.read_bytes("a/x") == b"old" * 1000
    assert [path.name for path in tiny_disk.rglob("*") if path.is_file()] == ["x"]
    storage.write_bytes("a/y", bytes(100_000))  # with room it goes on


def test_a_read_only_file_system_is_told_at_once(tiny_disk: Path) -> None:
    storage = Storage(str(tiny_disk))
    storage.write_bytes("x", b"1")
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    started = time.monotonic()
    with pytest.raises(DataError, match="the file system is read-only"):
        storage.write_bytes("x", b"2")
    with pytest.raises(DataError, match="the file system is read-only"), lease.hold(storage, "run"):
        pytest.fail("held")
    assert time.monotonic() - started < AT_ONCE_S
    assert storage.read_bytes("x") == b"1"


# -- two at once -------------------------------------------------------------------------------------------

READER = """
import sys
from pu_ray import storage
for _ in range(10):
    assert len(storage.Storage("s3://bucket/run").read_bytes("x")) == 200_000
print(sum(storage.take_weather().values()), sum(storage.weather().values()))
"""


def test_each_process_counts_its_own_weather(weather) -> None:
    proxy = weather(rates={"slow_down": 0.3}, at_most=2, calm=2)
    STORAGE.write_bytes("x", CONTENT)
    storage_module.take_weather()
    proxy.forget()
    done = subprocess.run([sys.executable, "-c", READER], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(proxy.counts["slow_down"]), "0"]
    assert proxy.counts["slow_down"] > 0
    assert not any(storage_module.weather().values())
