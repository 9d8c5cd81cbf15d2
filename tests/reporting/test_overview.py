"""All states on all benchmarks: one column per benchmark, ordered by domain, with several trainings side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from mftctl.reporting.output.text_tables import overview_text
from mftctl.reporting.overview import Cell, Column, Overview, overviews
from tests.reporting.run_folders import compare_runs, make_samples, write_evaluation

FFT = make_samples(1, loss=0.3, correct=0.5)
MFT = make_samples(2, loss=0.2, correct=0.9)


def overview_of(root: Path) -> Overview:
    tables, problems = compare_runs(root)
    assert problems == []
    [overview] = overviews(tables)
    return overview


def write_domain(root: Path, first: int, recipe: str) -> None:
    """Writes FFT and MFT of one domain, each on a maths benchmark, a code benchmark and a data file."""
    made_by: list[str] = []
    for stage, state, samples in (("fft", "FFT", FFT), ("mft", "MFT", MFT)):
        made_by = [*made_by, f"{first:03d}-{'fft' if stage == 'fft' else 'mask-train'}"]
        for offset, task in enumerate(("humaneval", "gsm8k", None)):
            number = first + 10 * len(made_by) + offset
            options = {"recipe": recipe, "data": f"{recipe}.jsonl", "task": task, "digest": str(task)}
            write_evaluation(root, number, state, made_by, samples, stage=stage, **options)


def test_a_benchmark_has_one_column_and_a_data_file_all_of_its_metrics_domain_by_domain(tmp_path: Path) -> None:
    write_domain(tmp_path, 100, "maths")
    assert overview_of(tmp_path).columns == (
        Column(None, "test.jsonl", "loss"),
        Column(None, "test.jsonl", "exact_match"),
        Column("math", "gsm8k", "loss"),
        Column("coding", "humaneval", "loss"),
    )


def test_cells_are_those_of_the_tables(tmp_path: Path) -> None:
    write_domain(tmp_path, 100, "maths")
    tables, _ = compare_runs(tmp_path)
    overview = overview_of(tmp_path)
    for place, column in enumerate(overview.columns):
        [table] = [table for table in tables if (table.dataset, table.metric) == (column.dataset, column.metric)]
        assert [cells[place] for _, cells in overview.rows] == [
            Cell(row.value, row.change, row.spread, row.runs, row.against) for row in table.rows
        ]


@pytest.mark.slow
def test_each_domain_is_compared_with_its_own_fine_tuning(tmp_path: Path) -> None:
    write_domain(tmp_path, 100, "maths")
    write_domain(tmp_path, 200, "code")
    overview = overview_of(tmp_path)
    assert [state for state, _ in overview.rows] == [
        "FFT (maths: fft)",
        "MFT (maths: mft)",
        "FFT (code: fft)",
        "MFT (code: mft)",
    ]
    changes = [cells[0].change for _, cells in overview.rows if cells[0] is not None]
    assert changes[1] == changes[3]
    assert changes[1] is not None
    assert changes[1].verdict == "better"
    tables, _ = compare_runs(tmp_path)
    assert [row.runs for row in tables[0].rows][::2] == [("110-eval",), ("210-eval",)]


def test_other_methods_belong_to_the_fine_tuning_on_their_data(tmp_path: Path) -> None:
    write_domain(tmp_path, 100, "maths")
    write_domain(tmp_path, 200, "code")
    shifted = [(nll + tokens, tokens, right) for nll, tokens, right in FFT]
    write_evaluation(tmp_path, 300, "FFT", ["290-fft"], shifted, stage="f", recipe="more", data="more.jsonl")
    run = {"stage": "gmt", "recipe": "more", "data": "more.jsonl"}
    (tmp_path / "291-fft").mkdir()
    (tmp_path / "291-fft" / "run.json").write_text(
        '{"command": "fft", "status": "finished", "started": "", "config": {}, "result": {"state": "GMT"}}'
    )
    write_evaluation(tmp_path, 301, "GMT", ["291-fft"], FFT, **run)
    tables, problems = compare_runs(tmp_path)
    assert problems == []
    [table] = [
        table for table in tables if (table.dataset, table.metric) == ("test.jsonl", "loss") and len(table.rows) == 2
    ]
    assert [row.state for row in table.rows] == ["FFT (f)", "GMT"]
    assert table.rows[1].change is not None
    assert table.rows[1].change.value == pytest.approx(-1)


def test_of_two_measurements_the_one_on_more_samples_counts(tmp_path: Path) -> None:
    write_domain(tmp_path, 100, "maths")
    more = make_samples(3, loss=0.3, correct=0.5, samples=90)
    options = {"recipe": "maths", "data": "maths.jsonl", "task": "gsm8k", "digest": "all"}
    write_evaluation(tmp_path, 300, "FFT", ["100-fft"], more, stage="fft", **options)
    overview = overview_of(tmp_path)
    [cells] = [cells for state, cells in overview.rows if state == "FFT"]
    cell = cells[[column.dataset for column in overview.columns].index("gsm8k")]
    assert cell is not None
    assert cell.value == pytest.approx(sum(nll for nll, _, _ in more) / sum(tokens for _, tokens, _ in more))


def test_a_single_value_needs_no_overview(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 1, "FFT", ["001-fft"], FFT, task="gsm8k")
    tables, _ = compare_runs(tmp_path)
    assert overviews(tables) == []


def test_a_state_that_was_not_measured_has_an_empty_cell(tmp_path: Path) -> None:
    write_domain(tmp_path, 100, "maths")
    write_evaluation(
        tmp_path, 400, "continued FFT", ["100-fft", "130-fft"], FFT, task="gsm8k", digest="gsm8k", data="maths.jsonl"
    )
    overview = overview_of(tmp_path)
    assert [(state, [cell is None for cell in cells]) for state, cells in overview.rows] == [
        ("FFT", [False] * 4),
        ("continued FFT", [True, True, False, True]),
        ("MFT", [False] * 4),
    ]


def test_its_text_marks_significant_changes(tmp_path: Path) -> None:
    write_domain(tmp_path, 100, "maths")
    text = overview_text(overview_of(tmp_path))
    assert text.columns[-2:] == ("math: gsm8k, loss", "coding: humaneval, loss")
    [row] = [cells for cells in text.rows if cells[0].text == "MFT"]
    assert ["*" in cell.text for cell in row[1:]] == [True] * 4
