"""A report on a runs folder with special files in place of regular ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mftctl.errors import OutputError
from mftctl.progress import Silence
from mftctl.reporting.output.write import write_report
from mftctl.reporting.report import make_report
from mftctl.reporting.watch import Following
from tests.reporting.training_folders import write_study

pytestmark = pytest.mark.timeout(60)


def replaced_by_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "samples.jsonl", "mask.bits"])
def test_a_report_names_each_special_file_and_reports_the_rest(tmp_path: Path, name: str) -> None:
    root = tmp_path / "runs"
    write_study(root)
    chosen = next(folder for folder in sorted(root.iterdir()) if (folder / name).exists() or name == "mask.bits")
    if name == "mask.bits":
        chosen = next(folder for folder in sorted(root.iterdir()) if folder.name.endswith("-mask-train"))
    replaced_by_fifo(chosen / name)
    report = make_report(root, Silence())
    assert any(chosen.name in problem for problem in report.problems), report.problems
    assert all("\n" not in problem for problem in report.problems)
    assert report.tables


@pytest.mark.slow
def test_a_fifo_in_place_of_an_earlier_reports_document(tmp_path: Path) -> None:
    write_study(tmp_path / "runs")
    (tmp_path / "report").mkdir()
    os.mkfifo(tmp_path / "report" / "report.json")
    with pytest.raises(OutputError, match="would be replaced") as caught:
        write_report(make_report(tmp_path / "runs", Silence()), tmp_path / "report", Silence())
    assert caught.value.actual == "report.json"


def test_watching_counts_it_as_unreadable(tmp_path: Path) -> None:
    write_study(tmp_path)
    chosen = sorted(tmp_path.iterdir())[0]
    replaced_by_fifo(chosen / "run.json")
    following = Following(tmp_path)
    assert following.refresh()
    assert following.unreadable == (chosen.name,)
