from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loads import TABLE, a_pass, a_training, passes, trainings

from cluster import estimate, prices, spot
from cluster.estimate import Load
from cluster.prices import Spot


def plan_of(*work: Load) -> list[estimate.StagePlan]:
    return [estimate.plan_stage(load, load.pool, TABLE) for load in work]


def test_interruptions_of_a_pass_by_hand() -> None:
    # 20 actors on 2 nodes take 0.5 h. An interruption costs a node 360 s, and 360 s of the chunk: 0.2 h. At 0.1 per
    # node-hour 2 % of the time is lost: 0.5 h / 0.98.
    load = a_pass(pool=20)
    found = spot.reckon([load], plan_of(load), TABLE)
    assert found.stages[0].lost_s == 720
    assert found.extra_seconds == pytest.approx(1800 / 0.98 - 1800)
    assert found.seconds == pytest.approx(360 + 1800 / 0.98)
    assert found.interruptions == pytest.approx(0.1 * 2 * 0.5 / 0.98)
    # Two nodes at half of 1 EUR.
    assert found.cost == pytest.approx(0.5 / 0.98)
    assert found.extra_cost == pytest.approx(0.5 / 0.98 - 0.5)


def test_interruptions_of_a_training_by_hand() -> None:
    # 4 workers on 2 nodes take 2.5 h. A checkpoint every 900 s: an interruption of either node costs all 360 + 450 s.
    load = a_training()
    found = spot.reckon([load], plan_of(load), TABLE)
    assert found.stages[0].lost_s == 810
    share = 0.1 * 2 * 810 / 3600
    assert found.extra_seconds == pytest.approx(9000 * share / (1 - share))
    assert found.cost == pytest.approx(0.5 * 2 * 3 * 2.5 / (1 - share))


def test_interruptions_that_come_faster_than_the_work_end_nothing() -> None:
    table = TABLE.model_copy(update={"spot": Spot(price_frac=0.5, interruptions_per_node_hour=10)})
    found = spot.reckon([a_training()], plan_of(a_training()), table)
    assert (found.seconds, found.cost, found.stages[0].extra_seconds) == (None, None, None)


def test_no_interruptions_cost_nothing() -> None:
    table = TABLE.model_copy(update={"spot": Spot(price_frac=0.5, interruptions_per_node_hour=0)})
    found = spot.reckon([a_pass()], plan_of(a_pass()), table)
    assert (found.interruptions, found.extra_seconds, found.extra_cost) == (0, 0, 0)


@given(work=st.tuples(passes, trainings), first=st.floats(0, 5), second=st.floats(0, 5))
def test_more_interruptions_are_never_cheaper_or_faster(work: tuple[Load, Load], first: float, second: float) -> None:
    def at(rate: float) -> spot.SpotPlan:
        table = TABLE.model_copy(update={"spot": Spot(price_frac=0.5, interruptions_per_node_hour=rate)})
        return spot.reckon(work, plan_of(*work), table)

    rare, often = (at(rate) for rate in sorted((first, second)))
    never = math.inf
    for field in ("cost", "seconds", "interruptions", "extra_cost"):
        values = [getattr(found, field) for found in (rare, often)]
        less, more = (never if value is None else value for value in values)
        assert less <= more * (1 + 1e-12), field


def test_the_packaged_table_is_no_worse_on_spot_nodes() -> None:
    """At its own rate spot nodes stay cheaper for a pass, else the table would be a strange one."""
    table = prices.load()
    load = a_pass(pool=16)
    stages = [estimate.plan_stage(load, load.pool, table)]
    found = spot.reckon([load], stages, table)
    assert found.cost is not None
    assert found.cost < stages[0].cost
