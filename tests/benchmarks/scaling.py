"""How a lake pass scales with its workers: `make bench NAME=scaling`.

The scorer sleeps instead of computing, so that two cores can hold sixteen workers: what is left to see is what the
pass itself costs, its scheduling, reading, writing and receipts, which a real scorer pays beside its own work. It is
the product's own pass (pu_ray/lake_pass.py) over a Parquet lake, once with actors that read and write themselves, as on
CPUs, and once with actors on logical GPUs around which tasks read and write.

A figure is the throughput in the steady part of one pass, from the receipt by which every worker had twice its share
of a chunk to the one after which some worker may be idle. Efficiency is throughput over (workers x that of a worker
that only sleeps), speed-up is throughput over that of the pass with one worker. The passes of one turn are
interleaved; the table shows medians over the turns.

With `--sleep-ms 0.1 --chunks 100` the pass is what limits, and the CPU time that a chunk takes of the driver, the one
process that no further node takes work from, tells how many chunks per second a job can have at most.

Not measured: starting nodes and workers, the network between nodes, a storage that limits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pu_ray.progress import Silent

ROOT = Path(__file__).parents[2]
WORKERS = (1, 2, 4, 8, 16)
KINDS = ("cpu", "gpu")
CHUNK_ROWS = 256
CHUNKS_PER_WORKER = 10
IMAGE_BYTES = 4096
SLEEP_MS = 5.0


class SleepingScorer:
    """One score per image, after as long as a network would have taken.

    Args:
        seconds_per_image: How long to sleep.
    """

    def __init__(self, seconds_per_image: float) -> None:
        self._seconds_per_image = seconds_per_image

    def __call__(self, table: pa.Table) -> pa.Table:
        """Identity, error and score of each row."""
        time.sleep(self._seconds_per_image * table.num_rows)
        scores = pa.array([0.0] * table.num_rows, pa.float32())
        return table.drop_columns(["bytes"]).append_column("score", scores)


class Clocked(Silent):
    """Remembers when how many images had come back."""

    def __init__(self) -> None:
        self.receipts: list[tuple[float, int]] = []

    def advance(self, count: int) -> None:
        self.receipts.append((time.perf_counter(), count))


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        kind: `cpu` or `gpu`.
        workers: How many slept at once.
        images_per_s: In its steady part.
        efficiency: Of `workers` that only sleep.
        driver_ms_per_chunk: CPU time of the one process that no further node takes work from.
    """

    kind: str
    workers: int
    images_per_s: float
    efficiency: float
    driver_ms_per_chunk: float


def steady_rate(receipts: list[tuple[float, int]], workers: int) -> float:
    """Images per second between the receipt 2 x `workers` and the one `workers` before the last.

    Args:
        receipts: When, and of how many images.
        workers: That work at once.
    """
    window = receipts[2 * workers - 1 : len(receipts) - workers]
    return sum(count for _, count in window[1:]) / (window[-1][0] - window[0][0])


def lake(folder: Path, chunks: int) -> None:
    """A Parquet lake of so many row groups; its images are noise that nobody decodes."""
    folder.mkdir()
    per_file = 16
    for first in range(0, chunks, per_file):
        groups = min(per_file, chunks - first)
        images = [os.urandom(IMAGE_BYTES) for _ in range(groups * CHUNK_ROWS)]
        table = pa.table({"bytes": pa.array(images, pa.large_binary())})
        pq.write_table(table, folder / f"{first:06d}.parquet", row_group_size=CHUNK_ROWS, compression="none")


def job(folder: Path, kind: str, workers: int) -> Any:
    """A job with a pool of exactly so many workers."""
    from pu_ray import config

    pool: dict[str, Any] = {"min_actors": workers, "max_actors": workers, "memory_gib": 0.01}
    gpus = {"cpus": 0, "gpus": 1} if kind == "gpu" else {"cpus": 1, "gpus": 0}
    settings = {
        "name": "scaling",
        "output": str(folder / f"{kind}-{workers}"),
        "teacher": {"architecture": "cifar/resnet8-w16", "weights": "-", "classes": "-"},
        "labeled": {"uri": "-"},
        "test": {"uri": "-"},
        "lake": {"uri": str(folder / f"lake-{workers}"), "chunk_rows": CHUNK_ROWS},
        "student": {"architecture": "cifar/resnet8-w16"},
        "resources": {
            "embed": pool | gpus,
            "decode": {"memory_gib": 0.01},
            "write": {"memory_gib": 0.01},
        },
    }
    return config.resolve([("benchmark", settings)]).job


def measure(folder: Path, kind: str, workers: int, seconds_per_image: float) -> Pass:
    """One pass; Ray must be connected."""
    from pu_ray import lake as lakes
    from pu_ray import lake_pass
    from pu_ray.ledger import Ledger
    from pu_ray.storage import Storage

    settings = job(folder, kind, workers)
    shards = lakes.list_shards(settings.lake)
    chunks = lakes.plan_chunks(settings.lake, shards, CHUNK_ROWS)
    units = [
        lake_pass.Unit(each.shard, each.first_row, each.rows, _Reader(settings.lake.uri, each), each.rows * IMAGE_BYTES)
        for each in chunks
    ]
    with tempfile.TemporaryDirectory(dir=folder) as target:
        storage = Storage(target)
        clock, before = Clocked(), time.process_time()
        lake_pass.run(
            units,
            storage=storage,
            ledger=Ledger(storage, "benchmark"),
            finished={},
            prepare=None,
            actor=SleepingScorer,
            actor_arguments={"seconds_per_image": seconds_per_image},
            resources=settings.resources,
            progress=clock,
        )
    rate = steady_rate(clock.receipts, workers)
    return Pass(
        kind,
        workers,
        images_per_s=rate,
        efficiency=rate * seconds_per_image / workers,
        driver_ms_per_chunk=(time.process_time() - before) / len(units) * 1e3,
    )


class _Reader:
    def __init__(self, uri: str, chunk: Any) -> None:
        self._uri, self._chunk = uri, chunk

    def __call__(self) -> pa.Table:
        from pu_ray import lake as lakes

        return lakes.read_chunk(self._uri, self._chunk)


def table(passes: list[Pass]) -> str:
    """Markdown."""
    lines = [
        "| actors | workers | images/s | speed-up | efficiency | driver, CPU ms/chunk |",
        "|---|---|---|---|---|---|",
    ]
    for kind, name in (("cpu", "read and write themselves"), ("gpu", "on logical GPUs")):
        alone = _median(passes, kind, 1, "images_per_s")
        for workers in sorted({each.workers for each in passes if each.kind == kind}):
            rate = _median(passes, kind, workers, "images_per_s")
            speed_up = f"{rate / alone:.2f}" if alone else ""
            reached = [each.efficiency for each in passes if (each.kind, each.workers) == (kind, workers)]
            driver = _median(passes, kind, workers, "driver_ms_per_chunk")
            lines.append(
                f"| {name} | {workers} | {rate:,.0f} | {speed_up} | {statistics.median(reached):.2f} "
                f"({min(reached):.2f} to {max(reached):.2f}) | {driver:.1f} |"
            )
    return "\n".join(lines)


def _median(passes: list[Pass], kind: str, workers: int, figure: str) -> float:
    found = [getattr(each, figure) for each in passes if (each.kind, each.workers) == (kind, workers)]
    return float(statistics.median(found)) if found else 0.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--chunks", type=int, default=CHUNKS_PER_WORKER, help="per worker")
    parser.add_argument("--sleep-ms", type=float, default=SLEEP_MS, help="per image")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["PYTHONPATH"] = str(ROOT)
    import ray
    import ray.data

    from cluster.session import errors_only

    ray.data.DataContext.get_current().enable_progress_bars = False
    passes: list[Pass] = []
    with errors_only(), tempfile.TemporaryDirectory() as temporary:
        most = max(arguments.workers)
        ray.init(address="local", num_cpus=2 * most + 4, num_gpus=most, include_dashboard=False, log_to_driver=False)
        folder = Path(temporary)
        for workers in arguments.workers:
            lake(folder / f"lake-{workers}", arguments.chunks * workers)
        for turn in range(arguments.turns):
            for workers in arguments.workers:
                for kind in arguments.kinds:
                    passes.append(measure(folder, kind, workers, arguments.sleep_ms / 1e3))
                    print(turn, json.dumps(asdict(passes[-1])), file=sys.stderr, flush=True)
        ray.shutdown()
    print(table(passes))


if __name__ == "__main__":
    main()
