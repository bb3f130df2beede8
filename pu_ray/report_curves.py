"""Precision against recall over all thresholds: measured where the lake's truth is known, and estimated where not.

Axes: N images of the lake, P held-out labeled images, U images of a held-out sample of the lake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pu_ray import ledger, schema
from pu_ray.config import JobConfig
from pu_ray.measures import wilson
from pu_ray.storage import Storage

_POINTS = 60
# With fewer images above a threshold, their share of the lake is too uncertain for the estimate to say anything.
FEWEST_ABOVE = 50


def measured(scores_N: Any, positive_N: Any) -> list[dict[str, float]]:
    """Precision and recall at thresholds that spread over recall, highest threshold first; none without a positive.

    Args:
        scores_N: Score of each distinct usable image, float [N]; minus infinity for what a gate rejected.
        positive_N: Whether it is in truth of one of the classes, bool [N].

    Returns:
        For each threshold `threshold`, `recall`, `precision` and `kept`, the images at or above it.
    """
    scores, positive = np.asarray(scores_N, float), np.asarray(positive_N, bool)
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(positive[order])
    if not len(hits) or hits[-1] == 0:
        return []
    ends = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True] & np.isfinite(scores))
    ends = ends[hits[ends] > 0]
    return [
        {
            "threshold": float(scores[end]),
            "recall": float(hits[end] / hits[-1]),
            "precision": float(hits[end] / (end + 1)),
            "kept": int(end + 1),
        }
        for end in _thinned(ends, hits[ends])
    ]


def estimated(calibration_P: Any, lake_U: Any, prior: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Precision and recall without the truth, highest threshold first.

    Recall at t is P(score >= t | positive), read off held-out labeled images, and precision follows from Bayes' rule:
    prior x recall / P(score >= t), the last read off the lake (Jain, White and Radivojac 2017). Both hold if labeled
    images look like the lake's positives, as the recall promise asks too. The band takes the worst of three 95 %
    intervals at once (prior, recall, share of the lake), so at one threshold it holds with 85 % at least (Bonferroni).

    Args:
        calibration_P: Scores of labeled images that nothing was fitted on, float [P].
        lake_U: Scores of lake images that nothing was fitted on, float [U].
        prior: `estimate`, `low`, `high`, and `is_upper_bound`, with which the band reaches down to 0.

    Returns:
        For each threshold `threshold`, and `recall` and `precision` with `value`, `low` and `high`. No threshold with
        fewer than 50 images of the sample at or above it.
    """
    calibration, lake = np.sort(np.asarray(calibration_P, float)), np.sort(np.asarray(lake_U, float))
    candidates = np.unique(calibration[np.isfinite(calibration)])[::-1]
    above = len(lake) - np.searchsorted(lake, candidates)
    candidates = candidates[above >= FEWEST_ABOVE]
    points = []
    for threshold in _thinned(candidates, np.arange(len(candidates))):
        recall = wilson(len(calibration) - int(np.searchsorted(calibration, threshold)), len(calibration))
        share = wilson(len(lake) - int(np.searchsorted(lake, threshold)), len(lake))
        low = 0.0 if prior["is_upper_bound"] else prior["low"] * recall.low / share.high
        points.append(
            {
                "threshold": float(threshold),
                "recall": asdict(recall),
                "precision": {
                    "value": min(1.0, prior["estimate"] * recall.value / share.value),
                    "low": min(1.0, low),
                    "high": min(1.0, prior["high"] * recall.high / share.low),
                },
            }
        )
    return points


def _thinned(values: Any, along: Any) -> Any:
    """At most 60 of the values, evenly along another rising quantity; first and last stay."""
    if len(values) <= _POINTS:
        return values
    wanted = np.linspace(along[0], along[-1], _POINTS)
    return values[np.unique(np.searchsorted(along, wanted))]


def of_run(job: JobConfig, storage: Storage, prior: Mapping[str, Any], truth_was_used: bool) -> dict[str, Any]:
    """Both curves of a run, for its summary.

    Args:
        job: The job.
        storage: Its output; the scorer is there.
        prior: As the summary has it.
        truth_was_used: Whether the evaluation measured against the truth; never else is it looked at.
    """
    scorer = storage.child("scorer")
    calibration, lake = (
        scorer.read_table(name, [schema.SCORE])[schema.SCORE].to_numpy()
        for name in ("calibration.parquet", "unlabeled.parquet")
    )
    truth = _against_truth(job, storage) if truth_was_used and job.lake.truth else []
    return {"estimated": estimated(calibration, lake, prior), "measured": truth}


def _against_truth(job: JobConfig, storage: Storage) -> list[dict[str, float]]:
    """As `measures.mining_quality` counts: contents of the lake, without those that were left out for a reason."""
    assert job.lake.truth is not None
    folder, name = Storage(job.lake.truth).split()
    table = folder.read_table(name, [schema.SAMPLE_ID, schema.CLASS])
    positives = table.filter(pc.greater_equal(table[schema.CLASS], 0))[schema.SAMPLE_ID].cast(schema.SAMPLE_ID_TYPE)
    excluded = storage.child("selection").read_table("left_out.parquet", [schema.SAMPLE_ID])[schema.SAMPLE_ID]
    scores = storage.child("scores")
    parts = []
    for file in ledger.data_files(scores):
        part = scores.read_table(file, [schema.SAMPLE_ID, schema.SCORE, schema.ERROR])
        usable = pc.and_(pc.is_null(part[schema.ERROR]), pc.is_valid(part[schema.SCORE]))
        kept = pc.and_(usable, pc.invert(pc.is_in(part[schema.SAMPLE_ID], value_set=excluded.combine_chunks())))
        parts.append(part.filter(kept).select([schema.SAMPLE_ID, schema.SCORE]))
    distinct = pa.concat_tables(parts).group_by(schema.SAMPLE_ID).aggregate([(schema.SCORE, "max")])
    positive = pc.is_in(distinct[schema.SAMPLE_ID], value_set=positives.combine_chunks())
    return measured(distinct[f"{schema.SCORE}_max"].to_numpy(), positive.to_numpy(zero_copy_only=False))
