"""Stage `report`: what a person sees. summary.json holds every number, report.html shows them.

The page is one file without external requests: pictures and plots are inlined.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from pu_ray import manifest, page, report_curves, report_plots, report_sheets
from pu_ray.config import JobConfig
from pu_ray.lineage import lookup
from pu_ray.manifest import Manifest
from pu_ray.storage import Storage
from pu_ray.usage import HourPrices, larger

# Whose manifests the lineage shows, in the order of their making.
_ARTIFACTS = (*lookup.ARTIFACTS, "audit")
_EVALUATED = (
    "teacher_calibration_error",
    "student_calibration_error",
    "teacher_top5_accuracy",
    "student_top5_accuracy",
    "agreement_interval",
    "cost",
    "slices",
    "confusion_pairs",
)
# The page's only script, and the only one that its policy lets run.
_SCRIPT = "report.js.j2"


# -- summary.json ------------------------------------------------------------------------------------------


def summarise(
    job: JobConfig, storage: Storage, done: Mapping[str, Manifest], stages: int, prices: HourPrices | None = None
) -> dict[str, Any]:
    """The numbers of a run, as far as it has come (DESIGN, section 4).

    Args:
        job: The job.
        storage: Its output.
        done: Manifests of the finished stages, by name.
        stages: How many there are in all.
        prices: What an hour costs; None: money is not spoken of.
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
    fitted = done.get("fit")
    if fitted is not None:
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
            "candidates": selected.counts["candidates"],
            "left_out": {reason: selected.counts.get(reason, 0) for reason in report_sheets.REASONS},
            "not_needed": max(0, sum(selected.facts["class_counts_before_balance"]) - selected.counts["selected"]),
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
        summary["evaluation"] = {key: facts[key] for key in _EVALUATED if key in facts}
        summary["times_smaller"] = summary["teacher_parameters"] / summary["student_parameters"]
        fast, slow = (facts["cost"][who]["cpu_latency_ms"] for who in ("student", "teacher"))
        summary["times_as_fast"] = slow / fast if fast > 0 else None
    summary["promise_kept"] = _promise_kept(summary)
    if fitted is not None:
        summary["classes"] = _classes(fitted, done.get("select"), done.get("evaluate"))
        # The stages of tests leave no scores.
        if storage.child("scorer").exists("calibration.parquet"):
            truth_was_used = "mined_precision" in summary
            summary["precision_recall"] = report_curves.of_run(job, storage, summary["prior"], truth_was_used)
    if "distill" in done and storage.child("student").exists("history.json"):
        summary["learning"] = storage.child("student").read_json("history.json")
    if exported := done.get("export"):
        summary["formats"] = exported.facts.get("formats", {})
    summary["controls"] = _controls(job, storage, prices)
    summary["seconds"] = {name: document.seconds for name, document in done.items()}
    summary["images_per_s"] = {
        name: round(images_done / done[name].seconds, 1)
        for name, images_done in _images_done(done).items()
        if images_done and done[name].seconds > 0
    }
    summary["usage"] = {name: _used([document], prices) for name, document in done.items()}
    parts = [*summary["usage"].values(), *(control["usage"] for control in summary["controls"].values())]
    summary["usage_in_all"] = _added(parts)
    summary["prices"] = prices and prices.model_dump()
    summary["written"] = {
        name: {"files": len(document.files), "bytes": sum(document.files.values())} for name, document in done.items()
    }
    summary["settings_changed"] = dict(_changed(job))
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


def _used(documents: Sequence[Manifest], prices: HourPrices | None) -> dict[str, Any]:
    """What stages took together; None for what is not known of one of them, and for what no worker did."""
    return _added([_used_by(document, prices) for document in documents])


def _used_by(document: Manifest, prices: HourPrices | None) -> dict[str, Any]:
    usage = document.usage
    workers = usage.workers if usage is not None else None
    alone = usage is not None and workers is None
    used: dict[str, Any] = {
        "seconds": document.seconds,
        "driver_peak_bytes": usage.driver_peak_bytes if usage is not None else None,
        "unit": workers.unit if workers is not None else None,
        "most": 0 if alone else workers.most if workers is not None else None,
        "worker_peak_bytes": workers.peak_bytes if workers is not None else None,
        "gpu_peak_bytes": workers.gpu_peak_bytes if workers is not None else None,
        "cpu_hours": 0.0 if alone else workers.cpu_hours if workers is not None else None,
        "gpu_hours": 0.0 if alone else workers.gpu_hours if workers is not None else None,
    }
    known = used["cpu_hours"] is not None and used["gpu_hours"] is not None
    used["cost"] = prices.cost(used["cpu_hours"], used["gpu_hours"]) if prices is not None and known else None
    return used


def _added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of what adds up, the highest of the peaks; a sum is not known if a part of it is not."""
    units = {part["unit"] for part in parts if part["unit"] is not None}
    added: dict[str, Any] = {"unit": units.pop() if len(units) == 1 else None}
    for name in ("driver_peak_bytes", "most", "worker_peak_bytes", "gpu_peak_bytes"):
        added[name] = functools.reduce(larger, (part[name] for part in parts), None)
    for name in ("seconds", "cpu_hours", "gpu_hours", "cost"):
        values = [part[name] for part in parts]
        added[name] = None if None in values else round(sum(values), 6)
    return added


def _controls(job: JobConfig, storage: Storage, prices: HourPrices | None) -> dict[str, Any]:
    controls: dict[str, Any] = {}
    for name in job.evaluation.controls:
        folder = storage.child(f"controls/{name}")
        folders = [folder.child(artifact) for artifact in _ARTIFACTS]
        evaluated, selected = manifest.read(folder.child("evaluation")), manifest.read(folder.child("selection"))
        if evaluated is not None and selected is not None:
            controls[name] = {
                "mined_rows": selected.counts["selected"],
                "student_accuracy": evaluated.facts["student_accuracy"],
                "gap_to_teacher": evaluated.facts["gap_to_teacher"],
                "usage": _used([each for each in map(manifest.read, folders) if each is not None], prices),
                **(
                    {"mined_precision": evaluated.facts["mined_precision"]}
                    if "mined_precision" in evaluated.facts
                    else {}
                ),
            }
    return controls


def _classes(fitted: Manifest, selected: Manifest | None, evaluated: Manifest | None) -> list[dict[str, Any]]:
    """What is known of each class, in the teacher's order."""
    classes = []
    for k, name in enumerate(fitted.facts["classes"]):
        known: dict[str, Any] = {"name": name}
        if selected is not None:
            known["candidates"] = selected.facts["class_counts_before_balance"][k]
            known["selected"] = selected.facts["class_counts"][k]
        for who in ("teacher", "student"):
            rates = evaluated.facts.get(f"{who}_accuracy_per_class", {}) if evaluated is not None else {}
            if name in rates:
                known[f"{who}_accuracy"] = rates[name]
        classes.append(known)
    return classes


def _promise_kept(summary: Mapping[str, Any]) -> bool | None:
    """Whether the promised recall was reached in this lake; None where nobody can know.

    It is about the threshold, so a budget that keeps fewer images says nothing of it.
    """
    promise, measured = summary.get("recall_promise"), summary.get("mined_recall")
    if promise is None or measured is None or summary["not_needed"]:
        return None
    return bool(measured["value"] >= promise["recall"])


def _changed(section: BaseModel, default: BaseModel | None = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings that are not what they would be if nobody, nor a recipe, had said anything; by dotted path.

    Without `tracking`: a server's URI may hold a password.
    """
    plain = section.model_dump(mode="json")
    for name, of in type(section).model_fields.items():
        value = getattr(section, name)
        usual = getattr(default, name) if default is not None else of.get_default(call_default_factory=True)
        if f"{prefix}{name}" == "tracking":
            continue
        if isinstance(value, BaseModel):
            same_kind = isinstance(usual, type(value))
            yield from _changed(value, usual if same_kind else None, f"{prefix}{of.alias or name}.")
        elif value != usual:
            yield f"{prefix}{of.alias or name}", plain[name]


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


def render(job: JobConfig, storage: Storage, summary: Mapping[str, Any]) -> str:
    """The page, as far as the run has come; every number in it about the run is in the summary or a manifest."""
    documents = {name: manifest.read(storage.child(name)) for name in _ARTIFACTS}
    # What another configuration made may lie there as well; it is no part of this run.
    done = {*summary["stages_done"], *(["audit"] if "audit" in summary else [])}
    found = {name: document for name, document in documents.items() if document and document.stage in done}
    curves = summary.get("precision_recall")
    plots: dict[str, Any] = {}
    sheets = report_sheets.Sheets()
    if {"fit", "select"} <= done:
        plots["scores"] = report_plots.scores(storage, summary["threshold"])
        plots["balance"] = report_plots.balance(summary["classes"])
        if {"score", "materialise"} <= done:
            sheets = report_sheets.of_mined(job, storage, [each["name"] for each in summary["classes"]])
    if curves and (curves["measured"] or curves["estimated"]):
        measured = bool(summary.get("mined_precision") and summary.get("mined_recall"))
        chosen = {name: summary[f"mined_{name}"]["value"] for name in ("precision", "recall")} if measured else None
        audited = summary["audit"]["precision"] if "audit" in summary else None
        plots["curve"] = report_plots.precision_recall(curves, chosen, audited)
    pairs = summary.get("evaluation", {}).get("confusion_pairs", [])
    script = page.text(_SCRIPT)
    return page.template("report.html.j2").render(
        job=job,
        summary=summary,
        plots=plots,
        learning=report_plots.learning(summary["learning"]) if summary.get("learning") else [],
        sheets=sheets,
        reasons=report_sheets.REASONS,
        pairs=list(zip(pairs, report_sheets.of_confusions(job, storage, pairs), strict=True)),
        lineage=found,
        sources=_sources(found),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _sources(found: Mapping[str, Manifest]) -> dict[str, str]:
    """Fingerprint of each outside source that an artifact was made from."""
    ours = {document.identity for document in found.values()}
    named = [pair for document in found.values() for pair in document.inputs.items()]
    outside = ("teacher", "labeled", "test", "lake", "truth", "metadata")
    return {name: value for name, value in named if name in outside and value not in ours and value != "none"}
