"""tests/corpus.py against images.decode and against real lakes: one row per file, never an exception, never a bomb."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pu_ray import images, lake, schema
from pu_ray.config import LakeConfig, PreprocessingConfig
from tests import corpus
from tests.corpus import Case

ROOT = Path(__file__).parents[2]
PREPROCESSING = PreprocessingConfig(size_px=16)
LIMITS = images.Limits(corpus.MAX_BYTES, corpus.MAX_PX)
CASES = corpus.corpus()
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest takes our filter away
CENTRES = ((4, 4), (4, 11), (11, 4), (11, 11))  # row and column of each quadrant's, at 16 px


def difference(case: Case, pixels: np.ndarray) -> int:
    """Largest difference of a channel at the quadrants' centres."""
    found = np.array([pixels[place] for place in CENTRES], int)
    return int(np.abs(found - np.array(case.quadrants)).max())


# -- decode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("scaled", [False, True], ids=["full", "scaled"])
def test_each_file_becomes_its_picture_or_its_code(case, scaled):
    if case.code is not None:
        with pytest.raises(images.ImageError) as caught:
            images.decode(case.content, PREPROCESSING, LIMITS, scaled)
        assert caught.value.code == case.code, str(caught.value)
        return
    pixels = images.decode(case.content, PREPROCESSING, LIMITS, scaled)
    assert pixels.shape == (16, 16, 3)
    assert difference(case, pixels) <= case.tolerance


def test_the_corpus_is_what_it_promises():
    assert len({case.name for case in CASES}) == len(CASES) >= 45
    assert {case.code for case in CASES} == {None, *schema.ERROR_CODES}
    # The expectation can fail: no picture passes for another one.
    upright = next(case for case in CASES if case.name == "jpeg orientation 1")
    for orientation in range(2, 9):
        stored = corpus.encode(corpus._stored(orientation), "PNG")
        assert difference(upright, images.decode(stored, PREPROCESSING)) > 100


def test_every_file_is_decoded_within_bounded_memory_and_time_and_nothing_is_said_on_stderr(tmp_path):
    for number, case in enumerate(CASES):
        (tmp_path / f"{number:03d}").write_bytes(case.content)
    probe = f"""
import json, sys, time
from pathlib import Path
from pu_ray import images
from pu_ray.config import PreprocessingConfig
preprocessing, limits = PreprocessingConfig(size_px=16), images.Limits({corpus.MAX_BYTES}, {corpus.MAX_PX})
# Not ru_maxrss, which begins with that of the process that started this one.
peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])
images.decode(Path(sys.argv[1], "000").read_bytes(), preprocessing, limits)
before, slowest = peak(), 0.0
for path in sorted(Path(sys.argv[1]).iterdir()):
    content, started = path.read_bytes(), time.monotonic()
    try:
        images.decode(content, preprocessing, limits)
    except images.ImageError:
        pass
    slowest = max(slowest, time.monotonic() - started)
print(json.dumps([peak() - before, slowest]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", probe, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == ""
    grown_kib, slowest_s = json.loads(done.stdout)
    # The largest file, read twice over, and no more: every bomb in here would be 80 MB and up.
    assert grown_kib * 1024 < 2 * corpus.MAX_BYTES + 2**20 * 10
    assert slowest_s < 5


# -- lakes -------------------------------------------------------------------------------------------------


def as_parquet(folder: Path) -> None:
    names = [f"{number:03d}{case.suffix}" for number, case in enumerate(CASES)]
    contents = pa.array([case.content for case in CASES], pa.binary())
    pq.write_table(pa.table({"bytes": contents, "name": names}), folder / "part.parquet", row_group_size=10)


def as_tar(folder: Path) -> None:
    with tarfile.open(folder / "part.tar", "w") as archive:
        for number, case in enumerate(CASES):
            for suffix, content in ((case.suffix, case.content), (".json", b"{}"), (".cls", b"1")):
                member = tarfile.TarInfo(f"{number:03d}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def as_folder(folder: Path) -> None:
    for number, case in enumerate(CASES):
        (folder / f"{number:03d}{case.suffix}").write_bytes(case.content)


def as_uris(folder: Path) -> None:
    (folder / "images").mkdir()
    for number, case in enumerate(CASES):
        (folder / "images" / f"{number:03d}{case.suffix}").write_bytes(case.content)
    lines = [f"images/{number:03d}{case.suffix}\n" for number, case in enumerate(CASES)]
    (folder / "all.uris").write_text("".join(lines))


@pytest.mark.parametrize("write", [as_parquet, as_tar, as_folder, as_uris])
def test_a_lake_of_all_of_them_has_one_row_each_with_its_picture_or_its_code(tmp_path, write):
    write(tmp_path)
    kind = "uris" if write is as_uris else "auto"
    config = LakeConfig(uri=str(tmp_path), format=kind, max_image_bytes=corpus.MAX_BYTES, max_image_px=corpus.MAX_PX)
    chunks = lake.plan_chunks(config, lake.list_shards(config), 16)
    tables = [lake.read_chunk(config.uri, chunk) for chunk in chunks]
    decoded = pa.concat_tables([lake.decode_table(table, PREPROCESSING, LIMITS) for table in tables])
    assert decoded.schema == schema.decoded(16 * 16 * 3)
    names = [Path(name).stem for name in decoded[schema.NAME].to_pylist()]
    assert names == [f"{number:03d}" for number in range(len(CASES))]
    assert decoded[schema.ERROR].to_pylist() == [case.code for case in CASES]
    pixels = lake.to_matrix(decoded[schema.PIXELS])
    for number, case in enumerate(CASES):
        if case.code is None:
            assert difference(case, pixels[number].reshape(16, 16, 3)) <= case.tolerance, case.name
    ids = decoded[schema.SAMPLE_ID].to_pylist()
    for case, found in zip(CASES, ids, strict=True):
        # What is too long to be read has no identity; Parquet brings its bytes all the same.
        unread = len(case.content) > corpus.MAX_BYTES and write is not as_parquet
        assert found == (None if unread else images.sample_id(case.content)), case.name
