from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from cluster import calibrate
from pu_ray import embedding, lake, models
from pu_ray.config import JobConfig
from pu_ray.errors import DataError
from pu_ray.lake import Shard
from pu_ray.progress import Silent

MakeJob = Callable[..., JobConfig]

IMAGES, BROKEN = 45, 5


class Counted(Silent):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []

    def start(self, total: int, unit: str) -> None:
        self.stages.append((unit, 0))

    def advance(self, count: int) -> None:
        unit, done = self.stages[-1]
        self.stages[-1] = (unit, done + count)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def job(make_job: MakeJob, tmp_path: Path) -> JobConfig:
    (tmp_path / "lake").mkdir()
    contents = [png(seed) for seed in range(IMAGES)] + [b"no image"] * BROKEN
    pq.write_table(pa.table({"bytes": pa.array(contents, pa.large_binary())}), tmp_path / "lake" / "a.parquet")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    teacher = {
        "architecture": "cifar/resnet8-w16",
        "weights": str(tmp_path / "teacher.safetensors"),
        "classes": str(tmp_path / "classes.txt"),
        "preprocessing": {"size_px": 32},
    }
    made = make_job(teacher=teacher, resources={"embed": {"cpus": 4, "max_actors": 8}}, features={"batch_size": 8})
    network = models.build(made.teacher, 2, 3)
    (tmp_path / "teacher.safetensors").write_bytes(models.save_weights(network))
    return made


@pytest.fixture
def shards(job: JobConfig) -> list[Shard]:
    return lake.list_shards(job.lake)


def test_a_sample_is_measured_and_no_ray_is_started(
    job: JobConfig, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan starts no Ray")

    monkeypatch.setattr(ray, "init", refuse)
    progress = Counted()
    found = calibrate.measure(job, shards, progress)
    assert (found.images, found.broken, found.teacher_images) == (IMAGES, BROKEN, IMAGES)
    assert found.encoded_bytes == sum(len(png(seed)) for seed in range(IMAGES))
    assert found.device == "core"
    assert found.teacher_images_per_s is not None
    assert found.decode_mb_per_s == pytest.approx(found.decode_images_per_s * found.encoded_bytes / found.images / 1e6)
    # A core that decodes fewer than ten such images a second, or more than a million, was not measured.
    assert 10 < found.decode_images_per_s < 1e6
    assert 10 < found.teacher_images_per_s < 1e6
    assert progress.stages == [("images decoded", IMAGES + BROKEN), ("images seen by the teacher", IMAGES)]


def test_it_is_the_actor_s_own_pass_on_one_core(
    job: JobConfig, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, batches = [], []
    opened, run = embedding._open_onnx, embedding.engine.OnnxEngine.run

    def open_onnx(*arguments: object) -> object:
        threads.append(arguments[-1])
        return opened(*arguments)  # type: ignore[arg-type]

    def watched(self: object, batch: np.ndarray) -> object:
        batches.append(batch.shape)
        return run(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(embedding, "_open_onnx", open_onnx)
    monkeypatch.setattr(embedding.engine.OnnxEngine, "run", watched)
    calibrate.measure(job, shards, Silent())
    assert threads == [1], "resources.embed.cpus is 4, and rates are per core"
    assert max(shape[0] for shape in batches) == 8
    # The actor's probe, a batch to warm up, and every usable image once.
    assert sum(shape[0] for shape in batches) == 1 + 8 + IMAGES


def test_an_engine_in_torch_has_one_thread_and_gives_the_others_back(
    job: JobConfig, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run = embedding.engine.TorchEngine.submit

    def watched(self: object, batch: np.ndarray) -> object:
        seen.append(torch.get_num_threads())
        return run(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(embedding.engine.TorchEngine, "submit", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_torch = job.model_copy(update={"features": job.features.model_copy(update={"engine": "torch"})})
        calibrate.measure(in_torch, shards, Silent())
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_without_the_gpu_that_the_job_asks_for_only_decoding_is_measured(
    make_job: MakeJob, job: JobConfig, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpu = job.model_copy(update={"resources": make_job(resources={"embed": {"gpus": 1}}).resources})
    found = calibrate.measure(on_gpu, shards, Silent())
    assert (found.device, found.teacher_images, found.teacher_images_per_s) == (None, 0, None)
    assert found.images == IMAGES


def test_missing_weights_are_refused(job: JobConfig, shards: list[Shard], tmp_path: Path) -> None:
    (tmp_path / "teacher.safetensors").unlink()
    with pytest.raises(DataError, match=r"teacher\.safetensors"):
        calibrate.measure(job, shards, Silent())


def test_a_lake_without_a_usable_image_is_refused(job: JobConfig, tmp_path: Path) -> None:
    table = pa.table({"bytes": pa.array([b"no image"] * 3, pa.large_binary())})
    pq.write_table(table, tmp_path / "lake" / "a.parquet")
    with pytest.raises(DataError, match="nothing can be measured"):
        calibrate.measure(job, lake.list_shards(job.lake), Silent())


def test_a_slow_teacher_is_measured_on_less(
    job: JobConfig, shards: list[Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_MOST_TEACHER_S", 0.0)
    assert calibrate.measure(job, shards, Silent()).teacher_images == 8
