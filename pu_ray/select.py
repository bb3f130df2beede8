"""Stage `select`: choose the lake images that teach the student, without touching the lake again.

A cheap second pass over `scores/`: a threshold with its promise, then one image per content, none that the customer
labeled, none that the student will be judged on (exact copies by content hash, near copies by thumbnail), none that the
run has to forget (found likewise), no near copies of each other, then balance between the classes. The controls of a
benchmark are rules like any other: what they rank by is in `scores/` too. Writes `selection/`: selection.parquet,
left_out.parquet.
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

from pu_ray import balance, duplicates, images, lake, ledger, manifest, schema
from pu_ray.config import THRESHOLD_RULES, JobConfig, SelectionConfig
from pu_ray.errors import DataError
from pu_ray.lineage import forgotten_list, lookup
from pu_ray.manifest import Manifest, Publication
from pu_ray.progress import Progress
from pu_ray.pu import threshold
from pu_ray.storage import Storage

FOLDER = "selection"
_COLUMNS = schema.scores().names
_KEY = "key"  # what is maximised when the budget binds
_PRUNE_AT = 4
_IMAGES_PER_CELL = 10
_MOST_CELLS = 512
_LEAST_STD = 1e-4


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


# -- what is maximised -------------------------------------------------------------------------------------

_RANKED_BY = {
    "recall": schema.SCORE,
    "fdr_discard": schema.SCORE,
    "zero": schema.SCORE,
    "budget": schema.SCORE,
    "confidence": schema.CONFIDENCE,  # lowest cross-entropy to the teacher's own answer (DFND, Chen et al. 2021)
    "energy": schema.ENERGY,
    "neighbours": schema.NEIGHBOUR,
}
_BLIND_RULES = ("random", "everything", "oracle")  # look at nothing that a network said
_PREFERRED_BY = {"purest": schema.SCORE, "uncertain": schema.ENTROPY}


def _keys(table: pa.Table, settings: SelectionConfig, seed: int) -> pa.Array:
    """What is maximised when the budget binds, float64 [N]; a number drawn at random where nothing is."""
    column = _RANKED_BY.get(settings.rule)
    if settings.rule in THRESHOLD_RULES:
        column = _PREFERRED_BY.get(settings.prefer)
    if column is None:
        return pa.array([random_key(sample, seed) for sample in table[schema.SAMPLE_ID].to_pylist()], pa.float64())
    return table[column].cast(pa.float64())


def _spread_keys(candidates: pa.Table, features: Storage, budget: int, seed: int) -> pa.Array:
    """Keys by which every region of feature space gives its share: the n-th of each region ranks with all n-ths.

    Regions are the cells of a k-means on standardised features (Sculley 2010), as many as the budget can fill well.
    """
    from sklearn.cluster import MiniBatchKMeans

    found: dict[bytes, Any] = {}
    for table in _rows_of(candidates, features, schema.FEATURES):
        rows = lake.to_matrix(table[schema.FEATURES]).astype(np.float32)
        found.update(zip(table[schema.SAMPLE_ID].to_pylist(), rows, strict=True))
    samples = candidates[schema.SAMPLE_ID].to_pylist()
    matrix = np.stack([found[sample] for sample in samples])
    matrix = (matrix - matrix.mean(axis=0)) / np.maximum(matrix.std(axis=0), _LEAST_STD)
    cells = max(1, min(_MOST_CELLS, budget // _IMAGES_PER_CELL, len(matrix)))
    cell = MiniBatchKMeans(cells, batch_size=4096, n_init=3, random_state=seed).fit_predict(matrix)
    keys = np.array([random_key(sample, seed) for sample in samples])
    place = np.empty(len(keys))
    for value in np.unique(cell):
        members = np.flatnonzero(cell == value)
        place[members[np.argsort(keys[members])]] = np.arange(len(members))
    return pa.array(keys - place, pa.float64())


# -- the passes over scores and features -------------------------------------------------------------------


def _candidates(
    scores: Storage,
    settings: SelectionConfig,
    cut_K: Any,
    seed: int,
    known: Mapping[bytes, str],
    only: set[bytes] | None,
    progress: Progress,
) -> tuple[pa.Table, dict[bytes, str]]:
    """Usable rows that pass, one per content, with what is maximised in column `key`.

    With a budget, memory holds a few times the budget, whatever the size of the lake.

    Args:
        scores: The artifact.
        settings: Rule and budget.
        cut_K: Least score of each predicted class, float [K].
        seed: Of what is random.
        known: Contents that must not be mined, with the reason.
        only: Contents that may be chosen; None for all. Asked before anything is forgotten for the budget's sake.
        progress: Advanced by rows.

    Returns:
        The candidates, and the known contents that were met.
    """
    empty = schema.scores().empty_table().append_column(_KEY, pa.array([], pa.float64()))
    parts: list[pa.Table] = [empty]
    met: dict[bytes, str] = {}
    held = 0
    for table in _usable(scores, settings, cut_K, progress):
        if only is not None:
            table = table.filter(pa.array([s in only for s in table[schema.SAMPLE_ID].to_pylist()], pa.bool_()))
        samples = table[schema.SAMPLE_ID].to_pylist()
        met.update((sample, known[sample]) for sample in samples if sample in known)
        table = table.filter(pa.array([sample not in known for sample in samples], pa.bool_()))
        parts.append(table.append_column(_KEY, _keys(table, settings, seed)))
        held += table.num_rows
        prunes = settings.budget is not None and settings.prefer != "spread"
        if prunes and held > _PRUNE_AT * max(settings.budget or 0, 65_536):
            # Twice the budget: some of these will turn out to be near copies.
            parts = [_best(_distinct(pa.concat_tables(parts)), settings, 2 * (settings.budget or 0))]
            held = parts[0].num_rows
    return _distinct(pa.concat_tables(parts)), met


def _usable(scores: Storage, settings: SelectionConfig, cut_K: Any, progress: Progress) -> Iterator[pa.Table]:
    # What the cascade's gate rejected is no candidate, except for controls that look at nothing.
    blind = settings.rule in _BLIND_RULES
    for table in _scored(scores, progress):
        predicted, score = table[schema.PREDICTED].to_numpy(), table[schema.SCORE].to_numpy()
        passes = (predicted != schema.NO_CLASS) & (score >= cut_K[predicted])
        yield table if blind else table.filter(pa.array(passes, pa.bool_()))


def _scored(scores: Storage, progress: Progress) -> Iterator[pa.Table]:
    """The rows of all usable images."""
    index = ledger.read_index(scores)
    progress.start(pc.sum(index["rows"]).as_py() or 0, "scores")
    for entry in index.to_pylist():
        table = scores.read_table(entry["file"], _COLUMNS)
        progress.advance(table.num_rows)
        scored = pc.and_(pc.is_valid(table[schema.SCORE]), pc.invert(pc.is_nan(table[schema.SCORE])))
        yield table.filter(pc.fill_null(pc.and_(pc.is_null(table[schema.ERROR]), scored), False))


def _distinct(table: pa.Table) -> pa.Table:
    """The first row of each content, by shard and row."""
    table = table.sort_by([(schema.SHARD, "ascending"), (schema.ROW, "ascending")])
    seen: set[bytes] = set()
    first = [not (sample in seen or seen.add(sample)) for sample in table[schema.SAMPLE_ID].to_pylist()]  # type: ignore[func-returns-value]
    return table.filter(pa.array(first, pa.bool_()))


def _best(table: pa.Table, settings: SelectionConfig, budget: int) -> pa.Table:
    """At most `budget` rows, the best by key, with or without class quotas; ties fall by content."""
    ranked = table.sort_by([(_KEY, "descending"), (schema.SAMPLE_ID, "ascending")])
    # What the gate rejected has no class to balance by.
    if settings.balance == "none" or settings.rule in _BLIND_RULES:
        return ranked.slice(0, budget)
    predicted = ranked[schema.PREDICTED].to_numpy()
    quota = balance.quotas(np.bincount(predicted), budget)
    rank_in_class = np.empty(len(predicted), np.int64)
    for value in np.unique(predicted):
        members = predicted == value
        rank_in_class[members] = np.arange(members.sum())
    return ranked.filter(pa.array(rank_in_class < quota[predicted]))


def _rows_of(wanted: pa.Table, storage: Storage, column: str) -> Iterator[pa.Table]:
    """Sample id and another column of the wanted contents, file by file; only files that may hold one are read."""
    contents = set(wanted[schema.SAMPLE_ID].to_pylist())
    shards = set(wanted[schema.SHARD].to_pylist())
    for entry in ledger.read_index(storage).to_pylist():
        if entry["shard"] in shards:
            table = storage.read_table(entry["file"], [schema.SAMPLE_ID, column])
            members = np.array([sample in contents for sample in table[schema.SAMPLE_ID].to_pylist()], bool)
            usable = pc.is_valid(table[column])
            yield table.filter(pc.and_(pa.array(members), usable))


def _near_leaks(thumbnails: Storage, rows: pa.Table, evaluation: images.Pixels, correlation: float) -> set[bytes]:
    """Contents among the rows whose stored thumbnails nearly equal one that must not be mined.

    Args:
        thumbnails: The artifact that holds them: the features, or without a cache the scores.
        rows: Whom to compare.
        evaluation: Thumbnails of the evaluation images, or of the forgotten ones.
        correlation: From which on two are copies.
    """
    leaks: set[bytes] = set()
    for table in _rows_of(rows, thumbnails, schema.THUMBNAIL):
        if table.num_rows:
            near = images.near_copies(lake.to_matrix(table[schema.THUMBNAIL]), evaluation, correlation)
            leaks.update(np.array(table[schema.SAMPLE_ID].to_pylist(), object)[near])
    return leaks


def _near_duplicates(thumbnails: Storage, rows: pa.Table, correlation: float) -> set[bytes]:
    """Contents among the rows that are near copies of a better one."""
    found: dict[bytes, Any] = {}
    for table in _rows_of(rows, thumbnails, schema.THUMBNAIL):
        found.update(zip(table[schema.SAMPLE_ID].to_pylist(), lake.to_matrix(table[schema.THUMBNAIL]), strict=True))
    ranked = rows.sort_by([(_KEY, "descending"), (schema.SAMPLE_ID, "ascending")])[schema.SAMPLE_ID].to_pylist()
    ranked = [sample for sample in ranked if sample in found]
    if not ranked:
        return set()
    best_first = np.arange(len(ranked))
    dropped = duplicates.near_duplicates(np.stack([found[sample] for sample in ranked]), best_first, correlation)
    return {sample for sample, drop in zip(ranked, dropped.tolist(), strict=True) if drop}


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

    cut_K, promise = _cut(settings, scorer, scores, len(classes), progress)
    labeled = scorer.read_table("labeled.parquet", [schema.SAMPLE_ID])[schema.SAMPLE_ID].to_pylist()
    evaluation = lake.read_labeled(config.test.uri, classes)
    only = _true_positives(config) if settings.rule == "oracle" else None
    forgotten = set(forgotten_list.read(Storage(config.output)))  # a control forgets what its job does
    known = _known(labeled, evaluation) | dict.fromkeys(forgotten, "forgotten")
    candidates, why_not = _candidates(scores, settings, cut_K, config.seed, known, only, progress)
    passed = candidates.num_rows + len(why_not)
    miniatures = images.thumbnails(evaluation.pixels(config.teacher.preprocessing, config.test.uri))
    thumbnails = storage.child("features") if config.features.cache else scores
    near = _near_leaks(thumbnails, candidates, miniatures, settings.near_copy_correlation)
    why_not |= dict.fromkeys(sorted(near), "near_leak")
    kept = _without(candidates, near)
    if forgotten:
        # Or a copy would step into the place of what was forgotten.
        miniatures = lookup.thumbnails_of(forgotten, thumbnails)
        alike = _near_leaks(thumbnails, kept, miniatures, settings.near_copy_correlation)
        why_not |= dict.fromkeys(sorted(alike), "near_forgotten")
        kept = _without(kept, alike)
    if settings.prefer == "spread" and settings.budget is not None and kept.num_rows:
        keys = _spread_keys(kept, storage.child("features"), settings.budget, config.seed)
        kept = kept.set_column(kept.schema.get_field_index(_KEY), _KEY, keys)
    if settings.duplicates == "near":
        copies = _near_duplicates(thumbnails, kept, settings.near_copy_correlation)
        why_not |= dict.fromkeys(sorted(copies), "near_duplicate")
        kept = _without(kept, copies)
    before = _class_counts(kept, len(classes))
    chosen = _best(kept, settings, settings.budget) if settings.budget is not None else kept
    if chosen.num_rows == 0:
        raise DataError(
            "no image was selected",
            slug="no-image-selected",
            where=str(scores),
            allowed="at least one image at or above the threshold",
            got=f"{passed} above {float(np.min(cut_K)):g}, {len(why_not)} of them excluded",
            hint="look at the score histogram in the report; lower selection.recall, or check lake and teacher",
        )
    after = _class_counts(chosen, len(classes))
    target = storage.child(FOLDER)
    target.delete()
    target.write_table("selection.parquet", _ordered(chosen, settings.rule, config.seed))
    reasons = {
        reason: sum(value == reason for value in why_not.values())
        for reason in ("labeled", "leak", "near_leak", "near_duplicate", "forgotten", "near_forgotten")
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
            "threshold": float(cut_K.min()) if np.isfinite(cut_K.min()) else None,
            "promise": promise,
            "class_counts_before_balance": before.tolist(),
            "class_counts": after.tolist(),
        },
    )


def _class_counts(rows: pa.Table, classes: int) -> Any:
    predicted = rows[schema.PREDICTED].to_numpy()
    return np.bincount(predicted[predicted != schema.NO_CLASS], minlength=classes)


def _without(table: pa.Table, contents: set[bytes]) -> pa.Table:
    return table.filter(
        pa.array([sample not in contents for sample in table[schema.SAMPLE_ID].to_pylist()], pa.bool_())
    )


def _true_positives(config: JobConfig) -> set[bytes]:
    """What nobody but a benchmark can choose."""
    assert config.lake.truth is not None
    folder, name = Storage(config.lake.truth).split()
    table = folder.read_table(name)
    return set(table.filter(pc.greater_equal(table[schema.CLASS], 0))[schema.SAMPLE_ID].to_pylist())


def _cut(
    settings: SelectionConfig, scorer: Storage, scores: Storage, classes: int, progress: Progress
) -> tuple[Any, dict[str, Any] | None]:
    """The least score of each predicted class, float64 [K], and what it promises."""
    if settings.rule == "zero":
        # The paper mines x iff g(x) > 0, strictly.
        return np.full(classes, math.nextafter(0.0, 1.0)), None
    if settings.rule not in ("recall", "fdr_discard"):
        return np.full(classes, -np.inf), None
    table = scorer.read_table("calibration.parquet")
    calibration, predicted = table[schema.SCORE].to_numpy(), table[schema.PREDICTED].to_numpy()
    try:
        if settings.rule == "fdr_discard":
            return _discard_cut(settings, calibration, scores, classes, progress)
        return _recall_cut(settings, calibration, predicted, classes)
    except ValueError as error:
        raise DataError(
            "too few calibration images for this promise",
            slug="too-few-calibration-images",
            where=f"selection.{'fdr' if settings.rule == 'fdr_discard' else 'per'}",
            got=str(error),
            hint="label more images, or promise less: a lower selection.recall or selection.confidence, "
            "selection.per lake, a higher selection.fdr",
        ) from error


def _discard_cut(
    settings: SelectionConfig, calibration: Any, scores: Storage, classes: int, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    counts = np.zeros(len(calibration) + 1, np.int64)
    for part in _scored(scores, progress):
        counts += threshold.count_between(calibration, part[schema.SCORE].to_numpy())
    found = threshold.discard_threshold(calibration, counts, settings.fdr)
    # Where nothing can be discarded there is no threshold; JSON has no minus infinity.
    value = None if math.isinf(found.value) else found.value
    return np.full(classes, found.value), asdict(found) | {"value": value}


def _recall_cut(
    settings: SelectionConfig, calibration: Any, predicted: Any, classes: int
) -> tuple[Any, dict[str, Any]]:
    if settings.per == "lake":
        found = threshold.recall_threshold(calibration, settings.recall, settings.confidence)
        _require_finite(found, calibration)
        return np.full(classes, found.value), asdict(found)
    each = threshold.recall_thresholds_per_class(calibration, predicted, classes, settings.recall, settings.confidence)
    for found in each:
        _require_finite(found, calibration)
    return np.array([found.value for found in each]), {
        "recall": settings.recall,
        "confidence": settings.confidence,
        "per_class": [asdict(found) for found in each],
    }


def _require_finite(found: threshold.RecallThreshold, calibration: Any) -> None:
    if math.isinf(found.value):
        raise DataError(
            "the cascade's gate rejects too many labeled images for this promise",
            slug="cascade-rejects-too-many",
            where="selection.recall",
            allowed=f"fewer than {found.rank} of {found.calibration} calibration images rejected",
            got=f"{int(np.isneginf(calibration).sum())} rejected",
            hint="raise features.cascade_recall or features.cascade_stages, or lower selection.recall",
        )


def _known(labeled: Sequence[bytes], evaluation: lake.LabeledImages) -> dict[bytes, str]:
    """Contents that must not be mined, with the reason; a test image is a leak even if it is labeled too."""
    return dict.fromkeys(labeled, "labeled") | dict.fromkeys(evaluation.ids, "leak")


def _ordered(chosen: pa.Table, why: str, seed: int) -> pa.Table:
    keys = [random_key(sample, seed) for sample in chosen[schema.SAMPLE_ID].to_pylist()]
    order = stratified_order(chosen[schema.PREDICTED].to_numpy(), keys)
    table = chosen.append_column(schema.ORDER, pa.array(order)).append_column(schema.WHY, pa.array([why] * len(order)))
    return table.select(schema.selection().names).cast(schema.selection()).sort_by(schema.ORDER)
