"""Contact sheets of report.html: what was mined, just missed, left out and confused, and what could not be used.

A page must open quickly whatever the number of classes: only so many pictures are embedded as fit a budget, and no
more images are read from the lake again than a person can look at. What the run has forgotten never appears.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pu_ray import images, lake, ledger, schema
from pu_ray.config import JobConfig
from pu_ray.lineage import forgotten_list, lookup
from pu_ray.page import Picture, inline
from pu_ray.storage import Storage

# Bytes of a page's class sheets, as they stand in it; with plots and tables a page stays below 8 MB.
BUDGET_BYTES = 6_000_000
# And no more classes than this are decoded for it: those with the most mined images.
MOST_CLASSES = 100
MOST_READ_AGAIN = 240  # images of the lake
SHEET_IMAGES = 12

_PER_LINE = 6
_TILE_PX, _GAP_PX = 64, 2
_QUALITY = 82
_BROKEN_SHOWN = 5  # of each reason
_PAIRS = 10
_SECRET = ("forgotten", "near_forgotten")

# Why an image above the threshold was left out.
REASONS = {
    "labeled": "labeled already",
    "leak": "copies of test images",
    "near_leak": "near copies of test images",
    "near_duplicate": "near copies of better images",
    "forgotten": "forgotten",
    "near_forgotten": "near copies of forgotten images",
}

Tile = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ClassSheets:
    """Pictures of one class."""

    name: str
    pictures: tuple[Picture, ...]


@dataclass
class Sheets:
    """All that is shown.

    Attributes:
        classes: Those with pictures, in the teacher's order.
        classes_without: How many other classes have mined images.
        left_out: A picture for each reason.
        broken: Reason, and where such images are, by name or place.
    """

    classes: list[ClassSheets] = field(default_factory=list)
    classes_without: int = 0
    left_out: list[Picture] = field(default_factory=list)
    broken: dict[str, list[str]] = field(default_factory=dict)


# -- the passes ---------------------------------------------------------------------------------------------


@dataclass
class _Survey:
    """What is in `scores/` besides the chosen images: few rows of each kind."""

    rejected: dict[int, list[dict[str, Any]]]
    left_out: dict[str, list[dict[str, Any]]]
    broken: dict[str, list[str]]


def of_mined(job: JobConfig, storage: Storage, classes: Sequence[str]) -> Sheets:
    """Contact sheets of each class: surest, borderline, at random, just rejected; and of what was left out, by reason.

    Args:
        job: The job.
        storage: Its output; scores, selection and mined images are there.
        classes: Names.
    """
    hidden = forgotten_list.not_to_be_shown(storage)
    chosen = storage.child("selection").read_table(
        "selection.parquet", [schema.SAMPLE_ID, schema.SCORE, schema.PREDICTED, schema.ORDER]
    )
    survey = _survey(storage, chosen, hidden)
    chosen = _without(chosen, hidden)
    wanted = _by_class(chosen)
    counts = Counter(chosen[schema.PREDICTED].to_pylist())
    shown = sorted(wanted, key=lambda k: (-counts[k], k))[:MOST_CLASSES]
    mined = storage.child("mined")
    tiles = _mined_tiles(job, mined, {one for k in shown for part in wanted[k].values() for one in part})
    again = [row for reason in survey.left_out for row in survey.left_out[reason]]
    room = max(0, MOST_READ_AGAIN - len(again))
    again += [row for k in shown for row in survey.rejected.get(k, [])][:room]
    tiles |= _lake_tiles(job, again)

    sheets, spent = Sheets(broken=survey.broken), 0
    made: dict[int, ClassSheets] = {}
    for k in shown:
        parts = wanted[k] | {"just rejected": [row[schema.SAMPLE_ID] for row in survey.rejected.get(k, [])]}
        pictures = [
            _sheet(title, f"{title} images of {classes[k]}", [tiles[one] for one in part if one in tiles])
            for title, part in parts.items()
            if any(one in tiles for one in part)
        ]
        spent += sum(len(picture.light) for picture in pictures)
        if spent > BUDGET_BYTES:
            break
        made[k] = ClassSheets(classes[k], tuple(pictures))
    sheets.classes = [made[k] for k in sorted(made)]
    sheets.classes_without = len(wanted) - len(made)
    for reason, rows in survey.left_out.items():
        if found := [tiles[row[schema.SAMPLE_ID]] for row in rows if row[schema.SAMPLE_ID] in tiles]:
            sheets.left_out.append(_sheet(REASONS[reason], f"images that were left out: {REASONS[reason]}", found))
    return sheets


def _survey(storage: Storage, chosen: pa.Table, hidden: Set[bytes]) -> _Survey:
    scores, selection = storage.child("scores"), storage.child("selection")
    known = pa.array([*chosen[schema.SAMPLE_ID].to_pylist(), *hidden], schema.SAMPLE_ID_TYPE)
    reasons: dict[bytes, str] = {}
    if selection.exists("left_out.parquet"):
        table = selection.read_table("left_out.parquet")
        reasons = dict(zip(table[schema.SAMPLE_ID].to_pylist(), table[schema.WHY].to_pylist(), strict=True))
    excluded = pa.array(list(reasons), schema.SAMPLE_ID_TYPE)
    columns = [*schema.IDENTITY_COLUMNS, schema.SCORE, schema.PREDICTED, schema.ERROR]
    best = schema.scores().empty_table().select(columns)
    left_out: dict[str, dict[bytes, dict[str, Any]]] = {}
    broken: dict[str, list[str]] = {}
    for file in ledger.data_files(scores):
        table = scores.read_table(file, columns).cast(best.schema)
        table = table.filter(pc.invert(pc.is_in(table[schema.SAMPLE_ID], value_set=known)))
        for row in table.filter(pc.is_valid(table[schema.ERROR])).to_pylist():
            places = broken.setdefault(row[schema.ERROR], [])
            if len(places) < _BROKEN_SHOWN:
                places.append(_place(row))
        table = table.filter(pc.fill_null(pc.is_finite(table[schema.SCORE]), False))
        apart = pc.is_in(table[schema.SAMPLE_ID], value_set=excluded)
        for row in table.filter(apart).to_pylist():
            reason = reasons[row[schema.SAMPLE_ID]]
            rows = left_out.setdefault(reason, {})
            if reason not in _SECRET and len(rows) < SHEET_IMAGES:
                rows.setdefault(row[schema.SAMPLE_ID], row)
        best = _best_of_each_class(pa.concat_tables([best, table.filter(pc.invert(apart))]))
    rejected: dict[int, list[dict[str, Any]]] = {}
    for row in best.to_pylist():
        rejected.setdefault(row[schema.PREDICTED], []).append(row)
    shown = {reason: list(rows.values()) for reason, rows in sorted(left_out.items()) if rows}
    return _Survey(rejected, shown, dict(sorted(broken.items())))


def _best_of_each_class(table: pa.Table) -> pa.Table:
    """The twelve best contents of each predicted class, best first."""
    table = table.filter(pc.not_equal(table[schema.PREDICTED], schema.NO_CLASS)).sort_by(
        [(schema.PREDICTED, "ascending"), (schema.SCORE, "descending"), (schema.SAMPLE_ID, "ascending")]
    )
    # A content that is twice in the lake has one score, so its rows stand beside each other.
    ids = table[schema.SAMPLE_ID].combine_chunks()
    another = pc.not_equal(ids.slice(1), ids.slice(0, max(0, len(ids) - 1))).to_numpy(zero_copy_only=False)
    table = table.filter(pa.array(np.r_[np.ones(min(1, len(ids)), bool), another]))
    predicted = table[schema.PREDICTED].to_numpy()
    rank = np.arange(len(predicted)) - np.searchsorted(predicted, predicted)
    return table.filter(pa.array(rank < SHEET_IMAGES))


def _by_class(chosen: pa.Table) -> dict[int, dict[str, list[bytes]]]:
    """Whom to show of each class; the surest first, the borderline last."""
    ranked = _grouped(chosen.sort_by([(schema.SCORE, "descending"), (schema.ORDER, "ascending")]))
    drawn = _grouped(chosen.sort_by(schema.ORDER))
    return {
        k: {
            "surest": ranked[k][:SHEET_IMAGES],
            "borderline": ranked[k][-SHEET_IMAGES:],
            "random": drawn[k][:SHEET_IMAGES],
        }
        for k in ranked
        if k != schema.NO_CLASS
    }


def _grouped(table: pa.Table) -> dict[int, list[bytes]]:
    groups: dict[int, list[bytes]] = {}
    for k, one in zip(table[schema.PREDICTED].to_pylist(), table[schema.SAMPLE_ID].to_pylist(), strict=True):
        groups.setdefault(k, []).append(one)
    return groups


def _without(table: pa.Table, hidden: Set[bytes]) -> pa.Table:
    return table.filter(pa.array([one not in hidden for one in table[schema.SAMPLE_ID].to_pylist()], pa.bool_()))


def _place(row: Mapping[str, Any]) -> str:
    """Where an image is in the lake, for people."""
    within = f", {row[schema.NAME]}" if row[schema.NAME] and row[schema.NAME] != row[schema.SHARD] else ""
    return f"{row[schema.SHARD]} row {row[schema.ROW]}{within}"


# -- confusions --------------------------------------------------------------------------------------------


def of_confusions(job: JobConfig, storage: Storage, pairs: Sequence[Mapping[str, Any]]) -> list[Picture | None]:
    """Test images of the commonest mistakes; None where there is none to show.

    Args:
        job: The job.
        storage: Its output.
        pairs: `measures.confusion_pairs`.
    """
    hidden, test = forgotten_list.not_to_be_shown(storage), Storage(job.test.uri)
    found: list[Picture | None] = []
    for pair in pairs:
        tiles = []
        for name in pair["examples"] if len(found) < _PAIRS else ():
            content = test.read_if_there(name)
            if content is not None and images.sample_id(content) not in hidden:
                tiles.append(_tile(job, content, images.Limits()))
        said = f"test images of {pair['true']} that the student takes for {pair['predicted']}"
        found.append(_sheet("", said, tiles) if tiles else None)
    return found


# -- pictures ----------------------------------------------------------------------------------------------


def _mined_tiles(job: JobConfig, mined: Storage, wanted: Set[bytes]) -> dict[bytes, Tile]:
    limits, tiles = images.Limits.of(job.lake), {}
    for _, table in lookup.find(mined, ledger.data_files(mined), sorted(wanted), [schema.BYTES]):
        for row in table.to_pylist():
            tiles[row[schema.SAMPLE_ID]] = _tile(job, row[schema.BYTES], limits)
    return tiles


def _lake_tiles(job: JobConfig, rows: Sequence[Mapping[str, Any]]) -> dict[bytes, Tile]:
    """Images that are in the lake still, by content; a few rows of few shards are read."""
    if not rows:
        return {}
    shards = {shard.path: shard for shard in lake.list_shards(job.lake)}
    wanted: dict[str, list[int]] = {}
    for row in rows:
        wanted.setdefault(row[schema.SHARD], []).append(row[schema.ROW])
    known = {row[schema.SAMPLE_ID] for row in rows}
    tiles = {}
    for path, places in sorted(wanted.items()):
        for chunk in lake.plan_chunks(job.lake, [shards[path]] if path in shards else [], job.lake.chunk_rows):
            inside = [row for row in places if chunk.first_row <= row < chunk.first_row + chunk.rows]
            for row in lake.read_chunk(job.lake.uri, chunk, inside).to_pylist() if inside else ():
                if row[schema.SAMPLE_ID] in known:
                    tiles[row[schema.SAMPLE_ID]] = _tile(job, row[schema.BYTES], images.Limits.of(job.lake))
    return tiles


def _tile(job: JobConfig, content: bytes, limits: images.Limits) -> Tile:
    """The image as the teacher sees it, only smaller."""
    pixels = images.decode(content, job.teacher.preprocessing, limits, scaled=True)
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    return np.asarray(picture.convert("RGB").resize((_TILE_PX, _TILE_PX), Image.Resampling.BICUBIC))


def _sheet(title: str, what: str, tiles: Iterable[Tile]) -> Picture:
    tiles = list(tiles)
    step = _TILE_PX + _GAP_PX
    width = min(len(tiles), _PER_LINE) * step - _GAP_PX
    height = -(-len(tiles) // _PER_LINE) * step - _GAP_PX
    canvas = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    for place, tile in enumerate(tiles):
        line, column = divmod(place, _PER_LINE)
        canvas.paste(Image.fromarray(tile), (column * step, line * step))
    buffer = io.BytesIO()
    canvas.save(buffer, format="WEBP", quality=_QUALITY)
    return Picture(inline(buffer.getvalue(), "webp"), None, width, height, f"{len(tiles)} {what}", title)
