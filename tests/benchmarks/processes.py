"""Wall clock, CPU time and memory of a command with everything that it starts, daemons included.

Linux only. This process becomes the one that orphans fall to, so a daemon never leaves the tree: whatever descends from
here while a command runs belongs to the command. Nothing of it is left when `measure` returns.

CPU time is user + system of all processes, as last seen (every 0.2 s) or as the kernel adds up those that were waited
for, whichever is more. Memory is the proportional set size (PSS), summed every 0.5 s: a page that several processes
share counts once. Shared memory is the larger of what is mapped and what the open files below /dev/shm hold, so an
object store counts once, and in full also where nobody has it mapped at the moment.

Not measured: CPU time of processes younger than 0.2 s that nobody waited for, and the page cache. Library pages that
processes outside the tree have mapped too count only in part, so measure on a quiet machine.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_CPU_EVERY_S = 0.2
_MEMORY_EVERY_S = 0.5
_LINGER_S = 15.0  # what a command leaves behind may take this long to end by itself
_SHARED_MEMORY = "/dev/shm/"


@dataclass(frozen=True)
class Usage:
    """What a command cost.

    Attributes:
        wall_s: From start to exit of the command itself.
        cpu_s: User and system time of the whole tree.
        peak_bytes: Largest sum of PSS and shared memory.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int

    def __add__(self, other: Usage) -> Usage:
        """One command after another."""
        return Usage(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s, max(self.peak_bytes, other.peak_bytes))


class CommandError(Exception):
    """A command failed or took too long; the message ends with the last lines of its output."""


@dataclass(frozen=True)
class Process:
    """What the kernel says of a process.

    Attributes:
        parent: Its parent's id.
        started: When, in the kernel's ticks; with the id it names a process for good.
        cpu_s: Its own user and system time.
        zombie: It has ended, and nobody waited for it yet.
    """

    parent: int
    started: int
    cpu_s: float
    zombie: bool


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def measure(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str], folder: Path, timeout_s: float
) -> Usage:
    """Run a command to its end and say what it cost; `adopt_orphans` must have been called.

    Args:
        command: The command.
        log: Receives its stdout and stderr.
        environment: All its variables.
        folder: Its current directory.
        timeout_s: The whole tree is killed after this long.

    Raises:
        CommandError: It exited with another status than 0, or too late.
    """
    waited = _waited_s()
    seen: dict[tuple[int, int], float] = {}
    peak = 0
    ended: list[float] = []
    with log.open("wb") as output:
        started = time.monotonic()
        child = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )

    def wait() -> None:
        child.wait()
        ended.append(time.monotonic())

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    next_memory = started
    late = False
    try:
        while tree := descendants(reap_except=child.pid):
            seen.update({(pid, process.started): process.cpu_s for pid, process in tree.items()})
            now = time.monotonic()
            late = not ended and now > started + timeout_s
            if late or (ended and now > ended[0] + _LINGER_S):
                break
            if now >= next_memory and not ended:
                peak = max(peak, memory_bytes(pid for pid, process in tree.items() if not process.zombie))
                next_memory = now + _MEMORY_EVERY_S
            waiter.join(_CPU_EVERY_S) if not ended else time.sleep(_CPU_EVERY_S)
    finally:
        end_descendants()
    waiter.join()
    if late or child.returncode != 0:
        problem = f"took longer than {timeout_s:.0f} s" if late else f"exited with {child.returncode}"
        raise CommandError(f"{' '.join(command)} {problem}; {log} ends with\n{tail(log)}")
    return Usage(ended[0] - started, max(sum(seen.values()), _waited_s() - waited), peak)


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def end_descendants() -> None:
    """Kill what this process started, each by its id, and wait for it."""
    for _ in range(100):
        tree = descendants()
        living = [pid for pid, process in tree.items() if not process.zombie]
        if not living:
            return
        for pid in living:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    print(f"still there: {living}", file=sys.stderr)


def _waited_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def descendants(reap_except: int | None = None) -> dict[int, Process]:
    """Everything below this process; adopted zombies are reaped, except one that somebody else waits for."""
    everything: dict[int, Process] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError), open(f"/proc/{entry}/stat", "rb") as source:
                # The name, in parentheses, may hold anything.
                fields = source.read().rpartition(b")")[2].split()
                cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
                everything[int(entry)] = Process(int(fields[1]), int(fields[19]), cpu_s, fields[0] == b"Z")
    children: dict[int, list[int]] = {}
    for pid, process in everything.items():
        children.setdefault(process.parent, []).append(pid)
    found: dict[int, Process] = {}
    open_ends = [os.getpid()]
    while open_ends:
        for pid in children.get(open_ends.pop(), []):
            found[pid] = everything[pid]
            open_ends.append(pid)
    if reap_except is not None:
        for pid, process in found.items():
            if process.zombie and process.parent == os.getpid() and pid != reap_except:
                with suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
    return found


def memory_bytes(pids: Iterable[int]) -> int:
    """PSS of these processes, and shared memory once."""
    private = mapped = 0
    files: dict[tuple[int, int], int] = {}
    for pid in pids:
        with suppress(OSError), open(f"/proc/{pid}/smaps_rollup", "rb") as source:
            sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in source.read().splitlines()[1:]}
            shared = sizes.get(b"Pss_Shmem:", 0)
            private += sizes[b"Pss:"] - shared
            mapped += shared
        with suppress(OSError):
            for descriptor in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    if os.readlink(descriptor.path).startswith(_SHARED_MEMORY):
                        status = os.stat(descriptor.path)
                        files[status.st_dev, status.st_ino] = status.st_blocks * 512
    return private + max(mapped, sum(files.values()))
