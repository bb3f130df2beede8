"""What the fit sees of the lake: a random sample of its usable, distinct images, as features or as pixels."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pu_ray import embedding, lake, ledger, schema
from pu_ray.config import JobConfig
from pu_ray.errors import DataError
from pu_ray.pu.training import rank
from pu_ray.storage import Storage

# Files are drawn at random until they hold this many times the sample, so that a large lake is not read whole.
_OVERSAMPLING = 4


def draw_unlabeled(features: Storage, count: int, seed: int, exclude: set[bytes], spied_share: float = 1.0) -> pa.Table:
    """A random sample of the lake's usable, distinct images, the same whatever order the lake was read in.

    Args:
        features: The artifact.
        count: Most rows.
        seed: Of the choice.
        exclude: Contents that are never drawn.
        spied_share: Behind a gate, only this share of the images has features whatever the gate says.

    Returns:
        Rows of `schema.features`, at most `count`, in random order.

    Raises:
        DataError: There is none.
    """
    index = ledger.read_index(features).to_pylist()
    index.sort(key=lambda entry: rank(entry["file"].encode(), seed))
    candidates: dict[bytes, tuple[bytes, str, int]] = {}
    rows = 0.0
    for entry in index:
        if rows >= _OVERSAMPLING * count:
            break
        table = features.read_table(entry["file"], [schema.SAMPLE_ID, schema.ERROR])
        rows += table.num_rows * spied_share
        samples = table[schema.SAMPLE_ID].to_pylist()
        usable = embedding.spied(samples, spied_share) & table[schema.ERROR].is_null().to_numpy()
        for position in np.flatnonzero(usable).tolist():
            sample = samples[position]
            if sample not in exclude and sample not in candidates:
                candidates[sample] = (rank(sample, seed), entry["file"], position)
    chosen = sorted(candidates.values())[:count]
    by_file: dict[str, list[tuple[bytes, int]]] = {}
    for place, file, position in chosen:
        by_file.setdefault(file, []).append((place, position))
    parts, ranks = [], []
    for file, places in by_file.items():
        parts.append(features.read_table(file).take(pa.array([position for _, position in places])))
        ranks += [place for place, _ in places]
    if not parts:
        raise DataError(
            "the lake holds no usable image",
            slug="no-usable-image",
            where=str(features),
            hint="look at the lake with `pu-ray lake inspect URI`",
        )
    return pa.concat_tables(parts).take(pa.array(sorted(range(len(ranks)), key=ranks.__getitem__)))


def lake_pixels(config: JobConfig, sample: pa.Table) -> npt.NDArray[np.uint8]:
    """Decoded images of a sample, uint8 [N, H, W, C], in its order; in a file that goes with the array.

    Args:
        config: The job.
        sample: Identity columns.

    Raises:
        DataError: The lake has changed since the sample was drawn.
    """
    shape = config.teacher.preprocessing.shape_hwc
    with tempfile.TemporaryFile() as file:
        pixels = np.memmap(file, np.uint8, "w+", shape=(max(sample.num_rows, 1), *shape))[: sample.num_rows]
    position = {sample_id: number for number, sample_id in enumerate(sample[schema.SAMPLE_ID].to_pylist())}
    shards = {shard.path: shard for shard in lake.list_shards(config.lake)}
    places: dict[str, list[int]] = {}
    for shard, row in zip(sample[schema.SHARD].to_pylist(), sample[schema.ROW].to_pylist(), strict=True):
        places.setdefault(shard, []).append(row)
    if gone := sorted(set(places) - set(shards)):
        raise _changed(config, gone)
    found = 0
    for chunk in lake.plan_chunks(config.lake, [shards[path] for path in places], config.lake.chunk_rows):
        decoded = embedding.decoder(config)(lake.read_chunk(config.lake.uri, chunk, places[chunk.shard.path]))
        numbers = [position.get(sample_id, -1) for sample_id in decoded[schema.SAMPLE_ID].to_pylist()]
        if -1 in numbers or embedding.broken_rows(decoded).any():
            raise _changed(config, [chunk.shard.path])
        if numbers:
            pixels[numbers] = lake.to_matrix(decoded[schema.PIXELS]).reshape(-1, *shape)
        found += len(numbers)
    if found != sample.num_rows:
        raise _changed(config, sorted(places))
    return pixels


def _changed(config: JobConfig, shards: Sequence[str]) -> DataError:
    return DataError(
        "the lake has changed since its features were computed",
        slug="lake-changed-since-features",
        where=config.lake.uri,
        got=", ".join(shards[:5]),
        hint="run the whole job again; unchanged shards are kept",
    )
