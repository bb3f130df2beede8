"""`pu-ray audit`: a person looks at a few chosen images, and precision gets a bound that holds.

Precision estimated from positives and unlabeled images alone is optimistic. A person who judges a uniform random sample
of the selection gives an exact binomial bound instead (Clopper and Pearson 1934). First `draw` lays out the sample,
then `publish` reads what the person filled in. The question is the one that precision asks elsewhere in this project:
does the image show one of the teacher's classes, whether or not the one predicted?

Writes `audit/`: sheet.html (one page without external requests), audit.csv (to be filled in), drawn.json (which images
of which selection), and with the answers answers.parquet and the manifest.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from PIL import Image
from scipy import stats

from pu_ray import config as settings_of
from pu_ray import images, ledger, manifest, schema
from pu_ray.config import JobConfig, PreprocessingConfig
from pu_ray.errors import DataError
from pu_ray.manifest import Manifest, Publication
from pu_ray.storage import Storage

FOLDER = "audit"
SHEET_FILE = "sheet.html"
FORM_FILE = "audit.csv"
_DRAWN_FILE = "drawn.json"
_ANSWERS_FILE = "answers.parquet"
_TEMPLATES = Path(__file__).parent / "templates"
_TILE_PX = 160

_ID, _CORRECT = "sample_id", "correct"
COLUMNS = ("number", _ID, "name", "predicted_class", _CORRECT)
_MEANINGS = {"yes": True, "y": True, "1": True, "true": True, "no": False, "n": False, "0": False, "false": False}
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


# -- pure functions ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditedShare:
    """A share that was counted in a random sample; all but `n` in [0, 1].

    Attributes:
        value: Of the sample.
        bound: One-sided: the true share is at least this, with `confidence`.
        low: Lower end of the two-sided interval.
        high: Its upper end.
        confidence: Of the bound, and of the interval.
        n: Size of the sample.
    """

    value: float
    bound: float
    low: float
    high: float
    confidence: float
    n: int


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> AuditedShare:
    """Exact binomial lower bound and two-sided interval of a share (Clopper and Pearson 1934).

    Raises:
        ValueError: There are no trials, the successes lie outside 0..trials, or the confidence outside (0, 1).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials and trials >= 1, got {successes} of {trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence:g}")

    def lower(miss: float) -> float:
        return float(stats.beta.ppf(miss, successes, trials - successes + 1)) if successes else 0.0

    def upper(miss: float) -> float:
        return float(stats.beta.isf(miss, successes + 1, trials - successes)) if successes < trials else 1.0

    miss = 1 - confidence
    return AuditedShare(successes / trials, lower(miss), lower(miss / 2), upper(miss / 2), confidence, trials)


def sample(ids: Sequence[bytes], count: int, seed: int) -> list[bytes]:
    """A uniform random sample in random order, the same whatever order the images come in; a prefix is a sample too."""

    def place(sample_id: bytes) -> bytes:
        return hashlib.blake2b(sample_id, digest_size=16, key=b"audit" + seed.to_bytes(8, "big")).digest()

    return sorted(ids, key=place)[:count]


def read_answers(content: bytes, drawn: Sequence[bytes], where: str) -> dict[bytes, bool]:
    """What a person filled in, as spreadsheets save it: separated by commas, semicolons or tabs, in any row order.

    Args:
        content: The CSV file.
        drawn: The contents that were asked about.
        where: The file's name, for errors.

    Returns:
        Answers by content; what is blank or missing is not judged and left out.

    Raises:
        DataError: Names the line, what is allowed and what is there.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "not UTF-8 text", slug="not-utf8", where=where, got=str(error), hint="save it as CSV in UTF-8"
        ) from error
    first_line = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first_line.count))
    known = set(drawn)
    answers: dict[bytes, bool] = {}
    seen: dict[bytes, int] = {}
    try:
        columns = [column.strip().lower() for column in next(rows, [])]
        if missing := {_ID, _CORRECT} - set(columns):
            raise DataError(
                f"the answers lack the columns {', '.join(sorted(missing))}",
                slug="audit-columns-missing",
                where=f"{where}, line 1",
                allowed=", ".join(COLUMNS),
                got=", ".join(columns) or "nothing",
                hint=f"keep the first line of {FORM_FILE} as it was written",
            )
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            line = f"{where}, line {rows.line_num}"
            cells = dict(zip(columns, (cell.strip() for cell in row), strict=False))
            sample_id = _known_id(cells.get(_ID, ""), known, line)
            if sample_id in seen:
                raise DataError(
                    "the same image twice",
                    slug="image-judged-twice",
                    where=line,
                    allowed="one line for each",
                    got=f"line {seen[sample_id]} too",
                    hint="remove one of the two lines",
                )
            seen[sample_id] = rows.line_num
            if answer := cells.get(_CORRECT, "").lower():
                if answer not in _MEANINGS:
                    raise DataError(
                        f"this is no answer in column {_CORRECT}",
                        slug="not-an-answer",
                        where=line,
                        allowed=f"{', '.join(_MEANINGS)}, or nothing for not judged",
                        got=repr(cells[_CORRECT]),
                    )
                answers[sample_id] = _MEANINGS[answer]
    except csv.Error as error:
        raise DataError(
            "not a readable CSV file",
            slug="not-csv",
            where=f"{where}, line {rows.line_num}",
            got=str(error),
            hint=f"save it as CSV again, with the columns of {FORM_FILE}",
        ) from error
    return answers


def _known_id(text: str, known: set[bytes], line: str) -> bytes:
    try:
        sample_id = bytes.fromhex(text)
    except ValueError:
        sample_id = b""
    if sample_id not in known:
        raise DataError(
            "this image is not in the sample that was drawn",
            slug="image-not-in-sample",
            where=line,
            allowed=f"a {_ID} of {FORM_FILE}",
            got=repr(text),
            hint="answer the file that belongs to this run, and leave its column as it is",
        )
    return sample_id


# -- drawing -----------------------------------------------------------------------------------------------


def draw(config: JobConfig, storage: Storage, count: int) -> dict[str, Any]:
    """Lay out a sample for a person to judge.

    Args:
        config: The job.
        storage: Its output; selection and mined images are there.
        count: Images to draw; all, where fewer were selected.

    Returns:
        How many of how many were drawn, and where sheet and form lie.

    Raises:
        DataError: Somebody has filled in an earlier form, which is never overwritten.
    """
    target = storage.child(FOLDER)
    _refuse_to_overwrite(target)
    selected = manifest.require(storage.child("selection"), "select")
    classes: list[str] = manifest.require(storage.child("scorer"), "fit").facts["classes"]
    chosen = storage.child("selection").read_table("selection.parquet", [schema.SAMPLE_ID])[schema.SAMPLE_ID]
    ids = sample(chosen.to_pylist(), count, config.seed)
    rows = [_described(row, classes) for row in _mined_rows(storage.child("mined"), ids)]
    # As for a stage: what is there no longer counts until all of the new is there.
    for file in (manifest.FILE_NAME, _DRAWN_FILE):
        target.delete(file)
    target.write_bytes(SHEET_FILE, _sheet(config, rows, len(chosen), classes))
    target.write_bytes(FORM_FILE, _form(rows))
    target.write_json(_DRAWN_FILE, {"selection": selected.identity, "samples": [one.hex() for one in ids]})
    return {
        "drawn": len(ids),
        "selected": len(chosen),
        "sheet": f"{target.uri}/{SHEET_FILE}",
        "form": f"{target.uri}/{FORM_FILE}",
    }


def _refuse_to_overwrite(target: Storage) -> None:
    form = target.read_if_there(FORM_FILE)
    if not target.exists(_ANSWERS_FILE) and (form is None or not _is_filled_in(form)):
        return
    raise DataError(
        "an audit is there already, with answers that somebody filled in",
        slug="audit-has-answers",
        where=str(target),
        allowed="an empty form, or none",
        hint=f"count the answers with `pu-ray audit JOB.yaml --answers {target.uri}/{FORM_FILE}`;"
        f" or move {target.uri} away and draw anew",
    )


def _is_filled_in(form: bytes) -> bool:
    """Whether there is anything in it that was not written by us; what cannot be read was changed by somebody."""
    try:
        rows = list(csv.DictReader(io.StringIO(form.decode("utf-8"), newline="")))
        return any(tuple(row) != COLUMNS or row[_CORRECT] for row in rows)
    except (UnicodeDecodeError, csv.Error):
        return True


def _mined_rows(mined: Storage, ids: Sequence[bytes]) -> list[dict[str, Any]]:
    """Rows of `schema.mined` in the order of `ids`, whose pixels alone are read into memory."""
    wanted, found = set(ids), {}
    for file in ledger.data_files(mined):
        here = mined.read_table(file, [schema.SAMPLE_ID])[schema.SAMPLE_ID].to_pylist()
        places = [place for place, sample_id in enumerate(here) if sample_id in wanted]
        if places:
            for row in mined.read_table(file).take(pa.array(places)).to_pylist():
                found[row[schema.SAMPLE_ID]] = row
    if missing := len(wanted - set(found)):
        raise DataError(
            "chosen images are missing from the mined ones",
            slug="mined-images-missing",
            where=str(mined),
            got=f"{missing} of {len(wanted)} missing",
            hint="run `pu-ray select JOB.yaml`",
        )
    return [found[sample_id] for sample_id in ids]


def _described(row: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    # Formats without names have places.
    name = row[schema.NAME] or f"{row[schema.SHARD]} row {row[schema.ROW]}"
    predicted = row[schema.PREDICTED]
    return dict(row) | {"name": name, "class": "" if predicted == schema.NO_CLASS else classes[predicted]}


def _form(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for number, row in enumerate(rows, start=1):
        writer.writerow([number, row[schema.SAMPLE_ID].hex(), _inert(row["name"]), _inert(row["class"]), ""])
    return text.getvalue().encode()


def _inert(text: str) -> str:
    """Names come from the lake; a spreadsheet must not run one as a formula."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _sheet(config: JobConfig, rows: Sequence[Mapping[str, Any]], selected: int, classes: Sequence[str]) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    limits = images.Limits.of(config.lake)
    pictures = [{**row, "picture": _picture(row[schema.BYTES], limits)} for row in rows]
    page = environment.get_template("audit.html.j2").render(
        job=config, rows=pictures, selected=selected, classes=classes, form=FORM_FILE, tile_px=_TILE_PX
    )
    return page.encode()


def _picture(content: bytes, limits: images.Limits) -> str:
    """The image's centre square, in colour whatever the teacher sees, as a data URI."""
    pixels = images.decode(content, PreprocessingConfig(size_px=_TILE_PX), limits, scaled=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -- counting ----------------------------------------------------------------------------------------------


def publish(config: JobConfig, storage: Storage, answers_uri: str, confidence: float = 0.95) -> Manifest:
    """Count a person's answers and publish the bound.

    Args:
        config: The job.
        storage: Its output.
        answers_uri: Path or URI of the filled form.
        confidence: Of bound and interval.

    Raises:
        DataError: No sample was drawn, the selection is another one since, or the answers cannot be used.
    """
    target = storage.child(FOLDER)
    record = target.read_if_there(_DRAWN_FILE)
    if record is None:
        raise DataError(
            "no sample was drawn yet",
            slug="audit-not-drawn",
            where=str(target),
            hint="run `pu-ray audit JOB.yaml` first",
        )
    drawn_of: str = target.read_json(_DRAWN_FILE)["selection"]
    drawn = [bytes.fromhex(text) for text in target.read_json(_DRAWN_FILE)["samples"]]
    selected = manifest.require(storage.child("selection"), "select")
    if drawn_of != selected.identity:
        raise DataError(
            "the selection has changed since the sample was drawn",
            slug="audit-outdated",
            where=str(target),
            allowed=f"a sample of selection {selected.identity[:16]}",
            got=f"one of {drawn_of[:16]}",
            hint=f"move {target.uri} away, run `pu-ray audit JOB.yaml` and judge the new sample",
        )
    folder, name = Storage(answers_uri).split()
    answers = read_answers(folder.read_bytes(name), drawn, answers_uri)
    if not answers:
        raise DataError(
            "no image is judged",
            slug="no-image-judged",
            where=answers_uri,
            allowed=f"yes or no in column {_CORRECT}",
            got=f"{len(drawn)} images without an answer",
            hint=f"look at {target.uri}/{SHEET_FILE} and fill the column in",
        )
    judged = [answers.get(sample_id) for sample_id in drawn]
    inputs = {"select": selected.identity, "answers": settings_of.digest(judged)}
    identity = manifest.identity("audit", {"confidence": confidence}, inputs, config.seed)
    publication = Publication("audit", identity, inputs, config.seed)
    table = {
        schema.SAMPLE_ID: pa.array(drawn, schema.SAMPLE_ID_TYPE),
        _CORRECT: pa.array(judged, pa.bool_()),
    }
    target.delete(manifest.FILE_NAME)
    target.write_table(_ANSWERS_FILE, pa.table(table))
    correct = sum(answers.values())
    return publication.publish(
        target,
        counts={"drawn": len(drawn), "judged": len(answers), "correct": correct, "unjudged": len(drawn) - len(answers)},
        facts={
            "precision": asdict(clopper_pearson(correct, len(answers), confidence)),
            "in_order": all(answer is not None for answer in judged[: len(answers)]),
        },
    )


def render(audited: Manifest) -> str:
    """What was found, for a person."""
    counts, precision = audited.counts, audited.facts["precision"]
    percent = {name: f"{100 * precision[name]:.2f}" for name in ("value", "bound", "low", "high")}
    confidence = f"{100 * precision['confidence']:g} %"
    lines = [
        f"precision: at least {percent['bound']} %, with confidence {confidence}",
        f"  {counts['correct']:,} of {counts['judged']:,} judged images are right: {percent['value']} %"
        f" ({percent['low']} to {percent['high']})",
    ]
    if counts["unjudged"]:
        lines.append(f"  {counts['unjudged']:,} of {counts['drawn']:,} are not judged: {caveat(audited.facts)}")
    return "\n".join(lines)


def caveat(facts: Mapping[str, Any]) -> str:
    """What an audit that was not finished can still say."""
    if facts["in_order"]:
        return "those judged are the first of a random order, so the bound holds"
    return "the bound holds only if those judged were picked at random, and not for being easy"
