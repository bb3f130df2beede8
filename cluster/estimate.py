"""Arithmetic of a plan: what each stage has to do, how long a pool takes for it, on which nodes, at what price.

Times are operations, counted, over the rates of `prices.yaml` or over what was measured (calibrate.py). They tell hours
from days, not minutes from minutes. Work is spread evenly over a pool, and a training is as much faster as it has
workers: what they lose by waiting for each other is not reckoned.

Not covered: head nodes, storage and transfer; what a cascade or cached features of another run spare; stages that take
under a minute on any machine (a head on frozen features, selection, export).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.prices import NodePrice, Prices, Table
from pu_ray.config import JobConfig, NetworkConfig, PreprocessingConfig

# Of a node's memory Ray keeps this share for the object store unless told otherwise; the rest is what it hands out.
OBJECT_STORE_FRAC = 0.3

_TEACHER_CLASSES = 1000  # only the last layer depends on it: far below the error of any estimate
_TRAIN_PASSES = 3  # forward, and about twice that backward
_SAMPLE_RESERVE = 1.25  # as the stage `features` takes where it keeps no cache
_SAMPLE_CHUNK_ROWS = 512
_SOFT_LABEL_CHUNK_ROWS = 1024
_LEAST_WORKER_BATCH = 2


class LakeSize(Table):
    """What is in the lake.

    Attributes:
        shards: Units of the ledger.
        size_bytes: Encoded.
        rows: Images.
        chunks: Units of work, as the job's own pool has them cut.
        most_chunks: Units of work at the finest cut, which a larger pool would get; `chunks` where nobody asked.
        chunk_rows: Most images of a chunk that was seen.
        exact: Whether `rows` and `chunks` were counted, or projected from `sampled_shards`.
        sampled_shards: How many shards were opened.
    """

    shards: int
    size_bytes: int
    rows: int
    chunks: int
    most_chunks: int
    chunk_rows: int
    exact: bool
    sampled_shards: int


class Measured(Table):
    """What calibrate.py found on one machine.

    Attributes:
        images: Usable images of the sample.
        broken: Images of it that could not be decoded.
        encoded_bytes: Of the usable ones.
        read_mb_per_s: Encoded, as they came from the storage, waiting included.
        decode_images_per_s: One core, reading's own work included and waiting left out.
        decode_mb_per_s: The same, in encoded bytes.
        device: What ran the teacher: `core`, `gpu`; None where it was not measured.
        teacher_images: Images that it saw.
        teacher_images_per_s: One core or one GPU; None where it was not measured.
    """

    images: int
    broken: int
    encoded_bytes: int
    read_mb_per_s: float
    decode_images_per_s: float
    decode_mb_per_s: float
    device: str | None
    teacher_images: int
    teacher_images_per_s: float | None


class StagePlan(Table):
    """One stage's share of time and money.

    Attributes:
        stage: Name.
        images: How many go through, repetitions included.
        pool: Actors or workers at once.
        unit: `actors` or `workers`.
        decoders: Decoding tasks at once beside GPU actors.
        seconds: Wall-clock time with the nodes below.
        cpu_nodes: Nodes of the kind `cpu`.
        gpu_nodes: Nodes of the kind `gpu`.
        gpu_hours: GPUs that the pool holds, times its time.
        cpu_hours: Cores that pool and decoders hold, times their time.
        cost: Of the nodes, in the table's currency.
    """

    stage: str
    images: int
    pool: int
    unit: str
    decoders: int
    seconds: float
    cpu_nodes: int
    gpu_nodes: int
    gpu_hours: float
    cpu_hours: float
    cost: float


# -- networks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkSize:
    """What one forward pass takes.

    Attributes:
        gflop: Operations per image in 1e9, two per multiply-add.
        parameter_bytes: All parameters and buffers, as float32.
        activation_bytes: The largest output of a layer per image, as float32.
    """

    gflop: float
    parameter_bytes: int
    activation_bytes: int


def network_size(network: NetworkConfig, preprocessing: PreprocessingConfig) -> NetworkSize:
    """Count a network's operations and bytes without computing anything.

    Raises:
        ConfigError: Unknown network.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pu_ray import models

    side, channels = preprocessing.size_px, preprocessing.channels
    with torch.device("meta"):
        module = models.build(network, _TEACHER_CLASSES, channels).eval()
        image = torch.empty(1, channels, side, side)
    largest = image.numel()

    def look(_module: torch.nn.Module, _inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    for part in module.modules():
        part.register_forward_hook(look)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    held = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    return NetworkSize(float(counter.get_total_flops()) / 1e9, 4 * held, 4 * largest)


# -- what there is to do -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSeconds:
    """Seconds per image of one GPU where the pool has GPUs, else of one core.

    Attributes:
        teacher: Forward pass over the lake.
        decode: Reading and decoding, always of one core.
        lesson: The teacher's answer within distillation.
        student: The student's step.
        fit: A step of a fine-tuned scorer.
    """

    teacher: float
    decode: float
    lesson: float
    student: float
    fit: float


def image_seconds(
    config: JobConfig,
    prices: Prices,
    lake: LakeSize,
    teacher: NetworkSize,
    student: NetworkSize,
    measured: Measured | None,
) -> ImageSeconds:
    """What the table says, or where it was measured what was measured."""
    embed, train, rates = config.resources.embed, config.resources.train, prices.rates

    def tabulated(gflop: float, gpus: float) -> float:
        return gflop / (rates.gpu_tflop_per_s * 1000 if gpus > 0 else rates.cpu_core_gflop_per_s)

    forward = tabulated(teacher.gflop, embed.gpus)
    lesson = tabulated(teacher.gflop, train.gpus)
    decode = lake.size_bytes / max(lake.rows, 1) / (rates.decode_mb_per_s_per_core * 1e6) + rates.image_us / 1e6
    if measured is not None:
        decode = 1 / measured.decode_images_per_s
        if measured.teacher_images_per_s is not None:
            forward = 1 / measured.teacher_images_per_s
            # On the other kind of device it would say nothing.
            lesson = forward if (embed.gpus > 0) == (train.gpus > 0) else lesson
    return ImageSeconds(
        teacher=forward,
        decode=decode,
        lesson=lesson,
        student=_TRAIN_PASSES * tabulated(student.gflop, train.gpus),
        fit=_TRAIN_PASSES * tabulated(teacher.gflop, train.gpus),
    )


@dataclass(frozen=True)
class Each:
    """What one process asks Ray for."""

    cpus: float
    gpus: float
    memory_gib: float


@dataclass(frozen=True)
class Load:
    """One stage's work, whatever the pool.

    Attributes:
        stage: Name.
        images: How many go through.
        device_s: Seconds of one GPU, or where the pool has none of one core.
        decode_s: Seconds of one core.
        each: One member of the pool.
        decoder: One decoding task beside GPU actors.
        unit: `actors` or `workers`.
        setting: What sets the pool's size.
        fewest: The least pool that the job allows.
        pool: The largest.
        chunks: Units of work, of which a decoder or an actor takes one at a time; training: 1.
        most: The largest pool that would be of use, whatever the job says.
        repeated_s: Training: seconds of one GPU or core between two checkpoints.
    """

    stage: str
    images: int
    device_s: float
    decode_s: float
    each: Each
    decoder: Each
    unit: str
    setting: str
    fewest: int
    pool: int
    chunks: int
    most: int
    repeated_s: float = 0.0

    @property
    def trains(self) -> bool:
        """Whether its members depend on each other, so that losing one stops all."""
        return self.unit == "workers"


def loads(
    config: JobConfig, prices: Prices, lake: LakeSize, labeled: int, per_image: ImageSeconds, *, finest: bool = False
) -> list[Load]:
    """The stages that count, in their order.

    Args:
        config: The job.
        prices: For the share of the lake that is mined.
        lake: Its size.
        labeled: Number of labeled images.
        per_image: See `image_seconds`.
        finest: Whether the lake is cut as finely as a larger pool would have it.
    """
    chunks = lake.most_chunks if finest else lake.chunks
    cached, finetuned = config.features.cache, config.scorer.features == "finetuned"
    sample = min(lake.rows, math.ceil(_SAMPLE_RESERVE * config.scorer.unlabeled_sample))
    seen = lake.rows if cached else sample
    found = [
        _pass("features", config, seen, per_image, chunks if cached else math.ceil(sample / _SAMPLE_CHUNK_ROWS)),
    ]
    if finetuned:
        found.append(_fit(config, per_image))
    if finetuned or not cached:
        # Scores come from the images: the lake is read again, by the teacher and a fine-tuned trunk of its size.
        found.append(_pass("score", config, lake.rows, per_image, chunks, looks=2 if finetuned else 1))
    taught = mined_images(config, prices, lake) + labeled
    if config.distill.soft_labels == "cached":
        units = math.ceil(taught / _SOFT_LABEL_CHUNK_ROWS)
        found.append(_pass("soft_labels", config, taught, per_image, units, looks=config.distill.crops))
    found.append(_distill(config, taught, per_image))
    return found


def mined_images(config: JobConfig, prices: Prices, lake: LakeSize) -> int:
    """How many lake images the student is likely to be taught on; `selection.budget` bounds it."""
    prior = config.scorer.prior if isinstance(config.scorer.prior, float) else prices.assumed_prior
    likely = round(prior * lake.rows)
    budget = config.selection.budget
    if config.selection.rule in ("budget", "random") and budget is not None:
        likely = lake.rows
    return min(likely, budget) if budget is not None else likely


def _pass(stage: str, config: JobConfig, images: int, per_image: ImageSeconds, chunks: int, looks: int = 1) -> Load:
    """A pass of networks over images; each is decoded once and looked at so many times."""
    embed, decode = config.resources.embed, config.resources.decode
    device_s, decode_s = images * looks * per_image.teacher, images * per_image.decode
    chunks = max(1, chunks)
    most = chunks
    if embed.gpus > 0 and decode_s > 0:
        # With a decoder for every chunk, more GPUs would wait for pixels.
        most = max(1, min(chunks, math.ceil(device_s / embed.gpus * chunks / decode_s)))
    return Load(
        stage=stage,
        images=images,
        device_s=device_s,
        decode_s=decode_s,
        each=Each(embed.cpus, embed.gpus, embed.memory_gib),
        decoder=Each(decode.cpus, 0.0, decode.memory_gib),
        unit="actors",
        setting="resources.embed.max_actors",
        fewest=embed.min_actors,
        pool=config.resources.most_actors,
        chunks=chunks,
        most=most,
    )


def _fit(config: JobConfig, per_image: ImageSeconds) -> Load:
    settings = config.scorer
    images = round(settings.epochs * settings.unlabeled_sample / (1 - settings.positive_share))
    device_s = images * per_image.fit
    return _training(
        "fit",
        config,
        images,
        device_s,
        setting="scorer.workers",
        workers=(settings.workers, settings.workers),
        batch_size=settings.batch_size,
        repeated_s=device_s / settings.epochs,  # it leaves a checkpoint after every epoch
    )


def _distill(config: JobConfig, taught: int, per_image: ImageSeconds) -> Load:
    settings = config.distill
    steps = settings.epochs * math.ceil(taught / settings.batch_size)
    steps = min(steps, settings.max_steps or steps)
    lesson = per_image.lesson if settings.soft_labels == "loop" else 0.0
    step_s = settings.batch_size * (per_image.student + lesson)
    most = settings.most_workers
    return _training(
        "distill",
        config,
        settings.batch_size * steps,
        steps * step_s,
        setting="distill.workers",
        workers=(settings.fewest_workers, most),
        batch_size=settings.batch_size,
        repeated_s=min(settings.checkpoint_steps, steps) * step_s,
    )


def _training(
    stage: str,
    config: JobConfig,
    images: int,
    device_s: float,
    *,
    setting: str,
    workers: tuple[int, int],
    batch_size: int,
    repeated_s: float,
) -> Load:
    train = config.resources.train
    return Load(
        stage=stage,
        images=images,
        device_s=device_s,
        decode_s=0.0,  # once per worker, then from its own disk
        each=Each(train.cpus, train.gpus, 0.0),
        decoder=Each(0.0, 0.0, 0.0),
        unit="workers",
        setting=setting,
        fewest=workers[0],
        pool=workers[1],
        chunks=1,
        most=max(workers[1], batch_size // _LEAST_WORKER_BATCH),
        repeated_s=repeated_s,
    )


# -- time and nodes ----------------------------------------------------------------------------------------


def seconds(load: Load, pool: int) -> float:
    """Wall-clock time of a stage with so many actors or workers."""
    busy = min(pool, load.most)
    if load.each.gpus > 0:
        return max(_device_seconds(load, busy), _decode_seconds(load, busy))
    # A CPU actor decodes what it embeds, and decoding takes one core however many it has.
    return _device_seconds(load, busy) + load.decode_s / (busy * min(1.0, load.each.cpus))


def decoders(load: Load, pool: int) -> int:
    """Decoding tasks that keep GPU actors busy; no more can work at once than there are chunks."""
    if load.each.gpus == 0 or load.decode_s == 0:
        return 0
    forward_s = max(_device_seconds(load, min(pool, load.most)), 1.0)
    return max(1, min(load.chunks, math.ceil(load.decode_s / forward_s)))


def _device_seconds(load: Load, busy: int) -> float:
    return load.device_s / (busy * (load.each.gpus or load.each.cpus))


def _decode_seconds(load: Load, busy: int) -> float:
    tasks = decoders(load, busy)
    return load.decode_s / tasks if tasks else 0.0


def fits(node: NodePrice, each: Each) -> float:
    """How many such processes Ray places on an empty node; a fraction below 1 where not even one fits."""
    memory_gib = node.memory_gib * (1 - OBJECT_STORE_FRAC)
    room = [
        have / need
        for have, need in ((node.cpus, each.cpus), (node.gpus, each.gpus), (memory_gib, each.memory_gib))
        if need > 0
    ]
    least = min(room)
    return float(math.floor(least + 1e-9)) if least >= 1 else least


def decoders_beside(node: NodePrice, load: Load, actors: int) -> int:
    """Decoding tasks that find room on a GPU node that holds so many actors."""
    cores = node.cpus - actors * load.each.cpus
    memory_gib = node.memory_gib * (1 - OBJECT_STORE_FRAC) - actors * load.each.memory_gib
    room = [cores / load.decoder.cpus]
    if load.decoder.memory_gib > 0:
        room.append(memory_gib / load.decoder.memory_gib)
    return max(0, math.floor(min(room) + 1e-9))


def plan_stage(load: Load, pool: int, prices: Prices) -> StagePlan:
    """Time, nodes and cost of a stage with so many actors or workers, up for the whole stage."""
    cpu, gpu = prices.nodes.cpu, prices.nodes.gpu
    busy, tasks, time_s = min(pool, load.most), decoders(load, pool), seconds(load, pool)
    gpu_nodes = cpu_nodes = 0
    if load.each.gpus > 0:
        per_node = fits(gpu, load.each)
        gpu_nodes = math.ceil(busy / per_node)
        if tasks:
            beside = sum(
                decoders_beside(gpu, load, share) for share in _shares(busy, gpu_nodes, max(1, math.ceil(per_node)))
            )
            cpu_nodes = math.ceil(max(0, tasks - beside) / fits(cpu, load.decoder))
    else:
        cpu_nodes = math.ceil(busy / fits(cpu, load.each))
    hours = time_s / 3600
    return StagePlan(
        stage=load.stage,
        images=load.images,
        pool=busy,
        unit=load.unit,
        decoders=tasks,
        seconds=round(time_s, 1),
        cpu_nodes=cpu_nodes,
        gpu_nodes=gpu_nodes,
        gpu_hours=round(busy * load.each.gpus * hours, 3),
        cpu_hours=round((busy * load.each.cpus + tasks * load.decoder.cpus) * hours, 3),
        cost=round((cpu_nodes * cpu.price_per_hour + gpu_nodes * gpu.price_per_hour) * hours, 2),
    )


def _shares(members: int, nodes: int, per_node: int) -> list[int]:
    """Members of each node, filled one node after the other."""
    return [min(per_node, max(0, members - node * per_node)) for node in range(nodes)]


def total_seconds(stages: Sequence[StagePlan], prices: Prices) -> float:
    """Of all stages, and of starting nodes once."""
    return round(sum(stage.seconds for stage in stages) + (prices.start_s if stages else 0.0), 1)


def duration(time_s: float) -> str:
    """For people."""
    if time_s < 90:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.0f} min" if time_s < 5400 else f"{time_s / 3600:.1f} h"
