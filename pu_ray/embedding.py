"""The frozen teacher on a worker: how it travels there, what it makes of a block, and what determines a row.

Shared by the pass that keeps features and by the one that scores images directly. Where there is no GPU an actor
decodes as well: encoded bytes travel through the object store, decoded pixels never do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pu_ray import config as settings_of
from pu_ray import engine, images, lake, schema
from pu_ray.config import JobConfig, PreprocessingConfig, TeacherConfig
from pu_ray.engine import Engine
from pu_ray.errors import DataError
from pu_ray.manifest import Manifest
from pu_ray.storage import Storage

Decode = Callable[[pa.Table], pa.Table]

GATE_FILE = "gate.onnx"
_ENGINE_FILE = "_engine/{key}-{name}.onnx"  # hidden from listings: a means, not a result
_GRAPH_FORMAT = 3  # raised when the graphs' outputs change
_GPU_BATCH = 256
_CPU_BATCH_BYTES = 5 * 2**19  # of uint8 pixels: 16 images of 224 x 224
_LEAST_CPU_BATCH, _MOST_CPU_BATCH = 8, 128
_FLOAT16_MAX = float(np.finfo(np.float16).max)


# -- opening the network on a worker -----------------------------------------------------------------------


def engine_kind(config: JobConfig) -> str:
    """`torch` where actors have a GPU, else `onnx`, unless the job says otherwise."""
    if config.features.engine != "auto":
        return config.features.engine
    return "torch" if config.resources.embed.gpus > 0 else "onnx"


def batch_size(config: JobConfig) -> int:
    """Images of one forward pass.

    On a CPU small images gain nothing beyond 128, and large ones lose a third of their speed where the activations of a
    batch outgrow the caches (docs/LOG.md).
    """
    if config.features.batch_size != "auto":
        return config.features.batch_size
    if config.resources.embed.gpus > 0:
        return _GPU_BATCH
    fitting = _CPU_BATCH_BYTES // int(np.prod(config.teacher.preprocessing.shape_hwc))
    return max(_LEAST_CPU_BATCH, min(_MOST_CPU_BATCH, 1 << (max(fitting, 1).bit_length() - 1)))


@dataclass(frozen=True)
class Gate:
    """The cascade's gate as it was published.

    Attributes:
        storage: Its artifact.
        stages: How many early stages it sees.
        threshold: Least logit that passes.
        spied_share: Share of the lake that is embedded whatever the gate says, see `spied`.
    """

    storage: Storage
    stages: int
    threshold: float
    spied_share: float

    @classmethod
    def of(cls, storage: Storage, published: Manifest) -> Gate:
        """From the artifact's manifest."""
        facts = published.facts
        return cls(storage, int(facts["stages"]), float(facts["threshold"]), float(facts["spied_share"]))


def _open_onnx(storage: Storage, file: str, threads: int) -> Engine:
    return engine.OnnxEngine(storage.read_bytes(file), threads)


def _open_onnx_cascade(storage: Storage, files: Sequence[str], gate: Gate, from_pixels: bool, threads: int) -> Engine:
    early, late = (_open_onnx(storage, file, threads) for file in files)
    return engine.Cascade(early, _open_onnx(gate.storage, GATE_FILE, threads), late, gate.threshold, from_pixels)


def _open_torch(teacher: TeacherConfig, gate: Gate | None, device: str, compiled: bool) -> Engine:
    from pu_ray import models

    module, _ = models.load_teacher(teacher)
    if gate is None:
        return engine.TorchEngine(models.Normalised(module, teacher.preprocessing), device, compiled)
    early = models.Normalised(models.EarlyStages(module, gate.stages), teacher.preprocessing)
    late = models.Normalised(models.LateStages(module, gate.stages), teacher.preprocessing)
    return engine.Cascade(
        engine.TorchEngine(early, device, compiled),
        _open_onnx(gate.storage, GATE_FILE, 1),
        engine.TorchEngine(late, device, compiled),
        gate.threshold,
        from_pixels=True,
    )


def engine_recipe(config: JobConfig, target: Storage, gate: Gate | None, teacher_content: str) -> Callable[[], Engine]:
    """A picklable recipe for the actors; ONNX graphs are written once, so that they need not import torch.

    Args:
        config: The job.
        target: The features' folder, where the graphs are kept: the stage that comes later finds them there, and need
            not import torch either.
        gate: The cascade's, if there is one.
        teacher_content: Digest of weights and class list.

    Returns:
        Opens the network that maps uint8 [N, H, W, C] to features [N, D] and logits [N, K], and with a gate margins.
    """
    if engine_kind(config) == "torch":
        device = "cuda" if config.resources.embed.gpus > 0 else "cpu"
        return partial(_open_torch, config.teacher, gate, device, config.features.compile)
    threads = max(1, int(config.resources.embed.cpus))
    stages = gate.stages if gate is not None else 0
    key = settings_of.digest([config.section("teacher"), teacher_content, stages, _GRAPH_FORMAT])[:16]
    if gate is None:
        file = _ENGINE_FILE.format(key=key, name="teacher")
        if target.kind(file) != "file":
            target.write_bytes(file, _whole_graph(config))
        return partial(_open_onnx, target, file, threads)
    files = [_ENGINE_FILE.format(key=key, name=name) for name in ("early", "late")]
    note = _ENGINE_FILE.format(key=key, name="cut").replace(".onnx", ".json")
    if target.kind(note) != "file":
        early, late, from_pixels = _cut_graphs(config, gate.stages)
        for file, graph in zip(files, (early, late), strict=True):
            target.write_bytes(file, graph)
        target.write_json(note, {"from_pixels": from_pixels})
    from_pixels = bool(target.read_json(note)["from_pixels"])
    return partial(_open_onnx_cascade, target, files, gate, from_pixels, threads)


def _whole_graph(config: JobConfig) -> bytes:
    from pu_ray import models

    teacher, _ = models.load_teacher(config.teacher)
    module = models.Normalised(teacher, config.teacher.preprocessing).eval()
    example = models.example_pixels(config.teacher.preprocessing)
    return engine.to_onnx(module, example, input_name="pixels", output_names=["features", "logits"])


def _cut_graphs(config: JobConfig, stages: int) -> tuple[bytes, bytes, bool]:
    """The graphs before and after the gate, and whether the latter starts from the pixels."""
    from pu_ray import models

    teacher, _ = models.load_teacher(config.teacher)
    staged = models.Normalised(models.StagedTeacher(teacher, stages), config.teacher.preprocessing).eval()
    example = models.example_pixels(config.teacher.preprocessing)
    names = ["early", "gate", "activation", "late", "logits"]
    graph = engine.to_onnx(staged, example, input_name="pixels", output_names=names)
    late = engine.cut_onnx(graph, ["activation"], ["late", "logits"])
    from_pixels = late is None
    early = engine.cut_onnx(graph, ["pixels"], ["early", "gate"] if from_pixels else ["early", "gate", "activation"])
    late = late or engine.cut_onnx(graph, ["pixels"], ["late", "logits"])
    assert early is not None
    assert late is not None
    return early, late, from_pixels


def decoder(config: JobConfig) -> Decode:
    """Encoded rows to decoded ones, as this job wants them; picklable."""
    return partial(
        lake.decode_table,
        preprocessing=config.teacher.preprocessing,
        limits=images.Limits.of(config.lake),
        scaled=config.lake.scaled_decode,
    )


def decode_where(config: JobConfig) -> tuple[Decode | None, Decode | None]:
    """The decoder for read tasks and the one for actors; one of them is None.

    A GPU must not wait for a decoder, so tasks on other cores decode for it. A CPU actor is itself such a core:
    decoding there spares the object store the pixels, which are many times the encoded bytes.
    """
    decode = decoder(config)
    return (decode, None) if config.resources.embed.gpus > 0 else (None, decode)


def check_scaled_decode(config: JobConfig, network: Engine, sample: pa.Table) -> dict[str, Any]:
    """Whether decoding at a smaller scale leaves the teacher's answers as they are.

    Args:
        config: The job.
        network: See `engine_recipe`; without a gate.
        sample: Rows of `schema.encoded`.

    Returns:
        Images compared, mean and largest difference of a pixel (0..255), and the share of equal answers.

    Raises:
        DataError: Too many answers change.
    """
    preprocessing, limits = config.teacher.preprocessing, images.Limits.of(config.lake)
    contents = [content for content in sample[schema.BYTES].to_pylist() if content is not None]
    difference = images.scaled_difference(contents, preprocessing, limits)
    found: dict[str, Any] = {
        "images": difference.images,
        "decoded_smaller": difference.scaled,
        "mean_pixel_difference": round(difference.mean, 3),
        "largest_pixel_difference": difference.largest,
        "agreement": None,
    }
    if difference.images == 0:
        return found
    answers = []
    for scaled in (False, True):
        decoded = lake.decode_table(sample, preprocessing, limits, scaled)
        pixels = usable_pixels(decoded, broken_rows(decoded), preprocessing.shape_hwc)
        answers.append(engine.in_batches(network, pixels, batch_size(config))[1].argmax(axis=1))
    found["agreement"] = float((answers[0] == answers[1]).mean())
    if found["agreement"] < config.lake.min_scaled_agreement:
        raise DataError(
            "decoding at a smaller scale changes too many of the teacher's answers",
            slug="scaled-decode-changes-answers",
            where="lake.scaled_decode",
            allowed=f"the same answer for a share of {config.lake.min_scaled_agreement:g} (lake.min_scaled_agreement)",
            got=f"{found['agreement']:.3f} of {difference.images} images",
            hint="set lake.scaled_decode to false",
        )
    return found


# -- what determines a row ---------------------------------------------------------------------------------


def row_settings(config: JobConfig, inputs: Mapping[str, str]) -> str:
    """Digest of what determines a feature row: the lake's listing is left out, so that a new shard redoes no other."""
    parts: dict[str, Any] = {
        "teacher": config.section("teacher"),
        "teacher_content": inputs["teacher"],
        "limits": [config.lake.max_image_bytes, config.lake.max_image_px],
        "scaled_decode": config.lake.scaled_decode,
        "engine": engine_kind(config),
        "batch_size": batch_size(config),
        "gate": inputs.get("cascade"),
    }
    return settings_of.digest(parts)


def spied(samples: Sequence[bytes | None], share: float) -> npt.NDArray[np.bool_]:
    """Which images are in a random sample of the lake, by their content alone; bool [N].

    The fit must see the lake as it is, not only what a gate lets pass: its negatives would be the few near ones, and
    the share of positives another one. So a share of all images goes through the whole network.
    """
    bound = int(share * 2**32)
    # The id is a cryptographic hash, so its first bytes are uniform.
    return np.array([sample is not None and int.from_bytes(sample[:4], "big") < bound for sample in samples], bool)


# -- the feature cache -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureCache:
    """Feature rows shared by runs, by what was embedded and with what.

    A file holds the rows of one block. Its name is a digest of the block's image digests and of all that determines
    a row, so that a renamed shard, a copied lake or another run finds it, and nothing stale is ever found.

    Attributes:
        storage: The folder that runs share.
        settings: See `row_settings`.
    """

    storage: Storage
    settings: str

    def find(self, block: pa.Table) -> pa.Table | None:
        """The feature rows of these images, or None; they carry the block's own identity columns."""
        path = self._path(block)
        if path is None or self.storage.kind(path) != "file":
            return None
        found = self.storage.read_table(path)
        return pa.table(
            {name: block[name] if name in schema.IDENTITY_COLUMNS else found[name] for name in found.column_names},
            schema=found.schema,
        )

    def keep(self, rows: pa.Table) -> None:
        """Store the feature rows of a block for others."""
        path = self._path(rows)
        if path is not None:
            self.storage.write_table(path, rows)

    def _path(self, block: pa.Table) -> str | None:
        samples = block[schema.SAMPLE_ID].to_pylist()
        # An image that could not even be read may be readable the next time.
        if not samples or None in samples:
            return None
        key = hashlib.blake2b(b"".join(samples), digest_size=16).hexdigest()
        return f"{self.settings[:32]}/{key[:2]}/{key}.parquet"


def feature_cache(config: JobConfig, inputs: Mapping[str, str]) -> FeatureCache | None:
    """The cache that this job shares with others, if it does."""
    if config.features.cache_uri is None:
        return None
    return FeatureCache(Storage(config.features.cache_uri), row_settings(config, inputs))


def find_or_decode(block: pa.Table, cache: FeatureCache | None, decode: Decode | None) -> pa.Table:
    """What a read task does to its rows: cached features if there are any, else pixels or, for a CPU actor, nothing."""
    if cache is not None and (found := cache.find(block)) is not None:
        return found
    return decode(block) if decode is not None else block


# -- the actor ---------------------------------------------------------------------------------------------


def broken_rows(block: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows are error rows, bool [N]."""
    broken: npt.NDArray[np.bool_] = block[schema.ERROR].is_valid().to_numpy(zero_copy_only=False)
    return broken


class Embedder:
    """Loads the teacher once, then turns encoded or decoded rows into feature rows.

    Args:
        open_engine: See `engine_recipe`.
        preprocessing: Shape of the pixels.
        batch_size: Images of one forward pass.
        decode: For encoded rows; None where they come decoded.
        cache: Where others look for what this actor makes.
        spied_share: Behind a gate: share of the images that get features whatever it says.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        preprocessing: PreprocessingConfig,
        batch_size: int,
        decode: Decode | None = None,
        cache: FeatureCache | None = None,
        spied_share: float = 0.0,
    ) -> None:
        self._engine = open_engine()
        self._shape = preprocessing.shape_hwc
        self._batch_size = batch_size
        self._decode = decode
        self._cache = cache
        self._spied_share = spied_share
        # A block without a single usable image still needs the widths.
        probe = self._engine.run(np.zeros((1, *self._shape), np.uint8))
        self._widths = [output.shape[1] for output in probe[:2]]

    def __call__(self, block: pa.Table) -> pa.Table:
        """Rows of `schema.encoded` or `schema.decoded` to rows of `schema.features`; error rows pass through."""
        if schema.FEATURES in block.column_names:
            return block  # found in the cache by the read task
        if self._decode is not None:
            block = self._decode(block)
        rows = self._embed(block)
        if self._cache is not None:
            self._cache.keep(rows)
        return rows

    def _embed(self, block: pa.Table) -> pa.Table:
        broken = broken_rows(block)
        outputs = [np.zeros((len(broken), width), np.float32) for width in self._widths]
        miniatures = np.zeros((len(broken), schema.THUMBNAIL_PX), np.uint8)
        margins: Any = None
        absent = broken
        if not broken.all():
            pixels = usable_pixels(block, broken, self._shape)
            values = engine.in_batches(self._engine, pixels, self._batch_size)
            for output, part in zip(outputs, values[:2], strict=True):
                output[~broken] = part
            miniatures[~broken] = images.thumbnails(pixels)
            if len(values) > 2:
                margins = np.zeros(len(broken), np.float32)
                margins[~broken] = values[2]
                absent = broken | (margins < 0)
                if (chosen := absent & ~broken & spied(block[schema.SAMPLE_ID].to_pylist(), self._spied_share)).any():
                    self._embed_whole(pixels[chosen[~broken]], chosen, outputs)
                    absent = absent & ~chosen
        features = np.clip(outputs[0], -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)
        identity = [block[name].combine_chunks() for name in schema.IDENTITY_COLUMNS]
        lists = [lake.fixed_list(features, absent), lake.fixed_list(outputs[1], absent)]
        lists.append(lake.fixed_list(miniatures, broken))
        gate = pa.nulls(len(broken), pa.float32()) if margins is None else pa.array(margins, mask=broken)
        return pa.table([*identity, *lists, gate, block[schema.ERROR]], schema=schema.features(*self._widths))

    def _embed_whole(self, pixels: Any, chosen: Any, outputs: list[Any]) -> None:
        assert isinstance(self._engine, engine.Cascade)
        for start in range(0, len(pixels), self._batch_size):
            rows = np.flatnonzero(chosen)[start : start + self._batch_size]
            whole = self._engine.run_whole(pixels[start : start + self._batch_size])
            for output, part in zip(outputs, whole, strict=True):
                output[rows] = part


def usable_pixels(block: pa.Table, broken: Any, shape_hwc: tuple[int, int, int]) -> Any:
    """Pixels of the rows that are not broken, uint8 [M, H, W, C]; without a copy where all are usable."""
    pixels = lake.to_matrix(block[schema.PIXELS]).reshape(-1, *shape_hwc)
    return pixels[~broken] if broken.any() else pixels
