from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import plan
from pu_ray.config import JobConfig, NetworkConfig, PreprocessingConfig
from pu_ray.errors import ConfigError

MakeJob = Callable[..., JobConfig]
MakeImages = Callable[[int, int], None]


@pytest.fixture(scope="module")
def prices() -> plan.Prices:
    return plan.load_prices()


def test_a_few_shards_are_counted(make_job: MakeJob, make_images: MakeImages) -> None:
    make_images(3, 25)
    lake = plan.measure_lake(make_job(lake={"uri": make_job().lake.uri, "chunk_rows": 10}))
    assert (lake.shards, lake.rows, lake.exact) == (3, 75, True)
    assert lake.chunks == 9


def test_many_shards_are_sampled_and_that_is_said(
    make_job: MakeJob, make_images: MakeImages, prices: plan.Prices
) -> None:
    make_images(45, 10)
    made = plan.make(make_job(), prices)
    assert made.lake is not None
    assert (made.lake.exact, made.lake.sampled_shards, made.lake.rows) == (False, 20, 450)
    assert "450 images (projected from 20 shards)" in plan.render(made)
    assert any("projected by bytes from 20 of 45 shards" in text for text in made.assumptions)


def test_operations_are_those_of_the_literature() -> None:
    # He et al.'s ResNet-18 in its CIFAR form has 557 million multiply-adds (METHOD, section 1).
    network = NetworkConfig(architecture="cifar/resnet18-w64")
    gflop = plan.gflop_per_image(network, PreprocessingConfig(size_px=32))
    assert gflop == pytest.approx(2 * 0.557, rel=0.01)


def test_a_plan_survives_json_and_shows_every_stage(
    make_job: MakeJob, make_images: MakeImages, prices: plan.Prices
) -> None:
    make_images(1, 20)
    made = plan.make(make_job(), prices)
    assert plan.Plan.model_validate_json(made.model_dump_json()) == made
    assert [stage.stage for stage in made.stages] == ["features", "distill"]
    assert made.exit_status == 0
    text = plan.render(made)
    for expected in ("20 images (counted)", "mining", "features", "distill", "USD", "placeholders"):
        assert expected in text


def test_the_paper_s_scorer_costs_a_fit_and_a_second_pass(
    make_job: MakeJob, make_images: MakeImages, prices: plan.Prices
) -> None:
    make_images(1, 20)
    made = plan.make(make_job(recipe="paper"), prices)
    assert [stage.stage for stage in made.stages] == ["features", "fit", "score", "distill"]


def test_more_actors_take_less_time_and_the_same_machine_hours(make_job: MakeJob, prices: plan.Prices) -> None:
    lake = plan.LakeSize(shards=1000, size_bytes=10**12, rows=10**8, chunks=10**5, exact=True, sampled_shards=1000)

    def features(actors: int) -> plan.StagePlan:
        job = make_job(resources={"embed": {"gpus": 1, "max_actors": actors}})
        return plan.estimate(job, prices, lake, 1000, 7.0, 3.0)[0]

    one, four = features(1), features(4)
    assert one.gpu_nodes == 1
    assert four.gpu_nodes == 4
    assert one.seconds == pytest.approx(4 * four.seconds, rel=0.01)
    assert one.cost == pytest.approx(one.seconds / 3600 * prices.nodes.gpu.price_per_hour, rel=0.01)


def test_decoding_gets_the_nodes_it_needs_to_keep_up(make_job: MakeJob, prices: plan.Prices) -> None:
    photos = plan.LakeSize(shards=1000, size_bytes=10**13, rows=10**7, chunks=10**5, exact=True, sampled_shards=1000)
    job = make_job(resources={"embed": {"gpus": 1, "max_actors": 1}})
    stage = plan.estimate(job, prices, photos, 1000, 7.0, 3.0)[0]
    assert stage.cpu_nodes > 0


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
def test_what_is_likely_mined(
    make_job: MakeJob, prices: plan.Prices, selection: dict[str, object], prior: object, expected: int
) -> None:
    lake = plan.LakeSize(shards=1, size_bytes=1, rows=10_000, chunks=1, exact=True, sampled_shards=1)
    assert plan.mined_images(make_job(selection=selection, scorer={"prior": prior}), prices, lake) == expected


def test_every_refusal_shows_at_once(make_job: MakeJob, tmp_path: Path, prices: plan.Prices) -> None:
    (tmp_path / "lake").mkdir()
    made = plan.make(make_job(student={"architecture": "cifar/resnet7-w1"}), prices)
    assert made.lake is None
    assert made.stages == ()
    assert len(made.refusals) == 3
    assert "the lake holds no images" in made.refusals[0]
    assert "labeled.uri" in made.refusals[1]
    assert "there is no residual network of this depth" in made.refusals[2]
    assert made.exit_status == 3
    assert "This job would be refused" in plan.render(made)
    assert made.needs


def test_a_wrong_price_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(plan.PRICES_FILE.read_text(encoding="utf-8").replace("gpus: 1", "gpus: 0"), encoding="utf-8")
    with pytest.raises(ConfigError, match="at least one GPU"):
        plan.load_prices(path)
    path.write_text("currency: EUR", encoding="utf-8")
    with pytest.raises(ConfigError, match="nodes"):
        plan.load_prices(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        plan.load_prices(tmp_path / "missing.yaml")
