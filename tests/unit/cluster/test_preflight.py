from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import growth, preflight
from cluster.preflight import CPU, GPU, MEMORY, Capacity
from pu_ray.config import JobConfig
from pu_ray.errors import ClusterError

GIB = 2**30
MakeJob = Callable[..., JobConfig]


def capacity(*nodes: dict[str, float], may_grow: bool = False) -> Capacity:
    total: dict[str, float] = {}
    for node in nodes:
        for resource, amount in node.items():
            total[resource] = total.get(resource, 0.0) + amount
    return Capacity(total, nodes, may_grow)


def test_mining_needs_its_actors_and_a_free_slot_to_read_and_to_write(make_job: MakeJob) -> None:
    embed = {"cpus": 2, "gpus": 0, "min_actors": 3, "max_actors": 9, "memory_gib": 1.5}
    resources = {
        "embed": embed,
        "decode": {"cpus": 0.5, "memory_gib": 0.25},
        "write": {"cpus": 0.5, "memory_gib": 0.125},
    }
    mining, _ = preflight.required(make_job(resources=resources))
    assert mining.stage == "mining"
    assert mining.total == {CPU: 3 * 2 + 0.5 + 0.5, MEMORY: (3 * 1.5 + 0.25 + 0.125) * GIB}
    assert mining.cpus == 7


def test_training_needs_its_fewest_workers_and_one_cpu(make_job: MakeJob) -> None:
    job = make_job(resources={"train": {"cpus": 2, "gpus": 1}}, distill={"workers": [2, 8]})
    _, distill = preflight.required(job)
    assert distill.total == {CPU: 2 * 2 + 1, GPU: 2}


def test_enough_is_enough(make_job: MakeJob) -> None:
    requirements = preflight.required(make_job())
    assert preflight.shortages(requirements, capacity({CPU: 3, MEMORY: 3 * GIB})) == []


def test_a_shortage_tells_stage_needed_available_and_setting(make_job: MakeJob) -> None:
    requirements = preflight.required(make_job())
    (text,) = preflight.shortages(requirements, capacity({CPU: 2, MEMORY: 3 * GIB}))
    assert text.startswith("mining needs 2.25 CPU at once (1 embedding actors x 1 CPU + ")
    assert "the cluster has 2 CPU: lower resources.embed or resources.decode or resources.write" in text


def test_memory_counts(make_job: MakeJob) -> None:
    (text,) = preflight.shortages(preflight.required(make_job()), capacity({CPU: 8, MEMORY: GIB}))
    assert "mining needs 2.75 GiB memory" in text
    assert "has 1 GiB memory" in text


def test_a_total_spread_over_nodes_of_which_none_is_big_enough_is_too_little(make_job: MakeJob) -> None:
    requirements = preflight.required(make_job(resources={"train": {"cpus": 4}}))
    small: dict[str, float] = {CPU: 2, MEMORY: 4 * GIB}
    (text,) = preflight.shortages(requirements, capacity(small, small, small))
    assert text == (
        "distill: no single node has the 4 CPU that one of the training workers needs: "
        "lower resources.train or distill.workers"
    )


def test_a_fixed_cluster_that_is_too_small_is_refused(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "capacity_now", lambda: capacity({CPU: 8, MEMORY: 8 * GIB}))
    job = make_job(resources={"embed": {"gpus": 1}})
    with pytest.raises(ClusterError, match="would wait forever") as raised:
        preflight.check(job)
    assert "mining needs 1 GPU at once (1 embedding actors x 1 GPU), the cluster has 0 GPU" in str(raised.value)
    assert "Ray sees no GPU" in str(raised.value.hint)


def test_a_cluster_that_grows_is_waited_for(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "capacity_now", lambda: capacity({CPU: 0}, may_grow=True))
    monkeypatch.setattr(growth, "refused", lambda wanted: [])
    report = preflight.check(make_job(), every_node=False)
    assert any(text.startswith("mining needs 2.25 CPU") for text in report.waiting_for)


def test_what_the_autoscaler_could_never_place_is_refused_and_the_rest_not_asked_for(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "capacity_now", lambda: capacity({CPU: 8, MEMORY: 8 * GIB}, may_grow=True))
    asked = []

    def refused(wanted: list[dict[str, float]]) -> list[dict[str, float]]:
        asked.extend(wanted)
        return wanted

    monkeypatch.setattr(growth, "refused", refused)
    job = make_job(resources={"embed": {"gpus": 2, "cpus": 1, "memory_gib": 3}})
    with pytest.raises(ClusterError, match="wait forever") as raised:
        preflight.check(job, every_node=False)
    assert asked == [{CPU: 1, GPU: 2, MEMORY: 3 * GIB}]
    assert "one of the embedding actors needs 1 CPU, 2 GPU, 3 GiB memory on one node" in str(raised.value)


def test_the_output_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    preflight.probe_output(str(tmp_path / "new" / "run"))
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ClusterError, match="could not be written, read back and deleted") as raised:
        preflight.probe_output(str(tmp_path / "file"))
    assert raised.value.where == f"output ({tmp_path}/file)"
