"""serving/registry.py: only finished, unchanged exports that passed their gate become students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pu_ray.errors import DataError, GateError
from serving import registry
from tests.unit.serving.students import LABELS, PREPROCESSING, onnx_network, write_student


def test_opens_an_export(tmp_path: Path) -> None:
    loaded = registry.load(write_student(tmp_path / "exported", "pets"))
    assert loaded.student.name == "pets"
    assert loaded.student.labels == LABELS
    assert loaded.student.preprocessing == PREPROCESSING
    assert len(loaded.student.version) == 64
    assert loaded.model == onnx_network()


def test_a_local_uri_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_student(tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    assert registry.load("exported").student.uri == str(tmp_path / "exported")


def test_other_weights_are_another_version(tmp_path: Path) -> None:
    versions = {registry.load(write_student(tmp_path / str(seed), seed=seed)).student.version for seed in range(2)}
    assert len(versions) == 2


def test_a_missing_export_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `pu-ray export"):
        registry.load(str(tmp_path))


def test_another_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only exported students") as refusal:
        registry.load(write_student(tmp_path, stage="distill"))
    assert refusal.value.got == "stage 'distill'"


@pytest.mark.parametrize("passed", [False, None, "yes"])
def test_a_failed_gate_is_refused(tmp_path: Path, passed: object) -> None:
    with pytest.raises(GateError, match="did not pass its quality gate"):
        registry.load(write_student(tmp_path, facts={"gate_passed": passed}))


@pytest.mark.parametrize("file", ["model.onnx", "labels.txt", "preprocess.json", "model.safetensors", "README.md"])
def test_a_changed_file_is_refused(tmp_path: Path, file: str) -> None:
    uri = write_student(tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    content[-1] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match="differs from the one that was published") as refusal:
        registry.load(uri)
    assert str(refusal.value.where).endswith(file)


@pytest.mark.parametrize("file", ["model.onnx", "config.json"])
def test_a_missing_file_is_refused(tmp_path: Path, file: str) -> None:
    uri = write_student(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match="no such file") as refusal:
        registry.load(uri)
    assert str(refusal.value.where).endswith(file)


def test_an_export_without_onnx_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no ONNX network") as refusal:
        registry.load(write_student(tmp_path, files={"model.onnx": None}))
    assert "export.formats" in str(refusal.value.hint)


def test_a_file_without_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="differs from"):
        registry.load(write_student(tmp_path, facts={"sha256": {}}))


def test_an_export_without_digests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lists no digests"):
        registry.load(write_student(tmp_path, facts={"sha256": None}))


@pytest.mark.parametrize("name", [None, "", "a/b", "two words", "..", 7])
def test_a_name_that_breaks_urls_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(DataError, match="cannot be used in URLs"):
        registry.load(write_student(tmp_path, facts={"name": name}))


@pytest.mark.parametrize("labels", [b"", b"cat\n\ndog\n", b"cat\ncat\ndog\n", b"\xff\n"])
def test_wrong_labels_are_refused(tmp_path: Path, labels: bytes) -> None:
    with pytest.raises(DataError) as refusal:
        registry.load(write_student(tmp_path, files={"labels.txt": labels}))
    assert str(refusal.value.where).endswith("labels.txt")


@pytest.mark.parametrize("preprocessing", [b"", b"{", b'{"size": 3}', b'{"std": [0, 1, 1]}'])
def test_wrong_preprocessing_is_refused(tmp_path: Path, preprocessing: bytes) -> None:
    with pytest.raises(DataError, match="not a preprocessing description"):
        registry.load(write_student(tmp_path, files={"preprocess.json": preprocessing}))


# -- engines --------------------------------------------------------------------------------------------------

INT8 = {"model.int8.onnx": onnx_network(seed=9)}


@pytest.mark.parametrize(
    ("files", "formats", "wanted", "taken"),
    [
        ({}, {}, "auto", "onnx"),
        (INT8, {}, "auto", "onnx"),
        (INT8, {"onnx": {"cpu_latency_ms": 1.0}, "onnx-int8": {"cpu_latency_ms": 2.0}}, "auto", "onnx"),
        (INT8, {"onnx": {"cpu_latency_ms": 2.0}, "onnx-int8": {"cpu_latency_ms": 1.0}}, "auto", "onnx-int8"),
        (INT8, {"onnx": {"cpu_latency_ms": 1.0}, "onnx-int8": {"cpu_latency_ms": 2.0}}, "onnx-int8", "onnx-int8"),
        (INT8 | {"model.onnx": None}, {}, "auto", "onnx-int8"),
    ],
)
def test_the_fastest_engine_answers_unless_one_is_named(
    tmp_path: Path, files: dict[str, bytes], formats: dict[str, Any], wanted: str, taken: str
) -> None:
    uri = write_student(tmp_path, files=files, facts={"formats": formats})
    loaded = registry.load(uri, wanted)
    assert loaded.student.engine == taken
    assert loaded.model == (INT8["model.int8.onnx"] if taken == "onnx-int8" else onnx_network())


def test_an_engine_that_was_not_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such engine") as refusal:
        registry.load(write_student(tmp_path), "onnx-int8")
    assert refusal.value.allowed == "auto, onnx, torch"
