"""Stage `select`: choose the lake images that teach the student, without touching the lake again.

A cheap second pass over `scores/`: a threshold with its promise, then one image per content, none that the customer
labeled, none that the student will be judged on (exact copies by content hash, near copies by thumbnail), then
balance between the classes. Writes `selection/`: selection.parquet, left_out.parquet.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pu_ray import balance, images, lake, ledger, manifest, schema
from pu_ray.config import JobConfig, SelectionConfig
from pu_ray.errors import DataError
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.pu import threshold
from pu_ray.storage import Storage

FOLDER = "selection"
_COLUMNS = [*schema.IDENTITY_COLUMNS, schema.SCORE, schema.PREDICTED, schema.CONFIDENCE, schema.ERROR]
_KEY = "key"  # what is maximised: the score, or a random number for the control
_PRUNE_AT = 4


# -- pure functions ----------------------------------------------------------------------------------------


def random_key(sample: bytes, seed: int) -> float:
    """A uniform number in [0, 1) that depends on the image and the seed alone, not on any order."""
    digest = hashlib.blake2b(sample, digest_size=8, key=b"select" + seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest, "big") / 2**64


def stratified_order(classes_N: Any, tie_break_N: Any) -> Any:
    """Positions such that every prefix holds the classes in about their overall shares.

    Args:
        classes_N: Class of each row, int [N].
        tie_break_N: Unique number of each row; decides the order inside a class.

    Returns:
        int64 [N], a permutation: the position of each row.
    """
    classes, tie_break = np.asarray(classes_N), np.asarray(tie_break_N)
    place = np.empty(len(classes))
    for value in np.unique(classes):
        members = np.flatnonzero(classes == value)
        ranked = members[np.argsort(tie_break[members], kind="stable")]
        place[ranked] = (np.arange(len(ranked)) + 0.5) / len(ranked)
    order = np.empty(len(classes), np.int64)
    order[np.lexsort((tie_break, place))] = np.arange(len(classes))
    return order


# -- the passes over scores and features -------------------------------------------------------------------


def _candidates(
    scores: Storage, settings: SelectionConfig, cut: float, seed: int, known: Mapping[bytes, str], progress: Progress
) -> tuple[pa.Table, dict[bytes, str]]:
    """Usable rows at or above the cut, one per content, with what is maximised in column `key`.

    With a budget, memory holds a few times the budget, whatever the size of the lake.

    Args:
        scores: The artifact.
        settings: Rule and budget.
        cut: Least score.
        seed: Of the random rule.
        known: Contents that must not be mined, with the reason.
        progress: Advanced by rows.

    Returns:
        The candidates, and the known contents that were met.
    """
    empty = schema.scores().empty_table().append_column(_KEY, pa.array([], pa.float64()))
    parts: list[pa.Table] = [empty]
    met: dict[bytes, str] = {}
    held = 0
    # What the cascade's gate rejected is no candidate, except for a control that looks at nothing.
    least = cut if settings.rule == "random" else max(cut, float(np.finfo(np.float32).min))
    for table in _usable(scores, least, progress):
        samples = table[schema.SAMPLE_ID].to_pylist()
        met.update((sample, known[sample]) for sample in samples if sample in known)
        table = table.filter(pa.array([sample not in known for sample in samples], pa.bool_()))
        if settings.rule == "random":
            keys = [random_key(sample, seed) for sample in table[schema.SAMPLE_ID].to_pylist()]
            column = pa.array(keys, pa.float64())
        else:
            column = table[schema.SCORE].cast(pa.float64())
        parts.append(table.append_column(_KEY, column))
        held += table.num_rows
        if settings.budget is not None and held > _PRUNE_AT * max(settings.budget, 65_536):
            # Twice the budget: some of these will turn out to be near copies of test images.
            parts = [_best(_distinct(pa.concat_tables(parts)), settings, 2 * settings.budget)]
            held = parts[0].num_rows
    return _distinct(pa.concat_tables(parts)), met


def _usable(scores: Storage, cut: float, progress: Progress) -> Iterator[pa.Table]:
    index = ledger.read_index(scores)
    progress.start(pc.sum(index["rows"]).as_py() or 0, "scores")
    for entry in index.to_pylist():
        table = scores.read_table(entry["file"], _COLUMNS)
        keep = pc.and_(pc.is_null(table[schema.ERROR]), pc.greater_equal(table[schema.SCORE], cut))
        progress.advance(table.num_rows)
        yield table.filter(pc.fill_null(keep, False))


def _distinct(table: pa.Table) -> pa.Table:
    """The first row of each content, by shard and row."""
    table = table.sort_by([(schema.SHARD, "ascending"), (schema.ROW, "ascending")])
    seen: set[bytes] = set()
    first = [not (sample in seen or seen.add(sample)) for sample in table[schema.SAMPLE_ID].to_pylist()]  # type: ignore[func-returns-value]
    return table.filter(pa.array(first, pa.bool_()))


def _best(table: pa.Table, settings: SelectionConfig, budget: int) -> pa.Table:
    """At most `budget` rows, the best by key, with or without class quotas; ties fall by content."""
    ranked = table.sort_by([(_KEY, "descending"), (schema.SAMPLE_ID, "ascending")])
    if settings.balance == "none" or settings.rule == "random":
        return ranked.slice(0, budget)
    predicted = ranked[schema.PREDICTED].to_numpy()
    quota = balance.quotas(np.bincount(predicted), budget)
    rank_in_class = np.empty(len(predicted), np.int64)
    for value in np.unique(predicted):
        members = predicted == value
        rank_in_class[members] = np.arange(members.sum())
    return ranked.filter(pa.array(rank_in_class < quota[predicted]))


def _near_leaks(thumbnails: Storage, rows: pa.Table, evaluation: images.Pixels, correlation: float) -> set[bytes]:
    """Contents among the rows whose stored thumbnails nearly equal an evaluation image's.

    Args:
        thumbnails: The artifact that holds them: the features, or without a cache the scores.
        rows: Whom to compare.
        evaluation: Thumbnails of the evaluation images.
        correlation: From which on two are copies.
    """
    wanted = set(rows[schema.SAMPLE_ID].to_pylist())
    shards = set(rows[schema.SHARD].to_pylist())
    leaks: set[bytes] = set()
    for entry in ledger.read_index(thumbnails).to_pylist():
        if entry["shard"] not in shards:
            continue
        table = thumbnails.read_table(entry["file"], [schema.SAMPLE_ID, schema.THUMBNAIL])
        members = np.array([sample in wanted for sample in table[schema.SAMPLE_ID].to_pylist()], bool)
        if members.any():
            chosen = table.filter(pa.array(members))
            near = images.near_copies(lake.to_matrix(chosen[schema.THUMBNAIL]), evaluation, correlation)
            leaks.update(np.array(chosen[schema.SAMPLE_ID].to_pylist(), object)[near])
    return leaks


# -- the stage ---------------------------------------------------------------------------------------------


def run(config: JobConfig, storage: Storage, inputs: Mapping[str, str], identity: str, progress: Progress) -> Manifest:
    """Choose, and publish the choice with the reasons for what was left out.

    Raises:
        DataError: Nothing passes the rule, or an upstream artifact is missing.
    """
    publication = Publication("select", identity, inputs, config.seed)
    settings = config.selection
    scorer, scores = storage.child("scorer"), storage.child("scores")
    fitted = manifest.require(scorer, "fit")
    classes: list[str] = fitted.facts["classes"]

    cut, promise = _cut(settings, scorer)
    labeled = scorer.read_table("labeled.parquet", [schema.SAMPLE_ID])[schema.SAMPLE_ID].to_pylist()
    evaluation = lake.read_labeled(config.test.uri, classes)
    candidates, why_not = _candidates(scores, settings, cut, config.seed, _known(labeled, evaluation), progress)
    miniatures = images.thumbnails(evaluation.pixels(config.teacher.preprocessing, config.test.uri))
    thumbnails = storage.child("features") if config.features.cache else scores
    near = _near_leaks(thumbnails, candidates, miniatures, settings.near_copy_correlation)
    passed = candidates.num_rows + len(why_not)
    why_not |= dict.fromkeys(sorted(near), "near_leak")
    kept = candidates.filter(
        pa.array([sample not in near for sample in candidates[schema.SAMPLE_ID].to_pylist()], pa.bool_())
    )
    before = _class_counts(kept, len(classes))
    chosen = _best(kept, settings, settings.budget) if settings.budget is not None else kept
    if chosen.num_rows == 0:
        raise DataError(
            "no image was selected",
            where=str(scores),
            allowed="at least one image at or above the threshold",
            got=f"{passed} above {cut:g}, {len(why_not)} of them excluded",
            hint="look at the score histogram in the report; lower selection.recall, or check lake and teacher",
        )
    after = _class_counts(chosen, len(classes))
    target = storage.child(FOLDER)
    target.delete()
    target.write_table("selection.parquet", _ordered(chosen, settings.rule, config.seed))
    reasons = {
        reason: sum(value == reason for value in why_not.values()) for reason in ("labeled", "leak", "near_leak")
    }
    left_out = pa.table(
        {
            schema.SAMPLE_ID: pa.array(list(why_not), schema.SAMPLE_ID_TYPE),
            schema.WHY: pa.array(list(why_not.values()), pa.string()),
        }
    )
    target.write_table("left_out.parquet", left_out)
    return publication.publish(
        target,
        counts={"selected": chosen.num_rows, "candidates": passed, **reasons},
        facts={
            "rule": settings.rule,
            "threshold": None if math.isinf(cut) else cut,
            "promise": promise,
            "class_counts_before_balance": before.tolist(),
            "class_counts": after.tolist(),
        },
    )


def _class_counts(rows: pa.Table, classes: int) -> Any:
    predicted = rows[schema.PREDICTED].to_numpy()
    return np.bincount(predicted[predicted != schema.NO_CLASS], minlength=classes)


def _cut(settings: SelectionConfig, scorer: Storage) -> tuple[float, dict[str, Any] | None]:
    if settings.rule == "zero":
        # The paper mines x iff g(x) > 0, strictly.
        return math.nextafter(0.0, 1.0), None
    if settings.rule != "recall":
        return -math.inf, None
    calibration = scorer.read_table("calibration.parquet")[schema.SCORE].to_numpy()
    found = threshold.recall_threshold(calibration, settings.recall, settings.confidence)
    if math.isinf(found.value):
        raise DataError(
            "the cascade's gate rejects too many labeled images for this promise",
            where="selection.recall",
            allowed=f"fewer than {found.rank} of {found.calibration} calibration images rejected",
            got=f"{int(np.isneginf(calibration).sum())} rejected",
            hint="raise features.cascade_recall or features.cascade_stages, or lower selection.recall",
        )
    return found.value, asdict(found)


def _known(labeled: Sequence[bytes], evaluation: lake.LabeledImages) -> dict[bytes, str]:
    """Contents that must not be mined, with the reason; a test image is a leak even if it is labeled too."""
    return dict.fromkeys(labeled, "labeled") | dict.fromkeys(evaluation.ids, "leak")


def _ordered(chosen: pa.Table, why: str, seed: int) -> pa.Table:
    keys = [random_key(sample, seed) for sample in chosen[schema.SAMPLE_ID].to_pylist()]
    order = stratified_order(chosen[schema.PREDICTED].to_numpy(), keys)
    table = chosen.append_column(schema.ORDER, pa.array(order)).append_column(schema.WHY, pa.array([why] * len(order)))
    return table.select(schema.selection().names).cast(schema.selection()).sort_by(schema.ORDER)
