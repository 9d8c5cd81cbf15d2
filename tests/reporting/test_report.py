"""Contents of a report, and its handling of bad input."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest

from mftctl.errors import RunError
from mftctl.progress import Silence
from mftctl.reporting.report import make_report
from tests.reporting.run_folders import make_samples, write_evaluation
from tests.reporting.training_folders import write_study, write_training


def change_record(folder: Path, **changes: object) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), encoding="utf-8")


@pytest.mark.slow
def test_every_part_of_a_study_is_reported(tmp_path: Path) -> None:
    write_study(tmp_path)
    report = make_report(tmp_path, Silence())
    assert [table.metric for table in report.tables] == ["loss", "exact_match"]
    assert len(report.overviews) == 1
    assert [entry.state for entry in report.efficiency] == ["FFT", "continued FFT", "MFT"]
    assert "loss-by-step" in [figure.name for figure in report.figures]
    assert report.unfinished == ()


@pytest.mark.slow
def test_the_runs_behind_all_numbers_are_named(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_training(tmp_path, 50, "fft", "FFT", status="interrupted")
    report = make_report(tmp_path, Silence())
    names = [source.name for source in report.sources]
    assert names == sorted(names)
    assert {"001-fft", "003-mask-train", "004-mask-train", "009-eval"} <= set(names)
    [source] = [source for source in report.sources if source.name == "009-eval"]
    assert (source.made, source.seed, source.folder) == ("measures MFT", 0, tmp_path / "009-eval")
    assert source.reproduction.startswith("mftctl eval ")
    [maker] = [source for source in report.sources if source.name == "004-mask-train"]
    assert maker.made == "makes MFT"


def test_no_runs_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to report") as caught:
        make_report(tmp_path / "none", Silence())
    assert (caught.value.actual, caught.value.hint) == ("no runs", "mftctl fft, or --runs DIR")


def test_only_unfinished_runs_are_one_clear_error_that_names_them(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "apply", "MFT", status="interrupted")
    with pytest.raises(RunError, match="no finished run") as caught:
        make_report(tmp_path, Silence())
    assert caught.value.actual == "001-apply: interrupted"


def test_trainings_alone_are_reported_without_a_comparison(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "fft", "FFT")
    report = make_report(tmp_path, Silence())
    assert report.tables == ()
    assert report.advice.command == "mftctl mask-train"
    assert [entry.state for entry in report.efficiency] == ["FFT"]


@pytest.mark.slow
def test_unfinished_runs_are_listed_with_the_command_to_resume(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_training(tmp_path, 30, "fft", "FFT", status="interrupted")
    write_training(tmp_path, 31, "mask-train", "MFT", status="running")
    write_training(tmp_path, 32, "fft", "FFT", status="failed", error="The loss is no number.\n  where: here")
    mine = write_training(tmp_path, 33, "apply", "MFT", status="running")
    change_record(mine, worker=f"{platform.node()}:{os.getppid()}")
    assert make_report(tmp_path, Silence()).unfinished == (
        "032-fft: failed: The loss is no number.",
        f"031-mask-train: killed; mftctl mask-train --resume --runs {tmp_path} resumes the latest run of this command",
        f"030-fft: interrupted; mftctl fft --resume --runs {tmp_path} resumes the latest run of this command",
        "033-apply: running now",
    )


@pytest.mark.slow
def test_of_many_unfinished_runs_the_newest_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    write_study(tmp_path)
    for number in range(100, 130):
        write_training(tmp_path, number, "fft", "FFT", status="interrupted" if number % 2 else "running")
    lines = make_report(tmp_path, Silence()).unfinished
    assert len(lines) == 11
    assert lines[0].startswith("129-fft: interrupted")
    assert lines[-1] == "older runs: 10 interrupted, 10 killed"


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", "[]", '{"command": "eval"}', "null", "\x00"])
def test_a_damaged_record_is_named_and_hides_no_other(tmp_path: Path, content: str) -> None:
    write_study(tmp_path)
    before = make_report(tmp_path, Silence())
    (tmp_path / "040-eval").mkdir()
    (tmp_path / "040-eval" / "run.json").write_text(content, encoding="utf-8")
    report = make_report(tmp_path, Silence())
    assert report.tables == before.tables
    assert [problem for problem in report.problems if "040-eval" in problem] == [
        f"{tmp_path / '040-eval' / 'run.json'}: This is not a readable run folder."
    ]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["result", "inputs", "config"])
def test_a_record_with_a_part_of_the_wrong_type_is_named_and_hides_no_other(tmp_path: Path, key: str) -> None:
    write_study(tmp_path)
    before = make_report(tmp_path, Silence())
    for number, command in ((41, "eval"), (42, "fft"), (43, "mask-train"), (44, "probe")):
        folder = tmp_path / f"{number:03d}-{command}"
        write_training(tmp_path, number, command, "MFT")
        change_record(folder, **{key: ["no mapping"]})
    report = make_report(tmp_path, Silence())
    assert [row.value for table in report.tables for row in table.rows] == [
        row.value for table in before.tables for row in table.rows
    ]
    for name in ("041-eval", "042-fft", "043-mask-train", "044-probe"):
        assert any(name in problem for problem in report.problems), name


@pytest.mark.slow
def test_results_measured_differently_are_flagged(tmp_path: Path) -> None:
    write_study(tmp_path)
    folder = write_evaluation(
        tmp_path, 60, "MFT", ["001-fft", "004-mask-train"], make_samples(5, loss=0.25, correct=0.7), stage="mft"
    )
    change_record(folder, versions={"torch": "1.0"})
    for number in (6, 16):
        change_record(tmp_path / f"{number:03d}-eval", versions={"torch": "2.0"})
    rows = {row.state: row for row in make_report(tmp_path, Silence()).tables[0].rows}
    assert any("torch 1.0" in flag for flag in rows["MFT"].flags)
    assert rows["FFT"].flags == ()
