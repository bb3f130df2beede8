from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loads import TABLE, a_pass, a_training, passes, trainings

from cluster import deadline, estimate
from cluster.estimate import Load


def test_a_deadline_by_hand() -> None:
    # 36,000 core-seconds and 36,000 GPU-seconds of at most 4 workers. Of 3 h, 0.1 h goes to the start. Distillation
    # takes 2.5 h with its 4 workers on 2 nodes, and 0.4 h are left for embedding: 25 actors, on 2.5 nodes.
    found = deadline.meet([a_pass(), a_training()], TABLE, 3.0)
    assert found.met
    assert [stage.pool for stage in found.stages] == [25, 4]
    assert [(stage.cpu_nodes, stage.gpu_nodes) for stage in found.stages] == [(3, 0), (0, 2)]
    assert found.seconds == pytest.approx(360 + 1440 + 9000)
    assert [(change.setting, change.value, change.now) for change in found.settings] == [
        ("resources.embed.max_actors", 25, 2)
    ]
    assert found.limits == ()


def test_all_stages_get_the_same_number_of_nodes() -> None:
    # On n nodes 10 n actors take 1/n h, 2 n workers 5/n h: 6/n within 7.9 - 0.1... and n = 1 has 6 h.
    found = deadline.meet([a_pass(), a_training()], TABLE, 6.1)
    assert [stage.pool for stage in found.stages] == [10, 2]
    assert {change.setting: change.value for change in found.settings} == {
        "resources.embed.max_actors": 10,
        "distill.workers": 2,
    }


def test_a_deadline_far_away_needs_one_of_each() -> None:
    found = deadline.meet([a_pass(), a_training()], TABLE, 1000.0)
    assert [stage.pool for stage in found.stages] == [1, 1]


def test_a_fixed_number_of_workers_stays() -> None:
    found = deadline.meet([a_training(fewest=4)], TABLE, 1000.0)
    assert found.stages[0].pool == 4
    assert found.settings == ()


def test_a_deadline_that_the_workers_forbid_says_which_setting_would_do() -> None:
    found = deadline.meet([a_pass(), a_training()], TABLE, 1.1)
    assert not found.met
    assert found.settings == ()
    assert found.limits[0] == "distill takes 2.5 h with 4 workers, the most that distill.workers allows"
    # 6/n h within 1 h: 6 nodes, 60 actors and 12 workers.
    assert found.limits[-1] == (
        "it would be met with resources.embed.max_actors = 60 (now 2), distill.workers = 12 (now 4)"
    )
    assert found.seconds > 1.1 * 3600


def test_a_deadline_that_the_chunks_forbid_says_so() -> None:
    found = deadline.meet([a_pass(chunks=20, most=20), a_training()], TABLE, 0.35)
    assert not found.met
    assert any("features takes 30 min with 20 actors: more find no work among 20 chunks" in t for t in found.limits)
    assert found.limits[-1].startswith("no pool is large enough")


def test_a_deadline_before_the_nodes_are_up_says_so() -> None:
    found = deadline.meet([a_pass()], TABLE, 0.05)
    assert not found.met
    assert found.limits == ("nodes take 6 min to start (start_s), and there are 3 min",)


@given(work=st.tuples(passes, trainings), first=st.floats(0.2, 500), second=st.floats(0.2, 500))
def test_an_earlier_deadline_never_needs_less(work: tuple[Load, Load], first: float, second: float) -> None:
    earlier, later = (deadline.meet(work, TABLE, hours) for hours in sorted((first, second)))
    if not earlier.met:
        return
    assert later.met
    assert earlier.seconds <= 3600 * earlier.hours + 0.5
    for soon, late in zip(earlier.stages, later.stages, strict=True):
        assert soon.pool >= late.pool
        assert soon.gpu_nodes >= late.gpu_nodes
        if not soon.gpu_nodes:
            assert soon.cpu_nodes >= late.cpu_nodes


@given(work=st.tuples(passes, trainings), hours=st.floats(0.2, 500))
def test_no_node_less_would_do(work: tuple[Load, Load], hours: float) -> None:
    found = deadline.meet(work, TABLE, hours)
    pools = [stage.pool for stage in found.stages]
    assume_larger = [pool > load.fewest for pool, load in zip(pools, work, strict=True)]
    if not found.met or not all(assume_larger):
        return
    fewer = [pool - 1 for pool in pools]
    assert TABLE.start_s + sum(map(estimate.seconds, work, fewer)) > 3600 * hours - 1e-6
