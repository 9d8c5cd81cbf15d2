from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path

import pytest

from mftctl.progress import Silence
from mftctl.reporting.output.table_files import table_files, to_csv, to_latex
from mftctl.reporting.output.text_tables import TextCell, TextTable
from mftctl.reporting.report import Report, make_report
from tests.reporting.training_folders import write_study


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    root = tmp_path_factory.mktemp("study") / "runs"
    write_study(root)
    return make_report(root, Silence())


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Writes the table files to a folder."""
    for name, text in table_files(report).items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in table_files(report)]


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


@pytest.mark.slow
def test_every_table_has_a_latex_and_a_csv_file(report: Report, tmp_path: Path) -> None:
    files = write_tables(report, tmp_path)
    names = ["all-states-of-base", "exact-match-on-test-jsonl-base", "loss-on-test-jsonl-base", "efficiency"]
    assert sorted(file.name for file in files) == sorted(f"{name}{end}" for name in names for end in (".csv", ".tex"))
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_csv_has_full_precision_and_one_line_per_seed(report: Report, tmp_path: Path) -> None:
    write_tables(report, tmp_path)
    rows = read(tmp_path / "loss-on-test-jsonl-base.csv")
    [table] = [table for table in report.tables if table.metric == "loss"]
    assert [row["seed"] for row in rows] == ["mean", "0", "1"] * 5
    mean, first, second = rows[-3:]
    mft = table.rows[-1]
    assert mft.change is not None
    assert mean["state"] == "MFT"
    assert (float(mean["value"]), float(mean["change"])) == (mft.value, mft.change.value)
    assert (float(mean["change_low"]), mean["verdict"]) == (mft.change.low, mft.change.verdict)
    assert mean["runs"] == "009-eval;019-eval"
    assert (first["runs"], second["runs"]) == ("009-eval", "019-eval")
    assert float(mean["value"]) == pytest.approx((float(first["value"]) + float(second["value"])) / 2)
    baseline = rows[3]
    assert (baseline["state"], baseline["change"], baseline["verdict"]) == ("FFT", "", "")


def test_the_overview_and_the_cost_are_tables_too(report: Report, tmp_path: Path) -> None:
    write_tables(report, tmp_path)
    overview = read(tmp_path / "all-states-of-base.csv")
    assert len(overview) == 10
    assert {row["metric"] for row in overview} == {"loss", "exact_match"}
    cost = read(tmp_path / "efficiency.csv")
    assert [row["state"] for row in cost] == ["FFT", "continued FFT", "MFT"]
    assert float(cost[0]["tokens_per_second"]) == report.efficiency[0].tokens_per_second


def test_tables_of_one_name_do_not_replace_each_other(report: Report, tmp_path: Path) -> None:
    one = report.tables[0]
    twice = dataclasses.replace(report, tables=(one, dataclasses.replace(one, rows=one.rows[:1])), overviews=())
    names = [file.name for file in write_tables(twice, tmp_path)]
    assert len(names) == len(set(names)) == 6


def test_latex_is_for_booktabs_and_escaped() -> None:
    cells = (TextCell("MFT_1 & 2"), TextCell("0.5 ± 0.1 (-0.1*)", "[-0.2, -0.1]"), TextCell("↓ 3×"))
    table = TextTable("name", "Title", ("state", "loss, 95 %", "change"), (cells,), (False, True, True))
    assert to_latex(table) == (
        "\\begin{tabular}{lrr}\n\\toprule\nstate & loss, 95 \\% & change \\\\\n\\midrule\n"
        "MFT\\_1 \\& 2 & 0.5 $\\pm$ 0.1 (-0.1*) [-0.2, -0.1] & $\\downarrow$ 3$\\times$ \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_csv_quotes_special_characters() -> None:
    [row] = csv.DictReader(io.StringIO(to_csv([{"state": 'a, "b"', "runs": ("1", "2"), "value": 0.1 + 0.2}])))
    assert row == {"state": 'a, "b"', "runs": "1;2", "value": "0.30000000000000004"}
