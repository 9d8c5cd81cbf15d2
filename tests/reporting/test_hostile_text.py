"""Untrusted text stays text in every report output: page, Markdown, CSV, LaTeX, figures, terminal, JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from markdown_it import MarkdownIt
from matplotlib.figure import Figure as Canvas

from mftctl.cli.report_view import table_view
from mftctl.cli.streams import PlainTextConsole
from mftctl.files.json_files import json_text
from mftctl.progress import Silence
from mftctl.reporting.figures.style import Drawing, Figure, drawn_text, put_legend, render
from mftctl.reporting.output.markdown import to_markdown
from mftctl.reporting.output.page import to_page
from mftctl.reporting.output.table_files import table_files, to_csv, to_latex
from mftctl.reporting.output.text_tables import TextCell, TextTable, efficiency_text, metric_text, overview_text
from mftctl.reporting.output.write import to_document
from mftctl.reporting.report import Report, make_report
from tests.hostile_texts import HOSTILE, OBEYED, TEXTS
from tests.reporting.every_kind import write_every_kind

MARK = "MARK"
NO_DRAWING = Drawing("<svg></svg>", b"")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report with the word MARK in place of every untrusted name."""
    root = tmp_path_factory.mktemp("hostile") / "runs"
    write_every_kind(root, stage=MARK, data=MARK, dataset=MARK)
    made = make_report(root, Silence())
    marked = dataclasses.replace(
        made, unfinished=(f"001-fft: {MARK}",), problems=(f"{MARK}/run.json: {MARK}",), figures=made.figures[:2]
    )
    figures = tuple(dataclasses.replace(item, title=MARK, caption=f"{MARK} on {MARK}") for item in marked.figures)
    tables = tuple(
        dataclasses.replace(table, origin=MARK, rows=tuple(dataclasses.replace(r, flags=(MARK,)) for r in table.rows))
        for table in marked.tables
    )
    return dataclasses.replace(marked, figures=figures, tables=tables)


def put(value: Any, text: str) -> Any:
    """A copy of plain data or a record with each MARK replaced by a text."""
    if isinstance(value, str):
        return value.replace(MARK, text)
    if isinstance(value, tuple):
        return tuple(put(part, text) for part in value)
    if isinstance(value, dict):
        return {put(key, text): put(part, text) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: put(getattr(value, field.name), text) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


class Page(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.handlers: list[str] = []
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.targets += [value or "" for name, value in attrs if name in ("href", "src")]


def page_of(report: Report) -> Page:
    drawings = {figure.name: NO_DRAWING for figure in report.figures}
    text = to_page(report, drawings, report.root.parent)
    assert not OBEYED & set(text)
    return Page(text)


@pytest.mark.slow
@settings(max_examples=30)
@given(TEXTS)
def test_the_page_has_the_same_elements_whatever_the_names_are(report: Report, text: str) -> None:
    page, plain = page_of(put(report, text)), page_of(put(report, "name"))
    assert page.elements == plain.elements
    assert page.handlers == []
    assert [target for target in page.targets if not target.startswith(("#", "runs/"))] == []


def kinds_of(markdown: str) -> list[str]:
    """All elements of a document that are not plain text."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = parser.parse(markdown)
    every = [part for token in tokens for part in (token, *(token.children or []))]
    return [token.type for token in every if token.type not in ("text", "inline")]


@pytest.mark.slow
@settings(max_examples=30)
@given(TEXTS)
def test_markdown_has_the_same_parts_whatever_the_names_are(report: Report, text: str) -> None:
    markdown = to_markdown(put(report, text))
    assert not OBEYED & set(markdown)
    assert kinds_of(markdown) == kinds_of(to_markdown(put(report, "name")))


@pytest.mark.slow
@settings(max_examples=30)
@given(TEXTS)
def test_tables_for_latex_and_csv_keep_their_shape(report: Report, text: str) -> None:
    files, plain = table_files(put(report, text)), table_files(put(report, "name"))
    assert [len(content.splitlines()) for content in files.values()] == [
        len(content.splitlines()) for content in plain.values()
    ]
    for name, content in files.items():
        assert not OBEYED & set(content)
        if name.endswith(".csv"):
            rows = list(csv.reader(io.StringIO(content)))
            assert {len(row) for row in rows} == {len(rows[0])}
            assert [cell for row in rows for cell in row if is_formula(cell)] == []
        else:
            assert not re.search(r"(?<!\\)(?:\\\\)*[%#$&_](?!\\(?:pm|times|uparrow|downarrow))", plain_cells(content))


def is_formula(cell: str) -> bool:
    return cell.lstrip()[:1] in tuple("=+-@\uff1d\uff0b\uff0d\uff20") and not re.fullmatch(r"[-+]?[\d.e+-]+", cell)


def plain_cells(latex: str) -> str:
    """The cells without table markup."""
    for own in (r"$\pm$", r"$\times$", r"$\uparrow$", r"$\downarrow$", "$-$", " & "):
        latex = latex.replace(own, " ")
    return latex


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@x", "\t=1", " =1", "\uff1d1"])
def test_a_formula_is_a_text_in_csv_and_a_number_a_number(text: str) -> None:
    [row] = csv.DictReader(io.StringIO(to_csv([{"state": text, "runs": (text,), "change": -0.5, "seed": "-1"}])))
    assert row["state"].startswith("'")
    assert row["runs"].startswith("'")
    assert (row["change"], row["seed"]) == ("-0.5", "-1")


@pytest.mark.parametrize("text", ["[8pt]x", "*x"])
def test_a_latex_row_is_not_an_argument_of_the_line_break_before_it(text: str) -> None:
    table = TextTable("n", "t", ("state", "x"), ((TextCell(text), TextCell("1")),), (False, True))
    assert f"\n{{}}{text} & 1" in to_latex(table)


@pytest.mark.slow
@settings(max_examples=30)
@given(TEXTS)
def test_no_control_sequences_reach_the_terminal(report: Report, text: str) -> None:
    made = put(report, text)
    stream = io.StringIO()
    console = PlainTextConsole(file=stream, force_terminal=True, width=100, color_system=None, emoji=False)
    tables = [*map(overview_text, made.overviews), *map(metric_text, made.tables), efficiency_text(made.efficiency)]
    for table in tables:
        console.print(table_view(table))
    assert not OBEYED & set(stream.getvalue())


@settings(max_examples=30)
@given(TEXTS)
def test_json_round_trips_every_text(report: Report, text: str) -> None:
    written = json_text(to_document(put(report, text)))
    assert written.isascii()
    document = json.loads(written, parse_constant=pytest.fail)
    assert document["figures"][0]["title"] == text
    assert document["unfinished"] == [f"001-fft: {text}"]


def test_json_has_null_where_there_is_no_number() -> None:
    assert json.loads(json_text({"a": [float("nan"), (float("-inf"), 1.5)]})) == {"a": [None, [None, 1.5]]}


def one_figure(text: str) -> Figure:
    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots()
        axes.plot([0, 1], [0, 1], label=drawn_text(text))
        axes.set_title(text)
        axes.set_xlabel(text)
        axes.set_yticks([0, 1], [drawn_text(text), "end"])
        put_legend(canvas, dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))

    return Figure("one", text, text, (), (), draw, 3.0, 2.0)


def check_drawing(text: str) -> None:
    svg = render(one_figure(text)).svg
    assert not OBEYED & set(svg)
    ET.fromstring(svg)


@pytest.mark.slow
@settings(max_examples=5)
@given(TEXTS)
def test_a_figure_draws_any_text(text: str) -> None:
    check_drawing(text)


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in HOSTILE if set("$_\\\x1b\ud800{") & set(text)])
def test_a_figure_draws_texts_that_failed_before(text: str) -> None:
    check_drawing(text)


@pytest.mark.slow
def test_a_name_is_not_read_as_mathtext_and_not_left_out_of_a_legend() -> None:
    texts = [item.text or "" for item in ET.fromstring(render(one_figure("_$x^{$")).svg).iter()]
    assert sum("_$x^{$" in text for text in texts) == 4


@pytest.mark.slow
def test_every_figure_of_a_report_is_drawn_with_names_that_failed_before(tmp_path: Path) -> None:
    name = "_$x^{$ <b>|\x1b]0;PWN\x07 =1\u2028"
    write_every_kind(tmp_path / "runs", stage=name, data=name, dataset=name)
    made = make_report(tmp_path / "runs", Silence())
    assert len(made.figures) > 5
    for figure in made.figures:
        svg = render(figure).svg
        ET.fromstring(svg)
        assert not OBEYED & set(svg)
