"""pu_ray/export.py: another model is never published, and the card says what was measured."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import torch
from artifacts import CLASSES, COUNTS, FACTS, job, png, publish, rate, write_shards
from safetensors.torch import load

from pu_ray import export, images, manifest, models, schema
from pu_ray.config import ExportConfig, JobConfig
from pu_ray.errors import DataError, GateError
from pu_ray.progress import Silent
from pu_ray.storage import Storage, sha256_of

SETTINGS = ExportConfig(max_logit_difference=1e-3, min_agreement=0.99)
BATCH = np.random.default_rng(0).normal(size=(50, 3, 4, 4)).astype(np.float32)


def reference(batch):
    """A model of two logits."""
    sums = batch.reshape(len(batch), -1).sum(axis=1)
    return np.stack([sums, -sums], axis=1)


# -- parity ------------------------------------------------------------------------------------------------


def test_the_same_model_passes_and_its_difference_is_told():
    measured = export.parity("onnx", lambda batch: reference(batch) + 5e-4, reference(BATCH), BATCH, SETTINGS)
    assert measured["max_logit_difference"] == pytest.approx(5e-4, rel=0.05)
    assert measured["agreement"] == 1.0


@pytest.mark.parametrize(
    ("forward", "got"),
    [
        (lambda batch: reference(batch) + 0.01, "logits differ by 0.01"),
        (lambda batch: -reference(batch), "agreement 0.0000"),
        (lambda batch: reference(batch) * np.nan, "logits differ by nan"),
        (lambda batch: reference(batch) + (len(batch) == 1), "logits differ by 1"),  # wrong for one image alone only
    ],
    ids=["shifted", "negated", "nan", "alone"],
)
def test_a_different_model_is_refused_with_what_differs(forward, got):
    with pytest.raises(DataError, match="the exported onnx is not the model that was trained") as caught:
        export.parity("onnx", forward, reference(BATCH), BATCH, SETTINGS)
    assert got in caught.value.got
    assert "0.001" in caught.value.allowed
    assert "0.99" in caught.value.allowed
    assert "nothing was published" in caught.value.hint


def test_answers_that_flip_are_refused_even_where_logits_are_close():
    close = np.tile([0.0, 1e-4], (50, 1)).astype(np.float32)
    with pytest.raises(DataError, match="not the model"):
        export.parity("onnx", lambda batch: close[: len(batch), ::-1], close, BATCH, SETTINGS)


# -- what goes beside the weights --------------------------------------------------------------------------


def test_the_timm_config_says_what_timm_needs():
    config = job(
        student={"architecture": "timm/resnet10t", "options": {"drop_rate": 0.1}},
        teacher={"preprocessing": {"size_px": 24, "resize_px": 32, "interpolation": "bicubic", "channels": 1,
                                   "mean": [0.25], "std": [0.5]}},
    )  # fmt: skip
    found = export.timm_config(config, CLASSES)
    assert found == {
        "architecture": "resnet10t",
        "num_classes": 2,
        "model_args": {"drop_rate": 0.1},
        "pretrained_cfg": {
            "input_size": [1, 24, 24],
            "interpolation": "bicubic",
            "crop_pct": 0.75,
            "mean": [0.25],
            "std": [0.5],
            "num_classes": 2,
        },
        "label_names": CLASSES,
    }
    assert json.loads(json.dumps(found)) == found


def test_without_a_larger_resize_nothing_is_cropped():
    assert export.timm_config(job(), CLASSES)["pretrained_cfg"]["crop_pct"] == 1.0


@pytest.mark.parametrize(
    ("architecture", "library"), [("timm/resnet10t", "timm"), ("cifar/resnet8-w2", "pytorch"), ("resnet18", "pytorch")]
)
def test_the_model_card_holds_the_measured_numbers_and_the_right_library(tmp_path, architecture, library):
    facts = {"student_accuracy": rate(0.9312, 1500), "teacher_accuracy": rate(0.9534, 1500)}
    evaluation = publish(Storage(str(tmp_path)), "evaluate", counts={"teacher_parameters": 11_234_567}, facts=facts)
    card = export.model_card(job(student={"architecture": architecture}), evaluation, 12_345, 987_654)
    for number in ("11,234,567", "987,654", "12,345"):
        assert number in card
    assert "| student | 0.9312 | 0.8812 to 0.9812 | 1,500 |" in card
    assert "| teacher | 0.9534 | 0.9034 to 1.0000 | 1,500 |" in card
    assert f"\nlibrary_name: {library}\n" in card
    assert card.startswith("---\n")
    assert f"\n# {job().name}\n" in card


# -- the stage ---------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path) -> JobConfig:
    """A job whose student, mined images and evaluation are there."""
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES) + "\n")
    made = job(tmp_path, export={"formats": ["safetensors"]})
    storage = Storage(made.output)
    torch.manual_seed(0)
    student = models.build(made.student, len(CLASSES), 3).eval()
    storage.child("student").write_bytes("model.safetensors", models.save_weights(student))
    publish(storage.child("student"), "distill", counts={"parameters": models.parameter_count(student)})
    mined = pa.table({schema.BYTES: pa.array([png(k) for k in range(6)], pa.large_binary())})
    write_shards(storage.child("mined"), {"a": mined.slice(0, 4), "b": mined.slice(4)})
    publish(storage.child("mined"), "materialise", counts={"rows": 6})
    publish(storage.child("evaluation"), "evaluate", counts=COUNTS["evaluate"], facts=FACTS["evaluate"])
    return made


def run(config: JobConfig) -> tuple[manifest.Manifest, Storage]:
    storage = Storage(config.output)
    return export.run(config, storage, {}, "identity", Silent()), storage.child("exported")


def test_everything_that_was_published_is_digested_and_belongs_to_the_student(config):
    document, exported = run(config)
    files = {file.path: exported.read_bytes(file.path) for file in exported.list_files()}
    del files["manifest.json"]
    assert document.facts["sha256"] == {name: sha256_of(content) for name, content in files.items()}
    student = Storage(config.output).child("student").read_bytes("model.safetensors")
    for name, value in load(files["model.safetensors"]).items():
        torch.testing.assert_close(value, load(student)[name])
    assert files["labels.txt"].decode().split() == CLASSES
    assert json.loads(files["preprocess.json"]) == config.section("teacher.preprocessing")
    assert json.loads(files["config.json"])["label_names"] == CLASSES
    assert document.counts["parity_images"] == 6
    assert document.facts["gate_passed"] is True


def test_the_onnx_file_answers_like_the_student_whatever_the_batch(config):
    config = config.model_copy(update={"export": ExportConfig(formats=("safetensors", "onnx"))})
    document, exported = run(config)
    assert document.facts["parity"]["onnx"]["agreement"] == 1.0
    session = onnxruntime.InferenceSession(exported.read_bytes("model.onnx"), providers=["CPUExecutionProvider"])
    student = models.load_student(config, Storage(config.output).child("student"), 2)
    preprocessing = config.teacher.preprocessing
    pixels = np.stack([images.decode(png(k), preprocessing) for k in range(3)])
    batch = images.normalise(pixels, preprocessing)
    with torch.inference_mode():
        expected = student(torch.from_numpy(batch)).numpy()
    for rows in (1, 3):
        (logits,) = session.run(["logits"], {"pixels": batch[:rows]})
        np.testing.assert_allclose(logits, expected[:rows], atol=1e-4)


def test_when_one_format_differs_nothing_is_published(config, monkeypatch):
    run(config)
    exported = Storage(config.output).child("exported")
    before = {file.path: exported.read_bytes(file.path) for file in exported.list_files()}
    config = config.model_copy(update={"export": ExportConfig(formats=("safetensors", "onnx"))})
    wrong = lambda student, config, classes: (b"graph", lambda batch: np.zeros((len(batch), classes), np.float32))  # noqa: E731
    monkeypatch.setitem(export._FORMATS, "onnx", wrong)
    with pytest.raises(DataError, match="the exported onnx is not the model"):
        run(config)
    assert {file.path: exported.read_bytes(file.path) for file in exported.list_files()} == before


def test_a_student_that_failed_its_gate_is_not_exported(config):
    storage = Storage(config.output)
    failed = {**FACTS["evaluate"], "gate": {"passed": False, "gap_to_teacher": 9.0, "allowed": 2.0}}
    publish(storage.child("evaluation"), "evaluate", counts=COUNTS["evaluate"], facts=failed)
    with pytest.raises(GateError, match="too far behind its teacher"):
        run(config)
    assert storage.child("exported").kind() == "missing"


def test_parity_is_measured_on_real_images_normalised_as_in_training(config):
    batch = export._real_images(config, Storage(config.output).child("mined"))
    preprocessing = config.teacher.preprocessing
    pixels = np.stack([images.decode(png(k), preprocessing) for k in range(6)])
    np.testing.assert_allclose(batch, (pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25, atol=1e-5)


def test_an_image_that_the_job_allows_is_no_surprise_at_export(config, monkeypatch):
    # As if the default were 100 bytes, which the job raises.
    decode, small = images.decode, images.Limits(max_bytes=100)
    monkeypatch.setattr(
        images,
        "decode",
        lambda content, preprocessing, limits=small: decode(content, preprocessing, limits),
    )
    assert len(export._real_images(config, Storage(config.output).child("mined"))) == 6
