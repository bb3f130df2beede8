"""What it is expected to cost that spot nodes are taken away, in time and money."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.estimate import Load, StagePlan, total_seconds
from cluster.prices import Prices, Table


class SpotStage(Table):
    """What interruptions do to one stage, as expected values.

    Attributes:
        stage: Name.
        interruptions: How many nodes are taken away.
        lost_s: Seconds of a node (training: of the whole pool) that one of them costs.
        extra_seconds: Longer wall-clock time; None where interruptions come faster than the work.
    """

    stage: str
    interruptions: float | None
    lost_s: float
    extra_seconds: float | None


class SpotPlan(Table):
    """The same pools on spot nodes, as expected values; None where interruptions come faster than the work.

    Attributes:
        stages: Stage by stage.
        interruptions: Of all stages.
        extra_seconds: What interruptions add.
        seconds: The whole plan with that.
        extra_cost: What they add to the price of spot nodes.
        cost: The whole plan with that.
    """

    stages: tuple[SpotStage, ...]
    interruptions: float | None
    extra_seconds: float | None
    seconds: float | None
    extra_cost: float | None
    cost: float | None


def reckon(work: Sequence[Load], stages: Sequence[StagePlan], prices: Prices) -> SpotPlan:
    """What interruptions are expected to cost, in time and money.

    With rate r per node-hour, a stage on m nodes for T hours:

    - A pass over the lake goes on without the node. One interruption costs that node `start_s`, until another one is
      there, and the chunks its actors were at, at most as long as a chunk takes: L hours. Of every hour of a node
      p = r L is lost.
    - A training stops as a whole. One interruption costs the pool `start_s` and half of what lies between two
      checkpoints: L hours. Of every hour of the pool p = r m L is lost.

    Lost time is interrupted as well, so that the stage takes T / (1 - p): T p / (1 - p) longer, in which all nodes
    are paid for at their spot price. With p of 1 or more it does not end.

    Args:
        work: See `loads`.
        stages: The same stages with their pools.
        prices: Rate, start and prices.
    """
    rate, cpu, gpu = prices.spot.interruptions_per_node_hour, prices.nodes.cpu, prices.nodes.gpu
    told, cost, extra_cost = [], 0.0, 0.0
    for load, stage in zip(work, stages, strict=True):
        nodes = stage.cpu_nodes + stage.gpu_nodes
        lost_s = prices.start_s + (_repeated_seconds(load, stage.pool) if load.trains else _chunk_seconds(load))
        share = rate * lost_s / 3600 * (nodes if load.trains else 1)
        endless = share >= 1
        longer = math.inf if endless else share / (1 - share)
        told.append(
            SpotStage(
                stage=load.stage,
                interruptions=None if endless else rate * nodes * stage.seconds / 3600 * (1 + longer),
                lost_s=round(lost_s, 1),
                extra_seconds=None if endless else stage.seconds * longer,
            )
        )
        per_hour = prices.spot.price_frac * (
            stage.cpu_nodes * cpu.price_per_hour + stage.gpu_nodes * gpu.price_per_hour
        )
        price = per_hour * stage.seconds / 3600
        cost += price
        extra_cost += price * longer if price else 0.0
    if any(stage.extra_seconds is None for stage in told):
        nothing = dict.fromkeys(("interruptions", "extra_seconds", "seconds", "extra_cost", "cost"))
        return SpotPlan(stages=tuple(told), **nothing)
    extra_s = sum(stage.extra_seconds or 0.0 for stage in told)
    return SpotPlan(
        stages=tuple(told),
        interruptions=sum(stage.interruptions or 0.0 for stage in told),
        extra_seconds=extra_s,
        seconds=total_seconds(stages, prices) + extra_s,
        extra_cost=extra_cost,
        cost=cost + extra_cost,
    )


def _chunk_seconds(load: Load) -> float:
    """How long an actor, or a decoder beside GPU actors, is at a chunk: the longer of the two."""
    forward_s = load.device_s / load.chunks / (load.each.gpus or load.each.cpus)
    decode_s = load.decode_s / load.chunks
    return max(forward_s, decode_s) if load.each.gpus > 0 else forward_s + decode_s / min(1.0, load.each.cpus)


def _repeated_seconds(load: Load, pool: int) -> float:
    """Half of what lies between two checkpoints."""
    return load.repeated_s / (pool * (load.each.gpus or load.each.cpus)) / 2
