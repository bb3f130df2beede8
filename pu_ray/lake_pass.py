"""A pass over rows in shards, as a Ray Data pipeline that can be killed at any moment.

read (CPU tasks, fused with `prepare`) -> transform (actor pool, loads once) -> write (CPU tasks) -> receipts.
A receipt says which rows of which shard lie in which file. The driver adds receipts up and commits a shard to
the ledger when all its rows are accounted for; it never sees a pixel or a feature. Blocks may be cut or joined
by Ray as it likes: files are named by the first row they hold, so a retried task writes the same file again.
"""

from __future__ import annotations

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

from pu_ray import lake, schema
from pu_ray.config import LakeConfig, PreprocessingConfig, ResourcesConfig
from pu_ray.errors import ClusterError, PuRayError
from pu_ray.lake import Shard
from pu_ray.ledger import DATA_FOLDER, Ledger, ShardEntry
from pu_ray.progress import Progress
from pu_ray.storage import Storage

Transform = Callable[[pa.Table], pa.Table]

# Waiting hours for spot capacity is not a failure (Ray's default gives up after half an hour without progress).
_NO_PROGRESS_TIMEOUT_S = 6 * 3600
_WRITE_CPUS = 0.25
_CHUNK_BYTES = 64 * 2**20  # of decoded pixels: well below Ray's target block size, so a chunk is one block

_RECEIPT = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("file", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("errors", pa.map_(pa.string(), pa.int64())),
    ]
)


@dataclass(frozen=True)
class Unit:
    """Rows that one read task brings.

    Attributes:
        shard: The shard they belong to.
        rows: How many there are.
        read: Brings them as a table with `schema.IDENTITY_COLUMNS` and `schema.ERROR`; runs on a worker.
        size_bytes: Estimate, for Ray's memory accounting.
    """

    shard: Shard
    rows: int
    read: Callable[[], pa.Table]
    size_bytes: int


class _UnitSource(Datasource):
    """Hands units to Ray Data, one read task each."""

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._units = units

    def get_name(self) -> str:
        return "Lake"

    def estimate_inmemory_data_size(self) -> int:
        return sum(unit.size_bytes for unit in self._units)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                _Read(unit.read),
                BlockMetadata(num_rows=unit.rows, size_bytes=unit.size_bytes, exec_stats=None),
                per_task_row_limit=per_task_row_limit,
            )
            for unit in self._units
        ]


@dataclass(frozen=True)
class _Read:
    read: Callable[[], pa.Table]

    def __call__(self) -> Iterable[pa.Table]:
        return [self.read()]


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
            receipts.append((shard, file, size, rows.num_rows, list(errors.items())))
        return pa.table([list(column) for column in zip(*receipts, strict=True)], schema=_RECEIPT)


def run(
    units: Sequence[Unit],
    *,
    storage: Storage,
    ledger: Ledger,
    finished: Mapping[str, ShardEntry],
    prepare: Transform | None,
    actor: type[Any] | None,
    actor_arguments: Mapping[str, Any],
    resources: ResourcesConfig,
    progress: Progress,
    row_group_rows: int = 1024,
) -> dict[str, ShardEntry]:
    """Bring every unfinished unit through the pipeline.

    Args:
        units: The unfinished work; all units of a shard are here or none.
        storage: The artifact's folder.
        ledger: Where finished shards are committed.
        finished: Entries of shards that need no work.
        prepare: Runs in the read task, for example decoding.
        actor: Its instances are callables from table to table, one row out for each row in; None: rows pass.
        actor_arguments: Keyword arguments of its constructor.
        resources: Pool sizes and CPUs.
        progress: Advanced by rows.
        row_group_rows: Of the written Parquet files.

    Returns:
        Entries of all shards, finished before or now.

    Raises:
        DataError: Raised by a reader or an actor.
        ClusterError: Rows were lost or doubled, which must never be published.
    """
    entries = dict(finished)
    shards = {unit.shard.path: unit.shard for unit in units}
    expected: Counter[str] = Counter()
    for unit in units:
        expected[unit.shard.path] += unit.rows
    progress.start(sum(expected.values()), "images")
    if not units:
        return entries
    dataset = _pipeline(units, storage, shards, prepare, actor, actor_arguments, resources, row_group_rows)
    open_entries = {path: ShardEntry(path, shard.fingerprint) for path, shard in shards.items()}
    sizes: dict[str, int] = {}
    for receipt in _receipts(dataset):
        entry = open_entries[receipt["shard"]]
        entry.files[receipt["file"]] = receipt["rows"]
        sizes[receipt["file"]] = receipt["bytes"]
        for code, count in receipt["errors"]:
            entry.errors[code] = entry.errors.get(code, 0) + count
        progress.advance(receipt["rows"])
        if entry.rows == expected[entry.shard]:
            ledger.commit(shards[entry.shard], entry, sizes)
            entries[entry.shard] = entry
    unbalanced = [entry for path, entry in open_entries.items() if entry.rows != expected[path]]
    if unbalanced:
        raise ClusterError(
            "rows were lost or doubled on the way",
            where=unbalanced[0].shard,
            allowed=f"{expected[unbalanced[0].shard]} rows",
            got=f"{unbalanced[0].rows} rows ({len(unbalanced)} shards differ)",
            hint="run the same command again: finished shards are kept, these are redone",
        )
    return entries


def _pipeline(
    units: Sequence[Unit],
    storage: Storage,
    shards: Mapping[str, Shard],
    prepare: Transform | None,
    actor: type[Any] | None,
    actor_arguments: Mapping[str, Any],
    resources: ResourcesConfig,
    row_group_rows: int,
) -> ray.data.Dataset:
    context = DataContext.get_current()
    context.execution_options.resource_limits = ExecutionResources()
    context.execution_no_progress_timeout_s = _NO_PROGRESS_TIMEOUT_S
    embed = resources.embed
    dataset = ray.data.read_datasource(
        _UnitSource(units), override_num_blocks=len(units), num_cpus=resources.decode.cpus
    )
    whole_block: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    if prepare is not None:
        dataset = dataset.map_batches(prepare, num_cpus=resources.decode.cpus, **whole_block)
    if actor is not None:
        dataset = dataset.map_batches(
            actor,
            fn_constructor_kwargs=dict(actor_arguments),
            compute=ActorPoolStrategy(
                min_size=min(embed.min_actors, len(units)), max_size=embed.max_actors, max_tasks_in_flight_per_actor=4
            ),
            num_cpus=embed.cpus,
            num_gpus=embed.gpus or None,
            memory=embed.memory_gib * 2**30,
            **whole_block,
        )
    keys = {path: shard.key for path, shard in shards.items()}
    write = _Writer(storage, keys, row_group_rows).__call__
    written: ray.data.Dataset = dataset.map_batches(write, num_cpus=_WRITE_CPUS, **whole_block)
    return written


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


def lake_units(lake_config: LakeConfig, shards: Sequence[Shard], preprocessing: PreprocessingConfig) -> list[Unit]:
    """Units that read encoded images; small enough that decoded they stay below `_CHUNK_BYTES`."""
    pixels_per_image = preprocessing.size_px**2 * preprocessing.channels
    chunk_rows = max(1, min(lake_config.chunk_rows, _CHUNK_BYTES // pixels_per_image))
    return [
        Unit(chunk.shard, chunk.rows, partial(lake.read_chunk, lake_config.uri, chunk), chunk.rows * pixels_per_image)
        for chunk in lake.plan_chunks(lake_config, shards, chunk_rows)
    ]
