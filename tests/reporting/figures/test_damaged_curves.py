"""Training figures from damaged or incomplete run folders: the problems that are named, and the remaining lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.figures.curve_study import (
    figures_and_problems_of,
    figures_of,
    labels_of,
    points_of,
    write_study,
)
from tests.reporting.run_folders import make_samples, write_evaluation
from tests.reporting.training_runs import write_probe, write_training


@pytest.mark.parametrize(
    "damage",
    ['{"step": 0, "eval_loss": "high"}\n', "no json\n", '["step", "eval_loss"]\n', '{"eval_loss": 0.5}\n'],
)
def test_a_damaged_file_of_metrics_is_named_and_hides_no_other_run(tmp_path: Path, damage: str) -> None:
    write_study(tmp_path)
    (tmp_path / "002-fft" / "metrics.jsonl").write_text(damage, encoding="utf-8")
    [figure], [problem] = figures_and_problems_of(tmp_path)
    assert "002-fft" in problem
    assert "cannot be read" in problem
    assert labels_of(figure) == ["FFT", "random mask", "MFT", "best FFT"]


def test_a_training_with_options_of_another_version_is_named(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_training(tmp_path, 6, "", {0: 2.0, 10: 1.1}, status="running")
    path = tmp_path / "006-fft" / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["config"]["fft"]["method"] = "unheard of"
    path.write_text(json.dumps(record), encoding="utf-8")
    [_], [problem] = figures_and_problems_of(tmp_path)
    assert "006-fft" in problem


@pytest.mark.parametrize(
    "damage", [{"inputs": {}}, {"inputs": None}, {"config": []}, {"result": {"state": "MFT", "unmasked_loss": "high"}}]
)
@pytest.mark.parametrize("number", [2, 3])
def test_a_damaged_record_is_named_and_hides_no_other_run(tmp_path: Path, number: int, damage: dict[str, Any]) -> None:
    write_study(tmp_path)
    write_training(tmp_path, 5, "continued FFT", {0: 0.8, 10: 0.9}, parents=["001-fft"], before="FFT", stage="longer")
    [folder] = tmp_path.glob(f"{number:03d}-*")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps({**record, **damage}), encoding="utf-8")
    [figure], [problem] = figures_and_problems_of(tmp_path)
    assert folder.name in problem
    assert {"001-fft", "005-fft", "004-mask-train"} <= set(figure.runs)
    assert folder.name not in figure.runs


@pytest.mark.parametrize("damage", [{"inputs": {}}, {"inputs": {"parents": None}}, {"result": {}}, {"result": None}])
def test_a_damaged_evaluation_or_probe_hides_no_training(tmp_path: Path, damage: dict[str, Any]) -> None:
    write_study(tmp_path)
    evaluation = write_evaluation(tmp_path, 8, "MFT", ["001-fft", "003-mask-train"], make_samples(1, loss=1, correct=1))
    for folder in (evaluation, tmp_path / write_probe(tmp_path, 9, {"0-3": 0.1, "4-7": 0.2})):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        (folder / "run.json").write_text(json.dumps({**record, **damage}), encoding="utf-8")
    [figure] = figures_of(tmp_path)
    assert len(figure.runs) == 4


def test_a_mask_whose_model_is_missing_is_drawn_from_step_0_with_a_note(tmp_path: Path) -> None:
    on_fft: dict[str, Any] = {"command": "mask-train", "parents": ["001-fft"], "before": "FFT", "unmasked_loss": 0.7}
    write_training(tmp_path, 2, "MFT", {0: 0.7, 4: 0.6}, **on_fft)
    [figure], [problem] = figures_and_problems_of(tmp_path)
    assert "001-fft" in problem
    assert points_of(figure, "MFT") == pytest.approx({0: 0.0, 4: -0.1})
