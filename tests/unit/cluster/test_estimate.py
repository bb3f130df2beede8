from __future__ import annotations

from collections.abc import Callable

import pytest
from loads import TABLE, a_pass

from cluster import estimate
from cluster.estimate import Each, ImageSeconds, LakeSize, Measured, NetworkSize
from pu_ray.config import JobConfig, NetworkConfig, PreprocessingConfig

MakeJob = Callable[..., JobConfig]

TEACHER = NetworkSize(gflop=2.0, parameter_bytes=1, activation_bytes=1)
STUDENT = NetworkSize(gflop=1.0, parameter_bytes=1, activation_bytes=1)


def lake_of(rows: int = 3_600_000, chunks: int = 1000, most_chunks: int = 4000, size_bytes: int = 0) -> LakeSize:
    return LakeSize(
        shards=10,
        size_bytes=size_bytes,
        rows=rows,
        chunks=chunks,
        most_chunks=most_chunks,
        chunk_rows=100,
        exact=True,
        sampled_shards=10,
    )


# -- networks ----------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_literature() -> None:
    # He et al.'s ResNet-18 in its CIFAR form has 557 million multiply-adds (METHOD, section 1).
    size = estimate.network_size(NetworkConfig(architecture="cifar/resnet18-w64"), PreprocessingConfig(size_px=32))
    assert size.gflop == pytest.approx(2 * 0.557, rel=0.01)
    # Its first convolution keeps the resolution: 64 channels of 32 x 32 floats, as large as any later layer.
    assert size.activation_bytes == 64 * 32 * 32 * 4


def test_parameters_are_those_of_the_literature() -> None:
    size = estimate.network_size(NetworkConfig(architecture="torchvision/resnet18"), PreprocessingConfig())
    # 11.69 million parameters (torchvision's table), and the running statistics of 20 normalisations.
    assert size.parameter_bytes == pytest.approx(4 * 11.69e6, rel=0.002)
    assert size.activation_bytes == 64 * 112 * 112 * 4


# -- what there is to do -----------------------------------------------------------------------------------


def test_seconds_per_image_by_hand(make_job: MakeJob) -> None:
    lake = lake_of(rows=1000, size_bytes=50_000_000)  # 50 kB each, at 10 MB/s 5 ms
    job = make_job(resources={"embed": {"gpus": 1}})
    found = estimate.image_seconds(job, TABLE, lake, TEACHER, STUDENT, None)
    expected = ImageSeconds(teacher=0.002, decode=0.005, lesson=0.2, student=0.3, fit=0.6)
    assert vars(found) == pytest.approx(vars(expected))


def test_small_images_take_more_than_their_bytes(make_job: MakeJob) -> None:
    rates = TABLE.rates.model_copy(update={"image_us": 200.0})
    table = TABLE.model_copy(update={"rates": rates})
    found = estimate.image_seconds(make_job(), table, lake_of(size_bytes=1), TEACHER, STUDENT, None)
    assert found.decode == pytest.approx(200e-6, rel=1e-3)


def test_what_was_measured_replaces_the_table(make_job: MakeJob) -> None:
    measured = Measured(
        images=10,
        broken=0,
        encoded_bytes=1,
        read_mb_per_s=1,
        decode_images_per_s=100,
        decode_mb_per_s=1,
        device="core",
        teacher_images=10,
        teacher_images_per_s=40,
    )
    found = estimate.image_seconds(make_job(), TABLE, lake_of(), TEACHER, STUDENT, measured)
    assert (found.decode, found.teacher, found.lesson) == pytest.approx((0.01, 0.025, 0.025))
    assert found.student == pytest.approx(0.3), "nobody trained anything"
    # A core says nothing about the GPU that distils.
    on_gpu = make_job(resources={"train": {"gpus": 1}})
    assert estimate.image_seconds(on_gpu, TABLE, lake_of(), TEACHER, STUDENT, measured).lesson == pytest.approx(0.002)
    nothing = measured.model_copy(update={"teacher_images_per_s": None})
    assert estimate.image_seconds(make_job(), TABLE, lake_of(), TEACHER, STUDENT, nothing).teacher == pytest.approx(0.2)


SECONDS = ImageSeconds(teacher=0.01, decode=0.001, lesson=0.02, student=0.03, fit=0.05)


@pytest.mark.parametrize(
    ("sections", "stages"),
    [
        ({}, {"features": 36_000, "distill": 128 * 50}),
        # The paper's scorer: a fit, and a second pass with the teacher and a trunk of its size.
        ({"recipe": "paper", "distill": {"max_steps": 50}}, {"features": 36_000, "fit": None, "score": 72_000}),
        # Without the cache 1.25 times the sample is embedded, and the lake is scored from its images.
        ({"features": {"cache": False}}, {"features": 250, "score": 36_000}),
        ({"distill": {"soft_labels": "cached", "max_steps": 50, "crops": 4}}, {"soft_labels": 360_100 * 4 / 100}),
    ],
)
def test_stages_and_their_device_seconds(
    make_job: MakeJob, sections: dict[str, object], stages: dict[str, float | None]
) -> None:
    job = make_job(**({"distill": {"max_steps": 50}} | sections))
    work = {load.stage: load for load in estimate.loads(job, TABLE, lake_of(), 100, SECONDS)}
    for stage, device_s in stages.items():
        if stage == "distill":
            assert work[stage].images == device_s
            assert work[stage].device_s == pytest.approx(work[stage].images * 0.05)
        elif device_s is not None:
            assert work[stage].device_s == pytest.approx(device_s)
    order = [name for name in ("features", "fit", "score", "soft_labels", "distill") if name in work]
    assert list(work) == order
    assert ("fit" in work) == ("fit" in stages)
    if "soft_labels" in stages:
        assert work["distill"].device_s == pytest.approx(work["distill"].images * 0.03), "no teacher in the loop"


def test_the_finest_cut_is_reckoned_with_when_asked(make_job: MakeJob) -> None:
    cuts = [estimate.loads(make_job(), TABLE, lake_of(), 1, SECONDS, finest=finest)[0].most for finest in (False, True)]
    assert cuts == [1000, 4000]


def test_more_gpus_than_decoding_can_feed_are_of_no_use(make_job: MakeJob) -> None:
    job = make_job(resources={"embed": {"gpus": 1}})
    seconds = ImageSeconds(teacher=0.001, decode=0.02, lesson=0.0, student=0.0, fit=0.0)
    load = estimate.loads(job, TABLE, lake_of(rows=100_000, chunks=100), 1, seconds)[0]
    # 100 decoders take 20 s for what one GPU sees in 100 s.
    assert load.most == 5
    assert estimate.seconds(load, 5) == pytest.approx(20)
    assert estimate.seconds(load, 50) == pytest.approx(20)


@pytest.mark.parametrize(
    ("selection", "prior", "expected"),
    [
        ({}, "auto", 1000),
        ({}, 0.3, 3000),
        ({"budget": 500}, 0.3, 500),
        ({"rule": "budget", "budget": 5000}, 0.3, 5000),
        ({"rule": "random", "budget": 50_000}, 0.3, 10_000),
    ],
)
def test_what_is_likely_mined(make_job: MakeJob, selection: dict[str, object], prior: object, expected: int) -> None:
    job = make_job(selection=selection, scorer={"prior": prior})
    assert estimate.mined_images(job, TABLE, lake_of(rows=10_000)) == expected


# -- time and nodes ----------------------------------------------------------------------------------------


def test_a_cpu_actor_decodes_what_it_embeds() -> None:
    # 4 actors of 2 cores: 36,000 / 8 s of the network, and decoding on one core of each.
    load = a_pass(each=Each(2.0, 0.0, 2.0), decode_s=400.0)
    assert estimate.seconds(load, 4) == pytest.approx(4500 + 100)
    assert estimate.decoders(load, 4) == 0


def test_more_actors_than_chunks_are_idle() -> None:
    assert estimate.seconds(a_pass(), 500) == estimate.seconds(a_pass(), 100) == pytest.approx(360)


def test_a_stage_by_hand() -> None:
    # 5 GPUs take 2 h, and 30 decoders keep up. 3 nodes of 2 GPUs have 30 - 5 cores left: 5 decoders need one node more.
    load = a_pass(each=Each(1.0, 1.0, 2.0), decode_s=30 * 7200.0, pool=5)
    found = estimate.plan_stage(load, 5, TABLE)
    assert (found.seconds, found.decoders, found.gpu_nodes, found.cpu_nodes) == (7200, 30, 3, 1)
    assert found.gpu_hours == 10
    assert found.cpu_hours == (5 + 30) * 2
    assert found.cost == (3 * 3 + 1) * 2


def test_a_node_holds_what_its_memory_holds() -> None:
    # Ray hands out 70 of 100 GiB: two actors of 30, not ten.
    found = estimate.plan_stage(a_pass(each=Each(1.0, 0.0, 30.0)), 10, TABLE)
    assert found.cpu_nodes == 5
    assert estimate.fits(TABLE.nodes.cpu, Each(1.0, 0.0, 140.0)) == pytest.approx(0.5)


def test_more_actors_take_less_time_and_the_same_gpu_hours() -> None:
    load = a_pass(each=Each(1.0, 1.0, 2.0))
    one, four = estimate.plan_stage(load, 1, TABLE), estimate.plan_stage(load, 4, TABLE)
    assert one.seconds == 4 * four.seconds
    assert one.gpu_hours == four.gpu_hours == 10
    assert (one.gpu_nodes, four.gpu_nodes) == (1, 2)
