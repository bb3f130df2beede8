"""pu_ray/demo.py: a real task whose test images are nowhere else, except where a leak was planted to be found."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pu_ray import demo, images, schema
from pu_ray.config import PreprocessingConfig
from pu_ray.demo import DemoSize
from pu_ray.errors import ConfigError
from pu_ray.progress import Silent

PREPROCESSING = PreprocessingConfig(size_px=28, channels=1, mean=(demo.MEAN,), std=(demo.STD,))
# Little of everything, and a teacher that hardly learns, so that building is quick.
SMALL = DemoSize(
    lake_rows=700,
    test_per_class=30,
    teacher_per_class=20,
    labeled_per_class=12,
    hidden_per_class=30,
    teacher_steps=1,
    leaks=10,
    broken=7,
    copies=5,
)


_real_digits = functools.cache(demo.digits)  # parsing them takes seconds


@pytest.fixture(autouse=True)
def digits_are_read_once(monkeypatch):
    monkeypatch.setattr(demo, "digits", _real_digits)


# -- pure functions ----------------------------------------------------------------------------------------


def test_the_long_tail_falls_geometrically_to_a_quarter():
    tail = demo.long_tail(1000, 10)
    assert tail[0] == 1000
    assert tail[-1] == 250
    ratios = np.array(tail[1:]) / tail[:-1]
    np.testing.assert_allclose(ratios, 0.25 ** (1 / 9), rtol=0.01)


LABELS = np.repeat(np.arange(10), 60)


def shared(seed=0, **sizes) -> dict:
    plain = {"test_per_class": 10, "teacher_per_class": 20, "labeled_per_class": 5, "hidden_per_class": 30}
    return demo._share_out(LABELS, DemoSize(**{**plain, **sizes}), np.random.default_rng(seed))


def test_digits_that_judge_that_teach_and_that_hide_are_apart():
    parts = shared()
    sets = {name: set(rows.tolist()) for name, rows in parts.items()}
    assert all(len(sets[name]) == len(parts[name]) for name in parts)
    assert not sets["test"] & (sets["teacher"] | sets["hidden"] | sets["labeled"])
    assert not sets["hidden"] & sets["teacher"]
    assert sets["labeled"] <= sets["teacher"]


def test_each_class_gets_its_number_and_the_hidden_ones_a_long_tail():
    parts = shared()
    for name, each in (("test", 10), ("teacher", 20), ("labeled", 5)):
        assert np.bincount(LABELS[parts[name]]).tolist() == [each] * 10
    assert np.bincount(LABELS[parts["hidden"]]).tolist() == demo.long_tail(30, 10)


def test_the_shares_depend_on_the_seed_alone():
    one, again = shared(), shared()
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
    assert one["test"].tolist() != shared(seed=1)["test"].tolist()


@pytest.mark.parametrize(
    "sizes", [{"teacher_per_class": 21}, {"test_per_class": 61}, {"labeled_per_class": 22}, {"hidden_per_class": 31}]
)
def test_more_digits_than_there_are_is_a_configuration_error(sizes):
    with pytest.raises(ConfigError, match="more digits than there are") as caught:
        shared(**sizes)
    assert "<= 60 per class" in caught.value.allowed
    assert all(str(size) in caught.value.got for size in sizes.values())


def test_letters_are_white_on_black_readable_in_size_and_follow_the_generator():
    one = demo.letters(12, np.random.default_rng(5))
    assert one.shape == (12, 28, 28)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, demo.letters(12, np.random.default_rng(5)))
    assert (one != demo.letters(12, np.random.default_rng(6))).any()
    assert len({tile.tobytes() for tile in one}) == 12
    for tile in one:
        assert tile.max() > 120
        assert 0.02 < (tile > 60).mean() < 0.6
        assert np.concatenate([tile[0], tile[-1]]).mean() < 60


def test_every_letter_can_be_seen():
    darkest = demo.letters(200, np.random.default_rng(0)).max(axis=(1, 2)).min()
    assert darkest > 120


def test_no_letters_are_no_letters():
    assert demo.letters(0, np.random.default_rng(0)).shape == (0, 28, 28)


def test_encoding_is_lossless_and_the_same_every_time():
    tile = np.random.default_rng(0).integers(0, 256, (28, 28)).astype(np.uint8)
    content = demo.encode_png(tile)
    assert content == demo.encode_png(tile.copy())
    np.testing.assert_array_equal(images.decode(content, PREPROCESSING)[..., 0], tile)


def test_digits_are_real_images_of_ten_classes():
    pixels, labels = _real_digits()
    assert pixels.shape[1:] == (28, 28)
    assert pixels.dtype == np.uint8
    assert len(pixels) == len(labels)
    assert sorted(set(labels.tolist())) == list(range(10))
    assert np.bincount(labels).min() > 100


# -- the whole task ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "task"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "digits", _real_digits)
        demo.build(str(folder), SMALL, 0, Silent())
    return folder


def lake_rows(folder: Path) -> list[bytes]:
    files = sorted((folder / "lake").glob("*.parquet"))
    return [content for file in files for content in pq.read_table(file)[schema.BYTES].to_pylist()]


def collection(folder: Path, name: str) -> dict[bytes, str]:
    return {path.read_bytes(): path.parent.name for path in (folder / name).rglob("*.png")}


def test_the_lake_has_the_size_that_was_asked_for_and_holds_what_lakes_hold(built):
    rows = lake_rows(built)
    assert len(rows) == SMALL.lake_rows
    codes = []
    for content in rows:
        try:
            images.decode(content, PREPROCESSING)
        except images.ImageError as error:
            codes.append(error.code)
    assert len(codes) == SMALL.broken


def test_the_lake_holds_as_many_copies_as_were_asked_for(built):
    rows = lake_rows(built)
    assert len(rows) - len(set(rows)) == SMALL.copies


def test_test_images_are_in_the_lake_only_where_a_leak_was_planted(built):
    rows, test = lake_rows(built), collection(built, "test")
    exact = [content for content in rows if content in test]
    assert len(exact) == SMALL.leaks // 2
    judged = images.thumbnails(np.stack([images.decode(content, PREPROCESSING) for content in test]))
    usable = [content for content in set(rows) - set(exact) if _decodes(content)]
    lake = images.thumbnails(np.stack([images.decode(content, PREPROCESSING) for content in usable]))
    assert images.near_copies(lake, judged, 0.995).sum() == SMALL.leaks // 2


def _decodes(content: bytes) -> bool:
    try:
        images.decode(content, PREPROCESSING)
    except images.ImageError:
        return False
    return True


def test_labeled_images_are_neither_judged_on_nor_hidden(built):
    labeled, test = collection(built, "labeled"), collection(built, "test")
    assert len(labeled) == 10 * SMALL.labeled_per_class
    assert len(test) == 10 * SMALL.test_per_class
    assert not set(labeled) & set(test)
    assert not set(labeled) & set(lake_rows(built))


def test_the_truth_names_every_content_of_the_lake_once(built):
    truth = pq.read_table(built / "truth.parquet")
    assert truth.schema == schema.truth()
    known = dict(zip(truth[schema.SAMPLE_ID].to_pylist(), truth[schema.CLASS].to_pylist(), strict=True))
    assert len(known) == truth.num_rows
    assert set(known) == {images.sample_id(content) for content in lake_rows(built)}
    test = collection(built, "test")
    for content in lake_rows(built):
        if content in test:
            assert known[images.sample_id(content)] == int(test[content])
    assert sum(label >= 0 for label in known.values()) == sum(demo.long_tail(30, 10)) + SMALL.leaks
    assert min(known.values()) == -1


def test_digits_do_not_lie_together_in_the_lake(built):
    truth = pq.read_table(built / "truth.parquet")
    known = dict(zip(truth[schema.SAMPLE_ID].to_pylist(), truth[schema.CLASS].to_pylist(), strict=True))
    is_digit = np.array([known[images.sample_id(content)] >= 0 for content in lake_rows(built)])
    first, second = is_digit[:350].sum(), is_digit[350:].sum()
    assert 0.5 < first / second < 2


def test_building_again_does_nothing_and_says_the_same(built, monkeypatch):
    monkeypatch.setattr(demo, "digits", lambda: pytest.fail("built again"))
    again = demo.build(str(built), SMALL, 0, Silent())
    assert again["lake_rows"] == SMALL.lake_rows
    assert again["test"] == 300


def test_another_size_or_seed_is_another_task(built, monkeypatch):
    class Built(Exception):
        pass

    def fail():
        raise Built

    monkeypatch.setattr(demo, "digits", fail)
    monkeypatch.setattr(demo.Storage, "delete", lambda self, path="": None)
    for size, seed in ((SMALL, 1), (DemoSize(), 0)):
        with pytest.raises(Built):
            demo.build(str(built), size, seed, Silent())


def test_the_same_seed_builds_the_same_task(built, tmp_path):
    demo.build(str(tmp_path / "again"), SMALL, 0, Silent())
    for path in sorted(built.rglob("*")):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(built)).read_bytes() == path.read_bytes(), path.name


def test_a_build_that_was_interrupted_is_begun_again(tmp_path, monkeypatch):
    folder = tmp_path / "task"

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_write_lake", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.build(str(folder), SMALL, 0, Silent())
    assert (folder / "labels.txt").exists()
    begun = []
    monkeypatch.setattr(demo, "_write_lake", lambda *_: begun.append(True) or interrupted())
    with pytest.raises(KeyboardInterrupt):
        demo.build(str(folder), SMALL, 0, Silent())
    assert begun


# -- what is refused ---------------------------------------------------------------------------------------


def test_an_impossible_size_is_refused_before_the_teacher_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_train_teacher", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="more digits than there are"):
        demo.build(str(tmp_path / "task"), DemoSize(test_per_class=10_000), 0, Silent())


@pytest.mark.parametrize(
    "sizes", [{"lake_rows": 100}, {"leaks": 0}, {"copies": 400}], ids=["small lake", "no leaks", "more copies"]
)
def test_a_lake_that_cannot_be_filled_as_asked_is_a_configuration_error_or_a_lake(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(demo, "_train_teacher", lambda *_: pytest.fail("trained"))
    size = DemoSize(**{**SMALL.__dict__, **sizes})
    parts = demo._share_out(demo.digits()[1], size, np.random.default_rng(0))
    target = demo.Storage(str(tmp_path / "task"))
    try:
        written = demo._write_lake(target, *demo.digits(), parts, size, np.random.default_rng(0))
    except ConfigError:
        return
    assert written["lake_rows"] == size.lake_rows


def test_a_folder_that_holds_something_else_is_not_deleted(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(demo, "digits", stop)
    with pytest.raises((ConfigError, Stop)):
        demo.build(str(tmp_path), SMALL, 0, Silent())
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
