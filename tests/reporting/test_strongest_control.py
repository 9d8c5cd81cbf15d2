from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mftctl.reporting.output.text_tables import metric_text
from mftctl.reporting.state_tables import MetricTable, Row
from tests.reporting.run_folders import compare_runs, make_samples, write_evaluation
from tests.reporting.training_folders import write_training

MASK = ["001-fft", "004-mask-train"]


def write_study(root: Path, *, averaged: float, mask: float = 0.2, seed: int = 0, first: int = 10) -> None:
    """Evaluations of FFT, two continuations, a random mask and a learned mask, by their losses."""
    states = [
        ("FFT", "fft", ["001-fft"], 0.3),
        ("continued FFT", "fft annealed", ["001-fft", "002-fft"], 0.26),
        ("continued FFT", "fft averaged", ["001-fft", "003-fft"], averaged),
        ("random mask", "random", ["001-fft", "005-mask-train"], 0.35),
        ("MFT", "mft", MASK, mask),
    ]
    for offset, (state, stage, parents, loss) in enumerate(states):
        samples = make_samples(offset + first, loss=loss, correct=1.0 - loss)
        write_evaluation(root, first + offset, state, parents, samples, seed=seed, stage=stage, recipe="r")


def table_of(root: Path, metric: str = "loss") -> MetricTable:
    tables, problems = compare_runs(root)
    assert problems == []
    [table] = [table for table in tables if table.metric == metric]
    return table


def row_of(table: MetricTable, state: str) -> Row:
    [row] = [row for row in table.rows if row.state == state]
    return row


@pytest.mark.parametrize(
    ("averaged", "control", "verdict"),
    [
        (0.1, "continued FFT (fft averaged)", "worse"),
        (0.4, "continued FFT (fft annealed)", "better"),
    ],
)
def test_a_mask_is_compared_with_the_best_plain_training(
    tmp_path: Path, averaged: float, control: str, verdict: str
) -> None:
    write_study(tmp_path, averaged=averaged)
    table = table_of(tmp_path)
    row = row_of(table, "MFT")
    assert row.change is not None
    assert row.change.verdict == "better"
    found = row.against_control
    assert found is not None
    assert (found.control, found.change.verdict, found.is_baseline) == (control, verdict, False)
    assert found.change.value == pytest.approx(row.value - row_of(table, control).value)
    assert row_of(table, "random mask").against_control is not None
    assert [row.state for row in table.rows if row.against_control is None] == [
        "FFT",
        "continued FFT (fft annealed)",
        "continued FFT (fft averaged)",
    ]


def test_higher_is_better_for_other_metrics(tmp_path: Path) -> None:
    write_study(tmp_path, averaged=0.1)
    found = row_of(table_of(tmp_path, "exact_match"), "MFT").against_control
    assert found is not None
    assert found.control == "continued FFT (fft averaged)"


def test_the_baseline_may_be_the_strongest(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 10, "FFT", ["001-fft"], make_samples(1, loss=0.3, correct=0.5), stage="fft")
    write_evaluation(tmp_path, 11, "MFT", MASK, make_samples(2, loss=0.25, correct=0.5), stage="mft")
    row = row_of(table_of(tmp_path), "MFT")
    assert row.against_control is not None
    assert (row.against_control.control, row.against_control.is_baseline) == ("FFT", True)
    assert row.against_control.change == row.change


def test_another_fine_tuning_of_the_same_data_is_a_control_of_its_own(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 10, "FFT", ["001-fft"], make_samples(1, loss=0.3, correct=0.5), stage="fft", recipe="r")
    strong = make_samples(2, loss=0.1, correct=0.5)
    write_evaluation(tmp_path, 11, "FFT", ["002-fft"], strong, stage="strong", recipe="r")
    write_evaluation(tmp_path, 12, "MFT", MASK, make_samples(3, loss=0.25, correct=0.5), stage="mft", recipe="r")
    table = table_of(tmp_path)
    row = row_of(table, "MFT")
    assert row.change is not None
    assert row.change.verdict == "better"
    assert row.against_control is not None
    assert (row.against_control.control, row.against_control.is_baseline) == ("FFT (strong)", False)
    assert row.against_control.change.verdict == "worse"
    assert row.against_control.change.value == pytest.approx(row.value - row_of(table, "FFT (strong)").value)


def test_a_control_must_have_seen_the_same_data_with_every_seed(tmp_path: Path) -> None:
    write_study(tmp_path, averaged=0.1)
    write_study(tmp_path, averaged=0.1, seed=1, first=30)
    fewer = make_samples(3, loss=0.05, correct=0.9)
    for number, keys in ((50, {"stage": "few seeds"}), (51, {"stage": "other data", "data": "other.jsonl"})):
        write_evaluation(tmp_path, number, "continued FFT", ["001-fft", f"0{number}-fft"], fewer, recipe="r", **keys)
    found = row_of(table_of(tmp_path), "MFT").against_control
    assert found is not None
    assert found.control == "continued FFT (fft averaged)"


def test_without_a_fine_tuned_model_there_is_no_control(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 10, "pre-trained", [], make_samples(1, loss=0.3, correct=0.5))
    write_evaluation(tmp_path, 11, "MFT", ["004-mask-train"], make_samples(2, loss=0.25, correct=0.5))
    table = table_of(tmp_path)
    assert row_of(table, "MFT").against_control is None
    assert metric_text(table).columns == ("state", "value", "change against pre-trained [95 %]", "verdict")


def test_a_mask_of_a_given_model_is_compared_with_that_model_and_with_its_controls(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"recipe": "r", "origin": "models/tuned"}
    chosen = {"decides": {"the stage before": ["one", "two"]}, **keys}
    base, other = make_samples(1, loss=0.3, correct=0.5), make_samples(4, loss=0.27, correct=0.5)
    write_evaluation(tmp_path, 10, "pre-trained", [], base, **keys)
    write_evaluation(tmp_path, 11, "MFT", ["001-mask-train"], make_samples(2, loss=0.2, correct=0.5), **keys)
    averaged = make_samples(3, loss=0.1, correct=0.5)
    write_evaluation(tmp_path, 12, "FFT", ["002-fft"], averaged, stage="model averaged", **chosen)
    write_evaluation(tmp_path, 13, "FFT", ["003-fft"], other, stage="model annealed", **chosen)
    table = table_of(tmp_path)
    assert table.baseline == "pre-trained"
    row = row_of(table, "MFT")
    assert row.change is not None
    assert row.change.value == pytest.approx(row.value - row_of(table, "pre-trained").value)
    assert row.against_control is not None
    assert (row.against_control.control, row.against_control.change.verdict) == ("FFT (model averaged)", "worse")
    assert row.against_control.change.value == pytest.approx(row.value - row_of(table, "FFT (model averaged)").value)


def test_both_changes_are_in_the_table(tmp_path: Path) -> None:
    write_study(tmp_path, averaged=0.1)
    text = metric_text(table_of(tmp_path))
    assert text.columns[2:] == (
        "change against FFT [95 %]",
        "verdict",
        "change against the strongest control [95 %]",
        "verdict",
    )
    assert len(text.is_numeric) == len(text.columns)
    [row] = [row for row in text.rows if row[0].text == "MFT"]
    assert (row[3].text, row[4].detail, row[5].text) == ("better", "against continued FFT (fft averaged)", "worse")
    assert [cell.text for cell in text.rows[0][4:]] == ["", ""]


def test_a_control_may_have_another_rate_for_each_seed(tmp_path: Path) -> None:
    for seed, rate in ((0, "0.1"), (1, "0.3")):
        first = 10 * seed
        fft, control, mask = f"{first:03d}-fft", f"{first + 1:03d}-fft", f"{first + 2:03d}-mask-train"
        tuned = {"loss": 0.3, "correct": 0.5}
        write_training(tmp_path, first, "fft", "FFT", stage="fft", recipe="r", seed=seed)
        write_training(
            tmp_path, first + 1, "fft", "continued FFT", stage=f"fft annealed[{rate}]", recipe="r", seed=seed
        )
        write_evaluation(tmp_path, first + 3, "FFT", [fft], make_samples(first, **tuned), seed=seed, recipe="r")
        write_evaluation(
            tmp_path,
            first + 4,
            "continued FFT",
            [fft, control],
            make_samples(first + 1, loss=0.1, correct=0.5),
            seed=seed,
            stage="fft annealed",
            recipe="r",
            decides={"the stage before": ["digest", "other"]},
        )
        samples = make_samples(first + 2, loss=0.2, correct=0.5)
        write_evaluation(tmp_path, first + 5, "MFT", [fft, mask], samples, seed=seed, stage="mft", recipe="r")
    table = table_of(tmp_path)
    assert row_of(table, "continued FFT").seeds == (0, 1)
    found = row_of(table, "MFT").against_control
    assert found is not None
    assert (found.control, found.change.verdict) == ("continued FFT", "worse")
