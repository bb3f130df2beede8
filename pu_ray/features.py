"""Stage `features`: one pass of the frozen teacher over the lake (paper, section 3.1: multi-scale features).

Every image is read and decoded once. What the later stages need is kept: each stage's pooled output as float16 and
the teacher's logits. Pixels are never written. Writes `features/`: data/*.parquet, ledger/, index.parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pu_ray import config as settings_of
from pu_ray import engine, images, lake, lake_pass, ledger, schema
from pu_ray.config import JobConfig, PreprocessingConfig, TeacherConfig
from pu_ray.engine import Engine
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.storage import Storage

FOLDER = "features"
_ENGINE_FILE = "_engine/teacher.onnx"  # hidden from listings: a means, not a result
_FLOAT16_MAX = float(np.finfo(np.float16).max)


# -- opening the network on a worker -----------------------------------------------------------------------


def engine_kind(config: JobConfig) -> str:
    """`torch` where actors have a GPU, else `onnx`, unless the job says otherwise."""
    if config.features.engine != "auto":
        return config.features.engine
    return "torch" if config.resources.embed.gpus > 0 else "onnx"


def _open_onnx(storage: Storage, file: str, threads: int) -> Engine:
    return engine.OnnxEngine(storage.read_bytes(file), threads)


def _open_torch(teacher: TeacherConfig, device: str) -> Engine:
    from pu_ray import models

    module, _ = models.load_teacher(teacher)
    return engine.TorchEngine(models.Normalised(module, teacher.preprocessing), device)


def _prepare_engine(config: JobConfig, target: Storage) -> Callable[[], Engine]:
    """A picklable recipe for the actors; an ONNX graph is written once, so that they need not import torch."""
    if engine_kind(config) == "torch":
        return partial(_open_torch, config.teacher, "cuda" if config.resources.embed.gpus > 0 else "cpu")
    from pu_ray import models

    teacher, _ = models.load_teacher(config.teacher)
    graph = engine.to_onnx(
        models.Normalised(teacher, config.teacher.preprocessing).eval(),
        models.example_pixels(config.teacher.preprocessing),
        input_name="pixels",
        output_names=["features", "logits"],
    )
    target.write_bytes(_ENGINE_FILE, graph)
    return partial(_open_onnx, target, _ENGINE_FILE, max(1, int(config.resources.embed.cpus)))


# -- the actor ---------------------------------------------------------------------------------------------


class Embedder:
    """Loads the teacher once, then turns decoded rows into feature rows.

    Args:
        open_engine: Opens the network that maps uint8 [N, H, W, C] to features [N, D] and logits [N, K].
        preprocessing: Shape of the pixels.
        batch_size: Images of one forward pass.
    """

    def __init__(self, open_engine: Callable[[], Engine], preprocessing: PreprocessingConfig, batch_size: int) -> None:
        self._engine = open_engine()
        self._shape = preprocessing.shape_hwc
        self._batch_size = batch_size
        # A block without a single usable image still needs the widths.
        probe = self._engine.run(np.zeros((1, *self._shape), np.uint8))
        self._widths = [output.shape[1] for output in probe]

    def __call__(self, block: pa.Table) -> pa.Table:
        """Rows of `schema.decoded` to rows of `schema.features`; error rows pass through."""
        broken = np.array([error is not None for error in block[schema.ERROR].to_pylist()], bool)
        outputs = [np.zeros((len(broken), width), np.float32) for width in self._widths]
        miniatures = np.zeros((len(broken), schema.THUMBNAIL_PX), np.uint8)
        if not broken.all():
            pixels = lake.to_matrix(block[schema.PIXELS]).reshape(-1, *self._shape)[~broken]
            for output, values in zip(outputs, engine.in_batches(self._engine, pixels, self._batch_size), strict=True):
                output[~broken] = values
            miniatures[~broken] = images.thumbnails(pixels)
        features = np.clip(outputs[0], -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)
        identity = [block[name].combine_chunks() for name in schema.IDENTITY_COLUMNS]
        lists = [lake.fixed_list(values, broken) for values in (features, outputs[1], miniatures)]
        columns = [*identity, *lists, block[schema.ERROR]]
        return pa.table(columns, schema=schema.features(*self._widths))


# -- the stage ---------------------------------------------------------------------------------------------


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Embed every shard that is not finished, and publish.

    Raises:
        DataError: The lake or the teacher cannot be used, or too many images are broken.
        ClusterError: Rows were lost on the way.
    """
    publication = Publication("features", identity, inputs, config.seed)
    target = storage.child(FOLDER)
    shards = lake.list_shards(config.lake)
    records = ledger.Ledger(target, _row_settings(config, inputs))
    finished = records.finished(shards)
    todo = [shard for shard in shards if shard.path not in finished]
    if finished and todo:
        progress.note(f"  {len(finished)} of {len(shards)} shards are finished already")
    entries = finished
    if todo:
        preprocessing = config.teacher.preprocessing
        prepare = partial(lake.decode_table, preprocessing=preprocessing, limits=images.Limits.of(config.lake))
        entries = lake_pass.run(
            lake_pass.lake_units(config.lake, todo, preprocessing),
            storage=target,
            ledger=records,
            finished=finished,
            prepare=prepare,
            actor=Embedder,
            actor_arguments={
                "open_engine": _prepare_engine(config, target),
                "preprocessing": preprocessing,
                "batch_size": config.features.batch_size,
            },
            resources=config.resources,
            progress=progress,
        )
    errors = ledger.write_index(target, entries)
    rows = sum(entry.rows for entry in entries.values())
    ledger.check_error_share(errors, rows, config.lake.max_error_share, config.lake.uri)
    return publication.publish(
        target,
        counts={
            "rows": rows,
            "errors": sum(errors.values()),
            "shards": len(shards),
            "shards_done_now": len(todo),
            "rows_done_now": sum(entries[shard.path].rows for shard in todo if shard.path in entries),
        },
        facts={"errors": dict(errors), "engine": engine_kind(config)},
    )


def _row_settings(config: JobConfig, inputs: Mapping[str, str]) -> str:
    """Digest of what determines a row: the lake's listing is left out, so that a new shard redoes no other."""
    parts: dict[str, Any] = {
        "teacher": config.section("teacher"),
        "teacher_content": inputs["teacher"],
        "limits": [config.lake.max_image_bytes, config.lake.max_image_px],
        "engine": engine_kind(config),
        "batch_size": config.features.batch_size,
    }
    return settings_of.digest(parts)
