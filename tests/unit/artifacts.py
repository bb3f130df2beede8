"""Hand-made images, job settings and artifacts for the unit tests: small, and without a network or a Ray."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pu_ray import config, images, ledger, schema
from pu_ray.config import JobConfig
from pu_ray.ledger import ShardEntry
from pu_ray.manifest import Manifest, Publication
from pu_ray.storage import Storage

CLASSES = ["cat", "dog"]


def settings(root: Path | str = "/data", **sections: Any) -> dict[str, Any]:
    """The smallest job as plain data; a section given here replaces what it names."""
    smallest: dict[str, Any] = {
        "name": "job",
        "output": f"{root}/run",
        "teacher": {
            "architecture": "cifar/resnet8-w4",
            "weights": f"{root}/teacher.safetensors",
            "classes": f"{root}/labels.txt",
            "preprocessing": {"size_px": 24, "channels": 3, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        },
        "labeled": {"uri": f"{root}/labeled"},
        "test": {"uri": f"{root}/test"},
        "lake": {"uri": f"{root}/lake"},
        "student": {"architecture": "cifar/resnet8-w2"},
    }
    for name, values in sections.items():
        known = smallest.get(name)
        smallest[name] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
    return smallest


def job(root: Path | str = "/data", **sections: Any) -> JobConfig:
    """The smallest job, validated."""
    return config.resolve([("test", settings(root, **sections))]).job


def picture(seed: int, side: int = 24) -> Image.Image:
    """A colour image with structure at many scales, as photographs have and noise has not."""
    generator = np.random.default_rng(seed)
    values = np.zeros((side, side, 3))
    for cells in (2, 4, 8):
        coarse = Image.fromarray(generator.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
        values += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), float) / 3
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int, side: int = 24) -> bytes:
    """An encoded `picture`."""
    return encode(picture(seed, side))


def identity_columns(contents: Sequence[bytes], shard: str = "a.parquet", first_row: int = 0) -> dict[str, Any]:
    """The columns that say which image a row is."""
    rows = range(first_row, first_row + len(contents))
    return {
        schema.SAMPLE_ID: pa.array([images.sample_id(content) for content in contents], schema.SAMPLE_ID_TYPE),
        schema.SHARD: pa.array([shard] * len(contents), pa.string()),
        schema.ROW: pa.array(rows, pa.int64()),
        schema.NAME: pa.array([None] * len(contents), pa.string()),
    }


def publish(
    storage: Storage,
    stage: str,
    *,
    counts: Mapping[str, int] | None = None,
    facts: Mapping[str, Any] | None = None,
    identity: str = "made-by-hand",
) -> Manifest:
    """Give a folder a manifest, as its stage would after two seconds of work."""
    publication = Publication(stage, identity, {}, 0)
    publication._started -= 2.0
    return publication.publish(storage, counts=counts or {}, facts=facts or {})


def write_shards(storage: Storage, tables: Mapping[str, pa.Table]) -> None:
    """One data file per shard, and the index over them."""
    entries = {}
    for position, (shard, table) in enumerate(tables.items()):
        file = f"{ledger.DATA_FOLDER}/{position:03d}.parquet"
        storage.write_table(file, table)
        entries[shard] = ShardEntry(shard, "fingerprint", {file: table.num_rows})
    ledger.write_index(storage, entries)


def rate(value: float, n: int = 100) -> dict[str, Any]:
    """An accuracy as manifests hold it."""
    return {"value": value, "low": value - 0.05, "high": min(1.0, value + 0.05), "n": n}


# What each stage publishes, by step name: enough for the report.
COUNTS: Mapping[str, Mapping[str, int]] = {
    "features": {"rows": 40, "errors": 2, "shards": 1, "shards_done_now": 1, "rows_done_now": 40},
    "fit": {"labeled": 12, "labeled_train": 6, "labeled_validate": 2, "labeled_calibrate": 4, "unlabeled": 20},
    "score": {"rows": 40, "errors": 2, "shards": 1, "rows_done_now": 40},
    "select": {"selected": 8, "candidates": 12, "labeled": 1, "leak": 2, "near_leak": 1, "near_duplicate": 3},
    "materialise": {"rows": 8, "shards": 1},
    "distill": {"steps": 10, "images_seen": 640, "images": 18, "parameters": 1_234},
    "evaluate": {"test": 100, "teacher_parameters": 12_340, "student_parameters": 1_234},
    "export": {"parity_images": 8, "parameters": 1_234},
}
FACTS: Mapping[str, Mapping[str, Any]] = {
    "features": {
        "errors": {"truncated": 2},
        "engine": "onnx",
        "whole_lake": True,
        "scaled_decode": None,
        "storage_retries": {},
    },
    "fit": {
        "classes": CLASSES,
        "proxy_auc": 0.97,
        "prior": {
            "estimate": 0.1,
            "low": 0.08,
            "high": 0.12,
            "confidence": 0.95,
            "is_upper_bound": False,
            "source": "estimated",
        },
    },
    "score": {"errors": {"truncated": 2}, "storage_retries": {"throttled": 3}},
    "select": {
        "rule": "recall",
        "threshold": 0.25,
        "promise": {"value": 0.25, "recall": 0.95, "confidence": 0.95, "calibration": 60, "rank": 1},
        "class_counts_before_balance": [7, 5],
        "class_counts": [5, 3],
    },
    "materialise": {},
    "distill": {"best_step": 10, "validation_accuracy": 0.9, "architecture": "cifar/resnet8-w2"},
    "evaluate": {
        "teacher_accuracy": rate(0.95),
        "student_accuracy": rate(0.93),
        "gap_to_teacher": 2.0,
        "agreement": 0.94,
        "student_accuracy_per_class": {"cat": rate(0.91, 50), "dog": rate(0.95, 50)},
        "gate": {"passed": True, "gap_to_teacher": 2.0, "bounds": {}, "violated": []},
        "teacher_calibration_error": 0.02,
        "student_calibration_error": 0.03,
        "cost": {
            "teacher": {
                "parameters": 12_340,
                "multiply_adds": 2_000_000,
                "weights_bytes": 49_360,
                "cpu_latency_ms": 2.0,
            },
            "student": {"parameters": 1_234, "multiply_adds": 300_000, "weights_bytes": 5_500, "cpu_latency_ms": 0.5},
        },
        "slices": {},
    },
    "export": {},
}


class Page(HTMLParser):
    """Tags, their attributes and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
