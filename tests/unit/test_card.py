"""pu_ray/card.py: the card says what was measured, and its figures are where a reader looks for them."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from artifacts import CLASSES, COUNTS, FACTS, job, publish, rate

from pu_ray import card
from pu_ray.config import JobConfig
from pu_ray.storage import Storage

FORMATS = {
    "safetensors": {"file": "model.safetensors", "bytes": 1_234_567, "cpu_latency_ms": 1.5},
    "onnx-int8": {"file": "model.int8.onnx", "bytes": 345_678, "cpu_latency_ms": 0.75},
}
PARITY = {
    "safetensors": {"max_logit_difference": 0.0, "agreement": 1.0},
    "onnx-int8": {
        "max_logit_difference": 0.21,
        "agreement": 0.9876,
        "accuracy_drop_points": 0.625,
        "labeled_images": 1_600,
    },
}


def made(**changes) -> card.Made:
    known = {"classes": CLASSES, "mined": 12_345, "labeled": 678, "parameters": 987_654}
    return card.Made(**{**known, "formats": FORMATS, "parity": PARITY, **changes})


@pytest.fixture
def write(tmp_path):
    def written(config: JobConfig | None = None, facts=(), **changes) -> str:
        counts = {**COUNTS["evaluate"], "test": 1500, "teacher_parameters": 11_234_567}
        known = {**FACTS["evaluate"], **dict(facts)}
        evaluation = publish(Storage(str(tmp_path)), "evaluate", counts=counts, facts=known)
        return card.model_card(config or job(), evaluation, made(**changes))

    return written


# -- timm's configuration ----------------------------------------------------------------------------------


def test_the_timm_config_says_what_timm_needs():
    config = job(
        student={"architecture": "timm/resnet10t", "options": {"drop_rate": 0.1}},
        teacher={"preprocessing": {"size_px": 24, "resize_px": 32, "interpolation": "bicubic", "channels": 1,
                                   "mean": [0.25], "std": [0.5]}},
    )  # fmt: skip
    found = card.timm_config(config, CLASSES)
    assert found == {
        "architecture": "resnet10t",
        "num_classes": 2,
        "model_args": {"drop_rate": 0.1},
        "pretrained_cfg": {
            "input_size": [1, 24, 24],
            "interpolation": "bicubic",
            "crop_pct": 0.75,
            "crop_mode": "center",
            "mean": [0.25],
            "std": [0.5],
            "num_classes": 2,
        },
        "label_names": CLASSES,
    }
    assert json.loads(json.dumps(found)) == found


def test_a_student_with_images_of_its_own_tells_timm_of_those():
    config = job(student={"preprocessing": {"size_px": 16, "channels": 1, "mean": [0.4], "std": [0.2]}})
    assert card.timm_config(config, CLASSES)["pretrained_cfg"]["input_size"] == [1, 16, 16]


def test_without_a_larger_resize_nothing_is_cropped():
    assert card.timm_config(job(), CLASSES)["pretrained_cfg"]["crop_pct"] == 1.0


def test_timm_resizes_to_the_pixel_whatever_the_sizes():
    # timm rounds size / crop_pct down, and for some of these the plain quotient is a pixel short.
    sizes = [(side, resize) for side in (24, 32, 96, 160, 224, 384) for resize in range(side, 2 * side)]
    assert any(math.floor(side / (side / resize)) != resize for side, resize in sizes)
    for side, resize in sizes:
        share = card._crop_pct(side, resize)
        assert math.floor(side / share) == resize
        assert share == pytest.approx(side / resize)


# -- the card ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "library"), [("timm/resnet10t", "timm"), ("cifar/resnet8-w2", "pytorch"), ("resnet18", "pytorch")]
)
def test_the_front_matter_is_yaml_and_no_license_is_made_up(write, architecture, library):
    _, front, body = write(job(student={"architecture": architecture})).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "unknown",
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["knowledge-distillation", "positive-unlabeled-learning"],
    }
    assert "License: unknown." in body


def test_the_card_holds_the_measured_numbers(write):
    text = write(facts={"student_accuracy": rate(0.9312, 1500), "teacher_accuracy": rate(0.9534, 1500)})
    for number in ("11,234,567", "987,654", "12,345", "678", "1,500 test images", "seed 0"):
        assert number in text
    assert "| student | accuracy | 0.9312 | 0.8812 to 0.9812 | 1,500 |" in text
    assert "| teacher | accuracy | 0.9534 | 0.9034 to 1.0000 | 1,500 |" in text
    assert "| student | calibration error | 0.0300 | | |" in text
    assert "| teacher | multiply-adds | 2,000,000 | | |" in text
    assert f"\n# {job().name}\n" in text


def test_five_answers_are_told_where_they_were_counted(write):
    assert "top-5" not in write()
    facts = {"student_top5_accuracy": rate(0.9912, 1500), "teacher_top5_accuracy": rate(0.9934, 1500)}
    assert "| student | top-5 accuracy | 0.9912 | 0.9412 to 1.0000 | 1,500 |" in write(facts=facts)


@pytest.mark.parametrize(
    ("gap", "words"), [(1.234, "1.23 percentage points behind its"), (-0.5, "0.50 percentage points ahead of its")]
)
def test_the_gap_says_which_way_it_goes(write, gap, words):
    assert f"The student is {words} teacher" in write(facts={"gap_to_teacher": gap})


def test_the_weakest_classes_are_named_worst_first(write):
    values = {"ant": 0.9, "bee": 0.5, "cat": 0.7, "dog": 0.99}
    facts = {"student_accuracy_per_class": {name: rate(value, 50) for name, value in values.items()}}
    assert "Its weakest classes: bee 0.500 of 50, cat 0.700 of 50, ant 0.900 of 50." in write(facts=facts)


def test_each_file_has_its_row_and_what_eight_bits_lose_is_said(write):
    text = write()
    assert "| model.safetensors | 1,234,567 | 1.50 | 0 | 100.00 % |" in text
    assert "| model.int8.onnx | 345,678 | 0.75 | 0.21 | 98.76 % |" in text
    assert "on 1,600 labeled images it loses\n0.62 percentage points" in text


def test_a_format_that_was_left_out_is_not_spoken_of(write):
    text = write(formats={"safetensors": FORMATS["safetensors"]}, parity={"safetensors": PARITY["safetensors"]})
    assert "int8" not in text


def test_of_many_classes_the_first_are_named(write):
    text = write(classes=[f"c{k:03d}" for k in range(1000)])
    assert "1,000 classes" in text
    assert "c019, ...." in text
    assert "c020" not in text
