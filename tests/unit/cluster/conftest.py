from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pu_ray.config import JobConfig, resolve

MakeJob = Callable[..., JobConfig]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """A small job below the test's folder; keyword arguments replace whole sections."""

    def make(**sections: object) -> JobConfig:
        settings: dict[str, Any] = {
            "name": "small",
            "output": str(tmp_path / "run"),
            "teacher": {
                "architecture": "cifar/resnet18-w64",
                "weights": str(tmp_path / "teacher.safetensors"),
                "classes": str(tmp_path / "classes.txt"),
                "preprocessing": {"size_px": 32},
            },
            "labeled": {"uri": str(tmp_path / "labeled")},
            "test": {"uri": str(tmp_path / "test")},
            "lake": {"uri": str(tmp_path / "lake")},
            "student": {"architecture": "cifar/resnet8-w16"},
        }
        return resolve([("test", settings | sections)]).job

    return make


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[[int, int], None]:
    """A Parquet lake of so many shards and rows per shard, 170 labeled and 170 test images, and a teacher's files."""

    def make(shards: int, rows: int) -> None:
        for folder in ("labeled/cat", "test/cat"):
            (tmp_path / folder).mkdir(parents=True)
            for image in range(170):
                (tmp_path / folder / f"{image:03d}.png").write_bytes(b"not looked at")
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
        (tmp_path / "teacher.safetensors").write_bytes(b"not opened")
        (tmp_path / "lake").mkdir()
        for shard in range(shards):
            table = pa.table({"bytes": pa.array([b"x" * 1000] * rows, pa.large_binary())})
            pq.write_table(table, tmp_path / "lake" / f"{shard:03d}.parquet", row_group_size=10, compression="none")

    return make
