"""Dry run of a job, without a cluster: the lake's size, what each stage needs, how long, what it costs, refusals.

The arithmetic is in estimate.py, deadline.py, spot.py and memory.py, the table in prices.py, measuring in calibrate.py.
Here the job's inputs are looked at, and all of it is put together and shown.

Not covered: whether the cluster at hand has the resources (preflight.py).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from cluster import calibrate, deadline, estimate, memory, preflight, spot
from cluster.deadline import DeadlinePlan
from cluster.estimate import (
    ImageSeconds,
    LakeSize,
    Load,
    Measured,
    NetworkSize,
    StagePlan,
    duration,
)
from cluster.memory import MemoryCheck
from cluster.prices import Prices, Table
from cluster.spot import SpotPlan
from pu_ray.config import JobConfig, LimitsConfig
from pu_ray.errors import ConfigError, DataError, PuRayError
from pu_ray.progress import Progress
from pu_ray.storage import Storage

if TYPE_CHECKING:
    from pu_ray.lake import Shard

_SAMPLED_SHARDS = 20
_GIB = 2**30
_WIDTH = 100
# A pool so large that only the least size of a chunk bounds how finely the lake is cut.
_ANY_ACTORS = 10**9


class Need(Table):
    """What a stage must have at once, from `preflight.required`."""

    stage: str
    cpus: float
    gpus: float
    memory_gib: float


class Rate(Table):
    """How fast one core or one GPU does something.

    Attributes:
        what: What it does.
        device: `core` or `gpu`.
        images_per_s: Of one of them.
        source: `table` or `measured`.
    """

    what: str
    device: str
    images_per_s: float
    source: str


class Plan(Table):
    """The dry run's answer.

    Attributes:
        name: The job's.
        output: Where it would publish.
        lake: None where the lake cannot be used.
        needs: Least resources per stage.
        measured: With `--calibrate`: what was found.
        rates: What the times rest on.
        stages: Time and cost with the largest pools that the job allows.
        seconds: Of all stages, and of starting nodes once.
        cost: Of all stages.
        gpu_hours: Of all stages.
        cpu_hours: Of all stages.
        spot: The same on spot nodes.
        deadline: With `--deadline`: the pools that meet it.
        deadline_spot: Those on spot nodes.
        memory: What processes and nodes are expected to need.
        currency: Of the costs.
        assumptions: What the figures rest on beyond the table.
        warnings: What would not stop the job and may go wrong.
        refusals: Why the job would stop; empty where it would not.
        exit_status: 0, or that of the first refusal.
    """

    name: str
    output: str
    lake: LakeSize | None
    needs: tuple[Need, ...]
    measured: Measured | None
    rates: tuple[Rate, ...]
    stages: tuple[StagePlan, ...]
    seconds: float
    cost: float
    gpu_hours: float
    cpu_hours: float
    spot: SpotPlan | None
    deadline: DeadlinePlan | None
    deadline_spot: SpotPlan | None
    memory: MemoryCheck | None
    currency: str
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    refusals: tuple[str, ...]
    exit_status: int


class _Reckoned(Table):
    """The part of a plan that needs all inputs; empty without them."""

    rates: tuple[Rate, ...] = ()
    stages: tuple[StagePlan, ...] = ()
    spot: SpotPlan | None = None
    deadline: DeadlinePlan | None = None
    deadline_spot: SpotPlan | None = None
    memory: MemoryCheck | None = None
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


# -- looking and reckoning ---------------------------------------------------------------------------------


def make(
    config: JobConfig,
    prices: Prices,
    progress: Progress,
    *,
    deadline_hours: float | None = None,
    calibrated: bool = False,
) -> Plan:
    """Look at the job's inputs and reckon; starts nothing and writes nothing.

    Args:
        config: The job.
        prices: See `prices.load`.
        progress: Sees the listing, and what is measured.
        deadline_hours: Until when the whole plan should end; None: as the job's own pools have it.
        calibrated: Whether to measure on this machine what can be measured.

    Returns:
        The plan; what is wrong with the inputs is in `refusals`, not raised, so that all of it shows at once.

    Raises:
        ConfigError: The deadline is no time to come.
    """
    if deadline_hours is not None and not 0 < deadline_hours < math.inf:
        raise ConfigError(
            "nothing can end then",
            slug="invalid-deadline",
            where="--deadline",
            allowed="a number of hours above 0",
            got=f"{deadline_hours:g}",
        )
    refusals: list[PuRayError] = []
    lake = labeled = networks = measured = None
    classes: list[str] = []
    try:
        classes = _teacher_classes(config)
    except PuRayError as error:
        refusals.append(error)
    try:
        shards = _list(config, progress)
        lake = measure_lake(config, shards, finest=deadline_hours is not None)
        if calibrated and classes:
            measured = calibrate.measure(config, shards, progress)
    except PuRayError as error:
        refusals.append(error)
    try:
        labeled = _count_images("labeled.uri", config.labeled.uri, classes)
        _require_enough(labeled, config)
    except PuRayError as error:
        refusals.append(error)
    try:
        _count_images("test.uri", config.test.uri, classes)
    except PuRayError as error:
        refusals.append(error)
    try:
        networks = (
            estimate.network_size(config.teacher, config.teacher.preprocessing),
            estimate.network_size(config.student, config.student_preprocessing),
        )
    except PuRayError as error:
        refusals.append(error)
    reckoned = _Reckoned()
    if lake is not None and labeled is not None and networks is not None:
        reckoned, misfits = _reckon(config, prices, lake, labeled, networks, measured, deadline_hours)
        refusals += misfits
    stages = reckoned.stages
    return Plan(
        name=config.name,
        output=config.output,
        lake=lake,
        needs=tuple(_need(requirement) for requirement in preflight.required(config)),
        measured=measured,
        rates=reckoned.rates,
        stages=stages,
        seconds=estimate.total_seconds(stages, prices),
        cost=round(sum(stage.cost for stage in stages), 2),
        gpu_hours=round(sum(stage.gpu_hours for stage in stages), 3),
        cpu_hours=round(sum(stage.cpu_hours for stage in stages), 3),
        spot=reckoned.spot,
        deadline=reckoned.deadline,
        deadline_spot=reckoned.deadline_spot,
        memory=reckoned.memory,
        currency=prices.currency,
        assumptions=reckoned.assumptions,
        warnings=reckoned.warnings,
        refusals=tuple(f"({refusal.code}) {refusal}" for refusal in refusals),
        exit_status=refusals[0].exit_status if refusals else 0,
    )


def measure_lake(config: JobConfig, shards: list[Shard], *, finest: bool = False) -> LakeSize:
    """Open at most 20 shards, evenly spread, to count rows.

    A damaged shard counts as the one row that stands for it.

    Args:
        config: The job.
        shards: The lake's.
        finest: Whether to look as well how finely the lake could be cut for a larger pool.

    Raises:
        DataError: A shard may not be read.
    """
    from pu_ray import lake_pass

    sample = _spread(shards, _SAMPLED_SHARDS)
    units = lake_pass.lake_units(config, shards, sample)
    pieces = len(lake_pass.lake_units(_with_any_pool(config), shards, sample)) if finest else len(units)
    size = sum(shard.size_bytes for shard in shards)
    # Rows follow bytes better than they follow shards, whose last one is often short.
    factor = 1.0 if len(sample) == len(shards) else size / max(1, sum(shard.size_bytes for shard in sample))
    return LakeSize(
        shards=len(shards),
        size_bytes=size,
        rows=round(factor * sum(unit.rows for unit in units)),
        chunks=round(factor * len(units)),
        most_chunks=round(factor * max(pieces, len(units))),
        chunk_rows=max((unit.rows for unit in units), default=1),
        exact=len(sample) == len(shards),
        sampled_shards=len(sample),
    )


def _list(config: JobConfig, progress: Progress) -> list[Shard]:
    # Its module is imported together with Ray Data's, a second that a wrong job file need not wait for.
    from pu_ray import lake

    return lake.list_shards(config.lake, progress.found)


def _with_any_pool(config: JobConfig) -> JobConfig:
    embed = config.resources.embed.model_copy(update={"max_actors": _ANY_ACTORS})
    pools = config.resources.model_copy(update={"embed": embed, "limits": LimitsConfig()})
    return config.model_copy(update={"resources": pools})


def _reckon(
    config: JobConfig,
    prices: Prices,
    lake: LakeSize,
    labeled: int,
    networks: tuple[NetworkSize, NetworkSize],
    measured: Measured | None,
    deadline_hours: float | None,
) -> tuple[_Reckoned, list[PuRayError]]:
    """All that follows from the inputs, and why the nodes of the table could not run it."""
    per_image = estimate.image_seconds(config, prices, lake, *networks, measured)
    work = estimate.loads(config, prices, lake, labeled, per_image)
    stages = tuple(estimate.plan_stage(load, load.pool, prices) for load in work)
    found, misfits = memory.check(config, prices, lake, networks[0], work, stages)
    interrupted = spot.reckon(work, stages, prices)
    warnings = [*found.warnings, *_spot_warnings(config, work, interrupted)]
    pools = pools_spot = None
    if deadline_hours is not None:
        finest = estimate.loads(config, prices, lake, labeled, per_image, finest=True)
        pools = deadline.meet(finest, prices, deadline_hours)
        pools_spot = spot.reckon(finest, pools.stages, prices)
        if not misfits:
            # Fuller nodes than the job's own pools make.
            crowded = memory.check(config, prices, lake, networks[0], finest, pools.stages)[1]
            warnings += [f"with the deadline's pools {refusal.problem}: {refusal.got}" for refusal in crowded]
    reckoned = _Reckoned(
        rates=tuple(_rates(config, per_image, measured)),
        stages=stages,
        spot=interrupted,
        deadline=pools,
        deadline_spot=pools_spot,
        memory=found,
        assumptions=tuple(_assumptions(config, prices, lake, networks, measured)),
        warnings=tuple(warnings),
    )
    return reckoned, misfits


def _rates(config: JobConfig, per_image: ImageSeconds, measured: Measured | None) -> Iterator[Rate]:
    def rate(what: str, gpus: float, each_s: float, known: bool) -> Rate:
        device = "gpu" if gpus > 0 else "core"
        source = "measured" if known else "table"
        return Rate(what=what, device=device, images_per_s=1 / max(each_s, 1e-12), source=source)

    seen = measured is not None and measured.teacher_images_per_s is not None
    embed, train = config.resources.embed.gpus, config.resources.train.gpus
    yield rate("read and decode", 0, per_image.decode, measured is not None)
    yield rate("teacher", embed, per_image.teacher, seen)
    if config.scorer.features == "finetuned":
        yield rate("fit of the scorer", train, per_image.fit, False)
    if config.distill.soft_labels == "loop":
        yield rate("teacher in distillation", train, per_image.lesson, seen and (embed > 0) == (train > 0))
    yield rate("student in distillation", train, per_image.student, False)


def _assumptions(
    config: JobConfig,
    prices: Prices,
    lake: LakeSize,
    networks: tuple[NetworkSize, NetworkSize],
    measured: Measured | None,
) -> Iterable[str]:
    teacher, student = networks
    yield f"{teacher.gflop:.3g} GFLOP per image of the teacher and {student.gflop:.3g} of the student, counted"
    yield "rates and prices of the price table, many of them assumptions and placeholders: edit it"
    if measured is not None:
        yield from _measured(config, measured)
    yield "the largest pools the job allows (resources.embed.max_actors, distill.workers), up for the whole stage"
    if prices.start_s:
        yield f"{duration(prices.start_s)} once until the first nodes are up, not billed here"
    yield (
        f"spot nodes at {prices.spot.price_frac:.0%} of the price, {prices.spot.interruptions_per_node_hour:g} "
        "interruptions per node-hour"
    )
    if not lake.exact:
        yield f"images and chunks projected by bytes from {lake.sampled_shards} of {lake.shards:,} shards"
    if config.features.cascade:
        yield "what the cascade spares is not known before it is fitted, and left out"
    if config.selection.budget is None and config.scorer.prior == "auto":
        yield f"{prices.assumed_prior:.0%} of the lake mined (assumed_prior): the run estimates the prior"


def _measured(config: JobConfig, measured: Measured) -> Iterable[str]:
    yield (
        f"measured here on {measured.images:,} images ({measured.broken:,} more unusable): "
        f"{measured.decode_mb_per_s:.3g} MB/s of one core read and decoded"
    )
    if measured.read_mb_per_s < measured.decode_mb_per_s:
        yield (
            f"the storage gave {measured.read_mb_per_s:.3g} MB/s at a time, less than a core decodes: where nodes are "
            "no nearer to it, they wait for it longer than reckoned"
        )
    if measured.teacher_images_per_s is None:
        yield "no GPU here, and the job's actors have one: the teacher's rate is the table's"
    else:
        yield f"the teacher measured here on {measured.teacher_images:,} images, one {measured.device}"
    if config.features.cascade:
        yield "measured without the cascade's gate"


def _spot_warnings(config: JobConfig, work: Sequence[Load], found: SpotPlan) -> Iterator[str]:
    for load, stage in zip(work, found.stages, strict=True):
        if load.stage != "distill" or stage.interruptions is None:
            continue
        if stage.interruptions > config.distill.max_failures:
            yield (
                f"on spot nodes distill expects {stage.interruptions:.1f} interruptions, and "
                f"{config.distill.max_failures} that were not announced end it: raise distill.max_failures"
            )


def _need(requirement: preflight.Requirement) -> Need:
    total = requirement.total
    return Need(
        stage=requirement.stage,
        cpus=total.get(preflight.CPU, 0.0),
        gpus=total.get(preflight.GPU, 0.0),
        memory_gib=total.get(preflight.MEMORY, 0.0) / _GIB,
    )


def _teacher_classes(config: JobConfig) -> list[str]:
    """The teacher's classes; its weights have to be there, and are not opened."""
    from pu_ray import models

    classes = models.read_classes(config.teacher.classes)
    folder, name = Storage(config.teacher.weights).split()
    if folder.kind(name) != "file":
        raise DataError(
            "there are no weights",
            slug="no-weights",
            where=f"teacher.weights ({config.teacher.weights})",
            allowed="a .safetensors file, or a .pth that holds a plain state dict",
            got="a folder" if folder.exists(name) else "nothing",
            hint="check the URI, and the credentials and endpoint in the environment",
        )
    return classes


def _count_images(where: str, uri: str, classes: Sequence[str]) -> int:
    """How many images lie in the folders of the classes; without classes, in any."""
    from pu_ray import lake

    files = len(Storage(uri).list_files())
    if files == 0:
        raise DataError(
            "there are no images",
            slug="no-images",
            where=f"{where} ({uri})",
            allowed="one folder per class, with images",
            got="0 files",
            hint="check the URI, and the credentials and endpoint in the environment",
        )
    return len(lake.list_labeled(uri, classes)) if classes else files


def _require_enough(labeled: int, config: JobConfig) -> None:
    from pu_ray.pu import fit, training

    fit.require_enough([training.role_at(position, config.scorer.split) for position in range(labeled)], config)


def _spread(shards: list[Shard], most: int) -> list[Shard]:
    if len(shards) <= most:
        return shards
    return [shards[index * len(shards) // most] for index in range(most)]


# -- showing -----------------------------------------------------------------------------------------------


def render(plan: Plan) -> str:
    """Tables for people, at most 100 columns but for what the job itself brings (URIs, refusals)."""
    lines = [f"plan of {plan.name}, published to {plan.output}"]
    if plan.lake is not None:
        lake = plan.lake
        how = "counted" if lake.exact else f"projected from {lake.sampled_shards} shards"
        lines.append(
            f"lake: {lake.rows:,} images ({how}), {lake.shards:,} shards, {_bytes(lake.size_bytes)}, "
            f"{lake.chunks:,} chunks"
        )
    lines += ["", f"{'needs at once':<16}{'CPU':>8}{'GPU':>8}{'memory':>12}"]
    lines += [f"{need.stage:<16}{need.cpus:>8g}{need.gpus:>8g}{need.memory_gib:>8.3g} GiB" for need in plan.needs]
    if plan.rates:
        lines += ["", f"{'images/s of one':<26}{'':<6}{'':>10}  from"]
        lines += [
            f"{rate.what:<26}{_device(rate.device):<6}{_number(rate.images_per_s):>10}  {_source(rate, plan.measured)}"
            for rate in plan.rates
        ]
    if plan.stages:
        lines += ["", *_table(plan.stages, plan.currency, plan.seconds, plan.cost)]
        assert plan.spot is not None
        lines.append(_spot_line(plan.spot, plan.currency))
    if plan.deadline is not None:
        assert plan.deadline_spot is not None
        lines += ["", *_deadline_lines(plan.deadline, plan.deadline_spot, plan)]
    if plan.memory is not None:
        lines += ["", *_memory_lines(plan.memory)]
    if plan.stages:
        lines += ["", "The estimate rests on:", *_bullets(plan.assumptions)]
    if plan.warnings:
        lines += ["", "Warnings:", *_bullets(plan.warnings)]
    if plan.refusals:
        lines += ["", "This job would be refused:", *(f"- {text}" for text in plan.refusals)]
    return "\n".join(lines)


def _table(stages: Sequence[StagePlan], currency: str, seconds: float, cost: float) -> Iterator[str]:
    widths = (14, 14, 9, 11, 11, 9, 9, 11)

    def row(name: str, *cells: str) -> str:
        return f"{name:<12}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    yield row("stage", "images", "pool", "time", "CPU nodes", "GPU nodes", "GPU-h", "core-h", currency)
    for stage in stages:
        yield row(
            stage.stage,
            f"{stage.images:,}",
            _members(stage.pool, stage.unit),
            duration(stage.seconds),
            f"{stage.cpu_nodes:,}",
            f"{stage.gpu_nodes:,}",
            _number(stage.gpu_hours),
            _number(stage.cpu_hours),
            f"{stage.cost:,.2f}",
        )
    yield row(
        "all",
        "",
        "",
        duration(seconds),
        f"{max(stage.cpu_nodes for stage in stages):,}",
        f"{max(stage.gpu_nodes for stage in stages):,}",
        _number(sum(stage.gpu_hours for stage in stages)),
        _number(sum(stage.cpu_hours for stage in stages)),
        f"{cost:,.2f}",
    )


def _spot_line(expected: SpotPlan, currency: str) -> str:
    if (
        expected.seconds is None
        or expected.cost is None
        or expected.extra_seconds is None
        or expected.extra_cost is None
    ):
        stuck = ", ".join(stage.stage for stage in expected.stages if stage.extra_seconds is None)
        return f"on spot nodes: {stuck} would not end, interruptions come faster than the work"
    lost = f"{duration(expected.extra_seconds)}, {expected.extra_cost:,.2f} {currency}"
    return (
        f"on spot nodes: {duration(expected.seconds)}, {expected.cost:,.2f} {currency}; of this "
        f"{expected.interruptions:.2g} expected interruptions take {lost}"
    )


def _deadline_lines(pools: DeadlinePlan, expected: SpotPlan, plan: Plan) -> Iterator[str]:
    own = "ends in time" if plan.seconds <= 3600 * pools.hours else f"takes {duration(plan.seconds)}"
    if not pools.met:
        fastest = f"within its bounds it takes {duration(pools.seconds)}"
        yield f"deadline {pools.hours:g} h: CANNOT BE MET; {fastest}"
        yield from _bullets(pools.limits)
    else:
        yield f"deadline {pools.hours:g} h: met with these pools (the job as it is {own})"
    yield from _table(pools.stages, plan.currency, pools.seconds, pools.cost)
    yield _spot_line(expected, plan.currency)
    if pools.met and (expected.seconds is None or expected.seconds > 3600 * pools.hours):
        yield "on spot nodes the expected end is after the deadline: plan for an earlier one"
    for change in pools.settings:
        if change.value > change.now:
            yield f"set {change.setting} = {change.value:,} (now {change.now:,})"
        else:
            yield f"{change.setting} = {change.value:,} would do (now {change.now:,})"


def _memory_lines(found: MemoryCheck) -> Iterator[str]:
    yield "memory by estimate, of what there is"
    for use in found.processes:
        parts = " + ".join(f"{size:.2g} {name}" for name, size in use.parts_gib.items() if size >= 0.005)
        yield f"  {use.what:<20}{use.needs_gib:>7.2f} of {use.declared_gib:g} GiB  ({parts})"
    for node in found.nodes:
        held = [_members(node.actors, "actors")] if node.actors else []
        held += [_members(node.decoders, "decoding tasks")] if node.decoders else []
        held += [f"{node.store_gib:.2g} GiB of blocks"] if node.store_gib else []
        name = f"the fullest {node.node.upper()} node"
        yield f"  {name:<20}{node.needs_gib:>7.2f} of {node.memory_gib:g} GiB  ({', '.join(held)})"


def _bullets(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from textwrap.wrap(
            text, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )


def _members(count: int, unit: str) -> str:
    return f"{count:,} {unit if count != 1 else unit.removesuffix('s')}"


def _device(device: str) -> str:
    return device.upper() if device == "gpu" else device


def _source(rate: Rate, measured: Measured | None) -> str:
    if rate.source == "table" or measured is None:
        return "the price table"
    images = measured.images if rate.what == "read and decode" else measured.teacher_images
    return f"measured here on {images:,} images"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"
