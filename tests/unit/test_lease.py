"""pu_ray/lease.py: two runs on one output refuse each other, and no dead run keeps a living one out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pu_ray import lease
from pu_ray import storage as storage_module
from pu_ray.errors import ClusterError, DataError
from pu_ray.lease import FILE_NAME, Owner
from pu_ray.storage import Storage
from tests.conftest import S3_SECRET as SECRET
from tests.fault_proxy import FaultProxy

ROOT = Path(__file__).parents[2]

QUICK = {"period_s": 0.2, "settle_s": 0.1}
HOLDER = """
import sys, time
from pu_ray import lease
from pu_ray.storage import Storage
with lease.hold(Storage(sys.argv[1]), "pu-ray run", period_s=float(sys.argv[2]), settle_s=0.1):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def local(tmp_path) -> Storage:
    return Storage(str(tmp_path / "run"))


@pytest.fixture
def s3(s3_bucket) -> Storage:
    return Storage(f"{s3_bucket}/run")


@pytest.fixture
def old_s3(s3, s3_server, monkeypatch) -> Iterator[Storage]:
    """A store that never heard of conditional writes."""
    with FaultProxy(s3_server, ignores_conditions=True) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield s3


@pytest.fixture
def memory() -> Iterator[Storage]:
    storage = Storage("memory://lease/run")
    yield storage
    storage.delete()


@pytest.fixture(params=["local", "s3", "old_s3", "memory"])
def any_storage(request) -> Storage:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["s3", "old_s3", "memory"])
def store(request) -> Storage:
    """A storage without a kernel's lock."""
    return request.getfixturevalue(request.param)


def elsewhere(**changes: object) -> Owner:
    """An owner on a machine of which nothing is known."""
    return replace(Owner.here("pu-ray run", 0.2), host="web-3", pid=4711, machine="another boot", **changes)


def stays_free(storage: Storage) -> bool:
    with lease.hold(storage, "next", **QUICK):
        return True


# -- the same on every storage -----------------------------------------------------------------------------


def test_a_second_run_is_refused_and_told_who_holds_it(any_storage):
    with lease.hold(any_storage, "pu-ray run", **QUICK) as held:
        held.check()
        started = time.monotonic()
        with (
            pytest.raises(ClusterError, match="another run is at work") as caught,
            lease.hold(any_storage, "x", **QUICK),
        ):
            pytest.fail("two at once")
        assert time.monotonic() - started < 10
        held.check()
    error = caught.value
    assert error.exit_status == 4
    assert error.where == str(any_storage)
    owner = Owner.here("pu-ray run", 0.2)
    assert f"pu-ray run, on host {owner.host}, pid {os.getpid()}, since 20" in error.got
    assert f"kill {os.getpid()} on {owner.host}" in error.hint
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_it_is_free_after_the_end_whether_good_or_bad_and_leaves_nothing(any_storage):
    with lease.hold(any_storage, "first", **QUICK):
        any_storage.write_bytes("x", b"")
        assert [file.path for file in any_storage.list_files()] == ["x"]
        assert any_storage.read_if_there(FILE_NAME)
    assert any_storage.read_if_there(FILE_NAME) is None
    with pytest.raises(KeyboardInterrupt), lease.hold(any_storage, "second", **QUICK):
        raise KeyboardInterrupt
    assert any_storage.read_if_there(FILE_NAME) is None
    assert stays_free(any_storage)


def test_outputs_are_leased_one_by_one(any_storage):
    with lease.hold(any_storage.child("a"), "a", **QUICK), lease.hold(any_storage.child("b"), "b", **QUICK):
        pass


def test_whoever_lost_it_is_told_and_leaves_the_others_lock_alone(any_storage):
    other = elsewhere().encode()
    with lease.hold(any_storage, "first", **QUICK) as held:
        any_storage.write_bytes(FILE_NAME, other)
        time.sleep(0.5)  # some heartbeats
        with pytest.raises(ClusterError, match="lost its output") as caught:
            held.check()
        assert "web-3, pid 4711" in caught.value.got
        assert caught.value.where == f"{any_storage}/{FILE_NAME}"
        with pytest.raises(ClusterError):
            held.check()
    assert any_storage.read_if_there(FILE_NAME) == other


def test_whoever_finds_the_lock_removed_is_told(any_storage):
    with lease.hold(any_storage, "first", **QUICK) as held:
        any_storage.delete(FILE_NAME)
        with pytest.raises(ClusterError, match="somebody removed this run's lock"):
            held.check()
        time.sleep(0.5)
        assert any_storage.read_if_there(FILE_NAME) is None  # no heartbeat brings it back


def test_a_lock_holds_no_secret(any_storage, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with lease.hold(any_storage, "pu-ray run", **QUICK):
        content = any_storage.read_bytes(FILE_NAME)
    assert set(json.loads(content)) == {
        *("id", "what", "host", "pid", "machine", "process_started", "since", "period_s", "beat")
    }
    assert SECRET.encode() not in content
    assert b"AKIAEXAMPLE" not in content


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_of_many_that_start_at_once_one_gets_it(request, kind):
    storage = request.getfixturevalue(kind)
    got: list[str] = []
    gate, done = threading.Barrier(6), threading.Event()

    def run() -> None:
        gate.wait()
        try:
            with lease.hold(storage, "run", **QUICK) as held:
                got.append("held")
                done.wait(10)
                held.check()
        except ClusterError:
            got.append("refused")

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(got) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["held"] + ["refused"] * 5


# -- what dies lets go -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_killed_run_is_replaced_at_once_on_its_machine(request, kind):
    storage = request.getfixturevalue(kind)
    command = [sys.executable, "-c", HOLDER, storage.uri, "10"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ClusterError, match=f"pid {process.pid}"), lease.hold(storage, "second", **QUICK):
            pytest.fail("two at once")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert storage.read_if_there(FILE_NAME)
        notes: list[str] = []
        started = time.monotonic()
        with lease.hold(storage, "second", note=notes.append) as held:
            held.check()
            assert time.monotonic() - started < 10
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert [f"pid {process.pid}" in note for note in notes] == ([] if kind == "local" else [True])


def test_a_process_that_is_only_dying_counts_as_dead(s3):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = lease._process_started(process.pid)
    owner = replace(Owner.here("run", 10.0), pid=process.pid, process_started=started)
    assert not owner.has_died()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert owner.has_died()
    process.communicate()
    assert owner.has_died()


def test_a_pid_that_was_given_away_anew_is_not_the_owner():
    here = Owner.here("run", 10.0)
    assert not here.has_died()
    assert replace(here, process_started="1").has_died()


def test_of_another_machine_nothing_is_known():
    here = Owner.here("run", 10.0)
    dead = replace(here, pid=(1 << 22) + 1)
    assert dead.has_died()
    assert not replace(dead, machine="another boot").has_died()
    assert not replace(dead, machine="").has_died()


# -- heartbeats --------------------------------------------------------------------------------------------


def test_the_heartbeat_moves(store):
    with lease.hold(store, "run", **QUICK):
        first = json.loads(store.read_bytes(FILE_NAME))
        time.sleep(0.9)
        later = json.loads(store.read_bytes(FILE_NAME))
    assert later["beat"] >= first["beat"] + 2
    assert {**first, "beat": 0} == {**later, "beat": 0}


def test_an_owner_elsewhere_that_gives_no_sign_of_life_is_replaced_after_three_periods(store):
    store.write_bytes(FILE_NAME, elsewhere().encode())
    notes: list[str] = []
    started = time.monotonic()
    with lease.hold(store, "second", note=notes.append, **QUICK) as held:
        waited = time.monotonic() - started
        held.check()
    assert 0.6 <= waited < 3
    assert [note.split(":")[0] for note in notes] == [
        "waiting up to 1 s for a sign of life of another run",
        "taking over from a run that gives no sign of life",
    ]
    assert all("web-3, pid 4711" in note for note in notes)


def test_an_owner_elsewhere_that_lives_is_not_replaced(store):
    ended = threading.Event()

    def live() -> None:
        beat = 0
        while not ended.wait(0.1):
            beat += 1
            store.write_bytes(FILE_NAME, elsewhere(beat=beat).encode())

    store.write_bytes(FILE_NAME, elsewhere().encode())
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(ClusterError, match="web-3, pid 4711"), lease.hold(store, "second", **QUICK):
            pytest.fail("two at once")
    finally:
        ended.set()
        thread.join()


def test_the_owners_slower_heart_is_given_its_time(s3):
    s3.write_bytes(FILE_NAME, elsewhere(period_s=0.7).encode())
    started = time.monotonic()
    assert stays_free(s3)
    assert time.monotonic() - started >= 2.1


def test_an_owner_that_ends_while_it_is_watched_makes_room_at_once(store):
    store.write_bytes(FILE_NAME, elsewhere(period_s=20.0).encode())
    timer = threading.Timer(0.3, lambda: store.delete(FILE_NAME))
    timer.start()
    started = time.monotonic()
    assert stays_free(store)
    assert time.monotonic() - started < 5
    timer.join()


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b'{"id": "x"}', b"\xff"])
def test_a_lock_that_cannot_be_read_is_watched_like_any_other(s3, content):
    s3.write_bytes(FILE_NAME, content)
    started = time.monotonic()
    assert stays_free(s3)
    assert time.monotonic() - started >= 0.6


@pytest.mark.parametrize("kind", ["s3", "old_s3"])
def test_of_two_that_watch_a_dead_owner_one_gets_it(request, kind):
    storage = request.getfixturevalue(kind)
    storage.write_bytes(FILE_NAME, elsewhere().encode())
    outcome: list[str] = []
    done = threading.Event()

    def run() -> None:
        try:
            with lease.hold(storage, "run", period_s=0.2, settle_s=1.0) as held:
                outcome.append("held")
                done.wait(20)
                held.check()
        except ClusterError:
            outcome.append("refused")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(outcome) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(outcome) == ["held", "refused"]


@pytest.mark.parametrize("kind", ["old_s3", "memory"])
def test_where_there_are_no_conditions_the_last_writer_wins(request, monkeypatch, kind):
    storage = request.getfixturevalue(kind)
    beats: list[float] = []

    def rival(seconds: float) -> None:
        beats.append(seconds)
        storage.write_bytes(FILE_NAME, elsewhere(beat=len(beats)).encode())

    monkeypatch.setattr(lease, "time", SimpleNamespace(**vars(time)))
    monkeypatch.setattr(lease.time, "sleep", rival)
    with pytest.raises(ClusterError, match="web-3, pid 4711"), lease.hold(storage, "run", period_s=0.2, settle_s=0.123):
        pytest.fail("two at once")
    assert beats[0] == 0.123


def test_an_answer_that_is_lost_does_not_lock_a_run_out_of_its_own_output(s3, monkeypatch):
    real = storage_module._call_s3
    lost: list[str] = []

    def call(method, **arguments):
        answer = real(method, **arguments)
        if method == "put_object" and not lost:
            lost.append(method)
            raise OSError("AWS Error ConnectionClosedError during put_object: Connection was closed")
        return answer

    monkeypatch.setattr(storage_module, "_call_s3", call)
    with lease.hold(s3, "run", **QUICK) as held:
        held.check()
        lost.clear()  # the next heartbeat's answer is lost as well
        time.sleep(1.5)
        held.check()
        assert lost
        beat = json.loads(s3.read_bytes(FILE_NAME))["beat"]
        time.sleep(0.9)
        assert json.loads(s3.read_bytes(FILE_NAME))["beat"] > beat
    assert s3.read_if_there(FILE_NAME) is None


def test_weather_that_outlasts_a_heartbeat_is_noted_and_survived(s3, monkeypatch):
    notes: list[str] = []
    with lease.hold(s3, "run", note=notes.append, **QUICK) as held:
        with monkeypatch.context() as patch:
            patch.setattr(
                Storage,
                "read_if_there",
                lambda *_: (_ for _ in ()).throw(DataError("reading failed", slug="storage-failed")),
            )
            time.sleep(0.6)
        time.sleep(0.5)
        held.check()
        assert json.loads(s3.read_bytes(FILE_NAME))["beat"] >= 1
    assert "the lock could not be renewed: reading failed" in notes
    assert s3.read_if_there(FILE_NAME) is None


def test_an_output_in_no_bucket_is_told(s3):
    with pytest.raises(DataError, match="there is no such bucket") as caught, lease.hold(Storage("s3://absent/a"), "x"):
        pytest.fail("held")
    assert caught.value.where == f"s3://absent/a/{FILE_NAME}"


# -- local folders -----------------------------------------------------------------------------------------


def test_a_file_system_without_locks_is_leased_by_heartbeat(local, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lease.fcntl, "flock", no_locks)
    started = time.monotonic()
    with lease.hold(local, "run", period_s=5.0, settle_s=0.1):
        pass
    assert time.monotonic() - started < 5  # the file that could not be locked is no sign of another run
    with lease.hold(local, "run", **QUICK) as held:
        held.check()
        with pytest.raises(ClusterError, match=f"pid {os.getpid()}"), lease.hold(local, "second", **QUICK):
            pytest.fail("two at once")
        time.sleep(0.5)
        assert json.loads(local.read_bytes(FILE_NAME))["beat"] >= 1
    assert local.read_if_there(FILE_NAME) is None


def test_an_old_lock_file_that_nobody_locks_means_nothing(local):
    local.write_bytes(FILE_NAME, elsewhere().encode())
    with lease.hold(local, "run") as held:
        held.check()
        assert Owner.parse(local.read_bytes(FILE_NAME)).pid == os.getpid()


def test_a_child_that_inherits_the_lock_does_not_keep_it(local):
    with lease.hold(local, "run"):
        waiting = os.open(local.local_path / FILE_NAME, os.O_RDWR)
        child = os.fork()
        if child == 0:  # pragma: no cover
            time.sleep(5)
            os._exit(0)
    try:
        assert stays_free(local)
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever had opened it before gets it as well
    finally:
        os.close(waiting)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_whose_file_is_removed_before_it_is_locked_is_taken_anew(local, monkeypatch):
    local.write_bytes(FILE_NAME, b"the last owner's, who is about to end")
    flock = fcntl.flock
    calls: list[int] = []

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            (local.local_path / FILE_NAME).unlink()
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(lease.fcntl, "flock", late)
    with lease.hold(local, "run") as held:
        held.check()
        assert Owner.parse(local.read_bytes(FILE_NAME)).pid == os.getpid()


def test_a_full_disk_is_told(local, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lease.os, "pwrite", full)
    with pytest.raises(DataError, match="no space left"), lease.hold(local, "run"):
        pytest.fail("held")
    monkeypatch.undo()
    assert stays_free(local)
