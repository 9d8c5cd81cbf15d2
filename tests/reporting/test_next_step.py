from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mftctl.experiments.run_folder import list_runs
from mftctl.experiments.state_names import known_state
from mftctl.reporting.next_step import next_step
from mftctl.reporting.paired_change import Change
from mftctl.reporting.state_tables import MetricTable, Row
from mftctl.reporting.strongest_control import AgainstControl
from tests.reporting.training_folders import write_training

CHANGES = {
    "better": Change(-0.02, -0.03, -0.01, "better"),
    "worse": Change(0.02, 0.01, 0.03, "worse"),
    "within noise": Change(0.0, -0.01, 0.01, "within noise"),
}


def make_tables(
    verdict: str, *, seeds: int = 1, is_benchmark: bool = False, baseline: str = "FFT"
) -> list[MetricTable]:
    rows = (
        Row(baseline, 0.5, None, None, 10, (0,), True, None, ("003-eval",), made=known_state(baseline)),
        Row(
            "MFT (mft[ratio=0.1])",
            0.5,
            None,
            None,
            10,
            tuple(range(seeds)),
            False,
            CHANGES[verdict],
            ("004-eval",),
            made=known_state("MFT"),
        ),
    )
    return [MetricTable("models/base", "test", "loss", baseline, rows, is_benchmark)]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    write_training(tmp_path, 1, "fft", "FFT", recipe="my study", stage="fft")
    write_training(tmp_path, 2, "mask-train", "MFT", recipe="my study", stage="mft")
    return tmp_path


def test_first_comes_a_model_then_a_mask_then_an_evaluation(tmp_path: Path) -> None:
    assert next_step([], []).command == "mftctl fft"
    write_training(tmp_path, 1, "fft", "FFT")
    assert next_step([], list_runs(tmp_path)[0]).command == "mftctl mask-train"
    write_training(tmp_path, 2, "mask-train", "MFT", status="interrupted")
    assert next_step([], list_runs(tmp_path)[0]).command == "mftctl mask-train"
    write_training(tmp_path, 3, "mask-train", "MFT")
    assert next_step([], list_runs(tmp_path)[0]).command == "mftctl eval"


@pytest.mark.parametrize(
    ("tables", "command"),
    [
        (make_tables("worse"), "mftctl probe"),
        (make_tables("within noise"), "mftctl eval"),
        (make_tables("better"), "mftctl run 'my study' --set \"seeds=[0,1,2]\""),
        (make_tables("better", seeds=3), "mftctl eval --tasks gsm8k"),
        (make_tables("better", seeds=3, is_benchmark=True), "mftctl apply"),
        (make_tables("better", baseline="pre-trained"), "mftctl eval MODEL"),
    ],
)
def test_the_results_decide_the_next_step(trained: Path, tables: list[MetricTable], command: str) -> None:
    assert next_step(tables, list_runs(trained)[0]).command == command


def test_a_mask_compared_with_its_own_model_alone_wants_a_control(trained: Path) -> None:
    [table] = make_tables("better", seeds=3, is_benchmark=True)
    control = AgainstControl("FFT", CHANGES["better"], is_baseline=True)
    mask = dataclasses.replace(table.rows[1], against_control=control)
    alone = dataclasses.replace(table, rows=(table.rows[0], mask))
    assert next_step([alone], list_runs(trained)[0]).command == "mftctl fft --schedule constant --average ema"
    other = dataclasses.replace(table.rows[0], state="continued FFT", is_baseline=False)
    both = dataclasses.replace(table, rows=(table.rows[0], other, mask))
    assert next_step([both], list_runs(trained)[0]).command == "mftctl apply"


def test_a_mask_that_helps_on_one_of_two_is_not_a_failure(trained: Path) -> None:
    tables = [*make_tables("worse", seeds=3), *make_tables("better", seeds=3, is_benchmark=True)]
    assert next_step(tables, list_runs(trained)[0]).command == "mftctl apply"


def test_without_a_recipe_more_seeds_are_not_suggested(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "fft", "FFT")
    write_training(tmp_path, 2, "mask-train", "MFT")
    advice = next_step(make_tables("better", is_benchmark=True), list_runs(tmp_path)[0])
    assert advice.command == "mftctl apply"
    assert dataclasses.astuple(advice)[1].startswith("The mask helps")


@pytest.mark.parametrize(
    ("verdict", "relation"), [("worse", "better than"), ("within noise", "no worse than"), ("better", "")]
)
def test_a_mask_no_better_than_its_strongest_control_is_not_recommended(
    trained: Path, verdict: str, relation: str
) -> None:
    [table] = make_tables("better", seeds=3, is_benchmark=True)
    control = AgainstControl("continued FFT (averaged)", CHANGES[verdict], is_baseline=False)
    rows = (table.rows[0], dataclasses.replace(table.rows[1], against_control=control))
    advice = next_step([dataclasses.replace(table, rows=rows)], list_runs(trained)[0])
    if relation:
        assert advice.reason.startswith(f"A model without a mask, continued FFT (averaged), is {relation} MFT")
        assert advice.command == "mftctl report --each-seed"
    else:
        assert advice.command == "mftctl apply"


@pytest.mark.parametrize(("verdict", "retained"), [("worse", "better"), ("better", "worse")])
def test_the_loss_on_data_to_retain_does_not_decide(verdict: str, retained: str, trained: Path) -> None:
    runs = list_runs(trained)[0]
    tables = make_tables(verdict)
    kept = [dataclasses.replace(table, dataset="retained") for table in make_tables(retained)]
    assert next_step([*tables, *kept], runs) == next_step(tables, runs)
    assert next_step(kept, runs).command == "mftctl eval"
