"""pu_ray/report.py: the numbers as far as the run has come, on a page that asks nobody for anything."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import CLASSES, COUNTS, FACTS, identity_columns, job, png, publish, rate, write_shards

from pu_ray import images, manifest, pipeline, report, schema
from pu_ray.config import JobConfig
from pu_ray.manifest import Publication
from pu_ray.storage import Storage

# A job without a cascade has no such step.
FOLDERS = {step.name: step.folder for step in pipeline.STEPS if step.only_if is None}
ORDER = list(FOLDERS)


class Page(HTMLParser):
    """What a page asks for, and what it says."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def make(root: Path, upto: str | None, classes: list[str] = CLASSES, facts: dict | None = None) -> JobConfig:
    """Artifacts of every stage up to one, made by hand."""
    config = job(root)
    storage = Storage(config.output)
    for name in ORDER[: ORDER.index(upto) + 1] if upto else []:
        told = {**FACTS[name], **(facts or {}).get(name, {})}
        if name == "fit":
            told["classes"] = classes
        _fill(name, storage.child(FOLDERS[name]), root)
        publish(storage.child(FOLDERS[name]), name, counts=COUNTS[name], facts=told)
    return config


CHOSEN = [png(k) for k in range(8)]
REJECTED = [png(k) for k in range(8, 12)]


def _fill(name: str, folder: Storage, root: Path) -> None:
    scores = np.linspace(5, 0, 12)
    everything = {
        **identity_columns(CHOSEN + REJECTED),
        schema.SCORE: pa.array(scores, pa.float32()),
        schema.PREDICTED: pa.array([k % 2 for k in range(12)], pa.int32()),
    }
    if name == "fit":
        for file in ("calibration.parquet", "unlabeled.parquet"):
            folder.write_table(file, pa.table({schema.SCORE: pa.array(scores, pa.float32())}))
    elif name == "score":
        table = pa.table({**everything, schema.ERROR: pa.nulls(12, pa.string())})
        write_shards(folder, {"a.parquet": table})
        (root / "lake").mkdir()
        lake = pa.table({"bytes": pa.array(CHOSEN + REJECTED, pa.binary())})
        pq.write_table(lake, root / "lake" / "a.parquet")
    elif name == "select":
        folder.write_table("selection.parquet", pa.table(everything).slice(0, 8))
    elif name == "materialise":
        mined = pa.table({**everything, schema.ORDER: pa.array(range(12), pa.int64())}).slice(0, 8)
        write_shards(folder, {"a.parquet": mined.append_column(schema.BYTES, pa.array(CHOSEN, pa.large_binary()))})
    elif name == "distill":
        records = [{"step": 5, "validation_accuracy": 0.8}, {"step": 10, "validation_accuracy": 0.9}]
        folder.write_json("history.json", {"validations": records, "best_step": 10})


def summarise(config: JobConfig) -> dict:
    storage = Storage(config.output)
    found = {name: manifest.read(storage.child(folder)) for name, folder in FOLDERS.items()}
    return report.summarise(config, storage, {name: made for name, made in found.items() if made}, len(FOLDERS))


def render(config: JobConfig) -> str:
    return report.render(config, Storage(config.output), summarise(config))


@pytest.fixture
def no_plots(monkeypatch):
    """Matplotlib is not what is tested."""
    monkeypatch.setattr(report, "_plot", lambda draw: report._inline(b"<svg/>", "svg+xml"))


@pytest.fixture(scope="module")
def full_page(tmp_path_factory) -> str:
    """The page of a finished run."""
    return render(make(tmp_path_factory.mktemp("finished"), "export"))


# -- summary.json ------------------------------------------------------------------------------------------


def test_a_finished_run_has_every_number_the_design_promises(tmp_path):
    known_truth = {"mined_precision": rate(0.8), "mined_recall": rate(0.9), "true_prior": 0.1}
    summary = summarise(make(tmp_path, "export", facts={"evaluate": known_truth}))
    expected = {
        "teacher_accuracy": rate(0.95),
        "student_accuracy": rate(0.93),
        "teacher_parameters": 12_340,
        "student_parameters": 1_234,
        "lake_rows": 40,
        "scored_rows": 38,
        "error_rows": 2,
        "mined_rows": 8,
        "leaks_removed": 3,
        "recall_promise": {"recall": 0.95, "confidence": 0.95},
        "exported": True,
        **known_truth,
    }
    assert {key: summary[key] for key in expected} == expected
    assert [summary["prior"][key] for key in ("estimate", "low", "high")] == [0.1, 0.08, 0.12]
    assert list(summary["seconds"]) == ORDER
    assert summary["lake_rows"] == summary["scored_rows"] + summary["error_rows"]


@pytest.mark.parametrize("upto", [None, *ORDER])
def test_a_run_is_summarised_as_far_as_it_has_come(tmp_path, upto):
    summary = summarise(make(tmp_path, upto))
    done = ORDER[: ORDER.index(upto) + 1] if upto else []
    assert summary["stages_done"] == done
    assert ("lake_rows" in summary) == ("features" in done)
    assert ("prior" in summary) == ("fit" in done)
    assert ("scored_rows" in summary) == ("score" in done)
    assert ("mined_rows" in summary) == ("select" in done)
    assert ("student_accuracy" in summary) == ("evaluate" in done)
    assert summary["exported"] == ("export" in done)
    if "evaluate" not in done:
        assert summary["verdict"] == f"unfinished: {len(done)} of {len(ORDER)} stages are done"


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ((1.234, {}, []), "the student is 1.23 points behind its teacher"),
        ((-0.5, {}, []), "the student is 0.50 points ahead of its teacher"),
        (
            (1.0, {"max_gap_to_teacher": 2.0}, []),
            "passed: the student is 1.00 points behind its teacher, 2 are allowed",
        ),
        (
            (3.0, {"max_gap_to_teacher": 2.5}, [("max_gap_to_teacher", 2.5, 3.0)]),
            "failed the quality gate: the student is 3.00 points behind its teacher, 2.5 are allowed",
        ),
        ((1.0, {"min_accuracy": 0.9}, []), "passed: the student is 1.00 points behind its teacher"),
        (
            (1.0, {"min_accuracy": 0.9}, [("min_accuracy", 0.9, 0.85)]),
            "failed the quality gate: the student is 1.00 points behind its teacher; min accuracy 0.9, got 0.8500",
        ),
    ],
)
def test_the_verdict_says_which_way_the_gap_goes_and_what_the_gate_says(tmp_path, gate, expected):
    gap, bounds, violated = gate
    broken = [{"setting": setting, "bound": bound, "got": got} for setting, bound, got in violated]
    judged = {"passed": not violated, "gap_to_teacher": gap, "bounds": bounds, "violated": broken}
    assert summarise(make(tmp_path, "evaluate", facts={"evaluate": {"gate": judged}}))["verdict"] == expected


def test_rates_are_images_of_this_attempt_per_second(tmp_path, monkeypatch):
    config = make(tmp_path, "score")
    folder = Storage(config.output).child("features")
    document = folder.read_json("manifest.json")
    document["counts"]["rows_done_now"] = 30  # ten of forty were done before
    folder.write_json("manifest.json", {**document, "seconds": 3.0})
    scores = Storage(config.output).child("scores")
    again = scores.read_json("manifest.json")
    again["counts"]["rows_done_now"] = 0
    scores.write_json("manifest.json", {**again, "seconds": 0.0})
    summary = summarise(config)
    assert summary["images_per_s"] == {"features": 10.0}


def test_a_stage_that_took_no_measurable_time_has_no_rate(tmp_path):
    config = make(tmp_path, "features")
    folder = Storage(config.output).child("features")
    folder.write_json("manifest.json", {**folder.read_json("manifest.json"), "seconds": 0.0})
    assert summarise(config)["images_per_s"] == {}


def test_controls_appear_when_they_are_evaluated(tmp_path, no_plots):
    config = make(tmp_path, "evaluate")
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"controls": ("random",)})})
    assert summarise(config)["controls"] == {}
    control = Storage(config.output).child("controls/random")
    publish(control.child("selection"), "select", counts=COUNTS["select"], facts=FACTS["select"])
    assert summarise(config)["controls"] == {}
    facts = {**FACTS["evaluate"], "student_accuracy": rate(0.8), "gap_to_teacher": 15.0}
    publish(control.child("evaluation"), "evaluate", counts=COUNTS["evaluate"], facts=facts)
    expected = {"mined_rows": 8, "student_accuracy": rate(0.8), "gap_to_teacher": 15.0}
    assert summarise(config)["controls"] == {"random": expected}
    assert "80.00 %" in render(config)


def test_an_example_image_is_one_of_the_test_images_that_lie_here(tmp_path):
    config = make(tmp_path, None)
    assert summarise(config)["example_image"] is None
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "1.png").write_bytes(png(1))
    assert summarise(config)["example_image"] == f"{tmp_path}/test/cat/1.png"
    assert summarise(job(tmp_path, test={"uri": "s3://bucket/test"}))["example_image"] is None


# -- report.html -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upto", [None, *ORDER])
def test_the_page_is_well_formed_however_far_the_run_has_come(tmp_path, no_plots, upto):
    page = Page(render(make(tmp_path, upto)))
    assert page.open == []
    assert "Undefined" not in page.text
    assert "None" not in page.text


def test_the_page_asks_nobody_for_anything(full_page):
    page = Page(full_page)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "action", "background"):
            assert (attributes.get(name) or "data:").startswith("data:")
    style = full_page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_every_picture_can_be_shown_and_says_what_it_shows(full_page):
    pictures = [attributes for tag, attributes in Page(full_page).tags if tag == "img"]
    assert len(pictures) >= 3 + 2 * 3  # scores, balance, learning; three sheets for each of two classes
    for attributes in pictures:
        assert len(attributes["alt"]) > 10
        kind, content = attributes["src"].split(";base64,")
        start = {"data:image/png": b"\x89PNG", "data:image/svg+xml": b"<?xml"}[kind]
        assert base64.b64decode(content).startswith(start)
    assert len({attributes["alt"] for attributes in pictures}) == len(pictures)


def test_teacher_and_student_stand_beside_each_other(full_page):
    text = Page(full_page).text
    for number in ("0.0200", "0.0300", "2,000,000", "300,000", "49,360", "5,500", "0.50"):
        assert number in text
    assert "top-5" not in text


def test_slices_and_five_answers_are_shown_where_there_are_any(tmp_path, no_plots):
    rows = [
        {"value": "<south>", "n": 1_600, "student_accuracy": rate(0.71, 1600), "teacher_accuracy": rate(0.82, 1600)},
        {"value": None, "n": 7, "student_accuracy": rate(0.43, 7), "teacher_accuracy": rate(0.57, 7)},
    ]
    five = {"student_top5_accuracy": rate(0.9912), "teacher_top5_accuracy": rate(0.9934)}
    html = render(make(tmp_path, "evaluate", facts={"evaluate": {"slices": {"site": rows}, **five}}))
    text = Page(html).text
    for shown in ("By site", "1,600", "71.00 %", "82.00 %", "66.00 to 76.00", "(none)", "top-5 accuracy", "99.12 %"):
        assert shown in text
    assert "&lt;south&gt;" in html


def test_the_page_shows_the_numbers_of_the_summary(full_page):
    text = Page(full_page).text
    for number in ("93.00 %", "95.00 %", "10.0 times smaller", "0.1000", "2 exact, 1 near", "truncated 2"):
        assert number in text
    assert "unfinished" not in text


HOSTILE = "<script>alert(1)</script>\"'&"


def test_names_that_customers_choose_are_shown_not_run(tmp_path, no_plots):
    facts = {"evaluate": {"student_accuracy_per_class": {HOSTILE: rate(0.9), "dog": rate(0.9)}}}
    html = render(make(tmp_path, "export", classes=[HOSTILE, "dog"], facts=facts))
    page = Page(html)
    assert "<script" not in html
    assert "script" not in {tag for tag, _ in page.tags}
    assert HOSTILE in page.text
    assert any(HOSTILE in (attributes.get("alt") or "") for tag, attributes in page.tags if tag == "img")


def test_a_uri_cannot_break_out_of_the_page(tmp_path):
    config = make(tmp_path, "features")
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"weights": HOSTILE})})
    assert "<script" not in render(config)


def test_the_same_run_gives_the_same_page(tmp_path):
    config = make(tmp_path, "fit")
    publish(Storage(config.output).child("selection"), "select", counts=COUNTS["select"], facts=FACTS["select"])
    assert render(config) == render(config)


def test_just_rejected_images_are_the_best_that_were_not_chosen(tmp_path):
    config = make(tmp_path, "materialise")
    assert report._just_rejected(config, Storage(config.output)) == REJECTED


def test_what_the_run_has_forgotten_is_shown_nowhere(tmp_path, no_plots, monkeypatch):
    config = make(tmp_path, "materialise")
    storage = Storage(config.output)
    shown: list[bytes] = []
    monkeypatch.setattr(
        report, "_sheet", lambda title, contents, job: shown.extend(contents) or report.Sheet(title, "", 0)
    )
    render(config)
    assert set(shown) == {*CHOSEN, *REJECTED}
    shown.clear()
    gone = [CHOSEN[0], REJECTED[0]]
    storage.write_bytes("forgotten.txt", "".join(f"{images.sample_id(one).hex()} lake\n" for one in gone).encode())
    render(config)
    assert set(shown) == {*CHOSEN[1:], *REJECTED[1:]}


@pytest.mark.parametrize("gone", ["scorer", "features"])
def test_a_run_interrupted_while_it_redoes_an_early_stage_can_be_reported(tmp_path, no_plots, gone):
    config = make(tmp_path, "export")
    Storage(config.output).child(gone).delete("manifest.json")
    page = Page(render(config))
    assert page.open == []
    assert summarise(config)["verdict"].startswith("unfinished")


def test_near_copies_are_counted_and_another_promise_is_told_in_its_own_words(tmp_path, no_plots):
    config = make(tmp_path, "materialise")
    assert "near copies of better images3" in Page(render(config)).text.replace("\n", "")
    discards = {"value": 0.1, "rate": 0.05, "calibration": 60, "rank": 1, "lake": 40, "discarded": 20}
    target = Storage(config.output).child("selection")
    publish(target, "select", counts=COUNTS["select"], facts={**FACTS["select"], "promise": discards})
    summary = summarise(config)
    assert (summary["recall_promise"], summary["discard_promise"]) == (None, {"positives_share": 0.05})
    assert "at most 5 % are positives" in Page(render(config)).text


def test_a_cascade_reports_what_it_saved_and_what_it_lost(tmp_path, no_plots):
    config = make(tmp_path, "materialise")
    storage = Storage(config.output)
    publish(
        storage.child("cascade"),
        "cascade",
        counts={"labeled": 60, "unlabeled": 500, "calibrate": 21, "calibrate_lost": 1},
        facts={"stages": 1, "threshold": -0.5, "proxy_auc": 0.9, "passing_share": 0.25},
    )
    publish(storage.child("features"), "features", counts={**COUNTS["features"], "spared": 30}, facts=FACTS["features"])
    found = {"cascade": "cascade", **FOLDERS}
    done = {name: made for name, folder in found.items() if (made := manifest.read(storage.child(folder)))}
    summary = report.summarise(config, storage, done, len(FOLDERS) + 1)
    assert summary["cascade"] == {
        "stages": 1,
        "passing_share": 0.25,
        "rows": 40,
        "spared": 30,
        "positives_checked": 21,
        "positives_lost": 1,
    }
    page = Page(report.render(config, storage, summary))
    assert "decoded at a smaller scale" not in page.text
    assert "30 of 40 images spared the late stages; 1 of 21 held-out labeled images lost" in page.text
    assert "throttled 3" in page.text


def test_without_a_feature_cache_the_scores_know_the_lake(tmp_path):
    config = make(tmp_path, "score")
    storage = Storage(config.output)
    sample = {**FACTS["features"], "whole_lake": False}
    publish(storage.child("features"), "features", counts={**COUNTS["features"], "rows": 9, "errors": 0}, facts=sample)
    summary = summarise(config)
    assert (summary["lake_rows"], summary["error_rows"], summary["scored_rows"]) == (40, 2, 38)


def test_scaled_decoding_is_shown_with_what_it_changed(tmp_path, no_plots):
    checked = {
        "images": 200,
        "decoded_smaller": 180,
        "mean_pixel_difference": 0.31,
        "largest_pixel_difference": 9,
        "agreement": 0.995,
    }
    config = make(tmp_path, "materialise", facts={"features": {"scaled_decode": checked}})
    assert summarise(config)["scaled_decode"] == checked
    assert "the same on 99.5 % of 200 images; pixels differ by 0.31 of 255" in Page(render(config)).text


AUDIT = {
    "counts": {"drawn": 200, "judged": 190, "correct": 180, "unjudged": 10},
    "facts": {"precision": {**rate(0.9474, 190), "bound": 0.9123, "confidence": 0.95}, "in_order": True},
}


@pytest.mark.parametrize("in_order", [True, False])
def test_a_persons_judgment_is_shown_with_what_it_rests_on(tmp_path, no_plots, in_order):
    config = make(tmp_path, "evaluate")
    selected = manifest.read(Storage(config.output).child("selection"))
    facts = {**AUDIT["facts"], "in_order": in_order}
    inputs = {"select": selected.identity, "answers": "digest"}
    Publication("audit", "audited", inputs, 0).publish(
        Storage(config.output).child("audit"), counts=AUDIT["counts"], facts=facts
    )
    assert summarise(config)["audit"] == {**AUDIT["counts"], **facts}
    text = Page(render(config)).text
    assert "at least 91.23 % with confidence 95 %: 180 of 190 images of a random sample are right, 94.74 %" in text
    assert ("10 were left out, so it holds only if" in text) == (not in_order)


def test_a_judgment_of_another_selection_is_not_shown(tmp_path, no_plots):
    config = make(tmp_path, "evaluate")
    Publication("audit", "audited", {"select": "another one", "answers": "digest"}, 0).publish(
        Storage(config.output).child("audit"), **AUDIT
    )
    assert "audit" not in summarise(config)
    assert "judged by a person" not in Page(render(config)).text
