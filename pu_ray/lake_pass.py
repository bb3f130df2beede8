"""A pass over rows in shards, as a Ray Data pipeline that can be killed at any moment.

read and `prepare` -> transform (actor pool, loads once) and write -> receipts. Before GPU actors reading and decoding
are tasks on other cores, and while a block is written the next is worked on, so that the GPU waits for neither. A CPU
actor does all of it for its own blocks: nothing but receipts travels, and what it made is safe before it begins the
next.

A receipt says which rows of which shard lie in which file. The driver adds receipts up and commits a shard to
the ledger when all its rows are accounted for; it never sees a pixel or a feature. Blocks may be cut or joined
by Ray as it likes: files are named by the first row they hold, so a retried task writes the same file again.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayTaskError

from pu_ray import lake, ray_watch, schema
from pu_ray.config import JobConfig, ResourcesConfig
from pu_ray.errors import ClusterError, PuRayError
from pu_ray.lake import Shard
from pu_ray.ledger import DATA_FOLDER, Ledger, ShardEntry
from pu_ray.progress import Progress
from pu_ray.storage import Storage, take_weather
from pu_ray.usage import Workers, larger, take_gpu_peak_bytes, take_peak_bytes

Transform = Callable[[pa.Table], pa.Table]

# Waiting hours for spot capacity is not a failure (Ray's default gives up after half an hour without progress).
_NO_PROGRESS_TIMEOUT_S = 6 * 3600
# For each call that an actor works on at once: one at work, the others near it. Ray Data adds an actor where there are
# at least 1.75.
_TASKS_IN_FLIGHT = 4
_CALLS = 2
_CHUNK_BYTES = 64 * 2**20  # of decoded pixels: well below Ray's target block size, so a chunk is one block
_LEAST_CHUNK_BYTES = 64 * 2**10  # encoded; smaller units would cost more than the images in them
_UNITS_PER_ACTOR = 8
_SAMPLED_SHARDS = 16  # opened at a time
_SAMPLE_CHUNK_ROWS = 512  # a sample is drawn in units: small ones mix better

_RECEIPT = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("file", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("errors", pa.map_(pa.string(), pa.int64())),
        pa.field("retries", pa.map_(pa.string(), pa.int64())),
        pa.field("peak_bytes", pa.int64()),
        pa.field("gpu_peak_bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Unit:
    """Rows that one read task brings.

    Attributes:
        shard: The shard they belong to.
        first_row: Position of the first one in the shard.
        rows: How many there are.
        read: Brings them as a table with `schema.IDENTITY_COLUMNS` and `schema.ERROR`; runs on a worker.
        size_bytes: Estimate, for Ray's memory accounting.
    """

    shard: Shard
    first_row: int
    rows: int
    read: Callable[[], pa.Table]
    size_bytes: int


@dataclass(frozen=True)
class Passed:
    """What a pass brought.

    Attributes:
        entries: All shards, finished before or now, by path.
        weather: Storage operations that had to be repeated, by reason: those of the driver and of every process that
            wrote.
        workers: Who did it, the peaks being those of the processes that wrote; None: there was nothing to do.
    """

    entries: dict[str, ShardEntry]
    weather: dict[str, int]
    workers: Workers | None = None

    @property
    def rows(self) -> int:
        """All rows, error rows included."""
        return sum(entry.rows for entry in self.entries.values())

    def rows_of(self, shards: Iterable[Shard]) -> int:
        """Rows of these shards."""
        return sum(self.entries[shard.path].rows for shard in shards if shard.path in self.entries)


class _UnitSource(Datasource):
    """Hands units to Ray Data, one read task each."""

    def __init__(self, units: Sequence[Unit], prepare: Transform | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._units = units
        self._prepare = prepare

    def get_name(self) -> str:
        return "Lake"

    def estimate_inmemory_data_size(self) -> int:
        return sum(unit.size_bytes for unit in self._units)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                _Read(unit.read, self._prepare),
                BlockMetadata(num_rows=unit.rows, size_bytes=unit.size_bytes, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for unit in self._units
        ]


@dataclass(frozen=True)
class _Read:
    read: Callable[[], pa.Table]
    prepare: Transform | None

    def __call__(self) -> Iterable[pa.Table]:
        # Not a stage of its own: Ray would hand the rows over once more.
        table = self.read()
        return [table if self.prepare is None else self.prepare(table)]


class _Writer:
    """Writes a block's rows, one file per shard, and returns receipts."""

    def __init__(self, storage: Storage, keys: Mapping[str, str], row_group_rows: int) -> None:
        self._storage = storage
        self._keys = keys
        self._row_group_rows = row_group_rows

    def __call__(self, block: pa.Table) -> pa.Table:
        receipts = []
        for shard in pc.unique(block[schema.SHARD]).to_pylist():
            rows = block.filter(pc.equal(block[schema.SHARD], shard)).sort_by(schema.ROW)
            file = f"{DATA_FOLDER}/{self._keys[shard]}-{rows[schema.ROW][0].as_py():09d}.parquet"
            size = self._storage.write_table(file, rows, self._row_group_rows)
            errors: Counter[str] = Counter()
            if schema.ERROR in rows.column_names:
                errors.update(code for code in rows[schema.ERROR].to_pylist() if code is not None)
            # Also the retries of whatever this process did before it wrote. No actor that keeps count: the one on a
            # node that dies would take the run with it.
            retries = list(take_weather().items())
            peaks = take_peak_bytes(), take_gpu_peak_bytes()
            receipts.append((shard, file, size, rows.num_rows, list(errors.items()), retries, *peaks))
        return pa.table([list(column) for column in zip(*receipts, strict=True)], schema=_RECEIPT)


def run(
    units: Sequence[Unit],
    *,
    storage: Storage,
    ledger: Ledger,
    finished: Mapping[str, ShardEntry],
    prepare: Transform | None,
    actor: Callable[..., Transform] | None,
    actor_arguments: Mapping[str, Any],
    resources: ResourcesConfig,
    progress: Progress,
    row_group_rows: int = 1024,
) -> Passed:
    """Bring every unfinished unit through the pipeline.

    Args:
        units: The unfinished work; all units of a shard are here or none.
        storage: The artifact's folder.
        ledger: Where finished shards are committed.
        finished: Entries of shards that need no work.
        prepare: Runs in the read task, for example decoding.
        actor: Its instances are callables from table to table, one row out for each row in; None: rows pass.
        actor_arguments: Keyword arguments of its constructor.
        resources: Pool sizes, CPUs and memory.
        progress: Advanced by rows.
        row_group_rows: Of the written Parquet files.

    Raises:
        DataError: Raised by a reader or an actor.
        ClusterError: Rows were lost or doubled, which must never be published.
    """
    entries = dict(finished)
    take_weather()  # of earlier stages
    shards = {unit.shard.path: unit.shard for unit in units}
    expected: Counter[str] = Counter()
    for unit in units:
        expected[unit.shard.path] += unit.rows
    progress.start(sum(expected.values()), "images")
    if not units:
        return Passed(entries, {})
    source = _UnitSource(units, prepare)
    keys = {path: shard.key for path, shard in shards.items()}
    writer = _Writer(storage, keys, row_group_rows)
    open_entries = {path: ShardEntry(path, shard.fingerprint) for path, shard in shards.items()}
    sizes: dict[str, int] = {}
    weather: Counter[str] = Counter()
    peak: int | None = None
    gpu_peak: int | None = None
    with ray_watch.watching(progress, of_actors=actor is not None) as watch:
        dataset = _pipeline(source, len(units), actor, actor_arguments, writer, resources, storage.is_local)
        for receipt in _receipts(dataset):
            entry = open_entries[receipt["shard"]]
            entry.files[receipt["file"]] = receipt["rows"]
            sizes[receipt["file"]] = receipt["bytes"]
            weather.update(dict(receipt["retries"]))
            peak, gpu_peak = larger(peak, receipt["peak_bytes"]), larger(gpu_peak, receipt["gpu_peak_bytes"])
            for code, count in receipt["errors"]:
                entry.errors[code] = entry.errors.get(code, 0) + count
            progress.broken(sum(count for _, count in receipt["errors"]))
            progress.advance(receipt["rows"])
            if entry.rows == expected[entry.shard]:
                ledger.commit(shards[entry.shard], entry, sizes)
                entries[entry.shard] = entry
        workers = watch.seen(peak, gpu_peak)
    unbalanced = [entry for path, entry in open_entries.items() if entry.rows != expected[path]]
    if unbalanced:
        raise ClusterError(
            "rows were lost or doubled on the way",
            slug="rows-lost",
            where=unbalanced[0].shard,
            allowed=f"{expected[unbalanced[0].shard]} rows",
            got=f"{unbalanced[0].rows} rows ({len(unbalanced)} shards differ)",
            hint="run the same command again: finished shards are kept, these are redone",
        )
    weather.update(take_weather())
    return Passed(entries, dict(+weather), workers)


def _pipeline(
    source: _UnitSource,
    units: int,
    actor: Callable[..., Transform] | None,
    actor_arguments: Mapping[str, Any],
    writer: _Writer,
    resources: ResourcesConfig,
    local: bool,
) -> ray.data.Dataset:
    context = DataContext.get_current()
    limits = resources.limits
    context.execution_options.resource_limits = ExecutionResources(cpu=limits.cpus, gpu=limits.gpus)
    context.execution_no_progress_timeout_s = _NO_PROGRESS_TIMEOUT_S
    embed, decode = resources.embed, resources.decode
    on_gpus = embed.gpus > 0
    # Ray lets an actor read its own blocks where both ask for the same resources.
    reader = decode if actor is None or on_gpus else embed
    dataset: ray.data.Dataset = ray.data.read_datasource(
        source, override_num_blocks=units, num_cpus=reader.cpus, memory=reader.memory_gib * 2**30
    )
    whole_block: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    if actor is None:
        write = resources.write
        written: ray.data.Dataset = dataset.map_batches(
            writer.__call__, num_cpus=write.cpus, memory=write.memory_gib * 2**30, **whole_block
        )
        return written
    # While one block is written, the actor works on another: a GPU always, a CPU where the storage is remote.
    calls = _CALLS if on_gpus or not local else 1
    # Not `map_batches`: that refuses whole blocks for GPUs, lest they be too large. These are cut to size, the actor
    # takes them in batches of its own, and a batch of two blocks would tear an artifact's file apart.
    made: ray.data.Dataset = dataset.map_batches_internal(
        _WritingActor,
        fn_constructor_kwargs={
            "open_actor": partial(actor, **actor_arguments),
            "writer": writer,
            "one_at_a_time": on_gpus,
        },
        compute=ActorPoolStrategy(
            min_size=min(embed.min_actors, units),
            max_size=resources.most_actors,
            max_tasks_in_flight_per_actor=calls * _TASKS_IN_FLIGHT,
            max_concurrent_calls_per_actor=calls,
        ),
        num_cpus=embed.cpus,
        num_gpus=embed.gpus or None,
        memory=embed.memory_gib * 2**30,
        **whole_block,
    )
    return made


class _WritingActor:
    """An actor that writes what it made, and returns the receipts.

    Args:
        open_actor: Makes what transforms a block.
        writer: Writes it.
        one_at_a_time: Transform one block after the other, though several calls are under way: a GPU's memory holds
            the activations of one batch.
    """

    def __init__(self, open_actor: Callable[[], Transform], writer: _Writer, one_at_a_time: bool) -> None:
        take_peak_bytes()  # of what this process did for others
        self._transform = open_actor()
        self._writer = writer
        self._turn: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if one_at_a_time else contextlib.nullcontext()
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        with self._turn:
            made = self._transform(block)
        return self._writer(made)


def _receipts(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            yield from batch.to_pylist()
    except RayTaskError as error:
        # What the user must act on is what the worker raised, not the wrapping.
        cause: BaseException | None = error
        while cause is not None:
            inner = getattr(cause, "cause", None) or cause.__cause__
            if isinstance(cause, PuRayError):
                raise cause from None
            cause = inner if inner is not cause else None
        raise


def lake_units(
    config: JobConfig, lake_shards: Sequence[Shard], todo: Sequence[Shard], chunk_rows: int | None = None
) -> list[Unit]:
    """Units that read encoded images, sized for the pool and for memory.

    Decoded they stay below `_CHUNK_BYTES`. A lake that is small for the pool is cut finer, so that every actor has
    several; the cut depends on the whole lake and never on what is left to do, so that a resumed pass makes the very
    rows an undisturbed one would have made.

    Args:
        config: The job.
        lake_shards: All shards of the lake.
        todo: Those to read.
        chunk_rows: Most rows of a unit; None: `lake.chunk_rows`.
    """
    preprocessing = config.teacher.preprocessing
    pixels_per_image = preprocessing.size_px**2 * preprocessing.channels
    rows = max(1, min(chunk_rows or config.lake.chunk_rows, _CHUNK_BYTES // pixels_per_image))
    lake_bytes = sum(shard.size_bytes for shard in lake_shards)
    share = math.ceil(lake_bytes / (_UNITS_PER_ACTOR * config.resources.embed.max_actors))
    chunks = lake.plan_chunks(config.lake, todo, rows, chunk_bytes=max(share, _LEAST_CHUNK_BYTES))
    # Where the actors decode, blocks hold encoded bytes; the estimate stays on the safe side.
    return [
        Unit(
            chunk.shard,
            chunk.first_row,
            chunk.rows,
            partial(lake.read_chunk, config.lake.uri, chunk),
            chunk.rows * pixels_per_image,
        )
        for chunk in chunks
    ]


def sample_units(config: JobConfig, shards: Sequence[Shard], rows: int) -> list[Unit]:
    """Units drawn at random, by seed, that hold about `rows` rows; few shards of a large lake are opened for it."""

    def rank(*place: object) -> bytes:
        text = "/".join(map(str, place)).encode()
        return hashlib.blake2b(text, digest_size=8, key=config.seed.to_bytes(8, "big")).digest()

    drawn: list[Unit] = []
    ordered = sorted(shards, key=lambda shard: rank(shard.path))
    for start in range(0, len(ordered), _SAMPLED_SHARDS):
        # From twice the rows, so that no shard need be taken whole.
        if sum(unit.rows for unit in drawn) >= 2 * rows:
            break
        drawn += lake_units(config, shards, ordered[start : start + _SAMPLED_SHARDS], _SAMPLE_CHUNK_ROWS)
    drawn.sort(key=lambda unit: rank(unit.shard.path, unit.first_row))
    taken, held = [], 0
    for unit in drawn:
        if held >= rows:
            break
        taken.append(unit)
        held += unit.rows
    return taken
