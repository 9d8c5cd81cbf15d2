"""`mftctl report` on hand-written run folders: what the terminal shows and what it omits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.reporting.training_folders import write_study, write_training


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.slow
def test_the_terminal_shows_the_main_table_and_its_summary(mftctl: CommandLine) -> None:
    write_study(mftctl.folder / "runs")
    outcome = mftctl("report", "-o", "here")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.splitlines()[0].rstrip() == "All states of base"
    assert outcome.stdout.count("continued FFT") == 1
    messages = words(outcome.stderr)
    assert (
        "MFT changes loss on test.jsonl by -0.0609 [-0.0720, -0.0495] against FFT: better (60 samples, 2 seeds)."
        in messages
    )
    assert "Written: here/index.html, report.md, report.json, 8 table files, 2 figure files" in messages
    assert "Next: mftctl eval --tasks gsm8k" in messages
    assert (mftctl.folder / "here" / "index.html").is_file()


@pytest.mark.slow
def test_each_seed_is_shown_on_request(mftctl: CommandLine) -> None:
    write_study(mftctl.folder / "runs")
    outcome = mftctl("report", "--each-seed")
    assert outcome.stdout.count("seed 0") == outcome.stdout.count("seed 1") == 10


@pytest.mark.slow
def test_without_evaluations_the_cost_is_the_main_table(mftctl: CommandLine) -> None:
    write_training(mftctl.folder / "runs", 1, "fft", "FFT")
    outcome = mftctl("report")
    assert outcome.code == 0
    assert "Training cost" in outcome.stdout
    assert "No finished evaluation to compare yet; run mftctl eval" in words(outcome.stderr)


@pytest.mark.slow
def test_of_many_problems_the_first_are_listed_and_the_rest_counted(mftctl: CommandLine) -> None:
    runs = mftctl.folder / "runs"
    write_study(runs)
    for number in range(100, 115):
        (runs / f"{number}-eval").mkdir()
        (runs / f"{number}-eval" / "run.json").write_text("{", encoding="utf-8")
    outcome = mftctl("report", "--json")
    document = json.loads(outcome.stdout)
    damaged = [problem for problem in document["problems"] if "not a readable run folder" in problem]
    assert len(damaged) == 15
    assert outcome.stderr.count("Warning:") == 11
    assert f"{len(document['problems']) - 10} more warnings in the report" in words(outcome.stderr)


def test_a_read_only_folder_is_reported_before_any_work(mftctl: CommandLine, tmp_path: Path) -> None:
    write_study(mftctl.folder / "runs")
    (tmp_path / "file").write_text("", encoding="utf-8")
    outcome = mftctl("report", "-o", tmp_path / "file" / "report")
    assert outcome.code == 2
    assert "A parent folder of the output is a file" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
