from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mftctl.reporting.efficiency import Efficiency
from mftctl.reporting.output.text_tables import (
    TextCell,
    cell_text,
    change_header,
    change_texts,
    efficiency_text,
    flag_lines,
    metric_text,
    overview_text,
    title,
    value_text,
)
from mftctl.reporting.overview import Cell, Column, Overview, overviews
from mftctl.reporting.paired_change import Change
from mftctl.reporting.state_tables import MetricTable, Row, SeedResult
from tests.reporting.run_folders import compare_runs, write_experiment

BETTER = Change(-0.02, -0.03, -0.01, "better")
NOISE = Change(0.01, -0.01, 0.03, "within noise")


def make_row(change: Change | None = None, *, spread: float | None = None, is_baseline: bool = False) -> Row:
    return Row("MFT", 0.12345, spread, None, 10, (0,), is_baseline, change, ("004-eval",))


def make_table(metric: str, *rows: Row) -> MetricTable:
    return MetricTable("models/base", "test.jsonl", metric, "FFT", rows)


def make_efficiency(
    state: str, tokens_per_second: float, *, origin: str = "base", flops: float | None = 1.5e12
) -> Efficiency:
    return Efficiency(origin, state, 2.5, tokens_per_second, flops, 3_210_000_000, 4_000, 61.4, 1, (f"{state}-run",))


@pytest.mark.parametrize(("value", "arrow"), [(0.05, "↑ +0.0500"), (-0.05, "↓ -0.0500"), (0.0, "= +0.0000")])
def test_change_has_an_arrow_its_interval_and_a_verdict(value: float, arrow: str) -> None:
    change = Change(value, value - 0.01, value + 0.01, "better")
    interval = f"[{value - 0.01:+.4f}, {value + 0.01:+.4f}]"
    assert change_texts(change, is_baseline=False) == (f"{arrow} {interval}", "better")


def test_a_corrected_p_value_is_shown_where_it_differs() -> None:
    change = dataclasses.replace(BETTER, p_value=0.01, corrected_p_value=0.02)
    assert change_texts(change, is_baseline=False)[1] == "better (p = 0.01, corrected 0.02)"
    same = dataclasses.replace(BETTER, p_value=0.01, corrected_p_value=0.01)
    assert change_texts(same, is_baseline=False)[1] == "better (p = 0.01)"


def test_baseline_has_no_change_and_a_state_that_cannot_be_compared_says_so() -> None:
    assert change_texts(None, is_baseline=True) == ("", "")
    assert change_texts(None, is_baseline=False) == ("", "not comparable")


def test_value_has_its_spread_over_seeds() -> None:
    assert value_text(make_row()) == "0.1235"
    assert value_text(make_row(spread=0.02)) == "0.1235 ± 0.0200"


@pytest.mark.parametrize(("metric", "direction"), [("loss", "lower"), ("exact_match", "higher")])
def test_title_states_which_direction_is_better(metric: str, direction: str) -> None:
    table = make_table(metric, make_row())
    assert title(table) == f"{metric} on test.jsonl, {direction} is better (base)"
    assert change_header(table) == "change against FFT [95 %]"


def test_numbers_have_their_runs_and_significance() -> None:
    rows = metric_text(make_table("loss", make_row(is_baseline=True), make_row(BETTER), make_row(NOISE))).rows
    assert rows[1] == (
        TextCell("MFT"),
        TextCell("0.1235", runs=("004-eval",)),
        TextCell("↓ -0.0200 [-0.0300, -0.0100]", verdict="better", runs=("004-eval",)),
        TextCell("better", verdict="better"),
    )
    assert [row[2].verdict for row in rows] == ["", "better", ""]


def test_each_seed_has_a_line_on_request() -> None:
    by_seed = (SeedResult(0, 0.1, BETTER, "004-eval"), SeedResult(3, 0.2, NOISE, "009-eval"))
    row = dataclasses.replace(
        make_row(BETTER, spread=0.1), seeds=(0, 3), runs=("004-eval", "009-eval"), by_seed=by_seed
    )
    table = make_table("loss", row)
    assert len(metric_text(table).rows) == 1
    _, first, second = metric_text(table, by_seed=True).rows
    assert [cell.text for cell in first[:2]] == ["  seed 0", "0.1000"]
    assert [cell.text for cell in second] == ["  seed 3", "0.2000", "↑ +0.0100 [-0.0100, +0.0300]", "within noise"]
    assert second[1].runs == ("009-eval",)


def test_a_single_seed_has_no_separate_line() -> None:
    row = dataclasses.replace(make_row(BETTER), by_seed=(SeedResult(0, 0.1, BETTER, "004-eval"),))
    assert len(metric_text(make_table("loss", row), by_seed=True).rows) == 1


def test_notes_shared_by_several_states_are_shown_once() -> None:
    one, two = (dataclasses.replace(make_row(), state=name, flags=("other code", name)) for name in ("A", "B"))
    assert flag_lines(make_table("loss", one, two)) == [("A, B", "other code"), ("A", "A"), ("B", "B")]


def test_an_overview_marks_significant_changes() -> None:
    columns = (Column(None, "test.jsonl", "loss"), Column("math", "gsm8k", "exact_match"))
    cells = (Cell(0.5, BETTER, 0.01, ("004-eval",)), None)
    view = overview_text(Overview("models/base", columns, (("MFT", cells),)))
    assert view.columns == ("state", "test.jsonl, loss", "math: gsm8k, exact_match")
    assert view.rows == (
        (
            TextCell("MFT"),
            TextCell("0.5000 ± 0.0100 (-0.0200*)", "[-0.0300, -0.0100]", "better", ("004-eval",)),
            TextCell(""),
        ),
    )
    assert cell_text(Cell(0.5, NOISE)) == "0.5000 (+0.0100)"
    assert cell_text(Cell(0.5, None)) == "0.5000"


@pytest.mark.slow
def test_the_overview_of_runs_names_them(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    tables, _ = compare_runs(tmp_path)
    [overview] = overviews(tables)
    view = overview_text(overview)
    assert view.title == "All states of base"
    assert [row[1].runs for row in view.rows] == [row.runs for row in tables[0].rows]


def test_cost_is_shown_relative_to_fine_tuning() -> None:
    view = efficiency_text([make_efficiency("FFT", 1000.0), make_efficiency("MFT", 1500.0, flops=None)])
    assert [cell.text for cell in view.rows[0]] == ["FFT", "2.50", "1,000 (1.00×)", "4,000", "1.5e+12", "3.21", "61"]
    assert [cell.text for cell in view.rows[1]][2:5] == ["1,500 (1.50×)", "4,000", ""]
    assert view.rows[1][4].runs == ()
    assert view.rows[1][1].runs == ("MFT-run",)


def test_cost_names_the_models_where_there_are_several() -> None:
    view = efficiency_text(
        [make_efficiency("FFT", 10.0, origin="x/small"), make_efficiency("MFT", 20.0, origin="x/big")]
    )
    assert [row[0].text for row in view.rows] == ["FFT (small)", "MFT (big)"]
    assert view.rows[1][2].text == "20"
