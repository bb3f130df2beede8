"""pu_ray/lake_inspect.py and `pu-ray lake inspect`: facts about a lake, against what was put into it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import encode, picture, png
from PIL import Image

from pu_ray import cli, lake, lake_inspect
from pu_ray.config import LakeConfig
from pu_ray.errors import DataError
from pu_ray.lake_inspect import Inspection
from pu_ray.progress import Silent


def write(folder: Path, contents, name="part.parquet") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"bytes": pa.array(contents, pa.binary())}), folder / name, row_group_size=4)


def look(folder: Path, sample=200, seed=0, **settings) -> Inspection:
    return lake_inspect.inspect(LakeConfig(uri=str(folder), **settings), sample, seed, Silent())[0]


# -- facts -------------------------------------------------------------------------------------------------


def test_every_image_of_a_small_lake_is_counted_and_described(tmp_path):
    contents = [
        encode(picture(0, side=40).crop((0, 0, 40, 10)), "JPEG"),
        encode(picture(1, side=20).convert("L")),
        encode(picture(2, side=30)),
        encode(picture(2, side=30)),
        b"<html>",
        b"",
        None,
    ]
    write(tmp_path, contents)
    (tmp_path / "loose").mkdir()
    gif = encode(picture(4, side=50), "GIF")
    (tmp_path / "loose" / "a.gif").write_bytes(gif)
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    found = look(tmp_path)
    assert {kind: (facts.shards, facts.files, facts.rows) for kind, facts in found.formats.items()} == {
        "parquet": (1, 1, 7),
        "folder": (1, 1, 1),
        "tar": (1, 1, 1),
    }
    assert (found.shards, found.rows, found.rows_exact) == (3, 9, True)
    assert found.formats["parquet"].size_bytes == (tmp_path / "part.parquet").stat().st_size
    sample = found.sample
    assert sample.images == 9
    assert sample.formats == {"PNG": 3, "JPEG": 1, "GIF": 1}
    assert sample.modes == {"RGB": 3, "L": 1, "P": 1}
    assert (sample.width_px[0], sample.width_px[2], sample.width_px[-1]) == (20, 30, 50)
    assert (sample.height_px[0], sample.height_px[2], sample.height_px[-1]) == (10, 30, 50)
    assert (sample.size_bytes[0], sample.size_bytes[-1]) == (0, len(gif))
    assert {code: facts.count for code, facts in sample.errors.items()} == {
        "not_an_image": 1,
        "truncated": 1,
        "unreadable": 2,
    }
    assert sample.errors["not_an_image"].examples == ("part.parquet row 4",)
    assert set(sample.errors["unreadable"].examples) == {"part.parquet row 6", "bad.tar row 0"}
    assert sample.duplicates == 1
    assert found.fingerprint == lake.fingerprint(lake.list_shards(LakeConfig(uri=str(tmp_path))))


def test_named_images_are_named_in_the_examples(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("1.png", "2.png", "3.png", "4.png", "5.png"):
        (tmp_path / "x" / name).write_bytes(b"text")
    facts = look(tmp_path).sample.errors["not_an_image"]
    assert facts.count == 5
    assert facts.examples == ("x/1.png row 0", "x/1.png row 1 (x/2.png)", "x/1.png row 2 (x/3.png)")


def test_rows_of_many_shards_are_projected_by_bytes_and_that_is_said(tmp_path):
    for number in range(60):
        write(tmp_path, [png(0, side=8)] * (10 if number % 2 else 40), f"{number:02d}.parquet")
    found = look(tmp_path, sample=5)
    facts = found.formats["parquet"]
    assert (facts.shards, facts.opened_shards, facts.rows_exact, found.rows_exact) == (60, 20, False, False)
    assert facts.rows == pytest.approx(30 * 50, rel=0.2)
    assert "projected" in lake_inspect.render(found)


def test_loose_files_are_counted_without_opening_any(tmp_path, monkeypatch):
    monkeypatch.setattr(lake, "_FILES_PER_GROUP", 2)
    for number in range(60):
        (tmp_path / f"{number:02d}.png").write_bytes(png(number, side=4))
    facts = look(tmp_path).formats["folder"]
    assert (facts.shards, facts.files, facts.rows, facts.rows_exact, facts.opened_shards) == (30, 60, 60, True, 0)


# -- the sample --------------------------------------------------------------------------------------------


def test_the_sample_is_random_and_the_same_for_the_same_seed(tmp_path):
    write(tmp_path, [png(number, side=4 + number % 50) for number in range(300)])
    first, again, other = (look(tmp_path, 40, seed).sample for seed in (0, 0, 1))
    assert first.images == other.images == 40
    assert first == again
    assert first.model_copy(update={"seed": 1}) != other
    # Not the head of the lake, and not one row twice.
    assert first.width_px[-1] - first.width_px[0] > 30
    assert first.duplicates == 0


def test_each_row_of_each_chunk_can_be_drawn_and_none_twice(tmp_path):
    sizes = [3, 1, 7, 5]
    shard = lake.Shard("a", "parquet", "f", 1)
    chunks = [lake.Chunk(shard, first, rows) for first, rows in zip([0, 3, 4, 11], sizes, strict=True)]
    for sample in (1, 5, 16, 99):
        counts = np.zeros(16, int)
        for seed in range(300):
            drawn = lake_inspect._draw(chunks, sample, seed)
            rows = [row for _, wanted in drawn for row in wanted]
            assert len(set(rows)) == len(rows) == min(sample, 16)
            for chunk, wanted in drawn:
                assert all(chunk.first_row <= row < chunk.first_row + chunk.rows for row in wanted)
            counts[rows] += 1
        expected = 300 * min(sample, 16) / 16
        assert np.abs(counts - expected).max() <= 5 * np.sqrt(expected) + 1e-9
    assert lake_inspect._draw([], 5, 0) == []


def test_only_the_sampled_rows_are_read(tmp_path, monkeypatch):
    write(tmp_path, [png(number, side=6) for number in range(200)])
    asked = []
    read_chunk = lake.read_chunk
    monkeypatch.setattr(lake, "read_chunk", lambda uri, chunk, rows: asked.extend(rows) or read_chunk(uri, chunk, rows))
    assert look(tmp_path, 10).sample.images == len(asked) == 10


# -- the contact sheet -------------------------------------------------------------------------------------


def test_the_sheet_shows_the_pictures_in_order_and_says_why_one_is_missing(tmp_path):
    contents = [encode(Image.new("RGB", (30, 30), colour)) for colour in ("red", "blue")]
    write(tmp_path, [contents[0], b"<html>", contents[1]])
    _, tiles = lake_inspect.inspect(LakeConfig(uri=str(tmp_path)), 10, 0, Silent())
    lake_inspect.write_sheet(str(tmp_path / "out" / "sheet.png"), tiles)
    sheet = Image.open(tmp_path / "out" / "sheet.png")
    assert sheet.size == (3 * 98 - 2, 96)
    assert sheet.getpixel((48, 48)) == (255, 0, 0)
    assert sheet.getpixel((2 * 98 + 48, 48)) == (0, 0, 255)
    broken = np.asarray(sheet.crop((98, 0, 98 + 96, 96)))
    assert broken.min() < 50  # the code, written in black
    assert tuple(broken[0, 0]) == (211, 211, 211)


def test_a_sheet_of_many_has_rows(tmp_path):
    sheet = Image.open(io.BytesIO(lake_inspect.contact_sheet([Image.new("RGB", (96, 96), "red")] * 33)))
    assert sheet.size == (16 * 98 - 2, 3 * 98 - 2)
    assert sheet.getpixel((48, 2 * 98 + 48)) == (255, 0, 0)
    assert sheet.getpixel((98 + 48, 2 * 98 + 48)) == (255, 255, 255)


def test_of_a_large_sample_some_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(lake_inspect, "_SHEET_TILES", 5)
    write(tmp_path, [png(number, side=6) for number in range(21)])
    found, tiles = lake_inspect.inspect(LakeConfig(uri=str(tmp_path)), 100, 0, Silent())
    assert (found.sample.images, len(tiles)) == (21, 5)


# -- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def call(capsys):
    """Runs the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli._run(list(arguments))
        seen = capsys.readouterr()
        return status, seen.out, seen.err

    return run


def test_the_command_prints_a_table_and_says_on_stderr_what_it_does(tmp_path, call):
    write(tmp_path / "lake", [png(number, side=6) for number in range(1234)] + [b"<html>"])
    sheet = tmp_path / "sheet.png"
    status, out, err = call("lake", "inspect", str(tmp_path / "lake"), "--sample", "1235", "--sheet", str(sheet))
    assert status == 0
    for part in (
        "1 shards, 1,235 images (counted)",
        "parquet",
        "PNG 1,234",
        "not_an_image 1, for example part.parquet",
    ):
        assert part in out
    assert f"listing {tmp_path}/lake" in err
    assert Image.open(sheet).width > 96
    assert call("lake", "inspect", str(tmp_path / "lake"), "--quiet")[2] == ""


def test_the_command_as_json_is_the_inspection(tmp_path, call):
    write(tmp_path, [png(number, side=6) for number in range(30)])
    status, out, _ = call("lake", "inspect", str(tmp_path), "--json", "--sample", "7", "--seed", "3")
    assert status == 0
    document = json.loads(out)
    assert (document["rows"], document["rows_exact"], document["shards"]) == (30, True, 1)
    assert document["sample"] == look(tmp_path, 7, 3).sample.model_dump(mode="json")


def test_a_lake_without_images_exits_with_3_and_a_wrong_kind_with_2(tmp_path, call):
    status, out, err = call("lake", "inspect", str(tmp_path))
    assert (status, out) == (3, "")
    assert "the lake holds no images" in err
    status, out, err = call("lake", "inspect", str(tmp_path), "--format", "zip")
    assert (status, out) == (2, "")
    assert err.startswith("error (config/invalid-lake-argument): --format: the lake cannot be named so\n")
    assert "'parquet'" in err
    assert "got: zip" in err
    with pytest.raises(DataError):
        look(tmp_path)
