"""report.html in a real browser: on a phone, in the dark, on paper, and without its script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Page, expect

from pu_ray import pipeline, report, schema
from pu_ray.storage import Storage
from tests.unit.artifacts import COUNTS, FACTS, identity_columns, job, png, publish, rate, write_shards

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

CLASSES = [f"class {k:02d} with a rather long name" for k in range(30)]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with so many classes that they are folded."""
    root = tmp_path_factory.mktemp("run")
    config = job(root)
    storage = Storage(config.output)
    contents = [png(k) for k in range(60)]
    rows = {
        **identity_columns(contents),
        schema.SCORE: pa.array(np.linspace(5, 0, 60), pa.float32()),
        schema.PREDICTED: pa.array([k % 30 for k in range(60)], pa.int32()),
    }
    ordered = {**rows, schema.ORDER: pa.array(range(60), pa.int64())}
    scorer = storage.child("scorer")
    for file, count in (("calibration.parquet", 60), ("unlabeled.parquet", 600)):
        scores = np.linspace(5, -5, count)
        scorer.write_table(file, pa.table({schema.SCORE: pa.array(scores, pa.float32())}))
    write_shards(storage.child("scores"), {"a.parquet": pa.table({**rows, schema.ERROR: pa.nulls(60, pa.string())})})
    storage.child("selection").write_table("selection.parquet", pa.table(ordered))
    mined = pa.table({**ordered, schema.BYTES: pa.array(contents, pa.large_binary())})
    write_shards(storage.child("mined"), {"a.parquet": mined})
    records = [{"step": step, "loss": 1 / step, "validation_accuracy": 0.9} for step in (1, 2, 3)]
    storage.child("student").write_json("history.json", {"validations": records, "best_step": 3})
    per_class = {name: rate(0.9) for name in CLASSES}
    facts = {
        **FACTS,
        "fit": {**FACTS["fit"], "classes": CLASSES},
        "select": {**FACTS["select"], "class_counts": [2] * 30, "class_counts_before_balance": [2] * 30},
        "evaluate": {**FACTS["evaluate"], "student_accuracy_per_class": per_class},
    }
    steps = [step for step in pipeline.STEPS if step.only_if is None]
    done = {
        step.name: publish(storage.child(step.folder), step.name, counts=COUNTS[step.name], facts=facts[step.name])
        for step in steps
    }
    made = root / "report.html"
    made.write_text(report.render(config, storage, report.summarise(config, storage, done, len(steps))))
    return made


@pytest.fixture
def page(browser: Browser, html: Path) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text))
    requested: list[str] = []
    opened.on("request", lambda request: requested.append(request.url))
    opened.goto(html.as_uri())
    yield opened
    assert problems == []
    assert [asked for asked in requested if not asked.startswith("data:")] == [html.as_uri()]
    context.close()


def test_it_fits_a_phone_whatever_is_unfolded(page: Page) -> None:
    fits = "document.documentElement.scrollWidth <= window.innerWidth"
    assert page.evaluate(fits)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate(fits)


def test_every_picture_is_drawn_at_the_place_that_was_kept_for_it(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    drawn = page.evaluate(
        """Promise.all([...document.images].map(async (each) => {
            await each.decode();
            return [each.naturalWidth / each.naturalHeight, each.clientWidth / each.clientHeight];
        }))"""
    )
    assert len(drawn) > 90
    for natural, shown in drawn:
        assert shown == pytest.approx(natural, rel=0.03)


def test_a_class_is_found_by_a_part_of_its_name(page: Page) -> None:
    page.get_by_label("Find a class").fill("CLASS 07")
    expect(page.locator("#found")).to_have_text("1 class")
    expect(page.locator("[data-class]:visible")).to_have_count(2)  # its line, and its pictures
    page.get_by_label("Find a class").fill("")
    expect(page.locator("tr[data-class]:visible")).to_have_count(30)


def test_paper_is_white_and_shows_what_is_folded(page: Page) -> None:
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(media="print")
    assert dark != page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    expect(page.locator("details:not([open])")).to_have_count(0)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 30


def test_without_scripts_only_the_search_is_missing(browser: Browser, html: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(html.as_uri())
    expect(opened.locator("form")).to_be_hidden()
    opened.get_by_text("Images and accuracy of each class").click()
    expect(opened.get_by_role("rowheader", name=CLASSES[29])).to_be_visible()
    context.close()
