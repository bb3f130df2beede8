from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import node_checks
from cluster.node_checks import Asked, NodeFacts

GIB = 2**30
FACTS = NodeFacts(
    node="10.0.0.7",
    versions=node_checks.versions(),
    storage_problem="",
    lake_problem="",
    gpus_promised=0.0,
    gpus_seen=0,
    clock_s=100.0,
    spill_free_bytes=50 * GIB,
    spill_size_bytes=100 * GIB,
)


def problems(*facts: NodeFacts, needs_gpus: bool = True) -> list[str]:
    return node_checks.problems([Asked(each, 99.0, 101.0) for each in facts], needs_gpus=needs_gpus)


def test_nodes_like_the_driver_have_no_problems() -> None:
    assert problems(FACTS, replace(FACTS, node="10.0.0.8", gpus_promised=2.0, gpus_seen=2)) == []


@pytest.mark.parametrize("name", ["python", "pu-ray", "ray", "torch", "pyarrow", "numpy"])
def test_another_version_is_named_with_the_driver_s(name: str) -> None:
    ours = node_checks.versions()[name]
    (found,) = problems(FACTS, replace(FACTS, node="10.0.0.8", versions=FACTS.versions | {name: "0.1"}))
    assert found == f"node 10.0.0.8 has {name} 0.1, the driver {ours}"
    (found,) = problems(replace(FACTS, versions=FACTS.versions | {name: ""}))
    assert f"has {name} missing" in found


def test_a_gpu_that_ray_gives_away_and_nobody_sees_is_a_problem_where_networks_need_it() -> None:
    blind = replace(FACTS, gpus_promised=1.0)
    (found,) = problems(blind)
    assert "promises 1 GPUs and has 0" in found
    assert problems(blind, needs_gpus=False) == []


@pytest.mark.parametrize(
    ("clock", "skew"), [(98.0, -1.0), (99.0, 0.0), (100.0, 0.0), (101.0, 0.0), (107.0, 6.0), (39.5, -59.5)]
)
def test_a_clock_is_off_only_by_what_the_way_there_and_back_cannot_explain(clock: float, skew: float) -> None:
    assert Asked(replace(FACTS, clock_s=clock), 99.0, 101.0).skew_s == pytest.approx(skew)
    assert problems(replace(FACTS, clock_s=clock)) == []


@pytest.mark.parametrize(("clock", "said"), [(162.0, "+61 s"), (38.0, "-61 s")])
def test_a_clock_a_minute_off_is_a_problem(clock: float, said: str) -> None:
    (found,) = problems(replace(FACTS, clock_s=clock))
    assert f"{said} off" in found


def test_a_disk_to_which_ray_would_spill_no_more_is_a_problem() -> None:
    (found,) = problems(replace(FACTS, spill_free_bytes=4 * GIB))
    assert "has 4 of 100 GiB free where Ray spills; under 5% it spills no more" in found
    assert problems(replace(FACTS, spill_free_bytes=5 * GIB)) == []


def test_this_machine_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    before = time.time()
    facts = node_checks.look("here", 0.0, str(tmp_path / "run"), str(tmp_path / "lake"))
    assert (facts.storage_problem, facts.lake_problem) == ("", "")
    assert before <= facts.clock_s <= time.time()
    assert 0 < facts.spill_free_bytes <= facts.spill_size_bytes
    assert list((tmp_path / "run").iterdir()) == []


def test_a_node_that_cannot_use_output_or_lake_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    facts = node_checks.look("here", 0.0, str(tmp_path / "file"), str(tmp_path / "nowhere"))
    assert facts.storage_problem
    assert facts.lake_problem == "nothing is there"
    found = problems(replace(facts, clock_s=100.0))
    assert any(text.startswith("node here cannot use the output: ") for text in found)
    assert "node here cannot read the lake: nothing is there" in found
    assert os.listdir(tmp_path) == ["file"]
