"""The table and the figure of trainings on preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mftctl.experiments.run_folder import list_runs
from mftctl.progress import Silence
from mftctl.reporting.figures.curves import curve_figures
from mftctl.reporting.output.markdown import to_markdown
from mftctl.reporting.output.table_files import table_files
from mftctl.reporting.output.write import to_document
from mftctl.reporting.preferences import preference_rows
from mftctl.reporting.report import make_report
from mftctl.reporting.strongest_control import same_objective
from tests.reporting.training_folders import write_training
from tests.reporting.training_runs import write_training as write_curve


def learned(accuracy: float, loss: float, **more: Any) -> dict[str, Any]:
    rewards = {"chosen": 0.2, "rejected": -0.3, "accuracy": accuracy, "margin": 0.5}
    return {"best_loss": loss, "rewards": rewards, **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A fine-tuning, two seeds of DPO on it, and a mask."""
    write_training(tmp_path, 1, "fft", "FFT", stage="fft", recipe="study")
    common = {"parents": ["001-fft"], "recipe": "study"}
    for number, seed, accuracy, loss in ((2, 0, 0.1, 0.9), (3, 0, 0.6, 0.66), (4, 1, 0.7, 0.64)):
        result = learned(accuracy, loss)
        write_training(tmp_path, number, "fft", "DPO", stage="dpo", seed=seed, result=result, **common)
    write_training(tmp_path, 5, "mask-train", "MFT DPO", stage="mask", result=learned(0.65, 0.67), **common)
    return tmp_path


def test_the_newest_run_of_each_seed_is_averaged(root: Path) -> None:
    dpo, mask = preference_rows(list_runs(root)[0])
    assert (dpo.state, dpo.runs, dpo.seeds) == ("DPO", ("003-fft", "004-fft"), (0, 1))
    assert (dpo.loss, dpo.accuracy, dpo.margin) == pytest.approx((0.65, 0.65, 0.5))
    assert dpo.spread == pytest.approx(0.01414, abs=1e-5)
    assert dpo.accuracy_spread == pytest.approx(0.0707, abs=1e-4)
    assert (mask.state, mask.spread) == ("MFT DPO", None)


def test_the_last_checkpoint_has_its_own_loss(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "fft", "DPO", result=learned(0.6, 0.6, kept="last", last_loss=0.68))
    [row] = preference_rows(list_runs(tmp_path)[0])
    assert row.loss == 0.68


def test_the_table_is_in_all_outputs(root: Path) -> None:
    report = make_report(root, Silence())
    text = to_markdown(report)
    assert "| DPO | 0.6500 ± 0.0141 | 65.0% ± 7.1 | +0.5000 | +0.2000 | -0.3000 | 003-fft, 004-fft |" in text
    assert "ln 2 = 0.6931" in text
    assert [row["state"] for row in to_document(report)["preferences"]] == ["DPO", "MFT DPO"]
    assert "0;1" in table_files(report)["preferences.csv"]


def test_losses_of_preferences_have_their_own_figure(tmp_path: Path) -> None:
    write_curve(tmp_path, 1, "FFT", {0: 2.0, 4: 1.0}, stage="fft")
    for number, state in ((2, "DPO"), (3, "GMT DPO")):
        write_curve(
            tmp_path,
            number,
            state,
            {0: 0.69, 4: 0.6},
            stage=state,
            parents=["001-fft"],
            before="FFT",
            validation="pairs",
        )
    figures, problems = curve_figures(list_runs(tmp_path)[0])
    assert problems == []
    titles = {figure.title: figure for figure in figures}
    assert len(titles) == 2
    figure = next(one for title, one in titles.items() if "preferences" in title)
    assert "0.6931" in figure.caption
    assert set(figure.runs) == {"002-fft", "003-fft"}


def test_controls_are_trained_for_thesame_objective() -> None:
    assert same_objective("DPO", "MFT DPO")
    assert same_objective("continued FFT", "MFT")
    assert not same_objective("DPO", "MFT")
    assert not same_objective("continued FFT", "MFT DPO")
