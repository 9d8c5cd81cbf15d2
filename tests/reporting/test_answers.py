"""Problems won and lost against the baseline, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mftctl.experiments.run_folder import list_runs
from mftctl.progress import Silence
from mftctl.reporting.answers import SHOWN_ANSWERS, AnswerChanges, answer_changes
from mftctl.reporting.output.page import to_page
from mftctl.reporting.output.write import write_report
from mftctl.reporting.report import make_report
from tests.reporting.run_folders import write_evaluation

FFT = ["001-fft"]
MFT = [*FFT, "003-mask-train"]


def evaluation(
    root: Path,
    number: int,
    state: str,
    parents: list[str],
    right: list[bool],
    *,
    stage: str | None = None,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """An evaluation whose answers name the state, with the problems that it solves."""
    samples = [(1.0, 2, float(one)) for one in right]
    folder = write_evaluation(root, number, state, parents, samples, stage=stage, seed=seed)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row |= {
            "prompt": f"question {index}",
            "reference": f"reference {index}",
            "output": f"{state} {index}",
            **fields,
        }
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def changes(root: Path) -> list[AnswerChanges]:
    found, problems = answer_changes(list_runs(root)[0])
    assert problems == []
    return found


def test_won_and_lost(tmp_path: Path) -> None:
    evaluation(tmp_path, 2, "FFT", FFT, [True, True, False, False])
    evaluation(tmp_path, 4, "MFT", MFT, [True, False, True, False])
    [found] = changes(tmp_path)
    assert (found.baseline, found.state, found.samples, found.metric) == ("FFT", "MFT", 4, "exact_match")
    assert [(one.id, one.before, one.after) for one in found.won] == [("2", "FFT 2", "MFT 2")]
    assert [(one.id, one.prompt, one.reference) for one in found.lost] == [("1", "question 1", "reference 1")]
    assert found.title == "test.jsonl: MFT against FFT, seed 0: 1 won, 1 lost of 4 (exact_match)"
    assert found.runs == ("002-eval", "004-eval")
    lines = [json.loads(line) for line in found.lines().splitlines()]
    assert [line["change"] for line in lines] == ["won", "lost"]


def test_states_are_called_as_in_the_tables(tmp_path: Path) -> None:
    evaluation(tmp_path, 2, "FFT", FFT, [True, False])
    evaluation(tmp_path, 4, "MFT", MFT, [True, True], stage="all")
    evaluation(tmp_path, 6, "MFT", [*FFT, "005-mask-train"], [False, True], stage="low")
    assert [(found.state, len(found.won), len(found.lost)) for found in changes(tmp_path)] == [
        ("MFT (all)", 1, 0),
        ("MFT (low)", 1, 1),
    ]


def test_a_pre_trained_model_is_compared_with_the_baseline_of_its_seed(tmp_path: Path) -> None:
    for seed in range(2):
        evaluation(tmp_path, 10 * seed, "pre-trained", [], [False, False], seed=seed)
        evaluation(
            tmp_path, 10 * seed + 2, "FFT", [f"{10 * seed + 1:03d}-fft"], [True, seed == 1], seed=seed, stage="fft"
        )
    assert [(found.seed, len(found.lost)) for found in changes(tmp_path)] == [(0, 1), (1, 2)]


def test_a_pre_trained_model_of_another_seed_is_compared_with_all(tmp_path: Path) -> None:
    evaluation(tmp_path, 1, "pre-trained", [], [False, False], seed=5)
    evaluation(tmp_path, 3, "FFT", ["002-fft"], [True, False], seed=0, stage="fft")
    evaluation(tmp_path, 5, "FFT", ["004-fft"], [True, True], seed=1, stage="fft")
    assert [(found.seed, len(found.lost)) for found in changes(tmp_path)] == [(5, 1), (5, 2)]


def test_answers_that_were_not_generated(tmp_path: Path) -> None:
    evaluation(tmp_path, 2, "FFT", FFT, [True, False])
    evaluation(tmp_path, 4, "MFT", MFT, [False, True], output=None)
    assert changes(tmp_path) == []


def test_evaluations_of_other_samples_are_not_paired(tmp_path: Path) -> None:
    evaluation(tmp_path, 2, "FFT", FFT, [True, False])
    evaluation(tmp_path, 4, "MFT", MFT, [True, False, True])
    assert changes(tmp_path) == []


def test_scores_between_0_and_1_are_no_wins(tmp_path: Path) -> None:
    for number, state, parents in ((2, "FFT", FFT), (4, "MFT", MFT)):
        folder = evaluation(tmp_path, number, state, parents, [True, False])
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        rows[0]["scores"]["exact_match"] = 0.5
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert changes(tmp_path) == []


def test_an_unreadable_file_is_a_problem(tmp_path: Path) -> None:
    evaluation(tmp_path, 2, "FFT", FFT, [True, False])
    (evaluation(tmp_path, 4, "MFT", MFT, [True, False]) / "samples.jsonl").write_text("{")
    found, problems = answer_changes(list_runs(tmp_path)[0])
    assert found == []
    assert any("004-eval" in line for line in problems)


def test_the_page_shows_the_first_ones_cut_and_the_files_have_all(tmp_path: Path) -> None:
    many = SHOWN_ANSWERS + 7
    evaluation(tmp_path / "runs", 2, "FFT", FFT, [False] * many)
    evaluation(tmp_path / "runs", 4, "MFT", MFT, [True] * many, prompt="<script>alert(1)</script>" + "x" * 700)
    report = make_report(tmp_path / "runs", Silence())
    page = to_page(report, {}, tmp_path / "report")
    assert page.count('<dl class="answer">') == SHOWN_ANSWERS
    assert f"Won: {many}, the first {SHOWN_ANSWERS} shown" in page
    assert "(125 more characters)" in page
    assert "<script>" not in page
    paths = write_report(report, tmp_path / "report", Silence())
    [file] = [path for path in paths if path.parent.name == "answers"]
    assert file.name == "test-jsonl-mft-seed-0.jsonl"
    assert len(file.read_text().splitlines()) == many
    document = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [(one["won"], one["lost"]) for one in document["answers"]] == [(many, 0)]
    assert "MFT against FFT, seed 0: 57 won, 0 lost of 57" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize("prompt", [None, "asked"])
def test_a_prompt_that_was_not_saved(tmp_path: Path, prompt: str | None) -> None:
    evaluation(tmp_path / "runs", 2, "FFT", FFT, [False])
    evaluation(tmp_path / "runs", 4, "MFT", MFT, [True], prompt=prompt)
    page = to_page(make_report(tmp_path / "runs", Silence()), {}, tmp_path)
    assert ("prompt not saved" in page) == (prompt is None)
