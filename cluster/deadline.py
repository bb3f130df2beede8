"""Pools with which a plan ends in time, or what forbids it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from cluster.estimate import Load, StagePlan, duration, fits, plan_stage, seconds, total_seconds
from cluster.prices import Prices, Table

_NEAR_FRAC = 0.02
_WORTH_NAMING_FRAC = 0.1
_SEARCH_STEPS = 100  # halvings of an interval: beyond the precision of a float


class Setting(Table):
    """A setting that a deadline wants changed.

    Attributes:
        setting: Its dotted path.
        value: What it should be.
        now: What the job says.
    """

    setting: str
    value: int
    now: int


class DeadlinePlan(Table):
    """The pools with which the whole plan ends in time.

    Attributes:
        hours: Until when, nodes' start included.
        met: Whether that can be done.
        seconds: What it takes with these pools; where it is not met, within a fiftieth of the least.
        cost: With these pools.
        stages: With these pools.
        settings: What to change in the job.
        limits: Where it is not met: what stands in the way, and what would help.
    """

    hours: float
    met: bool
    seconds: float
    cost: float
    stages: tuple[StagePlan, ...]
    settings: tuple[Setting, ...]
    limits: tuple[str, ...]


def meet(work: Sequence[Load], prices: Prices, hours: float) -> DeadlinePlan:
    """The smallest pools with which the whole plan ends in time.

    Every stage gets as many actors or workers as fit on the same number of nodes, of whatever kind it uses, within the
    stage's bounds: chunks bound actors, the job's own settings bound workers, because their number is the user's choice
    (batch size, what a worker keeps on its disk). The smallest such number, fractions of a node allowed, is searched.

    Args:
        work: See `loads`, with `finest`.
        prices: For the nodes and their start.
        hours: Above 0.
    """
    budget_s = 3600 * hours - prices.start_s
    pools = _smallest(work, prices, budget_s, _bounded)
    met = pools is not None
    if pools is None:
        # Near a bound many nodes save a second: those that come close to the fastest tell more.
        fastest_s = sum(seconds(load, _bounded(load)) for load in work)
        pools = _smallest(work, prices, (1 + _NEAR_FRAC) * fastest_s, _bounded)
        assert pools is not None
    stages = tuple(plan_stage(load, pool, prices) for load, pool in zip(work, pools, strict=True))
    return DeadlinePlan(
        hours=hours,
        met=met,
        seconds=total_seconds(stages, prices),
        cost=round(sum(stage.cost for stage in stages), 2),
        stages=stages,
        settings=_settings(work, pools) if met else (),
        limits=() if met else tuple(_limits(work, prices, hours)),
    )


def _bounded(load: Load) -> int:
    """The largest pool that a deadline may ask for."""
    return load.pool if load.trains else max(load.fewest, load.most)


def _smallest(work: Sequence[Load], prices: Prices, budget_s: float, bound: Callable[[Load], int]) -> list[int] | None:
    """Pools that fit on the fewest nodes and end within the budget; None where there are none."""
    rooms = [fits(prices.nodes.gpu if load.each.gpus > 0 else prices.nodes.cpu, load.each) for load in work]

    def pools(nodes: float) -> list[int]:
        return [
            max(load.fewest, min(bound(load), math.ceil(nodes * room))) for load, room in zip(work, rooms, strict=True)
        ]

    def in_time(sizes: Sequence[int]) -> bool:
        return sum(seconds(load, size) for load, size in zip(work, sizes, strict=True)) <= budget_s

    low, high = 0.0, max(bound(load) / room for load, room in zip(work, rooms, strict=True))
    if not in_time(pools(high)):
        return None
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if in_time(pools(middle)) else (middle, high)
    return pools(high)


def _settings(work: Sequence[Load], pools: Sequence[int]) -> tuple[Setting, ...]:
    wanted: dict[str, int] = {}
    for load, pool in zip(work, pools, strict=True):
        wanted[load.setting] = max(pool, wanted.get(load.setting, 0))
    now = {load.setting: load.pool for load in work}
    return tuple(
        Setting(setting=setting, value=value, now=now[setting])
        for setting, value in wanted.items()
        if value != now[setting]
    )


def _limits(work: Sequence[Load], prices: Prices, hours: float) -> list[str]:
    """What stands between the plan and its deadline, the longest first, and what would help."""
    budget_s = 3600 * hours - prices.start_s
    if budget_s <= 0:
        return [f"nodes take {duration(prices.start_s)} to start (start_s), and there are {duration(3600 * hours)}"]
    found = []
    least_s = {load.stage: seconds(load, _bounded(load)) for load in work}
    for load in sorted(work, key=lambda load: -least_s[load.stage]):
        if least_s[load.stage] < _WORTH_NAMING_FRAC * sum(least_s.values()):
            break
        pool = _bounded(load)
        unit = load.unit if pool != 1 else load.unit.removesuffix("s")
        takes = f"{load.stage} takes {duration(least_s[load.stage])} with {pool:,} {unit}"
        if load.trains:
            found.append(f"{takes}, the most that {load.setting} allows")
        else:
            found.append(f"{takes}: more find no work among {load.chunks:,} chunks (smaller row groups or tars)")
    possible = _smallest(work, prices, budget_s, lambda load: load.most)
    if possible is None:
        fastest = prices.start_s + sum(seconds(load, load.most) for load in work)
        found.append(
            f"no pool is large enough: with all the workers that a batch can feed it takes {duration(fastest)}"
        )
    else:
        changes = ", ".join(
            f"{change.setting} = {change.value:,} (now {change.now:,})" for change in _settings(work, possible)
        )
        found.append(f"it would be met with {changes}")
    return found
