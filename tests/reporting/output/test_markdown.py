from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from mftctl.progress import Silence
from mftctl.reporting.output.markdown import table_lines, to_markdown
from mftctl.reporting.output.text_tables import TextCell, TextTable
from mftctl.reporting.report import Report, make_report
from tests.reporting.training_folders import write_study

GOLDEN = Path(__file__).parents[1] / "golden" / "report.md"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("study") / "runs"
    write_study(root)
    (root / "030-eval").mkdir()
    return make_report(root, Silence())


@pytest.mark.slow
def test_the_report_of_two_seeds_is_the_stored_one(report: Report) -> None:
    text = to_markdown(report).replace(str(report.root), "runs")
    if os.environ.get("MFTCTL_UPDATE_GOLDENS"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text("utf-8")


def test_numbers_are_followed_by_their_runs_and_bars_are_escaped() -> None:
    cells = (TextCell("a|b"), TextCell("0.5", "[0.4, 0.6]", runs=("001-eval", "002-eval")))
    table = TextTable("name", "Title", ("state", "value"), (cells, (TextCell("c"), TextCell(""))), (False, True))
    assert table_lines(table) == [
        "## Title",
        "",
        "| state | value | runs |",
        "|---|---:|---|",
        "| a\\|b | 0.5 [0.4, 0.6] | 001-eval, 002-eval |",
        "| c |  |  |",
    ]


def test_differences_in_settings_are_listed_below_the_table(report: Report) -> None:
    table = report.tables[0]
    rows = (dataclasses.replace(table.rows[0], flags=("Measured with torch 1",)), *table.rows[1:])
    text = to_markdown(dataclasses.replace(report, tables=(dataclasses.replace(table, rows=rows),)))
    assert f"Not comparable with its baseline:\n\n- {rows[0].state}: Measured with torch 1\n" in text


def test_empty_sections_are_left_out(report: Report) -> None:
    bare = dataclasses.replace(report, figures=(), efficiency=(), problems=(), unfinished=())
    text = to_markdown(bare)
    assert "Left out" not in text
    assert "![" not in text
    assert "Training cost" not in text
    full = to_markdown(dataclasses.replace(report, unfinished=("007-fft: killed",), problems=("one", "two")))
    assert "## Not finished\n\n- 007-fft: killed\n\n## Left out\n\n- one\n- two\n" in full
