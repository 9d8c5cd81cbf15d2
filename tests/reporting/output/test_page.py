"""The HTML page as text; `test_page_in_browser.py` opens it in a browser."""

from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mftctl.progress import Silence
from mftctl.reporting.figures.style import INK, render
from mftctl.reporting.output.page import anchor, to_page
from mftctl.reporting.report import Report, make_report
from tests.reporting.training_folders import write_study


class Elements(HTMLParser):
    """The ids, link targets and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.ids += [found["id"]] if found.get("id") else []
        self.links += [found["href"]] if tag == "a" and found.get("href") else []


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study") / "my runs"
    write_study(root)
    return root


@pytest.fixture(scope="module")
def report(root: Path) -> Report:
    return make_report(root, Silence())


def page_of(report: Report, folder: Path) -> str:
    return to_page(report, {figure.name: render(figure) for figure in report.figures}, folder)


@pytest.fixture(scope="module")
def page(report: Report, root: Path) -> str:
    return page_of(report, root.parent / "report")


@pytest.mark.slow
def test_the_page_is_self_contained(page: str) -> None:
    assert page.lstrip().startswith("<!doctype html>")
    assert not Elements(page).tags & {"script", "link", "iframe", "object", "base", "form"}
    outside = re.findall(r'(?:src|xlink:href|url)\s*[=(]\s*["\']?(?!#|data:)([^"\')\s>]+)', page)
    assert outside == []


def test_every_number_links_to_its_runs_and_their_commands(page: str, report: Report, root: Path) -> None:
    found = Elements(page)
    inside = [link.removeprefix("#") for link in found.links if link.startswith("#")]
    assert set(inside) <= set(found.ids)
    cells = re.findall(r"<td[^>]*class=\"[^\"]*number[^\"]*\"[^>]*><span>(.*?)</span>", page, re.DOTALL)
    assert len(cells) > 20
    assert all(not cell.strip() or 'href="#run' in cell for cell in cells)
    for source in report.sources:
        assert f"../my%20runs/{source.name}/" in found.links
        assert html.escape(source.reproduction, quote=False) in page.replace("&#39;", "'")
    assert {run.name for run in report.sources} >= {"001-fft", "004-mask-train", "005-eval", "019-eval"}


def test_ids_are_unique(page: str) -> None:
    ids = Elements(page).ids
    assert len(ids) == len(set(ids))


def test_figures_take_the_colour_of_the_text(page: str, report: Report) -> None:
    assert len(re.findall(r"<svg ", page)) == len(report.figures) > 0
    assert INK not in page.split("</style>")[1].split("<svg", 1)[1]
    assert not re.search(r"<svg[^>]* (?:width|height)=", page)


@pytest.mark.slow
def test_names_from_runs_are_text_and_not_markup(report: Report, tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>"
    table = report.tables[0]
    rows = (dataclasses.replace(table.rows[0], state=bad, flags=(bad,)), *table.rows[1:])
    changed = dataclasses.replace(
        report, tables=(dataclasses.replace(table, dataset=bad, rows=rows),), overviews=(), problems=(bad,)
    )
    text = page_of(changed, tmp_path)
    assert bad not in text
    assert text.count("&lt;img src=x") >= 4


@pytest.mark.slow
def test_a_report_without_evaluation_says_so(report: Report, tmp_path: Path) -> None:
    text = page_of(dataclasses.replace(report, tables=(), overviews=()), tmp_path)
    assert "No evaluation has finished yet, so there is nothing to compare." in text


def test_several_runs_have_an_anchor_together() -> None:
    assert anchor(("009-eval",)) == "run-009-eval"
    assert anchor(("009-eval", "019-eval")) == "runs-009-019"
