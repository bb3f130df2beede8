from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster import calibrate, plan, prices
from cluster.estimate import Measured
from pu_ray import cli, lake
from pu_ray.config import JobConfig
from pu_ray.errors import ConfigError, DataError
from pu_ray.progress import Silent

MakeJob = Callable[..., JobConfig]
MakeImages = Callable[[int, int], None]

MEASURED = Measured(
    images=512,
    broken=3,
    encoded_bytes=1000,
    read_mb_per_s=5.0,
    decode_images_per_s=800.0,
    decode_mb_per_s=30.0,
    device="core",
    teacher_images=256,
    teacher_images_per_s=40.0,
)


@pytest.fixture(scope="module")
def table() -> prices.Prices:
    return prices.load()


def test_a_few_shards_are_counted(make_job: MakeJob, make_images: MakeImages) -> None:
    make_images(3, 25)
    job = make_job(lake={"uri": make_job().lake.uri, "chunk_rows": 10})
    found = plan.measure_lake(job, lake.list_shards(job.lake))
    assert (found.shards, found.rows, found.exact) == (3, 75, True)
    assert (found.chunks, found.most_chunks, found.chunk_rows) == (9, 9, 10)


@pytest.fixture
def coarse(make_images: MakeImages, tmp_path: Path) -> None:
    """Two shards of 1,000 images of 1 kB in row groups of ten."""
    make_images(0, 0)
    for shard in range(2):
        content = [np.random.default_rng([shard, row]).bytes(1000) for row in range(1000)]
        table = pa.table({"bytes": pa.array(content, pa.large_binary())})
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pq.write_table(table, tmp_path / "lake" / f"{shard}.parquet", row_group_size=10, **plain)


@pytest.mark.usefixtures("coarse")
def test_a_larger_pool_would_get_a_finer_cut(make_job: MakeJob) -> None:
    job = make_job()
    shards = lake.list_shards(job.lake)
    found = plan.measure_lake(job, shards, finest=True)
    # 2 MB for 8 units of two actors each are 12 row groups of 10 kB a unit; in the least, 64 KiB, there are six.
    assert found.chunks == 2 * -(-100 // 12)
    assert found.most_chunks == 2 * -(-100 // 6)
    assert plan.measure_lake(job, shards).most_chunks == found.chunks, "nobody asked"


@pytest.mark.usefixtures("coarse")
def test_a_deadline_reckons_with_that_cut(make_job: MakeJob, table: prices.Prices) -> None:
    job = make_job(distill={"max_steps": 1, "batch_size": 2})
    # 2,000 images of 1.11 GFLOP take a core 112 s: in 4 s they need some 28 actors, more than the 18 chunks of today.
    made = plan.make(job, table, Silent(), deadline_hours=(table.start_s + 4.2) / 3600)
    assert made.lake is not None
    assert made.deadline is not None
    assert made.deadline.met
    assert 26 <= made.deadline.stages[0].pool <= 30
    assert made.lake.chunks == 18


def test_many_shards_are_sampled_and_that_is_said(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices
) -> None:
    make_images(45, 10)
    made = plan.make(make_job(), table, Silent())
    assert made.lake is not None
    assert (made.lake.exact, made.lake.sampled_shards, made.lake.rows) == (False, 20, 450)
    assert "450 images (projected from 20 shards)" in plan.render(made)
    assert any("projected by bytes from 20 of 45 shards" in text for text in made.assumptions)


def test_a_plan_survives_json_and_shows_every_stage(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices
) -> None:
    make_images(1, 20)
    made = plan.make(make_job(), table, Silent(), deadline_hours=2)
    assert plan.Plan.model_validate_json(made.model_dump_json()) == made
    assert [stage.stage for stage in made.stages] == ["features", "distill"]
    assert made.exit_status == 0
    assert made.cpu_hours == pytest.approx(sum(stage.cpu_hours for stage in made.stages), abs=1e-3)
    text = plan.render(made)
    for expected in ("20 images (counted)", "mining", "features", "distill", "USD", "placeholders", "on spot nodes"):
        assert expected in text
    assert max(len(line) for line in text.splitlines()[1:]) <= 100


def test_the_job_s_own_pools_stay_whatever_the_deadline(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices
) -> None:
    make_images(2, 1000)
    job = make_job(distill={"epochs": 1, "workers": [1, 4]})
    without, late = (plan.make(job, table, Silent(), deadline_hours=hours) for hours in (None, 100))
    assert without.stages == late.stages
    assert without.deadline is None
    assert late.deadline is not None
    assert late.deadline.met
    text = plan.render(late)
    assert "deadline 100 h: met with these pools (the job as it is ends in time)" in text
    assert "distill.workers = 1 would do (now 4)" in text


def test_a_deadline_that_cannot_be_met_says_by_what(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices
) -> None:
    make_images(2, 1000)
    job = make_job(distill={"epochs": 200, "workers": 1}, student={"architecture": "torchvision/resnet18"})
    made = plan.make(job, table, Silent(), deadline_hours=0.15)
    assert made.exit_status == 0, "the job itself would run"
    text = plan.render(made)
    assert "deadline 0.15 h: CANNOT BE MET" in text
    assert "with 1 worker, the most that distill.workers allows" in text
    assert "it would be met with" in text


def test_a_deadline_that_only_on_demand_nodes_meet_is_a_warning_there(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices
) -> None:
    make_images(2, 1000)
    flaky = table.model_copy(update={"spot": prices.Spot(price_frac=0.5, interruptions_per_node_hour=3)})
    job = make_job(distill={"epochs": 200, "workers": [1, 64]}, student={"architecture": "torchvision/resnet18"})
    text = plan.render(plan.make(job, flaky, Silent(), deadline_hours=0.5))
    assert "on spot nodes the expected end is after the deadline" in text


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deadline_that_is_none_is_refused_before_anything_is_looked_at(
    make_job: MakeJob, table: prices.Prices, hours: float
) -> None:
    with pytest.raises(ConfigError, match="a number of hours above 0"):
        plan.make(make_job(), table, Silent(), deadline_hours=hours)


def test_what_was_measured_is_reckoned_with_and_said(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(1, 400)
    monkeypatch.setattr(calibrate, "measure", lambda *_: MEASURED)
    job = make_job(resources={"embed": {"max_actors": 1}})
    made = plan.make(job, table, Silent(), calibrated=True)
    assert made.measured == MEASURED
    # 400 images at 40/s, and at 800/s on the same core.
    assert made.stages[0].seconds == pytest.approx(10 + 0.5)
    text = plan.render(made)
    assert "measured here on 512 images" in text
    assert "measured here on 256 images" in text
    assert any("the storage gave 5 MB/s" in assumption for assumption in made.assumptions)
    assert plan.make(job, table, Silent()).stages[0].seconds != made.stages[0].seconds


def test_a_teacher_that_was_not_measured_is_the_table_s_and_that_is_said(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(1, 20)
    none = {"device": None, "teacher_images": 0, "teacher_images_per_s": None}
    monkeypatch.setattr(calibrate, "measure", lambda *_: MEASURED.model_copy(update=none))
    made = plan.make(make_job(resources={"embed": {"gpus": 1}}), table, Silent(), calibrated=True)
    assert {rate.what: rate.source for rate in made.rates}["teacher"] == "table"
    assert any("no GPU here" in assumption for assumption in made.assumptions)


def test_what_cannot_be_measured_is_a_refusal_among_the_others(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices
) -> None:
    make_images(1, 20)
    made = plan.make(make_job(), table, Silent(), calibrated=True)  # its images are no images
    assert made.exit_status == DataError.exit_status
    assert "nothing can be measured" in made.refusals[0]
    assert made.stages, "the table's rates are still there"


def test_the_listing_is_shown(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(2, 10)
    listed = lake.list_shards
    told: list[int] = []

    class Listening(Silent):
        def found(self, files: int) -> None:
            told.append(files)

    def slow(settings: object, on_progress: Callable[[int], None] | None = None) -> object:
        assert on_progress is not None
        on_progress(7)
        return listed(settings, on_progress)  # type: ignore[arg-type]

    monkeypatch.setattr(lake, "list_shards", slow)
    plan.make(make_job(), table, Listening())
    assert told[0] == 7


def test_every_refusal_shows_at_once(make_job: MakeJob, tmp_path: Path, table: prices.Prices) -> None:
    (tmp_path / "lake").mkdir()
    made = plan.make(make_job(student={"architecture": "cifar/resnet7-w1"}), table, Silent(), deadline_hours=1)
    assert made.lake is None
    assert made.stages == ()
    assert made.deadline is None
    teacher, lake_, labeled, test, student = made.refusals
    assert "classes.txt" in teacher
    assert lake_.startswith("(data/lake-without-images) ")
    assert "the lake holds no images" in lake_
    assert "labeled.uri" in labeled
    assert "test.uri" in test
    assert "there is no residual network of this depth" in student
    assert made.exit_status == 3
    assert "This job would be refused" in plan.render(made)
    assert made.needs


@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_that_are_not_there_are_refused_once(
    make_job: MakeJob,
    make_images: MakeImages,
    table: prices.Prices,
    tmp_path: Path,
    calibrated: bool,
) -> None:
    make_images(1, 20)
    (tmp_path / "teacher.safetensors").unlink()
    [refusal] = plan.make(make_job(), table, Silent(), calibrated=calibrated).refusals
    assert refusal.startswith(
        f"(data/no-weights) teacher.weights ({tmp_path}/teacher.safetensors): there are no weights"
    )
    assert "got: nothing" in refusal
    (tmp_path / "teacher.safetensors").mkdir()
    (tmp_path / "teacher.safetensors" / "model.bin").write_bytes(b"x")
    [refusal] = plan.make(make_job(), table, Silent(), calibrated=calibrated).refusals
    assert "got: a folder" in refusal


@pytest.mark.parametrize("part", ["labeled", "test"])
def test_a_folder_that_is_no_class_is_refused_before_the_lake_is_worked_on(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices, tmp_path: Path, part: str
) -> None:
    make_images(1, 20)
    (tmp_path / part / "cat").rename(tmp_path / part / "cats")
    [refusal] = plan.make(make_job(), table, Silent()).refusals
    assert refusal.startswith(f"(data/not-in-class-folder) {tmp_path}/{part}/cats/000.png: ")
    assert "did you mean 'cat'?" in refusal


def test_too_few_labeled_images_for_the_promise_are_refused_before_the_lake_is_worked_on(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices, tmp_path: Path
) -> None:
    make_images(1, 20)
    for image in range(168, 170):
        (tmp_path / "labeled" / "cat" / f"{image:03d}.png").unlink()
    made = plan.make(make_job(), table, Silent())
    [refusal] = made.refusals
    assert refusal.startswith("(data/too-few-labeled-images) ")
    assert "calibrate >= 59" in refusal
    assert made.stages, "the rest is reckoned all the same"
    assert plan.make(make_job(selection={"recall": 0.9}), table, Silent()).refusals == ()


def test_a_job_that_no_node_can_hold_is_refused(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices
) -> None:
    make_images(1, 20)
    made = plan.make(make_job(resources={"embed": {"memory_gib": 500}}), table, Silent())
    assert made.exit_status == 4
    assert "This job would be refused" in plan.render(made)
    assert "500 GiB" in made.refusals[0]


@pytest.mark.usefixtures("coarse")
def test_a_deadline_that_crowds_a_node_is_a_warning(make_job: MakeJob, table: prices.Prices) -> None:
    small = table.nodes.cpu.model_copy(update={"memory_gib": 4.0})
    tight = table.model_copy(update={"nodes": table.nodes.model_copy(update={"cpu": small})})
    job = make_job(distill={"max_steps": 1, "batch_size": 2}, resources={"embed": {"memory_gib": 0.1, "max_actors": 1}})
    made = plan.make(job, tight, Silent(), deadline_hours=(table.start_s + 10) / 3600)
    assert made.refusals == (), "one actor fits"
    assert any("with the deadline's pools a cpu node would run out of memory" in warning for warning in made.warnings)


def test_more_interruptions_than_distillation_survives_are_a_warning(
    make_job: MakeJob, make_images: MakeImages, table: prices.Prices
) -> None:
    make_images(2, 1000)
    job = make_job(student={"architecture": "torchvision/resnet50"}, distill={"epochs": 2000, "max_failures": 0})
    made = plan.make(job, table, Silent())
    assert any("raise distill.max_failures" in warning for warning in made.warnings)
    calm = table.model_copy(update={"spot": prices.Spot(price_frac=0.5, interruptions_per_node_hour=0)})
    assert plan.make(job, calm, Silent()).warnings == ()


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def job_file(make_job: MakeJob, make_images: MakeImages, tmp_path: Path) -> str:
    make_images(2, 50)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(make_job().model_dump(mode="json", by_alias=True)), encoding="utf-8")
    return str(path)


def test_the_command_gives_json_alone_on_stdout(job_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["plan", job_file, "--deadline", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["deadline"]["met"] is True
    assert found["stages"][0]["cpu_hours"] >= 0
    assert plan.Plan.model_validate(found).lake is not None


def test_the_command_takes_a_table_of_one_s_own(
    job_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = prices.PRICES_FILE.read_text(encoding="utf-8").replace("currency: USD", "currency: EUR")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert cli._run(["plan", job_file, "--prices", str(tmp_path / "mine.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "EUR" in shown
    assert "USD" not in shown
    assert cli._run(["plan", job_file, "--prices", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml: the price table cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("hours", ["0", "-3", "nan", "soon"])
def test_the_command_refuses_a_deadline_that_is_none(
    job_file: str, hours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._run(["plan", job_file, "--deadline", hours]) == 2
    said = capsys.readouterr()
    assert "--deadline" in said.err
    assert said.out == ""


def test_the_command_s_exit_status_is_the_first_refusal_s(job_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._run(["plan", job_file, "--calibrate"]) == 3
    assert "nothing can be measured" in capsys.readouterr().out
