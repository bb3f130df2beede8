"""Our server against others with the same network and pictures: `make bench NAME=serving`, after `make peers`.

Every server gets two workers with one thread each, listens on the loopback address, and is asked by wrk in a closed
loop of 1, 8 and 32 requests, a JPEG of 500 x 375 px each. Peers run eager torch, as their documentation does; ours runs
its engines, one of which is eager torch too. A round visits all contestants in an order by lot: start, wait until it
answers, check its answers to eight pictures, warm up, measure, stop. Figures are medians of the rounds, ratios medians
of the ratios within each round.

CPU time per request is that of all processes of the server between two looks, so wrk's is not in it. Memory is the
proportional set size (processes.py) right after the load; for servers on Ray also that of what serves alone, Ray's
workers and HAProxy, because a cluster has the rest anyway.

Rows are appended to tests/benchmarks/results/serving.jsonl, and those that are there are not measured again;
ARGS="--tell" prints the tables.

Not measured: servers under more than 32 requests, and on more than this machine. Let nothing else run: where the kernel
shares its time between sessions first (sched_autogroup_enabled), a process of nice 19 in another session takes half.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks import load, processes, serving_contestants, serving_material, serving_tables
from tests.benchmarks.load import LoadError
from tests.benchmarks.serving_contestants import ROOT, Contestant, Limit, Server
from tests.benchmarks.serving_material import Material
from tests.benchmarks.serving_tables import CONCURRENCIES

RESULTS = Path(__file__).with_name("results") / "serving.jsonl"
_READY_S = 180.0
_STOP_S = 30.0
_WARM_UP_S = 2
_MIB = 2**20
# Ray names the processes of its workers so; its daemons have names of their own.
_SERVES = ("ray::", "haproxy")


class ContestantError(Exception):
    """A server does not start, or answers wrong."""


# -- one server --------------------------------------------------------------------------------------------


@contextmanager
def running(server: Server, folder: Path, log: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The server on a free port; both are yielded, and at the end nothing of it is left."""
    port = serving_contestants.free_port()
    with log.open("wb") as output:
        child = subprocess.Popen(
            list(server.command(folder, port)),
            cwd=ROOT,
            env=server.variables(folder, port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield port, child
    finally:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            print(f"{server.name} does not stop by itself", file=sys.stderr)
            child.kill()
            child.wait()
        processes.end_descendants()


def wait_until_ready(server: Server, material: Material, port: int, child: subprocess.Popen[bytes], log: Path) -> float:
    """Seconds until it answered for the first time.

    Raises:
        ContestantError: It ended, or took too long.
    """
    began = time.monotonic()
    request, said = server.request(material.pictures[0]), "nothing"
    while time.monotonic() < began + _READY_S:
        try:
            status, body = load.ask(request, port=port)
        except (OSError, http.client.HTTPException) as error:
            said = f"{type(error).__name__}: {error}"
        else:
            if status == 200:
                return time.monotonic() - began
            said = f"{status} {body[:500]!r}"
        if child.poll() is not None:
            said += f", and exited with {child.returncode},"
            break
        time.sleep(0.2)
    waited = time.monotonic() - began
    raise ContestantError(f"{server.name} said {said} after {waited:.0f} s; {log} ends with\n{processes.tail(log)}")


def check(server: Server, material: Material, port: int) -> None:
    """Compare its answers with the right ones.

    Raises:
        ContestantError: One differs.
    """
    for picture, label in zip(material.pictures, material.labels, strict=True):
        status, body = load.ask(server.request(picture), port=port)
        got = server.label(body) if status == 200 else None
        if got != label:
            raise ContestantError(f"{server.name} must answer {label}, got {got} ({status} {body[:300]!r})")


def _kind(pid: int) -> str:
    """See `serving_tables.kind`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
    except OSError:
        words = []
    return serving_tables.kind(words)


def _cpu_s() -> dict[tuple[int, int], float]:
    """CPU time of everything that this process started, by id and start."""
    return {(pid, each.started): each.cpu_s for pid, each in processes.descendants().items()}


def _memory_mib() -> tuple[float, float | None]:
    """All of it; and of what serves, where that is told apart."""
    pids = [pid for pid, each in processes.descendants().items() if not each.zombie]
    serves = [pid for pid in pids if _kind(pid).startswith(_SERVES)]
    everything = processes.memory_bytes(pids) / _MIB
    return everything, processes.memory_bytes(serves) / _MIB if serves else None


def visit(server: Server, material: Material, seconds: int, work: Path) -> dict[str, Any]:
    """Start, check and measure one server.

    Raises:
        ContestantError, LoadError: It does not start, answers wrong, or refuses requests.
    """
    log, body_file = work / f"{server.name}.log", work / "body"
    request = server.request(material.pictures[0])
    measured: dict[str, Any] = {}
    with running(server, material.folder, log) as (port, child):
        ready_s = wait_until_ready(server, material, port, child, log)
        check(server, material, port)
        load.press(request, port=port, concurrency=CONCURRENCIES[-1], seconds=_WARM_UP_S, body_file=body_file)
        for concurrency in CONCURRENCIES:
            before = _cpu_s()
            found = load.press(request, port=port, concurrency=concurrency, seconds=seconds, body_file=body_file)
            spent: dict[str, float] = defaultdict(float)
            for (pid, started), cpu_s in _cpu_s().items():
                spent[_kind(pid)] += cpu_s - before.get((pid, started), 0.0)
            if not found.requests or found.failed > 0.01 * found.requests:
                raise ContestantError(
                    f"{server.name} failed {found.failed} of {found.requests} requests; {log} ends with\n"
                    f"{processes.tail(log)}"
                )
            measured[str(concurrency)] = {
                "per_s": found.per_s,
                "p50_ms": found.p50_ms,
                "p99_ms": found.p99_ms,
                "failed": found.failed,
                "cpu_ms": 1000 * sum(spent.values()) / found.requests,
                "cpu_ms_of": {kind: 1000 * cpu_s / found.requests for kind, cpu_s in spent.items()},
            }
        everything, serving = _memory_mib()
    return {"load": measured, "memory_mib": everything, "serving_mib": serving, "ready_s": ready_s}


def visit_limit(limit: Limit, material: Material, seconds: int, work: Path) -> dict[str, Any]:
    """Measure what plain processes do.

    Raises:
        ContestantError: They fail, or answer wrong.
    """
    picture = work / "picture.jpg"
    picture.write_bytes(material.pictures[0])
    measured: dict[str, Any] = {}
    memory = 0.0
    for concurrency in CONCURRENCIES:
        command = [sys.executable, "-m", "tests.benchmarks.peers.in_process", limit.engine, str(material.folder)]
        command += [str(picture), str(concurrency), str(seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT, check=False)
        if done.returncode != 0:
            raise ContestantError(f"{limit.name} exited with {done.returncode}")
        said = json.loads(done.stdout.splitlines()[-1])
        if said["labels"] != [material.labels[0]]:
            raise ContestantError(f"{limit.name} must answer {material.labels[0]}, got {said['labels']}")
        memory = said["memory_bytes"] / _MIB
        measured[str(concurrency)] = {name: said[name] for name in ("per_s", "p50_ms", "p99_ms", "cpu_ms")}
    return {"load": measured, "memory_mib": memory, "serving_mib": None, "ready_s": None}


# -- the rounds --------------------------------------------------------------------------------------------


def _versions(contestant: Contestant) -> dict[str, str]:
    """Of its packages, as its own environment has them.

    Raises:
        ContestantError: That environment is not there.
    """
    asked = "import json, sys; from importlib.metadata import version as v; "
    asked += "print(json.dumps({name: v(name) for name in sys.argv[1:]}))"
    command = [str(contestant.python), "-c", asked, *contestant.packages]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ContestantError(f"{contestant.name} is not installed ({error}); try `make peers`") from error
    return dict(json.loads(done.stdout))


def rows_of(results: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def measure(contestants: list[Contestant], rounds: int, seconds: int, results: Path, work: Path) -> list[str]:
    """Visit whoever lacks a row, round by round.

    Returns:
        What went wrong, one message per visit; such a visit leaves no row.
    """
    material = serving_material.prepare(work / "material")
    results.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    for position in range(rounds):
        order = list(contestants)
        random.Random(position).shuffle(order)
        for contestant in order:
            if any((row["contestant"], row["round"]) == (contestant.name, position) for row in rows_of(results)):
                continue
            began = time.monotonic()
            try:
                versions = _versions(contestant)
                if isinstance(contestant, Server):
                    found = visit(contestant, material, seconds, work)
                else:
                    assert isinstance(contestant, Limit)
                    found = visit_limit(contestant, material, seconds, work)
            except (ContestantError, LoadError) as error:
                problems.append(str(error))
                print(error, file=sys.stderr)
                continue
            row = {
                "contestant": contestant.name,
                "about": contestant.about,
                "engine": contestant.engine,
                "round": position,
                "seconds": seconds,
                "versions": {**versions, "python": platform.python_version()},
                **found,
            }
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            speeds = ", ".join(f"{found['load'][str(at)]['per_s']:.1f}" for at in CONCURRENCIES)
            taken = time.monotonic() - began
            print(f"round {position}, {contestant.name}: {speeds} requests/s ({taken:.0f} s)", file=sys.stderr)
    return problems


def main() -> int:
    """Measure, or tell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8, help="of each load")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/serving-benchmark"), help="network, logs, settings")
    parser.add_argument("--tell", action="store_true", help="print the tables and measure nothing")
    arguments = parser.parse_args()
    problems: list[str] = []
    if not arguments.tell:
        processes.adopt_orphans()
        work = arguments.work.absolute()
        work.mkdir(parents=True, exist_ok=True)
        everybody = serving_contestants.everybody(work)
        wanted = arguments.contestants or [each.name for each in everybody]
        if unknown := set(wanted) - {each.name for each in everybody}:
            parser.error(f"nobody is called {', '.join(sorted(unknown))}; {', '.join(e.name for e in everybody)} are")
        chosen = [each for each in everybody if each.name in wanted]
        problems = measure(chosen, arguments.rounds, arguments.seconds, arguments.results, work)
    for line in serving_tables.tell(rows_of(arguments.results)):
        print(line)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
