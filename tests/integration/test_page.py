"""The page at `/` in a real browser: a person drops a picture and sees the answer."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from ray import serve

from pu_ray.images import Limits
from serving import app, auth, registry
from serving.predictor import Predictor
from serving.settings import ServingSettings
from tests.integration.test_serving import free_port
from tests.unit.serving.students import LABELS, png, write_student

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

TOKEN = "for-the-page"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [write_student(tmp_path_factory.mktemp(name), name, seed) for seed, name in enumerate(["pets", "shoes"])]


@pytest.fixture(scope="module")
def url(ray_cluster: object, exported: list[str]) -> Iterator[str]:
    yield app.deploy(exported, ServingSettings(token_digests=(auth.digest(TOKEN),)), port=free_port())
    serve.shutdown()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    requested: list[str] = []
    opened.on("request", lambda request: requested.append(request.url))
    opened.goto(url)
    yield opened
    assert problems == []
    elsewhere = [asked for asked in requested if not asked.startswith((url, "blob:", "data:"))]
    assert elsewhere == [], "the page needs nothing from elsewhere"
    context.close()


def give_token(page: Page) -> None:
    expect(page.get_by_label("Token")).to_be_visible()
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_label("Token").press("Enter")
    expect(page.get_by_label("Student").locator("option")).to_have_count(2)


def drop(page: Page, content: bytes, name: str, kind: str) -> None:
    """As a person drops a file from the desktop."""
    page.evaluate(
        """([encoded, name, kind]) => {
            const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, { type: kind }));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
        }""",
        [base64.b64encode(content).decode(), name, kind],
    )


def expected(exported: list[str], which: int, seed: int) -> list[str]:
    best = Predictor(registry.load(exported[which]), Limits()).predict([png(seed)]).top(0, 5)
    return [f"{LABELS[index]}{100 * probability:.1f} %" for index, probability in best]


def test_a_dropped_picture_is_answered(page: Page, exported: list[str], tmp_path: Path) -> None:
    give_token(page)
    drop(page, png(3), "cat.png", "image/png")
    answers = page.get_by_role("listitem")
    expect(answers).to_have_count(len(LABELS))
    assert [text.replace("\n", "") for text in answers.all_inner_texts()] == expected(exported, 0, 3)
    expect(page.get_by_role("img", name="cat.png")).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text("pets, version")
    # Another student is asked about the same picture.
    page.get_by_label("Student").select_option("shoes")
    expect(page.get_by_role("status")).to_contain_text("shoes, version")
    assert [text.replace("\n", "") for text in answers.all_inner_texts()] == expected(exported, 1, 3)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it fits a phone"


def test_a_file_that_is_no_picture_is_told(page: Page) -> None:
    give_token(page)
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    expect(page.get_by_role("status")).to_contain_text("the image cannot be used")
    expect(page.get_by_role("listitem")).to_have_count(0)


def test_without_a_token_it_asks_for_one(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text("This server wants a token.")
    page.get_by_label("Token").fill("wrong")
    page.get_by_label("Token").press("Enter")
    expect(page.get_by_role("status")).to_have_text("This server wants a token.")


def test_the_documentation_opens(page: Page) -> None:
    page.get_by_role("link", name="How programs ask").click()
    expect(page.get_by_role("heading", name="How programs ask")).to_be_visible()
    expect(page.get_by_role("heading", name="/v2/models/{model}/infer")).to_be_visible()
