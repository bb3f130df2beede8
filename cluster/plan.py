"""Dry run of a job, without a cluster: the lake's size, what each stage needs, how long, what it costs, refusals.

Times are arithmetic: operations of the job's own networks, counted, over the rates of `prices.yaml`. They tell hours
from days, not minutes from minutes.

Not covered: head nodes, storage and transfer; stages that take under a minute on any machine (a head on frozen
features, selection, export); whether the cluster at hand has the resources (preflight.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster import preflight
from pu_ray.config import JobConfig, NetworkConfig, PreprocessingConfig
from pu_ray.errors import ConfigError, DataError, PuRayError
from pu_ray.storage import Storage

if TYPE_CHECKING:
    from pu_ray.lake import Shard

PRICES_FILE = Path(__file__).with_name("prices.yaml")

_SAMPLED_SHARDS = 20
_GIB = 2**30
_TEACHER_CLASSES = 1000  # only the last layer depends on it: far below the error of any estimate
_TRAIN_PASSES = 3  # forward, and about twice that backward


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NodePrice(_Table):
    """A kind of machine."""

    cpus: int = Field(ge=1)
    gpus: int = Field(ge=0)
    price_per_hour: float = Field(ge=0)


class NodePrices(_Table):
    """The two kinds a plan reckons with."""

    cpu: NodePrice
    gpu: NodePrice

    @model_validator(mode="after")
    def _gpu_nodes_have_gpus(self) -> Self:
        if self.gpu.gpus == 0:
            raise ValueError("nodes of the kind gpu need at least one GPU, got 0")
        return self


class Rates(_Table):
    """What one core or one GPU sustains."""

    cpu_core_gflop_per_s: float = Field(gt=0)
    gpu_tflop_per_s: float = Field(gt=0)
    decode_mb_per_s_per_core: float = Field(gt=0)


class Prices(_Table):
    """The editable table behind a plan."""

    currency: str
    nodes: NodePrices
    start_s: float = Field(ge=0)
    rates: Rates
    assumed_prior: float = Field(gt=0, lt=1)


class LakeSize(_Table):
    """What is in the lake.

    Attributes:
        shards: Units of the ledger.
        size_bytes: Encoded.
        rows: Images.
        chunks: Units of work.
        exact: Whether `rows` and `chunks` were counted, or projected from `sampled_shards`.
        sampled_shards: How many shards were opened.
    """

    shards: int
    size_bytes: int
    rows: int
    chunks: int
    exact: bool
    sampled_shards: int


class Need(_Table):
    """What a stage must have at once, from `preflight.required`."""

    stage: str
    cpus: float
    gpus: float
    memory_gib: float


class StagePlan(_Table):
    """One stage's share of time and money.

    Attributes:
        stage: Name.
        images: How many go through, repetitions included.
        seconds: Wall-clock time with the nodes below.
        cpu_nodes: Nodes of the kind `cpu`.
        gpu_nodes: Nodes of the kind `gpu`.
        cost: In the table's currency.
    """

    stage: str
    images: int
    seconds: float
    cpu_nodes: int
    gpu_nodes: int
    cost: float


class Plan(_Table):
    """The dry run's answer.

    Attributes:
        name: The job's.
        output: Where it would publish.
        lake: None where the lake cannot be used.
        needs: Least resources per stage.
        stages: Time and cost with the largest pools that the job allows.
        seconds: Of all stages, and of starting nodes once.
        cost: Of all stages.
        currency: Of the costs.
        assumptions: What the figures rest on beyond the table.
        refusals: Why the job would stop; empty where it would not.
        exit_status: 0, or that of the first refusal.
    """

    name: str
    output: str
    lake: LakeSize | None
    needs: tuple[Need, ...]
    stages: tuple[StagePlan, ...]
    seconds: float
    cost: float
    currency: str
    assumptions: tuple[str, ...]
    refusals: tuple[str, ...]
    exit_status: int


def load_prices(path: Path = PRICES_FILE) -> Prices:
    """The table of rates and prices.

    Raises:
        ConfigError: The file cannot be read or lacks something.
    """
    try:
        return Prices.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("the price table cannot be read", where=str(path), got=str(error)) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError("the price table is wrong", where=f"{path}: {where}", got=first["msg"]) from error


def make(config: JobConfig, prices: Prices) -> Plan:
    """Look at the job's inputs and reckon; starts nothing and writes nothing.

    Args:
        config: The job.
        prices: See `load_prices`.

    Returns:
        The plan; what is wrong with the inputs is in `refusals`, not raised, so that all of it shows at once.
    """
    refusals: list[PuRayError] = []
    lake = labeled = None
    gflop: list[float] = []
    try:
        lake = measure_lake(config)
    except PuRayError as error:
        refusals.append(error)
    try:
        labeled = _count_images("labeled.uri", config.labeled.uri)
        _count_images("test.uri", config.test.uri)
    except PuRayError as error:
        refusals.append(error)
    try:
        gflop = [
            gflop_per_image(config.teacher, config.teacher.preprocessing),
            gflop_per_image(config.student, config.student_preprocessing),
        ]
    except PuRayError as error:
        refusals.append(error)
    stages: tuple[StagePlan, ...] = ()
    assumptions: tuple[str, ...] = ()
    if lake is not None and labeled is not None and gflop:
        stages = tuple(estimate(config, prices, lake, labeled, *gflop))
        assumptions = tuple(_assumptions(config, prices, lake, *gflop))
    return Plan(
        name=config.name,
        output=config.output,
        lake=lake,
        needs=tuple(_need(requirement) for requirement in preflight.required(config)),
        stages=stages,
        seconds=round(sum(stage.seconds for stage in stages) + (prices.start_s if stages else 0.0), 1),
        cost=round(sum(stage.cost for stage in stages), 2),
        currency=prices.currency,
        assumptions=assumptions,
        refusals=tuple(str(refusal) for refusal in refusals),
        exit_status=refusals[0].exit_status if refusals else 0,
    )


def measure_lake(config: JobConfig) -> LakeSize:
    """List the lake and open at most 20 shards, evenly spread, to count rows.

    A damaged shard counts as the one row that stands for it.

    Raises:
        DataError: The lake holds no images, or may not be read.
    """
    # Brings Ray Data, a second's import that a wrong job file need not wait for.
    from pu_ray import lake, lake_pass

    shards = lake.list_shards(config.lake)
    sample = _spread(shards, _SAMPLED_SHARDS)
    units = lake_pass.lake_units(config, shards, sample)
    size = sum(shard.size_bytes for shard in shards)
    # Rows follow bytes better than they follow shards, whose last one is often short.
    factor = 1.0 if len(sample) == len(shards) else size / max(1, sum(shard.size_bytes for shard in sample))
    return LakeSize(
        shards=len(shards),
        size_bytes=size,
        rows=round(factor * sum(unit.rows for unit in units)),
        chunks=round(factor * len(units)),
        exact=len(sample) == len(shards),
        sampled_shards=len(sample),
    )


def gflop_per_image(network: NetworkConfig, preprocessing: PreprocessingConfig) -> float:
    """Operations of one forward pass in 1e9, two per multiply-add, counted without computing them.

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
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    return float(counter.get_total_flops()) / 1e9


def estimate(
    config: JobConfig, prices: Prices, lake: LakeSize, labeled: int, teacher_gflop: float, student_gflop: float
) -> list[StagePlan]:
    """Time and cost of the stages that count, with the largest pools the job allows.

    Args:
        config: The job.
        prices: Rates and prices.
        lake: Its size.
        labeled: Number of labeled images.
        teacher_gflop: One forward pass of the teacher.
        student_gflop: One forward pass of the student.
    """
    embed, train = config.resources.embed, config.resources.train
    stages = [_pass("features", config, prices, lake, teacher_gflop)]
    if config.scorer.features == "finetuned":
        images = round(config.scorer.epochs * config.scorer.unlabeled_sample / (1 - config.scorer.positive_share))
        speed = _gflop_per_s(prices.rates, embed.gpus, embed.cpus)
        seconds = images * teacher_gflop * _TRAIN_PASSES / speed
        stages += [
            _stage("fit", images, seconds, prices, cpus=embed.cpus, gpus=embed.gpus),
            # A finetuned scorer sees images, not the teacher's features: the lake is read and decoded again.
            _pass("score", config, prices, lake, teacher_gflop),
        ]
    settings = config.distill
    workers = settings.workers if isinstance(settings.workers, int) else settings.workers[1]
    steps = settings.epochs * math.ceil((mined_images(config, prices, lake) + labeled) / settings.batch_size)
    images = settings.batch_size * min(steps, settings.max_steps or steps)
    speed = workers * _gflop_per_s(prices.rates, train.gpus, train.cpus)
    seconds = images * (_TRAIN_PASSES * student_gflop + teacher_gflop) / speed
    stages.append(_stage("distill", images, seconds, prices, cpus=workers * train.cpus, gpus=workers * train.gpus))
    return stages


def mined_images(config: JobConfig, prices: Prices, lake: LakeSize) -> int:
    """How many lake images the student is likely to be taught on; `selection.budget` bounds it."""
    prior = config.scorer.prior if isinstance(config.scorer.prior, float) else prices.assumed_prior
    likely = round(prior * lake.rows)
    budget = config.selection.budget
    if config.selection.rule in ("budget", "random") and budget is not None:
        likely = lake.rows
    return min(likely, budget) if budget is not None else likely


def render(plan: Plan) -> str:
    """A short table for people."""
    lines = [f"plan of {plan.name}, published to {plan.output}"]
    if plan.lake is not None:
        lake = plan.lake
        how = "counted" if lake.exact else f"projected from {lake.sampled_shards} shards"
        lines.append(
            f"lake: {lake.rows:,} images ({how}), {lake.shards:,} shards, {_bytes(lake.size_bytes)}, "
            f"{lake.chunks:,} chunks"
        )
    lines += ["", f"{'needs at once':<16}{'CPU':>8}{'GPU':>8}{'memory':>12}"]
    lines += [f"{need.stage:<16}{need.cpus:>8g}{need.gpus:>8g}{need.memory_gib:>8g} GiB" for need in plan.needs]
    if plan.stages:
        lines += ["", f"{'stage':<12}{'images':>16}{'time':>10}{'CPU nodes':>12}{'GPU nodes':>12}{'cost':>14}"]
        lines += [
            f"{stage.stage:<12}{stage.images:>16,}{_duration(stage.seconds):>10}{stage.cpu_nodes:>12}"
            f"{stage.gpu_nodes:>12}{stage.cost:>10.2f} {plan.currency}"
            for stage in plan.stages
        ]
        lines.append(f"{'all':<12}{'':>16}{_duration(plan.seconds):>10}{'':>24}{plan.cost:>10.2f} {plan.currency}")
        lines += ["", "The estimate rests on:", *(f"- {text}" for text in plan.assumptions)]
    if plan.refusals:
        lines += ["", "This job would be refused:", *(f"- {text}" for text in plan.refusals)]
    return "\n".join(lines)


def _pass(stage: str, config: JobConfig, prices: Prices, lake: LakeSize, gflop: float) -> StagePlan:
    """A pass of a network over the lake, with as many decoding cores as its actors can use."""
    embed = config.resources.embed
    forward_s = lake.rows * gflop / (embed.max_actors * _gflop_per_s(prices.rates, embed.gpus, embed.cpus))
    decode_core_s = lake.size_bytes / (prices.rates.decode_mb_per_s_per_core * 1e6)
    # No more tasks can decode at once than there are chunks.
    decoders = max(1, min(lake.chunks, math.ceil(decode_core_s / max(forward_s, 1.0))))
    seconds = max(forward_s, decode_core_s / decoders)
    cpus = embed.max_actors * embed.cpus + decoders * config.resources.decode.cpus
    return _stage(stage, lake.rows, seconds, prices, cpus=cpus, gpus=embed.max_actors * embed.gpus)


def _stage(stage: str, images: int, seconds: float, prices: Prices, *, cpus: float, gpus: float) -> StagePlan:
    cpu, gpu = prices.nodes.cpu, prices.nodes.gpu
    gpu_nodes = math.ceil(gpus / gpu.gpus) if gpus > 0 else 0
    cpu_nodes = max(0, math.ceil((cpus - gpu_nodes * gpu.cpus) / cpu.cpus))
    per_hour = cpu_nodes * cpu.price_per_hour + gpu_nodes * gpu.price_per_hour
    return StagePlan(
        stage=stage,
        images=images,
        seconds=round(seconds, 1),
        cpu_nodes=cpu_nodes,
        gpu_nodes=gpu_nodes,
        cost=round(per_hour * seconds / 3600, 2),
    )


def _gflop_per_s(rates: Rates, gpus: float, cpus: float) -> float:
    return gpus * rates.gpu_tflop_per_s * 1000 if gpus > 0 else cpus * rates.cpu_core_gflop_per_s


def _assumptions(
    config: JobConfig, prices: Prices, lake: LakeSize, teacher_gflop: float, student_gflop: float
) -> Iterable[str]:
    yield f"{teacher_gflop:.2f} GFLOP per image of the teacher and {student_gflop:.2f} of the student, counted"
    yield "rates and prices of cluster/prices.yaml, many of them assumptions and placeholders: edit it"
    yield "the largest pools the job allows (resources.embed.max_actors, distill.workers), up for the whole stage"
    if prices.start_s:
        yield f"{_duration(prices.start_s)} once until the first nodes are up, not billed here"
    if not lake.exact:
        yield f"images and chunks projected by bytes from {lake.sampled_shards} of {lake.shards:,} shards"
    if config.selection.budget is None and config.scorer.prior == "auto":
        yield f"{prices.assumed_prior:.0%} of the lake mined (assumed_prior): the run estimates the prior"


def _need(requirement: preflight.Requirement) -> Need:
    total = requirement.total
    return Need(
        stage=requirement.stage,
        cpus=total.get(preflight.CPU, 0.0),
        gpus=total.get(preflight.GPU, 0.0),
        memory_gib=total.get(preflight.MEMORY, 0.0) / _GIB,
    )


def _count_images(where: str, uri: str) -> int:
    files = len(Storage(uri).list_files())
    if files == 0:
        raise DataError(
            "there are no images",
            where=f"{where} ({uri})",
            allowed="one folder per class, with images",
            got="0 files",
            hint="check the URI, and the credentials and endpoint in the environment",
        )
    return files


def _spread(shards: list[Shard], most: int) -> list[Shard]:
    if len(shards) <= most:
        return shards
    return [shards[index * len(shards) // most] for index in range(most)]


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
