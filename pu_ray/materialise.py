"""Stage `materialise`: copy the chosen images' bytes out of the lake, the only pixels that are ever written.

Reads only the shards that hold a chosen image, and checks that each still has the content it was chosen for. Writes
`mined/`: data/*.parquet as `schema.mined`, ledger/, index.parquet. `order` says in which order to stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pyarrow as pa

from pu_ray import config as settings_of
from pu_ray import lake, lake_pass, ledger, manifest, schema
from pu_ray.config import JobConfig
from pu_ray.errors import DataError
from pu_ray.lake import Chunk
from pu_ray.lake_pass import Unit
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage

FOLDER = "mined"
_ROW_GROUP_ROWS = 256


def read_chosen(lake_uri: str, chunk: Chunk, chosen: pa.Table) -> pa.Table:
    """Rows of `schema.mined` for the chosen rows of one chunk.

    Args:
        lake_uri: The lake's root.
        chunk: Where the rows lie.
        chosen: Rows of `schema.selection`, sorted by row.

    Raises:
        DataError: An image is not what was scored.
    """
    encoded = lake.read_chunk(lake_uri, chunk, chosen[schema.ROW].to_numpy())
    if encoded[schema.SAMPLE_ID].to_pylist() != chosen[schema.SAMPLE_ID].to_pylist():
        raise DataError(
            "the lake has changed since it was scored",
            slug="lake-changed-since-scores",
            where=f"{lake_uri}/{chunk.shard.path}",
            hint="run the whole job again; unchanged shards are kept",
        )
    return chosen.append_column(schema.BYTES, encoded[schema.BYTES]).cast(schema.mined())


def _units(config: JobConfig, chosen: pa.Table, shards: Mapping[str, lake.Shard]) -> list[Unit]:
    by_place = chosen.sort_by([(schema.SHARD, "ascending"), (schema.ROW, "ascending")])
    paths, rows = by_place[schema.SHARD].to_numpy(zero_copy_only=False), by_place[schema.ROW].to_numpy()
    bounds = {path: (np.searchsorted(paths, path, "left"), np.searchsorted(paths, path, "right")) for path in shards}
    units = []
    for chunk in lake.plan_chunks(config.lake, list(shards.values()), config.lake.chunk_rows):
        start, stop = bounds[chunk.shard.path]
        first, last = start + np.searchsorted(rows[start:stop], [chunk.first_row, chunk.first_row + chunk.rows])
        if first < last:
            part = by_place.slice(first, last - first)
            read = partial(read_chosen, config.lake.uri, chunk, part)
            mean_bytes = chunk.shard.size_bytes // max(chunk.rows, 1)
            row = int(rows[first])
            units.append(Unit(chunk.shard, row, part.num_rows, read, int(part.num_rows * mean_bytes)))
    return units


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Copy the chosen images and publish.

    Raises:
        DataError: The lake has changed or cannot be read.
        ClusterError: Rows were lost on the way.
    """
    publication = Publication("materialise", identity, inputs, config.seed)
    target = storage.child(FOLDER)
    manifest.require(storage.child("selection"), "select")
    chosen = storage.child("selection").read_table("selection.parquet")
    wanted = set(chosen[schema.SHARD].to_pylist())
    shards = {shard.path: shard for shard in lake.list_shards(config.lake) if shard.path in wanted}
    if gone := sorted(wanted - set(shards)):
        raise DataError(
            "shards of the lake have gone since it was scored",
            slug="shards-gone",
            where=config.lake.uri,
            got=", ".join(gone[:5]),
            hint="run the whole job again; unchanged shards are kept",
        )
    records = ledger.Ledger(target, settings_of.digest({"selection": inputs["select"]}))
    finished = records.finished(shards.values())
    todo = {path: shard for path, shard in shards.items() if path not in finished}
    passed = lake_pass.run(
        _units(config, chosen, todo),
        storage=target,
        ledger=records,
        finished=finished,
        prepare=None,
        actor=None,
        actor_arguments={},
        resources=config.resources,
        progress=progress,
        row_group_rows=_ROW_GROUP_ROWS,
    )
    ledger.write_index(target, passed.entries)
    return publication.publish(
        target,
        counts={"rows": chosen.num_rows, "shards": len(shards)},
        facts={"storage_retries": passed.weather},
        workers=passed.workers,
    )
