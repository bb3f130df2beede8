"""pu_ray/report_curves.py: against scikit-learn where the truth is known, against drawn mixtures where it is not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from artifacts import identity_columns, job, write_shards
from scipy import stats
from sklearn.metrics import precision_recall_curve

from pu_ray import images, report_curves, schema
from pu_ray.measures import mining_quality
from pu_ray.storage import Storage

GIVEN = {"estimate": 0.2, "low": 0.2, "high": 0.2, "is_upper_bound": False}


def test_measured_points_lie_on_the_curve_of_scikit_learn():
    generator = np.random.default_rng(0)
    positive = generator.random(500) < 0.3
    scores = np.round(generator.normal(positive, 1), 1)  # with ties
    points = report_curves.measured(scores, positive)
    precision, recall, thresholds = precision_recall_curve(positive, scores)
    known = {t: (p, r) for t, p, r in zip(thresholds, precision, recall, strict=False)}
    assert 30 < len(points) <= 60
    for point in points:
        assert (point["precision"], point["recall"]) == pytest.approx(known[point["threshold"]])
        assert point["kept"] == np.count_nonzero(scores >= point["threshold"])
    assert points[-1]["recall"] == 1
    assert [point["threshold"] for point in points] == sorted((each["threshold"] for each in points), reverse=True)


def test_what_the_gate_rejected_is_never_recalled():
    points = report_curves.measured([2.0, 1.0, -np.inf, -np.inf], [True, False, True, False])
    assert [(point["threshold"], point["recall"]) for point in points] == [(2.0, 0.5), (1.0, 0.5)]


@pytest.mark.parametrize(("scores", "positive"), [([], []), ([1.0, 2.0], [False, False])])
def test_without_a_positive_nothing_is_measured(scores, positive):
    assert report_curves.measured(scores, positive) == []


def draw(generator, n_positive: int, n_lake: int, prior: float = 0.2):
    """Scores of labeled positives and of a lake, and the lake's truth."""
    truth = generator.random(n_lake) < prior
    return generator.normal(1, 1, n_positive), generator.normal(2 * truth - 1, 1), truth


def test_the_estimate_is_near_the_truth_of_a_large_draw():
    calibration, lake, truth = draw(np.random.default_rng(1), 20_000, 100_000)
    points = report_curves.estimated(calibration, lake, GIVEN)
    assert len(points) > 30
    for point in points:
        kept = lake >= point["threshold"]
        assert point["recall"]["value"] == pytest.approx(truth[kept].sum() / truth.sum(), abs=0.02)
        if kept.sum() > 2_000:
            assert point["precision"]["value"] == pytest.approx(truth[kept].mean(), abs=0.04)


def test_the_band_holds_the_truth_as_often_as_it_says():
    generator, held, asked = np.random.default_rng(2), 0, 0
    for _ in range(60):
        calibration, lake, _ = draw(generator, 100, 1_000)
        points = report_curves.estimated(calibration, lake, GIVEN)
        for point in points[:: max(1, len(points) // 4)]:
            positives, others = (
                share * stats.norm.sf(point["threshold"], mean) for share, mean in ((0.2, 1), (0.8, -1))
            )
            held += point["precision"]["low"] <= positives / (positives + others) <= point["precision"]["high"]
            asked += 1
    assert asked > 200
    assert held / asked >= 0.85


def test_nothing_is_estimated_from_fewer_than_fifty_images():
    calibration, lake, _ = draw(np.random.default_rng(3), 50, 2_000)
    points = report_curves.estimated(calibration, lake, GIVEN)
    assert all(np.count_nonzero(lake >= point["threshold"]) >= 50 for point in points)
    assert report_curves.estimated(calibration, lake[:40], GIVEN) == []


def test_with_a_prior_that_is_an_upper_bound_the_band_reaches_down_to_nothing():
    calibration, lake, _ = draw(np.random.default_rng(4), 200, 5_000)
    points = report_curves.estimated(calibration, lake, {**GIVEN, "is_upper_bound": True})
    assert {point["precision"]["low"] for point in points} == {0.0}


def test_what_the_gate_rejected_counts_as_lost():
    calibration = np.r_[np.full(50, -np.inf), np.linspace(1, 2, 50)]
    points = report_curves.estimated(calibration, np.linspace(0, 3, 600), GIVEN)
    assert max(point["recall"]["value"] for point in points) == 0.5


CONTENTS = [b"%d" % k for k in range(200)]
IDS = [images.sample_id(content) for content in CONTENTS]


@pytest.fixture
def run(tmp_path):
    """A run over 200 images, the even ones positive; the first is a leak, the last is there twice, one is broken."""
    config = job(tmp_path, lake={"uri": f"{tmp_path}/lake", "truth": f"{tmp_path}/truth.parquet"})
    storage = Storage(config.output)
    scores = np.random.default_rng(5).normal(np.arange(200) % 2 == 0, 1).astype(np.float32)
    errors = [None] * 199 + [None, "truncated"]
    rows = {
        **identity_columns([*CONTENTS, CONTENTS[-1]]),
        schema.SCORE: pa.array([*scores, None], pa.float32()),
        schema.ERROR: pa.array(errors, pa.string()),
    }
    twice = pa.table(rows).slice(199, 1)
    write_shards(storage.child("scores"), {"a": pa.table(rows), "b": twice})
    scorer = {"calibration.parquet": scores[::2], "unlabeled.parquet": scores}
    for name, values in scorer.items():
        storage.child("scorer").write_table(name, pa.table({schema.SCORE: values}))
    left_out = {schema.SAMPLE_ID: pa.array(IDS[:1], schema.SAMPLE_ID_TYPE)}
    storage.child("selection").write_table("left_out.parquet", pa.table(left_out))
    classes = {schema.SAMPLE_ID: pa.array(IDS, schema.SAMPLE_ID_TYPE), schema.CLASS: [0, -1] * 100}
    Storage(str(tmp_path)).write_table("truth.parquet", pa.table(classes))
    return config, storage, scores


def test_a_runs_curve_agrees_with_what_the_evaluation_measures(run):
    config, storage, scores = run
    points = report_curves.of_run(config, storage, GIVEN, truth_was_used=True)["measured"]
    truth = dict(zip(IDS, [0, -1] * 100, strict=True))
    for point in points:
        selected = {one for one, score in zip(IDS, scores, strict=True) if score >= point["threshold"]} - set(IDS[:1])
        quality = mining_quality(selected, truth, set(IDS), set(IDS[:1]))
        assert point["kept"] == len(selected)
        assert point["precision"] == pytest.approx(quality["mined_precision"]["value"])
        assert point["recall"] == pytest.approx(quality["mined_recall"]["value"])


def test_the_truth_is_looked_at_only_where_the_evaluation_did(run):
    config, storage, _ = run
    Storage(config.lake.truth).split()[0].delete("truth.parquet")
    curves = report_curves.of_run(config, storage, GIVEN, truth_was_used=False)
    assert curves["measured"] == []
    assert curves["estimated"]
