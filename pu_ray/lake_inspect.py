"""`pu-ray lake inspect`: what is in a lake, from its listing, some footers and a random sample of its images.

Reads little: the listing, at most a few shards of each kind for the number of rows, and the sampled images alone.
Nothing is written but the contact sheet that somebody asked for.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Console
from rich.table import Column, Table

from pu_ray import images, lake, schema
from pu_ray.config import LakeConfig, PreprocessingConfig
from pu_ray.lake import Chunk, Shard
from pu_ray.progress import Progress
from pu_ray.storage import Storage

_OPENED_SHARDS = 20  # of each kind, as in a plan
_CHUNK_ROWS = 256
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
_EXAMPLES = 3
_TILE_PX = 96
_SHEET_COLUMNS = 16
_SHEET_TILES = 512


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FormatFacts(_Facts):
    """The shards of one kind.

    Attributes:
        shards: Units of the ledger.
        files: Shard files, or loose images.
        size_bytes: Encoded; of lists of URIs, the lists' own.
        rows: Images, usable or not.
        rows_exact: Whether they were counted; else projected by bytes from `opened_shards`.
        opened_shards: How many shards were opened to count.
    """

    shards: int
    files: int
    size_bytes: int
    rows: int
    rows_exact: bool
    opened_shards: int


class ErrorFacts(_Facts):
    """Images of the sample with one error code, and where some of them are."""

    count: int
    examples: tuple[str, ...]


class SampleFacts(_Facts):
    """What the sampled images are.

    Attributes:
        images: How many were drawn.
        seed: Of the draw.
        formats: Encoded formats of those whose header could be read, by Pillow's name.
        modes: Their colour modes.
        width_px: Quantiles (least, 5 %, median, 95 %, largest) of the stored width; empty where there is none.
        height_px: The same of the stored height.
        size_bytes: The same of the encoded size.
        errors: By code.
        duplicates: Images whose bytes were already in the sample; the lake's share of them is larger.
    """

    images: int
    seed: int
    formats: dict[str, int]
    modes: dict[str, int]
    width_px: tuple[int, ...]
    height_px: tuple[int, ...]
    size_bytes: tuple[int, ...]
    errors: dict[str, ErrorFacts]
    duplicates: int


class Inspection(_Facts):
    """What is in a lake.

    Attributes:
        uri: The lake.
        formats: By kind of shard.
        fingerprint: Of the listing; changes when a shard does.
        sample: What a random sample of its images is.
    """

    uri: str
    formats: dict[str, FormatFacts]
    fingerprint: str
    sample: SampleFacts

    @computed_field  # type: ignore[prop-decorator]
    @property
    def shards(self) -> int:
        """Over all kinds."""
        return sum(facts.shards for facts in self.formats.values())

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows(self) -> int:
        """Over all kinds; see `rows_exact`."""
        return sum(facts.rows for facts in self.formats.values())

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_exact(self) -> bool:
        """Whether every row was counted."""
        return all(facts.rows_exact for facts in self.formats.values())


def inspect(config: LakeConfig, sample: int, seed: int, progress: Progress) -> tuple[Inspection, list[Image.Image]]:
    """Look at a lake.

    Args:
        config: Where it is, and its limits.
        sample: Most images to draw.
        seed: Of the draw: the same lake and seed give the same sample.
        progress: Advanced by sampled images.

    Returns:
        The facts, and square miniatures of the sampled images, or of at most 512 of them, for `contact_sheet`.

    Raises:
        DataError: The lake holds no images, or cannot be read.
    """
    progress.note(f"listing {config.uri}")
    shards = lake.list_shards(config, lambda files: progress.note(f"  {files:,} files so far"))
    progress.note(f"{len(shards):,} shards; opening some to count their images")
    formats: dict[str, FormatFacts] = {}
    chunks: list[Chunk] = []
    for kind in sorted({shard.format for shard in shards}):
        of_kind = [shard for shard in shards if shard.format == kind]
        opened = _spread(of_kind, _OPENED_SHARDS)
        planned = lake.plan_chunks(config, opened, _CHUNK_ROWS)
        formats[kind] = _format_facts(of_kind, opened, planned)
        chunks += planned
    facts, tiles = _look(config, _draw(chunks, sample, seed), seed, progress)
    return Inspection(uri=config.uri, formats=formats, fingerprint=lake.fingerprint(shards), sample=facts), tiles


def _format_facts(shards: Sequence[Shard], opened: Sequence[Shard], planned: Sequence[Chunk]) -> FormatFacts:
    loose = shards[0].format == "folder"
    size = sum(shard.size_bytes for shard in shards)
    files = sum(len(shard.members) for shard in shards) if loose else len(shards)
    # Rows follow bytes better than they follow shards, whose last one is often short.
    factor = size / max(1, sum(shard.size_bytes for shard in opened))
    counted = sum(chunk.rows for chunk in planned)
    return FormatFacts(
        shards=len(shards),
        files=files,
        size_bytes=size,
        rows=files if loose else counted if len(opened) == len(shards) else round(factor * counted),
        rows_exact=loose or len(opened) == len(shards),
        opened_shards=0 if loose else len(opened),
    )


def _spread(shards: Sequence[Shard], most: int) -> Sequence[Shard]:
    if len(shards) <= most:
        return shards
    return [shards[index * len(shards) // most] for index in range(most)]


def _draw(chunks: Sequence[Chunk], sample: int, seed: int) -> list[tuple[Chunk, list[int]]]:
    """Rows drawn without replacement from all rows of these chunks, in their order."""
    ends = np.cumsum([chunk.rows for chunk in chunks], dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(sample, total), replace=False))
    places = np.searchsorted(ends, drawn, side="right")
    rows: dict[int, list[int]] = {}
    for place, position in zip(places.tolist(), drawn.tolist(), strict=True):
        chunk = chunks[place]
        rows.setdefault(place, []).append(chunk.first_row + position - int(ends[place]) + chunk.rows)
    return [(chunks[place], wanted) for place, wanted in rows.items()]


def _look(
    config: LakeConfig, drawn: Sequence[tuple[Chunk, list[int]]], seed: int, progress: Progress
) -> tuple[SampleFacts, list[Image.Image]]:
    limits = images.Limits.of(config)
    total = sum(len(rows) for _, rows in drawn)
    looked, every = 0, max(1, math.ceil(total / _SHEET_TILES))
    progress.start(total, "images")
    formats: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    widths: list[int] = []
    heights: list[int] = []
    sizes: list[int] = []
    errors: dict[str, list[str]] = {}
    ids: list[bytes] = []
    tiles: list[Image.Image] = []
    for chunk, rows in drawn:
        for row in _rows(lake.read_chunk(config.uri, chunk, rows)):
            content, code = row[schema.BYTES], row[schema.ERROR]
            tile = None
            if content is not None:
                ids.append(row[schema.SAMPLE_ID])
                sizes.append(len(content))
                try:
                    header = images.header(content, limits)
                    formats[header.format] += 1
                    modes[header.mode] += 1
                    widths.append(header.width)
                    heights.append(header.height)
                    tile = _tile(content, limits)
                except images.ImageError as error:
                    code = error.code
            if code is not None:
                errors.setdefault(code, []).append(_source(row))
            if looked % every == 0:
                tiles.append(tile if tile is not None else _label(code))
            looked += 1
        progress.advance(len(rows))
    facts = SampleFacts(
        images=looked,
        seed=seed,
        formats=dict(formats.most_common()),
        modes=dict(modes.most_common()),
        width_px=_quantiles(widths),
        height_px=_quantiles(heights),
        size_bytes=_quantiles(sizes),
        errors={
            code: ErrorFacts(count=len(sources), examples=tuple(sources[:_EXAMPLES]))
            for code, sources in sorted(errors.items())
        },
        duplicates=len(ids) - len(set(ids)),
    )
    return facts, tiles


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _source(row: Mapping[str, Any]) -> str:
    named = f" ({row[schema.NAME]})" if row[schema.NAME] is not None and row[schema.NAME] != row[schema.SHARD] else ""
    return f"{row[schema.SHARD]} row {row[schema.ROW]}{named}"


def _quantiles(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.quantile(values, _QUANTILES, method="nearest")) if values else ()


def _tile(content: bytes, limits: images.Limits) -> Image.Image:
    return Image.fromarray(images.decode(content, PreprocessingConfig(size_px=_TILE_PX), limits, scaled=True))


def _label(code: str | None) -> Image.Image:
    """A grey tile that says why there is no picture."""
    tile = Image.new("RGB", (_TILE_PX, _TILE_PX), "lightgrey")
    ImageDraw.Draw(tile).text((4, _TILE_PX // 2 - 6), code or "", fill="black")
    return tile


def render(found: Inspection) -> str:
    """Tables for people."""
    console = Console(file=io.StringIO(), width=110, highlight=False)
    exact = "counted" if found.rows_exact else "projected by bytes from the opened shards"
    console.print(f"{found.uri}: {found.shards:,} shards, {found.rows:,} images ({exact})", markup=False)
    kinds = Table("kind", *(Column(name, justify="right") for name in ("shards", "files", "bytes", "images", "opened")))
    for kind, facts in found.formats.items():
        rows = f"{facts.rows:,}" if facts.rows_exact else f"about {facts.rows:,}"
        numbers = (f"{facts.shards:,}", f"{facts.files:,}", f"{facts.size_bytes:,}", rows, f"{facts.opened_shards:,}")
        kinds.add_row(kind, *numbers)
    console.print(kinds)
    sample = found.sample
    console.print(f"a random sample of {sample.images:,} images (seed {sample.seed})")
    heads = ("least", "5 %", "median", "95 %", "largest")
    quantiles = Table("", *(Column(head, justify="right") for head in heads))
    for name, values in (("width px", sample.width_px), ("height px", sample.height_px), ("bytes", sample.size_bytes)):
        quantiles.add_row(name, *(f"{value:,}" for value in values))
    console.print(quantiles)
    for name, counts in (("formats", sample.formats), ("modes", sample.modes)):
        console.print(f"{name}: " + (", ".join(f"{key} {count:,}" for key, count in counts.items()) or "none"))
    console.print(f"duplicates in the sample: {sample.duplicates:,}")
    console.print(f"errors: {sum(broken.count for broken in sample.errors.values()):,}")
    for code, broken in sample.errors.items():
        console.print(
            f"  {code} {broken.count:,}, for example {'; '.join(broken.examples)}", markup=False, soft_wrap=True
        )
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def contact_sheet(tiles: Sequence[Image.Image]) -> bytes:
    """The miniatures in rows, as a PNG."""
    columns = max(1, min(_SHEET_COLUMNS, len(tiles)))
    rows = max(1, -(-len(tiles) // columns))
    step = _TILE_PX + 2
    canvas = Image.new("RGB", (columns * step - 2, rows * step - 2), "white")
    for place, tile in enumerate(tiles):
        canvas.paste(tile, (place % columns * step, place // columns * step))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    return buffer.getvalue()


def write_sheet(uri: str, tiles: Sequence[Image.Image]) -> None:
    """Publish the contact sheet atomically at a path or URI.

    Raises:
        DataError: It cannot be written.
    """
    folder, name = Storage(uri).split()
    folder.write_bytes(name, contact_sheet(tiles))
