"""The plots of report.html: each shows numbers of the summary, or the scores that the threshold was set on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pu_ray import schema
from pu_ray.page import BLUE, GREY, ORANGE, Picture, themed_plot
from pu_ray.storage import Storage

_MOST_NAMED = 20  # classes with a name below their bar
_MOST_UPRIGHT = 36  # characters of names that fit side by side


def scores(storage: Storage, threshold: float | None) -> Picture:
    """How held-out labeled images and the lake score."""
    scorer = storage.child("scorer")
    positive = scorer.read_table("calibration.parquet")[schema.SCORE].to_numpy()
    positive = positive[np.isfinite(positive)]  # the others were rejected by the cascade's gate
    unlabeled = scorer.read_table("unlabeled.parquet")[schema.SCORE].to_numpy()
    low, high = np.quantile(np.r_[positive, unlabeled], [0.001, 0.999])
    bins = np.linspace(low, high, 60)

    def draw(axes: Any) -> None:
        for values, colour, label in (
            (unlabeled, GREY, "lake (held-out sample)"),
            (positive, BLUE, "labeled (calibration)"),
        ):
            axes.hist(
                np.clip(values, low, high),
                bins=bins,
                weights=np.full(len(values), 100 / max(1, len(values))),
                color=colour,
                alpha=0.65,
                label=label,
            )
        if threshold is not None:
            axes.axvline(threshold, color=ORANGE, linestyle="--", label="threshold")
        axes.set_xlabel("score")
        axes.set_ylabel("% of images")
        axes.set_yscale("symlog", linthresh=1)
        axes.legend(frameon=False, loc="upper left")

    return themed_plot(
        draw,
        "Histogram of scores: labeled calibration images lie to the right of most of the held-out lake images"
        if len(positive) and np.median(positive) > np.median(unlabeled)
        else "Histogram of scores of labeled calibration images and of held-out lake images",
        "Scores of held-out labeled images and of the lake; images right of the threshold are candidates.",
    )


def precision_recall(curves: Mapping[str, Any], chosen: Mapping[str, Any] | None, audited: Any) -> Picture:
    """Measured and estimated curves, what the run chose, and what a person found."""

    def draw(axes: Any) -> None:
        if points := curves["estimated"]:
            recall = [100 * point["recall"]["value"] for point in points]
            ends = [[100 * point["precision"][end] for point in points] for end in ("value", "low", "high")]
            axes.fill_between(recall, ends[1], ends[2], color=GREY, alpha=0.3, linewidth=0, label="its band")
            axes.plot(recall, ends[0], "--", color=GREY, label="estimated without the truth")
        if points := curves["measured"]:
            xs, ys = ([100 * point[name] for point in points] for name in ("recall", "precision"))
            axes.plot(xs, ys, color=BLUE, label="measured against the truth")
        if chosen is not None:
            axes.plot([100 * chosen["recall"]], [100 * chosen["precision"]], "o", color=ORANGE, label="this selection")
        if audited is not None:
            axes.axhline(100 * audited["bound"], color=ORANGE, linestyle=":", label="a person's judgment, lower bound")
        axes.set_xlim(0, 102)
        axes.set_ylim(0, 102)
        axes.set_xlabel("recall, %")
        axes.set_ylabel("precision, %")
        axes.legend(frameon=False, loc="lower left")

    how = " and ".join(name for name in ("measured", "estimated") if curves[name])
    return themed_plot(draw, f"Precision over recall at all thresholds, {how}", f"Precision over recall, {how}.")


def balance(classes: Sequence[Mapping[str, Any]]) -> Picture:
    """Candidates and selected images of each class."""
    before = np.array([each["candidates"] for each in classes])
    after = np.array([each["selected"] for each in classes])
    order = np.argsort(-before, kind="stable")
    names = [classes[k]["name"] for k in order]
    few = len(classes) <= _MOST_NAMED

    def draw(axes: Any) -> None:
        places = np.arange(len(order))
        if few:
            axes.bar(places - 0.2, before[order], 0.4, color=GREY, label="above the threshold")
            axes.bar(places + 0.2, after[order], 0.4, color=BLUE, label="selected")
            upright = sum(map(len, names)) > _MOST_UPRIGHT
            axes.set_xticks(places, names, rotation=90 if upright else 0)
        else:
            axes.plot(places, before[order], color=GREY, label="above the threshold")
            axes.plot(places, after[order], ".", markersize=2, color=BLUE, label="selected")
        axes.set_xlabel("class, as the teacher sees it")
        axes.set_ylabel("images")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="upper right")

    return themed_plot(
        draw, f"Candidates and selected images of each of {len(classes)} classes", "Classes before and after balancing."
    )


def learning(history: Mapping[str, Any]) -> list[Picture]:
    """Accuracy and, where it was recorded, loss over optimiser steps."""
    records = history["validations"]
    shown = [("validation_accuracy", 100, "% right, held-out labeled", "Accuracy on held-out labeled images")]
    if records and all("loss" in record for record in records):
        shown.append(("loss", 1, "loss", "Loss of the training"))
    return [_learning(records, history["best_step"], *each) for each in shown]


def _learning(records: Sequence[Any], best_step: int, key: str, scale: int, label: str, title: str) -> Picture:
    def draw(axes: Any) -> None:
        axes.plot([record["step"] for record in records], [scale * record[key] for record in records], "o-", color=BLUE)
        axes.axvline(best_step, color=ORANGE, linestyle="--", linewidth=1, label="kept")
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel(label)
        axes.legend(frameon=False, loc="center right")

    return themed_plot(draw, f"{title} over {len(records)} validations", f"{title}, by optimiser step.")
