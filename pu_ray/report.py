"""Stage `report`: what a person sees. summary.json holds every number, report.html shows them.

The page is one file without external requests: pictures and plots are inlined.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pu_ray import images, lake, ledger, lineage, manifest, page, schema
from pu_ray.config import JobConfig
from pu_ray.manifest import Manifest
from pu_ray.page import BLUE, GREY, ORANGE
from pu_ray.page import inline as _inline
from pu_ray.page import plot as _plot
from pu_ray.storage import Storage

_SHEET_IMAGES = 12
_MOST_CLASSES = 20
_TILE_PX = 56


# -- summary.json ------------------------------------------------------------------------------------------


def summarise(job: JobConfig, storage: Storage, done: Mapping[str, Manifest], stages: int) -> dict[str, Any]:
    """The numbers of a run, as far as it has come (DESIGN, section 4).

    Args:
        job: The job.
        storage: Its output.
        done: Manifests of the finished stages, by name.
        stages: How many there are in all.
    """
    summary: dict[str, Any] = {"name": job.name, "recipe": job.recipe, "seed": job.seed, "stages_done": list(done)}
    # Without a feature cache only the scores know the whole lake.
    features, scored = done.get("features"), done.get("score")
    if (whole := features if features and features.facts["whole_lake"] else scored) is not None:
        summary |= {
            "lake_rows": whole.counts["rows"],
            "error_rows": whole.counts["errors"],
            "errors": whole.facts["errors"],
        }
    if gate := done.get("cascade"):
        summary["cascade"] = _cascade(gate, features)
    if features is not None and features.facts["scaled_decode"] is not None:
        summary["scaled_decode"] = features.facts["scaled_decode"]
    summary["storage_retries"] = _storage_retries(done)
    if fitted := done.get("fit"):
        prior = fitted.facts["prior"]
        summary["prior"] = {key: prior[key] for key in ("estimate", "low", "high", "is_upper_bound", "source")}
        summary["labeled_rows"] = fitted.counts["labeled"]
        summary["proxy_auc"] = fitted.facts["proxy_auc"]
    if scored is not None:
        summary["scored_rows"] = scored.counts["rows"] - scored.counts["errors"]
    if selected := done.get("select"):
        promise = selected.facts["promise"] or {}
        summary |= {
            "mined_rows": selected.counts["selected"],
            "leaks_removed": selected.counts["leak"] + selected.counts["near_leak"],
            "leaks_exact": selected.counts["leak"],
            "leaks_near": selected.counts["near_leak"],
            "near_duplicates": selected.counts["near_duplicate"],
            "recall_promise": {name: promise[name] for name in ("recall", "confidence")}
            if "recall" in promise
            else None,
            "discard_promise": {"positives_share": promise["rate"]} if "rate" in promise else None,
            "threshold": selected.facts["threshold"],
        }
        # A person's judgment of another selection says nothing about this one.
        audited = manifest.read(storage.child("audit"))
        if audited is not None and audited.inputs["select"] == selected.identity:
            summary["audit"] = {**audited.counts, **audited.facts}
    if evaluated := done.get("evaluate"):
        facts = evaluated.facts
        summary |= {key: facts[key] for key in ("teacher_accuracy", "student_accuracy", "gap_to_teacher", "agreement")}
        summary |= {key: evaluated.counts[key] for key in ("teacher_parameters", "student_parameters")}
        summary |= {key: facts[key] for key in ("mined_precision", "mined_recall", "true_prior") if key in facts}
    summary["controls"] = _controls(job, storage)
    summary["seconds"] = {name: document.seconds for name, document in done.items()}
    summary["images_per_s"] = {
        name: round(images_done / done[name].seconds, 1)
        for name, images_done in _images_done(done).items()
        if images_done and done[name].seconds > 0
    }
    summary["exported"] = "export" in done
    summary["verdict"] = _verdict(done, stages)
    summary["example_image"] = _example_image(job)
    return summary


def _cascade(gate: Manifest, features: Manifest | None) -> dict[str, Any]:
    """What the gate saved, and what it lost of the labeled images that nothing was fitted on."""
    counts = gate.counts
    saved: dict[str, Any] = {"stages": gate.facts["stages"], "passing_share": gate.facts["passing_share"]}
    if features is not None and "spared" in features.counts:
        saved |= {"rows": features.counts["rows"], "spared": features.counts["spared"]}
    return saved | {"positives_checked": counts["calibrate"], "positives_lost": counts["calibrate_lost"]}


def _storage_retries(done: Mapping[str, Manifest]) -> dict[str, int]:
    """Storage operations that had to be repeated, by reason, over all stages that keep count."""
    total: Counter[str] = Counter()
    for document in done.values():
        total.update(document.facts.get("storage_retries", {}))
    return dict(total)


def _images_done(done: Mapping[str, Manifest]) -> dict[str, int]:
    keys = {"features": "rows_done_now", "score": "rows_done_now", "materialise": "rows", "distill": "images_seen"}
    return {name: done[name].counts[key] for name, key in keys.items() if name in done}


def _controls(job: JobConfig, storage: Storage) -> dict[str, Any]:
    controls: dict[str, Any] = {}
    for name in job.evaluation.controls:
        folder = storage.child(f"controls/{name}")
        evaluated, selected = manifest.read(folder.child("evaluation")), manifest.read(folder.child("selection"))
        if evaluated is not None and selected is not None:
            controls[name] = {
                "mined_rows": selected.counts["selected"],
                "student_accuracy": evaluated.facts["student_accuracy"],
                "gap_to_teacher": evaluated.facts["gap_to_teacher"],
                **(
                    {"mined_precision": evaluated.facts["mined_precision"]}
                    if "mined_precision" in evaluated.facts
                    else {}
                ),
            }
    return controls


def _verdict(done: Mapping[str, Manifest], stages: int) -> str:
    # The verdict stands before the export, and a student that failed its gate never gets one.
    if "evaluate" not in done or len(done) + ("export" not in done) < stages:
        return f"unfinished: {len(done)} of {stages} stages are done"
    judged = done["evaluate"].facts["gate"]
    points = judged["gap_to_teacher"]
    told = f"the student is {abs(points):.2f} points {'behind' if points >= 0 else 'ahead of'} its teacher"
    if (allowed := judged["bounds"].get("max_gap_to_teacher")) is not None:
        told += f", {allowed:g} are allowed"
    if not judged["passed"]:
        others = [each for each in judged["violated"] if each["setting"] != "max_gap_to_teacher"]
        told += "".join(
            f"; {each['setting'].replace('_', ' ')} {each['bound']:g}, got {each['got']:.4f}" for each in others
        )
        return f"failed the quality gate: {told}"
    return f"passed: {told}" if judged["bounds"] else told


def _example_image(job: JobConfig) -> str | None:
    """A test image to try the student on, where it is a plain file."""
    test = Storage(job.test.uri)
    if not test.is_local:
        return None
    files = test.list_files()
    return f"{job.test.uri.rstrip('/')}/{files[len(files) // 2].path}" if files else None


# -- report.html -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """One row of pictures: title, and an inlined PNG."""

    title: str
    picture: str
    count: int


def render(job: JobConfig, storage: Storage, summary: Mapping[str, Any]) -> str:
    """The page, as far as the run has come."""
    selected = manifest.read(storage.child("selection"))
    distilled = manifest.read(storage.child("student"))
    fitted = manifest.read(storage.child("scorer"))
    evaluated = manifest.read(storage.child("evaluation"))
    return page.template("report.html.j2").render(
        job=job,
        summary=summary,
        sheets=_sheets(job, storage, fitted.facts["classes"])
        if selected and fitted and manifest.read(storage.child("mined"))
        else [],
        scores=_score_plot(storage, summary) if selected and fitted else None,
        balance=_balance_plot(fitted.facts["classes"], selected) if selected and fitted else None,
        learning=_learning_plot(storage) if distilled else None,
        evaluated=evaluated.facts if evaluated else None,
        lineage=[
            (name, document)
            for name in (
                "cascade",
                "features",
                "scorer",
                "scores",
                "selection",
                "mined",
                "student",
                "evaluation",
                "exported",
            )
            if (document := manifest.read(storage.child(name))) is not None
        ],
    )


def _score_plot(storage: Storage, summary: Mapping[str, Any]) -> str:
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
                weights=np.full(len(values), 100 / len(values)),
                color=colour,
                alpha=0.65,
                label=label,
            )
        if summary.get("threshold") is not None:
            axes.axvline(summary["threshold"], color=ORANGE, label="threshold")
        axes.set_xlabel("score")
        axes.set_ylabel("% of images")
        axes.set_yscale("symlog", linthresh=1)
        axes.legend(frameon=False, labelcolor=GREY)

    return _plot(draw)


def _balance_plot(classes: Sequence[str], selected: Manifest) -> str:
    before = np.array(selected.facts["class_counts_before_balance"])
    after = np.array(selected.facts["class_counts"])
    order = np.argsort(-before, kind="stable")

    def draw(axes: Any) -> None:
        places = np.arange(len(order))
        axes.bar(places - 0.2, before[order], 0.4, color=GREY, label="above the threshold")
        axes.bar(places + 0.2, after[order], 0.4, color=BLUE, label="selected")
        if len(classes) <= _MOST_CLASSES:
            axes.set_xticks(places, [classes[k] for k in order])
        axes.set_xlabel("class, as the teacher sees it")
        axes.set_ylabel("images")
        axes.legend(frameon=False, labelcolor=GREY)

    return _plot(draw)


def _learning_plot(storage: Storage) -> str:
    history = storage.child("student").read_json("history.json")
    steps = [record["step"] for record in history["validations"]]

    def draw(axes: Any) -> None:
        axes.plot(steps, [100 * record["validation_accuracy"] for record in history["validations"]], "o-", color=BLUE)
        axes.axvline(history["best_step"], color=ORANGE, linewidth=1, label="kept")
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel("% right, held-out labeled")
        axes.legend(frameon=False, labelcolor=GREY)

    return _plot(draw)


def _sheets(job: JobConfig, storage: Storage, classes: Sequence[str]) -> list[tuple[str, list[Sheet]]]:
    """Contact sheets: per class the surest, the borderline and random ones; and what was just rejected."""
    mined = storage.child("mined")
    columns = [schema.SAMPLE_ID, schema.SCORE, schema.PREDICTED, schema.ORDER, schema.BYTES]
    table = pa.concat_tables(mined.read_table(file, columns) for file in ledger.data_files(mined))
    hidden = lineage.not_to_be_shown(storage)
    table = table.filter(pa.array([sample not in hidden for sample in table[schema.SAMPLE_ID].to_pylist()], pa.bool_()))
    sheets = []
    classified = np.unique(table[schema.PREDICTED].to_numpy())
    for k in classified[classified != schema.NO_CLASS][:_MOST_CLASSES]:
        rows = table.filter(pc.equal(table[schema.PREDICTED], int(k))).sort_by(
            [(schema.SCORE, "descending"), (schema.ORDER, "ascending")]
        )
        by_order = rows.sort_by(schema.ORDER)
        choices = {
            "surest": rows.slice(0, _SHEET_IMAGES),
            "borderline": rows.slice(max(0, rows.num_rows - _SHEET_IMAGES)),
            "random": by_order.slice(0, _SHEET_IMAGES),
        }
        pictures = [_sheet(title, part[schema.BYTES].to_pylist(), job) for title, part in choices.items()]
        sheets.append((f"{classes[k]} ({rows.num_rows:,})", pictures))
    rejected = _just_rejected(job, storage, hidden)
    if rejected:
        sheets.append(("just below the threshold, or left out", [_sheet("rejected", rejected, job)]))
    return sheets


def _just_rejected(job: JobConfig, storage: Storage, hidden: Set[bytes] = frozenset()) -> list[bytes]:
    """Encoded images with the highest scores among those that were not chosen and are not hidden."""
    scores = storage.child("scores")
    selected = storage.child("selection").read_table("selection.parquet", [schema.SAMPLE_ID])[schema.SAMPLE_ID]
    chosen = {*hidden, *selected.to_pylist()}
    best: list[tuple[float, bytes, str, int]] = []
    wanted = [schema.SAMPLE_ID, schema.SHARD, schema.ROW, schema.SCORE, schema.ERROR]
    for file in ledger.data_files(scores):
        part = scores.read_table(file, wanted)
        part = part.filter(pc.is_null(part[schema.ERROR])).sort_by([(schema.SCORE, "descending")])
        fresh = []
        for row in part.slice(0, len(chosen) + 2 * _SHEET_IMAGES).to_pylist():
            if row[schema.SAMPLE_ID] not in chosen:
                fresh.append((row[schema.SCORE], row[schema.SAMPLE_ID], row[schema.SHARD], row[schema.ROW]))
            if len(fresh) == 2 * _SHEET_IMAGES:
                break
        best = sorted(best + fresh, reverse=True)[: 2 * _SHEET_IMAGES]
    shards = {shard.path: shard for shard in lake.list_shards(job.lake)}
    contents: dict[bytes, bytes] = {}
    for path in {place[2] for place in best if place[2] in shards}:
        rows = [place[3] for place in best if place[2] == path]
        for chunk in lake.plan_chunks(job.lake, [shards[path]], job.lake.chunk_rows):
            inside = [row for row in rows if chunk.first_row <= row < chunk.first_row + chunk.rows]
            if inside:
                read = lake.read_chunk(job.lake.uri, chunk, inside)
                contents.update(zip(read[schema.SAMPLE_ID].to_pylist(), read[schema.BYTES].to_pylist(), strict=True))
    return [contents[place[1]] for place in dict.fromkeys(best) if place[1] in contents][:_SHEET_IMAGES]


def _sheet(title: str, contents: Sequence[bytes], job: JobConfig) -> Sheet:
    preprocessing, limits = job.teacher.preprocessing, images.Limits.of(job.lake)
    tiles = []
    for content in contents:
        pixels = images.decode(content, preprocessing, limits)
        picture = Image.fromarray(pixels.squeeze(2) if preprocessing.channels == 1 else pixels)
        tiles.append(picture.convert("RGB").resize((_TILE_PX, _TILE_PX), Image.Resampling.BILINEAR))
    canvas = Image.new("RGB", (_SHEET_IMAGES * (_TILE_PX + 2), _TILE_PX), "white")
    for place, tile in enumerate(tiles):
        canvas.paste(tile, (place * (_TILE_PX + 2), 0))
    canvas = canvas.crop((0, 0, max(1, len(tiles)) * (_TILE_PX + 2) - 2, _TILE_PX))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return Sheet(title, _inline(buffer.getvalue(), "png"), len(tiles))
