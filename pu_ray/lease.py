"""One run at a time on one output: two that write the same folder would take each other's files for leftovers.

A local folder is locked by the kernel (flock), which lets go when the process dies, however it dies. Every other
storage holds a small hidden object that its owner keeps renewing; an owner whose heartbeat stops is replaced. A lease
is a refusal, not a fence: an owner that was frozen for longer than the others' patience learns of its loss at its next
`check`, and what it writes until then is not held back.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from pu_ray.errors import ClusterError, PuRayError
from pu_ray.storage import Storage

FILE_NAME = "_lock.json"  # hidden from listings

Note = Callable[[str], None]

_PERIOD_S = 10.0
_PATIENCE = 3  # periods without a heartbeat until an owner counts as dead
_MAX_PERIOD_S = 60.0  # nobody waits longer for what a damaged lock claims
_SETTLE_S = 2.0
_TRIES = 20  # how often others may come between
# What file systems answer that know no flock.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True)
class Owner:
    """Who holds a lease, as it is written down; nothing secret.

    Attributes:
        id: Random; tells two leases of one process apart.
        what: What it is held for, for people.
        host: Name of the machine.
        pid: The process, in its own pid namespace.
        machine: Boot and pid namespace: where `pid` means this process; empty where there is no telling.
        process_started: The kernel's start time of the process, against a pid that was given away anew.
        since: When the lease began, UTC.
        period_s: Between two heartbeats.
        beat: Counts heartbeats.
    """

    id: str
    what: str
    host: str
    pid: int
    machine: str
    process_started: str
    since: str
    period_s: float
    beat: int = 0

    @classmethod
    def here(cls, what: str, period_s: float) -> Owner:
        """This process."""
        return cls(
            id=uuid.uuid4().hex,
            what=what,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            process_started=_process_started(os.getpid()),
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            period_s=period_s,
        )

    @classmethod
    def parse(cls, content: bytes) -> Owner | None:
        """What a lock says, or None if it says nothing that can be understood."""
        try:
            document = json.loads(content)
            owner = cls(**{field.name: document[field.name] for field in fields(cls)})
            owner = replace(owner, pid=int(owner.pid), period_s=float(owner.period_s))
        except (ValueError, TypeError, KeyError):
            return None
        return owner if 0 < owner.pid < 1 << 31 and owner.period_s > 0 else None

    def encode(self) -> bytes:
        """The lock's content."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def has_died(self) -> bool:
        """Whether the owner ran on this machine and does no more; False where that cannot be known."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it exists, and is another user's
        return _process_started(self.pid) not in ("", self.process_started)

    def __str__(self) -> str:
        return f"{self.what}, on host {self.host}, pid {self.pid}, since {self.since}"


class Lease(Protocol):
    """What `hold` gives."""

    def check(self) -> None:
        """Make sure that the lease is still ours.

        Raises:
            ClusterError: Another owner took it over, or somebody removed the lock.
            DataError: The storage does not say.
        """


@contextmanager
def hold(
    storage: Storage, what: str, *, note: Note | None = None, period_s: float = _PERIOD_S, settle_s: float = _SETTLE_S
) -> Iterator[Lease]:
    """Keep every other run away from this folder, until the end of the block.

    On a local folder this is an flock, free at once when the process ends, killed or not. On NFS it reaches other hosts
    if the server locks (NFSv4, or v3 with lockd); mounted with `nolock` or `local_lock=flock` it keeps apart the runs
    of one host only. A file system without any locks is treated like an object store.

    On an object store an owner that died on this machine is replaced at once. One elsewhere is watched for three
    periods and replaced if its heartbeat stands still; its clock does not matter. Where the store knows no conditional
    writes, two that start at the same moment find out who was last after a short wait.

    Args:
        storage: The folder; a local one is made if need be.
        what: What it is held for, for the one who is refused.
        note: Is told of a wait and of an owner that is replaced.
        period_s: Between two heartbeats, on an object store.
        settle_s: Wait before reading back, where the store knows no conditional writes.

    Raises:
        ClusterError: Another run holds it; names host, pid and beginning.
        DataError: The storage refuses to write.
    """
    say = note or (lambda _: None)
    owner = Owner.here(what, period_s)
    if storage.is_local:
        file_lock = _FileLock.take(storage, owner)
        if file_lock is not None:
            try:
                yield file_lock
            finally:
                file_lock.release()
            return
    heartbeat = _Heartbeat(storage, owner, say, settle_s)
    heartbeat.take()
    try:
        yield heartbeat
    finally:
        heartbeat.release()


def _refusal(storage: Storage, content: bytes) -> ClusterError:
    owner = Owner.parse(content)
    end = f"end it (kill {owner.pid} on {owner.host})" if owner else "end it"
    return ClusterError(
        "another run is at work on this output",
        slug="output-in-use",
        where=str(storage),
        got=str(owner) if owner else None,
        hint=f"wait until it is done, or {end} and give the same command again; or choose another `output`",
    )


def _loss(storage: Storage, content: bytes | None) -> ClusterError:
    owner = Owner.parse(content) if content else None
    return ClusterError(
        "this run has lost its output to another one" if content else "somebody removed this run's lock",
        slug="output-lost" if content else "lock-removed",
        where=f"{storage}/{FILE_NAME}",
        got=str(owner) if owner else None,
        hint="a run that was frozen or cut off for half a minute is taken for dead; when the other one has ended, "
        "give the same command again: finished work is kept",
    )


# -- the kernel's lock -------------------------------------------------------------------------------------


class _FileLock:
    """An flock on a hidden file, which names the owner for whoever is refused."""

    def __init__(self, storage: Storage, path: Path, descriptor: int) -> None:
        self._storage, self._path, self._descriptor = storage, path, descriptor

    @classmethod
    def take(cls, storage: Storage, owner: Owner) -> _FileLock | None:
        """The lock, or None where the file system knows no locks."""
        path = storage.local_path / FILE_NAME

        def attempt() -> _FileLock | None:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                lock = cls(storage, path, os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
                try:
                    fcntl.flock(lock._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if lock._is_in_place():
                        os.ftruncate(lock._descriptor, 0)
                        os.pwrite(lock._descriptor, owner.encode(), 0)
                        return lock
                except BlockingIOError:
                    content = os.pread(lock._descriptor, 1 << 16, 0)
                    os.close(lock._descriptor)
                    raise _refusal(storage, content) from None
                except OSError as error:
                    if error.errno in _NO_LOCKS and os.fstat(lock._descriptor).st_size == 0:
                        path.unlink()  # made just now; a heartbeat's lock is never empty
                    os.close(lock._descriptor)
                    if error.errno in _NO_LOCKS:
                        return None
                    raise
                os.close(lock._descriptor)  # its last owner removed it between our opening and our locking

        return storage.attempt("locking", FILE_NAME, attempt)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """See `Lease`."""
        if not self._is_in_place():
            raise _loss(self._storage, self._storage.read_if_there(FILE_NAME))

    def release(self) -> None:
        """Remove the file while it is ours, then let go."""
        try:
            if self._is_in_place():
                self._path.unlink()
        finally:
            # Closing alone would leave it locked while a forked child holds the descriptor.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)


# -- an object with a heartbeat ----------------------------------------------------------------------------


class _Heartbeat:
    """A hidden object that its owner renews."""

    def __init__(self, storage: Storage, owner: Owner, note: Note, settle_s: float) -> None:
        self._storage, self._owner, self._note, self._settle_s = storage, owner, note, settle_s
        self._tag: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    # -- taking it

    def take(self) -> None:
        """Become the owner and start the heartbeat.

        Raises:
            ClusterError: Another run is at work.
        """
        for _ in range(_TRIES):
            if self._try():
                self._thread.start()
                return
        raise _refusal(self._storage, self._read() or b"")

    def _try(self) -> bool:
        """One attempt; False: things changed meanwhile, look again."""
        tag = self._storage.tag(FILE_NAME)
        found = self._read()
        if found is not None:
            self._wait_for_death(found)
        content = self._owner.encode()
        self._tag = self._storage.write_if(FILE_NAME, content, tag)
        # What was refused may be ours all the same, if the answer to the first attempt was lost.
        if self._tag is None and not self._is_ours(self._read()):
            return False
        # A store that heeds conditions refuses the same write a second time.
        again = self._storage.write_if(FILE_NAME, content, tag)
        if again is not None:
            self._tag = again
            time.sleep(self._settle_s)
        return again is None or self._is_ours(self._read())

    def _wait_for_death(self, found: bytes) -> None:
        """Return when the owner is dead or gone.

        Raises:
            ClusterError: It is alive.
        """
        owner = Owner.parse(found)
        if owner is not None and owner.machine and owner.machine == self._owner.machine:
            if not owner.has_died():
                raise _refusal(self._storage, found)
            self._note(f"taking over from a run that died here: {owner}")
            return
        period_s = max(self._owner.period_s, min(owner.period_s, _MAX_PERIOD_S) if owner else 0.0)
        about = owner or "a lock that cannot be read"
        self._note(f"waiting up to {_PATIENCE * period_s:.0f} s for a sign of life of another run: {about}")
        deadline = time.monotonic() + _PATIENCE * period_s
        while time.monotonic() < deadline:
            time.sleep(min(period_s / 4, 1.0))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise _refusal(self._storage, now)
        self._note(f"taking over from a run that gives no sign of life: {about}")

    # -- keeping it

    def _beat(self) -> None:
        while not self._ended.wait(self._owner.period_s):
            try:
                if not self._renew():
                    return
            except PuRayError as error:
                # The weather may last; whether the lease survived it shows at the next beat.
                self._note(f"the lock could not be renewed: {error.problem}")

    def _renew(self) -> bool:
        """One heartbeat; False if the lease is lost."""
        if not self._is_ours(self._read()):
            return False
        self._owner = replace(self._owner, beat=self._owner.beat + 1)
        self._tag = self._storage.write_if(FILE_NAME, self._owner.encode(), self._tag)
        if self._tag is None:
            # Refused: either because another owner came between, or because an answer was lost and the tag is an old
            # one. The next beat finds out.
            self._tag = self._storage.tag(FILE_NAME)
        return True

    def check(self) -> None:
        """See `Lease`."""
        found = self._read()
        if not self._is_ours(found):
            raise _loss(self._storage, found)

    def release(self) -> None:
        """Stop the heartbeat and remove the object, if it is ours."""
        self._ended.set()
        self._thread.join()
        try:
            if self._is_ours(self._read()):
                self._storage.delete(FILE_NAME)
        except PuRayError as error:
            # The work is done; the next run finds a lock without a heartbeat.
            self._note(f"the lock could not be removed: {error.problem}")

    def _read(self) -> bytes | None:
        return self._storage.read_if_there(FILE_NAME)

    def _is_ours(self, content: bytes | None) -> bool:
        owner = Owner.parse(content) if content else None
        return owner is not None and owner.id == self._owner.id


# -- this machine ------------------------------------------------------------------------------------------


def _machine() -> str:
    # Containers of one host share its boot id, and may share its name, but not its pids.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_started(pid: int) -> str:
    """When the process began, in clock ticks since boot; `ended` for a zombie, empty where the kernel does not say."""
    try:
        # The second field is the program's name, which may hold spaces and parentheses.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if state in "ZX" else rest[18]
