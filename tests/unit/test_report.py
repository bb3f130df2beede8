"""pu_ray/report.py: the numbers as far as the run has come, on a page that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import CLASSES, COUNTS, FACTS, encode, identity_columns, job, png, publish, rate, write_shards
from PIL import Image

from pu_ray import images, manifest, page, pipeline, report, report_plots, report_sheets, schema
from pu_ray.config import JobConfig
from pu_ray.manifest import Publication
from pu_ray.storage import Storage
from pu_ray.usage import HourPrices, Usage, Workers

# A job without a cascade has no such step.
FOLDERS = {step.name: step.folder for step in pipeline.STEPS if step.only_if is None}
ORDER = list(FOLDERS)


VOID = {"meta", "img", "link", "br", "source", "input"}
MENDED_BY_BROWSERS = {"p": {"p", "div", "table", "ul", "figure", "details", "h2", "h3", "dl"}}


class Page(HTMLParser):
    """What a page asks for, and what it says; strict where browsers are lenient."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.told = ""  # of the run: without the layout's own numbers
        self.open: list[str] = []
        self.quiet: list[bool] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        for parent in self.open:
            assert tag not in MENDED_BY_BROWSERS.get(parent, ()), f"<{tag}> inside <{parent}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            own = tag in ("style", "script", "title") or "layout" in (dict(attrs).get("class") or "").split()
            self.quiet.append(own or any(self.quiet[-1:]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.quiet.pop()

    def handle_data(self, data):
        self.text += data
        if not any(self.quiet[-1:]):
            self.told += f" {data} "

    def every(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


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
LEAKED = [png(12)]
BROKEN = [b"no image", b"none either"]


def _fill(name: str, folder: Storage, root: Path) -> None:
    everyone = CHOSEN + REJECTED + LEAKED
    scores = [*np.linspace(5, 0, 12), 2.5]
    everything = {
        **identity_columns(everyone),
        schema.SCORE: pa.array(scores, pa.float32()),
        schema.PREDICTED: pa.array([k % 2 for k in range(13)], pa.int32()),
    }
    if name == "fit":
        for file in ("calibration.parquet", "unlabeled.parquet"):
            folder.write_table(file, pa.table({schema.SCORE: pa.array(scores, pa.float32())}))
    elif name == "score":
        table = pa.table({**everything, schema.ERROR: pa.nulls(13, pa.string())})
        broken = identity_columns(BROKEN, first_row=13) | {
            schema.NAME: pa.array(["<b>/one.jpg", None]),
            schema.ERROR: pa.array(["truncated"] * 2),
        }
        table = pa.concat_tables([table, pa.table(broken)], promote_options="default")
        write_shards(folder, {"a.parquet": table})
        (root / "lake").mkdir()
        lake = pa.table({"bytes": pa.array(everyone + BROKEN, pa.binary())})
        pq.write_table(lake, root / "lake" / "a.parquet")
    elif name == "select":
        folder.write_table("selection.parquet", _numbered(everything).slice(0, 8))
        ids = [images.sample_id(content) for content in LEAKED]
        left_out = {schema.SAMPLE_ID: pa.array(ids, schema.SAMPLE_ID_TYPE), schema.WHY: pa.array(["leak"])}
        folder.write_table("left_out.parquet", pa.table(left_out))
    elif name == "materialise":
        mined = _numbered(everything).slice(0, 8)
        write_shards(folder, {"a.parquet": mined.append_column(schema.BYTES, pa.array(CHOSEN, pa.large_binary()))})
    elif name == "distill":
        records = [
            {"step": 5, "loss": 1.5, "validation_accuracy": 0.8},
            {"step": 10, "loss": 0.5, "validation_accuracy": 0.9},
        ]
        folder.write_json("history.json", {"validations": records, "best_step": 10})
    elif name == "evaluate":
        (root / "test" / "cat").mkdir(parents=True)
        for k in (20, 21):
            (root / "test" / "cat" / f"{k}.png").write_bytes(png(k))


def _numbered(everything: dict[str, Any]) -> pa.Table:
    return pa.table({**everything, schema.ORDER: pa.array(range(13), pa.int64())})


PAIRS = [
    {
        "true": "cat",
        "predicted": "dog",
        "count": 17,
        "teacher_count": 11,
        "examples": ["cat/20.png", "cat/21.png", "gone.png"],
    }
]


def summarise(config: JobConfig) -> dict:
    storage = Storage(config.output)
    found = {name: manifest.read(storage.child(folder)) for name, folder in FOLDERS.items()}
    return report.summarise(config, storage, {name: made for name, made in found.items() if made}, len(FOLDERS))


def render(config: JobConfig) -> str:
    return report.render(config, Storage(config.output), summarise(config))


@pytest.fixture
def no_plots(monkeypatch):
    """Matplotlib is not what is tested."""

    def blank(draw, alt, title):
        return page.Picture("data:image/svg+xml;base64,PHN2Zy8+", None, 461, 278, alt, title)

    monkeypatch.setattr(report_plots, "themed_plot", blank)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> JobConfig:
    """A finished run, mistakes included."""
    return make(tmp_path_factory.mktemp("finished"), "export", facts={"evaluate": {"confusion_pairs": PAIRS}})


@pytest.fixture(scope="module")
def full_page(finished) -> str:
    """Its page."""
    return render(finished)


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
    found = summarise(config)["controls"]
    assert {name: found["random"][name] for name in expected} == expected
    assert found["random"]["usage"]["seconds"] == pytest.approx(4.0, abs=0.5)  # of both stages
    assert "80.00 %" in render(config)


def test_an_example_image_is_one_of_the_test_images_that_lie_here(tmp_path):
    config = make(tmp_path, None)
    assert summarise(config)["example_image"] is None
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "1.png").write_bytes(png(1))
    assert summarise(config)["example_image"] == f"{tmp_path}/test/cat/1.png"
    assert summarise(job(tmp_path, test={"uri": "s3://bucket/test"}))["example_image"] is None


# -- what it took ------------------------------------------------------------------------------------------

MIB = 2**20
ACTORS = Workers(unit="actors", most=3, peak_bytes=321 * MIB, cpu_hours=12.0, gpu_hours=0.0)
TRAINING = Workers(unit="workers", most=2, peak_bytes=654 * MIB, gpu_peak_bytes=77 * MIB, cpu_hours=40.0, gpu_hours=2.0)
PRICES = HourPrices(currency="EUR", cpu_hour=0.25, gpu_hour=3.0, cores_with_gpu=8.0)


def taking(config: JobConfig, took: dict[str, Usage | None], prices: HourPrices | None = None) -> dict[str, Any]:
    """The summary of a run whose stages took this."""
    storage = Storage(config.output)
    done = {name: made for name, folder in FOLDERS.items() if (made := manifest.read(storage.child(folder)))}
    done = {
        name: made.model_copy(update={"usage": took[name]}) if name in took else made for name, made in done.items()
    }
    return report.summarise(config, storage, done, len(FOLDERS), prices)


def test_the_summary_says_what_each_stage_took_and_all_together(tmp_path):
    config = make(tmp_path, "distill")
    alone = Usage(driver_peak_bytes=111 * MIB)
    took = {name: alone for name in ORDER[:6]} | {
        "features": Usage(driver_peak_bytes=222 * MIB, workers=ACTORS),
        "distill": Usage(driver_peak_bytes=100 * MIB, workers=TRAINING),
    }
    summary = taking(config, took, PRICES)
    features, fit, distill = (summary["usage"][name] for name in ("features", "fit", "distill"))
    assert (features["driver_peak_bytes"], features["worker_peak_bytes"]) == (222 * MIB, 321 * MIB)
    assert (features["unit"], features["most"], features["gpu_peak_bytes"]) == ("actors", 3, None)
    assert (features["cpu_hours"], features["cost"]) == (12.0, 3.0)
    # Nobody worked for it but the driver.
    assert (fit["unit"], fit["most"], fit["worker_peak_bytes"], fit["cpu_hours"], fit["cost"]) == (None, 0, None, 0, 0)
    assert distill["gpu_peak_bytes"] == 77 * MIB
    assert distill["cost"] == pytest.approx(2 * 3.0 + (40 - 16) * 0.25)
    together = summary["usage_in_all"]
    assert (together["driver_peak_bytes"], together["worker_peak_bytes"]) == (222 * MIB, 654 * MIB)
    assert (together["cpu_hours"], together["gpu_hours"], together["cost"]) == (52.0, 2.0, 15.0)
    assert together["seconds"] == pytest.approx(sum(summary["seconds"].values()))
    assert summary["prices"] == PRICES.model_dump()


def test_what_is_not_known_of_a_stage_is_not_known_of_all(tmp_path):
    config = make(tmp_path, "score")
    unknown = ACTORS.model_copy(update={"cpu_hours": None, "gpu_hours": None})
    for usage in (None, Usage(driver_peak_bytes=MIB, workers=unknown)):
        took = {"features": Usage(workers=ACTORS), "fit": Usage(driver_peak_bytes=MIB), "score": usage}
        summary = taking(config, took, PRICES)
        assert summary["usage"]["features"]["cost"] == 3.0
        for part in (summary["usage"]["score"], summary["usage_in_all"]):
            assert (part["cpu_hours"], part["gpu_hours"], part["cost"]) == (None, None, None)


def test_without_prices_nothing_has_a_cost(tmp_path):
    summary = taking(make(tmp_path, "features"), {"features": Usage(workers=ACTORS)})
    assert (summary["prices"], summary["usage"]["features"]["cost"]) == (None, None)


def _rows_of_time(html: str) -> dict[str, list[str]]:
    """The table of what stages took: cells by the first one."""
    table = html.split('aria-label="Time, memory and storage"')[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    return {row[0]: row[1:] for row in rows}


def test_the_page_shows_what_each_stage_took(tmp_path, no_plots):
    config = make(tmp_path, "distill")
    took = {"features": Usage(driver_peak_bytes=222 * MIB, workers=ACTORS), "fit": Usage(driver_peak_bytes=111 * MIB)}
    took |= {"distill": Usage(driver_peak_bytes=100 * MIB, workers=TRAINING), "score": None}
    html = report.render(config, Storage(config.output), taking(config, took, PRICES))
    rows = _rows_of_time(html)
    names = ["driver, MiB", "workers at once", "one worker, MiB", "its GPU, MiB", "CPU-hours", "GPU-hours", "EUR"]
    assert rows["stage"][2:9] == names
    assert rows["features"][2:9] == ["222", "3 actors", "321", "", "12.0000", "0", "3.00"]
    assert rows["fit"][2:9] == ["111", "none", "", "", "0", "0", "0"]
    assert rows["distill"][2:9] == ["100", "2 workers", "654", "77", "40.0000", "2.0000", "12.00"]
    assert rows["score"][2:9] == ["", "not known", "", "", "not known", "not known", "not known"]
    assert rows["in all"][6:9] == ["not known", "not known", "not known"]
    assert len({len(cells) for cells in rows.values()}) == 1
    text = Page(html).text
    assert "0.25 EUR for a core and 3 for a GPU with its 8 cores" in text


def test_a_run_without_gpus_or_prices_has_no_columns_of_theirs(tmp_path, no_plots):
    config = make(tmp_path, "fit")
    took = {"features": Usage(driver_peak_bytes=222 * MIB, workers=ACTORS), "fit": Usage(driver_peak_bytes=111 * MIB)}
    html = report.render(config, Storage(config.output), taking(config, took))
    rows = _rows_of_time(html)
    assert rows["stage"][2:6] == ["driver, MiB", "workers at once", "one worker, MiB", "CPU-hours"]
    assert rows["in all"][2:6] == ["222", "3 actors", "321", "12.0000"]
    assert len({len(cells) for cells in rows.values()}) == 1
    assert "pu-ray report JOB.yaml --prices FILE.yaml" in Page(html).text


# -- report.html -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upto", [None, *ORDER])
def test_the_page_is_well_formed_however_far_the_run_has_come(tmp_path, no_plots, upto):
    page = Page(render(make(tmp_path, upto)))
    assert page.open == []
    assert "Undefined" not in page.text
    assert "None" not in page.text


def test_the_page_asks_nobody_for_anything(full_page):
    parsed = Page(full_page)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in parsed.tags}
    for _, attributes in parsed.tags:
        for name in ("src", "srcset", "poster", "action", "background"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    style = full_page.split("<style>")[1].split("</style>")[0]
    for request in ("url(", "@import", "http:", "https:"):
        assert request not in style
    script = full_page.split("<script>")[1].split("</script>")[0]
    for request in ("fetch", "XMLHttpRequest", "import", "http:", "https:", ".src"):
        assert request not in script


def test_the_policy_lets_only_the_own_script_run(full_page):
    [policy] = [each["content"] for each in Page(full_page).every("meta") if "http-equiv" in each]
    script = full_page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")
    assert full_page.count("<script") == 1


def test_every_picture_can_be_shown_and_says_what_it_shows(full_page):
    pictures = Page(full_page).every("img")
    assert len(pictures) == 4 + 2 * 4 + 1 + 1  # plots, four sheets for each of two classes, one left out, one mistake
    for attributes in pictures:
        assert len(attributes["alt"]) > 10
        assert int(attributes["width"]) > 0
        assert int(attributes["height"]) > 0
        kind, content = attributes["src"].split(";base64,")
        start = {"data:image/webp": b"RIFF", "data:image/svg+xml": b"<?xml"}[kind]
        assert base64.b64decode(content).startswith(start)
    assert len({attributes["alt"] for attributes in pictures}) == len(pictures)


def test_plots_have_an_ink_for_dark_pages(full_page):
    parsed = Page(full_page)
    dark = [base64.b64decode(each["srcset"].split(",")[1]).decode() for each in parsed.every("source")]
    light = [each["src"].split(",")[1] for each in parsed.every("img") if "svg" in each["src"]]
    assert len(dark) == len(light) == 4
    for one, other in zip(light, dark, strict=True):
        assert page.INK in base64.b64decode(one).decode()
        assert page.INK not in other
        assert page.INK_ON_DARK in other


def test_it_can_be_read_without_seeing_it(full_page):
    parsed = Page(full_page)
    assert parsed.every("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {each["href"].removeprefix("#") for each in parsed.every("a")} <= set(ids)
    assert {each["id"] for each in parsed.every("input")} == {each["for"] for each in parsed.every("label")}
    assert all(each.get("scope") in ("row", "col") for each in parsed.every("th"))
    # What scrolls can be reached with a keyboard.
    scrolled = [each for each in parsed.every("div") if each.get("class") == "scroll"]
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in scrolled)


def test_without_its_script_everything_is_there_but_the_search(full_page):
    parsed = Page(full_page)
    hidden = [tag for tag, attributes in parsed.tags if "hidden" in attributes]
    assert hidden == ["form"]


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    colour = colour.removeprefix("#")
    if len(colour) == 3:
        colour = "".join(2 * digit for digit in colour)
    parts = [int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def palettes() -> list[dict[str, str]]:
    """Colours of light and of dark pages, by name."""
    style = page.text("style.css.j2")
    found = re.findall(r":root \{([^}]*--ink[^}]*)\}", style)
    return [dict(re.findall(r"--(\w+): (#\w+)", rules)) for rules in found]


def test_contrast_is_what_wcag_asks_for():
    assert contrast("#000", "#fff") == pytest.approx(21)
    light, dark = palettes()
    for palette in (light, dark):
        for name in ("ink", "soft", "good", "bad"):
            for ground in ("ground", "card"):
                assert contrast(palette[name], palette[ground]) >= 4.5, (name, ground)
        for name in ("BLUE", "ORANGE", "GREY"):  # marks, not text
            assert contrast(getattr(page, name), palette["ground"]) >= 3, name
    assert (light["soft"], dark["soft"]) == (page.INK, page.INK_ON_DARK)


# Numbers of the page's own prose: three 95 % intervals, 255 levels, top-5, SHA-256, and less than 0.01 of a currency.
PROSE = {"95", "255", "5", "256", "0.01"}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    elif value is not None and not isinstance(value, bool):
        yield value


def numbers_of(summary: dict[str, Any]) -> set[str]:
    """Every way in which the page may write a number of the summary."""
    forms = ("{}", "{:,}", "{:.1f}", "{:.2f}", "{:.4f}", "{:g}", "{:,.0f}", "{:,.1f}")
    allowed: set[str] = set(PROSE)
    for leaf in _leaves(summary):
        if isinstance(leaf, str):
            allowed |= set(re.findall(NUMBER, leaf))
        else:
            allowed |= {form.format(abs(scaled)) for form in forms for scaled in (leaf, 100 * leaf)}
            allowed |= set(re.findall(NUMBER, page.size(int(leaf)))) | {page.mib(int(leaf))}
    return allowed


NUMBER = r"\d[\d,]*(?:\.\d+)?"


def test_every_number_of_the_page_is_in_the_summary(tmp_path, no_plots, finished, full_page):
    summary = summarise(finished)
    assert [found for found in re.findall(NUMBER, Page(full_page).told) if found not in numbers_of(summary)] == []
    # And of a page with all that a run may have.
    known = {"mined_precision": rate(0.8123), "mined_recall": rate(0.9321), "true_prior": 0.1357}
    slices = {"site": [{"value": "a", "n": 1601, "student_accuracy": rate(0.7), "teacher_accuracy": rate(0.8)}]}
    scaled = {"images": 200, "mean_pixel_difference": 0.31, "agreement": 0.995}
    five = {"student_top5_accuracy": rate(0.9912), "teacher_top5_accuracy": rate(0.9934)}
    facts = {
        "features": {"scaled_decode": scaled},
        "evaluate": {**known, **five, "slices": slices, "confusion_pairs": PAIRS},
        "export": {"formats": {"onnx": {"file": "model.onnx", "bytes": 5321, "cpu_latency_ms": 0.4}}},
    }
    config = make(tmp_path, "export", facts=facts)
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"controls": ("random",)})})
    storage = Storage(config.output)
    control = storage.child("controls/random")
    publish(control.child("selection"), "select", counts=COUNTS["select"], facts=FACTS["select"])
    poor = {**FACTS["evaluate"], "student_accuracy": rate(0.7777), "gap_to_teacher": 17.23}
    publish(control.child("evaluation"), "evaluate", counts=COUNTS["evaluate"], facts=poor)
    inputs = {"select": "made-by-hand", "answers": "digest"}
    Publication("audit", "audited", inputs, 0).publish(storage.child("audit"), **AUDIT)
    summary = summarise(config)
    told = Page(render(config)).told
    found = re.findall(NUMBER, told)
    shown = {"81.23", "93.21", "0.1357", "1,601", "17", "11", "77.77", "17.23", "91.23", "99.12", "5,321", "99.5"}
    assert shown <= set(found)
    assert [number for number in found if number not in numbers_of(summary)] == []


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
    text = Page(full_page).text.replace("\n", "")
    for number in ("93.00 %", "95.00 %", "10.0 times smaller", "4.0 times as fast", "0.1000", "copies of test images2"):
        assert number in text
    assert "unfinished" not in text


POINT = {"value": 0.5, "low": 0.25, "high": 0.75}
CURVES = {
    "estimated": [{"threshold": t, "recall": {**POINT, "n": 9}, "precision": POINT} for t in (2.0, 1.0)],
    "measured": [{"threshold": t, "recall": 0.5, "precision": 0.5, "kept": 3} for t in (2.0, 1.0)],
}


@pytest.mark.parametrize("shown", [("estimated",), ("measured",), ("estimated", "measured"), ()])
def test_the_page_says_where_precision_over_recall_comes_from(tmp_path, shown):
    config = make(tmp_path, "export")
    curves = {name: CURVES[name] if name in shown else [] for name in CURVES}
    summary = {**summarise(config), "precision_recall": curves, "audit": {**AUDIT["counts"], **AUDIT["facts"]}}
    parsed = Page(report.render(config, Storage(config.output), summary))
    alts = [each["alt"] for each in parsed.every("img") if each["alt"].startswith("Precision over recall")]
    said = " and ".join(name for name in ("measured", "estimated") if name in shown)
    assert alts == ([f"Precision over recall at all thresholds, {said}"] if shown else [])
    assert ("by Bayes' rule" in parsed.text) == ("estimated" in shown)
    assert ("not shown. The truth is not known" in parsed.text) == (not shown)


HOSTILE = "<script>alert(1)</script>\"'&"


def test_names_that_customers_choose_are_shown_not_run(tmp_path, no_plots):
    facts = {"evaluate": {"student_accuracy_per_class": {HOSTILE: rate(0.9), "dog": rate(0.9)}}}
    html = render(make(tmp_path, "export", classes=[HOSTILE, "dog"], facts=facts))
    parsed = Page(html)
    assert html.count("<script") == 1
    assert len(parsed.every("script")) == 1
    assert HOSTILE in parsed.text
    assert any(HOSTILE in (attributes.get("alt") or "") for attributes in parsed.every("img"))
    assert HOSTILE in {attributes.get("data-class") for attributes in parsed.every("tr")}


def test_a_uri_cannot_break_out_of_the_page(tmp_path):
    config = make(tmp_path, "features")
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"weights": HOSTILE})})
    assert render(config).count("<script") == 1


def test_the_same_run_gives_the_same_page(tmp_path):
    config = make(tmp_path, "fit")
    publish(Storage(config.output).child("selection"), "select", counts=COUNTS["select"], facts=FACTS["select"])
    assert render(config) == render(config)


@pytest.fixture
def shown(monkeypatch) -> dict[str, list[bytes]]:
    """Which contents each sheet shows, by its description."""
    sheets: dict[str, list[bytes]] = {}
    monkeypatch.setattr(report_sheets, "_tile", lambda job, content, limits: content)

    def sheet(title, what, tiles):
        sheets[what] = list(tiles)
        return page.Picture("data:image/webp;base64,", None, 1, 1, what, title)

    monkeypatch.setattr(report_sheets, "_sheet", sheet)
    return sheets


def test_sheets_show_the_surest_the_borderline_random_ones_and_what_just_failed(tmp_path, no_plots, shown, monkeypatch):
    monkeypatch.setattr(report_sheets, "SHEET_IMAGES", 3)
    render(make(tmp_path, "evaluate", facts={"evaluate": {"confusion_pairs": PAIRS}}))
    assert shown == {
        "surest images of cat": [CHOSEN[0], CHOSEN[2], CHOSEN[4]],
        "borderline images of cat": [CHOSEN[2], CHOSEN[4], CHOSEN[6]],
        "random images of cat": [CHOSEN[0], CHOSEN[2], CHOSEN[4]],
        "just rejected images of cat": [REJECTED[0], REJECTED[2]],
        "surest images of dog": [CHOSEN[1], CHOSEN[3], CHOSEN[5]],
        "borderline images of dog": [CHOSEN[3], CHOSEN[5], CHOSEN[7]],
        "random images of dog": [CHOSEN[1], CHOSEN[3], CHOSEN[5]],
        "just rejected images of dog": [REJECTED[1], REJECTED[3]],
        "images that were left out: copies of test images": LEAKED,
        "test images of cat that the student takes for dog": [png(20), png(21)],
    }


def test_an_image_that_is_twice_in_the_lake_is_rejected_once():
    table = pa.table(
        {
            **identity_columns([REJECTED[0], REJECTED[1], REJECTED[0]]),
            schema.SCORE: pa.array([1.0, 2.0, 1.0], pa.float32()),
            schema.PREDICTED: pa.array([0, 0, 0], pa.int32()),
        }
    )
    best = report_sheets._best_of_each_class(table)
    assert best[schema.SCORE].to_pylist() == [2.0, 1.0]


def test_what_cannot_be_decoded_is_named_with_its_reason_and_place(full_page):
    text = Page(full_page).text
    assert "Truncated, for example" in text
    assert "a.parquet row 13, <b>/one.jpg" in text
    assert "a.parquet row 14" in text


def test_what_the_run_has_forgotten_is_shown_nowhere(tmp_path, no_plots, shown):
    config = make(tmp_path, "evaluate", facts={"evaluate": {"confusion_pairs": PAIRS}})
    storage = Storage(config.output)
    render(config)
    everyone = {*CHOSEN, *REJECTED, *LEAKED, png(20), png(21)}
    assert {content for contents in shown.values() for content in contents} == everyone
    shown.clear()
    gone = [CHOSEN[0], REJECTED[0], LEAKED[0], BROKEN[0], png(20)]
    storage.write_bytes("forgotten.txt", "".join(f"{images.sample_id(one).hex()} lake\n" for one in gone).encode())
    text = Page(render(config)).text
    assert {content for contents in shown.values() for content in contents} == everyone - set(gone)
    assert "row 13" not in text
    assert "row 14" in text


def test_nearly_forgotten_images_are_not_shown_as_left_out(tmp_path, no_plots, shown):
    config = make(tmp_path, "materialise")
    storage = Storage(config.output)
    left_out = {
        schema.SAMPLE_ID: pa.array([images.sample_id(one) for one in LEAKED], schema.SAMPLE_ID_TYPE),
        schema.WHY: pa.array(["near_forgotten"]),
    }
    storage.child("selection").write_table("left_out.parquet", pa.table(left_out))
    storage.write_bytes("forgotten.txt", f"{images.sample_id(CHOSEN[0]).hex()} lake\n".encode())
    render(config)
    assert not any(LEAKED[0] in contents for contents in shown.values())


def test_no_more_is_embedded_than_the_budget_allows_and_the_page_says_so(tmp_path, no_plots, monkeypatch):
    config = make(tmp_path, "export")
    one_class = len(report_sheets.of_mined(config, Storage(config.output), CLASSES).classes[0].pictures[0].light)
    monkeypatch.setattr(report_sheets, "BUDGET_BYTES", 5 * one_class)
    text = Page(render(config)).text
    assert "Pictures of 1 classes, those with the most mined images; of 1 more there is no room." in text


def test_few_images_are_read_from_the_lake_again(tmp_path, no_plots, shown, monkeypatch):
    monkeypatch.setattr(report_sheets, "MOST_READ_AGAIN", 3)
    render(make(tmp_path, "materialise"))
    again = [content for contents in shown.values() for content in contents if content in REJECTED + LEAKED]
    assert sorted(again) == sorted([LEAKED[0], REJECTED[0], REJECTED[2]])


def test_a_thousand_classes_fit_one_page(tmp_path, no_plots):
    """The worst case for the budget: noise compresses badly."""
    count = 1000
    names = [f"class {k}" for k in range(count)]
    config = make(tmp_path, "export", classes=names)
    storage = Storage(config.output)
    generator = np.random.default_rng(0)
    contents = [
        encode(Image.fromarray(noise)) for noise in generator.integers(0, 256, (2 * count, 24, 24, 3), np.uint8)
    ]
    rows = {
        **identity_columns(contents),
        schema.SCORE: pa.array(range(2 * count), pa.float32()),
        schema.PREDICTED: pa.array([k % count for k in range(2 * count)], pa.int32()),
        schema.ORDER: pa.array(range(2 * count), pa.int64()),
    }
    facts = {**FACTS["select"], "class_counts": [2] * count, "class_counts_before_balance": [3] * count}
    storage.child("selection").write_table("selection.parquet", pa.table(rows))
    publish(storage.child("selection"), "select", counts=COUNTS["select"], facts=facts)
    rows[schema.BYTES] = pa.array(contents, pa.large_binary())
    write_shards(storage.child("mined"), {"a.parquet": pa.table(rows)})
    rates = {name: rate(0.9) for name in names}
    told = {**FACTS["evaluate"], "student_accuracy_per_class": rates, "teacher_accuracy_per_class": rates}
    publish(storage.child("evaluation"), "evaluate", counts=COUNTS["evaluate"], facts=told)
    html = render(config)
    parsed = Page(html)
    assert len(html) < 8_000_000
    assert len([each for each in parsed.every("tr") if "data-class" in each]) == count
    shown = [each for each in parsed.every("details") if "data-class" in each]
    assert len(shown) == report_sheets.MOST_CLASSES
    assert f"of {count - report_sheets.MOST_CLASSES} more there is no room" in parsed.text
    assert not any("open" in each for each in shown)
    [table] = [each for each in parsed.every("details") if each.get("class") == "classes" and "open" not in each]
    assert table is not None


@pytest.mark.parametrize(
    ("promise", "measured", "not_needed", "kept"),
    [
        (0.95, 0.96, 0, True),
        (0.95, 0.95, 0, True),
        (0.95, 0.94, 0, False),
        (0.95, 0.94, 3, None),
        (None, 0.94, 0, None),
        (0.95, None, 0, None),
    ],
)
def test_a_promise_is_judged_only_where_somebody_can_know(promise, measured, not_needed, kept):
    summary = {
        "recall_promise": promise and {"recall": promise, "confidence": 0.95},
        "mined_recall": measured and {"value": measured},
        "not_needed": not_needed,
    }
    assert report._promise_kept(summary) is kept


def test_a_broken_promise_is_said_on_top(tmp_path, no_plots):
    known = {"mined_precision": rate(0.8), "mined_recall": rate(0.9), "true_prior": 0.1}
    all_chosen = {"class_counts_before_balance": [5, 3]}
    html = render(make(tmp_path, "evaluate", facts={"evaluate": known, "select": all_chosen}))
    text = " ".join(Page(html).text.split())
    assert text.index("not kept90.00 % found, by the truth") < text.index("Share of positives")


def test_settings_are_shown_where_they_are_not_the_defaults(tmp_path):
    changed = summarise(make(tmp_path, None))["settings_changed"]
    assert changed["student.architecture"] == "cifar/resnet8-w2"
    assert not any(name.startswith(("distill.", "selection.", "resources.", "tracking")) for name in changed)
    tracked = job(tmp_path, distill={"max_steps": 7}, selection={"recall": 0.5}, resources={"embed": {"max_actors": 3}})
    changed = summarise(tracked)["settings_changed"]
    assert (changed["distill.max_steps"], changed["selection.recall"]) == (7, 0.5)
    assert [name for name in changed if name.startswith("resources.")] == ["resources.embed.max_actors"]


@pytest.mark.parametrize("gone", ["scorer", "features"])
def test_a_run_interrupted_while_it_redoes_an_early_stage_can_be_reported(tmp_path, no_plots, gone):
    config = make(tmp_path, "export")
    Storage(config.output).child(gone).delete("manifest.json")
    page = Page(render(config))
    assert page.open == []
    assert summarise(config)["verdict"].startswith("unfinished")


def test_what_another_configuration_made_is_not_shown(tmp_path, no_plots):
    config = make(tmp_path, "export")
    storage = Storage(config.output)
    current = {"features": manifest.read(storage.child("features"))}
    parsed = Page(report.render(config, storage, report.summarise(config, storage, current, len(FOLDERS))))
    assert parsed.every("img") == []
    assert [row for row in ("scorer", "selection", "exported") if row in parsed.text] == []


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
