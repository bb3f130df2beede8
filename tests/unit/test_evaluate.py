"""pu_ray/evaluate.py: what the stage tells of two small networks, against what they say when asked directly."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from artifacts import job, picture, png, publish, write_shards
from sklearn.metrics import top_k_accuracy_score

from pu_ray import evaluate, gate, images, lake, measures, models, schema
from pu_ray.config import JobConfig
from pu_ray.errors import ConfigError, DataError, GateError
from pu_ray.manifest import Manifest
from pu_ray.progress import Silent
from pu_ray.storage import Storage

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
PER_CLASS = 6
# The student looks at small grey images, its teacher at colour.
SMALL_GREY = {"size_px": 16, "channels": 1, "mean": [0.4], "std": [0.2]}


def untrained(network, classes: int, preprocessing) -> torch.nn.Module:
    """A network that gives every class about as often, though it knows nothing."""
    built = models.build(network, classes, preprocessing.channels).eval()
    shown = np.stack([images.decode(png(seed), preprocessing) for seed in range(50)])
    with torch.no_grad():
        logits = built(torch.from_numpy(images.normalise(shown, preprocessing)))
        built.head.weight /= logits.std(0)[:, None]
        built.head.bias.copy_((built.head.bias - logits.mean(0)) / logits.std(0))
    return built


def make(root, classes=CLASSES, **sections) -> JobConfig:
    """A job with a teacher, a student and test images; the networks are not trained."""
    config = job(root, **{"student": {"preprocessing": SMALL_GREY}, **sections})
    (root / "labels.txt").write_text("\n".join(classes) + "\n")
    for k, name in enumerate(classes):
        (root / "test" / name).mkdir(parents=True, exist_ok=True)
        for number in range(PER_CLASS):
            picture(100 * k + number).save(root / "test" / name / f"{number}.png")
    torch.manual_seed(3)
    teacher = untrained(config.teacher, len(classes), config.teacher.preprocessing)
    student = untrained(config.student, len(classes), config.student_preprocessing)
    (root / "teacher.safetensors").write_bytes(models.save_weights(teacher))
    folder = Storage(config.output).child("student")
    folder.write_bytes("model.safetensors", models.save_weights(student))
    publish(folder, "distill", counts={"parameters": models.parameter_count(student)})
    return config


def run(config: JobConfig) -> Manifest:
    return evaluate.run(config, Storage(config.output), {}, "identity", Silent())


def probabilities(config: JobConfig, who: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities, true classes and names, by the plain way: one image after the other."""
    preprocessing = config.teacher.preprocessing if who == "teacher" else config.student_preprocessing
    network = {
        "teacher": lambda: models.load_teacher(config.teacher)[0].tapped.network,
        "student": lambda: models.load_student(config, Storage(config.output).child("student"), len(CLASSES)),
    }[who]()
    test = lake.read_labeled(config.test.uri, CLASSES)
    rows = []
    with torch.inference_mode():
        for content in test.encoded:
            pixels = images.normalise(images.decode(content, preprocessing)[None], preprocessing)
            rows.append(torch.softmax(network(torch.from_numpy(pixels)).double(), dim=1)[0].numpy())
    return np.array(rows), test.labels, test.names


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[JobConfig, Manifest]:
    """One run, for all tests that only look."""
    config = make(tmp_path_factory.mktemp("job"))
    return config, run(config)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_each_network_is_judged_on_the_images_as_it_takes_them(evaluated, who):
    config, document = evaluated
    expected, labels, _ = probabilities(config, who)
    facts, right = document.facts, expected.argmax(axis=1) == labels
    assert facts[f"{who}_accuracy"] == measures.share_of(right)
    top5 = top_k_accuracy_score(labels, expected, k=5, labels=np.arange(7))
    assert facts[f"{who}_top5_accuracy"]["value"] == pytest.approx(top5)
    assert facts[f"{who}_top5_accuracy"]["n"] == len(labels) == 42
    assert facts[f"{who}_calibration_error"] == pytest.approx(
        measures.expected_calibration_error(expected.max(axis=1), right), abs=1e-6
    )
    assert facts[f"{who}_accuracy_per_class"] == {
        name: measures.share_of(right[labels == k]) for k, name in enumerate(CLASSES)
    }


def test_gap_and_agreement_are_of_the_same_answers(evaluated):
    config, document = evaluated
    teacher, labels, _ = probabilities(config, "teacher")
    student, _, _ = probabilities(config, "student")
    same = teacher.argmax(1) == student.argmax(1)
    assert 0 < same.sum() < 42
    assert document.facts["agreement"] == same.mean()
    assert document.facts["agreement_interval"] == measures.share_of(same)
    hits = [(each.argmax(1) == labels).sum() for each in (teacher, student)]
    assert hits[0] != hits[1]  # else the next line could not fail
    assert document.facts["gap_to_teacher"] == pytest.approx(100 * (hits[0] - hits[1]) / 42)


def test_mistakes_name_images_that_show_them(evaluated):
    config, document = evaluated
    student, labels, names = probabilities(config, "student")
    said = dict(zip(names, student.argmax(1), strict=True))
    pairs = document.facts["confusion_pairs"]
    assert sum(pair["count"] for pair in pairs) <= (student.argmax(1) != labels).sum()
    assert pairs
    for pair in pairs:
        for name in pair["examples"]:
            assert name.startswith(f"{pair['true']}/")
            assert CLASSES[said[name]] == pair["predicted"]


def test_the_cost_is_that_of_the_two_networks(evaluated):
    config, document = evaluated
    teacher, student = document.facts["cost"]["teacher"], document.facts["cost"]["student"]
    assert teacher["parameters"] == document.counts["teacher_parameters"]
    assert student["parameters"] == document.counts["student_parameters"]
    assert teacher["weights_bytes"] == 4 * teacher["parameters"]
    stored = Storage(config.output).child("student").read_bytes("model.safetensors")
    assert student["weights_bytes"] == len(stored)
    # The same network with half the width has about a quarter of the work, and sees 16 / 24 of each side.
    assert student["multiply_adds"] / teacher["multiply_adds"] == pytest.approx((16 / 24) ** 2 / 4, rel=0.25)
    assert 0 < student["cpu_latency_ms"] < 1000


def test_answers_are_a_row_per_image(evaluated):
    config, _ = evaluated
    table = Storage(config.output).child("evaluation").read_table("answers.parquet")
    assert table.column_names == [
        *(schema.SAMPLE_ID, schema.NAME, schema.CLASS),
        *("teacher_predicted", "teacher_confidence", "student_predicted", "student_confidence"),
    ]
    student, labels, names = probabilities(config, "student")
    assert table[schema.NAME].to_pylist() == names
    assert table[schema.CLASS].to_pylist() == labels.tolist()
    assert table["student_predicted"].to_pylist() == student.argmax(1).tolist()
    np.testing.assert_allclose(table["student_confidence"].to_numpy(), student.max(1), atol=1e-5)


def test_the_batch_size_changes_no_answer(evaluated, tmp_path):
    _, document = evaluated
    again = run(make(tmp_path, evaluation={"batch_size": 5}))
    for key in ("student_accuracy", "teacher_accuracy", "agreement", "confusion_pairs"):
        assert again.facts[key] == document.facts[key]


def test_among_five_classes_or_fewer_nobody_is_asked_for_five(tmp_path):
    facts = run(make(tmp_path, CLASSES[:5])).facts
    assert not [key for key in facts if "top5" in key]
    assert facts["slices"] == {}


# -- slices ------------------------------------------------------------------------------------------------


def test_accuracy_is_told_for_each_value_of_a_column(tmp_path):
    names = [f"{name}/{number}.png" for name in CLASSES for number in range(PER_CLASS)]
    sites = {name: "south" if int(name[-5]) < 2 else "north" for name in names}
    pq.write_table(
        pa.table({"name": names[::-1], "site": [sites[name] for name in names[::-1]]}), tmp_path / "m.parquet"
    )
    config = make(tmp_path, evaluation={"metadata": f"{tmp_path}/m.parquet", "slices": ["site"]})
    told = run(config).facts["slices"]["site"]
    assert [(row["value"], row["n"]) for row in told] == [("north", 28), ("south", 14)]
    for who in ("teacher", "student"):
        expected, labels, order = probabilities(config, who)
        right = expected.argmax(1) == labels
        for row in told:
            inside = np.array([sites[name] == row["value"] for name in order])
            assert row[f"{who}_accuracy"] == measures.share_of(right[inside])


def test_wrong_metadata_stops_before_any_network_runs(tmp_path, monkeypatch):
    (tmp_path / "m.csv").write_text("name,site\nant/0.png,south\n")
    monkeypatch.setattr(evaluate, "_answers", lambda *_: pytest.fail("a network ran"))
    config = make(tmp_path, evaluation={"metadata": f"{tmp_path}/m.csv", "slices": ["site"]})
    with pytest.raises(DataError, match="lacks test images"):
        run(config)
    config = make(tmp_path, evaluation={"metadata": f"{tmp_path}/m.csv", "slices": ["camera"]})
    with pytest.raises(ConfigError, match="no such column"):
        run(config)
    assert Storage(config.output).child("evaluation").kind() == "missing"


# -- gate and truth ----------------------------------------------------------------------------------------


def test_the_gate_judges_what_was_measured_and_the_evaluation_is_published_all_the_same(tmp_path):
    config = make(tmp_path, evaluation={"gate": {"min_accuracy": 0.99, "max_calibration_error": 1.0}})
    document = run(config)
    judged = document.facts["gate"]
    assert judged["passed"] is False
    assert judged["violated"] == [
        {"setting": "min_accuracy", "bound": 0.99, "got": document.facts["student_accuracy"]["value"]}
    ]
    with pytest.raises(GateError, match="right too rarely") as caught:
        gate.require(document, "evaluation")
    assert caught.value.exit_status == 5


def test_a_gap_of_exactly_the_bound_passes(tmp_path, monkeypatch):
    # 100 * (0.93 - 0.91) is a little more than 2.
    labels = np.zeros(100, int)
    hits = {"teacher": 93, "student": 91}
    config = make(tmp_path, evaluation={"gate": {"max_gap_to_teacher": 2.0}})
    many = lake.LabeledImages([bytes([k]) * 16 for k in range(100)], [str(k) for k in range(100)], labels, [b""] * 100)
    monkeypatch.setattr(lake, "read_labeled", lambda *_: many)

    def answers(network, test, preprocessing, config):
        who = "teacher" if preprocessing == config.teacher.preprocessing else "student"
        right = np.arange(100) < hits[who]
        return evaluate.Answers(np.where(right, 0, 1), np.ones(100), right, right)

    monkeypatch.setattr(evaluate, "_answers", answers)
    judged = run(config).facts["gate"]
    assert judged["gap_to_teacher"] == 2.0
    assert judged["passed"] is True


def test_where_the_truth_is_known_mining_is_judged_too(tmp_path):
    config = make(tmp_path, lake={"truth": f"{tmp_path}/truth.parquet"})
    storage = Storage(config.output)
    samples = [bytes([k]) * 16 for k in range(6)]
    ids = lambda rows: pa.array([samples[k] for k in rows], schema.SAMPLE_ID_TYPE)  # noqa: E731
    classes = pa.array([0, 1, 2, -1, -1, 3], pa.int32())
    pq.write_table(pa.table({schema.SAMPLE_ID: ids(range(6)), schema.CLASS: classes}), tmp_path / "truth.parquet")
    errors = pa.array([None, None, None, None, None, "truncated"])
    write_shards(storage.child("scores"), {"a": pa.table({schema.SAMPLE_ID: ids(range(6)), schema.ERROR: errors})})
    storage.child("selection").write_table("selection.parquet", pa.table({schema.SAMPLE_ID: ids([0, 3])}))
    storage.child("selection").write_table("left_out.parquet", pa.table({schema.SAMPLE_ID: ids([2])}))
    facts = run(config).facts
    # Of 0 and 3 one is right; of 0 and 1, without the excluded 2 and the broken 5, one was found.
    assert facts["mined_precision"]["value"] == 0.5
    assert (facts["mined_recall"]["value"], facts["mined_recall"]["n"]) == (0.5, 2)
    assert facts["true_prior"] == pytest.approx(3 / 5)
