"""The page in a real browser: no errors, no external requests, no overflow on a phone, the numbers of `report.json`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from mftctl.progress import Silence
from mftctl.reporting.output.write import write_report
from mftctl.reporting.report import make_report
from tests.reporting.training_folders import write_study

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report."""
    folder = tmp_path_factory.mktemp("browser")
    write_study(folder / "runs")
    write_report(make_report(folder / "runs", Silence()), folder / "report", Silence())
    return folder / "report"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS, ids=str)
def page(browser: Browser, folder: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.goto((folder / "index.html").as_uri())
    yield page
    page.close()


@pytest.mark.slow
def test_it_loads_without_errors_and_external_requests(browser: Browser, folder: Path) -> None:
    page = browser.new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    address = (folder / "index.html").as_uri()
    page.goto(address)
    page.close()
    assert told == []
    assert asked == [address]


@pytest.mark.slow
def test_nothing_overflows_horizontally(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    beyond = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
            .filter(item => !item.closest('.scroll') && item.getBoundingClientRect().right > window.innerWidth + 0.5)
            .map(item => item.outerHTML.slice(0, 80))"""
    )
    assert beyond == []


@pytest.mark.slow
def test_tables_fit_a_phone_without_scrolling(page: Page) -> None:
    width = page.evaluate("Math.max(...[...document.querySelectorAll('table')].map(item => item.scrollWidth))")
    assert width <= page.evaluate("document.querySelector('main').clientWidth")


@pytest.mark.slow
def test_the_main_table_is_that_of_the_document(page: Page, folder: Path) -> None:
    document = json.loads((folder / "report.json").read_text("utf-8"))
    overview = document["overviews"][0]
    rows = page.locator("table.main tbody tr").all()
    assert len(rows) == len(overview["rows"]) == 5
    for row, (state, cells) in zip(rows, overview["rows"], strict=True):
        assert row.locator("th").inner_text() == state
        shown = [cell.inner_text().split() for cell in row.locator("td > span").all()]
        assert len(shown) == len(cells)
        for words, cell in zip(shown, cells, strict=True):
            assert float(words[0]) == pytest.approx(cell["value"], abs=6e-5)
            assert float(words[2]) == pytest.approx(cell["spread"], abs=6e-5)
            if cell["change"] is not None:
                numbers = [float(word.strip("()[],*")) for word in words[3:]]
                expected = [cell["change"][key] for key in ("value", "low", "high")]
                assert numbers == pytest.approx(expected, abs=6e-5)
                assert ("*" in words[3]) == (cell["change"]["verdict"] != "within noise")


@pytest.mark.slow
def test_figures_are_drawn_and_fit_their_container(page: Page) -> None:
    boxes = [item.bounding_box() for item in page.locator("figure svg").all()]
    assert boxes
    assert all(box is not None and box["width"] > 300 and box["height"] > 100 for box in boxes)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark_mode(browser: Browser, folder: Path, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto((folder / "index.html").as_uri())
    colours = page.evaluate(
        """() => {
            const style = getComputedStyle(document.body);
            const label = document.querySelector('figure svg text');
            return [style.backgroundColor, style.color, getComputedStyle(label).fill];
        }"""
    )
    page.close()
    ground, ink, label = (luminance(colour) for colour in colours)
    assert (ground > ink) == (scheme == "light")
    assert contrast(ground, ink) > 7
    assert contrast(ground, label) > 7


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(...)`, as defined by WCAG 2."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    low, high = sorted((one, other))
    return (high + 0.05) / (low + 0.05)
