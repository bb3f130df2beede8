"""`pu-ray trace` and `pu-ray forget`: where an image went, and a run that never chooses it again.

Images are known by their content (`images.sample_id`), so one question finds them in every run, whatever they were
called there. `trace` reads what the stages published: the lake's rows in `scores/`, the choice and its reasons in
`selection/`, the bytes in `mined/`, and by the manifests' identities which student was taught with them.

`forget` keeps a list in the run's folder, forgotten.txt, which the stage `select` reads whatever its rule: what is on
it, and what nearly looks like it, is never chosen. The list belongs to the identity of the choice, so the next
`pu-ray run` redoes the choice and all that came of it, and neither features nor scores. The pictures go at once.

Not covered: copies outside of the run's folder (a registry of students, `features.cache_uri`, old versions of objects
in a bucket that keeps them), and the scorer, which may have seen an image among its sample of the lake.
"""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pu_ray import config as settings_of
from pu_ray import images, lake, lease, ledger, manifest, schema
from pu_ray.errors import ConfigError, DataError
from pu_ray.manifest import Manifest
from pu_ray.progress import Progress
from pu_ray.storage import Storage

LIST_FILE = "forgotten.txt"
_CONTROLS = "controls"
_SELECTION_FILE, _LEFT_OUT_FILE = "selection.parquet", "left_out.parquet"
_REPORT_FILE, _SHEET_FILE, _DRAWN_FILE = "report.html", "audit/sheet.html", "audit/drawn.json"
_ARTIFACTS = (
    "cascade",
    "features",
    "scorer",
    "scores",
    "selection",
    "mined",
    "soft_labels",
    "student",
    "evaluation",
    "exported",
)
_THREADS = 16
_MOST_NAMED = 5
_HEX = re.compile(rf"[0-9a-f]{{{2 * schema.SAMPLE_ID_BYTES}}}")

# Steps that see the chosen images, by the names under which manifests list their inputs.
_HANG_ON_THE_CHOICE = ("select", "materialise", "soft_labels", "distill", "evaluate")
_TEACHING_ROLES = ("train", "calibrate")  # of labeled images; those that validate choose the student's best step
_REASONS = {
    "labeled": "it is one of the labeled images",
    "leak": "it is one of the test images",
    "near_leak": "it nearly equals a test image",
    "near_duplicate": "it nearly equals a better image of the choice",
    "forgotten": f"it is in {LIST_FILE}",
    "near_forgotten": f"it nearly equals an image in {LIST_FILE}",
}


# -- ids ---------------------------------------------------------------------------------------------------


def parse_id(text: str) -> bytes | None:
    """A sample id in hexadecimal, or None for any other text."""
    text = text.strip().lower()
    return bytes.fromhex(text) if _HEX.fullmatch(text) else None


def sample_of(text: str) -> bytes:
    """The id that a person means: given as such, or as the path or URI of an image file.

    Raises:
        ConfigError: It is neither.
        DataError: The file may not be read.
    """
    if (sample := parse_id(text)) is not None:
        return sample
    folder, name = Storage(text).split()
    if not name or folder.kind(name) != "file":
        raise ConfigError(
            "neither a sample id nor a file",
            slug="not-an-image-or-id",
            where="SAMPLE_ID|FILE",
            allowed=f"{2 * schema.SAMPLE_ID_BYTES} hexadecimal digits, or the path or URI of an image",
            got=text,
            hint="sample ids are in selection/selection.parquet and in what `pu-ray audit` writes",
        )
    return images.sample_id(folder.read_bytes(name))


def read_ids(content: bytes, where: str) -> list[bytes]:
    """Sample ids from a list: one a line, or a CSV with a column sample_id or the id first; `#` begins a comment.

    Args:
        content: The file.
        where: Its name, for errors.

    Returns:
        The ids in their order, each once.

    Raises:
        DataError: Names the line, what is allowed and what is there; or the list names no image.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "not UTF-8 text", slug="not-utf8", where=where, got=str(error), hint="save it in UTF-8"
        ) from error
    lines = ["" if line.lstrip().startswith("#") else line for line in text.splitlines()]
    first = next((line for line in lines if line.strip()), "")
    rows = csv.reader(lines, delimiter=max(",;\t", key=first.count))
    column: int | None = None
    found: dict[bytes, None] = {}
    for row in rows:
        cells = [cell.partition("#")[0].strip() for cell in row]
        if not any(cells):
            continue
        if column is None:
            names = [cell.lower() for cell in cells]
            column = names.index(schema.SAMPLE_ID) if schema.SAMPLE_ID in names else 0
            if schema.SAMPLE_ID in names:
                continue
        words = cells[column].split() if column < len(cells) else []
        sample = parse_id(words[0]) if words else None
        if sample is None:
            raise DataError(
                "this is no sample id",
                slug="not-a-sample-id",
                where=f"{where}, line {rows.line_num}",
                allowed=f"{2 * schema.SAMPLE_ID_BYTES} hexadecimal digits first, or a column {schema.SAMPLE_ID}",
                got=repr(cells[column] if column < len(cells) else ""),
                hint="`pu-ray trace FILE RUN` tells the id of an image",
            )
        found[sample] = None
    if not found:
        raise DataError(
            "the list names no image",
            slug="no-image-listed",
            where=where,
            allowed="one sample id a line",
            got="none",
            hint="`pu-ray trace FILE RUN` tells the id of an image",
        )
    return list(found)


# -- the list of a run -------------------------------------------------------------------------------------


def forgotten(run: Storage) -> dict[bytes, str]:
    """What a run must never choose: where each image was when it was forgotten (selected, lake, unknown), by id.

    Args:
        run: The run's folder; a control's images are forgotten by its job.

    Raises:
        DataError: A line of the list cannot be understood.
    """
    content = run.read_if_there(LIST_FILE)
    found: dict[bytes, str] = {}
    for number, line in enumerate((content or b"").decode("utf-8", "replace").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        sample = parse_id(words[0])
        # Who wrote an id by hand meant that it counts.
        state = words[1] if len(words) > 1 else "lake"
        if sample is None or state not in ("selected", "lake", "unknown"):
            raise DataError(
                "the list of forgotten images is damaged",
                slug="forgotten-list-damaged",
                where=f"{run}/{LIST_FILE}, line {number}",
                allowed="a sample id in hexadecimal, and selected, lake or unknown",
                got=line.strip(),
                hint="mend that line; do not delete it, or the image may be chosen again",
            )
        found[sample] = state
    return found


def forgotten_digest(run: Storage) -> str | None:
    """What the list adds to the identity of a choice; None where it changes nothing.

    Images that the lake did not hold do not count: a list that goes to many runs must not have them all taught anew. If
    the lake grows by one of them later, the scores have another identity anyway.
    """
    return _digest(forgotten(run))


def _digest(states: Mapping[bytes, str]) -> str | None:
    counted = sorted(sample.hex() for sample, state in states.items() if state != "unknown")
    return settings_of.digest(counted) if counted else None


def not_to_be_shown(run: Storage) -> set[bytes]:
    """Images that no page may show: those of the list, and those left out because they nearly equal one."""
    hidden = set(forgotten(run))
    if hidden and run.child("selection").exists(_LEFT_OUT_FILE):
        table = run.child("selection").read_table(_LEFT_OUT_FILE)
        alike = table.filter(pc.equal(table[schema.WHY], "near_forgotten"))
        hidden.update(alike[schema.SAMPLE_ID].to_pylist())
    return hidden


def thumbnails_of(samples: Iterable[bytes], artifact: Storage) -> Any:
    """Stored thumbnails of some contents, uint8 [M, 144]; of those that have none there is none.

    Args:
        samples: The contents.
        artifact: Where thumbnails are: the features, or without a cache the scores.
    """
    found = [np.empty((0, schema.THUMBNAIL_PX), np.uint8)]
    for _, table in find(artifact, ledger.data_files(artifact), samples, [schema.THUMBNAIL]):
        there = table.filter(pc.is_valid(table[schema.THUMBNAIL]))
        if there.num_rows:
            found.append(lake.to_matrix(there[schema.THUMBNAIL]))
    return np.concatenate(found)


# -- looking into artifacts --------------------------------------------------------------------------------


def find(
    artifact: Storage,
    files: Sequence[str],
    samples: Iterable[bytes],
    columns: Sequence[str],
    progress: Progress | None = None,
) -> Iterator[tuple[str, pa.Table]]:
    """Rows of some contents, with the file they are in.

    Ids are read a row group at a time, and other columns only of groups that hold one of them: memory grows neither
    with the artifact nor with its images.

    Args:
        artifact: The folder.
        files: Parquet files in it.
        samples: The contents.
        columns: What to read of them.
        progress: Advanced by files.
    """
    wanted = pa.array(list(samples), schema.SAMPLE_ID_TYPE)
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(partial(_rows_in, artifact, wanted=wanted, columns=list(columns)), files)
        for file, table in zip(files, parts, strict=True):
            if progress is not None:
                progress.advance(1)
            if table is not None:
                yield file, table


def _rows_in(artifact: Storage, file: str, wanted: pa.Array, columns: list[str]) -> pa.Table | None:
    def read() -> list[pa.Table]:
        with artifact.filesystem().open_input_file(artifact.path(file)) as source:
            parquet = pq.ParquetFile(source)
            found = []
            for group in range(parquet.num_row_groups):
                here = parquet.read_row_group(group, [schema.SAMPLE_ID])[schema.SAMPLE_ID]
                places = np.flatnonzero(pc.is_in(here, value_set=wanted).to_numpy(zero_copy_only=False))
                if len(places):
                    found.append(parquet.read_row_group(group, [schema.SAMPLE_ID, *columns]).take(pa.array(places)))
            return found

    try:
        found = artifact.attempt("reading", file, read)
    except pa.ArrowInvalid as error:
        raise DataError(
            "not a readable Parquet file",
            slug="not-parquet",
            where=f"{artifact}/{file}",
            got=str(error),
            hint="delete that folder of the run and run the job again, then give this command again",
        ) from error
    return pa.concat_tables(found) if found else None


def _data_files(artifact: Storage) -> list[str]:
    # By listing and not by index: a pass that was killed has no index, and what it wrote is there all the same.
    return [file.path for file in artifact.list_files(ledger.DATA_FOLDER) if file.path.endswith(".parquet")]


def runs_below(uri: str) -> list[str]:
    """The run at this place; or the runs below it, which takes a listing of everything there.

    Raises:
        DataError: There is none.
    """
    storage = Storage(uri)
    if any(storage.child(name).kind(manifest.FILE_NAME) == "file" for name in _ARTIFACTS):
        return [storage.uri]
    found = set()
    for file in storage.list_files():
        parent, _, name = file.path.rpartition("/")
        run, _, artifact = parent.rpartition("/")
        if name == manifest.FILE_NAME and run and artifact in _ARTIFACTS and _CONTROLS not in run.split("/"):
            found.add(run)
    if not found:
        raise DataError(
            "there is no run here",
            slug="no-run",
            where=storage.uri,
            allowed="the output of a job, or a folder with such outputs below it",
            got="no manifest of any stage" if storage.exists() else "nothing",
            hint="give the folder that `output` names in the job file",
        )
    return [f"{storage.uri}/{run}" for run in sorted(found)]


def _choices(run: Storage) -> dict[str, Storage]:
    """The run itself under the name "", and its controls under theirs."""
    found = {"": run}
    for file in run.list_files(_CONTROLS):
        name, _, rest = file.path.removeprefix(f"{_CONTROLS}/").partition("/")
        if rest:
            found[name] = run.child(f"{_CONTROLS}/{name}")
    return found


# -- trace -------------------------------------------------------------------------------------------------


class _Found(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LakeRow(_Found):
    """One row of the lake that has this content.

    Attributes:
        shard: The shard's path below the lake's root.
        row: Its number in the shard.
        name: Path or key inside the shard, where the format has one.
        error: Why it could not be used.
        score: The PU logit; None where there is none, or where the cascade's gate spared it.
        predicted: The teacher's class.
        confidence: The teacher's probability of that class.
    """

    shard: str
    row: int
    name: str | None
    error: str | None
    score: float | None = None
    predicted: str | None = None
    confidence: float | None = None


class Taught(_Found):
    """A published student, and whether it learned from the image.

    Attributes:
        identity: Of its manifest.
        finished_at: When it was published.
        taught: None: it was made from another choice than the one that is there, so nobody can say.
        sha256: Of the exported files, by name.
    """

    identity: str
    finished_at: str
    taught: bool | None
    sha256: dict[str, str] = {}


class Choice(_Found):
    """What became of the image in one choice of the run.

    Attributes:
        control: Name of the control; empty for the run's own choice.
        selected: None where nothing was chosen yet.
        why: The rule that chose it, or why it was not chosen.
        place: Its place in the order of the mined images.
        of: How many were selected.
        mined: The file that holds its bytes.
        student: What was taught.
        exported: What is served.
    """

    control: str
    selected: bool | None
    why: str
    place: int | None = None
    of: int | None = None
    mined: str | None = None
    student: Taught | None = None
    exported: Taught | None = None


class Trace(_Found):
    """Where one image went in one run.

    Attributes:
        run: The run's folder.
        sample_id: The image, in hexadecimal.
        searched: The artifact that knows the lake's rows, `scores` or `features`; None where there is none.
        lake: Its rows in the lake; the same content may lie there more than once.
        labeled: Its role among the labeled images: train, validate or calibrate.
        test: Whether students were judged on it.
        forgotten: Whether the run must not choose it.
        choices: The run's own choice, and those of its controls.
    """

    run: str
    sample_id: str
    searched: str | None
    lake: list[LakeRow]
    labeled: str | None
    test: bool
    forgotten: bool
    choices: list[Choice]

    @property
    def found(self) -> bool:
        """Whether the run has anything to do with it."""
        chosen = any(choice.selected or choice.mined for choice in self.choices)
        return bool(self.lake or self.labeled or self.test or self.forgotten or chosen)


@dataclass(frozen=True)
class _KnownLake:
    """The artifact that holds a row for each image of the lake."""

    artifact: Storage
    name: str
    files: list[str]


def _known_lake(run: Storage) -> _KnownLake | None:
    # Without a feature cache the features are a sample; the scores know every row.
    for name in ("scores", "features"):
        if files := _data_files(run.child(name)):
            return _KnownLake(run.child(name), name, files)
    return None


def trace(run: Storage, sample: bytes, progress: Progress) -> Trace:
    """Everything that a run did with one image.

    Args:
        run: The run's folder.
        sample: The image.
        progress: Counts the files of the lake's rows.
    """
    fitted = manifest.read(run.child("scorer"))
    classes: list[str] = fitted.facts["classes"] if fitted else []
    known = _known_lake(run)
    rows: list[LakeRow] = []
    if known is not None:
        progress.start(len(known.files), "files")
        columns = [*schema.IDENTITY_COLUMNS[1:], schema.ERROR]
        if known.name == "scores":
            columns += [schema.SCORE, schema.PREDICTED, schema.CONFIDENCE]
        for _, table in find(known.artifact, known.files, [sample], columns, progress):
            rows += [_lake_row(row, classes) for row in table.to_pylist()]
    return Trace(
        run=run.uri,
        sample_id=sample.hex(),
        searched=known.name if known else None,
        lake=rows,
        labeled=_roles(run, [sample]).get(sample),
        test=sample in _among(run.child("evaluation"), "answers.parquet", [sample]),
        forgotten=sample in forgotten(run),
        choices=[_choice(name, folder, run, sample, rows) for name, folder in _choices(run).items()],
    )


def _lake_row(row: Mapping[str, Any], classes: Sequence[str]) -> LakeRow:
    predicted, score = row.get(schema.PREDICTED), row.get(schema.SCORE)
    named = predicted is not None and 0 <= predicted < len(classes)
    return LakeRow(
        shard=row[schema.SHARD],
        row=row[schema.ROW],
        name=row[schema.NAME],
        error=row[schema.ERROR],
        # What the gate rejected scores minus infinity, which JSON does not know.
        score=score if score is not None and np.isfinite(score) else None,
        predicted=classes[predicted] if named and predicted is not None else None,
        confidence=row.get(schema.CONFIDENCE) if named else None,
    )


def _rows(artifact: Storage, file: str, samples: Iterable[bytes], columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of these contents in one table; none where there is no such table."""
    if not artifact.exists(file):
        return []
    return [row for _, part in find(artifact, [file], samples, columns) for row in part.to_pylist()]


def _among(artifact: Storage, file: str, samples: Iterable[bytes]) -> set[bytes]:
    """Which of these contents a table names."""
    return {row[schema.SAMPLE_ID] for row in _rows(artifact, file, samples)}


def _roles(run: Storage, samples: Iterable[bytes]) -> dict[bytes, str]:
    """Roles of those that are labeled images."""
    rows = _rows(run.child("scorer"), "labeled.parquet", samples, ["role"])
    return {row[schema.SAMPLE_ID]: row["role"] for row in rows}


def _choice(name: str, folder: Storage, run: Storage, sample: bytes, rows: Sequence[LakeRow]) -> Choice:
    selection = folder.child("selection")
    document = manifest.read(selection)
    copies = folder.child("mined")
    mined = next((file for file, _ in find(copies, _data_files(copies), [sample], [])), None)
    if document is None:
        return Choice(control=name, selected=None, why="nothing was chosen yet", mined=mined)
    chosen = _rows(selection, _SELECTION_FILE, [sample], [schema.ORDER, schema.WHY])
    left_out = _rows(selection, _LEFT_OUT_FILE, [sample], [schema.WHY])
    if chosen:
        why = f"rule {chosen[0][schema.WHY]}"
    elif left_out:
        why = _REASONS.get(left_out[0][schema.WHY], left_out[0][schema.WHY])
    else:
        why = _why_not(rows, document)
    role = _roles(run, [sample]).get(sample)
    scorer = manifest.read(run.child("scorer"))

    def taught(artifact: str) -> Taught | None:
        made = manifest.read(folder.child(artifact))
        if made is None:
            return None
        origin = _selection_behind(folder, made)
        learned = None if origin != document.identity else bool(chosen)
        if role in _TEACHING_ROLES and scorer is not None and made.inputs.get("fit") == scorer.identity:
            learned = True
        return Taught(
            identity=made.identity,
            finished_at=made.finished_at,
            taught=learned,
            sha256=made.facts.get("sha256", {}),
        )

    return Choice(
        control=name,
        selected=bool(chosen),
        why=why,
        place=chosen[0][schema.ORDER] + 1 if chosen else None,
        of=document.counts["selected"],
        mined=mined,
        student=taught("student"),
        exported=taught("exported"),
    )


def _selection_behind(folder: Storage, made: Manifest) -> str | None:
    """Identity of the choice that a student was made from, as far as what is there can tell."""
    mined, evaluated = manifest.read(folder.child("mined")), manifest.read(folder.child("evaluation"))
    if mined is not None and made.inputs.get("materialise") == mined.identity:
        return mined.inputs.get("select")
    # The mined images are another generation, or were erased: the evaluation names both, student and choice.
    student = made.inputs.get("distill", made.identity)
    if evaluated is not None and evaluated.inputs.get("distill") == student:
        return evaluated.inputs.get("select")
    return None


def _why_not(rows: Sequence[LakeRow], selected: Manifest) -> str:
    """Why a content that is neither chosen nor left out by name was not chosen."""
    if not rows:
        return "the lake does not hold it"
    usable = [row for row in rows if row.error is None]
    if not usable:
        return f"it cannot be used: {rows[0].error}"
    rule = selected.facts["rule"]
    scores = [row.score for row in usable if row.score is not None]
    threshold = selected.facts["threshold"]
    if threshold is not None and not scores:
        return "it has no score: the cascade's gate rejected it"
    if threshold is not None and max(scores) < threshold:
        return f"its score is below the threshold {threshold:.3f} of rule {rule}"
    if threshold is None:
        return f"rule {rule} took others"
    return f"rule {rule} took others: its budget, its balance, or a higher threshold of its class"


def render_traces(found: Sequence[Trace]) -> str:
    """Where an image went, for people."""
    hits = [each for each in found if each.found]
    lines = [f"image {found[0].sample_id}: in {len(hits)} of {len(found)} run{'' if len(found) == 1 else 's'}"]
    for each in found:
        lines += ["", each.run, *(f"  {line}" for line in (_told(each) if each.found else [_nowhere(each)]))]
    return "\n".join(lines)


def _nowhere(one: Trace) -> str:
    if one.searched is None:
        return "not found, but its lake was not looked at yet: there are neither scores nor features"
    return f"not found: not in the lake (by {one.searched}/), not among the labeled or test images, never chosen"


def _told(one: Trace) -> list[str]:
    lines = []
    for row in one.lake:
        place = f"{row.shard} row {row.row}" + (f" ({row.name})" if row.name and row.name != row.shard else "")
        score = "" if row.score is None else f", score {row.score:.3f}"
        looks = "" if row.predicted is None else f", looks like {row.predicted} ({row.confidence or 0:.3f})"
        lines.append(f"lake       {place}" + (f", unusable: {row.error}" if row.error else score + looks))
    if not one.lake:
        lines.append("lake       not there" if one.searched else "lake       not looked at yet")
    if one.labeled is not None:
        lines.append(f"labeled    it is a labeled image, role {one.labeled}")
    if one.test:
        lines.append("test       it is a test image: students are judged on it")
    if one.forgotten:
        lines.append(f"forgotten  it is in {LIST_FILE}: no choice from now on takes it")
    for choice in one.choices:
        lines += _told_of(choice)
    return lines


def _told_of(choice: Choice) -> list[str]:
    label = f"control {choice.control}: " if choice.control else ""
    if choice.selected:
        lines = [f"selection  {label}selected by {choice.why}, number {choice.place:,} of {choice.of:,}"]
    else:
        lines = [f"selection  {label}{'not selected: ' if choice.selected is False else ''}{choice.why}"]
    if choice.mined:
        lines.append(f"mined      {label}its bytes are in {choice.mined}")
    for name, made in (("student", choice.student), ("exported", choice.exported)):
        if made is None:
            continue
        said = {
            True: "taught with it",
            False: "not taught with it",
            None: "made from an earlier choice: nobody can say",
        }
        lines.append(f"{name:<9}  {label}{said[made.taught]}; identity {made.identity[:16]}, {made.finished_at}")
        if made.taught is not False and (weights := made.sha256.get("model.safetensors")):
            lines.append(f"           model.safetensors has sha256 {weights}")
    return lines


# -- forget ------------------------------------------------------------------------------------------------


class Forgetting(_Found):
    """What forgetting some images does to a run.

    Attributes:
        run: The run's folder.
        applied: Whether it was done.
        asked: Images that were named.
        already: Of these, forgotten before.
        lake: In the lake.
        selected: In the run's own choice.
        mined: With their bytes in `mined/`, the run's own or a control's.
        controls: In the choice of each control.
        labeled: Ids among the labeled images, which a choice does not touch.
        test: Ids among the test images.
        unknown: Ids that the run has never seen.
        outdated: Artifacts that the next `pu-ray run` makes anew.
        erased: Files that go at once, because they hold or may show one of the images.
        students: Identities of the students that were taught with one of them, by folder.
    """

    run: str
    applied: bool
    asked: int
    already: int
    lake: int
    selected: int
    mined: int
    controls: dict[str, int]
    labeled: list[str]
    test: list[str]
    unknown: list[str]
    outdated: list[str]
    erased: list[str]
    students: dict[str, str]


@dataclass(frozen=True)
class _Whereabouts:
    """Where images are in a run; sets of contents."""

    lake: set[bytes]
    selected: dict[str, set[bytes]]
    mined: dict[str, dict[str, set[bytes]]]
    roles: dict[bytes, str]
    test: set[bytes]

    def state(self, sample: bytes) -> str:
        """How the list records it."""
        if any(sample in chosen for chosen in self.selected.values()) or sample in self.with_bytes:
            return "selected"
        return "lake" if sample in self.lake else "unknown"

    @property
    def with_bytes(self) -> set[bytes]:
        """Those whose pixels the run has copied."""
        return {sample for files in self.mined.values() for here in files.values() for sample in here}


def _whereabouts(
    run: Storage, choices: Mapping[str, Storage], samples: Sequence[bytes], progress: Progress
) -> _Whereabouts:
    known = _known_lake(run)
    in_lake: set[bytes] = set()
    if known is not None:
        progress.start(len(known.files), "files")
        for _, part in find(known.artifact, known.files, samples, [], progress):
            in_lake.update(part[schema.SAMPLE_ID].to_pylist())
    mined = {}
    for name, folder in choices.items():
        artifact = folder.child("mined")
        mined[name] = {
            file: set(part[schema.SAMPLE_ID].to_pylist())
            for file, part in find(artifact, _data_files(artifact), samples, [])
        }
    return _Whereabouts(
        in_lake,
        {name: _among(folder.child("selection"), _SELECTION_FILE, samples) for name, folder in choices.items()},
        mined,
        _roles(run, samples),
        _among(run.child("evaluation"), "answers.parquet", samples),
    )


def forget(
    uri: str, samples: Sequence[bytes], progress: Progress, *, apply: bool, note: Callable[[str], None]
) -> Forgetting:
    """Make a run never choose these images again, and erase the copies that it made of them.

    The list is written first: whatever interrupts what follows, no choice takes them any more, and doing it again
    finishes it.

    Args:
        uri: The run's folder.
        samples: The images.
        progress: Counts the files of the lake's rows.
        apply: False: only say what would happen.
        note: Is told of a wait for another run.

    Raises:
        DataError: There is no run, or it cannot be written.
        ClusterError: A run is at work there.
    """
    run = Storage(uri)
    if (found := runs_below(uri)) != [run.uri]:
        raise DataError(
            "this is no run's own folder",
            slug="not-one-run",
            where=uri,
            allowed="the output of one job",
            got=f"a folder with runs below it, such as {found[0]}",
            hint="give each of them a command of its own",
        )
    if not apply:
        return _forget(run, samples, progress, apply=False)
    with lease.hold(run, "forget", note=note):
        return _forget(run, samples, progress, apply=True)


def _forget(run: Storage, samples: Sequence[bytes], progress: Progress, *, apply: bool) -> Forgetting:
    before = forgotten(run)
    # Those of the list are looked for as well: somebody may have been interrupted, or have written it by hand.
    everything = list(dict.fromkeys([*samples, *before]))
    choices = _choices(run)
    there = _whereabouts(run, choices, everything, progress)
    # What was recorded once stays: the choices since then were made with it, and are no others for being asked again.
    new = {sample: there.state(sample) for sample in samples if sample not in before}
    digest = _digest(before | new)
    documents = {name: _made_from_a_choice(folder) for name, folder in choices.items()}
    prefixes = {name: f"{_CONTROLS}/{name}/" if name else "" for name in choices}
    asked = set(samples)
    students = {
        f"{prefixes[name]}{folder}": made.identity
        for name in choices
        for folder in ("student", "exported")
        if (made := documents[name].get(folder)) is not None
        and (chosen := documents[name].get("selection")) is not None
        if there.selected[name] & asked and _selection_behind(choices[name], made) == chosen.identity
    }
    mined_files = [
        f"{prefixes[name]}mined/{file}" for name in choices for file in there.mined[name] if there.mined[name][file]
    ]
    result = Forgetting(
        run=run.uri,
        applied=apply,
        asked=len(samples),
        already=sum(sample in before for sample in samples),
        lake=len(there.lake & asked),
        selected=len(there.selected[""] & asked),
        mined=len(there.with_bytes & asked),
        controls={name: len(chosen & asked) for name, chosen in there.selected.items() if name},
        labeled=sorted(sample.hex() for sample in asked & set(there.roles)),
        test=sorted(sample.hex() for sample in asked & there.test),
        unknown=[
            sample.hex()
            for sample in samples
            if there.state(sample) == "unknown" and sample not in there.roles and sample not in there.test
        ],
        outdated=[f"{prefixes[name]}{folder}" for name in choices for folder in _outdated(documents[name], digest)],
        erased=mined_files + _pages(run, there, asked),
        students=students,
    )
    if apply:
        if new:
            run.write_bytes(LIST_FILE, _list(run, new, result))
        for name, folder in choices.items():
            if any(there.mined[name].values()):
                # As for a stage: what is not whole any more is no artifact.
                folder.child("mined").delete(manifest.FILE_NAME)
        for file in result.erased:
            run.delete(file)
    return result


def _made_from_a_choice(folder: Storage) -> dict[str, Manifest]:
    """Artifacts that hang on the choice of images, by folder, in their order."""
    names = _ARTIFACTS[_ARTIFACTS.index("selection") :]
    return {name: document for name in names if (document := manifest.read(folder.child(name))) is not None}


def _outdated(made: Mapping[str, Manifest], digest: str | None) -> list[str]:
    """Folders of what was not made with this list, or was made of something that was not, or is no more.

    Args:
        made: Artifacts that hang on the choice.
        digest: What the list adds to the choice's identity.
    """
    current: dict[str, str] = {}
    outdated = []
    for folder, document in made.items():
        ours = {name: value for name, value in document.inputs.items() if name in _HANG_ON_THE_CHOICE}
        listed = document.stage != "select" or document.inputs.get("forgotten") == digest
        if listed and all(current.get(name) == value for name, value in ours.items()):
            current[document.stage] = document.identity
        else:
            outdated.append(folder)
    return outdated


def _pages(run: Storage, there: _Whereabouts, asked: set[bytes]) -> list[str]:
    """Pages that show one of the images, or may."""
    seen = there.lake | there.with_bytes
    pages = []
    # The report shows the best images that were not chosen, too, and which these are it does not say.
    if seen & asked and run.kind(_REPORT_FILE) == "file":
        pages.append(_REPORT_FILE)
    if run.kind(_SHEET_FILE) == "file" and run.kind(_DRAWN_FILE) == "file":
        drawn = {bytes.fromhex(text) for text in run.read_json(_DRAWN_FILE)["samples"]}
        pages += [_SHEET_FILE] if drawn & seen else []
    return pages


def _list(run: Storage, new: Mapping[bytes, str], result: Forgetting) -> bytes:
    """The list with new images at its end, under a line that says when, and which students knew them."""
    text = (run.read_if_there(LIST_FILE) or b"").decode()
    if not text:
        text = "# Images that this run never chooses again: `pu-ray forget` adds to it, the stage `select` reads it.\n"
    elif not text.endswith("\n"):
        text += "\n"
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    named = ", ".join(f"{folder} {identity}" for folder, identity in result.students.items())
    knew = f"; taught with some of them: {named}" if named else ""
    lines = [f"# {now}: {len(new):,} images{knew}", *(f"{sample.hex()} {state}" for sample, state in new.items())]
    return (text + "\n".join(lines) + "\n").encode()


def render_forgetting(done: Forgetting, command: str) -> str:
    """What was forgotten, or would be, and what is to be done next; for people.

    Args:
        done: What happened.
        command: The command that does it, for whoever has only looked.
    """
    text = io.StringIO()

    def say(line: str = "") -> None:
        text.write(f"{line}\n")

    images_ = "1 image" if done.asked == 1 else f"{done.asked:,} images"
    say(f"{done.run}: {images_} {'forgotten' if done.applied else 'to forget'}")
    say(f"  in the lake        {done.lake:,}")
    say(f"  selected           {done.selected:,}")
    for name, count in done.controls.items():
        say(f"  control {name:<10} {count:,}")
    say(f"  copied to mined/   {done.mined:,}")
    say(f"  forgotten before   {done.already:,}")
    say(f"  unknown here       {len(done.unknown):,}{_some(done.unknown)}")
    for ids, what in (
        (done.labeled, "labeled images: they go on teaching until you take them out of labeled.uri"),
        (done.test, "test images: students are judged on them until you take them out of test.uri"),
    ):
        if ids:
            say(f"  {len(ids):,} of them are {what}{_some(ids)}")
    will = "" if done.applied else "would be "
    say()
    say(f"{will}out of date: {', '.join(done.outdated) or 'nothing'}")
    say(f"{will}erased at once: {', '.join(_in_short(done.erased)) or 'nothing'}")
    if done.students:
        named = ", ".join(f"{folder} {identity[:16]}" for folder, identity in done.students.items())
        say(f"taught with some of them: {named}")
    say()
    if not done.applied:
        say("Nothing was changed. To do it:")
        say(f"  {command}")
        return text.getvalue().rstrip()
    if done.outdated:
        say("next:")
        say("  pu-ray select JOB.yaml   # the choice and its images without them: minutes, no training")
        say("  pu-ray run JOB.yaml      # students that never saw them; features and scores are kept")
        if any(name.endswith("exported") for name in done.outdated):
            say("Until a new student has passed its gate, exported/ is the old one.")
    if done.lake:
        say("Not forgotten: numbers (in features/ a 12 x 12 thumbnail) of every image in the lake, and what the scorer")
        say("learned. Take the images out of the lake as well, and the next run drops these too.")
    return text.getvalue().rstrip()


def _some(ids: Sequence[str]) -> str:
    if not ids:
        return ""
    return f": {', '.join(ids[:_MOST_NAMED])}" + (", ..." if len(ids) > _MOST_NAMED else "")


def _in_short(files: Sequence[str]) -> list[str]:
    """Files of one folder as their number."""
    counted: dict[str, list[str]] = {}
    for file in files:
        counted.setdefault(file.partition(f"/{ledger.DATA_FOLDER}/")[0], []).append(file)
    return [
        f"{len(here):,} file{'' if len(here) == 1 else 's'} of {folder}" if here != [folder] else folder
        for folder, here in counted.items()
    ]
