"""`pu-ray trace`: where an image went.

What the stages published is read: the lake's rows in `scores/`, the choice and its reasons in `selection/`, the bytes
in `mined/`, and by the manifests' identities which student was taught with them.

Not covered: the scorer, which may have seen an image among its sample of the lake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from pu_ray import manifest, schema
from pu_ray.lineage import forgotten_list, lookup
from pu_ray.lineage.forgotten_list import LIST_FILE
from pu_ray.manifest import Manifest
from pu_ray.progress import Progress
from pu_ray.storage import Storage

_TEACHING_ROLES = ("train", "calibrate")  # of labeled images; those that validate choose the student's best step
_REASONS = {
    "labeled": "it is one of the labeled images",
    "leak": "it is one of the test images",
    "near_leak": "it nearly equals a test image",
    "near_duplicate": "it nearly equals a better image of the choice",
    "forgotten": f"it is in {LIST_FILE}",
    "near_forgotten": f"it nearly equals an image in {LIST_FILE}",
}


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


def trace(run: Storage, sample: bytes, progress: Progress) -> Trace:
    """Everything that a run did with one image.

    Args:
        run: The run's folder.
        sample: The image.
        progress: Counts the files of the lake's rows.
    """
    fitted = manifest.read(run.child("scorer"))
    classes: list[str] = fitted.facts["classes"] if fitted else []
    known = lookup.known_lake(run)
    rows: list[LakeRow] = []
    if known is not None:
        progress.start(len(known.files), "files")
        columns = [*schema.IDENTITY_COLUMNS[1:], schema.ERROR]
        if known.name == "scores":
            columns += [schema.SCORE, schema.PREDICTED, schema.CONFIDENCE]
        for _, table in lookup.find(known.artifact, known.files, [sample], columns, progress):
            rows += [_lake_row(row, classes) for row in table.to_pylist()]
    return Trace(
        run=run.uri,
        sample_id=sample.hex(),
        searched=known.name if known else None,
        lake=rows,
        labeled=lookup.roles_of(run, [sample]).get(sample),
        test=sample in lookup.among(run.child("evaluation"), "answers.parquet", [sample]),
        forgotten=sample in forgotten_list.read(run),
        choices=[_choice(name, folder, run, sample, rows) for name, folder in lookup.choices_of(run).items()],
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


def _choice(name: str, folder: Storage, run: Storage, sample: bytes, rows: Sequence[LakeRow]) -> Choice:
    selection = folder.child("selection")
    document = manifest.read(selection)
    copies = folder.child("mined")
    mined = next((file for file, _ in lookup.find(copies, lookup.data_files(copies), [sample], [])), None)
    if document is None:
        return Choice(control=name, selected=None, why="nothing was chosen yet", mined=mined)
    chosen = lookup.rows_of(selection, lookup.SELECTION_FILE, [sample], [schema.ORDER, schema.WHY])
    left_out = lookup.rows_of(selection, lookup.LEFT_OUT_FILE, [sample], [schema.WHY])
    if chosen:
        why = f"rule {chosen[0][schema.WHY]}"
    elif left_out:
        why = _REASONS.get(left_out[0][schema.WHY], left_out[0][schema.WHY])
    else:
        why = _why_not(rows, document)
    role = lookup.roles_of(run, [sample]).get(sample)
    scorer = manifest.read(run.child("scorer"))

    def taught(artifact: str) -> Taught | None:
        made = manifest.read(folder.child(artifact))
        if made is None:
            return None
        origin = lookup.selection_behind(folder, made)
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


# -- for people --------------------------------------------------------------------------------------------


def render(found: Sequence[Trace]) -> str:
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
