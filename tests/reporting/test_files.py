from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.reporting.comparison import Change, MetricTable, Row, compare_runs
from mftctl.reporting.files import (
    change_header,
    change_texts,
    title,
    to_document,
    to_markdown,
    value_text,
    write_report,
)
from tests.reporting.run_folders import write_experiment

GOLDEN = Path(__file__).parent / "golden" / "report.md"


def make_row(change: Change | None = None, *, spread: float | None = None, is_baseline: bool = False) -> Row:
    return Row("MFT", 0.12345, spread, None, 10, (0,), is_baseline, change, ("004-eval",))


def make_table(metric: str, row: Row) -> MetricTable:
    return MetricTable("models/base", "test.jsonl", metric, "FFT", (row,))


def test_report_of_two_seeds_is_the_stored_one(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    (tmp_path / "030-eval").mkdir()
    tables, problems = compare_runs(tmp_path)
    text = to_markdown(tables, problems).replace(str(tmp_path), "runs")
    assert text == GOLDEN.read_text("utf-8")


def test_report_is_written_as_markdown_and_json_and_replaced(tmp_path: Path) -> None:
    write_experiment(tmp_path / "runs")
    tables, problems = compare_runs(tmp_path / "runs")
    folder = tmp_path / "new" / "report"
    for _ in range(2):
        files = write_report(tables, problems, folder)
    assert sorted(folder.iterdir()) == sorted(files) == [folder / "report.json", folder / "report.md"]
    assert (folder / "report.md").read_text("utf-8") == to_markdown(tables, problems)
    document = json.loads((folder / "report.json").read_text("utf-8"))
    assert document == json.loads(json.dumps(to_document(tables, problems)))
    assert [row["state"] for row in document["tables"][0]["rows"]] == [row.state for row in tables[0].rows]
    assert set(document["tables"][0]["rows"][-1]["change"]) == {
        "value",
        "low",
        "high",
        "verdict",
        "p_value",
        "corrected_p_value",
    }


@pytest.mark.parametrize(("value", "arrow"), [(0.05, "↑ +0.0500"), (-0.05, "↓ -0.0500"), (0.0, "= +0.0000")])
def test_change_has_an_arrow_its_interval_and_a_verdict(value: float, arrow: str) -> None:
    row = make_row(Change(value, value - 0.01, value + 0.01, "better"))
    interval = f"[{value - 0.01:+.4f}, {value + 0.01:+.4f}]"
    assert change_texts(row, make_table("loss", row)) == (f"{arrow} {interval}", "better")


def test_baseline_has_no_change_and_a_state_that_cannot_be_compared_says_so() -> None:
    baseline, other = make_row(is_baseline=True), make_row()
    assert change_texts(baseline, make_table("loss", baseline)) == ("", "")
    assert change_texts(other, make_table("loss", other)) == ("", "not comparable")


def test_value_has_its_spread_over_seeds() -> None:
    assert value_text(make_row()) == "0.1235"
    assert value_text(make_row(spread=0.02)) == "0.1235 ± 0.0200"


@pytest.mark.parametrize(("metric", "direction"), [("loss", "lower"), ("exact_match", "higher")])
def test_title_says_which_way_is_better(metric: str, direction: str) -> None:
    table = make_table(metric, make_row())
    assert title(table) == f"{metric} on test.jsonl, {direction} is better (base)"
    assert change_header(table) == "change against FFT [95 %]"


def test_what_was_left_out_stands_at_the_end() -> None:
    table = make_table("loss", make_row())
    assert "Left out" not in to_markdown([table], [])
    assert to_markdown([table], ["one", "two"]).endswith("\nLeft out:\n\n- one\n- two\n")
