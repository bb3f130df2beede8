from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster import estimate, memory, prices
from cluster.estimate import ImageSeconds, LakeSize, NetworkSize
from cluster.memory import MemoryCheck
from cluster.prices import Prices
from pu_ray import lake_pass
from pu_ray.config import JobConfig
from pu_ray.errors import PuRayError

MakeJob = Callable[..., JobConfig]

GIB = 2**30
# A chunk of 2,048 images of 224 x 224 x 3 would be 294 MiB; that of 445 is just within the 64 MiB of a pass.
LAKE = LakeSize(
    shards=10,
    size_bytes=10_000 * 100_000,
    rows=10_000,
    chunks=100,
    most_chunks=100,
    chunk_rows=400,
    exact=True,
    sampled_shards=10,
)
SECONDS = ImageSeconds(teacher=0.01, decode=0.01, lesson=0.01, student=0.01, fit=0.01)
TEACHER = NetworkSize(gflop=4.0, parameter_bytes=GIB // 8, activation_bytes=2**20)


def check(job: JobConfig, table: Prices | None = None) -> tuple[MemoryCheck, list[PuRayError]]:
    table = table or prices.load()
    work = estimate.loads(job, table, LAKE, 10, SECONDS)
    stages = [estimate.plan_stage(load, load.pool, table) for load in work]
    return memory.check(job, table, LAKE, TEACHER, work, stages)


def with_nodes(cpu: dict[str, float], gpu: dict[str, float]) -> Prices:
    table = prices.load()
    nodes = table.nodes.model_copy(
        update={"cpu": table.nodes.cpu.model_copy(update=cpu), "gpu": table.nodes.gpu.model_copy(update=gpu)}
    )
    return table.model_copy(update={"nodes": nodes})


def test_constants_are_those_of_the_pass() -> None:
    assert memory.TASKS_IN_FLIGHT == lake_pass._TASKS_IN_FLIGHT
    assert memory.CALLS == lake_pass._CALLS


def test_a_cpu_actor_by_hand(make_job: MakeJob) -> None:
    found, refusals = check(make_job())
    (actor,) = found.processes
    # Of 32 x 32 x 3, in batches of 128, from a block of 400 images of 100 kB.
    assert actor.parts_gib["networks"] == pytest.approx(2 / 8)
    assert actor.parts_gib["activations"] == pytest.approx(3 * 128 / 1024, abs=1e-3)
    assert actor.parts_gib["blocks"] == pytest.approx((2 * 400 * 3072 + 400 * 100_000) / GIB, abs=1e-3)
    assert actor.needs_gib == pytest.approx(sum(actor.parts_gib.values()), abs=2e-3)
    assert refusals == []


def test_with_a_remote_output_two_blocks_are_at_work(make_job: MakeJob) -> None:
    near, far = (
        check(make_job(output=output))[0].processes[0].parts_gib["blocks"] for output in ("/runs/a", "s3://bucket/a")
    )
    assert far == pytest.approx(2 * near, abs=2e-3)


def test_an_actor_that_declares_too_little_is_a_warning(make_job: MakeJob) -> None:
    found, refusals = check(make_job(resources={"embed": {"memory_gib": 0.5}}))
    assert refusals == []
    (warning,) = found.warnings
    assert "an embedding actor needs about" in warning
    assert "declares 0.5: raise resources.embed.memory_gib" in warning


def test_enough_memory_is_no_warning(make_job: MakeJob) -> None:
    assert check(make_job())[0].warnings == ()


def test_a_gpu_node_holds_actors_decoders_and_blocks(make_job: MakeJob) -> None:
    job = make_job(resources={"embed": {"gpus": 1, "memory_gib": 4}})
    found, refusals = check(job, with_nodes({}, {"gpus": 2}))
    assert refusals == []
    assert [use.what for use in found.processes] == ["an embedding actor", "a decoding task"]
    assert found.processes[0].parts_gib["activations"] == 0, "a GPU keeps them"
    node = found.nodes[0]
    assert (node.node, node.actors) == ("gpu", 2)
    block_gib = 400 * 3072 / GIB
    assert node.store_gib == pytest.approx((2 * 2 * 4 + node.decoders) * block_gib, abs=1e-3)
    expected = 2 * found.processes[0].needs_gib + node.decoders * found.processes[1].needs_gib + node.store_gib
    assert node.needs_gib == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("resources", "where", "asked"),
    [
        ({"embed": {"memory_gib": 50}}, "resources.embed", "50 GiB memory"),
        ({"embed": {"cpus": 32}}, "resources.embed", "32 CPUs"),
        ({"embed": {"gpus": 2}}, "resources.embed", "2 GPUs"),
        ({"train": {"cpus": 64}}, "resources.train", "64 CPUs"),
        ({"embed": {"gpus": 1}, "decode": {"memory_gib": 60}}, "resources.decode", "60 GiB memory"),
    ],
)
def test_what_no_node_can_hold_is_refused(
    make_job: MakeJob, resources: dict[str, object], where: str, asked: str
) -> None:
    _, refusals = check(make_job(resources=resources))
    (refusal,) = refusals
    assert refusal.where == where
    assert asked in str(refusal.got)
    assert refusal.exit_status == 4
    assert "--prices" in str(refusal.hint)


def test_just_within_what_ray_hands_out_is_not_refused(make_job: MakeJob) -> None:
    # 70 % of 64 GiB.
    assert check(make_job(resources={"embed": {"memory_gib": 44.7}}))[1] == []
    (refusal,) = check(make_job(resources={"embed": {"memory_gib": 44.9}}))[1]
    assert "44.8 GiB memory (of 64:" in str(refusal.allowed)


def test_a_node_that_would_run_out_is_refused_with_the_sum(make_job: MakeJob) -> None:
    # Ray would place 8 actors that declare 0.1 GiB on a node of 4 GiB, where each needs about 0.98.
    job = make_job(resources={"embed": {"memory_gib": 0.1, "max_actors": 8}})
    found, refusals = check(job, with_nodes({"memory_gib": 4}, {}))
    assert found.nodes[0].needs_gib > 4
    (refusal,) = refusals
    assert "would run out of memory" in str(refusal)
    assert "8 x" in str(refusal.got)
    assert "resources.embed.memory_gib" in str(refusal.hint)
    honest = make_job(resources={"embed": {"memory_gib": 1.2, "max_actors": 8}})
    assert check(honest, with_nodes({"memory_gib": 4}, {}))[1] == []


def test_an_object_store_that_overflows_is_a_warning(make_job: MakeJob) -> None:
    pixels = {"architecture": "cifar/resnet18-w64", "weights": "w", "classes": "c", "preprocessing": {"size_px": 400}}
    job = make_job(teacher=pixels, resources={"embed": {"gpus": 1, "max_actors": 4, "memory_gib": 1}})
    # Four blocks in flight for each of four actors, 183 MiB each; 30 % of 8 GiB is the object store.
    found, _ = check(job, with_nodes({}, {"gpus": 4, "memory_gib": 8}))
    assert any("do not fit into its object store (2.4 GiB)" in warning for warning in found.warnings)
    roomy, _ = check(job, with_nodes({}, {"gpus": 4, "memory_gib": 64}))
    assert not any("object store" in warning for warning in roomy.warnings)
