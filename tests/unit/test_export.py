"""pu_ray/export.py: another model is never published, and what is published opens elsewhere."""

from __future__ import annotations

import functools
import io
import json
import math
import subprocess

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pytest
import torch
from artifacts import CLASSES, COUNTS, FACTS, encode, job, picture, publish, write_shards
from PIL import Image
from safetensors.torch import load

from pu_ray import export, gate, images, manifest, models, quantise, schema, tracking
from pu_ray.config import (
    ExportConfig,
    GateConfig,
    JobConfig,
    PreprocessingConfig,
    StudentConfig,
    TrackingConfig,
)
from pu_ray.errors import DataError, GateError
from pu_ray.progress import Silent
from pu_ray.storage import Storage, sha256_of
from serving import predictor, registry

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


# -- eight bits --------------------------------------------------------------------------------------------

PREPROCESSING = PreprocessingConfig(size_px=4, mean=(0.5,) * 3, std=(0.25,) * 3)
PIXELS = np.random.default_rng(1).integers(0, 256, (100, 4, 4, 3), np.uint8)
# The checkpoint is right about 90 of 100.
TRUE = reference(images.normalise(PIXELS, PREPROCESSING)).argmax(1)
JUDGES = export.Judges(PIXELS, np.where(np.arange(100) < 90, TRUE, 1 - TRUE), 90, PREPROCESSING)


def lossy(share_of_mined: float, images_lost: int):
    """A network that says something else for some of the mined images, and for some labeled ones known to be right."""
    flipped = {row.tobytes() for row in BATCH[: round(share_of_mined * len(BATCH))]}
    flipped |= {row.tobytes() for row in images.normalise(PIXELS[:images_lost], PREPROCESSING)}
    sign = lambda batch: np.array([[-1.0 if row.tobytes() in flipped else 1.0] for row in batch], np.float32)  # noqa: E731
    return lambda batch: reference(batch) * sign(batch)


def test_the_checkpoint_is_asked_once_how_often_it_is_right():
    assert export.hits_of(reference, PIXELS, JUDGES.labels_N, PREPROCESSING) == 90


def test_what_eight_bits_lose_is_told():
    settings = ExportConfig(min_int8_agreement=0.9, max_int8_accuracy_drop=2.0)
    measured = export.int8_parity(lossy(0.1, 2), reference(BATCH), BATCH, JUDGES, settings)
    assert measured["agreement"] == pytest.approx(0.9)
    assert measured["accuracy_drop_points"] == 2.0
    assert measured["labeled_images"] == 100
    assert measured["max_logit_difference"] == pytest.approx(2 * np.abs(reference(BATCH[:5])).max())


def test_one_other_answer_of_few_is_no_proof_that_eight_bits_lose_too_much():
    few, settings = BATCH[:20], ExportConfig(min_int8_agreement=0.97)
    answers = reference(few)
    answers[0] = -answers[0]
    other = lambda batch: answers if len(batch) == 20 else lossy(0.0, 0)(batch)  # noqa: E731
    assert export.int8_parity(other, reference(few), few, JUDGES, settings)["agreement"] == 0.95


def test_a_network_that_got_better_in_eight_bits_has_a_negative_drop():
    settings = ExportConfig(max_int8_accuracy_drop=0.0)
    wrong_before = export.Judges(PIXELS, 1 - TRUE, 0, PREPROCESSING)
    measured = export.int8_parity(lossy(0.0, 3), reference(BATCH), BATCH, wrong_before, settings)
    assert measured["accuracy_drop_points"] == -3.0


@pytest.mark.parametrize(
    ("share", "lost", "got"),
    [
        (0.0, 3, "3.00 points on 100 labeled images, agreement 1.0000"),
        (0.24, 0, "0.00 points on 100 labeled images, agreement 0.7600 on 50 mined ones (at most 0.8"),
    ],
    ids=["accuracy", "agreement"],
)
def test_a_network_that_loses_too_much_in_eight_bits_is_refused(share, lost, got):
    settings = ExportConfig(min_int8_agreement=0.9, max_int8_accuracy_drop=2.0)
    with pytest.raises(DataError, match="loses too much in eight bits") as caught:
        export.int8_parity(lossy(share, lost), reference(BATCH), BATCH, JUDGES, settings)
    assert got in caught.value.got
    assert "2 percentage points" in caught.value.allowed
    assert "agreement >= 0.9 " in caught.value.allowed
    assert "leave onnx-int8 out of export.formats" in caught.value.hint


# -- the stage ---------------------------------------------------------------------------------------------


def shade(seed: int, bright: bool) -> bytes:
    """An image that is dark or bright, which is easy to learn."""
    values = np.asarray(picture(seed)).astype(np.uint16) // 3 + (160 if bright else 0)
    return encode(Image.fromarray(values.astype(np.uint8)))


def taught(config: JobConfig, classes: int) -> torch.nn.Module:
    """A student that tells dark images from bright ones: quantising one that knows nothing says nothing."""
    return _taught(config.student.model_dump_json(), config.student_preprocessing, classes)


@functools.cache
def _taught(student_json: str, preprocessing: PreprocessingConfig, classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    student = models.build(StudentConfig.model_validate_json(student_json), classes, preprocessing.channels)
    pixels = np.stack([images.decode(shade(k, k % 2 == 1), preprocessing) for k in range(1000, 1040)])
    batch, labels = torch.from_numpy(images.normalise(pixels, preprocessing)), torch.arange(40) % 2
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(student(batch), labels).backward()
        optimizer.step()
    return student.eval()


MINED = 24


def prepared(root, *, classes: list[str] = CLASSES, mined: int = MINED, **sections) -> JobConfig:
    """A job whose student, mined images, labeled images and evaluation are there."""
    (root / "labels.txt").write_text("\n".join(classes) + "\n")
    made = job(root, **{"export": {"formats": ["safetensors"]}, **sections})
    storage = Storage(made.output)
    student = taught(made, len(classes))
    storage.child("student").write_bytes("model.safetensors", models.save_weights(student))
    publish(storage.child("student"), "distill", counts={"parameters": models.parameter_count(student)})
    table = pa.table({schema.BYTES: pa.array([shade(k, k % 2 == 1) for k in range(mined)], pa.large_binary())})
    write_shards(storage.child("mined"), {"a": table.slice(0, mined // 2), "b": table.slice(mined // 2)})
    publish(storage.child("mined"), "materialise", counts={"rows": mined})
    publish(storage.child("evaluation"), "evaluate", counts=COUNTS["evaluate"], facts=FACTS["evaluate"])
    contents = {f"{classes[k % 2]}/{k}.png": shade(500 + k, k % 2 == 1) for k in range(12)}
    for name, content in contents.items():
        (root / "labeled" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "labeled" / name).write_bytes(content)
    roles = {
        schema.SAMPLE_ID: pa.array([images.sample_id(content) for content in contents.values()], schema.SAMPLE_ID_TYPE),
        "role": pa.array(["train", "train", "validate", "validate", "calibrate", "calibrate"] * 2),
    }
    storage.child("scorer").write_table("labeled.parquet", pa.table(roles))
    publish(storage.child("scorer"), "fit", counts=COUNTS["fit"], facts=FACTS["fit"])
    return made


@pytest.fixture
def config(tmp_path) -> JobConfig:
    return prepared(tmp_path)


def formats(config: JobConfig, *names: str, **settings) -> JobConfig:
    return config.model_copy(update={"export": ExportConfig(formats=("safetensors", *names), **settings)})


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
    assert document.counts["parity_images"] == MINED
    assert document.facts["gate_passed"] is True


def test_the_onnx_file_answers_like_the_student_whatever_the_batch(config):
    config = formats(config, "onnx")
    document, exported = run(config)
    assert document.facts["parity"]["onnx"]["agreement"] == 1.0
    session = onnxruntime.InferenceSession(exported.read_bytes("model.onnx"), providers=["CPUExecutionProvider"])
    student = models.load_student(config, Storage(config.output).child("student"), 2)
    preprocessing = config.student_preprocessing
    pixels = np.stack([images.decode(shade(k, k % 2 == 1), preprocessing) for k in range(3)])
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
    config = formats(config, "onnx")
    wrong = lambda material: (b"graph", lambda batch: np.zeros((len(batch), material.classes), np.float32))  # noqa: E731
    monkeypatch.setitem(export._FORMATS, "onnx", ("model.onnx", wrong))
    with pytest.raises(DataError, match="the exported onnx is not the model"):
        run(config)
    assert {file.path: exported.read_bytes(file.path) for file in exported.list_files()} == before


FAILED = gate.verdict(GateConfig(max_gap_to_teacher=2.0), gap=9.0, accuracy=0.9, calibration_error=0.0)


def test_a_student_that_failed_its_gate_is_not_exported(config):
    storage = Storage(config.output)
    failed = {**FACTS["evaluate"], "gate": FAILED}
    publish(storage.child("evaluation"), "evaluate", counts=COUNTS["evaluate"], facts=failed)
    with pytest.raises(GateError, match="too far behind its teacher"):
        run(config)
    assert storage.child("exported").kind() == "missing"


def test_parity_is_measured_on_real_images_normalised_as_in_training(config):
    batch = export._real_images(config, Storage(config.output).child("mined"))
    preprocessing = config.student_preprocessing
    pixels = np.stack([images.decode(shade(k, k % 2 == 1), preprocessing) for k in range(MINED)])
    np.testing.assert_allclose(batch, (pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25, atol=1e-5)


def test_an_image_that_the_job_allows_is_no_surprise_at_export(config, monkeypatch):
    # As if the default were 100 bytes, which the job raises.
    decode, small = images.decode, images.Limits(max_bytes=100)
    monkeypatch.setattr(
        images,
        "decode",
        lambda content, preprocessing, limits=small: decode(content, preprocessing, limits),
    )
    assert len(export._real_images(config, Storage(config.output).child("mined"))) == MINED


# -- eight bits, the digests, other images than the teacher's ----------------------------------------------


# -- MLflow's registry -------------------------------------------------------------------------------------


@pytest.fixture
def tracked(config, tmp_path, monkeypatch) -> JobConfig:
    """The job with a student whose training is known to an MLflow folder."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = TrackingConfig(mlflow_uri=f"file://{tmp_path}/mlruns")
    training = tracking.log_to_mlflow(settings, "job", {"seed": 0}, [], {})
    student = Storage(config.output).child("student")
    publish(student, "distill", counts=manifest.read(student).counts, facts={"mlflow_run": training})
    return formats(config, "onnx").model_copy(update={"tracking": settings})


def test_the_student_is_registered_with_its_signature(tracked, monkeypatch):
    import mlflow.onnx
    from mlflow import MlflowClient

    document, exported = run(tracked)
    assert document.facts["mlflow_model"] == f"models:/{tracked.name}/1"
    uri = tracked.tracking.mlflow_uri
    version = MlflowClient(uri).get_model_version(tracked.name, "1")
    training = manifest.read(Storage(tracked.output).child("student")).facts["mlflow_run"]
    assert (version.run_id, version.tags) == (training, {"pu_ray.identity": "identity"})
    assert MlflowClient(uri).get_run(training).data.metrics["test_student_accuracy"] == 0.93
    # As whoever deploys from the registry would.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    signature = mlflow.models.get_model_info(document.facts["mlflow_model"]).signature
    size = tracked.student_preprocessing.size_px
    (taken,), (given,) = signature.inputs.inputs, signature.outputs.inputs
    assert (taken.name, taken.type, taken.shape) == ("pixels", np.float32, (-1, 3, size, size))
    assert (given.name, given.type, given.shape) == ("logits", np.float32, (-1, 2))
    again = mlflow.onnx.load_model(document.facts["mlflow_model"]).SerializeToString()
    pixels = np.random.default_rng(0).normal(size=(3, 3, size, size)).astype(np.float32)
    answers = [session(graph).run(None, {"pixels": pixels})[0] for graph in (again, exported.read_bytes("model.onnx"))]
    np.testing.assert_array_equal(*answers)


def test_another_export_is_another_version_of_the_name_that_was_chosen(tracked):
    named = tracked.tracking.model_copy(update={"registered_model": "shop-window"})
    config = tracked.model_copy(update={"tracking": named})
    assert [run(config)[0].facts["mlflow_model"] for _ in range(2)] == [
        "models:/shop-window/1",
        "models:/shop-window/2",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"export": ExportConfig(formats=("safetensors",))}, "no ONNX file in export.formats"),
        ({"tracking": TrackingConfig(mlflow_uri="http://127.0.0.1:9")}, "MLflow does not take the model"),
    ],
)
def test_a_registry_that_takes_nothing_stops_no_export(tracked, monkeypatch, change, said):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    notes: list[str] = []
    listening = Silent()
    listening.note = notes.append
    config = tracked.model_copy(update=change)
    document = export.run(config, Storage(config.output), {}, "identity", listening)
    assert "mlflow_model" not in document.facts
    assert said in notes[0]


def session(content: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def test_every_format_is_there_by_default_and_each_is_told_apart(config):
    document, exported = run(config.model_copy(update={"export": ExportConfig()}))
    names = {
        "safetensors": "model.safetensors",
        "pt2": "model.pt2",
        "onnx": "model.onnx",
        "onnx-int8": "model.int8.onnx",
    }
    assert {name: about["file"] for name, about in document.facts["formats"].items()} == names
    for about in document.facts["formats"].values():
        assert about["bytes"] == len(exported.read_bytes(about["file"]))
        assert 0 < about["cpu_latency_ms"] < 1000
    assert document.facts["parity"].keys() == names.keys()
    assert document.counts["calibration_images"] == document.counts["parity_images"] == MINED // 2
    int8 = document.facts["parity"]["onnx-int8"]
    # Eight of twelve labeled images judge; the rest have the role `train`.
    assert (int8["labeled_images"], int8["accuracy_drop_points"]) == (8, 0.0)
    graph = onnx.load_from_string(exported.read_bytes("model.int8.onnx"))
    weights = [each for each in graph.graph.initializer if len(each.dims) == 4]
    assert weights
    assert {each.data_type for each in weights} == {onnx.TensorProto.INT8}
    # What was measured can be measured again from the file, by anybody.
    preprocessing = config.student_preprocessing
    batch = images.normalise(
        np.stack([images.decode(shade(k, k % 2 == 1), preprocessing) for k in range(0, MINED, 2)]), preprocessing
    )
    (logits,) = session(exported.read_bytes("model.int8.onnx")).run(["logits"], {"pixels": batch})
    (exact,) = session(exported.read_bytes("model.onnx")).run(["logits"], {"pixels": batch})
    assert int8["max_logit_difference"] == pytest.approx(np.abs(logits - exact).max(), abs=1e-3)
    assert int8["agreement"] == (logits.argmax(1) == exact.argmax(1)).mean()


@pytest.mark.parametrize("opset", [18, 24])
def test_the_oldest_and_the_newest_opset_run_on_this_runtime(config, opset):
    _, exported = run(formats(config, "onnx", "onnx-int8", opset=opset))
    for file in ("model.onnx", "model.int8.onnx"):
        content = exported.read_bytes(file)
        assert {each.domain: each.version for each in onnx.load_from_string(content).opset_import}[""] == opset
        assert session(content).run(["logits"], {"pixels": np.zeros((3, 3, 24, 24), np.float32)})[0].shape == (3, 2)


def test_no_image_calibrates_and_judges(config, monkeypatch):
    seen = {}
    real = quantise.to_int8
    monkeypatch.setattr(
        quantise,
        "to_int8",
        lambda graph, name, batch: seen.setdefault("batch", batch) is None or real(graph, name, batch),
    )
    compared = export._compared
    monkeypatch.setattr(export, "_compared", lambda *args: seen.update(judged=args[2]) or compared(*args))
    run(formats(config, "onnx-int8"))
    calibrates, judged = ({row.tobytes() for row in seen[key]} for key in ("batch", "judged"))
    assert len(calibrates) == len(judged) == MINED // 2
    assert not calibrates & judged


def test_one_mined_image_cannot_do_both(tmp_path):
    with pytest.raises(DataError, match="too few mined images") as caught:
        run(formats(prepared(tmp_path, mined=1), "onnx-int8"))
    assert "leave onnx-int8 out" in caught.value.hint


def test_a_network_that_cannot_be_quantised_stops_the_export_and_says_what_to_do(config, monkeypatch):
    from onnxruntime import quantization

    def refuse(*_, **__):
        raise ValueError("no such operator\nand a long story")

    monkeypatch.setattr(quantization, "quantize_static", refuse)
    with pytest.raises(DataError, match="cannot be quantised") as caught:
        run(formats(config, "onnx-int8"))
    assert caught.value.got == "ValueError: no such operator"
    assert caught.value.hint == "leave onnx-int8 out of export.formats"
    assert Storage(config.output).child("exported").kind() == "missing"


def test_labeled_images_that_changed_since_the_fit_do_not_judge(config, tmp_path):
    (tmp_path / "labeled/cat/new.png").write_bytes(shade(9999, False))
    with pytest.raises(DataError, match="labeled images have changed"):
        run(formats(config, "onnx-int8"))


def test_sha256sum_checks_the_folder_and_notices_a_change(config, tmp_path):
    _, exported = run(formats(config, "onnx"))
    check = lambda: subprocess.run(  # noqa: E731
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=exported.local_path, capture_output=True, text=True
    )
    done = check()
    assert done.returncode == 0, done.stderr
    files = {file.path for file in exported.list_files()} - {"manifest.json", "SHA256SUMS"}
    assert {line.removesuffix(": OK") for line in done.stdout.splitlines()} == files
    exported.write_bytes("labels.txt", b"dog\ncat\n")
    assert "labels.txt: FAILED" in check().stdout


GREY = {"size_px": 16, "channels": 1, "mean": [0.4], "std": [0.2]}


def test_a_student_with_images_of_its_own_is_exported_with_them_and_served(tmp_path):
    config = prepared(tmp_path, student={"preprocessing": GREY})
    _, exported = run(formats(config, "pt2", "onnx", "onnx-int8"))
    preprocessing = config.student_preprocessing
    assert json.loads(exported.read_bytes("preprocess.json")) == preprocessing.model_dump(mode="json")
    assert json.loads(exported.read_bytes("config.json"))["pretrained_cfg"]["input_size"] == [1, 16, 16]
    loaded = registry.load(exported.uri)
    assert loaded.student.preprocessing == preprocessing
    server = predictor.Predictor(loaded, images.Limits())
    server.warm_up()
    contents = [shade(k, k % 2 == 1) for k in range(4)]
    answer = server.predict(contents)
    student = models.load_student(config, Storage(config.output).child("student"), 2)
    batch = images.normalise(np.stack([images.decode(each, preprocessing) for each in contents]), preprocessing)
    with torch.inference_mode():
        np.testing.assert_allclose(answer.logits_NK, student(torch.from_numpy(batch)).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "options", "preprocessing"),
    [
        ("timm/test_resnet", {"drop_rate": 0.1}, {"size_px": 32, "interpolation": "bicubic"}),
        ("timm/test_vit", {"img_size": 32}, {"size_px": 32, "channels": 1, "mean": [0.4], "std": [0.3]}),
        ("timm/test_efficientnet", {}, {"size_px": 32, "resize_px": 47}),
    ],
)
def test_plain_timm_opens_the_folder_as_the_same_network(tmp_path, architecture, options, preprocessing):
    import timm
    from timm.data import create_transform, resolve_model_data_config

    classes = ["cat", "dog", "elk"]
    student = {"architecture": architecture, "options": options, "preprocessing": preprocessing}
    config = prepared(tmp_path, classes=classes, student=student)
    _, exported = run(config)
    network = timm.create_model(f"local-dir:{exported.local_path}", pretrained=True).eval()
    ours = models.load_student(config, Storage(config.output).child("student"), 3)
    wanted = config.student_preprocessing
    pictures = [Image.open(io.BytesIO(shade(k, k % 2 == 1))) for k in range(3)]
    pixels = np.stack([images.decode(shade(k, k % 2 == 1), wanted) for k in range(3)])
    batch = torch.from_numpy(images.normalise(pixels, wanted))
    with torch.inference_mode():
        assert network(batch).shape == (3, 3)
        torch.testing.assert_close(network(batch), ours(batch))
    assert network.pretrained_cfg["label_names"] == classes
    found = resolve_model_data_config(network)
    assert tuple(found["input_size"]) == (wanted.channels, 32, 32)
    assert (tuple(found["mean"]), tuple(found["std"])) == (wanted.mean, wanted.std)
    assert (found["interpolation"], found["crop_mode"]) == (wanted.interpolation, "center")
    assert math.floor(32 / found["crop_pct"]) == (wanted.resize_px or 32)
    if wanted.resize_px is None:  # else timm crops after resizing, at whole pixels
        mode = "RGB" if wanted.channels == 3 else "L"
        transform = create_transform(**found, is_training=False)
        theirs = torch.stack([transform(each.convert(mode)) for each in pictures])
        torch.testing.assert_close(theirs, batch, atol=0.02, rtol=0)
