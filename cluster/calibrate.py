"""What one core, or one GPU, of this machine makes of a sample of the lake: reading, decoding, the teacher.

The actor's own code runs, without Ray: its decoder, its engine, its batches. A core's work is counted in CPU time of
this process, so that neither a slow storage nor other programs count; a GPU's by the clock.

Not covered: a cascade's gate, training, and how much slower a core is when all of a machine are busy.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from cluster.estimate import Measured
from pu_ray.config import JobConfig
from pu_ray.errors import DataError
from pu_ray.progress import Progress
from pu_ray.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa

    from pu_ray.embedding import Embedder
    from pu_ray.lake import Shard

_CORE_IMAGES = 512
_GPU_IMAGES = 4096
_GPU_BATCHES = 8  # of one call: on a GPU the next batch is copied while one is computed
_MOST_DECODE_S = 20.0
_MOST_TEACHER_S = 20.0
_LEAST_S = 1e-6  # a clock's resolution


def measure(config: JobConfig, shards: Sequence[Shard], progress: Progress) -> Measured:
    """Decode a sample and let the teacher look at it; some 20 seconds each at most, and at least one batch.

    Args:
        config: The job.
        shards: The lake's.
        progress: Advanced by decoded images, then by those that the teacher has seen.

    Raises:
        ConfigError: Unknown network.
        DataError: The teacher cannot be loaded, the lake not be read, or the sample holds no usable image.
    """
    device = _device(config)
    wanted = _GPU_IMAGES if device == "gpu" else _CORE_IMAGES
    decoded = _Decoded(config)
    progress.start(wanted, "images decoded")
    decoded.take(shards, wanted, progress)
    seen, per_s = 0, None
    if device is not None:
        progress.start(decoded.images, "images seen by the teacher")
        seen, per_s = _teacher_rate(config, decoded.tables, progress)
    return Measured(
        images=decoded.images,
        broken=decoded.broken,
        encoded_bytes=decoded.encoded_bytes,
        read_mb_per_s=decoded.encoded_bytes / 1e6 / max(decoded.read_s, _LEAST_S),
        decode_images_per_s=decoded.images / max(decoded.core_s, _LEAST_S),
        decode_mb_per_s=decoded.encoded_bytes / 1e6 / max(decoded.core_s, _LEAST_S),
        device=device,
        teacher_images=seen,
        teacher_images_per_s=per_s,
    )


class _Decoded:
    """A sample of the lake, decoded, and what that took."""

    def __init__(self, config: JobConfig) -> None:
        self._config = config
        self.tables: list[pa.Table] = []
        self.images = self.broken = self.encoded_bytes = 0
        self.read_s = self.core_s = 0.0

    def take(self, shards: Sequence[Shard], wanted: int, progress: Progress) -> None:
        """Read and decode about so many images, drawn by the job's seed.

        Raises:
            DataError: None of them is usable.
        """
        from pu_ray import embedding, lake_pass, schema

        decode = embedding.decoder(self._config)
        began = time.monotonic()
        for unit in lake_pass.sample_units(self._config, shards, wanted):
            started, at_work = time.perf_counter(), time.process_time()
            encoded = unit.read()
            self.read_s += time.perf_counter() - started
            table = decode(encoded)
            self.core_s += time.process_time() - at_work
            broken = embedding.broken_rows(table)
            self.images += int((~broken).sum())
            self.broken += int(broken.sum())
            contents = encoded[schema.BYTES].to_pylist()
            self.encoded_bytes += sum(len(contents[row]) for row in np.flatnonzero(~broken))
            if not broken.all():
                self.tables.append(table)
            progress.advance(table.num_rows)
            if self.images >= wanted or (self.tables and time.monotonic() - began > _MOST_DECODE_S):
                break
        if not self.tables:
            raise DataError(
                "none of the sample's images can be decoded, so that nothing can be measured",
                slug="nothing-to-measure",
                where=self._config.lake.uri,
                got=f"{self.broken} unusable images",
                hint="look at them with `pu-ray lake inspect`, or plan without --calibrate",
            )


def _teacher_rate(config: JobConfig, tables: Sequence[pa.Table], progress: Progress) -> tuple[int, float]:
    """Images seen, and how many one core or one GPU sees in a second."""
    on_gpu = config.resources.embed.gpus > 0
    clock: Callable[[], float] = time.perf_counter if on_gpu else time.process_time
    seen, spent = 0, 0.0
    with tempfile.TemporaryDirectory() as folder, _one_core(config):
        actor, size = _open(config, Storage(folder))
        # The first pass of a batch's size is the one that allocates, and on a GPU compiles.
        actor(tables[0].slice(0, size))
        began = time.monotonic()
        for block in _blocks(tables, size):
            started = clock()
            actor(block)
            spent += clock() - started
            rows = _usable(block)
            seen += rows
            progress.advance(rows)
            if time.monotonic() - began > _MOST_TEACHER_S:
                break
    return seen, seen / max(spent, _LEAST_S)


def _open(config: JobConfig, folder: Storage) -> tuple[Embedder, int]:
    """The actor as the pass opens it, with one core where it has no GPU, and how many rows it gets at once."""
    from pu_ray import embedding

    embed = config.resources.embed
    if embed.gpus == 0:
        alone = embed.model_copy(update={"cpus": 1.0})
        config = config.model_copy(update={"resources": config.resources.model_copy(update={"embed": alone})})
    recipe = embedding.engine_recipe(config, folder, None, "calibrate")
    batch = embedding.batch_size(config)
    actor = embedding.Embedder(recipe, config.teacher.preprocessing, batch)
    return actor, batch * (_GPU_BATCHES if embed.gpus > 0 else 1)


def _blocks(tables: Sequence[pa.Table], rows: int) -> Iterator[pa.Table]:
    for table in tables:
        for start in range(0, table.num_rows, rows):
            yield table.slice(start, rows)


def _usable(block: pa.Table) -> int:
    from pu_ray import embedding

    return int((~embedding.broken_rows(block)).sum())


@contextmanager
def _one_core(config: JobConfig) -> Iterator[None]:
    """Torch on one thread where it runs on a core, as Ray has it in an actor; ONNX Runtime is told by the recipe."""
    from pu_ray import embedding

    if config.resources.embed.gpus > 0 or embedding.engine_kind(config) != "torch":
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(config: JobConfig) -> str | None:
    """What an actor of this job would run the teacher on; None where this machine has no such thing."""
    from pu_ray import embedding

    if config.resources.embed.gpus == 0:
        return "core"
    if embedding.engine_kind(config) != "torch":
        return None  # ONNX Runtime stays on the cores, and the plan reckons with the GPU that was asked for
    import torch

    return "gpu" if torch.cuda.is_available() else None
