"""pu_ray/select.py: the rule, one row per content, nothing labeled, nothing judged on, then balance."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from artifacts import CLASSES, encode, identity_columns, job, picture, png, publish, write_shards
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from pu_ray import images, lake, manifest, schema, select
from pu_ray.config import PreprocessingConfig
from pu_ray.errors import DataError
from pu_ray.progress import Silent
from pu_ray.storage import Storage

PREPROCESSING = PreprocessingConfig(size_px=24)
CALIBRATION = np.linspace(0.5, 6.0, 60)  # 59 positives are the fewest for 0.95 with 0.95: the lowest is the threshold


@dataclass
class Row:
    """One row of the lake: an image with its score and the teacher's class."""

    content: bytes
    score: float | None
    predicted: int = 0
    error: str | None = None
    confidence: float = 0.9
    energy: float = 1.0
    entropy: float = 0.3
    neighbour: float = 0.5
    features: tuple[float, float] = (0.0, 0.0)


@dataclass
class Scene:
    """Scores, features, scorer and test images as the stages before would have left them."""

    root: Path
    shards: dict[str, list[Row]] = field(default_factory=dict)
    labeled: list[bytes] = field(default_factory=list)
    test: list[bytes] = field(default_factory=lambda: [png(9_000)])

    cache: bool = True
    calibration: list[float] = field(default_factory=lambda: list(CALIBRATION))
    calibration_classes: list[int] = field(default_factory=list)
    truth: dict[bytes, int] = field(default_factory=dict)

    def run(self, **settings: Any) -> pa.Table:
        """Select, and return selection.parquet."""
        self.write()
        known = {"lake": {"uri": f"{self.root}/lake", "truth": f"{self.root}/truth.parquet"}} if self.truth else {}
        config = job(self.root, selection=settings, features={"cache": self.cache}, **known)
        self.manifest = select.run(config, self.storage, {}, "identity", Silent())
        return self.storage.child("selection").read_table("selection.parquet")

    @property
    def storage(self) -> Storage:
        return Storage(f"{self.root}/run")

    @property
    def left_out(self) -> dict[bytes, str]:
        table = self.storage.child("selection").read_table("left_out.parquet")
        return dict(zip(table[schema.SAMPLE_ID].to_pylist(), table[schema.WHY].to_pylist(), strict=True))

    def write(self) -> None:
        scorer = self.storage.child("scorer")
        ids = pa.array([images.sample_id(content) for content in self.labeled], schema.SAMPLE_ID_TYPE)
        scorer.write_table("labeled.parquet", pa.table({schema.SAMPLE_ID: ids}))
        predicted = self.calibration_classes or [0] * len(self.calibration)
        promises = {
            schema.SCORE: pa.array(self.calibration, pa.float32()),
            schema.PREDICTED: pa.array(predicted, pa.int32()),
        }
        scorer.write_table("calibration.parquet", pa.table(promises))
        publish(scorer, "fit", facts={"classes": CLASSES})
        if self.truth:
            columns = {
                schema.SAMPLE_ID: pa.array(
                    [images.sample_id(content) for content in self.truth], schema.SAMPLE_ID_TYPE
                ),
                schema.CLASS: pa.array(list(self.truth.values()), pa.int32()),
            }
            Storage(str(self.root)).write_table("truth.parquet", pa.table(columns))
        test = Storage(f"{self.root}/test")
        test.delete()
        for position, content in enumerate(self.test):
            test.write_bytes(f"cat/{position:03d}.png", content)
        scores = {name: _scores(name, rows) for name, rows in self.shards.items()}
        features = {name: _features(name, rows) for name, rows in self.shards.items()}
        if self.cache:
            write_shards(self.storage.child("features"), features)
        else:
            for name, table in scores.items():
                place = table.column_names.index(schema.ERROR)
                scores[name] = table.add_column(place, schema.THUMBNAIL, features[name][schema.THUMBNAIL])
                assert scores[name].schema == schema.scores(thumbnails=True)
        write_shards(self.storage.child("scores"), scores)


def _scores(shard: str, rows: list[Row]) -> pa.Table:
    columns = {
        **identity_columns([row.content for row in rows], shard),
        schema.SCORE: pa.array([row.score for row in rows], pa.float32()),
        schema.PREDICTED: pa.array([row.predicted for row in rows], pa.int32()),
        schema.CONFIDENCE: pa.array([row.confidence for row in rows], pa.float32()),
        schema.ENERGY: pa.array([row.energy for row in rows], pa.float32()),
        schema.ENTROPY: pa.array([row.entropy for row in rows], pa.float32()),
        schema.NEIGHBOUR: pa.array([row.neighbour for row in rows], pa.float32()),
        schema.ERROR: pa.array([row.error for row in rows], pa.string()),
    }
    return pa.table(columns, schema=schema.scores())


def _features(shard: str, rows: list[Row]) -> pa.Table:
    broken = [row.error is not None for row in rows]
    small = np.zeros((len(rows), schema.THUMBNAIL_PX), np.uint8)
    for position, row in enumerate(rows):
        if not broken[position]:
            small[position] = images.thumbnails(images.decode(row.content, PREPROCESSING)[None])[0]
    columns = {
        **identity_columns([row.content for row in rows], shard),
        schema.FEATURES: lake.fixed_list(np.array([row.features for row in rows], np.float16).reshape(-1, 2), broken),
        schema.LOGITS: lake.fixed_list(np.zeros((len(rows), 2), np.float32), broken),
        schema.THUMBNAIL: lake.fixed_list(small, broken),
        schema.GATE: pa.nulls(len(rows), pa.float32()),
        schema.ERROR: pa.array([row.error for row in rows], pa.string()),
    }
    return pa.table(columns, schema=schema.features(2, 2))


@pytest.fixture
def scene(tmp_path) -> Scene:
    return Scene(tmp_path)


def ids(*contents: bytes) -> list[bytes]:
    return [images.sample_id(content) for content in contents]


def chosen(table: pa.Table) -> set[bytes]:
    return set(table[schema.SAMPLE_ID].to_pylist())


def brighter(content: bytes) -> bytes:
    """Another file that shows the same picture to any person."""
    import io

    return encode(ImageEnhance.Brightness(Image.open(io.BytesIO(content))).enhance(0.9))


# -- pure functions ----------------------------------------------------------------------------------------


def test_the_random_key_depends_on_image_and_seed_alone():
    samples = ids(*(bytes([k]) for k in range(200)))
    keys = {sample: select.random_key(sample, 3) for sample in samples}
    assert {sample: select.random_key(sample, 3) for sample in reversed(samples)} == keys
    assert all(0 <= key < 1 for key in keys.values())
    assert len(set(keys.values())) == len(samples)
    assert {sample: select.random_key(sample, 4) for sample in samples} != keys


def test_random_keys_are_uniform_and_other_seeds_give_unrelated_ones():
    samples = ids(*(k.to_bytes(2, "big") for k in range(2000)))
    one, other = ([select.random_key(sample, seed) for sample in samples] for seed in (0, 1))
    assert abs(np.mean(one) - 0.5) < 0.03
    counts, _ = np.histogram(one, bins=10, range=(0, 1))
    assert counts.min() > 140
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.08


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.randoms(use_true_random=False))
def test_every_prefix_of_the_order_holds_the_classes_in_about_their_shares(classes, random):
    ties = list(range(len(classes)))
    random.shuffle(ties)
    order = select.stratified_order(classes, ties)
    assert sorted(order) == list(range(len(classes)))  # a permutation
    in_order = np.asarray(classes)[np.argsort(order)]
    kinds = np.unique(classes)
    for end in range(1, len(classes) + 1):
        for value in kinds:
            expected = end * np.mean(np.asarray(classes) == value)
            assert abs(np.sum(in_order[:end] == value) - expected) <= len(kinds) / 2 + 0.5


def test_a_shuffled_order_would_fail_the_prefix_test():
    # The bound above can tell: sorted by class, half of the prefix is one class.
    in_order = np.repeat([0, 1], 40)
    assert abs(np.sum(in_order[:40] == 0) - 20) > 2 / 2 + 0.5


def test_the_order_inside_a_class_is_that_of_the_tie_break():
    order = select.stratified_order([0, 0, 0, 1, 1], [0.9, 0.1, 0.5, 0.2, 0.1])
    assert order[1] < order[2] < order[0]
    assert order[4] < order[3]


def test_the_order_does_not_depend_on_the_order_of_the_rows():
    classes, ties = np.array([0, 1, 0, 1, 1, 2]), np.array([0.3, 0.1, 0.2, 0.6, 0.5, 0.4])
    shuffle = np.array([5, 3, 1, 0, 4, 2])
    np.testing.assert_array_equal(
        select.stratified_order(classes, ties)[shuffle], select.stratified_order(classes[shuffle], ties[shuffle])
    )


# -- rules -------------------------------------------------------------------------------------------------


def test_the_recall_rule_keeps_what_reaches_the_promised_threshold(scene):
    scores = [0.49, 0.5, 0.51, 3.0, -4.0]
    rows = [Row(png(k), score) for k, score in enumerate(scores)]
    scene.shards = {"a": rows}
    table = scene.run()
    assert chosen(table) == set(ids(*(row.content for row in rows if row.score >= 0.5)))
    assert scene.manifest.facts["threshold"] == 0.5
    assert scene.manifest.facts["promise"]["calibration"] == 60
    assert set(table[schema.WHY].to_pylist()) == {"recall"}


def test_the_zero_rule_is_strict(scene):
    scores = [0.0, -0.0, 1e-30, -1e-30, 5.0]
    scene.shards = {"a": [Row(png(k), score) for k, score in enumerate(scores)]}
    assert chosen(scene.run(rule="zero")) == set(ids(png(2), png(4)))
    assert scene.manifest.facts["promise"] is None


def test_the_budget_rule_takes_the_best(scene):
    scores = [3.0, -1.0, 2.0, 5.0, -9.0]
    scene.shards = {"a": [Row(png(k), score) for k, score in enumerate(scores)]}
    assert chosen(scene.run(rule="budget", budget=3)) == set(ids(png(3), png(0), png(2)))
    assert scene.manifest.facts["threshold"] is None


def test_a_budget_larger_than_the_lake_takes_all(scene):
    scene.shards = {"a": [Row(png(k), float(k)) for k in range(4)]}
    assert scene.run(rule="budget", budget=100).num_rows == 4


def test_quotas_share_a_budget_between_the_classes(scene):
    # Class 0 has the higher scores; without quotas it would take everything.
    scene.shards = {"a": [Row(png(k), 9.0 - 0.1 * k, predicted=int(k >= 8)) for k in range(12)]}
    with_quota = scene.run(rule="budget", budget=6)
    assert Counter(with_quota[schema.PREDICTED].to_pylist()) == {0: 3, 1: 3}
    assert chosen(with_quota) == set(ids(*(png(k) for k in (0, 1, 2, 8, 9, 10))))
    assert scene.manifest.facts["class_counts_before_balance"] == [8, 4]
    assert scene.manifest.facts["class_counts"] == [3, 3]
    without = scene.run(rule="budget", budget=6, balance="none")
    assert Counter(without[schema.PREDICTED].to_pylist()) == {0: 6}


def test_a_recall_rule_with_a_budget_keeps_both_promises(scene):
    scene.shards = {"a": [Row(png(k), k - 3.0) for k in range(10)]}
    assert chosen(scene.run(budget=2)) == set(ids(png(9), png(8)))
    assert scene.run(budget=100).num_rows == 6  # those at or above 0.5: 1.0 to 6.0


def test_scores_that_are_equal_fall_by_content_not_by_place(scene):
    rows = [Row(png(k), 1.0) for k in range(10)]
    scene.shards = {"a": rows[:5], "b": rows[5:]}
    one = chosen(scene.run(rule="budget", budget=4))
    scene.shards = {"a": rows[::-1][:7], "b": rows[::-1][7:]}
    assert chosen(scene.run(rule="budget", budget=4)) == one
    assert one == set(sorted(ids(*(png(k) for k in range(10))))[:4])


def test_the_random_rule_ignores_scores_classes_and_the_order_of_files(scene):
    rows = [Row(png(k), float(k), predicted=int(k < 3)) for k in range(20)]
    scene.shards = {"a": rows[:10], "b": rows[10:]}
    one = chosen(scene.run(rule="random", budget=6))
    shuffled = [Row(row.content, -row.score, 1 - row.predicted) for row in rows[::-1]]
    scene.shards = {"a": shuffled[:3], "x": shuffled[3:15], "y": shuffled[15:]}
    assert chosen(scene.run(rule="random", budget=6)) == one
    ranked = sorted(ids(*(png(k) for k in range(20))), key=lambda sample: select.random_key(sample, 0), reverse=True)
    assert one == set(ranked[:6])


def test_another_seed_draws_other_random_images(scene):
    scene.shards = {"a": [Row(png(k), 1.0) for k in range(30)]}
    one = chosen(scene.run(rule="random", budget=8))
    config = job(scene.root, selection={"rule": "random", "budget": 8}, seed=1)
    select.run(config, scene.storage, {}, "identity", Silent())
    assert chosen(scene.storage.child("selection").read_table("selection.parquet")) != one


def test_error_rows_and_scores_that_are_no_number_are_never_chosen(scene):
    scene.shards = {
        "a": [Row(png(0), 1.0), Row(b"broken", 9.0, error="truncated"), Row(png(2), float("nan")), Row(png(3), None)]
    }
    for settings in ({"rule": "budget", "budget": 9}, {"rule": "random", "budget": 9}, {"rule": "zero"}, {}):
        assert chosen(scene.run(**settings)) == set(ids(png(0)))


# -- controls, and what is preferred -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "column"), [("confidence", "confidence"), ("energy", "energy"), ("neighbours", "neighbour")]
)
def test_a_control_takes_the_first_by_what_it_ranks_by(scene, rule, column):
    scene.shards = {"a": [Row(png(k), score=-5.0, **{column: k / 10}) for k in range(9)]}
    assert chosen(scene.run(rule=rule, budget=3)) == set(ids(png(6), png(7), png(8)))


def test_everything_is_everything_that_may_be_mined(scene):
    scene.labeled = [png(1)]
    scene.shards = {"a": [Row(png(k), score=-5.0) for k in range(5)] + [rejected_by_the_gate(png(7))]}
    assert chosen(scene.run(rule="everything")) == set(ids(png(0), png(2), png(3), png(4), png(7)))


def test_the_oracle_takes_the_true_positives_whatever_their_scores(scene):
    scene.shards = {"a": [Row(png(k), score=float(-k)) for k in range(8)]}
    scene.truth = {png(k): (k % 2) - 1 for k in range(8)}  # odd ones are of class 0
    assert chosen(scene.run(rule="oracle")) == set(ids(png(1), png(3), png(5), png(7)))
    assert len(chosen(scene.run(rule="oracle", budget=2))) == 2


def test_the_oracle_fills_its_budget_however_early_others_are_forgotten(scene, monkeypatch):
    scene.shards = {f"{k}": [Row(png(8 * k + j), score=1.0) for j in range(8)] for k in range(5)}
    scene.truth = {png(k): 0 if k >= 35 else -1 for k in range(40)}
    monkeypatch.setattr(select, "_PRUNE_AT", 0)
    assert chosen(scene.run(rule="oracle", budget=5)) == set(ids(*(png(k) for k in range(35, 40))))


def test_the_oracle_may_choose_what_the_gate_rejected(scene):
    scene.shards = {"a": [Row(png(k), score=1.0) for k in range(4)] + [rejected_by_the_gate(png(7))]}
    scene.truth = {png(k): 0 if k in (2, 7) else -1 for k in (0, 1, 2, 3, 7)}
    assert chosen(scene.run(rule="oracle", budget=2)) == set(ids(png(2), png(7)))


def test_among_those_that_pass_the_least_certain_may_be_preferred(scene):
    scene.shards = {"a": [Row(png(k), score=1.0 + k, entropy=2.0 - k / 5) for k in range(8)]}
    scene.shards["a"].append(Row(png(50), score=-9.0, entropy=9.0))
    assert chosen(scene.run(budget=3)) == set(ids(png(5), png(6), png(7)))
    assert chosen(scene.run(budget=3, prefer="uncertain")) == set(ids(png(0), png(1), png(2)))


def test_any_of_those_that_pass_is_a_draw_that_the_seed_decides(scene):
    scene.shards = {"a": [Row(png(k), score=1.0 + k) for k in range(40)] + [Row(png(99), score=-9.0)]}
    ranked = sorted(ids(*(png(k) for k in range(40))), key=lambda sample: select.random_key(sample, 0), reverse=True)
    assert chosen(scene.run(budget=6, prefer="any")) == set(ranked[:6])


def test_spread_gives_every_region_of_feature_space_its_share(scene):
    # 60 images in one corner, 6 in each of two others: purest-first would never see these.
    rows = [Row(png(k), score=50.0 - k / 10, features=(0.01 * k, 0.0)) for k in range(60)]
    rows += [Row(png(100 + k), score=2.0, features=(90.0, 0.01 * k)) for k in range(6)]
    rows += [Row(png(200 + k), score=2.0, features=(0.01 * k, 90.0)) for k in range(6)]
    scene.shards = {"a": rows}
    far = set(ids(*(png(100 + k) for k in range(6)), *(png(200 + k) for k in range(6))))
    assert not chosen(scene.run(budget=30, balance="none")) & far
    once = chosen(scene.run(budget=30, balance="none", prefer="spread"))
    assert far <= once
    assert len(once) == 30
    assert chosen(scene.run(budget=30, balance="none", prefer="spread")) == once


# -- other promises ----------------------------------------------------------------------------------------


def test_each_predicted_class_may_have_its_own_threshold(scene):
    scene.calibration = [*np.linspace(5.0, 9.0, 60), *np.linspace(0.5, 2.0, 60)]
    scene.calibration_classes = [0] * 60 + [1] * 60
    rows = [Row(png(0), 4.0, predicted=0), Row(png(1), 5.5, predicted=0)]
    scene.shards = {"a": [*rows, Row(png(2), 1.0, predicted=1), Row(png(3), 0.1, predicted=1)]}
    assert chosen(scene.run(per="class")) == set(ids(png(1), png(2)))
    per_class = scene.manifest.facts["promise"]["per_class"]
    assert [each["value"] for each in per_class] == pytest.approx([5.0, 0.5])


def test_too_few_calibration_images_of_a_class_are_refused_with_what_to_do(scene):
    scene.calibration_classes = [0] * 50 + [1] * 10
    scene.shards = {"a": [Row(png(0), 4.0)]}
    with pytest.raises(DataError, match="too few calibration images for this promise") as caught:
        scene.run(per="class")
    assert caught.value.where == "selection.per"
    assert "59 calibration positives of each predicted class, got 50 of class 0, 10 of class 1" in caught.value.got


def test_what_is_discarded_holds_few_positives(scene):
    # 300 lake images far below every calibration positive, 20 among them.
    rows = [Row(png(k), score=-30.0 - k / 100) for k in range(300)]
    rows += [Row(png(1000 + k), score=1.0 + k / 4) for k in range(20)]
    scene.calibration = list(np.linspace(0.5, 6.0, 200))
    scene.shards = {"a": rows[:150], "b": rows[150:]}
    table = scene.run(rule="fdr_discard", fdr=0.05)
    assert chosen(table) == set(ids(*(png(1000 + k) for k in range(20))))


def test_where_nothing_can_be_discarded_all_stay_and_the_manifest_says_so(scene):
    scene.shards = {"a": [Row(png(k), score=3.0) for k in range(5)]}
    assert len(scene.run(rule="fdr_discard", fdr=0.05)) == 5
    promise = scene.manifest.facts["promise"]
    assert (promise["value"], promise["discarded"], scene.manifest.facts["threshold"]) == (None, 0, None)


# -- near copies of each other -----------------------------------------------------------------------------


def test_of_two_near_copies_the_better_stays(scene):
    scene.shards = {"a": [Row(png(0), 1.0), Row(brighter(png(0)), 2.0), Row(png(1), 1.0)]}
    assert chosen(scene.run()) == set(ids(brighter(png(0)), png(1)))
    assert scene.left_out == dict(zip(ids(png(0)), ["near_duplicate"], strict=True))
    assert len(scene.run(duplicates="exact")) == 3


# -- one row per content -----------------------------------------------------------------------------------


def test_copies_in_the_lake_are_chosen_once_at_their_first_place(scene):
    scene.shards = {
        "b": [Row(png(0), 1.0), Row(png(1), 1.0)],
        "a": [Row(png(2), 1.0), Row(png(1), 1.0), Row(png(1), 1.0)],
    }
    table = scene.run()
    places = {row["sample_id"]: (row["shard"], row["row"]) for row in table.to_pylist()}
    assert places == dict(zip(ids(png(0), png(1), png(2)), [("b", 0), ("a", 1), ("a", 0)], strict=True))
    assert scene.manifest.counts["candidates"] == 3


# -- what must not be mined --------------------------------------------------------------------------------


def test_labeled_and_test_images_and_near_copies_stay_out_with_the_reason(scene):
    scene.test = [png(100), png(101)]
    scene.labeled = [png(200)]
    scene.shards = {
        "a": [Row(png(0), 1.0), Row(png(100), 9.0), Row(png(200), 9.0)],
        "b": [Row(brighter(png(101)), 9.0), Row(png(1), 1.0)],
    }
    assert chosen(scene.run()) == set(ids(png(0), png(1)))
    near = brighter(png(101))
    reasons = ["leak", "labeled", "near_leak"]
    assert scene.left_out == dict(zip(ids(png(100), png(200), near), reasons, strict=True))
    counts = scene.manifest.counts
    assert [counts[name] for name in ("selected", "candidates", "labeled", "leak", "near_leak")] == [2, 5, 1, 1, 1]


def test_an_exact_copy_is_called_a_leak_even_where_it_is_labeled_or_near_another(scene):
    scene.test = [png(100), brighter(png(100))]
    scene.labeled = [png(100), brighter(png(101))]
    scene.test.append(png(101))
    scene.shards = {"a": [Row(png(0), 1.0), Row(png(100), 9.0), Row(brighter(png(101)), 9.0)]}
    scene.run()
    assert scene.left_out == dict(zip(ids(png(100), brighter(png(101))), ["leak", "labeled"], strict=True))


def forget(scene: Scene, *contents: bytes) -> None:
    lines = [f"{sample.hex()} selected\n" for sample in ids(*contents)]
    scene.storage.write_bytes("forgotten.txt", "".join(lines).encode())


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("rule", ["recall", "zero", "random"])
def test_what_the_run_has_to_forget_stays_out_whatever_the_rule(scene, rule, cache):
    scene.cache = cache
    scene.shards = {"a": [Row(png(0), 9.0), Row(png(1), 1.0)], "b": [Row(png(0), 9.0), Row(png(2), 1.0)]}
    settings = {"rule": rule, **({"budget": 3} if rule == "random" else {})}
    assert chosen(scene.run(**settings)) == set(ids(png(0), png(1), png(2)))
    assert scene.manifest.counts["forgotten"] == 0
    forget(scene, png(0), png(77))
    assert chosen(scene.run(**settings)) == set(ids(png(1), png(2)))
    assert scene.left_out == dict(zip(ids(png(0)), ["forgotten"], strict=True))
    assert (scene.manifest.counts["forgotten"], scene.manifest.counts["candidates"]) == (1, 3)


def test_no_copy_steps_into_the_place_of_what_was_forgotten(scene):
    copy = brighter(png(0))
    scene.shards = {"a": [Row(png(0), 9.0), Row(png(1), 1.0)], "b": [Row(copy, 8.0)]}
    assert chosen(scene.run()) == set(ids(png(0), png(1)))
    assert scene.left_out == dict(zip(ids(copy), ["near_duplicate"], strict=True))
    forget(scene, png(0))
    assert chosen(scene.run()) == set(ids(png(1)))
    assert scene.left_out == dict(zip(ids(png(0), copy), ["forgotten", "near_forgotten"], strict=True))
    assert scene.manifest.counts["near_forgotten"] == 1


def test_a_copy_goes_too_where_the_forgotten_image_itself_would_not_have_been_chosen(scene):
    scene.shards = {"a": [Row(png(0), -9.0), Row(png(1), 1.0)], "b": [Row(brighter(png(0)), 8.0)]}
    forget(scene, png(0))
    assert chosen(scene.run()) == set(ids(png(1)))


def test_the_bound_for_near_copies_is_the_jobs(scene):
    # A weak blend of another picture: nearly, but not quite, the test image.
    blend = encode(Image.blend(picture(100), picture(55), 0.25))
    scene.test = [png(100)]
    scene.shards = {"a": [Row(png(0), 1.0), Row(blend, 1.0)]}
    assert len(scene.run(near_copy_correlation=0.999)) == 2
    assert len(scene.run(near_copy_correlation=0.8)) == 1
    assert set(scene.left_out.values()) == {"near_leak"}


def test_what_does_not_pass_the_rule_is_not_counted_as_left_out(scene):
    scene.test = [png(100)]
    scene.shards = {"a": [Row(png(0), 1.0), Row(png(100), -9.0)]}
    scene.run()
    assert scene.left_out == {}


def test_the_budget_is_filled_with_what_may_be_mined(scene):
    scene.labeled = [png(k) for k in range(5)]
    scene.shards = {"a": [Row(png(k), 20.0 - k) for k in range(10)]}
    for settings in ({"rule": "budget"}, {"rule": "random"}):
        table = scene.run(budget=5, **settings)
        assert chosen(table) == set(ids(*(png(k) for k in range(5, 10))))


# -- pruning on the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"rule": "budget"}, {"rule": "random"}, {"rule": "budget", "balance": "none"}])
def test_forgetting_hopeless_rows_on_the_way_does_not_change_the_choice(scene, monkeypatch, settings):
    generator = np.random.default_rng(0)
    rows = [Row(png(k), float(generator.normal()), predicted=int(generator.random() < 0.3)) for k in range(40)]
    scene.shards = {f"{k}": rows[8 * k : 8 * k + 8] for k in range(5)}
    whole = scene.run(budget=8, **settings)
    monkeypatch.setattr(select, "_PRUNE_AT", 0)
    assert scene.run(budget=8, **settings) == whole


@pytest.mark.parametrize("settings", [{"rule": "budget"}, {"rule": "random"}])
def test_forgetting_on_the_way_leaves_enough_to_fill_the_budget(scene, monkeypatch, settings):
    scene.labeled = [png(k) for k in range(5)]
    scene.shards = {f"{k}": [Row(png(2 * k + j), 20.0 - 2 * k - j) for j in range(2)] for k in range(5)}
    monkeypatch.setattr(select, "_PRUNE_AT", 0)
    assert chosen(scene.run(budget=5, **settings)) == set(ids(*(png(k) for k in range(5, 10))))


# -- what is published -------------------------------------------------------------------------------------


def test_the_selection_is_ordered_so_that_every_prefix_is_stratified(scene):
    scene.shards = {"a": [Row(png(k), 1.0 + k, predicted=int(k >= 20)) for k in range(30)]}
    table = scene.run()
    assert table.schema == schema.selection()
    assert table[schema.ORDER].to_pylist() == list(range(30))
    predicted = np.array(table[schema.PREDICTED].to_pylist())
    for end in (3, 6, 15, 24):
        assert abs(predicted[:end].mean() - 1 / 3) <= 1.5 / end


def test_running_again_gives_the_same_files(scene):
    scene.shards = {"a": [Row(png(k), 1.0 + k, predicted=k % 2) for k in range(9)]}
    scene.labeled = [png(3)]
    target = scene.storage.child("selection")
    scene.run()
    before = {file.path: target.read_bytes(file.path) for file in target.list_files() if file.path != "manifest.json"}
    target.write_bytes("leftover.parquet", b"of an older run")
    scene.run()
    after = {file.path: target.read_bytes(file.path) for file in target.list_files() if file.path != "manifest.json"}
    assert after == before
    assert manifest.is_current(target, "identity")


@pytest.mark.parametrize("shards", [{"a": [Row(png(0), -50.0)]}, {}])
def test_when_nothing_passes_the_run_stops_and_says_why(scene, shards):
    scene.shards = shards
    with pytest.raises(DataError, match="no image was selected") as caught:
        scene.run()
    assert caught.value.got.startswith("0 above 0.5")
    assert manifest.read(scene.storage.child("selection")) is None


def test_when_all_that_passes_is_excluded_the_message_counts_it(scene):
    scene.labeled = [png(0)]
    scene.shards = {"a": [Row(png(0), 5.0)]}
    with pytest.raises(DataError, match="no image was selected") as caught:
        scene.run()
    assert caught.value.got == "1 above 0.5, 1 of them excluded"


def test_without_a_scorer_the_command_that_makes_it_is_named(scene):
    with pytest.raises(DataError, match="does not exist yet") as caught:
        select.run(job(scene.root), scene.storage, {}, "identity", Silent())
    assert "pu-ray fit" in caught.value.hint


# -- behind a cascade, and without a feature cache ---------------------------------------------------------


def rejected_by_the_gate(content: bytes) -> Row:
    return Row(content, score=-np.inf, predicted=schema.NO_CLASS)


@pytest.mark.parametrize("settings", [{"rule": "budget", "budget": 10}, {"rule": "zero"}, {"rule": "recall"}])
def test_what_the_gate_rejected_is_no_candidate(scene, settings):
    passed = [Row(png(k), score=9.0 + k, predicted=k % 2) for k in range(4)]
    scene.shards = {"a": [*passed, *(rejected_by_the_gate(png(100 + k)) for k in range(6))]}
    assert chosen(scene.run(**settings)) == set(ids(*(png(k) for k in range(4))))
    assert sum(scene.manifest.facts["class_counts"]) == 4


def test_a_random_control_draws_from_what_the_gate_rejected_too(scene):
    scene.shards = {"a": [Row(png(0), score=1.0), *(rejected_by_the_gate(png(100 + k)) for k in range(40))]}
    table = scene.run(rule="random", budget=20)
    assert table.num_rows == 20
    assert schema.NO_CLASS in table[schema.PREDICTED].to_pylist()


def test_a_gate_that_breaks_the_promise_stops_the_run(scene):
    scene.shards = {"a": [Row(png(k), score=1.0) for k in range(4)]}
    scene.calibration = [*CALIBRATION, *[-np.inf] * len(CALIBRATION)]
    with pytest.raises(DataError, match="gate rejects too many") as caught:
        scene.run(rule="recall", recall=0.9)
    assert str(len(CALIBRATION)) in str(caught.value.got)


def test_without_a_feature_cache_near_copies_are_found_by_the_scores_thumbnails(scene):
    scene.cache = False
    scene.shards = {"a": [Row(png(1), score=5.0), Row(brighter(png(9_000)), score=5.0), Row(png(2), score=4.0)]}
    assert chosen(scene.run(rule="zero")) == set(ids(png(1), png(2)))
    assert list(scene.left_out.values()) == ["near_leak"]
