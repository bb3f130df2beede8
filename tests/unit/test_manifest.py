"""pu_ray/manifest.py: no manifest, no artifact; another identity, another artifact."""

from __future__ import annotations

import json

import pytest

import pu_ray
from pu_ray import manifest
from pu_ray.errors import DataError
from pu_ray.manifest import Manifest, Publication
from pu_ray.storage import Storage
from pu_ray.usage import Workers

SETTINGS = {"epochs": 3, "loss": {"kind": "sigmoid"}}
INPUTS = {"features": "abc", "teacher": "def"}


@pytest.fixture
def folder(tmp_path) -> Storage:
    return Storage(str(tmp_path / "artifact"))


def published(folder: Storage, identity: str = "wanted") -> Manifest:
    folder.write_bytes("data/a.bin", b"12345")
    folder.write_bytes("index.bin", b"1")
    return Publication("fit", identity, INPUTS, 7).publish(folder, counts={"rows": 2}, facts={"prior": 0.1})


# -- identity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        ("score", SETTINGS, INPUTS, 0),
        ("fit", {**SETTINGS, "epochs": 4}, INPUTS, 0),
        ("fit", {**SETTINGS, "loss": {"kind": "logistic"}}, INPUTS, 0),
        ("fit", {**SETTINGS, "more": None}, INPUTS, 0),
        ("fit", SETTINGS, {**INPUTS, "teacher": "xyz"}, 0),
        ("fit", SETTINGS, {"features": "abc"}, 0),
        ("fit", SETTINGS, {"features": "def", "teacher": "abc"}, 0),
        ("fit", SETTINGS, INPUTS, 1),
    ],
)
def test_the_identity_changes_with_stage_settings_inputs_and_seed(other):
    assert manifest.identity(*other) != manifest.identity("fit", SETTINGS, INPUTS, 0)


@pytest.mark.parametrize(("module", "name", "value"), [(pu_ray, "__version__", "9.9"), (manifest, "FORMAT", 99)])
def test_the_identity_changes_with_the_code_and_the_format(monkeypatch, module, name, value):
    before = manifest.identity("fit", SETTINGS, INPUTS, 0)
    monkeypatch.setattr(module, name, value)
    assert manifest.identity("fit", SETTINGS, INPUTS, 0) != before


def test_the_identity_does_not_depend_on_the_order_of_keys():
    again = manifest.identity("fit", dict(reversed(SETTINGS.items())), dict(reversed(INPUTS.items())), 0)
    assert again == manifest.identity("fit", SETTINGS, INPUTS, 0)


# -- publishing --------------------------------------------------------------------------------------------


def test_what_was_published_is_read_again(folder):
    document = published(folder)
    assert manifest.read(folder) == document
    assert document.stage == "fit"
    assert document.identity == "wanted"
    assert document.inputs == INPUTS
    assert document.seed == 7
    assert document.counts == {"rows": 2}
    assert document.facts == {"prior": 0.1}
    assert document.code_version == pu_ray.__version__
    assert document.seconds >= 0


def test_the_manifest_lists_every_visible_file_but_itself_with_its_size(folder):
    folder.write_bytes("_engine/teacher.onnx", b"a means, not a result")
    published(folder)
    again = published(folder)  # a manifest that is there already is not a file of the artifact
    assert again.files == {"data/a.bin": 5, "index.bin": 1}


def test_the_manifest_is_written_after_everything_it_vouches_for(folder, monkeypatch):
    seen = []
    write_json = Storage.write_json

    def watched(self, path, value):
        seen.append((path, sorted(value["files"]), [file.path for file in self.list_files()]))
        write_json(self, path, value)

    monkeypatch.setattr(Storage, "write_json", watched)
    published(folder)
    assert seen == [("manifest.json", ["data/a.bin", "index.bin"], ["data/a.bin", "index.bin"])]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_when_publishing_fails_nothing_vouches_for_the_data(folder, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Storage, "write_json", fail)
    with pytest.raises(error):
        published(folder)
    assert folder.kind("data/a.bin") == "file"
    assert manifest.read(folder) is None
    assert not manifest.is_current(folder, "wanted")


def test_facts_that_are_not_json_are_never_published(folder):
    with pytest.raises(ValueError, match="JSON"):
        Publication("fit", "x", {}, 0).publish(folder, counts={}, facts={"auc": float("nan")})
    assert manifest.read(folder) is None


# -- reading -----------------------------------------------------------------------------------------------


def test_an_artifact_is_current_under_its_own_identity_only(folder):
    assert not manifest.is_current(folder, "wanted")
    published(folder)
    assert manifest.is_current(folder, "wanted")
    assert not manifest.is_current(folder, "other")


def test_an_artifact_with_a_missing_file_is_not_current(folder):
    published(folder)
    folder.delete("data/a.bin")
    assert not manifest.is_current(folder, "wanted")


@pytest.mark.parametrize("content", [b"", b"1234", b"123456"])
def test_an_artifact_with_a_file_of_another_size_is_not_current(folder, content):
    published(folder)
    folder.write_bytes("data/a.bin", content)
    assert not manifest.is_current(folder, "wanted")


def test_a_file_too_many_does_not_make_an_artifact_stale(folder):
    published(folder)
    folder.write_bytes("notes.txt", b"seen by a person")
    assert manifest.is_current(folder, "wanted")


def test_a_folder_without_a_manifest_is_no_artifact(folder):
    folder.write_bytes("data/a.bin", b"12345")
    assert manifest.read(folder) is None
    with pytest.raises(DataError, match="does not exist yet") as caught:
        manifest.require(folder, "fit")
    assert caught.value.where == folder.uri
    assert "pu-ray fit JOB.yaml" in caught.value.hint


def test_a_required_artifact_that_is_there_is_returned(folder):
    document = published(folder)
    assert manifest.require(folder, "fit") == document


@pytest.mark.parametrize("change", [{"stage": 5}, {"identity": None}, {"unknown": 1}, {"counts": {"rows": "many"}}])
def test_a_damaged_manifest_is_named_with_what_is_wrong_and_how_to_go_on(folder, change):
    published(folder)
    document = folder.read_json("manifest.json")
    folder.write_json("manifest.json", {**document, **change})
    with pytest.raises(DataError, match="damaged or of another version") as caught:
        manifest.read(folder)
    assert caught.value.where == f"{folder.uri}/manifest.json"
    assert caught.value.got
    assert "delete the artifact's folder and run again" in caught.value.hint


def test_a_manifest_that_is_no_json_is_named(folder):
    published(folder)
    folder.write_bytes("manifest.json", b'{"stage": ')
    with pytest.raises(DataError, match="not valid JSON") as caught:
        manifest.read(folder)
    assert caught.value.where == f"{folder.uri}/manifest.json"


def test_a_manifest_cannot_be_changed_and_is_plain_json(folder):
    document = published(folder)
    with pytest.raises(ValueError, match="frozen"):
        document.stage = "other"
    assert json.loads(folder.read_bytes("manifest.json")) == document.model_dump(mode="json")


# -- what it took ------------------------------------------------------------------------------------------


def test_a_manifest_says_what_its_attempt_took(folder):
    workers = Workers(unit="actors", most=2, peak_bytes=5, cpu_hours=0.5, gpu_hours=0.0)
    publication = Publication("fit", "wanted", INPUTS, 7)
    made = publication.publish(folder, counts={}, facts={}, workers=workers)
    assert made.usage is not None
    assert made.usage.workers == workers
    assert made.usage.driver_peak_bytes is None or made.usage.driver_peak_bytes > 2**20
    assert manifest.read(folder) == made
    assert manifest.is_current(folder, "wanted")


def test_a_manifest_from_before_usage_was_recorded_is_as_good(folder):
    published(folder)
    document = folder.read_json("manifest.json")
    del document["usage"]
    folder.write_json("manifest.json", document)
    old = manifest.read(folder)
    assert old is not None
    assert old.usage is None
    assert manifest.is_current(folder, "wanted")
